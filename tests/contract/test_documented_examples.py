"""What the documentation shows is true: its Python runs, and its commands exist with the options it gives them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from torch import nn

import fallow
from fallow.cli import GENERATED, app

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md"]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def commands() -> Iterator[tuple[str, str]]:
    """(page, command) of every line in a bash block that calls fallow."""
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith("fallow "):
                    yield page.name, line


@pytest.mark.parametrize(("page", "line"), commands())
def test_a_command_exists_with_its_options(page, line):
    words = shlex.split(line, comments=True)[1:]
    command = typer.main.get_command(app)
    while hasattr(command, "commands"):
        assert words[0] in command.commands, line
        name, words = words[0], words[1:]
        command = GENERATED[name]() if name in GENERATED else command.commands[name]
    known = {spelled for parameter in command.params for spelled in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in words if word.startswith("-")} <= known | {"--help"}, line


@pytest.fixture
def names(mlp, tmp_path, monkeypatch):
    """What the examples take for granted: a model, batches, a loss, two adapters in the present folder."""
    monkeypatch.chdir(tmp_path)
    batches = [(torch.randn(4, 80), torch.randint(0, 10, (4,))) for _ in range(3)]

    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    for name, seed in (("blueprint", 0), ("bronze", 1)):
        model = mlp()
        trained = fallow.Random(model, fraction=0.1, seed=seed, lr=1e-2)
        loss(model, batches[0]).backward()
        trained.step()
        trained.save(f"{name}.safetensors")
    return {"model": mlp(), "batches": batches, "loss": loss, "make": mlp}


@pytest.mark.parametrize("page", ["docs/index.md", "docs/python.md", "README.md"])
def test_the_training_loop_trains_and_saves(page, names):
    (example, *_) = blocks(ROOT / page, "python")
    before = [param.detach().clone() for param in names["model"].parameters()]
    exec(example, names)
    moved = sum(int((a != b).sum()) for a, b in zip(before, names["model"].parameters(), strict=True))
    assert 0 < moved <= round(0.05 * sum(param.numel() for param in before))


def test_the_page_on_adapters_shows_them_in_a_model(names):
    names["optimizer"] = fallow.SaRA(names["model"], fraction=0.05)
    saving, using, *_ = blocks(ROOT / "docs/concepts/adapters.md", "python")
    exec(saving, names)
    assert Path("style/adapter_config.json").is_file()
    fresh = names["make"]()
    names |= {"pipeline": SimpleNamespace(unet=fresh), "fallow": fallow}
    exec(using, names)
    assert names["adapters"].scales == {}
    merged = names["make"]()
    fallow.Adapters(merged).add("bronze", "bronze.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), merged.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(fresh.parameters(), names["make"]().parameters(), strict=True))


def test_the_page_on_selection_shows_a_selector_that_takes_the_rows_of_least_norm(names, tiny_unet):
    choosing, selecting = blocks(ROOT / "docs/concepts/selection.md", "python")
    names |= {"unet": tiny_unet(), "fallow": fallow}
    exec(choosing, names)
    names["model"] = tiny_unet()
    exec(selecting, names)
    optimizer = names["optimizer"]
    assert all("attn" in name for name in optimizer.slots)
    assert optimizer.trained_parameters == round(0.05 * optimizer.total_parameters)


def test_the_page_on_small_gpus_quantises_swaps_and_trains_within_the_backward_pass(names):
    (example,) = blocks(ROOT / "docs/concepts/small-gpus.md", "python")
    exec(example, names)
    model, optimizer = names["model"], names["optimizer"]
    before = optimizer.masters()
    names["loss"](model, names["batches"][0]).backward()
    optimizer.step()
    moved = [not torch.equal(value, before[name]) for name, value in optimizer.masters().items()]
    assert any(moved)
    assert names["swap"].resident == [0, 1]
