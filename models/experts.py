"""The experts of Hugging Face MoE models, computed by :func:`qllm_ops.moe`.

transformers asks a function registered under a name for the experts' output, in every forward pass
of every layer. Ours is registered as "qllm" when this package is imported. It first recognises the
layout of the module, and refuses what `moe` does not compute: an experts class says what it does in a
handful of flags, in its gating method and in its own forward, and a function that ignores one of them
returns plausible nonsense. So flags say how the weights lie, trying the gating says which activation it
is, and the class's own forward, on a few small tensors, says whether that was all.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import math
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
from transformers.integrations.moe import ExpertsInterface

from qllm_ops import (
    ACTIVATIONS,
    Activation,
    MoeRun,
    PriorityFlag,
    QuantizedWeight,
    moe,
    moe_reference,
    warm_up,
)
from qllm_ops.inputs import DTYPES, Weight
from qllm_ops.library import kept, uncompiled
from qllm_ops.modes import asked_for_gradients, refusing_gradients
from qllm_ops.moe import check_flag

from .projections import SCALES, UNUSED, stored_weight

NAME = "qllm"
"""The experts implementation's name, as in ``from_pretrained(..., experts_implementation="qllm")``."""

GRANULARITIES = ("tile", "layer", None)


class UnsupportedExpertsError(NotImplementedError):
    """An experts layout that `moe` would compute wrongly. ``reasons`` says what is not supported."""

    def __init__(self, message: str, reasons: tuple[str, ...] = ()):
        super().__init__(message)
        self.reasons = reasons


# -- who may be preempted ---------------------------------------------------------------------------


@dataclass
class Preemption:
    """Which flag the experts of a forward pass listen to, and how.

    Attributes:
        flag: the flag, or None: never stand still.
        priority: the class that the pass belongs to.
        granularity: "tile": leave at the next tile, mid-layer. "layer": look at the flag once per MoE
            layer, just before its experts, which then run to the end. None: do not look at the flag
            inside the pass.
        wasted_tiles: how many tiles the passes left halfway, to be computed again. Not counted under a
            stream gate, where nobody asks the device.
    """

    flag: PriorityFlag | None = None
    priority: int = 0
    granularity: str | None = "tile"
    wasted_tiles: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.granularity not in GRANULARITIES:
            raise ValueError(f'granularity must be "tile", "layer" or None, got {self.granularity!r}')
        device = self.flag.words.device if isinstance(self.flag, PriorityFlag) else torch.device("cpu")
        check_flag(self.flag, self.priority, device)


_override: ContextVar[Preemption | None] = ContextVar("qllm_preemption", default=None)


@contextlib.contextmanager
def preemptible(
    flag: PriorityFlag | None, priority: int = 0, granularity: str | None = "tile"
) -> Iterator[Preemption]:
    """Make every experts call of this thread's body listen to ``flag`` as class ``priority``.

    It goes before what was given to `install`, whatever the model; ``flag=None`` means that the body
    is never preempted. The innermost body wins. A new thread starts outside of every body, one that is
    given a copy of the context (``asyncio.to_thread``) in the same one. What is yielded belongs to this
    body alone, and counts its ``wasted_tiles``.
    """
    preemption = Preemption(flag, priority, granularity)
    token = _override.set(preemption)
    try:
        yield preemption
    finally:
        _override.reset(token)


def current_preemption() -> Preemption | None:
    """What the innermost :func:`preemptible` body of this thread says; None outside of all of them."""
    return _override.get()


_warming: ContextVar[tuple[PriorityFlag | None, int, set] | None] = ContextVar("qllm_warming", default=None)


@contextlib.contextmanager
def warming_up(flag: PriorityFlag | None, priority: int = 0) -> Iterator[None]:
    """Make every experts call of this thread's body first load the kernels that calls like it may need.

    One forward pass in the body, and no later pass loads a kernel: that would wait for the whole
    device, paused work included (:func:`qllm_ops.warm_up`). The passes meant are those with ``flag``
    and ``priority``, and those with no flag.
    """
    token = _warming.set((flag, priority, set()))
    try:
        yield
    finally:
        _warming.reset(token)


# -- the experts function ---------------------------------------------------------------------------


@dataclass(frozen=True)
class ExpertsSettings:
    """What `install` was told about one experts module."""

    preemption: Preemption
    backend: str
    fp8_activations: bool = False


NOT_INSTALLED = ExpertsSettings(Preemption(), "auto")
SETTINGS: weakref.WeakKeyDictionary[nn.Module, ExpertsSettings] = weakref.WeakKeyDictionary()
"""Kept beside the modules and not on them: a flag holds a lock, and models are copied and pickled."""

_calls: ContextVar[set[int] | None] = ContextVar("qllm_calls", default=None)


@contextlib.contextmanager
def recorded_calls() -> Iterator[set[int]]:
    """Collect the ids of the experts modules that the body really calls, in this thread."""
    calls: set[int] = set()
    token = _calls.set(calls)
    try:
        yield calls
    finally:
        _calls.reset(token)


def experts_forward(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """What transformers calls in place of the experts class's own forward.

    Args:
        module: the experts module.
        hidden_states: (T, H).
        top_k_index: (T, K), integer; an index outside [0, E) is skipped.
        top_k_weights: (T, K).

    Returns:
        (T, H) in the dtype of hidden_states. May stand still while the class is paused.

    Raises:
        UnsupportedExpertsError: the module's layout is not one that `moe` computes.
    """
    if kept():  # A number of this process would be another module's elsewhere: the weights go along.
        if torch.compiler.is_dynamo_compiling():
            raise ValueError("strict must be False in torch.export of a model with our experts, got True")
        return _experts_forward(module, hidden_states, top_k_index, top_k_weights)
    if torch.compiler.is_compiling() and getattr(module, HANDLE, None) is not None:
        number = getattr(module, HANDLE).number
        output = torch.ops.qllm_ops.experts(
            hidden_states.detach(), top_k_index, top_k_weights.detach(), number
        )
    else:
        output = uncompiled(_experts_forward, module, hidden_states, top_k_index, top_k_weights)
    return refusing_gradients(output, asked_for_gradients((hidden_states, top_k_weights), (module,)))


def _experts_forward(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    layout = experts_layout(module)
    calls = _calls.get()
    if calls is not None:
        calls.add(id(module))
    settings = SETTINGS.get(module, NOT_INSTALLED)
    preemption = _override.get() or settings.preemption
    flag = preemption.flag
    if flag is not None and preemption.granularity != "tile":
        if preemption.granularity == "layer":
            flag.wait(preemption.priority)
        flag = None
    tensors = (hidden_states, *layout.weights(module), top_k_index, top_k_weights)
    options = {**layout.options(module), "backend": settings.backend}
    options["fp8_activations"] = settings.fp8_activations
    if _warming.get() is not None:
        _warm_up(tensors, options)
    if flag is None or flag.gate == "stream" or kept():  # where `moe` refuses a flag
        output = moe(*tensors, **options, flag=flag, priority=preemption.priority)
    else:
        run = MoeRun(*tensors, **options, flag=flag, priority=preemption.priority)
        while not run.step():
            flag.wait(preemption.priority)
        preemption.wasted_tiles += run.tiles_taken - run.tiles_done
        output = run.output
    return output


# -- under torch.compile ------------------------------------------------------------------------------

HANDLE = "_qllm_handle"


class Handle:
    """What a compiled graph knows a module by. A copy of the module gets none: it is another module."""

    def __init__(self, module: nn.Module):
        self.number = next(_numbers)
        NUMBERED[self.number] = module

    def __reduce__(self) -> tuple:  # for copy and pickle alike
        return _no_handle, ()


def _no_handle() -> None:
    """What a copy gets. A pickle names this function, so that whoever reads it registers "qllm", too."""


NUMBERED: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()
_numbers = itertools.count()


@torch.library.custom_op("qllm_ops::experts", mutates_args=())
def experts_op(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, module: int) -> Tensor:
    """The experts of one module, opaque: its layout, its flag and its weights are looked up when it runs."""
    experts = NUMBERED.get(module)
    if experts is None:
        raise RuntimeError(f"a compiled graph refers to experts module {module}, which no longer exists")
    return _experts_forward(experts, hidden_states, top_k_index, top_k_weights)


@experts_op.register_fake
def _(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, module: int) -> Tensor:
    return hidden_states.new_empty(hidden_states.shape)


def _warm_up(tensors: tuple[Weight, ...], options: dict[str, Any]) -> None:
    """Once for all modules that differ in their weights only."""
    flag, priority, done = _warming.get()
    hidden_states, top_k_index = tensors[0], tensors[3]
    alike = (
        (hidden_states.device, hidden_states.dtype, top_k_index.shape[1]),
        *(_kind(x) for x in tensors[1:3]),
        *((x.shape[1:], x.dtype) for x in tensors[3:]),
        *(_kind(value) for value in options.values()),
    )
    if alike not in done and len(hidden_states):
        done.add(alike)
        warm_up(*tensors, **options, flag=flag, priority=priority)


def _kind(value: Any) -> Any:
    """What a kernel is compiled for: a tensor's shape, and whether there is a function."""
    if isinstance(value, QuantizedWeight):
        return (value.shape, value.format, value.block, value.scales.dtype, value.zeros is None)
    if isinstance(value, Tensor):
        return (value.shape, value.dtype)
    return "function" if callable(value) and not isinstance(value, Activation) else value


# Both registries: the experts of a model quantised to FP8 ask the second one.
ExpertsInterface.register(NAME, experts_forward)
FP8ExpertsInterface.register(NAME, experts_forward)


# -- recognising a layout ---------------------------------------------------------------------------


@dataclass(frozen=True)
class ExpertsLayout:
    """How an experts module lies, in the words of `moe`.

    Attributes:
        activation: what the kernels compute; None: the module's own method, unfused.
        act_fn: the one that the activation was found for.
        stored: where an adapted class keeps its two weights; None: under the usual names.
    """

    activation: Activation | None
    gated: bool
    interleaved: bool
    transposed: bool
    has_bias: bool
    has_norm: bool
    act_fn: Any
    weights_on_input: bool = False
    stored: Callable[[nn.Module], tuple[Tensor, Tensor]] | None = None

    @property
    def first(self) -> str:
        return "gate_up_proj" if self.gated else "up_proj"

    def weights(self, module: nn.Module) -> tuple[Weight, Weight]:
        if self.stored:
            return self.stored(module)
        return stored_weight(module, self.first), stored_weight(module, "down_proj")

    def sizes(self, module: nn.Module) -> tuple[int, int, int]:
        """E, H and I."""
        num_experts, rows, columns = self.weights(module)[1].shape
        return (num_experts, columns, rows) if self.lies_transposed(module) else (num_experts, rows, columns)

    def lies_transposed(self, module: nn.Module) -> bool:
        """Quantised weights lie in rows, however the class has dense ones."""
        return self.transposed and isinstance(self.weights(module)[1], Tensor)

    def options(self, module: nn.Module) -> dict[str, Any]:
        """What `moe` is told besides tensors of the batch and weights."""
        options: dict[str, Any] = {
            "activation": self.activation or (module._apply_gate if self.gated else module.act_fn),
            "gated": self.gated,
            "interleaved": self.interleaved,
            "transposed": self.lies_transposed(module),
        }
        if self.has_bias:
            options["gate_up_bias"] = getattr(module, self.first + "_bias")
            options["down_bias"] = module.down_proj_bias
        if self.weights_on_input:
            options["weights_on_input"] = True
        if self.has_norm:
            options["expert_norm"] = module.post_expert_norm
        return options

    def __str__(self) -> str:
        act = self.activation
        words = ["own activation (not fused)" if act is None else act.kind]
        if act is not None and not act.plain:
            named = {"alpha": (act.alpha, 1.0), "limit": (act.limit, None), "up_offset": (act.up_offset, 0.0)}
            changed = [f"{name}={value:g}" for name, (value, usual) in named.items() if value != usual]
            words = [f"{act.kind}({', '.join(changed)})"]
        for said, word in (
            (not self.gated, "no gate"), (self.interleaved, "interleaved"), (self.transposed, "transposed"),
            (self.has_bias, "biases"), (self.has_norm, "a norm after each expert"),
            (self.weights_on_input, "weights on the input"),
        ):  # fmt: skip
            words += [word] * said
        return ", ".join(words)


ADAPTED: dict[str, Any] = {}
"""Classes that transformers does not dispatch and `adapters` does, by name; filled there."""

UNSUITED = {
    "DogeCDMoE": "its experts are rows of two embeddings, found by product keys, and no matrices",
    "Mxfp4GptOssExperts": "its weights lie as transformers' kernels want them; qllm_ops.models.load(folder) "
    "reads them as they lie in the checkpoint",
    "NllbMoeExperts": "its forward takes the router's 0-1 mask for expert numbers, so that experts 0 and 1 "
    "compute every token whatever was chosen",
    "VitPoseBackboneMoeMLP": "an expert is one linear layer, chosen by the data set and not by a router",
}
"""MoE modules of transformers that are no experts of `moe`, and why."""

OTHER = ("JetMoeMoA",)
"""Modules with experts of attention projections: no MLP, computed by their own forward."""

_layouts: weakref.WeakKeyDictionary[nn.Module, ExpertsLayout] = weakref.WeakKeyDictionary()


def is_dispatched(module: nn.Module) -> bool:
    """Whether transformers looks up an experts function in the forward of this module's class."""
    return hasattr(module, "is_transposed") and hasattr(type(module).forward, "__wrapped__")


def experts_layout(module: nn.Module) -> ExpertsLayout:
    """The layout of an experts module, found once per module.

    Raises:
        UnsupportedExpertsError: names the class and everything about it that is not supported.
    """
    layout, adapter = _layouts.get(module), ADAPTED.get(type(module).__name__)
    act_fn = adapter.activation_of(module) if adapter else getattr(module, "act_fn", None)
    if layout is not None and layout.act_fn is act_fn:
        return layout
    if adapter:
        layout = _layouts[module] = adapter.layout(module)
        setattr(module, HANDLE, Handle(module))
        return layout
    layout = ExpertsLayout(
        activation=None,
        gated=getattr(module, "has_gate", True),
        interleaved=False,
        transposed=getattr(module, "is_transposed", False),
        has_bias=getattr(module, "has_bias", False),
        has_norm=getattr(module, "has_post_expert_norm", False),
        act_fn=act_fn,
    )
    reasons = _declared_differences(module, layout)
    if not reasons:
        gating = getattr(module, "_apply_gate", None) if layout.gated else layout.act_fn
        activation, interleaved = find_activation(gating, module, layout.gated)
        layout = replace(layout, activation=activation, interleaved=interleaved)
        reasons = _observed_difference(module, layout)
    if reasons:
        raise UnsupportedExpertsError(
            f"{type(module).__name__} is not supported by qllm-ops: {'; '.join(reasons)}", tuple(reasons)
        )
    _layouts[module] = layout
    if getattr(module, HANDLE, None) is None:
        setattr(module, HANDLE, Handle(module))
    return layout


def _declared_differences(module: nn.Module, layout: ExpertsLayout) -> list[str]:
    """What the module's class and tensors say that `moe` does not do."""
    if not is_dispatched(module):
        name = type(module).__name__
        return [UNSUITED.get(name, "transformers never asks an experts function for this class")]
    tensors = dict([*module.named_parameters(), *module.named_buffers()])
    projections = (layout.first, "down_proj")
    biases = [name + "_bias" for name in projections] if layout.has_bias else []
    reasons = []
    known = {*biases, *(name + suffix for name in projections for suffix in ("", SCALES, UNUSED))}
    parts = tuple(name + "." for name in [*projections, *["post_expert_norm"] * layout.has_norm])
    unknown = sorted(name for name in tensors.keys() - known if not name.startswith(parts))
    if unknown:
        reasons.append(f"tensors that would be ignored: {', '.join(unknown)}")
    if any(name.startswith("parametrizations.") for name in unknown):  # peft: in the body of its forward
        reasons.append("call install before the first forward pass of a model whose experts are adapted")
    for name in projections:
        try:
            weight = stored_weight(module, name) if hasattr(module, name) else None
        except (TypeError, ValueError) as error:
            reasons.append(f"{name}: {error}")
            continue
        if not isinstance(weight, QuantizedWeight):
            reasons += _tensor_differences(name, weight, 3)
    for name in biases:
        reasons += _tensor_differences(name, tensors.get(name), 2)
    if layout.has_norm and not callable(getattr(module, "post_expert_norm", None)):
        reasons.append("no post_expert_norm")
    if not reasons:
        num_experts, hidden_size, intermediate_size = layout.sizes(module)
        columns = intermediate_size * (2 if layout.gated else 1)
        wanted = (columns, hidden_size)[:: -1 if layout.lies_transposed(module) else 1]
        got, down = (tuple(weight.shape) for weight in layout.weights(module))
        if got != (num_experts, *wanted):
            reasons.append(f"{layout.first} is {got} beside down_proj {down}")
    return reasons


def _tensor_differences(name: str, tensor: Tensor | None, rank: int) -> list[str]:
    if tensor is None:
        return [f"no {name}"]
    if type(tensor) not in (nn.Parameter, Tensor):
        return [f"{name} is a {type(tensor).__name__}, not a plain tensor"]
    if tensor.dtype not in DTYPES:
        perhaps = "" if tensor.dtype == torch.float64 else " (quantised?)"
        return [f"{name} has dtype {tensor.dtype}, wanted float32, bfloat16 or float16{perhaps}"]
    if tensor.dim() != rank:
        return [f"{name} has shape {tuple(tensor.shape)}, wanted {rank} dimensions"]
    return []


def find_activation(
    gating: Callable[[Tensor], Tensor], module: nn.Module, gated: bool
) -> tuple[Activation | None, bool]:
    """The activation that a module's gating is, by trying it, and whether gate and up alternate.

    None if it is none that the kernels compute; then the module's own method is called.
    """
    device = _compute_device(module)
    # Around zero the activations differ; far out a clamp or a soft cap shows, on gate or on up.
    wide = {"dtype": torch.float64, "device": "cpu"}  # whatever the user's defaults are
    near, far = torch.linspace(-8, 8, 385, **wide), torch.logspace(0, 4.8, 40, **wide)
    gate = torch.cat([near, far, -far]).repeat(7)
    up = torch.tensor([1.0, -0.5, 3.0, 300.0, -300.0, 6e4, -6e4], **wide)
    up = up.repeat_interleave(len(gate) // 7)
    for interleaved in (False, True) if gated else (False,):

        def ask(gate: Tensor, up: Tensor, interleaved: bool = interleaved) -> Tensor:
            if not gated:
                return gating(gate[None].to(device)).double().cpu()[0]
            both = torch.stack([gate, up], -1).flatten() if interleaved else torch.cat([gate, up])
            return gating(both[None].to(device)).double().cpu()[0]

        try:
            with torch.no_grad():
                got = ask(gate, up)
                candidates = _fit(ask) if gated else [Activation(kind) for kind in ACTIVATIONS]
        except Exception:  # a gating that cannot even be asked is not one of ours
            continue
        if got.shape != gate.shape:
            continue
        for activation in candidates:
            want = activation(gate, up) if gated else activation(None, gate)
            size = (1 + gate.abs()) * (1 + up.abs()) if gated else (1 + gate.abs()) ** 2
            if ((got - want).abs() <= 1e-5 * size).all():
                return activation, interleaved
    return None, False


def _fit(ask: Callable[[Tensor, Tensor], Tensor]) -> list[Activation]:
    """Activations that agree with a gating at gate 1; which one it is shows elsewhere."""
    one = torch.ones(1, dtype=torch.float64, device="cpu")
    at_zero, at_one, far_out = (ask(one, up * one).item() for up in (0.0, 1.0, 1e6))
    act_of_one = at_one - at_zero  # act(1) * (1 + offset) - act(1) * offset
    if not (math.isfinite(far_out) and act_of_one > 0):
        return []
    offset = round(at_zero / act_of_one, 5)
    limit = round(far_out / act_of_one - offset, 5)
    options = {"limit": None if limit > 0.99e6 else limit, "up_offset": offset}
    if options["limit"] is not None and limit <= 0:
        return []
    found = [Activation(kind, **options) for kind in ACTIVATIONS]
    if 0 < act_of_one < 1:
        alpha = round(math.log(act_of_one / (1 - act_of_one)), 5)
        found.append(Activation("silu", alpha=alpha, **options))
    return found


def _observed_difference(module: nn.Module, layout: ExpertsLayout) -> list[str]:
    """Whether the class's own forward and `moe_reference` agree on a few small tensors.

    Catches what no flag declares: a clamp, a norm or a scale written into forward itself, routing
    weights applied to the input. The module's own weights are not touched, so it costs milliseconds.
    """
    device = _compute_device(module)
    random = torch.Generator().manual_seed(0)
    num_experts, hidden_size, _ = layout.sizes(module)
    num_experts, intermediate_size = min(3, num_experts), 8
    num_tokens, top_k = 6, min(2, num_experts)
    if not layout.has_norm:  # whose own weights say how long a row is
        hidden_size = 8
    columns = intermediate_size * (2 if layout.gated else 1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float32, device="cpu").to(device)

    order = -1 if layout.transposed else 1
    small = copy.copy(module)
    small._parameters = {
        **module._parameters,  # scales of quantised weights, which its forward looks up and does not need
        layout.first: nn.Parameter(normal(num_experts, *(columns, hidden_size)[::order])),
        "down_proj": nn.Parameter(normal(num_experts, *(hidden_size, intermediate_size)[::order])),
    }
    if layout.has_bias:
        small._parameters[layout.first + "_bias"] = nn.Parameter(normal(num_experts, columns))
        small._parameters["down_proj_bias"] = nn.Parameter(normal(num_experts, hidden_size))
    hidden_states = normal(num_tokens, hidden_size)
    hidden_states[1::2] *= 100  # far enough to meet a clamp
    choices = [torch.randperm(num_experts, generator=random, device="cpu")[:top_k] for _ in range(num_tokens)]
    top_k_index, top_k_weights = torch.stack(choices).to(device), normal(num_tokens, top_k)
    try:
        with torch.no_grad():
            # transformers wraps FP8Experts once more for every layer.
            own = inspect.unwrap(type(module).forward)(small, hidden_states, top_k_index, top_k_weights)
            ours = moe_reference(
                hidden_states, *layout.weights(small), top_k_index, top_k_weights, **layout.options(small)
            )
    except Exception as error:
        return [f"its forward could not be compared with ours ({type(error).__name__}: {error})"]
    # Loose, because a GPU may be set to compute float32 products in TF32.
    if own.shape == ours.shape and ((own - ours).abs() <= 1e-2 * ours.abs().amax(1, keepdim=True)).all():
        return []
    return ["its own forward computes something else on the same tensors"]


def _compute_device(module: nn.Module) -> torch.device:
    """Where to try things out: the module's device, or the CPU for a module without memory yet."""
    tensor = first_tensor(module)
    return torch.device("cpu") if tensor is None or tensor.is_meta else tensor.device


def first_tensor(module: nn.Module) -> Tensor | None:
    """Of its parameters, or, where all its weights are quantised, of its buffers."""
    return next(itertools.chain(module.parameters(), module.buffers()), None)
