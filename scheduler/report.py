"""What is said about runs: summaries, comparisons, the report and its table.

Everything here is a pure function of records; nothing runs a model.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import shlex
import sys
from collections import Counter
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from qllm_ops.scheduler.records import LS_ALONE, STATUSES, Finished, Pause, RunRecord, Span

__all__ = [
    "LS_ALONE",
    "TIE_TOLERANCE",
    "Finished",
    "Pause",
    "RunRecord",
    "Span",
    "build_report",
    "compare_tokens",
    "device_meta",
    "print_table",
    "summarise",
    "write_json",
]

TIE_TOLERANCE = 1e-3
"""Logits of one request in two differently batched fp32 runs agree to about 1e-4; this leaves some room."""

VERSUS_FCFS = {
    "ls_ttft_mean": ("ls", "ttft_s", "mean"),
    "ls_turnaround_mean": ("ls", "turnaround_s", "mean"),
    "be_turnaround_mean": ("be", "turnaround_s", "mean"),
    "tokens_per_s": ("tokens_per_s",),
}
VERSUS_LS_ALONE = {
    "ls_ttft_mean": ("ls", "ttft_s", "mean"),
    "ls_ttft_p99": ("ls", "ttft_s", "p99"),
    "ls_turnaround_mean": ("ls", "turnaround_s", "mean"),
}


# -- one run ---------------------------------------------------------------------------------------------


def summarise(run: RunRecord, slo_s: float) -> dict[str, Any]:
    """One run in numbers.

    Percentiles are numpy's with linear interpolation between order statistics. Latencies are those of
    requests that are done; TPOT those with two tokens at least. What has no value (an empty class, a run of
    no length) is None, never NaN.

    Returns:
        ``ls`` and ``be``: counts, errors, tokens, and ``{mean,p50,p90,p99}`` of ``ttft_s``, ``tpot_s`` and
        ``turnaround_s``. ``tokens_per_s``: prompt and generated tokens of the requests that are done, over
        the wall time; ``generated_tokens_per_s``: the generated ones alone. ``slo_attainment``: the share of
        all LS requests that are done with TTFT <= ``slo_s``. ``preemptions``: ``exit_s`` is from the flag's
        write to standing still, over the pauses that found something to stop (``stopped``).
    """
    ls = [f for f in run.finished if f.priority > 0]
    be = [f for f in run.finished if f.priority == 0]
    classes = {"ls": _class_summary(ls), "be": _class_summary(be)}
    prompt = sum(c["prompt_tokens"] for c in classes.values())
    generated = sum(c["generated_tokens"] for c in classes.values())
    held = sum(f.status == "done" and f.ttft_s is not None and f.ttft_s <= slo_s for f in ls)
    return {
        **classes,
        "requests": len(run.finished),
        "wall_s": run.wall_s,
        "tokens_per_s": _ratio(prompt + generated, run.wall_s),
        "generated_tokens_per_s": _ratio(generated, run.wall_s),
        "slo_attainment": _ratio(held, len(ls)),
        "preemptions": _preemptions(run),
        **({"extra": run.extra} if run.extra else {}),
    }


def _class_summary(requests: list[Finished]) -> dict[str, Any]:
    done = [f for f in requests if f.status == "done"]
    status = Counter(f.status for f in requests)
    return {
        "requests": len(requests),
        "completed": status["done"],
        **{name: status[name] for name in STATUSES[1:]},
        "errors": dict(Counter(f.error for f in requests if f.error)),
        "prompt_tokens": sum(f.prompt_tokens for f in done),
        "generated_tokens": sum(f.output_tokens for f in done),
        "ttft_s": _distribution(f.ttft_s for f in done),
        "tpot_s": _distribution(f.tpot_s for f in done),
        "turnaround_s": _distribution(f.turnaround_s for f in done),
    }


def _preemptions(run: RunRecord) -> dict[str, Any]:
    stopped = [p for p in run.pauses if p.parked_s is not None]
    exits = np.array([p.parked_s - p.asked_s for p in stopped])
    percentiles = _distribution(exits)
    return {
        "count": len(run.pauses),
        "stopped": len(stopped),
        "by_place": dict(Counter(p.where for p in stopped)),
        "exit_s": {
            **{name: percentiles[name] for name in ("p50", "p99", "mean")},
            "max": float(exits.max()) if len(exits) else None,
        },
        "paused_s": float(sum(p.resumed_s - p.parked_s for p in stopped)),
        "wasted_tiles": run.wasted_tiles,
    }


def _distribution(values: Iterable[float | None]) -> dict[str, float | None]:
    present = np.array([v for v in values if v is not None], dtype=float)
    if not len(present):
        return dict.fromkeys(("mean", "p50", "p90", "p99"))
    p50, p90, p99 = np.percentile(present, [50, 90, 99])
    return {"mean": float(present.mean()), "p50": float(p50), "p90": float(p90), "p99": float(p99)}


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


# -- several runs ----------------------------------------------------------------------------------------


def compare_tokens(baseline: RunRecord, other: RunRecord, tolerance: float = TIE_TOLERANCE) -> dict[str, Any]:
    """Whether greedy requests got the same tokens in two runs.

    Two policies may put a request into different batches, and then logits agree only to rounding. So a
    request whose first different token has a margin within ``tolerance`` in *both* runs is a tie, and any
    other difference (also one output that ends where the other goes on) is a mismatch. After its first
    difference a request is not looked at further: its context is another one.

    Returns:
        ``compared`` (requests done in both), ``equal``, ``ties`` and ``mismatches`` as ``{count, requests}``
        with a request's id, step, tokens and margins, and the ids that are done in one run only.
    """
    ours = {f.id: f for f in baseline.finished if f.status == "done"}
    theirs = {f.id: f for f in other.finished if f.status == "done"}
    both = [key for key in ours if key in theirs]
    ties, mismatches = [], []
    for key in both:
        a, b = ours[key], theirs[key]
        if a.tokens == b.tokens:
            continue
        shortest = min(len(a.tokens), len(b.tokens))
        step = next((i for i in range(shortest) if a.tokens[i] != b.tokens[i]), shortest)
        margins = [_finite(run.margins[step]) if step < len(run.margins) else None for run in (a, b)]
        tokens = [run.tokens[step] if step < len(run.tokens) else None for run in (a, b)]
        excused = None not in tokens and all(m is not None and m <= tolerance for m in margins)
        (ties if excused else mismatches).append(
            {"id": key, "step": step, "tokens": tokens, "margins": margins}
        )
    return {
        "compared": len(both),
        "equal": len(both) - len(ties) - len(mismatches),
        "ties": {"count": len(ties), "requests": ties},
        "mismatches": {"count": len(mismatches), "requests": mismatches},
        "only_in_baseline": [key for key in ours if key not in theirs],
        "only_in_other": [key for key in theirs if key not in ours],
    }


def _finite(value: float) -> float | None:
    # A broken model's margins may be NaN, which is no JSON and no excuse either.
    return value if math.isfinite(value) else None


def build_report(
    runs: dict[str, RunRecord],
    slo_s: float,
    meta: dict[str, Any],
    *,
    tie_tolerance: float = TIE_TOLERANCE,
) -> dict[str, Any]:
    """Everything that report.json holds.

    Args:
        runs: by policy name; "ls_alone" is the run without BE.
        slo_s: bound on LS TTFT, in seconds.
        meta: device, versions, command, seed, date, model: see `device_meta`.
        tie_tolerance: see `compare_tokens`.

    Returns:
        ``meta``, ``slo_s``, ``policies.<name>`` and ``ls_alone`` (see `summarise`), ``versus_fcfs.<policy>``
        and ``versus_ls_alone.<policy>`` (that policy's value over the other's: below 1 is better for a
        time, above 1 for tokens/s; None where undefined), ``tokens`` (every run against the baseline, which
        is fcfs or else the first policy) and ``notes`` (what a reader must know, as sentences).
    """
    if not slo_s > 0:
        raise ValueError(f"slo_s must be a positive number of seconds, got {slo_s!r}")
    summaries = {name: summarise(run, slo_s) for name, run in runs.items()}
    alone = summaries.pop(LS_ALONE, None)
    return {
        "meta": meta,
        "slo_s": slo_s,
        "policies": summaries,
        LS_ALONE: alone,
        "versus_fcfs": _versus(summaries, "fcfs", summaries.get("fcfs"), VERSUS_FCFS),
        "versus_ls_alone": _versus(summaries, LS_ALONE, alone, VERSUS_LS_ALONE),
        "tokens": _token_block(runs, tie_tolerance),
        "notes": _notes(summaries, alone),
    }


def _versus(
    summaries: dict[str, Any], name: str, base: dict[str, Any] | None, measures: dict[str, tuple[str, ...]]
) -> dict[str, dict[str, float | None]]:
    if base is None:
        return {}
    return {
        policy: {measure: _ratio(_at(s, path), _at(base, path)) for measure, path in measures.items()}
        for policy, s in summaries.items()
        if policy != name
    }


def _at(summary: dict[str, Any], path: tuple[str, ...]) -> Any:
    for key in path:
        summary = summary[key]
    return summary


def _token_block(runs: dict[str, RunRecord], tolerance: float) -> dict[str, Any]:
    policies = [name for name in runs if name != LS_ALONE]
    baseline = "fcfs" if "fcfs" in policies else next(iter(policies), None)
    versus = {}
    for name, run in runs.items():
        if baseline is None or name == baseline:
            continue
        against = runs[baseline]
        if name == LS_ALONE:
            only_ls = [f for f in against.finished if f.priority > 0]
            against = RunRecord(against.policy, against.wall_s, only_ls)
        versus[name] = compare_tokens(against, run, tolerance)
    return {
        "baseline": baseline,
        "tie_tolerance": tolerance,
        "ties": sum(v["ties"]["count"] for v in versus.values()),
        "mismatches": sum(v["mismatches"]["count"] for v in versus.values()),
        "versus": versus,
    }


def _notes(summaries: dict[str, Any], alone: dict[str, Any] | None) -> list[str]:
    notes = []
    if "fcfs" not in summaries:
        notes.append("fcfs was not among the policies, so versus_fcfs is empty.")
    if alone is None:
        notes.append("LS alone was not run, as there is no LS request, so versus_ls_alone is empty.")
    everything = {**summaries, **({} if alone is None else {LS_ALONE: alone})}
    for name, summary in everything.items():
        for cls in ("ls", "be"):
            lost = summary[cls]["requests"] - summary[cls]["completed"]
            if lost:
                notes.append(
                    f"{name}: {lost} of {summary[cls]['requests']} {cls.upper()} requests did not complete; "
                    "its latencies are those of the others."
                )
    return notes


def write_json(report: dict[str, Any], path: str | Path) -> None:
    """Write the report as strict JSON: a NaN or an infinity in it is a ValueError, not a broken file."""
    text = json.dumps(report, indent=2, allow_nan=False)
    Path(path).write_text(text + "\n", encoding="utf-8")


# -- the table -------------------------------------------------------------------------------------------


def print_table(report: dict[str, Any], console: Console | None = None) -> None:
    """Print the report: what each class got, and what preemption cost. A row per policy, then LS alone."""
    console = console or Console()
    for table in (_latency_table(report), _preemption_table(report)):
        # A line too long for the terminal is wrapped by it; rich would cut digits off.
        table.width = console.measure(table, options=console.options.update(max_width=200)).maximum
        console.print(table, crop=False)
    for note in report["notes"]:
        console.print(f"note: {note}", highlight=False, markup=False)


def _table_rows(report: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    rows = [(name, name, summary) for name, summary in report["policies"].items()]
    return [*rows, ("LS alone", LS_ALONE, report[LS_ALONE])] if report[LS_ALONE] else rows


def _latency_table(report: dict[str, Any]) -> Table:
    heads = (
        *("LS\nTTFT\nmean\nms", "p50\nms", "p99\nms", "over\nLS\nalone", "fcfs\nover\nthis"),
        *("LS\nturn-\naround\nms", "BE\nturn-\naround\ns", "total\ntokens\n/s", "this\nover\nfcfs"),
    )
    table = _table("Latency and throughput", heads)
    for label, name, summary in _table_rows(report):
        ttft, fcfs = summary["ls"]["ttft_s"], report["versus_fcfs"].get(name, {})
        table.add_row(
            label,
            *(_digits(ttft[key], 1e3) for key in ("mean", "p50", "p99")),
            _times(report["versus_ls_alone"].get(name, {}).get("ls_ttft_mean")),
            _times(_ratio(1.0, fcfs.get("ls_ttft_mean"))),
            _digits(summary["ls"]["turnaround_s"]["mean"], 1e3),
            _digits(summary["be"]["turnaround_s"]["mean"]),
            _digits(summary["tokens_per_s"]),
            "-" if fcfs.get("tokens_per_s") is None else f"{fcfs['tokens_per_s']:.3f}",
        )
    return table


def _preemption_table(report: dict[str, Any]) -> Table:
    heads = (
        *("LS in\nSLO", "done", "not\ndone", "pauses", "exit\np50 ms", "exit\np99 ms"),
        *("wasted\ntiles", "tokens\ndiffer", "ties"),
    )
    slo_ms = _digits(report["slo_s"], 1e3)
    table = _table(f"Service and preemption (SLO: first token within {slo_ms} ms)", heads)
    for label, name, summary in _table_rows(report):
        pauses = summary["preemptions"]
        tokens = report["tokens"]["versus"].get(name)
        done = summary["ls"]["completed"] + summary["be"]["completed"]
        held = summary["slo_attainment"]
        table.add_row(
            label,
            "-" if held is None else f"{100 * held:.1f} %",
            str(done),
            str(summary["requests"] - done),
            str(pauses["count"]),
            _digits(pauses["exit_s"]["p50"], 1e3),
            _digits(pauses["exit_s"]["p99"], 1e3),
            str(pauses["wasted_tiles"]),
            "-" if tokens is None else str(tokens["mismatches"]["count"]),
            "-" if tokens is None else str(tokens["ties"]["count"]),
        )
    return table


def _table(title: str, heads: Iterable[str]) -> Table:
    # Narrow enough for a terminal of 80 columns.
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("policy", no_wrap=True, vertical="bottom")
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True, vertical="bottom")
    return table


def _times(value: float | None) -> str:
    return (
        "-"
        if value is None
        else (f"{value:.2f}x" if value < 10 else f"{value:.1f}x" if value < 100 else f"{value:,.0f}x")
    )


def _digits(value: float | None, scale: float = 1.0) -> str:
    """Three significant digits, or all digits before the point; "-" for None."""
    if value is None:
        return "-"
    value *= scale
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:.3g}"


# -- what it ran on --------------------------------------------------------------------------------------


def device_meta(device: str | None = None) -> dict[str, Any]:
    """What this machine is, for a report: device, CPU, cores, versions and the time (UTC).

    ``device`` is the torch device that was used; None means CUDA where there is one.
    """
    import torch

    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    cpu, cores = _cpu_model(), _usable_cores()
    if torch.device(kind).type == "cuda":
        name = torch.cuda.get_device_name(kind)
    else:
        name = f"{cpu}, {cores} core{'s' if cores != 1 else ''}"
    packages = ("qllm-ops", "torch", "triton", "transformers", "numpy")
    return {
        "device": name,
        "device_type": torch.device(kind).type,
        "cpu": cpu,
        "cores": cores,
        "torch_threads": torch.get_num_threads(),
        "system": platform.platform(),
        "versions": {
            "python": platform.python_version(),
            **{package: _version(package) for package in packages},
            "cuda": torch.version.cuda,
        },
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _usable_cores() -> int:
    # A container may be confined to fewer cores than the machine has.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
