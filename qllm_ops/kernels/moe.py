"""The Triton kernels of the MoE layer: persistent, ticketed, and able to leave at every tile.

Launches in stream order, each but the first a phase with its own tiles:

    route      where every expert's rows begin, how many tiles there are, and for few pairs their order
               (one program)
    gate_up    intermediate[r] = act(gate) * up   for every sorted row r          (P, I)
    down       partial[s, p] = part s of down(intermediate[r])   for p = order[r] (S, P, W)
    combine    output[t] = sum over k of weight[t, k] * sum over s of partial[s, t * K + k]

P = T * K (token, k) pairs; pair p = t * K + k. down and combine take turns over chunks of W columns of the
output, so that `partial` need not hold all H of them; mostly there is one chunk, W = H. `order` lists the
pairs sorted by expert, so an expert owns a contiguous range of sorted rows, and `offsets` says where:

    sorted row   0    1  |  2    3    4  |  5  |  6
    expert      -1   -1  |  0    0    0  |  2  |  9         with E = 4: rows 0, 1 and 6 are skipped
    offsets                 [0]             [2]   [4]        = (2, 5, 5, 6, 6)

What a run needs to be taken up again is one tensor, `state` (int32), which `tickets.py` describes. `route`
writes all of it.

A kernel's first arguments are tensors on whose alignment it may rely; then come those that change from run to
run without any effect on how it is compiled; then what `qllm_ops.plan` decides.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qllm_ops.kernels.quantized import (
    CHUNK,
    INTERPRETED,
    add_products_of_weights,
    dequantize,
    float8_products,
    in_chunks,
    narrow,
    quantized_rows,
    to_float32,
    weights_first,
    zero_rows,
)
from qllm_ops.kernels.tickets import (
    DONE,
    MAX_PHASES,
    OFFSETS,
    TICKETS,
    TOTAL,
    answer,
    begin_poll,
    give_back,
    last_ticket,
    leave,
    next_ticket,
)

# Row blocks of one expert that run side by side share a block of weights through the L2 cache; beyond
# this many, the activations of the group would in turn be read from memory once per block of weights.
GROUP_M = tl.constexpr(16)


@triton.jit
def wait_for_previous(DEPENDENT: tl.constexpr):
    """To be called before anything else by a kernel that may be launched before the previous one has ended.

    Programmatic dependent launch: returns when all that the previous launch wrote can be read, and lets the
    next one begin. Its programs wait here, on what these leave of a multiprocessor.
    """
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def locate(
    ticket, blocks_ptr, offsets_ptr, num_experts, n_blocks, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr
):
    """The ticket's expert, its first sorted row and one past the expert's last, and its column block.

    Column blocks follow each other, and within one the row blocks of a group: where an expert has few
    rows, its weights are read from memory once.
    """
    experts = tl.arange(0, BLOCK_E)
    ends = tl.load(blocks_ptr + 1 + experts, mask=experts < num_experts, other=0)
    before = (experts < num_experts) & (ends * n_blocks <= ticket)
    expert = tl.sum(before.to(tl.int32), axis=0)
    first = tl.load(blocks_ptr + expert)
    m_blocks = tl.load(blocks_ptr + expert + 1) - first

    local = ticket - first * n_blocks
    group = local // (GROUP_M * n_blocks)
    group_rows = tl.minimum(m_blocks - group * GROUP_M, GROUP_M)
    in_group = local - group * (GROUP_M * n_blocks)
    m_block = group * GROUP_M + in_group % group_rows
    row = tl.load(offsets_ptr + expert) + m_block * BLOCK_M
    return expert, row, tl.load(offsets_ptr + expert + 1), in_group // group_rows


@triton.jit
def multiply(
    a_ptr,
    a_rows,  # the numbers of a's rows, at multiples of a_stride
    a_stride,
    b_ptrs,
    b_stride,  # from one k to the next
    b_inside,  # which columns of b exist, if MASKED
    scale_ptrs,  # to the first scale of every column of b, if there is a FORMAT
    zero_ptrs,  # to the first zero point; None: there are none
    begin,
    stop,
    flag_ptr,
    FORMAT: tl.constexpr,
    GROUP_K: tl.constexpr,
    BY_TWO: tl.constexpr,
    MASKED: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    EXIT_K: tl.constexpr,
    HAS_FLAG: tl.constexpr,
    THREADS: tl.constexpr,
):
    """Sum over k in [begin, stop) of a[:, k] * b[k, :], in increasing k, in float32; and whether all of it.

    With EXIT_K, a multiple of BLOCK_K, this program leaves the sums halfway once it may no longer run.
    With a FORMAT, b_ptrs and scale_ptrs are those of `quantized_rows`.
    """
    WEIGHTS_FIRST: tl.constexpr = weights_first(FORMAT, a_ptr.dtype.element_ty, BLOCK_M, BLOCK_N)
    if WEIGHTS_FIRST:
        sums = tl.zeros((BLOCK_N // 16, 16, BLOCK_M), dtype=tl.float32)
    else:
        sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if EXIT_K == 0:
        sums = add_products(
            sums, a_ptr, a_rows, a_stride, b_ptrs, b_stride, b_inside, scale_ptrs, zero_ptrs,
            begin, stop, stop, FORMAT, GROUP_K, BY_TWO, MASKED, EVEN, BLOCK_K, STAGES,
        )  # fmt: skip
        whole = True
    else:
        k = begin
        stay = k < stop
        while stay:
            upto = tl.minimum(k + EXIT_K, stop)
            sums = add_products(
                sums, a_ptr, a_rows, a_stride, b_ptrs, b_stride, b_inside, scale_ptrs, zero_ptrs,
                k, upto, stop, FORMAT, GROUP_K, BY_TWO, MASKED, EVEN, BLOCK_K, STAGES,
            )  # fmt: skip
            k += EXIT_K
            stay = k < stop
            if HAS_FLAG:
                stay &= tl.program_id(0) < answer(begin_poll(flag_ptr, HAS_FLAG, THREADS))
        whole = k >= stop
    if WEIGHTS_FIRST:
        sums = tl.trans(tl.reshape(sums, (BLOCK_N, BLOCK_M)))
    return sums, whole


@triton.jit
def add_products(
    sums,  # (BLOCK_M, BLOCK_N), or (BLOCK_N / 16, 16, BLOCK_M): weights first
    a_ptr,
    a_rows,
    a_stride,
    b_ptrs,
    b_stride,
    b_inside,
    scale_ptrs,
    zero_ptrs,
    begin,
    upto,
    stop,
    FORMAT: tl.constexpr,
    GROUP_K: tl.constexpr,
    BY_TWO: tl.constexpr,
    MASKED: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    ks = tl.arange(0, BLOCK_K)
    WEIGHTS_FIRST: tl.constexpr = len(sums.shape) == 3
    if in_chunks(WEIGHTS_FIRST, BY_TWO, FORMAT, GROUP_K, zero_ptrs):
        # Shared memory then has the rows of a chunk side by side, for threads to read from different banks.
        M: tl.constexpr = a_rows.shape[0]
        CHUNKS: tl.constexpr = BLOCK_K // CHUNK
        a_rows = tl.reshape(tl.broadcast_to(a_rows[None, :], (CHUNKS, M)), (CHUNKS * M,))[:, None]
        a_columns = (tl.arange(0, CHUNKS * M) // M * CHUNK)[:, None] + tl.arange(0, CHUNK)[None, :]
    else:
        a_rows = a_rows[:, None]
        a_columns = ks[None, :]
    a_ptrs = a_ptr + a_rows * a_stride + a_columns
    for k in tl.range(begin, upto, BLOCK_K, num_stages=STAGES):
        inside = k + ks < stop
        if EVEN:
            a = tl.load(a_ptrs + k)
        else:
            a = tl.load(a_ptrs + k, mask=k + a_columns < stop, other=0.0)
        if FORMAT == "fp8_w8a8":
            sums += float8_products(a, b_ptrs, scale_ptrs, k, stop, GROUP_K, EVEN, BLOCK_K)
        elif WEIGHTS_FIRST:
            sums = add_products_of_weights(
                sums, a, b_ptrs, scale_ptrs, zero_ptrs, k, stop, FORMAT, GROUP_K, BY_TWO, EVEN, BLOCK_K
            )
        else:
            if FORMAT is not None:
                b = dequantize(
                    b_ptrs, scale_ptrs, zero_ptrs, k, stop, a.dtype, FORMAT, GROUP_K, True, BY_TWO, EVEN,
                    BLOCK_K,
                )  # fmt: skip
                b = tl.trans(b)
            elif EVEN and MASKED:
                b = tl.load(b_ptrs + k * b_stride, mask=b_inside[None, :], other=0.0)
            elif MASKED:
                b = tl.load(b_ptrs + k * b_stride, mask=inside[:, None] & b_inside[None, :], other=0.0)
            elif EVEN:
                b = tl.load(b_ptrs + k * b_stride)
            else:
                b = tl.load(b_ptrs + k * b_stride, mask=inside[:, None], other=0.0)
            if INTERPRETED:
                a, b = to_float32(a), to_float32(b)
            sums = tl.dot(a, b, sums, input_precision="ieee")
    return sums


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr):
    """The kind of a `qllm_ops.Activation`; or "none", for what is activated by somebody else."""
    if ACTIVATION == "none":
        result = x
    elif ACTIVATION == "silu":
        if ALPHA == 1.0:
            result = x * tl.sigmoid(x)
        else:
            result = x * tl.sigmoid(ALPHA * x)
    elif ACTIVATION == "gelu":
        result = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 * (1 + tanh(u)) is sigmoid(2u).
        result = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        result = tl.where(x < 0, 0.0, x)
        if ACTIVATION == "relu2":
            result = result * result
        else:
            tl.static_assert(ACTIVATION == "relu")
    return result


@triton.jit
def below(x, LIMIT: tl.constexpr):
    """The smaller of the two; NaN stays NaN."""
    return tl.where(x > LIMIT, LIMIT, x)


@triton.jit(
    do_not_specialize=["num_pairs", "down_blocks", "last_down_blocks", "combine_tiles", "last_combine_tiles"],
    do_not_specialize_on_alignment=["experts_ptr"],
)
def route(
    order_ptr,  # (P,) int64; written unless COUNT is 0
    state_ptr,
    experts_ptr,  # (P,) expert of every pair, or of every sorted row if COUNT is 0
    num_pairs,
    num_experts,
    num_phases,
    gate_up_blocks,  # column blocks of one row block, in each phase
    down_blocks,
    last_down_blocks,  # of the last chunk of columns
    combine_tiles,
    last_combine_tiles,
    GATE_UP_M: tl.constexpr,
    DOWN_M: tl.constexpr,
    BLOCK_E: tl.constexpr,  # power of two, at least E + 1
    SLOTS: tl.constexpr,
    COUNT: tl.constexpr,  # a power of two, at least P: they are sorted here; 0: they are sorted
    DEPENDENT: tl.constexpr,
):
    """Write the state of a run that has not begun. One program, of no class: it never waits for a flag."""
    wait_for_previous(DEPENDENT)
    experts = tl.arange(0, BLOCK_E)
    known = experts < num_experts
    if COUNT > 0:
        begin, rows = sort_pairs(experts_ptr, order_ptr, num_pairs, num_experts, COUNT, BLOCK_E)
    else:
        # Every expert finds its rows by binary search: faster for one program than a pass over them.
        begin = first_row(experts_ptr, num_pairs, experts, BLOCK_E)
        rows = first_row(experts_ptr, num_pairs, experts + 1, BLOCK_E) - begin
    rows = tl.where(known, rows, 0)
    offsets_ptr = state_ptr + OFFSETS
    tl.store(offsets_ptr + experts, begin, mask=experts <= num_experts)
    blocks_ptr = offsets_ptr + num_experts + 1
    gate_up_rows = write_blocks(blocks_ptr, experts, known, rows, GATE_UP_M)
    down_rows = write_blocks(blocks_ptr + num_experts + 1, experts, known, rows, DOWN_M)
    if SLOTS > 0:
        tl.store(blocks_ptr + 2 * (num_experts + 1) + tl.arange(0, SLOTS), -1)

    phases = tl.arange(0, MAX_PHASES)
    is_last, is_down = phases >= num_phases - 2, phases % 2 == 1
    tiles = tl.where(
        is_down,
        down_rows * tl.where(is_last, last_down_blocks, down_blocks),
        tl.where(is_last, last_combine_tiles, combine_tiles),
    )
    tiles = tl.where(phases == 0, gate_up_rows * gate_up_blocks, tiles)
    tl.store(state_ptr + phases, 0, mask=phases < TICKETS)
    tl.store(state_ptr + TICKETS + phases, 0)
    tl.store(state_ptr + DONE + phases, 0)
    tl.store(state_ptr + TOTAL + phases, tl.where(phases < num_phases, tiles, 0))


@triton.jit
def sort_pairs(index_ptr, order_ptr, num_pairs, num_experts, COUNT: tl.constexpr, BLOCK_E: tl.constexpr):
    """Write the order of the pairs; the first row of every expert, and how many it has.

    A bitonic network sorts keys that hold the pair beside its expert, so that pairs of one keep their order.
    """
    pairs = tl.arange(0, COUNT)
    expert = expert_of(index_ptr, pairs, num_pairs, num_experts)
    order = tl.sort((expert + 1) * COUNT + pairs) % COUNT
    tl.store(order_ptr + pairs, order.to(tl.int64), mask=pairs < num_pairs)
    known = (expert >= 0) & (expert < num_experts)
    rows = tl.histogram(tl.where(known, expert, 0), BLOCK_E, mask=known)
    begin = tl.sum((expert < 0).to(tl.int32), axis=0) + tl.cumsum(rows, axis=0) - rows
    return begin, rows


@triton.jit
def expert_of(index_ptr, pairs, num_pairs, num_experts):
    """The pairs' experts: -1 for all below 0, num_experts for all above, and more for pairs that are none."""
    expert = tl.load(index_ptr + pairs, mask=pairs < num_pairs, other=0).to(tl.int64)
    expert = tl.minimum(tl.maximum(expert, -1), num_experts).to(tl.int32)
    return tl.where(pairs < num_pairs, expert, num_experts + 1)


@triton.jit
def first_row(sorted_ptr, num_pairs, experts, BLOCK_E: tl.constexpr):
    """The first sorted row whose expert is not below each of `experts`, by binary search."""
    low = tl.zeros((BLOCK_E,), dtype=tl.int32)
    high = low + num_pairs
    left = num_pairs
    while left > 0:
        middle = low + (high - low) // 2  # low + high may be more than 32 bits
        searching = low < high
        below = tl.load(sorted_ptr + middle, mask=searching, other=0).to(tl.int64) < experts
        low = tl.where(searching & below, middle + 1, low)
        high = tl.where(searching & ~below, middle, high)
        left //= 2
    return low


@triton.jit
def write_blocks(blocks_ptr, experts, known, rows, BLOCK_M: tl.constexpr):
    blocks = (rows + BLOCK_M - 1) // BLOCK_M
    tl.store(blocks_ptr, 0)
    tl.store(blocks_ptr + 1 + experts, tl.cumsum(blocks, axis=0), mask=known)
    return tl.sum(blocks, axis=0)


@triton.jit(do_not_specialize=["share", "quantum"], do_not_specialize_on_alignment=["flag_ptr", "scale_ptr"])
def gate_up(
    hidden_ptr,  # (T, H)
    weight_ptr,  # (E, R, H): R = 2I rows of gate and up, or I without a gate; strides below
    weight_scale_ptr,  # of quantised weights, as in quantized_rows; their row_stride is in bytes
    weight_zero_ptr,  # as in zero_rows; None: there are no zero points
    bias_ptr,  # (E, R)
    intermediate_ptr,  # (P, I)
    order_ptr,  # (P,) int64
    state_ptr,
    scale_ptr,  # (T, K): what multiplies the sums of each pair, if SCALED
    flag_ptr,
    share,
    quantum,
    num_experts,
    top_k,
    hidden_size,
    weight_rows,  # R
    row_stride,  # of an expert's weights: from row to row, and along a row
    k_stride,
    scale_columns,
    zero_columns,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,  # None: no clamp
    UP_OFFSET: tl.constexpr,
    # Where an up row is: "halves" and "blocks", I after its gate's; "alternating", 1 after; "none". "blocks"
    # is for rows that are contiguous: a tile has BLOCK_N gates, then their ups, loaded 16 bytes at a time.
    PAIRS: tl.constexpr,
    FORMAT: tl.constexpr,  # of quantised weights; None for dense ones
    GROUP_N: tl.constexpr,  # rows and columns of weights that share a scale
    GROUP_K: tl.constexpr,
    BY_TWO: tl.constexpr,  # they are widened two at a time: `qllm_ops.kernels.by_two` says which can be
    MASKED: tl.constexpr,  # rows of weights are contiguous (k_stride is not 1), and R no multiple of a tile's
    HAS_BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_FLAG: tl.constexpr,
    THREADS: tl.constexpr,  # of a program
    DEPENDENT: tl.constexpr,  # as in wait_for_previous
    EVEN: tl.constexpr,  # hidden_size is a multiple of BLOCK_K
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # half as many as there are rows of weights in a tile
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STAGES: tl.constexpr,
    EXIT_K: tl.constexpr,
    SLOTS: tl.constexpr,
):
    offsets_ptr = state_ptr + OFFSETS
    returned_ptr = offsets_ptr + 3 * (num_experts + 1)
    n_blocks = tl.cdiv(weight_rows, 2 * BLOCK_N)
    out_columns = weight_rows if PAIRS == "none" else weight_rows // 2
    wait_for_previous(DEPENDENT)
    first_poll = begin_poll(flag_ptr, HAS_FLAG, THREADS)
    end = last_ticket(state_ptr, 0)
    done = 0
    ticket = next_ticket(state_ptr, returned_ptr, first_poll, end, share, quantum, 0, HAS_FLAG, EXIT_K, SLOTS)
    while ticket < end:
        expert, row, stop, n_block = locate(
            ticket, offsets_ptr + num_experts + 1, offsets_ptr, num_experts, n_blocks, BLOCK_M, BLOCK_E
        )
        rows = row + tl.arange(0, BLOCK_M)
        # Rows past the expert's last read pair 0, which exists, and are not stored. So the loads in
        # the loop need no mask; the same for the columns past the last.
        # Divided in 32 bits: in 64 it takes two hundred instructions.
        tokens = (tl.load(order_ptr + rows, mask=rows < stop, other=0).to(tl.int32) // top_k).to(tl.int64)
        both = tl.arange(0, 2 * BLOCK_N)
        weights = n_block * 2 * BLOCK_N + both
        inside = weights < weight_rows
        if PAIRS == "halves":
            # Gate and up rows alternate, so that one product holds both halves of a pair in one thread.
            weights = tl.minimum(n_block * BLOCK_N + both // 2, out_columns - 1) + both % 2 * out_columns
        elif PAIRS == "blocks":
            weights = n_block * BLOCK_N + both % BLOCK_N
            inside = weights < out_columns
            weights += both // BLOCK_N * out_columns
        elif not MASKED:
            weights = tl.minimum(weights, weight_rows - 1)
        ks = tl.arange(0, BLOCK_K)
        if FORMAT is None:
            expert_ptr = weight_ptr + expert.to(tl.int64) * weight_rows * hidden_size
            b_ptrs = expert_ptr + weights.to(tl.int64)[None, :] * row_stride + ks[:, None] * k_stride
            scale_ptrs = None
        else:
            b_ptrs, scale_ptrs = quantized_rows(
                weight_ptr, weight_scale_ptr, expert, weights, weight_rows, row_stride, scale_columns,
                GROUP_N,
            )  # fmt: skip
        if weight_zero_ptr is None:
            zero_ptrs = None
        else:
            zero_ptrs = zero_rows(weight_zero_ptr, scale_ptrs, expert, weights, weight_rows, zero_columns)
        sums, whole = multiply(
            hidden_ptr, tokens, hidden_size,
            b_ptrs, k_stride, inside, scale_ptrs, zero_ptrs, 0, hidden_size, flag_ptr, FORMAT, GROUP_K,
            BY_TWO, MASKED, EVEN, BLOCK_M, 2 * BLOCK_N, BLOCK_K, STAGES, EXIT_K, HAS_FLAG, THREADS,
        )  # fmt: skip
        if not whole:
            give_back(ticket, state_ptr, returned_ptr)
        asked = begin_poll(flag_ptr, HAS_FLAG, THREADS)  # answered while the tile is stored
        if SCALED:
            scale = tl.load(scale_ptr + tl.load(order_ptr + rows, mask=rows < stop, other=0))
            sums *= scale.to(tl.float32)[:, None]
        if HAS_BIAS:
            bias = tl.load(bias_ptr + expert.to(tl.int64) * weight_rows + weights, mask=inside, other=0.0)
            sums += bias.to(tl.float32)[None, :]
        if PAIRS == "none":
            if LIMIT is not None:
                sums = -below(-below(sums, LIMIT), LIMIT)
            result = activate(sums, ACTIVATION, ALPHA)
            columns = n_block * 2 * BLOCK_N + both
        else:
            if PAIRS == "blocks":
                pairs = tl.permute(tl.reshape(sums, (BLOCK_M, 2, BLOCK_N)), (0, 2, 1))
            else:
                pairs = tl.reshape(sums, (BLOCK_M, BLOCK_N, 2))
            gate, up = tl.split(pairs)
            if LIMIT is not None:
                gate = below(gate, LIMIT)
                up = -below(-below(up, LIMIT), LIMIT)
            if UP_OFFSET != 0.0:
                up += UP_OFFSET
            result = activate(gate, ACTIVATION, ALPHA) * up
            columns = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
        tl.store(
            intermediate_ptr + rows[:, None].to(tl.int64) * out_columns + columns[None, :],
            narrow(result, intermediate_ptr.dtype.element_ty),
            mask=(rows < tl.where(whole, stop, row))[:, None] & (columns < out_columns)[None, :],
        )
        done += tl.where(whole, 1, 0)
        ticket = next_ticket(state_ptr, returned_ptr, asked, end, share, quantum, 0, HAS_FLAG, EXIT_K, SLOTS)
    leave(state_ptr, done, quantum, 0)


@triton.jit(
    do_not_specialize=["share", "quantum", "phase", "num_pairs"],
    do_not_specialize_on_alignment=["flag_ptr"],
)
def down(
    intermediate_ptr,  # (P, I)
    weight_ptr,  # (E, H, I), strides below
    weight_scale_ptr,
    weight_zero_ptr,
    bias_ptr,  # (E, H)
    partial_ptr,  # (SPLIT_K, P, W)
    order_ptr,  # (P,) int64
    state_ptr,
    flag_ptr,
    share,
    quantum,
    phase,
    num_pairs,
    num_experts,
    hidden_size,
    intermediate_size,
    chunk_begin,  # the columns of this launch: [chunk_begin, chunk_begin + chunk_size)
    chunk_size,
    partial_width,  # W
    row_stride,
    k_stride,
    scale_columns,
    zero_columns,
    FORMAT: tl.constexpr,  # as in gate_up
    GROUP_N: tl.constexpr,
    GROUP_K: tl.constexpr,
    BY_TWO: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_FLAG: tl.constexpr,
    THREADS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    EVEN: tl.constexpr,  # every part of intermediate_size is a multiple of BLOCK_K
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SPLIT_K: tl.constexpr,
    STAGES: tl.constexpr,
    EXIT_K: tl.constexpr,
    SLOTS: tl.constexpr,
):
    offsets_ptr = state_ptr + OFFSETS
    blocks_ptr = offsets_ptr + 2 * (num_experts + 1)
    returned_ptr = offsets_ptr + 3 * (num_experts + 1)
    n_blocks = tl.cdiv(chunk_size, BLOCK_N) * SPLIT_K
    part_size = tl.cdiv(tl.cdiv(intermediate_size, SPLIT_K), BLOCK_K) * BLOCK_K
    wait_for_previous(DEPENDENT)
    first_poll = begin_poll(flag_ptr, HAS_FLAG, THREADS)
    end = last_ticket(state_ptr, phase)
    done = 0
    ticket = next_ticket(
        state_ptr, returned_ptr, first_poll, end, share, quantum, phase, HAS_FLAG, EXIT_K, SLOTS
    )
    while ticket < end:
        expert, row, stop, n_block = locate(
            ticket, blocks_ptr, offsets_ptr, num_experts, n_blocks, BLOCK_M, BLOCK_E
        )
        part = n_block % SPLIT_K
        rows = row + tl.arange(0, BLOCK_M)
        valid = rows < stop
        columns = n_block // SPLIT_K * BLOCK_N + tl.arange(0, BLOCK_N)
        ks = tl.arange(0, BLOCK_K)
        inside = columns < chunk_size
        weights = columns if MASKED else tl.minimum(columns, chunk_size - 1)
        if FORMAT is None:
            first_ptr = weight_ptr + expert.to(tl.int64) * hidden_size * intermediate_size
            first_ptr += chunk_begin.to(tl.int64) * row_stride
            b_ptrs = first_ptr + weights.to(tl.int64)[None, :] * row_stride + ks[:, None] * k_stride
            scale_ptrs = None
        else:
            b_ptrs, scale_ptrs = quantized_rows(
                weight_ptr, weight_scale_ptr, expert, chunk_begin + weights, hidden_size, row_stride,
                scale_columns, GROUP_N,
            )  # fmt: skip
        if weight_zero_ptr is None:
            zero_ptrs = None
        else:
            zero_ptrs = zero_rows(
                weight_zero_ptr, scale_ptrs, expert, chunk_begin + weights, hidden_size, zero_columns
            )
        source_rows = tl.where(valid, rows, 0).to(tl.int64)
        if FORMAT is None:
            # Before the sums, which hide how long it takes; those of widened weights leave no registers.
            pairs = tl.load(order_ptr + rows, mask=valid, other=0).to(tl.int32)
        begin = part * part_size
        sums, whole = multiply(
            intermediate_ptr, source_rows, intermediate_size,
            b_ptrs, k_stride, inside, scale_ptrs, zero_ptrs,
            begin, tl.minimum(begin + part_size, intermediate_size), flag_ptr, FORMAT, GROUP_K,
            BY_TWO, MASKED, EVEN, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, EXIT_K, HAS_FLAG, THREADS,
        )  # fmt: skip
        if not whole:
            give_back(ticket, state_ptr, returned_ptr)
        asked = begin_poll(flag_ptr, HAS_FLAG, THREADS)  # answered while the tile is stored
        if HAS_BIAS:
            bias_row_ptr = bias_ptr + expert.to(tl.int64) * hidden_size + chunk_begin
            bias = tl.load(bias_row_ptr + columns, mask=inside, other=0.0)
            sums += tl.where(part == 0, bias.to(tl.float32), 0.0)[None, :]
        if FORMAT is not None:
            pairs = tl.load(order_ptr + rows, mask=valid, other=0)
        part_ptr = partial_ptr + part.to(tl.int64) * num_pairs * partial_width
        tl.store(
            part_ptr + pairs[:, None].to(tl.int64) * partial_width + columns[None, :],
            narrow(sums, partial_ptr.dtype.element_ty),
            mask=(rows < tl.where(whole, stop, row))[:, None] & inside[None, :],
        )
        done += tl.where(whole, 1, 0)
        ticket = next_ticket(
            state_ptr, returned_ptr, asked, end, share, quantum, phase, HAS_FLAG, EXIT_K, SLOTS
        )
    leave(state_ptr, done, quantum, phase)


@triton.jit(
    do_not_specialize=["share", "quantum", "phase", "num_tokens"],
    do_not_specialize_on_alignment=["flag_ptr", "index_ptr", "weights_ptr"],
)
def combine(
    partial_ptr,  # (SPLIT_K, P, W)
    output_ptr,  # (T, H)
    state_ptr,
    index_ptr,  # (T, K)
    weights_ptr,  # (T, K)
    flag_ptr,
    share,
    quantum,
    phase,
    num_tokens,
    num_experts,
    hidden_size,
    chunk_begin,
    chunk_size,
    partial_width,
    HAS_FLAG: tl.constexpr,
    THREADS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TOP_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    n_blocks = tl.cdiv(chunk_size, BLOCK_N)
    wait_for_previous(DEPENDENT)
    first_poll = begin_poll(flag_ptr, HAS_FLAG, THREADS)
    end = last_ticket(state_ptr, phase)
    done = 0
    ticket = next_ticket(state_ptr, state_ptr, first_poll, end, share, quantum, phase, HAS_FLAG, 0, 0)
    while ticket < end:
        tokens = (ticket // n_blocks * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        columns = ticket % n_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (tokens < num_tokens)[:, None] & (columns < chunk_size)[None, :]
        sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in tl.range(0, TOP_K, num_stages=STAGES):
            pairs = tokens * TOP_K + k
            experts = tl.load(index_ptr + pairs, mask=tokens < num_tokens, other=-1).to(tl.int64)
            weights = tl.load(weights_ptr + pairs, mask=tokens < num_tokens, other=0.0).to(tl.float32)
            here = (experts >= 0) & (experts < num_experts)
            value = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            for part in tl.static_range(SPLIT_K):
                rows = (part * num_tokens.to(tl.int64) * TOP_K + pairs)[:, None] * partial_width
                term = tl.load(partial_ptr + rows + columns[None, :], mask=inside, other=0.0)
                # Nothing was written for a pair that is skipped: what is there is loaded, and left out.
                value += to_float32(tl.where(here[:, None], term, 0.0))
            sums += tl.where(here, weights, 0.0)[:, None] * value
        asked = begin_poll(flag_ptr, HAS_FLAG, THREADS)
        tl.store(
            output_ptr + tokens[:, None] * hidden_size + (chunk_begin + columns)[None, :],
            narrow(sums, output_ptr.dtype.element_ty),
            mask=inside,
        )
        done += 1
        ticket = next_ticket(state_ptr, state_ptr, asked, end, share, quantum, phase, HAS_FLAG, 0, 0)
    leave(state_ptr, done, quantum, phase)
