"""What ``qllm replay`` does with its options: check them, load the model, run, report.

A replay is checked as far as it can be before the model is loaded, and the model before the clock runs:
who waits for minutes should get figures.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.live import Live
from rich.text import Text
from transformers.utils import logging

from qllm_ops.models import PRESETS, UnsupportedExpertsError, load, save_preset
from qllm_ops.scheduler import workload
from qllm_ops.scheduler.core import Limits
from qllm_ops.scheduler.engine import Engine
from qllm_ops.scheduler.plots import write_png
from qllm_ops.scheduler.policies import POLICIES, get_policy
from qllm_ops.scheduler.records import RunRecord
from qllm_ops.scheduler.replay import Progress, run_all
from qllm_ops.scheduler.report import TIE_TOLERANCE, build_report, device_meta, print_table, write_json
from qllm_ops.scheduler.request import RequestError
from qllm_ops.scheduler.timeline import write_perfetto

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qllm_ops.models import InstallReport

ONLY_SYNTHETIC = ("rate", "ls_fraction", "ls_prompt", "be_prompt", "ls_output", "be_output")
ONLY_TRACE = ("time_scale", "max_prompt", "max_output")
AT_LEAST = {"seed": 0, "threads": 1, "max_requests": 1, "max_prompt": 1, "max_output": 1, "kv_tokens": 1}

MOST_REQUESTS = 1_000_000
"""More are a slip of the keyboard, and would be made for minutes before anything is said."""

TIES = {torch.float32: TIE_TOLERANCE, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""How close two logits are when rounding may decide between them: in 16 bits a few times the distance of
two neighbouring numbers of the size of a logit."""


class BadInput(Exception):
    """The user asked for something that cannot be done; the message is all that they need."""


def run(o: SimpleNamespace, given: set[str], out: Console) -> list[str]:
    """Replay what the options ``o`` say, print the table to ``out`` and write the report's files.

    Args:
        o: the options of ``qllm replay`` by their names.
        given: those that the user named.

    Returns:
        What went wrong in the replay, one sentence each: different tokens, requests that failed.

    Raises:
        BadInput: before anything is replayed, or at the end, when the files cannot be written.
    """
    _check_options(o, given)
    limits = _limits(o)
    arrivals, notes = _arrivals(o)
    place = _place(o)
    _make_folder(o.out_dir)
    model, label = _load(o, place)
    label += _formats(_check_fit(model, o, limits))
    described = _describe(o, arrivals)
    out.print(Text(f"{label}\n{described}"), soft_wrap=True)
    runs, slo_s = _replay(model, arrivals, o, limits, out)
    meta = {"model": label, "workload": described, **_meta(o, place, limits)}
    # Where rounding does not depend on the batch, it excuses nothing.
    ties = 0.0 if o.batch_invariant else TIES[model.dtype]
    report = build_report(runs, slo_s, meta, tie_tolerance=ties)
    report["notes"] += notes + _reasons(runs)
    _write(report, runs, o.out_dir, out)
    return _wrong(report, runs)


@contextlib.contextmanager
def _bad_input(*kinds: type[Exception]) -> Iterator[None]:
    """Turn exceptions of these kinds, where only the user's input can cause them, into `BadInput`."""
    try:
        yield
    except kinds as error:
        raise BadInput(str(error)) from error


# -- what the options say ----------------------------------------------------------------------------------


def _check_options(o: SimpleNamespace, given: set[str]) -> None:
    if {"model", "preset"} <= given:
        raise BadInput("--model and --preset are two ways to name one model; give one of them")
    traces = [flag for flag in ("ls_trace", "be_trace") if flag in given]
    for name in ONLY_SYNTHETIC if traces else ONLY_TRACE:
        if name in given:
            why = f"{_flag(traces[0])} gives the load" if traces else "there is no --ls-trace or --be-trace"
            raise BadInput(f"{_flag(name)} has no effect, because {why}")
    for name, least in AT_LEAST.items():
        value = getattr(o, name)
        if value is not None and value < least:
            raise BadInput(f"{_flag(name)} must be at least {least}, got {value}")
    if o.threads is not None and o.threads > (cores := os.cpu_count() or 1):  # with very many, OpenMP crashes
        raise BadInput(f"--threads must be at most {cores}, the cores of this machine, got {o.threads}")
    if o.seed >= 2**63:  # torch's generator takes no larger one
        raise BadInput(f"--seed must be below 2**63, got {o.seed}")
    for name in ("duration", "slo", "drain_timeout"):
        value = getattr(o, name)
        if value is not None and not 0 < value < math.inf:
            raise BadInput(f"{_flag(name)} must be a positive number of seconds, got {value}")
    if not traces and math.isfinite(o.rate) and o.rate * o.duration > MOST_REQUESTS:
        raise BadInput(
            f"--rate {o.rate:g} in --duration {o.duration:g} brings {o.rate * o.duration:.2g} requests; "
            f"at most {MOST_REQUESTS} are made"
        )
    with _bad_input(ValueError):
        o.policy = [get_policy(name).name for name in dict.fromkeys(o.policy or POLICIES)]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _limits(o: SimpleNamespace) -> Limits:
    with _bad_input(ValueError):
        return Limits(
            kv_tokens=o.kv_tokens,
            kv_reserve=o.kv_reserve,
            max_batch=o.max_batch,
            prefill_tokens=o.prefill_tokens,
            top_up_tokens=o.top_up_tokens,
            be_floor=o.be_floor,
            aging_s=o.aging,
        )


def _arrivals(o: SimpleNamespace) -> tuple[list[workload.Arrival], list[str]]:
    """The load, and what the reader of it had to say."""
    with _bad_input(ValueError), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if o.ls_trace or o.be_trace:
            options = {
                "duration_s": o.duration,
                "max_requests": o.max_requests,
                "time_scale": o.time_scale,
                "max_prompt_tokens": o.max_prompt,
                "max_output_tokens": o.max_output,
            }
            ls, be = (
                workload.read_azure_trace(path, priority, prefix, **options) if path else []
                for path, priority, prefix in (
                    (o.ls_trace, workload.LS, "ls"),
                    (o.be_trace, workload.BE, "be"),
                )
            )
            arrivals = workload.merge(ls, be)
        else:
            sizes = {name: getattr(o, name) for name in ONLY_SYNTHETIC if name != "rate"}
            arrivals = workload.synthetic(o.rate, o.duration, o.seed, **sizes)
            if not arrivals:
                raise BadInput(
                    f"--rate {o.rate:g} brings no request in --duration {o.duration:g} (--seed {o.seed})"
                )
    arrivals = arrivals[: o.max_requests]
    _check_classes(o, arrivals)
    return arrivals, [str(warning.message) for warning in said]


def _check_classes(o: SimpleNamespace, arrivals: list[workload.Arrival]) -> None:
    """Policies differ where both classes meet. A load of one alone is replayed if it was asked for."""
    traces = o.ls_trace or o.be_trace
    asked = {
        "LS": o.ls_trace if traces else o.ls_fraction > 0,
        "BE": o.be_trace if traces else o.ls_fraction < 1,
    }
    came = {"LS" if arrival.priority >= workload.LS else "BE" for arrival in arrivals}
    for cls in asked:
        if not asked[cls] or cls in came:
            continue
        if o.max_requests is not None and len(arrivals) == o.max_requests:
            raise BadInput(
                f"no {cls} request is among the earliest --max-requests {o.max_requests}; raise it"
            )
        fraction = 0 if cls == "LS" else 1
        raise BadInput(
            f"no {cls} request arrives in --duration {o.duration:g} at --rate {o.rate:g} with --ls-fraction "
            f"{o.ls_fraction:g} (--seed {o.seed}); raise --duration or --rate, or ask for no {cls} with "
            f"--ls-fraction {fraction}"
        )


def _describe(o: SimpleNamespace, arrivals: list[workload.Arrival]) -> str:
    """The load in a few words."""
    ls = sum(arrival.priority > 0 for arrival in arrivals)
    counts = f"{ls} LS + {len(arrivals) - ls} BE requests"
    if o.ls_trace or o.be_trace:
        traces = [path.name for path in (o.ls_trace, o.be_trace) if path]
        return f"{counts} in {o.duration:g} s of {' and '.join(traces)} (time x {o.time_scale:g})"
    return f"{counts}, Poisson at {o.rate:g}/s for {o.duration:g} s, seed {o.seed}"


# -- the model ---------------------------------------------------------------------------------------------


def _place(o: SimpleNamespace) -> torch.device:
    try:
        place = torch.device(o.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        place = None
    if place is None or place.type not in ("cpu", "cuda"):
        raise BadInput(f'--device must be "cpu", "cuda" or "cuda:N", got {o.device!r}')
    if place.type == "cuda":
        count = torch.cuda.device_count()
        if (place.index or 0) >= count:
            raise BadInput(
                f"--device {o.device}: this machine has {count} CUDA devices; qllm doctor says more"
            )
        torch.cuda.set_device(place)
        place = torch.device("cuda", torch.cuda.current_device())
    if o.threads is not None:
        torch.set_num_threads(o.threads)
    return place


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--out {path}: {error.strerror}") from error
    if not os.access(path, os.W_OK):
        raise BadInput(f"--out {path}: no permission to write there")


def _load(o: SimpleNamespace, place: torch.device) -> tuple[PreTrainedModel, str]:
    """The model, and what to call it. A preset takes the same way from disk as a user's own model."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dtype = getattr(torch, o.dtype.value) if o.dtype else None
    with (
        tempfile.TemporaryDirectory(prefix="qllm-") as folder,
        _bad_input(ValueError, UnsupportedExpertsError, OSError),
        _memory(f"{o.model or o.preset} does not fit into the memory of {place}"),
    ):
        path, label = o.model, str(o.model)
        if path is None:
            dtype = dtype or (torch.float32 if place.type == "cpu" else torch.bfloat16)
            path = save_preset(o.preset, folder, o.seed, dtype)
            label = f"{o.preset} (random weights): {PRESETS[o.preset].about}"
        quantize = o.quantize.value if o.quantize else None
        model = load(path, dtype=dtype, device=place, backend=o.backend.value, quantize=quantize)
    return model, f"{label}, {str(model.dtype).removeprefix('torch.')}"


def _check_fit(model: PreTrainedModel, o: SimpleNamespace, limits: Limits) -> InstallReport:
    """See that an engine takes the model and the limits before the clock runs."""
    with _bad_input(ValueError), _memory(f"--kv-tokens {limits.kv_tokens} needs more memory than there is"):
        engine = Engine(model, policy=o.policy[0], limits=limits, **_engine_options(o))
        engine.close()
    return engine.report


def _engine_options(o: SimpleNamespace) -> dict[str, Any]:
    return {"backend": o.backend.value, "gate": o.gate.value, "batch_invariant": o.batch_invariant}


def _formats(report: InstallReport) -> str:
    found = sorted({module.format for module in report.modules if module.format})
    return f", experts in {' and '.join(found)}" if found else ""


@contextlib.contextmanager
def _memory(message: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise BadInput(message) from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # what torch says on a CPU
            raise
        raise BadInput(message) from error


# -- the runs and what is said about them --------------------------------------------------------------------


def _replay(
    model: PreTrainedModel,
    arrivals: list[workload.Arrival],
    o: SimpleNamespace,
    limits: Limits,
    out: Console,
) -> tuple[dict[str, RunRecord], float]:
    # No thread of its own: it is drawn when the replay says so, and the lanes are not disturbed.
    with Live(console=out, auto_refresh=False, transient=True) as live:

        def show(name: str, progress: Progress) -> None:
            line = (
                f"{name:<9} LS {progress.ls_done}/{progress.ls_total}  "
                f"BE {progress.be_done}/{progress.be_total}  {progress.elapsed_s:.1f} s"
            )
            if progress.ended:
                live.update("")
                out.print(line, highlight=False)
            elif out.is_terminal:
                live.update(Text(line), refresh=True)

        try:
            return run_all(
                model,
                arrivals,
                o.policy,
                limits=limits,
                seed=o.seed,
                **_engine_options(o),
                slo_s=o.slo,
                drain_timeout_s=o.drain_timeout,
                progress=show,
            )
        except RequestError as error:  # of the measurement of the SLO, before any run
            raise BadInput(f"the model cannot serve a request: {error}") from error


def _meta(o: SimpleNamespace, place: torch.device, limits: Limits) -> dict[str, Any]:
    options = {key: str(v) if isinstance(v, (Path, Enum)) else v for key, v in vars(o).items()}
    return {**device_meta(str(place)), "seed": o.seed, "limits": asdict(limits), "options": options}


def _write(report: dict[str, Any], runs: dict[str, RunRecord], folder: Path, out: Console) -> None:
    """Print the table, and write the three files. The table first: figures that took minutes are not lost
    with a disk that is full."""
    picture = importlib.util.find_spec("matplotlib") is not None
    if not picture:
        report["notes"].append("no report.png: matplotlib is not installed (pip install 'qllm-ops[plots]').")
    print_table(report, out)
    with _bad_input(OSError):
        write_json(report, folder / "report.json")
        if picture:
            write_png(report, runs, folder / "report.png")
        write_perfetto(runs, folder / "timeline.json")
    files = ["report.json", *["report.png"] * picture, "timeline.json (open it at https://ui.perfetto.dev)"]
    out.print(Text(f"written to {folder}: {', '.join(files)}"), soft_wrap=True)


def _wrong(report: dict[str, Any], runs: dict[str, RunRecord]) -> list[str]:
    """What must not be in a replay. A refused request may, beside others: its note says why."""
    wrong = []
    for name, versus in report["tokens"]["versus"].items():
        if differ := versus["mismatches"]["requests"]:
            ids = ", ".join(request["id"] for request in differ)
            wrong.append(f"{name}: other tokens than under {report['tokens']['baseline']} for {ids}")
    for name, run in runs.items():
        for status in ("failed", "cancelled"):
            lost = sum(f.status == status for f in run.finished)
            if lost:
                wrong.append(f"{name}: {lost} of {len(run.finished)} requests {status}")
        if all(f.status == "refused" for f in run.finished):
            count = len(run.finished)
            wrong.append(f"{name}: {count} of {count} requests refused, so nothing was measured")
    return wrong


def _reasons(runs: dict[str, RunRecord]) -> list[str]:
    """Why requests did not complete, the first one of each run."""
    reasons = []
    for name, run in runs.items():
        first = next((f for f in run.finished if f.error), None)
        if first:
            reasons.append(f"{name}: {first.id} {first.status}: {first.error}")
        if run.extra.get("timed_out"):
            reasons.append(
                f"{name}: cut short, with {run.extra['timed_out']} requests left (--drain-timeout)."
            )
    return reasons
