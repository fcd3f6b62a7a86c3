"""What is decided about a layer without looking at its tensors: tiles, phases, how kernels are launched.

A plan is made once for all layers and batches that are alike in everything but the values and the addresses
of their tensors, and kept: at decode, where the device needs tens of microseconds for a layer, making it
would take longer.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from qllm_ops.activation import Activation
from qllm_ops.device import arch_of, fit_device
from qllm_ops.inputs import MoeInputs, Weight
from qllm_ops.kernels import moe as kernels
from qllm_ops.kernels import tickets
from qllm_ops.kernels.by_two import by_two
from qllm_ops.kernels.quantized import INTERPRETED
from qllm_ops.quantized import W8A8, QuantizedWeight
from qllm_ops.tiles import TileConfig, compile_options, layer_configs, partial_width

INVARIANT_ROWS = 64
"""Rows per expert for which tiles are chosen that must be the same for every batch: 64 rows still read
the weights of a decode batch faster than they multiply, and use the matrix units of a prefill."""

MOST_COUNTED = 2**31 - 2**16
"""Most pairs, rows and columns of weights, and tiles of a phase: kernels count them in 32 bits, up to a tile
or, of tickets, the programs of some launches past the last."""

MOST_EXPERTS = 2**16 - 1
"""One program has some numbers for each of them in its registers."""

SORTED_PAIRS = (16, 64, 256, 1024, 2048)
"""Up to so many pairs are sorted by the routing program, by a network for each of these sizes; more by torch,
whose launches would take longer than that for fewer."""

SORTED_EXPERTS = 2**13 - 1
"""Most experts of which it sorts pairs: it counts those of each in shared memory."""


DEPENDENT_LAUNCHES = False
"""Whether a kernel is launched before the one before it has ended (programmatic dependent launch), on devices
that can. Not as long as no card has shown that it pays: `perf/gpu_check.py` times both."""

DEPENDENT_ARCHS = ("sm_90", "sm_90_h100", "sm_100")


class Quantized(NamedTuple):
    """How a quantised weight lies in memory, and how it is widened."""

    row_bytes: int
    block: tuple[int, int]
    scales_dtype: torch.dtype
    scale_columns: int
    zeros_dtype: torch.dtype | None  # that of the scales: they share words
    zero_columns: int | None
    by_two: bool


class Signature(NamedTuple):
    """All that a plan depends on."""

    device: torch.device
    num_tokens: int
    top_k: int
    num_experts: int
    hidden_size: int
    intermediate_size: int
    gate_up_size: int
    dtype: torch.dtype
    routing_dtypes: tuple[torch.dtype, torch.dtype]
    bias_dtypes: tuple[torch.dtype | None, torch.dtype | None]  # None: there is none
    quantized: tuple[Quantized | None, Quantized | None]
    product_format: str | None
    activation: Activation | None  # None: a function, which is not fused
    expert_norm: bool
    gated: bool
    interleaved: bool
    transposed: bool
    weights_on_input: bool
    batch_invariant: bool
    max_exit_us: float
    dependent_launches: bool


def signature_of(x: MoeInputs) -> Signature:
    num_tokens, hidden_size = x.hidden_states.shape
    dtype, device = x.hidden_states.dtype, x.hidden_states.device
    biases = x.gate_up_bias, x.down_bias
    return Signature(
        device,
        num_tokens,
        x.top_k,
        x.num_experts,
        hidden_size,
        x.intermediate_size,
        x.gate_up_size,
        dtype,
        (x.top_k_index.dtype, x.top_k_weights.dtype),
        tuple(None if bias is None else bias.dtype for bias in biases),
        tuple(_quantized(weight, dtype, device) for weight in (x.gate_up_proj, x.down_proj)),
        x.product_format,
        x.activation if isinstance(x.activation, Activation) else None,
        x.expert_norm is not None,
        x.gated,
        x.interleaved,
        x.transposed,
        x.weights_on_input,
        x.batch_invariant,
        x.max_exit_us,
        DEPENDENT_LAUNCHES and arch_of(device) in DEPENDENT_ARCHS,
    )


def _quantized(weight: Weight, dtype: torch.dtype, device: torch.device) -> Quantized | None:
    if not isinstance(weight, QuantizedWeight):
        return None
    scales, zeros = weight.scales, weight.zero_words
    return Quantized(
        weight.values.shape[2],
        weight.block,
        scales.dtype,
        scales.stride(1),
        None if zeros is None else zeros.dtype,
        None if zeros is None else zeros.stride(1),
        widened_by_two(weight, dtype, device),
    )


def widened_by_two(weight: QuantizedWeight, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the weight is widened two numbers at a time: it is read in words of 4 bytes then."""
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    in_words = weight.columns % (4 if weight.format == "fp8" else 8) == 0
    in_words &= weight.values.data_ptr() % 4 == 0
    return (
        arch_of(device).startswith("sm_") and in_words and by_two(weight.format, name, weight.largest_scale)
    )


@dataclass(frozen=True)
class Phase:
    """One launch of a layer: all of gate_up, or down or combine for a chunk of the output's columns."""

    number: int
    kernel: str
    begin: int
    size: int


class Launch:
    """A kernel with its grid and all of its arguments but the first ones, which change from run to run.

    Triton finds the compiled kernel by looking at every argument, 10 to 20 us a launch. Here that is done by
    the first launch: later ones differ in the addresses of tensors only, of which the kernel has been
    compiled to rely on one thing, that they are multiples of 16. Those that are not are left to Triton.

    Attributes:
        programs: of the grid.
    """

    def __init__(self, kernel: Any, programs: int, constants: dict[str, object], options: dict[str, object]):
        self.programs = programs
        self._kernel, self._constants, self._options = kernel, constants, options
        # The compiled kernel and its last arguments. Written at once: several threads may launch.
        self._found: tuple[Any, tuple[object, ...]] | None = None

    def __call__(self, tensors: Sequence[torch.Tensor | None], others: Sequence[object]) -> Any:
        """Enqueue it on the current stream.

        Args:
            tensors: the kernel's first arguments, whose alignment it may rely on. None where it wants none.
            others: the next ones, with whose values and alignment the kernel has nothing to do.

        Returns:
            What was launched, as Triton compiled it; None in the interpreter.
        """
        bits = 0
        for tensor in tensors:
            if tensor is not None:
                bits |= tensor.data_ptr()
        if bits % 16:
            return self._by_triton(tensors, others)
        if self._found is not None:
            compiled, rest = self._found
            compiled[self.programs, 1, 1](*tensors, *others, *rest)
            return compiled
        compiled = self._by_triton(tensors, others)
        if compiled is not None:
            names = self._kernel.arg_names[len(tensors) + len(others) :]
            self._found = compiled, tuple(self._constants[name] for name in names)
        return compiled

    def _by_triton(self, tensors: Sequence[torch.Tensor | None], others: Sequence[object]) -> Any:
        with _TURN:
            return self._kernel[(self.programs,)](*tensors, *others, **self._constants, **self._options)


_TURN = threading.RLock() if INTERPRETED.value else contextlib.nullcontext()
"""Triton's interpreter keeps which program runs, and what it patches, in variables of the process."""


class Plan:
    """
    Args:
        tiles: the configuration of each phase, instead of the one that `qllm_ops.tiles` picks.
        width: W, instead of the one that `qllm_ops.tiles` picks; a multiple of down's block_n, or H.

    Attributes:
        tiles: of each phase.
        width: columns of the output that are computed at once.
        phases: in the order of their launches.
        pairs: of a token and one of its experts, T * K.
        sorted_pairs: how many the routing program can sort, at least as many; 0 where torch sorts them.
        partial_dtype: of what each expert gives a token, before the weighted sum.
        slots: for tiles that are given back; 0 if none are.
        state_words: of the run's state.
    """

    def __init__(
        self, signature: Signature, tiles: dict[str, TileConfig] | None = None, width: int | None = None
    ):
        x = self.signature = signature
        self.tiles = tiles or tiles_for(x)
        if x.expert_norm:  # It is a norm of the whole sum.
            self.tiles = {**self.tiles, "down": replace(self.tiles["down"], split_k=1)}
        self.pairs = x.num_tokens * x.top_k
        self.sorted_pairs = sorted_pairs(self.pairs, x.num_experts, arch_of(x.device))
        # As before a fused activation, nothing is rounded before a norm of the experts' outputs. And bfloat16
        # weights that were widened are rounded already: one rounding more would take the error past 4e-3.
        rounded = x.product_format not in (None, W8A8) and x.dtype == torch.bfloat16
        self.partial_dtype = torch.float32 if rounded or x.expert_norm else x.dtype
        self.width = width or self._columns_at_once()
        self.phases = cut_into_phases(x.hidden_size, x.intermediate_size, self.width)
        self._check_sizes()
        self.slots = self._slots()
        self.state_words = tickets.OFFSETS.value + 3 * (x.num_experts + 1) + self.slots
        self._block_e = max(16, next_power_of_2(x.num_experts + 1))
        self._launches: dict[object, Launch] = {}

    @functools.cached_property
    def route(self) -> Launch:
        """Of the routing."""
        x, tiles = self.signature, self.tiles
        row_blocks = ceil_div(x.num_tokens, tiles["combine"].block_m)
        chunks = (self.width, self.phases[-1].size)  # any but the last, and the last
        down, last_down = (ceil_div(size, tiles["down"].block_n) * tiles["down"].split_k for size in chunks)
        combine, last_combine = (ceil_div(size, tiles["combine"].block_n) * row_blocks for size in chunks)
        constants = {
            "num_pairs": self.pairs,
            "num_experts": x.num_experts,
            "num_phases": len(self.phases),
            "gate_up_blocks": ceil_div(x.gate_up_size, 2 * tiles["gate_up"].block_n),
            "down_blocks": down,
            "last_down_blocks": last_down,
            "combine_tiles": combine,
            "last_combine_tiles": last_combine,
            "GATE_UP_M": tiles["gate_up"].block_m,
            "DOWN_M": tiles["down"].block_m,
            "BLOCK_E": self._block_e,
            "SLOTS": self.slots,
            "COUNT": self.sorted_pairs,
        }
        options = {"num_warps": route_warps(self.sorted_pairs), "enable_fp_fusion": True}
        return self._make(kernels.route, 1, constants, options)

    def launch(self, phase: Phase, poll: bool) -> Launch:
        """Of a phase, that leaves while its class is paused (``poll``) or not."""
        key = phase.number, poll
        if key not in self._launches:
            self._launches[key] = self._make_launch(phase, poll)
        return self._launches[key]

    def programs(self, phase: Phase) -> int:
        """As many as stay resident, or as tiles there may be. From T only, whatever the routing."""
        resident = self.tiles[phase.kernel].programs_per_sm * multiprocessors(self.signature.device)
        return min(self._most_tiles(phase), resident)

    def _most_tiles(self, phase: Phase) -> int:
        x, config = self.signature, self.tiles[phase.kernel]
        if phase.kernel == "combine":
            row_blocks, columns = ceil_div(x.num_tokens, config.block_m), phase.size
        else:
            # Full blocks, and at most one more for each expert that has a row.
            row_blocks = self.pairs // config.block_m + min(x.num_experts, self.pairs)
            columns = ceil_div(x.gate_up_size, 2) if phase.kernel == "gate_up" else phase.size
        return row_blocks * ceil_div(columns, config.block_n) * config.split_k

    def _check_sizes(self) -> None:
        """Refuse what kernels cannot count. Offsets have 64 bits, but for those in transposed weights."""
        x = self.signature
        inside = x.gate_up_size * x.hidden_size if x.transposed else 0
        for name, what, got, most in (
            ("top_k_index", "pairs of a token and an expert (T * K)", self.pairs, MOST_COUNTED),
            ("hidden_states", "columns (H)", x.hidden_size, MOST_COUNTED),
            ("gate_up_proj", "rows of an expert (2I)", x.gate_up_size, MOST_COUNTED),
            ("gate_up_proj", "numbers of an expert (H * 2I) if transposed", inside, MOST_COUNTED),
            ("down_proj", "experts (E)", x.num_experts, MOST_EXPERTS),
            ("hidden_states", "tiles of a phase", max(map(self._most_tiles, self.phases)), MOST_COUNTED),
        ):
            if got > most:
                raise ValueError(f'{name} must have at most {most} {what} for backend="triton", got {got}')

    def _columns_at_once(self) -> int:
        x = self.signature
        if x.expert_norm:  # which is a norm of whole rows
            return x.hidden_size
        times = self.partial_dtype.itemsize // x.dtype.itemsize
        sizes = (self.pairs, x.hidden_size, x.intermediate_size)
        return partial_width(*sizes, self.tiles["down"], x.dtype.itemsize, times)

    def _slots(self) -> int:
        products = [self.tiles[phase.kernel] for phase in self.phases if phase.kernel != "combine"]
        if not any(config.exit_k for config in products):
            return 0
        # One for each program that may give a tile back, whatever T is: kernels are compiled for it.
        resident = max(config.programs_per_sm for config in products)
        return next_power_of_2(resident * multiprocessors(self.signature.device))

    # -- what kernels are launched with: names are those of `qllm_ops.kernels.moe` -----------------

    def _make_launch(self, phase: Phase, poll: bool) -> Launch:
        x, config = self.signature, self.tiles[phase.kernel]
        constants = {
            "num_experts": x.num_experts,
            "hidden_size": x.hidden_size,
            "HAS_FLAG": poll,
            "THREADS": config.num_warps * warp_size(arch_of(x.device)),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
        }
        chunk = {
            "phase": phase.number,
            "chunk_begin": phase.begin,
            "chunk_size": phase.size,
            "partial_width": self.width,
            "SPLIT_K": self.tiles["down"].split_k,
        }
        if phase.kernel == "gate_up":
            constants |= {
                "top_k": x.top_k,
                "weight_rows": x.gate_up_size,
                "SCALED": x.weights_on_input,
                **self._activation(),
                **self._weights("gate_up", x.gate_up_size, x.hidden_size),
            }
        elif phase.kernel == "down":
            constants |= {
                "num_pairs": self.pairs,
                "intermediate_size": x.intermediate_size,
                **chunk,
                **self._weights("down", x.hidden_size, x.intermediate_size),
            }
        else:
            # Where down leaves a sum in parts, those of one expert are loaded side by side.
            stages = config.num_stages if chunk["SPLIT_K"] == 1 else min(config.num_stages, 3)
            constants |= {"num_tokens": x.num_tokens, "TOP_K": x.top_k, "STAGES": stages, **chunk}
        options = compile_options(config, x.dtype, arch_of(x.device))
        return self._make(getattr(kernels, phase.kernel), self.programs(phase), constants, options)

    def _make(
        self, kernel: Any, programs: int, constants: dict[str, object], options: dict[str, object]
    ) -> Launch:
        dependent = self.signature.dependent_launches
        if dependent:
            options = {**options, "launch_pdl": True}
        return Launch(kernel, programs, {**constants, "DEPENDENT": dependent}, options)

    def _weights(self, kernel: str, rows: int, length: int) -> dict[str, object]:
        """How a product reads an expert's (rows, length) weights."""
        x, config, first = self.signature, self.tiles[kernel], kernel == "gate_up"
        # Rows that a tile of contiguous ones takes side by side, and how many there are.
        tile_rows, side = config.block_n * (2 if first else 1), rows
        if first and self._pairing() == "blocks":
            tile_rows, side = config.block_n, rows // 2
        quantized = x.quantized[0 if first else 1]
        if quantized is not None:
            lies = {
                "zero_columns": quantized.zero_columns,
                "FORMAT": x.product_format,
                "GROUP_N": quantized.block[0],
                "GROUP_K": quantized.block[1],
                "BY_TWO": quantized.by_two,
                "scale_columns": quantized.scale_columns,
                "row_stride": quantized.row_bytes,
                "k_stride": 1,
            }
        else:
            lies = {
                **dict.fromkeys(("FORMAT", "GROUP_N", "GROUP_K", "BY_TWO", "scale_columns", "zero_columns")),
                "row_stride": 1 if x.transposed else length,
                "k_stride": rows if x.transposed else 1,
            }
        return {
            **lies,
            "HAS_BIAS": x.bias_dtypes[0 if first else 1] is not None,
            # A row that does not exist is left out where rows are contiguous, so that 16 bytes of them can be
            # loaded at once; elsewhere another row is read in its place, which needs no mask.
            "MASKED": x.transposed and side % tile_rows != 0,
            "BLOCK_K": config.block_k,
            "BLOCK_E": self._block_e,
            "STAGES": config.num_stages,
            "EXIT_K": config.exit_k,
            "EVEN": length % config.block_k == 0,
            "SLOTS": self.slots,
        }

    def _pairing(self) -> str:
        x = self.signature
        if x.activation is None or not x.gated:
            return "none"
        if x.interleaved:
            return "alternating"
        return "blocks" if x.transposed else "halves"

    def _activation(self) -> dict[str, object]:
        act = self.signature.activation or Activation("silu")
        return {
            "ACTIVATION": "none" if self.signature.activation is None else act.kind,
            "ALPHA": float(act.alpha),
            "LIMIT": None if act.limit is None else float(act.limit),
            "UP_OFFSET": float(act.up_offset),
            "PAIRS": self._pairing(),
        }


def plan_of(inputs: MoeInputs, tiles: dict[str, TileConfig] | None = None, width: int | None = None) -> Plan:
    """Of layers like this one; or one that is not kept, with tiles or a width that were chosen elsewhere.

    ValueError, before any launch, if the device cannot run it.
    """
    signature = signature_of(inputs)
    return _kept(signature) if tiles is width is None else Plan(signature, tiles, width)


_kept = functools.lru_cache(1024)(Plan)


def tiles_for(x: Signature) -> dict[str, TileConfig]:
    num_tokens = x.num_tokens
    if x.batch_invariant:  # The same tiles for every number of tokens, those of INVARIANT_ROWS.
        num_tokens = max(1, INVARIANT_ROWS * x.num_experts // x.top_k)
    configs = layer_configs(
        num_tokens=num_tokens,
        top_k=x.top_k,
        num_experts=x.num_experts,
        hidden_size=x.hidden_size,
        intermediate_size=x.intermediate_size,
        dtype=x.dtype,
        arch=arch_of(x.device),
        max_exit_us=x.max_exit_us,
        device_name=torch.cuda.get_device_name(x.device) if x.device.type == "cuda" else None,
        weights=x.product_format,
    )
    return fit_device(configs, x.dtype, x.device, x.product_format)


def cut_into_phases(hidden_size: int, intermediate_size: int, width: int) -> tuple[Phase, ...]:
    phases = [Phase(0, "gate_up", 0, intermediate_size)]
    for begin in range(0, hidden_size, width):
        size = min(width, hidden_size - begin)
        phases += [
            Phase(len(phases) + i, kernel, begin, size) for i, kernel in enumerate(("down", "combine"))
        ]
    return tuple(phases)


def sorted_pairs(pairs: int, num_experts: int, arch: str) -> int:
    """Of the network that sorts them in the routing program; 0: torch does."""
    networks = SORTED_PAIRS if num_experts <= SORTED_EXPERTS else ()
    if arch == "interpreter":  # of whose operations a larger one has hundreds
        networks = networks[:1]
    return next((n for n in networks if pairs <= n), 0)


def route_warps(network: int) -> int:
    """Of the routing program: with two numbers a thread, or four, the compiler sorts in registers mostly."""
    return 16 if network > 1024 else 8


def warp_size(arch: str) -> int:
    """Threads of a warp; of a wavefront, on AMD's cards for servers."""
    return 64 if arch.startswith("gfx") else 32


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of the device; 1 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
