"""Speed of the torch backend against transformers' experts implementations, on this machine's CPU.

    python perf/bench_torch_moe.py --out result.json
    python perf/bench_torch_moe.py --formats bf16 fp8 mxfp4 int4     what widening costs, ours alone

Every round runs each implementation once, in an order that changes, so that what else the machine does
falls on all of them alike. A ratio is the median over the rounds of (theirs / ours) within a round:
above 1 means that ours is faster. Of formats: how many times as long as with the dense weights of --dtype.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from context import cpu_name
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import qllm_ops
from qllm_ops.quantized import QUANTIZERS

SHAPES = [  # H, I, E, K
    (512, 1024, 8, 2),
    (256, 512, 8, 2),
    (512, 256, 64, 8),
]
TOKENS = [1, 8, 64, 512, 2048]
OURS, POLLED = "qllm", "qllm+flag"


def implementations(
    hidden: int, intermediate: int, experts: int, top_k: int, tokens: int, dtype: torch.dtype
):
    """Name -> a call that computes one layer; all of them on the same tensors."""
    config = MixtralConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_local_experts=experts,
        num_experts_per_tok=top_k,
    )
    module = MixtralExperts(config).to(dtype)
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    hidden_states = torch.randn(tokens, hidden).to(dtype)
    weights, index = torch.topk(torch.softmax(torch.randn(tokens, experts), -1), top_k)
    tensors = (hidden_states, module.gate_up_proj, module.down_proj, index, weights.to(dtype))
    flag = qllm_ops.PriorityFlag()

    def theirs(name: str) -> Callable[[], torch.Tensor]:
        def call() -> torch.Tensor:
            config._experts_implementation = name
            return module(hidden_states, index, tensors[4])

        return call

    names = ["grouped_mm", "eager"]
    if tokens * top_k * 3 * hidden * intermediate * 4 < 2**30:  # it copies the weights for every pair
        names.append("batched_mm")
    return {
        OURS: lambda: qllm_ops.moe(*tensors),
        POLLED: lambda: qllm_ops.moe(*tensors, flag=flag, priority=0),
        **{name: theirs(name) for name in names},
    }


def in_formats(
    sizes: tuple[int, int, int, int, int], dtype: torch.dtype, formats: list[str]
) -> dict[str, Callable[[], torch.Tensor]]:
    """Format -> a call that computes one layer (H, I, E, K, T) with weights in it; OURS has dense ones."""
    hidden, intermediate, experts, top_k, tokens = sizes
    pair = (
        torch.randn(experts, 2 * intermediate, hidden).mul_(hidden**-0.5).to(dtype),
        torch.randn(experts, hidden, intermediate).mul_(intermediate**-0.5).to(dtype),
    )
    hidden_states = torch.randn(tokens, hidden).to(dtype)
    weights, index = torch.topk(torch.softmax(torch.randn(tokens, experts), -1), top_k)

    def ours(x: torch.Tensor, pair: tuple) -> Callable[[], torch.Tensor]:
        return lambda: qllm_ops.moe(x, *pair, index, weights.to(x.dtype))

    calls = {OURS: ours(hidden_states, pair)}
    for format in formats:
        if format == "bf16":
            calls[format] = ours(hidden_states.bfloat16(), tuple(w.bfloat16() for w in pair))
        else:
            calls[format] = ours(hidden_states, tuple(map(QUANTIZERS[format], pair)))
    return calls


def check(calls: dict[str, Callable[[], torch.Tensor]]) -> None:
    expected = calls["grouped_mm"]().float()
    for name, call in calls.items():
        error = (call().float() - expected).abs().max() / expected.abs().max()
        if not error < 2e-2:
            raise AssertionError(f"{name} differs from grouped_mm by {error:.1e} of the peak")


def measure(calls: dict[str, Callable[[], torch.Tensor]], seconds: float) -> dict[str, list[float]]:
    """Seconds of every call, one of each per round, for about ``seconds`` and at least 7 rounds."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    end = time.perf_counter() + seconds
    while len(times[OURS]) < 7 or (time.perf_counter() < end and len(times[OURS]) < 500):
        random.shuffle(order)
        for name in order:
            start = time.perf_counter()
            calls[name]()
            times[name].append(time.perf_counter() - start)
    return times


def ratios(times: dict[str, list[float]], theirs: str, ours: str) -> list[float]:
    return [a / b for a, b in zip(times[theirs], times[ours], strict=True)]


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write the numbers to this JSON file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0, help="time per row")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--formats", nargs="+", choices=["bf16", *QUANTIZERS], metavar="FORMAT")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    random.seed(0)

    before = os.getloadavg()
    rows = formats_rows(args) if args.formats else peers_rows(args)
    if args.out:
        load = {"before": before, "after": os.getloadavg()}
        args.out.write_text(
            json.dumps({**provenance(args), "load_average": load, "rows": rows}, indent=1) + "\n"
        )


def peers_rows(args: argparse.Namespace) -> list[dict]:
    rows = []
    print(f"{args.dtype}, {args.threads} threads; theirs / ours, so above 1 is faster than theirs\n")
    print(
        "   H     I   E  K     T     ours ms (min-max)        "
        "grouped_mm  with flag  batched_mm  eager  flag cost"
    )
    for hidden, intermediate, experts, top_k in SHAPES:
        for tokens in TOKENS:
            calls = implementations(hidden, intermediate, experts, top_k, tokens, getattr(torch, args.dtype))
            check(calls)
            times = measure(calls, args.seconds)
            row = {
                "shape": {"H": hidden, "I": intermediate, "E": experts, "K": top_k, "T": tokens},
                "rounds": len(times[OURS]),
                "seconds": {name: summary(values) for name, values in times.items()},
                "ratio": {name: summary(ratios(times, name, OURS)) for name in times if name != OURS},
                "ratio_with_flag": {"grouped_mm": summary(ratios(times, "grouped_mm", POLLED))},
                "flag_cost": statistics.median(ratios(times, POLLED, OURS)) - 1,
            }
            rows.append(row)
            print(line(row), flush=True)
    return rows


def formats_rows(args: argparse.Namespace) -> list[dict]:
    rows = []
    print(f"{args.threads} threads; how many times as long as dense weights in {args.dtype} (min-max)\n")
    for hidden, intermediate, experts, top_k in SHAPES:
        for tokens in TOKENS:
            sizes = (hidden, intermediate, experts, top_k, tokens)
            calls = in_formats(sizes, getattr(torch, args.dtype), args.formats)
            times = measure(calls, args.seconds)
            found = {name: summary(ratios(times, name, OURS)) for name in args.formats}
            row = {
                "shape": dict(zip("HIEKT", sizes, strict=True)),
                "rounds": len(times[OURS]),
                "seconds": {name: summary(values) for name, values in times.items()},
                "times_as_long": found,
            }
            rows.append(row)
            each = (
                f"{n} {r['median']:.2f} ({r['min']:.2f}-{r['max']:.2f})"
                for n, r in row["times_as_long"].items()
            )
            print(sizes, f"{row['seconds'][OURS]['median'] * 1e3:.3f} ms,", ", ".join(each), flush=True)
    return rows


def line(row: dict) -> str:
    shape, ours, ratio = row["shape"], row["seconds"][OURS], row["ratio"]
    cells = [
        f"{shape['H']:4} {shape['I']:5} {shape['E']:3} {shape['K']:2} {shape['T']:5}",
        f"{ours['median'] * 1e3:9.3f} ({ours['min'] * 1e3:.3f}-{ours['max'] * 1e3:.3f})".ljust(28),
        f"{ratio['grouped_mm']['median']:10.2f}",
        f"{row['ratio_with_flag']['grouped_mm']['median']:10.2f}",
        f"{ratio['batched_mm']['median']:11.2f}" if "batched_mm" in ratio else " " * 10 + "-",
        f"{ratio['eager']['median']:6.2f}",
        f"{row['flag_cost'] * 100:9.1f}%",
    ]
    return " ".join(cells)


def provenance(args: argparse.Namespace) -> dict:
    return {
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "device": cpu_name(),
        "threads": args.threads,
        "dtype": args.dtype,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "qllm_ops": qllm_ops.__version__,
        },
    }


if __name__ == "__main__":
    main()
