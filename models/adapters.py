"""Experts that transformers does not dispatch: told to :func:`qllm_ops.moe` class by class.

An `Adapter` says how the weights of a class lie and what stands in place of its forward; `adopt` puts that
in place, `give_back` undoes it. Some classes keep the weights of gate, up or each expert apart: those are
fused when they are adopted, one module after the other, so that one layer at most is in memory twice. The
fused tensors are then the module's parameters, so `model.to` moves them. The state dict keeps the names,
shapes and values of the class: `state_dict`, `load_state_dict` and `save_pretrained` of an installed model
are those of the model as it was (its fused layers are copied for that).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .experts import (
    ADAPTED,
    ExpertsLayout,
    UnsupportedExpertsError,
    experts_forward,
    find_activation,
    preemptible,
)

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Adapter:
    """One class of experts, or of blocks with experts, in the words of `moe`.

    Attributes:
        forward: stands in place of the class's own; asks `experts_forward`.
        act_fn: the module's activation, of up alone if not ``gated``.
        weights: gate_up_proj and down_proj, without copying.
        example: arguments of its forward for (T, H) hidden states, to compare the two.
        fuse: from the class's tensors, by name, to the fused ones that `weights` reads. None: they lie as
            `moe` wants them.
        split: the way back.
    """

    forward: Callable[..., Any]
    act_fn: Callable[[nn.Module], Callable[[Tensor], Tensor]]
    weights: Callable[[nn.Module], tuple[Tensor, Tensor]]
    example: Callable[[nn.Module, Tensor], tuple[Tensor, ...]]
    gated: bool = True
    transposed: bool = False
    weights_on_input: bool = False
    fuse: Callable[[nn.Module, Tensors], Tensors] | None = None
    split: Callable[[nn.Module], Tensors] | None = None

    def activation_of(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        try:
            return self.act_fn(module)
        except AttributeError as error:
            raise _replaced(module, error) from error

    def layout(self, module: nn.Module) -> ExpertsLayout:
        """Raises UnsupportedExpertsError for an activation that no kernel fuses and no method computes."""
        own, act_fn = getattr(module, "_apply_gate", None), self.activation_of(module)
        gating = own or (_gating(act_fn) if self.gated else act_fn)
        activation, _ = find_activation(gating, module, self.gated)
        if activation is None and own is None:
            raise UnsupportedExpertsError(
                f"{type(module).__name__} is not supported by qllm-ops: its activation is not fused",
                ("its activation is not fused",),
            )
        return ExpertsLayout(
            activation=activation,
            gated=self.gated,
            interleaved=False,
            transposed=self.transposed,
            has_bias=False,
            has_norm=False,
            act_fn=act_fn,
            weights_on_input=self.weights_on_input,
            stored=self.weights,
        )


def _replaced(module: nn.Module, what: object) -> UnsupportedExpertsError:
    """A part is not the class's own: one that peft has wrapped, say, whose additions would be left out."""
    reason = f"a part of it was replaced: {what}"
    name = type(module).__name__
    return UnsupportedExpertsError(f"{name} is not supported by qllm-ops: {reason}", (reason,))


def _gating(act_fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def gate(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return act_fn(gate) * up

    return gate


# -- adopting a module --------------------------------------------------------------------------------

HOOKS = "_qllm_state_dict_hooks"
FUSED = ("gate_up_proj", "down_proj")


def is_adopted(module: nn.Module) -> bool:
    return type(module).__name__ in ADAPTED and "forward" in vars(module)


@torch.no_grad()
def adopt(module: nn.Module) -> bool:
    """Let `moe` compute this module; False if it does already, or is none of these classes.

    Raises:
        UnsupportedExpertsError: on a few tokens, its own forward computes something else. Nothing changed.
    """
    adapter = ADAPTED.get(type(module).__name__)
    if adapter is None or is_adopted(module):
        return False
    like = next(module.parameters())
    draw = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(8, _hidden_size(module), generator=draw, device="cpu")
    hidden_states = hidden_states.to(like.device, like.dtype)
    example = adapter.example(module, hidden_states)
    with _in_eval_mode(module):
        wanted = _first(module(*example))
    if adapter.fuse is not None:
        _fuse(module, adapter)
    module.forward = functools.partial(adapter.forward, module)  # unlike a method of it, it can be pickled
    with _in_eval_mode(module), preemptible(None):
        got = _first(module(*example))
    # Loose, because of 16 bits, and because a GPU may be set to compute float32 products in TF32.
    limit = (1e-2 if like.dtype == torch.float32 else 5e-2) * wanted.abs().max()
    if got.shape != wanted.shape or not ((got - wanted).abs() <= limit).all():
        give_back(module)
        reason = "its own forward computes something else on the same tensors"
        raise UnsupportedExpertsError(
            f"{type(module).__name__} is not supported by qllm-ops: {reason}", (reason,)
        )
    return True


@torch.no_grad()
def give_back(module: nn.Module) -> None:
    """Undo `adopt`: the class's own forward, and its tensors with their values, bit by bit."""
    if not is_adopted(module):
        return
    adapter = ADAPTED[type(module).__name__]
    del module.forward
    if adapter.fuse is None:
        return
    for hook in vars(module).pop(HOOKS):
        hook.remove()
    grad = module.gate_up_proj.requires_grad
    for name, tensor in adapter.split(module).items():
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, nn.Parameter(tensor, grad))
    for name in FUSED:
        del module._parameters[name]


def _fuse(module: nn.Module, adapter: Adapter) -> None:
    apart = dict(module.named_parameters())
    try:
        fused = adapter.fuse(module, apart)
    except KeyError as error:
        raise _replaced(module, f"it has no {error}") from error
    grad = any(parameter.requires_grad for parameter in apart.values())
    for name in apart:
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, None)
    for name, tensor in fused.items():
        module.register_parameter(name, nn.Parameter(tensor, grad))
    hooks = [
        module.register_state_dict_post_hook(_split_state),
        module.register_load_state_dict_pre_hook(_fuse_state),
    ]
    setattr(module, HOOKS, hooks)


def _split_state(module: nn.Module, state: Tensors, prefix: str, metadata: Any) -> None:
    """The names of the class in its state dict; the values are copies."""
    for name in FUSED:
        state.pop(prefix + name)
    for name, tensor in ADAPTED[type(module).__name__].split(module).items():
        state[prefix + name] = tensor.detach()


def _fuse_state(module: nn.Module, state: Tensors, prefix: str, *rest: Any) -> None:
    """The other way round; where a tensor is missing, `load_state_dict` says so of the fused ones."""
    names = list(ADAPTED[type(module).__name__].split(module))
    if all(prefix + name in state for name in names):
        apart = {name: state.pop(prefix + name) for name in names}
        for name, tensor in ADAPTED[type(module).__name__].fuse(module, apart).items():
            state[prefix + name] = tensor


@contextlib.contextmanager
def _in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Without dropout, which no comparison would survive."""
    training = [inner for inner in module.modules() if inner.training]
    module.eval()
    try:
        yield
    finally:
        for inner in training:
            inner.training = True


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _hidden_size(module: nn.Module) -> int:
    for name in ("input_size", "hidden_size", "hidden_dim"):  # JetMoeMoE's hidden_size is the inner one
        if hasattr(module, name):
            return getattr(module, name)
    return module["expert_0"].wi.in_features


# -- one class after the other ------------------------------------------------------------------------


def _routed(num_experts: int, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments of an experts module: every token on two experts, or one where there is one."""
    tokens = torch.arange(len(hidden_states), device=hidden_states.device)[:, None]
    choices = torch.arange(min(2, num_experts), device=hidden_states.device)
    index = (tokens * 5 + choices) % num_experts
    return hidden_states, index, (0.25 + index % 3).to(hidden_states.dtype)


def _longcat_flash(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Experts from num_routed_experts on return what they get."""
    output = experts_forward(module, hidden_states, top_k_index, top_k_weights)
    identity = (top_k_index >= module.num_routed_experts) & (top_k_index < module.total_experts)
    weights = top_k_weights.float().masked_fill(~identity, 0).sum(-1, keepdim=True)
    return output + (weights * hidden_states).to(output.dtype)


def _llama4(module: nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Its own computes every expert for every token; those that were not chosen have a score of 0."""
    hidden_states = hidden_states.reshape(-1, module.hidden_dim)
    scores, logits = module.router(hidden_states)
    top_k_weights, top_k_index = scores.topk(module.top_k, dim=1)
    routed = experts_forward(module, hidden_states, top_k_index, top_k_weights)
    return module.shared_expert(hidden_states) + routed, logits


def _jetmoe(module: nn.Module, hidden_states: Tensor) -> Tensor:
    """Its router sorts the pairs by expert; (T, K) is read back from the place of each pair."""
    tokens = hidden_states.reshape(-1, module.input_size)
    order, _, gates, counts, _ = module.router(tokens)
    experts = torch.arange(len(counts), device=order.device)
    experts = experts.repeat_interleave(torch.tensor(counts, device=order.device))
    shape = len(tokens), module.router.top_k
    top_k_index = torch.empty_like(experts).scatter_(0, order, experts).view(shape)
    top_k_weights = torch.empty_like(gates).scatter_(0, order, gates).view(shape)
    output = experts_forward(module, tokens, top_k_index, top_k_weights)
    return output.view_as(hidden_states) + module.bias


def _dbrx(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    tokens = hidden_states.reshape(-1, module.hidden_size)
    return experts_forward(module, tokens, top_k_index, top_k_weights).view_as(hidden_states)


def _fuse_dbrx(module: nn.Module, apart: Tensors) -> Tensors:
    gate, up, down = (
        apart[f"mlp.{name}"].view(module.num_experts, -1, module.hidden_size) for name in ("w1", "v1", "w2")
    )
    return {"gate_up_proj": torch.cat([gate, up], 1), "down_proj": down.mT.contiguous()}


def _split_dbrx(module: nn.Module) -> Tensors:
    gate, up = module.gate_up_proj.chunk(2, dim=1)
    parts = {"w1": gate, "v1": up, "w2": module.down_proj.mT}
    return {f"mlp.{name}": part.reshape(-1, module.hidden_size) for name, part in parts.items()}


def _switch(
    module: nn.Module, hidden_states: Tensor, selected_experts: Tensor, routing_weights: Tensor
) -> Tensor:
    """selected_experts is one-hot, (T, 1, E), and all zeros for a token beyond its expert's capacity."""
    chosen = selected_experts.max(-1)
    top_k_index = chosen.indices.masked_fill(chosen.values == 0, -1)
    return experts_forward(module, hidden_states, top_k_index, routing_weights)


def _switch_example(module: nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    hidden_states, index, weights = _routed(module.num_experts, hidden_states)
    one_hot = nn.functional.one_hot(index[:, :1], module.num_experts)
    one_hot[-1] = 0
    return hidden_states, one_hot, weights[:, :1]


def _fuse_switch(module: nn.Module, apart: Tensors) -> Tensors:
    first, second = (
        torch.stack([apart[f"expert_{e}.{name}.weight"] for e in range(module.num_experts)])
        for name in ("wi", "wo")
    )
    return {"gate_up_proj": first, "down_proj": second}


def _split_switch(module: nn.Module) -> Tensors:
    # Copies, because safetensors refuses tensors that share memory.
    return {
        f"expert_{e}.{name}.weight": stack[e].clone()
        for e in range(module.num_experts)
        for name, stack in (("wi", module.gate_up_proj), ("wo", module.down_proj))
    }


def _in_place(module: nn.Module) -> tuple[Tensor, Tensor]:
    return module.gate_up_proj, module.down_proj


ADAPTED |= {
    "DbrxExperts": Adapter(
        _dbrx,
        lambda m: m.mlp.activation_fn,
        _in_place,
        lambda m, x: (lambda t, i, w: (t[None], i, w))(*_routed(m.num_experts, x)),
        fuse=_fuse_dbrx,
        split=_split_dbrx,
    ),
    "JetMoeMoE": Adapter(
        _jetmoe,
        lambda m: m.activation,
        lambda m: (m.input_linear.weight, m.output_linear.weight),
        lambda m, x: (x[None],),
    ),
    "Llama4TextMoe": Adapter(
        _llama4,
        lambda m: m.experts.act_fn,
        lambda m: (m.experts.gate_up_proj, m.experts.down_proj),
        lambda m, x: (x[None],),
        transposed=True,
        weights_on_input=True,
    ),
    "LongcatFlashExperts": Adapter(
        _longcat_flash,
        lambda m: m.act_fn,
        lambda m: (m.gate_up_proj[: m.num_routed_experts], m.down_proj),
        lambda m, x: _routed(m.total_experts, x),
    ),
    "Step3p7Experts": Adapter(
        experts_forward, lambda m: m.act_fn, _in_place, lambda m, x: _routed(m.num_experts, x)
    ),
    "SwitchTransformersExperts": Adapter(
        _switch,
        lambda m: m["expert_0"].act,
        _in_place,
        _switch_example,
        gated=False,
        fuse=_fuse_switch,
        split=_split_switch,
    ),
}
