"""Quantise the experts of a model that is in memory."""

from __future__ import annotations

import gc
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qllm_ops.quantized import QUANTIZERS, QuantizedWeight

from .experts import ExpertsLayout, UnsupportedExpertsError
from .install import check_model, check_not_served, find_experts
from .projections import QuantizedProjection


@torch.no_grad()
def quantize_experts(model: PreTrainedModel, format: str) -> None:
    """Replace the weights of every experts module of ``model`` by quantised ones. There is no way back.

    One projection of one layer at a time, so that little is in memory twice. From then on only `moe` computes
    the model: :func:`install` it, before or after this call. Biases, routers, shared experts and everything
    outside of the experts stay as they are. The model cannot be saved, nor one that it is a part of: save the
    dense one.

    Args:
        format: "fp8" (blocks of 128 x 128), "mxfp4", or "int4" (symmetric, groups of 128).

    Raises:
        TypeError: ``model`` is none of transformers.
        ValueError: no such format, no experts in the model, or they are quantised already; a weight that is
            not finite, whose tensor is named: those before it are quantised then.
        UnsupportedExpertsError: experts that qllm-ops does not support, or supports with dense weights only.
        RuntimeError: an engine serves the model.
    """
    check_model(model)
    check_not_served(model, "quantised")
    check_format("format", format)
    experts = find_experts(model)
    for name, module, layout in experts:
        check_quantizable(type(module).__name__, layout)
        wrapper, _, leaf = name.rpartition(".")
        if leaf == "base_layer":  # of peft, which adds to weights that it could not find any more
            raise UnsupportedExpertsError(
                f"{name} is wrapped by a {type(model.get_submodule(wrapper)).__name__}, which adds to dense "
                "weights; merge what it adds (peft: merge_and_unload) before they are quantised",
                ("its weights are added to by a wrapper",),
            )
        if any(isinstance(weight, QuantizedWeight) for weight in layout.weights(module)):
            raise ValueError(f"{name} is quantised already: {layout.weights(module)[1]}")
    having = _models_with(module for _, module, _ in experts)
    for name, module, layout in experts:
        for leaf in (layout.first, "down_proj"):
            weight = quantize_stored(f"{name}.{leaf}", getattr(module, leaf), layout, format)
            hold(model, f"{name}.{leaf}", weight)
            for other in having:
                other.save_pretrained = refuse_to_save


def _models_with(modules: Iterable[nn.Module]) -> list[PreTrainedModel]:
    """Every model with one of these modules: no module knows where it is in, but Python's collector does."""
    modules = set(modules)
    models = [each for each in gc.get_objects() if issubclass(type(each), PreTrainedModel)]
    return [model for model in models if not modules.isdisjoint(model.modules())]


def hold(model: PreTrainedModel, name: str, weight: QuantizedWeight) -> None:
    """Put the weight in the place of the parameter of that name."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    delattr(module, leaf)
    setattr(module, leaf, QuantizedProjection(weight))
    model.save_pretrained = refuse_to_save


def refuse_to_save(*args: object, **kwargs: object) -> None:
    """What `save_pretrained` of a model with quantised experts is: nobody could load what it would write."""
    raise NotImplementedError(
        "a model with experts that qllm-ops holds quantised cannot be saved; its state_dict can be, for a "
        "model that is quantised alike"
    )


def check_format(argument: str, format: str) -> None:
    if format not in QUANTIZERS:
        raise ValueError(f"{argument} must be one of {', '.join(QUANTIZERS)}, got {format!r}")


def check_quantizable(class_name: str, layout: ExpertsLayout) -> None:
    """Refuse a class whose weights are not its own gate_up_proj and down_proj."""
    if layout.stored:
        reason = "qllm-ops computes this class by an adapter of its own, with dense weights only"
        raise UnsupportedExpertsError(f"{class_name} cannot be quantised by qllm-ops: {reason}", (reason,))


def quantize_stored(name: str, weight: Tensor, layout: ExpertsLayout, format: str) -> QuantizedWeight:
    """A dense weight as it lies in the experts module, quantised in rows."""
    try:
        return QUANTIZERS[format](weight.detach().mT if layout.transposed else weight.detach())
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
