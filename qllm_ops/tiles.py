"""What the Triton kernels are compiled with, decided in one place: `tile_config`.

A tile is also what a paused class waits for, so its size is a bargain: a large tile multiplies faster,
a small one leaves sooner. The tables hold the tiles that multiply fastest; `tile_config` then makes
them smaller until one takes no longer than `max_exit_us` at the device's peak rates.

    heuristics     the tables below: whatever the device
    tuned tables   qllm_ops/tuned/DEVICE.json, entries that were timed on that device and won
    max_exit_us    makes the tiles of either smaller, or lets a program leave inside of one
    device.py      refuses, before a launch, what the device at hand cannot run

Every entry of the heuristics compiles without a register spilled (tests/test_compile.py). None has been
timed on a GPU yet: the reasons given are arithmetic. Nothing is timed while a user waits; `perf/tune.py`
times and writes the tuned tables.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from qllm_ops.arguments import is_number
from qllm_ops.quantized import ROW_GROUP, W8A8

PHASES = ("gate_up", "down", "combine")

EXIT_US = 30.0
"""Longest time of one tile, in microseconds, and so of leaving a phase, unless a caller chooses another."""

TUNED = Path(__file__).with_name("tuned")
"""Where the tuned tables lie, one file for each device."""


@dataclass(frozen=True)
class TileConfig:
    """How one phase is cut into tiles and compiled.

    Attributes:
        block_m: rows of a tile: sorted pairs of one expert; tokens in the combine.
        block_n: columns of a tile. In gate_up a column is a gate row and an up row of the weights.
        block_k: columns that one turn of the inner loop multiplies.
        num_warps: warps of a program.
        num_stages: turns of the inner loop whose loads are under way at once; in the combine, a token's
            experts are the turns.
        programs_per_sm: programs of a launch per multiprocessor; they are all resident.
        split_k: tiles that share one output block, each with its own part of the inner dimension.
            The combine adds the parts up in order. Only in down.
        exit_k: columns of the inner dimension between two looks at the flag inside of a tile; a program that
            leaves there gives its tile back, and what it had of it is computed again. 0: it leaves at the end
            of a tile only, and the sums are one loop. A multiple of block_k.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    programs_per_sm: int = 1
    split_k: int = 1
    exit_k: int = 0


@dataclass(frozen=True)
class Multiprocessor:
    """Peak rates of one multiprocessor: datasheet figures divided by the number of them."""

    shared_bytes: int  # for all resident programs
    macs_per_us: float  # 16-bit multiply-adds, dense
    fp32_macs_per_us: float
    bytes_per_us: float  # its share of the memory's bandwidth


MULTIPROCESSORS = {
    "sm_100": Multiprocessor(227 * 1024, 7.6e6, 0.27e6, 54e3),  # B200: 2250 TFLOP/s, 8.0 TB/s, 148
    "sm_90": Multiprocessor(227 * 1024, 3.0e6, 0.25e6, 32e3),  # H200: 790 TFLOP/s and 4.3 TB/s measured, 132
    "sm_90_h100": Multiprocessor(227 * 1024, 3.0e6, 0.25e6, 23e3),  # the same with 3.0 TB/s measured
    "sm_80": Multiprocessor(163 * 1024, 1.44e6, 0.09e6, 18e3),  # A100 80GB: 312 TFLOP/s, 2.0 TB/s, 108
    "sm_86": Multiprocessor(99 * 1024, 0.65e6, 0.2e6, 8e3),  # RTX 4090: 165 TFLOP/s, 1.0 TB/s, 128
    "gfx942": Multiprocessor(64 * 1024, 2.1e6, 0.26e6, 17e3),  # MI300X: 1300 TFLOP/s, 5.3 TB/s, 304
    "interpreter": Multiprocessor(1 << 30, float("inf"), float("inf"), float("inf")),
}

PARTIAL_BYTES = 64 * 2**20
"""What the parts of the second product may take before they are computed in chunks of columns."""

MAX_PHASES = 32
"""Most launches of a layer: the first product, and two for each chunk of columns. A power of two."""

WEIGHT_BITS = {"fp8": 8, W8A8: 8, "mxfp4": 4.25, "int4": 4.5}
"""Of a number of quantised weights with its share of a scale; of int4 in groups of 32, as in checkpoints."""

MAX_PARTS = 4
"""Most parts of a sum in down: each is written and read again, (T * K, H) elements a part."""

ROW_CLASSES = (
    # most rows per expert on average, block_m, whether each block of weights is read for one row block only
    (4, 8, True),
    (8, 16, True),
    (24, 32, True),
    (64, 64, True),
    (256, 128, True),
    (float("inf"), 128, False),
)
"""Where the number of rows per expert changes the tiles, and nowhere else: so a layer has six sets of tiles.

With few rows the weights are read once whatever the tile, and more rows would only be padding. About
half of the experts get more rows than the average, hence a margin. From 65 rows on, a taller tile
halves what is read from the L2 cache for each product, which outweighs the padding of the last block.
"""

MIN_WEIGHT_ROWS = {16: 32, 32: 32, 64: 64, 128: 128}
"""Fewest rows of weights in a tile of each block_m. Below that, activations read again for every tile
cost more than a sooner exit is worth: a 128 x 64 tile reads 1.5 times as much per product as 128 x 128."""

_DECODE = {
    # Bound by memory: what counts is how many bytes are on their way. 64 rows of weights x 128 columns
    # are 16 KB a stage; three under way in each of two programs are 96 KB per multiprocessor, twice
    # what covers the latency of memory at full bandwidth.
    "gate_up": {16: TileConfig(16, 32, 128, 4, 4, 2), 32: TileConfig(32, 32, 128, 4, 4, 2)},
    "down": {16: TileConfig(16, 64, 128, 4, 4, 2), 32: TileConfig(32, 64, 128, 4, 4, 2)},
}

TILES_16_BIT = {
    # wgmma, and tcgen05 on sm_100, needs 64 rows per four warps. 128 x 256 is the largest tile whose sums fit
    # the registers of eight warps (128 each, 255 used in all) and four stages the shared memory (192 KB).
    "sm_90": {
        "gate_up": {
            **_DECODE["gate_up"], 64: TileConfig(64, 64, 64, 4, 4, 2), 128: TileConfig(128, 128, 64, 8, 4),
        },
        "down": {
            **_DECODE["down"], 64: TileConfig(64, 128, 64, 4, 4, 2), 128: TileConfig(128, 256, 64, 8, 4),
        },
    },
    # mma.sync also keeps its operands in registers, so 128 x 128; three stages, as one program of 213
    # registers fills a multiprocessor and 96 KB leave room on the smaller cards too.
    "sm_80": {
        "gate_up": {
            **_DECODE["gate_up"], 64: TileConfig(64, 64, 64, 4, 3, 2), 128: TileConfig(128, 64, 64, 8, 3),
        },
        "down": {
            **_DECODE["down"], 64: TileConfig(64, 128, 64, 4, 3, 2), 128: TileConfig(128, 128, 64, 8, 3),
        },
    },
    # 64 KB of shared memory: two stages.
    "gfx942": {
        "gate_up": {
            16: TileConfig(16, 32, 128, 4, 2, 2), 32: TileConfig(32, 32, 128, 4, 2, 2),
            64: TileConfig(64, 64, 64, 4, 2, 2), 128: TileConfig(128, 64, 64, 8, 2),
        },
        "down": {
            16: TileConfig(16, 64, 128, 4, 2, 2), 32: TileConfig(32, 64, 128, 4, 2, 2),
            64: TileConfig(64, 128, 64, 4, 2, 2), 128: TileConfig(128, 128, 64, 8, 2),
        },
    },
}  # fmt: skip

# Float8 by float8: never more than 64 rows. The sums of one group of columns stand beside all sums, and with
# more of them in the registers of eight warps Triton 3.6 spills. What quantising a row costs is shared by the
# rows of weights in a tile: 128 on sm_90; mma.sync, which keeps its factors in registers, has room for 64.
# Two stages leave room for two programs there, and one multiplies while the other waits.
_DECODE_W8A8 = {
    "gate_up": {16: TileConfig(16, 32, 128, 4, 6, 2), 32: TileConfig(32, 32, 128, 4, 6, 2)},
    "down": {16: TileConfig(16, 64, 128, 4, 6, 2), 32: TileConfig(32, 64, 128, 4, 6, 2)},
}
TILES_W8A8 = {
    "sm_90": {
        "gate_up": {**_DECODE_W8A8["gate_up"], 64: TileConfig(64, 64, 128, 8, 4)},
        "down": {**_DECODE_W8A8["down"], 64: TileConfig(64, 128, 128, 8, 4)},
    },
    "sm_86": {
        "gate_up": {**_DECODE_W8A8["gate_up"], 64: TileConfig(64, 32, 128, 4, 2, 2)},
        "down": {**_DECODE_W8A8["down"], 64: TileConfig(64, 64, 128, 4, 2, 2)},
    },
}

TILES_OF = {"sm_100": "sm_90", "sm_90_h100": "sm_90", "sm_86": "sm_80"}
"""Architectures whose 16-bit tiles are those of another."""

# IEEE float32 has no matrix unit: 64 x 64 sums in 8 warps are 16 a thread, enough to reuse what is loaded.
TILES_32_BIT = {
    "gate_up": {
        16: TileConfig(16, 16, 64, 4, 3, 2), 32: TileConfig(32, 32, 32, 4, 3, 2),
        64: TileConfig(64, 32, 16, 8, 4), 128: TileConfig(64, 32, 16, 8, 4),
    },
    "down": {
        16: TileConfig(16, 32, 64, 4, 3, 2), 32: TileConfig(32, 64, 32, 4, 3, 2),
        64: TileConfig(64, 64, 16, 8, 4), 128: TileConfig(64, 64, 16, 8, 4),
    },
}  # fmt: skip

# The interpreter takes milliseconds for each operation, whatever the shape; programs run one after another.
INTERPRETER = {
    "gate_up": TileConfig(8, 16, 32, 1, 1, 4),
    "down": TileConfig(8, 32, 32, 1, 1, 4),
    "combine": TileConfig(4, 32, 1, 1, 1, 4),
}


def tile_config(
    phase: str, *, num_tokens: int, top_k: int, num_experts: int, n: int, k: int, dtype: torch.dtype,
    arch: str, max_exit_us: float = EXIT_US, device_name: str | None = None, weights: str | None = None,
) -> TileConfig:  # fmt: skip
    """The tiles of one phase of one layer.

    Args:
        phase: "gate_up", "down" or "combine".
        num_tokens, top_k, num_experts: T, K and E of the layer.
        n, k: columns of the phase's output and length of its sums: (I, H), (H, I) or (H, K).
        dtype: of hidden_states.
        arch: as :func:`qllm_ops.device.arch_of` gives it.
        max_exit_us: how long a tile may take at the device's peak rates, as :func:`tile_us` estimates it;
            float("inf") for the fastest tiles, whatever they take. Tiles are not cut below MIN_WEIGHT_ROWS
            and sums not into more than MAX_PARTS; what is still too long is left halfway (``exit_k``). A
            very small number may not be reached. How a sum is cut into parts shows in its last bits.
        device_name: whose tuned table is looked at before the heuristics; None for the heuristics alone.
        weights: the format of quantised weights, or W8A8, for neither of which anything is tuned yet; None
            for dense ones.
    """
    check_max_exit_us(max_exit_us)
    if arch == "interpreter":
        config = INTERPRETER[phase]
        return replace(config, block_k=ROW_GROUP) if weights == W8A8 and phase != "combine" else config
    most_rows, block_m, read_once = row_class(num_tokens, top_k, num_experts)
    table = tuned_table(device_name if weights is None else None, arch)
    tuned = table.get(TileKey(phase, most_rows, n, k, dtype_name(dtype))) if table else None
    if phase == "combine":
        return tuned or _combine(n, dtype, arch)
    config = tuned or _fastest(phase, block_m, k, dtype, arch, weights)
    return within_exit(phase, config, k, dtype, arch, read_once, max_exit_us, weights)


def check_max_exit_us(max_exit_us: float) -> None:
    if not is_number(max_exit_us) or not max_exit_us > 0:  # which NaN is not
        raise ValueError(
            "max_exit_us must be a positive number of microseconds, or float('inf') for the fastest tiles "
            f"whatever they take, got {max_exit_us!r}"
        )


def row_class(num_tokens: int, top_k: int, num_experts: int) -> tuple[float, int, bool]:
    """The entry of ROW_CLASSES for a layer of so many tokens."""
    rows = num_tokens * top_k / num_experts
    return next(entry for entry in ROW_CLASSES if rows <= entry[0])


def _combine(n: int, dtype: torch.dtype, arch: str) -> TileConfig:
    # One token, 16 bytes a thread. Three of its pairs under way in each of six programs are 36 KB, as much as
    # covers the latency of memory.
    block_n = max(128, min(1024 if dtype.itemsize == 2 else 512, 1 << (n - 1).bit_length()))
    stages, programs = (1, 8) if arch == "gfx942" else (4, 6)
    return TileConfig(1, block_n, 1, 4, stages, programs)


def _fastest(
    phase: str, block_m: int, k: int, dtype: torch.dtype, arch: str, weights: str | None
) -> TileConfig:
    few, block_m = block_m == 8, max(block_m, 16)  # of which only quantised tiles have fewer
    if weights == W8A8:  # What is neither of the two is refused by `fit_device`.
        config = TILES_W8A8["sm_90" if TILES_OF.get(arch, arch) == "sm_90" else "sm_86"][phase][
            min(block_m, 64)
        ]
        return replace(config, programs_per_sm=_programs_that_fit(phase, config, dtype, arch, weights))
    table = TILES_32_BIT if dtype.itemsize == 4 else TILES_16_BIT[TILES_OF.get(arch, arch)]
    if weights is not None and dtype.itemsize == 4 and arch == "sm_100":
        # From 64 rows on, Triton 3.6 multiplies what was widened in TF32 there, asked for IEEE or not.
        block_m = min(block_m, 32)
    config = table[phase][block_m]
    if weights is not None:
        config = _for_quantized(config, few, k, dtype, arch, weights)
    return replace(config, programs_per_sm=_programs_that_fit(phase, config, dtype, arch, weights))


def _for_quantized(
    config: TileConfig, few: bool, k: int, dtype: torch.dtype, arch: str, weights: str
) -> TileConfig:
    """A tile for dense weights as quantised ones have it."""
    if dtype.itemsize == 4:
        # 16 columns of four bits are too few bytes to be copied ahead, and 64 of any spill.
        return replace(config, block_k=32)
    if config.block_m <= 32 and arch != "gfx942":
        # A stage has a half or a quarter of the bytes, so more of them; or longer ones, for which MXFP4 takes
        # an eighth fewer instructions for a weight. In int4 these would have two scales of a group of 128.
        longer = {"block_k": 256, "num_stages": 4} if weights == "mxfp4" else {"num_stages": 6}
        config = replace(config, **longer)
        # Weights go first in such products, whose second factor may have 8 rows: an eighth fewer instructions
        # for a weight. That leaves registers for a third program, and widening is bound by instructions.
        return replace(config, block_m=8, programs_per_sm=3) if few else config
    if config.block_m == 128 and arch == "gfx942":
        # The largest tile's sums leave no registers to widen in by way of float32.
        return replace(config, block_n=min(64, config.block_n))
    if config.block_m == 128 and k % config.block_k:
        # Nor to widen two at a time, where a sum ends within a turn.
        return replace(config, block_n=config.block_n // 2)
    if config.block_m == 128 and arch == "sm_100" and dtype == torch.bfloat16:
        # There, sums come out of tensor memory all at once, and with bfloat16 they are stored as float32.
        return replace(config, block_n=min(128, config.block_n))
    return config


def within_exit(
    phase: str, config: TileConfig, k: int, dtype: torch.dtype, arch: str, read_once: bool,
    max_exit_us: float, weights: str | None = None,
) -> TileConfig:  # fmt: skip
    """``config`` with narrower tiles, in down shorter sums, and an exit inside of what is still too long."""
    sides = 2 if phase == "gate_up" else 1
    if weights not in (None, W8A8) and config.block_m < 64 and dtype.itemsize == 2:
        least_rows = 16 * config.num_warps  # Each widens 16 for itself; of fewer, some warps the same.
    else:
        least_rows = MIN_WEIGHT_ROWS[config.block_m]
    while (
        tile_us(phase, config, k, dtype, arch, read_once, weights) > max_exit_us
        and config.block_n * sides // 2 >= least_rows
    ):
        config = replace(config, block_n=config.block_n // 2)
        if config.block_m == 16 and arch != "gfx942" and weights is None:  # Keep the bytes on their way.
            config = replace(config, block_k=config.block_k * 2)
    if phase == "down":
        # A part must stay long enough for its loads to get into step: four turns of the inner loop.
        us = tile_us(phase, config, k, dtype, arch, read_once, weights)
        parts = config.split_k * math.ceil(us / max_exit_us)
        parts = min(parts, MAX_PARTS, k // (4 * config.block_k))
        config = replace(config, split_k=max(config.split_k, parts))
    # Around such an exit, sums of 32 bits spill registers, and so do large tiles of weights that mma.sync has
    # to widen, and float8 by float8 with Triton 3.6.
    widens = weights is not None and arch in ("sm_80", "sm_86") and config.block_m >= 64
    has_registers = dtype.itemsize == 2 and not widens and weights != W8A8
    if not config.exit_k and has_registers:
        us = tile_us(phase, config, k, dtype, arch, read_once, weights)
        config = replace(config, exit_k=_exit_k(config, k, us, max_exit_us))
    return config


def _exit_k(config: TileConfig, k: int, us: float, max_exit_us: float) -> int:
    """Columns between two looks at the flag, so that the pieces are alike and short enough; 0: no look."""
    # Every piece fills the pipeline of loads anew, so none is shorter than two such fillings.
    shortest = 2 * config.num_stages * config.block_k
    part = k // config.split_k
    pieces = min(math.ceil(us / max_exit_us), part // shortest)
    return math.ceil(part / pieces / config.block_k) * config.block_k if pieces > 1 else 0


def tile_us(
    phase: str, config: TileConfig, k: int, dtype: torch.dtype, arch: str, read_once: bool,
    weights: str | None = None,
) -> float:  # fmt: skip
    """Microseconds that a tile takes at the device's peak rates, with all its multiprocessor's programs busy.

    ``read_once``: every tile waits for its own weights to come from memory; else they are in the cache.
    Float8 by float8 is counted as 16 bits are: quantising costs about what its products save.
    """
    sm = MULTIPROCESSORS[arch]
    numbers = config.block_n * (2 if phase == "gate_up" else 1) * k / config.split_k
    us = config.block_m * numbers / (sm.fp32_macs_per_us if dtype.itemsize == 4 else sm.macs_per_us)
    if read_once:
        us = max(us, numbers * weight_bytes(dtype, weights) / sm.bytes_per_us)
    return config.programs_per_sm * us


def leave_us(
    phase: str, config: TileConfig, k: int, dtype: torch.dtype, arch: str, read_once: bool,
    weights: str | None = None,
) -> float:  # fmt: skip
    """Microseconds that a program told to leave takes at most: those of a tile, or of a piece of its sums."""
    us = tile_us(phase, config, k, dtype, arch, read_once, weights)
    return us * min(1.0, config.exit_k * config.split_k / k) if config.exit_k else us


def weight_bytes(dtype: torch.dtype, weights: str | None) -> float:
    """Bytes that a number of the weights takes, its share of a scale included where scales are the most."""
    return dtype.itemsize if weights is None else WEIGHT_BITS[weights] / 8


def shared_bytes(phase: str, config: TileConfig, dtype: torch.dtype, weights: str | None = None) -> int:
    """Shared memory that the stages of one program take, in bytes, at most."""
    rows = config.block_n * (2 if phase == "gate_up" else 1)
    activations = config.block_m * config.block_k
    stage = activations * dtype.itemsize + rows * config.block_k * weight_bytes(dtype, weights)
    if weights is None:
        return int(stage * config.num_stages)
    stage += 4 * rows  # A row's scales come in words of 4 bytes.
    if weights == W8A8:  # Activations are read a stage ahead of the products, and written again in float8.
        return int(stage * config.num_stages - activations * dtype.itemsize + activations)
    widened = rows * config.block_k * dtype.itemsize
    if config.block_m < 64 and dtype.itemsize == 2:
        # Widened in the registers that the products read; but on AMD, and in int4 with zero points of groups
        # of 128 or more, by way of shared memory once more, beside all stages but one.
        beside = config.num_stages - 1 if weights == "int4" else 0
        return int(max(stage * config.num_stages, stage * beside + widened, activations * 2 + widened))
    # What is widened goes through shared memory once more.
    return int(stage * config.num_stages + widened)


def _programs_that_fit(
    phase: str, config: TileConfig, dtype: torch.dtype, arch: str, weights: str | None = None
) -> int:
    # The driver keeps 1 KB of shared memory for itself in each program.
    fit = MULTIPROCESSORS[arch].shared_bytes // (shared_bytes(phase, config, dtype, weights) + 1024)
    return max(1, min(config.programs_per_sm, fit))


@functools.cache
def compile_options(config: TileConfig, dtype: torch.dtype, arch: str) -> dict[str, int | bool]:
    """What a kernel of these tiles is compiled with besides them. Not to be changed."""
    # Fusing is the compiler's default today and will not be; fixed here, the bits stay the same.
    options = {"num_warps": config.num_warps, "enable_fp_fusion": True}
    if arch in ("sm_80", "sm_86", "sm_90_h100", "sm_100") and dtype.itemsize == 2:
        # As many registers as the resident programs leave each other. Not told so, the assembler saves them
        # for programs that do not come, and spills some. (Of 32 bits it keeps more than it should then.)
        threads = 32 * config.num_warps * config.programs_per_sm
        options["maxnreg"] = min(255, 65536 // threads // 8 * 8)
    return options


# -- tuned tables ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TileKey:
    """What decides a configuration on one device, and what an entry of its tuned table is found by."""

    phase: str
    most_rows: float  # of the class of rows; in the file null stands for the last one's infinity
    n: int
    k: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.phase}, up to {self.most_rows} rows, n = {self.n}, k = {self.k}, {self.dtype}"


def table_path(device_name: str) -> Path:
    """The file of a device's tuned table, whether or not there is one."""
    safe = re.sub(r"[^A-Za-z0-9 ._-]+", "_", device_name).strip(" .")
    return TUNED / f"{safe}.json"


@functools.cache
def tuned_table(device_name: str | None, arch: str) -> dict[TileKey, TileConfig]:
    """The tuned table of a device, read once; empty where nothing was tuned. Not to be changed."""
    path = None if device_name is None else table_path(device_name)
    if path is None or not path.exists():
        return {}
    table = read_table(path)
    for head, wanted in (("device", device_name), ("arch", arch)):
        if table[head] != wanted:
            raise ValueError(f"{path}: the table is of {head} {table[head]!r}, wanted {wanted!r}")
    return {entry_key(entry): TileConfig(**entry["tiles"]) for entry in table["entries"]}


HEAD = ("device", "arch", "date", "versions", "command", "entries")
"""What a tuned table says, in order: where, when and how it was last measured, then what won."""


def read_table(path: Path) -> dict[str, Any]:
    """A tuned table as it is in the file. What is wrong with it raises ValueError with the file and entry."""
    try:
        table = json.loads(path.read_text())
    except ValueError as error:  # not JSON, or not text
        raise ValueError(f"{path}: not a tuned table, which is JSON: {error}") from error
    if not isinstance(table, dict) or not set(HEAD) <= set(table):
        raise ValueError(f"{path}: a tuned table is an object of {', '.join(HEAD)}")
    if table["arch"] not in MULTIPROCESSORS:
        raise ValueError(f"{path}: arch must be one of {', '.join(MULTIPROCESSORS)}, got {table['arch']!r}")
    if not isinstance(table["entries"], list):
        raise ValueError(f"{path}: entries must be a list")
    seen = set()
    for number, entry in enumerate(table["entries"]):
        try:
            key = entry_key(entry)
            problem = "is there twice" if key in seen else _problem(key, entry["tiles"], table["arch"])
            seen.add(key)
        except (KeyError, TypeError) as error:
            key, problem = "?", f"must have the fields of a key and of tiles: {type(error).__name__} {error}"
        if problem:
            raise ValueError(f"{path}: entry {number} ({key}) {problem}")
    return table


def entry_key(entry: dict[str, Any]) -> TileKey:
    key = TileKey(**entry["key"])
    return replace(key, most_rows=float("inf") if key.most_rows is None else key.most_rows)


def new_entry(key: TileKey, config: TileConfig, measured: dict[str, Any]) -> dict[str, Any]:
    """An entry as the file has it, ``measured`` being what it won by. JSON has no infinity."""
    most_rows = None if math.isinf(key.most_rows) else key.most_rows
    return {"key": asdict(replace(key, most_rows=most_rows)), "tiles": asdict(config), "measured": measured}


def _problem(key: TileKey, tiles: dict[str, int], arch: str) -> str | None:
    """What is wrong with an entry; None if nothing is."""
    dtypes = {dtype_name(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    classes = [most for most, _, _ in ROW_CLASSES]
    if key.phase not in PHASES or key.dtype not in dtypes or key.most_rows not in classes:
        return f"is of a phase, dtype or class of rows that is none: {PHASES}, {tuple(dtypes)}, {classes}"
    if not _positive_integers((key.n, key.k)):
        return "must have positive integers as n and k"
    names = [field.name for field in fields(TileConfig)]
    if sorted(tiles) != sorted(names) or not _positive_integers({**tiles, "exit_k": 1}.values()):
        return f"must give all of {', '.join(names)} as positive integers"
    if tiles["exit_k"] != 0 and not _positive_integers([tiles["exit_k"]]):
        return f"must give exit_k as a positive integer or 0, got {tiles['exit_k']!r}"
    return tiles_problem(key.phase, TileConfig(**tiles), dtypes[key.dtype], arch)


def tiles_problem(phase: str, config: TileConfig, dtype: torch.dtype, arch: str) -> str | None:
    """Why the kernels cannot have these tiles on ``arch``; None if they can."""
    powers = (config.block_m, config.block_n, config.block_k, config.num_warps)
    if any(value & (value - 1) for value in powers):
        return "must have powers of two as blocks and warps"
    if not config.split_k <= (MAX_PARTS if phase == "down" else 1):
        return f"splits k into {config.split_k}; down may into {MAX_PARTS}, the other phases not at all"
    if config.exit_k % config.block_k or (phase == "combine" and config.exit_k):
        return f"has exit_k = {config.exit_k}; it must be a multiple of block_k, and 0 in the combine"
    if phase == "combine":
        return None
    if config.block_m not in MIN_WEIGHT_ROWS or min(config.block_n, config.block_k) < 16:
        return f"must have a block_m of {tuple(MIN_WEIGHT_ROWS)}, and blocks of at least 16"
    if _programs_that_fit(phase, config, dtype, arch) < config.programs_per_sm or (
        shared_bytes(phase, config, dtype) > MULTIPROCESSORS[arch].shared_bytes
    ):
        return (
            f"does not fit: {config.programs_per_sm} programs of {shared_bytes(phase, config, dtype)} bytes "
            f"of shared memory on a multiprocessor that has {MULTIPROCESSORS[arch].shared_bytes}"
        )
    return None


def _positive_integers(values: Iterable[object]) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) and value > 0 for value in values)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -- whole layers ------------------------------------------------------------------------------------------

MODELS = {
    # (hidden size, intermediate size, experts, top k)
    "Mixtral-8x7B": (4096, 14336, 8, 2),
    "Qwen3-30B-A3B": (2048, 768, 128, 8),
    "OLMoE-1B-7B": (2048, 1024, 64, 8),
    "DeepSeek-V3": (7168, 2048, 256, 8),
    "gpt-oss-20b": (2880, 2880, 32, 4),
}


def layer_configs(
    *, num_tokens: int, top_k: int, num_experts: int, hidden_size: int, intermediate_size: int,
    dtype: torch.dtype, arch: str, max_exit_us: float = EXIT_US, device_name: str | None = None,
    weights: str | None = None,
) -> dict[str, TileConfig]:  # fmt: skip
    """The tiles of all phases of one layer. Arguments as of :func:`tile_config`."""
    layer = {"num_tokens": num_tokens, "top_k": top_k, "num_experts": num_experts}
    device = {"arch": arch, "max_exit_us": max_exit_us, "device_name": device_name}
    return {
        phase: tile_config(phase, n=n, k=k, dtype=dtype, weights=weights, **layer, **device)
        for phase, (n, k) in phase_sizes(top_k, hidden_size, intermediate_size).items()
    }


def partial_width(
    num_pairs: int, hidden_size: int, intermediate_size: int, down: TileConfig, itemsize: int, times: int = 1
) -> int:
    """How many columns of the output are computed before the next ones begin: W of the kernels' `partial`.

    A number there takes ``times`` as many bytes as one of the activations, ``itemsize``. All of them, unless
    that buffer would be both large and larger than the intermediate activations; then as many as make it
    about as large as those. Every chunk costs two launches, and the end of each is idle time.
    """
    column = down.split_k * times  # in numbers of the activations, for each pair
    small = column * num_pairs * itemsize * hidden_size <= PARTIAL_BYTES
    small = small or column * hidden_size <= intermediate_size
    if small or hidden_size % 16:  # then a chunk would need kernels of its own, compiled for its alignment
        return hidden_size
    most = max(1, intermediate_size // column // down.block_n)  # column blocks in a chunk
    blocks = math.ceil(hidden_size / down.block_n)
    chunks = min(math.ceil(blocks / most), (MAX_PHASES - 1) // 2)
    return min(hidden_size, math.ceil(blocks / chunks) * down.block_n)


def phase_sizes(top_k: int, hidden_size: int, intermediate_size: int) -> dict[str, tuple[int, int]]:
    """(n, k) of every phase: columns of its output and length of its sums."""
    return {
        "gate_up": (intermediate_size, hidden_size),
        "down": (hidden_size, intermediate_size),
        "combine": (hidden_size, top_k),
    }


def token_counts(top_k: int, num_experts: int) -> list[int]:
    """One number of tokens for each set of tiles that a layer has, to compile them all in advance."""
    most_rows = [0, *(most for most, _, _ in ROW_CLASSES[:-1])]
    counts = [int(rows * num_experts // top_k) + 1 for rows in most_rows]
    return sorted(set(counts))


def shipped_configs(
    arch: str, dtype: torch.dtype, weights: str | None = None
) -> dict[tuple[str, TileConfig], str]:
    """Every (phase, configuration) on ``arch`` of a known model or a tuned table, and the first of them."""
    reached: dict[tuple[str, TileConfig], str] = {}
    for name, (hidden_size, intermediate_size, num_experts, top_k) in MODELS.items():
        for num_tokens in token_counts(top_k, num_experts):
            configs = layer_configs(
                num_tokens=num_tokens, top_k=top_k, num_experts=num_experts, hidden_size=hidden_size,
                intermediate_size=intermediate_size, dtype=dtype, arch=arch, weights=weights,
            )  # fmt: skip
            for item in configs.items():
                reached.setdefault(item, name)
    for path in sorted(TUNED.glob("*.json")) if weights is None else ():
        table = read_table(path)
        for entry in table["entries"] if table["arch"] == arch else ():
            if entry["key"]["dtype"] == dtype_name(dtype):
                reached.setdefault((entry["key"]["phase"], TileConfig(**entry["tiles"])), path.name)
    return reached
