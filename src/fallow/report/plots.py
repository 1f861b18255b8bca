"""The plots of the pages and of `fallow probe`: matplotlib figures in one look, and their way into a page.

Every figure is drawn in the few colours of `COLOURS`. Saved to a file they are what they are; inlined into a page by
`inline_svg` they become the page's own variables, so that a plot follows the reader's light or dark scheme.
"""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    EngFormatter,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
    PercentFormatter,
)

COLOURS = {  # the name of the page's variable -> the colour in a file
    "ink": "#2a2723",
    "muted": "#7b746a",
    "rule": "#ddd6ca",
    "c0": "#a8560f",
    "c1": "#2f6f6a",
    "c2": "#7a4b86",
    "c3": "#5b7d2a",
    "c4": "#b8354a",
    "c5": "#3b6aa6",
    "c6": "#8a7000",
    "c7": "#5e5a55",
}
SERIES = [COLOURS[f"c{i}"] for i in range(8)]
MARKERS = "osD^vPXh"  # a method is told apart by shape too: colour alone fails some readers and all photocopies
INK, MUTED, RULE = COLOURS["ink"], COLOURS["muted"], COLOURS["rule"]

_STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "fallow", "font.size": 8, "font.family": "sans-serif",
    "axes.edgecolor": MUTED, "axes.labelcolor": INK, "axes.titlecolor": INK, "text.color": INK,
    "axes.titlesize": 9, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlepad": 8,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.7,
    "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "axes.grid": True, "grid.color": RULE, "grid.linewidth": 0.5, "axes.axisbelow": True,
    "legend.frameon": False, "legend.fontsize": 7.5, "lines.linewidth": 1.4,
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "white",
}  # fmt: skip


@rc_context(_STYLE)
def canvas(width: float = 4.6, height: float = 2.7, **subplots: Any) -> tuple[Figure, Any]:
    """A figure of `width` x `height` inches in the house look, and its axes. No window system is touched."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(**subplots)


def inline_svg(figure: Figure, label: str) -> str:
    """The figure as an `<svg>` element for a page: colours as variables, no ids in common with other figures.

    `label` is read aloud in its place. The result holds no URL and no script.
    """
    buffer = io.StringIO()
    number = next(_numbers)
    with rc_context(_STYLE | {"svg.hashsalt": f"fallow-{number}"}):
        figure.savefig(buffer, format="svg", facecolor="none", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style type=\"text/css\">.*?</style>", "", text, flags=re.DOTALL)
    box = re.search(r'viewBox="([^"]+)"', text)
    assert box is not None
    body = text[text.index(">", text.index("<svg")) + 1 :]
    for name, value in COLOURS.items():
        body = body.replace(value, f"var(--{name})")
    # figure_1, axes_1, ... are the same in every figure; the ids that are referred to are hashed with the salt
    body = re.sub(r'<g id="[a-zA-Z0-9_.]+">', "<g>", body)
    body = re.sub(r"font: ([^;\"]*?)px [^;\"]*", r"font-size: \1px", body)
    escaped = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return f'<svg class="plot" role="img" aria-label="{escaped}" viewBox="{box[1]}">{body.strip()}'


_numbers = itertools.count()


def smoothed(values: Sequence[float], span: float | None = None) -> np.ndarray:
    """Exponential moving average, without the bias of its start; `span` defaults to a fifteenth of the values.

    Values that are not finite are passed over (the average stands still there).
    """
    span = max(2.0, len(values) / 15) if span is None else span
    keep = 1 - 2 / (span + 1)
    out, total, weight = np.empty(len(values)), 0.0, 0.0
    for i, value in enumerate(values):
        if math.isfinite(value):
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        out[i] = total / weight if weight else math.nan
    return out


def _finite(steps: Sequence[float], values: Sequence[float | None]) -> tuple[list[float], list[float]]:
    pairs = [(s, v) for s, v in zip(steps, values, strict=True) if v is not None and math.isfinite(v)]
    return [s for s, _ in pairs], [v for _, v in pairs]


def _mark_events(axes: Axes, events: Sequence[Mapping[str, Any]]) -> None:
    """A dotted line where something happened, with its name at the top."""
    for event in events:
        axes.axvline(event["step"], color=MUTED, linewidth=0.8, linestyle=(0, (1, 2)))
        axes.annotate(
            str(event["event"]), (event["step"], 1), xycoords=("data", "axes fraction"), xytext=(2, -2),
            textcoords="offset points", fontsize=6.5, color=MUTED, va="top",
        )  # fmt: skip


@rc_context(_STYLE)
def loss_curve(
    steps: Sequence[int], losses: Sequence[float | None], events: Sequence[Mapping[str, Any]] = ()
) -> Figure | None:
    """Raw loss as faint points, its moving average over them; None where no finite loss was logged."""
    at, values = _finite(steps, losses)
    if not values:
        return None
    figure, axes = canvas()
    if len(values) > 1:
        axes.plot(at, values, color=SERIES[0], alpha=0.28, linewidth=0.6, label="each logged step")
        axes.plot(at, smoothed(values), color=SERIES[0], label="moving average")
        axes.legend(loc="upper right")
        low, high = np.percentile(values, [0.5, 99.5])  # one wild step must not flatten the rest
        room = (high - low or abs(high) or 1) * 0.12
        axes.set_ylim(max(0.0, low - room) if low >= 0 else low - room, high + room)
    else:
        axes.plot(at, values, "o", color=SERIES[0])
    axes.set(title="Loss", xlabel="step", ylabel="denoising loss")
    _mark_events(axes, events)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return figure


@rc_context(_STYLE)
def curve(
    steps: Sequence[int],
    values: Sequence[float | None],
    *,
    title: str,
    label: str,
    colour: int,
    noisy: bool = False,
    from_zero: bool = True,
) -> Figure | None:
    """One logged figure over the steps, a `noisy` one with its moving average; None where nothing finite was logged."""
    at, finite = _finite(steps, values)
    if not finite:
        return None
    figure, axes = canvas()
    if noisy and len(finite) > 2:
        axes.plot(at, finite, color=SERIES[colour], alpha=0.28, linewidth=0.6)
        axes.plot(at, smoothed(finite), color=SERIES[colour])
    else:
        axes.plot(at, finite, "-" if len(finite) > 1 else "o", color=SERIES[colour])
    axes.set(title=title, xlabel="step", ylabel=label)
    if min(finite) >= 0 and from_zero:
        axes.set_ylim(0, max(finite) * 1.12 or 1)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if max(map(abs, finite)) < 1e-2:
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    return figure


@rc_context(_STYLE)
def block_bars(blocks: Sequence[tuple[str, int, int]]) -> Figure:
    """Share of each block's parameters that is trained; `blocks`: (name, trained, parameters), drawn top to bottom."""
    figure, axes = canvas(height=max(1.2, 0.55 + 0.22 * len(blocks)))
    shares = [trained / numel if numel else 0.0 for _, trained, numel in blocks]
    rows = range(len(blocks))[::-1]
    axes.barh(rows, shares, height=0.66, color=SERIES[1])
    top = max(shares, default=0) or 1
    for row, share, (_, trained, _) in zip(rows, shares, blocks, strict=True):
        axes.annotate(
            f"{trained:,}", (share, row), xytext=(3, 0), textcoords="offset points", va="center", fontsize=6.5,
            color=MUTED,
        )  # fmt: skip
    axes.set_yticks(list(rows), [name for name, _, _ in blocks])
    axes.set_xlim(0, top * 1.22)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.set(title="Share of each block that was trained", xlabel="trained share (number: trained parameters)")
    return figure


@rc_context(_STYLE)
def trade_off(
    points: Sequence[Mapping[str, Any]], x: str, y: str, *, title: str, xlabel: str, ylabel: str,
    log_x: bool = False, references: Sequence[Mapping[str, Any]] = (),
) -> Figure | None:  # fmt: skip
    """One mark for each method: its mean over the seeds, with bars of one standard deviation.

    `points`: mappings with `label`, `series` (colour and shape), the two figures and optionally `<figure>_spread`.
    `references` (the base model, real pictures) are drawn hollow. None where no point has both figures.
    """
    told = [p for p in points if p.get(x) is not None and p.get(y) is not None]
    if not told:
        return None
    figure, axes = canvas(4.6, 3.2)
    for point in told:
        series = int(point["series"]) % len(SERIES)
        axes.errorbar(
            point[x], point[y], xerr=point.get(f"{x}_spread"), yerr=point.get(f"{y}_spread"), fmt=MARKERS[series],
            color=SERIES[series], markersize=6, elinewidth=0.9, capsize=2,
        )  # fmt: skip
    for point in references:
        if point.get(x) is not None and point.get(y) is not None:
            axes.plot(point[x], point[y], "o", markerfacecolor="none", markeredgecolor=MUTED, markersize=6)
    shown = [p[x] for p in [*told, *references] if p.get(x) is not None and p.get(y) is not None]
    if log_x and min(shown) > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=7))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.margins(0.16, 0.14)
    figure.draw_without_rendering()  # the limits that the labels are placed in
    for point in [*told, *references]:
        if point.get(x) is None or point.get(y) is None:
            continue
        across = axes.transAxes.inverted().transform(axes.transData.transform((point[x], point[y])))[0]
        right = across > 0.66
        axes.annotate(
            str(point["label"]), (point[x], point[y]), xytext=(-6 if right else 6, 4), textcoords="offset points",
            ha="right" if right else "left", fontsize=7.5, color=INK,
        )  # fmt: skip
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    return figure


@rc_context(_STYLE)
def score_bars(rows: Sequence[Mapping[str, Any]]) -> Figure | None:
    """VLHI of each method, best on top, with a bar of one standard deviation and a dot for each seed."""
    told = [row for row in rows if row.get("vlhi") is not None]
    if not told:
        return None
    told.sort(key=lambda row: row["vlhi"])
    figure, axes = canvas(height=max(2.2, 0.6 + 0.3 * len(told)))
    for place, row in enumerate(told):
        colour = SERIES[int(row["series"]) % len(SERIES)]
        axes.barh(place, row["vlhi"], height=0.62, color=colour, alpha=0.85)
        if row.get("vlhi_spread"):
            axes.errorbar(row["vlhi"], place, xerr=row["vlhi_spread"], color=INK, elinewidth=0.9, capsize=2.5)
        if len(row.get("vlhi_by_seed", ())) > 1:
            axes.plot(row["vlhi_by_seed"], [place] * len(row["vlhi_by_seed"]), ".", color=INK, markersize=3.5)
    axes.set_yticks(range(len(told)), [row["label"] for row in told])
    axes.set_xlim(0, 2.05)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.set(title="VLHI: distance and alignment in one figure", xlabel="VLHI (0 worst in both, 2 best in both)")
    return figure


@rc_context(_STYLE)
def sweep_plot(
    sweeps: Mapping[str, tuple[int, Sequence[Mapping[str, Any]]]], figure_name: str, ylabel: str
) -> Figure | None:
    """A figure over the learning rate, one line for each method, the chosen rate filled; None where none is known.

    `sweeps`: label -> (series, runs), each run with `lr`, `chosen` and the figure (None where the run failed).
    """
    figure, axes = canvas(4.6, 3.0)
    drawn = False
    for label, (series, runs) in sweeps.items():
        told = sorted((r["lr"], r[figure_name], r["chosen"]) for r in runs if r.get(figure_name) is not None)
        if not told:
            continue
        colour, marker = SERIES[series % len(SERIES)], MARKERS[series % len(MARKERS)]
        axes.plot([t[0] for t in told], [t[1] for t in told], color=colour, linewidth=1.1, label=label)
        for lr, value, chosen in told:
            axes.plot(lr, value, marker, color=colour, markerfacecolor=colour if chosen else "none", markersize=5.5)
        drawn = True
    if not drawn:
        return None
    axes.set_xscale("log")
    tried = _apart(sorted({run["lr"] for _, runs in sweeps.values() for run in runs}))
    axes.set_xticks(tried, [f"{lr:g}" for lr in tried], rotation=30 if len(tried) > 5 else 0)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(title="Learning rates tried (filled: chosen)", xlabel="learning rate", ylabel=ylabel)
    axes.legend(loc="best")
    return figure


def _apart(rates: Sequence[float]) -> list[float]:
    """Of ascending rates those whose labels do not run into that of the one before, on a logarithmic axis."""
    kept: list[float] = []
    for rate in rates:
        if not kept or math.log(rate / kept[-1]) > 0.08 * math.log(rates[-1] / rates[0]):
            kept.append(rate)
    return kept


@rc_context(_STYLE)
def loss_curves(runs: Sequence[tuple[str, int, Sequence[int], Sequence[float | None]]]) -> Figure | None:
    """Moving averages of several runs' losses; `runs`: (label, series, steps, losses)."""
    figure, axes = canvas(4.6, 3.0)
    drawn = False
    for label, series, steps, losses in runs:
        at, values = _finite(steps, losses)
        if len(values) > 1:
            axes.plot(at, smoothed(values, max(2.0, len(values) / 8)), color=SERIES[series % len(SERIES)], label=label)
            drawn = True
    if not drawn:
        return None
    axes.set(title="Loss (moving average)", xlabel="step", ylabel="denoising loss")
    axes.legend(loc="best")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return figure


@rc_context(_STYLE)
def threshold_plot(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """What zeroing the smallest entries does to the judged figures: one panel each, over the zeroed share.

    `rows` as of `fallow.analysis.small_weights.zero_small`; the row of threshold 0 is the level to compare with.
    """
    given = {"threshold", "zeroed", "total", "share"}
    names = [
        k for k, v in rows[0].items() if k not in given and isinstance(v, (int, float)) and not isinstance(v, bool)
    ]
    figure, panels = canvas(4.6, 0.5 + 1.9 * max(1, len(names)), nrows=max(1, len(names)), sharex=True, squeeze=False)
    swept = sorted((row for row in rows if row["zeroed"]), key=lambda row: row["share"])
    before = next((row for row in rows if not row["zeroed"]), None)
    for series, (name, axes) in enumerate(zip(names, panels[:, 0], strict=False)):
        colour = SERIES[series % len(SERIES)]
        told = [(row["share"], row[name]) for row in swept if row[name] is not None]
        axes.plot([t[0] for t in told], [t[1] for t in told], "o-", color=colour, markersize=4)
        if before is not None and before[name] is not None:
            axes.axhline(before[name], color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
            axes.annotate(
                "nothing zeroed", (1, before[name]), xycoords=("axes fraction", "data"), xytext=(-2, 3),
                textcoords="offset points", ha="right", fontsize=6.5, color=MUTED,
            )  # fmt: skip
        axes.set_ylabel(name.replace("_", " "))
        axes.margins(y=0.2)
    last = panels[-1, 0]
    last.set_xscale("log")
    last.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    last.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))
    last.xaxis.set_minor_formatter(NullFormatter())  # the default names minor ticks where there are few major ones
    last.set_xlabel("share of the entries set to zero, smallest first")
    panels[0, 0].set_title("Without the smallest weights")
    return figure


@rc_context(_STYLE)
def small_share_plot(records: Sequence[Mapping[str, Any]], threshold: float) -> Figure:
    """How the entries below the threshold change while everything is trained: those of the start, and others.

    `records` as of `fallow.analysis.small_weights.SmallShare.records`.
    """
    figure, axes = canvas(4.6, 3.0)
    steps = [record["step"] for record in records]
    axes.plot(
        steps, [r["still_small"] for r in records], "o-", color=SERIES[0], markersize=3.5, label="small at the start"
    )
    axes.plot(
        steps, [r["became_small"] for r in records], "s-", color=SERIES[1], markersize=3.5, label="became small later"
    )
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=2))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_ylim(bottom=0)
    axes.legend(loc="best")
    axes.set(
        title="Small entries do not stay small",
        xlabel="step of full training",
        ylabel=f"share of all entries below {threshold:.3g}",
    )
    return figure
