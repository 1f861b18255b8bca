"""Starts and budgets in both hosts: what is taken out of a weight stays beside it, ranks are shared out at first."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import fallow
from fallow.core.budgeting import BUDGETS, Budget, at_rank
from fallow.core.delta import Delta, Site
from fallow.core.errors import ConfigError, DataError
from fallow.core.starting import STARTS, Pair, Start
from fallow.deltas.lora import LoRA

METHODS = {
    "lora": {"rank": 4, "alpha": 6.0},
    "dora": {"rank": 4},
    "sora": {"rank": 4, "threshold": 0.0},
    "codyra": {"rank": 4, "max_kappa": 0.0},
    "dylora": {"rank": 4, "alpha": 4.0},
    "kasa": {"rank": 4, "trunc_rank": 0},
    "pego": {"rank": 2, "group": 2},
}
CONFIGS = {
    "lora": "LoRA",
    "dora": "DoRA",
    "sora": "SoRA",
    "codyra": "CoDyRA",
    "dylora": "DyLoRA",
    "kasa": "KaSA",
    "pego": "PEGO",
}


class Leading(Start):
    """The leading triples, both factors of the size of W."""

    def pair(self, site: Site, rank: int, scale: float) -> Pair:
        u, s, vt = torch.linalg.svd(site.weight(), full_matrices=False)
        root = (s[:rank] / scale).sqrt()
        return Pair(u[:, :rank] * root, root[:, None] * vt[:rank])


class Broken(Start):
    name = ""

    def __init__(self, **changed: Tensor | None) -> None:
        self.changed = changed

    def pair(self, site: Site, rank: int, scale: float) -> Pair:
        made = {"b": torch.zeros(site.shape[0], rank), "a": torch.zeros(rank, site.shape[1]), **self.changed}
        return Pair(**made)


@dataclasses.dataclass
class Rising(Budget):
    """0, 1, 2 ... of a rank."""

    first: int = 0

    def ranks(self, shapes: Any, rank: int) -> dict[str, int]:
        return {name: self.first + number for number, name in enumerate(shapes)}


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 10), nn.Linear(10, 8))


def hosted(host: str, method: str, model: nn.Module, **options: Any) -> nn.Module:
    if host == "own":
        return fallow.attach(model, method, **options)
    config = getattr(fallow, f"{CONFIGS[method]}Config")
    return get_peft_model(model, config(target_modules=["0", "2", "3"], **options))


def trained(model: nn.Module, steps: int = 3) -> nn.Module:
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], 1e-2)
    for _ in range(steps):
        model(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


X = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("host", ["own", "peft"])
@pytest.mark.parametrize("method", METHODS)
def test_a_start_changes_nothing_and_its_file_loads_on_the_base(method: str, host: str, tmp_path: Path) -> None:
    base = net()
    expected = base(X)
    before = [param.detach().clone() for param in base.parameters()]
    model = hosted(host, method, base, start=Leading(), **METHODS[method])
    torch.testing.assert_close(model.eval()(X), expected, rtol=0, atol=1e-6)
    found = [delta for delta in model.modules() if isinstance(delta, Delta)]
    assert all(
        delta.o.offset == 4 and delta.B.norm() > 0.5 if method != "dylora" else delta.o.offset for delta in found
    )
    trained(model.train())
    assert (model(X) - expected).abs().max() > 1e-3
    held = dict(model.named_parameters())
    for param, value in zip(net().parameters(), before, strict=True):
        assert any(torch.equal(value, own) for own in held.values())  # W itself is never written
        assert torch.equal(param, value)
    if host == "own":
        fallow.save(model, tmp_path / "a")
        again = fallow.load(net(), tmp_path / "a").eval()
    else:
        model.save_pretrained(tmp_path / "a")
        again = PeftModel.from_pretrained(net(), tmp_path / "a").eval()
    assert torch.equal(again(X), model(X))


def test_the_factors_are_the_lora_of_twice_the_rank_on_the_original_base() -> None:
    model = trained(fallow.attach(net(), "lora", rank=4, alpha=6.0, start=Leading()))
    base = net()
    for name, delta in ((name, m) for name, m in model.named_modules() if isinstance(m, LoRA)):
        b, a = delta.factors()
        assert a.shape[0] == 8
        w = base.get_submodule(name.partition(".")[0]).weight
        u, s, vt = torch.linalg.svd(w.detach(), full_matrices=False)
        leading = (u[:, :4] * s[:4]) @ vt[:4]
        torch.testing.assert_close(b @ a, delta.scaling * delta.B @ delta.A - leading, rtol=0, atol=1e-5)


def test_what_a_rank_has_learned_is_its_importance_and_a_rank_that_learned_nothing_goes_without_a_change() -> None:
    model = fallow.attach(nn.Sequential(nn.Linear(12, 16)), "lora", rank=4, alpha=6.0, start=Leading())
    delta: Any = model[0].adapters["default"]
    with torch.no_grad():
        delta.B[:, 1] += 0.1
        delta.A[3] *= 1.5
    change = delta.delta_weight()
    expected = [
        delta.scaling
        * (delta.B[:, k : k + 1] @ delta.A[k : k + 1] - delta.start_B[:, k : k + 1] @ delta.start_A[k : k + 1])
        for k in range(4)
    ]
    torch.testing.assert_close(
        delta.importance(), torch.stack([part.norm() for part in expected]), rtol=1e-3, atol=1e-5
    )
    delta.resize(2)
    torch.testing.assert_close(delta.delta_weight(), change, rtol=0, atol=1e-5)
    delta.resize(5)
    torch.testing.assert_close(delta.delta_weight(), change, rtol=0, atol=1e-5)
    assert (delta.o.offset, delta.o.rank) == (5, 5)


def test_each_block_of_a_fused_weight_starts_from_its_own_rows() -> None:
    model = nn.Sequential(nn.Linear(12, 24))
    w, expected = model[0].weight.detach().clone(), model(X)
    fallow.attach(model, "lora", rank=2, start=Leading(), fused={"0": 3})
    torch.testing.assert_close(model(X), expected, rtol=0, atol=1e-6)
    parts: Any = model[0].adapters["default"].deltas
    for part, rows in zip(parts, w.split(8), strict=True):
        u, s, vt = torch.linalg.svd(rows, full_matrices=False)
        torch.testing.assert_close(part.B @ part.A, (u[:, :2] * s[:2]) @ vt[:2], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("start", "error", "told"),
    [
        ("pisa", ConfigError, "did you mean 'pissa'"),
        ("lora-ga", ConfigError, "needs data"),
        ({"name": "pissa", "steps": 3}, ConfigError, "options that 'pissa' does not know"),
        (Broken(a=torch.zeros(3, 3)), ConfigError, r"gave a \(3, 3\) for '0', not \(4, 12\)"),
        (Broken(a=torch.full((4, 12), torch.nan)), DataError, "NaN or infinite values for '0'"),
        (Broken(core=torch.eye(4)), ConfigError, "no core"),
    ],
)
def test_impossible_starts_are_refused_by_name_and_leave_the_model_as_it_was(start: Any, error: Any, told: str) -> None:
    model = net()
    with pytest.raises(error, match=told):
        fallow.attach(model, "lora", rank=4, start=start)
    assert not any(isinstance(module, Delta) for module in model.modules())
    assert all(param.requires_grad for param in model.parameters())


def test_a_method_without_a_factor_pair_says_so() -> None:
    with pytest.raises(ConfigError, match="'vera' has no factor pair"):
        fallow.attach(net(), "vera", rank=4, start=Leading())


@pytest.mark.parametrize("host", ["own", "peft"])
def test_a_budget_shares_out_ranks_at_one_scale_and_leaves_layers_out(host: str, tmp_path: Path) -> None:
    model = hosted(host, "lora", net(), rank=4, alpha=8.0, budget=Rising(), start=Leading())
    found = {delta.site_name: delta for delta in model.modules() if isinstance(delta, LoRA)}
    assert {name: delta.A.shape[0] for name, delta in found.items()} == {"2": 1, "3": 2}
    assert {delta.scaling for delta in found.values()} == {2.0}
    assert sum("base_layer" in name for name, _ in model.named_modules()) == (2 if host == "peft" else 0)
    trained(model)
    if host == "own":
        again = fallow.load(net(), fallow.save(model, tmp_path / "a")).eval()
    else:
        model.save_pretrained(tmp_path / "a")
        again = PeftModel.from_pretrained(net(), tmp_path / "a").eval()
        assert isinstance(again.base_model.model[0], nn.Linear)
    assert torch.equal(again(X), model(X))


def test_budgets_that_fit_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="gives no layer any rank"):
        fallow.attach(net(), "lora", targets=["0"], budget=Rising())
    with pytest.raises(ConfigError, match="patterns both give layers ranks"):
        fallow.attach(net(), "lora", budget=Rising(1), patterns={"2": {"rank": 3}})
    with pytest.raises(ConfigError, match="shares out ranks, which this method does not have"):
        fallow.attach(net(), "loca", budget=Rising(1))
    with pytest.raises(ConfigError, match="rank=40 is above"):
        fallow.attach(net(), "lora", budget=Rising(40))


def test_alpha_follows_the_rank_so_that_the_scale_stays() -> None:
    for options in (
        LoRA.Options(rank=4, alpha=8.0),
        LoRA.Options(rank=4, alpha=8.0, scaling="rslora"),
        LoRA.Options(rank=4),
        LoRA.Options(rank=4, scaling="rslora"),
    ):
        changed: Any = at_rank(options, 9)
        alpha, before = changed.alpha or 9.0, options.alpha or 4.0
        power = 0.5 if options.scaling == "rslora" else 1.0
        assert alpha / 9**power == pytest.approx(before / 4**power)


def test_every_start_and_budget_has_a_name_of_its_own() -> None:
    assert {"pissa", "milora", "olora", "gaussian", "orthogonal", "lora-ga", "lora-sb", "corda", "eva", "fila"} <= set(
        STARTS
    )
    assert {"uniform", "eva", "lamda", "colora"} <= set(BUDGETS)


def test_dylora_weighs_what_a_cut_loses_of_what_was_learned_since_its_start() -> None:
    model = fallow.attach(nn.Sequential(nn.Linear(12, 16)), "dylora", rank=4, alpha=4.0, start=Leading())
    delta: Any = model[0].adapters["default"]
    assert delta.importance().max() < 1e-6
    with torch.no_grad():
        delta.B2 += 0.1
    lost = (0.1 * torch.ones(16, 1) @ delta.A2).norm().detach()
    torch.testing.assert_close(delta.importance(), torch.stack([lost, lost, lost, 0 * lost]), rtol=1e-4, atol=1e-6)
    delta.resize(6)
    assert delta.o.offset == 6
    torch.testing.assert_close(delta.importance()[3:], torch.zeros(3), rtol=0, atol=1e-6)
