"""Figures of the pages on sequences of tasks and on domains, in the look of `fallow.report.plots`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fallow.report.plots import _STYLE, INK, MARKERS, MUTED, RULE, SERIES, canvas

SHADES = LinearSegmentedColormap.from_list("shades", ["#fbf3e8", "#a8560f"])
DARK = 0.6  # share of the scale from which figures in a field are white
ON_LIGHT = "#2b2724"  # of others: no colour of the page, which is light in a dark scheme, as the field is not


@rc_context(_STYLE)
def matrix_plot(matrix: Sequence[Sequence[float]], tasks: Sequence[str], title: str) -> Figure:
    """Accuracy on each task (columns) before and after each task (rows), in per cent; the diagonal is framed."""
    figure, axes = canvas(4.6, 1.1 + 0.34 * len(matrix))
    edges = [place - 0.5 for place in range(len(tasks) + 1)], [place - 0.5 for place in range(len(matrix) + 1)]
    axes.pcolormesh(*edges, matrix, cmap=SHADES, vmin=0, vmax=1, edgecolors="none")
    for row, values in enumerate(matrix):
        for column, value in enumerate(values):
            colour = "white" if value > DARK else ON_LIGHT
            axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=colour, fontsize=8)
    for task in range(len(tasks)):
        axes.plot(
            [task - 0.5, task + 0.5, task + 0.5, task - 0.5, task - 0.5],
            [task + 0.5, task + 0.5, task + 1.5, task + 1.5, task + 0.5], color=INK, linewidth=1.1, clip_on=False,
        )  # fmt: skip
    axes.set_xticks(range(len(tasks)), tasks, rotation=30 if max(map(len, tasks)) > 6 else 0)
    axes.set_yticks(range(len(matrix)), ["before", *(f"after {task}" for task in tasks)])
    axes.set_xlim(-0.5, len(tasks) - 0.5)
    axes.set_ylim(len(matrix) - 0.5, -0.5)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.set(title=title, xlabel="accuracy on the task, %")
    return figure


@rc_context(_STYLE)
def course_plot(courses: Sequence[Mapping[str, Any]], tasks: Sequence[str], title: str, ylabel: str) -> Figure | None:
    """One line for each method over the tasks learned so far; `courses`: label, series, values, deviations."""
    told = [course for course in courses if course["values"]]
    if not told:
        return None
    figure, axes = canvas(4.6, 2.9)
    for course in told:
        series = course["series"] % len(SERIES)
        axes.errorbar(
            range(len(course["values"])), course["values"], yerr=course["deviations"], color=SERIES[series],
            marker=MARKERS[series], markersize=4.5, elinewidth=0.8, capsize=2, label=course["label"],
        )  # fmt: skip
    axes.set_xticks(range(len(tasks) + 1), ["before", *tasks])
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylim(0, 1.03)
    axes.set(title=title, xlabel="after task", ylabel=ylabel)
    axes.legend(loc="best")
    return figure


@rc_context(_STYLE)
def rank_plot(ranks: Sequence[Mapping[str, float]], tasks: Sequence[str], title: str, most: int) -> Figure:
    """Where the rank went: a bar for each weight and task; a dotted line at the rank that each began with."""
    names = list(ranks[0])
    figure, axes = canvas(4.6, max(1.9, 0.9 + (0.1 + 0.11 * len(ranks)) * len(names)))
    height = 0.8 / len(ranks)
    for number, (task, one) in enumerate(zip(tasks, ranks, strict=True)):
        places = [row + (number - (len(ranks) - 1) / 2) * height for row in range(len(names))]
        axes.barh(places, [one[name] for name in names], height=0.9 * height, color=SERIES[number % 8], label=task)
    axes.axvline(most, color=MUTED, linewidth=0.9, linestyle=(0, (1, 2)))
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, most * 1.04)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.set(title=title, xlabel="rank merged (dotted: what it began with)")
    figure.legend(loc="outside lower center", ncols=min(4, len(tasks)))
    return figure


@rc_context(_STYLE)
def domain_bars(methods: Sequence[Mapping[str, Any]], domains: Sequence[str], title: str) -> Figure:
    """Accuracy on each domain that was left out, a bar for each method with one standard deviation."""
    figure, axes = canvas(max(4.6, 0.9 + 0.14 * len(methods) * len(domains)), 2.9)
    width = 0.84 / len(methods)
    for number, method in enumerate(methods):
        at = [place + (number - (len(methods) - 1) / 2) * width for place in range(len(domains))]
        means = [method["mean"][name] for name in domains]
        heights = [math.nan if value is None else value for value in means]
        axes.bar(at, heights, width=0.92 * width, color=SERIES[method["series"] % 8], label=method["label"])
        if all(method["deviation"][name] is not None for name in domains):
            spreads = [method["deviation"][name] for name in domains]
            axes.errorbar(at, heights, yerr=spreads, fmt="none", ecolor=INK, elinewidth=0.7, capsize=1.5)
    axes.set_xticks(range(len(domains)), domains)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylim(0, 1.03)
    axes.grid(axis="x", visible=False)
    axes.tick_params(axis="x", length=0)
    axes.set(title=title, ylabel="accuracy", xlabel="domain that was not trained on")
    figure.legend(loc="outside lower center", ncols=min(4, len(methods)))
    return figure


@rc_context(_STYLE)
def seen_unseen(points: Sequence[Mapping[str, Any]], title: str) -> Figure | None:
    """Accuracy on unseen domains over that on the sources, each method with one standard deviation both ways."""
    told = [point for point in points if point["seen"] is not None and point["unseen"] is not None]
    if not told:
        return None
    figure, axes = canvas(4.6, 3.2)
    for point in told:
        series = point["series"] % len(SERIES)
        axes.errorbar(
            point["seen"], point["unseen"], xerr=point["seen_spread"], yerr=point["unseen_spread"], fmt=MARKERS[series],
            color=SERIES[series], markersize=6, elinewidth=0.9, capsize=2, label=point["label"],
        )  # fmt: skip
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.margins(0.12)
    limits = axes.get_xlim(), axes.get_ylim()
    axes.plot(limits[0], limits[0], color=RULE, linewidth=0.9, zorder=0)  # as good on unseen domains as on those seen
    axes.set(xlim=limits[0], ylim=limits[1])
    axes.set(title=title, xlabel="other pictures of the sources", ylabel="unseen domains")
    figure.legend(loc="outside lower center", ncols=min(3, len(told)))
    return figure
