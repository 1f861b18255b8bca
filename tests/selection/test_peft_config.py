"""SaRA and SHiRA as PEFT adapters: the same choice, gradients and steps as the optimizers, and what PEFT promises."""

from __future__ import annotations

import copy
import gc
import json
import re
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel, ShiraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import fallow
from fallow.core.compact import gather
from fallow.core.peft_host import FallowLayer
from fallow.core.probe import gradients
from fallow.core.select import eligible

WEIGHTS = r"(0|2|4)\.weight"


def layers(model: nn.Module) -> dict[str, FallowLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FallowLayer)}


def sara(model: nn.Module, **options) -> PeftModel:
    options = {"fraction": 0.05, "target_modules": ["0", "2", "4"], **options}
    return get_peft_model(model, fallow.SaRAConfig(**options))


def moved(model: PeftModel, lr: float = 1e-2, steps: int = 3, seed: int = 1) -> PeftModel:
    """The model after some steps, so that its adapter does something."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        x = torch.randn(4, 80, generator=generator)
        model(x.to(next(model.parameters()).dtype)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_new_adapter_is_the_base_bit_for_bit_and_trains_exactly_its_entries(mlp, dtype):
    model, x = mlp(dtype), torch.randn(4, 80, dtype=dtype)
    before, expected = copy.deepcopy(model.state_dict()), model(x)
    peft = sara(model, fraction=None, budget=777)
    assert torch.equal(peft(x), expected)
    assert peft.get_nb_trainable_parameters()[0] == 777
    trained = [p for p in peft.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 777
    assert {p.dtype for p in trained} == {torch.float64 if dtype == torch.float64 else torch.float32}
    assert all(torch.equal(layer.parameter, before[f"{name[-1]}.weight"]) for name, layer in layers(peft).items())


def test_the_choice_is_that_of_the_optimizer_over_all_layers_together(mlp):
    optimizer = fallow.SaRA(mlp(), fraction=0.07, include=WEIGHTS)
    peft = sara(mlp(), fraction=0.07)
    for name, layer in layers(peft).items():
        assert torch.equal(layer.fallow_delta["default"].index, optimizer.delta().entries[f"{name[-1]}.weight"].index)
    assert peft.peft_config["default"].made["threshold"] == optimizer.threshold


@pytest.mark.parametrize("options", [{"mask": "rand", "seed": 3}, {"mask": "wm", "task": 1}, {"mask": "struct"}])
def test_shiras_masks_are_those_of_the_optimizer(mlp, options):
    optimizer = fallow.SHiRA(mlp(), density=0.03, **options)
    peft = get_peft_model(mlp(), fallow.SHiRAConfig(density=0.03, target_modules="all-linear", **options))
    for name, layer in layers(peft).items():
        assert torch.equal(layer.fallow_delta["default"].index, optimizer.delta().entries[f"{name[-1]}.weight"].index)


def test_snip_takes_gradients_gathered_beforehand_and_says_so_without_them(mlp, tmp_path):
    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return model(batch).square().mean()

    batches, model = [torch.randn(8, 80)], mlp()
    optimizer = fallow.SHiRA(mlp(), mask="snip", density=0.02, batches=batches, loss=loss)
    stats = gradients(model, eligible(model, WEIGHTS), batches, loss)
    peft = get_peft_model(model, fallow.SHiRAConfig(mask="snip", target_modules="all-linear", stats=stats))
    for name, layer in layers(peft).items():
        assert torch.equal(layer.fallow_delta["default"].index, optimizer.delta().entries[f"{name[-1]}.weight"].index)
    moved(peft).save_pretrained(tmp_path)
    assert "stats" not in json.loads((tmp_path / "adapter_config.json").read_text())
    assert torch.equal(PeftModel.from_pretrained(mlp(), tmp_path)(batches[0]), peft(batches[0]))
    with pytest.raises(fallow.ConfigError, match="mask='snip' chooses by gradients; give stats="):
        fallow.SHiRAConfig(mask="snip")


def test_gradients_are_the_dense_ones_at_the_chosen_entries(mlp):
    x, dense = torch.randn(4, 80, dtype=torch.float64), mlp(torch.float64)
    dense(x).square().sum().backward()
    peft = sara(mlp(torch.float64))
    peft(x).square().sum().backward()
    for name, layer in layers(peft).items():
        delta = layer.fallow_delta["default"]
        expected = gather(dense[int(name[-1])].weight.grad, delta.index)
        torch.testing.assert_close(delta.values.grad, expected, rtol=1e-12, atol=1e-14)
        assert layer.parameter.grad is None


@pytest.mark.parametrize(
    "options", [{}, {"rank_weight": 5e-3}, {"reselect_at": [4]}, {"rank_weight": 5e-3, "reselect_at": 4}]
)
def test_ten_steps_of_an_ordinary_optimizer_are_those_of_sara(mlp, options):
    one, other = mlp(), sara(mlp(), **options)
    optimizer = fallow.SaRA(one, fraction=0.05, lr=2e-3, include=WEIGHTS, **options)
    plain = torch.optim.AdamW(other.parameters(), lr=2e-3, weight_decay=0.0)
    for _ in range(10):
        x = torch.randn(4, 80)
        for model in (one, other):
            for half in x.split(2):  # accumulated
                model(half).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(optimizer.trainable(), 0.05)
        torch.nn.utils.clip_grad_norm_(other.parameters(), 0.05)
        optimizer.step()
        plain.step()
        fallow.step(other)
        optimizer.zero_grad()
        plain.zero_grad()
    x = torch.randn(4, 80)
    torch.testing.assert_close(other(x), one(x), rtol=1e-5, atol=1e-6)
    for name, layer in layers(other).items():
        torch.testing.assert_close(layer.parameter, one[int(name[-1])].weight, rtol=1e-5, atol=1e-6)
    if "reselect_at" in options:
        live = sum(int(layer.fallow_delta["default"].live.sum()) for layer in layers(other).values())
        assert live == optimizer.live_parameters < optimizer.trained_parameters


def test_frozen_entries_keep_still_though_momentum_and_decay_move_them_and_survive_saving(mlp, tmp_path):
    peft = sara(mlp(), reselect_at=[2])
    optimizer = torch.optim.AdamW(peft.parameters(), lr=1e-2, weight_decay=0.5)
    held = None
    for step in range(6):
        peft(torch.randn(4, 80)).square().mean().backward()
        optimizer.step()
        fallow.step(peft)
        optimizer.zero_grad()
        if step == 1:
            frozen = {name: ~layer.fallow_delta["default"].live for name, layer in layers(peft).items()}
            held = {
                n: layer.fallow_delta["default"].values[frozen[n]].detach().clone() for n, layer in layers(peft).items()
            }
            assert 0 < sum(int(mask.sum()) for mask in frozen.values()) < 808
    assert held is not None
    peft.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(mlp(), tmp_path, is_trainable=True)
    for name, layer in layers(fresh).items():
        assert torch.equal(layer.fallow_delta["default"].values[frozen[name]], held[name])
        assert torch.equal(~layer.fallow_delta["default"].live, frozen[name])
    x = torch.randn(4, 80)
    assert torch.equal(fresh(x), peft(x))


def test_the_places_of_what_a_re_selection_left_are_found_once(mlp):
    peft = sara(mlp(), fraction=0.3, reselect_at=[2])
    entries = [layer.fallow_delta["default"] for layer in layers(peft).values()]
    assert all(one.trained is None for one in entries)
    for one in entries:
        one.freeze(torch.arange(one.values.numel()) % 3 == 0)
        assert one.trained is one.trained
        assert one.trained.tolist() == list(range(0, one.values.numel(), 3))
        one.freeze(torch.arange(one.values.numel()) % 2 == 0)
        assert one.trained.tolist() == list(range(0, one.values.numel(), 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_adapter_gives_equal_outputs_on_a_fresh_base_without_a_second_choice(mlp, tmp_path, dtype, monkeypatch):
    peft, x = moved(sara(mlp(dtype))), torch.randn(4, 80, dtype=dtype)
    peft.save_pretrained(tmp_path)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert size < 8 * 808 + 2000  # float32 values and int32 indices
    monkeypatch.setattr("fallow.core.select.choose", None)
    monkeypatch.setattr("fallow.selection.sara.choose", None)
    for options in ({}, {"low_cpu_mem_usage": True}, {"is_trainable": True}):
        fresh = PeftModel.from_pretrained(mlp(dtype), tmp_path, **options)
        assert torch.equal(fresh(x), peft(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PeftModel.from_pretrained(mlp(dtype), tmp_path, adapter_name="style")


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        ({"made": {}}, "tells no number of entries"),
        (
            {"made": {"entries": {"0": 10**15, "2": 389, "4": 36}}},
            "claims 1000000000000000 entries of a weight",
        ),
        ({"made": {"entries": {"0": "x", "2": 389, "4": 36}}}, "claims 'x' entries"),
        ({"made": {"entries": {"9": 5}}}, "the adapter trains '9', which Sequential lacks"),
        ({"method": "none"}, "method='none' is not hosted"),
    ],
)
def test_a_config_that_claims_what_cannot_be_is_refused(mlp, tmp_path, broken, told):
    moved(sara(mlp())).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | broken))
    with pytest.raises(fallow.FallowError, match=told):
        PeftModel.from_pretrained(mlp(), tmp_path)


@pytest.mark.parametrize("index", [[5, 5], [7, 3], [0, 80 * 96], [-3, 2]])
def test_indices_that_do_not_fit_are_refused(mlp, tmp_path, index):
    moved(sara(mlp())).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.0.fallow_delta.index"][-2:] = torch.tensor(index, dtype=torch.int32)
    save_file(tensors, file)
    with pytest.raises(fallow.AdapterError, match=r"indices do not fit|not loaded"):
        PeftModel.from_pretrained(mlp(), tmp_path)


def test_training_goes_on_from_a_loaded_adapter(mlp, tmp_path):
    peft = moved(sara(mlp()))
    peft.save_pretrained(tmp_path)
    again = moved(PeftModel.from_pretrained(mlp(), tmp_path, is_trainable=True), seed=2)
    straight, x = moved(peft, seed=2), torch.randn(4, 80)
    assert torch.equal(again(x), straight(x))


def test_another_base_is_refused_unless_forced(mlp, tmp_path):
    peft = moved(sara(mlp()))
    peft.save_pretrained(tmp_path)
    with pytest.raises(fallow.AdapterError, match=r"was trained on another base.*check_base"):
        PeftModel.from_pretrained(mlp(seed=1), tmp_path)
    config = PeftConfig.from_pretrained(str(tmp_path))
    config.check_base = False
    forced, x = PeftModel.from_pretrained(mlp(seed=1), tmp_path, config=config), torch.randn(4, 80)
    assert not torch.equal(forced(x), mlp(seed=1)(x))
    half = PeftModel.from_pretrained(mlp(torch.bfloat16), tmp_path)  # the same base in half precision
    torch.testing.assert_close(half(x.bfloat16()).float(), peft(x), rtol=0.1, atol=0.1)


def test_a_config_of_a_file_without_its_file_is_refused_when_used(mlp, tmp_path):
    moved(sara(mlp())).save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(config, fallow.SaRAConfig)
    assert config.fraction == 0.05
    model = get_peft_model(mlp(), config)
    with pytest.raises(fallow.AdapterError, match="made = None to choose anew"):
        model(torch.randn(4, 80))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_and_unloading_are_exact(mlp, dtype):
    peft, x = moved(sara(mlp(dtype))), torch.randn(4, 80, dtype=dtype)
    expected, base = peft(x), mlp(dtype)
    with peft.disable_adapter():
        assert torch.equal(peft(x), base(x))
        assert all(torch.equal(layer.parameter, base[int(name[-1])].weight) for name, layer in layers(peft).items())
    assert torch.equal(peft(x), expected)
    peft.merge_adapter(safe_merge=True)
    assert torch.equal(peft(x), expected)
    peft.unmerge_adapter()
    assert torch.equal(peft(x), expected)
    merged = copy.deepcopy(peft).merge_and_unload(safe_merge=True)
    assert torch.equal(merged(x), expected)
    assert merged.state_dict().keys() == base.state_dict().keys()
    plain = peft.unload()
    assert all(torch.equal(plain.state_dict()[name], value) for name, value in base.state_dict().items())


def test_values_that_are_not_finite_are_not_merged(mlp):
    peft = moved(sara(mlp()))
    next(p for p in peft.parameters() if p.requires_grad).data[0] = torch.nan
    with pytest.raises(fallow.AdapterError, match="NaN or infinite"):
        peft.merge_and_unload(safe_merge=True)


def test_in_half_precision_the_weight_is_the_rounded_sum(mlp):
    peft, base = moved(sara(mlp(torch.bfloat16)), lr=1e-4, steps=4), mlp(torch.bfloat16)
    peft(torch.randn(4, 80, dtype=torch.bfloat16))
    for name, layer in layers(peft).items():
        delta = layer.fallow_delta["default"]
        assert delta.values.dtype == torch.float32
        expected = base[int(name[-1])].weight.detach().flatten()
        expected[delta.index.long()] = (expected[delta.index.long()].float() + delta.values).bfloat16()
        assert torch.equal(layer.parameter.flatten(), expected)


def test_two_adapters_switch_add_up_disable_and_go(mlp, tmp_path):
    peft, base, x = moved(sara(mlp())), mlp(), torch.randn(4, 80)
    first = peft(x)
    peft.add_adapter("other", fallow.SHiRAConfig(density=0.05, target_modules=["0", "2"]))
    assert torch.equal(peft(x), first)
    peft.set_adapter("other")
    assert torch.equal(peft(x), base(x))
    second = moved(peft, seed=2)(x)
    peft.set_adapter("default")
    assert torch.equal(peft(x), first)
    peft.base_model.set_adapter(["default", "other"])
    both = peft(x)
    dense = mlp()
    with torch.no_grad():
        for name, layer in layers(peft).items():
            for adapter in layer.fallow_delta:
                dense[int(name[-1])].weight += layer.get_delta_weight(adapter)
    torch.testing.assert_close(both, dense(x), rtol=1e-5, atol=1e-6)
    merged = copy.deepcopy(peft).merge_and_unload()
    assert torch.equal(merged(x), both)
    peft.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    peft.set_adapter("sum")
    torch.testing.assert_close(peft(x), both, rtol=1e-5, atol=1e-6)
    peft.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mlp(), tmp_path / "sum")
    assert torch.equal(loaded(x), peft(x))
    loaded.load_adapter(tmp_path / "other", "other")
    loaded.set_adapter("other")
    assert torch.equal(loaded(x), second)
    peft.set_adapter("other")
    peft.delete_adapter("other")
    peft.set_adapter("default")
    assert torch.equal(peft(x), first)
    peft.delete_adapter("default")
    with peft.disable_adapter():
        assert torch.equal(peft(x), base(x))


def test_a_batch_may_have_another_adapter_in_each_row(mlp):
    peft, x = moved(sara(mlp())), torch.randn(3, 80)
    peft.add_adapter("other", fallow.SHiRAConfig(target_modules=["0"]))
    peft.set_adapter("other")
    moved(peft, seed=2).eval()
    with torch.no_grad():
        rows = peft(x, adapter_names=["default", "__base__", "other"])
        other = peft(x)[2]
        peft.set_adapter("default")
        torch.testing.assert_close(rows, torch.stack([peft(x)[0], mlp()(x)[1], other]))
        with pytest.raises(fallow.ConfigError, match="no adapter \\['othr'\\] \\(did you mean 'other'"):
            peft(x, adapter_names=["default", "default", "othr"])


def test_scales_are_a_line_through_the_base(mlp):
    peft, base = moved(sara(mlp())), mlp()
    for layer in layers(peft).values():
        layer.set_scale("default", 0.5)
    peft(torch.randn(4, 80))
    for name, layer in layers(peft).items():
        delta = layer.fallow_delta["default"]
        change = (layer.parameter - base[int(name[-1])].weight).flatten()[delta.index.long()]
        torch.testing.assert_close(change, 0.5 * delta.values, rtol=1e-4, atol=1e-7)
        layer.set_scale("default", 0.0)
    x = torch.randn(4, 80)
    assert torch.equal(peft(x), base(x))


def test_a_backward_sees_the_weights_of_its_own_forward(mlp):
    """As in DPO, where the reference is computed with the adapter off between forward and backward."""
    x, one, other = torch.randn(4, 80), moved(sara(mlp())), moved(sara(mlp()))
    one(x).square().mean().backward()
    policy = other(x)
    with torch.no_grad(), other.disable_adapter():
        reference = other(x)
    policy.square().mean().backward()
    assert torch.equal(reference, mlp()(x))
    for a, b in zip(layers(one).values(), layers(other).values(), strict=True):
        assert torch.equal(a.fallow_delta["default"].values.grad, b.fallow_delta["default"].values.grad)


def test_values_changed_between_forward_and_backward_are_told(mlp):
    peft, x = moved(sara(mlp())), torch.randn(4, 80)
    loss = peft(x).square().mean()
    with torch.no_grad():
        for layer in layers(peft).values():
            layer.fallow_delta["default"].values += 1
        peft(x)
    with pytest.raises(fallow.ModelError, match="between its forward and its backward"):
        loss.backward()


def test_values_written_past_autograd_are_seen_in_training_and_after_switching_modes(mlp):
    """As averages of weights and some optimizers write them."""
    peft, x = moved(sara(mlp())), torch.randn(4, 80)
    values = next(p for p in peft.parameters() if p.requires_grad)
    seen = [peft(x)]
    values.data += 1e-2
    seen.append(peft(x))
    values.data += 1e-2
    with torch.no_grad():
        seen.append(peft.eval()(x))
    values.data += 1e-2
    peft.eval()
    with torch.no_grad():
        seen.append(peft(x))
    assert all(not torch.equal(a, b) for a, b in pairwise(seen))


def test_a_state_dict_holds_the_base_and_restores_all(mlp):
    peft, x = moved(sara(mlp())), torch.randn(4, 80)
    expected, base = peft(x), mlp().state_dict()
    state = copy.deepcopy(peft.state_dict())
    assert all(torch.equal(state[f"base_model.model.{i}.base_layer.weight"], base[f"{i}.weight"]) for i in (0, 2, 4))
    fresh = sara(mlp())
    fresh(x)
    fresh.load_state_dict(state)
    assert torch.equal(fresh(x), expected)
    moved(peft)
    peft.load_state_dict(state)
    assert torch.equal(peft(x), expected)
    with peft.disable_adapter():
        assert torch.equal(peft(x), mlp()(x))


def test_no_base_weight_is_cloned_and_no_dense_gradient_kept(peak_bytes):
    """Live bytes of a forward and backward: at most one layer's gradient beside the compact terms."""
    wide = 512

    def net() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(*[nn.Linear(wide, wide) for _ in range(6)])

    x, layer = torch.randn(2, wide), 4 * wide * wide
    peft = sara(net(), target_modules="all-linear")
    trained = peft.get_nb_trainable_parameters()[0]
    peft(x).square().mean().backward()
    peft.zero_grad()
    weights = {layer.parameter.data_ptr() for layer in layers(peft).values()}
    peak = peak_bytes(lambda: peft(x).square().mean().backward())
    assert peak <= layer + 16 * trained + 20 * x.numel() * 8
    gc.collect()
    tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
    alive = [t for t in tensors if t.numel() == wide * wide]
    assert {t.data_ptr() for t in alive} == weights
    assert all(t.grad is None for t in alive)
    shira = get_peft_model(
        net(), ShiraConfig(r=13, target_modules="all-linear" if False else [str(i) for i in range(6)])
    )
    shira(x).square().mean().backward()
    shira.zero_grad()
    assert shira.get_nb_trainable_parameters()[0] == pytest.approx(trained, rel=0.1)
    assert peak_bytes(lambda: shira(x).square().mean().backward()) > 6 * layer > 4 * peak


def test_an_adapter_becomes_a_sparse_one_and_comes_back(mlp, tmp_path):
    peft, x = moved(sara(mlp())), torch.randn(4, 80)
    expected = peft(x)
    peft.save_pretrained(tmp_path / "peft")
    sparse = fallow.to_sparse(peft)
    assert sparse.metadata["method"] == "sara"
    sparse.save(tmp_path / "style.safetensors")
    assert (tmp_path / "style.safetensors").stat().st_size < 6.5 * 808 + 3000
    model = mlp()
    fallow.Adapters(model).add("style", tmp_path / "style.safetensors")
    assert torch.equal(model(x), expected)
    folder = fallow.to_sparse(tmp_path / "peft", mlp())
    for name, entry in sparse.entries.items():
        assert torch.equal(folder.entries[name].index, entry.index)
        assert torch.equal(folder.entries[name].values, entry.values)
        assert folder.entries[name].fingerprint == entry.fingerprint
    back = fallow.from_sparse(tmp_path / "style.safetensors", mlp())
    assert torch.equal(back(x), expected)
    back.save_pretrained(tmp_path / "back")
    assert torch.equal(PeftModel.from_pretrained(mlp(), tmp_path / "back")(x), expected)
    fallow.from_sparse(sparse, back, "twice")
    back.base_model.set_adapter(["default", "twice"])
    with back.disable_adapter():
        assert torch.equal(back(x), mlp()(x))


def test_what_the_optimizer_trained_becomes_a_peft_adapter_where_it_is_weights_alone(mlp):
    model, x = mlp(), torch.randn(4, 80)
    optimizer = fallow.SaRA(model, fraction=0.05, include=r"weight$", lr=1e-2)
    model(x).square().mean().backward()
    optimizer.step()
    peft = fallow.from_sparse(optimizer.delta(), mlp())
    torch.testing.assert_close(peft(x), model(x), rtol=1e-6, atol=1e-7)
    with pytest.raises(fallow.AdapterError, match="trained on another base"):
        fallow.from_sparse(optimizer.delta(), mlp(seed=1))
    biased = fallow.SaRA(mlp(), fraction=0.05)
    with pytest.raises(fallow.AdapterError, match=r"changes '\d.bias', which is no module's weight"):
        fallow.from_sparse(biased.delta(), mlp())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"threshold": 0.0}, "threshold=0.0 selects no weight"),
        ({"fraction": 0.1, "budget": 3}, "exactly one of threshold, fraction, budget"),
        ({"fraction": 1.5}, r"fraction=1.5 is outside \(0, 1\]"),
        ({"rank_weight": -1.0}, "rank_weight=-1.0 must be a number > 0"),
        ({"rank_mode": "pole"}, "did you mean 'polar'"),
        ({"reselect_at": [0]}, "reselect_at=.*must be a step"),
        ({"target_modules": []}, "adapts nothing"),
        ({"layers_pattern": "h"}, "needs layers_to_transform"),
    ],
)
def test_an_impossible_config_is_refused_when_made(options, told):
    with pytest.raises(fallow.FallowError, match=told):
        fallow.SaRAConfig(**options)


def test_a_choice_that_fails_leaves_the_model_as_it_was(mlp):
    model = mlp()
    modules = [type(module) for module in model.modules()]
    with pytest.raises(fallow.SelectionError, match="selects no weight of"):
        sara(model, fraction=None, threshold=1e-12)
    with pytest.raises(fallow.SelectionError, match="has no layer to act on"):
        sara(model, target_modules=["4"], rank_weight=1e-3)
    assert [type(module) for module in model.modules()] == modules
    assert all(param.requires_grad for param in model.parameters())
    assert not hasattr(model, "peft_config")
    peft = sara(model)
    with pytest.raises(fallow.SelectionError, match="r=100 asks for 9000 entries"):
        peft.add_adapter("big", fallow.SHiRAConfig(r=100, target_modules=["4"]))
    assert list(peft.peft_config) == ["default"]
    assert peft.get_nb_trainable_parameters()[0] == 808


def test_the_documented_example_trains_saves_and_loads(mlp, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).parents[2] / "docs" / "concepts" / "peft.md"
    (example,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    x = torch.randn(4, 80)
    names = {"make": mlp, "batches": [x, x], "loss": lambda model, batch: model(batch).square().mean()}
    exec(example, names)
    assert torch.equal(names["again"](x), names["peft_model"](x))
    assert not torch.equal(names["again"](x), mlp()(x))
