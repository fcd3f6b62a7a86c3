"""The short table at the end of `gpu_check.py`, out of its JSON alone.

python perf/gpu_table.py perf/results/gpu_check-....json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from goals import goals, name_of, of_gpu_check

Row = list[str]


def print_summary(document: dict[str, Any]) -> None:
    for line in summary(document):
        print(line, flush=True)


def summary(document: dict[str, Any]) -> Iterable[str]:
    sections = document["sections"]
    kind = "REHEARSAL on a CPU: the figures mean nothing" if document["rehearsal"] else document["device"]
    yield f"\n== gpu_check, {kind}, {document['date']}"
    for title, make in (
        ("", _sections),
        ("leaving, us from the order to pause (p50 / p99 / max): host's view, then device's", _latency),
        ("polling: overhead of the flag (noise), us without", _polling),
        ("lanes: us per layer as called, by gate; decode beside a share of prefill, against turns", _lanes),
        ("speed: us per layer as a graph, part of the floor, times faster than, us as called", _speed),
        ("phases: us of each, and part of its own floor", _phases),
        ("replay", _replay),
    ):
        rows = list(make(sections))
        if rows:
            yield f"-- {title}" if title else ""
            yield from _aligned(rows)
    if not document["rehearsal"]:
        yield "-- goals"
        rows = [
            (goal.name, goal.asked, goal.measured, goal.verdict) for goal in goals(of_gpu_check(document))
        ]
        yield from _aligned([("goal", "asked", "measured", "met"), *rows])
    if "passed" in document:
        left_out = sum(len(sections.get(name, {}).get("left_out", ())) for name in ("correctness", "bitwise"))
        but = f", with {left_out} cases left out for lack of time or memory" if left_out else ""
        yield f"PASSED{but}" if document["passed"] else "NOT PASSED: see correctness, bitwise and lanes"


def _aligned(rows: list[Row]) -> Iterable[str]:
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    for row in rows:
        yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip()


def _result(sections: dict[str, Any], name: str) -> dict[str, Any]:
    return sections.get(name, {}).get("result") or {}


def _sections(sections: dict[str, Any]) -> Iterable[Row]:
    for name, entry in sections.items():
        result = entry.get("result") or {}
        about = entry.get("error") or entry.get("reason") or result.get("reason") or ""
        if name in ("correctness", "bitwise"):
            cases = result.get("cases", [])
            failed = [case for case in cases if not case.get("passed")]
            about = f"{len(cases) - len(failed)} of {len(cases)} cases passed {about}"
            worst = [case["rms"] for case in cases if case.get("rms") and case.get("dtype") == "bfloat16"]
            about += f"; worst bf16 RMS error {max(worst):.2e}" if worst else ""
        if name == "compile" and result.get("failed"):
            about = f"{len(result['failed'])} failed: {result['failed'][0][:200]}"
        if name == "ceilings" and result:
            about = (
                f"{result['copy_bytes_per_s']['p50'] / 1e12:.2f} TB/s, "
                f"{result['product_flops_per_s']['p50'] / 1e12:.0f} TFLOP/s"
            )
        if entry.get("left_out"):
            about += f" (left out: {len(entry['left_out'])})"
        yield [name, entry["status"], f"{entry.get('seconds', 0):.0f} s", about.strip()]


def _latency(sections: dict[str, Any]) -> Iterable[Row]:
    for case in _result(sections, "latency").get("cases", []):
        for writer, row in case["writers"].items():
            cells = [f"{case['shape']} T={case['tokens']}", writer]
            if row.get("error"):
                yield [*cells, row["error"]]
                continue
            counts = f"{row['left_early']} of {row['samples']} left"
            if "expected_us" in case:
                counts += f", at most {max(case['expected_us'].values()):.0f} expected of a tile"
            yield [*cells, _three(row["host_us"]), _three(row.get("device_us")), counts]
    bare = _result(sections, "latency").get("bare", {})
    for writer, row in bare.items():
        if "done_us" in row:
            yield ["idle device", writer, _three(row["done_us"])]


def _three(spread: dict[str, float] | None) -> str:
    return "-" if not spread else " / ".join(f"{spread[key]:.1f}" for key in ("p50", "p99", "max"))


def _polling(sections: dict[str, Any]) -> Iterable[Row]:
    for case in _result(sections, "polling").get("cases", []):
        name = f"{case['shape']} T={case['tokens']}"
        if "overhead" not in case:
            yield [name, case.get("error", "-")]
            continue
        yield [
            name,
            f"{case['overhead'] * 100:+.2f} %",
            f"({case['noise'] * 100:+.2f} %)",
            f"{case['without_us']['p50']:.1f}",
        ]


def _lanes(sections: dict[str, Any]) -> Iterable[Row]:
    found = _result(sections, "lanes")
    for case in found.get("gates", []):
        name = f"{case['shape']} T={case['tokens']}"
        if "error" in case:
            yield [name, case["error"]]
            continue
        ways = case.get("called_us", {}).items()
        yield [name, *(f"{way} {us['p50']:.0f}" for way, us in ways), case.get("graph", "")]
    for case in found.get("shares", []):
        name = f"{case['shape']} T={case['tokens']}"
        if "error" in case:
            yield [name, case["error"]]
        for part in case.get("parts", []):
            yield [
                name,
                f"{part['part']:.0%} of the programs",
                f"decode {part['decode_us'] / case['decode_alone_us']:.2f}x as long",
                f"{part['of_turns']:.2f}x of turns",
            ]


def _speed(sections: dict[str, Any]) -> Iterable[Row]:
    for case in _result(sections, "speed").get("cases", []):
        name = name_of(case)
        graph = (case.get("graph_us") or {}).get("qllm")
        if not graph:
            yield [name, case.get("error") or str(case.get("peers", "-"))]
            continue
        floor = f"{case['of_floor'] * 100:.0f} % of {case['bound_by']}" if "of_floor" in case else "-"
        ratios = ", ".join(f"{peer} {ratio['p50']:.2f}x" for peer, ratio in case["ratio"].items())
        if "times_faster_than_dense" in case:
            ratios += f"{', ' if ratios else ''}bf16 {case['times_faster_than_dense']['p50']:.2f}x"
        called = case.get("host_us", {}).get("qllm")
        called = f"as called {called['p50']:.0f}" if called else "-"
        yield [
            name,
            f"{graph['p50']:.1f}",
            floor,
            ratios or "-",
            called,
            "DIFFERS" if case.get("differ") else "",
        ]


def _phases(sections: dict[str, Any]) -> Iterable[Row]:
    for case in _result(sections, "speed").get("cases", []):
        cells = [name_of(case)]
        for name, phase in case.get("phases", {}).items():
            cell = f"{name} {phase['us']['p50']:.1f}"
            if "floor_us" in phase:
                cell += f" {phase['floor_us'] / phase['us']['p50'] * 100:.0f} % of {phase['bound_by']}"
            if phase.get("spills"):
                cell += f", {phase['spills']} SPILLS"
            cells.append(cell)
        if cells[1:]:
            yield cells


def _replay(sections: dict[str, Any]) -> Iterable[Row]:
    report = _result(sections, "replay").get("report")
    if not report:
        return
    yield ["policy", "LS TTFT p50 / p99 ms", "BE turnaround ms", "tokens/s", "exit p50 / p99 ms", "not done"]
    for name, s in {**report["policies"], "ls_alone": report["ls_alone"]}.items():
        ttft, pauses = s["ls"]["ttft_s"], s["preemptions"]["exit_s"]
        done = s["ls"]["completed"] + s["be"]["completed"]
        yield [
            name,
            f"{_ms(ttft['p50'])} / {_ms(ttft['p99'])}",
            _ms(s["be"]["turnaround_s"]["mean"]),
            "-" if s["tokens_per_s"] is None else f"{s['tokens_per_s']:.0f}",
            f"{_ms(pauses['p50'])} / {_ms(pauses['p99'])}",
            str(s["requests"] - done),
        ]


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.3g}"


if __name__ == "__main__":
    print_summary(json.loads(Path(sys.argv[1]).read_text()))
