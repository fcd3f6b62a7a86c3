"""The KV budget against a model anyone can check: a list that says who owns each slot."""

import itertools

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from qllm_ops.scheduler.kv import KVBudget


class KVMachine(RuleBasedStateMachine):
    @initialize(tokens=st.integers(1, 12) | st.integers(1, 60), data=st.data())
    def create(self, tokens, data):
        self.kv = KVBudget(tokens, data.draw(st.integers(0, tokens - 1), label="reserve"))
        self.owner: list[int | None] = [None] * tokens
        self.taken: dict[int, tuple[int, int, bool]] = {}  # number: start, length, urgent
        self.number = 0

    def room(self, urgent: bool, reserve_only: bool) -> range:
        low = self.kv.tokens - self.kv.reserve if reserve_only else 0
        return range(low, self.kv.tokens if urgent else self.kv.tokens - self.kv.reserve)

    @rule(length=st.integers(1, 4) | st.integers(1, 40), urgent=st.booleans(), reserve_only=st.booleans())
    def take(self, length, urgent, reserve_only):
        reserve_only = reserve_only and urgent
        room = self.room(urgent, reserve_only)
        fits = [
            start
            for start in room
            if start + length <= room.stop and set(self.owner[start : start + length]) == {None}
        ]
        start = self.kv.take(length, urgent, reserve_only=reserve_only)
        if not fits:
            assert start is None
            return
        # From the top for one kind and from the bottom for the other, which the model makes exact.
        assert start == (max(fits) if urgent else min(fits))
        self.number += 1
        self.owner[start : start + length] = [self.number] * length
        self.taken[self.number] = (start, length, urgent)

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def give_back(self, data):
        number = data.draw(st.sampled_from(sorted(self.taken)))
        start, length, _ = self.taken.pop(number)
        self.kv.give_back(start, length)
        self.owner[start : start + length] = [None] * length

    @rule(data=st.data())
    def give_back_what_is_free(self, data):
        free = [slot for slot, owner in enumerate(self.owner) if owner is None]
        if not free:
            return
        slot = data.draw(st.sampled_from(free))
        start = data.draw(st.integers(max(0, slot - 5), slot))
        before = list(self.kv._free)
        with pytest.raises(RuntimeError, match=f"KV region at {start} of .* given back twice"):
            self.kv.give_back(start, data.draw(st.integers(slot - start + 1, slot - start + 6)))
        assert self.kv._free == before

    @invariant()
    def agrees(self):
        if not hasattr(self, "kv"):
            return
        assert self.kv.free_tokens == self.owner.count(None)
        free = {slot for start, length in self.kv._free for slot in range(start, start + length)}
        assert free == {slot for slot, owner in enumerate(self.owner) if owner is None}
        ends = [start + length for start, length in self.kv._free]
        starts = [start for start, _ in self.kv._free]
        assert all(end < start for end, start in zip(ends, starts[1:], strict=False)), "holes not coalesced"
        for start, length, urgent in self.taken.values():
            assert urgent or start + length <= self.kv.tokens - self.kv.reserve

    def teardown(self):
        if not hasattr(self, "kv"):
            return
        for start, length, _ in self.taken.values():
            self.kv.give_back(start, length)
        assert self.kv._free == [(0, self.kv.tokens)]
        assert self.kv.take(self.kv.limit(True), urgent=True) == 0


TestKV = KVMachine.TestCase


@pytest.mark.parametrize(
    ("tokens", "reserve", "named"),
    [
        (0, 0, "kv_tokens .* got 0"),
        (-5, 0, "kv_tokens .* got -5"),
        (2.5, 0, "kv_tokens .* got 2.5"),
        (8, 8, "kv_reserve .* 0 to 7, got 8"),
        (8, -1, "kv_reserve .* got -1"),
        (8, "2", "kv_reserve .* got '2'"),
    ],
)
def test_bad_sizes_are_named(tokens, reserve, named):
    with pytest.raises(ValueError, match=named):
        KVBudget(tokens, reserve)


def test_the_two_kinds_fill_from_their_own_ends():
    assert KVBudget(100).reserve == 0
    kv = KVBudget(100, reserve=20)
    assert [kv.take(10, urgent=False), kv.take(10, urgent=False)] == [0, 10]
    assert [kv.take(10, urgent=True), kv.take(30, urgent=True)] == [90, 60]
    assert kv.take(41, urgent=False) is None
    assert kv.take(40, urgent=False) == 20
    assert kv.take(1, urgent=True) is None


def test_best_effort_never_gets_the_reserve_and_urgent_can_be_held_to_it():
    kv = KVBudget(100, reserve=20)
    assert kv.limit(urgent=False) == 80
    assert kv.take(81, urgent=False) is None
    assert kv.take(80, urgent=False) == 0
    assert kv.take(1, urgent=False) is None
    assert kv.take(20, urgent=True) == 80
    kv.give_back(0, 80)
    assert kv.take(5, urgent=True, reserve_only=True) is None
    kv.give_back(80, 20)
    assert kv.take(21, urgent=True, reserve_only=True) is None
    assert kv.take(5, urgent=True, reserve_only=True) == 95


@pytest.mark.parametrize("backwards", [False, True])
def test_every_pattern_of_holes_in_a_small_pool(backwards):
    """Each kind takes the outermost room on its side that is long enough, and only that."""
    slots = range(6)
    for free, length, urgent in itertools.product(
        itertools.product((False, True), repeat=len(slots)), (1, 2, 3), (False, True)
    ):
        kv = KVBudget(len(slots))
        assert [kv.take(1, urgent=False) for _ in slots] == [*slots]
        for slot in reversed(slots) if backwards else slots:
            if free[slot]:
                kv.give_back(slot, 1)
        fits = [start for start in slots[: len(slots) - length + 1] if all(free[start : start + length])]
        start = kv.take(length, urgent)
        assert start == ((fits[-1] if urgent else fits[0]) if fits else None)
        taken = [] if start is None else range(start, start + length)
        left = [slot for slot in slots if free[slot] and slot not in taken]
        assert [kv.take(1, urgent=False) for _ in left] == left
        assert kv.free_tokens == 0
