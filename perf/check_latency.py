"""Section "latency" of `gpu_check.py`: from the host's order to pause until the launch is over.

One sample: enqueue a layer's three launches with the poll, write the flag at a random moment while they
run, and watch an event behind them. Two times come of it:

    host_us     from just before the write until the host sees the event: the write's way to the device,
                the tiles under way, the launches behind that find the flag and leave at once, and the
                host's look at the event. `bare` says what of it an idle device costs: the same with
                nothing to leave.
    device_us   from an event right behind the write, on the stream of the write, to the event behind the
                launches: both on the device's clock (half a microsecond fine), with nothing of the host.

Samples in which the launch came to its end all the same are counted, not averaged. "step" is what a caller
has: the write until `MoeRun.step` has returned in another thread, result read and all.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from check_speed import known_ceilings
from context import Context, Skip, free_memory, one_line, that_fit
from layers import (
    DEEPSEEK,
    GPT_OSS,
    MIXTRAL,
    OLMOE,
    QWEN3,
    TINY,
    Launches,
    Shape,
    Tensors,
    layer_bytes,
    layer_inputs,
    layer_name,
    settle,
    weights,
)
from timing import spread, synchronize

from qllm_ops import FULL, MoeRun, PriorityFlag
from qllm_ops.device import arch_of
from qllm_ops.tiles import MULTIPROCESSORS, layer_configs, leave_us, phase_sizes, row_class

STUCK_S = 10.0
MOMENTS = (0.03, 0.85)
"""When the flag is written, as parts of the launch's length: at random between these."""


def latency(c: Context) -> dict[str, Any]:
    plan = that_fit(c, _plan(c), layer_bytes)
    result: dict[str, Any] = c.so_far or {"bare": bare_costs(c), "cases": []}
    for (shape, num_tokens, samples), seconds in c.in_time(plan, layer_name):
        pair = weights(shape, torch.bfloat16, c.device)
        tensors = layer_inputs(shape, num_tokens, pair)
        row: dict[str, Any] = {"shape": shape.name, "tokens": num_tokens, "writers": {}}
        result["cases"].append(row)
        if c.backend == "triton":
            row["expected_us"] = expected_us(c, shape, num_tokens)
        synchronize(c.device)
        deadline = time.monotonic() + seconds
        ways = _ways(c, result["bare"], first=not result["cases"][1:])
        for n, (way, measure) in enumerate(ways):
            until = time.monotonic() + max(0.0, deadline - time.monotonic()) / (len(ways) - n)
            try:
                row["writers"][way] = measure(c, tensors, samples, until)
            except Exception as error:
                row["writers"][way] = {"error": one_line(error)}
                synchronize(c.device)
            c.say(f"{layer_name((shape, num_tokens))} {way}: {brief(row['writers'][way])}")
        del pair, tensors
        free_memory(c.device)
        c.keep(result)
    return result


def _plan(c: Context) -> list[tuple[Shape, int, int]]:
    """Shape, tokens, samples per way of writing."""
    if c.rehearsal:
        return [(TINY, 4096, 12)]
    if c.quick:
        return [(MIXTRAL, 2048, 60), (QWEN3, 2048, 60)]
    prefill = [(shape, 2048, 400) for shape in (MIXTRAL, QWEN3, OLMOE, GPT_OSS)]
    return [*prefill, (MIXTRAL, 32, 400), (MIXTRAL, 8192, 400), (DEEPSEEK, 2048, 400), (DEEPSEEK, 32, 400)]


def _ways(c: Context, bare: dict[str, Any], first: bool) -> list[tuple[str, Callable[..., dict[str, Any]]]]:
    """All ways in the first case; then the one that a `PriorityFlag` chooses here, and what a caller sees."""
    if c.backend != "triton" or c.device.type != "cuda":
        return [("step", step_exits)]
    chosen = "copy" if "error" in bare["stream"] else "stream"
    enqueued = [
        (name, lambda c, *rest, name=name: enqueued_exits(c, writer_of(name, c.device), *rest))
        for name in (("stream", "copy", "fill_") if first else (chosen,))
    ]
    return [*enqueued, ("step", step_exits)]


def expected_us(c: Context, shape: Shape, num_tokens: int) -> dict[str, float]:
    """How long a program that is told to leave a product should take at most.

    At the rates of this device, and not at those that its tiles were chosen for.
    """
    from qllm_ops.plan import multiprocessors

    arch, (_, _, read_once) = arch_of(c.device), row_class(num_tokens, shape.top_k, shape.num_experts)
    sizes = phase_sizes(shape.top_k, shape.hidden_size, shape.intermediate_size)
    configs = layer_configs(
        num_tokens=num_tokens, top_k=shape.top_k, num_experts=shape.num_experts,
        hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size, dtype=torch.bfloat16,
        arch=arch,
    )  # fmt: skip
    bandwidth, rate = known_ceilings(c)
    share = 1e-6 / multiprocessors(c.device)
    measured = replace(MULTIPROCESSORS[arch], bytes_per_us=bandwidth * share, macs_per_us=rate / 2 * share)
    with mock.patch.dict(MULTIPROCESSORS, {arch: measured}):
        return {
            phase: leave_us(phase, configs[phase], sizes[phase][1], torch.bfloat16, arch, read_once)
            for phase in ("gate_up", "down")
        }


def brief(row: dict[str, Any]) -> str:
    if "error" in row:
        return row["error"]
    if not row["host_us"]:
        return f"none of {row['samples']} left early"
    host = row["host_us"]
    text = f"p50 {host['p50']:.0f} us, p99 {host['p99']:.0f}, max {host['max']:.0f}"
    text += f" ({host['n']} of {row['samples']} left early)"
    if row.get("device_us"):
        text += f"; on the device p50 {row['device_us']['p50']:.1f}, p99 {row['device_us']['p99']:.1f}"
    return text


# -- ways of writing the flag ----------------------------------------------------------------------------


class FlagWriter:
    """A `PriorityFlag`'s own way."""

    def __init__(self, kind: str, device: torch.device):
        self.flag = PriorityFlag(device, writer=kind)
        self.stream = self.flag._write_word.stream

    def pause(self) -> None:
        self.flag.pause(0)

    def resume(self) -> None:
        self.flag.resume(0)


class FillWriter:
    """A kernel on a side stream, for comparison: it needs room beside the launch that it is to stop."""

    def __init__(self, device: torch.device):
        self.flag = PriorityFlag(device, writer="copy")
        settle(self.flag)
        _, most_urgent = torch.cuda.Stream.priority_range()
        self.stream = torch.cuda.Stream(device=device, priority=most_urgent)
        self.fill(FULL)  # load the kernel: doing so waits for the device
        self.stream.synchronize()

    def fill(self, value: int) -> None:
        with torch.cuda.stream(self.stream):
            self.flag.words[:1].fill_(value)

    def pause(self) -> None:
        self.fill(0)

    def resume(self) -> None:
        self.fill(FULL)


def writer_of(name: str, device: torch.device) -> FlagWriter | FillWriter:
    return FillWriter(device) if name == "fill_" else FlagWriter(name, device)


def warm_up(writer: FlagWriter | FillWriter) -> None:
    """The first copy of a value takes pinned memory from the driver."""
    writer.pause()
    writer.resume()
    writer.stream.synchronize()


# -- a launch that nobody waits for ----------------------------------------------------------------------


def enqueued_exits(
    c: Context, writer: FlagWriter | FillWriter, tensors: Tensors, samples: int, until: float
) -> dict[str, Any]:
    stream = torch.cuda.Stream(device=c.device)
    draw = random.Random(0)
    warm_up(writer)
    length_s = min(_exit(tensors, writer, stream, None)["length_s"] for _ in range(3))
    taken = []
    while len(taken) < samples and (len(taken) < 5 or time.monotonic() < until):
        taken.append(_exit(tensors, writer, stream, draw.uniform(*MOMENTS) * length_s))
    early = [s for s in taken if s["left_early"]]
    phases = {
        phase: {
            "host_us": spread(hosts),
            "device_us": spread(s["device_us"] for s in early if s["phase"] == n),
        }
        for n, phase in enumerate(("gate_up", "down", "combine"))
        if (hosts := [s["host_us"] for s in early if s["phase"] == n])
    }
    return {
        "samples": len(taken),
        "left_early": len(early),
        "launch_us": length_s * 1e6,
        "host_us": spread(s["host_us"] for s in early),
        "device_us": spread(s["device_us"] for s in early),
        "issue_us": spread(s["issue_us"] for s in taken),
        "to_the_end_us": spread(s["host_us"] for s in taken if not s["left_early"]),
        "by_phase": phases,
        "lost_tiles": sum(s["lost"] for s in taken),
        "programs": max((s["programs"] for s in taken), default=0),
    }


def _exit(
    tensors: Tensors, writer: FlagWriter | FillWriter, stream: torch.cuda.Stream, after_s: float | None
) -> dict[str, Any]:
    """One sample; without ``after_s`` nothing is written."""
    start, end, written = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    with torch.cuda.stream(stream):
        launches = Launches(tensors, writer.flag)
        stream.synchronize()  # the routing is not part of it
        start.record()
        launches.enqueue(poll=True)
        end.record()
    enqueued = time.perf_counter()
    if after_s is None:
        end.synchronize()
        return {"length_s": start.elapsed_time(end) * 1e-3}
    while time.perf_counter() - enqueued < after_s:
        pass
    over = end.query()
    ordered = time.perf_counter()
    writer.pause()
    issued = time.perf_counter()
    written.record(writer.stream)
    while not end.query():
        if time.perf_counter() - ordered > STUCK_S:
            raise RuntimeError(f"the launch is not over {STUCK_S:.0f} s after it was paused")
    seen = time.perf_counter()
    written.synchronize()
    writer.resume()
    writer.stream.synchronize()
    with torch.cuda.stream(stream):
        progress = launches.progress()
    pairs = list(zip(progress["done"], progress["total"], strict=True))
    unfinished = [n for n, (done, total) in enumerate(pairs) if done < total]
    return {
        "left_early": bool(unfinished) and not over,
        "phase": unfinished[0] if unfinished else None,
        "host_us": (seen - ordered) * 1e6,
        "issue_us": (issued - ordered) * 1e6,
        "device_us": written.elapsed_time(end) * 1e3,
        "lost": progress["given_back"],
        "programs": launches.programs,
    }


# -- what the caller of step() sees ----------------------------------------------------------------------


def step_exits(c: Context, tensors: Tensors, samples: int, until: float) -> dict[str, Any]:
    flag = PriorityFlag(c.device)
    flag.pause(0)
    flag.resume(0)
    draw = random.Random(0)
    length_s = min(_timed_step(c, tensors, flag, None)[1] for _ in range(3))
    early, count, lost = [], 0, 0
    while count < samples and (count < 5 or time.monotonic() < until):
        finished, seconds, thrown_away = _timed_step(c, tensors, flag, draw.uniform(*MOMENTS) * length_s)
        count += 1
        lost += thrown_away
        if not finished:
            early.append(seconds * 1e6)
    return {
        "samples": count,
        "left_early": len(early),
        "launch_us": length_s * 1e6,
        "host_us": spread(early),
        "lost_tiles": lost,
    }


def _timed_step(
    c: Context, tensors: Tensors, flag: PriorityFlag, pause_after_s: float | None
) -> tuple[bool, float, int]:
    """Whether a step in another thread came to its end, how long after the order it returned (without an
    order: after its beginning), and how many tiles it had taken and not done."""
    run = MoeRun(*tensors, flag=flag, backend=c.backend)
    run.tiles_total  # noqa: B018  (waits for the routing)
    begun, seen = threading.Event(), {}

    def step() -> None:
        on_gpu = c.device.type == "cuda"
        with torch.cuda.stream(torch.cuda.Stream(device=c.device)) if on_gpu else contextlib.nullcontext():
            seen["begun"] = time.perf_counter()
            begun.set()
            seen["finished"] = run.step()
            seen["ended"] = time.perf_counter()

    thread = threading.Thread(target=step, daemon=True)
    thread.start()
    begun.wait()
    ordered = seen["begun"]
    if pause_after_s is not None:
        time.sleep(pause_after_s)
        ordered = time.perf_counter()
        flag.pause(0)
    thread.join(STUCK_S)
    flag.resume(0)
    settle(flag)
    if "ended" not in seen:
        raise RuntimeError(f"the step has not ended {STUCK_S:.0f} s after it was paused, or it raised")
    return seen["finished"], seen["ended"] - ordered, run.tiles_taken - run.tiles_done


# -- what nothing costs ----------------------------------------------------------------------------------


def bare_costs(c: Context, samples: int = 200) -> dict[str, Any]:
    """The same order on an idle device: what of an exit latency is not the kernel's."""
    if c.device.type != "cuda":
        flag = PriorityFlag(c.device)
        times = []
        for _ in range(samples):
            start = time.perf_counter()
            flag.pause(0)
            times.append((time.perf_counter() - start) * 1e6)
            flag.resume(0)
        return {"write": {"issue_us": spread(times)}}
    costs: dict[str, Any] = {}
    stream = torch.cuda.Stream(device=c.device)
    event = torch.cuda.Event()

    def empty() -> None:
        event.record(stream)
        while not event.query():
            pass

    costs["empty"] = {"host_us": spread(_times(empty, samples))}
    costs["empty_synchronize"] = {"host_us": spread(_times(stream.synchronize, samples))}
    for name in ("stream", "copy", "fill_"):
        try:
            costs[name] = _bare_write(writer_of(name, c.device), samples)
        except Exception as error:
            costs[name] = {"error": one_line(error)}
            continue
        c.say(f"writing by {name}, idle device: p50 {costs[name]['done_us']['p50']:.1f} us until done")
    if "error" in costs["stream"] and "error" in costs["copy"]:
        raise Skip(f"no way of writing the flag works: {costs['stream']['error']}; {costs['copy']['error']}")
    return costs


def _bare_write(writer: FlagWriter | FillWriter, samples: int) -> dict[str, Any]:
    """Issue: the call. Done: until an event behind the write is seen."""
    warm_up(writer)
    issue, done = [], []
    event = torch.cuda.Event()
    for _ in range(samples):
        start = time.perf_counter()
        writer.pause()
        issue.append((time.perf_counter() - start) * 1e6)
        event.record(writer.stream)
        while not event.query():
            pass
        done.append((time.perf_counter() - start) * 1e6)
        writer.resume()
        writer.stream.synchronize()
    return {"issue_us": spread(issue), "done_us": spread(done)}


def _times(call: Callable[[], object], samples: int) -> list[float]:
    times = []
    for _ in range(samples):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
    return times
