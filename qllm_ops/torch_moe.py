"""The MoE layer in plain torch, one (expert, row block) tile at a time: the backend for CPUs.

The (token, k) pairs are sorted by expert, so that every expert owns a contiguous range of rows:

    row          0    1    2  |  3    4  |  5    6    7    8
    expert       0    0    0  |  2    2  |  3    3    3    3
    token        1    4    5     0    4     0    2    3    5
    tile        [   first   ] [ second ] [ third ] [ fourth ]

A tile gathers the hidden states of its rows, multiplies them by its expert's matrices and leaves
one row per pair in `_pair_out`. The last tiles add the K rows of each token, in order of k. The tiles
depend on the inputs only and each is computed whole, so the result does not depend on where the
run was left and taken up again.

All arithmetic is in float32: 16-bit weights are widened one expert at a time, which on a CPU without
16-bit matrix units is also several times faster than multiplying them as they are.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from qllm_ops.flag import PriorityFlag
from qllm_ops.inputs import MoeInputs

TILE_FLOPS = 0.9e9
"""Most work in one tile: 4 to 9 ms at 100 to 200 GFLOP/s. Leaving takes as long as one tile."""

MIN_ROWS, MAX_ROWS = 16, 512
"""Fewer rows do not pay for reading the weights; more rows no longer make a matrix product faster."""

COMBINE_BYTES = 8 * 2**20
"""Bytes of pair outputs that one tile of the combine reads: about a millisecond."""

WIDE_ROWS, MANY_ROWS = 12, 64
"""Between these numbers of rows per expert, products are stored column by column: MKL then takes half the
time on two cores. With fewer or more rows it takes longer."""

GROUP_BYTES = 64 * 2**20
"""Most weights in a tile that joins experts with few rows: about 4 ms of reading memory."""

Block = tuple[int, int, int]
"""Expert, first row, one past the last row."""


def tile_rows(hidden_size: int, intermediate_size: int) -> int:
    """Most rows of a tile: the power of two that keeps its three matrix products within TILE_FLOPS."""
    rows = int(TILE_FLOPS / (6 * hidden_size * intermediate_size))
    return min(MAX_ROWS, max(MIN_ROWS, 1 << (rows.bit_length() - 1 if rows else 0)))


def split(start: int, stop: int, most: int) -> list[tuple[int, int]]:
    """Cut the range into the fewest pieces of at most ``most``, all of nearly the same length."""
    length = stop - start
    pieces = -(-length // most)
    return [(start + length * i // pieces, start + length * (i + 1) // pieces) for i in range(pieces)]


def make_tiles(edges: list[int], hidden_size: int, intermediate_size: int) -> list[list[Block]]:
    """Cut the rows into tiles, where expert e owns rows edges[e] to edges[e + 1].

    A tile is one block of rows of one expert; or, where consecutive experts have only a few rows each,
    blocks of several of them: a tile for each would cost more in calls than in products.
    """
    most_rows = tile_rows(hidden_size, intermediate_size)
    most_experts = GROUP_BYTES // (12 * hidden_size * intermediate_size)
    tiles: list[list[Block]] = []
    last_has_many = None
    for expert, (first, last) in enumerate(itertools.pairwise(edges)):
        for start, stop in split(first, last, most_rows):
            has_many = stop - start >= MANY_ROWS
            if (
                has_many == last_has_many
                and len(tiles[-1]) < most_experts
                and stop - tiles[-1][0][1] <= most_rows
            ):
                tiles[-1].append((expert, start, stop))
            else:
                tiles.append([(expert, start, stop)])
            last_has_many = has_many
    return tiles


class TorchMoe:
    """One MoE layer and its progress. Works on any device; polls and routes on the host.

    A backend of `qllm_ops.MoeRun`, which documents the arguments. Every tile that was taken was
    also finished: a step that raises has not counted the tile in which it did.
    """

    def __init__(self, inputs: MoeInputs, flag: PriorityFlag | None, priority: int):
        self.inputs = inputs
        self.tiles_done = 0
        self._flag = flag
        self._word = None if flag is None else flag.words[priority]
        self._can_group = can_group(inputs)
        self._route()
        self._output = torch.empty_like(inputs.hidden_states)

    @property
    def tiles_total(self) -> int:
        return len(self._tiles) + len(self._combines)

    @property
    def tiles_taken(self) -> int:
        return self.tiles_done

    @property
    def output(self) -> Tensor:
        return self._output

    def step(self, max_tiles: int | None) -> bool:
        """Compute tiles until all are done, ``max_tiles`` are, or the class is paused; True if all are."""
        if self._flag is not None:
            self._flag.expire()
        word, total = self._word, self.tiles_total
        end = total if max_tiles is None else min(total, self.tiles_done + max_tiles)
        while self.tiles_done < end:
            # This is one program, so it may run whatever the share is, as long as it is not 0.
            if word is not None and word.item() == 0:
                break
            self._compute(self.tiles_done)
            self.tiles_done += 1
        return self.tiles_done == total

    def _route(self) -> None:
        """Sort the pairs by expert and cut every expert's rows into tiles."""
        x = self.inputs
        experts = x.top_k_index.reshape(-1).to(torch.int64)
        ordered, pair = torch.sort(experts, stable=True)
        edges = torch.arange(x.num_experts + 1, device=experts.device)
        edges = torch.searchsorted(ordered, edges, out_int32=True)
        self._ends, edges = edges[1:], edges.tolist()
        self._token = pair // x.top_k
        # slot[t * K + k] is the row at which the pair (t, k) is computed.
        slot = torch.empty_like(pair)
        slot.scatter_(0, pair, torch.arange(pair.numel(), device=pair.device))
        weights = x.top_k_weights.to(torch.float32).reshape(-1)
        skips = edges[-1] - edges[0] < pair.numel()
        if skips:  # All of them point at one more row, which is zero.
            skipped = (experts < 0) | (experts >= x.num_experts)
            slot.masked_fill_(skipped, pair.numel())
            weights = weights.masked_fill(skipped, 0)
        self._slot, self._weights = slot, weights
        self._pair_out = self._new(pair.numel() + skips, x.hidden_size)
        if skips:
            self._pair_out[-1] = 0

        self._tiles = make_tiles(edges, x.hidden_size, x.intermediate_size)
        self._combines = split(0, x.num_tokens, max(1, COMBINE_BYTES // (4 * x.top_k * x.hidden_size)))
        rows = max((tile[-1][2] - tile[0][1] for tile in self._tiles), default=0)
        self._x = self._new(rows, x.hidden_size)
        self._gate_up = self._new(rows * 2 * x.intermediate_size)

    def _new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.inputs.hidden_states.device)

    def _compute(self, tile: int) -> None:
        if tile < len(self._tiles):
            self._experts(self._tiles[tile])
        else:
            self._combine(*self._combines[tile - len(self._tiles)])

    def _experts(self, tile: list[Block]) -> None:
        """The rows of one tile, from hidden states to `_pair_out`."""
        inputs, first, start, stop = self.inputs, tile[0][0], tile[0][1], tile[-1][2]
        rows, mean_rows = stop - start, (stop - start) / len(tile)
        # What `multiply` needs is made ready before the first product has emptied the caches.
        blocks = [(expert - first, a - start, b - start) for expert, a, b in tile]
        experts = slice(first, tile[-1][0] + 1)
        gate_up_proj, down_proj = inputs.gate_up_proj[experts].mT, inputs.down_proj[experts].mT
        # One call for many experts, but it also spends some time on those of them that have no rows.
        one_call = self._can_group and mean_rows < WIDE_ROWS and 2 * len(tile) > gate_up_proj.shape[0] + 4
        ends = self._ends[experts] - start if one_call else None
        x, out = self._x[:rows], self._pair_out[start:stop]
        gate_up = self._gate_up[: rows * 2 * inputs.intermediate_size]
        if WIDE_ROWS <= mean_rows < MANY_ROWS:
            gate_up, down = gate_up.view(-1, rows).t(), self._new(inputs.hidden_size, rows).t()
        else:
            gate_up, down = gate_up.view(rows, -1), out

        if inputs.hidden_states.dtype == torch.float32:
            torch.index_select(inputs.hidden_states, 0, self._token[start:stop], out=x)
        else:
            x.copy_(inputs.hidden_states.index_select(0, self._token[start:stop]))
        gate, up = multiply(x, gate_up_proj, blocks, ends, gate_up).chunk(2, dim=1)
        activate_(gate, inputs.activation).mul_(up)
        down = multiply(gate, down_proj, blocks, ends, down)
        if down is not out:
            out.copy_(down)

    def _combine(self, start: int, stop: int) -> None:
        """Rows start..stop of the output: the weighted sum over k, in order, in float32."""
        k = self.inputs.top_k
        pairs = slice(start * k, stop * k)
        first = torch.arange(0, (stop - start) * k, k, device=self._slot.device)
        sums, *_ = torch.embedding_bag(
            self._pair_out, self._slot[pairs], first, mode=0, per_sample_weights=self._weights[pairs]
        )
        self._output[start:stop] = sums


def multiply(x: Tensor, weight: Tensor, blocks: list[Block], ends: Tensor | None, out: Tensor) -> Tensor:
    """Rows start to stop of ``x`` times weight[expert], for every block: in ``out``, or in a new tensor.

    ``ends``, if given, are where the rows of every expert in ``weight`` end; then one call does it all.
    """
    if ends is not None:
        return F.grouped_mm(x, weight, offs=ends)
    for expert, start, stop in blocks:
        torch.mm(x[start:stop], weight[expert].float(), out=out[start:stop])
    return out


def can_group(inputs: MoeInputs) -> bool:
    """Whether torch multiplies by several experts in one call: from 2.10 on, if rows start at 16 bytes."""
    weights = (inputs.gate_up_proj, inputs.down_proj)
    return (
        hasattr(F, "grouped_mm")
        and inputs.hidden_states.device.type == "cpu"
        and inputs.hidden_states.dtype == torch.float32
        and all(weight.shape[2] % 4 == 0 and weight.data_ptr() % 16 == 0 for weight in weights)
    )


def activate_(gate: Tensor, activation: str) -> Tensor:
    """Apply the activation in place."""
    if activation == "silu":
        return F.silu(gate, inplace=True)
    return torch.ops.aten.gelu_(gate, approximate="tanh" if activation == "gelu_tanh" else "none")
