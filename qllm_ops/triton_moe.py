"""The MoE layer in Triton: routes the (token, k) pairs once, then launches its phases until they are done.

The kernels, and the memory that they share, are described in `qllm_ops.kernels.moe`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from qllm_ops.activation import Activation
from qllm_ops.device import arch_of, fit_device
from qllm_ops.flag import FULL, PriorityFlag
from qllm_ops.inputs import MoeInputs, Weight
from qllm_ops.kernels import moe as kernels
from qllm_ops.kernels import tickets
from qllm_ops.kernels.by_two import by_two
from qllm_ops.quantized import QuantizedWeight
from qllm_ops.tiles import W8A8, TileConfig, compile_options, layer_configs, partial_width, token_counts
from qllm_ops.torch_moe import checked

ROUNDS = {"gate_up": 2, "down": 2, "combine": 1}
"""How often a launch of each phase may be left under a stream gate. What is left then is computed by one more
launch, which nothing stops; where nothing is left, each of them costs a launch that ends at once."""

COUNTED_PAIRS = 512
"""Most pairs that one program sorts by itself: below that, a sort's own launches take longer."""

SORTS = (1024, 2048, 4096, 8192)
"""Up to so many pairs torch sorts by a kernel of its own each, and all beyond 4096 by the same."""

INVARIANT_ROWS = 64
"""Rows per expert for which tiles are chosen that must be the same for every batch: 64 rows still read
the weights of a decode batch faster than they multiply, and use the matrix units of a prefill."""


@dataclass(frozen=True)
class Phase:
    """One launch of a layer: all of gate_up, or down or combine for a chunk of the output's columns."""

    number: int
    kernel: str
    begin: int
    size: int


class TritonMoe:
    """One MoE layer and its progress on the device.

    A backend of `qllm_ops.MoeRun`, which documents the arguments. Making one enqueues the routing
    on the current stream and waits for nothing.

    Memory beside inputs and output, in elements of hidden_states' dtype, with P = T * K and S the tiles
    that share an output block of the second product (1 to 4)::

        P * I + S * P * W

    W is H as long as the second term is below 64 MiB or below the first; beyond that, the output is computed
    in chunks of W columns (at most 15), which make it about as large as the first. Besides, 4 * (98 + 3 *
    (E + 1)) + 16 * P bytes of state and order, and a word for each program where tiles have an exit inside.
    An activation of yours makes the first term P * 2I floats, an expert_norm the second one P * H floats; so
    do quantised weights with bfloat16 (S * P * W of them); weights_on_input takes P weights of one.

    Args:
        tiles: the configuration of each phase, instead of the one that `qllm_ops.tiles` picks.
        width: W, instead of the one that `qllm_ops.tiles` picks; a multiple of down's block_n, or H.
    """

    def __init__(
        self,
        inputs: MoeInputs,
        flag: PriorityFlag | None,
        priority: int,
        *,
        tiles: dict[str, TileConfig] | None = None,
        width: int | None = None,
    ):
        self.inputs = inputs
        self.device = inputs.hidden_states.device
        num_tokens = inputs.num_tokens
        if inputs.batch_invariant:  # The same tiles for every number of tokens, those of INVARIANT_ROWS.
            num_tokens = max(1, INVARIANT_ROWS * inputs.num_experts // inputs.top_k)
        self.tiles = tiles or tiles_for(
            (num_tokens, inputs.top_k, inputs.num_experts, inputs.hidden_size, inputs.intermediate_size),
            inputs.hidden_states.dtype,
            self.device,
            inputs.max_exit_us,
            inputs.product_format,
        )
        if inputs.expert_norm is not None:  # It is a norm of the whole sum.
            self.tiles = {**self.tiles, "down": replace(self.tiles["down"], split_k=1)}
        self._own_activation = not isinstance(inputs.activation, Activation)
        self._width = width or self._columns_at_once()
        self._phases = cut_into_phases(inputs.hidden_size, inputs.intermediate_size, self._width)
        self._stages = self._cut_into_stages()
        self._applied: set[str] = set()
        self._flag, self._priority = flag, priority
        self._word = None if flag is None else flag.words[priority:]
        # What the host knows about the phases; totals are None until the device was asked.
        nothing = (0,) * len(self._phases)
        self._done, self._given_back = nothing, 0
        self._totals: tuple[int, ...] | None = None if inputs.num_tokens else nothing
        self._unread = False
        with self._on_device():
            self._allocate()
            if inputs.num_tokens:
                self._route()
            self._mark()

    @classmethod
    def warm_up(cls, inputs: MoeInputs, flag: PriorityFlag | None = None, priority: int = 0) -> None:
        """Compile and load every kernel that layers like this one may need, whatever their number of tokens.

        The runs are of tokens that no expert here takes: their output is zero. T must be at least 1.
        """
        counts = token_counts(inputs.top_k, inputs.num_experts)
        for num_tokens in sorted({*counts, COUNTED_PAIRS // inputs.top_k + 1}):
            nobody = replace(
                inputs,
                hidden_states=inputs.hidden_states.new_empty(num_tokens, inputs.hidden_size),
                top_k_index=torch.full_like(inputs.top_k_index[:1], -1).repeat(num_tokens, 1),
                top_k_weights=inputs.top_k_weights.new_empty(num_tokens, inputs.top_k),
            )
            run = cls(nobody, flag, priority)
            with run._on_device():
                for phase in run._phases if flag is not None else ():
                    run._launch(phase)
            run.launch_all()
        for pairs in SORTS:
            torch.sort(inputs.top_k_index.new_zeros(pairs), stable=True)

    # -- the run ---------------------------------------------------------------------------------

    def step(self, max_tiles: int | None) -> bool:
        """One launch of every phase that has tiles left; waits for it. True when all tiles are done.

        The tiles of a quantum are the next ones in order, the phases one after another.
        """
        if self._flag is not None:
            self._flag.expire()
        if self._unread:
            self._read()
        if self._done == self._totals:
            return True
        with self._on_device():
            self._catch_up()
            if self._flag is not None:
                self._flag.fence()
            if max_tiles is not None:
                self._state[:1].fill_(max_tiles)
            for phases, apply in self._stages:
                for phase in phases:
                    if self._totals is None or self._done[phase.number] < self._totals[phase.number]:
                        self._launch(phase, quantum=max_tiles is not None, share=self._share(phase))
                self._read()
                if apply is not None and not self._apply(phases[-1], apply):
                    break
        return self._done == self._totals

    def launch_all(self, gated: bool = False) -> None:
        """Enqueue all that is left on the current stream, and wait for nothing.

        For a run that has not been stepped. The output may be used in stream order.

        Args:
            gated: the stream stands still while the flag pauses the class, at the next tile of the launches
                that ROUNDS says, and before every launch. Without it, nothing looks at the flag.
        """
        if self.inputs.num_tokens:
            self._unread = True
            with self._on_device():
                self._catch_up()
                for phases, apply in self._stages:
                    for phase in phases:
                        for _ in range(ROUNDS[phase.kernel] if gated else 0):
                            self._flag.hold(self._priority)
                            self._launch(phase)
                        if gated:
                            self._flag.hold(self._priority)
                        self._launch(phase, poll=False)
                    if apply is not None:
                        apply()
                self._mark()

    @property
    def tiles_done(self) -> int:
        if self._unread:
            self._read()
        return sum(self._done)

    @property
    def tiles_taken(self) -> int:
        """How often a tile was started, but for those that wait unfinished to be taken again."""
        return self.tiles_done + self._given_back

    @property
    def tiles_total(self) -> int:
        """Tiles of all phases. They depend on the routing, so the first look waits for the device."""
        if self._totals is None:
            self._read()
        return sum(self._totals)

    @property
    def output(self) -> torch.Tensor:
        return self._output

    # -- what the kernels do not compute ---------------------------------------------------------

    def _columns_at_once(self) -> int:
        x = self.inputs
        if x.expert_norm is not None:  # which is a norm of whole rows
            return x.hidden_size
        sizes = (x.num_tokens * x.top_k, x.hidden_size, x.intermediate_size)
        itemsize = x.hidden_states.itemsize
        return partial_width(*sizes, self.tiles["down"], itemsize, self._partial_dtype.itemsize // itemsize)

    @property
    def _partial_dtype(self) -> torch.dtype:
        """Of what each expert gives a token, before the weighted sum."""
        x = self.inputs
        # As before a fused activation, nothing is rounded before a norm of the experts' outputs. And bfloat16
        # weights that were widened are rounded already: one rounding more would take the error past 4e-3.
        rounded = x.product_format not in (None, W8A8) and x.hidden_states.dtype == torch.bfloat16
        return torch.float32 if rounded or x.expert_norm is not None else x.hidden_states.dtype

    def _cut_into_stages(self) -> list[tuple[list[Phase], Callable[[], None] | None]]:
        """Phases that are launched together, and what is done by torch when they are finished."""
        after = {}
        if self._own_activation:
            after["gate_up"] = self._activate
        if self.inputs.expert_norm is not None:
            after["down"] = self._norm
        stages: list[tuple[list[Phase], Callable[[], None] | None]] = [([], None)]
        for phase in self._phases:
            stages[-1][0].append(phase)
            if phase.kernel in after:
                stages[-1] = (stages[-1][0], after[phase.kernel])
                stages.append(([], None))
        return stages

    def _apply(self, phase: Phase, apply: Callable[[], None]) -> bool:
        """Once the phase is finished, once; False while it is not."""
        if self._done[phase.number] < self._totals[phase.number]:
            return False
        if apply.__name__ not in self._applied:
            apply()
            self._applied.add(apply.__name__)
        return True

    def _activate(self) -> None:
        rows, shape = self._intermediate, (self._pairs, self.inputs.intermediate_size)
        gated = checked("activation", self.inputs.activation(rows), shape, rows.device)
        if self.device.type == "cuda":
            # Read on this stream, and let go to the one that the run was made on.
            self._intermediate.record_stream(torch.cuda.current_stream())
        self._intermediate = gated.to(self._output.dtype).contiguous()

    def _norm(self) -> None:
        rows = self._partial[0]
        rows.copy_(checked("expert_norm", self.inputs.expert_norm(rows), rows.shape, rows.device))

    # -- before the first launch -----------------------------------------------------------------

    def _allocate(self) -> None:
        x = self.inputs
        new = functools.partial(torch.empty, dtype=x.hidden_states.dtype, device=self.device)
        self._output = torch.empty_like(x.hidden_states)
        self._pairs = x.num_tokens * x.top_k
        if self._own_activation:
            # The whole first product, not yet rounded: a fused activation comes before that, too.
            self._intermediate = new(self._pairs, x.gate_up_size, dtype=torch.float32)
        else:
            self._intermediate = new(self._pairs, x.intermediate_size)
        self._partial = new(self.tiles["down"].split_k, self._pairs, self._width, dtype=self._partial_dtype)
        self._allocate_state()

    def _allocate_state(self) -> None:
        products = [phase for phase in self._phases if phase.kernel != "combine"]
        self._slots = 0
        if any(self.tiles[phase.kernel].exit_k for phase in products):
            # One for each program that may give a tile back, whatever T is: kernels are compiled for it.
            resident = max(self.tiles[phase.kernel].programs_per_sm for phase in products)
            self._slots = next_power_of_2(resident * multiprocessors(self.device))
        words = tickets.OFFSETS.value + 3 * (self.inputs.num_experts + 1) + self._slots
        self._state = torch.empty(words, dtype=torch.int32, device=self.device)

    def _route(self) -> None:
        """Sort the pairs by expert and let the device write the state: nothing here knows the routing."""
        x, tiles = self.inputs, self.tiles
        counted = self._pairs <= COUNTED_PAIRS
        if counted:
            experts = x.top_k_index
            self._order = torch.empty(self._pairs, dtype=torch.int64, device=self.device)
        else:
            experts, self._order = torch.sort(x.top_k_index.view(-1), stable=True)
        self._weights_of_sum = torch.ones_like(x.top_k_weights) if x.weights_on_input else x.top_k_weights
        row_blocks = ceil_div(x.num_tokens, tiles["combine"].block_m)
        chunks = (self._width, self._phases[-1].size)  # any but the last, and the last
        self._block_e = max(16, next_power_of_2(x.num_experts + 1))
        kernels.route[(1,)](
            experts,
            self._order,
            self._state,
            self._pairs,
            x.num_experts,
            len(self._phases),
            ceil_div(x.gate_up_size, 2 * tiles["gate_up"].block_n),
            *(ceil_div(size, tiles["down"].block_n) * tiles["down"].split_k for size in chunks),
            *(ceil_div(size, tiles["combine"].block_n) * row_blocks for size in chunks),
            GATE_UP_M=tiles["gate_up"].block_m,
            DOWN_M=tiles["down"].block_m,
            BLOCK_E=self._block_e,
            SLOTS=self._slots,
            COUNT=COUNTED_PAIRS if counted else 0,
            num_warps=8,
            enable_fp_fusion=True,
        )

    # -- launching -------------------------------------------------------------------------------

    def _launch(self, phase: Phase, *, quantum: bool = False, poll: bool = True, share: int = FULL) -> Any:
        """Enqueue the phase. Returns what was launched, as Triton compiled it; None in the interpreter.

        Args:
            quantum: it takes no more tiles than the state's budget has.
            poll: it leaves while its class is paused.
            share: it leaves once the flag allows more programs than that.
        """
        x = self.inputs
        word = self._word if poll else None
        run = {
            "state_ptr": self._state,
            # Without a flag any tensor will do: the kernel is compiled without the poll.
            "flag_ptr": self._state if word is None else word,
            "HAS_FLAG": word is not None,
            "share": share,
            "quantum": int(quantum),
            "num_experts": x.num_experts,
            "hidden_size": x.hidden_size,
            **self._block(phase.kernel),
        }
        products = {"order_ptr": self._order, "BLOCK_E": self._block_e, "SLOTS": self._slots}
        chunk = {
            "phase": phase.number,
            "chunk_begin": phase.begin,
            "chunk_size": phase.size,
            "partial_width": self._width,
            "SPLIT_K": self.tiles["down"].split_k,
        }
        if phase.kernel == "gate_up":
            return kernels.gate_up[self._grid(phase)](
                x.hidden_states,
                scale_ptr=x.top_k_weights,
                SCALED=x.weights_on_input,
                intermediate_ptr=self._intermediate,
                top_k=x.top_k,
                weight_rows=x.gate_up_size,
                **self._activation(),
                **run,
                **products,
                **self._weights("gate_up", x.gate_up_proj, x.gate_up_bias),
            )
        if phase.kernel == "down":
            return kernels.down[self._grid(phase)](
                self._intermediate,
                partial_ptr=self._partial,
                num_pairs=self._pairs,
                intermediate_size=x.intermediate_size,
                **chunk,
                **run,
                **products,
                **self._weights("down", x.down_proj, x.down_bias),
            )
        return kernels.combine[self._grid(phase)](
            self._partial,
            x.top_k_index,
            self._weights_of_sum,
            self._output,
            num_tokens=x.num_tokens,
            TOP_K=x.top_k,
            **chunk,
            **run,
        )

    def _share(self, phase: Phase) -> int:
        """How many programs a launch begins with, if the flag could let it have more later; else FULL."""
        if self._flag is None:
            return FULL
        share = self._flag.read()[self._priority]
        return share if 0 < share < self._grid(phase)[0] else FULL

    def _block(self, kernel: str) -> dict[str, int | bool]:
        config = self.tiles[kernel]
        compiled = compiled_with(config, self.inputs.hidden_states.dtype, self.device)
        return {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, **compiled}

    def _weights(self, phase: str, weight: Weight, bias: torch.Tensor | None) -> dict[str, object]:
        """How a phase reads an expert's (rows, length) weights."""
        config, transposed = self.tiles[phase], self.inputs.transposed
        rows, length = weight.shape[1:] if not transposed else weight.shape[:0:-1]
        # Rows that a tile of contiguous ones takes side by side, and how many there are.
        tile_rows, side = config.block_n * (2 if phase == "gate_up" else 1), rows
        if phase == "gate_up" and self._pairing() == "blocks":
            tile_rows, side = config.block_n, rows // 2
        if isinstance(weight, QuantizedWeight):
            lies = {
                "weight_ptr": weight.values.view(torch.uint8),
                "weight_scale_ptr": weight.scales,
                "weight_zero_ptr": weight.zeros,
                "zero_columns": None if weight.zeros is None else weight.zeros.stride(1),
                "FORMAT": self.inputs.product_format,
                "GROUP_N": weight.block[0],
                "GROUP_K": weight.block[1],
                "BY_TWO": self._by_two(weight),
                "scale_columns": weight.scales.stride(1),
                "row_stride": weight.values.shape[2],
                "k_stride": 1,
            }
        else:
            lies = {
                "weight_ptr": weight,
                "weight_scale_ptr": self._state,
                **dict.fromkeys(("FORMAT", "GROUP_N", "GROUP_K", "BY_TWO", "scale_columns")),
                **dict.fromkeys(("weight_zero_ptr", "zero_columns")),
                "row_stride": 1 if transposed else length,
                "k_stride": rows if transposed else 1,
            }
        return {
            **lies,
            "bias_ptr": self._state if bias is None else bias,
            "HAS_BIAS": bias is not None,
            # A row that does not exist is left out where rows are contiguous, so that 16 bytes of them can be
            # loaded at once; elsewhere another row is read in its place, which needs no mask.
            "MASKED": transposed and side % tile_rows != 0,
            "BLOCK_K": config.block_k,
            "STAGES": config.num_stages,
            "EXIT_K": config.exit_k,
            "EVEN": length % config.block_k == 0,
        }

    def _by_two(self, weight: QuantizedWeight) -> bool:
        """Whether the weight is widened two numbers at a time: it is read in words of 4 bytes then."""
        dtype = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(self.inputs.hidden_states.dtype)
        on_nvidia = arch_of(self.device).startswith("sm_")
        in_words = weight.columns % (4 if weight.format == "fp8" else 8) == 0
        in_words &= weight.values.data_ptr() % 4 == 0
        return on_nvidia and in_words and by_two(weight.format, dtype, weight.largest_scale)

    def _pairing(self) -> str:
        if self._own_activation or not self.inputs.gated:
            return "none"
        if self.inputs.interleaved:
            return "alternating"
        return "blocks" if self.inputs.transposed else "halves"

    def _activation(self) -> dict[str, object]:
        act = Activation("silu") if self._own_activation else self.inputs.activation
        return {
            "ACTIVATION": "none" if self._own_activation else act.kind,
            "ALPHA": float(act.alpha),
            "LIMIT": None if act.limit is None else float(act.limit),
            "UP_OFFSET": float(act.up_offset),
            "PAIRS": self._pairing(),
        }

    def _grid(self, phase: Phase) -> tuple[int]:
        """Programs of a launch: as many as stay resident, or as tiles there may be. From T only."""
        x, config = self.inputs, self.tiles[phase.kernel]
        if phase.kernel == "combine":
            row_blocks, columns = ceil_div(x.num_tokens, config.block_m), phase.size
        else:
            # Full blocks, and at most one more for each expert that has a row.
            row_blocks = self._pairs // config.block_m + min(x.num_experts, self._pairs)
            columns = ceil_div(x.gate_up_size, 2) if phase.kernel == "gate_up" else phase.size
        tiles = row_blocks * ceil_div(columns, config.block_n) * config.split_k
        return (min(tiles, config.programs_per_sm * multiprocessors(self.device)),)

    def _read(self) -> None:
        """Wait for the current stream and learn how far the phases are."""
        if self.inputs.num_tokens == 0:
            return
        with self._on_device():
            self._catch_up()
            words = self._state[: tickets.OFFSETS.value].tolist()
        done, total, count = tickets.DONE.value, tickets.TOTAL.value, len(self._phases)
        self._done, self._totals = tuple(words[done : done + count]), tuple(words[total : total + count])
        self._given_back = words[tickets.GIVEN_BACK.value]
        self._unread = False

    def _rewind(self, finished: int = 0) -> None:
        """Back to where the first phases are finished and the others not begun, for measurements.

        In stream order. No tile may wait to be taken again.
        """
        done, total = tickets.DONE.value, tickets.TOTAL.value
        self._state[:total].zero_()
        self._state[done : done + finished] = self._state[total : total + finished]
        self._done, self._given_back = (0,) * len(self._phases), 0

    def _mark(self) -> None:
        """Remember what the current stream was given, for whoever goes on with the run on another one."""
        self._given = torch.cuda.current_stream().record_event() if self.device.type == "cuda" else None

    def _catch_up(self) -> None:
        if self._given is not None:
            torch.cuda.current_stream().wait_event(self._given)

    def _on_device(self) -> contextlib.AbstractContextManager:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()


# Triton's own of these two take microseconds, ten times in each layer.


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


@functools.lru_cache(4096)
def tiles_for(
    sizes: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    max_exit_us: float,
    weights: str | None = None,
) -> dict[str, TileConfig]:
    """The tiles of a layer of T, K, E, H, I. ValueError, before any launch, if the device cannot run them."""
    num_tokens, top_k, num_experts, hidden_size, intermediate_size = sizes
    configs = layer_configs(
        num_tokens=num_tokens,
        top_k=top_k,
        num_experts=num_experts,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        dtype=dtype,
        arch=arch_of(device),
        max_exit_us=max_exit_us,
        device_name=torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        weights=weights,
    )
    return fit_device(configs, dtype, device, weights)


@functools.lru_cache(4096)
def cut_into_phases(hidden_size: int, intermediate_size: int, width: int) -> tuple[Phase, ...]:
    phases = [Phase(0, "gate_up", 0, intermediate_size)]
    for begin in range(0, hidden_size, width):
        size = min(width, hidden_size - begin)
        phases += [
            Phase(len(phases) + i, kernel, begin, size) for i, kernel in enumerate(("down", "combine"))
        ]
    return tuple(phases)


@functools.cache
def compiled_with(config: TileConfig, dtype: torch.dtype, device: torch.device) -> dict[str, int | bool]:
    return compile_options(config, dtype, arch_of(device))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of the device; 1 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
