"""The map of ranks says what the adapter has, as a file of the kind that is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fallow
from fallow.core.errors import ConfigError
from fallow.core.trimming import adapters
from fallow.report.ranks import rank_map, ranks_of


def network() -> nn.Module:
    torch.manual_seed(0)
    block = {"q": nn.Linear(8, 8), "v": nn.Linear(8, 8)}
    blocks = nn.ModuleList([nn.ModuleDict(block), nn.ModuleDict({"q": nn.Linear(8, 8), "up": nn.Linear(8, 8)})])
    return nn.ModuleDict({"blocks": blocks, "head": nn.Linear(8, 4)})


def texts(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def test_each_module_stands_in_its_layer_and_its_type_with_its_rank() -> None:
    ranks = {"blocks.0.q": 3, "blocks.0.v": 0, "blocks.1.q": 8, "blocks.1.up": 1, "head": 2}
    axes = rank_map(ranks).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["blocks.0", "blocks.1", "(model)"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["q", "v", "up", "head"]
    placed = {tuple(text.get_position()): text.get_text() for text in axes.texts}
    assert placed == {(0, 0): "3", (1, 0): "0", (0, 1): "8", (2, 1): "1", (3, 2): "2"}
    assert axes.get_title(loc="left") == "rank 14 over 5 modules, 2.8 on average"
    (mesh,) = axes.collections
    assert mesh.get_array().mask.sum() == 12 - 5


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
@pytest.mark.parametrize("host", ["own", "peft"])
def test_the_file_is_drawn_and_the_ranks_in_use_are_told(host: str, suffix: str, tmp_path: Path) -> None:
    names = ["q", "v", "up"]
    if host == "own":
        model = fallow.attach(network(), "sora", names, rank=4)
    else:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(network(), fallow.SoRAConfig(rank=4, target_modules=names))
    assert set(ranks_of(model).values()) == {4}  # none does anything yet: what there is
    for number, (_, delta) in enumerate(adapters(model)):
        delta.randomize()
        with torch.no_grad():
            delta.gate[: number + 1] = 0.0
    told = fallow.rank_figure(model, tmp_path / f"ranks{suffix}")
    assert told == {"blocks.0.q": 3, "blocks.0.v": 2, "blocks.1.q": 1, "blocks.1.up": 0}
    starts = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}
    assert (tmp_path / f"ranks{suffix}").read_bytes().startswith(starts[suffix])


def test_what_cannot_be_drawn_is_refused_before_a_file_is_there(tmp_path: Path) -> None:
    model = fallow.attach(network(), "lora", rank=2)
    with pytest.raises(ConfigError, match=r"must end in .png, .svg, .pdf"):
        fallow.rank_figure(model, tmp_path / "ranks.gif")
    with pytest.raises(ConfigError, match="has no adapter 'other'"):
        fallow.rank_figure(model, tmp_path / "ranks.png", "other")
    with pytest.raises(ConfigError, match="'bone' has no ranks"):
        fallow.rank_figure(fallow.attach(network(), "bone", ["q"], rank=2), tmp_path / "ranks.png")
    assert list(tmp_path.iterdir()) == []
