"""The MoE layer in plain torch, one (expert, row block) tile at a time: the backend for CPUs.

The (token, k) pairs are sorted by expert, so that every expert owns a contiguous range of rows:

    row          0    1    2  |  3    4  |  5    6    7    8
    expert       0    0    0  |  2    2  |  3    3    3    3
    token        1    4    5     0    4     0    2    3    5
    group       [         first        ] [     second       ]

Every group of rows is two tiles: one gathers the hidden states, multiplies them by gate_up_proj and
applies the activation; the next multiplies by down_proj and leaves one row per pair in `_pair_out`. The
last tiles add the K rows of each token, in order of k. The tiles depend on the inputs only and each is
computed whole, so the result does not depend on where the run was left and taken up again.

All arithmetic is in float32: 16-bit and quantised weights are widened one expert at a time, which on a CPU
without 16-bit matrix units is also several times faster than multiplying them as they are.

A batch-invariant layer has the same tiles; its products go in blocks of rows that are proven to give the same
bits (`qllm_ops.invariant`).
"""

from __future__ import annotations

import functools
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from qllm_ops.activation import Activation
from qllm_ops.flag import PriorityFlag
from qllm_ops.inputs import MoeInputs, Weight
from qllm_ops.invariant import elementwise, multiply
from qllm_ops.quantized import QuantizedWeight, rounded_rows

TILE_FLOPS = 1.2e9
"""Most work in one tile: 6 to 12 ms at 100 to 200 GFLOP/s. Leaving takes as long as one tile."""

MIN_ROWS, MAX_ROWS = 16, 640
"""Fewer rows do not pay for reading the weights; more rows no longer make a matrix product faster."""

COMBINE_BYTES = 8 * 2**20
"""Bytes of pair outputs that one tile of the combine reads: about a millisecond."""

GROUP_BYTES = 96 * 2**20
"""Most weights of a group that joins experts with few rows: its tiles read memory for 2 to 4 ms."""

SILU = Activation("silu")

Block = tuple[int, int, int]
"""Expert, first row, one past the last row."""


def group_rows(hidden_size: int, intermediate_size: int) -> int:
    """Most rows of a group: what keeps the larger of its products, gate_up_proj's, within TILE_FLOPS."""
    return min(MAX_ROWS, max(MIN_ROWS, int(TILE_FLOPS / (4 * hidden_size * intermediate_size))))


def split(start: int, stop: int, most: int) -> list[tuple[int, int]]:
    """Cut the range into the fewest pieces of at most ``most``, all of nearly the same length."""
    length = stop - start
    pieces = -(-length // most)
    return [(start + length * i // pieces, start + length * (i + 1) // pieces) for i in range(pieces)]


def make_groups(edges: list[int], hidden_size: int, intermediate_size: int) -> list[list[Block]]:
    """Cut the rows into groups, where expert e owns rows edges[e] to edges[e + 1].

    A group is one block of rows of one expert; or, where consecutive experts have few rows each, blocks
    of several of them: tiles for each would cost more in calls than in products.
    """
    most_rows = group_rows(hidden_size, intermediate_size)
    most_experts = GROUP_BYTES // (12 * hidden_size * intermediate_size)
    groups: list[list[Block]] = []
    for expert, (first, last) in enumerate(itertools.pairwise(edges)):
        if first == last:
            continue
        for start, stop in [(first, last)] if last - first <= most_rows else split(first, last, most_rows):
            if groups and len(groups[-1]) < most_experts and stop - groups[-1][0][1] <= most_rows:
                groups[-1].append((expert, start, stop))
            else:
                groups.append([(expert, start, stop)])
    return groups


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
        return 2 * len(self._groups) + len(self._combines)

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
        self._experts, self._ends, edges = ordered, edges[1:], edges.tolist()
        self._token = pair // x.top_k
        # slot[t * K + k] is the row at which the pair (t, k) is computed.
        slot = torch.empty_like(pair)
        numbers = torch.arange(pair.numel(), device=pair.device)
        slot.scatter_(0, pair, numbers)
        self._bags = numbers[:: x.top_k]  # where the pairs of every token begin
        weights = x.top_k_weights.to(torch.float32).reshape(-1)
        skips = edges[-1] - edges[0] < pair.numel()
        if skips:  # All of them point at one more row, which is zero.
            skipped = (experts < 0) | (experts >= x.num_experts)
            slot.masked_fill_(skipped, pair.numel())
            weights = weights.masked_fill(skipped, 0)
        if x.weights_on_input:  # one for each row of the first product, and none later
            self._scale, weights = weights[pair, None], torch.ones_like(weights)
        self._slot, self._weights = slot, weights
        self._pair_out = self._new(pair.numel() + skips, x.hidden_size)
        if skips:
            self._pair_out[-1] = 0

        self._groups = make_groups(edges, x.hidden_size, x.intermediate_size)
        self._combines = split(0, x.num_tokens, max(1, COMBINE_BYTES // (4 * x.top_k * x.hidden_size)))
        rows = max((group[-1][2] - group[0][1] for group in self._groups), default=0)
        self._gate_up = self._new(rows, x.gate_up_size)
        self._gated = self._new(rows, x.intermediate_size)

    def _new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.inputs.hidden_states.device)

    def _compute(self, tile: int) -> None:
        if tile >= 2 * len(self._groups):
            self._combine(*self._combines[tile - 2 * len(self._groups)])
        elif tile % 2 == 0:
            self._up(self._groups[tile // 2])
        else:
            self._down(self._groups[tile // 2])

    def _up(self, group: list[Block]) -> None:
        """One group from hidden states to activation(gate) * up, in `_gated`."""
        start, stop = group[0][1], group[-1][2]
        x = self.inputs.hidden_states.index_select(0, self._token[start:stop])
        x = rounded_rows(x) if self.inputs.fp8_activations else x.float()
        if self.inputs.weights_on_input:
            x.mul_(self._scale[start:stop])  # a copy of the rows, so no argument changes
        out = self._gate_up[: stop - start]
        gate_up = self._multiply(x, self.inputs.gate_up_proj, self.inputs.gate_up_bias, group, out)
        activate(gate_up, self.inputs, self._gated[: stop - start])

    def _down(self, group: list[Block]) -> None:
        """One group from there to its rows of `_pair_out`."""
        start, stop = group[0][1], group[-1][2]
        gated, out = self._gated[: stop - start], self._pair_out[start:stop]
        if self.inputs.fp8_activations:
            gated = rounded_rows(gated.to(self._output.dtype))
        down = self._multiply(gated, self.inputs.down_proj, self.inputs.down_bias, group, out)
        if self.inputs.expert_norm is not None:
            down = out.copy_(checked("expert_norm", self.inputs.expert_norm(down), down.shape, down.device))
        if down.shape == self._pair_out.shape:  # all there is
            self._pair_out = down
        elif down is not out:
            out.copy_(down)

    def _multiply(
        self, x: Tensor, weight: Weight, bias: Tensor | None, group: list[Block], out: Tensor
    ) -> Tensor:
        """x times the expert's weight, plus its bias, for every block's rows: in ``out`` or a new tensor."""
        (first, begin, _), (last, _, end) = group[0], group[-1]
        # One call for many experts, but it also spends some time on those between them that have no rows.
        if self._can_group and 2 * len(group) > last - first + 5:
            ends = self._ends[first : last + 1]
            # Skipped rows may come first, and the outer experts may have rows in other groups.
            if begin or len(self._groups) > 1:
                ends = (ends - begin).clamp_(max=len(x))
            right = weight[first : last + 1]
            out = F.grouped_mm(x, right if self.inputs.transposed else right.mT, offs=ends)
        else:
            for expert, start, stop in group:
                rows = slice(start - begin, stop - begin)
                right = widened(weight, expert)
                right = right if self.inputs.transposed else right.T
                if self.inputs.batch_invariant:
                    multiply(x[rows], right, out=out[rows])
                else:
                    torch.mm(x[rows], right, out=out[rows])
        return out if bias is None else out.add_(bias.index_select(0, self._experts[begin:end]))

    def _combine(self, start: int, stop: int) -> None:
        """Rows start..stop of the output: the weighted sum over k, in order, in float32."""
        pairs = slice(start * self.inputs.top_k, stop * self.inputs.top_k)
        slot, weights, bags = self._slot[pairs], self._weights[pairs], self._bags[: stop - start]
        sums, *_ = torch.embedding_bag(self._pair_out, slot, bags, mode=0, per_sample_weights=weights)
        self._output[start:stop] = sums


def widened(weight: Weight, expert: int) -> Tensor:
    """One expert's weight in float32, which is no copy if it is that already."""
    return weight.dequantize(expert) if isinstance(weight, QuantizedWeight) else weight[expert].float()


def can_group(inputs: MoeInputs) -> bool:
    """Whether torch multiplies by several experts in one call: from 2.10 on, if rows start at 16 bytes."""
    weights = (inputs.gate_up_proj, inputs.down_proj)
    return (
        hasattr(F, "grouped_mm")
        and inputs.hidden_states.device.type == "cpu"
        and inputs.hidden_states.dtype == torch.float32
        and inputs.weight_format is None
        and not inputs.batch_invariant
        and inputs.hidden_size % 4 == inputs.intermediate_size % 4 == 0
        and all(weight.data_ptr() % 16 == 0 for weight in weights)
    )


def activate(gate_up: Tensor, inputs: MoeInputs, out: Tensor) -> None:
    """What goes into the second product, (rows, I), into ``out``. Overwrites ``gate_up``."""
    activation = inputs.activation
    if not isinstance(activation, Activation):
        out.copy_(checked("activation", activation(gate_up), out.shape, out.device))
        return
    if not inputs.gated:
        parts = (gate_up,)
        activation = functools.partial(activation, None)
    elif inputs.interleaved:
        parts = (gate_up[:, ::2], gate_up[:, 1::2])
    else:
        parts = gate_up.chunk(2, dim=1)
    if inputs.batch_invariant:
        out.copy_(elementwise(activation, *parts))
    elif activation == SILU and inputs.gated:  # The most frequent one makes no new tensor.
        gate, up = parts
        torch.mul(F.silu(gate, inplace=True), up, out=out)
    else:
        out.copy_(activation(*parts))


def checked(name: str, result: object, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """What a user's function returned, if it is a tensor as it must be."""
    if not isinstance(result, Tensor) or result.shape != shape:
        got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        # F.silu and the like, the first thing to try, know nothing of the gate.
        hint = "; a function is given (rows, 2I), gate and up together" if name == "activation" else ""
        raise ValueError(f"{name} must return a tensor of shape {tuple(shape)}, got {got}{hint}")
    if not result.is_floating_point() or result.layout != torch.strided or result.device != device:
        raise ValueError(
            f"{name} must return a dense floating-point tensor on {device}, got {result.dtype}, "
            f"{result.layout}, on {result.device}"
        )
    return result
