"""Section "compile" of `gpu_check.py`: compiles the kernels of all shapes in parallel, into Triton's cache.

Triton compiles a kernel when it is first launched, one after another: for all shapes that would be minutes.
So several processes launch them on layers in which no expert has a token; the process that measures
then finds the machine code on disk. Nothing depends on this but the time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import checkout  # noqa: F401  (makes qllm_ops importable)
import torch
from check_correct import SOME_TOKENS
from check_replay import MODEL
from check_speed import QUANTIZED_TOKENS, TOKENS
from context import Context, Skip, one_line
from layers import DENSE, FORMATS, MIXTRAL, OLMOE, QWEN3, SHAPES, Shape

from qllm_ops import Activation, PriorityFlag
from qllm_ops.device import arch_of
from qllm_ops.inputs import MoeInputs, Weight
from qllm_ops.quantized import QUANTIZERS, W8A8, QuantizedWeight
from qllm_ops.tiles import TileConfig, layer_configs, token_counts

PROCESSES = 14


@dataclass(frozen=True)
class Job:
    """A layer with tiles of its own, as a section launches it."""

    sizes: tuple[int, int, int, int]  # H, I, E, K
    dtype: str
    num_tokens: int
    format: str = DENSE
    weights_dtype: str = "bfloat16"  # of top_k_weights: kernels are compiled for it
    rounded: bool = False  # fp8_activations
    invariant: bool = False  # batch_invariant


def compile_all(
    c: Context,
    shapes: Sequence[Shape] | None = None,
    formats: Sequence[str] = (DENSE,),
    tokens: Sequence[int] = TOKENS,
) -> dict[str, Any]:
    """What all sections launch, or layers of ``shapes`` in ``formats`` with bfloat16 activations."""
    if c.backend != "triton" or c.device.type != "cuda":
        raise Skip("only Triton on a GPU compiles kernels")
    jobs = plan(c.device, c.quick) if shapes is None else plan_of(c.device, shapes, formats, tokens)
    count = min(PROCESSES, max(1, (os.cpu_count() or 2) - 2), len(jobs))
    start = time.monotonic()
    processes = [_start(c, jobs[n::count]) for n in range(count)]
    failed = []
    for process in processes:
        try:
            stdout, stderr = process.communicate(timeout=max(1.0, c.left_s))
            if process.returncode:
                failed.append(f"a process ended with code {process.returncode}: {stderr.strip()[-600:]}")
            else:
                failed += json.loads(stdout.splitlines()[-1])
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            failed.append("a process was not done in time")
    seconds = time.monotonic() - start
    c.say(f"{len(jobs)} layers in {count} processes, {seconds:.0f} s; {len(failed)} failed")
    for reason in failed:
        c.say(reason)
    return {"layers": len(jobs), "processes": count, "compiled_s": seconds, "failed": failed}


def plan(device: torch.device, quick: bool) -> list[Job]:
    """What the sections launch; of a quick run somewhat more."""
    jobs = plan_of(device, (QWEN3, MIXTRAL, OLMOE) if quick else SHAPES, (DENSE,), TOKENS)
    few = (QWEN3,) if quick else (QWEN3, MIXTRAL)
    jobs += plan_of(device, few, FORMATS[1:], (*QUANTIZED_TOKENS, *SOME_TOKENS))
    for dtype in ("float16", "float32"):
        jobs += _of(device, OLMOE, SOME_TOKENS, dtype=dtype, weights_dtype=dtype)
    served = Shape("replay", MODEL["hidden_size"], MODEL["intermediate_size"], MODEL["num_local_experts"], 2)
    # Its router's weights are float32, as those of most models are.
    return jobs + _of(device, served, token_counts(2, served.num_experts), weights_dtype="float32")


def plan_of(
    device: torch.device, shapes: Sequence[Shape], formats: Sequence[str], tokens: Sequence[int]
) -> list[Job]:
    """What layers are compared with: ours with its options, and as they are."""
    jobs = []
    for shape in shapes:
        for format in formats:
            jobs += _of(device, shape, tokens, format=format)
            if format == "fp8":
                jobs += _of(device, shape, tokens, format=format, rounded=True)
            jobs += _of(device, shape, tokens, format=format, invariant=True)
    return jobs


def _of(device: torch.device, shape: Shape, tokens: Sequence[int], **options: Any) -> list[Job]:
    """Those of a shape that differ in what is compiled: the tiles, and how the pairs are sorted."""
    from qllm_ops.plan import sorted_pairs

    sizes = (shape.hidden_size, shape.intermediate_size, shape.num_experts, shape.top_k)
    found: dict[Any, Job] = {}
    for num_tokens in sorted(tokens):
        job = Job(sizes, **{"dtype": "bfloat16", "num_tokens": num_tokens, **options})
        tiles = None if job.invariant else _tiles(device, job)
        network = sorted_pairs(num_tokens * shape.top_k, shape.num_experts, arch_of(device))
        found.setdefault((str(tiles), network), job)
    return list(found.values())


def _tiles(device: torch.device, job: Job) -> dict[str, TileConfig]:
    hidden_size, intermediate_size, num_experts, top_k = job.sizes
    return layer_configs(
        num_tokens=job.num_tokens, top_k=top_k, num_experts=num_experts, hidden_size=hidden_size,
        intermediate_size=intermediate_size, dtype=getattr(torch, job.dtype), arch=arch_of(device),
        device_name=torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        weights=W8A8 if job.rounded else None if job.format == DENSE else job.format,
    )  # fmt: skip


def _start(c: Context, jobs: list[Job]) -> subprocess.Popen:
    asked = json.dumps({"device": str(c.device), "jobs": [asdict(job) for job in jobs]})
    return subprocess.Popen(
        [sys.executable, __file__, asked], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def launch_once(device: torch.device, job: Job) -> None:
    """Launch every kernel of a layer in which no expert has a token, without and with the poll.

    So the weights are never read, and one element, or one expert, stands for all of them.
    """
    from qllm_ops.triton_moe import TritonMoe

    hidden_size, intermediate_size, num_experts, top_k = job.sizes
    num_tokens, dtype = job.num_tokens, getattr(torch, job.dtype)
    one = torch.zeros(1, dtype=dtype, device=device)

    def weight(rows: int, columns: int) -> Weight:
        if job.format == DENSE:
            return one.expand(num_experts, rows, columns)
        return _repeated(QUANTIZERS[job.format](one.expand(1, rows, columns)), num_experts)

    inputs = MoeInputs(
        hidden_states=torch.zeros(num_tokens, hidden_size, dtype=dtype, device=device),
        gate_up_proj=weight(2 * intermediate_size, hidden_size),
        down_proj=weight(hidden_size, intermediate_size),
        top_k_index=torch.full((num_tokens, top_k), -1, device=device),
        top_k_weights=torch.zeros(num_tokens, top_k, dtype=getattr(torch, job.weights_dtype), device=device),
        activation=Activation("silu"),
        batch_invariant=job.invariant,
        fp8_activations=job.rounded,
    )
    run, finished = TritonMoe(inputs, None, 0), True
    run.launch_all()
    if not (job.invariant or job.rounded):  # which are timed without a flag only
        run = TritonMoe(inputs, PriorityFlag(device), 0)
        finished = run.step(None)
    if not finished or run.output.count_nonzero():
        raise AssertionError("a layer without tokens is not zero")


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
    device, errors = torch.device(asked["device"]), []
    for fields_of_job in asked["jobs"]:
        job = Job(**fields_of_job)
        try:
            launch_once(device, job)
        except Exception as error:
            tiles = {phase: asdict(config) for phase, config in _tiles(device, job).items()}
            errors.append(f"{job}: {one_line(error)} ({tiles})")
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
