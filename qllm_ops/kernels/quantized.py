"""Quantised factors of a product: where weights lie, how a tile of them is widened in registers, and how one
of activations becomes float8 there.

`qllm_ops.quantized` says what the formats are. One more FORMAT is known here: "fp8_w8a8", float8 weights that
are multiplied as they lie, by activations in float8.
"""

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

from qllm_ops.kernels.by_two import add_by_two, fma_by_two, int4_shift, lift, move_bits, multiply_by_two

# Triton's interpreter multiplies bfloat16 numbers as if they were integers, cuts where it should round, and
# loses those below 2 ** -126; it has no arithmetic of float8.
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
    GROUP_N: tl.constexpr,
):
    """Where an expert's rows begin, and the first scale of each."""
    first = expert.to(tl.int64) * weight_rows
    groups = expert.to(tl.int64) * tl.cdiv(weight_rows, GROUP_N) + rows // GROUP_N
    return weight_ptr + (first + rows) * row_bytes, weight_scale_ptr + groups * scale_columns


@triton.jit
def zero_rows(
    weight_zero_ptr,  # (E, R, zero_columns), rows of whole words; the scales', if they are `zeros_beside`
    scale_ptrs,  # of `quantized_rows`
    expert,
    rows,
    weight_rows,
    zero_columns,
):
    """The first zero point of each row."""
    if zeros_beside(weight_zero_ptr):
        ptrs = scale_ptrs
    else:
        ptrs = weight_zero_ptr + (expert.to(tl.int64) * weight_rows + rows) * zero_columns
    return ptrs


@triton.jit
def dequantize(
    value_ptrs,  # to the first byte of each row
    scale_ptrs,
    zero_ptrs,  # to the first zero point of each row, in whole words too, or scale_ptrs: they lie beside
    # their scales. None: there are none.
    k,
    stop,
    dtype: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP_K: tl.constexpr,
    SCALED: tl.constexpr,  # False: without their scales, which nothing reads then
    BY_TWO: tl.constexpr,  # of `by_two`
    EVEN: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Columns k to k + BLOCK_K of some rows of weights, in dtype. From ``stop`` on, any finite numbers."""
    BESIDE: tl.constexpr = zeros_beside(zero_ptrs)
    WORDS: tl.constexpr = BY_TWO and in_words(FORMAT, GROUP_K, zero_ptrs)
    PACKED: tl.constexpr = (1 if FORMAT == "fp8" else 2) * (4 if WORDS else 1)
    places = tl.arange(0, BLOCK_K // PACKED)
    if WORDS:
        value_ptrs = value_ptrs.to(tl.pointer_type(tl.int32), bitcast=True)
    value_ptrs = value_ptrs[:, None] + places[None, :]
    if EVEN:
        values = tl.load(value_ptrs + k // PACKED)
    else:
        # Bytes or words are compared, and not columns: so Triton sees which neighbours are inside together,
        # and loads them at once. Rounded up, as where the last byte has one number only, it would not.
        end = stop // PACKED if BY_TWO else tl.cdiv(stop, PACKED)
        inside = k // PACKED + places < end
        values = tl.load(value_ptrs + k // PACKED, mask=inside[None, :], other=0)
    zeros = None
    if zero_ptrs is not None:
        zeros = load_groups(zero_ptrs, k, stop, GROUP_K, BESIDE, EVEN, BLOCK_K)
        zeros = (zeros >> 16 if BESIDE else zeros) & 255
    if BY_TWO:
        wide = widen_by_two(values, zeros, dtype, FORMAT)
        if SCALED:
            wide = scale_by_two(wide, scale_ptrs, k, stop, FORMAT, GROUP_K, BESIDE, EVEN)
        elif lift(FORMAT, dtype) != 0:
            wide = multiply_by_two(wide, tl.full(wide.shape, 2.0 ** lift(FORMAT, dtype), dtype))
    else:
        if PACKED == 2:
            values = tl.reshape(tl.join(values & 15, values >> 4), (values.shape[0], BLOCK_K))
        wide = widen(values, FORMAT)
        if zeros is not None:  # Small integers: nothing is rounded.
            wide += over_columns(8 - zeros.to(tl.float16), BLOCK_K)
        wide = wide.to(tl.float32)
        if SCALED:
            scales = load_scales(scale_ptrs, k, stop, GROUP_K, BESIDE, EVEN, BLOCK_K)
            wide *= over_columns(scales, BLOCK_K)
        wide = narrow(wide, dtype)
    return wide


@triton.jit
def widen_by_two(values, zeros, dtype: tl.constexpr, FORMAT: tl.constexpr):
    """What the codes stand for, without the format's lift."""
    wide = move_bits(values, dtype, FORMAT)
    if FORMAT == "int4":
        SHIFT: tl.constexpr = int4_shift(dtype)
        if zeros is None:
            shift = tl.full(wide.shape, SHIFT[0], dtype)
        else:
            shift = over_columns((zeros | SHIFT[1]).to(tl.int16).to(dtype, bitcast=True), wide.shape[1])
        wide = add_by_two(wide, shift)
    return wide


@triton.jit
def scale_by_two(
    wide, scale_ptrs, k, stop, FORMAT: tl.constexpr, GROUP_K: tl.constexpr, BESIDE: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Columns of `widen_by_two`, lifted and scaled.

    A scale of more digits than theirs is taken as a sum of two numbers, and with it the product: before it is
    rounded, that is off by 2 ** -8 of its last bit and by half of the least number that there is.
    """
    BLOCK_K: tl.constexpr = wide.shape[1]
    LIFT: tl.constexpr = lift(FORMAT, wide.dtype)
    dtype: tl.constexpr = scale_ptrs.dtype.element_ty
    if dtype == tl.uint8:
        powers = load_powers(scale_ptrs, k, stop, LIFT, wide.dtype, GROUP_K, EVEN, BLOCK_K)
        wide = multiply_by_two(wide, over_columns(powers, BLOCK_K))
    elif dtype == wide.dtype:
        words = load_groups(scale_ptrs, k, stop, GROUP_K, BESIDE, EVEN, BLOCK_K)
        wide = multiply_by_two(wide, over_columns(words.to(tl.int16).to(dtype, bitcast=True), BLOCK_K))
    else:
        scales = load_scales(scale_ptrs, k, stop, GROUP_K, BESIDE, EVEN, BLOCK_K) * 2.0**LIFT
        high = scales.to(wide.dtype)
        low = over_columns((scales - high.to(tl.float32)).to(wide.dtype), BLOCK_K)
        wide = fma_by_two(wide, over_columns(high, BLOCK_K), multiply_by_two(wide, low))
    return wide


@triton.jit
def over_columns(groups, BLOCK_K: tl.constexpr):
    """(rows, BLOCK_K): what each of a row's groups has, for each of the group's columns."""
    shape: tl.constexpr = (groups.shape[0], groups.shape[1], BLOCK_K // groups.shape[1])
    return tl.reshape(tl.broadcast_to(groups[:, :, None], shape), (groups.shape[0], BLOCK_K))


@triton.jit
def load_scales(
    scale_ptrs, k, stop, GROUP_K: tl.constexpr, BESIDE: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The scales of columns k to k + BLOCK_K of some rows, float32: (rows, 1), or one for every GROUP_K."""
    dtype: tl.constexpr = scale_ptrs.dtype.element_ty
    words = load_groups(scale_ptrs, k, stop, GROUP_K, BESIDE, EVEN, BLOCK_K)
    if dtype == tl.uint8:  # The exponent of a float32; 0 is of numbers without a leading 1.
        words = words & 255
        scales = tl.where(words == 0, 0x00400000, words << 23).to(tl.float32, bitcast=True)
    elif dtype == tl.float16:
        scales = words.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        scales = (words << (32 - dtype.primitive_bitwidth)).to(tl.float32, bitcast=True)
    return scales


@triton.jit
def load_powers(
    scale_ptrs, k, stop, LIFT: tl.constexpr, dtype: tl.constexpr, GROUP_K: tl.constexpr,
    EVEN: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The scales of "mxfp4" times 2 ** LIFT, in a dtype of 16 bits: (rows, 1), or one for every GROUP_K."""
    if dtype == tl.bfloat16 and 4 * GROUP_K <= BLOCK_K:  # by two as well, in whole words
        words = load_words(scale_ptrs, k, stop, GROUP_K, False, EVEN, BLOCK_K)
        even = (words & 0x00FF00FF) * 0x80 + LIFT * 0x00800080  # to the exponents, 7 bits up
        odd = ((words >> 8) & 0x00FF00FF) * 0x80 + LIFT * 0x00800080
        halves = tl.join(tl.join(even, even >> 16), tl.join(odd, odd >> 16)).to(tl.int16)
        powers = tl.reshape(halves, (words.shape[0], 4 * words.shape[1])).to(tl.bfloat16, bitcast=True)
    else:
        exponents = (load_groups(scale_ptrs, k, stop, GROUP_K, False, EVEN, BLOCK_K) & 255) + LIFT
        powers = (exponents << 23).to(tl.float32, bitcast=True).to(dtype)
    return powers


@triton.jit
def load_groups(
    ptrs, k, stop, GROUP_K: tl.constexpr, ALONE: tl.constexpr, EVEN: tl.constexpr, BLOCK_K: tl.constexpr
):
    """What groups of columns k to k + BLOCK_K have, in the lowest bits of integers; above them is anything.

    GROUP_K is a multiple of BLOCK_K, or a part of it. ALONE: each has a word of its own.
    """
    BITS: tl.constexpr = 32 if ALONE else ptrs.dtype.element_ty.primitive_bitwidth
    IN_WORD: tl.constexpr = 32 // BITS
    GROUPS: tl.constexpr = BLOCK_K // GROUP_K if BLOCK_K > GROUP_K else 1
    words = load_words(ptrs, k, stop, GROUP_K, ALONE, EVEN, BLOCK_K)
    if BITS == 32:
        groups = words
    elif GROUPS < IN_WORD:
        shifts = (k // GROUP_K + tl.arange(0, GROUPS)) % IN_WORD * BITS
        groups = words >> shifts[None, :]
    else:  # Shifts by constants: no others can be moved to where the products want the weights.
        if BITS == 16:
            parts = tl.join(words, words >> 16)
        else:
            parts = tl.join(tl.join(words, words >> 16), tl.join(words >> 8, words >> 24))
        groups = tl.reshape(parts, (words.shape[0], GROUPS))
    return groups


@triton.jit
def load_words(
    ptrs, k, stop, GROUP_K: tl.constexpr, ALONE: tl.constexpr, EVEN: tl.constexpr, BLOCK_K: tl.constexpr
):
    """What groups of columns k to k + BLOCK_K have, as it lies, with some neighbours: words of 4 bytes.

    Fewer cannot be copied to shared memory while others are multiplied.
    """
    BITS: tl.constexpr = 32 if ALONE else ptrs.dtype.element_ty.primitive_bitwidth
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
    return words


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Round float32 to the nearest number of ``dtype``, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits = tl.where(x == x, rounded, (bits >> 16) | 0x40)  # NaN stays, whatever its lower bits are
        x = bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def to_float32(x):
    """As ``x.to(tl.float32)``, of the least numbers of bfloat16 under the interpreter, too."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


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


@triton.constexpr_function
def weights_first(FORMAT, dtype, BLOCK_M, BLOCK_N):
    """Whether a product is one of weights by activations, and so are its sums.

    So are those of few rows, where warps widen weights in the registers that mma.sync reads them from: as its
    first factor, whose four registers widening leaves side by side. 16 rows of weights for each warp are a
    batch of products for Triton, which of 64 in one would make a wgmma, and that reads shared memory.
    """
    few = FORMAT in ("fp8", "mxfp4", "int4") and BLOCK_M < 64 and BLOCK_N % 16 == 0
    return few and dtype.primitive_bitwidth == 16


# Columns of four threads that read 8 each for mma.sync: 16 bytes of activations, a word of four-bit codes.
CHUNK = tl.constexpr(32)


@triton.constexpr_function
def zeros_beside(zero_ptrs):
    """Whether zero points are in the words of their scales, 16 bits up: the pointers are the scales' then."""
    return zero_ptrs is not None and zero_ptrs.dtype.scalar.element_ty.primitive_bitwidth == 16


@triton.constexpr_function
def in_words(FORMAT, GROUP_K, zero_ptrs):
    """Whether codes are widened by words, and not by bytes.

    All are but those that Triton sends through shared memory again, where bytes meet fewer conflicts: those
    where half of the threads want another half of a word of scales (groups of 16), or each turn of the loop
    another byte of a word of zero points (groups of 64 and more, where they do not lie beside their scales).
    """
    apart = zero_ptrs is not None and not zeros_beside(zero_ptrs)
    return FORMAT != "int4" or (GROUP_K >= 32 and not (apart and GROUP_K > 32))


@triton.constexpr_function
def in_chunks(weights_first, by_two, FORMAT, GROUP_K, zero_ptrs):
    """Whether activations come in chunks, to be multiplied in the order that registers have them in."""
    return weights_first and by_two and in_words(FORMAT, GROUP_K, zero_ptrs) and not INTERPRETED.value


@triton.jit
def add_products_of_weights(
    sums,  # (R / 16, 16, M)
    a,  # (M, BLOCK_K), or (BLOCK_K / CHUNK * M, CHUNK): `in_chunks`
    value_ptrs,  # of R rows
    scale_ptrs,
    zero_ptrs,
    k,
    stop,
    FORMAT: tl.constexpr,
    GROUP_K: tl.constexpr,
    BY_TWO: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Add weights by activations, from columns k to k + BLOCK_K.

    Where these columns are of one group, its scale goes on the sums, of which there are fewer than weights.
    """
    SCALED: tl.constexpr = GROUP_K < BLOCK_K
    w = dequantize(
        value_ptrs, scale_ptrs, zero_ptrs, k, stop, a.dtype, FORMAT, GROUP_K, SCALED, BY_TWO, EVEN, BLOCK_K
    )  # fmt: skip
    SIXTEENS: tl.constexpr = sums.shape[0]
    M: tl.constexpr = sums.shape[2]
    if in_chunks(True, BY_TWO, FORMAT, GROUP_K, zero_ptrs):
        # The even pairs of a chunk's columns go first, then the odd ones. mma.sync takes one of each, in two
        # registers side by side; so a thread's 8 columns need not be moved there.
        CHUNKS: tl.constexpr = BLOCK_K // CHUNK
        w = tl.reshape(w, (SIXTEENS * 16, CHUNKS, CHUNK // 4, 2, 2))
        w = tl.permute(w, (0, 1, 3, 2, 4))
        a = tl.permute(tl.reshape(a, (CHUNKS, M, CHUNK // 4, 2, 2)), (0, 3, 2, 4, 1))
        a = tl.reshape(a, (BLOCK_K, M))
    else:
        a = tl.trans(a)
    w = tl.reshape(w, (SIXTEENS, 16, BLOCK_K))
    a = tl.broadcast_to(a[None, :, :], (SIXTEENS, BLOCK_K, M))
    if INTERPRETED:
        w, a = to_float32(w), to_float32(a)
    if SCALED:
        sums = tl.dot(w, a, sums, input_precision="ieee")
    else:
        products = tl.dot(w, a, input_precision="ieee")
        scales = load_scales(scale_ptrs, k, stop, GROUP_K, zeros_beside(zero_ptrs), EVEN, BLOCK_K)
        sums += products * tl.reshape(scales, (SIXTEENS, 16, 1))
    return sums


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
    b_scales = load_scales(scale_ptrs, k, stop, GROUP_K, False, EVEN, BLOCK_K)
    if not INTERPRETED:  # Pointers to float8, for the copies to end where the products read them.
        value_ptrs = value_ptrs.to(tl.pointer_type(tl.float8e4nv), bitcast=True)
    ks = tl.arange(0, BLOCK_K)
    value_ptrs = value_ptrs[:, None] + ks[None, :]
    if EVEN:
        b = tl.load(value_ptrs + k)
    else:
        inside = k + ks < stop
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
    a = to_float32(a)
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
