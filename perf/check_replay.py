"""Section "replay" of `gpu_check.py`: LS and BE requests on one model, under every policy and LS alone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import checkout
import torch
from context import Context, Skip, free_memory

MODEL = {
    # A Mixtral of 4.4 billion random parameters: large enough that the device and not Python is what a
    # prefill waits for, small enough to be made in seconds.
    "hidden_size": 2048,
    "intermediate_size": 7168,
    "num_hidden_layers": 12,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 8192,
    "max_position_embeddings": 16384,
    "initializer_range": 0.02,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
TIE_TOLERANCE = 1e-1
"""bfloat16 logits this close are a tie, as in `qllm replay`."""

LOAD = 0.7
"""Arrivals, as a part of what fcfs gets done when all requests are there at once."""

LENGTHS = {"ls_prompt": (16, 128), "be_prompt": (1024, 4096), "ls_output": (8, 32), "be_output": (8, 32)}
TINY_LENGTHS = {"ls_prompt": (4, 8), "be_prompt": (64, 128), "ls_output": (2, 3), "be_output": (2, 4)}


def replay(c: Context) -> dict[str, Any]:
    """The same random requests under fcfs, priority, layer and tile, and the LS requests alone.

    The rate is LOAD of the measured capacity, so that the queues are neither empty nor endless. In
    bfloat16 two batches round differently, so tokens that differ are reported and fail nothing.
    """
    try:
        with checkout.without_rich():
            from qllm_ops.scheduler import report as reports
        from qllm_ops.scheduler.core import Limits
        from qllm_ops.scheduler.policies import POLICIES
        from qllm_ops.scheduler.replay import run_all
        from qllm_ops.scheduler.workload import synthetic
    except ImportError as error:
        raise Skip(f"the scheduler cannot be imported: {error}") from error

    model = _model(c)
    lengths = TINY_LENGTHS if c.rehearsal else LENGTHS
    limits = Limits(
        kv_tokens=4096 if c.rehearsal else 131072,
        max_batch=4 if c.rehearsal else 16,
        prefill_tokens=256 if c.rehearsal else 4096,
    )
    capacity = _capacity(c, model, limits, synthetic(1.0, 6.0 if c.rehearsal else 24.0, 1, **lengths))
    rate = LOAD * capacity
    # One run for each policy and one for LS alone; warm-up and the last requests take about as long again.
    seconds = min(0.4 * c.left_s / (len(POLICIES) + 1), 12.0)
    seconds = 8 / rate if c.rehearsal else max(seconds, 2.0)
    arrivals = synthetic(rate, seconds, 0, **lengths)
    c.say(f"capacity {capacity:.1f} requests/s; {len(arrivals)} arrivals in {seconds:.1f} s at {rate:.1f}/s")
    if not any(a.priority for a in arrivals) or all(a.priority for a in arrivals):
        raise Skip(f"{len(arrivals)} arrivals are too few for both classes; give the section more time")
    result: dict[str, Any] = {
        "model": "tiny" if c.rehearsal else MODEL,
        "limits": asdict(limits),
        "capacity_requests_per_s": capacity,
        "rate_per_s": rate,
        "duration_s": seconds,
        "lengths": lengths,
        "arrivals": len(arrivals),
    }
    c.keep(result)
    runs, slo_s = run_all(
        model,
        arrivals,
        list(POLICIES),
        limits=limits,
        backend=c.backend,
        drain_timeout_s=seconds + 5.0,
        progress=lambda name, p: c.say(f"{name}: {p.elapsed_s:.1f} s") if p.ended else None,
    )
    report = reports.build_report(runs, slo_s, {}, tie_tolerance=TIE_TOLERANCE)
    del report["meta"]
    result["report"] = report
    for name, summary in {**report["policies"], "ls_alone": report["ls_alone"]}.items():
        c.say(replay_line(name, summary))
    return result


def _model(c: Context) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    from qllm_ops.models import make_preset

    if c.rehearsal:
        return make_preset("tiny")
    start = time.monotonic()
    torch.manual_seed(0)
    with torch.device(c.device):
        config = AutoConfig.for_model("mixtral", **MODEL)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    c.say(f"{model.num_parameters() / 1e9:.1f} billion parameters in {time.monotonic() - start:.1f} s")
    return model


def _capacity(c: Context, model: torch.nn.Module, limits: Any, arrivals: Sequence[Any]) -> float:
    """Requests per second when all of them are there from the beginning."""
    from qllm_ops.scheduler.replay import replay as serve

    arrivals = [replace(a, arrival_s=0.0) for a in arrivals]
    patience_s = max(5.0, 0.3 * c.left_s)
    run = serve(model, arrivals, "fcfs", limits=limits, backend=c.backend, drain_timeout_s=patience_s)
    free_memory(c.device)
    done = sum(f.status == "done" for f in run.finished)
    if not done:
        raise RuntimeError(f"none of {len(arrivals)} requests got done: {run.finished[0].error}")
    return done / run.wall_s


def replay_line(name: str, summary: dict[str, Any]) -> str:
    ls, pauses = summary["ls"]["ttft_s"], summary["preemptions"]
    text = f"{name}: LS TTFT p50 {_ms(ls['p50'])}, p99 {_ms(ls['p99'])}"
    if summary["be"]["requests"]:
        text += f", BE turnaround {_ms(summary['be']['turnaround_s']['mean'])}"
    if pauses["stopped"]:
        exits = pauses["exit_s"]
        text += f", {pauses['stopped']} pauses, exit p50 {_ms(exits['p50'])}, p99 {_ms(exits['p99'])}"
    rate = summary["tokens_per_s"]
    return text + ("" if rate is None else f", {rate:.0f} tokens/s")


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.3g} ms"
