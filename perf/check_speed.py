"""Sections "ceilings", "polling" and "speed" of `gpu_check.py`."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any
from unittest import mock

import peers
import torch
from context import Context, free_memory, nvidia_smi, one_line, that_fit
from goals import name_of
from layers import (
    DEEPSEEK,
    DENSE,
    FORMATS,
    GPT_OSS,
    MAX_RELATIVE,
    MIXTRAL,
    OLMOE,
    QWEN3,
    TINY,
    Launches,
    Pair,
    Shape,
    Tensors,
    bytes_to_move,
    errors,
    floor_seconds,
    format_of,
    layer_bytes,
    layer_inputs,
    layer_name,
    phase_floors,
    phase_times,
    quantized,
    stored_bytes,
    tokens,
    weights,
    with_weights,
)
from timing import (
    Call,
    Mark,
    capture,
    copy_bandwidth,
    host_seconds,
    interleaved,
    matmul_rate,
    spread,
    synchronize,
)

from qllm_ops import PriorityFlag, moe

TOKENS = (1, 8, 32, 256, 2048, 8192)

QUANTIZED_TOKENS = (1, 8, 32)
"""Decode, which is what quantising is for."""

ROUNDED = "fp8_activations"
INVARIANT = "batch_invariant"
"""What ours with the option of that name is called among the implementations that are timed."""
DEPENDENT = "dependent_launches"
"""The same for ours with `qllm_ops.plan.DEPENDENT_LAUNCHES` the other way round, where the device can."""

ROUNDED_ACTIVATIONS = 0.1
"""Largest error, relative to the peak, of a peer that rounds its activations to float8 where ours does not:
0.04 if it does so in groups of 128 (4 experts of OLMoE's sizes, 64 tokens). It finds a wrong expert or
scale, and is no promise."""


# -- what the device can do ------------------------------------------------------------------------------


def ceilings(c: Context) -> dict[str, Any]:
    """Copy bandwidth (bytes read plus written) and the rate of a large product, on random numbers."""
    nbytes, size = (1 << 24, 512) if c.rehearsal else (1 << 32, 8192)
    dtype = torch.float32 if c.rehearsal else torch.bfloat16
    copy = copy_bandwidth(c.device, nbytes)
    free_memory(c.device)
    product = matmul_rate(c.device, size, dtype)
    free_memory(c.device)
    c.say(f"copy {copy['p50'] / 1e12:.3f} TB/s, {size}^3 product {product['p50'] / 1e12:.0f} TFLOP/s")
    result = {"copy_bytes_per_s": copy, "product_flops_per_s": product, "product_size": size}
    if c.device.type == "cuda":
        result |= _under_load(c, size, product["p50"])
    return result


def _under_load(c: Context, size: int, rate: float, seconds: float = 1.5) -> dict[str, Any]:
    """Clocks and power while products run; idle, they say nothing. And the rate of so many in a row."""
    a = torch.empty(size, size, dtype=torch.bfloat16, device=c.device).normal_()
    out, products = torch.empty_like(a), int(seconds * rate / (2 * size**3))
    begin = Mark(c.device)
    for _ in range(products):
        torch.mm(a, a, out=out)
    end = Mark(c.device)
    found = nvidia_smi(c.device)
    sustained = products * 2 * size**3 / end.seconds_after(begin)
    return {"nvidia_smi_under_load": found, "sustained_product_flops_per_s": sustained}


def known_ceilings(c: Context) -> tuple[float, float]:
    found = c.results.get("ceilings", {}).get("result") or ceilings(c)
    return found["copy_bytes_per_s"]["p50"], found["product_flops_per_s"]["p50"]


# -- what polling costs ----------------------------------------------------------------------------------


def polling(c: Context) -> dict[str, Any]:
    """The three kernels compiled with and without the poll, on the same run, in turns.

    Without the poll twice: what the two differ by is noise. Overhead is the median over the rounds of
    (with / without) within a round, minus 1.
    """
    result: dict[str, Any] = c.so_far or {"cases": []}
    plan = that_fit(c, _polling_plan(c), layer_bytes)
    for (shape, num_tokens), seconds in c.in_time(plan, layer_name):
        pair = weights(shape, torch.float32 if c.rehearsal else torch.bfloat16, c.device)
        row: dict[str, Any] = {"shape": shape.name, "tokens": num_tokens}
        result["cases"].append(row)
        try:
            row |= polling_cost(c, rotated(shape, num_tokens, pair), 0.6 * seconds)
            c.say(
                f"{layer_name((shape, num_tokens))}: {row['overhead'] * 100:+.2f} % "
                f"(noise {row['noise'] * 100:+.2f} %), {row['without_us']['p50']:.1f} us without"
            )
        except Exception as error:
            row["error"] = one_line(error)
            c.say(f"{layer_name((shape, num_tokens))}: {row['error']}")
            synchronize(c.device)
        del pair
        free_memory(c.device)
        c.keep(result)
    return result


def _polling_plan(c: Context) -> list[tuple[Shape, int]]:
    if c.rehearsal:
        return [(TINY, 64)]
    if c.quick:
        return [(QWEN3, 32), (MIXTRAL, 2048)]
    shapes = (QWEN3, MIXTRAL, OLMOE, GPT_OSS)
    return [*((shape, t) for t in (2048, 32, 1) for shape in shapes), (DEEPSEEK, 2048)]


def polling_cost(c: Context, inputs: list[Tensors], seconds: float) -> dict[str, Any]:
    """One layer with and without the poll, for about ``seconds``."""
    calls = _polled_calls(c, inputs)
    times = interleaved(calls, c.device, seconds, least=15, most=20 if c.rehearsal else 300)
    return _overhead(times, len(inputs))


def _polled_calls(c: Context, inputs: list[Tensors]) -> dict[str, Callable[[], object]]:
    flag = PriorityFlag(c.device)
    if c.backend != "triton":
        without = lambda: [moe(*x, backend=c.backend) for x in inputs]  # noqa: E731
        polled = lambda: [moe(*x, flag=flag, backend=c.backend) for x in inputs]  # noqa: E731
        return {"without": without, "again": without, "with": polled}
    runs = [Launches(x, flag) for x in inputs]

    def launch(poll: bool) -> None:
        for run in runs:
            run.rewind()
            run.enqueue(poll)

    calls = {
        name: capture(functools.partial(launch, poll), c.device)
        for name, poll in (("without", False), ("again", False), ("with", True))
    }
    for replay in calls.values():
        replay()
        progress = runs[0].progress()
        runs[0].rewind()
        if progress["done"] != progress["total"]:
            raise AssertionError(f"a launch left tiles: {progress}")
    return calls


def _overhead(times: dict[str, list[float]], layers: int) -> dict[str, Any]:
    def over(name: str) -> list[float]:
        return [a / b - 1 for a, b in zip(times[name], times["without"], strict=True)]

    return {
        "overhead": statistics.median(over("with")),
        "noise": statistics.median(over("again")),
        "overhead_spread": spread(over("with")),
        "noise_spread": spread(over("again")),
        "without_us": _per_layer(times["without"], layers),
        "with_us": _per_layer(times["with"], layers),
    }


def _per_layer(seconds: list[float], layers: int) -> dict[str, float | int] | None:
    return spread(s / layers * 1e6 for s in seconds)


def rotated(shape: Shape, num_tokens: int, pair: Pair) -> list[Tensors]:
    """Several inputs of different routing, so that a small layer's weights do not stay in the L2 cache."""
    sets = 8 if num_tokens <= 32 else 3 if num_tokens <= 2048 else 1
    return [layer_inputs(shape, num_tokens, pair, seed=10 + n) for n in range(sets)]


# -- against peers ---------------------------------------------------------------------------------------


def speed(c: Context) -> dict[str, Any]:
    """One layer, ours and transformers' experts on the same tensors, per layer in microseconds.

    `graph`: device time, several layers of different routing as one CUDA graph, implementations in turns.
    `phases`: device time of each phase alone, beside its own floor, and what was compiled for it.
    `host`: the same calls one after another as Python makes them: where the device is faster than Python,
    this is Python. `with flag` is `moe` with a flag, which waits for every layer. `of_floor`: floor over
    our graph time, with this device's measured ceilings. Sorting by expert is part of every time, the
    router of none. Beside quantised layers the same ones with dense weights.
    """
    ceilings = known_ceilings(c)
    plan = that_fit(c, _speed_plan(c), lambda case: case[0].layer_bytes * (1 if case[1] == DENSE else 2))
    result: dict[str, Any] = c.so_far or {"cases": []}
    for (shape, format, counts), seconds in c.in_time(plan, _speed_name, lambda case: len(case[2])):
        dense = weights(shape, torch.float32 if c.rehearsal else torch.bfloat16, c.device)
        pair = quantized(dense, format)
        bound, absent = peers.bind(peers.TRANSFORMERS, shape, pair)
        for num_tokens in counts:
            row: dict[str, Any] = {"shape": shape.name, "format": format, "tokens": num_tokens}
            row["peers"] = dict(absent)
            result["cases"].append(row)
            c.keep(result)
            try:
                one_layer(c, row, shape, (dense, pair), bound, ceilings, 0.4 * seconds / len(counts))
            except Exception as error:
                row["error"] = one_line(error)
                row |= tiles_of(c, shape, num_tokens, pair)
            c.say(speed_line(row))
            c.keep(result)
            synchronize(c.device)  # a device that is broken for good ends the section here
        bound = None
        del pair, dense
        free_memory(c.device)
    return result


def one_layer(
    c: Context, row: dict[str, Any], shape: Shape, pairs: tuple[Pair, Pair], bound: dict[str, peers.Prepare],
    ceilings: tuple[float, float], seconds: float,
) -> None:  # fmt: skip
    """Times, phases, floors and memory of one number of tokens, into ``row``; ``pairs``: dense, timed."""
    dense = rotated(shape, row["tokens"], pairs[0])
    inputs = [with_weights(tensors, pairs[1]) for tensors in dense]
    calls = compare(c, row, inputs, bound, seconds, dense if row["format"] != DENSE else None)
    row |= against_device(shape, inputs, *ceilings, row["graph_us"]["qllm"]["p50"])
    if c.backend == "triton":
        row["phases"] = phases(shape, inputs, c.device, *ceilings)
    row["host_us"] = _as_called(c, row, calls, inputs)
    row["memory"] = extra_memory(c, shape, inputs[0])


def phases(
    shape: Shape, inputs: list[Tensors], device: torch.device, bandwidth: float, flops_per_s: float
) -> dict[str, dict[str, Any]]:
    """Of routing and of each phase: time, floor, tiles, registers, shared memory, number of programs."""
    launches = Launches(inputs[0], None)
    tiles, compiled = launches.tiles, launches.compiled()
    floors = phase_floors(shape, inputs[0], tiles["down"]["split_k"], bandwidth, flops_per_s)
    found = {}
    for name, us in phase_times(inputs, device).items():
        found[name] = {"us": us, **floors.get(name, {}), **compiled.get(name, {})}
        if name in tiles:
            found[name]["tiles"] = tiles[name]
    return found


def tiles_of(c: Context, shape: Shape, num_tokens: int, pair: Pair) -> dict[str, Any]:
    """What a case that failed would have been computed with."""
    if c.backend != "triton":
        return {}
    try:
        hidden_states, *routing = tokens(shape, num_tokens, torch.bfloat16, c.device)
        return {"tiles": Launches((hidden_states, *pair, *routing), None).tiles}
    except Exception as error:
        return {"tiles": one_line(error)}


def _speed_name(case: tuple[Shape, str, tuple[int, ...]]) -> str:
    return f"{case[0].name} {case[1]}"


def _speed_plan(c: Context) -> list[tuple[Shape, str, tuple[int, ...]]]:
    """Shapes, formats and numbers of tokens; what most depends on comes first."""
    quantised = [format for format in FORMATS if format != DENSE]
    if c.rehearsal:
        return [(TINY, DENSE, _speed_tokens(c)), *((TINY, format, (4,)) for format in quantised)]
    first, last = ((QWEN3, MIXTRAL), ()) if c.quick else ((QWEN3, MIXTRAL, OLMOE), (DEEPSEEK, GPT_OSS))
    # A layer of few and large experts and one of many and small ones.
    few = (QWEN3,) if c.quick else (MIXTRAL, QWEN3)
    return [
        *((shape, DENSE, _speed_tokens(c)) for shape in first),
        *((shape, format, QUANTIZED_TOKENS) for shape in few for format in quantised),
        *((shape, DENSE, _speed_tokens(c)) for shape in last),
    ]


def _speed_tokens(c: Context) -> tuple[int, ...]:
    return (4, 64) if c.rehearsal else (1, 32, 2048) if c.quick else TOKENS


def against_device(
    shape: Shape, inputs: list[Tensors], bandwidth: float, rate: float, ours_us: float
) -> dict[str, Any]:
    """What must move and be computed, on average over the routings, and the rates at which ours does."""
    expert_bytes = stored_bytes(inputs[0][1:3])
    nbytes = statistics.mean(bytes_to_move(shape, x[3], x[0].element_size(), expert_bytes) for x in inputs)
    flops = shape.flops(inputs[0][3].numel())
    found = floor(shape, inputs, bandwidth, rate)
    return {
        "bytes": nbytes,
        "flops": flops,
        "memory_floor_us": nbytes / bandwidth * 1e6,
        "arithmetic_floor_us": flops / rate * 1e6,
        **found,
        "of_floor": found["floor_us"] / ours_us,
        "of_copy": nbytes / (ours_us * 1e-6) / bandwidth,
        "of_matmul": flops / (ours_us * 1e-6) / rate,
    }


def extra_memory(c: Context, shape: Shape, tensors: Tensors) -> dict[str, int] | None:
    """Peak of what one call takes beyond its arguments. Only CUDA's allocator tells."""
    if c.device.type != "cuda":
        return None
    moe(*tensors, backend=c.backend)  # what is made once is not this call's
    free_memory(c.device)
    torch.cuda.reset_peak_memory_stats(c.device)
    before = torch.cuda.memory_allocated(c.device)
    output = moe(*tensors, backend=c.backend)
    synchronize(c.device)
    return {
        "peak_bytes": torch.cuda.max_memory_allocated(c.device) - before,
        "output_bytes": output.numel() * output.element_size(),
        "intermediate_bytes": tensors[3].numel() * shape.intermediate_size * output.element_size(),
    }


def compare(
    c: Context, row: dict[str, Any], inputs: list[Tensors], bound: dict[str, peers.Prepare], seconds: float,
    dense: list[Tensors] | None = None,
) -> dict[str, Call]:  # fmt: skip
    """Time ours and the peers in turns, each with all inputs in one graph. The results go into ``row``.

    A peer must have our output, within the contract's tolerance, before it is timed; one that quantises
    its activations, within ROUNDED_ACTIVATIONS. Under inference mode, as a model that serves is. Returns
    the calls, ours is "qllm".

    Args:
        dense: the inputs with the weights before they were quantised: ours with those is timed, too, and
            how many times as long it takes is "times_faster_than_dense" of the row.

    Ours is timed with `batch_invariant` as well: "batch_invariant_times_as_long" of the row. Where launches
    can be dependent ones, with those: "dependent_launches_times_as_long".
    With FP8 weights and hidden states of 16 bits ours is timed with `fp8_activations` as well, where the
    device has them: how many times faster that is, is "fp8_activations_faster" of the row, and what it
    changes "fp8_activations_rms", some 0.04.
    """
    row |= {"layers": len(inputs), "graph_us": {}, "ratio": {}, "errors": {}, "not_captured": []}
    ours = [functools.partial(moe, *tensors, backend=c.backend) for tensors in inputs]
    want = ours[0]()
    calls = {"qllm": functools.partial(_every, ours)}
    for name, prepare in bound.items():
        try:
            layers = [prepare(tensors) for tensors in inputs]
            with torch.inference_mode():
                off = errors(layers[0](), want)["max_relative"]
        except peers.Absent as reason:
            row["peers"][name] = str(reason)
            continue
        except Exception as error:
            row["peers"][name] = one_line(error)
            synchronize(c.device)
            continue
        row["errors"][name] = off
        most = ROUNDED_ACTIVATIONS if peers.rounds_activations(name, inputs[0]) else MAX_RELATIVE
        if off is None or off > most:
            row["differ"] = True
            row["peers"][name] = f"its output is not ours: off by {off} of the peak"
            continue
        calls[name] = functools.partial(_every, layers)
    timed = dict(calls)
    timed[INVARIANT] = functools.partial(
        _every, [functools.partial(call, batch_invariant=True) for call in ours]
    )
    if c.backend == "triton" and _may_be_dependent(c.device):
        timed[DEPENDENT] = functools.partial(_dependent, ours)
        if not torch.equal(timed[DEPENDENT]()[0], want):
            raise AssertionError("dependent launches change the output")
    if dense is not None:
        timed[DENSE] = functools.partial(
            _every, [functools.partial(moe, *tensors, backend=c.backend) for tensors in dense]
        )
    if format_of(inputs[0][1:3]) == "fp8" and inputs[0][0].itemsize == 2:
        rounded = [functools.partial(call, fp8_activations=True) for call in ours]
        try:
            off = row["fp8_activations_rms"] = errors(rounded[0](), want)["rms"]
            if off is None or off > ROUNDED_ACTIVATIONS:
                row["peers"][ROUNDED] = f"its output is not that of 16-bit activations: off by {off} RMS"
            else:
                timed[ROUNDED] = functools.partial(_every, rounded)
        except ValueError as refusal:  # a device without float8 products
            row["peers"][ROUNDED] = one_line(refusal)
    graphs = {name: _captured(c, row, name, call) for name, call in timed.items()}
    times = interleaved(graphs, c.device, seconds, least=7, most=10 if c.rehearsal else 200)
    row["graph_us"] = {name: _per_layer(t, len(inputs)) for name, t in times.items()}
    ratio = {
        name: spread(a / b for a, b in zip(times[name], times["qllm"], strict=True))
        for name in times
        if name != "qllm"
    }
    row["batch_invariant_times_as_long"] = ratio.pop(INVARIANT)
    if DEPENDENT in ratio:
        row["dependent_launches_times_as_long"] = ratio.pop(DEPENDENT)
    if DENSE in ratio:
        row["times_faster_than_dense"] = ratio.pop(DENSE)
    if ROUNDED in ratio:
        del ratio[ROUNDED]
        pairs = zip(times["qllm"], times[ROUNDED], strict=True)
        row["fp8_activations_faster"] = spread(ours / rounded for ours, rounded in pairs)
    row["ratio"] = ratio
    return calls


def _captured(c: Context, row: dict[str, Any], name: str, call: Call) -> Call:
    try:
        return capture(call, c.device)
    except Exception as error:
        # Then its time has the gaps between its kernels in it.
        row["not_captured"].append(name)
        row["peers"][name] = f"not captured: {one_line(error)}"
        synchronize(c.device)
        return call


def _as_called(
    c: Context, row: dict[str, Any], calls: dict[str, Call], inputs: list[Tensors]
) -> dict[str, Any]:
    """Microseconds per layer of calls as Python makes them, and of ours with a flag beside them."""
    flag = PriorityFlag(c.device)
    with_flag = [functools.partial(moe, *tensors, flag=flag, backend=c.backend) for tensors in inputs]
    found = {}
    for name, call in {**calls, "with flag": functools.partial(_every, with_flag)}.items():
        try:
            found[name] = _per_layer(host_seconds(call, c.device, calls=2, repeats=5), len(inputs))
        except Exception as error:
            row["peers"][name] = one_line(error)
            synchronize(c.device)
    return found


@torch.inference_mode()
def _every(layers: list[Call]) -> list[object]:
    return [layer() for layer in layers]


def _may_be_dependent(device: torch.device) -> bool:
    from qllm_ops.plan import DEPENDENT_ARCHS, arch_of

    return arch_of(device) in DEPENDENT_ARCHS


def _dependent(layers: list[Call]) -> list[object]:
    from qllm_ops import plan

    with mock.patch.object(plan, "DEPENDENT_LAUNCHES", not plan.DEPENDENT_LAUNCHES):
        return _every(layers)


def floor(shape: Shape, inputs: list[Tensors], bandwidth: float, rate: float) -> dict[str, Any]:
    """The floor of a layer, on average over the routings of ``inputs``."""
    floors = [
        floor_seconds(shape, x[3], bandwidth, rate, x[0].element_size(), stored_bytes(x[1:3])) for x in inputs
    ]
    return {"floor_us": statistics.mean(f[0] for f in floors) * 1e6, "bound_by": floors[0][1]}


def speed_line(row: dict[str, Any]) -> str:
    name = name_of(row)
    graph = row.get("graph_us") or {}
    if "error" in row or "qllm" not in graph:
        return f"{name}: {row.get('error') or row.get('peers')}"
    parts = [f"{name}: {graph['qllm']['p50']:.1f} us"]
    if "of_floor" in row:
        parts.append(f"{row['of_floor'] * 100:.0f} % of the floor ({row['bound_by']})")
    parts += [f"{peer} {ratio['p50']:.2f}x" for peer, ratio in row["ratio"].items()]
    if "times_faster_than_dense" in row:
        parts.append(f"{DENSE} {row['times_faster_than_dense']['p50']:.2f}x")
    if DEPENDENT + "_times_as_long" in row:
        parts.append(f"dependent launches {row[DEPENDENT + '_times_as_long']['p50']:.2f}x as long")
    called = row.get("host_us", {}).get("qllm")
    parts += [f"as called {called['p50']:.0f} us"] if called else []
    return ", ".join(parts) + (" THE OUTPUTS DIFFER" if row.get("differ") else "")
