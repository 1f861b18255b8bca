"""Adapters of other ranks and of several blocks, saved and loaded again, on both hosts."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from delta_hosts import HOSTS
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

import fallow
from fallow.core.delta import method_of
from fallow.core.errors import AdapterError, ConfigError
from zoo import Zoo

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 9))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Parameter(0.3 * torch.randn(3, 8, 6))
        self.down = nn.Parameter(0.3 * torch.randn(3, 6, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ebo,eio->bi", torch.einsum("bi,eoi->ebo", x, self.up).relu(), self.down)


class Moe(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x)


def deltas(host: Any, model: nn.Module) -> list[Any]:
    return list(host.deltas(model).values())


def resized(host: Any, method: str, model: nn.Module) -> Any:
    """With one layer of a lower rank, and changes of both."""
    torch.manual_seed(1)
    model = host.attach(model, method_of(method), {"rank": 4}, ["0", "2"])
    first, second = deltas(host, model)
    for delta in (first, second):
        delta.randomize()
    first.resize(2)
    second.resize(3)
    return model


@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.name)
@pytest.mark.parametrize("method", ["lora", "sora", "dylora", "kasa"])
def test_a_resized_adapter_is_whole_again_from_its_file(host: Any, method: str, tmp_path: Path):
    model = resized(host, method, mlp()).eval()
    said = model(X)
    host.save(model, tmp_path)
    again = host.load(mlp(), tmp_path).eval()
    assert [delta.o.rank for delta in deltas(host, again)] == [2, 3]
    assert torch.equal(again(X), said)
    host.save(again, tmp_path / "twice")
    assert torch.equal(host.load(mlp(), tmp_path / "twice").eval()(X), said)
    assert json.loads((tmp_path / "twice/adapter_config.json").read_text())["method"] == method


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_of_a_model_tells_of_its_own_ranks(copied: Callable[[nn.Module], nn.Module], tmp_path: Path):
    peft = HOSTS[1]
    original = get_peft_model(mlp(), fallow.LoRAConfig(rank=4, target_modules=["0", "2"]))
    model = copied(original)
    first = deltas(peft, model)[0]
    first.resize(1)
    first.randomize()
    peft.save(model, tmp_path / "copy")
    peft.save(original, tmp_path / "original")
    told = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("copy", "original")]
    assert told[0]["made"]["options"] == {"0": {"rank": 1}}
    assert "options" not in told[1]["made"]
    assert torch.equal(peft.load(mlp(), tmp_path / "copy")(X), model(X))
    assert [delta.o.rank for delta in deltas(peft, original)] == [4, 4]


def test_ranks_that_were_changed_are_told_by_hotswap_and_are_another_start_for_a_fresh_adapter(tmp_path: Path):
    peft = HOSTS[1]
    model = resized(peft, "lora", mlp())
    peft.save(model, tmp_path)
    fresh = get_peft_model(mlp(), fallow.LoRAConfig(rank=4, target_modules=["0", "2"], seed=3))
    with pytest.raises(AdapterError, match="layers of other ranks than adapter 'default'"):
        fallow.hotswap(fresh, tmp_path)
    fallow.hotswap(model, tmp_path)
    fallow.to_lora(model, tmp_path / "plain")
    assert load_file(tmp_path / "plain/adapter_model.safetensors")["base_model.model.0.lora_A.weight"].shape == (2, 6)


def test_diffusers_own_saving_tells_of_ranks_that_were_changed(tiny_unet, tmp_path: Path):
    unet = tiny_unet()
    unet.add_adapter(fallow.LoRAConfig(rank=2, target_modules=["to_q"]))
    first = next(layer.fallow_delta["default"] for layer in unet.modules() if hasattr(layer, "fallow_delta"))
    first.resize(1)
    unet.save_lora_adapter(tmp_path)
    from safetensors import safe_open

    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as found:
        told = json.loads(found.metadata()["lora_adapter_metadata"])
    assert told["made"]["options"] == {first.site_name: {"rank": 1}}


# -- blocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.name)
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_both_hosts_give_each_matrix_of_a_stack_a_delta_of_its_own(host: Any, method: str, tmp_path: Path):
    model = fallow.attach(Moe(), method, ["experts.up", "experts.down"], rank=2) if host.name == "own" else None
    if model is None:
        config = {"lora": fallow.LoRAConfig, "dora": fallow.DoRAConfig}[method]
        model = get_peft_model(
            Moe(), config(rank=2, target_modules=[], target_parameters=["experts.up", "experts.down"])
        )
    count = sum(param.numel() for param in model.parameters() if param.requires_grad)
    assert count == 2 * 3 * 2 * (8 + 6) + (3 * (8 + 6) if method == "dora" else 0)
    torch.testing.assert_close(model(X), Moe()(X))
    torch.manual_seed(2)
    for delta in (module for module in model.modules() if isinstance(module, fallow.Delta)):
        if hasattr(delta, "A"):
            delta.randomize()
    said = model(X)
    assert float((said - Moe()(X)).detach().abs().max()) > 1e-2
    host.save(model, tmp_path)
    assert torch.equal(host.load(Moe(), tmp_path)(X), said)
    host.merge(model)
    torch.testing.assert_close(model(X), said)


def test_a_stack_is_the_same_adapter_on_both_hosts():
    targets = ["experts.up", "experts.down"]
    torch.manual_seed(4)
    own = fallow.attach(Moe(), "lora", targets, rank=2)
    for parts in (module for module in own.modules() if hasattr(module, "parts")):
        parts.randomize()
    peft = get_peft_model(Moe(), fallow.LoRAConfig(rank=2, target_modules=[], target_parameters=targets))
    held = [m for m in peft.modules() if hasattr(m, "parts")]
    mine = [m for m in own.modules() if hasattr(m, "parts")]
    assert [sorted(m.state_dict()) for m in held] == [sorted(m.state_dict()) for m in mine]
    for here, there in zip(held, mine, strict=True):
        here.load_state_dict(there.state_dict())
    torch.testing.assert_close(peft(X), own(X))


def test_blocks_of_a_stack_may_have_ranks_of_their_own(tmp_path: Path):
    for host in HOSTS:
        model = Moe()
        if host.name == "own":
            fallow.attach(model, "lora", ["experts.up"], rank=2)
        else:
            config = fallow.LoRAConfig(rank=2, target_modules=[], target_parameters=["experts.up"])
            model = get_peft_model(model, config)
        fused = next(module for module in model.modules() if hasattr(module, "parts"))
        fused.randomize()
        assert fused.importance().shape == (2,)
        worth = torch.stack([part.importance().sort(descending=True).values for part in fused.parts])
        torch.testing.assert_close(fused.importance(), worth.norm(dim=0))
        fused.resize(3)
        fused.parts[1].resize(1)
        assert fused.importance().shape == (3,)
        said = model(X)
        host.save(model, tmp_path / host.name)
        again = host.load(Moe(), tmp_path / host.name)
        assert torch.equal(again(X), said)
        fused = next(module for module in again.modules() if hasattr(module, "parts"))
        assert [part.o.rank for part in fused.parts] == [3, 1, 3]


def test_fused_projections_have_a_delta_each_without_peft_too(tmp_path: Path):
    model = fallow.attach(mlp(), "lora", ["0", "2"], rank=2, fused={"0": 3, "2": [4, 5]})
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * (3 * (4 + 6) + (4 + 12) + (5 + 12))
    for module in model.modules():
        if hasattr(module, "parts"):
            module.randomize()
    said = model(X)
    fallow.save(model, tmp_path)
    assert torch.equal(fallow.load(mlp(), tmp_path)(X), said)
    attention = fallow.attach(
        Zoo(tied=False), "lora", ["attention.in_proj_weight"], rank=2, fused={"in_proj_weight": 3}
    )
    assert sum(p.numel() for p in attention.parameters() if p.requires_grad) == 3 * 2 * (16 + 16)
    with pytest.raises(ConfigError, match="fused: 'qkv' matches none of the targets"):
        fallow.attach(mlp(), "lora", ["0"], rank=2, fused={"qkv": 3})
    with pytest.raises(ConfigError, match="fused=5 does not divide the 12 rows of '0'"):
        fallow.attach(mlp(), "lora", ["0"], rank=2, fused={"0": 5})


def test_a_stack_that_was_saved_as_one_matrix_is_refused_by_name(tmp_path: Path):
    from fallow.core.files import read_tensors, write_tensors

    model = fallow.attach(Moe(), "lora", ["experts.up"], rank=2)
    file = fallow.save(model, tmp_path / "a.safetensors")
    tensors, header = read_tensors(file)
    told = json.loads(header["fallow"])
    for name in ("blocks", "apart"):
        del told["weights"]["experts.up"][name]
    write_tensors(file, tensors, header | {"fallow": json.dumps(told)})
    with pytest.raises(AdapterError, match=r"adapts the stack 'experts\.up' as one matrix"):
        fallow.load(Moe(), file)
    told["weights"]["experts.up"] |= {"blocks": ["a"], "apart": {}}
    write_tensors(file, tensors, header | {"fallow": json.dumps(told)})
    with pytest.raises(AdapterError, match=r"broken metadata \(the blocks of 'experts\.up'\)"):
        fallow.load(Moe(), file)
