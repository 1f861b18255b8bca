"""The examples of the page on starts, and of the cards of starts, run and start what they say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fallow
from fallow.catalogue import card
from fallow.core.delta import Delta

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/concepts/starts.md").read_text(encoding="utf-8")
CARDS = ("lora-ga", "lora-sb")


def started(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, Delta)]


def test_every_example_of_the_page_runs_and_starts_its_network():
    examples = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(examples) >= 3
    given: dict[str, Any] = {}
    for text in examples:
        exec(text, given)
        assert started(given["network"])


def test_every_start_stands_in_the_pages_table():
    rows = re.findall(r"^\| `([^`]+)`", PAGE, flags=re.MULTILINE)
    for name in ("gaussian", "orthogonal", "pissa", "milora", "olora"):
        assert any(f'"{name}"' in row for row in rows)
    for name in ("LoRAGA", "LoRASB", "FILA"):
        assert any(f"fallow.{name}(" in row for row in rows)


@pytest.mark.parametrize("slug", CARDS)
def test_the_example_of_a_card_starts_a_model_that_trains(slug):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 16))
    batches = [(torch.randn(6, 16), torch.randint(10, (6,))) for _ in range(10)]

    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    before = float(loss(model, batches[9]).detach())
    exec(card(slug).use, {"model": model, "batches": batches, "loss": loss})
    assert len(started(model)) == 3
    first = float(loss(model, batches[9]).detach())
    assert first == pytest.approx(before, rel=1e-5 if slug == "lora-ga" else 1e-2)
    optimizer = torch.optim.SGD([param for param in model.parameters() if param.requires_grad], 0.02)
    for _ in range(10):
        optimizer.zero_grad()
        loss(model, batches[9]).backward()
        optimizer.step()
    assert float(loss(model, batches[9]).detach()) < first - 0.01


@pytest.mark.parametrize("slug", CARDS)
def test_a_card_names_the_public_class(slug):
    assert card(slug).load() is getattr(fallow, card(slug).name)
    assert card(slug).ready
