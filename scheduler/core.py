"""The scheduler: requests, queues, KV memory and pauses as a state machine.

No threads, no tensors, no sleeping: whoever drives it says when a lane is free and what came of its
batch, and the clock is an argument. The engine drives it with two threads and a model, the tests
with a virtual clock and a seeded random source. The driver must not call it from two threads at once.
"""

from __future__ import annotations

import math
import time
from bisect import insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from qllm_ops import PriorityFlag
from qllm_ops.arguments import is_integer, is_number
from qllm_ops.scheduler.kv import KVBudget
from qllm_ops.scheduler.policies import BACKGROUND, FOREGROUND, Plan, Policy, View, get_policy
from qllm_ops.scheduler.request import BE, LS, Request, RequestError, State, as_int


@dataclass(frozen=True)
class Limits:
    """What an engine may use. Token counts, rows, seconds.

    Args:
        kv_tokens: KV memory, in tokens, shared by all requests.
        kv_reserve: the part of it that best-effort requests may not take, aged ones neither; None: an eighth.
        max_batch: rows of a decode batch.
        prefill_tokens: tokens of a prefill iteration; longer prompts go in chunks of at most this size.
        top_up_tokens: best-effort prompt tokens that may ride in an urgent prefill iteration. Each
            delays the urgent ones where prefill is bound by arithmetic, hence 0.
        be_floor: share of the time in which urgent and best-effort work compete that is given to
            best-effort work, 0 to below 1.
        be_slice_s: in slices of this length, seconds.
        aging_s: age at which a best-effort request counts as latency-sensitive and queues with those,
            by arrival; None: never.
        pause_timeout_s: deadline of a pause. Renewed by every urgent iteration, so it ends only the
            pauses of a lane that hangs or died.
    """

    kv_tokens: int = 32768
    kv_reserve: int | None = None
    max_batch: int = 8
    prefill_tokens: int = 2048
    top_up_tokens: int = 0
    be_floor: float = 0.05
    be_slice_s: float = 0.05
    aging_s: float | None = None
    pause_timeout_s: float = 30.0

    def __post_init__(self):
        for name in ("kv_tokens", "kv_reserve", "max_batch", "prefill_tokens", "top_up_tokens"):
            object.__setattr__(self, name, as_int(getattr(self, name)))  # the fields are frozen
        if self.kv_reserve is None and is_integer(self.kv_tokens):
            object.__setattr__(self, "kv_reserve", self.kv_tokens // 8)
        KVBudget(self.kv_tokens, self.kv_reserve)  # says what is wrong with these two
        for name in ("max_batch", "prefill_tokens"):
            value = getattr(self, name)
            if not is_integer(value) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if not is_integer(self.top_up_tokens) or self.top_up_tokens < 0:
            raise ValueError(f"top_up_tokens must be an integer of 0 or more, got {self.top_up_tokens!r}")
        if not is_number(self.be_floor) or not 0 <= self.be_floor < 1:
            raise ValueError(f"be_floor must be from 0 to below 1, got {self.be_floor!r}")
        for name in ("be_slice_s", "pause_timeout_s", "aging_s"):
            value = getattr(self, name)
            if not (name == "aging_s" and value is None) and not (is_number(value) and value > 0):
                raise ValueError(f"{name} must be positive, got {value!r}")


@dataclass(frozen=True)
class Row:
    """One request's part of an iteration: ``tokens`` go in at position ``start``."""

    request: Request
    start: int
    tokens: list[int]
    samples: bool  # whether the row's last logits yield a token (not so for a chunk of a prompt)

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


@dataclass(frozen=True, eq=False)
class Batch:
    """One iteration of one lane."""

    id: int
    lane: str
    kind: str
    rows: tuple[Row, ...]
    started_s: float

    @property
    def urgent(self) -> bool:
        return any(row.request.priority >= LS for row in self.rows)


Outcome = tuple[int, float] | BaseException | None
"""What a row came to: (token, margin), an error of that row alone, or None where nothing is sampled."""


class Scheduler:
    """Decides what runs and what is paused; see the module's docstring for how it is driven.

    Where a chunk of a prompt is not its end, it ends at a multiple of ``chunk_multiple``.

    The driver's loop, per lane: ``next(lane)``; run the batch; ``complete(batch, outcomes)`` or
    ``fail(batch, error)``. When ``next`` gives None, ask again after anything has changed (for
    the background lane that includes what the foreground was given, and the end of the pause if it is
    ``held``), or at ``wake_s[lane]`` if that is set.
    """

    def __init__(
        self,
        policy: str | Policy,
        limits: Limits | None = None,
        *,
        flag: PriorityFlag | None = None,
        clock: Callable[[], float] = time.monotonic,
        chunk_multiple: int = 1,
    ):
        self.policy = get_policy(policy)
        if limits is not None and not isinstance(limits, Limits):
            raise TypeError(f"limits must be Limits or None, got {type(limits).__name__}")
        self.limits = limits or Limits()
        if self.limits.prefill_tokens < chunk_multiple:
            raise ValueError(
                f"prefill_tokens must be at least {chunk_multiple}, because chunks of a prompt end at "
                f"multiples of that in a batch-invariant engine, got {self.limits.prefill_tokens}"
            )
        self.chunk_multiple = chunk_multiple
        self.clock = clock
        self.flag = flag or PriorityFlag(clock=clock)
        self.kv = KVBudget(self.limits.kv_tokens, self.limits.kv_reserve)
        self.requests: list[Request] = []  # the open ones, by arrival
        self._ids: set[str] = set()  # theirs
        self.running: dict[str, Batch] = {}
        self.wake_s: dict[str, float] = {}
        self.held = False  # whether the lane that asked last got nothing because it is paused
        self._batches = 0
        self._prefills = dict.fromkeys(self.policy.lanes, 0)  # in a row, per lane
        floor = self.limits.be_floor if self.policy.by_class else 0.0
        self._owed_per_s = floor / (1 - floor)
        self._owed_s = 0.0  # best-effort time that the floor owes
        self._settled_s = self.clock()  # what is owed was last brought up to date
        self._slice_until = -math.inf

    # -- requests --------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Queue a request. A ValueError says what is wrong with it; nothing else is affected."""
        request.check()
        if not request.prompt:
            raise ValueError(f"request {request.id!r}: prompt must hold at least one token")
        if request.max_new_tokens < 1:
            raise ValueError(
                f"request {request.id!r}: max_new_tokens must be at least 1, got {request.max_new_tokens}"
            )
        if not 0 <= request.priority < self.flag.classes:
            raise ValueError(
                f"request {request.id!r}: priority must be from 0 to {self.flag.classes - 1}, "
                f"got {request.priority}"
            )
        limit = self.kv.limit(urgent=request.priority >= LS)
        if request.kv_tokens > limit:
            raise ValueError(
                f"request {request.id!r}: {len(request.prompt)} prompt + {request.max_new_tokens} new tokens "
                f"need {request.kv_tokens} tokens of KV memory; its class can have {limit} "
                f"(kv_tokens={self.kv.tokens}, kv_reserve={self.kv.reserve})"
            )
        if request.id in self._ids:
            raise ValueError(f"request id {request.id!r} is in use by an open request")
        self._ids.add(request.id)
        insort(self.requests, request, key=lambda r: r.arrival_s)

    def cancel(self, request: Request) -> None:
        """End a request. One that is part of an iteration ends with that iteration."""
        if not request.open:
            return
        request.cancelled = True
        if not request.in_flight:
            self._end(request, State.CANCELLED)

    # -- lanes -----------------------------------------------------------------------------------

    def next(self, lane: str) -> Batch | None:
        """The batch that ``lane`` should run now; lower classes are paused as the policy wants."""
        if lane in self.running:
            raise RuntimeError(f"the {lane} lane has not ended its batch yet")
        if lane not in self.policy.lanes:
            return None
        now = self.clock()
        self.wake_s.pop(lane, None)
        self.held = lane == BACKGROUND and self.flag.paused(BE)
        plan = None if self.held else self.policy.next_batch(lane, self._view(lane, now))
        if plan is None:
            self._stand_by(lane, now)
            return None
        self._batches += 1
        batch = Batch(self._batches, lane, plan.kind, tuple(self._rows(plan)), now)
        for row in batch.rows:
            row.request.state = State.RUNNING
            row.request.in_flight = True
        self._prefills[lane] = self._prefills[lane] + 1 if plan.kind == "prefill" else 0
        self.running[lane] = batch
        if lane == FOREGROUND and self.policy.granularity is not None:
            self._pause(now)
        return batch

    def complete(self, batch: Batch, outcomes: Sequence[Outcome]) -> None:
        """The batch ran; ``outcomes`` holds one entry per row."""
        if len(outcomes) != len(batch.rows):
            raise ValueError(f"outcomes must hold one entry per row: {len(batch.rows)}, got {len(outcomes)}")
        self._retire(batch)
        for row, outcome in zip(batch.rows, outcomes, strict=True):
            request = row.request
            if isinstance(outcome, BaseException):
                request.error = outcome
                self._end(request, State.FAILED)
                continue
            request.alone = False
            request.computed = row.end
            if row.samples:
                self._token(request, *outcome)
            if request.open and request.cancelled:
                self._end(request, State.CANCELLED)

    def fail(self, batch: Batch, error: BaseException) -> None:
        """The batch raised. Its requests are tried again one by one, so that only the guilty one fails.

        That is safe because an iteration writes keys and values for its own positions and nothing else.
        """
        self._retire(batch)
        for row in batch.rows:
            if row.request.cancelled:
                self._end(row.request, State.CANCELLED)
            elif len(batch.rows) == 1:
                row.request.error = error
                self._end(row.request, State.FAILED)
            else:
                row.request.alone = True

    def abort(self, error: str, lane: str) -> None:
        """``lane`` has ended for good: end its requests, and those that no lane has in flight.

        A batch of the other lane still completes; when that lane ends too, nothing is left open.
        """
        batch = self.running.pop(lane, None)
        for row in batch.rows if batch else ():
            row.request.in_flight = False
        for request in [r for r in self.requests if not r.in_flight]:
            request.error = RequestError(error)
            self._end(request, State.FAILED)

    # -- how a batch is made ---------------------------------------------------------------------

    def _view(self, lane: str, now: float) -> View:
        if lane == FOREGROUND:
            self._credit_idle_time(now)
        ready = sorted((r for r in self.requests if not r.in_flight), key=lambda r: -self._class(r, now))
        self._admit(ready, now)
        urgent: list[Request] = []
        patient: list[Request] = []
        for request in ready:
            if request.region is not None:
                # The background lane minds no age, so an aged request has a way should the foreground hang.
                seen_as = self._class(request, now) if lane == FOREGROUND else request.priority
                (urgent if seen_as >= LS else patient).append(request)
        can_run = bool(patient) or BACKGROUND in self.running
        return View(
            ls_prefill=[r for r in urgent if r.prefilling],
            ls_decode=[r for r in urgent if not r.prefilling],
            be_prefill=[r for r in patient if r.prefilling],
            be_decode=[r for r in patient if not r.prefilling],
            foreground_busy=FOREGROUND in self.running and now < self._trusted_until,
            best_effort_due=lane == FOREGROUND and self._slice_is_due(now, can_run),
            prefills=self._prefills[lane],
            max_batch=self.limits.max_batch,
            top_up_tokens=self.limits.top_up_tokens,
        )

    def _class(self, request: Request, now: float) -> int:
        age = self.limits.aging_s
        aged = age is not None and now >= request.arrival_s + age
        return max(request.priority, LS) if aged else request.priority

    def _admit(self, ready: Iterable[Request], now: float) -> None:
        """Give regions in order, and none to anyone behind one that does not fit yet, so that a large
        request is not overtaken for ever.

        The floor is worth nothing without memory: best-effort work that has been crowded out of it
        goes first, and if it does not fit yet, urgent requests get no more than the reserve.
        """
        waiting = [r for r in ready if r.region is None]
        if not self.policy.by_class:
            waiting.sort(key=lambda r: r.arrival_s)
        patient = next((r for r in waiting if r.priority < LS), None)
        crowded = patient is not None and self._crowded_out(now) and not self._place(patient)
        for request in waiting:
            if request.region is None and not self._place(request, reserve_only=crowded):
                return

    def _place(self, request: Request, reserve_only: bool = False) -> bool:
        urgent = request.priority >= LS
        request.region = self.kv.take(request.kv_tokens, urgent, reserve_only=reserve_only)
        return request.region is not None

    def _rows(self, plan: Plan) -> list[Row]:
        first = plan.requests[0]
        together = [first] if first.alone else [r for r in plan.requests if not r.alone]
        riders = [] if first.alone else [r for r in plan.riders if not r.alone]
        if plan.kind == "decode":
            return [self._row(r, 1) for r in together[: self.limits.max_batch]]
        rows: list[Row] = []
        budget = self.limits.prefill_tokens
        for request in together[: self.limits.max_batch]:
            budget = self._add(rows, request, budget)
        budget = min(budget, plan.rider_tokens)
        for request in riders[: self.limits.max_batch - len(rows)]:
            budget = self._add(rows, request, budget)
        return rows

    def _add(self, rows: list[Row], request: Request, budget: int) -> int:
        """Add what fits of a prompt, if anything does; the budget that is left."""
        left = len(request.prompt) - request.computed
        length = left if left <= budget else budget - budget % self.chunk_multiple
        if length > 0:
            rows.append(self._row(request, length))
        return budget - length

    @staticmethod
    def _row(request: Request, limit: int) -> Row:
        tokens = request.pending(limit)
        samples = request.computed + len(tokens) >= len(request.prompt)
        return Row(request, request.computed, tokens, samples)

    # -- what comes of it ------------------------------------------------------------------------

    def _retire(self, batch: Batch) -> None:
        if self.running.get(batch.lane) is not batch:
            raise RuntimeError(f"batch {batch.id} is not running in the {batch.lane} lane")
        del self.running[batch.lane]
        for row in batch.rows:
            row.request.in_flight = False
        if batch.lane == FOREGROUND:
            self._charge(batch, self.clock())

    def _token(self, request: Request, token: int, margin: float) -> None:
        now = self.clock()
        if request.first_token_s is None:
            request.first_token_s = now
        request.tokens.append(token)
        request.margins.append(margin)
        if request.on_token is not None:
            try:
                request.on_token(token)
            except Exception as error:  # harms nobody else
                request.error = error
                self._end(request, State.FAILED)
                return
        if len(request.tokens) >= request.max_new_tokens or token in request.ends:
            self._end(request, State.DONE)

    def _end(self, request: Request, state: State) -> None:
        request.state = state
        request.finish_s = self.clock()
        if request.region is not None:
            self.kv.give_back(request.region, request.kv_tokens)
            request.region = None
        self.requests.remove(request)
        self._ids.remove(request.id)
        if request.on_end is not None:
            request.on_end()

    # -- pauses and the floor --------------------------------------------------------------------

    def _pause(self, now: float) -> None:
        behind = self.running.get(BACKGROUND)
        if behind is not None and any(self._class(row.request, now) >= LS for row in behind.rows):
            self.release()  # it holds an aged request, which only running can bring to its end
            return
        for c in range(LS):
            self.flag.pause(c, owner=self, timeout_s=self.limits.pause_timeout_s)

    def release(self) -> None:
        """Let best-effort work run; the driver calls it too when the foreground lane ends."""
        for c in range(LS):
            self.flag.resume(c, owner=self)

    def _stand_by(self, lane: str, now: float) -> None:
        """There is nothing for ``lane`` now; note when there may be, other than by an event."""
        if lane == FOREGROUND:
            self.release()
            times = [self._slice_until]
            if self.limits.aging_s is not None:  # when the next one is urgent by its age
                times += [r.arrival_s + self.limits.aging_s for r in self.requests if not r.in_flight]
            if times := [t for t in times if t > now]:
                self.wake_s[lane] = min(times)
        elif FOREGROUND in self.running and now < self._trusted_until:
            self.wake_s[lane] = self._trusted_until

    @property
    def _trusted_until(self) -> float:
        """When the foreground's iteration is taken for hung; its pause ends then, too."""
        return self.running[FOREGROUND].started_s + self.limits.pause_timeout_s

    # What the floor owes grows with every urgent iteration that leaves best-effort work behind, and
    # shrinks by the time that best-effort work gets, in a slice or because nothing urgent is there.

    def _charge(self, batch: Batch, now: float) -> None:
        took = min(now, batch.started_s + self.limits.pause_timeout_s) - batch.started_s
        riding = {row.request for row in batch.rows}
        if not batch.urgent:
            # More than was owed counts against the next slice, but only this once.
            self._owed_s = max(self._owed_s, 0.0) - took
        elif any(r.priority < LS and r not in riding for r in self.requests):
            self._owed_s += self._owed_per_s * took
        self._settled_s = now

    def _credit_idle_time(self, now: float) -> None:
        best_effort = [r for r in self.requests if r.priority < LS]
        if not best_effort:
            self._owed_s = 0.0
        elif self._owed_s > 0 and any(r.region is not None for r in best_effort):
            self._owed_s = max(self._owed_s - (now - self._settled_s), 0.0)
        self._settled_s = now

    def _slice_is_due(self, now: float, can_run: bool) -> bool:
        """Whether urgent work must stand back now so that best-effort work gets its floor."""
        if not can_run:
            # No slice for nobody; nor a huge one later for all the time without memory.
            self._owed_s, self._slice_until = min(self._owed_s, self.limits.be_slice_s), -math.inf
        elif self._owed_s >= self.limits.be_slice_s and now >= self._slice_until:
            self._slice_until = now + self._owed_s
        return now < self._slice_until

    def _crowded_out(self, now: float) -> bool:
        """Whether best-effort work holds no memory though it is owed time, or though nobody else runs."""
        if FOREGROUND in self.running and now >= self._trusted_until:
            return True
        held = any(r.priority < LS and r.region is not None for r in self.requests)
        return self._owed_s >= self.limits.be_slice_s and not held

    @property
    def idle(self) -> bool:
        """No open request is left."""
        return not self.requests
