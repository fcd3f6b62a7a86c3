"""What the Triton kernels are compiled with, decided in one place: `tile_config`.

A tile is also what a paused class waits for, so its size is a bargain: a large tile multiplies faster,
a small one leaves sooner. The tables hold the tiles that multiply fastest; `tile_config` then makes
them smaller until one takes no longer than EXIT_US at the device's peak rates.

Every entry compiles without a register spilled (tests/test_compile.py). None has been timed on a GPU
yet: the reasons given are arithmetic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

PHASES = ("gate_up", "down", "combine")

EXIT_US = 30.0
"""Longest time of one tile, in microseconds, and so of leaving a phase."""


@dataclass(frozen=True)
class TileConfig:
    """How one phase is cut into tiles and compiled.

    Attributes:
        block_m: rows of a tile: sorted pairs of one expert; tokens in the combine.
        block_n: columns of a tile. In gate_up a column is a gate row and an up row of the weights.
        block_k: columns that one turn of the inner loop multiplies.
        num_warps: warps of a program.
        num_stages: turns of the inner loop whose loads are under way at once.
        programs_per_sm: programs of a launch per multiprocessor; they are all resident.
        split_k: tiles that share one output block, each with its own part of the inner dimension.
            The combine adds the parts up in order. Only in down.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    programs_per_sm: int = 1
    split_k: int = 1


@dataclass(frozen=True)
class Multiprocessor:
    """Peak rates of one multiprocessor: datasheet figures divided by the number of them."""

    shared_bytes: int  # for all resident programs
    macs_per_us: float  # 16-bit multiply-adds, dense
    fp32_macs_per_us: float
    bytes_per_us: float  # its share of the memory's bandwidth


MULTIPROCESSORS = {
    "sm_90": Multiprocessor(227 * 1024, 3.0e6, 0.25e6, 32e3),  # H200: 790 TFLOP/s and 4.3 TB/s measured, 132
    "sm_80": Multiprocessor(163 * 1024, 1.44e6, 0.09e6, 18e3),  # A100 80GB: 312 TFLOP/s, 2.0 TB/s, 108
    "sm_86": Multiprocessor(99 * 1024, 0.65e6, 0.2e6, 8e3),  # RTX 4090: 165 TFLOP/s, 1.0 TB/s, 128
    "gfx942": Multiprocessor(64 * 1024, 2.1e6, 0.26e6, 17e3),  # MI300X: 1300 TFLOP/s, 5.3 TB/s, 304
    "interpreter": Multiprocessor(1 << 30, float("inf"), float("inf"), float("inf")),
}

MAX_PARTS = 4
"""Most parts of a sum in down: each is written and read again, (T * K, H) elements a part."""

ROW_CLASSES = (
    # most rows per expert on average, block_m, whether each block of weights is read for one row block only
    (8, 16, True),
    (24, 32, True),
    (64, 64, True),
    (256, 128, True),
    (float("inf"), 128, False),
)
"""Where the number of rows per expert changes the tiles, and nowhere else: so a layer has five sets of tiles.

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
    # wgmma needs 64 rows per four warps. 128 x 256 is the largest tile whose sums fit the registers of
    # eight warps (128 each, 255 used in all) and four stages of it the shared memory (192 KB).
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
    arch: str,
) -> TileConfig:  # fmt: skip
    """The tiles of one phase of one layer.

    Args:
        phase: "gate_up", "down" or "combine".
        num_tokens, top_k, num_experts: T, K and E of the layer.
        n, k: columns of the phase's output and length of its sums: (I, H), (H, I) or (H, K).
        dtype: of hidden_states.
        arch: as :func:`arch_of` gives it.
    """
    if arch == "interpreter":
        return INTERPRETER[phase]
    if phase == "combine":
        # One token, 16 bytes a thread. Eight programs hide the latency of memory.
        block_n = min(1024 if dtype.itemsize == 2 else 512, 1 << (n - 1).bit_length())
        return TileConfig(1, max(block_n, 128), 1, 4, 1, 8)

    rows = num_tokens * top_k / num_experts
    _, block_m, read_once = next(c for c in ROW_CLASSES if rows <= c[0])
    table = TILES_32_BIT if dtype.itemsize == 4 else TILES_16_BIT[{"sm_86": "sm_80"}.get(arch, arch)]
    config = table[phase][block_m]
    config = replace(config, programs_per_sm=_programs_that_fit(phase, config, dtype, arch))

    sides = 2 if phase == "gate_up" else 1
    while (
        tile_us(phase, config, k, dtype, arch, read_once) > EXIT_US
        and config.block_n * sides // 2 >= MIN_WEIGHT_ROWS[config.block_m]
    ):
        config = replace(config, block_n=config.block_n // 2)
        if config.block_m == 16 and arch != "gfx942":  # Keep the bytes of a stage.
            config = replace(config, block_k=config.block_k * 2)
    if phase == "down":
        # A part must stay long enough for its loads to get into step: four turns of the inner loop.
        parts = math.ceil(tile_us(phase, config, k, dtype, arch, read_once) / EXIT_US)
        config = replace(config, split_k=max(1, min(parts, MAX_PARTS, k // (4 * config.block_k))))
    return config


def tile_us(phase: str, config: TileConfig, k: int, dtype: torch.dtype, arch: str, read_once: bool) -> float:
    """Microseconds that a tile takes at the device's peak rates, with all its multiprocessor's programs busy.

    ``read_once``: every tile waits for its own weights to come from memory; else they are in the cache.
    """
    sm = MULTIPROCESSORS[arch]
    weights = config.block_n * (2 if phase == "gate_up" else 1) * k / config.split_k
    us = config.block_m * weights / (sm.fp32_macs_per_us if dtype.itemsize == 4 else sm.macs_per_us)
    if read_once:
        us = max(us, weights * dtype.itemsize / sm.bytes_per_us)
    return config.programs_per_sm * us


def shared_bytes(phase: str, config: TileConfig, dtype: torch.dtype) -> int:
    """Shared memory that the stages of one program take, in bytes, at most."""
    rows = config.block_m + config.block_n * (2 if phase == "gate_up" else 1)
    return rows * config.block_k * dtype.itemsize * config.num_stages


def _programs_that_fit(phase: str, config: TileConfig, dtype: torch.dtype, arch: str) -> int:
    # The driver keeps 1 KB of shared memory for itself in each program.
    fit = MULTIPROCESSORS[arch].shared_bytes // (shared_bytes(phase, config, dtype) + 1024)
    return max(1, min(config.programs_per_sm, fit))


def arch_of(device: torch.device) -> str:
    """The table that ``device`` uses: the newest architecture that is not newer, by name."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major >= 9:
        return "sm_90" if major < 12 else "sm_86"  # 12.x are cards with 99 KB of shared memory again
    return "sm_80" if (major, minor) in ((8, 0), (8, 7)) else "sm_86"


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
    dtype: torch.dtype, arch: str,
) -> dict[str, TileConfig]:  # fmt: skip
    """The tiles of all phases of one layer."""
    sizes = {
        "gate_up": (intermediate_size, hidden_size),
        "down": (hidden_size, intermediate_size),
        "combine": (hidden_size, top_k),
    }
    layer = {"num_tokens": num_tokens, "top_k": top_k, "num_experts": num_experts}
    return {
        phase: tile_config(phase, n=n, k=k, dtype=dtype, arch=arch, **layer)
        for phase, (n, k) in sizes.items()
    }


def token_counts(top_k: int, num_experts: int) -> list[int]:
    """One number of tokens for each set of tiles that a layer has, to compile them all in advance."""
    most_rows = [0, *(most for most, _, _ in ROW_CLASSES[:-1])]
    counts = [int(rows * num_experts // top_k) + 1 for rows in most_rows]
    return sorted(set(counts))


def shipped_configs(arch: str, dtype: torch.dtype) -> dict[tuple[str, TileConfig], str]:
    """Every (phase, configuration) that a known model reaches on ``arch``, and the first such model."""
    reached: dict[tuple[str, TileConfig], str] = {}
    for name, (hidden_size, intermediate_size, num_experts, top_k) in MODELS.items():
        for num_tokens in token_counts(top_k, num_experts):
            configs = layer_configs(
                num_tokens=num_tokens, top_k=top_k, num_experts=num_experts, hidden_size=hidden_size,
                intermediate_size=intermediate_size, dtype=dtype, arch=arch,
            )  # fmt: skip
            for item in configs.items():
                reached.setdefault(item, name)
    return reached
