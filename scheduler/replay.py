"""Replays a workload on an engine, open-loop, and says what became of every request.

Open-loop: requests are submitted when the workload says so, however far behind the engine is. A
request's time begins at its scheduled arrival, so a late submission counts against the engine.

Prompts and seeds are functions of (seed, request id) alone, so all policies get the same requests, and
every request generates exactly as many tokens as the workload says: there is no end-of-sequence token.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from qllm_ops.scheduler.core import Limits
from qllm_ops.scheduler.engine import Engine
from qllm_ops.scheduler.policies import Policy, get_policy
from qllm_ops.scheduler.records import LS_ALONE, Finished, Pause, RunRecord
from qllm_ops.scheduler.request import BE, LS, Handle, State
from qllm_ops.scheduler.workload import Arrival, prompt_ids

DRAIN_TIMEOUT_S = 600.0
"""How long after the last arrival a run may go on before what is left is cancelled."""

GRACE_S = 60.0
"""How long the iterations that run may then still take to end."""

PROGRESS_S = 0.25
"""Shortest time between two reports of progress: each holds the interpreter for about a millisecond."""

SLO_ITERATIONS = 10
"""The paper's SLO is ten un-contended decode iterations."""

STATUS = {State.DONE: "done", State.FAILED: "failed", State.CANCELLED: "cancelled"}


@dataclass(frozen=True)
class Progress:
    """How far a run has come. Requests count as done whatever way they ended; ``ended`` is the last word."""

    ls_done: int
    ls_total: int
    be_done: int
    be_total: int
    elapsed_s: float
    ended: bool = False


def run_all(
    model: torch.nn.Module,
    arrivals: Sequence[Arrival],
    policies: Iterable[str | Policy],
    *,
    limits: Limits | None = None,
    seed: int = 0,
    backend: str = "auto",
    gate: str = "host",
    batch_invariant: bool = False,
    slo_s: float | None = None,
    drain_timeout_s: float = DRAIN_TIMEOUT_S,
    progress: Callable[[str, Progress], None] | None = None,
) -> tuple[dict[str, RunRecord], float]:
    """LS alone (on the engine of "tile"), then every policy on the same requests.

    Args:
        slo_s: bound on LS TTFT in seconds; measured with :func:`measure_slo` if None.
        progress: called as ``progress(run's name, progress)``, at most four times a second, and once at
            the end of every run.

    Returns:
        The runs by name, "ls_alone" first if there are LS requests, and the SLO in seconds.
    """
    options = {
        "limits": limits, "seed": seed, "backend": backend, "gate": gate, "batch_invariant": batch_invariant,
    }  # fmt: skip
    plan = [(LS_ALONE, "tile", [a for a in arrivals if a.priority >= LS])]
    plan += [(get_policy(policy).name, policy, arrivals) for policy in policies]
    if slo_s is None:
        slo_s = measure_slo(model, **options)
    runs: dict[str, RunRecord] = {}
    for name, policy, load in plan:
        if not load:
            continue
        tell = None if progress is None else (lambda p, name=name: progress(name, p))
        run = replay(model, load, policy, **options, drain_timeout_s=drain_timeout_s, progress=tell)
        run.policy = name
        runs[name] = run
    return runs, slo_s


def replay(
    model: torch.nn.Module,
    arrivals: Sequence[Arrival],
    policy: str | Policy,
    *,
    limits: Limits | None = None,
    seed: int = 0,
    backend: str = "auto",
    gate: str = "host",
    batch_invariant: bool = False,
    temperature: float = 0.0,
    top_p: float = 1.0,
    drain_timeout_s: float = DRAIN_TIMEOUT_S,
    progress: Callable[[Progress], None] | None = None,
) -> RunRecord:
    """Serve ``arrivals`` under one policy, after a warm-up that is not in the figures.

    A request that the engine refuses (its prompt does not fit the KV budget, say) is recorded as
    "refused" with the reason, one that fails as "failed"; the others go on. What has not ended
    ``drain_timeout_s`` after the last arrival is cancelled, and ``extra["timed_out"]`` says how many
    requests that were. An exception, Ctrl-C included, closes the engine on its way out.

    Args:
        model, backend, gate, batch_invariant: as for :class:`Engine`.
        seed: of the prompts and, where ``temperature`` is above 0, of each request's own sampling.

    Returns:
        What happened, in seconds from the start of the workload. ``extra["submit_late_max_s"]`` is how
        late the latest submission was.

    Raises:
        ValueError: there are no arrivals, or the engine refuses the model, the limits or the policy.
        RuntimeError: an iteration still runs `GRACE_S` after everything was cancelled.
    """
    arrivals = sorted(arrivals, key=lambda a: a.arrival_s)
    if not arrivals:
        raise ValueError("arrivals must hold at least one request, got none")
    engine = Engine(
        model, policy=policy, limits=limits, backend=backend, gate=gate, batch_invariant=batch_invariant
    )
    engine.log.keep = None  # the record is of all of it
    stuck = False
    try:
        warm_up(engine, max(a.prompt_tokens for a in arrivals))
        prompts = {a.id: prompt_ids(a, engine.runner.vocab_size, seed) for a in arrivals}
        seen = len(engine.log.spans), len(engine.log.pauses)
        run = _Run(engine, arrivals, drain_timeout_s, progress)
        run.serve(
            lambda a, arrival_s: engine.submit(
                prompts[a.id],
                priority=a.priority,
                max_new_tokens=a.output_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=request_seed(seed, a.id),
                id=a.id,
                arrival_s=arrival_s,
            )
        )
        stuck = not engine.drain(GRACE_S)
        if stuck:
            raise RuntimeError(
                f"policy {engine.scheduler.policy.name}: {len(engine.scheduler.requests)} requests are in an "
                f"iteration that has not ended {GRACE_S:.0f} s after they were cancelled; the run is given up"
            )
    finally:
        if not stuck:  # closing would wait for that iteration
            engine.close()
    return run.record(*seen)


def request_seed(seed: int, request_id: str) -> int:
    """The sampling seed of one request, from 0 to below 2**63."""
    # Not hash(): Python salts it per process.
    digest = hashlib.sha256(f"sampling:{seed}:{request_id}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class _Run:
    """One pass over the arrivals: submits, waits, and turns what the engine noted into a record."""

    def __init__(
        self,
        engine: Engine,
        arrivals: list[Arrival],
        drain_timeout_s: float,
        progress: Callable[[Progress], None] | None,
    ):
        self.engine, self.arrivals, self.drain_timeout_s = engine, arrivals, drain_timeout_s
        self.progress = progress
        self.handles: dict[str, Handle] = {}
        self.refused: dict[str, str] = {}
        self.timed_out = 0
        self.late_s = 0.0
        self.start_s = 0.0
        self._told_s = 0.0
        self._totals = [sum((a.priority >= LS) == urgent for a in arrivals) for urgent in (True, False)]

    def serve(self, submit: Callable[[Arrival, float], Handle]) -> None:
        """Submit everything on time and wait until it has ended, or cancel it."""
        clock = self.engine.clock
        self.start_s = clock()
        for arrival in self.arrivals:
            due_s = self.start_s + arrival.arrival_s
            self._sleep_until(due_s)
            self.late_s = max(self.late_s, clock() - due_s)
            try:
                self.handles[arrival.id] = submit(arrival, due_s)
            except ValueError as error:
                self.refused[arrival.id] = str(error)
        give_up_s = clock() + self.drain_timeout_s
        while not self.engine.drain(min(PROGRESS_S, max(give_up_s - clock(), 0.0))):
            self._tell()
            if clock() >= give_up_s:
                left = [h for h in self.handles.values() if not h.done]
                self.timed_out = len(left)
                for handle in left:
                    handle.cancel()
                break
        self._tell(last=True)

    def _sleep_until(self, due_s: float) -> None:
        while (rest := due_s - self.engine.clock()) > 0:
            time.sleep(min(rest, PROGRESS_S) if self.progress else rest)
            self._tell()

    def _tell(self, last: bool = False) -> None:
        now = self.engine.clock()
        if self.progress is None or (now - self._told_s < PROGRESS_S and not last):
            return
        self._told_s = now
        ended = [h.request.priority >= LS for h in self.handles.values() if h.done]
        urgent = {a.id: a.priority >= LS for a in self.arrivals}
        ended += [urgent[id] for id in self.refused]
        ls_total, be_total = self._totals
        ls, be = sum(ended), len(ended) - sum(ended)
        self.progress(Progress(ls, ls_total, be, be_total, now - self.start_s, last))

    # -- the record, once the engine is closed ---------------------------------------------------------

    def record(self, first_span: int, first_pause: int) -> RunRecord:
        """What happened after the warm-up, on the workload's clock."""
        log = self.engine.log
        finished = [self._finished(a) for a in self.arrivals]
        done = [f.finish_s for f in finished if f.status == "done"]
        spans = log.spans[first_span:]
        for span in spans:
            span.start_s -= self.start_s
            span.end_s -= self.start_s
        extra = {"submit_late_max_s": self.late_s, "pauses_expired": self.engine.flag.expired}
        if self.timed_out:
            extra["timed_out"] = self.timed_out
        return RunRecord(
            policy=self.engine.scheduler.policy.name,
            wall_s=max(done, default=0.0),
            finished=finished,
            pauses=[self._pause(p) for p in log.pauses[first_pause:]],
            spans=spans,
            wasted_tiles=log.wasted_tiles,
            extra=extra,
        )

    def _pause(self, pause: Pause) -> Pause:
        pause.asked_s -= self.start_s
        pause.resumed_s -= self.start_s
        if pause.parked_s is not None:
            pause.parked_s -= self.start_s
        return pause

    def _finished(self, arrival: Arrival) -> Finished:
        size = {"prompt_tokens": arrival.prompt_tokens, "priority": arrival.priority}
        if arrival.id in self.refused:
            return Finished(
                arrival.id,
                arrival_s=arrival.arrival_s,
                first_token_s=None,
                finish_s=arrival.arrival_s,
                output_tokens=0,
                status="refused",
                error=self.refused[arrival.id],
                **size,
            )
        request = self.handles[arrival.id].request
        first_s = request.first_token_s
        error = request.error
        return Finished(
            arrival.id,
            arrival_s=arrival.arrival_s,
            first_token_s=None if first_s is None else first_s - self.start_s,
            finish_s=request.finish_s - self.start_s,
            output_tokens=len(request.tokens),
            status=STATUS[request.state],
            error=None if error is None else f"{type(error).__name__}: {error}",
            tokens=list(request.tokens),
            margins=list(request.margins),
            **size,
        )


# -- before the clock runs -----------------------------------------------------------------------------


def warm_up(engine: Engine, longest_prompt: int) -> None:
    """Run iterations of every kind through both lanes, so that no request pays for what is only done once.

    On a GPU a kernel is compiled per range of sizes and memory is taken from the device per stream:
    every power of two up to the largest prefill runs once. A CPU only has threads to start and memory
    to touch. How these requests end does not matter here: a broken model shows in the replay.
    """
    limits, positions = engine.scheduler.limits, engine.runner.max_positions
    most = {c: engine.scheduler.kv.limit(urgent=c >= LS) - 2 for c in (LS, BE)}
    classes = [c for c in most if most[c] > 0]  # the reserve may leave best-effort requests nothing
    room = min(most[c] for c in classes)
    if positions is not None:
        room = min(room, positions - 2)
    largest = max(1, min(longest_prompt, limits.prefill_tokens, room))
    if engine.runner.device.type == "cuda":
        sizes = sorted({*(2**i for i in range(largest.bit_length())), largest})
    else:
        sizes = [min(largest, 256)]
    for size in sizes:
        for priority in classes:
            engine.submit([0] * size, priority=priority, max_new_tokens=2)
            engine.drain()
    # Both lanes at once, a pause in mid-pass included, and a full decode batch of each class.
    short = max(1, min(16, room // 2))
    engine.submit([0] * sizes[-1], priority=classes[-1], max_new_tokens=2)
    for priority in classes:
        for _ in range(limits.max_batch):
            engine.submit([0] * short, priority=priority, max_new_tokens=2)
    engine.drain()


def measure_slo(
    model: torch.nn.Module,
    *,
    limits: Limits | None = None,
    seed: int = 0,
    backend: str = "auto",
    gate: str = "host",
    batch_invariant: bool = False,
    prompt_tokens: int = 64,
    steps: int = 16,
) -> float:
    """The paper's SLO on LS TTFT: ten times one decode iteration with nothing else to do, in seconds.

    The iteration is one of a full batch, ``max_batch`` rows (or as many as the KV budget has room for),
    as the paper's is one of its batch of 32. The median of about ``steps`` iterations counts.
    """
    limits = limits or Limits()
    with Engine(
        model, policy="priority", limits=limits, backend=backend, gate=gate, batch_invariant=batch_invariant
    ) as engine:
        warm_up(engine, prompt_tokens)
        steps = min(steps, max(2, limits.kv_tokens // 2))
        prompt_tokens = max(1, min(prompt_tokens, limits.kv_tokens // limits.max_batch - steps))
        first = len(engine.log.spans)
        handles = []
        for i in range(limits.max_batch):
            arrival = Arrival(f"slo-{i}", LS, 0.0, prompt_tokens, steps)
            ids = prompt_ids(arrival, engine.runner.vocab_size, seed)
            handles.append(engine.submit(ids, priority=LS, max_new_tokens=steps))
        for handle in handles:
            handle.result()
    decodes = [span for span in engine.log.spans[first:] if span.kind == "decode"]
    fullest = max(span.ls_rows for span in decodes)
    return SLO_ITERATIONS * statistics.median(s.end_s - s.start_s for s in decodes if s.ls_rows == fullest)
