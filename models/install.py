"""Swap the experts of a Hugging Face MoE model for :func:`qllm_ops.moe`, and back."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from qllm_ops import MoeRun, PriorityFlag, QuantizedWeight

from .adapters import adopt, give_back
from .choices import Choice
from .experts import (
    ADAPTED,
    NAME,
    OTHER,
    SETTINGS,
    UNSUITED,
    ExpertsLayout,
    ExpertsSettings,
    Preemption,
    UnsupportedExpertsError,
    experts_layout,
    first_tensor,
    is_dispatched,
    preemptible,
    recorded_calls,
)
from .rotary import isolate, restore


@dataclass(frozen=True)
class InstalledExperts:
    """One experts module: where it is in the model, its sizes, and how it is computed.

    Attributes:
        layout: its activation, and what is unusual about it.
        fused: whether the kernels compute the activation; else a method of the module does, between them.
        dtype: of the weights, or, where they are quantised, of what is multiplied by them.
        format: of quantised weights; None: they are not quantised.
        fp8_activations: whether activations become float8, too.
    """

    name: str
    class_name: str
    num_experts: int
    hidden_size: int
    intermediate_size: int
    layout: str
    fused: bool
    dtype: torch.dtype
    device: torch.device
    backend: str
    format: str | None = None
    fp8_activations: bool = False


@dataclass(frozen=True)
class InstallReport:
    """What `install` took. Printable; ``len()`` is the number of experts modules.

    Attributes:
        note: what a user of the model may not expect; empty: nothing.
    """

    model: str
    modules: tuple[InstalledExperts, ...]
    note: str = ""

    def __len__(self) -> int:
        return len(self.modules)

    def __str__(self) -> str:
        lines = [f"{self.model}: {len(self)} experts module{'s' if len(self) > 1 else ''} run by qllm-ops"]
        lines += [
            f"  {m.name}  {m.class_name}  E={m.num_experts} H={m.hidden_size} I={m.intermediate_size}"
            f"  {m.layout}  {_weights_of(m)}  {m.device}  {m.backend}"
            for m in self.modules
        ]
        return "\n".join([*lines, *[f"  note: {self.note}"] * bool(self.note)])


def _weights_of(m: InstalledExperts) -> str:
    dtype = "float8" if m.fp8_activations else str(m.dtype).removeprefix("torch.")
    return f"{m.format}, {dtype} activations" if m.format else dtype


EXPERTS = Choice("_experts_implementation")
"""Which installed model's configs named which experts implementation before."""

SERVED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Models in the body of :func:`installed`, whose experts nobody else may change meanwhile."""


def install(
    model: PreTrainedModel,
    flag: PriorityFlag | None = None,
    priority: int = 0,
    *,
    backend: str = "auto",
    fp8_activations: bool = False,
) -> InstallReport:
    """Let :func:`qllm_ops.moe` compute every experts module of ``model``. All of them, or none.

    Runs one forward pass over two tokens, to see that every module is really reached: transformers
    accepts an experts implementation for some architectures and then never calls it. Experts that
    transformers does not dispatch (Llama 4, DBRX and others) get a forward of `adapters`, after it was
    compared with their own on a few tokens. Those that keep gate, up or each expert apart (DBRX, Switch) are
    fused, one module at a time; `state_dict`, `load_state_dict` and `save_pretrained` go on with the names
    and values of the class, through copies of the fused layers. `uninstall` undoes all of it. Installing
    again changes what is said here. A copy of the model keeps the experts, not the flag; it is uninstalled by
    itself.
    So that several threads can run the model, rotary embeddings that would change themselves while they
    run ("dynamic" and "longrope" scaling) keep no state between calls from then on.

    Args:
        model: a Hugging Face model with its weights in memory, on one device.
        flag: what pauses the experts; on the model's device. None: nothing, unless a thread says
            otherwise with :func:`preemptible`.
        priority: class of the model's work where no `preemptible` body says otherwise.
        backend: as in :func:`qllm_ops.moe`.
        fp8_activations: True: experts with weights in FP8 multiply float8 by float8, as in
            :func:`qllm_ops.moe`. transformers' own FP8 experts do so; by default, ours do not.

    Raises:
        TypeError: ``model`` is none of transformers; says what is, where one is inside of it.
        ValueError: there are no MoE experts in the model, or an argument does not fit it.
        UnsupportedExpertsError: experts that would be computed wrongly or never reached; names them.
        RuntimeError: the forward pass over two tokens failed, or an engine serves the model.
    """
    check_model(model)
    check_not_served(model, "installed again")
    experts = find_experts(model)
    for name, module, _ in experts:
        if first_tensor(module).is_meta:
            raise ValueError(
                f"{name} has no weights in memory (meta device); load the model on one device first"
            )
    settings = ExpertsSettings(Preemption(flag, priority), backend, fp8_activations)

    before = {module: SETTINGS.get(module) for _, module, _ in experts}
    named, new = EXPERTS.read(model), EXPERTS.remember(model)
    adopted: list[nn.Module] = []
    try:
        if any(is_dispatched(module) for _, module, _ in experts):
            model.set_experts_implementation(NAME)
        for _, module, _ in experts:
            if adopt(module):
                adopted.append(module)
        modules = tuple(_describe(model, name, layout, settings) for name, _, layout in experts)
        SETTINGS.update({module: settings for _, module, _ in experts})
        _prove_reached(model, experts)
    except BaseException:
        for module in adopted:
            give_back(module)
        EXPERTS.put_back(model) if new else EXPERTS.write(named)
        for module, old in before.items():
            SETTINGS.pop(module, None)
            if old is not None:
                SETTINGS[module] = old
        raise
    isolate(model)
    return InstallReport(type(model).__name__, modules, _note(model, modules))


def _note(model: PreTrainedModel, modules: tuple[InstalledExperts, ...]) -> str:
    method = getattr(model, "quantization_method", None)
    if method is None or any(module.format for module in modules):
        return ""
    name = getattr(method, "value", method)
    bits = modules[0].dtype.itemsize * 8
    return f"{name} left these experts in {bits} bits; quantize_experts(model, format) quantises them"


def uninstall(model: PreTrainedModel) -> bool:
    """Give ``model`` back the experts implementation it had; False if nothing was installed.

    What another installed model shares, a config or experts, is left as it is until that one is uninstalled
    too: so a shallow copy, which has nothing of its own, leaves the model itself installed.

    Raises:
        TypeError: ``model`` is none of transformers.
        RuntimeError: an engine serves the model, whose work nothing could pause any more.
    """
    check_model(model)
    check_not_served(model, "uninstalled")
    if model not in EXPERTS:
        return False
    needed = {module for other in EXPERTS.others(model) for module in other.modules()}
    for module in model.modules():
        if module not in needed:
            SETTINGS.pop(module, None)
            give_back(module)
    restore(model, except_in=needed)
    EXPERTS.put_back(model)
    return True


@contextlib.contextmanager
def installed(model: PreTrainedModel, *, backend: str = "auto") -> Iterator[InstallReport]:
    """`install` for the body alone, without a flag; an install from before it is there again after it.

    Whether activations become float8 stays as it was installed.
    """
    earlier = {module: SETTINGS[module] for module in model.modules() if module in SETTINGS}
    again = model in EXPERTS
    fp8_activations = any(settings.fp8_activations for settings in earlier.values())
    report = install(model, backend=backend, fp8_activations=fp8_activations)
    SERVED.add(model)
    try:
        yield report
    finally:
        SERVED.discard(model)
        if again:
            SETTINGS.update(earlier)
        else:
            uninstall(model)


def check_model(model: object) -> None:
    """Raises TypeError for what is no model of transformers, and says where one is."""
    if isinstance(model, PreTrainedModel):
        return
    if isinstance(model, nn.Module):
        inside = [name for name, inner in model.named_modules() if isinstance(inner, PreTrainedModel)]
    else:  # a pipeline
        inside = ["model"] * isinstance(getattr(model, "model", None), PreTrainedModel)
    got = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
    if inside:
        got += f", which has one: pass its .{inside[0]}"
    elif isinstance(model, str | Path):
        got += "; qllm_ops.models.load reads one from a folder, installs it, and quantises it if told to"
    raise TypeError(f"model must be a transformers PreTrainedModel, got {got}")


def check_not_served(model: PreTrainedModel, what: str) -> None:
    """Raises RuntimeError in the body of :func:`installed`, of any model with experts of this one."""
    experts = {module for module in model.modules() if module in SETTINGS}
    if any(not experts.isdisjoint(served.modules()) for served in list(SERVED)):
        raise RuntimeError(
            f"{type(model).__name__} cannot be {what} while an engine serves it; close the engine first"
        )


def find_experts(model: nn.Module) -> list[tuple[str, nn.Module, ExpertsLayout]]:
    """Name, module and layout of every experts module in ``model``, weights in memory or not.

    Raises:
        ValueError: there is none.
        UnsupportedExpertsError: there is one that `moe` does not compute; lists all of them.
    """
    found, refused, outer = [], {}, None
    for name, module in model.named_modules():
        if outer is not None and name.startswith(outer + "."):
            continue
        if type(module).__name__ in OTHER:
            outer = name
            continue
        if not is_dispatched(module) and not _looks_like_experts(module):
            continue
        outer = name
        try:
            found.append((name, module, experts_layout(module)))
        except UnsupportedExpertsError as error:
            refused.setdefault((type(module).__name__, error.reasons), []).append(name)
    if refused:
        lines = [
            f"  {class_name}: {'; '.join(reasons)} ({_some(names)})"
            for (class_name, reasons), names in refused.items()
        ]
        raise UnsupportedExpertsError(
            f"{type(model).__name__} has experts that qllm-ops does not support:\n" + "\n".join(lines),
            tuple(reason for _, reasons in refused for reason in reasons),
        )
    if not found:
        raise ValueError(f"model {type(model).__name__} has no MoE experts module")
    return found


def _looks_like_experts(module: nn.Module) -> bool:
    """Routed experts outside transformers' experts interface, such as Llama4TextExperts.

    Shared experts are ordinary MLPs beside the routed ones, and stay as they are.
    """
    name = type(module).__name__
    if name in ADAPTED or name in UNSUITED:
        return True
    if "Expert" not in name or "Shared" in name or next(module.parameters(), None) is None:
        return False
    return not any(is_dispatched(inner) for inner in module.modules())


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _describe(
    model: PreTrainedModel,
    name: str,
    layout: ExpertsLayout,
    settings: ExpertsSettings,
) -> InstalledExperts:
    module = model.get_submodule(name)
    down = layout.weights(module)[1]
    quantized = isinstance(down, QuantizedWeight)
    dtype = _compute_dtype(model) if quantized else down.dtype
    num_experts, hidden_size, intermediate_size = layout.sizes(module)
    # A run over no tokens: the operator itself says whether it takes these weights, flag and backend.
    try:
        run = MoeRun(
            torch.empty(0, hidden_size, dtype=dtype, device=down.device),
            *layout.weights(module),
            torch.empty(0, 1, dtype=torch.int64, device=down.device),
            torch.empty(0, 1, dtype=dtype, device=down.device),
            flag=settings.preemption.flag,
            priority=settings.preemption.priority,
            backend=settings.backend,
            fp8_activations=settings.fp8_activations,
            **layout.options(module),
        )
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error
    return InstalledExperts(
        name,
        type(module).__name__,
        num_experts,
        hidden_size,
        intermediate_size,
        str(layout),
        layout.activation is not None,
        dtype,
        down.device,
        run.backend,
        down.format if quantized else None,
        settings.fp8_activations,
    )


def _compute_dtype(model: PreTrainedModel) -> torch.dtype:
    """Of the hidden states, which weights of 8 bits do not say."""
    return model.get_input_embeddings().weight.dtype


def _prove_reached(model: PreTrainedModel, experts: list[tuple[str, nn.Module, ExpertsLayout]]) -> None:
    """Run the model over two tokens and see that each experts module asks for our function.

    What text does not reach (the vision experts of Ernie 4.5 VL) must ask when its own block is called.
    """
    device = model.get_input_embeddings().weight.device
    generators = [device] if device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(generators), preemptible(None), recorded_calls() as calls:
            ids = {"input_ids": torch.tensor([[0, 1]], device=device)}
            if model.config.is_encoder_decoder:
                ids["decoder_input_ids"] = ids["input_ids"]
            model(**ids, use_cache=False)
            _call_blocks(model, [name for name, module, _ in experts if id(module) not in calls])
    except Exception as error:
        raise RuntimeError(
            f"{type(model).__name__} failed on a forward pass over two tokens, nothing was installed: "
            f"{type(error).__name__}: {error}"
        ) from error
    missed = [name for name, module, _ in experts if id(module) not in calls]
    if missed:
        raise UnsupportedExpertsError(
            f"a forward pass of {type(model).__name__} never reaches {len(missed)} of its {len(experts)} "
            f"experts modules through transformers' experts interface: {_some(missed)}"
        )


def _call_blocks(model: PreTrainedModel, names: list[str]) -> None:
    """Call the block around each of these experts modules on two tokens, if a block can be called so."""
    for name in names:
        experts = model.get_submodule(name)
        block = model.get_submodule(name.rpartition(".")[0])
        hidden_size = experts_layout(experts).sizes(experts)[1]
        place = {"dtype": _compute_dtype(model), "device": first_tensor(experts).device}
        zeros = torch.zeros(1, 2, hidden_size, **place)
        # A block that takes something else than hidden states proves nothing; its experts count as missed.
        with contextlib.suppress(Exception):
            block(zeros)
