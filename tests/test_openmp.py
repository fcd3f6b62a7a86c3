"""OpenMP's workers are given back, and come again."""

import os
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from qllm_ops import PriorityFlag, openmp
from qllm_ops.openmp import release_workers

gnu = pytest.mark.skipif(
    openmp._pause() is None or torch.get_num_threads() < 2, reason="torch does not use GNU's OpenMP here"
)


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def compute() -> torch.Tensor:
    return torch.ones(400, 400) @ torch.ones(400, 400)


@gnu
def test_workers_end_and_start_again():
    expected = compute()
    before = threads()
    release_workers()
    release_workers()  # nothing is left to give back
    assert threads() == before - (torch.get_num_threads() - 1)
    assert torch.equal(compute(), expected)
    assert threads() == before


@gnu
def test_a_thread_gives_back_its_own_workers_only():
    compute()
    before, computed, go = threads(), threading.Event(), threading.Event()

    def other():
        compute()
        computed.set()
        go.wait(30)

    thread = threading.Thread(target=other)
    thread.start()
    computed.wait(30)
    with_both = threads()
    release_workers()
    after = threads()
    go.set()
    thread.join()
    assert with_both == before + torch.get_num_threads()
    assert after == with_both - (torch.get_num_threads() - 1)


@gnu
def test_a_thread_that_waits_at_the_flag_has_none():
    flag, counts = PriorityFlag(), []
    flag.pause(0)

    def wait():
        compute()
        counts.append(threads())
        flag.wait(0)

    compute()
    thread = threading.Thread(target=wait)
    thread.start()
    deadline = time.monotonic() + 10
    while (not counts or threads() == counts[0]) and time.monotonic() < deadline:
        time.sleep(0.001)
    waiting = threads()
    flag.resume(0)
    thread.join()
    assert waiting == counts[0] - (torch.get_num_threads() - 1)


@pytest.mark.parametrize("maps", ["", "0-1 r 0 0:0 0 /a/libgomp.so\n0-1 r 0 0:0 0 /b/libgomp.so\n", None])
def test_without_one_gnu_runtime_nothing_happens(maps, monkeypatch):
    def read_text(path):
        if maps is None:
            raise FileNotFoundError(path)
        return maps

    monkeypatch.setattr(openmp.Path, "read_text", read_text)
    openmp._pause.cache_clear()
    try:
        release_workers()
        assert openmp._pause() is None
    finally:
        openmp._pause.cache_clear()


@pytest.mark.skipif(sys.platform != "linux", reason="about Linux")
def test_the_runtime_of_torch_is_found():
    if "libgomp" not in Path("/proc/self/maps").read_text():
        pytest.skip("torch does not use GNU's OpenMP here")
    assert openmp._pause() is not None


@pytest.mark.parametrize(
    ("policy", "count", "gnu", "spins"),
    [
        (None, None, True, True),
        ("", "", True, True),
        ("ACTIVE", None, True, True),
        ("PASSIVE", None, True, False),
        (" passive ", None, False, False),
        (None, "0", True, False),
        (None, "0", False, True),  # which is not looked at there
        ("PASSIVE", "300k", True, True),
        ("PASSIVE", "INFINITE", False, False),
    ],
)
def test_whether_workers_spin(monkeypatch, policy, count, gnu, spins):
    monkeypatch.setattr(openmp, "can_release", lambda: gnu)
    for name, value in (("OMP_WAIT_POLICY", policy), ("GOMP_SPINCOUNT", count)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert openmp.spinning() is spins
