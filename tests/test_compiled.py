"""Whole layers by compiled kernels, run on a CPU: the code for a card computes what the reference does, and
the same bits when its programs take turns at random and are paused at any atomic operation.

tests/test_triton_moe.py shows that of the kernels' own logic, under the interpreter. Here are registers,
shared memory, copies that arrive late, matrix units, and how Triton specialises a launch. No address outside
of the arguments is touched, or tests/ptx.py says so.
"""

import pytest
from compiled_cases import CHOSEN
from other_process import records_of


@pytest.fixture(scope="module")
def computed(tmp_path_factory) -> dict[tuple[str, int], dict]:
    requests = [{"name": name, "capability": capability} for name, capability in CHOSEN]
    records = records_of("compiled.py", requests, tmp_path_factory.mktemp("compiled"))
    return dict(zip(CHOSEN, records, strict=True))


@pytest.mark.parametrize("case", CHOSEN, ids=lambda case: f"{case[0]}, sm_{case[1]}")
def test_compiled_layers(computed, case):
    record = computed[case]
    assert "error" not in record, record["error"]
    for disturbed in ("pause_for_good", "pause_and_share"):
        assert record[disturbed]["left"] > 0, "nothing was interrupted"
    if case[0] != "exits":
        assert record["pause_for_good"]["given_back"] == record["pause_and_share"]["given_back"] == 0


def test_tiles_are_given_back_where_they_have_exits(computed):
    records = [record for case, record in computed.items() if case[0] == "exits"]
    assert all(record["pause_for_good"]["given_back"] > 0 for record in records)
