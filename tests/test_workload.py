"""Workloads: reading traces in the Azure format, the synthetic mix, prompts."""

import re
import subprocess
import sys
import warnings
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qllm_ops.scheduler.workload import Arrival, TraceError, merge, prompt_ids, read_azure_trace, synthetic

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"
ROWS = (
    "2023-11-16 23:59:59.9799600,4808,10",
    "2023-11-17 00:00:00.0319600,3180,8",
    "2023-11-17 00:00:00.0319600,7,1",
    "2023-11-17 00:00:02.5000000,110,27",
)


def write(tmp_path, *lines, end="\n", bom=False):
    path = tmp_path / "trace.csv"
    text = "".join(line + end for line in lines)
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + text.encode())
    return path


# -- traces --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", [False, True])
def test_reads_a_trace(tmp_path, end, bom):
    path = write(tmp_path, HEADER, *ROWS, end=end, bom=bom)
    arrivals = read_azure_trace(path, 1, "ls")
    assert [(a.id, a.priority, a.prompt_tokens, a.output_tokens) for a in arrivals] == [
        ("ls-0", 1, 4808, 10),
        ("ls-1", 1, 3180, 8),
        ("ls-2", 1, 7, 1),
        ("ls-3", 1, 110, 27),
    ]
    # Seven digits, over midnight: nothing of them may be lost.
    assert [a.arrival_s for a in arrivals] == pytest.approx([0.0, 0.052, 0.052, 2.52004], abs=1e-9)


@pytest.mark.parametrize(
    ("first", "second", "gap"),
    [
        ("2023-11-16 18:17:03.0000001", "2023-11-16 18:17:03.0000002", 1e-7),
        ("2023-11-16 18:17:03", "2023-11-16 18:17:04.5", 1.5),
        ("2024-05-10 00:00:00.009930+00:00", "2024-05-10 00:00:00.017335+00:00", 0.007405),
        ("2024-05-10T02:00:00+02:00", "2024-05-10T00:00:01Z", 1.0),
    ],
)
def test_timestamp_forms(tmp_path, first, second, gap):
    path = write(tmp_path, HEADER, f"{first},1,1", f"{second},1,1")
    assert read_azure_trace(path, 0, "be")[1].arrival_s == pytest.approx(gap, abs=1e-10)


def test_a_missing_last_newline_and_blank_lines_are_no_rows(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(f"{HEADER}\n{ROWS[0]}\n\n{ROWS[1]}")
    assert len(read_azure_trace(path, 0, "be")) == 2


def test_limits(tmp_path):
    path = write(tmp_path, HEADER, *ROWS)

    def ids(**limits):
        return [a.id for a in read_azure_trace(path, 0, "be", **limits)]

    assert ids(duration_s=2.52003) == ["be-0", "be-1", "be-2"]
    assert ids(duration_s=2.53) == ["be-0", "be-1", "be-2", "be-3"]
    assert ids(duration_s=2.52004) == ["be-0", "be-1", "be-2"]  # the bound is not included
    # The duration is that of the replay: at half speed the last row comes later.
    assert ids(duration_s=2.53, time_scale=2.0) == ["be-0", "be-1", "be-2"]
    assert ids(max_requests=2) == ["be-0", "be-1"]
    slow, plain = read_azure_trace(path, 0, "be", time_scale=3.0), read_azure_trace(path, 0, "be")
    assert [a.arrival_s for a in slow] == pytest.approx([3 * a.arrival_s for a in plain])


def test_cutting_lengths_says_so(tmp_path):
    path = write(tmp_path, HEADER, *ROWS)
    with pytest.warns(UserWarning, match="prompt_tokens of 2 of 4 requests cut to 1000"):
        arrivals = read_azure_trace(path, 0, "be", max_prompt_tokens=1000)
    assert [a.prompt_tokens for a in arrivals] == [1000, 1000, 7, 110]
    with pytest.warns(UserWarning, match="output_tokens of 1 of 4 requests cut to 20"):
        arrivals = read_azure_trace(path, 0, "be", max_output_tokens=20)
    assert [a.output_tokens for a in arrivals] == [10, 8, 1, 20]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_azure_trace(path, 0, "be", max_prompt_tokens=4808, max_output_tokens=27)


GOOD = "2023-11-16 18:17:03.9799600,10,5"


@pytest.mark.parametrize(
    ("lines", "where", "says"),
    [
        ([], ":1: ", "the file is empty"),
        ([GOOD], ":1: ", "the header is '2023-11-16 18:17:03.9799600,10,5'"),
        (["TIMESTAMP,ContextTokens"], ":1: ", "wanted TIMESTAMP,ContextTokens,GeneratedTokens"),
        ([HEADER], ": ", "no rows after the header"),
        ([HEADER, GOOD, "2023-11-16 18:17:04.0,10"], ":3: ", "2 fields in"),
        ([HEADER, GOOD, GOOD + ",9"], ":3: ", "4 fields in"),
        ([HEADER, GOOD, "", "garbage"], ":4: ", "1 fields in 'garbage'"),
        ([HEADER, "yesterday,10,5"], ":2: ", "TIMESTAMP is 'yesterday'; wanted one such as 2023-"),
        ([HEADER, "2023-02-30 00:00:00.0,10,5"], ":2: ", "TIMESTAMP is '2023-02-30 00:00:00.0'"),
        ([HEADER, "2023-11-16 25:00:00,10,5"], ":2: ", "TIMESTAMP is"),
        ([HEADER, ",10,5"], ":2: ", "TIMESTAMP is ''"),
        ([HEADER, GOOD, "2023-11-16 18:17:03.9799599,10,5"], ":3: ", "earlier than the row before"),
        ([HEADER, "2023-11-16 18:17:03,ten,5"], ":2: ", "ContextTokens is 'ten'; wanted a whole number"),
        ([HEADER, "2023-11-16 18:17:03,1.5,5"], ":2: ", "ContextTokens is '1.5'"),
        ([HEADER, "2023-11-16 18:17:03,0,5"], ":2: ", "ContextTokens is '0'"),
        ([HEADER, "2023-11-16 18:17:03,-3,5"], ":2: ", "ContextTokens is '-3'"),
        ([HEADER, "2023-11-16 18:17:03,1_0,5"], ":2: ", "ContextTokens is '1_0'"),
        ([HEADER, "2023-11-16 18:17:03,٣,5"], ":2: ", "ContextTokens is '٣'"),
        ([HEADER, "2023-11-16 18:17:03,10,"], ":2: ", "GeneratedTokens is ''"),
        ([HEADER, "2023-11-16 18:17:03,10,nan"], ":2: ", "GeneratedTokens is 'nan'"),
        ([HEADER, "2023-11-16 18:17:03,10," + "9" * 6000], ":2: ", "GeneratedTokens is '999"),
    ],
)
def test_malformed_traces_name_file_line_and_wish(tmp_path, lines, where, says):
    path = write(tmp_path, *lines)
    with pytest.raises(TraceError) as error:
        read_azure_trace(path, 0, "be")
    assert str(error.value).startswith(f"{path}{where}")
    assert says in str(error.value)
    assert "wanted" in str(error.value)
    assert len(str(error.value)) < len(str(path)) + 300


def test_unreadable_traces(tmp_path):
    with pytest.raises(TraceError, match=r"nowhere\.csv: No such file"):
        read_azure_trace(tmp_path / "nowhere.csv", 0, "be")
    with pytest.raises(TraceError, match="Is a directory"):
        read_azure_trace(tmp_path, 0, "be")
    binary = tmp_path / "binary.csv"
    binary.write_bytes(b"\x80\x02PK\xff\x00")
    with pytest.raises(TraceError, match=r"binary\.csv:1: the header is"):
        read_azure_trace(binary, 0, "be")


def test_reads_no_further_than_needed(tmp_path):
    path = write(tmp_path, HEADER, *ROWS, "broken")
    assert len(read_azure_trace(path, 0, "be", duration_s=1.0)) == 3
    assert len(read_azure_trace(path, 0, "be", max_requests=4)) == 4
    with pytest.raises(TraceError, match=":6: "):
        read_azure_trace(path, 0, "be")


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *[("time_scale", v) for v in (0, -1.0, float("inf"), float("nan"))],
        *[("duration_s", v) for v in (0, -1.0, float("nan"))],
        *[(n, v) for n in ("max_requests", "max_prompt_tokens", "max_output_tokens") for v in (0, 1.5, True)],
    ],
)
def test_bad_arguments_of_a_trace(tmp_path, argument, value):
    path = write(tmp_path, HEADER, *ROWS)
    with pytest.raises(ValueError, match=argument):
        read_azure_trace(path, 0, "be", **{argument: value})


def test_bad_priority(tmp_path):
    with pytest.raises(ValueError, match="priority must be 1"):
        read_azure_trace(write(tmp_path, HEADER, *ROWS), 2, "x")


# -- synthetic -----------------------------------------------------------------------------------------

bounds = st.tuples(st.integers(1, 5000), st.integers(1, 5000)).map(lambda b: (min(b), max(b)))


@given(
    st.floats(0.1, 50),
    st.floats(0.1, 20),
    st.integers(0, 2**63),
    st.floats(0, 1),
    *[bounds] * 4,
)
def test_synthetic_is_ordered_bounded_and_repeatable(rate, duration, seed, fraction, lp, bp, lo, bo):
    sizes = {"ls_prompt": lp, "be_prompt": bp, "ls_output": lo, "be_output": bo}
    arrivals = synthetic(rate, duration, seed, ls_fraction=fraction, **sizes)
    assert arrivals == synthetic(rate, duration, seed, ls_fraction=fraction, **sizes)
    times = [a.arrival_s for a in arrivals]
    assert times == sorted(times)
    assert all(0 <= t < duration for t in times)
    for priority, name, prompt, output in ((1, "ls", lp, lo), (0, "be", bp, bo)):
        mine = [a for a in arrivals if a.priority == priority]
        assert [a.id for a in mine] == [f"{name}-{i}" for i in range(len(mine))]
        assert all(prompt[0] <= a.prompt_tokens <= prompt[1] for a in mine)
        assert all(output[0] <= a.output_tokens <= output[1] for a in mine)


@given(st.integers(0, 1000), st.floats(1, 10), st.floats(0, 10))
def test_a_longer_duration_only_adds_requests(seed, duration, more):
    short, long = synthetic(5.0, duration, seed), synthetic(5.0, duration + more, seed)
    assert long[: len(short)] == short
    assert all(a.arrival_s >= duration for a in long[len(short) :])


def test_another_mix_keeps_the_times():
    few, many = synthetic(5.0, 50.0, 7, ls_fraction=0.1), synthetic(5.0, 50.0, 7, ls_fraction=0.6)
    assert [a.arrival_s for a in few] == [a.arrival_s for a in many]
    assert sum(a.priority for a in few) < sum(a.priority for a in many)


def test_synthetic_is_poisson_with_the_paper_s_mix():
    rate, duration = 20.0, 1000.0
    arrivals = synthetic(rate, duration, seed=11)
    n = len(arrivals)
    assert abs(n - rate * duration) < 4 * (rate * duration) ** 0.5
    gaps = np.diff([a.arrival_s for a in arrivals])
    assert gaps.mean() == pytest.approx(1 / rate, rel=0.04)
    assert gaps.std() == pytest.approx(1 / rate, rel=0.05)  # an exponential's deviation is its mean
    assert np.mean([a.priority for a in arrivals]) == pytest.approx(0.2, abs=0.012)
    # Log-uniform: every factor of two holds as much, and both ends are reached.
    octaves = Counter(
        int(np.log2(a.prompt_tokens / 16)) for a in arrivals if a.priority and a.prompt_tokens < 128
    )
    assert set(octaves) == {0, 1, 2}
    assert min(octaves.values()) > 0.85 * max(octaves.values())
    assert {16, 128} <= {a.prompt_tokens for a in arrivals if a.priority}


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"rate": 0}, "rate"),
        ({"rate": float("inf")}, "rate"),
        ({"duration_s": -1}, "duration_s"),
        ({"ls_fraction": 1.2}, "ls_fraction"),
        ({"ls_fraction": float("nan")}, "ls_fraction"),
        ({"ls_prompt": (0, 4)}, "ls_prompt"),
        ({"be_prompt": (9, 4)}, "be_prompt"),
        ({"ls_output": (1,)}, "ls_output"),
        ({"be_output": (1, 2.5)}, "be_output"),
    ],
)
def test_bad_arguments_of_synthetic(wrong, name):
    with pytest.raises(ValueError, match=rf"^{name} must be"):
        synthetic(**{"rate": 1.0, "duration_s": 1.0, "seed": 0, **wrong})


# -- merge and prompts ---------------------------------------------------------------------------------

times = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), max_size=8).map(sorted)


@given(times, times)
def test_merge_sorts_stably_and_loses_nothing(ls_times, be_times):
    ls = [Arrival(f"ls-{i}", 1, t, 1, 1) for i, t in enumerate(ls_times)]
    be = [Arrival(f"be-{i}", 0, t, 1, 1) for i, t in enumerate(be_times)]
    merged = merge(ls, be)
    assert [a for a in merged if a.priority == 1] == ls
    assert [a for a in merged if a.priority == 0] == be
    assert [(a.arrival_s, -a.priority) for a in merged] == sorted((a.arrival_s, -a.priority) for a in merged)


def test_merge_refuses_an_id_that_comes_twice():
    one = Arrival("x-0", 1, 0.0, 1, 1)
    with pytest.raises(ValueError, match="'x-0' comes twice"):
        merge([one], [one])


@given(st.integers(1, 300), st.integers(1, 200_000), st.integers(0, 2**40))
def test_prompts_have_their_length_and_vocabulary(length, vocab, seed):
    ids = prompt_ids(Arrival("be-1", 0, 0.0, length, 1), vocab, seed)
    assert len(ids) == length
    assert all(type(i) is int and 0 <= i < vocab for i in ids)


def test_prompts_depend_on_seed_and_id_alone():
    def ids(name, seed, priority=0, at=0.0):
        return prompt_ids(Arrival(name, priority, at, 32, 1), 50_000, seed)

    assert ids("be-1", 3) == ids("be-1", 3, priority=1, at=9.5)
    assert len({tuple(ids(f"be-{i}", seed)) for i in range(20) for seed in range(5)}) == 100
    with pytest.raises(ValueError, match="vocab_size"):
        prompt_ids(Arrival("be-1", 0, 0.0, 1, 1), 0, 0)


def test_prompts_are_the_same_in_another_process():
    code = (
        "from qllm_ops.scheduler.workload import Arrival, prompt_ids;"
        "print(prompt_ids(Arrival('be-1', 0, 0.0, 12, 1), 50_000, 3))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    theirs = [int(i) for i in re.findall(r"\d+", other.stdout)]
    assert theirs == prompt_ids(Arrival("be-1", 0, 0.0, 12, 1), 50_000, 3)
