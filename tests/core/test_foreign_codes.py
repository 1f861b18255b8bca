"""Adapters on weights that other libraries keep in codes: torchao's int8, bitsandbytes' 4 and 8 bits; on both hosts.

torchao is no dependency: its cases are left out where it is not installed (pip install torchao).
"""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import fallow
from fallow.core.delta import Delta
from fallow.core.errors import ModelError
from fallow.core.foreign_codes import decoded, is_coded

X = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
CODES = ["torchao", "4bit", "8bit"]
METHODS: dict[str, dict[str, Any]] = {"lora": {"rank": 2}, "dora": {"rank": 2}, "svfit": {}}
CONFIGS = {"lora": fallow.LoRAConfig, "dora": fallow.DoRAConfig, "svfit": fallow.SVFitConfig}


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))


def base(code: str) -> nn.Sequential:
    """`plain`, in a code."""
    model = plain()
    if code == "torchao":
        quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        return model
    bnb = pytest.importorskip("bitsandbytes")
    made = {
        "4bit": lambda a, b: bnb.nn.Linear4bit(a, b, compute_dtype=torch.float32, quant_type="nf4"),
        "8bit": lambda a, b: bnb.nn.Linear8bitLt(a, b, has_fp16_weights=False),
    }[code]
    for number in (0, 2):
        layer = made(model[number].in_features, model[number].out_features)
        layer.load_state_dict(model[number].state_dict())
        model[number] = layer
    return model.to("cpu")


def stir(model: nn.Module) -> None:
    torch.manual_seed(1)
    for delta in model.modules():
        if isinstance(delta, Delta):
            delta.randomize()


def far(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().abs().max() / other.detach().abs().max())


@pytest.mark.parametrize("code", CODES)
def test_a_coded_weight_is_read_as_the_layer_runs_with_it(code: str):
    model = base(code)
    for number in (0, 2):
        assert is_coded(model[number].weight)
        read = decoded(model[number])
        assert read.shape == plain()[number].weight.shape
        assert read.is_floating_point()
        assert far(read, plain()[number].weight) < 0.2
    first = model[0]
    for _ in range(2):  # int8 keeps its scales elsewhere once it has run
        assert far(nn.functional.linear(X, decoded(first).float(), first.bias), first(X)) < 0.03
    assert not is_coded(plain()[0].weight)
    bare = plain()[0]
    assert decoded(bare) is bare.weight


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("method", METHODS)
def test_the_host_without_peft_trains_saves_and_disables_on_it_and_merges_nothing(
    code: str, method: str, tmp_path: Path
):
    model = base(code)
    before = model(X)
    fallow.attach(model, method, ["0", "2"], **METHODS[method])
    assert far(model(X), before) < (0.05 if code == "8bit" and method == "dora" else 1e-5)
    stir(model)
    said = model(X)
    assert far(said, before) > 1e-3
    said.sum().backward()
    assert fallow.check_gradients(model) == 2
    fallow.save(model, tmp_path)
    assert torch.equal(fallow.load(base(code), tmp_path)(X), said)
    assert torch.equal(copy.deepcopy(model)(X), said)
    with fallow.disabled(model):
        assert torch.equal(model(X), before)
    with pytest.raises(ModelError, match="'0' is quantised"):
        fallow.merge(model)
    assert torch.equal(model(X), said)
    fallow.detach(model)
    assert torch.equal(model(X), before)


@pytest.mark.parametrize("method", METHODS)
def test_pefts_host_trains_and_saves_on_torchao_and_merges_where_it_knows_how_the_base_was_coded(
    method: str, tmp_path: Path
):
    bare = base("torchao")
    before = bare(X)
    model = get_peft_model(bare, CONFIGS[method](target_modules=["0", "2"], **METHODS[method]))
    assert far(model(X), before) < 1e-5
    stir(model)
    said = model(X)
    said.sum().backward()
    assert all(param.grad is not None for param in model.parameters() if param.requires_grad)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(base("torchao"), tmp_path)(X), said)
    with model.disable_adapter():
        assert torch.equal(model(X), before)
    with pytest.raises(ModelError, match="quantised by torchao in a way that cannot be made again"):
        model.merge_adapter()
    assert torch.equal(model(X), said)

    from torchao.quantization import Int8WeightOnlyConfig

    told = base("torchao")
    told.hf_quantizer = SimpleNamespace(
        quantization_config=SimpleNamespace(get_apply_tensor_subclass=Int8WeightOnlyConfig)
    )  # as transformers leaves it on a model that it has loaded so
    again = PeftModel.from_pretrained(told, tmp_path)
    with torch.no_grad():
        again.merge_adapter()
        assert 0.0 < far(again(X), said) < 0.1  # coded anew
        again.unmerge_adapter()
        assert torch.equal(again(X), said)


class Forward:
    """Of a code that can be run and not made."""

    backend_name, supports_merge = "a code of its own", False


def test_where_one_layer_cannot_merge_none_does():
    before = plain()(X)
    model = get_peft_model(plain(), fallow.LoRAConfig(rank=2, target_modules=["0", "2"]))
    stir(model)
    said = model(X)
    first, second = (model.base_model.model[number] for number in (0, 2))
    second.quantization_backend = Forward()
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(
            ModelError, match="'2' is quantised by a code of its own in a way that cannot be made again"
        ):
            merge()
        assert not first.merged
        assert torch.equal(model(X), said)
    second.quantization_backend = None
    model.add_adapter("gated", fallow.SMoRAConfig(rank=4, active=2, target_modules=["2"]))
    model.base_model.set_adapter(["default", "gated"])
    with pytest.raises(
        fallow.ConfigError, match="'smora' acts on a layer's input and output; it has no weight and cannot merge"
    ):
        model.merge_adapter()
    assert not first.merged
    model.merge_adapter(["default"])
    assert first.merged
    model.unmerge_adapter()
    assert torch.equal(model.unload()(X), before)
