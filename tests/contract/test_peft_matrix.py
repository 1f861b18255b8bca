"""What PEFT asks of every method on its custom models, asked of all of ours: models of layers of each kind, small ones.

`scripts/peft_matrix.py` runs PEFT's own tests, which are not installed with it.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from peft.utils import set_peft_model_state_dict
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fallow.core.delta import REGISTRY, Delta
from fallow.core.peft_host import FallowLayer, config_of

SMALL: dict[str, dict[str, Any]] = {
    "loca": {"components": 4, "location_until": 0},
    "smora": {"rank": 2, "active": 1},
    "mos": {"equivalent_rank": 1, "shards": 1, "private_rank": 0, "dropout": 0.0},
    "mosa": {"experts": 2},
    "sltrain": {"density": 0.5},
    "pego": {"rank": 1, "group": 1},
    "wara-spatial": {"prefix": 0, "grid": (3, 3)},
    "lamda": {"dropout": 0.0},
}
NOT_MERGEABLE = ("smora", "wara-spatial")
METHODS = [name for name, method in REGISTRY.items() if method.__module__.startswith("fallow.deltas.")]


class Dense(nn.Module):
    """Two linear layers, also on a grid of tokens."""

    targets, kinds = ("first", "second"), ("linear",)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(10, 20), nn.Linear(20, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x.unflatten(0, (1, 9))).relu()).log_softmax(-1)[0]

    def batch(self, dtype: torch.dtype) -> Tensor:
        return torch.randn(9, 10, generator=torch.Generator().manual_seed(0)).to(dtype)


class Table(nn.Module):
    """An embedding and a layer that is stored transposed."""

    targets, kinds = ("table", "turned"), ("embedding", "linear")

    def __init__(self) -> None:
        super().__init__()
        self.table, self.turned, self.last = nn.Embedding(30, 6), Conv1D(4, 6), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.turned(self.table(x))).flatten(1)).log_softmax(-1)

    def batch(self, dtype: torch.dtype) -> Tensor:
        return torch.arange(27).view(9, 3)


class Image(nn.Module):
    """Convolutions of two sizes and a linear layer."""

    targets, kinds = ("image", "line", "last"), ("conv", "linear")

    def __init__(self) -> None:
        super().__init__()
        self.image, self.line, self.last = nn.Conv2d(3, 8, 3), nn.Conv1d(8, 6, 2), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.line(torch.tanh(self.image(x)).flatten(2)).mean(-1)).log_softmax(-1)

    def batch(self, dtype: torch.dtype) -> Tensor:
        return torch.randn(9, 3, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)


MODELS = {"dense": Dense, "table": Table, "image": Image}


def fits(method: str, model: str) -> bool:
    if method == "wara-spatial":
        return model == "dense"
    return set(MODELS[model].kinds) <= set(REGISTRY[method].supports)


CASES = [(method, model) for method in METHODS for model in MODELS if fits(method, model)]
MERGING = [case for case in CASES if case[0] not in NOT_MERGEABLE]
of_cases = pytest.mark.parametrize(("method", "model"), CASES)
of_merging = pytest.mark.parametrize(("method", "model"), MERGING)


def config(method: str, model: str, **given: Any) -> Any:
    cls = REGISTRY[method]
    rank = {"rank": 1} if "rank" in {field.name for field in dataclasses.fields(cls.Options)} else {}
    return config_of(cls)(**{"target_modules": list(MODELS[model].targets), **rank, **SMALL.get(method, {}), **given})


def base(model: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return MODELS[model]().to(dtype)


def adapted(method: str, model: str, dtype: torch.dtype = torch.float32, drawn: bool = True, **given: Any) -> Any:
    """In evaluation, changed by the adapter where `drawn`."""
    own = {name: given.pop(name) for name in ("adapter_name", "autocast_adapter_dtype") if name in given}
    torch.manual_seed(1)
    return get_peft_model(base(model, dtype), config(method, model, init_weights=not drawn, **given), **own).eval()


def say(model: nn.Module, x: Tensor) -> Tensor:
    for module in model.modules():
        if isinstance(module, Delta):
            module.context["quality"] = 0.7
    return model(x)


def said(model: Any) -> Tensor:
    with torch.no_grad():
        bare = model.get_base_model() if isinstance(model, PeftModel) else model
        dtype = next(param.dtype for param in bare.parameters())
        return say(model, bare.batch(dtype))


def close(one: Tensor, other: Tensor, within: float = 1e-4) -> bool:
    return bool((one.float() - other.float()).abs().max() <= within * (1 + other.float().abs().max()))


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


# -- files ------------------------------------------------------------------------------------------------------------


@of_cases
def test_a_folder_is_whole_for_any_name_and_way_of_loading(method: str, model: str, tmp_path: Path):
    first = adapted(method, model, adapter_name="own")
    expected = said(first)
    assert not close(expected, said(base(model)))
    first.save_pretrained(tmp_path)
    torch.manual_seed(9)
    again = PeftModel.from_pretrained(base(model), tmp_path / "own").eval()
    assert close(said(again), expected, 1e-6)
    again.load_adapter(tmp_path / "own", "fall", low_cpu_mem_usage=True)
    again.set_adapter("fall")
    assert not any(tensor.is_meta for tensor in again.state_dict().values())
    assert close(said(again), expected, 1e-6)
    names = (first, "own"), (again, "default"), (again, "fall")
    tensors = [get_peft_model_state_dict(each, adapter_name=name) for each, name in names]
    assert all(each.keys() == tensors[0].keys() for each in tensors)
    assert all(torch.equal(tensors[0][key], each[key]) for each in tensors[1:] for key in each)


@of_cases
def test_what_is_injected_without_a_wrapper_takes_the_same_tensors(method: str, model: str):
    first = adapted(method, model)
    held = {key.removeprefix("base_model.model."): value for key, value in get_peft_model_state_dict(first).items()}
    torch.manual_seed(9)
    bare = inject_adapter_in_model(config(method, model, made=first.peft_config["default"].made), base(model)).eval()
    assert not set_peft_model_state_dict(bare, held).unexpected_keys
    assert close(said(bare), said(first), 1e-6)


@of_cases
def test_the_base_is_there_under_its_own_names_and_every_layer_tells_its_sides(method: str, model: str):
    first, plain = adapted(method, model), base(model)
    found = {name.replace(".base_layer", ""): value for name, value in first.get_base_model().state_dict().items()}
    for name, value in plain.state_dict().items():
        assert torch.equal(found[name], value), name
    layers = [layer for layer in first.modules() if isinstance(layer, FallowLayer)]
    assert len(layers) == len(MODELS[model].targets)
    assert all(layer.in_features and layer.out_features for layer in layers)
    assert "fallow_delta" in repr(first)


# -- merging ----------------------------------------------------------------------------------------------------------


@of_merging
@pytest.mark.parametrize("safe", [False, True])
def test_merged_is_as_unmerged_and_merging_once_more_changes_nothing(method: str, model: str, safe: bool):
    first = adapted(method, model)
    expected = said(first)
    merged = copy.deepcopy(first).merge_and_unload(safe_merge=safe)
    assert type(merged) is MODELS[model]
    assert list(merged.state_dict()) == list(base(model).state_dict())
    assert close(said(merged), expected)
    for _ in range(2):
        first.merge_adapter(safe_merge=safe)
        assert close(said(first), expected)
    first.unmerge_adapter()
    assert torch.equal(said(first), expected)
    assert torch.equal(said(first.unload()), said(base(model)))


@of_merging
def test_a_merged_adapter_is_off_where_it_is_disabled_and_cannot_be_deleted(method: str, model: str):
    first = adapted(method, model)
    expected = said(first)
    first.merge_adapter()
    with first.disable_adapter(), first.disable_adapter():
        assert torch.equal(said(first), said(base(model)))
    assert close(said(first), expected)
    first.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        first.delete_adapter("default")
    first.unmerge_adapter()
    assert torch.equal(said(first), expected)


# -- precision --------------------------------------------------------------------------------------------------------


@of_cases
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_with_autocast_and_without(method: str, model: str, dtype: torch.dtype):
    whole = adapted(method, model, dtype)
    assert {param.dtype for param in trained(whole).values()} == {torch.float32}
    expected = said(whole)
    assert bool(torch.isfinite(expected).all())
    assert expected.dtype == dtype
    with torch.autocast("cpu", dtype):
        assert bool(torch.isfinite(said(whole)).all())
    half = adapted(method, model, dtype, autocast_adapter_dtype=False)
    assert {param.dtype for param in trained(half).values()} == {dtype}
    assert close(said(half), expected, 0.1)
    if method not in NOT_MERGEABLE:
        assert close(said(half.merge_and_unload()), expected, 0.1)


# -- training and switching -------------------------------------------------------------------------------------------


@of_cases
def test_only_the_adapter_is_trained_and_all_of_it(method: str, model: str):
    first = adapted(method, model).train()
    before = {name: value.detach().clone() for name, value in first.state_dict().items()}
    optimizer = torch.optim.AdamW(trained(first).values(), lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        out = say(first, first.get_base_model().batch(torch.float32))
        nn.functional.nll_loss(out, torch.arange(len(out)) % 2).backward()
        optimizer.step()
    moved = {name for name, value in first.state_dict().items() if not torch.equal(value, before[name])}
    assert set(trained(first)) <= moved
    assert not any("base_layer" in name or ("fallow" not in name and "shared" not in name) for name in moved)
    first.eval()
    learned = said(first)
    with first.disable_adapter():
        assert torch.equal(said(first), said(base(model)))
    assert torch.equal(said(first), learned)


@of_cases
def test_adapters_are_switched_disabled_and_deleted_each_by_itself(method: str, model: str):
    first = adapted(method, model)
    expected, plain = said(first), said(base(model))
    torch.manual_seed(5)
    first.add_adapter("other", config(method, model, init_weights=False, seed=0))
    assert torch.equal(said(first), expected)
    assert all(".default" in name for name in trained(first))
    first.set_adapter("other")
    others = said(first)
    assert not close(others, expected)
    assert all(".other" in name for name in trained(first))
    with first.disable_adapter():
        assert torch.equal(said(first), plain)
    assert torch.equal(said(first), others)
    if method not in NOT_MERGEABLE:
        first.base_model.set_adapter(["default", "other"])
        both = said(first)
        joint = copy.deepcopy(first).merge_and_unload(adapter_names=["default", "other"])
        assert close(said(joint), both)
        first.set_adapter("other")
    first.delete_adapter("default")
    assert torch.equal(said(first), others)
    assert not any(".default" in name for name in first.state_dict())
    with pytest.raises(ValueError, match="default"):
        first.delete_adapter("default")
    assert torch.equal(said(first.unload()), plain)


@pytest.mark.parametrize("method", METHODS)
def test_layers_that_are_trained_whole_are_saved_beside_the_adapter(method: str, tmp_path: Path):
    first = adapted(method, "dense", target_modules=["first"], modules_to_save=["second"])
    with torch.no_grad():
        for name, param in trained(first).items():
            if "modules_to_save" in name:
                param.add_(1.0)
    expected = said(first)
    first.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base("dense"), tmp_path, is_trainable=True).eval()
    assert close(said(again), expected, 1e-6)
    assert trained(again).keys() == trained(first).keys()
    with again.disable_adapter():
        assert torch.equal(said(again), said(base("dense")))


def test_all_methods_are_asked():
    assert len(METHODS) >= 26
    assert {method for method, _ in CASES} == set(METHODS)
