"""Every start on every method that takes one, in both hosts: unchanged at first, in files, as a plain LoRA, resized."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from begun import probed, small, train
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import fallow
from fallow.core.delta import Delta
from fallow.core.errors import ConfigError
from fallow.core.starting import STARTS
from fallow.core.statistics import Statistics
from fallow.deltas._peft import CONFIGS
from fallow.recipes.convert import convert
from fallow.starts.orthogonal import Orthogonal

LAYERS = ["conv", "up", "head"]
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4, "alpha": 8.0},
    "dora": {"rank": 4, "alpha": 2.0},
    "sora": {"rank": 4, "threshold": 0.0},
    "codyra": {"rank": 4, "max_kappa": 0.0},
    "dylora": {"rank": 4, "alpha": 8.0, "update": "full"},
    "kasa": {"rank": 4, "trunc_rank": 2},
    "pego": {"rank": 2, "group": 2},
}
CLASSES = {cls.delta.name: cls for cls in CONFIGS.values() if hasattr(cls, "delta")}
FROM_WEIGHTS = ("pissa", "milora", "olora", "gaussian", "orthogonal")
BEGIN: dict[str, Callable[[Statistics], Any]] = {
    **{name: lambda stats, name=name: name for name in FROM_WEIGHTS},
    "orthogonal, subtracted": lambda stats: Orthogonal(subtract=True),
    "lora-ga": lambda stats: fallow.LoRAGA(stats),
    "fila": lambda stats: fallow.FILA(stats, stats),
    "lora-sb": lambda stats: fallow.LoRASB(stats, 1e-3),
}
ON_PAIRS = [name for name in BEGIN if name != "lora-sb"]


def adapted(host: str, method: str, model: nn.Module, **options: Any) -> nn.Module:
    """A copy of the model."""
    model = copy.deepcopy(model)
    if host == "own":
        return fallow.attach(model, method, LAYERS, **options)
    return get_peft_model(model, CLASSES[method](target_modules=LAYERS, **options))


def begun(host: str, method: str, start: str, **options: Any) -> tuple[nn.Module, nn.Module, Tensor]:
    """The adapted model, its base and an input."""
    base, x = small()
    first = BEGIN[start](probed(base, x))
    options = METHODS.get(method, {"rank": 4}) | options
    return adapted(host, method, base, start=first, **options), base, x


def saved(host: str, model: nn.Module, base: nn.Module, folder: Path) -> nn.Module:
    """What a fresh base makes of the file."""
    if host == "own":
        fallow.save(model, folder)
        return fallow.load(copy.deepcopy(base), folder)
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(copy.deepcopy(base), folder)


def deltas(model: nn.Module) -> list[Delta]:
    return [module for module in model.modules() if isinstance(module, Delta)]


@pytest.mark.parametrize(
    ("host", "method", "start"),
    [
        *(("own", method, start) for method in METHODS for start in ON_PAIRS),
        *(("peft", method, "pissa") for method in METHODS),
        *(("peft", "lora", start) for start in ON_PAIRS if start != "pissa"),
    ],
)
def test_unchanged_at_first_trained_saved_and_a_plain_lora_of_the_original_base(host, method, start, tmp_path):
    if (method, start) == ("dylora", "orthogonal"):
        start = "orthogonal, subtracted"  # half of its ranks alone are not zero
    model, base, x = begun(host, method, start)
    want = base(x)
    if method == "kasa":  # which starts as its truncated model
        want = adapted(host, method, base, **METHODS["kasa"])(x)
    torch.testing.assert_close(model(x), want, atol=1e-5, rtol=1e-5)
    for name, param in base.named_parameters():
        assert any(
            torch.equal(param, own) for key, own in model.named_parameters() if key.endswith(name.split(".")[-1])
        )
    train(model, x)
    model.eval()
    trained = model(x).detach()
    assert float((trained - want.detach()).abs().max()) > 1e-3
    torch.testing.assert_close(saved(host, model, base, tmp_path / "own").eval()(x), trained, atol=1e-6, rtol=1e-6)
    bound = {"rank": 12} if method == "dora" else {}  # no product of two factors, so written to its full rank
    fallow.to_lora(model, tmp_path / "lora", **bound)
    plain = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora").eval()
    torch.testing.assert_close(plain(x), trained, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("host", ["own", "peft"])
def test_lora_xs_starts_ahead_saves_its_factors_and_is_a_plain_lora(host, tmp_path):
    model, base, x = begun(host, "lora-xs", "lora-sb")
    ahead = float((model(x) - base(x)).abs().max())
    assert 1e-4 < ahead < 0.5
    level, _, _ = begun(host, "lora-xs", "pissa")
    torch.testing.assert_close(level(x), base(x), atol=1e-6, rtol=1e-6)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 3 * 4**2
    train(model, x)
    trained = model.eval()(x).detach()
    again = saved(host, model, base, tmp_path / "own").eval()
    assert torch.equal(again(x), trained)  # to the bit: B and A are in the file
    fallow.to_lora(model, tmp_path / "lora")
    plain = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora").eval()
    torch.testing.assert_close(plain(x), trained, atol=1e-5, rtol=1e-5)
    merged = fallow.merge(model) if host == "own" else model.merge_and_unload()
    torch.testing.assert_close((model if merged is None else merged)(x), trained, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("host", ["own", "peft"])
@pytest.mark.parametrize("start", ON_PAIRS)
def test_trained_numbers_are_those_of_lora_and_merged_equals_unmerged(host, start):
    model, base, x = begun(host, "lora", start)
    shapes = [base.get_submodule(name).weight.flatten(1).shape for name in LAYERS]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(4 * sum(shape) for shape in shapes)
    train(model, x)
    trained = model.eval()(x).detach()
    merged = fallow.merge(model) if host == "own" else model.merge_and_unload()
    torch.testing.assert_close((model if merged is None else merged)(x), trained, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("host", ["own", "peft"])
@pytest.mark.parametrize("start", ON_PAIRS)
def test_adapters_in_bfloat16_start_as_the_base(host, start):
    base, x = small()
    first = BEGIN[start](probed(base, x))
    base, x = base.bfloat16(), x.bfloat16()
    want = base(x)
    if host == "own":
        model = fallow.attach(copy.deepcopy(base), "lora", LAYERS, rank=4, alpha=8.0, start=first).bfloat16()
    else:
        config = CLASSES["lora"](target_modules=LAYERS, rank=4, alpha=8.0, start=first)
        model = get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False)
    assert {delta.A.dtype for delta in deltas(model)} == {torch.bfloat16}
    assert bool(torch.isfinite(model(x)).all())
    torch.testing.assert_close(model(x), want, atol=0.03, rtol=0.03)
    for delta in deltas(model):  # B A - B0 A0 = 0 from the rounded factors
        b, a = delta.factors()
        assert float((b.double() @ a.double()).detach().abs().max()) < 1e-3


@pytest.mark.parametrize("method", ["lora", "dora", "dylora", "kasa", "sora", "codyra"])
@pytest.mark.parametrize("start", ["pissa", "milora", "olora", "orthogonal, subtracted", "lora-ga", "fila"])
@pytest.mark.parametrize("rank", [2, 6])
def test_resizing_changes_nothing_that_was_not_learned(method, start, rank):
    model, _, x = begun("own", method, start)
    if method in ("sora", "codyra"):  # whose ranks are cut where their gate is zero, which is a change
        for delta in deltas(model):
            delta.gate.data[:2] = 0.0
    before = model.eval()(x).detach()
    for delta in deltas(model):
        delta.resize(rank)
    after = model(x).detach()
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["lora", "kasa"])
def test_the_ranks_that_learned_least_are_cut_whatever_they_started_with(method):
    model, _, _ = begun("own", method, "pissa")
    delta = deltas(model)[1]
    with torch.no_grad():
        delta.A[3] += 0.01  # the rank with the least part of W
    assert int(delta.importance().argmax()) == 3
    kept = delta.A[3].detach().clone()
    delta.resize(1)
    assert torch.equal(delta.A.detach()[0], kept)


@pytest.mark.parametrize("start", FROM_WEIGHTS)
def test_names_do_for_starts_from_the_weight_and_files_keep_them(start, tmp_path):
    model, _, _ = begun("peft", "lora", start)
    model.save_pretrained(tmp_path)
    assert start in (tmp_path / "adapter_config.json").read_text()
    assert STARTS[start]().needs == ""


@pytest.mark.parametrize("start", ["lora-ga", "lora-sb", "fila"])
def test_names_of_starts_that_need_data_are_refused(start):
    base, _ = small()
    with pytest.raises(ConfigError, match=f"start='{start}' needs data"):
        adapted("own", "lora", base, rank=4, start=start)


def test_two_adapters_of_two_starts_disable_and_stack_on_one_base():
    base, x = small()
    want, stats = base(x), probed(base, x)
    model = adapted("own", "lora", base, rank=4, start="pissa")
    fallow.attach(model, "lora", LAYERS, name="second", rank=4, start=fallow.LoRAGA(stats))
    fallow.activate(model, "default", "second")
    torch.testing.assert_close(model(x), want, atol=1e-5, rtol=1e-5)
    train(model, x)
    assert float((model(x) - want).detach().abs().max()) > 1e-3
    with fallow.disabled(model):
        assert torch.equal(model(x), want)


@pytest.mark.parametrize("host", ["own", "peft"])
@pytest.mark.parametrize(("method", "scaling"), [("lora", "standard"), ("lora", "rslora"), ("dora", "standard")])
def test_pefts_own_file_of_it_has_twice_the_rank_and_the_same_scale(host, method, scaling, tmp_path):
    model, base, x = begun(host, method, "pissa", scaling=scaling)
    train(model, x)
    trained = model.eval()(x).detach()
    fallow.to_peft(model, tmp_path / "theirs")
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs").eval()
    torch.testing.assert_close(theirs(x), trained, atol=1e-5, rtol=1e-5)
    layer = theirs.base_model.model.up
    assert layer.r["default"] == 8
    assert layer.scaling["default"] == pytest.approx(deltas(model)[0].scaling)


@pytest.mark.parametrize("host", ["own", "peft"])
@pytest.mark.parametrize(("method", "scaling"), [("lora", "standard"), ("lora", "rslora"), ("dora", ""), ("sora", "")])
def test_a_saved_file_converts_without_its_model(host, method, scaling, tmp_path):
    options = {"scaling": scaling} if scaling else {}
    model, base, x = begun(host, method, "pissa", **options)
    train(model, x)
    trained = model.eval()(x).detach()
    saved(host, model, base, tmp_path / "own")
    told = convert(tmp_path / "own", "peft", tmp_path / "theirs")
    assert told["error"] == 0.0
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs").eval()
    torch.testing.assert_close(theirs(x), trained, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rule", ["LoRAPlus", "LoRAPro", "Riemannian"])
@pytest.mark.parametrize("start", ["pissa", "lora-ga"])
def test_rules_of_update_train_a_started_adapter(rule, start):
    model, base, x = begun("own", "lora", start)
    frozen = {name: t.clone() for name, t in model.state_dict().items() if "start_" in name or name.endswith(".weight")}
    target = torch.arange(len(x)) % 12
    optimizer, losses = getattr(fallow, rule)(model, lr=1e-2), []
    for _ in range(8):
        loss = torch.nn.functional.cross_entropy(model(x), target)
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0] == pytest.approx(float(torch.nn.functional.cross_entropy(base(x), target)), rel=1e-5)
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in frozen.items())


@pytest.mark.parametrize(("rule", "scale"), [("ALLoRA", 4.0), ("GGPO", 8.0)])
def test_rules_that_look_at_the_rows_of_the_product_refuse_what_is_subtracted(rule, scale):
    model, _, _ = begun("own", "lora", "pissa", alpha=scale)
    with pytest.raises(ConfigError, match=f"{rule} looks at the rows of B A, and '(conv|up|head)' changes by"):
        getattr(fallow, rule)(model)
    plain, _, _ = begun("own", "lora", "gaussian", alpha=scale)
    assert len(getattr(fallow, rule)(plain).pairs) == 3
