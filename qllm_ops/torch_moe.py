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

import functools

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

WIDE_ROWS = 12
"""From this many rows on, the products are computed transposed (see `_matmuls`)."""


def tile_rows(hidden_size: int, intermediate_size: int) -> int:
    """Most rows of a tile: the power of two that keeps its three matrix products within TILE_FLOPS."""
    rows = int(TILE_FLOPS / (6 * hidden_size * intermediate_size))
    return min(MAX_ROWS, max(MIN_ROWS, 1 << (rows.bit_length() - 1 if rows else 0)))


def split(start: int, stop: int, most: int) -> list[tuple[int, int]]:
    """Cut the range into the fewest pieces of at most ``most``, all of nearly the same length."""
    length = stop - start
    pieces = -(-length // most)
    return [(start + length * i // pieces, start + length * (i + 1) // pieces) for i in range(pieces)]


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
        self._route()
        self._allocate()

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
        edges = torch.searchsorted(ordered, edges).tolist()
        self._token = pair // x.top_k
        # _slot[t * K + k] is the row at which the pair (t, k) was computed.
        self._slot = torch.empty_like(pair)
        self._slot[pair] = torch.arange(pair.numel(), device=pair.device)
        self._weights = x.top_k_weights.to(torch.float32).reshape(-1)

        rows = tile_rows(x.hidden_size, x.intermediate_size)
        self._tiles = [
            (expert, start, stop)
            for expert in range(x.num_experts)
            for start, stop in split(edges[expert], edges[expert + 1], rows)
        ]
        self._combines = split(0, x.num_tokens, max(1, COMBINE_BYTES // (4 * x.top_k * x.hidden_size)))

        self._skipped = edges[-1] - edges[0] < pair.numel()
        if self._skipped:  # They all point at one more row, which is zero.
            skipped = (experts < 0) | (experts >= x.num_experts)
            self._slot.masked_fill_(skipped, pair.numel())
            self._weights = self._weights.masked_fill(skipped, 0)

    def _allocate(self) -> None:
        x = self.inputs
        rows = max((stop - start for _, start, stop in self._tiles), default=0)
        new = functools.partial(torch.empty, dtype=torch.float32, device=x.hidden_states.device)
        self._x = new(rows * x.hidden_size)
        self._gate_up = new(rows * 2 * x.intermediate_size)
        self._pair_out = new(self._slot.numel() + self._skipped, x.hidden_size)
        if self._skipped:
            self._pair_out[-1] = 0
        if x.hidden_states.dtype != torch.float32:
            self._gate_up_proj = new(x.gate_up_proj.shape[1:])
            self._down_proj = new(x.down_proj.shape[1:])
        self._output = torch.empty_like(x.hidden_states)

    def _compute(self, tile: int) -> None:
        if tile < len(self._tiles):
            self._matmuls(*self._tiles[tile])
        else:
            self._combine(*self._combines[tile - len(self._tiles)])

    def _matmuls(self, expert: int, start: int, stop: int) -> None:
        """Rows start..stop of `_pair_out`: gate and up, activation, down."""
        inputs, rows = self.inputs, stop - start
        gate_up_proj, down_proj = inputs.gate_up_proj[expert], inputs.down_proj[expert]
        x = self._x[: rows * inputs.hidden_size].view(rows, -1)
        if inputs.hidden_states.dtype == torch.float32:
            torch.index_select(inputs.hidden_states, 0, self._token[start:stop], out=x)
        else:
            x.copy_(inputs.hidden_states.index_select(0, self._token[start:stop]))
            gate_up_proj, down_proj = self._gate_up_proj.copy_(gate_up_proj), self._down_proj.copy_(down_proj)

        gate_up = self._gate_up[: rows * 2 * inputs.intermediate_size]
        if rows < WIDE_ROWS:
            gate_up = gate_up.view(rows, -1)
            torch.mm(x, gate_up_proj.t(), out=gate_up)
            gate, up = gate_up.chunk(2, dim=1)
        else:
            # The same numbers the other way round, (2I, rows): with 16 to 48 rows this takes MKL half
            # the time, with more it is no slower, and gate and up are contiguous for the activation.
            gate_up = gate_up.view(-1, rows)
            torch.mm(gate_up_proj, x.t(), out=gate_up)
            gate, up = gate_up.t().chunk(2, dim=1)
        activate_(gate, inputs.activation).mul_(up)
        torch.mm(gate, down_proj.t(), out=self._pair_out[start:stop])

    def _combine(self, start: int, stop: int) -> None:
        """Rows start..stop of the output: the weighted sum over k, in order, in float32."""
        k = self.inputs.top_k
        offsets = torch.arange(0, (stop - start) * k, k, device=self._slot.device)
        pairs = slice(start * k, stop * k)
        sums, *_ = torch.embedding_bag(
            self._pair_out, self._slot[pairs], offsets, mode=0, per_sample_weights=self._weights[pairs]
        )
        self._output[start:stop] = sums


def activate_(gate: Tensor, activation: str) -> Tensor:
    """Apply the activation in place."""
    if activation == "silu":
        return F.silu(gate, inplace=True)
    return torch.ops.aten.gelu_(gate, approximate="tanh" if activation == "gelu_tanh" else "none")
