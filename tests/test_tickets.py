"""The ticket protocol of the kernels, in every order of its memory operations: each tile is computed once,
after the phase before it, within the budget; no ticket is lost; a step that nobody disturbs does all that is
left."""

import os

import pytest
from tickets import FULL, Explorer

THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"

RUNS = {
    "nobody pauses": Explorer((2, 1), 2, ()),
    "a pause": Explorer((2, 1), 2, (0, FULL)),
    "a share that grows": Explorer((2, 1), 2, (1, FULL)),
    "a share of nothing, then of one": Explorer((1, 1), 2, (0, 1, FULL)),
    "budgets, and a pause": Explorer((2, 1), 2, (0, FULL), budgets=(1, 2)),
    "no exit inside of a tile": Explorer((2, 1), 2, (0, FULL), looks=0),
    "a stream gate": Explorer((2, 1), 2, (0, FULL), rounds=1),
    "a stream gate of two rounds": Explorer((1, 1), 2, (0, FULL), rounds=2),
}
LONG = {
    "three tiles": Explorer((3, 1), 2, (0, FULL)),
    "two pauses": Explorer((2, 1), 2, (0, FULL, 0, FULL)),
    "three programs": Explorer((2, 1), 3, (0, FULL)),
    "three programs, budgets": Explorer((1, 2), 3, (1, FULL), budgets=(1,)),
}


@pytest.mark.parametrize("name", RUNS)
def test_every_order(name):
    assert RUNS[name].explore() > 100


@pytest.mark.skipif(not THOROUGH, reason="minutes: with HYPOTHESIS_PROFILE=thorough")
@pytest.mark.parametrize("name", LONG)
def test_every_order_of_more(name):
    assert LONG[name].explore(most=10**7) > 10**5


TAKE = 'ticket = tl.atomic_add(state_ptr + TICKETS + phase, 1, sem="relaxed")'

FAULTS = {
    "who reads a slot takes what is in it": (
        {'tl.atomic_xchg(returned_ptr + slot, -1, sem="relaxed")': "tl.load(returned_ptr + slot)"},
        "not done by a whole step|computed twice",
    ),
    "a ticket that is taken while paused is dropped": (
        {
            "    if may_run:\n": "    if end > 0:\n",
            TAKE: f"{TAKE}\n        if not may_run:\n            ticket = end",
        },
        "not done by a whole step",
    ),
    "the slots are not looked at": ({"if EXIT_K > 0:": "if False:"}, "not done by a whole step"),
    "one slot for all": (
        {"tl.atomic_xchg(returned_ptr + tl.program_id(0), ticket": "tl.atomic_xchg(returned_ptr, ticket"},
        "overwritten",
    ),
    "the second phase does not wait": (
        {"end = tl.where(ready, end, 0)": "end = end"},
        "before the first ended",
    ),
    "one tile more than the budget": (
        {'-1, sem="relaxed") > 0': '-1, sem="relaxed") >= 0'},
        "than the budget",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name):
    changes, message = FAULTS[name]
    run = Explorer((2, 1), 2, (0, FULL), budgets=(1, 2) if "budget" in name else (), changes=changes)
    with pytest.raises(AssertionError, match=message):
        run.explore()


def test_a_program_must_see_what_it_wrote_to_its_own_slot():
    """Otherwise it takes another ticket, and gives that one back on top of the first."""
    with pytest.raises(AssertionError, match="overwritten"):
        Explorer((2, 1), 1, (0, FULL, 0, FULL), coherent=False).explore()
    assert Explorer((2, 1), 1, (0, FULL, 0, FULL)).explore() > 100
