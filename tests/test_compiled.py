"""Whole layers by compiled kernels, run on a CPU: the code for a card computes what the reference does, and
the same bits when its programs take turns at random and are paused at any atomic operation.

tests/test_triton_leaving.py shows that of the kernels' own logic, under the interpreter. Here are registers,
shared memory, copies that arrive late, matrix units, and how Triton specialises a launch. No address outside
of the arguments is touched, or tests/ptx.py says so.
"""

import functools

import pytest
from compiled_cases import CHOSEN
from other_process import records_of

AT_ONCE = 8


@pytest.fixture(scope="module")
def record_of(tmp_path_factory):
    """What tests/compiled.py says of a case, which it computes with a few others."""
    where = tmp_path_factory.mktemp("compiled")

    @functools.cache
    def records(first: int) -> list[dict]:
        some = CHOSEN[first : first + AT_ONCE]
        requests = [{"name": name, "capability": capability} for name, capability in some]
        return records_of("compiled.py", requests, where)

    def record_of(case: tuple[str, int]) -> dict:
        number = CHOSEN.index(case)
        return records(number - number % AT_ONCE)[number % AT_ONCE]

    return record_of


@pytest.mark.parametrize("case", CHOSEN, ids=lambda case: f"{case[0]}, sm_{case[1]}")
def test_compiled_layers(record_of, case):
    record = record_of(case)
    assert "error" not in record, record["error"]
    for disturbed in ("pause_for_good", "pause_and_share"):
        assert record[disturbed]["left"] > 0, "nothing was interrupted"
    # Where tiles have exits some were given back, and nowhere else.
    assert (record["pause_for_good"]["given_back"] > 0) == (case[0] == "exits")
    assert (record["pause_and_share"]["given_back"] > 0) == (case[0] == "exits")
    # A plan in use leaves nothing to Triton, whatever the address of a chunk's routing, but what the kernels
    # were not compiled for: hidden states that are not aligned. Launched is what Triton would have chosen.
    routing, hidden_states = record["routing_moved"], record["hidden_states_moved"]
    assert routing["same"]
    assert hidden_states["same"]
    launches = routing["new"]["launches"]
    assert launches >= 4
    assert routing["new"] == {"launches": launches, "by_triton": launches}
    assert routing["used"] == {"launches": launches, "by_triton": 0}
    assert hidden_states["used"] == {"launches": launches, "by_triton": 1}
