"""The scheduler under a virtual clock with a fake model; the laws themselves stand in ``virtual.py``."""

from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from virtual import VirtualEngine, expected_tokens

from qllm_ops import FULL, PriorityFlag
from qllm_ops.scheduler.core import Limits, Scheduler
from qllm_ops.scheduler.policies import BACKGROUND, FOREGROUND, POLICIES
from qllm_ops.scheduler.request import BE, LS, Request, State

BY_CLASS = ["priority", "layer", "tile"]
PREEMPTING = ["layer", "tile"]


# -- any schedule of arrivals, cancels and failures ----------------------------------------------------


@st.composite
def limits_strategy(draw):
    kv_tokens = draw(st.integers(12, 120))
    return Limits(
        kv_tokens=kv_tokens,
        kv_reserve=draw(st.integers(0, kv_tokens // 2)),
        max_batch=draw(st.integers(1, 4)),
        prefill_tokens=draw(st.sampled_from([1, 3, 8, 100])),
        top_up_tokens=draw(st.sampled_from([0, 5, 100])),
        be_floor=draw(st.sampled_from([0.0, 0.05, 0.5, 0.9])),
        be_slice_s=draw(st.sampled_from([0.01, 0.05, 1.0])),
        aging_s=draw(st.sampled_from([None, 0.1, 2.0])),
        pause_timeout_s=draw(st.sampled_from([0.02, 1.0, 30.0])),
    )


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        policy=st.sampled_from(sorted(POLICIES)),
        limits=limits_strategy(),
        classes=st.integers(2, 3),
        seed=st.integers(0, 2**16),
        multiple=st.sampled_from([1, 1, 2, 5]),
    )
    def create(self, policy, limits, classes, seed, multiple):
        multiple = min(multiple, limits.prefill_tokens)
        self.engine = VirtualEngine(policy, limits, seed=seed, classes=classes, chunk_multiple=multiple)

    @rule(
        count=st.integers(1, 4),
        priority=st.integers(0, 1),
        prompt=st.integers(1, 14),
        new=st.integers(1, 5),
        eos=st.sampled_from([None, 0, 1]),
        poisoned=st.sampled_from([None, None, 0, 1]),
        bad_token=st.sampled_from([None, None, 0, 2]),
    )
    def submit(self, count, priority, prompt, new, eos, poisoned, bad_token):
        limit = self.engine.scheduler.kv.limit(urgent=priority >= LS)
        for i in range(count):
            self.engine.submit(
                min(prompt + i, limit - new),
                priority,
                new,
                eos_token_id=eos,
                poisoned=i == poisoned,
                bad_token=bad_token if i == 0 else None,
            )

    @rule(priority=st.integers(-1, 3), prompt=st.integers(0, 90), new=st.integers(-1, 6))
    def submit_anything(self, priority, prompt, new):
        kv, classes = self.engine.scheduler.kv, self.engine.flag.classes
        limit = kv.tokens if priority >= LS else kv.tokens - kv.reserve
        refused = prompt < 1 or new < 1 or not 0 <= priority < classes or prompt + new > limit
        before = list(self.engine.scheduler.requests)
        try:
            self.engine.submit(prompt, priority, new)
        except ValueError:
            assert refused
            assert self.engine.scheduler.requests == before
        else:
            assert not refused

    @precondition(lambda self: self.engine.fates)
    @rule(data=st.data())
    def cancel(self, data):
        fates = sorted(self.engine.fates.values(), key=lambda f: (f.ends, -f.request.arrival_s))
        request = data.draw(st.sampled_from(fates)).request
        was = request.state
        self.engine.cancel(request)
        if was not in (State.WAITING, State.RUNNING):
            assert request.state is was
        elif not request.in_flight:
            assert request.state is State.CANCELLED

    @rule(seconds=st.sampled_from([0.001, 0.01, 0.05, 0.3, 3.0]))
    def advance(self, seconds):
        self.engine.advance(seconds)

    @rule(lane=st.sampled_from([FOREGROUND, BACKGROUND]))
    def wake_for_no_reason(self, lane):
        if lane not in self.engine.lanes:
            self.engine.ask(lane)

    @rule(lane=st.sampled_from([FOREGROUND, BACKGROUND]))
    def break_lane(self, lane):
        self.engine.break_lane(lane)

    @rule(lane=st.sampled_from([FOREGROUND, BACKGROUND]))
    def hang(self, lane):
        if lane in self.engine.lanes:
            self.engine.lanes[lane].hung = True

    @rule(lane=st.sampled_from([FOREGROUND, BACKGROUND]))
    def recover(self, lane):
        if lane in self.engine.lanes:
            self.engine.lanes[lane].hung = False

    @invariant()
    def laws(self):
        if hasattr(self, "engine"):
            self.engine.settle()

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        engine = self.engine
        for work in engine.lanes.values():
            work.hung = False
        open_ = engine.scheduler.requests
        # Twice what every token by itself would take at the slowest, and a batch in vain for each request.
        limit_s = 5.0 + sum(0.05 * request.kv_tokens + 0.5 for request in open_)
        assert engine.drain(limit_s), f"never ended: {open_}"
        assert all(fate.ends == 1 for fate in engine.fates.values())
        assert engine.scheduler.kv._free == [(0, engine.limits.kv_tokens)]
        engine.settle()
        assert engine.flag.read() == (FULL,) * engine.flag.classes


TestScheduler = SchedulerMachine.TestCase
# More schedules than other examples, as they cost little. Not shrunk: a long one can take minutes to shrink,
# and repeats exactly as it is; fewer steps give a shorter one.
TestScheduler.settings = settings(
    max_examples=4 * settings().max_examples,
    stateful_step_count=40,
    phases=set(Phase) - {Phase.shrink, Phase.explain},
)


# -- endless load: nobody starves ----------------------------------------------------------------------


def endless(policy, limits, clients, *, seed=1):
    """An engine whose clients replace each request that ends at once; a client is (prompt, class, new)."""

    def again(request):
        if request.id in client_of:
            start(client_of.pop(request.id))

    def start(client):
        client_of[engine.submit(*client).id] = client

    client_of = {}
    engine = VirtualEngine(policy, limits, seed=seed, on_end=again)
    for client in clients:
        start(client)
    engine.advance(2.0)
    return engine


LOADS = {
    # (prompt tokens, class, new tokens) of each client
    "light": [(6, LS, 4)] * 3,
    "heavy": [(6, LS, 4)] * 12,
    "more than the memory holds": [(30, LS, 10)] * 12,
    "one token each": [(20, LS, 1)] * 6,
    "whole memory": [(90, LS, 10)] * 2,
    "mixed": [(3, LS, 12), (70, LS, 2), (20, LS, 1), (9, LS, 9), (33, LS, 33)],
}


def limits_of(**changes):
    return Limits(**{"kv_tokens": 100, "kv_reserve": 20, "max_batch": 4, "prefill_tokens": 16, **changes})


def best_effort(engine, prompt=50, new=12):
    return engine.submit(prompt, BE, new)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("policy", ["priority", "tile"])
def test_without_floor_or_aging_best_effort_may_starve(policy, load):
    """So that the tests below prove something: their load does not leave best-effort work any room."""
    engine = endless(policy, limits_of(be_floor=0.0), LOADS[load])
    request = best_effort(engine)
    assert not engine.run_until(lambda: not request.open, 30.0)


@pytest.mark.parametrize("floor", [0.05, 0.5])
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("policy", BY_CLASS)
def test_the_floor_bounds_the_turnaround(policy, load, floor):
    engine = endless(policy, limits_of(be_floor=floor), LOADS[load])
    request = best_effort(engine)
    work_s = 3 * (0.01 + 0.002 * 16) * 4 + 12 * 0.012 * 2  # chunks and steps, at the slowest
    memory_s = 20.0  # until the urgent ones have left enough of it
    assert engine.run_until(lambda: not request.open, memory_s + 2 * work_s / floor)
    assert request.state is State.DONE


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("policy", [*BY_CLASS, "fcfs"])
def test_aging_bounds_the_turnaround(policy, load):
    engine = endless(policy, limits_of(be_floor=0.0, aging_s=5.0), LOADS[load])
    request = best_effort(engine)
    assert engine.run_until(lambda: not request.open, 5.0 + 30.0)
    assert request.state is State.DONE


@pytest.mark.parametrize("load", LOADS)
def test_under_fcfs_nobody_starves(load):
    engine = endless("fcfs", limits_of(), [*LOADS[load], (25, BE, 1)])
    requests = [best_effort(engine), best_effort(engine, 80 - 1, 1), engine.submit(90, LS, 10)]
    assert engine.run_until(lambda: not any(r.open for r in requests), 60.0)


@pytest.mark.parametrize("policy", PREEMPTING)
def test_aging_frees_a_request_that_is_paused_in_the_background(policy):
    engine = VirtualEngine(policy, limits_of(be_floor=0.0, aging_s=3.0, prefill_tokens=100))
    request = best_effort(engine, 60, 1)
    engine.settle()
    assert BACKGROUND in engine.lanes
    engine.on_end = lambda ended: ended is not request and engine.submit(4, LS, 4)
    engine.submit(4, LS, 4)
    assert not engine.run_until(lambda: not request.open, 2.9)
    younger = best_effort(engine, 10, 1)
    assert engine.run_until(lambda: not request.open, 3.0)
    # That nothing is paused now does not mean that the background lane may start another one.
    assert not engine.run_until(lambda: younger.in_flight, 2.0)


@pytest.mark.parametrize("policy", ["priority", "tile"])
@pytest.mark.parametrize("floor", [0.0, 0.05, 0.3])
def test_the_floor_is_what_best_effort_work_gets(policy, floor):
    engine = endless(policy, limits_of(be_floor=floor, kv_tokens=400), LOADS["heavy"] + [(40, BE, 8)] * 3)
    start_s, before = engine.clock.now, engine.best_effort_s
    engine.advance(50.0)
    share = (engine.best_effort_s - before) / (engine.clock.now - start_s)
    assert share == pytest.approx(floor, rel=0.15, abs=0.002)


def test_the_floor_is_given_in_slices():
    """Not a little after every urgent iteration: 0.5 s of it at a time, once that much is owed."""
    engine = VirtualEngine("priority", limits_of(be_floor=0.5, be_slice_s=0.5), cost=lambda batch: 0.125)
    engine.submit(4, LS, 12)
    best_effort(engine, 60, 10)
    assert engine.drain(10.0)
    assert [batch.urgent for batch in engine.history[:12]] == [True] * 4 + [False] * 4 + [True] * 4


def test_what_was_owed_to_those_who_left_is_not_owed_to_the_next():
    engine = VirtualEngine("priority", limits_of(be_floor=0.5, be_slice_s=1.0), cost=lambda batch: 0.1)
    engine.submit(4, LS, 60)
    first = best_effort(engine, 20, 1)
    engine.advance(0.85)
    engine.cancel(first)
    engine.advance(0.5)
    second = best_effort(engine, 10, 1)
    assert not engine.run_until(lambda: second.in_flight, 0.95)
    assert engine.run_until(lambda: second.in_flight, 0.3)


def test_riders_are_owed_nothing():
    """Best-effort rows in an urgent decode batch get on; a slice for them as well would be too much."""

    def urgent_s(floor):
        engine = VirtualEngine("priority", limits_of(be_floor=floor), cost=lambda batch: 0.01)
        patient = best_effort(engine, 10, 60)
        assert engine.run_until(lambda: len(patient.tokens) == 1, 1.0)
        urgent, start_s = engine.submit(4, LS, 16), engine.clock.now
        engine.submit(40, LS, 10)  # waits for memory: nothing is owed for urgent ones that are left behind
        assert engine.run_until(lambda: not urgent.open, 5.0)
        assert len(patient.tokens) > 10
        return engine.clock.now - start_s

    assert urgent_s(0.5) == pytest.approx(urgent_s(0.0))


@pytest.mark.parametrize("policy", BY_CLASS)
def test_no_arrears_for_the_time_without_memory(policy):
    """What could not be given is not made up for at the cost of the next urgent request."""
    engine = VirtualEngine(policy, limits_of(be_floor=0.5, kv_reserve=0), cost=lambda batch: 0.05)
    first = engine.submit(10, LS, 90)
    engine.settle()
    patient, second = best_effort(engine, 40, 20), engine.submit(20, LS, 10)
    assert engine.run_until(lambda: not first.open, 10.0)
    assert first.finish_s > 4.0
    assert patient.region is not None
    assert engine.run_until(lambda: not second.open, 10.0)
    # Two chunks of prompt and nine steps, as much again for the floor, and a slice and an iteration to wait.
    assert second.finish_s - first.finish_s < 2 * 11 * 0.05 + 0.05 + 0.05
    assert engine.drain(10.0)


@pytest.mark.parametrize("policy", BY_CLASS)
def test_no_slice_for_best_effort_work_that_cannot_run(policy):
    """Urgent work standing back for a request without memory would be time that nobody has."""
    engine = endless(policy, limits_of(be_floor=0.5, kv_reserve=0), LOADS["whole memory"])
    best_effort(engine)
    busy_s = 0.0
    for _ in range(400):
        engine.advance(0.01)
        engine.settle()
        busy_s += 0.01 * bool(engine.lanes)
    assert busy_s > 0.99 * 4.0


@pytest.mark.parametrize("policy", BY_CLASS)
def test_a_large_urgent_request_is_not_kept_out_by_best_effort_ones(policy):
    engine = endless(policy, limits_of(), [(5, BE, 9)] * 12)
    request = engine.submit(70, LS, 30)
    assert engine.run_until(lambda: not request.open, 20.0)


def test_long_best_effort_prompts_leave_the_reserve_to_urgent_ones():
    engine = endless("tile", limits_of(be_floor=0.0), [(40, BE, 40)] * 4)
    for _ in range(10):
        request = engine.submit(10, LS, 10)
        engine.settle()
        assert request.in_flight
        assert engine.run_until(lambda: not request.open, 5.0)  # noqa: B023


def test_crowded_out_best_effort_work_leaves_the_reserve_to_urgent_ones():
    engine = VirtualEngine("tile", limits_of(be_floor=0.5), cost=lambda batch: 0.2)
    first = engine.submit(40, LS, 30)
    patient = best_effort(engine, 60, 10)
    assert engine.run_until(lambda: len(first.tokens) == 5, 10.0)
    too_large, small = engine.submit(15, LS, 15), engine.submit(10, LS, 5)
    assert first.region == 30
    engine.advance(1.0)
    assert patient.region is None
    assert too_large.region is None
    assert engine.run_until(lambda: not first.open, 20.0)
    assert patient.region == 0
    assert engine.drain(60.0)
    assert small.state is too_large.state is State.DONE


# -- pauses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", PREEMPTING)
def test_urgent_work_starts_at_once_and_its_pause_ends_with_it(policy):
    engine = VirtualEngine(policy, limits_of(be_floor=0.0), cost=lambda batch: 1.0)
    patient = best_effort(engine, 10, 1)
    engine.advance(0.25)
    assert engine.lanes[BACKGROUND].left_s == pytest.approx(0.75)
    engine.submit(10, LS, 2)
    engine.settle()
    assert engine.lanes[FOREGROUND].batch.started_s == 0.25
    assert engine.flag.read() == (0, FULL)
    engine.advance(1.5)
    assert engine.lanes[BACKGROUND].left_s == pytest.approx(0.75)
    assert engine.run_until(lambda: FOREGROUND not in engine.lanes, 10.0)
    assert engine.clock.now == pytest.approx(2.25)
    assert engine.flag.read() == (FULL, FULL)
    assert engine.drain(10.0)
    assert patient.finish_s == pytest.approx(3.0)


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_iteration_level_policies_never_pause(policy):
    engine = VirtualEngine(policy, limits_of(), cost=lambda batch: 1.0)
    engine.flag.pause = None  # would raise
    best_effort(engine, 10, 3)
    engine.settle()
    urgent = engine.submit(10, LS, 3)
    assert engine.drain(100.0)
    assert urgent.first_token_s == pytest.approx(2.0)


@pytest.mark.parametrize("policy", PREEMPTING)
def test_a_hung_foreground_cannot_keep_best_effort_work_for_ever(policy):
    engine = VirtualEngine(policy, limits_of(pause_timeout_s=5.0, be_floor=0.5), cost=lambda batch: 1.0)
    first = best_effort(engine, 10, 3)
    engine.settle()
    urgent = engine.submit(10, LS, 3)
    engine.settle()
    engine.lanes[FOREGROUND].hung = True
    later = best_effort(engine, 10, 3)
    engine.advance(4.9)
    assert engine.flag.read() == (0, FULL)
    assert engine.run_until(lambda: not first.open and not later.open, 10.0)
    assert engine.clock.now < 5.0 + 8.0
    assert engine.flag.expired == 1
    # It was only slow: what it did still counts, and its next iteration pauses again. Best-effort work is
    # owed for the time of the pause, and not for the thousand seconds after it.
    engine.advance(1000.0)
    patient = best_effort(engine, 10, 60)
    engine.lanes[FOREGROUND].hung = False
    assert engine.run_until(lambda: not urgent.open, 20.0)
    assert patient.open
    assert engine.drain(200.0)
    assert urgent.state is patient.state is State.DONE


def test_an_idle_background_lane_wakes_when_the_foreground_is_taken_for_hung():
    """No event tells it: without a time to wake at it would sleep on, whatever the flag says."""
    engine = VirtualEngine("tile", limits_of(pause_timeout_s=5.0), cost=lambda batch: 1.0)
    engine.submit(10, LS, 1)
    engine.settle()
    engine.lanes[FOREGROUND].hung = True
    patient = best_effort(engine, 10, 1)
    engine.settle()
    assert engine.scheduler.wake_s == {BACKGROUND: 5.0}
    assert engine.run_until(lambda: not patient.open, 6.5)


def test_a_hung_foreground_does_not_keep_best_effort_work_from_memory():
    engine = VirtualEngine("tile", limits_of(pause_timeout_s=5.0), cost=lambda batch: 1.0)
    engine.submit(30, LS, 10)
    engine.settle()
    engine.lanes[FOREGROUND].hung = True
    engine.submit(60, LS, 20)  # would be next, and does not fit beside the one that hangs
    patient = [best_effort(engine, 20, 2), best_effort(engine, 40, 2)]
    assert engine.run_until(lambda: not any(r.open for r in patient), 30.0)


def test_a_foreground_that_is_slow_is_not_taken_for_hung_when_memory_is_given():
    """The background lane asks while urgent work runs: nothing is paused for the sake of an aged request."""
    cost = lambda batch: 4.0 if batch.urgent else 1.0  # noqa: E731
    engine = VirtualEngine("tile", limits_of(be_floor=0.0, aging_s=3.0), cost=cost)
    aged = best_effort(engine, 10, 1)
    engine.settle()
    engine.submit(30, LS, 10)
    engine.settle()
    large, patient = engine.submit(60, LS, 10), best_effort(engine, 20, 2)
    assert engine.run_until(lambda: not aged.open, 5.5)
    engine.settle()
    assert FOREGROUND in engine.lanes
    assert large.region is patient.region is None


def test_release_lets_go_only_of_the_schedulers_own_pause():
    scheduler = Scheduler("tile", limits_of())
    scheduler.flag.pause(BE, owner="someone else")
    scheduler.release()
    assert scheduler.flag.paused(BE)
    assert scheduler.next(BACKGROUND) is None


@pytest.mark.parametrize("lane", [FOREGROUND, BACKGROUND])
@pytest.mark.parametrize("policy", POLICIES)
def test_when_a_lane_dies_its_requests_end_and_the_other_batch_still_counts(policy, lane):
    engine = VirtualEngine(policy, limits_of(), cost=lambda batch: 1.0)
    best_effort(engine, 10, 1)
    engine.settle()
    engine.submit(10, LS, 2)
    engine.submit(10, LS, 2)
    best_effort(engine, 40, 1)
    engine.settle()
    engine.stop(lane)
    assert all(row.request.open for work in engine.lanes.values() for row in work.batch.rows)
    for work in list(engine.lanes.values()):
        engine._finish(work)
    for other in {*engine.scheduler.policy.lanes} - {lane}:
        engine.stop(other)
    assert engine.scheduler.idle
    assert all(fate.ends == 1 for fate in engine.fates.values())
    assert engine.scheduler.kv.free_tokens == engine.limits.kv_tokens
    if lane == FOREGROUND:
        assert not engine.flag.paused(BE)


# -- failures ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guilty", range(4))
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("priority", [BE, LS])
def test_a_failed_batch_fails_only_the_guilty_row(policy, priority, guilty):
    engine = VirtualEngine(policy, limits_of(prefill_tokens=100))
    requests = [engine.submit(8, priority, 3, poisoned=i == guilty) for i in range(4)]
    assert engine.drain(100.0)
    assert max(len(batch.rows) for batch in engine.history) == 4
    for i, request in enumerate(requests):
        if i == guilty:
            assert request.state is State.FAILED
            assert isinstance(request.error, ArithmeticError)
        else:
            assert request.tokens == expected_tokens(request.prompt, 3)


def test_an_error_of_one_row_is_that_rows_alone():
    engine = VirtualEngine("fcfs", limits_of(prefill_tokens=100))
    requests = [engine.submit(8, BE, 4, bad_token=2 if i == 1 else None) for i in range(3)]
    assert engine.drain(100.0)
    assert [r.state for r in requests] == [State.DONE, State.FAILED, State.DONE]
    assert len(requests[1].tokens) == 2
    # One prefill and three steps: nothing was run again for it.
    assert len(engine.history) == 4


def test_a_bad_day_of_the_device_fails_nobody_in_a_batch_of_several():
    engine = VirtualEngine("tile", limits_of(prefill_tokens=100))
    requests = [engine.submit(8, LS, 3) for _ in range(3)]
    engine.settle()
    engine.break_lane(FOREGROUND)
    assert engine.drain(100.0)
    assert all(r.state is State.DONE for r in requests)
    assert [len(batch.rows) for batch in engine.history[:4]] == [3, 1, 1, 1]
    assert len(engine.history[-1].rows) == 3, "they did not come together again"


@pytest.mark.parametrize("tokens", [0, 1])
def test_what_failed_together_does_not_ride_in_an_urgent_batch(tokens):
    """Whichever is guilty would fail that as well, and again with every urgent batch that it rides in."""
    engine = VirtualEngine("priority", limits_of(prefill_tokens=100, top_up_tokens=50))
    patient = [engine.submit(8, BE, 5) for _ in range(2)]
    assert engine.run_until(lambda: all(len(r.tokens) == tokens for r in patient), 1.0)
    urgent = engine.submit(8, LS, 3)
    engine.break_lane(FOREGROUND)
    assert engine.run_until(lambda: not urgent.open, 1.0)
    together = [[row.request for row in batch.rows] for batch in engine.history]
    assert [rows for rows in together if urgent in rows] == [[urgent]] * 3
    assert engine.drain(100.0)
    assert all(r.state is State.DONE for r in patient)


def test_cancelled_in_flight_ends_with_its_iteration_whatever_becomes_of_that():
    for breaks in (False, True):
        engine = VirtualEngine("fcfs", limits_of(prefill_tokens=100), cost=lambda batch: 1.0)
        requests = [engine.submit(8, BE, 3) for _ in range(3)]
        engine.advance(0.5)
        engine.cancel(requests[1])
        assert requests[1].open
        if breaks:
            engine.break_lane(FOREGROUND)
        else:
            engine.advance(0.6)
        assert requests[1].state is State.CANCELLED
        assert engine.drain(100.0)
        assert requests[0].state is requests[2].state is State.DONE


# -- the driver's side of the contract -----------------------------------------------------------------


def test_a_driver_that_breaks_the_contract_is_told():
    scheduler = Scheduler("tile", limits_of())
    scheduler.submit(Request("a", [1, 2], LS, 2))
    batch = scheduler.next(FOREGROUND)
    with pytest.raises(RuntimeError, match="foreground lane has not ended"):
        scheduler.next(FOREGROUND)
    with pytest.raises(ValueError, match="one entry per row: 1, got 2"):
        scheduler.complete(batch, [(1, 1.0), (2, 1.0)])
    scheduler.complete(batch, [(1, 1.0)])
    with pytest.raises(RuntimeError, match=f"batch {batch.id} is not running"):
        scheduler.complete(batch, [(1, 1.0)])
    with pytest.raises(RuntimeError, match="is not running in the foreground lane"):
        scheduler.fail(batch, ValueError())
    assert Scheduler("fcfs").next(BACKGROUND) is None


def test_more_urgent_classes_go_first_and_only_best_effort_is_paused():
    engine = VirtualEngine("tile", limits_of(max_batch=1, be_floor=0.0), classes=3, cost=lambda batch: 1.0)
    order = [engine.submit(4, priority, 1) for priority in (0, 1, 2)]
    assert engine.drain(100.0)
    assert [r.finish_s for r in order] == [3.0, 2.0, 1.0]


REFUSED = [
    ({"prompt": []}, "prompt must hold at least one token"),
    ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
    ({"max_new_tokens": 2.5}, "max_new_tokens must be an integer, got 2.5"),
    ({"priority": 2}, "priority must be from 0 to 1, got 2"),
    ({"priority": -1}, "priority must be from 0 to 1, got -1"),
    ({"priority": True}, "priority must be an integer, got True"),
    (
        {"prompt": [1] * 70, "max_new_tokens": 11},
        r"70 prompt \+ 11 new tokens need 81 .* can have 80 .*kv_reserve=20",
    ),
    ({"prompt": [1] * 70, "max_new_tokens": 31, "priority": LS}, r"need 101 .* can have 100 \(kv_tokens=100"),
    ({"id": "taken"}, "id 'taken' is in use"),
    ({"eos_token_id": [1, 2.0]}, r"eos_token_id must be an integer, several or None, got \[1, 2.0\]"),
    ({"eos_token_id": "</s>"}, "eos_token_id must be an integer, several or None, got '</s>'"),
    ({"arrival_s": "now"}, "arrival_s must be a finite number, got 'now'"),
    ({"arrival_s": float("nan")}, "arrival_s must be a finite number, got nan"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_a_refused_request_is_told_why_and_disturbs_nobody(changes, message):
    scheduler = Scheduler("tile", limits_of())
    scheduler.submit(Request("taken", [1], LS, 1))
    arguments = {"id": "new", "prompt": [1, 2], "max_new_tokens": 4, **changes}
    with pytest.raises(ValueError, match=message):
        scheduler.submit(Request(**arguments))
    assert [r.id for r in scheduler.requests] == ["taken"]
    assert len(scheduler.next(FOREGROUND).rows) == 1


def test_a_callback_that_raises_fails_its_own_request():
    def closed(token):
        raise OSError(f"nobody takes token {token}")

    scheduler = Scheduler("fcfs", limits_of())
    requests = [Request("a", [1], LS, 2, on_token=closed), Request("b", [1], LS, 2)]
    for request in requests:
        scheduler.submit(request)
    for _ in range(2):
        batch = scheduler.next(FOREGROUND)
        scheduler.complete(batch, [(7, 0.5)] * len(batch.rows))
    assert [(r.state, r.tokens) for r in requests] == [(State.FAILED, [7]), (State.DONE, [7, 7])]
    assert str(requests[0].error) == "nobody takes token 7"
    assert scheduler.idle
    assert scheduler.kv.free_tokens == 100


def test_an_id_can_be_given_again_when_its_request_has_ended():
    scheduler = Scheduler("fcfs", limits_of())
    for _ in range(2):
        request = Request("a", [1])
        scheduler.submit(request)
        with pytest.raises(ValueError, match="id 'a' is in use"):
            scheduler.submit(Request("a", [1]))
        scheduler.cancel(request)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("max_batch", v) for v in (0, -1, 1.5, None, True)],
        *[("prefill_tokens", v) for v in (0, 2.0)],
        *[("top_up_tokens", v) for v in (-1, 0.5, False)],
        *[("be_floor", v) for v in (-0.1, 1, 1.5, float("nan"), None)],
        *[("be_slice_s", v) for v in (0, -1.0, None, float("nan"))],
        *[("pause_timeout_s", v) for v in (0, -1.0, None, "30")],
        *[("aging_s", v) for v in (0, -1.0)],
        *[("kv_tokens", v) for v in (0, 1.5, "2048")],
        *[("kv_reserve", v) for v in (-1, 32768)],
    ],
)
def test_bad_limits_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*{value}"):
        Limits(**{name: value})


@pytest.mark.parametrize("kv_reserve", [None, np.int32(5)])
def test_integers_of_numpy_are_limits(kv_reserve):
    """And become Python's own, which a report can be written with, and which have no largest one."""
    sizes = {"kv_tokens": 120, "max_batch": 4, "prefill_tokens": 16, "top_up_tokens": 3}
    limits = Limits(**{name: np.int8(value) for name, value in sizes.items()}, kv_reserve=kv_reserve)
    assert limits == Limits(**sizes, kv_reserve=None if kv_reserve is None else 5)
    assert {type(value) for name, value in asdict(limits).items() if name in {*sizes, "kv_reserve"}} == {int}


@pytest.mark.parametrize(("tokens", "reserve"), [(32768, 4096), (2048, 256), (7, 0), (1, 0)])
def test_an_eighth_of_the_memory_is_kept_for_urgent_requests(tokens, reserve):
    assert Scheduler("tile", Limits(kv_tokens=tokens)).kv.reserve == reserve == Limits(tokens).kv_reserve
    assert Scheduler("tile", Limits(kv_tokens=tokens, kv_reserve=0)).kv.reserve == 0


def test_chunks_end_at_multiples():
    """What is left of an iteration goes to a prompt that fits; the others get what is a multiple of it."""
    engine = VirtualEngine("fcfs", limits_of(prefill_tokens=30), chunk_multiple=8)
    for length in (10, 40, 3):
        engine.submit(length)
    assert engine.drain(100)
    chunks = [[(r.start, r.end) for r in batch.rows] for batch in engine.history if batch.kind == "prefill"]
    assert chunks == [[(0, 10), (0, 16), (0, 3)], [(16, 40)]]
    with pytest.raises(ValueError, match=r"prefill_tokens must be at least 8, .*batch-invariant.*got 7"):
        Scheduler("fcfs", limits_of(prefill_tokens=7), chunk_multiple=8)


def test_the_flag_need_not_be_given():
    now = [1.0]
    scheduler = Scheduler("tile", limits_of(pause_timeout_s=5.0), clock=lambda: now[0])
    assert isinstance(scheduler.flag, PriorityFlag)
    scheduler.submit(Request("a", [1], LS, 1))
    batch = scheduler.next(FOREGROUND)
    assert scheduler.flag.read() == (0, FULL)
    scheduler.complete(batch, [(3, 0.5)])
    assert scheduler.next(FOREGROUND) is None
    assert scheduler.flag.read() == (FULL, FULL)
    scheduler.submit(Request("b", [1], LS, 1))
    scheduler.next(FOREGROUND)
    assert scheduler.flag.read() == (0, FULL)
    now[0] += 5.0  # a pause and its deadline go by one clock
    assert scheduler.flag.read() == (FULL, FULL)


def test_limits_of_another_type_are_named():
    with pytest.raises(TypeError, match="limits must be Limits or None, got dict"):
        Scheduler("tile", {"kv_tokens": 100})
