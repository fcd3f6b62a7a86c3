"""Which tensors of a checkpoint are one quantised weight, and how they become a `QuantizedWeight`.

    method of the config    stored                                                               format
    fp8                     X (N, K) float8, X_scale_inv (N / 128, K / 128)                      fp8
    mxfp4                   X_blocks (E, N, K / 32, 16) uint8, X_scales (E, N, K / 32) uint8     mxfp4
    compressed-tensors      X_packed (N, K / 8) int32, X_scale (N, K / group), X_shape (2,)      int4
                            and, with zero points, X_zero_point (N / 8, K / group) int32
    gptq                    Y.qweight (K / 8, N) int32, Y.scales (K / group, N),                 int4
                            Y.qzeros (K / group, N / 8) int32, Y.g_idx (K,) int32
    awq                     Y.qweight (K, N / 8) int32, Y.scales and Y.qzeros likewise           int4

where X is Y.weight. Each such weight takes the place of the dense tensor X that it stands for, so that
transformers' tables, which know X, say where it goes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from qllm_ops import QuantizedWeight

from .projections import one_block
from .shards import CheckpointError, StoredTensor

METHODS = ("fp8", "mxfp4", "compressed-tensors", "gptq", "awq")
"""Of quantization_config in config.json."""

PACKINGS = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm",)}
"""Those that are read of a method that has several; the first where a config does not say."""

Slots = list[tuple[StoredTensor, torch.Tensor]]


@dataclass(frozen=True)
class QuantizedTensor:
    """A quantised weight in a checkpoint, instead of a `StoredTensor` of the dense one.

    Attributes:
        name: the dense tensor's.
        shape: the dense tensor's, as the model has it.
        dtype: what it becomes where the model wants it dense and does not say as what.
        format, block: as of `QuantizedWeight`.
        values, scales, zeros: where they are; ``zeros`` is None where there are no zero points.
        order: the group of every column, where that is stored.
        packing: one of PACKINGS, whose parts have inputs as rows; "" lies as `QuantizedWeight` has it.
        transposed: ``shape`` is (E, K, N), while the values lie as (E, N, K).
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    format: str
    block: tuple[int, int]
    values: StoredTensor
    scales: StoredTensor
    zeros: StoredTensor | None = None
    order: StoredTensor | None = None
    packing: str = ""
    transposed: bool = False

    @property
    def file(self) -> Any:
        return self.values.file

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.values, self.scales, self.zeros, self.order) if part)

    @property
    def rows_and_columns(self) -> tuple[int, int]:
        """N and K."""
        n, k = self.shape[-2:]
        return (k, n) if self.transposed else (n, k)

    def __str__(self) -> str:
        return str(self.values)


# -- finding them ----------------------------------------------------------------------------------------


def gather(
    stored: dict[str, StoredTensor], quantization: dict[str, Any], dtype: torch.dtype
) -> dict[str, StoredTensor | QuantizedTensor]:
    """``stored`` with every quantised weight in the place of its parts.

    Args:
        quantization: quantization_config of config.json, of one of METHODS.
        dtype: of weights that the model wants dense.

    Raises:
        CheckpointError: a part is missing, surplus, or of a kind that is not read.
    """
    find = {"fp8": _fp8, "mxfp4": _mxfp4, "compressed-tensors": _packed}.get(
        quantization["quant_method"], _gptq_or_awq
    )
    left = dict(stored)
    found = {tensor.name: tensor for tensor in find(left, quantization, dtype)}
    for name in found.keys() & left.keys():
        raise CheckpointError(f"{left[name]} is there twice, dense and quantised ({found[name]})")
    for tensor in left.values():
        if tensor.code.startswith("F8_"):
            raise CheckpointError(f"{tensor} is float8, but no tensor of its scales is there")
    return left | found


def _fp8(
    left: dict[str, StoredTensor], quantization: dict[str, Any], dtype: torch.dtype
) -> Iterator[QuantizedTensor]:
    for name in [name for name in left if name.endswith("activation_scale")]:
        del left[name]  # fixed ones, which `moe` does not use
    for name in [name for name in left if name.endswith("_scale_inv")]:
        scales = left.pop(name)
        values = _take(left, name.removesuffix("_scale_inv"), scales)
        if values.code != "F8_E4M3":  # DeepSeek-V4's experts are I8, two numbers of 4 bits each
            raise CheckpointError(
                f"{values} is {values.code}, wanted F8_E4M3; from_pretrained and install may take it"
            )
        block = quantization.get("weight_block_size") or one_block(*values.shape[-2:])
        yield QuantizedTensor(values.name, values.shape, dtype, "fp8", tuple(block), values, scales)


def _mxfp4(
    left: dict[str, StoredTensor], quantization: dict[str, Any], dtype: torch.dtype
) -> Iterator[QuantizedTensor]:
    for name in [name for name in left if name.endswith("_blocks")]:
        base = name.removesuffix("_blocks")
        values = left.pop(name)
        scales = _take(left, base + "_scales", values)
        if len(values.shape) != 4 or values.shape[3] != 16:
            raise CheckpointError(f"{values} has shape {list(values.shape)}, wanted [E, N, K / 32, 16]")
        experts, rows, groups, _ = values.shape
        shape = (experts, 32 * groups, rows)
        yield QuantizedTensor(base, shape, dtype, "mxfp4", (1, 32), values, scales, transposed=True)


def _packed(
    left: dict[str, StoredTensor], quantization: dict[str, Any], dtype: torch.dtype
) -> Iterator[QuantizedTensor]:
    groups = quantization.get("config_groups") or {}
    bits = {(group.get("weights") or {}).get("num_bits") for group in groups.values()}
    for name in [name for name in left if name.endswith("_packed")]:
        base = name.removesuffix("_packed")
        values = left.pop(name)
        scales = _take(left, base + "_scale", values)
        zeros = left.pop(base + "_zero_point", None)
        left.pop(base + "_shape", None)
        for other in (base + "_g_idx", base + "_global_scale"):
            if other in left:
                raise CheckpointError(
                    f"{left[other]}: only 4-bit groups in order are read, wanted no such tensor"
                )
        if len(values.shape) != 2 or values.code != "I32" or len(scales.shape) != 2:
            raise CheckpointError(
                f"{values} is {values.code} {list(values.shape)} with scales {list(scales.shape)}, "
                "wanted I32 [N, K / 8] and [N, K / group]"
            )
        if bits != {4}:
            raise CheckpointError(f"{values} has {bits or 'no'} bits by config.json, wanted 4")
        rows, columns, groups = values.shape[0], 8 * values.shape[1], scales.shape[1]
        group = columns // groups if columns % groups == 0 else 0
        if zeros and (zeros.code != "I32" or zeros.shape != (-(-rows // 8), groups)):
            raise CheckpointError(
                f"{zeros} is {zeros.code} {list(zeros.shape)}, wanted I32 {[-(-rows // 8), groups]}, eight "
                "rows in one"
            )
        yield QuantizedTensor(base, (rows, columns), dtype, "int4", (1, group), values, scales, zeros)


def _gptq_or_awq(
    left: dict[str, StoredTensor], quantization: dict[str, Any], dtype: torch.dtype
) -> Iterator[QuantizedTensor]:
    method, bits = quantization["quant_method"], quantization.get("bits")
    named = quantization.get("version") if method == "awq" else None  # AutoAWQ's word for the other
    packing = (named or quantization.get("checkpoint_format") or PACKINGS[method][0]).lower()
    for name in [name for name in left if name.endswith(".qweight")]:
        values, base = left.pop(name), name.removesuffix(".qweight")
        if bits != 4 or packing not in PACKINGS[method]:
            raise CheckpointError(
                f"{values} has {bits} bits, packed as {packing!r}, by config.json; wanted 4 bits in "
                f"{' or '.join(PACKINGS[method])}"
            )
        scales, zeros = (_take(left, f"{base}.{part}", values) for part in ("scales", "qzeros"))
        order = left.pop(f"{base}.g_idx", None)
        if values.code != "I32" or len(values.shape) != 2 or len(scales.shape) != 2:
            raise CheckpointError(
                f"{values} is {values.code} {list(values.shape)} with scales {list(scales.shape)}, "
                "wanted I32 and scales, of two dimensions each"
            )
        columns = values.shape[0] * (1 if method == "awq" else 8)
        groups, rows = scales.shape
        for part, wanted in ((zeros, (groups, -(-rows // 8))), (order, (columns,))):
            if part and part.shape != wanted:
                raise CheckpointError(f"{part} has shape {list(part.shape)}, wanted {list(wanted)}")
        block = (1, columns // groups if groups and columns % groups == 0 else 0)
        parts = (values, scales, zeros, order)
        yield QuantizedTensor(f"{base}.weight", (rows, columns), dtype, "int4", block, *parts, packing)


def _take(left: dict[str, StoredTensor], name: str, beside: StoredTensor) -> StoredTensor:
    if name not in left:
        raise CheckpointError(f"{beside} belongs to a tensor {name}, which is in no file")
    return left.pop(name)


# -- reading them ----------------------------------------------------------------------------------------


class Assembly:
    """The memory of one `QuantizedWeight`, and which stored tensor fills which part of it.

    Args:
        sources: one tensor of all experts; or for each of what lies below one another (gate and up) a
            list with one tensor for each expert.

    Attributes:
        slots: what is to be read where, before `weight` is called.

    Raises:
        CheckpointError: the tensors are of different formats or shapes, or their blocks do not meet.
    """

    def __init__(self, sources: list[list[QuantizedTensor]], device: torch.device):
        self.first = sources[0][0]
        self.slots: Slots = []
        for tensor in (tensor for tensors in sources for tensor in tensors):
            _check_alike(self.first, tensor)
        rows, block = self.first.rows_and_columns[0], 8 if self.first.zeros else self.first.block[0]
        self.parts = len(sources)
        if len(sources) > 1 and rows % block:
            raise CheckpointError(
                f"{self.first}: blocks of {block} rows do not divide its {rows} rows, so what lies below one "
                "another would share blocks; this is not supported"
            )
        self._values, self._scales, self._zeros, self._order = (
            self._allocate([[getattr(tensor, part) for tensor in tensors] for tensors in sources], device)
            for part in ("values", "scales", "zeros", "order")
        )

    def _allocate(
        self, sources: list[list[StoredTensor | None]], device: torch.device
    ) -> torch.Tensor | None:
        first = sources[0][0]
        if first is None:
            return None
        dtype = torch.float32 if first is self.first.scales and self.first.format == "fp8" else first.dtype
        if len(first.shape) > 2:  # all experts in one tensor
            whole = torch.empty(first.shape, dtype=dtype, device=device)
            self.slots.append((first, whole))
            return whole.flatten(2)
        rows, columns = first.shape if len(first.shape) == 2 else (math.prod(first.shape), 1)
        whole = torch.empty(len(sources[0]), len(sources) * rows, columns, dtype=dtype, device=device)
        apart = whole.unflatten(1, (len(sources), rows))
        self.slots += [
            (tensor, apart[expert, part])
            for part, tensors in enumerate(sources)
            for expert, tensor in enumerate(tensors)
        ]
        return whole

    def weight(self) -> QuantizedWeight:
        """Raises CheckpointError for numbers that are none."""
        format, block = self.first.format, self.first.block
        columns = self.first.rows_and_columns[1]
        try:
            if self.first.packing:
                return self._rearranged()
            if format == "int4":
                return QuantizedWeight.from_compressed_tensors(self._values, self._scales, self._zeros)
            return QuantizedWeight(self._values, self._scales, format, block, columns)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{self.first}, or one that lies beside it: {error}") from error

    def _rearranged(self) -> QuantizedWeight:
        """Of parts with inputs as rows, one below the other: each by itself, and then put together."""
        stored = (self._values, self._zeros, self._scales, self._order)
        apart = [None if of is None else of.unflatten(1, (self.parts, -1)) for of in stored]
        weights = []
        for part in range(self.parts):
            values, zeros, scales, order = (None if of is None else of[:, part] for of in apart)
            if self.first.packing == "gemm":
                weights.append(QuantizedWeight.from_awq(values, zeros, scales))
            else:
                v2 = self.first.packing == "gptq_v2"
                order = None if order is None else order[..., 0]
                weights.append(QuantizedWeight.from_gptq(values, zeros, scales, order, v2=v2))
        return weights[0] if len(weights) == 1 else _below_one_another(weights)

    def dequantized(self) -> torch.Tensor:
        """In float32 and the shape of the dense tensor; of one source."""
        dense = self.weight().dequantize()
        return (dense.mT if self.first.transposed else dense).reshape(self.first.shape)


def _below_one_another(weights: list[QuantizedWeight]) -> QuantizedWeight:
    """Of int4: one weight with the rows of all."""
    first, zeros = weights[0], None
    if any(weight.zeros is not None for weight in weights):
        eights = [torch.full_like(weight.scales, 8, dtype=torch.uint8) for weight in weights]
        zeros = [eight if w.zeros is None else w.zeros for w, eight in zip(weights, eights, strict=True)]
        zeros = torch.cat(zeros, 1)
    values, scales = (
        torch.cat([getattr(weight, part) for weight in weights], 1) for part in ("values", "scales")
    )
    return QuantizedWeight(values, scales, first.format, first.block, first.columns, zeros)


def _check_alike(first: QuantizedTensor, other: QuantizedTensor) -> None:
    for what in ("format", "block", "shape"):
        wanted, got = getattr(first, what), getattr(other, what)
        if wanted != got:
            raise CheckpointError(
                f"{other} has {what} {got}, but {first} beside it {wanted}; wanted them alike"
            )
    for what, words in (("zeros", "zero points"), ("order", "a g_idx")):
        has = [tensor for tensor in (first, other) if getattr(tensor, what)]
        if len(has) == 1:
            none = other if has[0] is first else first
            raise CheckpointError(f"{has[0]} has {words}, but {none} beside it none; wanted them alike")
    if first.scales.shape != other.scales.shape or first.scales.code != other.scales.code:
        raise CheckpointError(
            f"{other.scales} is {other.scales.code} {list(other.scales.shape)}, but {first.scales} beside it "
            f"{first.scales.code} {list(first.scales.shape)}; wanted them alike"
        )
