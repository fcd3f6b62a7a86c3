"""Layers for the compiled kernels to compute: what tests/test_compiled.py asks tests/compiled.py for."""

import os

import torch

from qllm_ops.testing import CLAMPED, MoeCase
from qllm_ops.tiles import TileConfig

B, H, F = torch.bfloat16, torch.float16, torch.float32
COMBINE = TileConfig(4, 64, 1, 4, 1)
SMALL = {"gate_up": TileConfig(16, 32, 64, 4, 3), "down": TileConfig(16, 64, 64, 4, 3), "combine": COMBINE}
PARTS = {**SMALL, "down": TileConfig(16, 64, 32, 4, 3, split_k=2)}
EXITS = {
    "gate_up": TileConfig(16, 32, 32, 4, 3, exit_k=32), "down": TileConfig(16, 64, 32, 4, 3, exit_k=64),
    "combine": COMBINE,
}  # fmt: skip
TALL = {"gate_up": TileConfig(64, 32, 64, 4, 3), "down": TileConfig(64, 64, 64, 4, 3), "combine": COMBINE}

# name: layer, tiles (None: those that are shipped), columns of the output at once (None: all)
CASES = {
    "plain": (MoeCase(9, 64, 48, 3, 2, B), SMALL, None),
    "uneven, biases": (MoeCase(9, 72, 40, 3, 2, B, biases=True), SMALL, None),
    "parts, a branch of threads": (MoeCase(9, 64, 96, 3, 2, H, "gelu"), PARTS, None),
    "float32": (MoeCase(5, 64, 48, 3, 2, F, "gelu_tanh"), SMALL, None),
    "exits": (MoeCase(9, 160, 96, 3, 2, B), EXITS, None),
    "chunks of columns": (MoeCase(9, 64, 192, 3, 2, H), SMALL, 64),
    "more pairs than are counted": (MoeCase(270, 32, 32, 2, 2, B, routing="out_of_range"), TALL, None),
    "interleaved, clamped": (
        MoeCase(7, 64, 48, 3, 2, B, CLAMPED[0], "interleaved", biases=True), SMALL, None
    ),
    "transposed": (MoeCase(7, 64, 48, 3, 2, B, layout="transposed", weights_on_input=True), SMALL, None),
    "transposed, interleaved": (MoeCase(7, 64, 48, 3, 2, H, layout="transposed_interleaved"), SMALL, None),
    "ungated": (MoeCase(7, 64, 48, 3, 2, B, "relu2", "ungated", biases=True), SMALL, None),
    "shipped": (MoeCase(12, 256, 128, 3, 2, B), None, None),
    "fp8, 64 rows": (MoeCase(60, 256, 128, 3, 2, B, quantized="fp8", seed=1), TALL, None),
    "fp8": (MoeCase(20, 256, 128, 3, 2, B, quantized="fp8"), None, None),
    "fp8, 8 rows": (MoeCase(5, 256, 128, 3, 2, H, quantized="fp8"), None, None),
    "float8 by float8": (
        MoeCase(12, 256, 256, 3, 2, B, quantized="fp8", fp8_activations=True), None, None
    ),
    "mxfp4": (MoeCase(20, 256, 128, 3, 2, B, CLAMPED[0], "interleaved", True, quantized="mxfp4"), None, None),
    "mxfp4, 8 rows, uneven": (MoeCase(5, 160, 96, 3, 2, B, quantized="mxfp4"), None, None),
    "int4": (MoeCase(20, 256, 128, 3, 2, H, quantized="int4"), None, None),
    "int4, 8 rows": (MoeCase(5, 256, 128, 3, 2, B, quantized="int4"), None, None),
    "int4 with zero points": (MoeCase(5, 256, 128, 3, 2, B, quantized="int4_asymmetric"), None, None),
    "int4, zero points beside": (MoeCase(5, 256, 160, 3, 2, B, quantized="int4_asymmetric_128"), None, None),
}  # fmt: skip

THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
DEFAULT = {
    "plain": (80, 90), "parts, a branch of threads": (90,), "float32": (80,), "exits": (80, 90),
    "chunks of columns": (90,), "more pairs than are counted": (80,), "transposed": (90,), "shipped": (90,),
    "fp8, 64 rows": (80,), "fp8, 8 rows": (90,), "float8 by float8": (90,), "mxfp4": (90,),
    "int4 with zero points": (80,), "int4, zero points beside": (90,),
}  # fmt: skip
# Tiles of 64 rows are wgmma on sm_90, which tests/ptx.py does not know; sm_80 does not multiply float8.
CARDS = {
    name: (80,) if tiles is TALL else (90,) if case.fp8_activations else (80, 90)
    for name, (case, tiles, _) in CASES.items()
}
CHOSEN = [
    (name, capability)
    for name in CASES
    for capability in CARDS[name]
    if THOROUGH or capability in DEFAULT.get(name, ())
]
