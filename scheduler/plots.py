"""The picture of a replay: how long each class waited for its first token, and what every lane did when."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qllm_ops.scheduler.records import LS_ALONE, RunRecord, Span

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with any kind of colour vision. Policies and classes share none.
POLICY_COLORS = {
    "fcfs": "#4D4D4D",
    "priority": "#E69F00",
    "layer": "#56B4E9",
    "tile": "#009E73",
    LS_ALONE: "#000000",
}
OTHER_COLORS = ("#CC79A7", "#999933", "#882255")

SPAN_COLORS = {
    ("LS", "prefill"): "#0072B2",
    ("LS", "decode"): "#8CC4E8",
    ("BE", "prefill"): "#D55E00",
    ("BE", "decode"): "#F5B78A",
    ("LS + BE", "prefill"): "#7B3294",
    ("LS + BE", "decode"): "#C9A5D6",
}
PAUSE_COLOR = "#111111"
SLO_COLOR = "#AA0000"

WIDTH_IN, DPI = 14.0, 100  # 1400 pixels, what a README shows without scaling
# What stands at which height of a strip.
ROWS = {"foreground": 1, "background": 0}
ARRIVALS_ROW, WAIT_ROW, TOP = 2.3, 2.8, 3.5


def write_png(report: dict[str, Any], runs: dict[str, RunRecord], path: str | Path) -> None:
    """Draw ``report`` (see `report.build_report`) and the ``runs`` it was made from into a PNG at ``path``.

    Above: the share of all requests of a class that had their first token within a time, per policy; what
    never completed keeps a curve below 1. Below: for each policy a strip with LS arrivals, foreground and
    background lane and every pause, once for the whole run and once around a typical LS request.

    Raises:
        ModuleNotFoundError: matplotlib is not there; it comes with the extra ``plots``.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the picture needs matplotlib, which is not installed: pip install 'qllm-ops[plots]'"
        ) from error

    policies = {name: run for name, run in runs.items() if name != LS_ALONE}
    height = 5.05 + 1.5 * len(policies)
    figure = Figure(figsize=(WIDTH_IN, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)  # not pyplot: nothing global, and it works in any thread
    _title(figure, report["meta"], height)
    _distributions(figure, report, runs, height)
    if policies:
        _strips(figure, policies, height)
    figure.savefig(path, format="png")


def _title(figure: Figure, meta: dict[str, Any], height: float) -> None:
    model = meta.get("model", "unnamed model")
    x = 0.06
    figure.text(x, 1 - 0.32 / height, f"Replay of {model}", fontsize=15, weight="bold", va="center")
    facts = (meta.get("device"), meta.get("workload"), str(meta.get("date") or "")[:10])
    figure.text(
        x,
        1 - 0.62 / height,
        " · ".join(str(fact) for fact in facts if fact),
        fontsize=10.5,
        color="#555555",
        va="center",
    )


# -- distributions ---------------------------------------------------------------------------------------


def _distributions(figure: Figure, report: dict[str, Any], runs: dict[str, RunRecord], height: float) -> None:
    grid = figure.add_gridspec(
        1, 2, left=0.06, right=0.875, top=1 - 1.25 / height, bottom=1 - 3.75 / height, wspace=0.42
    )
    for column, (title, urgent) in enumerate((("latency-sensitive (LS)", True), ("best-effort (BE)", False))):
        ax = figure.add_subplot(grid[column])
        if column == 0:
            ax.set_ylabel("share of requests", fontsize=9.5)
        ax.set_title(f"Time to first token: {title}", fontsize=11.5, loc="left", weight="bold", pad=20)
        values = {}
        for name, run in sorted(runs.items(), key=lambda item: item[0] == LS_ALONE):  # LS alone last
            requests = [f for f in run.finished if (f.priority > 0) == urgent]
            if requests and (urgent or name != LS_ALONE):
                times = sorted(f.ttft_s for f in requests if f.status == "done" and f.ttft_s is not None)
                values[name] = (times, len(requests))
        _ecdf(ax, values, report["slo_s"] if urgent else None)


def _ecdf(ax: Axes, values: dict[str, tuple[list[float], int]], slo_s: float | None) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

    shown = [t for times, _ in values.values() for t in times if t > 0]
    shown += [slo_s] if slo_s else []
    low, high = (min(shown) / 1.3, max(shown) * 1.3) if shown else (0.01, 10.0)
    for name, (times, total) in values.items():
        # From the left edge at 0 to the right edge at whatever share completed.
        x = [low, *times, high]
        y = [0.0, *(np.arange(1, len(times) + 1) / total), len(times) / total]
        alone = name == LS_ALONE
        label = "LS alone" if alone else name
        if times:
            label += f"  {_duration(float(np.median(times)))}"
        ax.step(
            np.maximum(x, low),
            y,
            where="post",
            label=label,
            color=policy_color(name, values),
            linewidth=1.8 if alone else 2.2,
            linestyle=(0, (1.2, 1.2)) if alone else "-",
            zorder=4 if alone else 3,
        )
    if slo_s is not None:
        ax.axvline(slo_s, color=SLO_COLOR, linewidth=1, linestyle=(0, (4, 3)))
        ax.annotate(
            f"SLO {_duration(slo_s)}", (slo_s, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 3),
            textcoords="offset points", color=SLO_COLOR, fontsize=9, ha="center",
        )  # fmt: skip
    ax.set_xscale("log")
    ax.set_xlim(low, high)
    ax.set_ylim(0, 1.02)
    # A narrow range holds too few powers of ten to read a value off.
    subs = (1.0,) if high / low > 3000 else (1.0, 2.0, 5.0) if high / low < 30 else (1.0, 3.0)
    ax.xaxis.set_major_locator(LogLocator(subs=subs))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda t, _: _duration(t)))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_xlabel("time to first token (log scale)", fontsize=9.5)
    ax.tick_params(labelsize=9)
    ax.grid(color="#E4E4E4", linewidth=0.8)
    ax.set_axisbelow(True)
    _no_frame(ax)
    if values:
        # Beside the axes: the curves may be anywhere inside.
        ax.legend(
            title="median", alignment="left", fontsize=9, title_fontsize=9, frameon=False,
            loc="upper left", bbox_to_anchor=(1.0, 1.03), handlelength=1.6,
        )  # fmt: skip
    else:
        ax.text(
            0.5, 0.5, "no requests", transform=ax.transAxes, ha="center", color="#777777", backgroundcolor="w"
        )


def policy_color(name: str, among: Iterable[str]) -> str:
    """The colour of a policy: always the same for the four that ship, any free one for others."""
    if name in POLICY_COLORS:
        return POLICY_COLORS[name]
    others = [other for other in among if other not in POLICY_COLORS]
    return OTHER_COLORS[others.index(name) % len(OTHER_COLORS)]


# -- timelines -------------------------------------------------------------------------------------------


def _strips(figure: Figure, policies: dict[str, RunRecord], height: float) -> None:
    top, bottom = 1 - 4.85 / height, 0.5 / height
    end = max(_length(run) for run in policies.values()) or 1.0
    zoom = typical_request(policies)
    widths = [2.0, 1.0] if zoom else [1.0]
    grid = figure.add_gridspec(
        len(policies), len(widths), left=0.105, right=0.985, top=top, bottom=bottom,
        hspace=0.16, wspace=0.07, width_ratios=widths,
    )  # fmt: skip
    axes = [
        [figure.add_subplot(grid[row, column]) for column in range(len(widths))]
        for row in range(len(policies))
    ]
    for row, (name, run) in enumerate(policies.items()):
        windows = [(0.0, end), zoom[1:]] if zoom else [(0.0, end)]
        for column, (ax, window) in enumerate(zip(axes[row], windows, strict=True)):
            _strip(ax, run, window)
            ax.tick_params(labelbottom=row == len(policies) - 1, labelleft=column == 0)
        axes[row][0].text(
            -0.135 if zoom else -0.09, 0.5, name, transform=axes[row][0].transAxes, rotation=90, va="center",
            ha="center", fontsize=11.5, weight="bold", color=policy_color(name, policies),
        )  # fmt: skip
        if zoom:
            axes[row][0].axvspan(*zoom[1:], color="#F1F1F1", zorder=0)
            _mark_ttft(axes[row][1], run, zoom[0])
    axes[0][0].set_title("What the lanes did: the whole run", fontsize=11.5, loc="left", weight="bold")
    axes[-1][0].set_xlabel("seconds since the start of the run", fontsize=9.5)
    if zoom:
        axes[0][1].set_title(
            f"The grey part: how long {zoom[0]} waits", fontsize=11.5, loc="left", weight="bold"
        )
        axes[-1][1].set_xlabel("seconds since the start of the run", fontsize=9.5)
    _span_legend(figure, height, policies.values())


def typical_request(policies: dict[str, RunRecord]) -> tuple[str, float, float] | None:
    """(id, start, end): an LS request and a window around its wait, at most a third of the run.

    Of all LS requests, it is the median one by how much its wait differs between the policies, so that the
    picture shows what is usual and not what flatters. None with fewer than two policies, or no LS request
    that is done under all of them.
    """
    waits: dict[str, list[float]] = {}
    arrival: dict[str, float] = {}
    for run in policies.values():
        for f in run.finished:
            if f.priority > 0 and f.status == "done" and f.ttft_s is not None:
                waits.setdefault(f.id, []).append(f.ttft_s)
                arrival[f.id] = f.arrival_s
    comparable = [key for key, times in waits.items() if len(times) == len(policies) > 1]
    if not comparable:
        return None
    comparable.sort(key=lambda key: max(waits[key]) - min(waits[key]))
    key = comparable[len(comparable) // 2]
    width = min(1.35 * max(waits[key]), max(_length(run) for run in policies.values()) / 3)
    start = max(0.0, arrival[key] - 0.1 * width)
    return key, start, start + width


def _strip(ax: Axes, run: RunRecord, window: tuple[float, float]) -> None:
    start, end = window
    bars: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for span in run.spans:
        key = (SPAN_COLORS[_class_of(span), span.kind], span.lane)
        bars.setdefault(key, []).append((span.start_s, span.end_s - span.start_s))
    for (color, lane), extents in bars.items():
        extents = _visible(extents, window)
        # A white line parts iterations, but would wipe out those of a few pixels.
        edges = ["white" if width > (end - start) / 150 else color for _, width in extents]
        ax.broken_barh(extents, (ROWS[lane] + 0.12, 0.76), facecolors=color, edgecolors=edges, linewidth=0.5)
    _pauses(ax, run, window)
    arrivals = [f.arrival_s for f in run.finished if f.priority > 0]
    ax.plot(arrivals, [ARRIVALS_ROW] * len(arrivals), "v", color=SPAN_COLORS["LS", "prefill"], markersize=5)
    ax.set_xlim(start, end)
    ax.set_ylim(-0.3, TOP)
    ax.set_yticks([ARRIVALS_ROW, 1.5, 0.5], ["LS arrivals", "foreground", "background"])
    ax.tick_params(labelsize=9, left=False)
    ax.grid(axis="x", color="#E4E4E4", linewidth=0.8)
    ax.set_axisbelow(True)
    _no_frame(ax)


def _visible(extents: list[tuple[float, float]], window: tuple[float, float]) -> list[tuple[float, float]]:
    """(start, width) of what lies in the window, neighbours of less than a pixel merged."""
    pixel = (window[1] - window[0]) / 1000
    seen: list[tuple[float, float]] = []
    for start, width in sorted(extents):
        if start > window[1] or start + width < window[0]:
            continue
        last = seen[-1] if seen else None
        if last and width < pixel and start - sum(last) < pixel / 2 and last[1] < 20 * pixel:
            seen[-1] = (last[0], max(last[1], start + width - last[0]))
        else:
            seen.append((start, width))
    return seen


def _pauses(ax: Axes, run: RunRecord, window: tuple[float, float]) -> None:
    stopped = [p for p in run.pauses if p.parked_s is not None]
    if stopped:
        extents = _visible([(p.asked_s, p.resumed_s - p.asked_s) for p in stopped], window)
        ax.broken_barh(
            extents,
            (0.12, 0.76),
            facecolors="#FFFFFFD0",
            edgecolors=PAUSE_COLOR,
            hatch="//////",
            linewidth=0.6,
        )
    # A pause can be narrower than a pixel, or have found nothing to stop: its mark is always there.
    for found, fill in ((True, PAUSE_COLOR), (False, "white")):
        asked = [p.asked_s for p in run.pauses if (p.parked_s is not None) == found]
        ax.plot(asked, [-0.1] * len(asked), "^", color=PAUSE_COLOR, markerfacecolor=fill, markersize=4)


def _mark_ttft(ax: Axes, run: RunRecord, request_id: str) -> None:
    request = next(f for f in run.finished if f.id == request_id)
    color = SPAN_COLORS["LS", "prefill"]
    ax.hlines(WAIT_ROW, request.arrival_s, request.first_token_s, color=color, linewidth=1.6)
    ax.plot([request.arrival_s, request.first_token_s], [WAIT_ROW] * 2, "|", color=color, markersize=7)
    ax.annotate(
        f"first token after {_duration(request.ttft_s)}", (request.arrival_s, WAIT_ROW), xytext=(0, 6),
        textcoords="offset points", fontsize=9, color=color,
    )  # fmt: skip


def _span_legend(figure: Figure, height: float, runs: Iterable[RunRecord]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    present = {(_class_of(span), span.kind) for run in runs for span in run.spans}
    handles: list[Any] = [
        Patch(facecolor=color, label=f"{cls} {kind}")
        for (cls, kind), color in SPAN_COLORS.items()
        if (cls, kind) in present
    ]
    handles.append(Patch(facecolor="white", edgecolor=PAUSE_COLOR, hatch="//////", label="BE paused"))
    for label, fill in (("a pause begins", PAUSE_COLOR), ("... and stops nothing", "white")):
        mark = {"color": PAUSE_COLOR, "marker": "^", "markersize": 5, "markerfacecolor": fill}
        handles.append(Line2D([], [], linestyle="", label=label, **mark))
    figure.legend(
        handles=handles, ncols=len(handles), loc="center", bbox_to_anchor=(0.5, 1 - 4.38 / height),
        fontsize=9, frameon=False, handlelength=1.4, columnspacing=1.5,
    )  # fmt: skip


def _length(run: RunRecord) -> float:
    # What failed or was cancelled after the last token still kept a lane busy.
    return max([run.wall_s, *(span.end_s for span in run.spans)])


def _class_of(span: Span) -> str:
    if span.ls_rows and span.be_rows:
        return "LS + BE"
    return "LS" if span.ls_rows else "BE"


def _no_frame(ax: Axes) -> None:
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)


def _duration(seconds: float) -> str:
    for limit, scale, unit in ((1e-3, 1e6, "µs"), (1.0, 1e3, "ms")):
        if seconds < limit * 0.9995:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds:.3g} s" if seconds < 999.5 else f"{seconds:.0f} s"
