"""Curves and figures: what they show, and how they come into a page."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from fallow.report import plots
from fallow.report.page import count, data_size, duration, figure, percent


def test_smoothing_is_the_unbiased_exponential_average():
    values = [3.0, 1.0, 4.0, 1.0, 5.0]
    keep = 1 - 2 / (3 + 1)
    expected = []
    for i in range(len(values)):
        weights = [keep**j for j in range(i, -1, -1)]
        expected.append(float(np.average(values[: i + 1], weights=weights)))
    assert plots.smoothed(values, span=3) == pytest.approx(expected)


def test_smoothing_passes_over_what_is_not_finite():
    assert plots.smoothed([2.0, math.nan, 2.0, math.inf, 2.0]) == pytest.approx([2.0] * 5)
    assert math.isnan(plots.smoothed([math.nan])[0])


def test_figures_without_data_are_none():
    assert plots.loss_curve([], []) is None
    assert plots.loss_curve([1], [None]) is None
    assert plots.curve([1], [math.nan], title="", label="", colour=0) is None
    assert plots.loss_curves([("sara", 0, [], [])]) is None
    assert plots.score_bars([{"vlhi": None}]) is None
    assert plots.trade_off([{"x": None, "y": 1}], "x", "y", title="", xlabel="", ylabel="") is None


def test_a_plot_in_a_page_takes_the_pages_colours_and_refers_to_itself_alone():
    figures = [plots.loss_curve(range(5), [3.0, 2.0, 1.5, 1.2, 1.0]) for _ in range(2)]
    first, second = (plots.inline_svg(figure, 'the "loss" <curve>') for figure in figures)
    assert 'aria-label="the &quot;loss&quot; &lt;curve>"' in first
    assert "var(--c0)" in first
    assert "var(--ink)" in first
    assert not any(value in first for value in plots.COLOURS.values())
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in (first, second)]
    assert not ids[0] & ids[1]
    for svg, own in zip((first, second), ids, strict=True):
        assert set(re.findall(r"#([A-Za-z]\w+)", svg)) <= own
    assert "http" not in first
    assert ">denoising loss</text>" in first


def test_trade_off_marks_each_method_with_its_spread_and_the_references_hollow():
    points = [
        {"label": "sara", "series": 0, "x": 5.0, "y": 0.9, "x_spread": 0.5, "y_spread": 0.01},
        {"label": "lora", "series": 1, "x": 9.0, "y": 0.95, "x_spread": None, "y_spread": None},
        {"label": "lost", "series": 2, "x": None, "y": None},
    ]
    figure = plots.trade_off(
        points,
        "x",
        "y",
        title="t",
        xlabel="a",
        ylabel="b",
        log_x=True,
        references=[{"label": "base", "x": 30.0, "y": 0.8}],
    )
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    assert sorted(text.get_text() for text in axes.texts) == ["base", "lora", "sara"]
    positions = sorted(
        (float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in axes.lines if len(line.get_xdata()) == 1
    )
    assert {(5.0, 0.9), (9.0, 0.95), (30.0, 0.8)} <= set(positions)


def test_threshold_plot_has_a_panel_for_each_judged_figure_and_the_level_of_the_whole_model():
    rows = [
        {"threshold": 0.0, "zeroed": 0, "total": 100, "share": 0.0, "frechet": 5.0, "alignment": 0.9},
        {"threshold": 0.1, "zeroed": 10, "total": 100, "share": 0.1, "frechet": 5.2, "alignment": None},
        {"threshold": 0.2, "zeroed": 30, "total": 100, "share": 0.3, "frechet": 9.0, "alignment": 0.7},
    ]
    figure = plots.threshold_plot(rows)
    assert [axes.get_ylabel() for axes in figure.axes] == ["frechet", "alignment"]
    top, bottom = figure.axes
    assert list(top.lines[0].get_xdata()) == [0.1, 0.3]
    assert list(top.lines[0].get_ydata()) == [5.2, 9.0]
    assert list(top.lines[1].get_ydata()) == [5.0, 5.0]
    assert list(bottom.lines[0].get_ydata()) == [0.7]
    figure.draw_without_rendering()
    low, high = bottom.get_xlim()
    ticks = [tick for which in (bottom.xaxis.get_major_ticks(), bottom.xaxis.get_minor_ticks()) for tick in which]
    assert [t.label1.get_text() for t in ticks if low <= t.get_loc() <= high and t.label1.get_text()] == ["10%", "20%"]


def test_small_share_plot_draws_who_stayed_and_who_came():
    records = [
        {"step": 0, "still_small": 0.01, "became_small": 0.0, "left": 0.0},
        {"step": 50, "still_small": 0.002, "became_small": 0.008, "left": 0.8},
    ]
    figure = plots.small_share_plot(records, 1e-3)
    first, second = figure.axes[0].lines[:2]
    assert list(first.get_ydata()) == [0.01, 0.002]
    assert list(second.get_ydata()) == [0.0, 0.008]


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (count(3152), "3,152"), (count(3152644), "3.15 M"), (count(8.6e11), "860.00 B"), (count(None), "–"),
        (data_size(999), "999 B"), (data_size(612345), "612 kB"), (data_size(12_300_000), "12.3 MB"),
        (data_size(2e9), "2 GB"),
        (duration(0.0123), "12.3 ms"), (duration(0.384), "0.38 s"), (duration(42.4), "42 s"),
        (duration(192.4), "3 min 12 s"),
        (duration(7501), "2 h 05 min"), (duration(59.7), "1 min 00 s"), (duration(3599.8), "1 h 00 min"),
        (percent(0.05), "5%"), (percent(0.000512), "0.0512%"), (percent(1.0), "100%"), (percent(0), "0%"),
        (figure(0.12345), "0.123"), (figure(33.333), "33.33"), (figure(133.333), "133.3"), (figure(None), "–"),
        (figure(math.nan), "–"),
    ],
)  # fmt: skip
def test_figures_are_written_as_people_read_them(shown, expected):
    assert shown == expected


def test_rates_that_lie_close_together_share_a_label():
    runs = [{"lr": lr, "frechet": 1.0, "chosen": False} for lr in (1e-4, 9e-4, 1e-3, 9e-3)]
    figure = plots.sweep_plot({"sara": (0, runs)}, "frechet", "Frechet distance")
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["0.0001", "0.0009", "0.009"]
