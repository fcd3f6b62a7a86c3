"""The picture: it is drawn whatever the runs hold, and says what it shows."""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qllm_ops.scheduler.plots import POLICY_COLORS, _visible, policy_color, typical_request, write_png
from qllm_ops.scheduler.report import LS_ALONE, Finished, Pause, RunRecord, Span, build_report


def run(policy, waits, wall=10.0):
    finished = [Finished(f"ls-{i}", 1, float(i), i + w, i + w + 0.2, 16, 3) for i, w in enumerate(waits)]
    finished.append(Finished("be-0", 0, 0.0, 4.0, 6.0, 2000, 4))
    pauses = [Pause("background", 1.0, 1.01, 1.5, "tile"), Pause("background", 7.0, None, 7.1, "tile")]
    spans = [
        Span("background", 0.0, 4.0, "prefill", 0, 1, 2000),
        Span("foreground", 1.0, 1.1, "prefill", 1, 0, 16),
        Span("foreground", 1.1, 1.5, "decode", 1, 1, 2),
    ]
    return RunRecord(policy, wall, finished, pauses, spans)


def test_draws_1400_pixels_of_png(tmp_path):
    pytest.importorskip("matplotlib")
    runs = {name: run(name, [0.1, 0.5, 1.0]) for name in ("fcfs", "tile", "mine", LS_ALONE)}
    report = build_report(runs, 0.3, {"device": "a machine", "model": "a model", "date": "2025-01-02T03:04"})
    path = tmp_path / "report.png"
    write_png(report, runs, path)
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(header[16:20], "big") == 1400


@pytest.mark.parametrize(
    "runs",
    [
        {},
        {"tile": RunRecord("tile", 0.0)},
        {LS_ALONE: run("tile", [0.1])},
        {"tile": RunRecord("tile", 1.0, [Finished("ls-0", 1, 0.0, None, 1.0, 5, 0, "failed", "x")])},
        {"tile": RunRecord("tile", 1.0, [Finished("ls-0", 1, 0.5, 0.5, 0.5, 5, 1)])},
    ],
    ids=["no runs", "empty run", "only ls alone", "none done", "a wait of zero"],
)
def test_draws_whatever_there_is(runs, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "report.png"
    write_png(build_report(runs, 0.3, {}), runs, path)
    assert path.stat().st_size > 1000


def test_without_matplotlib_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ModuleNotFoundError, match=r"qllm-ops\[plots\]"):
        write_png(build_report({}, 0.3, {}), {}, tmp_path / "report.png")


def test_the_close_up_is_of_the_median_request():
    slow, fast = run("fcfs", [0.2, 3.0, 1.0]), run("tile", [0.1, 0.1, 0.1])
    key, start, end = typical_request({"fcfs": slow, "tile": fast})
    assert key == "ls-2"  # differs by 0.9 s; the others by 0.1 and 2.9
    assert start < 2.0
    assert end >= 2.0 + 1.0
    assert end - start <= 10.0 / 3
    assert typical_request({"tile": fast}) is None
    assert typical_request({"fcfs": RunRecord("fcfs", 1.0), "tile": fast}) is None


def test_a_policy_keeps_its_colour():
    assert policy_color("tile", ["mine", "tile"]) == policy_color("tile", ["tile"]) == POLICY_COLORS["tile"]
    assert policy_color("mine", ["mine", "yours"]) != policy_color("yours", ["mine", "yours"])


@given(st.lists(st.tuples(st.floats(0, 5), st.floats(0, 0.01)), max_size=80))
def test_merging_what_is_under_a_pixel_hides_nothing(extents):
    window = (1.0, 2.0)
    drawn = _visible(extents, window)
    for start, width in extents:
        if start <= window[1] and start + width >= window[0]:
            assert any(s <= start and start + width <= s + w + 1e-9 for s, w in drawn)
    # And nothing is drawn where nothing was, but for gaps of half a pixel.
    assert sum(w for _, w in drawn) <= sum(w for _, w in extents) + 0.0005 * len(extents) + 1e-9
