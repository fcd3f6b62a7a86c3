"""What is said about runs: summaries, token comparison, the report and its table."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from qllm_ops.scheduler.report import (
    LS_ALONE,
    Finished,
    Pause,
    RunRecord,
    build_report,
    compare_tokens,
    device_meta,
    print_table,
    summarise,
    write_json,
)

DISTRIBUTION = {"mean", "p50", "p90", "p99"}


def request(name="ls-0", arrival=0.0, first=1.0, finish=3.0, tokens=(1, 2, 3), margins=None, **kw):
    return Finished(
        id=name,
        priority=1 if name.startswith("ls") else 0,
        arrival_s=arrival,
        first_token_s=first,
        finish_s=finish,
        prompt_tokens=kw.pop("prompt", 10),
        output_tokens=len(tokens),
        tokens=list(tokens),
        margins=[1.0] * len(tokens) if margins is None else list(margins),
        **kw,
    )


def run(*finished, policy="tile", wall=10.0, **kw):
    return RunRecord(policy, wall, list(finished), **kw)


def lost(name, status, error=None, **kw):
    return request(name, first=None, tokens=(), status=status, error=error, **kw)


# -- one run -------------------------------------------------------------------------------------------


def test_a_summary_by_hand():
    s = summarise(
        run(
            request("ls-0", 0.0, 0.5, 2.5, tokens=(1, 2, 3)),  # ttft 0.5, tpot 1.0, turnaround 2.5
            request("ls-1", 1.0, 2.5, 2.5, tokens=(4,)),  # ttft 1.5, no tpot, turnaround 1.5
            request("be-0", 0.0, 4.0, 8.0, tokens=(1,) * 5, prompt=2000),
            wall=8.0,
        ),
        slo_s=1.0,
    )
    assert s["ls"]["ttft_s"] == pytest.approx({"mean": 1.0, "p50": 1.0, "p90": 1.4, "p99": 1.49})
    assert s["ls"]["tpot_s"] == {"mean": 1.0, "p50": 1.0, "p90": 1.0, "p99": 1.0}
    assert s["ls"]["turnaround_s"]["mean"] == 2.0
    assert s["be"]["tpot_s"]["mean"] == 1.0
    assert (s["requests"], s["ls"]["requests"], s["be"]["completed"]) == (3, 2, 1)
    assert s["tokens_per_s"] == pytest.approx((10 + 3 + 10 + 1 + 2000 + 5) / 8.0)
    assert s["generated_tokens_per_s"] == pytest.approx(9 / 8.0)
    assert s["slo_attainment"] == 0.5


def test_the_slo_includes_its_bound_and_counts_failures_against():
    requests = [
        request("ls-0", first=1.0),
        request("ls-1", first=1.0 + 1e-9),
        lost("ls-2", "failed", "out of memory"),
        lost("ls-3", "refused", "prompt too long"),
    ]
    s = summarise(run(*requests), slo_s=1.0)
    assert s["slo_attainment"] == 0.25
    assert (s["ls"]["completed"], s["ls"]["failed"], s["ls"]["refused"], s["ls"]["cancelled"]) == (2, 1, 1, 0)
    assert s["ls"]["errors"] == {"out of memory": 1, "prompt too long": 1}


def test_what_failed_after_its_first_token_is_in_no_latency_and_no_throughput():
    done = request("be-0", first=1.0)
    broken = request("be-1", first=100.0, finish=200.0, status="failed", error="x")
    assert summarise(run(done, broken), 1.0)["be"]["ttft_s"]["mean"] == 1.0
    assert summarise(run(done, broken), 1.0)["tokens_per_s"] == summarise(run(done), 1.0)["tokens_per_s"]


def test_preemptions_by_hand():
    pauses = [
        Pause("background", 1.0, 1.002, 1.5, "tile"),
        Pause("background", 2.0, 2.004, 2.5, "attention"),
        Pause("background", 3.0, None, 3.5, "tile"),
    ]
    p = summarise(run(pauses=pauses, wasted_tiles=7), 1.0)["preemptions"]
    assert (p["count"], p["stopped"], p["wasted_tiles"]) == (3, 2, 7)
    assert p["by_place"] == {"tile": 1, "attention": 1}
    assert p["exit_s"] == pytest.approx({"p50": 0.003, "p99": 0.00398, "mean": 0.003, "max": 0.004})
    assert p["paused_s"] == pytest.approx(0.498 + 0.496)


@pytest.mark.parametrize(
    "record",
    [
        run(),
        run(wall=0.0),
        run(request("be-0")),
        run(request("ls-0", tokens=(1,))),
        run(lost("ls-0", "failed"), lost("be-0", "cancelled")),
        run(request("ls-0", first=None, tokens=())),  # done with nothing to generate
        run(pauses=[Pause("background", 0.0, None, 1.0, "tile")]),
    ],
    ids=["nothing", "no time", "no ls", "one token", "none done", "no token", "no exit"],
)
def test_what_is_missing_is_null(record):
    s = summarise(record, 1.0)
    text = json.dumps(s, allow_nan=False)
    assert set(s["ls"]["ttft_s"]) == DISTRIBUTION
    if not any(f.priority for f in record.finished):
        assert s["slo_attainment"] is None
        assert s["ls"]["ttft_s"] == dict.fromkeys(DISTRIBUTION)
    assert "NaN" not in text


def test_an_unknown_status_is_refused():
    with pytest.raises(ValueError, match="status of be-3 must be one of done, failed, cancelled, refused"):
        request("be-3", status="fine")


times = st.floats(0, 1e4, allow_nan=False)


@given(st.lists(times, min_size=1, max_size=60), st.floats(1e-3, 1e4))
def test_laws_of_a_distribution(values, slo):
    s = summarise(run(*[request(f"ls-{i}", first=v, finish=v + 1) for i, v in enumerate(values)]), slo)
    d = s["ls"]["ttft_s"]
    low, high = min(values), max(values)
    slack = 1e-9 * (1 + high)
    assert low - slack <= d["p50"] <= d["p90"] + slack <= d["p99"] + 2 * slack <= high + 3 * slack
    assert low - slack <= d["mean"] <= high + slack
    # Linear interpolation: rank (n - 1) q between the two neighbours.
    for q, name in ((0.5, "p50"), (0.9, "p90"), (0.99, "p99")):
        rank = (len(values) - 1) * q
        a, b = sorted(values)[math.floor(rank)], sorted(values)[math.ceil(rank)]
        assert d[name] == pytest.approx(a + (b - a) * (rank - math.floor(rank)), abs=slack)
    assert s["slo_attainment"] == sum(v <= slo for v in values) / len(values)


# -- tokens --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        (((1, 2, 3), (9, 9, 9)), ((1, 2, 3), (0, 0, 0)), "equal"),
        (((1, 2, 3), (9, 1e-5, 9)), ((1, 7, 8), (9, 1e-5, 9)), "ties"),
        (((1, 2, 3), (9, 1e-3, 9)), ((1, 7, 8), (9, 0.0, 9)), "ties"),  # the bound itself
        (((1, 2, 3), (9, 1e-5, 9)), ((1, 7, 8), (9, 0.5, 9)), "mismatches"),  # one side was sure
        (((1, 2, 3), (9, 0.5, 9)), ((1, 7, 8), (9, 1e-5, 9)), "mismatches"),
        (((1, 2, 3), (1e-5, 9, 1e-5)), ((1, 7, 3), (1e-5, 9, 1e-5)), "mismatches"),  # ties elsewhere
        (((1, 2, 3), (9, 9, 1e-5)), ((1, 2), (9, 9)), "mismatches"),  # one goes on
        (((1, 2), (9, 1e-5)), ((1, 7), (9,)), "mismatches"),  # no margin, no excuse
        (((1, 2), (9, float("nan"))), ((1, 7), (9, 1e-5)), "mismatches"),
    ],
)
def test_equal_tie_mismatch(ours, theirs, verdict):
    a = run(request("be-0", tokens=ours[0], margins=ours[1]))
    b = run(request("be-0", tokens=theirs[0], margins=theirs[1]))
    result = compare_tokens(a, b, tolerance=1e-3)
    counts = {
        "equal": result["equal"],
        "ties": result["ties"]["count"],
        "mismatches": result["mismatches"]["count"],
    }
    assert counts == {**dict.fromkeys(counts, 0), verdict: 1}
    if verdict != "equal":
        (found,) = result[verdict]["requests"]
        json.dumps(result, allow_nan=False)
        assert found["id"] == "be-0"
        assert found["step"] == next(
            (i for i, (x, y) in enumerate(zip(ours[0], theirs[0], strict=False)) if x != y), 2
        )


def test_requests_in_one_run_only_are_listed():
    a = run(request("ls-0"), request("be-0"), request("be-1"))
    b = run(request("ls-0"), lost("be-0", "failed"), request("be-2"))
    result = compare_tokens(a, b)
    assert (result["compared"], result["equal"]) == (1, 1)
    assert result["only_in_baseline"] == ["be-0", "be-1"]
    assert result["only_in_other"] == ["be-2"]


outputs = st.lists(st.tuples(st.integers(0, 2), st.sampled_from([0.0, 1e-4, 0.5])), min_size=1, max_size=5)


@given(st.lists(st.tuples(outputs, outputs), max_size=6))
def test_comparison_is_symmetric_and_counts_every_request(pairs):
    def tokens(output):
        return [token for token, _ in output]

    def margins(output):
        return [margin for _, margin in output]

    runs = [
        run(
            *[
                request(f"be-{i}", tokens=tokens(p[side]), margins=margins(p[side]))
                for i, p in enumerate(pairs)
            ]
        )
        for side in (0, 1)
    ]
    ab, ba = compare_tokens(*runs), compare_tokens(*reversed(runs))
    for result in (ab, ba):
        assert result["equal"] + result["ties"]["count"] + result["mismatches"]["count"] == len(pairs)
    for kind in ("ties", "mismatches"):
        assert [f["id"] for f in ab[kind]["requests"]] == [f["id"] for f in ba[kind]["requests"]]
    assert compare_tokens(runs[0], runs[0])["equal"] == len(pairs)


# -- the report ----------------------------------------------------------------------------------------


@pytest.fixture
def runs():
    def policy(name, ls_first, be_finish, wall):
        pauses = [Pause("background", 1.0, 1.25, 2.0, "tile")] if name in ("tile", "layer") else []
        return run(
            request("ls-0", 1.0, 1.0 + ls_first, 2.0 + ls_first),
            request("be-0", 0.0, 3.0, be_finish, prompt=1000),
            policy=name,
            wall=wall,
            pauses=pauses,
        )

    alone = run(request("ls-0", 1.0, 1.5, 2.5), policy="tile", wall=2.0)
    return {
        "fcfs": policy("fcfs", 4.0, 8.0, 8.0),
        "priority": policy("priority", 2.0, 9.0, 9.0),
        "tile": policy("tile", 0.5, 10.0, 10.0),
        LS_ALONE: alone,
    }


def test_the_report_has_what_is_promised(runs):
    report = build_report(runs, 1.0, {"device": "a machine", "seed": 3})
    assert report["meta"] == {"device": "a machine", "seed": 3}
    assert report["slo_s"] == 1.0
    assert list(report["policies"]) == ["fcfs", "priority", "tile"]
    for summary in (*report["policies"].values(), report["ls_alone"]):
        for cls in ("ls", "be"):
            for kind in ("ttft_s", "tpot_s", "turnaround_s"):
                assert set(summary[cls][kind]) == DISTRIBUTION
        assert {"requests", "tokens_per_s", "slo_attainment"} <= set(summary)
        assert {"count", "exit_s", "wasted_tiles"} <= set(summary["preemptions"])
        assert {"p50", "p99", "mean", "max"} == set(summary["preemptions"]["exit_s"])
    assert report["versus_fcfs"] == {
        "priority": pytest.approx(
            {
                "ls_ttft_mean": 0.5,
                "ls_turnaround_mean": 3 / 5,
                "be_turnaround_mean": 9 / 8,
                "tokens_per_s": 8 / 9,
            }
        ),
        "tile": pytest.approx(
            {
                "ls_ttft_mean": 0.125,
                "ls_turnaround_mean": 1.5 / 5,
                "be_turnaround_mean": 10 / 8,
                "tokens_per_s": 0.8,
            }
        ),
    }
    assert report["versus_ls_alone"]["fcfs"]["ls_ttft_mean"] == 8.0
    assert report["versus_ls_alone"]["tile"]["ls_ttft_mean"] == 1.0
    assert report["tokens"]["baseline"] == "fcfs"
    assert (report["tokens"]["ties"], report["tokens"]["mismatches"]) == (0, 0)
    # LS alone is held against the LS requests only: that it has no BE is no finding.
    assert report["tokens"]["versus"][LS_ALONE]["only_in_baseline"] == []
    assert report["notes"] == []


def test_a_report_without_fcfs_or_ls_alone_says_so(runs):
    report = build_report({"priority": runs["priority"], "tile": runs["tile"]}, 1.0, {})
    assert report["versus_fcfs"] == {}
    assert report["versus_ls_alone"] == {}
    assert report["ls_alone"] is None
    assert report["tokens"]["baseline"] == "priority"
    assert [("fcfs" in note, "LS alone" in note) for note in report["notes"]] == [
        (True, False),
        (False, True),
    ]


def test_lost_requests_and_differing_tokens_are_said(runs):
    runs["tile"].finished.append(lost("ls-9", "failed", "gone"))
    runs["tile"].finished[1].tokens[1] = 77
    report = build_report(runs, 1.0, {})
    assert any("tile: 1 of 2 LS requests did not complete" in note for note in report["notes"])
    assert report["tokens"]["mismatches"] == 1
    assert report["tokens"]["versus"]["tile"]["mismatches"]["requests"][0]["id"] == "be-0"
    assert build_report(runs, 1.0, {}, tie_tolerance=1.0)["tokens"]["ties"] == 1


def test_empty_classes_give_nulls_everywhere(runs, tmp_path):
    for record in runs.values():
        record.finished = [f for f in record.finished if f.priority == 0]
    report = build_report(runs, 1.0, {})
    assert report["versus_fcfs"]["tile"]["ls_ttft_mean"] is None
    assert report["versus_fcfs"]["tile"]["be_turnaround_mean"] == pytest.approx(10 / 8)
    write_json(report, tmp_path / "report.json")
    print_table(report, Console(file=(tmp_path / "table.txt").open("w"), width=80))


@pytest.mark.parametrize("runs_given", [{}, {LS_ALONE: run(request())}])
def test_a_report_of_hardly_anything(runs_given, tmp_path):
    report = build_report(runs_given, 1.0, {})
    write_json(report, tmp_path / "report.json")
    print_table(report, Console(file=(tmp_path / "table.txt").open("w"), width=80))


@pytest.mark.parametrize("slo", [0, -1.0, float("nan")])
def test_a_bad_slo(slo):
    with pytest.raises(ValueError, match="slo_s must be a positive number"):
        build_report({}, slo, {})


def test_json_is_strict(runs, tmp_path):
    path = tmp_path / "report.json"
    report = build_report(runs, 1.0, {"model": "Mixtral"})
    write_json(report, path)

    def refuse(constant):
        raise AssertionError(f"{constant} in strict JSON")

    assert json.loads(path.read_text(), parse_constant=refuse) == report
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json({**report, "slo_s": float("inf")}, path)
    assert json.loads(path.read_text()) == report  # the good file is still there


def test_the_table_fits_80_columns_and_shows_every_run(runs, tmp_path):
    path = tmp_path / "table.txt"
    runs["tile"].finished.append(lost("be-9", "failed", "[oops]"))
    with path.open("w") as file:
        print_table(build_report(runs, 1.0, {}), Console(file=file, width=80))
    text = path.read_text()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    for name in ("fcfs", "priority", "tile", "LS alone"):
        assert sum(line.strip().startswith(f"{name} ") for line in text.splitlines()) == 2
    tile = next(line.split() for line in text.splitlines() if line.split()[:1] == ["tile"])
    # mean, p50, p99 in ms; over LS alone; fcfs over this; turnarounds; tokens/s; over fcfs
    assert tile[1:] == ["500", "500", "500", "1.00x", "8.00x", "1,500", "10", "102", "0.800"]
    assert "250" in text  # the exit in ms
    assert "note: tile: 1 of 2 BE requests did not complete" in text


def test_no_digit_is_cut_off_however_narrow(runs, tmp_path):
    path = tmp_path / "table.txt"
    slow = runs["fcfs"].finished[0]
    slow.first_token_s, slow.finish_s = 1234.567, 2345.678
    with path.open("w") as file:
        print_table(build_report(runs, 1.0, {}), Console(file=file, width=30))
    assert "1,233,567" in path.read_text()
    assert "…" not in path.read_text()


def test_device_meta_is_complete_and_serialisable():
    meta = device_meta("cpu")
    json.dumps(meta, allow_nan=False)
    assert meta["device"]
    assert meta["cores"] >= 1
    assert {"python", "torch", "triton", "transformers"} <= set(meta["versions"])
    assert meta["versions"]["torch"] is not None
    assert meta["date"].endswith("+00:00")
    assert "/" not in meta["command"].split()[0]
