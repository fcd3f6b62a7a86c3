"""docs/performance.md is what `perf/performance_page.py` makes of perf/results, and says what is missing."""

import json
import sys
from pathlib import Path

import pytest

PERF = Path(__file__).resolve().parent.parent / "perf"
sys.path.insert(0, str(PERF))

import performance_page  # noqa: E402
from performance_page import Result, page, results  # noqa: E402


def test_the_page_is_up_to_date():
    written = performance_page.PAGE.read_text()
    assert written == page(results(performance_page.RESULTS)), "run python perf/performance_page.py"


def test_without_results_it_states_the_goals_and_claims_nothing():
    text = page([])
    assert text.count("| not measured yet |") == 13
    assert text.count("**Not measured yet.**") == 5
    assert "<= 30 us" in text


def test_every_result_has_device_date_versions_and_command():
    found = results(performance_page.RESULTS)
    text = page(found)
    for result in found:
        assert f"### {result.meta['device']}, {result.meta['date'][:10]}" in text
        assert f"`{result.meta['command']}`" in text
        assert f"torch {result.environment['versions']['torch']}" in text
        assert result.path.name in text


def spread(median: float) -> dict:
    return {"p25": median * 0.9, "p50": median, "p75": median * 1.1}


def moe_result(folder: Path, date: str = "2026-12-01T10:00:00+00:00") -> Result:
    measured = {
        "shape": "OLMoE-1B-7B",
        "tokens": 32,
        "graph_us": {"qllm": spread(200.0), "vllm": spread(250.0)},
        "ratio": {"vllm": spread(1.25)},
        "not_captured": [],
        "peers": {},
        "floor_us": 185.0,
        "bound_by": "memory",
        "of_copy": 0.925,
        "of_matmul": 0.02,
        "polling": {"overhead": 0.001, "noise": 0.0},
        "batch_invariant_times_as_long": spread(1.125),
        "memory": {"peak_bytes": 3, "output_bytes": 1, "intermediate_bytes": 1},
    }
    document = {
        "device": "NVIDIA H200",
        "device_type": "cuda",
        "date": date,
        "command": "python perf/bench_moe.py",
        "environment": {"versions": {"torch": "2.13.0", "vllm": None}, "commit": "abc"},
        "absent": {"OLMoE-1B-7B": {"triton_kernels": "not installed"}},
        "cases": [measured, {"shape": "OLMoE-1B-7B", "tokens": 8, "error": "out of | memory"}],
        "exits": [],
    }
    path = folder / f"bench_moe-h200-{date[:10]}.json"
    path.write_text(json.dumps(document))
    path.with_suffix(".png").touch()
    return Result(path, document)


def test_a_result_of_bench_moe(tmp_path):
    text = page([moe_result(tmp_path)])
    assert "### NVIDIA H200, 2026-12-01" in text
    assert "| decode, T = 8 to 256: part of the measured copy bandwidth | >= 90 % | lowest 92 %" in text
    assert "lowest 1.25x (vllm, OLMoE-1B-7B T=32), of 1 case" in text
    assert "| OLMoE-1B-7B T=32 | 200.0 (180.0-220.0) | vllm | 1.25" in text
    assert "out of \\| memory" in text
    assert "Not compared: triton_kernels: not installed." in text
    assert "../perf/results/bench_moe-h200-2026-12-01.png" in text
    assert "commit abc" in text
    assert "vllm None" not in text


def test_a_result_of_gpu_check():
    sections = {
        "environment": {"status": "done", "result": {"versions": {"torch": "2.13.0"}, "commit": "abc"}},
        "polling": {"status": "skipped", "reason": "for a test"},
    }
    meta = {"device": "NVIDIA H200", "date": "2026-12-01", "command": "python perf/gpu_check.py"}
    document = {**meta, "rehearsal": False, "passed": False, "sections": sections}
    text = page([Result(Path("gpu_check-h200-2026-12-01.json"), document)])
    for part in ("for a test", "NOT PASSED", "torch 2.13.0", "commit abc"):
        assert part in text


def test_a_result_of_bench_load():
    def loaded(seconds: float, peak: float) -> dict:
        sizes = {"model_bytes": spread(3e9), "peak_bytes": spread(peak), "private_bytes": spread(peak - 1e9)}
        return {"seconds": spread(seconds), "returned_s": spread(seconds / 2), **sizes}

    row = {
        **{"layout": "one by one", "dtype": "bfloat16", "cache": "warm", "cached": spread(1.0)},
        **{"qllm": loaded(1.0, 3.1e9), "from_pretrained": loaded(2.0, 5.5e9)},
        **{"ratio": spread(2.0), "step_ratio": spread(1.0)},
    }
    meta = {
        **{"device": "a CPU", "date": "2026-12-01", "command": "bench_load.py", "torch_threads": 1},
        **{"versions": {"torch": "2.13.0"}, "load_average": {"before": [0.5, 1, 1], "after": [2.5, 1, 1]}},
    }
    model = {
        "layers": 8,
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_local_experts": 8,
        "layer_bytes": 4e8,
    }
    document = {"meta": meta, "args": {"runs": 5}, "model": model, "rows": [row]}
    text = page([Result(Path("bench_load-a-cpu-2026-12-01.json"), document)])
    assert (
        "3.00 GB in bfloat16, of which a layer's\nexperts are 0.40 GB. Medians (quartiles) of 5 runs" in text
    )
    assert "torch_threads: 1. Load average of the machine (1 min): 0.5 before, 2.5 after" in text
    times = "1.00 (0.90-1.10) | 2.00 (1.80-2.20) | 1.00 | 2.00 (1.80-2.20)"
    memory = "+0.10 | +2.50 | +1.50 | 1.00 (0.90-1.10)"
    assert f"| one by one | bfloat16 | warm, 100 % | {times} | {memory} |" in text


def test_results_of_quantised_weights():
    def summary(median: float) -> dict:
        return {"median": median, "min": median / 2, "max": median * 2}

    meta = {"device": "a CPU", "date": "2026-12-01", "command": "x", "versions": {"torch": "2.13.0"}}
    row = {
        "shape": dict(zip("HIEKT", (8, 4, 2, 1, 64), strict=True)),
        **{"seconds": {"qllm": summary(0.002)}, "times_as_long": {"fp8": summary(1.5)}},
    }
    load = {"before": [0.5, 1, 1], "after": [2.5, 1, 1]}
    widened = {**meta, "dtype": "float32", "threads": 2, "load_average": load, "rows": [row]}
    one = {"bits": 8.01, "weights": 0.026, "output": 0.046, "published": {"a": 0.03, "b": "not installed: b"}}
    errors = {"format": "fp8", "bits_by_arithmetic": 8.002, "gaussian": one, "heavy-tailed": one}
    found = {**meta, "shape": row["shape"], "rows": [errors]}
    text = page(
        [Result(Path("bench_torch_moe-x.json"), widened), Result(Path("quantization_error-x.json"), found)]
    )
    assert "| H 8, I 4, E 2, K 1 | 64 | 2.000 | 1.50 (0.75-3.00) |" in text
    assert "0.5 before and 2.5 after" in text
    assert "| fp8 | 8.002 | 8.010 | 2.60 % | a 3.00 %; b not installed: b | 4.60 %" in text


def test_the_newest_comes_first_and_unknown_files_are_refused(tmp_path):
    for date in ("2026-12-01", "2026-12-03"):
        moe_result(tmp_path, date)
    assert [result.meta["date"] for result in results(tmp_path)] == ["2026-12-03", "2026-12-01"]
    (tmp_path / "other-1.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other-1\.json is of no known kind"):
        results(tmp_path)
