"""The weights of an experts module, dense or quantised, as :func:`qllm_ops.moe` takes them.

Quantised ones come in two forms: in a `QuantizedProjection`, where `load` and `quantize_experts` put them,
and as the parameters of transformers' `FP8Experts`, a weight and its scales.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

from qllm_ops import QuantizedWeight

SCALES = "_scale_inv"
"""What transformers adds to the name of an FP8 weight for that of its scales."""

UNUSED = "_activation_scale"
"""Of FP8 models whose activations have a fixed scale, which `moe` does not use."""


INSTALL = "quantised experts are computed by qllm-ops alone: call qllm_ops.models.install(model)"


class QuantizedProjection(nn.Module):
    """A quantised weight where a class of experts has a parameter of that name: it moves with the model.

    Its tensors are buffers, and keep their dtypes when the model is given another one. The class's own
    forward cannot use it.
    """

    def __init__(self, weight: QuantizedWeight):
        super().__init__()
        self.format, self.block, self.columns = weight.format, weight.block, weight.columns
        self._weight = weight
        self.register_buffer("values", weight.values)
        self.register_buffer("scales", weight.scales)
        self.register_buffer("zeros", weight.zeros)

    @property
    def weight(self) -> QuantizedWeight:
        """What it holds. Described anew, which waits for the device, where the buffers are other ones."""
        known = self._weight
        if not (known.values is self.values and known.scales is self.scales and known.zeros is self.zeros):
            known = self._weight = QuantizedWeight(
                self.values, self.scales, self.format, self.block, self.columns, self.zeros
            )
            self.scales, self.zeros = known.scales, known.zeros
        return known

    def extra_repr(self) -> str:
        return str(self._weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # As bytes, which no change of dtype concerns.
        return super()._apply(lambda tensor: fn(tensor.view(torch.uint8)).view(tensor.dtype), recurse)

    def __getitem__(self, expert: object) -> Tensor:
        raise TypeError(INSTALL)

    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            raise AttributeError(f"{error}; {INSTALL}") from None


_described: weakref.WeakKeyDictionary[nn.Module, dict[str, QuantizedWeight]] = weakref.WeakKeyDictionary()


def stored_weight(module: nn.Module, name: str) -> Tensor | QuantizedWeight:
    """The weight ``name`` of an experts module.

    Raises:
        TypeError, ValueError: what is stored is not quantised in a way that `moe` knows.
    """
    held = getattr(module, name)
    if isinstance(held, QuantizedProjection):
        return held.weight
    if not isinstance(held, Tensor) or held.dtype.itemsize > 1 or not hasattr(module, name + SCALES):
        return held
    scales = getattr(module, name + SCALES)
    known = _described.setdefault(module, {})
    weight = known.get(name)
    # A parameter keeps its identity when the model moves; its memory does not.
    if weight is None or weight.values.data_ptr() != held.data_ptr() or weight.device != held.device:
        weight = known[name] = _of_fp8_experts(held.detach(), scales.detach(), module.block_size)
    return weight


def one_block(rows: int, columns: int) -> tuple[int, int]:
    """The block of rows that share one scale; columns as a power of two, which `QuantizedWeight` wants."""
    return rows, 1 << max(4, (columns - 1).bit_length())


def _of_fp8_experts(values: Tensor, scales: Tensor, block: tuple[int, int] | None) -> QuantizedWeight:
    if values.dtype == torch.int8:  # expert_dtype "fp4": two numbers a byte, a power of two for every 32
        if scales.dtype != torch.float8_e8m0fnu:
            raise TypeError(f"scales must be float8_e8m0fnu for weights of 4 bits, got {scales.dtype}")
        columns = 2 * values.shape[2]
        return QuantizedWeight(values.view(torch.uint8), scales.view(torch.uint8), "mxfp4", (1, 32), columns)
    if block is None:  # one scale for all of an expert, or for its gate and for its up
        block = one_block(-(-values.shape[1] // scales.shape[1]), values.shape[2])
    return QuantizedWeight.from_fp8(values, scales, tuple(block))
