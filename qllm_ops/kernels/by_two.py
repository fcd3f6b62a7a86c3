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


# Where a float that a byte begins with has to be in its half of a register: how far to the left of the half's
# lower byte, and the bits of the half that are its own.
PLACES = {
    ("mxfp4", "bf16"): (2, 0x81C0),
    ("mxfp4", "fp16"): (5, 0x8E00),
    ("fp8", "bf16"): (4, 0x87F0),
    ("fp8", "fp16"): (7, 0xBF80),
}


def _widening(format: str, dtype: str) -> str:
    inputs = 2 if format == "fp8" else 4  # the number of the first input is that of the outputs
    lines = _int4(dtype) if format == "int4" else _floats(format, dtype)
    return "\n".join(["{", ".reg .b32 w, h, x;", f"mov.b32 w, ${inputs};", *lines, "}"])


def _floats(format: str, dtype: str) -> list[str]:
    """Four bytes of one or two floats. A half gets a byte that begins with one, and above it the byte's sign
    eight times, so that one of these is at bit 15 however far the rest is shifted:

        s s s s s s s s  s e e m . . . .     by 2 to the left:  s . . . . . . e  e m . . . . . .
    """
    shift, mask = PLACES[format, dtype]
    lower = "w" if format == "fp8" else "h"
    lines = [] if format == "fp8" else ["shl.b32 h, w, 4;"]  # lower codes to where the upper ones are
    for pair in range(2 if format == "fp8" else 4):
        first, second = (2 * pair, 2 * pair + 1) if format == "fp8" else (pair, 4 + pair)
        bytes = 0x8080 + 0x11 * first + 0x1100 * second
        lines += [
            f"prmt.b32 x, {lower}, w, {bytes:#06x};",
            f"shl.b32 x, x, {shift};",
            f"and.b32 ${pair}, x, {mask * 0x10001:#010x};",
        ]
    return lines


def _int4(dtype: str) -> list[str]:
    """Four bytes of two codes: every code to the lowest four bits of its half of a register."""
    offset = INT4_OFFSETS[dtype][1] * 0x10001
    lines = ["shr.u32 h, w, 4;"]
    for pair in range(4):
        lines += [
            f"prmt.b32 x, w, h, {0x0400 + 0x0101 * pair:#06x};",
            f"lop3.b32 ${pair}, x, 0x000f000f, {offset:#010x}, 0xea;",  # (x & 15) | offset
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
def move_bits(codes, dtype: tl.constexpr, FORMAT: tl.constexpr):
    """What is to be shifted (int4) and lifted to what the codes stand for: (rows, numbers).

    Codes come in words of int32, or those of int4 in bytes: four of a thread's bytes then make a register,
    whether they are neighbours in a row or not.
    """
    PTX: tl.constexpr = widening(FORMAT, dtype)
    if codes.dtype == tl.uint8:
        NUMBERS: tl.constexpr = 2 * codes.shape[1]
        pairs = tl.inline_asm_elementwise(PTX, "=r,=r,=r,=r,r", [codes], dtype=tl.int32, is_pure=True, pack=4)
    elif FORMAT == "fp8":
        NUMBERS: tl.constexpr = 4 * codes.shape[1]
        p, q = tl.inline_asm_elementwise(
            PTX, "=r,=r,r", [codes], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
        )
        pairs = tl.join(p, q)
    else:
        NUMBERS: tl.constexpr = 8 * codes.shape[1]
        p, q, r, s = tl.inline_asm_elementwise(
            PTX, "=r,=r,=r,=r,r", [codes], dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True, pack=1,
        )  # fmt: skip
        pairs = tl.join(tl.join(p, r), tl.join(q, s))
    halves = tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16))
    return tl.reshape(halves, (codes.shape[0], NUMBERS)).to(dtype, bitcast=True)


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
