"""`perf/bench_load.py`: that its child measures, and with it that loading keeps nothing beside the model."""

import sys
from pathlib import Path

import pytest

PERF = Path(__file__).resolve().parent.parent / "perf"
sys.path.insert(0, str(PERF))

import bench_load  # noqa: E402

from qllm_ops.models.reader import BUFFER_BYTES, READERS  # noqa: E402


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory needs Linux's /proc")
def test_a_load_holds_the_model_and_its_readers_buffers(tmp_path):
    """Half a gigabyte of experts one by one becomes one of float32: a copy of anything would show."""
    model = bench_load.in_child("write", str(tmp_path), "one by one", "1")
    assert bench_load.cached(tmp_path) > 0  # else it would be no measure of a warm cache
    run = bench_load.in_child("qllm", str(tmp_path), "float32")
    assert run["model_bytes"] > 2 * model["layer_bytes"]
    assert run["model_bytes"] < run["private_bytes"] <= run["peak_bytes"]
    rest = 40e6  # modules that are imported late, the allocator, the header
    assert run["peak_bytes"] < run["model_bytes"] + READERS * BUFFER_BYTES + rest
    assert 0 < run["returned_s"] < run["seconds"]
    assert run["step_s"] > 0
