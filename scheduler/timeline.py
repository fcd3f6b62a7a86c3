"""The runs as a timeline that opens in Perfetto (https://ui.perfetto.dev): Chrome's trace event format.

One process per run. Its threads: the lanes with an iteration per slice, the pauses with the way out as an
inner slice, and the requests with waiting and generating as inner slices. Slices of one thread must nest or
stand apart, so what overlaps is spread over several threads of the same name.
"""

from __future__ import annotations

import heapq
import json
from pathlib import Path
from typing import Any

from qllm_ops.scheduler.records import LS_ALONE, Finished, Pause, RunRecord, Span

Event = dict[str, Any]


def write_perfetto(runs: dict[str, RunRecord], path: str | Path) -> None:
    """Write ``runs`` (by policy name) to ``path`` as a Chrome trace; times become whole microseconds."""
    trace = {"traceEvents": trace_events(runs), "displayTimeUnit": "ms"}
    # Compact: a replay has tens of thousands of events.
    Path(path).write_text(json.dumps(trace, allow_nan=False, separators=(",", ":")), encoding="utf-8")


def trace_events(runs: dict[str, RunRecord]) -> list[Event]:
    """The events of every run, one process each, in the order of ``runs``."""
    events: list[Event] = []
    tid = len(runs)  # Perfetto wants thread ids unique over all processes, and reads tid == pid as "main"
    for pid, (name, run) in enumerate(runs.items(), start=1):
        label = "LS alone" if name == LS_ALONE else name
        events.append(_named("process_name", pid, pid, name=label))
        events.append(_named("process_sort_index", pid, pid, sort_index=pid))
        lanes = sorted({span.lane for span in run.spans}, reverse=True)  # foreground before background
        tracks = [(lane, [_iteration(s) for s in run.spans if s.lane == lane]) for lane in lanes]
        tracks.append(("pauses", [_pause(p) for p in run.pauses]))
        for title, urgent in (("LS requests", True), ("BE requests", False)):
            tracks.append((title, [_request(f) for f in run.finished if (f.priority > 0) == urgent]))
        for title, families in tracks:
            for row in _rows(families):
                tid += 1
                events.append(_named("thread_name", pid, tid, name=title))
                events.append(_named("thread_sort_index", pid, tid, sort_index=tid))
                events.extend({**event, "pid": pid, "tid": tid} for family in row for event in family)
    return events


def _iteration(span: Span) -> list[Event]:
    who = "+".join(name for name, rows in (("LS", span.ls_rows), ("BE", span.be_rows)) if rows)
    args = {
        "ls_rows": span.ls_rows,
        "be_rows": span.be_rows,
        "tokens": span.tokens,
        "requests": list(span.request_ids),
    }
    return [_slice(f"{who} {span.kind}".strip(), span.kind, span.start_s, span.end_s, args)]


def _pause(pause: Pause) -> list[Event]:
    args: dict[str, Any] = {"lane": pause.lane, "where": pause.where}
    if pause.parked_s is None:
        return [_slice("pause, nothing to stop", "pause", pause.asked_s, pause.resumed_s, args)]
    args["exit_us"] = round((pause.parked_s - pause.asked_s) * 1e6, 3)
    return [
        _slice(f"pause at {pause.where}", "pause", pause.asked_s, pause.resumed_s, args),
        # A lane may come to stand still just as it is let go: the inner slice must not stick out.
        _slice("exit", "pause", pause.asked_s, min(pause.parked_s, pause.resumed_s), {}),
    ]


def _request(request: Finished) -> list[Event]:
    args = {
        "status": request.status,
        "prompt_tokens": request.prompt_tokens,
        "output_tokens": request.output_tokens,
        "ttft_ms": None if request.ttft_s is None else round(request.ttft_s * 1e3, 3),
        **({"error": request.error} if request.error else {}),
    }
    start, first, end = request.arrival_s, request.first_token_s, request.finish_s
    events = [
        _slice(request.id, "request", start, end, args),
        _slice("to first token", "request", start, end if first is None else first, {}),
    ]
    if first is not None:
        events.append(_slice("generating", "request", first, end, {}))
    arrival = {"name": f"{request.id} arrives", "cat": "arrival", "ph": "i", "s": "t", "ts": _us(start)}
    return [*events, arrival]


def _slice(name: str, category: str, start_s: float, end_s: float, args: dict[str, Any]) -> Event:
    # Whole microseconds, both ends rounded alike: what nested or touched before still does.
    ts, end = _us(start_s), _us(end_s)
    return {"name": name, "cat": category, "ph": "X", "ts": ts, "dur": max(end - ts, 0), "args": args}


def _us(seconds: float) -> int:
    return round(seconds * 1e6)


def _named(what: str, pid: int, tid: int, **args: Any) -> Event:
    return {"name": what, "ph": "M", "ts": 0, "pid": pid, "tid": tid, "args": args}


def _rows(families: list[list[Event]]) -> list[list[list[Event]]]:
    """Spread families (an outer slice first, then what lies in it) over the fewest rows without overlap."""
    rows: list[list[list[Event]]] = []
    free: list[tuple[int, int]] = []  # a heap of (end of a row's last family, row)
    for family in sorted(families, key=lambda family: family[0]["ts"]):
        ts, end = family[0]["ts"], family[0]["ts"] + family[0]["dur"]
        if free and free[0][0] <= ts:
            _, row = heapq.heappop(free)
        else:
            row = len(rows)
            rows.append([])
        rows[row].append(family)
        heapq.heappush(free, (end, row))
    return rows
