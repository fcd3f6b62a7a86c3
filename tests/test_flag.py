"""The priority flag: owners, deadlines, shares, the gate, and what many threads at once leave behind."""

import contextlib
import gc
import random
import threading
import time

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from qllm_ops import FULL, PriorityFlag


class Clock:
    """A clock that only a test moves."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def flag_with_clock(**kwargs):
    clock = Clock()
    return PriorityFlag(clock=clock, **kwargs), clock


# -- words and owners ----------------------------------------------------------------------------


def test_every_class_starts_full():
    flag = PriorityFlag(classes=3)
    assert flag.classes == 3
    assert flag.read() == (FULL, FULL, FULL)
    assert flag.words.dtype == torch.int32
    assert flag.words.tolist() == [FULL] * 3
    assert FULL == 2**31 - 1


def test_a_class_runs_again_when_its_last_owner_lets_go():
    flag = PriorityFlag()
    flag.pause(0, "a")
    flag.pause(0, "b")
    flag.pause(0, "b")  # owners are counted once
    assert flag.paused(0)
    assert not flag.paused(1)
    assert flag.words.tolist() == [0, FULL]
    assert not flag.resume(0, "a")
    assert flag.words[0] == 0
    assert not flag.resume(0, "nobody")
    assert flag.words[0] == 0
    assert flag.resume(0, "b")
    assert flag.words.tolist() == [FULL, FULL]
    assert flag.resume(0, "b")  # not held: changes nothing


def test_release_ends_the_pauses_of_all_owners_of_one_class():
    flag = PriorityFlag(classes=3)
    for owner in ("a", "b", None):
        flag.pause(0, owner, timeout_s=None)
    flag.pause(1)
    flag.release(0)
    assert flag.words.tolist() == [FULL, 0, FULL]
    flag.release(0)  # harmless without one
    flag.pause(0, "a")
    assert flag.words.tolist() == [0, 0, FULL]
    with pytest.raises(ValueError, match="priority must be an integer from 0 to 2, got 3"):
        flag.release(3)


def test_words_stay_at_one_address():
    """Kernels in flight poll the address they were given."""
    flag = PriorityFlag()
    address, word = flag.words.data_ptr(), flag.words[0]
    flag.pause(0)
    assert word.item() == 0
    flag.resume(0)
    assert word.item() == FULL
    assert flag.words.data_ptr() == address


def test_share_before_during_and_after_a_pause():
    flag = PriorityFlag()
    flag.share(0, 16)
    assert flag.read() == (16, FULL)
    flag.pause(0)
    assert flag.read() == (0, FULL)
    flag.share(0, 7)  # a pause goes before a share
    assert flag.read() == (0, FULL)
    assert flag.words[0] == 0
    flag.resume(0)
    assert flag.words.tolist() == [7, FULL]
    flag.share(0, FULL)
    assert flag.words[0] == FULL


# -- deadlines -----------------------------------------------------------------------------------


def test_a_pause_ends_at_its_deadline():
    flag, clock = flag_with_clock()
    flag.pause(0, "a", timeout_s=10)
    clock.now += 9.99
    assert flag.expire() == 0
    assert flag.words[0] == 0
    clock.now += 0.01
    assert flag.expire() == 1
    assert flag.words[0] == FULL
    assert flag.expired == 1
    assert flag.expire() == 0


def test_each_owner_has_its_own_deadline():
    flag, clock = flag_with_clock()
    flag.pause(0, "short", timeout_s=1)
    flag.pause(0, "long", timeout_s=3)
    flag.pause(1, "other", timeout_s=1)
    clock.now += 2
    assert flag.expire() == 2
    assert flag.words.tolist() == [0, FULL]
    clock.now += 2
    assert flag.expire() == 1
    assert flag.words[0] == FULL
    assert flag.expired == 3


def test_pausing_again_moves_the_deadline():
    flag, clock = flag_with_clock()
    flag.pause(0, "a", timeout_s=1)
    flag.pause(0, "a", timeout_s=5)
    clock.now += 3
    assert flag.paused(0)
    flag.pause(0, "a", timeout_s=0.5)
    clock.now += 1
    assert not flag.paused(0)


def test_a_pause_may_have_no_deadline():
    flag, clock = flag_with_clock()
    flag.pause(0, timeout_s=None)
    clock.now += 1e9
    assert flag.paused(0)
    assert flag.resume(0)


def test_a_pause_has_a_deadline_unless_it_says_otherwise():
    flag, clock = flag_with_clock()
    flag.pause(0)
    clock.now += 1e9
    assert not flag.paused(0)


@pytest.mark.parametrize("look", ["read", "paused", "resume", "pause", "wait", "expire"])
def test_whoever_looks_enforces_the_deadlines(look):
    flag, clock = flag_with_clock()
    flag.pause(0, "dead", timeout_s=1)
    clock.now += 1
    arguments = {"read": (), "expire": (), "paused": (0,), "resume": (1,), "pause": (1,), "wait": (0,)}
    getattr(flag, look)(*arguments[look])
    assert flag.words[0] == FULL


def test_a_late_resume_does_not_touch_another_pause():
    """The owner's pause has expired and somebody else's has begun; its resume comes too late for both."""
    flag, clock = flag_with_clock()
    flag.pause(0, "slow", timeout_s=1)
    clock.now += 2
    flag.pause(0, "next")
    assert not flag.resume(0, "slow")
    assert flag.words[0] == 0


# -- urgent --------------------------------------------------------------------------------------


def test_urgent_pauses_what_is_below():
    flag = PriorityFlag(classes=4)
    with flag.urgent(2):
        assert flag.read() == (0, 0, FULL, FULL)
    assert flag.read() == (FULL,) * 4


def test_urgent_bodies_nest_and_overlap():
    flag = PriorityFlag(classes=3)
    with flag.urgent(1):
        with flag.urgent(1), flag.urgent(2):
            assert flag.read() == (0, 0, FULL)
        assert flag.read() == (0, FULL, FULL)
    assert flag.read() == (FULL,) * 3


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_urgent_resumes_whatever_way_the_body_ends(error):
    flag = PriorityFlag()
    words = []

    def body():
        with flag.urgent(1):
            words.append(flag.read())
            raise error

    with pytest.raises(error):
        body()
    assert words == [(0, FULL)]
    assert flag.read() == (FULL, FULL)


def test_urgent_resumes_the_classes_it_paused_before_it_failed():
    def fail_on_the_second(kind, priority, now):
        if kind == "pause" and priority == 1:
            raise RuntimeError("no more")

    flag = PriorityFlag(classes=3, on_event=fail_on_the_second)
    with pytest.raises(RuntimeError, match="no more"), flag.urgent(2):
        raise AssertionError("the body must not run")
    assert flag.read() == (FULL,) * 3


class NotedNoMore(Exception):
    pass


def raises_at(*kinds):
    """An on_event that does."""

    def on_event(kind, priority, now):
        if kind in kinds:
            raise NotedNoMore

    return on_event


def test_urgent_resumes_all_classes_whatever_on_event_raises():
    flag = PriorityFlag(classes=4, on_event=raises_at("resume"))
    with pytest.raises(NotedNoMore), flag.urgent(3):
        assert flag.read() == (0, 0, 0, FULL)
    assert flag.words.tolist() == [FULL] * 4


@pytest.mark.parametrize("kind", ["expire", "resume"])
def test_no_class_stays_paused_because_on_event_raises(kind):
    """A word at 0 that nobody pauses would be left by every launch, and waited for by nobody."""
    flag, clock = flag_with_clock(classes=3, on_event=raises_at(kind))
    flag.pause(0, "dead", timeout_s=1)
    flag.pause(1, "dead", timeout_s=1)
    flag.pause(1, "alive", timeout_s=5)
    clock.now += 1
    with pytest.raises(NotedNoMore):
        flag.expire()
    assert flag.words.tolist() == [FULL, 0, FULL]
    assert flag.expired == 2
    clock.now += 4
    with pytest.raises(NotedNoMore):
        flag.wait(1)
    assert flag.words.tolist() == [FULL] * 3


# -- the gate ------------------------------------------------------------------------------------


def waiting(flag, *args):
    """A thread in wait(); its answer is in the list when it has ended."""
    answers = []
    thread = threading.Thread(target=lambda: answers.append(flag.wait(*args)), daemon=True)
    thread.start()
    return thread, answers


def parked(flag, events, count=1):
    end = time.monotonic() + 10
    while sum(kind == "park" for kind, *_ in events) < count:
        assert time.monotonic() < end, "nobody parked"
        time.sleep(0.001)


def test_wait_returns_at_once_while_the_class_runs():
    events = []
    flag = PriorityFlag(on_event=lambda *event: events.append(event))
    flag.pause(1)
    events.clear()
    assert flag.wait(0)
    assert flag.wait(0, timeout_s=0)
    assert not events


def test_wait_wakes_at_the_last_resume():
    events = []
    flag = PriorityFlag(on_event=lambda *event: events.append(event))
    flag.pause(0, "a")
    flag.pause(0, "b")
    thread, answers = waiting(flag, 0)
    parked(flag, events)
    flag.resume(0, "a")
    thread.join(0.05)
    assert thread.is_alive()
    flag.resume(0, "b")
    thread.join(10)
    assert answers == [True]


def test_only_who_stands_still_gives_its_workers_back(monkeypatch):
    """The class that goes first needs the cores, and a team of threads is not started for nothing."""
    released = []
    monkeypatch.setattr("qllm_ops.flag.release_workers", lambda: released.append(flag.read()))
    flag = PriorityFlag()
    assert flag.wait(0)
    assert released == []
    flag.pause(0)
    assert not flag.wait(0, timeout_s=0.01)
    assert released == [(0, FULL)]


def test_wait_gives_up():
    flag = PriorityFlag()
    flag.pause(0)
    start = time.monotonic()
    assert not flag.wait(0, timeout_s=0.05)
    assert 0.04 < time.monotonic() - start < 5
    assert flag.paused(0)


def test_wait_wakes_at_the_deadline_without_a_watchdog():
    flag = PriorityFlag()
    flag.pause(0, "dead", timeout_s=0.05)
    start = time.monotonic()
    assert flag.wait(0)
    assert 0.04 < time.monotonic() - start < 5
    assert flag.expired == 1


def test_wait_follows_a_deadline_that_moves():
    """Asleep until a far deadline, it notices that the owner has set a near one; and the other way round."""
    events = []
    flag = PriorityFlag(on_event=lambda *event: events.append(event))
    flag.pause(0, "a", timeout_s=1000)
    thread, answers = waiting(flag, 0)
    parked(flag, events)
    flag.pause(0, "a", timeout_s=0.05)
    thread.join(10)
    assert answers == [True]
    flag.pause(0, "a", timeout_s=0.05)
    flag.pause(0, "a", timeout_s=1000)
    assert not flag.wait(0, timeout_s=0.15)


def test_everybody_who_waits_is_woken():
    events = []
    flag = PriorityFlag(on_event=lambda *event: events.append(event))
    flag.pause(0)
    threads = [waiting(flag, 0) for _ in range(8)]
    parked(flag, events, 8)
    flag.resume(0)
    for thread, answers in threads:
        thread.join(10)
        assert answers == [True]


def test_events_in_order():
    events = []
    flag, clock = flag_with_clock(on_event=lambda *event: events.append(event))
    flag.pause(0, "a")
    flag.pause(0, "b", timeout_s=5)  # already paused: no event
    flag.share(0, 3)  # nor is a share one
    clock.now += 1
    flag.resume(0, "a")
    clock.now += 4
    flag.expire()
    flag.pause(1)
    flag.resume(1)
    flag.resume(1)
    assert events == [
        ("pause", 0, 100.0), ("expire", 0, 105.0), ("resume", 0, 105.0),
        ("pause", 1, 105.0), ("resume", 1, 105.0),
    ]  # fmt: skip
    events.clear()
    flag.pause(0, timeout_s=None)
    assert not flag.wait(0, timeout_s=0)
    assert events[1:] == [("park", 0, 105.0), ("unpark", 0, 105.0)]


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PriorityFlag(classes=0), "classes must be a positive integer, got 0"),
        (lambda: PriorityFlag(classes=1.5), "classes must be a positive integer, got 1.5"),
        (lambda: PriorityFlag("meta"), "device must be a CPU or a CUDA device, got meta"),
        (lambda: PriorityFlag(writer="stream"), "is for CUDA flags"),
        (lambda: PriorityFlag().pause(2), "priority must be an integer from 0 to 1, got 2"),
        (lambda: PriorityFlag().pause(-1), "priority must be an integer from 0 to 1, got -1"),
        (lambda: PriorityFlag().resume(True), "priority must be an integer from 0 to 1, got True"),
        (lambda: PriorityFlag().paused("0"), "priority must be an integer from 0 to 1, got '0'"),
        (lambda: PriorityFlag().wait(0.0), "priority must be an integer from 0 to 1, got 0.0"),
        (lambda: PriorityFlag().pause(0, timeout_s=0), "timeout_s must be a positive number .* got 0"),
        (
            lambda: PriorityFlag().pause(0, timeout_s=float("nan")),
            "timeout_s must be a positive number .* got nan",
        ),
        (lambda: PriorityFlag().share(0, 0), r"programs must be .* got 0; use pause\(\) for 0"),
        (lambda: PriorityFlag().share(0, FULL + 1), "programs must be an integer from 1 to FULL"),
        (lambda: PriorityFlag().share(0, 2.0), "programs must be an integer from 1 to FULL, got 2.0"),
        (lambda: PriorityFlag().urgent(5).__enter__(), "priority must be an integer from 0 to 1, got 5"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# -- laws ----------------------------------------------------------------------------------------

OWNERS = st.sampled_from(("a", "b", "c", None))
CLASSES = st.integers(0, 2)


class FlagMachine(RuleBasedStateMachine):
    """The flag against a model: a dictionary of deadlines per class, and the share."""

    def __init__(self):
        super().__init__()
        self.events = []
        self.flag, self.clock = flag_with_clock(classes=3, on_event=lambda *e: self.events.append(e))
        self.deadlines = [{}, {}, {}]
        self.shares = [FULL] * 3
        self.ended = 0

    def forget_the_late(self):
        for owners in self.deadlines:
            for owner in [o for o, end in owners.items() if end <= self.clock.now]:
                del owners[owner]
                self.ended += 1

    @rule(c=CLASSES, owner=OWNERS, timeout=st.none() | st.floats(0.5, 20))
    def pause(self, c, owner, timeout):
        self.forget_the_late()
        self.flag.pause(c, owner, timeout_s=timeout)
        self.deadlines[c][owner] = float("inf") if timeout is None else self.clock.now + timeout

    @rule(c=CLASSES, owner=OWNERS)
    def resume(self, c, owner):
        self.forget_the_late()
        self.deadlines[c].pop(owner, None)
        assert self.flag.resume(c, owner) == (not self.deadlines[c])

    @rule(c=CLASSES, programs=st.integers(1, 200) | st.just(FULL))
    def share(self, c, programs):
        self.flag.share(c, programs)
        self.shares[c] = programs

    @rule(seconds=st.floats(0, 8))
    def pass_time(self, seconds):
        self.clock.now += seconds

    @rule(c=CLASSES)
    def wait(self, c):
        self.forget_the_late()
        assert self.flag.wait(c, timeout_s=0) == (not self.deadlines[c])

    @rule(c=CLASSES)
    def urgent(self, c):
        with self.flag.urgent(c):
            assert all(self.flag.paused(lower) for lower in range(c))

    @invariant()
    def a_word_is_zero_exactly_while_somebody_holds_a_pause(self):
        # Between two calls the device may see a pause that is over, but never miss one that is not.
        for c, owners in enumerate(self.deadlines):
            if any(end > self.clock.now for end in owners.values()):
                assert self.flag.words[c] == 0
        self.flag.expire()
        self.forget_the_late()
        wanted = tuple(0 if owners else n for owners, n in zip(self.deadlines, self.shares, strict=True))
        assert tuple(self.flag.words.tolist()) == wanted
        assert self.flag.read() == wanted
        assert self.flag.expired == self.ended

    @invariant()
    def pauses_and_resumes_take_turns(self):
        for c in range(3):
            kinds = [
                kind for kind, priority, _ in self.events if priority == c and kind in ("pause", "resume")
            ]
            assert kinds == ["pause", "resume"] * (len(kinds) // 2) + ["pause"] * (len(kinds) % 2)
            assert bool(len(kinds) % 2) == bool(self.deadlines[c])

    @invariant()
    def time_goes_forward(self):
        times = [now for *_, now in self.events]
        assert times == sorted(times)


TestFlagMachine = FlagMachine.TestCase


# -- races ---------------------------------------------------------------------------------------


def test_many_threads_leave_it_full():
    """Pauses with and without deadlines, shares, gates and bodies that raise, from many threads at once."""
    flag = PriorityFlag(classes=3)
    errors = []

    def work(seed):
        rng = random.Random(seed)
        try:
            for _ in range(150):
                c = rng.randrange(3)
                kind = rng.randrange(4)
                if kind == 0:
                    flag.pause(c, seed)
                    assert flag.words[c] == 0
                    assert flag.paused(c)
                    flag.resume(c, seed)
                elif kind == 1:
                    flag.pause(c, (seed, "forgotten"), timeout_s=rng.uniform(1e-5, 1e-3))
                elif kind == 2:
                    assert flag.wait(c, timeout_s=30), "paused for ever"
                else:
                    with contextlib.suppress(ZeroDivisionError), flag.urgent(c):
                        assert all(word == 0 for word in flag.read()[:c])
                        raise ZeroDivisionError
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not errors
    time.sleep(2e-3)
    flag.expire()
    assert flag.words.tolist() == [FULL] * 3
    assert flag.read() == (FULL,) * 3


def test_a_word_is_never_seen_running_while_paused():
    """A reader without the lock, as a kernel is, between a pause that has returned and its resume."""
    flag = PriorityFlag()
    word = flag.words[0]
    stop = threading.Event()

    def disturb():
        rng = random.Random(0)
        while not stop.is_set():
            flag.share(0, rng.randint(1, 9))
            flag.pause(0, "other")
            flag.resume(0, "other")

    thread = threading.Thread(target=disturb, daemon=True)
    thread.start()
    try:
        for _ in range(300):
            flag.pause(0, "mine")
            for _ in range(20):
                assert word.item() == 0
            flag.resume(0, "mine")
    finally:
        stop.set()
        thread.join(10)
    assert word.item() > 0


# -- the stream gate -------------------------------------------------------------------------------


def test_only_a_flag_with_a_stream_gate_holds_a_stream():
    with pytest.raises(RuntimeError, match='gate="stream"'):
        PriorityFlag().hold(0)
    with pytest.raises(ValueError, match="gate must be"):
        PriorityFlag(gate="device")
    flag = PriorityFlag(gate="stream")
    flag.hold(0)  # which is not paused
    with pytest.raises(ValueError, match="priority must be"):
        flag.hold(2)


def test_a_watchdog_ends_the_pauses_that_nobody_waits_for(monkeypatch):
    """A device stream that is held calls nobody: with a host gate this word would stay 0."""
    monkeypatch.setattr("qllm_ops.flag.WATCH_S", 30.0)  # it wakes for the deadline
    flag, plain = PriorityFlag(gate="stream"), PriorityFlag()
    for each in (flag, plain):
        each.pause(1, "for ever", timeout_s=None)
        each.pause(0, "dead", timeout_s=0.05)
    until = time.monotonic() + 5
    while flag.words[0].item() == 0 and time.monotonic() < until:
        time.sleep(0.01)
    assert flag.words.tolist() == [FULL, 0]
    assert flag.expired == 1
    assert plain.words[0].item() == 0


def test_a_watchdog_outlives_an_on_event_that_raises(monkeypatch):
    said = []
    monkeypatch.setattr(threading, "excepthook", said.append)
    flag = PriorityFlag(gate="stream", on_event=raises_at("expire"))
    for count in (1, 2):
        flag.pause(0, "dead", timeout_s=0.02)
        until = time.monotonic() + 5
        while len(said) < count and time.monotonic() < until:
            time.sleep(0.005)
        assert [what.exc_type for what in said] == [NotedNoMore] * count
        assert flag.words.tolist() == [FULL, FULL]


def test_the_watchdog_obeys_a_deadline_that_was_moved():
    flag = PriorityFlag(gate="stream")
    flag.pause(0, "lane", timeout_s=0.1)
    for _ in range(10):
        time.sleep(0.04)
        flag.pause(0, "lane", timeout_s=0.5)
    assert flag.words[0].item() == 0
    assert flag.expired == 0


def test_a_watchdog_sleeps_while_nothing_is_paused():
    """One that looks again at once takes the interpreter from the lanes."""
    looks = []
    flag = PriorityFlag(gate="stream", clock=lambda: looks.append(1) or 0.0)
    time.sleep(0.1)
    assert len(looks) <= 2
    flag.pause(0)
    flag.resume(0)
    time.sleep(0.1)
    assert len(looks) <= 8


def test_the_watchdog_goes_with_its_flag(monkeypatch):
    monkeypatch.setattr("qllm_ops.flag.WATCH_S", 0.02)
    before = set(threading.enumerate())
    flag = PriorityFlag(gate="stream")
    (watchdog,) = set(threading.enumerate()) - before
    del flag
    gc.collect()
    watchdog.join(5)
    assert not watchdog.is_alive()


def test_a_flag_that_was_made_in_inference_mode_can_be_written_outside_of_it():
    with torch.inference_mode():
        flag = PriorityFlag()
    flag.pause(0)
    assert flag.words.tolist() == [0, FULL]
