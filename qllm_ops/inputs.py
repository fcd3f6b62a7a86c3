"""What the operator `moe` accepts, checked once before anything is launched."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
"""Names of the activations: SiLU, GELU with the error function, GELU with the tanh approximation."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INDEX_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True, eq=False)
class MoeInputs:
    """The arguments of one MoE layer, checked by :func:`check_inputs`: contiguous, on one device, detached.

    Attributes:
        hidden_states: (T, H), float32, bfloat16 or float16.
        gate_up_proj: (E, 2I, H), the gate's rows before the up rows, dtype of hidden_states.
        down_proj: (E, H, I), dtype of hidden_states.
        top_k_index: (T, K), integer. A value outside [0, E) means that the pair is skipped.
        top_k_weights: (T, K), floating point.
        activation: one of ACTIVATIONS.
    """

    hidden_states: Tensor
    gate_up_proj: Tensor
    down_proj: Tensor
    top_k_index: Tensor
    top_k_weights: Tensor
    activation: str

    @property
    def num_tokens(self) -> int:
        return self.hidden_states.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.hidden_states.shape[1]

    @property
    def intermediate_size(self) -> int:
        return self.down_proj.shape[2]

    @property
    def num_experts(self) -> int:
        return self.down_proj.shape[0]

    @property
    def top_k(self) -> int:
        return self.top_k_index.shape[1]


def check_inputs(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    activation: str = "silu",
) -> MoeInputs:
    """Refuse what `moe` cannot compute, and return the rest in the form that the backends read.

    The three small tensors (hidden_states, top_k_index, top_k_weights) are copied if they are not
    contiguous. The weights are not: a copy of them could take gigabytes on every call, so weights
    that are not contiguous are refused. No value is looked at, so a GPU is not waited for.

    Gradients are not recorded: every tensor is detached. Parameters may require a gradient.

    Raises:
        TypeError: an argument is no dense tensor, or has a dtype that is not supported.
        ValueError: shapes, dtypes or devices do not fit each other, weights are not contiguous,
            or the activation is unknown.
    """
    ranks = {"hidden_states": 2, "gate_up_proj": 3, "down_proj": 3, "top_k_index": 2, "top_k_weights": 2}
    layouts = ("(T, H)", "(E, 2I, H)", "(E, H, I)", "(T, K)", "(T, K)")
    tensors = (hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights)
    for (name, rank), layout, tensor in zip(ranks.items(), layouts, tensors, strict=True):
        _check_tensor(name, tensor, rank, layout)
    _check_dtypes(*tensors)
    _check_shapes(*tensors)
    for name, tensor in zip(ranks, tensors, strict=True):
        if tensor.device != hidden_states.device:
            raise ValueError(
                f"{name} is on {tensor.device}, but hidden_states is on {hidden_states.device}; "
                "all tensors must be on one device"
            )
    for name, weight in (("gate_up_proj", gate_up_proj), ("down_proj", down_proj)):
        if not weight.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous, got shape {tuple(weight.shape)} with strides {weight.stride()}; "
                "call .contiguous() once when the weights are loaded (it copies them)"
            )
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    return MoeInputs(
        hidden_states.detach().contiguous(),
        gate_up_proj.detach(),
        down_proj.detach(),
        top_k_index.contiguous(),
        top_k_weights.detach().contiguous(),
        activation,
    )


def _check_tensor(name: str, tensor: Tensor, rank: int, layout: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {layout}, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {tensor.layout}")
    if tensor.dim() != rank:
        raise ValueError(f"{name} must have {rank} dimensions {layout}, got shape {tuple(tensor.shape)}")


def _check_dtypes(
    hidden_states: Tensor, gate_up_proj: Tensor, down_proj: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> None:
    if hidden_states.dtype not in DTYPES:
        raise TypeError(f"hidden_states must be float32, bfloat16 or float16, got {hidden_states.dtype}")
    for name, weight in (("gate_up_proj", gate_up_proj), ("down_proj", down_proj)):
        if weight.dtype != hidden_states.dtype:
            raise TypeError(
                f"{name} must have the dtype of hidden_states, {hidden_states.dtype}, got {weight.dtype}"
            )
    if top_k_index.dtype not in INDEX_DTYPES:
        raise TypeError(f"top_k_index must be an integer tensor such as int64, got {top_k_index.dtype}")
    if not top_k_weights.is_floating_point():
        raise TypeError(f"top_k_weights must be a floating-point tensor, got {top_k_weights.dtype}")


def _check_shapes(
    hidden_states: Tensor, gate_up_proj: Tensor, down_proj: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> None:
    num_tokens, hidden_size = hidden_states.shape
    num_experts, _, intermediate_size = down_proj.shape
    if min(hidden_size, num_experts, intermediate_size) < 1:
        raise ValueError(
            "hidden_states (T, H) and down_proj (E, H, I) must have E, H and I of at least 1, "
            f"got {tuple(hidden_states.shape)} and {tuple(down_proj.shape)}"
        )
    if down_proj.shape[1] != hidden_size:
        raise ValueError(
            f"down_proj must be (E, H, I) with H = {hidden_size} as in hidden_states, "
            f"got shape {tuple(down_proj.shape)}"
        )
    wanted = (num_experts, 2 * intermediate_size, hidden_size)
    if tuple(gate_up_proj.shape) != wanted:
        raise ValueError(
            f"gate_up_proj must be (E, 2I, H) = {wanted} to fit down_proj {tuple(down_proj.shape)}, "
            f"got shape {tuple(gate_up_proj.shape)}"
        )
    if top_k_index.shape[0] != num_tokens or top_k_index.shape[1] < 1:
        raise ValueError(
            f"top_k_index must be (T, K) with T = {num_tokens} as in hidden_states and K >= 1, "
            f"got shape {tuple(top_k_index.shape)}"
        )
    if top_k_weights.shape != top_k_index.shape:
        raise ValueError(
            f"top_k_weights must have the shape of top_k_index, {tuple(top_k_index.shape)}, "
            f"got {tuple(top_k_weights.shape)}"
        )
