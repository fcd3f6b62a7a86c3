"""Quantised weights of experts: what they are, and how a dense weight becomes one.

Three formats, all with rows of K consecutive numbers, as (E, N, K) dense weights have them:

    format   values                         one scale for              bits per number, scales included
    fp8      float8_e4m3fn (E, N, K)        128 x 128, as float32      8 + 32 / 16384
    mxfp4    e2m1, two a byte (E, N, K/2)   32 of a row, as 2 ** n     4 + 8 / 32
    int4     two a byte (E, N, K/2)         a group of a row, 16 bits  4 + 16 / group

Two numbers of a byte are neighbours in their row, the first in the low half. An int4 half h stands
for h - 8; or for h - zero where every scale has a zero point beside it, a byte each (8 / group bits more).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qllm_ops.modes import in_memory, plain
from qllm_ops.words import apart, are_beside, in_words

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The magnitudes of four-bit floating point: a bit of sign, two of exponent, one of mantissa."""

CODES = {
    # what each of the 16 halves of a byte stands for
    "mxfp4": (*E2M1, *(-value for value in E2M1)),
    "int4": tuple(float(code - 8) for code in range(16)),
}
LARGEST = {"fp8": 448.0, "mxfp4": 6.0, "int4": 8.0}
FORMATS = tuple(LARGEST)

SCALE_DTYPES = {
    "fp8": (torch.float32,),
    "mxfp4": (torch.uint8,),
    "int4": (torch.bfloat16, torch.float16, torch.float32),
}

PIECE = 2**15
"""How many numbers are quantised at a time on a CPU: what is made of them stays in its cache, and for so few
torch wakes no other threads, which costs more than it brings where somebody else needs the cores."""

W8A8 = "fp8_w8a8"
"""What a product of float8 weights by float8 activations is called: not a format of weights."""

ROW_GROUP = 128
"""Columns of activations that share a scale: those that DeepSeek-V3 was trained with, and few enough for what
the matrix units of an H100 add up in less than float32."""

INT4_DIVISORS = (6.5, 7.0, 7.5, 8.0, 8.75, 9.5)
"""Steps that the largest number of a group may be taken as; the one with the least squared error is. The
range ends at 7 and -8: beyond that the largest numbers are cut off, and all the others get finer steps."""

INT4_SPANS = (15.0, 16.0, 17.25, 18.75)
"""The same for the span from a group's least number to its largest, 0 included, which has 15 steps."""


@dataclass(frozen=True, eq=False, repr=False)
class QuantizedWeight:
    """The weights of E experts, (E, N, K), as `moe` multiplies by them: value times scale.

    Checked when it is made, every value included, so that no call has to: that waits for the device once.
    `torch.save` and `torch.load` take it, with weights_only=True as well where qllm_ops is imported; what is
    loaded is checked again.

    Attributes:
        values: (E, N, K) float8_e4m3fn, or (E, N, ceil(K / 2)) uint8 with two numbers a byte.
        scales: (E, ceil(N / block[0]), ceil(K / block[1])), positive and finite. float32 for "fp8"; bfloat16,
            float16 or float32 for "int4"; uint8 exponents n for "mxfp4", standing for 2 ** (n - 127). A copy
            of what was given, if it takes one for kernels to read them in words of 4 bytes, row after row.
        format: "fp8", "mxfp4" or "int4".
        block: rows and columns that share a scale; the last of either may be shorter. Columns are a power of
            two, at least 16. One row except in "fp8"; 32 columns in "mxfp4".
        columns: K.
        zeros: of an asymmetric "int4", uint8 of 0 to 15, in the shape of the scales; a half h stands for
            (h - zero) * scale. None: all are 8. Copied as the scales are; in groups of 128 or more, with
            scales of 16 bits, into the same words.
        largest: no number is larger than this in magnitude.

    Raises:
        TypeError, ValueError: names the field, what came and what was wanted.
    """

    values: Tensor
    scales: Tensor
    format: str
    block: tuple[int, int]
    columns: int
    zeros: Tensor | None = None
    largest: float = field(init=False)

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {self.format!r}")
        _check_block(self.format, self.block)
        if type(self.columns) is not int:
            raise TypeError(f"columns must be an integer, got {self.columns!r}")
        self._check_values()
        self._check_scales()
        self._check_zeros()
        scales, zeros = in_words(self.scales, self.zeros, self.block[1])
        object.__setattr__(self, "scales", scales)
        object.__setattr__(self, "zeros", zeros)
        largest_scale = self._wide_scales(self.scales).max().item()
        object.__setattr__(self, "largest", self._largest_value * largest_scale)

    @classmethod
    def checked(
        cls, values: Tensor, scales: Tensor, format: str, block: Sequence[int], columns: int,
        zeros: Tensor | None, largest: float,
    ) -> QuantizedWeight:  # fmt: skip
        """Of what a QuantizedWeight had already: no number is checked, so no device is waited for."""
        weight = object.__new__(cls)
        if in_memory(values):  # else nothing is where it will be
            scales, zeros = in_words(scales, zeros, block[1])
        attributes = {"values": values, "scales": scales, "format": format, "block": tuple(block)}
        attributes |= {"columns": columns, "zeros": zeros, "largest": largest}
        for name, value in attributes.items():
            object.__setattr__(weight, name, value)
        return weight

    @classmethod
    def from_fp8(
        cls, weight: Tensor, weight_scale_inv: Tensor, block: tuple[int, int] = (128, 128)
    ) -> QuantizedWeight:
        """From a checkpoint such as DeepSeek-V3's: (E, N, K) float8_e4m3fn and a scale for every block.

        Scales of 8 or 16 bits are widened; the name is theirs, a weight is value times scale.
        """
        scales = weight_scale_inv
        if isinstance(scales, Tensor) and scales.is_floating_point() and scales.itemsize < 4:
            scales = scales.float()
        columns = weight.shape[-1] if isinstance(weight, Tensor) and weight.dim() else 0
        return cls(weight, scales, "fp8", tuple(block) if isinstance(block, list) else block, columns)

    @classmethod
    def from_mxfp4(cls, blocks: Tensor, scales: Tensor) -> QuantizedWeight:
        """From a checkpoint such as gpt-oss's: (E, N, K / 32, 16) uint8 and (E, N, K / 32) uint8."""
        if not isinstance(blocks, Tensor) or blocks.dim() != 4 or blocks.shape[3] != 16:
            got = tuple(blocks.shape) if isinstance(blocks, Tensor) else type(blocks).__name__
            raise ValueError(f"blocks must be a tensor (E, N, K / 32, 16), got {got}")
        return cls(blocks.flatten(2), scales, "mxfp4", (1, 32), blocks.shape[2] * 32)

    @classmethod
    def from_compressed_tensors(
        cls, weight_packed: Tensor, weight_scale: Tensor, weight_zero_point: Tensor | None = None
    ) -> QuantizedWeight:
        """From a 4-bit "pack-quantized" checkpoint: (E, N, K / 8) int32 and (E, N, K / group).

        The group follows from the shapes, so K is a multiple of it. An asymmetric one has zero points too,
        (E, ceil(N / 8), K / group) int32: eight rows of the output in one, the first in the lowest bits.
        """
        for name, tensor in (("weight_packed", weight_packed), ("weight_scale", weight_scale)):
            if not isinstance(tensor, Tensor) or tensor.dim() != 3:
                got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
                raise ValueError(f"{name} must be a tensor of three dimensions, the experts first, got {got}")
        if weight_packed.dtype != torch.int32:
            raise TypeError(f"weight_packed must be int32, eight numbers each, got {weight_packed.dtype}")
        columns, groups = 8 * weight_packed.shape[2], weight_scale.shape[2]
        if groups == 0 or columns % groups:
            raise ValueError(
                f"weight_scale must be (E, N, K / group) with K = {columns} as in weight_packed, "
                f"got shape {tuple(weight_scale.shape)}"
            )
        # The first of the eight is in the lowest bits, which is the first byte.
        values, block = weight_packed.view(torch.uint8), (1, columns // groups)
        zeros = None if weight_zero_point is None else _zeros_of_rows(weight_zero_point, weight_scale)
        return cls(values, weight_scale, "int4", block, columns, zeros)

    @classmethod
    def from_gptq(
        cls, qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None = None, v2: bool = False
    ) -> QuantizedWeight:
        """From a 4-bit checkpoint of GPTQ (AutoGPTQ, GPTQModel), whose rows are the inputs.

        Args:
            qweight: (E, K / 8, N) int32: eight numbers of an output in one, the first in the lowest bits.
            qzeros: (E, K / group, N / 8) int32: zero points of eight outputs in one.
            scales: (E, K / group, N).
            g_idx: (E, K), the group of every input. None: they are in order, which is all that is taken.
            v2: the zero points are those; otherwise each is stored less 1, so that 16 is none.
        """
        _check_words("qweight", qweight, qzeros, scales, rows_in_one=8)
        columns, groups = 8 * qweight.shape[1], scales.shape[1]
        if g_idx is not None:
            if not isinstance(g_idx, Tensor):
                raise TypeError(f"g_idx must be a tensor or None, got {type(g_idx).__name__}")
            in_order = torch.arange(columns, device=g_idx.device) // (columns // groups)
            if g_idx.shape[-1] != columns or not (g_idx == in_order).all():
                raise ValueError(
                    f"g_idx must be groups in order, input k in group k // {columns // groups} "
                    "(desc_act=False), got others"
                )
        zeros = _numbers_of(qzeros).mT
        if not v2:
            if (zeros == 15).any():
                raise ValueError("qzeros must be at most 14, less by 1 than what they stand for, got 15")
            zeros = zeros + 1
        values = qweight.mT.contiguous().view(torch.uint8)
        return cls(values, scales.mT, "int4", (1, columns // groups), columns, _zeros_or_none(zeros))

    @classmethod
    def from_awq(cls, qweight: Tensor, qzeros: Tensor, scales: Tensor) -> QuantizedWeight:
        """From a 4-bit checkpoint of AWQ ("gemm" version), whose rows are the inputs.

        Args:
            qweight: (E, K, N / 8) int32: numbers of eight outputs in one, in AWQ_PLACES.
            qzeros: (E, K / group, N / 8) int32: zero points likewise.
            scales: (E, K / group, N).
        """
        _check_words("qweight", qweight, qzeros, scales, rows_in_one=1)
        columns, groups = qweight.shape[1], scales.shape[1]
        values = torch.stack([_awq_by_outputs(expert) for expert in qweight]).view(torch.uint8)
        zeros = _numbers_of(qzeros).unflatten(-1, (-1, 8))[..., list(AWQ_PLACES)].flatten(-2)
        zeros = _zeros_or_none(zeros.mT)
        return cls(values, scales.mT, "int4", (1, columns // groups), columns, zeros)

    # -- what it looks like ----------------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        """(E, N, K), as of the dense weight."""
        return torch.Size((*self.values.shape[:2], self.columns))

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def largest_scale(self) -> float:
        return self.largest / self._largest_value

    @property
    def _largest_value(self) -> float:
        return LARGEST[self.format] if self.zeros is None else 15.0

    @property
    def nbytes(self) -> int:
        zeros = self.zero_words
        padded = [self.scales] if zeros is None or zeros is self.scales else [self.scales, zeros]
        return self.values.nbytes + sum(x.stride(0) * x.shape[0] * x.itemsize for x in padded)

    @functools.cached_property
    def zero_words(self) -> Tensor | None:
        """Where kernels find the zero points: ``zeros``, or ``scales`` where they share words with these."""
        return self.scales if are_beside(self.scales, self.zeros) else self.zeros

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same on another device. It has no dtype: it is widened to that of hidden_states."""
        if not isinstance(device, (str, torch.device, int)):
            raise TypeError(f"device must be a device, got {device!r}; a quantised weight has no other dtype")
        zeros = None if self.zeros is None else self.zeros.to(device)
        return QuantizedWeight(
            self.values.to(device), self.scales.to(device), self.format, self.block, self.columns, zeros
        )

    def __reduce__(self) -> tuple:
        """For copy, pickle and `torch.load` alike: checked as any other."""
        scales, zeros = apart(self.scales, self.zeros)
        parts = (self.values, scales, self.format, self.block, self.columns, zeros)
        return _rebuild, parts

    def __repr__(self) -> str:
        return f"<QuantizedWeight {self}>"  # and no numbers, which would have to be waited for

    def __str__(self) -> str:
        scale = "a scale" if self.zeros is None else "a scale and a zero point"
        return f"{self.format} {tuple(self.shape)}, {scale} for {self.block[0]} x {self.block[1]}"

    # -- what it stands for ----------------------------------------------------------------------

    def dequantize(self, expert: int | None = None) -> Tensor:
        """The numbers that it stands for, in float32: (E, N, K), or (N, K) of one expert. The definition."""
        which = slice(None) if expert is None else expert
        wide, scales = self._widen(self.values[which]), self._wide_scales(self.scales[which])
        rows, columns = self.block
        if self.zeros is not None:
            shifts = 8.0 - self.zeros[which].repeat_interleave(columns, -1)[..., : self.columns]
            wide += shifts  # small integers: no rounding
        if rows > 1:
            scales = scales.repeat_interleave(rows, -2)[..., : wide.shape[-2], :]
        if self.columns % columns == 0:
            wide.unflatten(-1, (-1, columns)).mul_(scales[..., None])
            return wide
        return wide.mul_(scales.repeat_interleave(columns, -1)[..., : self.columns])

    def _widen(self, values: Tensor) -> Tensor:
        """The numbers without their scales: bits are moved, which takes a fraction of looking them up."""
        if self.format == "fp8":
            return _float8_to_float32(values)
        # Two halves of a byte to two bytes at once, the low half first.
        pairs = values.to(torch.int16)
        pairs.bitwise_or_(pairs << 4).bitwise_and_(0x0F0F)
        if self.format == "int4":
            wide = pairs.view(torch.uint8).float().sub_(8)
        else:  # as float8: the sign to bit 7, exponent and mantissa to bits 4 and below
            float8 = (pairs & 0x0808).bitwise_left_shift_(4)
            float8.bitwise_or_(pairs.bitwise_and_(0x0707).bitwise_left_shift_(2))
            wide = _float8_to_float32(float8.view(torch.uint8)).mul_(64)  # 2 to the difference of the biases
        return wide if wide.shape[-1] == self.columns else wide[..., : self.columns].contiguous()

    def _wide_scales(self, scales: Tensor) -> Tensor:
        if self.format != "mxfp4":
            return scales.float()
        bits = scales.int() << 23  # the exponent of a float32; 0 is of numbers without a leading 1
        return torch.where(scales == 0, 0x00400000, bits).view(torch.float32)

    # -- what is refused -------------------------------------------------------------------------

    def _check_values(self) -> None:
        wanted = torch.float8_e4m3fn if self.format == "fp8" else torch.uint8
        last = self.columns if self.format == "fp8" else -(-self.columns // 2)
        layout = "(E, N, K)" if self.format == "fp8" else "(E, N, ceil(K / 2))"
        _check_tensor("values", self.values, (wanted,))
        shape = tuple(self.values.shape)
        if len(shape) != 3 or min(shape) < 1 or self.columns < 1 or shape[2] != last:
            raise ValueError(
                f"values must be {layout} with K = {self.columns} in {self.format}, got shape {shape}"
            )
        if self.format == "fp8":
            # One expert at a time: a layer of DeepSeek-V3 has 7.5 GB of values, and this makes copies.
            nans = [((expert.view(torch.uint8) & 0x7F) == 0x7F).any() for expert in self.values]
            if torch.stack(nans).any():
                raise ValueError("values must be numbers, got NaN")

    def _check_scales(self) -> None:
        _check_tensor("scales", self.scales, SCALE_DTYPES[self.format])
        experts, rows, columns = self.shape
        wanted = (experts, -(-rows // self.block[0]), -(-columns // self.block[1]))
        if tuple(self.scales.shape) != wanted:
            raise ValueError(
                f"scales must be {wanted}, one for each {self.block[0]} x {self.block[1]} of "
                f"{tuple(self.shape)}, got shape {tuple(self.scales.shape)}"
            )
        if self.scales.device != self.values.device:
            raise ValueError(f"scales are on {self.scales.device}, but values on {self.values.device}")
        if self.format == "mxfp4":
            if (self.scales == 255).any():
                raise ValueError("scales must be exponents of 0 to 254, got 255, which stands for NaN")
        elif not ((self.scales > 0) & (self.scales < torch.inf)).all():
            worst = self.scales.flatten()[(~((self.scales > 0) & (self.scales < torch.inf))).flatten()][0]
            raise ValueError(f"scales must be positive and finite, got {worst.item()}")

    def _check_zeros(self) -> None:
        if self.zeros is None:
            return
        if self.format != "int4":
            raise ValueError(f"zeros must be None in {self.format}, only int4 has zero points, got a tensor")
        _check_tensor("zeros", self.zeros, (torch.uint8,))
        if self.zeros.shape != self.scales.shape:
            raise ValueError(
                f"zeros must be {tuple(self.scales.shape)}, one for each scale, got {tuple(self.zeros.shape)}"
            )
        if self.zeros.device != self.values.device:
            raise ValueError(f"zeros are on {self.zeros.device}, but values on {self.values.device}")
        if (self.zeros > 15).any():
            raise ValueError(f"zeros must be 0 to 15, got {self.zeros.max().item()}")


def _rebuild(*parts: object) -> QuantizedWeight:
    """What a pickle of a weight names. A function, so that the constructor cannot be passed by."""
    return QuantizedWeight(*parts)


torch.serialization.add_safe_globals([_rebuild])  # for torch.load(..., weights_only=True)


def _check_block(format: str, block: tuple[int, int]) -> None:
    if not (isinstance(block, tuple) and len(block) == 2 and all(type(size) is int for size in block)):
        raise TypeError(f"block must be (rows, columns), two integers, got {block!r}")
    rows, columns = block
    if columns < 16 or columns & (columns - 1):
        raise ValueError(f"block must have a power of two of at least 16 as columns, got {block}")
    if rows < 1 or (rows != 1 and format != "fp8"):
        raise ValueError(f"block must have {'1 row or more' if format == 'fp8' else '1 row'}, got {block}")
    if format == "mxfp4" and columns != 32:
        raise ValueError(f"block must be (1, 32) in mxfp4, got {block}")


def _check_tensor(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    if tensor.is_meta:
        raise ValueError(f"{name} must be in memory, got a tensor on the meta device")
    if name == "values" and not tensor.is_contiguous():
        raise ValueError(f"values must be contiguous, got strides {tensor.stride()}")


def _float8_to_float32(values: Tensor) -> Tensor:
    """From e4m3 by way of float16; torch's own conversion takes some ten times as long on a CPU."""
    bits = values.view(torch.int8).to(torch.int16)  # whose sign fills the upper byte
    bits.bitwise_left_shift_(7).bitwise_and_(~0x4000)
    return bits.view(torch.float16).float().mul_(256)


def _zeros_of_rows(weight_zero_point: Tensor, weight_scale: Tensor) -> Tensor:
    """Zero points of rows, (E, N, K / group) uint8, from eight rows in an int32."""
    experts, rows, groups = weight_scale.shape
    wanted = (experts, -(-rows // 8), groups)
    if not isinstance(weight_zero_point, Tensor) or weight_zero_point.dtype != torch.int32:
        got = getattr(weight_zero_point, "dtype", type(weight_zero_point).__name__)
        raise TypeError(f"weight_zero_point must be int32, eight rows each, got {got}")
    if tuple(weight_zero_point.shape) != wanted:
        got = tuple(weight_zero_point.shape)
        raise ValueError(f"weight_zero_point must be (E, ceil(N / 8), K / group) = {wanted}, got shape {got}")
    shifts = 4 * torch.arange(8, device=weight_zero_point.device)
    halves = (weight_zero_point[:, :, None, :] >> shifts[:, None]) & 15
    return halves.flatten(1, 2)[:, :rows].to(torch.uint8)


AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word of AWQ the numbers of outputs 0 to 7 are, counted from the lowest bits."""


def _check_words(name: str, words: Tensor, qzeros: Tensor, scales: Tensor, rows_in_one: int) -> None:
    """What GPTQ and AWQ store, (E, K / rows_in_one, ...) and (E, K / group, ...), before it is rearranged."""
    for which, tensor in ((name, words), ("qzeros", qzeros), ("scales", scales)):
        if not isinstance(tensor, Tensor) or tensor.dim() != 3:
            got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{which} must be a tensor of three dimensions, the experts first, got {got}")
        if which != "scales" and tensor.dtype != torch.int32:
            raise TypeError(f"{which} must be int32, eight numbers each, got {tensor.dtype}")
    experts, rows, last = words.shape
    columns, outputs = rows * rows_in_one, last * (1 if rows_in_one > 1 else 8)
    groups = scales.shape[1]
    if groups == 0 or columns % groups or tuple(scales.shape) != (experts, groups, outputs):
        raise ValueError(
            f"scales must be (E, K / group, N) with E = {experts}, K = {columns} and N = {outputs} as in "
            f"{name}, got shape {tuple(scales.shape)}"
        )
    if columns % 8:
        raise ValueError(f"{name} must be of a multiple of 8 inputs, got shape {tuple(words.shape)}")
    if outputs % 8 or tuple(qzeros.shape) != (experts, groups, outputs // 8):
        raise ValueError(
            f"qzeros must be (E, K / group, N / 8) = ({experts}, {groups}, {outputs} / 8), "
            f"got shape {tuple(qzeros.shape)}"
        )


def _numbers_of(words: Tensor) -> Tensor:
    """(..., C) int32 -> (..., 8 * C) uint8, the lowest four bits first."""
    halves = words.contiguous().view(torch.uint8)
    return torch.stack((halves & 15, halves >> 4), -1).flatten(-2)


def _awq_by_outputs(words: Tensor) -> Tensor:
    """(K, N / 8) int32 in AWQ_PLACES -> (N, K / 8) int32, the first of eight inputs in the lowest bits."""
    outputs = words.new_empty(words.shape[1], 8, len(words) // 8)
    at_once = 64 if words.device.type == "cpu" else len(outputs)  # of 4096 inputs, what a cache holds
    for some, of_some in zip(words.split(at_once, 1), outputs.split(at_once), strict=True):
        eights = some.unflatten(0, (-1, 8))
        for output, place in enumerate(AWQ_PLACES):
            numbers = (eights >> 4 * place).bitwise_and_(15)
            packed = numbers[:, 0]
            for i in range(1, 8):
                packed.bitwise_or_(numbers[:, i].bitwise_left_shift_(4 * i))
            of_some[:, output] = packed.mT
    return outputs.flatten(0, 1)


def _zeros_or_none(zeros: Tensor) -> Tensor | None:
    """None for a symmetric weight, which is stored with zero points in these formats as well."""
    return None if (zeros == 8).all() else zeros


# -- quantising dense weights ------------------------------------------------------------------------------


def quantize_fp8(weight: Tensor, block: tuple[int, int] = (128, 128)) -> QuantizedWeight:
    """Quantise (E, N, K) of any floating-point dtype to float8_e4m3fn, the largest of a block becoming 448.

    One expert at a time. Raises TypeError, ValueError for what is no such tensor, or not finite.
    """
    _check_block("fp8", block)
    rows, columns = block

    def quantize(expert: Tensor) -> tuple[Tensor, Tensor]:
        n, k = expert.shape
        blocks = _padded(expert, rows, columns).unflatten(0, (-1, rows)).unflatten(2, (-1, columns))
        scales = _scale_of(blocks.abs().amax((1, 3), keepdim=True), 448.0, torch.float32)
        values = (blocks / scales).clamp_(-448, 448).flatten(2).flatten(0, 1)[:n, :k]
        return values.contiguous().to(torch.float8_e4m3fn), scales[:, 0, :, 0]

    return _by_expert(weight, quantize, "fp8", block)


def quantize_mxfp4(weight: Tensor) -> QuantizedWeight:
    """Quantise (E, N, K) of any floating-point dtype to 4-bit floating point, 32 of a row to a power of two.

    Of the two powers that come into question, one cuts the largest numbers off and one has coarser steps:
    the one with the least squared error is taken. One expert at a time. Raises as :func:`quantize_fp8`.
    """

    def quantize(expert: Tensor) -> tuple[Tensor, Tensor]:
        groups = _padded(expert, 1, 32).unflatten(1, (-1, 32))
        # The largest number is in [2 ** (n - 1), 2 ** n), and 4 is the largest power of two among the values.
        exponents = torch.frexp(groups.abs().amax(2, keepdim=True)).exponent - 3
        tried = [(exponents + more).clamp_(-127, 127) for more in (0, 1)]
        one = torch.ones_like(groups[:, :, :1])
        scales = [torch.ldexp(one, n) for n in tried]
        best = _least_error(groups, scales, [_nearest_e2m1] * 2)
        values = _nearest_e2m1(groups / torch.where(best == 0, *scales))
        # Times 2 ** -14 these are float16 numbers that end after two bits of exponent and one of mantissa.
        bits = values.mul_(2.0**-14).half().view(torch.int16)
        codes = ((bits >> 12) & 8).bitwise_or_((bits >> 9) & 7).to(torch.uint8)
        exponents = torch.where(best == 0, *tried) + 127
        return _packed(codes.flatten(1)[:, : expert.shape[1]]), exponents[..., 0].to(torch.uint8)

    return _by_expert(weight, quantize, "mxfp4", (1, 32))


def quantize_int4(weight: Tensor, group_size: int = 128, symmetric: bool = True) -> QuantizedWeight:
    """Quantise (E, N, K) of any floating-point dtype to integers of 4 bits, a 16-bit scale for each group.

    The scale is the one of INT4_DIVISORS, and without symmetry of INT4_SPANS too, with the least squared
    error; in the weight's dtype if that has 16 bits, else bfloat16. One expert at a time. Raises as
    :func:`quantize_fp8`.

    Args:
        group_size: numbers of a row that share a scale: a power of two, at least 16. It need not divide K.
        symmetric: False: groups have a zero point of their own, where that lessens the squared error.
    """
    block = (1, group_size)
    if type(group_size) is not int:
        raise TypeError(f"group_size must be an integer, got {group_size!r}")
    _check_block("int4", block)
    if not isinstance(symmetric, bool):
        raise TypeError(f"symmetric must be True or False, got {symmetric!r}")
    dtype = torch.float16 if isinstance(weight, Tensor) and weight.dtype == torch.float16 else torch.bfloat16

    def quantize(expert: Tensor) -> tuple[Tensor, ...]:
        groups = _padded(expert, 1, group_size).unflatten(1, (-1, group_size))
        peaks = groups.abs().amax(2, keepdim=True)
        tried = [_scale_of(peaks, divisor, dtype) for divisor in INT4_DIVISORS]
        zeros = [torch.full_like(peaks, 8)] * len(tried)
        if not symmetric:
            low, high = groups.amin(2, keepdim=True).clamp_(max=0), groups.amax(2, keepdim=True).clamp_(min=0)
            for divisor in INT4_SPANS:
                tried.append(_scale_of(high - low, divisor, dtype))
                zeros.append((7.5 - (high + low) / (2 * tried[-1])).round_().clamp_(0, 15))
        best = _least_error(groups, tried, [functools.partial(_nearest_int4, zeros=z) for z in zeros])
        scales, zero = (torch.stack(each).gather(0, best[None])[0] for each in (tried, zeros))
        codes = _nearest_int4(groups / scales, zero).add_(zero).to(torch.uint8)
        values = _packed(codes.flatten(1)[:, : expert.shape[1]])
        result = values, scales[..., 0].to(dtype)
        return result if symmetric else (*result, zero[..., 0].to(torch.uint8))

    return _by_expert(weight, quantize, "int4", block)


QUANTIZERS: dict[str, Callable[[Tensor], QuantizedWeight]] = {
    "fp8": quantize_fp8,
    "mxfp4": quantize_mxfp4,
    "int4": quantize_int4,
}


@plain
def _by_expert(
    weight: Tensor,
    quantize: Callable[[Tensor], tuple[Tensor, ...]],
    format: str,
    block: tuple[int, int],
) -> QuantizedWeight:
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dtype.itemsize < 2:
        got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"weight must be a dense floating-point tensor, got {got}")
    if weight.layout != torch.strided:
        raise TypeError(f"weight must be a dense floating-point tensor, got layout {weight.layout}")
    if not in_memory(weight):
        raise ValueError(f"weight must be in memory, got a {'meta' if weight.is_meta else 'fake'} tensor")
    if weight.dim() != 3 or weight.numel() == 0:
        raise ValueError(f"weight must be (E, N, K), none of them 0, got shape {tuple(weight.shape)}")
    at_once = PIECE if weight.device.type == "cpu" else weight[0].numel()
    rows = max(1, at_once // weight.shape[2] // block[0]) * block[0]
    for number, expert in enumerate(weight):
        expert = expert.float() if expert.dtype == torch.float64 else expert
        if not expert.isfinite().all():  # in float32, in which scales and errors are computed
            raise ValueError(f"weight must be finite in float32, got infinity or NaN in expert {number}")
        pieces = [quantize(piece.float().contiguous()) for piece in expert.split(rows)]
        parts = [torch.cat(part) for part in zip(*pieces, strict=True)]
        if number == 0:
            wholes = [part.new_empty(len(weight), *part.shape) for part in parts]
        for whole, part in zip(wholes, parts, strict=True):
            whole[number] = part
    values, scales, *zeros = wholes
    return QuantizedWeight(values, scales, format, block, weight.shape[2], *zeros)


def _padded(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """With zeros, up to multiples of these."""
    n, k = matrix.shape
    return torch.nn.functional.pad(matrix, (0, -k % columns, 0, -n % rows))


def _scale_of(peaks: Tensor, divisor: float, dtype: torch.dtype) -> Tensor:
    """Peak over divisor as ``dtype`` has it, in float32. 1 where all is zero."""
    scales = (peaks / divisor).to(dtype).float().clamp_(min=torch.finfo(dtype).tiny)
    return torch.where(peaks == 0, 1.0, scales)


def _nearest_int4(x: Tensor, zeros: Tensor) -> Tensor:
    """The nearest number of the format with these zero points, into ``x``."""
    return x.round_().clamp_(-zeros, 15 - zeros)


def _nearest_e2m1(x: Tensor) -> Tensor:
    """The nearest number of the format, into ``x``; of two the one with an even mantissa."""
    # Between two powers of two the numbers are a step apart: half, one and two from 0, 2 and 4 on.
    power_of_two = (x.view(torch.int32) & 0x7F800000).view(torch.float32)
    step = power_of_two.clamp_(1, 4).mul_(0.5)
    return x.div_(step).round_().mul_(step).clamp_(-6, 6)


def _least_error(groups: Tensor, scales: list[Tensor], nearest: list[Callable[[Tensor], Tensor]]) -> Tensor:
    """Which of these scales is the best for every group, (N, groups, 1), each with its way to round."""
    errors = [
        round_(groups / scale).mul_(scale).sub_(groups).square_().sum(2, keepdim=True)
        for scale, round_ in zip(scales, nearest, strict=True)
    ]
    return torch.stack(errors).argmin(0)


def _packed(codes: Tensor) -> Tensor:
    """Two codes of a row in a byte, the first in its low half; a missing last one is 0."""
    codes = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
    return codes[:, ::2] | codes[:, 1::2] << 4


# -- quantising activations --------------------------------------------------------------------------------


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations as `moe` multiplies by them with ``fp8_activations``. The definition, bit by bit.

    In float32, with IEEE rounding: a group's scale is its largest magnitude / 448, at least 2 ** -126, which
    it is where all is zero; a value is x * (1 / scale) rounded to the nearest float8_e4m3fn, ties to even.
    The sums of a row with infinity or NaN are NaN.

    Args:
        x: (rows, K), any floating-point dtype.

    Returns:
        (rows, K) float8_e4m3fn, and (rows, ceil(K / 128)) float32, a scale for each group of columns.
    """
    groups = _padded(x.float(), 1, ROW_GROUP).unflatten(1, (-1, ROW_GROUP))
    scales = (groups.abs().amax(2) / 448.0).clamp_(min=torch.finfo(torch.float32).tiny)
    values = (groups * scales.reciprocal()[..., None]).flatten(1)[:, : x.shape[1]]
    return values.to(torch.float8_e4m3fn), scales


def rounded_rows(x: Tensor) -> Tensor:
    """What :func:`quantize_rows` makes of (rows, K), as the numbers that it stands for, in float32."""
    values, scales = quantize_rows(x)
    return values.float().mul_(scales.repeat_interleave(ROW_GROUP, 1)[:, : x.shape[1]])
