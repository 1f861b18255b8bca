"""Ranks of no effect are cut without a change: of all methods that have such, on both hosts, in files, in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fallow
from fallow.budgets.increlora import IncreLoRA
from fallow.core.errors import ConfigError
from fallow.core.trimming import adapters

OPTIONS = {"adalora": {}, "codyra": {}, "kasa": {}, "lora": {"alpha": 6.0, "scaling": "rslora"}, "sora": {}}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.conv, self.last = nn.Linear(6, 12), nn.Conv1d(12, 8, 3), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x)).transpose(1, 2)
        return self.last(torch.tanh(self.conv(y)).transpose(1, 2))


def data() -> Tensor:
    return torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(2))


def adapted(method: str, host: str, **options: Any) -> nn.Module:
    given = {"rank": 4, **OPTIONS.get(method, {}), **options}
    if host == "own":
        model: Any = fallow.attach(Net(), method, "all-layers", **given)
    else:
        peft = pytest.importorskip("peft")
        made = fallow.config_of(fallow.core.delta.REGISTRY[method])(target_modules="all-layers", **given)
        model = peft.get_peft_model(Net(), made)
    for _, delta in adapters(model):
        delta.randomize()
    return model


@torch.no_grad()
def hush(delta: Any, ranks: list[int]) -> None:
    """Let these ranks do nothing."""
    if hasattr(delta, "gate"):
        delta.gate[ranks] = 0.0
    else:
        delta.B[:, ranks] = 0.0


@pytest.mark.parametrize("host", ["own", "peft"])
@pytest.mark.parametrize("method", OPTIONS)
def test_ranks_of_no_effect_are_cut_and_the_output_stays(method: str, host: str, tmp_path: Path) -> None:
    model, x = adapted(method, host), data()
    deltas = dict(adapters(model))
    hush(deltas["first"], [1, 3])
    hush(deltas["last"], [0, 1, 2, 3])
    said = model(x).detach()
    assert fallow.trim(model) == {"first": 2, "conv": 4, "last": 1}
    torch.testing.assert_close(model(x), said, rtol=0, atol=1e-6)
    assert {name: delta.o.rank for name, delta in adapters(model)} == {"first": 2, "conv": 4, "last": 1}
    counts = {name: sum(p.numel() for p in delta.parameters()) for name, delta in adapters(model)}
    assert counts["first"] == deltas["first"].parameter_count((12, 6), deltas["first"].o)
    assert fallow.trim(model) == {"first": 2, "conv": 4, "last": 1}
    if host == "own":
        again = fallow.load(Net(), fallow.save(model, tmp_path / "file"))
    else:
        from peft import PeftModel

        model.save_pretrained(tmp_path / "file")
        again = PeftModel.from_pretrained(Net(), tmp_path / "file")
    torch.testing.assert_close(again(x), said, rtol=0, atol=1e-6)
    assert {name: delta.o.rank for name, delta in adapters(again)} == {"first": 2, "conv": 4, "last": 1}


@pytest.mark.parametrize("host", ["own", "peft"])
def test_dylora_is_cut_at_the_rank_that_was_chosen(host: str) -> None:
    model, x = adapted("dylora", host).eval(), data()
    with fallow.condition(model, rank=2):
        said = model(x).detach()
        assert set(fallow.trim(model).values()) == {2}
    torch.testing.assert_close(model(x), said)
    assert set(fallow.trim(model).values()) == {2}


@pytest.mark.parametrize("method", ["sora", "adalora", "lora"])
def test_training_goes_on_after_a_cut_as_if_what_is_gone_had_never_been_there(method: str) -> None:
    """The moments of what stays are kept: the steps are those of the whole adapter whose silent ranks are held so."""
    options = {"threshold": 0.0} if method == "sora" else {"orthogonal": 0.0} if method == "adalora" else {}
    ends = []
    for cut in (False, True):
        torch.manual_seed(5)
        model, x = adapted(method, "own", **options), data()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        delta = dict(adapters(model))["first"]
        for step in range(8):
            if step == 4 and cut:
                assert fallow.trim(model)["first"] == 2
            optimizer.zero_grad()
            (model(x) - 1).square().mean().backward()
            optimizer.step()
            if delta.o.rank == 4 and step >= 3:
                hush(delta, [0, 2])
        ends.append(model(x).detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-5)


def test_blocks_of_a_fused_weight_are_cut_each_by_itself(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 12))
    base = nn.Sequential(nn.Linear(6, 12))
    base.load_state_dict(model.state_dict())
    fallow.attach(model, "sora", rank=3, fused={"0": 2})
    deltas = dict(adapters(model))
    for delta in deltas.values():
        delta.randomize()
    hush(deltas["0.1"], [0, 1])
    x = torch.randn(4, 6)
    said = model(x).detach()
    assert fallow.trim(model) == {"0.0": 3, "0.1": 1}
    torch.testing.assert_close(model(x), said, rtol=0, atol=1e-6)
    fallow.load(base, fallow.save(model, tmp_path / "file"))
    torch.testing.assert_close(base(x), said, rtol=0, atol=1e-6)


def test_what_a_start_took_out_is_not_cut() -> None:
    model = fallow.attach(Net(), "lora", "all-layers", rank=4, start="pissa")
    assert set(fallow.trim(model).values()) == {4}


def test_what_cannot_be_cut_is_refused_by_name() -> None:
    model = Net()
    with pytest.raises(ConfigError, match=r"has no adapter 'default'; fallow.attach"):
        fallow.trim(model)
    fallow.attach(model, "lora", rank=2)
    with pytest.raises(ConfigError, match=r"has no adapter 'defualt' .did you mean 'default'"):
        fallow.trim(model, "defualt")
    with pytest.raises(ConfigError, match="'bone' has no ranks"):
        fallow.trim(fallow.attach(Net(), "bone", ["last"], rank=2))
    growing = fallow.attach(Net(), "adalora", rank=2, budget=IncreLoRA(begin=1, every=1))
    with pytest.raises(ConfigError, match="still changing ranks"):
        fallow.trim(growing)
    fallow.attach(growing, "sora", rank=2, name="other")  # another adapter is not held up
    assert set(fallow.trim(growing, "other").values()) == {2}
