"""Quantised numbers widened two at a time, in the two halves of a register: on NVIDIA, to 16 bits.

One instruction then serves two numbers, and nothing passes through float32. Bits are moved (`widening`), so
that a float with a mantissa and an exponent stands there, too small by a power of two (`lift`) that the scale
makes up for. Some are subnormal until then: PTX's packed fma takes them as they are. tests/test_by_two.py
runs all of these instructions on a CPU.
"""

import triton
import triton.language as tl

# Two to this power is what the bits that `widening` makes have to be multiplied by.
LIFTS = {
    ("int4", "bf16"): 0,
    ("int4", "fp16"): 0,
    ("mxfp4", "bf16"): 126,
    ("mxfp4", "fp16"): 14,
    ("fp8", "bf16"): 120,
    ("fp8", "fp16"): 8,
}
MOST = {"bf16": 3.3895313892515355e38, "fp16": 65504.0}
"""The largest number."""

# Numbers whose lowest bits of the mantissa count ones, and their bits.
INT4_OFFSETS = {"bf16": (2**7, 0x4300), "fp16": (2**10, 0x6400)}


def by_two(format: str, dtype: str, largest_scale: float) -> bool:
    """Whether weights of such scales can be widened to "bf16" or "fp16" so: it must have lifted scales."""
    return (format, dtype) in LIFTS and largest_scale * 2.0 ** LIFTS[format, dtype] <= MOST[dtype]


def _widening(format: str, dtype: str) -> str:
    inputs = 2 if format == "fp8" else 4  # the number of the first input is that of the outputs
    lines = _float8(dtype) if format == "fp8" else _halves_of_bytes(format, dtype)
    return "\n".join(["{", ".reg .b32 w, h, x, y;", f"mov.b32 w, ${inputs};", *lines, "}"])


def _float8(dtype: str) -> list[str]:
    """Four bytes of sign, four bits of exponent and three of mantissa: both to where the dtype has them."""
    shift, mask = (4, "0x07f007f0") if dtype == "bf16" else (1, "0x3f803f80")
    lines = []
    for pair, bytes in enumerate(("0x1404", "0x3424")):
        lines += [
            f"prmt.b32 x, w, 0, {bytes};",  # to the upper bytes of the halves
            f"shr.u32 y, x, {shift};",
            f"and.b32 y, y, {mask};",
            f"lop3.b32 ${pair}, x, 0x80008000, y, 0xea;",  # (x & sign) | y
        ]
    return lines


def _halves_of_bytes(format: str, dtype: str) -> list[str]:
    """Four bytes of two codes: every code to the lowest four bits of its half of a register, or the next."""
    shift = "shr.u32 h, w, 4;" if format == "int4" else "shl.b32 h, w, 4;"
    first, second = ("w", "h") if format == "int4" else ("h", "w")
    lines = [shift]
    for pair in range(4):
        lines.append(f"prmt.b32 x, {first}, {second}, {0x0400 + 0x0101 * pair:#06x};")
        if format == "int4":
            offset = INT4_OFFSETS[dtype][1] * 0x10001
            lines.append(f"lop3.b32 ${pair}, x, 0x000f000f, {offset:#010x}, 0xea;")  # (x & 15) | offset
        elif dtype == "bf16":
            lines += [
                "and.b32 x, x, 0x00f000f0;",
                "mul.lo.u32 x, x, 0x104;",  # the sign 8 bits up, exponent and mantissa 2: no bit twice
                f"and.b32 ${pair}, x, 0x81c081c0;",
            ]
        else:
            lines += [
                "shl.b32 y, x, 5;",
                "and.b32 y, y, 0x0e000e00;",
                "shl.b32 x, x, 8;",
                f"lop3.b32 ${pair}, x, 0x80008000, y, 0xea;",
            ]
    return lines


WIDENING = {key: _widening(*key) for key in LIFTS}
"""PTX, by format and dtype. $0 and on are registers of two numbers each, the first in the lower half; the one
after them has their codes."""


@triton.constexpr_function
def lift(FORMAT, dtype):
    return LIFTS[FORMAT, dtype.name]


@triton.constexpr_function
def widening(FORMAT, dtype):
    return WIDENING[FORMAT, dtype.name]


FUSED = {"bf16": "fma.rn.bf16x2 $0, $1, $2, $3;", "fp16": "fma.rn.f16x2 $0, $1, $2, $3;"}
"""$1 * $2 + $3, rounded once. Before sm_90 there is no other packed arithmetic of bfloat16."""


@triton.constexpr_function
def fused(dtype):
    return FUSED[dtype.name]


@triton.constexpr_function
def int4_shift(dtype):
    """What to add to a widened int4 whose zero point is 8, and its bits for 0, in which others can be set."""
    offset, bits = INT4_OFFSETS[dtype.name]
    return -(offset + 8), bits - 0x8000


@triton.jit
def move_bits(values, dtype: tl.constexpr, FORMAT: tl.constexpr):
    """What is to be shifted (int4) and lifted to what the codes stand for, a uint8 each or two in one."""
    PTX: tl.constexpr = widening(FORMAT, dtype)
    if FORMAT == "fp8":
        bits = tl.inline_asm_elementwise(PTX, "=r,=r,r", [values], dtype=tl.int16, is_pure=True, pack=4)
    else:
        pairs = tl.inline_asm_elementwise(
            PTX, "=r,=r,=r,=r,r", [values], dtype=tl.int32, is_pure=True, pack=4
        )
        bits = tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16))
        bits = tl.reshape(bits, (values.shape[0], 2 * values.shape[1]))
    return bits.to(dtype, bitcast=True)


@triton.jit
def add_by_two(x, y):
    """x + y, exact numbers of 16 bits."""
    return fma_by_two(x, tl.full(x.shape, 1.0, x.dtype), y)


@triton.jit
def multiply_by_two(x, y):
    return fma_by_two(x, y, tl.full(x.shape, -0.0, x.dtype))


@triton.jit
def fma_by_two(x, y, z):
    """x * y + z, rounded once."""
    PTX: tl.constexpr = fused(x.dtype)
    return tl.inline_asm_elementwise(PTX, "=r,r,r,r", [x, y, z], dtype=x.dtype, is_pure=True, pack=2)
