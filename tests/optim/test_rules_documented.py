"""The examples of the page on LISA and the rules for LoRA, and of their cards, run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fallow
from fallow.catalogue import card

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/concepts/optimizers.md").read_text(encoding="utf-8")
EXAMPLES = [text for text in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL) if "Trainer(" not in text]
CARDS = ("lisa", "lora-pro", "allora", "lora-ggpo")


class Blocks(nn.Module):
    """`q_proj` and layers named "0" and "2", in a list of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, 8), nn.Linear(8, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def names() -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "torch": torch,
        "fallow": fallow,
        "model": Blocks(),
        "batches": [(torch.randn(6, 8), torch.randint(3, (6,))) for _ in range(4)],
        "loss": lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
    }


@pytest.mark.parametrize("text", [*EXAMPLES, *(card(slug).use for slug in CARDS)])
def test_an_example_runs_and_its_optimizer_trains(text):
    given = names()
    before = {name: value.clone() for name, value in given["model"].state_dict().items()}
    exec(text, given)
    model, optimizer = given["model"], given["optimizer"]
    for batch in given["batches"]:
        given["loss"](model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = model.state_dict()
    assert any(name not in before or not torch.equal(value, before[name]) for name, value in after.items())


def test_there_are_examples_of_all():
    assert len(EXAMPLES) == 4
    assert all(card(slug).load() is getattr(fallow, card(slug).name) for slug in CARDS)
