"""The peers that a layer's speed is held against, each with an adapter of a few lines.

A peer is a function of a shape and a pair of weights. It brings the weights into the layout that the peer
wants and returns `prepare`, which does the same for the tokens of one layer and returns the call that is
timed. So what a model would do once, when it is loaded or in its router, is in no time; sorting by expert
is in all of them. A peer that cannot be had here, or has no such format, raises `Absent` with the reason.
Quantised weights are given as they are stored, only in another layout.

Nothing here installs or copies a peer: what Python can import is used.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch
from context import one_line
from layers import DENSE, Pair, Shape, Tensors, format_of
from torch import Tensor

Call = Callable[[], Tensor]
Prepare = Callable[[Tensors], Call]

MOST_COPIED = 8e9
"""batched_mm copies the weights for every (token, k) pair: it is run up to so many bytes ..."""

MOST_TOKENS = 32
"""... and so many tokens; beyond, nobody would use it."""


class Absent(Exception):
    """A peer that is not compared, and why."""


# -- transformers ----------------------------------------------------------------------------------------


def grouped_mm(shape: Shape, pair: Pair) -> Prepare:
    return _transformers("grouped_mm", shape, pair)


def batched_mm(shape: Shape, pair: Pair) -> Prepare:
    prepare = _transformers("batched_mm", shape, pair)

    def prepare_few(tensors: Tensors) -> Call:
        index = tensors[3]
        copied = index.numel() * shape.expert_bytes
        if index.shape[0] > MOST_TOKENS or copied > MOST_COPIED:
            raise Absent("it copies the weights for every pair: only for few tokens")
        return prepare(tensors)

    return prepare_few


def _transformers(name: str, shape: Shape, pair: Pair) -> Prepare:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    if format_of(pair) != DENSE:
        return _transformers_fp8(name, shape, pair)
    config = MixtralConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_local_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
    )
    config._experts_implementation = name
    with torch.device("meta"):
        module = MixtralExperts(config).eval()
    module.gate_up_proj, module.down_proj = (torch.nn.Parameter(w, requires_grad=False) for w in pair)

    def prepare(tensors: Tensors) -> Call:
        hidden_states, _, _, index, weight = tensors
        return lambda: module(hidden_states, index, weight)

    return prepare


def _transformers_fp8(name: str, shape: Shape, pair: Pair) -> Prepare:
    """Its FP8 experts, whose kernels come by the `kernels` library; they quantise the activations as well."""
    _only(pair, "fp8")
    _on_gpu(pair)
    fp8 = _import("transformers.integrations.finegrained_fp8")
    try:
        fp8.load_finegrained_fp8_kernel()
    except Exception as error:  # no library, or nothing to download it from
        raise Absent(f"its FP8 kernels cannot be had: {one_line(error)}") from error
    from transformers import MixtralConfig

    config = MixtralConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_local_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
    )
    with torch.device("meta"):
        module = fp8.FP8Experts(config, block_size=pair[0].block).eval()
    for field, weight in zip(("gate_up_proj", "down_proj"), pair, strict=True):
        setattr(module, field, torch.nn.Parameter(weight.values, requires_grad=False))
        setattr(module, f"{field}_scale_inv", torch.nn.Parameter(weight.scales.contiguous(), False))
    forward = fp8.ALL_FP8_EXPERTS_FUNCTIONS[name]
    module._is_expert_parallel = False

    def prepare(tensors: Tensors) -> Call:
        hidden_states, _, _, index, weight = tensors
        return lambda: forward(module, hidden_states, index, weight)

    return prepare


# -- vLLM ------------------------------------------------------------------------------------------------


def vllm(shape: Shape, pair: Pair) -> Prepare:
    """vLLM's Triton fused_moe, with the tuned configuration that it ships for this device, if it does."""
    _only(pair, DENSE, "fp8", "int4")  # of mxfp4 its kernels are triton_kernels'
    _on_gpu(pair)
    fused_experts = _import("vllm.model_executor.layers.fused_moe.fused_moe").fused_experts
    if format_of(pair) != DENSE:
        return _vllm_quantized(fused_experts, pair)

    def prepare(tensors: Tensors) -> Call:
        hidden_states, gate_up_proj, down_proj, index, weight = tensors
        # As its router hands them over.
        index, weight = index.to(torch.int32), weight.float()
        # By position, and no options: those differ from version to version.
        return lambda: fused_experts(hidden_states, gate_up_proj, down_proj, weight, index)

    return prepare


def _vllm_quantized(fused_experts: Callable[..., Tensor], pair: Pair) -> Prepare:
    """Its int4 lies as ours does: two numbers a byte, the first lowest, each 8 too large."""
    configs = _import("vllm.model_executor.layers.fused_moe.config")
    w1, w2 = (weight.values for weight in pair)
    scales = {f"w{n}_scale": weight.scales.contiguous() for n, weight in enumerate(pair, 1)}
    if format_of(pair) == "fp8":  # which quantises the activations as well
        config = configs.fp8_w8a8_moe_quant_config(**scales, block_shape=list(pair[0].block))
    else:
        config = configs.int4_w4a16_moe_quant_config(**scales, block_shape=[0, pair[0].block[1]])

    def prepare(tensors: Tensors) -> Call:
        hidden_states, _, _, index, weight = tensors
        index, weight = index.to(torch.int32), weight.float()
        return lambda: fused_experts(hidden_states, w1, w2, weight, index, quant_config=config)

    return prepare


# -- triton_kernels --------------------------------------------------------------------------------------


def triton_kernels(shape: Shape, pair: Pair) -> Prepare:
    """triton_kernels' ragged matmul, its gather, scatter and activation fused, its own sort by expert.

    Its weights are (E, H, 2I) and (E, I, H) with the inner dimension contiguous, and gate and up rows
    alternate: so gate_up_proj is copied. Its SwiGLU is gpt-oss's, so the plain one is given to it as a
    function of ours.
    """
    _only(pair, DENSE, "mxfp4")
    _on_gpu(pair)
    _import("triton_kernels")
    lib = _import("triton_kernels.matmul")  # older versions have matmul_ogs, with other arguments
    tensor, topk = _import("triton_kernels.tensor"), _import("triton_kernels.topk").topk
    reduce = _import("triton_kernels.reduce").reduce
    if format_of(pair) == "mxfp4":
        w1, w2, precision = _mxfp4_of_triton_kernels(lib, tensor, pair)
    else:
        w1, w2 = _alternating(pair[0]).transpose(1, 2), pair[1].transpose(1, 2)
        precision = None, None
    specs = lib.FnSpecs("silu_and_mul", _import("peer_kernels").silu_and_mul, (), reduction_n=2)
    activation = lib.FusedActivation(specs, ())

    def prepare(tensors: Tensors) -> Call:
        hidden_states, _, _, index, weight = tensors
        pairs, top_k = index.numel(), shape.top_k
        index, weight = index.to(torch.int16), weight.float().flatten()
        # It reads values at the given indices only, and nobody uses them.
        logits = hidden_states.new_zeros(index.shape[0], shape.num_experts)

        def call() -> Tensor:
            routed = topk(logits, top_k, apply_softmax=False, y_indx=index).mask_metadata
            ragged = tensor.make_ragged_tensor_metadata(routed.col_sum, pairs)
            order = routed.col_sorted_indx
            x = lib.matmul(
                hidden_states, w1, None,
                a_ragged_metadata=ragged, gather_indx=order // top_k, fused_activation=activation,
                precision_config=precision[0],
            )  # fmt: skip
            y = lib.matmul(
                x, w2, None, a_ragged_metadata=ragged, scatter_indx=order, gammas=weight[order],
                precision_config=precision[1],
            )  # fmt: skip
            return reduce(y.view(-1, top_k, shape.hidden_size), dim=1)[0]

        return call

    return prepare


def _alternating(rows: Tensor) -> Tensor:
    """(E, 2I, ...) with gate and up rows in turn."""
    return rows.unflatten(1, (2, -1)).transpose(1, 2).reshape(rows.shape)


def _mxfp4_of_triton_kernels(lib: ModuleType, tensor: ModuleType, pair: Pair) -> tuple[Any, Any, tuple]:
    """Its values and scales in the layouts that it chooses for this device."""
    layout = _import("triton_kernels.tensor_details.layout")
    values_layout = layout.make_default_matmul_mxfp4_w_layout(mx_axis=-2)
    scales_layout = layout.make_default_matmul_mxfp4_w_scale_layout(mx_axis=-2, num_warps=8)
    found, precision = [], []
    for n, weight in enumerate(pair):
        values, scales = weight.values, weight.scales.contiguous()
        if n == 0:
            values, scales = _alternating(values), _alternating(scales)
        wrapped = tensor.wrap_torch_tensor(values.transpose(1, 2), dtype=tensor.FP4)
        found.append(tensor.convert_layout(wrapped, values_layout))
        scales = tensor.convert_layout(tensor.wrap_torch_tensor(scales.transpose(1, 2)), scales_layout)
        precision.append(lib.PrecisionConfig(b_mx_scale=scales))
    return *found, tuple(precision)


# -- which of them are here ------------------------------------------------------------------------------

PEERS: dict[str, Callable[[Shape, Pair], Prepare]] = {
    "grouped_mm": grouped_mm,
    "batched_mm": batched_mm,
    "vllm": vllm,
    "triton_kernels": triton_kernels,
}

TRANSFORMERS = ("grouped_mm", "batched_mm")


def bind(names: Iterable[str], shape: Shape, pair: Pair) -> tuple[dict[str, Prepare], dict[str, str]]:
    """The peers that can be had for these weights, and why the others cannot."""
    bound, absent = {}, {}
    for name in names:
        try:
            bound[name] = PEERS[name](shape, pair)
        except Absent as reason:
            absent[name] = str(reason)
        except Exception as error:
            absent[name] = one_line(error)
    return bound, absent


def _import(name: str) -> ModuleType:
    package = name.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        raise Absent("not installed")
    try:
        return importlib.import_module(name)
    except Exception as error:  # packages of compiled code fail in many ways
        raise Absent(f"installed, but {name} cannot be imported: {one_line(error)}") from error


def rounds_activations(name: str, tensors: Tensors) -> bool:
    """Whether a peer computes on activations in float8: those of fp8 weights do."""
    return name in PEERS and format_of(tensors[1:3]) == "fp8"


def _only(pair: Pair, *formats: str) -> None:
    if format_of(pair) not in formats:
        raise Absent(f"it has no {format_of(pair)} experts that can be called alone")


def _on_gpu(pair: Pair) -> None:
    if pair[0].device.type != "cuda":
        raise Absent("it runs on a GPU only")
