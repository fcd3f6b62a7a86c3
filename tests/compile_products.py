"""Compile one tile of `qllm_ops.kernels.moe.multiply` with quantised weights, for a card that is not here.

    python tests/compile_products.py DIRECTORY < requests.json > records.json

A request is {"format": "int4", "block": [1, 32], "arch": "sm_90", "dtype": "bf16", "scale": "bf16",
"zeros": false, "rows": 16, "block_k": 128, "even": true}; a record has the shared memory and the name of the
PTX, too. A program of its own for the reason that tests/compile_kernels.py gives.
"""

import json
import sys
from pathlib import Path

import triton
import triton.language as tl
from compile_kernels import DTYPES, TARGETS
from triton.compiler import ASTSource

from qllm_ops.kernels.moe import multiply
from qllm_ops.kernels.quantized import quantized_rows, zero_rows
from qllm_ops.tiles import TileConfig, compile_options

N, WARPS, STAGES = 64, 4, 4


@triton.jit
def products(
    a_ptr, value_ptr, scale_ptr, zero_ptr, output_ptr, columns, row_bytes, scale_columns, zero_columns,
    FORMAT: tl.constexpr, GROUP_N: tl.constexpr, GROUP_K: tl.constexpr, EVEN: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    m, n = tl.arange(0, M), tl.arange(0, N)
    value_ptrs, scale_ptrs = quantized_rows(
        value_ptr, scale_ptr, tl.program_id(0), n, N, row_bytes, scale_columns, GROUP_N
    )
    if zero_ptr is None:
        zero_ptrs = None
    else:
        zero_ptrs = zero_rows(zero_ptr, scale_ptrs, tl.program_id(0), n, N, zero_columns)
    sums, _ = multiply(
        a_ptr, m, columns, value_ptrs, 1, n < N, scale_ptrs, zero_ptrs, 0, columns,
        a_ptr, FORMAT, GROUP_K, True, False, EVEN, M, N, BLOCK_K, STAGES, 0, False, 0,
    )  # fmt: skip
    tl.store(output_ptr + m[:, None] * N + n[None, :], sums)


def compile_products(request: dict, directory: Path) -> dict:
    constants = {
        "FORMAT": request["format"], "GROUP_N": request["block"][0], "GROUP_K": request["block"][1],
        "EVEN": request["even"], "M": request["rows"], "N": N, "BLOCK_K": request["block_k"],
        "STAGES": STAGES,
    }  # fmt: skip
    types = {
        "a_ptr": f"*{request['dtype']}", "value_ptr": "*u8", "scale_ptr": f"*{request['scale']}",
        "zero_ptr": f"*{request['zeros']}", "output_ptr": "*fp32",
        **dict.fromkeys(("columns", "row_bytes", "scale_columns", "zero_columns"), "i32"),
    }  # fmt: skip
    if not request["zeros"]:
        constants |= {"zero_ptr": None, "zero_columns": None}
    types |= dict.fromkeys(constants, "constexpr")
    names = products.arg_names
    aligned = [name for name in names if types[name] != "constexpr" and name[-4:] == "_ptr"] + [
        "columns",
        "row_bytes",
    ]
    source = ASTSource(
        fn=products,
        signature={name: types[name] for name in names},
        constexprs={(i,): constants[name] for i, name in enumerate(names) if types[name] == "constexpr"},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in aligned},
    )
    config = TileConfig(request["rows"], N, request["block_k"], WARPS, STAGES, 2)
    options = compile_options(config, DTYPES[request["dtype"]], request["arch"])
    compiled = triton.compile(source, target=TARGETS[request["arch"]], options=options)
    path = directory / f"{compiled.hash}.ptx"
    path.write_text(compiled.asm["ptx"])
    return {**request, "shared": compiled.metadata.shared, "ptx": str(path)}


if __name__ == "__main__":
    where = Path(sys.argv[1])
    json.dump([compile_products(request, where) for request in json.load(sys.stdin)], sys.stdout)
