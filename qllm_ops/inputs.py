"""What the operator `moe` accepts, checked once before anything is launched."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qllm_ops.activation import AnyActivation, as_activation
from qllm_ops.invariant import is_batch_invariant
from qllm_ops.modes import in_memory, refuse_tangents
from qllm_ops.quantized import ROW_GROUP, W8A8, QuantizedWeight
from qllm_ops.tiles import EXIT_US, check_max_exit_us

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Weight = Tensor | QuantizedWeight
WEIGHTS = ("gate_up_proj", "down_proj")
INDEX_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True, eq=False)
class MoeInputs:
    """The arguments of one MoE layer, checked by :func:`check_inputs`: contiguous, on one device, detached.

    The attributes are the arguments of :func:`qllm_ops.moe`, which documents them.
    """

    hidden_states: Tensor
    gate_up_proj: Weight
    down_proj: Weight
    top_k_index: Tensor
    top_k_weights: Tensor
    activation: AnyActivation
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    gated: bool = True
    interleaved: bool = False
    transposed: bool = False
    expert_norm: Callable[[Tensor], Tensor] | None = None
    batch_invariant: bool = False
    max_exit_us: float = EXIT_US
    weights_on_input: bool = False
    fp8_activations: bool = False

    @property
    def num_tokens(self) -> int:
        return self.hidden_states.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.hidden_states.shape[1]

    @property
    def intermediate_size(self) -> int:
        return self.down_proj.shape[1 if self.transposed else 2]

    @property
    def gate_up_size(self) -> int:
        """Columns of the first product: 2I, or I without a gate."""
        return self.gate_up_proj.shape[2 if self.transposed else 1]

    @property
    def num_experts(self) -> int:
        return self.down_proj.shape[0]

    @property
    def top_k(self) -> int:
        return self.top_k_index.shape[1]

    @property
    def weight_format(self) -> str | None:
        """How both weights are quantised; None for dense ones."""
        return self.down_proj.format if isinstance(self.down_proj, QuantizedWeight) else None

    @property
    def in_memory(self) -> bool:
        return in_memory(self.hidden_states)

    @property
    def product_format(self) -> str | None:
        """What the products are of: weight_format, or W8A8 where both of their factors are float8."""
        return W8A8 if self.fp8_activations else self.weight_format


def check_inputs(
    hidden_states: Tensor,
    gate_up_proj: Weight,
    down_proj: Weight,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    activation: str | AnyActivation = "silu",
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    gated: bool = True,
    interleaved: bool = False,
    transposed: bool = False,
    expert_norm: Callable[[Tensor], Tensor] | None = None,
    batch_invariant: bool = False,
    max_exit_us: float = EXIT_US,
    weights_on_input: bool = False,
    fp8_activations: bool = False,
) -> MoeInputs:
    """Refuse what `moe` cannot compute, and return the rest in the form that the backends read.

    The small tensors (all but the two weights) are copied if they are not contiguous. The weights are
    not: a copy of them could take gigabytes on every call, so weights that are not contiguous are
    refused. No value is looked at, so a GPU is not waited for.

    Gradients are not recorded: every tensor is detached. Parameters may require a gradient.

    Raises:
        NotImplementedError: a tensor has a tangent, of torch.autograd.forward_ad.
        RuntimeError: inside of a transform of torch.func, which gives tensors that are none.
        TypeError: an argument is no dense tensor, or has a dtype that is not supported; one weight is
            quantised and the other is not, or otherwise.
        ValueError: shapes, dtypes or devices do not fit each other, weights are not contiguous,
            quantised weights are said to be transposed, fp8_activations go with other weights than float8,
            or the activation is unknown.
    """
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "qllm_ops.moe cannot be called inside of torch.func's transforms (vmap, grad, jvp, ...): it has "
            "no gradient, and takes a batch as more rows of hidden_states"
        )
    switches = {"gated": gated, "interleaved": interleaved, "transposed": transposed}
    switches |= {"batch_invariant": batch_invariant, "weights_on_input": weights_on_input}
    switches["fp8_activations"] = fp8_activations
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")
    if interleaved and not gated:
        raise ValueError("interleaved must be False for experts without a gate (gated=False), got True")
    check_max_exit_us(max_exit_us)
    if expert_norm is not None and not callable(expert_norm):
        raise TypeError(f"expert_norm must be a function or None, got {type(expert_norm).__name__}")
    tensors = {
        "hidden_states": hidden_states,
        "gate_up_proj": gate_up_proj,
        "down_proj": down_proj,
        "top_k_index": top_k_index,
        "top_k_weights": top_k_weights,
    }
    if gate_up_bias is not None:
        tensors["gate_up_bias"] = gate_up_bias
    if down_bias is not None:
        tensors["down_bias"] = down_bias
    refuse_tangents(tensors)
    layouts = _layouts(gated, transposed)
    quantized = [name for name in WEIGHTS if isinstance(tensors[name], QuantizedWeight)]
    for name, tensor in tensors.items():
        if name not in quantized:
            _check_tensor(name, tensor, layouts[name])
    _check_dtypes(**tensors)
    if quantized:
        _check_quantized(hidden_states, gate_up_proj, down_proj, transposed, fp8_activations)
    if fp8_activations:
        _check_fp8_activations(hidden_states, gate_up_proj, down_proj)
    inputs = MoeInputs(
        hidden_states.detach().contiguous(),
        gate_up_proj if quantized else gate_up_proj.detach(),
        down_proj if quantized else down_proj.detach(),
        top_k_index.contiguous(),
        top_k_weights.detach().contiguous(),
        as_activation(activation),
        None if gate_up_bias is None else gate_up_bias.detach().contiguous(),
        None if down_bias is None else down_bias.detach().contiguous(),
        gated,
        interleaved,
        transposed,
        expert_norm,
        batch_invariant or is_batch_invariant(),
        max_exit_us,
        weights_on_input,
        fp8_activations,
    )
    _check_shapes(inputs, layouts)
    for name, tensor in tensors.items():
        if tensor.device != hidden_states.device:
            raise ValueError(
                f"{name} is on {tensor.device}, but hidden_states is on {hidden_states.device}; "
                "all tensors must be on one device"
            )
    for name, weight in (("gate_up_proj", gate_up_proj), ("down_proj", down_proj)):
        if not quantized and not weight.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous, got shape {tuple(weight.shape)} with strides {weight.stride()}; "
                "call .contiguous() once when the weights are loaded (it copies them)"
            )
    return inputs


@functools.cache
def _layouts(gated: bool, transposed: bool) -> dict[str, str]:
    columns = "2I" if gated else "I"
    return {
        "hidden_states": "(T, H)",
        "gate_up_proj": f"(E, H, {columns})" if transposed else f"(E, {columns}, H)",
        "down_proj": "(E, I, H)" if transposed else "(E, H, I)",
        "top_k_index": "(T, K)",
        "top_k_weights": "(T, K)",
        "gate_up_bias": f"(E, {columns})",
        "down_bias": "(E, H)",
    }


def _check_tensor(name: str, tensor: Tensor, layout: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {layout}, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {tensor.layout}")
    if hasattr(tensor, "__tensor_flatten__"):  # of a DTensor and others that only wrap tensors
        raise TypeError(f"{name} must have its numbers in memory, got a {type(tensor).__name__}")
    if tensor.dim() != (rank := layout.count(",") + 1):
        raise ValueError(f"{name} must have {rank} dimensions {layout}, got shape {tuple(tensor.shape)}")


def _check_dtypes(
    hidden_states: Tensor,
    gate_up_proj: Weight,
    down_proj: Weight,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    **biases: Tensor,
) -> None:
    if hidden_states.dtype not in DTYPES:
        raise TypeError(f"hidden_states must be float32, bfloat16 or float16, got {hidden_states.dtype}")
    for name, weight in (("gate_up_proj", gate_up_proj), ("down_proj", down_proj)):
        if not isinstance(weight, QuantizedWeight) and weight.dtype != hidden_states.dtype:
            raise TypeError(
                f"{name} must have the dtype of hidden_states, {hidden_states.dtype}, got {weight.dtype}"
            )
    if top_k_index.dtype not in INDEX_DTYPES:
        raise TypeError(f"top_k_index must be an integer tensor such as int64, got {top_k_index.dtype}")
    for name, tensor in {"top_k_weights": top_k_weights, **biases}.items():
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:  # torch does not add float8
            raise TypeError(f"{name} must be a floating-point tensor of 16 bits or more, got {tensor.dtype}")


def _check_quantized(
    hidden_states: Tensor, gate_up_proj: Weight, down_proj: Weight, transposed: bool, fp8_activations: bool
) -> None:
    formats = [getattr(weight, "format", "dense") for weight in (gate_up_proj, down_proj)]
    if formats[0] != formats[1]:
        raise TypeError(
            f"gate_up_proj and down_proj must be quantised alike or both be dense, got {formats[0]} and "
            f"{formats[1]}"
        )
    if transposed:
        raise ValueError(
            "transposed must be False for quantised weights, which are (E, 2I, H) and (E, H, I): quantise "
            "weight.mT; got True"
        )
    if fp8_activations:
        return  # The weights become no float16.
    for name, weight in (("gate_up_proj", gate_up_proj), ("down_proj", down_proj)):
        if hidden_states.dtype == torch.float16 and weight.largest > torch.finfo(torch.float16).max:
            raise ValueError(
                f"{name} has scales for numbers up to {weight.largest:g}, which float16 does not have, "
                "as which it would be multiplied; got float16 hidden_states, wanted bfloat16 or float32"
            )


def _check_fp8_activations(hidden_states: Tensor, gate_up_proj: Weight, down_proj: Weight) -> None:
    for name, weight in (("gate_up_proj", gate_up_proj), ("down_proj", down_proj)):
        format = getattr(weight, "format", "dense")
        if format != "fp8":
            raise TypeError(
                f"{name} must be quantised to fp8 (quantize_fp8) for fp8_activations=True, got {format}"
            )
        if weight.block[1] % ROW_GROUP:
            raise ValueError(
                f"{name} must have blocks of a multiple of {ROW_GROUP} columns for fp8_activations=True, "
                f"as many as share a scale in a row of activations, got blocks of {weight.block}"
            )
    if hidden_states.dtype == torch.float32:
        raise TypeError(
            "hidden_states must be bfloat16 or float16 for fp8_activations=True, got torch.float32: the last "
            "bit of a first product can turn a float8 made of it, by more than the error promised for float32"
        )


def _check_shapes(x: MoeInputs, layouts: dict[str, str]) -> None:
    hidden_states, gate_up_proj, down_proj = x.hidden_states, x.gate_up_proj, x.down_proj
    num_tokens, hidden_size = hidden_states.shape
    num_experts, intermediate_size = x.num_experts, x.intermediate_size
    if min(hidden_size, num_experts, intermediate_size) < 1:
        raise ValueError(
            f"hidden_states (T, H) and down_proj {layouts['down_proj']} must have E, H and I of at least 1, "
            f"got {tuple(hidden_states.shape)} and {tuple(down_proj.shape)}"
        )
    if down_proj.shape[2 if x.transposed else 1] != hidden_size:
        raise ValueError(
            f"down_proj must be {layouts['down_proj']} with H = {hidden_size} as in hidden_states, "
            f"got shape {tuple(down_proj.shape)}"
        )
    columns = intermediate_size * (2 if x.gated else 1)
    wanted = (num_experts, hidden_size, columns) if x.transposed else (num_experts, columns, hidden_size)
    if tuple(gate_up_proj.shape) != wanted:
        raise ValueError(
            f"gate_up_proj must be {layouts['gate_up_proj']} = {wanted} to fit down_proj "
            f"{tuple(down_proj.shape)}, got shape {tuple(gate_up_proj.shape)}"
        )
    if x.top_k_index.shape[0] != num_tokens or x.top_k_index.shape[1] < 1:
        raise ValueError(
            f"top_k_index must be (T, K) with T = {num_tokens} as in hidden_states and K >= 1, "
            f"got shape {tuple(x.top_k_index.shape)}"
        )
    if x.top_k_weights.shape != x.top_k_index.shape:
        raise ValueError(
            f"top_k_weights must have the shape of top_k_index, {tuple(x.top_k_index.shape)}, "
            f"got {tuple(x.top_k_weights.shape)}"
        )
    for name, bias, size in (
        ("gate_up_bias", x.gate_up_bias, columns), ("down_bias", x.down_bias, hidden_size),
    ):  # fmt: skip
        if bias is not None and tuple(bias.shape) != (num_experts, size):
            raise ValueError(
                f"{name} must be {layouts[name]} = {(num_experts, size)} to fit gate_up_proj and down_proj, "
                f"got shape {tuple(bias.shape)}"
            )
