"""Quantised factors of a product: where weights lie, how a tile of them is widened in registers, and how one
of activations becomes float8 there.

`qllm_ops.quantized` says what the formats are. One more FORMAT is known here: "fp8_w8a8", float8 weights that
are multiplied as they lie, by activations in float8.
"""

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

# Triton's interpreter multiplies bfloat16 numbers as if they were integers and cuts where it should round; it
# has no arithmetic of float8.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def quantized_rows(
    weight_ptr,  # (E, R, row_bytes) uint8
    weight_scale_ptr,  # (E, R / GROUP_N, scale_columns), rows of whole words of 4 bytes
    expert,
    rows,
    weight_rows,  # R
    row_bytes,
    scale_columns,
    FORMAT: tl.constexpr,
    GROUP_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Where the first BLOCK_K numbers of an expert's rows are, and the first scale of each row."""
    bytes = tl.arange(0, BLOCK_K // 2 if FORMAT == "mxfp4" or FORMAT == "int4" else BLOCK_K)
    first = expert.to(tl.int64) * weight_rows
    return (
        weight_ptr + (first + rows)[:, None] * row_bytes + bytes[None, :],
        group_rows(weight_scale_ptr, expert, rows, weight_rows, scale_columns, GROUP_N),
    )


@triton.jit
def group_rows(ptr, expert, rows, weight_rows, columns, GROUP_N: tl.constexpr):
    """The first scale, or zero point, of each row."""
    return ptr + (expert.to(tl.int64) * tl.cdiv(weight_rows, GROUP_N) + rows // GROUP_N) * columns


@triton.jit
def dequantize(
    value_ptrs,
    scale_ptrs,
    zero_ptrs,  # to the first zero point of each row, in whole words too; None: there are none
    k,
    stop,
    FORMAT: tl.constexpr,
    GROUP_K: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Columns k to k + BLOCK_K of some rows of weights, in float32; 0 from ``stop`` on."""
    PACKED: tl.constexpr = 1 if FORMAT == "fp8" else 2
    if EVEN:
        values = tl.load(value_ptrs + k // PACKED)
    else:
        inside = k + tl.arange(0, BLOCK_K // PACKED) * PACKED < stop
        values = tl.load(value_ptrs + k // PACKED, mask=inside[None, :], other=0)
    scales = load_scales(scale_ptrs, k, stop, GROUP_K, EVEN, BLOCK_K)
    if PACKED == 2:
        values = tl.reshape(tl.join(values & 15, values >> 4), (values.shape[0], BLOCK_K))
    wide = tl.reshape(widen(values, FORMAT), (scales.shape[0], scales.shape[1], BLOCK_K // scales.shape[1]))
    if zero_ptrs is not None:  # Small integers: nothing is rounded.
        zeros = load_groups(zero_ptrs, k, stop, GROUP_K, EVEN, BLOCK_K) & 255
        wide += 8 - zeros.to(tl.float16)[:, :, None]
    return tl.reshape(wide.to(tl.float32) * scales[:, :, None], (values.shape[0], BLOCK_K))


@triton.jit
def load_scales(scale_ptrs, k, stop, GROUP_K: tl.constexpr, EVEN: tl.constexpr, BLOCK_K: tl.constexpr):
    """The scales of columns k to k + BLOCK_K of some rows, float32: (rows, 1), or one for every GROUP_K."""
    dtype: tl.constexpr = scale_ptrs.dtype.element_ty
    words = load_groups(scale_ptrs, k, stop, GROUP_K, EVEN, BLOCK_K)
    if dtype == tl.uint8:  # The exponent of a float32; 0 is of numbers without a leading 1.
        words = words & 255
        scales = tl.where(words == 0, 0x00400000, words << 23).to(tl.float32, bitcast=True)
    elif dtype == tl.float16:
        scales = words.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        scales = (words << (32 - dtype.primitive_bitwidth)).to(tl.float32, bitcast=True)
    return scales


@triton.jit
def load_groups(ptrs, k, stop, GROUP_K: tl.constexpr, EVEN: tl.constexpr, BLOCK_K: tl.constexpr):
    """What groups of columns k to k + BLOCK_K have, in the lowest bits of integers; above them is anything.

    They come in words of 4 bytes, with a few that are not needed: fewer cannot be copied to shared memory
    while others are multiplied. GROUP_K is a multiple of BLOCK_K, or a part of it.
    """
    BITS: tl.constexpr = ptrs.dtype.element_ty.primitive_bitwidth
    IN_WORD: tl.constexpr = 32 // BITS
    GROUPS: tl.constexpr = BLOCK_K // GROUP_K if BLOCK_K > GROUP_K else 1
    WORDS: tl.constexpr = GROUPS // IN_WORD if GROUPS > IN_WORD else 1
    word_ptrs = ptrs.to(tl.pointer_type(tl.int32), bitcast=True)[:, None]
    numbers = k // (GROUP_K * IN_WORD) + tl.arange(0, WORDS)
    if EVEN:
        words = tl.load(word_ptrs + numbers[None, :])
    else:
        inside = numbers * (GROUP_K * IN_WORD) < stop
        words = tl.load(word_ptrs + numbers[None, :], mask=inside[None, :], other=0)
    if BITS < 32:
        shifts = (k // GROUP_K + tl.arange(0, GROUPS // WORDS)) % IN_WORD * BITS
        words = tl.reshape(words[:, :, None] >> shifts[None, None, :], (words.shape[0], GROUPS))
    return words


@triton.jit
def widen(codes, FORMAT: tl.constexpr):
    """What the codes stand for, in float16, which has all of these numbers: bits are moved, and exponents."""
    codes = codes.to(tl.uint16)
    if FORMAT == "int4":
        wide = (codes | 0x6400).to(tl.float16, bitcast=True) - 1032  # 1024 + code, and a code is 8 too large
    elif FORMAT == "mxfp4":
        wide = ((codes & 8) << 12 | (codes & 7) << 9).to(tl.float16, bitcast=True) * 16384
    else:
        wide = ((codes & 0x80) << 8 | (codes & 0x7F) << 7).to(tl.float16, bitcast=True) * 256
    return wide


# -- float8 by float8 ----------------------------------------------------------------------------


@triton.jit
def float8_products(
    a,
    value_ptrs,
    scale_ptrs,
    k,
    stop,
    GROUP_K: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """a, (rows, 128), times columns k to k + 128 of some rows of weights, both in float8, summed in float32.

    A sum of its own for every group: what an H100 adds up inside of a product has about 14 bits, so no more
    than 128 products are left to it.
    """
    tl.static_assert(BLOCK_K == 128, "activations share a scale by 128 columns")
    b_scales = load_scales(scale_ptrs, k, stop, GROUP_K, EVEN, BLOCK_K)
    if not INTERPRETED:  # Pointers to float8, for the copies to end where the products read them.
        value_ptrs = value_ptrs.to(tl.pointer_type(tl.float8e4nv), bitcast=True)
    if EVEN:
        b = tl.load(value_ptrs + k)
    else:
        inside = k + tl.arange(0, BLOCK_K) < stop
        b = tl.load(value_ptrs + k, mask=inside[None, :], other=0.0)
    if INTERPRETED:
        b = widen(b, "fp8").to(tl.float32)
    a, a_scales = quantize_rows(a)
    # One scale after the other: their product would take as many registers again, before there is a sum.
    return tl.dot(a, tl.trans(b)) * a_scales[:, None] * tl.trans(b_scales)


@triton.jit
def quantize_rows(a):
    """What `qllm_ops.quantized.quantize_rows` makes of rows of at most 128 columns: values and scales.

    One reciprocal for each row, for a quotient for each number would take longer than the products do.
    """
    a = a.to(tl.float32)
    scales = tl.maximum(tl.div_rn(tl.max(tl.abs(a), axis=1), 448.0), 1.1754943508222875e-38)
    values = a * tl.div_rn(1.0, scales)[:, None]
    if INTERPRETED:
        values = round_to_float8(values)
    elif cuda_capability_geq(9, 0):
        values = values.to(tl.float8e4nv)
    else:  # There Triton 3.6 cuts to float16 on the way.
        values = keep_in_float16(values).to(tl.float8e4nv)
    return values, scales


@triton.jit
def keep_in_float16(x):
    """x, safe to cut to float16 on its way to float8: what would be lost sets the last bit that stays."""
    bits = x.to(tl.uint32, bitcast=True)
    return (bits | (((bits & 0x1FFF) + 0x1FFF) & 0x2000)).to(tl.float32, bitcast=True)


@triton.jit
def round_to_float8(x):
    """The number of float8_e4m3fn nearest to each float32 of at most 464, ties to even, as float32."""
    bits = x.to(tl.uint32, bitcast=True)
    sign, size = bits & 0x80000000, bits & 0x7FFFFFFF
    size = (size + 0x7FFFF + ((size >> 20) & 1)) & 0xFFF00000  # three bits of mantissa
    # Below 2 ** -6 the step is 2 ** -9, which is that of float32 numbers around 2 ** 14.
    near_zero = ((tl.abs(x) + 16384.0) - 16384.0).to(tl.uint32, bitcast=True)
    size = tl.where(tl.abs(x) < 0.015625, near_zero, size)
    return tl.where(x == x, (sign | size).to(tl.float32, bitcast=True), x)
