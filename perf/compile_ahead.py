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
from typing import Any

import checkout  # noqa: F401  (makes qllm_ops importable)
import torch
from check_replay import MODEL
from context import Context, Skip
from layers import OLMOE, SHAPES, Shape

from qllm_ops import Activation, PriorityFlag
from qllm_ops.inputs import MoeInputs

PROCESSES = 10


def compile_all(c: Context, shapes: Sequence[Shape] | None = None) -> dict[str, Any]:
    """The layers of `plan`, or those of ``shapes`` in bfloat16 alone."""
    if c.backend != "triton" or c.device.type != "cuda":
        raise Skip("only Triton on a GPU compiles kernels")
    jobs = plan(c, shapes)
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


def plan(c: Context, shapes: Sequence[Shape] | None = None) -> list[list[Any]]:
    """A job for every layer with tiles of its own: sizes, dtype, number of tokens."""
    from qllm_ops.tiles import arch_of, layer_configs, token_counts

    served = Shape("replay", MODEL["hidden_size"], MODEL["intermediate_size"], MODEL["num_local_experts"], 2)
    layers = [(shape, "bfloat16") for shape in shapes or (*SHAPES, served)]
    layers += [] if shapes else [(OLMOE, "float16"), (OLMOE, "float32")]
    jobs = []
    for shape, dtype in layers:
        seen = []
        for num_tokens in token_counts(shape.top_k, shape.num_experts):
            sizes = (shape.hidden_size, shape.intermediate_size, shape.num_experts, shape.top_k)
            configs = layer_configs(
                num_tokens=num_tokens, top_k=shape.top_k, num_experts=shape.num_experts,
                hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size,
                dtype=getattr(torch, dtype), arch=arch_of(c.device),
                device_name=torch.cuda.get_device_name(c.device) if c.device.type == "cuda" else None,
            )  # fmt: skip
            if configs not in seen:
                seen.append(configs)
                jobs.append([*sizes, dtype, num_tokens])
    return jobs


def _start(c: Context, jobs: list[list[Any]]) -> subprocess.Popen:
    command = [sys.executable, __file__, json.dumps({"device": str(c.device), "jobs": jobs})]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def launch_once(
    device: torch.device, sizes: tuple[int, int, int, int], dtype: torch.dtype, num_tokens: int
) -> None:
    """Launch every kernel of a layer in which no expert has a token, without and with the poll.

    So the weights are never read, and one element stands for all of them.
    """
    from qllm_ops.triton_moe import TritonMoe

    hidden_size, intermediate_size, num_experts, top_k = sizes
    one = torch.zeros(1, dtype=dtype, device=device)
    inputs = MoeInputs(
        hidden_states=torch.zeros(num_tokens, hidden_size, dtype=dtype, device=device),
        gate_up_proj=one.expand(num_experts, 2 * intermediate_size, hidden_size),
        down_proj=one.expand(num_experts, hidden_size, intermediate_size),
        top_k_index=torch.full((num_tokens, top_k), -1, device=device),
        top_k_weights=torch.zeros(num_tokens, top_k, dtype=dtype, device=device),
        activation=Activation("silu"),
    )
    run = TritonMoe(inputs, None, 0)
    run.launch_all()
    if not TritonMoe(inputs, PriorityFlag(device), 0).step(None) or run.output.count_nonzero():
        raise AssertionError(f"a layer without tokens is not zero: {sizes}, {dtype}, T={num_tokens}")


def main() -> None:
    asked = json.loads(sys.argv[1])
    errors = []
    for *sizes, dtype, num_tokens in asked["jobs"]:
        try:
            launch_once(torch.device(asked["device"]), tuple(sizes), getattr(torch, dtype), num_tokens)
        except Exception as error:
            errors.append(f"{sizes} {dtype} T={num_tokens}: {type(error).__name__}: {error}")
    if errors:
        with contextlib.suppress(OSError):
            print(errors[0].replace("\n", " "), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
