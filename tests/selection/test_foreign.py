"""Checkpoints of other code: the official SaRA optimizer's, and PEFT's SHiRA."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel, ShiraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

import fallow
from fallow.core.sparse import Entry


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.LayerNorm(30), nn.Linear(30, 10))


def official(path, model: nn.Module, trained: nn.Module, threshold: float) -> None:
    """As the official optimizer's save_params(): by position, the trained values where the base is small."""
    held: dict = {"threshold": threshold}
    for position, (base, param) in enumerate(zip(model.parameters(), trained.parameters(), strict=True)):
        held[position] = param.detach()[base.detach().abs() < threshold]
    torch.save(held, path)


def test_an_official_checkpoint_gives_the_trained_weights_on_the_same_base(tmp_path):
    base, trained = net(), net()
    optimizer = fallow.SaRA(trained, threshold=0.05, lr=1e-2)
    for _ in range(3):
        trained(torch.randn(8, 20)).square().sum().backward()
        optimizer.step()
    official(tmp_path / "params.pt", base, trained, 0.05)
    delta = fallow.SaRA.from_official(tmp_path / "params.pt", base)
    assert delta.trained == optimizer.trained_parameters
    adapters = fallow.Adapters(base)
    adapters.add("official", delta)
    for ours, theirs in zip(base.parameters(), trained.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)


def test_an_official_checkpoint_of_another_base_or_network_and_a_foreign_file_are_refused(tmp_path):
    path = tmp_path / "params.pt"
    official(path, net(), net(), 0.05)
    with pytest.raises(fallow.AdapterError, match=r"entries of '0.weight', where this model has \d+ below 0.05"):
        fallow.SaRA.from_official(path, net(1))
    with pytest.raises(fallow.AdapterError, match="holds 6 parameters, Linear has 2"):
        fallow.SaRA.from_official(path, nn.Linear(20, 30))
    path.write_bytes(b"nonsense")
    with pytest.raises(fallow.AdapterError, match="no checkpoint of the official SaRA code"):
        fallow.SaRA.from_official(path, net())
    torch.save({"a": 1}, path)
    with pytest.raises(fallow.AdapterError, match="no checkpoint of the official SaRA code"):
        fallow.SaRA.from_official(path, net())


def test_8_an_adapter_of_pefts_shira_gives_the_same_output_as_in_peft(tmp_path):
    hosted = get_peft_model(net(), ShiraConfig(r=2, target_modules=["0", "3"], random_seed=1, init_weights=False))
    hosted.save_pretrained(tmp_path)
    x = torch.randn(7, 20)
    theirs = PeftModel.from_pretrained(net(), tmp_path)(x)
    model = net()
    plain = model(x)
    adapters = fallow.Adapters(model)
    adapters.add("peft", fallow.SHiRA.from_peft(tmp_path, model))
    torch.testing.assert_close(model(x), theirs, rtol=0, atol=1e-6)
    assert float((model(x) - plain).detach().abs().max()) > 0.01
    adapters.unload()
    with pytest.raises(fallow.AdapterError, match=r"Linear has no '0.weight'"):
        fallow.SHiRA.from_peft(tmp_path, nn.Linear(20, 30))


def test_an_adapter_of_pefts_shira_is_the_same_when_written_back(tmp_path):
    hosted = get_peft_model(net(), ShiraConfig(r=2, target_modules=["0", "3"], random_seed=1, init_weights=False))
    hosted.save_pretrained(tmp_path / "theirs")
    delta = fallow.SHiRA.from_peft(tmp_path / "theirs", net())
    assert fallow.SHiRA.to_peft(delta, tmp_path / "ours") == tmp_path / "ours"
    before, after = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("theirs", "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    x = torch.randn(7, 20)
    torch.testing.assert_close(PeftModel.from_pretrained(net(), tmp_path / "ours")(x), hosted(x), rtol=0, atol=0)


def test_a_sparse_adapter_is_loaded_by_pefts_shira_filled_up_to_its_number_of_entries(tmp_path):
    model = net()
    optimizer = fallow.SHiRA(model, density=0.1, lr=1e-2, include=r"(0|3)\.weight")
    model(torch.randn(8, 20)).square().sum().backward()
    optimizer.step()
    optimizer.save(tmp_path / "sparse.safetensors")
    delta = fallow.SparseDelta.load(tmp_path / "sparse.safetensors")
    fallow.SHiRA.to_peft(delta, tmp_path / "peft")
    held = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    rank = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["r"]
    assert held["base_model.model.0.shira_weight"].numel() == rank * 50
    x = torch.randn(7, 20)
    hosted = PeftModel.from_pretrained(net(), tmp_path / "peft")
    torch.testing.assert_close(hosted(x), model(x), rtol=0, atol=1e-5)
    assert float((model(x) - net()(x)).detach().abs().max()) > 1e-3


def test_what_pefts_shira_has_no_place_for_is_refused_and_not_written(tmp_path):
    index = torch.arange(60, dtype=torch.int32)
    for name, shape, store, told in (
        ("0.bias", (60,), "delta", "'0.bias'"),
        ("0.weight", (30, 20), "value", "stores values"),
    ):
        delta = fallow.SparseDelta({name: Entry(index, torch.zeros(60), shape, "float32", "")}, store, {})
        with pytest.raises(fallow.AdapterError, match=told):
            fallow.SHiRA.to_peft(delta, tmp_path / "peft")
    small = Entry(index[:2], torch.zeros(2), (3, 4), "float32", "")
    large = Entry(index, torch.zeros(60), (20, 9), "float32", "")
    with pytest.raises(fallow.AdapterError, match=r"'1.weight' \(3, 4\) would have 21 entries at the rank 3"):
        fallow.SHiRA.to_peft(fallow.SparseDelta({"0.weight": large, "1.weight": small}, "delta", {}), tmp_path / "peft")
    assert not (tmp_path / "peft").exists()
