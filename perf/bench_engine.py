"""The engine's throughput without preemption, against transformers' `generate` on the same batch, and what it
costs that a request's bits do not depend on its batch.

    python perf/bench_engine.py [--rows 8] [--prompt 256] [--new 32] [--runs 5] [--out FILE]
    python perf/bench_engine.py --rows 1 --prompt 32    a request that decodes alone

All run the same model of random weights with the same experts kernels, greedy, in alternating order.
`generate` gets the whole batch at once, all prompts of one length: without padding, the best it can do.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time

import torch
from rich.console import Console
from rich.table import Table

from qllm_ops.models import load
from qllm_ops.models.presets import save_preset
from qllm_ops.scheduler.core import Limits
from qllm_ops.scheduler.engine import Engine
from qllm_ops.scheduler.report import device_meta


def with_generate(model, prompts: list[list[int]], new: int) -> tuple[float, list[list[int]]]:
    ids = torch.tensor(prompts)
    start = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False
        )
    return time.perf_counter() - start, out[:, ids.shape[1] :].tolist()


def with_engine(engine: Engine, prompts: list[list[int]], new: int) -> tuple[float, list[list[int]]]:
    ask, start = engine.scheduler.next, time.perf_counter()
    engine.scheduler.next = lambda lane: None  # no lane starts before the whole batch is there
    handles = [engine.submit(prompt, max_new_tokens=new) for prompt in prompts]
    with engine._changed:
        engine.scheduler.next = ask
        engine._changed.notify_all()
    tokens = [handle.result() for handle in handles]
    return time.perf_counter() - start, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--prompt", type=int, nargs="*", default=[32, 256, 1024])
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        save_preset(args.preset, folder)
        model = load(folder)
    random = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    rows = []
    for length in args.prompt:
        prompts = torch.randint(vocabulary, (args.rows, length), generator=random).tolist()
        theirs, ours, invariant, equal = [], [], [], 0
        for run in range(args.runs + 1):  # the first warms up
            seconds, expected = with_generate(model, prompts, args.new)
            # One prefill of the whole batch, as generate does.
            limits = Limits(max_batch=args.rows, prefill_tokens=max(args.rows * length, 1024), kv_reserve=0)
            with Engine(model, policy="fcfs", limits=limits) as engine:
                ours_seconds, got = with_engine(engine, prompts, args.new)
            with Engine(model, policy="fcfs", limits=limits, batch_invariant=True) as engine:
                invariant_seconds, _ = with_engine(engine, prompts, args.new)
            if run:
                theirs.append(seconds)
                ours.append(ours_seconds)
                invariant.append(invariant_seconds)
                equal += got == expected
        rate = args.rows * (length + args.new)
        rows.append(
            {
                "prompt": length,
                "generate_tokens_per_s": rate / statistics.median(theirs),
                "engine_tokens_per_s": rate / statistics.median(ours),
                "ratio": statistics.median(a / b for a, b in zip(theirs, ours, strict=True)),
                "generate_s": theirs,
                "engine_s": ours,
                "batch_invariant_s": invariant,
                "batch_invariant_times_as_long": statistics.median(
                    b / a for a, b in zip(ours, invariant, strict=True)
                ),
                "runs_with_equal_tokens": equal,
            }
        )
    table = Table(
        "prompt",
        "generate tok/s",
        "engine tok/s",
        "engine / generate",
        "equal tokens",
        "batch invariant, times as long",
        title=f"{args.rows} rows, {args.new} new tokens",
    )
    for row in rows:
        table.add_row(
            str(row["prompt"]),
            f"{row['generate_tokens_per_s']:.0f}",
            f"{row['engine_tokens_per_s']:.0f}",
            f"{row['ratio']:.3f}",
            f"{row['runs_with_equal_tokens']}/{args.runs}",
            f"{row['batch_invariant_times_as_long']:.2f}",
        )
    Console().print(table)
    if args.out:
        with open(args.out, "w") as file:
            json.dump({"meta": device_meta(), "args": vars(args), "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
