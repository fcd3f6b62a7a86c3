"""The Perfetto timeline: valid events, slices that nest, nothing left out."""

import json
from collections import defaultdict

from hypothesis import given
from hypothesis import strategies as st

from qllm_ops.scheduler.report import LS_ALONE, Finished, Pause, RunRecord, Span
from qllm_ops.scheduler.timeline import trace_events, write_perfetto


def by_thread(events):
    threads = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            threads[event["pid"], event["tid"]].append(event)
    return threads


def check(events):
    """Every event is well formed, and slices of one thread nest or stand apart."""
    processes, threads = {}, {}
    for event in events:
        assert event["ph"] in ("X", "i", "M")
        assert isinstance(event["name"], str)
        assert event["name"]
        assert type(event["ts"]) is int
        assert type(event["pid"]) is int
        assert type(event["tid"]) is int
        if event["ph"] == "X":
            assert type(event["dur"]) is int
            assert event["dur"] >= 0
            assert event["cat"]
        if event["ph"] == "i":
            assert event["s"] == "t"
        if event["ph"] == "M" and event["name"] == "process_name":
            assert event["pid"] not in processes
            processes[event["pid"]] = event["args"]["name"]
        if event["ph"] == "M" and event["name"] == "thread_name":
            assert event["tid"] not in threads
            assert event["tid"] not in processes
            threads[event["tid"]] = event["args"]["name"]
    for (pid, tid), slices in by_thread(events).items():
        assert pid in processes
        assert tid in threads
        open_ends = []
        # As a viewer reads them: by start, and of those that start together the one written first is outside.
        for event in sorted(slices, key=lambda e: e["ts"]):
            while open_ends and open_ends[-1] <= event["ts"]:
                open_ends.pop()
            if open_ends:
                assert event["ts"] + event["dur"] <= open_ends[-1]
            open_ends.append(event["ts"] + event["dur"])
    return processes, threads


def sample():
    tile = RunRecord(
        "tile",
        3.0,
        [
            Finished("ls-0", 1, 0.5, 0.6, 0.8, 16, 3),
            Finished("be-0", 0, 0.0, 2.0, 3.0, 2000, 4),
            Finished("be-1", 0, 0.1, None, 0.2, 9999, 0, "refused", "prompt longer than the KV budget"),
        ],
        [
            Pause("background", 0.5, 0.500031, 0.8, "tile"),
            Pause("background", 2.5, None, 2.6, "tile"),
        ],
        [
            Span("background", 0.0, 2.0, "prefill", 0, 1, 2000, ("be-0",)),
            Span("foreground", 0.5, 0.6, "prefill", 1, 0, 16, ("ls-0",)),
            Span("foreground", 0.6, 0.7, "decode", 1, 1, 2, ("ls-0", "be-0")),
        ],
    )
    return {"tile": tile, LS_ALONE: RunRecord("tile", 0.0)}


def test_the_file(tmp_path):
    path = tmp_path / "timeline.json"
    write_perfetto(sample(), path)
    trace = json.loads(path.read_text())
    events = trace["traceEvents"]
    processes, threads = check(events)
    assert list(processes.values()) == ["tile", "LS alone"]
    names = list(threads.values())
    assert names[:4] == ["foreground", "background", "pauses", "LS requests"]
    assert names[4:] == ["BE requests"] * 2  # they overlap

    named = {event["name"]: event for event in events if event["ph"] != "M"}
    assert (named["BE prefill"]["ts"], named["BE prefill"]["dur"]) == (0, 2_000_000)
    assert named["LS+BE decode"]["args"]["requests"] == ["ls-0", "be-0"]
    pause = named["pause at tile"]
    assert (pause["ts"], pause["dur"]) == (500_000, 300_000)
    assert pause["args"]["exit_us"] == 31.0
    assert named["exit"]["dur"] == 31
    assert named["pause, nothing to stop"]["dur"] == 100_000
    assert named["be-1"]["args"]["error"] == "prompt longer than the KV budget"
    assert named["ls-0"]["args"]["ttft_ms"] == 100.0
    assert named["ls-0 arrives"]["ts"] == 500_000


# Times with more digits than a microsecond, equal times, and any overlap at all.
moment = st.one_of(st.floats(0, 2), st.sampled_from([0.0, 0.5, 0.5000004, 0.5000006, 1.0]))


def ordered(count):
    return st.lists(moment, min_size=count, max_size=count).map(sorted)


@st.composite
def records(draw):
    finished = [
        Finished(f"{name}-{i}", priority, t[0], t[1] if got else None, t[2], 5, 2)
        for priority, name in ((1, "ls"), (0, "be"))
        for i, (t, got) in enumerate(draw(st.lists(st.tuples(ordered(3), st.booleans()), max_size=6)))
    ]
    pauses = []
    for asked, a, b in draw(st.lists(ordered(3), max_size=6)):
        # The order of parking and resuming is a race: either may be noted first.
        parked, resumed = draw(st.sampled_from([(a, b), (b, a), (None, b)]))
        pauses.append(Pause("background", asked, parked, resumed, "tile"))
    spans = [
        Span(lane, t[0], t[1], "decode", 1, 0, 1)
        for lane in ("foreground", "background")
        for t in draw(st.lists(ordered(2), max_size=6))
    ]
    return RunRecord("tile", 2.0, finished, pauses, spans)


@given(st.lists(records(), max_size=3))
def test_any_run_nests_and_nothing_is_left_out(runs):
    events = trace_events({f"policy {i}": run for i, run in enumerate(runs)})
    check(events)
    for pid, run in enumerate(runs, start=1):
        mine = [e for e in events if e["pid"] == pid and e["ph"] != "M"]
        outer = [e for e in mine if e["name"].startswith("pause")]
        assert sorted(e["ts"] for e in outer) == sorted(round(p.asked_s * 1e6) for p in run.pauses)
        assert sum(e["name"] == "exit" for e in mine) == sum(p.parked_s is not None for p in run.pauses)
        assert sorted(e["name"] for e in mine if e["ph"] == "i") == sorted(
            f"{f.id} arrives" for f in run.finished
        )
        assert {f.id for f in run.finished} <= {e["name"] for e in mine}
        assert sum(e["name"] == "LS decode" for e in mine) == len(run.spans)
