"""Compiled products of quantised weights, run: what Triton makes of them for a card, on a CPU (tests/ptx.py).

Where numbers lie in registers, which ones the matrix units multiply, and that nothing is read before it has
been copied: none of that shows under the interpreter.
"""

import functools
import itertools
import os
from pathlib import Path

import ptx
import pytest
import torch
from other_process import records_of

from qllm_ops import QuantizedWeight, quantize_fp8, quantize_int4, quantize_mxfp4

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
N, THREADS = 64, 128
THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"

QUANTIZERS = {
    "fp8": quantize_fp8,
    "fp8 of small blocks": lambda w: quantize_fp8(w, (4, 32)),
    "mxfp4": quantize_mxfp4,
    "int4 of 16": lambda w: quantize_int4(w, 16),
    "int4 of 32": lambda w: quantize_int4(w, 32),
    "int4 of 128": lambda w: quantize_int4(w, 128),
    "asymmetric int4 of 32": lambda w: quantize_int4(w, 32, symmetric=False),
    "asymmetric int4 of 64": lambda w: quantize_int4(w, 64, symmetric=False),
    "asymmetric int4 of 128": lambda w: quantize_int4(w, 128, symmetric=False),
}
EVERY_KIND = (8, "bf16", "sm_90", 512)
SOME_KINDS = [(16, "fp16", "sm_90", 512), (32, "bf16", "sm_80", 480)]
CASES = [  # kind, rows of activations, dtype, card, columns: whole turns of 128, or not
    (kind, *rest)
    for kind in QUANTIZERS
    for rest in (
        itertools.product((8, 16, 32), DTYPES, ("sm_90", "sm_80"), (512, 480))
        if THOROUGH
        else [EVERY_KIND, *(SOME_KINDS if kind in ("fp8", "mxfp4", "int4 of 32") else [])]
    )
]


@functools.cache
def problem(name: str, dtype: str, columns: int) -> tuple[torch.Tensor, QuantizedWeight]:
    """(32, columns) of activations, and (1, N, columns) of weights."""
    draw = torch.Generator().manual_seed(0)
    weights = 0.05 * torch.randn(1, N, columns, generator=draw)
    return torch.randn(32, columns, generator=draw).to(DTYPES[dtype]), QUANTIZERS[name](
        weights.to(DTYPES[dtype])
    )


def block_k(name: str) -> int:
    """Columns of a turn, as the tiles of few rows have them."""
    return 256 if name == "mxfp4" else 128


SCALES = {torch.float32: "fp32", torch.uint8: "u8", torch.bfloat16: "bf16", torch.float16: "fp16"}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[tuple, dict]:
    """The record of every case."""
    where = tmp_path_factory.mktemp("products")
    requests = []
    for name, rows, dtype, arch, columns in CASES:
        weight = problem(name, dtype, columns)[1]
        requests.append({
            "format": weight.format, "block": weight.block, "arch": arch, "dtype": dtype, "rows": rows,
            "scale": SCALES[weight.scales.dtype],
            "block_k": block_k(name), "even": columns % block_k(name) == 0,
            "zeros": weight.zeros is not None and SCALES[weight.zero_words.dtype],
        })  # fmt: skip
    return dict(zip(CASES, records_of("compile_products.py", requests, where), strict=True))


def rows_of(tensor: torch.Tensor):
    """All of the memory of (1, rows, columns), whose rows may be longer."""
    length = tensor.shape[1] * tensor.stride(1)
    return torch.as_strided(tensor, (length,), (1,)).view(torch.uint8).numpy()


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, case)))
def test_compiled_products_are_those_of_what_the_weights_stand_for(compiled, case):
    name, rows, dtype, _, columns = case
    hidden, weight = problem(name, dtype, columns)
    hidden, record, output = hidden[:rows].contiguous(), compiled[case], torch.zeros(rows, N)
    words = weight.zero_words
    zeros = ([], []) if words is None else ([rows_of(words)], [words.stride(1)])
    [block] = ptx.launch(
        Path(record["ptx"]).read_text(), THREADS, record["shared"],
        [
            hidden.view(torch.uint8).numpy(), weight.values.view(torch.uint8).numpy(), rows_of(weight.scales),
            *zeros[0], output.numpy(), columns, weight.values.shape[2], weight.scales.stride(1), *zeros[1],
        ],
    )  # fmt: skip
    # A scale of every turn's columns goes on the sums; others on the weights, which are rounded then.
    numbers = weight.dequantize(0)
    wanted = hidden.double() @ (numbers if weight.block[1] >= 128 else numbers.to(DTYPES[dtype])).double().T
    assert (output - wanted).square().mean().sqrt() <= 1e-6 * wanted.square().mean().sqrt()
    products = sum(count for name, count in block.executed.items() if name.startswith("mma.sync"))
    turns = -(-columns // block_k(name))
    assert products * (THREADS // 32) == turns * (N // 16) * (rows // 8) * (block_k(name) // 16)
    # What goes through shared memory a second time is written for other threads, and read as it can be.
    assert block.conflicts == 0 or name in ("int4 of 16", "asymmetric int4 of 64")
