"""What the pages on starts and budgets, and the methods' own, tell users to write runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import fallow

ROOT = Path(__file__).parents[2]
CARDS = {card.slug: card for card in fallow.methods()}


@pytest.mark.parametrize("page", ["starts", "budgets"])
def test_the_python_of_the_page_runs_from_top_to_bottom(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / f"docs/concepts/{page}.md").read_text(encoding="utf-8")
    names = {}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(block, names)
    assert any(isinstance(module, fallow.Delta) for module in names["network"].modules())


@pytest.mark.parametrize("slug", ["corda", "eva", "colora"])
def test_the_example_of_the_methods_page_trains_and_saves(slug, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 20))

    names = {
        "torch": torch,
        "model": network(),
        "tuned": network().state_dict(),
        "batches": [torch.randn(60, 20) for _ in range(3)],
        "loss": lambda model, x: (model(x) - x.flip(-1)).square().mean(),
    }
    names["tuned"]["2.weight"] += 0.1
    exec(CARDS[slug].use, names)
    x = names["batches"][0]
    said = names["model"](x).detach()
    assert (said - network()(x)).abs().max() > 1e-5
    again = fallow.load(network(), "adapter")
    torch.testing.assert_close(again(x), said, atol=1e-6, rtol=1e-5)
