"""Loading a checkpoint: seconds and peak memory of `qllm_ops.models.load`, against `from_pretrained`.

    python perf/bench_load.py [--gb 3] [--runs 5] [--out FILE]

A random Mixtral-like checkpoint in shards, its experts one by one or fused, is loaded onto the CPU, as it is
stored and into float32. Every load is a process of its own. Memory is the most that the process held
(VmHWM) beyond what it held when everything was imported; of that, "private" leaves out the pages that
are a file's (sampled every 5 ms). Time is until every page of the weights was touched: from_pretrained
maps a file and returns before it has read it, and a first request would wait for the rest; when it
returned is kept too. "cold" means that the files were dropped from this machine's page cache before;
what is beneath a virtual disk may still hold them. A step is one forward pass of eight single tokens with
the loaded model, transformers' own in both: it shows where the weights lie in memory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from timing import spread

LAYOUTS = ("one by one", "fused")
CASES = (("bfloat16", "warm"), ("bfloat16", "cold"), ("float32", "warm"))
"""What the weights become, and the page cache; they are stored as bfloat16."""

LOADERS = ("qllm", "from_pretrained")
SHARD_BYTES = 500_000_000
LAYER = {"hidden_size": 2048, "intermediate_size": 3584, "num_local_experts": 8}
LAYER_BYTES = 2 * 3 * LAYER["num_local_experts"] * LAYER["hidden_size"] * LAYER["intermediate_size"]


# -- one load, in a process of its own -------------------------------------------------------------------


def child(loader: str, folder: str, dtype_name: str) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.mixtral import modeling_mixtral  # noqa: F401
    from transformers.utils.logging import disable_progress_bar

    from qllm_ops.models import load

    disable_progress_bar()
    dtype = getattr(torch, dtype_name)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    before, private_before = memory("VmRSS"), memory("RssAnon")
    with Private() as private:
        start = time.perf_counter()
        if loader == "qllm":
            model = load(folder, dtype=dtype, install=False, progress=False)
        else:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
        returned = time.perf_counter() - start
        page = 4096 // dtype.itemsize
        for parameter in model.parameters():
            parameter.detach().view(-1)[::page].sum()
        seconds = time.perf_counter() - start
    peak = memory("VmHWM") - before
    return {
        "returned_s": returned,
        "seconds": seconds,
        "step_s": step_seconds(model),
        "peak_bytes": peak,
        "private_bytes": private.most - private_before,
        "model_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
    }


def step_seconds(model, steps: int = 9) -> float:
    import torch

    ids, times = torch.arange(8).view(8, 1), []
    with torch.inference_mode():
        for _ in range(steps):
            start = time.perf_counter()
            model(ids, use_cache=False)
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def memory(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; this benchmark needs Linux")


class Private(threading.Thread):
    """The most private memory that this process has while the body runs."""

    def __init__(self):
        super().__init__(daemon=True)
        self.most, self.over = 0, threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.005):
            self.most = max(self.most, memory("RssAnon"))

    def __enter__(self) -> Private:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.join()
        self.most = max(self.most, memory("RssAnon"))


def in_child(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


# -- the checkpoints -------------------------------------------------------------------------------------


def write_checkpoint(folder: str, layout: str, layers: int) -> dict[str, Any]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    sizes = {
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "num_experts_per_tok": 2,
    }
    config = AutoConfig.for_model("mixtral", num_hidden_layers=layers, **LAYER, **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    fused = layout == "fused"
    model.save_pretrained(folder, save_original_format=not fused, max_shard_size=SHARD_BYTES)
    return {"layers": layers, **LAYER, "layer_bytes": LAYER_BYTES}


def drop_from_cache(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_all(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            while stream.read(2**24):
                pass


def cached(folder: Path, samples: int = 200) -> float:
    """The part of the files that the page cache has, asked for at random places without reading them."""
    files, there = sorted(folder.glob("*.safetensors")), 0
    for _ in range(samples):
        file = random.choice(files)
        with file.open("rb") as stream:
            at = random.randrange(file.stat().st_size // 4096) * 4096
            with contextlib.suppress(BlockingIOError):
                there += os.preadv(stream.fileno(), [bytearray(1)], at, os.RWF_NOWAIT)
    return there / samples


# -- the rounds ------------------------------------------------------------------------------------------


def measure(folder: Path, dtype: str, cache: str, runs: int) -> dict[str, Any]:
    """Both loaders in turns, in an order that changes."""
    found: dict[str, list[dict[str, Any]]] = {loader: [] for loader in LOADERS}
    caches = []
    for run in range(runs):
        for loader in LOADERS[:: 1 if run % 2 else -1]:
            (drop_from_cache if cache == "cold" else read_all)(folder)
            caches.append(cached(folder))
            found[loader].append(in_child(loader, str(folder), dtype))

    def ratio(name: str) -> dict[str, float]:
        return spread(theirs[name] / ours[name] for ours, theirs in zip(*found.values(), strict=True))

    return {
        "cached": spread(caches),
        "ratio": ratio("seconds"),
        "step_ratio": ratio("step_s"),
        **{
            loader: {name: spread(run[name] for run in ran) for name in ran[0]}
            for loader, ran in found.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gb", type=float, default=3.0, help="size of the checkpoint")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        kind, *rest = args.child
        result = write_checkpoint(rest[0], rest[1], int(rest[2])) if kind == "write" else child(kind, *rest)
        print(json.dumps(result))
        return

    from qllm_ops.scheduler.report import device_meta

    layers, rows, model = max(1, round(args.gb * 1e9 / LAYER_BYTES)), [], {}
    load_before = os.getloadavg()
    for layout in LAYOUTS:
        with tempfile.TemporaryDirectory() as name:
            model = in_child("write", name, layout, str(layers))
            for dtype, cache in CASES:
                row = {"layout": layout, "dtype": dtype, "cache": cache}
                rows.append({**row, **measure(Path(name), dtype, cache, args.runs)})
                print(line(rows[-1]), flush=True)
    if args.out:
        meta = {**device_meta("cpu"), "load_average": {"before": load_before, "after": os.getloadavg()}}
        asked = {"gb": args.gb, "runs": args.runs}
        document = {"meta": meta, "args": asked, "model": model, "rows": rows}
        args.out.write_text(json.dumps(document, indent=1) + "\n")


def line(row: dict[str, Any]) -> str:
    cells = [f"{row['layout']}, {row['dtype']}, {row['cache']} ({row['cached']['p50'] * 100:.0f} % cached):"]
    for loader in LOADERS:
        run = row[loader]
        peak, private = (
            run[name]["p50"] / run["model_bytes"]["p50"] for name in ("peak_bytes", "private_bytes")
        )
        cells.append(f"{loader} {run['seconds']['p50']:.2f} s, peak {peak:.2f}x ({private:.2f}x private)")
    return " ".join(cells) + (
        f"; {row['ratio']['p50']:.2f} times as fast, steps {row['step_ratio']['p50']:.2f} times"
    )


if __name__ == "__main__":
    main()
