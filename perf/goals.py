"""What the operator's speed is held against, out of a result of `bench_moe.py` or `gpu_check.py` alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Any

Case = dict[str, Any]
Document = dict[str, Any]

NOT_MEASURED = "not measured"

DECODE = (8, 256)
"""Smallest and largest number of tokens for which a layer should be bound by its weights' bytes."""

PREFILL = {"Mixtral-8x7B": 0.75, "Qwen3-30B-A3B": 0.65, "OLMoE-1B-7B": 0.65}
"""Parts of the device's matmul rate that are asked for at PREFILL_TOKENS."""

PREFILL_TOKENS = 8192

QUANTIZED = {"fp8": 1.8, "mxfp4": 3.0, "int4": 3.0}
"""How many times faster a layer of this format should be than the same one in 16 bits, up to
QUANTIZED_TOKENS; its bytes are 2.0, 3.8 and 3.9 times fewer."""

QUANTIZED_TOKENS = 32

MEMORY_BYTES = 64 * 2**20
"""With fewer tokens, what the allocator rounds up is more than the activations."""


@dataclass(frozen=True)
class Goal:
    """One row of the table.

    Attributes:
        measured: NOT_MEASURED, or figures with the case that decides.
        met: None if not measured, or not well enough to tell.
    """

    name: str
    asked: str
    measured: str = NOT_MEASURED
    met: bool | None = None

    @property
    def verdict(self) -> str:
        return "-" if self.met is None else "yes" if self.met else "NO"


def goals(document: Document | None) -> list[Goal]:
    """All rows; without a document nothing is measured."""
    document = document or {"device_type": None, "cases": [], "exits": []}
    on_gpu = document["device_type"] == "cuda"
    cases = [case for case in document["cases"] if not is_quantized(case)]
    return [
        *against_peers(cases),
        decode(cases if on_gpu else []),
        *(prefill(cases if on_gpu else [], shape) for shape in PREFILL),
        polling(cases),
        exits(document["exits"]),
        thrown_away(document["exits"]),
        memory(cases),
        *(faster_than_dense(document["cases"] if on_gpu else [], format) for format in QUANTIZED),
    ]


def of_gpu_check(document: Document) -> Document:
    """What its sections measured, as `bench_moe.py` would have written it."""

    def cases(section: str) -> list[Case]:
        return (document["sections"].get(section, {}).get("result") or {}).get("cases", [])

    exits = [
        {"shape": case["shape"], "tokens": case["tokens"], **case["writers"][way]}
        for case in cases("latency")
        for way in [next((way for way in ("stream", "copy") if way in case["writers"]), None)]
        if way is not None
    ]
    polled = [{"shape": row["shape"], "tokens": row["tokens"], "polling": row} for row in cases("polling")]
    kind = "cpu" if document["rehearsal"] else "cuda"
    return {"device_type": kind, "cases": [*cases("speed"), *polled], "exits": exits}


# -- the rows --------------------------------------------------------------------------------------------


def against_peers(cases: Iterable[Case]) -> list[Goal]:
    lowest = Goal("speed against the best peer of the same run", ">= 1.0x everywhere")
    mean = Goal("the same, geometric mean over all cases", ">= 1.15x")
    found = [(case, *best) for case in cases if (best := best_peer(case))]
    if not found:
        return [lowest, mean]
    case, peer, ratio = min(found, key=lambda f: f[2]["p50"])
    average = geometric_mean(r["p50"] for _, _, r in found)
    worst = f"lowest {ratio['p50']:.2f}x ({peer}, {name_of(case)})"
    return [
        Goal(lowest.name, lowest.asked, f"{worst}, of {counted(found)}", ratio["p50"] >= 1.0),
        Goal(mean.name, mean.asked, f"{average:.2f}x of {counted(found)}", average >= 1.15),
    ]


def decode(cases: Iterable[Case]) -> Goal:
    least, most = DECODE
    return _lowest(
        Goal(f"decode, T = {least} to {most}: part of the measured copy bandwidth", ">= 90 %"),
        [case for case in cases if least <= case["tokens"] <= most],
        lambda case: case.get("of_copy"),
        0.90,
    )


def prefill(cases: Iterable[Case], shape: str) -> Goal:
    asked = PREFILL[shape]
    name = f"prefill, T = {PREFILL_TOKENS}, {shape}: part of the measured matmul rate"
    return _lowest(
        Goal(name, f">= {asked * 100:.0f} %"),
        [case for case in cases if (case["shape"], case["tokens"]) == (shape, PREFILL_TOKENS)],
        lambda case: case.get("of_matmul"),
        asked,
    )


def polling(cases: Iterable[Case]) -> Goal:
    """Neither met nor missed where the same kernel differs from itself by more than is asked for."""
    goal = Goal("cost of polling, median over all cases", "<= 0.5 %")
    found = [case["polling"] for case in cases if "overhead" in (case.get("polling") or {})]
    if not found:
        return goal
    cost = statistics.median(row["overhead"] for row in found)
    noise = statistics.median(abs(row["noise"]) for row in found)
    text = f"{cost * 100:+.2f} % (noise {noise * 100:.2f} %) of {counted(found)}"
    return Goal(goal.name, goal.asked, text, cost <= 0.005 if noise <= 0.005 else None)


def exits(rows: Iterable[dict[str, Any]]) -> Goal:
    """On the device's clock, so a row that has the host's alone does not count."""
    goal = Goal("flag written to last program gone, P99", "<= 30 us")
    found = [row for row in rows if row.get("device_us")]
    if not found:
        return goal
    worst = max(found, key=lambda row: row["device_us"]["p99"])
    p99 = worst["device_us"]["p99"]
    where = f"{name_of(worst)}, {worst['device_us']['n']} exits"
    return Goal(goal.name, goal.asked, f"at most {p99:.1f} us ({where}), of {counted(found)}", p99 <= 30)


def thrown_away(rows: Iterable[dict[str, Any]]) -> Goal:
    goal = Goal("work thrown away per preemption", "<= 1 tile a program")
    found = [row for row in rows if row.get("left_early")]
    if not found:
        return goal
    lost, preemptions = sum(row["lost_tiles"] for row in found), sum(row["left_early"] for row in found)
    text = f"{lost / preemptions:g} tiles ({lost} in {preemptions} preemptions)"
    met = all(row["lost_tiles"] <= row["left_early"] * row.get("programs", 0) for row in found)
    return Goal(goal.name, goal.asked, text, met)


def memory(cases: Iterable[Case]) -> Goal:
    goal = Goal("peak extra memory beyond the output, if more than 64 MiB over T x K x I", "<= 2x T x K x I")
    # Below that, the parts of the second product are computed in one go whatever they take.
    found = [case for case in cases if case.get("memory") and beyond(case["memory"]) > MEMORY_BYTES]
    if not found:
        return goal
    worst = max(found, key=lambda case: memory_ratio(case["memory"]))
    ratio = memory_ratio(worst["memory"])
    text = f"at most {ratio:.2f}x ({name_of(worst)}), of {counted(found)}"
    return Goal(goal.name, goal.asked, text, ratio <= 2.0)


def faster_than_dense(cases: Iterable[Case], format: str) -> Goal:
    asked = QUANTIZED[format]
    return _lowest(
        Goal(
            f"{format} experts, T <= {QUANTIZED_TOKENS}: times faster than the same in bf16", f">= {asked}x"
        ),
        [case for case in cases if case.get("format") == format and case["tokens"] <= QUANTIZED_TOKENS],
        lambda case: (case.get("times_faster_than_dense") or {}).get("p50"),
        asked,
        lambda value: f"{value:.2f}x",
    )


def _percent(value: float) -> str:
    return f"{value * 100:.0f} %"


def _lowest(
    goal: Goal, cases: Iterable[Case], value: Callable[[Case], float | None], asked: float,
    shown: Callable[[float], str] = _percent,
) -> Goal:  # fmt: skip
    found = [case for case in cases if value(case) is not None]
    if not found:
        return goal
    worst = min(found, key=value)
    text = f"lowest {shown(value(worst))} ({name_of(worst)}), of {counted(found)}"
    return Goal(goal.name, goal.asked, text, value(worst) >= asked)


# -- arithmetic ------------------------------------------------------------------------------------------


def best_peer(case: Case) -> tuple[str, dict[str, float]] | None:
    """The fastest peer of a case by its median, and how many times its time is ours."""
    times = {name: case["graph_us"][name]["p50"] for name in case.get("ratio", {})}
    if not times:
        return None
    name = min(times, key=times.get)
    return name, case["ratio"][name]


def quartiles(spread: dict[str, float], form: str) -> str:
    return f"{spread['p50']:{form}} ({spread['p25']:{form}}-{spread['p75']:{form}})"


def beyond(row: dict[str, int]) -> int:
    return row["peak_bytes"] - row["output_bytes"] - row["intermediate_bytes"]


def memory_ratio(row: dict[str, int]) -> float:
    return (row["peak_bytes"] - row["output_bytes"]) / row["intermediate_bytes"]


def is_quantized(case: Case) -> bool:
    """Results from before there were formats have none."""
    return case.get("format", "bf16") != "bf16"


def name_of(row: dict[str, Any]) -> str:
    format = f" {row['format']}" if is_quantized(row) else ""
    return f"{row['shape']}{format} T={row['tokens']}"


def counted(rows: list[Any]) -> str:
    return f"{len(rows)} case{'s' if len(rows) != 1 else ''}"
