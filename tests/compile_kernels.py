"""Compile the MoE kernels for GPUs that this machine does not have, and describe what came out.

    python tests/compile_kernels.py DIRECTORY < requests.json > records.json

A request is {"kernel": "gate_up", "arch": "sm_90", "dtype": "bf16", "config": {...}}, the fields of the
configuration being those of qllm_ops.tiles.TileConfig; it may also hold "has_flag", "activation", "even",
"top_k", "count", "layout" (of LAYOUTS below), "format" (of FORMATS), and "sass" to have the machine code
written too. A record repeats the request and adds the registers, the stack, the local and the shared memory
in bytes, and the names of the files in DIRECTORY.

It is a program of its own because TRITON_INTERPRET, which the other tests set, is read when a kernel
is defined. Kernels are compiled as a launch on aligned tensors of even shapes would compile them.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qllm_ops.kernels import moe
from qllm_ops.tiles import TileConfig, compile_options
from qllm_ops.words import zeros_lie_beside

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_90_h100": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

PLAIN = {
    "ALPHA": 1.0, "LIMIT": None, "UP_OFFSET": 0.0, "PAIRS": "halves", "MASKED": False, "HAS_BIAS": False,
    "SCALED": False, "row_stride": None, "k_stride": 1,
}  # fmt: skip
LAYOUTS = {
    "plain": PLAIN,
    # Rows of weights are contiguous: row_stride is 1.
    "gpt_oss": {
        **PLAIN, "ALPHA": 1.702, "LIMIT": 7.0, "UP_OFFSET": 1.0, "PAIRS": "alternating", "MASKED": True,
        "HAS_BIAS": True, "row_stride": 1, "k_stride": None,
    },
    # The same, with gate and up in halves; no tile goes past the last row.
    "aria": {**PLAIN, "PAIRS": "blocks", "row_stride": 1, "k_stride": None},
    "llama4": {**PLAIN, "PAIRS": "blocks", "row_stride": 1, "k_stride": None, "SCALED": True},
    "ungated": {**PLAIN, "PAIRS": "none"},
    # gpt-oss as its checkpoint is quantised: rows are not contiguous.
    "gpt_oss_rows": {
        **PLAIN, "ALPHA": 1.702, "LIMIT": 7.0, "UP_OFFSET": 1.0, "PAIRS": "alternating", "HAS_BIAS": True,
    },
}  # fmt: skip

# Quantised weights, and the type of their scales. Groups of 32 are the most work for an int4 kernel.
FORMATS = {
    None: ({"FORMAT": None, "GROUP_N": None, "GROUP_K": None, "BY_TWO": None, "scale_columns": None}, "T"),
    "fp8": ({"FORMAT": "fp8", "GROUP_N": 128, "GROUP_K": 128}, "fp32"),
    "fp8_w8a8": ({"FORMAT": "fp8_w8a8", "GROUP_N": 128, "GROUP_K": 128}, "fp32"),
    "mxfp4": ({"FORMAT": "mxfp4", "GROUP_N": 1, "GROUP_K": 32}, "u8"),
    "int4": ({"FORMAT": "int4", "GROUP_N": 1, "GROUP_K": 32}, "T"),
    "int4_asymmetric": ({"FORMAT": "int4", "GROUP_N": 1, "GROUP_K": 32}, "T"),
    "int4_128": ({"FORMAT": "int4", "GROUP_N": 1, "GROUP_K": 128}, "T"),
    "int4_128_asymmetric": ({"FORMAT": "int4", "GROUP_N": 1, "GROUP_K": 128}, "T"),
}

# "T" stands for the type of hidden_states.
ARGUMENTS = {
    **dict.fromkeys(
        ("hidden_ptr", "weight_ptr", "bias_ptr", "intermediate_ptr", "partial_ptr", "output_ptr"), "*T"
    ),
    **dict.fromkeys(("order_ptr", "experts_ptr", "index_ptr"), "*i64"),
    **dict.fromkeys(("state_ptr", "flag_ptr"), "*i32"),
    **dict.fromkeys(("weights_ptr", "scale_ptr"), "*fp32"),
    **dict.fromkeys(
        ("share", "quantum", "phase", "num_phases", "num_pairs", "num_tokens", "num_experts", "top_k"), "i32"
    ),
    **dict.fromkeys(("gate_up_blocks", "down_blocks", "last_down_blocks"), "i32"),
    **dict.fromkeys(("combine_tiles", "last_combine_tiles"), "i32"),
}
# The sizes of a model are multiples of 16; those of a batch may be anything.
SIZES = {
    "hidden_size", "intermediate_size", "weight_rows", "row_stride", "k_stride", "chunk_begin", "chunk_size",
    "partial_width",
}  # fmt: skip
ARGUMENTS |= dict.fromkeys(SIZES, "i32")
ARGUMENTS |= dict.fromkeys(
    ("scale_columns", "zero_columns"), "i32"
)  # a multiple of a word, and often no larger one
ALIGNED = {*SIZES, *(name for name in ARGUMENTS if name.endswith("_ptr"))}
ALIGNED.remove("flag_ptr")  # the word of any class
ALIGNED -= {"experts_ptr", "index_ptr", "weights_ptr", "scale_ptr"}  # maybe of a slice of a larger batch


def compile_kernel(request: dict, directory: Path) -> dict:
    config = TileConfig(**request["config"])
    constants = {
        "HAS_FLAG": request.get("has_flag", True), "ACTIVATION": request.get("activation", "silu"),
        "EVEN": request.get("even", True), "BLOCK_E": 256,
        "COUNT": request.get("count", 0), "GATE_UP_M": config.block_m, "DOWN_M": config.block_m,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
        "SPLIT_K": config.split_k, "TOP_K": request.get("top_k", 8), "STAGES": config.num_stages,
        "EXIT_K": config.exit_k, "SLOTS": 512 if config.exit_k else 0,
        "THREADS": 32 * config.num_warps,
        "DEPENDENT": request.get("dependent", False),
        **LAYOUTS[request.get("layout", "plain")],
    }  # fmt: skip
    quantized, scale = FORMATS[request.get("format")]
    constants |= {"BY_TWO": request["arch"].startswith("sm_") and request["dtype"] != "fp32"} | quantized
    kernel = getattr(moe, request["kernel"])
    names = kernel.arg_names
    arguments = {**ARGUMENTS, "weight_scale_ptr": f"*{scale}"}
    if quantized["FORMAT"]:
        arguments["weight_ptr"] = "*u8"
        if request["dtype"] == "bf16" and request["format"] != "fp8_w8a8":
            arguments["partial_ptr"] = "*fp32"
    if (request.get("format") or "").endswith("_asymmetric"):
        beside = zeros_lie_beside(quantized["GROUP_K"], DTYPES[request["dtype"]])
        arguments["weight_zero_ptr"] = "*T" if beside else "*u8"
    else:
        arguments["zero_columns"] = "constexpr"
        constants |= {"weight_zero_ptr": None, "zero_columns": None}
    types = {name: arguments.get(name, "constexpr") for name in names}
    # A launch makes a constant of an argument that is 1 or None.
    types |= {name: "constexpr" for name in names if constants.get(name) == 1}
    if "scale_columns" in names and not quantized["FORMAT"]:
        types["scale_columns"] = "constexpr"
    source = ASTSource(
        fn=kernel,
        signature={name: kind.replace("T", request["dtype"]) for name, kind in types.items()},
        constexprs={(i,): constants[name] for i, name in enumerate(names) if types[name] == "constexpr"},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if name in (*ALIGNED, "weight_zero_ptr") and types[name] != "constexpr"
        },
    )
    options = compile_options(config, DTYPES[request["dtype"]], request["arch"])
    compiled = triton.compile(source, target=TARGETS[request["arch"]], options=options)
    stem = f"{request['arch']}-{request['kernel']}-{request['dtype']}-{compiled.hash[:12]}"
    record = {**request, "shared": compiled.metadata.shared}
    if request["arch"].startswith("gfx"):
        return {**record, "amdgcn": _write(directory / f"{stem}.amdgcn", compiled.asm["amdgcn"])}
    record["ptx"] = _write(directory / f"{stem}.ptx", compiled.asm["ptx"])
    cubin = directory / f"{stem}.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = _cuobjdump("-res-usage", cubin)
    for field, name in (("REG", "registers"), ("STACK", "stack"), ("LOCAL", "local")):
        record[name] = int(re.search(rf"\b{field}:(\d+)", usage).group(1))
    if request.get("sass"):
        record["sass_file"] = _write(directory / f"{stem}.sass", _cuobjdump("-sass", cubin))
    return record


def _cuobjdump(what: str, cubin: Path) -> str:
    return subprocess.run([CUOBJDUMP, what, cubin], capture_output=True, text=True, check=True).stdout


def _write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("unset TRITON_INTERPRET: the interpreter compiles nothing")
    if not CUOBJDUMP.exists():
        sys.exit(f"triton {triton.__version__} came without cuobjdump, which reads registers: {CUOBJDUMP}")
    where = Path(sys.argv[1])
    json.dump([compile_kernel(request, where) for request in json.load(sys.stdin)], sys.stdout)
