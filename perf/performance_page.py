"""Writes docs/performance.md out of perf/results/*.json, and out of nothing else.

    python perf/performance_page.py

Run it whenever a result was added; a test holds the page against the results. A part without a result
says "not measured yet".
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from goals import best_peer, goals, memory_ratio, name_of, quartiles
from gpu_table import summary

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "perf" / "results", ROOT / "docs" / "performance.md"

NOT_YET = "not measured yet"


@dataclass(frozen=True)
class Result:
    """One landed file."""

    path: Path
    document: dict[str, Any]

    @property
    def kind(self) -> str:
        return self.path.name.partition("-")[0]

    @property
    def meta(self) -> dict[str, Any]:
        """Where the kind keeps device, date and command."""
        return self.document.get("meta", self.document)

    @property
    def environment(self) -> dict[str, Any]:
        """Versions and commit."""
        section = self.document.get("sections", {}).get("environment", {}).get("result", {})
        return self.document.get("environment") or section or self.meta


def main() -> None:
    PAGE.write_text(page(results(RESULTS)))
    print(f"written: {PAGE.relative_to(ROOT)}")


def results(folder: Path) -> list[Result]:
    """The newest first."""
    found = [Result(path, json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))]
    for result in found:
        if result.kind not in WRITERS:
            raise ValueError(f"{result.path.name} is of no known kind: {', '.join(WRITERS)}")
    return sorted(found, key=lambda result: result.meta["date"], reverse=True)


def page(found: list[Result]) -> str:
    lines = [
        "# Performance",
        "",
        "What was measured, each with its device, date, versions and command; written by",
        "`python perf/performance_page.py` out of `perf/results/`. A ratio is a median over rounds in which",
        "each implementation ran once, in an order that changed; above 1 means that ours is faster.",
    ]
    for kind, (title, about, write) in WRITERS.items():
        lines += ["", f"## {title}", "", about]
        mine = [result for result in found if result.kind == kind]
        for result in mine:
            lines += ["", *heading(result), "", *write(result)]
        if not mine:
            lines += ["", *nothing(kind)]
    return "\n".join(lines) + "\n"


def heading(result: Result) -> Iterator[str]:
    meta, environment = result.meta, result.environment
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    yield f"### {meta['device']}, {meta['date'][:10]}"
    yield ""
    yield f"`{meta['command']}`\\"
    yield f"{versions}\\"
    if environment.get("commit"):
        yield f"commit {environment['commit']}\\"
    yield f"[{result.path.name}](../perf/results/{result.path.name})"


def nothing(kind: str) -> Iterator[str]:
    if kind != "bench_moe":
        yield f"**{NOT_YET[0].upper()}{NOT_YET[1:]}.**"
        return
    yield from table(
        ("goal", "asked", "measured"), [(goal.name, goal.asked, NOT_YET) for goal in goals(None)]
    )


# -- one kind of result each -----------------------------------------------------------------------------


def bench_moe(result: Result) -> Iterator[str]:
    document = result.document
    rows = [(goal.name, goal.asked, goal.measured, goal.verdict) for goal in goals(document)]
    yield from table(("goal", "asked", "measured", "met"), rows)
    picture = result.path.with_suffix(".png")
    if picture.exists():
        yield from ("", f"![time per layer over tokens](../perf/results/{picture.name})")
    yield ""
    against = ("best peer", "times faster", "times faster than bf16")
    columns = ("us", *against, "floor us", "of copy", "of matmul", "polling", "batch invariant", "memory")
    yield from table(("model, tokens", *columns), [_moe_cells(case) for case in document["cases"]])
    absent = sorted(
        {f"{peer}: {why}" for why_not in document["absent"].values() for peer, why in why_not.items()}
    )
    yield from ("", *(f"Not compared: {text}." for text in absent))


def _moe_cells(case: dict[str, Any]) -> tuple[str, ...]:
    if "error" in case or "of_copy" not in case:
        return name_of(case), case.get("error", "not measured"), *[""] * 9
    dense = case.get("times_faster_than_dense")
    best, polled = best_peer(case), case["polling"]
    star = " (with gaps between its kernels)" if best and best[0] in case["not_captured"] else ""
    return (
        name_of(case),
        quartiles(case["graph_us"]["qllm"], ".1f"),
        best[0] + star if best else "-",
        quartiles(best[1], ".2f") if best else "-",
        quartiles(dense, ".2f") if dense else "-",
        f"{case['floor_us']:.1f}, {case['bound_by']}",
        f"{case['of_copy'] * 100:.0f} %",
        f"{case['of_matmul'] * 100:.0f} %",
        f"{polled['overhead'] * 100:+.2f} %" if "overhead" in polled else "not measured",
        f"{case['batch_invariant_times_as_long']['p50']:.2f}x as long",
        f"{memory_ratio(case['memory']):.2f}x" if case["memory"] else "not measured",
    )


def gpu_check(result: Result) -> Iterator[str]:
    yield from ("```", *(line for line in "\n".join(summary(result.document)).strip().splitlines()), "```")


def bench_torch_moe(result: Result) -> Iterator[str]:
    document = result.document
    if "times_as_long" in document["rows"][0]:
        yield from _in_formats(document)
        return
    yield f"{document['dtype']}, {document['threads']} threads. In brackets the range over all rounds."
    yield ""
    rows = [
        (
            "H {H}, I {I}, E {E}, K {K}".format(**row["shape"]),
            str(row["shape"]["T"]),
            f"{row['seconds']['qllm']['median'] * 1e3:.3f}",
            *(_range(row["ratio"].get(peer)) for peer in ("grouped_mm", "batched_mm", "eager")),
            f"{row['flag_cost'] * 100:+.1f} %",
        )
        for row in document["rows"]
    ]
    yield from table(
        ("layer", "tokens", "ms", "against grouped_mm", "batched_mm", "eager", "cost of a flag"), rows
    )


def _range(ratio: dict[str, float] | None) -> str:
    return f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})" if ratio else "-"


def _in_formats(document: dict[str, Any]) -> Iterator[str]:
    before, after = (load[0] for load in document["load_average"].values())
    formats = list(document["rows"][0]["times_as_long"])
    yield "How many times as long a layer takes with its weights in a format as with dense ones in"
    yield f"{document['dtype']}. Weights in a format are widened to float32 in every call, one expert's at a"
    yield "time."
    yield f"{document['threads']} threads, on a machine with other work: its load average (1 min) was"
    yield f"{before:.1f} before and {after:.1f} after. In brackets the range over all rounds."
    yield ""
    rows = [
        (
            "H {H}, I {I}, E {E}, K {K}".format(**row["shape"]),
            str(row["shape"]["T"]),
            f"{row['seconds']['qllm']['median'] * 1e3:.3f}",
            *(_range(row["times_as_long"][format]) for format in formats),
        )
        for row in document["rows"]
    ]
    yield from table(("layer", "tokens", f"{document['dtype']}, ms", *formats), rows)


def quantization_error(result: Result) -> Iterator[str]:
    shape = "H {H}, I {I}, {E} experts, top {K}, {T} tokens".format(**result.document["shape"])
    yield f"{shape}. Errors are relative RMS; bits are of a number with its share of the scales."
    yield ""
    yield from table(ERROR_HEADINGS, map(error_cells, result.document["rows"]))


WEIGHTS = ("gaussian", "heavy-tailed")
"""The kinds of weights that `quantization_error.py` draws."""

ERROR_HEADINGS = (
    *("format", "bits by arithmetic", "measured"),
    *(f"{what}, {kind}" for kind in WEIGHTS for what in ("weights", "published", "output")),
)


def error_cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of `quantization_error.py`; the script prints it as well."""
    found = [row["format"], f"{row['bits_by_arithmetic']:.3f}", f"{row[WEIGHTS[0]]['bits']:.3f}"]
    for kind in WEIGHTS:
        each = row[kind]["published"].items()
        published = "; ".join(f"{name} {e if isinstance(e, str) else _percent(e)}" for name, e in each)
        found += [_percent(row[kind]["weights"]), published, _percent(row[kind]["output"])]
    return tuple(found)


def _percent(error: float) -> str:
    return f"{error * 100:.2f} %"


def bench_engine(result: Result) -> Iterator[str]:
    document = result.document
    asked = document["args"]
    each = f"{asked['new']} new tokens each, preset {asked['preset']}, greedy"
    yield f"Requests at once: {asked['rows']}, {each}."
    yield ""
    rows = [
        (
            str(row["prompt"]),
            f"{row['generate_tokens_per_s']:.0f}",
            f"{row['engine_tokens_per_s']:.0f}",
            f"{row['ratio']:.3f}",
            f"{row['runs_with_equal_tokens']} of {len(row['engine_s'])}",
            f"{row['batch_invariant_times_as_long']:.2f}",
        )
        for row in document["rows"]
    ]
    yield from table(
        (
            "prompt tokens",
            "generate, tokens/s",
            "engine, tokens/s",
            "engine / generate",
            "runs, equal tokens",
            "batch invariant, times as long",
        ),
        rows,
    )


def bench_load(result: Result) -> Iterator[str]:
    document = result.document
    model, before, after = document["model"], *document["meta"]["load_average"].values()
    stored = document["rows"][0]["qllm"]["model_bytes"]["p50"]
    runs = document["args"]["runs"]
    sizes = f"H {model['hidden_size']}, I {model['intermediate_size']}, {model['num_local_experts']} experts"
    yield f"Mixtral, {model['layers']} layers, {sizes}: {stored / 1e9:.2f} GB in bfloat16, of which a layer's"
    yield f"experts are {model['layer_bytes'] / 1e9:.2f} GB. Medians (quartiles) of {runs} runs."
    threads = f"torch_threads: {document['meta']['torch_threads']}"
    yield f"{threads}. Load average of the machine (1 min): {before[0]:.1f} before, {after[0]:.1f} after."
    yield ""
    head = ("on disk", "in memory", "file cache")
    times = ("qllm, s", "from_pretrained, s", "returned after", "times faster")
    memory = ("qllm: beside the model, GB", "from_pretrained", "of it private", "a step, times faster")
    yield from table((*head, *times, *memory), map(_load_cells, document["rows"]))


def _load_cells(row: dict[str, Any]) -> tuple[str, ...]:
    ours, theirs = row["qllm"], row["from_pretrained"]

    def beside(run: dict[str, Any], what: str = "peak_bytes") -> str:
        return f"{(run[what]['p50'] - run['model_bytes']['p50']) / 1e9:+.2f}"

    return (
        row["layout"],
        row["dtype"],
        f"{row['cache']}, {row['cached']['p50'] * 100:.0f} %",
        quartiles(ours["seconds"], ".2f"),
        quartiles(theirs["seconds"], ".2f"),
        f"{theirs['returned_s']['p50']:.2f}",
        quartiles(row["ratio"], ".2f"),
        beside(ours),
        beside(theirs),
        beside(theirs, "private_bytes"),
        quartiles(row["step_ratio"], ".2f"),
    )


WRITERS = {
    "bench_moe": (
        "One layer on a GPU",
        """\
`python perf/bench_moe.py`: Mixtral-8x7B, Qwen3-30B-A3B, OLMoE, DeepSeek-V3 (one layer) and the sizes of
gpt-oss-20b, T = 1 to 8192 tokens, bfloat16, against transformers' `grouped_mm` and `batched_mm`, and vLLM's
fused_moe and triton_kernels where they are installed. With `--formats fp8 mxfp4 int4` the same layers with
quantised experts, against the same layer in bfloat16 and the peers that have the format. Every
implementation is replayed as a CUDA graph. The
floor is what must move (weights of the experts that are hit, with their scales, activations in and out, once
each) or be computed, at the copy bandwidth and the matmul rate measured in the same run.""",
        bench_moe,
    ),
    "gpu_check": (
        "Correctness, preemption and a replay on a GPU",
        """\
`python perf/gpu_check.py`: errors against float32, the speed of a layer and of each of its phases, from the
order to pause until the launch is over, bits under preemption, polling, and requests of both classes under
every policy; at its end, what it has measured of the goals above.""",
        gpu_check,
    ),
    "bench_torch_moe": (
        "One layer on a CPU: the torch backend",
        """\
`python perf/bench_torch_moe.py`: against transformers' experts implementations; with `--formats`, what
quantised weights cost there.""",
        bench_torch_moe,
    ),
    "quantization_error": (
        "What quantised experts cost in precision",
        """\
`python perf/quantization_error.py`: normal weights, and weights of Student's t with 3 degrees of freedom
(heavy-tailed), in bfloat16 before they are quantised; beside ours what published ways make of the same
weights: transformers' `Fp8Quantize`, the OCP specification's scale of MXFP4 and the one that cuts nothing
off (both by their formulas), and compressed-tensors' symmetric integers, by the library, which rounds to
bfloat16, and by its formula. The output is a layer's with both weights quantised against dense ones, in
float32.""",
        quantization_error,
    ),
    "bench_engine": (
        "The engine on a CPU",
        """\
`python perf/bench_engine.py`: throughput without preemption, against transformers' `generate` on the same
batch, with the same experts kernels.""",
        bench_engine,
    ),
    "bench_load": (
        "Loading a checkpoint",
        """\
`python perf/bench_load.py`: `qllm_ops.models.load` against transformers' `from_pretrained`, onto the CPU,
each load in a process of its own. Time is until every page of the weights was touched; from_pretrained maps
what needs no work and returns before that is read. Memory is the most that the process held at once, less the
weights that it ended with: negative where those are a file's pages. The goal is a layer's experts beside the
model at the most. A step is a forward pass of eight tokens, on transformers' own experts in both.""",
        bench_load,
    ),
}
"""Kind of a result, which its file's name begins with -> title, what it is, and what writes it."""


# -- Markdown --------------------------------------------------------------------------------------------


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    head = list(head)
    yield _row(head)
    yield _row(["---"] * len(head))
    for row in rows:
        yield _row(row)


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    main()
