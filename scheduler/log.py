"""What happened when: iterations and preemptions, noted by the lanes and the flag as they happen."""

from __future__ import annotations

import threading
from collections.abc import Callable

from qllm_ops.scheduler.core import Batch
from qllm_ops.scheduler.policies import BACKGROUND
from qllm_ops.scheduler.report import Pause, Span
from qllm_ops.scheduler.request import BE, LS

KEEP = 10_000


class Log:
    """Spans of both lanes, and one `Pause` per preemption: a pause that met an iteration in flight.

    The newest ``keep`` of each and as many older ones at most, so that an engine can serve for months;
    None: all.
    """

    def __init__(self, clock: Callable[[], float]):
        self.clock = clock
        self.keep: int | None = KEEP
        self.spans: list[Span] = []
        self.pauses: list[Pause] = []
        self.wasted_tiles = 0
        self.where: str | None = None  # between what the background lane would stand still now
        self._lock = threading.Lock()
        self._background: Batch | None = None
        self._open: Pause | None = None

    def begin(self, batch: Batch, granularity: str | None) -> None:
        if batch.lane == BACKGROUND:
            with self._lock:
                self._background, self.where = batch, granularity

    def count_waste(self, tiles: int) -> None:
        with self._lock:
            self.wasted_tiles += tiles

    def end(self, batch: Batch) -> None:
        now = self.clock()
        rows = batch.rows
        urgent = sum(row.request.priority >= LS for row in rows)
        with self._lock:
            if batch.lane == BACKGROUND:
                self._background = None
                self._parked(now, "end")
            self._add(
                self.spans,
                Span(
                    lane=batch.lane,
                    start_s=batch.started_s,
                    end_s=now,
                    kind=batch.kind,
                    ls_rows=urgent,
                    be_rows=len(rows) - urgent,
                    tokens=sum(len(row.tokens) for row in rows),
                    request_ids=[row.request.id for row in rows],
                ),
            )

    def flag_event(self, kind: str, priority: int, now: float) -> None:
        """For :class:`PriorityFlag`'s ``on_event``."""
        if priority != BE:
            return
        with self._lock:
            if kind == "pause" and self._background is not None:
                self._open = Pause(lane=BACKGROUND, asked_s=now, parked_s=None, resumed_s=None, where=None)
                self._add(self.pauses, self._open)
            elif kind == "park":
                self._parked(now, self.where)
            elif kind == "resume" and self._open is not None:
                self._open.resumed_s = now
                self._open = None

    def _parked(self, now: float, where: str) -> None:
        if self._open is not None and self._open.parked_s is None:
            self._open.parked_s, self._open.where = now, where

    def _add(self, to: list, entry: Span | Pause) -> None:
        to.append(entry)
        if self.keep is not None and len(to) > 2 * self.keep:
            del to[: -self.keep]
