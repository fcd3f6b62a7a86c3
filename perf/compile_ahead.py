"""Section "compile" of `gpu_check.py`: compiles the kernels of all shapes in parallel, into Triton's cache.

Triton compiles a kernel when it is first launched, one after another: for all shapes that would be minutes.
So several processes launch them on layers in which no expert has a token; the process that measures
then finds the machine code on disk. Nothing depends on this but the time.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import checkout  # noqa: F401  (makes qllm_ops importable)
import torch
from check_replay import MODEL
from context import Context, Skip
from layers import DENSE, FORMATS, MIXTRAL, OLMOE, QWEN3, SHAPES, Shape

from qllm_ops import Activation, PriorityFlag
from qllm_ops.inputs import MoeInputs, Weight
from qllm_ops.quantized import QUANTIZERS, QuantizedWeight

PROCESSES = 10


def compile_all(
    c: Context, shapes: Sequence[Shape] | None = None, formats: Sequence[str] = (DENSE,)
) -> dict[str, Any]:
    """The layers of `plan`, or those of ``shapes`` in ``formats`` with bfloat16 activations alone."""
    if c.backend != "triton" or c.device.type != "cuda":
        raise Skip("only Triton on a GPU compiles kernels")
    jobs = plan(c, shapes, formats)
    count = min(PROCESSES, max(1, (os.cpu_count() or 2) - 2), len(jobs))
    start = time.monotonic()
    processes = [_start(c, jobs[n::count]) for n in range(count)]
    failed = []
    for process in processes:
        try:
            _, stderr = process.communicate(timeout=max(1.0, c.left_s))
            if process.returncode:
                failed.append(stderr.strip().splitlines()[-1][:300] if stderr.strip() else "?")
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            failed.append("not done in time")
    c.say(f"{len(jobs)} layers in {count} processes, {time.monotonic() - start:.0f} s; {len(failed)} failed")
    return {"layers": len(jobs), "processes": count, "failed": failed}


def plan(
    c: Context, shapes: Sequence[Shape] | None = None, formats: Sequence[str] = (DENSE,)
) -> list[list[Any]]:
    """A job for every layer with tiles of its own: sizes, dtype, format, number of tokens."""
    from qllm_ops.tiles import arch_of, layer_configs, token_counts

    served = Shape("replay", MODEL["hidden_size"], MODEL["intermediate_size"], MODEL["num_local_experts"], 2)
    if shapes:
        layers = [(shape, "bfloat16", format) for shape in shapes for format in formats]
    else:
        layers = [(shape, "bfloat16", DENSE) for shape in (*SHAPES, served)]
        layers += [(OLMOE, dtype, DENSE) for dtype in ("float16", "float32")]
        few = (QWEN3,) if c.quick else (QWEN3, MIXTRAL)
        layers += [(shape, "bfloat16", format) for shape in few for format in FORMATS[1:]]
    jobs = []
    for shape, dtype, format in layers:
        seen = []
        for num_tokens in token_counts(shape.top_k, shape.num_experts):
            sizes = (shape.hidden_size, shape.intermediate_size, shape.num_experts, shape.top_k)
            configs = layer_configs(
                num_tokens=num_tokens, top_k=shape.top_k, num_experts=shape.num_experts,
                hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size,
                dtype=getattr(torch, dtype), arch=arch_of(c.device),
                device_name=torch.cuda.get_device_name(c.device) if c.device.type == "cuda" else None,
                weights=None if format == DENSE else format,
            )  # fmt: skip
            if configs not in seen:
                seen.append(configs)
                jobs.append([*sizes, dtype, format, num_tokens])
    return jobs


def _start(c: Context, jobs: list[list[Any]]) -> subprocess.Popen:
    command = [sys.executable, __file__, json.dumps({"device": str(c.device), "jobs": jobs})]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def launch_once(
    device: torch.device, sizes: tuple[int, int, int, int], dtype: torch.dtype, num_tokens: int,
    format: str = DENSE,
) -> None:  # fmt: skip
    """Launch every kernel of a layer in which no expert has a token, without and with the poll.

    So the weights are never read, and one element, or one expert, stands for all of them.
    """
    from qllm_ops.triton_moe import TritonMoe

    hidden_size, intermediate_size, num_experts, top_k = sizes
    one = torch.zeros(1, dtype=dtype, device=device)

    def weight(rows: int, columns: int) -> Weight:
        if format == DENSE:
            return one.expand(num_experts, rows, columns)
        return _repeated(QUANTIZERS[format](one.expand(1, rows, columns)), num_experts)

    inputs = MoeInputs(
        hidden_states=torch.zeros(num_tokens, hidden_size, dtype=dtype, device=device),
        gate_up_proj=weight(2 * intermediate_size, hidden_size),
        down_proj=weight(hidden_size, intermediate_size),
        top_k_index=torch.full((num_tokens, top_k), -1, device=device),
        top_k_weights=torch.zeros(num_tokens, top_k, dtype=dtype, device=device),
        activation=Activation("silu"),
    )
    run = TritonMoe(inputs, None, 0)
    run.launch_all()
    if not TritonMoe(inputs, PriorityFlag(device), 0).step(None) or run.output.count_nonzero():
        raise AssertionError(f"a layer without tokens is not zero: {sizes}, {dtype}, T={num_tokens}")


def _repeated(weight: QuantizedWeight, num_experts: int) -> QuantizedWeight:
    """One expert, as often as is wanted without a copy; so past the checks, which want contiguous values."""
    repeated = object.__new__(QuantizedWeight)
    for field in fields(QuantizedWeight):
        value = getattr(weight, field.name)
        if isinstance(value, torch.Tensor):
            value = value.expand(num_experts, *value.shape[1:])
        object.__setattr__(repeated, field.name, value)
    return repeated


def main() -> None:
    asked = json.loads(sys.argv[1])
    errors = []
    for *sizes, dtype, format, num_tokens in asked["jobs"]:
        try:
            device = torch.device(asked["device"])
            launch_once(device, tuple(sizes), getattr(torch, dtype), num_tokens, format)
        except Exception as error:
            errors.append(f"{sizes} {dtype} {format} T={num_tokens}: {type(error).__name__}: {error}")
    if errors:
        with contextlib.suppress(OSError):
            print(errors[0].replace("\n", " "), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
