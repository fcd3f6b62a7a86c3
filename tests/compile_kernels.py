"""Compile the MoE kernels for GPUs that this machine does not have, and describe what came out.

    python tests/compile_kernels.py DIRECTORY < requests.json > records.json

A request is {"kernel": "gate_up", "arch": "sm_90", "dtype": "bf16", "config": {...}}, the fields of the
configuration being those of qllm_ops.tiles.TileConfig. A record repeats the request and adds the
registers, the stack and the shared memory in bytes, and the files in DIRECTORY with PTX and SASS.

It is a program of its own because TRITON_INTERPRET, which the other tests set, is read when a kernel
is defined. Kernels are compiled as a launch on aligned tensors of even shapes would compile them.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qllm_ops.kernels import moe
from qllm_ops.tiles import TileConfig

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"bf16": "bf16", "fp16": "fp16", "fp32": "fp32"}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

# "T" stands for the type of hidden_states. Sizes of the model are multiples of 16, sizes of the batch anything.
ARGUMENTS = {
    **{name: "*T" for name in ("hidden_ptr", "weight_ptr", "intermediate_ptr", "partial_ptr", "output_ptr")},
    **{name: "*i64" for name in ("order_ptr", "sorted_ptr", "index_ptr")},
    **{name: "*i32" for name in ("state_ptr", "flag_ptr")},
    "weights_ptr": "*fp32",
    **{name: "i32" for name in ("limit", "num_pairs", "num_tokens", "num_experts", "top_k")},
    **{name: "i32" for name in ("hidden_size", "intermediate_size")},
    **{name: "i32" for name in ("gate_up_blocks", "down_blocks", "combine_tiles")},
}
UNALIGNED = {"flag_ptr", "limit", "num_pairs", "num_tokens", "num_experts", "top_k", "combine_tiles"}
UNALIGNED |= {"gate_up_blocks", "down_blocks"}


def compile_kernel(request: dict, directory: Path) -> dict:
    config = TileConfig(**request["config"])
    constants = {
        "HAS_FLAG": request.get("has_flag", True), "ACTIVATION": request.get("activation", "silu"),
        "EVEN": request.get("even", True), "BLOCK_E": 256, "GATE_UP_M": config.block_m, "DOWN_M": config.block_m,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
        "SPLIT_K": config.split_k, "TOP_K": request.get("top_k", 8), "STAGES": config.num_stages,
    }  # fmt: skip
    kernel = getattr(moe, request["kernel"])
    names = kernel.arg_names
    types = {name: ARGUMENTS[name] if name in ARGUMENTS else "constexpr" for name in names}
    if types.get("partial_ptr") and config.split_k > 1:
        types["partial_ptr"] = "*fp32"
    source = ASTSource(
        fn=kernel,
        signature={name: kind.replace("T", DTYPES[request["dtype"]]) for name, kind in types.items()},
        constexprs={(i,): constants[name] for i, name in enumerate(names) if types[name] == "constexpr"},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if types[name] != "constexpr" and name not in UNALIGNED
        },
    )
    compiled = triton.compile(source, target=TARGETS[request["arch"]], options={"num_warps": config.num_warps})
    stem = f"{request['arch']}-{request['kernel']}-{request['dtype']}-{compiled.hash[:12]}"
    record = {**request, "shared": compiled.metadata.shared}
    if request["arch"].startswith("gfx"):
        return {**record, "amdgcn": _write(directory / f"{stem}.amdgcn", compiled.asm["amdgcn"])}
    record["ptx"] = _write(directory / f"{stem}.ptx", compiled.asm["ptx"])
    cubin = directory / f"{stem}.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    for field, name in (("REG", "registers"), ("STACK", "stack"), ("LOCAL", "local")):
        record[name] = int(re.search(rf"\b{field}:(\d+)", usage).group(1))
    return record


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
