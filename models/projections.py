"""The weights of an experts module, dense or quantised, as :func:`qllm_ops.moe` takes them.

Quantised ones come in two forms: in a `QuantizedProjection`, where `load` and `quantize_experts` put them,
and as the parameters of transformers' `FP8Experts`, a weight and its scales.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qllm_ops import QuantizedWeight
from qllm_ops.modes import in_memory
from qllm_ops.words import apart

SCALES = "_scale_inv"
"""What transformers adds to the name of an FP8 weight for that of its scales."""

UNUSED = "_activation_scale"
"""Of FP8 models whose activations have a fixed scale, which `moe` does not use."""


PARTS = ("values", "scales", "zeros")
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
INSTALL = "quantised experts are computed by qllm-ops alone: call qllm_ops.models.install(model)"


class QuantizedProjection(nn.Module):
    """A quantised weight where a class of experts has a parameter of that name: it moves with the model.

    Its tensors are buffers, and keep their dtypes when the model is given another one. The class's own
    forward cannot use it.
    """

    def __init__(self, weight: QuantizedWeight):
        super().__init__()
        self.format, self.block, self.columns = weight.format, weight.block, weight.columns
        self._hold(weight)

    def _hold(self, weight: QuantizedWeight) -> None:
        self._weight: QuantizedWeight | None = weight
        self._largest, self._said = weight.largest, str(weight)
        for name in PARTS:
            self.register_buffer(name, getattr(weight, name))

    @property
    def weight(self) -> QuantizedWeight:
        """What it holds. Described anew, which waits for the device, where the buffers are other ones."""
        known = self._weight
        if known is None or any(getattr(known, name) is not getattr(self, name) for name in PARTS):
            parts = (self.values, self.scales, self.format, self.block, self.columns, self.zeros)
            if not in_memory(self.values):  # torch.export, whose tensors have no numbers to be looked at
                return QuantizedWeight.checked(*parts, self._largest)
            known = QuantizedWeight(*parts)
            self._hold(known)
        return known

    def extra_repr(self) -> str:
        return self._said

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        def move(tensor: Tensor) -> Tensor:
            integers = tensor.view(INTEGERS[tensor.itemsize])  # which no change of dtype concerns
            moved = fn(integers)
            return tensor if moved is integers else moved.view(tensor.dtype)

        before = dict(self._buffers)
        super()._apply(move, recurse)
        if any(self._buffers[name] is not before[name] for name in PARTS):
            self._weight = None  # which would keep the memory that they were in
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        scales, zeros = apart(*(destination.get(prefix + name) for name in PARTS[1:]))
        destination[prefix + "scales"] = scales
        if zeros is not None:
            destination[prefix + "zeros"] = zeros

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in PARTS:  # which `copy_` would convert: exponents from scales, say
            given, own = state.get(prefix + name), getattr(self, name)
            if isinstance(given, Tensor) and own is not None and given.dtype != own.dtype:
                raise TypeError(f"{prefix}{name} must be {own.dtype} in {self._said}, got {given.dtype}")
        super()._load_from_state_dict(state, prefix, *args)
        self._weight = None  # other numbers, perhaps in the same tensors
        if in_memory(self.values):
            self._hold(self.weight)

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle: the weight takes the buffers along."""
        return vars(self) | {"_weight": self.weight, "_buffers": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._hold(self._weight)

    def __getitem__(self, expert: object) -> Tensor:
        raise TypeError(INSTALL)

    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            raise AttributeError(f"{error}; {INSTALL}") from None


_described: weakref.WeakKeyDictionary[nn.Module, dict[str, tuple]] = weakref.WeakKeyDictionary()
"""Of `FP8Experts`: their weights by name, and the state of the tensors that each was made of."""


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
    if not in_memory(held):
        raise ValueError(
            f"{name} must be in memory, got a {'meta' if held.is_meta else 'fake'} tensor; where this is an "
            "export: FP8Experts of transformers cannot be exported, a model of qllm_ops.models.load can"
        )
    scales = getattr(module, name + SCALES)
    described, state = _described.setdefault(module, {}), (_state_of(held), _state_of(scales))
    known, weight = described.get(name, (None, None))
    if known != state:  # of the weight, scales may be a copy, and what is said of them is
        weight = _of_fp8_experts(held.detach(), scales.detach(), module.block_size)
        described[name] = state, weight
    return weight


def _state_of(tensor: Tensor) -> tuple[torch.device, int, int]:
    """A parameter keeps its identity when its memory does not, and its memory when its numbers do not."""
    return tensor.device, tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


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
