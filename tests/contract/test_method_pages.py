"""Each method's page of the documentation is whole, and what it tells users to write runs and does what it says."""

from __future__ import annotations

import json
import re
import shlex
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from peft import PeftModel
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))

from measured_cost import measured  # noqa: E402
from method_pages import (  # noqa: E402
    EXAMPLES,
    PRETRAINING,
    command,
    in_peft,
    is_delta,
    method_page,
    over_a_model,
    without_peft,
)

import fallow  # noqa: E402
from fallow.catalogue.option import options_of  # noqa: E402
from fallow.cli import GENERATED, app  # noqa: E402
from fallow.deltas.sltrain import SLTrainLinear  # noqa: E402
from fallow.recipes.methods import METHODS, check_options  # noqa: E402

READY = [card for card in fallow.methods() if card.ready]
DELTAS = [card for card in READY if is_delta(card)]
WIDTH, TOKENS = 128, 17  # a class token and a grid of 4 x 4


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.scaled_dot_product_attention(self.q_proj(x), self.k_proj(x), self.v_proj(x))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"attn": Attention()}) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block["attn"](x)
        return x


def network() -> nn.Module:
    torch.manual_seed(0)
    return Network()


@pytest.fixture
def names(tmp_path, monkeypatch) -> dict[str, Any]:
    """What the examples take for granted, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    batches = [torch.randn(2, TOKENS, WIDTH) for _ in range(4)]
    return {
        "model": network(),
        "other": network(),
        "batches": batches,
        "loss": lambda model, batch: (model(batch) - batch.flip(-1)).square().mean(),
        "scores": lambda batch: torch.linspace(0.1, 0.9, len(batch)),
    }


def told(card: Any, model: nn.Module) -> Any:
    adapted = any(isinstance(module, fallow.Delta) for module in model.modules())
    return fallow.condition(model, quality=0.9) if card.slug == "petalface" and adapted else nullcontext()


@torch.no_grad()
def says(card: Any, model: nn.Module, x: Tensor) -> Tensor:
    with told(card, model):
        return model.eval()(x)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("card", DELTAS, ids=lambda card: card.slug)
def test_the_example_in_peft_trains_saves_and_merges(card, names, monkeypatch):
    base, x = says(card, network(), names["batches"][0]), names["batches"][0]
    seen: dict[str, Tensor] = {}
    saved = PeftModel.save_pretrained

    def save(self: PeftModel, folder: str) -> None:
        saved(self, folder)
        seen["trained"] = says(card, self, x)

    monkeypatch.setattr(PeftModel, "save_pretrained", save)
    exec("\n".join(in_peft(card)), names)
    assert not torch.allclose(seen["trained"], base, atol=1e-6)
    again = PeftModel.from_pretrained(network(), "adapter")
    torch.testing.assert_close(says(card, again, x), seen["trained"], atol=1e-5, rtol=1e-5)
    if "merged" in names:
        torch.testing.assert_close(names["merged"](x), seen["trained"], atol=1e-4, rtol=1e-4)
    if EXAMPLES[card.slug].merges and not EXAMPLES[card.slug].lora:
        plain = PeftModel.from_pretrained(network(), "plain-lora")
        torch.testing.assert_close(says(card, plain, x), seen["trained"], atol=1e-4, rtol=1e-4)
    assert Path("plain-lora").exists() == EXAMPLES[card.slug].merges


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("card", DELTAS, ids=lambda card: card.slug)
def test_the_example_without_peft_saves_and_loads(card, names):
    lines, x = without_peft(card), names["batches"][0]
    at = lines.index("...")
    exec("\n".join(lines[:at]), names)
    for delta in names["model"].modules():
        if isinstance(delta, fallow.Delta):
            delta.randomize()  # in the place of the loop, which is that of the other example
    trained = says(card, names["model"], x)
    assert not torch.allclose(trained, says(card, network(), x), atol=1e-6)
    exec("\n".join(lines[at:]), names)
    torch.testing.assert_close(says(card, names["other"], x), trained, atol=1e-3, rtol=1e-3)


OVER_A_MODEL = [card for card in READY if card.idea in ("selection", "update rule") and card.home and not card.use]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("card", OVER_A_MODEL, ids=lambda card: card.slug)
def test_the_example_of_an_optimizer_over_a_model_trains_it(card, names):
    exec("\n".join(over_a_model(card)), names)
    fresh = dict(network().named_parameters())
    moved = [name for name, param in names["model"].named_parameters() if not torch.equal(param, fresh[name])]
    assert moved
    assert Path("adapter.safetensors").exists() == (card.idea == "selection")


def test_sltrain_pretrains_and_leaves_plain_layers(names):
    exec("\n".join(PRETRAINING[:5]), names)
    assert sum(isinstance(layer, SLTrainLinear) for layer in names["model"].modules()) == 6
    exec("\n".join(PRETRAINING[5:-2]), names)
    trained = names["model"](names["batches"][0]).detach()
    exec("\n".join(PRETRAINING[-2:]), names)
    assert not any(isinstance(layer, SLTrainLinear) for layer in names["model"].modules())
    torch.testing.assert_close(names["model"](names["batches"][0]), trained, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("card", READY, ids=lambda card: card.slug)
def test_the_command_is_one_that_trains_with_it(card):
    line = command(card)
    if card.apart or card.idea not in ("delta", "selection", "full"):
        assert card.slug not in METHODS
        assert line == ""
        return
    words = shlex.split(line)
    assert words[:4] == ["fallow", "train", "--method", card.slug]
    known = {spelled for parameter in GENERATED["train"]().params for spelled in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known
    given = dict(word.split("=") for word in words if "=" in word)
    check_options(card.slug, {name: json.loads(v) if v[0].isdigit() else v for name, v in given.items()})
    assert "train" in typer.main.get_command(app).commands


@pytest.mark.parametrize("card", DELTAS, ids=lambda card: card.slug)
def test_a_page_has_all_its_parts(card):
    page = method_page(card)
    parts = re.findall(r"^## (.*)$", page, flags=re.MULTILINE)
    wanted = ["Equation", "When to use it", "Use", "Options", "Cost", "Claimed and found", "The method", "Reference"]
    assert parts == wanted
    for field in ("equation", "when", "cost", "found"):
        assert getattr(card, field).strip() in page, field
        assert len(getattr(card, field)) > 60, field
    assert f"**The claim:** {card.claim}." in page


@pytest.mark.parametrize("card", DELTAS, ids=lambda card: card.slug)
def test_every_option_is_explained(card):
    options = options_of(card)
    assert options
    assert [option.name for option in options if not option.meaning] == []
    assert EXAMPLES.keys() == {card.slug for card in DELTAS}


def test_the_readme_changes_one_line(names):
    (_, example, *_) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    exec(example, names)
    assert Path("adapter/adapter_model.safetensors").is_file()
    assert Path("plain-lora/adapter_model.safetensors").is_file()


def test_measured_costs_are_shown_where_there_are_some(tmp_path):
    assert measured("bone", tmp_path) == []
    against = [{"name": "PEFT MiSS", "trained": 640, "time_ratio": 0.914, "peak_ratio": 1.0061}]
    case = {"method": "bone", "options": {"rank": 5}, "layers": 24, "convolutions": False, "trained": 1234}
    refused = {"method": "bone", "variant": "bat", "convolutions": False, "refused": "rank=5 must divide"}
    run = {"model": "transformer", "hardware": "a processor", "threads": 1}
    told = {**run, "cases": [{**case, "against": against}, refused]}
    (tmp_path / "deltas-transformer-somewhere.json").write_text(json.dumps(told), encoding="utf-8")
    (tmp_path / "deltas-setup.json").write_text('{"model": "another"}', encoding="utf-8")
    lines = measured("bone", tmp_path)
    assert lines[-1] == "| ViT, float32 | `rank=5` | 24 linear | 1,234 | PEFT MiSS | 640 | 0.91 | 1.01 |"
    assert "a processor" in "".join(lines)
    assert measured("loca", tmp_path) == []
