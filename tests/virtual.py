"""A virtual engine: drives the scheduler as the engine's threads do, on a virtual clock with a fake model.

Time moves from event to event, so nothing sleeps and a run repeats exactly. A lane asks for work only when
the real one would: after a change that it is told of, or at its ``wake_s``. The fake model keeps every slot
of the KV pool and derives each token from what it reads there, so a region handed out twice, a position
left out or a row computed out of turn gives a wrong token if no assertion comes first.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from qllm_ops import FULL, PriorityFlag
from qllm_ops.scheduler.core import Batch, Limits, Outcome, Row, Scheduler
from qllm_ops.scheduler.policies import BACKGROUND, FOREGROUND, Policy
from qllm_ops.scheduler.request import BE, LS, Request, State

VOCABULARY = 11
EPSILON_S = 1e-9


def next_token(history: Sequence[int]) -> int:
    return zlib.crc32(bytes(history)) % VOCABULARY


def expected_tokens(prompt: Sequence[int], max_new_tokens: int, eos_token_id: int | None = None) -> list[int]:
    """What the fake model generates for a request, whoever it is batched with."""
    tokens: list[int] = []
    while len(tokens) < max_new_tokens and (not tokens or tokens[-1] != eos_token_id):
        tokens.append(next_token([*prompt, *tokens]))
    return tokens


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Fate:
    """What is wrong with a request, and what became of it."""

    request: Request
    poisoned: bool = False  # every batch that it is in raises
    bad_token: int | None = None  # the outcome of the row that samples this token is an error
    guilty: bool = False  # it may fail: something went wrong with it and nobody else
    computed: int = 0
    streamed: list[int] = field(default_factory=list)
    ends: int = 0


@dataclass
class Work:
    batch: Batch
    left_s: float
    hung: bool = False


class FakeModel:
    """Runs batches over a pool of slots, each of which remembers (request id, position, token)."""

    def __init__(self, slots: int, fates: dict[str, Fate]):
        self.slots: list[tuple | None] = [None] * slots
        self.fates = fates

    def begin(self, batch: Batch) -> None:
        for row in batch.rows:
            request = row.request
            assert row.start == self.fates[request.id].computed, f"{request.id}: a gap or a repetition"
            assert row.tokens, f"{request.id}: an empty row"
            assert list(row.tokens) == [*request.prompt, *request.tokens][row.start : row.end]
            assert row.samples == (row.end == len(request.prompt) + len(request.tokens))
            self._read(row, row.start)
            # Half-written from here on: what a failure leaves behind must be written again.
            for position in range(row.start, row.end):
                self.slots[request.region + position] = (batch.id, "busy")

    def end(self, batch: Batch) -> list[Outcome]:
        for row in batch.rows:
            for position, token in enumerate(row.tokens, start=row.start):
                slot = row.request.region + position
                assert self.slots[slot] == (batch.id, "busy"), f"{row.request.id}: its region was written to"
                self.slots[slot] = (row.request.id, position, token)
        if any(self.fates[row.request.id].poisoned for row in batch.rows):
            raise ArithmeticError("poisoned")
        return [self._outcome(row) for row in batch.rows]

    def _outcome(self, row: Row) -> Outcome:
        fate = self.fates[row.request.id]
        if row.samples and fate.bad_token == len(row.request.tokens):
            fate.guilty = True
            return ValueError("not a number")
        fate.computed = row.end
        return (next_token(self._read(row, row.end)), 1.0) if row.samples else None

    def _read(self, row: Row, end: int) -> list[int]:
        request = row.request
        kept = self.slots[request.region : request.region + end]
        assert [slot[:2] for slot in kept] == [(request.id, p) for p in range(end)], f"{request.id}: lost KV"
        return [slot[2] for slot in kept]


class VirtualEngine:
    """The engine without threads. ``cost``: seconds that a batch takes. ``on_end`` hears of every end."""

    def __init__(
        self,
        policy: str | Policy,
        limits: Limits,
        *,
        seed: int = 0,
        classes: int = 2,
        cost: Callable[[Batch], float] | None = None,
        on_end: Callable[[Request], None] = lambda request: None,
        chunk_multiple: int = 1,
    ):
        self.clock = Clock()
        self.flag = PriorityFlag(classes=classes, clock=self.clock)
        self.scheduler = Scheduler(
            policy, limits, flag=self.flag, clock=self.clock, chunk_multiple=chunk_multiple
        )
        self.limits = limits
        self.preempts = self.scheduler.policy.granularity is not None
        self.fates: dict[str, Fate] = {}
        self.open: dict[str, Fate] = {}
        self.model = FakeModel(limits.kv_tokens, self.fates)
        self.random = random.Random(seed)
        self.cost = cost or self._jittered_cost
        self.on_end = on_end
        self.lanes: dict[str, Work] = {}
        self.asking: set[str] = set(self.scheduler.policy.lanes)
        self.history: list[Batch] = []  # every batch that was started
        self.best_effort_s = 0.0  # time in which a batch of best-effort requests alone got on
        self._late: list[Request] = []  # ended, and on_end is still to hear of it

    # -- what a caller does ------------------------------------------------------------------------

    def submit(
        self,
        prompt: int | Sequence[int],
        priority: int = BE,
        new: int = 1,
        *,
        eos_token_id: int | None = None,
        poisoned: bool = False,
        bad_token: int | None = None,
    ) -> Request:
        """``prompt``: its tokens, or how many."""
        number = len(self.fates)
        ids = [self.random.randrange(256) for _ in range(prompt)] if isinstance(prompt, int) else list(prompt)
        request = Request(
            f"r{number}", ids, priority, new, eos_token_id=eos_token_id, arrival_s=self.clock.now
        )
        fate = Fate(request, poisoned, bad_token)
        request.on_token = lambda token: self._on_token(fate, token)
        request.on_end = lambda: self._on_end(fate)
        self.scheduler.submit(request)
        self.fates[request.id] = self.open[request.id] = fate
        self._changed()
        return request

    def cancel(self, request: Request) -> None:
        self.scheduler.cancel(request)
        self._changed()

    def stop(self, lane: str, error: str = "stopped") -> None:
        """The lane's thread dies, with what it was doing."""
        self.lanes.pop(lane, None)
        for fate in self.open.values():
            fate.guilty = True
        self.scheduler.abort(error, lane)
        if lane == FOREGROUND:
            self.scheduler.release()
        self.asking = set()

    # -- what the lanes do -------------------------------------------------------------------------

    def advance(self, seconds: float) -> None:
        self.run_until(lambda: False, seconds)

    def drain(self, limit_s: float) -> bool:
        """Run until no request is open; False if virtual time ``limit_s`` was not enough."""
        return self.run_until(lambda: self.scheduler.idle, limit_s)

    def run_until(self, condition: Callable[[], bool], limit_s: float) -> bool:
        """Run until ``condition`` holds; False if it did not within ``limit_s`` of virtual time."""
        give_up = self.clock.now + limit_s
        while True:
            self.settle()
            if condition():
                return True
            event_s = min(self._event_times(), default=math.inf)
            self._spend(min(event_s, give_up) - self.clock.now)
            self.clock.now = min(event_s, give_up)
            if event_s > give_up:
                return False
            self._fire()

    def break_lane(self, lane: str) -> None:
        """What the lane runs raises, for no fault of any request."""
        work = self.lanes.get(lane)
        if work is not None:
            self._fail(work, ArithmeticError("the device had a bad day"))

    def settle(self) -> None:
        """Let every lane ask that has a reason to, in any order, until none has."""
        self._hear()
        while self.asking:
            lane = self.random.choice(sorted(self.asking))
            self.asking.discard(lane)
            if lane in self.lanes:
                continue
            self.ask(lane)
            self._hear()
        self.check()

    def ask(self, lane: str) -> Batch | None:
        batch = self.scheduler.next(lane)
        if batch is not None:
            self._start(batch)
        if lane == FOREGROUND:
            self.asking |= {BACKGROUND} & set(self.scheduler.policy.lanes)
        return batch

    def _start(self, batch: Batch) -> None:
        busy = {row.request for work in self.lanes.values() for row in work.batch.rows}
        rows = [row.request for row in batch.rows]
        assert batch.rows, "an empty batch"
        assert len(set(rows)) == len(rows), "a request twice in one batch"
        assert busy.isdisjoint(rows), "a request in two batches"
        assert len(rows) <= self.limits.max_batch
        assert len(rows) == 1 or not any(r.alone for r in rows), "what failed together runs with others"
        assert not self.history or batch.id > self.history[-1].id
        assert all(self.fates[r.id].ends == 0 for r in rows), "an ended request runs"
        if batch.kind == "prefill":
            assert sum(len(row.tokens) for row in batch.rows) <= self.limits.prefill_tokens
            multiple = self.scheduler.chunk_multiple
            assert all(row.samples or row.end % multiple == 0 for row in batch.rows), (
                "a chunk of another size"
            )
        else:
            assert all(len(row.tokens) == 1 for row in batch.rows)
        if batch.lane == BACKGROUND:
            assert not any(r.priority >= LS for r in rows), "urgent work in the lane that is paused"
            assert not self.flag.paused(BE), "started while paused"
            assert not self._urgent_runs(), "started while the foreground is busy"
        self.model.begin(batch)
        self.lanes[batch.lane] = Work(batch, self.cost(batch))
        self.history.append(batch)

    def _fire(self) -> None:
        now = self.clock.now
        self.flag.expire()
        for work in list(self.lanes.values()):
            if not work.hung and work.left_s <= EPSILON_S:
                self._finish(work)
        self.asking |= {lane for lane, wake in self.scheduler.wake_s.items() if wake <= now + EPSILON_S}

    def _finish(self, work: Work) -> None:
        try:
            outcomes = self.model.end(work.batch)
        except ArithmeticError as error:
            self._fail(work, error)
            return
        del self.lanes[work.batch.lane]
        self.scheduler.complete(work.batch, outcomes)
        self._changed()

    def _fail(self, work: Work, error: Exception) -> None:
        if len(work.batch.rows) == 1:
            self.fates[work.batch.rows[0].request.id].guilty = True
        del self.lanes[work.batch.lane]
        self.scheduler.fail(work.batch, error)
        self._changed()

    def _changed(self) -> None:
        self.asking |= set(self.scheduler.policy.lanes) - set(self.lanes)

    # -- time --------------------------------------------------------------------------------------

    def _event_times(self) -> list[float]:
        now = self.clock.now
        times = [wake for lane, wake in self.scheduler.wake_s.items() if lane not in self.lanes]
        assert all(wake > now for wake in times), "asked to wake at once, again and again"
        for lane, work in self.lanes.items():
            if not work.hung and not (lane == BACKGROUND and self.flag.paused(BE)):
                times.append(now + max(work.left_s, 0.0))
            if lane == FOREGROUND and self._deadline(work) > now:
                times.append(self._deadline(work))
        return times

    def _spend(self, seconds: float) -> None:
        paused = self.flag.paused(BE)
        for lane, work in self.lanes.items():
            if not work.hung and not (lane == BACKGROUND and paused):
                work.left_s -= seconds
                if not work.batch.urgent:
                    self.best_effort_s += seconds

    def _deadline(self, work: Work) -> float:
        return work.batch.started_s + self.limits.pause_timeout_s

    def _urgent_runs(self) -> bool:
        work = self.lanes.get(FOREGROUND)
        return work is not None and self.clock.now < self._deadline(work)

    def _jittered_cost(self, batch: Batch) -> float:
        tokens = sum(len(row.tokens) for row in batch.rows)
        return (0.01 + 0.002 * tokens) * self.random.uniform(0.5, 2)

    # -- what must hold ----------------------------------------------------------------------------

    def _on_token(self, fate: Fate, token: int) -> None:
        assert fate.ends == 0, f"{fate.request.id}: a token after its end"
        fate.streamed.append(token)

    def _on_end(self, fate: Fate) -> None:
        request = fate.request
        fate.ends += 1
        assert fate.ends == 1, f"{request.id} ended twice"
        assert not request.open
        assert request.region is None
        del self.open[request.id]
        assert request.finish_s == self.clock.now
        want = expected_tokens(request.prompt, request.max_new_tokens, request.eos_token_id)
        assert fate.streamed == request.tokens == want[: len(request.tokens)]
        if request.state is State.DONE:
            assert request.tokens == want
            assert not fate.poisoned
        elif request.state is State.FAILED:
            assert fate.guilty, f"{request.id} failed for another's fault: {request.error!r}"
            assert request.error is not None
        else:
            assert request.cancelled, f"{request.id} was cancelled by nobody"
        self._late.append(request)

    def _hear(self) -> None:
        # Not from inside on_end: a real caller that answers with a new request does so after it.
        while self._late:
            self.on_end(self._late.pop(0))

    def check(self) -> None:
        """The laws that hold whenever every lane has had its say."""
        self._check_requests()
        self._check_memory()
        self._check_flag()
        self._check_nobody_idles()

    def _check_requests(self) -> None:
        open_ = [fate.request for fate in self.open.values()]
        assert set(self.open) == {r.id for r in self.scheduler.requests}
        running = {row.request.id for work in self.lanes.values() for row in work.batch.rows}
        assert {r.id for r in open_ if r.in_flight} == running
        for request in open_:
            assert request.open
            assert request.computed == self.fates[request.id].computed
            assert not (request.cancelled and not request.in_flight), f"{request.id} outlives its cancel"

    def _check_memory(self) -> None:
        used = 0
        kv, end = self.scheduler.kv, 0
        for request in sorted(
            (r for r in self.scheduler.requests if r.region is not None), key=lambda r: r.region
        ):
            assert request.region >= end, f"{request.id} overlaps another"
            end = request.region + request.kv_tokens
            if request.priority < LS:
                assert end <= kv.tokens - kv.reserve, f"{request.id} took of the reserve"
            used += request.kv_tokens
        assert end <= kv.tokens
        assert kv.free_tokens == kv.tokens - used, "KV was lost or made"

    def _check_flag(self) -> None:
        words = self.flag.read()
        assert words == tuple(self.flag.words.tolist())
        assert all(word == FULL for word in words[LS:]), "a class that is never paused was"
        behind = self.lanes.get(BACKGROUND)
        aged = behind is not None and any(self._aged(row.request) for row in behind.batch.rows)
        if words[BE] == 0:
            assert self._urgent_runs(), "a pause has outlived its owner"
            assert self.preempts, "a policy that never pauses did"
        elif behind is not None and not aged:
            assert not self._urgent_runs(), "best-effort work runs beside urgent work"

    def _check_nobody_idles(self) -> None:
        ready = [r for r in self.scheduler.requests if r.region is not None and not r.in_flight]
        if not self.lanes and not self.scheduler.wake_s:
            assert not self.scheduler.requests, "something is open and nobody will ever do it"
        if FOREGROUND not in self.lanes and FOREGROUND not in self.scheduler.wake_s:
            assert not any(r.priority >= LS for r in ready), "the foreground idles"
        if BACKGROUND in self.scheduler.policy.lanes and BACKGROUND not in self.lanes:
            waiting = [r for r in ready if r.priority < LS]
            assert self._urgent_runs() or not waiting, "the background idles"
        elif not self.lanes:
            assert not ready, "the only lane idles"

    def _aged(self, request: Request) -> bool:
        age = self.limits.aging_s
        return age is not None and self.clock.now >= request.arrival_s + age
