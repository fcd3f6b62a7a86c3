"""The experts of Hugging Face MoE models, computed by :func:`qllm_ops.moe`.

transformers asks a function registered under a name for the experts' output, in every forward pass
of every layer. Ours is registered as "qllm" when this package is imported. It first recognises the
layout of the module, and refuses the ones that `moe` does not compute: an experts class says what
it does in a handful of flags, in its gating method and in its own forward, and a function that
ignores one of them returns plausible nonsense.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
from transformers.integrations.moe import ExpertsInterface

from qllm_ops import MoeRun, PriorityFlag, moe, moe_reference, warm_up
from qllm_ops.inputs import DTYPES
from qllm_ops.moe import check_flag

NAME = "qllm"
"""The experts implementation's name, as in ``from_pretrained(..., experts_implementation="qllm")``."""

GRANULARITIES = ("tile", "layer", None)
SUPPORTED = "gate_up_proj (E, 2I, H) as [gate; up], down_proj (E, H, I), no biases, silu, gelu or gelu_tanh"


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
        wasted_tiles: how many tiles the passes took and threw away; 0, or a kernel is broken.
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
    is never preempted. The innermost body wins. A new thread starts outside of every body. What is
    yielded belongs to this body alone, and counts its ``wasted_tiles``.
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
    tensors = (hidden_states, module.gate_up_proj, module.down_proj, top_k_index, top_k_weights)
    options = {"activation": layout.activation, "backend": settings.backend}
    if _warming.get() is not None:
        _warm_up(tensors, options)
    if flag is None:
        output = moe(*tensors, **options)
    else:
        run = MoeRun(*tensors, **options, flag=flag, priority=preemption.priority)
        while not run.step():
            flag.wait(preemption.priority)
        preemption.wasted_tiles += run.tiles_taken - run.tiles_done
        output = run.output
    if torch.is_grad_enabled() and hidden_states.requires_grad:
        return _NoGradient.apply(output, hidden_states)
    return output


def _warm_up(tensors: tuple[Tensor, ...], options: dict[str, str]) -> None:
    """Once for all modules that differ in their weights only."""
    flag, priority, done = _warming.get()
    hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights = tensors
    weights = (gate_up_proj.shape, down_proj.shape, hidden_states.dtype)
    routing = (top_k_index.shape[1], top_k_index.dtype, top_k_weights.dtype)
    alike = (hidden_states.device, weights, routing, *options.values())
    if alike not in done and len(hidden_states):
        done.add(alike)
        warm_up(*tensors, **options, flag=flag, priority=priority)


class _NoGradient(torch.autograd.Function):
    """Lets a forward pass in grad mode through, and refuses to make up its gradient."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, hidden_states: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(
            'experts_implementation="qllm" is for inference and has no backward pass; '
            "uninstall(model), or train with another experts implementation"
        )


# Both registries: a model quantised to FP8 asks the second one, and gets a refusal that names it.
ExpertsInterface.register(NAME, experts_forward)
FP8ExpertsInterface.register(NAME, experts_forward)


# -- recognising a layout ---------------------------------------------------------------------------


@dataclass(frozen=True)
class ExpertsLayout:
    """An experts module that `moe` computes: its activation, and what the answer was found for."""

    activation: str
    act_fn: Any


_layouts: weakref.WeakKeyDictionary[nn.Module, ExpertsLayout] = weakref.WeakKeyDictionary()


def is_dispatched(module: nn.Module) -> bool:
    """Whether transformers looks up an experts function in the forward of this module's class."""
    return hasattr(module, "is_transposed") and hasattr(type(module).forward, "__wrapped__")


def experts_layout(module: nn.Module) -> ExpertsLayout:
    """The layout of an experts module, found once per module.

    Raises:
        UnsupportedExpertsError: names the class and everything about it that is not supported.
    """
    layout = _layouts.get(module)
    if layout is not None and layout.act_fn is getattr(module, "act_fn", None):
        return layout
    reasons = _declared_differences(module)
    activation = None
    if is_dispatched(module) and module.has_gate:
        activation = _find_activation(module)
        if activation is None:
            act_fn = getattr(module, "act_fn", None)
            name = "" if act_fn is None else f", act_fn {getattr(act_fn, '__name__', type(act_fn).__name__)}"
            reasons.append(f"its gating is not silu, gelu or gelu_tanh of gate, times up (_apply_gate{name})")
    if not reasons:
        reasons += _observed_difference(module, activation)
    if reasons:
        raise UnsupportedExpertsError(
            f"{type(module).__name__} is not supported by qllm-ops: {'; '.join(reasons)}. "
            f"Supported: {SUPPORTED}",
            tuple(reasons),
        )
    layout = _layouts[module] = ExpertsLayout(activation, getattr(module, "act_fn", None))
    return layout


def _declared_differences(module: nn.Module) -> list[str]:
    """What the module's flags and tensors say that `moe` does not do."""
    if not is_dispatched(module):
        return ["transformers never asks an experts function for this class"]
    reasons = []
    for flag, usual, reason in (
        ("has_gate", True, "no gate (up_proj only)"),
        ("has_bias", False, "biases"),
        ("is_transposed", False, "transposed weights"),
        ("is_concatenated", True, "interleaved gate and up"),
        ("has_post_expert_norm", False, "a norm after each expert"),
    ):
        if getattr(module, flag, usual) != usual:
            reasons.append(reason)
    if reasons:
        return reasons
    tensors = dict([*module.named_parameters(), *module.named_buffers()])
    unknown = sorted(tensors.keys() - {"gate_up_proj", "down_proj"})
    if unknown:
        reasons.append(f"tensors that would be ignored: {', '.join(unknown)}")
    for name in ("gate_up_proj", "down_proj"):
        reasons += _tensor_differences(name, tensors.get(name))
    if not reasons:
        gate_up, down = tensors["gate_up_proj"].shape, tensors["down_proj"].shape
        if gate_up != (down[0], 2 * down[2], down[1]):
            reasons.append(f"gate_up_proj is {tuple(gate_up)} beside down_proj {tuple(down)}")
    return reasons


def _tensor_differences(name: str, tensor: Tensor | None) -> list[str]:
    if tensor is None:
        return [f"no {name}"]
    if type(tensor) not in (nn.Parameter, Tensor):
        return [f"{name} is a {type(tensor).__name__}, not a plain tensor"]
    if tensor.dtype not in DTYPES:
        return [f"{name} has dtype {tensor.dtype}, wanted float32, bfloat16 or float16 (quantised?)"]
    if tensor.dim() != 3:
        return [f"{name} has shape {tuple(tensor.shape)}, wanted 3 dimensions"]
    return []


def _find_activation(module: nn.Module) -> str | None:
    """The activation for which ``_apply_gate`` is activation(gate) * up, by trying it; None if none is."""
    apply_gate = getattr(module, "_apply_gate", None)
    if apply_gate is None:
        return None
    # Around zero the activations differ; far out a clamp or a soft cap shows, on gate or on up.
    near = torch.linspace(-8, 8, 385)
    far = torch.logspace(0, 4.8, 40)
    gate = torch.cat([near, far, -far]).repeat(7)
    up = torch.tensor([1.0, -0.5, 3.0, 300.0, -300.0, 6e4, -6e4]).repeat_interleave(len(gate) // 7)
    gate, up = gate[None].to(_compute_device(module)), up[None].to(_compute_device(module))
    try:
        with torch.no_grad():
            got = apply_gate(torch.cat([gate, up], dim=-1))
    except Exception:  # a gating that cannot even be asked is not one of ours
        return None
    if not isinstance(got, Tensor) or got.shape != gate.shape:
        return None
    for activation, act in (
        ("silu", F.silu),
        ("gelu", F.gelu),
        ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
    ):
        if ((got - act(gate) * up).abs() <= 1e-5 * (1 + gate.abs()) * up.abs()).all():
            return activation
    return None


def _observed_difference(module: nn.Module, activation: str) -> list[str]:
    """Whether the class's own forward and `moe_reference` agree on a few small tensors.

    Catches what no flag declares: a clamp, a norm or a scale written into forward itself, routing
    weights applied to the input. The module's own weights are not touched, so it costs milliseconds.
    """
    device = _compute_device(module)
    random = torch.Generator().manual_seed(0)
    num_experts = min(3, module.down_proj.shape[0])
    num_tokens, top_k, size = 6, min(2, num_experts), 8

    small = copy.copy(module)
    small._parameters = {
        "gate_up_proj": nn.Parameter(torch.randn(num_experts, 2 * size, size, generator=random).to(device)),
        "down_proj": nn.Parameter(torch.randn(num_experts, size, size, generator=random).to(device)),
    }
    hidden_states = torch.randn(num_tokens, size, generator=random).to(device)
    hidden_states[1::2] *= 100  # far enough to meet a clamp
    choices = [torch.randperm(num_experts, generator=random)[:top_k] for _ in range(num_tokens)]
    top_k_index = torch.stack(choices).to(device)
    top_k_weights = torch.randn(num_tokens, top_k, generator=random).to(device)
    try:
        with torch.no_grad():
            own = type(module).forward.__wrapped__(small, hidden_states, top_k_index, top_k_weights)
            ours = moe_reference(
                hidden_states, small.gate_up_proj, small.down_proj, top_k_index, top_k_weights, activation
            )
    except Exception as error:
        return [f"its forward could not be compared with ours ({type(error).__name__}: {error})"]
    # Loose, because a GPU may be set to compute float32 products in TF32.
    if own.shape == ours.shape and ((own - ours).abs() <= 1e-2 * ours.abs().amax(1, keepdim=True)).all():
        return []
    return ["its own forward computes something else on the same tensors"]


def _compute_device(module: nn.Module) -> torch.device:
    """Where to try things out: the module's device, or the CPU for a module without memory yet."""
    tensor = next(module.parameters(), None)
    return torch.device("cpu") if tensor is None or tensor.is_meta else tensor.device
