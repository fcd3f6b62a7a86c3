"""Section "lanes" of `gpu_check.py`: what a gate costs that nobody closes, and two classes side by side.

gates    Layers that are called one after another as a model calls them, and waited for at the end: without a
         flag, under a flag with a host gate, and under one with a stream gate. Then, under each gate, while
         another thread pauses and resumes the class at random: whether all bits are those of an uninterrupted
         call. And whether this driver captures the stream gate in a CUDA graph.
shares   Best-effort prefills in one stream, confined to a part of the programs by `flag.share`, and decode
         layers in a stream of high priority meanwhile. How much longer the decodes take than alone; and how
         much both get done in that time, against taking turns: (decodes x their time alone + prefills x
         theirs) / time. Above 1, sharing does more than turns do. A part that runs alone shows that the share
         confines: bound by arithmetic, half of the programs take twice the time.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from check_speed import rotated
from context import Context, free_memory, one_line, that_fit
from layers import MIXTRAL, QWEN3, TINY, Launches, Shape, Tensors, layer_bytes, layer_name, weights
from timing import capture, host_seconds, spread, synchronize

from qllm_ops import FULL, PriorityFlag, moe

PARTS = (0.25, 0.5, 0.75, 1.0)
"""Shares of the programs that best-effort work is confined to."""

DECODE_TOKENS, PREFILL_TOKENS, DECODES = 8, 2048, 100


def lanes(c: Context) -> dict[str, Any]:
    result: dict[str, Any] = c.so_far or {"gates": [], "shares": []}
    plan = that_fit(c, _plan(c), layer_bytes)
    for (shape, num_tokens), seconds in c.in_time(plan, layer_name):
        pair = weights(shape, torch.float32 if c.rehearsal else torch.bfloat16, c.device)
        for name, measure in (("gates", gates), ("shares", shares)):
            if name == "shares" and (c.device.type != "cuda" or num_tokens > DECODE_TOKENS):
                continue  # on a CPU one program runs at a time
            row: dict[str, Any] = {"shape": shape.name, "tokens": num_tokens}
            result[name].append(row)
            try:
                row |= measure(c, shape, num_tokens, pair, 0.4 * seconds)
            except Exception as error:
                row["error"] = one_line(error)
                synchronize(c.device)
            c.say(f"{name}, {layer_name((shape, num_tokens))}: {brief(row)}")
        del pair
        free_memory(c.device)
        c.keep(result)
    wrong = any(way["wrong"] for row in result["gates"] for way in _ways(row))
    return result | {"passed": not wrong and not any("error" in row for row in result["gates"])}


def _plan(c: Context) -> list[tuple[Shape, int]]:
    if c.rehearsal:
        return [(TINY, 64)]
    if c.quick:
        return [(MIXTRAL, DECODE_TOKENS), (MIXTRAL, PREFILL_TOKENS)]
    return [(shape, t) for shape in (MIXTRAL, QWEN3) for t in (DECODE_TOKENS, PREFILL_TOKENS)]


def _ways(row: dict[str, Any]) -> list[dict[str, Any]]:
    return list(row.get("paused", {}).values())


def brief(row: dict[str, Any]) -> str:
    if "error" in row:
        return row["error"]
    if "parts" in row:
        slower = [part["decode_us"] / row["decode_alone_us"] for part in row["parts"]]
        return "; ".join(
            f"{part['part']:.0%} of the programs: decode {times:.2f}x as long, turns {part['of_turns']:.2f}x"
            for part, times in zip(row["parts"], slower, strict=True)
        )
    times = ", ".join(f"{way} {us['p50']:.0f} us" for way, us in row["called_us"].items())
    wrong = sum(way["wrong"] for way in _ways(row))
    passes = sum(way["passes"] for way in _ways(row))
    return f"{times} a layer; {wrong} of {passes} paused passes differ; {row['graph']}"


# -- gates -----------------------------------------------------------------------------------------------


def gates(
    c: Context, shape: Shape, num_tokens: int, pair: tuple[torch.Tensor, torch.Tensor], seconds: float
) -> dict[str, Any]:
    inputs = rotated(shape, num_tokens, pair)
    flags: dict[str, PriorityFlag | None] = {"no flag": None, "host": PriorityFlag(c.device)}
    graph = "no graph of a stream gate on a CPU"
    try:
        flags["stream"] = PriorityFlag(c.device, gate="stream")
    except ValueError as error:
        graph = one_line(error)
    calls = {way: _layers(c, inputs, flag) for way, flag in flags.items()}
    times: dict[str, list[float]] = {way: [] for way in calls}
    for _ in range(3):
        for way, call in calls.items():
            times[way] += host_seconds(call, c.device, calls=1 if c.rehearsal else 5, repeats=3)
    row: dict[str, Any] = {
        "called_us": {way: spread(s / len(inputs) * 1e6 for s in each) for way, each in times.items()},
        "graph": graph,
    }
    expected = moe(*inputs[0], backend=c.backend)
    row["paused"] = {
        gate: while_paused(c, inputs[0], flag, expected, seconds / 2) for gate, flag in flags.items() if flag
    }
    if c.device.type == "cuda" and "stream" in calls:  # last: nobody knows what a refusal leaves behind
        try:
            capture(calls["stream"], c.device)()
            synchronize(c.device)
            row["graph"] = "the stream gate is captured in a graph"
        except Exception as error:
            row["graph"] = f"no graph of the stream gate: {one_line(error)}"
    return row


def _layers(c: Context, inputs: list[Tensors], flag: PriorityFlag | None) -> Callable[[], object]:
    return lambda: [moe(*tensors, flag=flag, backend=c.backend) for tensors in inputs]


def while_paused(
    c: Context, tensors: Tensors, flag: PriorityFlag, expected: torch.Tensor, seconds: float
) -> dict[str, Any]:
    """Passes whose class another thread pauses and resumes at random; how many have other bits."""
    over = threading.Event()
    draw = random.Random(0)
    pauses = 0

    def urgent() -> None:
        nonlocal pauses
        while not over.is_set():
            with flag.urgent(1, timeout_s=5.0):
                time.sleep(draw.uniform(0, 5e-4))
            pauses += 1
            time.sleep(draw.uniform(0, 5e-4))

    thread = threading.Thread(target=urgent, daemon=True)
    thread.start()
    passes = wrong = 0
    until = time.monotonic() + seconds
    try:
        while passes < 10 or (time.monotonic() < until and passes < 2000):
            # Several in a row, so that a stream gate is ahead of its device.
            outputs = [moe(*tensors, flag=flag, backend=c.backend) for _ in range(5)]
            wrong += sum(not torch.equal(output, expected) for output in outputs)
            passes += len(outputs)
    finally:
        over.set()
        thread.join()
    return {"passes": passes, "pauses": pauses, "wrong": wrong}


# -- shares ----------------------------------------------------------------------------------------------


def shares(
    c: Context, shape: Shape, num_tokens: int, pair: tuple[torch.Tensor, torch.Tensor], seconds: float
) -> dict[str, Any]:
    least, most = torch.cuda.Stream.priority_range()
    urgent, patient = (torch.cuda.Stream(c.device, priority=p) for p in (most, least))
    flag = PriorityFlag(c.device)
    decodes = rotated(shape, num_tokens, pair)
    decodes = [decodes[i % len(decodes)] for i in range(DECODES)]
    (prefill,) = rotated(shape, PREFILL_TOKENS, pair)[:1]
    launches = Launches(prefill, flag)
    synchronize(c.device)

    def decode() -> None:
        for tensors in decodes:
            moe(*tensors, backend=c.backend)

    def time_of(stream: torch.cuda.Stream, call: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(stream):
            start.record()
            call()
            end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3

    def prefills(count: int) -> list[torch.cuda.Event]:
        ends = []
        with torch.cuda.stream(patient):
            for _ in range(count):
                launches.rewind()
                launches.enqueue(poll=True)
                ends.append(torch.cuda.Event(enable_timing=True))
                ends[-1].record()
        return ends

    replay = capture(decode, c.device)  # so that no host decides how fast decodes follow each other
    decode_us = min(time_of(urgent, replay) for _ in range(5)) / DECODES
    alone_us = min(time_of(patient, lambda: prefills(1)) for _ in range(5))
    row: dict[str, Any] = {"decode_alone_us": decode_us, "prefill_alone_us": alone_us, "parts": []}
    for part in PARTS:
        programs = max(1, int(part * launches.programs))
        flag.share(0, programs if part < 1 else FULL)
        synchronize(c.device)
        confined_us = min(time_of(patient, lambda: prefills(1)) for _ in range(3))
        # More than fit beside the decodes, however much longer those take.
        ends = prefills(3 + int(5 * DECODES * decode_us / confined_us))
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(urgent):
            start.record()
            replay()
            end.record()
        end.synchronize()
        flag.pause(0)  # what is left of the prefills leaves at once
        synchronize(c.device)
        flag.resume(0)
        window_us = start.elapsed_time(end) * 1e3
        done = sum(0 < start.elapsed_time(each) * 1e3 <= window_us for each in ends)
        row["parts"].append(
            {
                "part": part,
                "programs": programs,
                "prefill_confined_us": confined_us,
                "decode_us": window_us / DECODES,
                "prefills_meanwhile": done,
                "of_turns": (DECODES * decode_us + done * alone_us) / window_us,
            }
        )
    flag.share(0, FULL)
    return row
