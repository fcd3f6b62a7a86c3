"""The Triton kernels of the MoE layer: persistent, ticketed, and able to leave at every tile.

Four launches in stream order, each a phase with its own tiles:

    route      where every expert's rows begin, and how many tiles there are      (one program)
    gate_up    intermediate[r] = act(gate) * up   for every sorted row r          (P, I)
    down       partial[s, p] = part s of down(intermediate[r])   for p = order[r] (S, P, H)
    combine    output[t] = sum over k of weight[t, k] * sum over s of partial[s, t * K + k]

P = T * K (token, k) pairs; pair p = t * K + k. `order` lists the pairs sorted by expert, so an expert
owns a contiguous range of sorted rows, and `offsets` says where:

    sorted row   0    1  |  2    3    4  |  5  |  6
    expert      -1   -1  |  0    0    0  |  2  |  9         with E = 4: rows 0, 1 and 6 are skipped
    offsets                 [0]             [2]   [4]        = (2, 5, 5, 6, 6)

What a run needs to be taken up again is one tensor, `state` (int32). `route` writes all of it; later
only the first six words change:

    0 .. 2      tickets given out in each phase. They go on counting past the last tile
    3 .. 5      tiles finished in each phase; a program adds its own when it leaves
    6 .. 8      tiles in all
    9 ..        offsets (E + 1), then the first row block of each expert and the number of all row blocks
                (E + 1), for gate_up and again for down

A program polls the flag, takes a ticket, computes that tile whole, and only then polls again. So a
tile that was taken is a tile that is done, and no tile's arithmetic depends on who ran it or when.
"""

import triton
import triton.language as tl

# Row blocks of one expert that run side by side share a block of weights through the L2 cache; beyond
# this many, the activations of the group would in turn be read from memory once per block of weights.
GROUP_M = tl.constexpr(16)

# The interpreter multiplies bfloat16 numbers as if they were integers, and cuts where it should round.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

DONE = tl.constexpr(3)
TOTAL = tl.constexpr(6)
OFFSETS = tl.constexpr(9)


@triton.jit
def next_ticket(state_ptr, flag_ptr, end, PHASE: tl.constexpr, HAS_FLAG: tl.constexpr):
    """Poll, then take a ticket; `end` if this program has to leave.

    The poll is an atomic that adds nothing: one thread reads, and the whole program sees the same value.
    A volatile load would let the warps of one program read different values.
    """
    # A phase that may not begin gives out no ticket: nobody would compute its tile.
    may_run = end > 0
    if HAS_FLAG:
        may_run &= tl.program_id(0) < tl.atomic_add(flag_ptr, 0, sem="relaxed", scope="sys")
    ticket = end
    if may_run:
        ticket = tl.atomic_add(state_ptr + PHASE, 1, sem="relaxed")
    return ticket


@triton.jit
def last_ticket(state_ptr, limit, PHASE: tl.constexpr):
    """One past the last ticket that this launch may compute; 0 while the previous phase is not done.

    The end of a launch makes its tiles visible to the next.
    """
    end = tl.minimum(limit, tl.load(state_ptr + TOTAL + PHASE))
    if PHASE > 0:
        ready = tl.load(state_ptr + DONE + PHASE - 1) >= tl.load(state_ptr + TOTAL + PHASE - 1)
        end = tl.where(ready, end, 0)
    return end


@triton.jit
def locate(
    ticket, blocks_ptr, offsets_ptr, num_experts, n_blocks, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr
):
    """The ticket's expert, its first sorted row and one past the expert's last, and its column block.

    Column blocks follow each other, and within one the row blocks of a group: where an expert has few
    rows, its weights are read from memory once.
    """
    experts = tl.arange(0, BLOCK_E)
    ends = tl.load(blocks_ptr + 1 + experts, mask=experts < num_experts, other=2147483647)
    expert = tl.sum((ends <= ticket // n_blocks).to(tl.int32), axis=0)
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
    a_ptrs,
    b_ptrs,
    b_stride,  # from one k to the next
    b_inside,  # which columns of b exist, if MASKED
    begin,
    stop,
    MASKED: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sum over k in [begin, stop) of a[:, k] * b[k, :], in increasing k, in float32."""
    ks = tl.arange(0, BLOCK_K)
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in tl.range(begin, stop, BLOCK_K, num_stages=STAGES):
        inside = k + ks < stop
        if EVEN:
            a = tl.load(a_ptrs + k)
        else:
            a = tl.load(a_ptrs + k, mask=inside[None, :], other=0.0)
        if EVEN and MASKED:
            b = tl.load(b_ptrs + k * b_stride, mask=b_inside[None, :], other=0.0)
        elif MASKED:
            b = tl.load(b_ptrs + k * b_stride, mask=inside[:, None] & b_inside[None, :], other=0.0)
        elif EVEN:
            b = tl.load(b_ptrs + k * b_stride)
        else:
            b = tl.load(b_ptrs + k * b_stride, mask=inside[:, None], other=0.0)
        if INTERPRETED:
            a, b = a.to(tl.float32), b.to(tl.float32)
        sums = tl.dot(a, b, sums, input_precision="ieee")
    return sums


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Round float32 to the nearest number of ``dtype``, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


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


@triton.jit(do_not_specialize=["num_pairs", "combine_tiles"])
def route(
    sorted_ptr,  # (P,) expert of every sorted row
    state_ptr,
    num_pairs,
    num_experts,
    gate_up_blocks,  # column blocks of one row block, in each phase
    down_blocks,
    combine_tiles,
    GATE_UP_M: tl.constexpr,
    DOWN_M: tl.constexpr,
    BLOCK_E: tl.constexpr,  # power of two, at least E + 1
):
    """Write the state of a run that has not begun. One program, of no class: it never waits.

    Every expert finds its rows by binary search, which is faster for one program than a pass over them.
    """
    experts = tl.arange(0, BLOCK_E)
    tl.store(state_ptr + experts, 0, mask=experts < TOTAL)
    known = experts < num_experts
    begin = first_row(sorted_ptr, num_pairs, experts, BLOCK_E)
    rows = first_row(sorted_ptr, num_pairs, experts + 1, BLOCK_E) - begin
    rows = tl.where(known, rows, 0)
    offsets_ptr = state_ptr + OFFSETS
    tl.store(offsets_ptr + experts, begin, mask=experts <= num_experts)
    blocks_ptr = offsets_ptr + num_experts + 1
    total = write_blocks(blocks_ptr, experts, known, rows, GATE_UP_M)
    tl.store(state_ptr + TOTAL, total * gate_up_blocks)
    total = write_blocks(blocks_ptr + num_experts + 1, experts, known, rows, DOWN_M)
    tl.store(state_ptr + TOTAL + 1, total * down_blocks)
    tl.store(state_ptr + TOTAL + 2, combine_tiles)


@triton.jit
def first_row(sorted_ptr, num_pairs, experts, BLOCK_E: tl.constexpr):
    """The first sorted row whose expert is not below each of `experts`, by binary search."""
    low = tl.zeros((BLOCK_E,), dtype=tl.int32)
    high = low + num_pairs
    left = num_pairs
    while left > 0:
        middle = (low + high) // 2
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


@triton.jit(do_not_specialize=["limit"], do_not_specialize_on_alignment=["flag_ptr"])
def gate_up(
    hidden_ptr,  # (T, H)
    weight_ptr,  # (E, R, H): R = 2I rows of gate and up, or I without a gate; strides below
    bias_ptr,  # (E, R)
    intermediate_ptr,  # (P, I)
    order_ptr,  # (P,) int64
    state_ptr,
    flag_ptr,
    limit,
    num_experts,
    top_k,
    hidden_size,
    weight_rows,  # R
    row_stride,  # of an expert's weights: from row to row, and along a row
    k_stride,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,  # None: no clamp
    UP_OFFSET: tl.constexpr,
    PAIRS: tl.constexpr,  # where an up row is: "halves", I after its gate's; "alternating", 1 after; "none"
    MASKED: tl.constexpr,  # rows of weights are contiguous (k_stride is not 1), and R no multiple of a tile's
    HAS_BIAS: tl.constexpr,
    HAS_FLAG: tl.constexpr,
    EVEN: tl.constexpr,  # hidden_size is a multiple of BLOCK_K
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # half as many as there are rows of weights in a tile
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STAGES: tl.constexpr,
):
    offsets_ptr = state_ptr + OFFSETS
    n_blocks = tl.cdiv(weight_rows, 2 * BLOCK_N)
    out_columns = weight_rows if PAIRS == "none" else weight_rows // 2
    end = last_ticket(state_ptr, limit, 0)
    done = 0
    ticket = next_ticket(state_ptr, flag_ptr, end, 0, HAS_FLAG)
    while ticket < end:
        expert, row, stop, n_block = locate(
            ticket, offsets_ptr + num_experts + 1, offsets_ptr, num_experts, n_blocks, BLOCK_M, BLOCK_E
        )
        rows = row + tl.arange(0, BLOCK_M)
        # Rows past the expert's last read pair 0, which exists, and are not stored. So the loads in
        # the loop need no mask; the same for the columns past the last.
        tokens = tl.load(order_ptr + rows, mask=rows < stop, other=0) // top_k
        # Gate and up rows alternate, so that one product holds both halves of a pair in one thread.
        both = tl.arange(0, 2 * BLOCK_N)
        weights = n_block * 2 * BLOCK_N + both
        inside = weights < weight_rows
        if PAIRS == "halves":
            weights = tl.minimum(n_block * BLOCK_N + both // 2, out_columns - 1) + both % 2 * out_columns
        elif not MASKED:
            weights = tl.minimum(weights, weight_rows - 1)
        ks = tl.arange(0, BLOCK_K)
        expert_ptr = weight_ptr + expert.to(tl.int64) * weight_rows * hidden_size
        sums = multiply(
            hidden_ptr + tokens[:, None] * hidden_size + ks[None, :],
            expert_ptr + weights.to(tl.int64)[None, :] * row_stride + ks[:, None] * k_stride,
            k_stride, inside, 0, hidden_size,
            MASKED, EVEN, BLOCK_M, 2 * BLOCK_N, BLOCK_K, STAGES,
        )  # fmt: skip
        if HAS_BIAS:
            bias = tl.load(bias_ptr + expert.to(tl.int64) * weight_rows + weights, mask=inside, other=0.0)
            sums += bias.to(tl.float32)[None, :]
        if PAIRS == "none":
            if LIMIT is not None:
                sums = -below(-below(sums, LIMIT), LIMIT)
            result = activate(sums, ACTIVATION, ALPHA)
            columns = n_block * 2 * BLOCK_N + both
        else:
            gate, up = tl.split(tl.reshape(sums, (BLOCK_M, BLOCK_N, 2)))
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
            mask=(rows < stop)[:, None] & (columns < out_columns)[None, :],
        )
        done += 1
        ticket = next_ticket(state_ptr, flag_ptr, end, 0, HAS_FLAG)
    tl.atomic_add(state_ptr + DONE + 0, done, sem="relaxed")


@triton.jit(do_not_specialize=["limit", "num_pairs"], do_not_specialize_on_alignment=["flag_ptr"])
def down(
    intermediate_ptr,  # (P, I)
    weight_ptr,  # (E, H, I), strides below
    bias_ptr,  # (E, H)
    partial_ptr,  # (SPLIT_K, P, H)
    order_ptr,  # (P,) int64
    state_ptr,
    flag_ptr,
    limit,
    num_pairs,
    num_experts,
    hidden_size,
    intermediate_size,
    row_stride,
    k_stride,
    MASKED: tl.constexpr,  # as in gate_up
    HAS_BIAS: tl.constexpr,
    HAS_FLAG: tl.constexpr,
    EVEN: tl.constexpr,  # every part of intermediate_size is a multiple of BLOCK_K
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SPLIT_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    offsets_ptr = state_ptr + OFFSETS
    blocks_ptr = offsets_ptr + 2 * (num_experts + 1)
    n_blocks = tl.cdiv(hidden_size, BLOCK_N) * SPLIT_K
    part_size = tl.cdiv(tl.cdiv(intermediate_size, SPLIT_K), BLOCK_K) * BLOCK_K
    end = last_ticket(state_ptr, limit, 1)
    done = 0
    ticket = next_ticket(state_ptr, flag_ptr, end, 1, HAS_FLAG)
    while ticket < end:
        expert, row, stop, n_block = locate(
            ticket, blocks_ptr, offsets_ptr, num_experts, n_blocks, BLOCK_M, BLOCK_E
        )
        part = n_block % SPLIT_K
        rows = row + tl.arange(0, BLOCK_M)
        valid = rows < stop
        columns = n_block // SPLIT_K * BLOCK_N + tl.arange(0, BLOCK_N)
        ks = tl.arange(0, BLOCK_K)
        inside = columns < hidden_size
        weights = columns if MASKED else tl.minimum(columns, hidden_size - 1)
        expert_ptr = weight_ptr + expert.to(tl.int64) * hidden_size * intermediate_size
        source_rows = tl.where(valid, rows, 0).to(tl.int64)
        begin = part * part_size
        sums = multiply(
            intermediate_ptr + source_rows[:, None] * intermediate_size + ks[None, :],
            expert_ptr + weights.to(tl.int64)[None, :] * row_stride + ks[:, None] * k_stride,
            k_stride, inside, begin, tl.minimum(begin + part_size, intermediate_size),
            MASKED, EVEN, BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
        )  # fmt: skip
        if HAS_BIAS:
            bias = tl.load(bias_ptr + expert.to(tl.int64) * hidden_size + columns, mask=inside, other=0.0)
            sums += tl.where(part == 0, bias.to(tl.float32), 0.0)[None, :]
        pairs = tl.load(order_ptr + rows, mask=valid, other=0) + part.to(tl.int64) * num_pairs
        tl.store(
            partial_ptr + pairs[:, None] * hidden_size + columns[None, :],
            narrow(sums, partial_ptr.dtype.element_ty),
            mask=valid[:, None] & (columns < hidden_size)[None, :],
        )
        done += 1
        ticket = next_ticket(state_ptr, flag_ptr, end, 1, HAS_FLAG)
    tl.atomic_add(state_ptr + DONE + 1, done, sem="relaxed")


@triton.jit(do_not_specialize=["limit", "num_tokens"], do_not_specialize_on_alignment=["flag_ptr"])
def combine(
    partial_ptr,  # (SPLIT_K, P, H)
    index_ptr,  # (T, K)
    weights_ptr,  # (T, K)
    output_ptr,  # (T, H)
    state_ptr,
    flag_ptr,
    limit,
    num_tokens,
    num_experts,
    hidden_size,
    HAS_FLAG: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TOP_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    n_blocks = tl.cdiv(hidden_size, BLOCK_N)
    end = last_ticket(state_ptr, limit, 2)
    done = 0
    ticket = next_ticket(state_ptr, flag_ptr, end, 2, HAS_FLAG)
    while ticket < end:
        tokens = (ticket // n_blocks * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        columns = ticket % n_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (tokens < num_tokens)[:, None] & (columns < hidden_size)[None, :]
        sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        # The loads of two k are under way at once; those of four make one compiler spill.
        for k in tl.range(0, TOP_K, loop_unroll_factor=2):
            pairs = tokens * TOP_K + k
            experts = tl.load(index_ptr + pairs, mask=tokens < num_tokens, other=-1).to(tl.int64)
            here = (experts >= 0) & (experts < num_experts)
            weights = tl.load(weights_ptr + pairs, mask=here, other=0.0).to(tl.float32)
            value = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            for part in tl.static_range(SPLIT_K):
                rows = (part * num_tokens.to(tl.int64) * TOP_K + pairs)[:, None] * hidden_size
                term = tl.load(partial_ptr + rows + columns[None, :], mask=here[:, None] & inside, other=0.0)
                value += term.to(tl.float32)
            sums += weights[:, None] * value
        tl.store(
            output_ptr + tokens[:, None] * hidden_size + columns[None, :],
            narrow(sums, output_ptr.dtype.element_ty),
            mask=inside,
        )
        done += 1
        ticket = next_ticket(state_ptr, flag_ptr, end, 2, HAS_FLAG)
    tl.atomic_add(state_ptr + DONE + 2, done, sem="relaxed")
