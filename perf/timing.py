"""Timing for the benchmarks on a GPU: events, graphs, interleaved rounds, and the device's ceilings.

A time is taken between two events on one stream, after a warm-up, many times; what is compared is run in
turns, in an order that changes, so that what else happens to the clocks falls on all of them alike.
On a CPU the same functions use the host's clock.
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable, Iterable

import numpy as np
import torch

Call = Callable[[], object]


def spread(values: Iterable[float]) -> dict[str, float | int] | None:
    """Count, mean, extremes and percentiles (linear interpolation); None of nothing."""
    v = np.array(list(values), dtype=float)
    if not len(v):
        return None
    p25, p50, p75, p90, p99 = (float(p) for p in np.percentile(v, (25, 50, 75, 90, 99)))
    ends = {"min": float(v.min()), "max": float(v.max())}
    return {
        "n": len(v),
        "mean": float(v.mean()),
        **ends,
        "p25": p25,
        "p50": p50,
        "p75": p75,
        "p90": p90,
        "p99": p99,
    }


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def capture(call: Call, device: torch.device) -> Call:
    """``call``'s device work as one launch without gaps between kernels. It must not wait for the device.

    What cannot be captured raises. On a CPU: the call itself.
    """
    if device.type != "cuda":
        return call
    # Libraries make their handles and Triton loads its kernels in the first calls, on a stream of their own.
    side = torch.cuda.Stream(device=device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
    try:
        with torch.cuda.graph(graph):
            call()
    except BaseException:
        torch.cuda.set_stream(current)  # a capture that fails at its end leaves its own stream behind
        raise
    # The graph has the addresses of what `call` holds, so that must live as long.
    return functools.partial(_replay, graph, call)


def _replay(graph: torch.cuda.CUDAGraph, call: Call) -> None:
    graph.replay()


class Mark:
    """A moment in the current stream of a GPU, or on the clock of the host."""

    def __init__(self, device: torch.device):
        self.event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self.event is None:
            self.time = time.perf_counter()
        else:
            self.event.record()

    def seconds_after(self, begin: Mark) -> float:
        """Waits for it."""
        if self.event is None:
            return self.time - begin.time
        self.event.synchronize()
        return begin.event.elapsed_time(self.event) * 1e-3


def timed(call: Call, device: torch.device) -> Callable[[], float]:
    """Run ``call`` once; what is returned waits for it and gives the seconds that it took."""
    begin = Mark(device)
    call()
    end = Mark(device)
    return functools.partial(end.seconds_after, begin)


def interleaved(
    calls: dict[str, Call], device: torch.device, seconds: float, least: int = 10, most: int = 400
) -> dict[str, list[float]]:
    """Seconds of every call, once per round, for about ``seconds`` and from ``least`` to ``most`` rounds."""
    for call in calls.values():
        call()
    synchronize(device)
    order = list(calls)
    times: dict[str, list[float]] = {name: [] for name in calls}
    shuffle = random.Random(0).shuffle
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < least or (time.perf_counter() < end and rounds < most):
        shuffle(order)
        waits = [(name, timed(calls[name], device)) for name in order]
        for name, wait in waits:
            times[name].append(wait())
        rounds += 1
    return times


def host_seconds(call: Call, device: torch.device, calls: int, repeats: int = 5) -> list[float]:
    """Seconds per call as a host sees them that calls ``calls`` times in a row and then waits."""
    call()
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize(device)
        times.append((time.perf_counter() - start) / calls)
    return times


def copy_bandwidth(device: torch.device, nbytes: int, repeats: int = 50) -> dict[str, float | int]:
    """Bytes read plus bytes written per second by a copy inside the device's memory."""
    source = torch.empty(nbytes // 4, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    return spread(2 * nbytes / s for s in _repeat(lambda: target.copy_(source), device, repeats))


def matmul_rate(
    device: torch.device, size: int, dtype: torch.dtype, repeats: int = 50
) -> dict[str, float | int]:
    """Operations per second of a square matrix product of random numbers, by torch's library."""
    a, b = (torch.empty(size, size, dtype=dtype, device=device).normal_() for _ in range(2))
    out = torch.empty_like(a)
    return spread(2 * size**3 / s for s in _repeat(lambda: torch.mm(a, b, out=out), device, repeats))


def _repeat(call: Call, device: torch.device, repeats: int) -> list[float]:
    """After a warm-up that lets an idle device's clocks rise."""
    until = time.perf_counter() + (0.3 if device.type == "cuda" else 0.0)
    call()
    while time.perf_counter() < until:
        for _ in range(5):
            call()
        synchronize(device)
    waits = [timed(call, device) for _ in range(repeats)]
    return [wait() for wait in waits]
