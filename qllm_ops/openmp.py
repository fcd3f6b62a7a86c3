"""OpenMP's worker threads, given back by a thread that stands still.

Every host thread that computes has a team of OpenMP workers of its own. GNU's runtime, which torch uses
on Linux, lets a worker spin for its next job only while all teams together are no more than the cores;
with one team too many each small operation pays for waking a thread. On two cores a decode step of a small
model takes a quarter longer when another thread once ran on torch, even though that thread does nothing.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path

_SOFT = 1  # omp_pause_soft


def release_workers() -> None:
    """End the calling thread's OpenMP workers; its next parallel operation starts new ones.

    For a thread that will wait: takes some tens of microseconds, now and when it goes on. Does nothing
    where torch does not use GNU's OpenMP. Must not be called from inside a parallel operation.
    """
    pause = _pause()
    if pause is not None:
        pause(_SOFT)


def spinning() -> bool:
    """Whether a worker spins for a while when it has nothing to do, as the environment has it: it does unless
    OMP_WAIT_POLICY is PASSIVE, or, for GNU's OpenMP, which asks for it first, GOMP_SPINCOUNT is 0."""
    spins = os.environ.get("GOMP_SPINCOUNT", "").strip()
    if spins and can_release():
        return spins != "0"
    return os.environ.get("OMP_WAIT_POLICY", "").strip().lower() != "passive"


def can_release() -> bool:
    """Whether `release_workers` does anything here."""
    return _pause() is not None


@functools.cache
def _pause() -> Callable[[int], int] | None:
    """`omp_pause_resource_all` (OpenMP 5.0) of the libgomp that is loaded, if one is."""
    try:
        maps = Path("/proc/self/maps").read_text()
        paths = {line.split(maxsplit=5)[5] for line in maps.splitlines() if "libgomp" in line}
        if len(paths) != 1:  # with several there is no telling which one computes
            return None
        return ctypes.CDLL(paths.pop()).omp_pause_resource_all
    except (OSError, AttributeError):
        return None
