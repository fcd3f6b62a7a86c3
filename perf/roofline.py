"""The picture of a result of `bench_moe.py`: time per layer over the number of tokens, above the floor.

A line for every format; a thin one of its colour is the floor of its bytes.

python perf/roofline.py perf/results/bench_moe-....json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from goals import best_peer

COLOURS = {"bf16": "C0", "fp8": "C2", "mxfp4": "C3", "int4": "C4"}


def draw(document: dict[str, Any], path: Path) -> None:
    """One panel per model. Points are medians, bars reach from the first quartile to the third."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullLocator

    cases = [case for case in document["cases"] if case.get("graph_us")]
    models = list(dict.fromkeys(case["shape"] for case in cases))
    if not models:
        return
    columns = min(3, len(models))
    rows = -(-len(models) // columns)
    figure, panels = pyplot.subplots(rows, columns, figsize=(4.6 * columns, 3.6 * rows + 0.6), squeeze=False)
    for panel, model in zip(panels.flat, models, strict=False):
        ours = [case for case in cases if case["shape"] == model]
        for format, colour in COLOURS.items():
            mine = [case for case in ours if case.get("format", "bf16") == format]
            _format(panel, sorted(mine, key=lambda case: case["tokens"]), format, colour)
        tokens = sorted({case["tokens"] for case in ours})
        panel.set(title=model, xlabel="tokens", ylabel="us per layer", xscale="log", yscale="log")
        panel.set_xticks(tokens, [str(t) for t in tokens])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.grid(alpha=0.3)
    for panel in list(panels.flat)[len(models) :]:
        panel.axis("off")
    figure.suptitle(f"{document['device']}, {document['dtype']}, {document['date'][:10]}", fontsize=10)
    lines, labels = panels[0][0].get_legend_handles_labels()
    across = min(4, 2 * columns)
    figure.legend(lines, labels, loc="lower center", ncols=across, fontsize=8, frameon=False)
    below = 0.2 + 0.2 * -(-len(labels) // across)
    figure.tight_layout(rect=(0, below / figure.get_figheight(), 1, 1))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _format(panel: Any, cases: list[dict[str, Any]], format: str, colour: str) -> None:
    """Ours in one format. Peers beside dense weights only, where arithmetic bounds as well."""
    if not cases:
        return
    name = "qllm-ops" if format == "bf16" else f"qllm-ops, {format}"
    tokens = [case["tokens"] for case in cases]
    _points(panel, tokens, [case["graph_us"]["qllm"] for case in cases], name, colour, "o-")
    if format != "bf16":
        known = [case for case in cases if "memory_floor_us" in case]
        floors = [case["memory_floor_us"] for case in known]
        panel.plot([case["tokens"] for case in known], floors, "-", color=colour, linewidth=0.8, alpha=0.5)
        return
    _floors(panel, cases)
    compared = [case for case in cases if best_peer(case)]
    fastest = [case["graph_us"][best_peer(case)[0]] for case in compared]
    _points(panel, [case["tokens"] for case in compared], fastest, "best peer", "C1", "s--")


def _floors(panel: Any, cases: list[dict[str, Any]]) -> None:
    """Both lines; the floor is the higher one at every number of tokens."""
    known = [case for case in cases if "memory_floor_us" in case]
    tokens = [case["tokens"] for case in known]
    for key, label, style in (
        ("memory_floor_us", "floor: bytes / measured copy bandwidth", "-"),
        ("arithmetic_floor_us", "floor: operations / measured matmul rate", ":"),
    ):
        panel.plot(tokens, [case[key] for case in known], style, color="0.4", label=label, linewidth=1.2)


def _points(panel: Any, tokens: list[int], spreads: list[dict], label: str, colour: str, style: str) -> None:
    if not tokens:
        return
    middle = [s["p50"] for s in spreads]
    below = [s["p50"] - s["p25"] for s in spreads]
    above = [s["p75"] - s["p50"] for s in spreads]
    panel.errorbar(
        tokens, middle, [below, above], fmt=style, color=colour, label=label, markersize=4, capsize=2
    )


if __name__ == "__main__":
    source = Path(sys.argv[1])
    draw(json.loads(source.read_text()), source.with_suffix(".png"))
