"""The peers that a layer's speed is held against, each with an adapter of a few lines.

A peer is a function of a shape and a pair of weights. It brings the weights into the layout that the peer
wants and returns `prepare`, which does the same for the tokens of one layer and returns the call that is
timed. So what a model would do once, when it is loaded or in its router, is in no time; sorting by expert
is in all of them. A peer that cannot be had here raises `Absent` with the reason.

Nothing here installs or copies a peer: what Python can import is used.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable
from types import ModuleType

import torch
from context import one_line
from layers import Shape, Tensors
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


def grouped_mm(shape: Shape, pair: tuple[Tensor, Tensor]) -> Prepare:
    return _transformers("grouped_mm", shape, pair)


def batched_mm(shape: Shape, pair: tuple[Tensor, Tensor]) -> Prepare:
    prepare = _transformers("batched_mm", shape, pair)

    def prepare_few(tensors: Tensors) -> Call:
        index = tensors[3]
        copied = index.numel() * shape.expert_bytes
        if index.shape[0] > MOST_TOKENS or copied > MOST_COPIED:
            raise Absent("it copies the weights for every pair: only for few tokens")
        return prepare(tensors)

    return prepare_few


def _transformers(name: str, shape: Shape, pair: tuple[Tensor, Tensor]) -> Prepare:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

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


# -- vLLM ------------------------------------------------------------------------------------------------


def vllm(shape: Shape, pair: tuple[Tensor, Tensor]) -> Prepare:
    """vLLM's Triton fused_moe, with the tuned configuration that it ships for this device, if it does."""
    _on_gpu(pair)
    fused_experts = _import("vllm.model_executor.layers.fused_moe.fused_moe").fused_experts

    def prepare(tensors: Tensors) -> Call:
        hidden_states, gate_up_proj, down_proj, index, weight = tensors
        # As its router hands them over.
        index, weight = index.to(torch.int32), weight.float()
        # By position, and no options: those differ from version to version.
        return lambda: fused_experts(hidden_states, gate_up_proj, down_proj, weight, index)

    return prepare


# -- triton_kernels --------------------------------------------------------------------------------------


def triton_kernels(shape: Shape, pair: tuple[Tensor, Tensor]) -> Prepare:
    """triton_kernels' ragged matmul, its gather, scatter and activation fused, its own sort by expert.

    Its weights are (E, H, 2I) and (E, I, H) with the inner dimension contiguous, and gate and up rows
    alternate: so gate_up_proj is copied. Its SwiGLU is gpt-oss's, so the plain one is given to it as a
    function of ours.
    """
    _on_gpu(pair)
    _import("triton_kernels")
    lib = _import("triton_kernels.matmul")  # older versions have matmul_ogs, with other arguments
    tensor, topk = _import("triton_kernels.tensor"), _import("triton_kernels.topk").topk
    reduce = _import("triton_kernels.reduce").reduce
    gate_up, down = pair
    halves = gate_up.unflatten(1, (2, shape.intermediate_size))
    w1 = halves.transpose(1, 2).reshape(gate_up.shape).transpose(1, 2)
    w2 = down.transpose(1, 2)
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
            )  # fmt: skip
            y = lib.matmul(
                x, w2, None, a_ragged_metadata=ragged, scatter_indx=order, gammas=weight[order]
            )  # fmt: skip
            return reduce(y.view(-1, top_k, shape.hidden_size), dim=1)[0]

        return call

    return prepare


# -- which of them are here ------------------------------------------------------------------------------

PEERS: dict[str, Callable[[Shape, tuple[Tensor, Tensor]], Prepare]] = {
    "grouped_mm": grouped_mm,
    "batched_mm": batched_mm,
    "vllm": vllm,
    "triton_kernels": triton_kernels,
}

TRANSFORMERS = ("grouped_mm", "batched_mm")


def bind(
    names: Iterable[str], shape: Shape, pair: tuple[Tensor, Tensor]
) -> tuple[dict[str, Prepare], dict[str, str]]:
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


def _on_gpu(pair: tuple[Tensor, Tensor]) -> None:
    if pair[0].device.type != "cuda":
        raise Absent("it runs on a GPU only")
