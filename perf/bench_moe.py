"""The operator's speed against its peers and against the device, as one table.

    python perf/bench_moe.py                                    five models, T = 1 to 8192, every peer here
    python perf/bench_moe.py --models mixtral olmoe --tokens 32 8192 --peers grouped_mm vllm
    python perf/bench_moe.py --formats bf16 fp8 mxfp4 int4      with quantised experts as well
    python perf/bench_moe.py --device cpu --models tiny --tokens 4 64 --seconds 1 --out result.json

Runs from a checkout, installed or not. One layer of each model, bfloat16 (float32 on a CPU), random weights,
tokens and routing, inputs of different routing in turn. Every implementation is one CUDA graph; they run in
turns and their medians are compared, the quartiles beside them. Sorting by expert is part of every time, the
router of none. A layer of quantised experts is also held against the same one with dense weights (16 bits;
float32 on a CPU), and against the peers that have its format. The results go to
perf/results/bench_moe-DEVICE-DATE.json (or --out), rewritten as they come, and as a picture beside it. Exit
code: 0; 1 if a case failed; 2 without the device that was asked for.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gpu_check
import peers
import roofline
import torch
from check_latency import enqueued_exits, step_exits, writer_of
from check_speed import TOKENS, ceilings, one_layer, polling_cost, rotated
from compile_ahead import compile_all
from context import Context, cpu_name, free_memory, one_line, that_fit
from goals import best_peer, goals, memory_ratio, name_of, quartiles
from layers import (
    DEEPSEEK,
    DENSE,
    FORMATS,
    GPT_OSS,
    MIXTRAL,
    OLMOE,
    QWEN3,
    TINY,
    Pair,
    Shape,
    Tensors,
    layer_inputs,
    quantized,
    weights,
    with_weights,
)
from timing import synchronize

MODELS = {
    "mixtral": MIXTRAL,
    "qwen3": QWEN3,
    "olmoe": OLMOE,
    "gpt-oss": GPT_OSS,
    "deepseek": DEEPSEEK,
    "tiny": TINY,  # to try the script; its figures mean nothing
}

EXIT_TOKENS = (32, 2048, 8192)
EXITS = 400
"""Orders to pause per case, if there is time: the 99th percentile wants some hundreds."""

COMPILE_S = 120.0


def main() -> int:
    args = parse()
    device = torch.device(args.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            print("bench_moe: no CUDA device here; --device cpu measures the torch backend", file=sys.stderr)
            return gpu_check.NO_DEVICE
        device = torch.device("cuda", torch.cuda.current_device())
    torch.set_grad_enabled(False)
    torch.set_float32_matmul_precision("highest")
    document, out = new_document(args, device), args.out
    out = out or gpu_check.default_out(document["device"], "bench_moe")
    out.parent.mkdir(parents=True, exist_ok=True)
    measure(args, context(device, document, out), document)
    document["finished"] = gpu_check.now()
    gpu_check.write(document, out)
    for line in table(document):
        print(line)
    print(f"written to {out}")
    draw(document, out.with_suffix(".png"))
    return 1 if any("error" in case for case in document["cases"]) else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    real = [name for name in MODELS if name != "tiny"]
    parser.add_argument("--models", nargs="+", choices=MODELS, default=real, metavar="MODEL")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=[DENSE], metavar="FORMAT")
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS), metavar="T")
    parser.add_argument("--peers", nargs="+", choices=peers.PEERS, default=list(peers.PEERS), metavar="PEER")
    parser.add_argument("--seconds", type=float, default=4.0, help="time per case, warm-up excluded")
    parser.add_argument("--out", type=Path, help="the JSON file; the picture lies beside it")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args()
    if min(args.tokens) < 1:
        parser.error("--tokens must be at least 1")
    if args.device == "cpu" and not args.out:
        parser.error("on a CPU name an --out: perf/results/bench_moe-... is for GPUs")
    return args


def new_document(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    return {
        "what": "perf/bench_moe.py",
        "device": torch.cuda.get_device_name(device) if on_gpu else f"{cpu_name()}, {os.cpu_count()} cores",
        "device_type": device.type,
        "dtype": "bfloat16" if on_gpu else "float32",
        "date": gpu_check.now(),
        "command": shlex.join(["python", *sys.argv]),
        "seconds_per_case": args.seconds,
        "absent": {},
        "left_out": [],
        "cases": [],
        "exits": [],
    }


def context(device: torch.device, document: dict[str, Any], out: Path) -> Context:
    """Rewrites the file whenever something was found."""
    return Context(
        device=device,
        backend="triton" if device.type == "cuda" else "torch",
        quick=False,
        rehearsal=device.type != "cuda",
        deadline=time.monotonic() + COMPILE_S,
        results={},
        keep=lambda _: gpu_check.write(document, out),
        left_out=document["left_out"],
    )


# -- measuring -------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, c: Context, document: dict[str, Any]) -> None:
    shapes = [MODELS[name] for name in args.models]
    document["environment"] = gpu_check.environment(c)
    if c.device.type == "cuda":
        document["compiled"] = compile_all(c, shapes, args.formats, args.tokens)
    document["ceilings"] = ceilings(c)
    # The dense weights stay beside the quantised ones: half as much again at the most.
    copies = 1 if args.formats == [DENSE] else 1.5
    for shape in shapes:
        if not that_fit(c, [shape], lambda s: copies * s.layer_bytes):
            continue
        dense = weights(shape, getattr(torch, document["dtype"]), c.device)
        for format in (format for format in FORMATS if format in args.formats):
            one_model(args, c, document, shape, dense, format)
            free_memory(c.device)
            if gpu_check.broken(c.device):
                # What a peer left behind, mostly: --peers leaves it out.
                left_out = f"all after {shape.name} {format}: the device does not answer any more"
                document["left_out"].append(left_out)
                return
        del dense
        free_memory(c.device)


def one_model(
    args: argparse.Namespace, c: Context, document: dict[str, Any], shape: Shape, dense: Pair, format: str
) -> None:
    pair = quantized(dense, format)
    bound, absent = peers.bind(args.peers, shape, pair)
    document["absent"][named(shape, format)] = absent
    for num_tokens in sorted(set(args.tokens)):
        case: dict[str, Any] = {"shape": shape.name, "format": format, "tokens": num_tokens}
        case["peers"] = dict(absent)
        document["cases"].append(case)
        try:
            one_case(c, case, shape, (dense, pair), bound, document["ceilings"], args.seconds)
        except Exception as error:
            case["error"] = one_line(error)
            if gpu_check.broken(c.device):
                return
        c.say(case_line(case))
        c.keep(case)
    for num_tokens in exit_tokens(c, args.tokens):
        tensors = with_weights(layer_inputs(shape, num_tokens, dense), pair)
        document["exits"].append(one_exit(c, shape, format, tensors, args.seconds))
        c.keep({})


def named(shape: Shape, format: str) -> str:
    return shape.name if format == DENSE else f"{shape.name} {format}"


def one_case(
    c: Context,
    case: dict[str, Any],
    shape: Shape,
    pairs: tuple[Pair, Pair],
    bound: dict[str, peers.Prepare],
    found: dict[str, Any],
    seconds: float,
) -> None:
    """Times, phases, floors, polling and memory of one number of tokens, into ``case``."""
    ceilings = found["copy_bytes_per_s"]["p50"], found["product_flops_per_s"]["p50"]
    one_layer(c, case, shape, pairs, bound, ceilings, 0.5 * seconds)
    try:
        inputs = [with_weights(tensors, pairs[1]) for tensors in rotated(shape, case["tokens"], pairs[0])]
        case["polling"] = polling_cost(c, inputs, 0.5 * seconds)
    except Exception as error:
        case["polling"] = {"error": one_line(error)}
        synchronize(c.device)


def exit_tokens(c: Context, asked: Iterable[int]) -> list[int]:
    """For a GPU a decode and two prefills of what was asked; for a CPU the largest, its launches are long."""
    asked = set(asked)
    return [t for t in EXIT_TOKENS if t in asked] if c.device.type == "cuda" else [max(asked)]


def one_exit(c: Context, shape: Shape, format: str, tensors: Tensors, seconds: float) -> dict[str, Any]:
    """Launches that are told to leave. "stream" writes the flag as `PriorityFlag` does with cuda-bindings."""
    row: dict[str, Any] = {"shape": shape.name, "format": format, "tokens": tensors[0].shape[0]}
    until = time.monotonic() + seconds
    for way in ("stream", "copy") if c.device.type == "cuda" else ("step",):
        try:
            if way == "step":
                row |= {"writer": way} | step_exits(c, tensors, EXITS, until)
            else:
                row |= {"writer": way} | enqueued_exits(c, writer_of(way, c.device), tensors, EXITS, until)
            row.pop("error", None)
            break
        except Exception as error:
            row["error"] = one_line(error)
            if gpu_check.broken(c.device):
                break
    c.say(f"{name_of(row)}: {row.get('left_early', 0)} of {row.get('samples', 0)} exits were early")
    return row


# -- showing ---------------------------------------------------------------------------------------------


def case_line(case: dict[str, Any]) -> str:
    if "error" in case:
        return f"{name_of(case)}: {case['error']}"
    best = best_peer(case)
    against = f"{best[1]['p50']:.2f}x of {best[0]}" if best else "no peer"
    dense = case.get("times_faster_than_dense")
    against += f", {dense['p50']:.2f}x of {DENSE}" if dense else ""
    rounded = case.get("fp8_activations_faster")
    against += f", {rounded['p50']:.2f}x faster with float8 activations" if rounded else ""
    return f"{name_of(case)}: {case['graph_us']['qllm']['p50']:.1f} us, {against}"


HEADINGS = (
    *("model and tokens", "ours us (quartiles)", "best peer", "times faster (quartiles)"),
    *("times faster than bf16", "floor us", "of copy", "of matmul", "polling", "batch invariant", "memory"),
)


def table(document: dict[str, Any]) -> list[str]:
    """Every case, then what was asked."""
    lines = [f"== bench_moe, {document['device']}, {document['dtype']}, {document['date']}"]
    lines += aligned([HEADINGS, *map(cells, document["cases"])])
    if any(case.get("not_captured") for case in document["cases"]):
        lines.append("* not captured as a graph: its time has the gaps between its kernels in it")
    for reason, where in reasons(document["cases"]).items():
        lines.append(f"not compared: {reason} ({', '.join(where)})")
    lines += [f"left out: {text}" for text in document["left_out"]]
    lines += ["", *aligned([("goal", "asked", "measured", "met"), *map(goal_cells, goals(document))])]
    return lines


def goal_cells(goal: Any) -> tuple[str, ...]:
    return goal.name, goal.asked, goal.measured, goal.verdict


def cells(case: dict[str, Any]) -> tuple[str, ...]:
    if "error" in case or "of_copy" not in case:
        return name_of(case), case.get("error", "not measured")
    best, polled, memory = best_peer(case), case["polling"], case["memory"]
    dense = case.get("times_faster_than_dense")
    star = "*" if best and best[0] in case["not_captured"] else ""
    return (
        name_of(case),
        quartiles(case["graph_us"]["qllm"], ".1f"),
        best[0] + star if best else "-",
        quartiles(best[1], ".2f") if best else "-",
        quartiles(dense, ".2f") if dense else "-",
        f"{case['floor_us']:.1f} {case['bound_by']}",
        f"{case['of_copy'] * 100:.0f} %",
        f"{case['of_matmul'] * 100:.0f} %",
        f"{polled['overhead'] * 100:+.2f} %" if "overhead" in polled else polled["error"],
        f"{case['batch_invariant_times_as_long']['p50']:.2f}x as long",
        f"{memory_ratio(memory):.2f}x" if memory else "not measured",
    )


def reasons(cases: Iterable[dict[str, Any]]) -> dict[str, list[str]]:
    """Why peers were not compared, and where."""
    found: dict[str, list[str]] = {}
    for case in cases:
        for peer, reason in case["peers"].items():
            if peer in case.get("not_captured", ()):
                continue  # that one was compared
            found.setdefault(f"{peer}: {reason}", []).append(name_of(case))
    return found


def aligned(rows: Iterable[Iterable[str]]) -> list[str]:
    rows = [list(row) for row in rows]
    # A row of an error has one long cell, which should not push the columns apart.
    full = [row for row in rows if len(row) == max(map(len, rows))]
    widths = [max(len(row[n]) for row in full) for n in range(len(full[0]))]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def draw(document: dict[str, Any], path: Path) -> None:
    try:
        roofline.draw(document, path)
        print(f"drawn to {path}")
    except ImportError:
        print("matplotlib is not installed: no picture; perf/roofline.py makes it from the JSON")


if __name__ == "__main__":
    sys.exit(main())
