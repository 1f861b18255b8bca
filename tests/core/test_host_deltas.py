"""Weight parameterizations in PEFT: everything that does not depend on the method."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn

import fallow
from fallow.core.delta import Delta, method_of
from fallow.core.peft_host.contract import check_version
from fallow.core.quantized import quantize_
from zoo import Zoo


class Experts(nn.Module):
    """Two stacks of weights that their module reads itself, as mixtures of experts hold them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 12, 8) * 0.3)
        self.down = nn.Parameter(torch.randn(3, 8, 12) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bei,eoi->beo", torch.relu(torch.einsum("bi,eoi->beo", x, self.up)), self.down).mean(1)


class Moe(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 8)
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(self.inner(x))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))


def stir(model: nn.Module, seed: int = 1) -> None:
    torch.manual_seed(seed)
    for delta in model.modules():
        if isinstance(delta, Delta):
            delta.randomize()


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(3))


# -- weights that modules read themselves -----------------------------------------------------------------------------


def test_stacks_of_experts_get_a_delta_for_each_expert(x: Tensor, tmp_path):
    torch.manual_seed(0)
    base = Moe()
    before = base(x)
    config = fallow.LoRAConfig(rank=2, target_modules=[], target_parameters=["experts.up", "experts.down"])
    model = get_peft_model(copy.deepcopy(base), config)
    assert torch.equal(model(x), before)
    assert model.get_nb_trainable_parameters()[0] == 2 * 3 * 2 * (12 + 8)
    stir(model)
    changed = model(x)
    assert difference(changed, before) > 1e-2
    changed.sum().backward()
    assert all(param.grad is not None for param in model.parameters() if param.requires_grad)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(again(x), changed)
    again.load_adapter(tmp_path, "second")
    again.set_adapter("second")
    assert torch.equal(again(x), changed)
    merged = model.merge_and_unload(safe_merge=True)
    assert list(merged.state_dict()) == list(base.state_dict())
    assert difference(merged(x), changed) < 1e-5


def test_attention_is_adapted_through_its_fused_weight_and_its_projection():
    torch.manual_seed(0)
    base = Zoo(tied=False)
    ids = torch.randint(32, (2, 6))
    config = fallow.LoRAConfig(rank=2, target_modules=["attention", "out_proj"], fused={"attention": 3})
    model = get_peft_model(copy.deepcopy(base), config)
    assert torch.equal(model(ids), base(ids))
    assert model.get_nb_trainable_parameters()[0] == 3 * 2 * (16 + 16) + 2 * (16 + 16)
    stir(model)
    for training in (True, False):  # torch has a fast path for inference that reads the weights too
        model.train(training)
        with torch.no_grad():
            changed = model(ids)
            model.merge_adapter()
            assert difference(changed, model(ids)) < 1e-5
            assert difference(changed, base(ids)) > 1e-3
            model.unmerge_adapter()
    model(ids).sum().backward()
    assert all(param.grad is not None for param in model.parameters() if param.requires_grad)


def test_blocks_that_do_not_add_up_are_refused_and_leave_the_model_as_it_was(x: Tensor):
    base = mlp()
    with pytest.raises(fallow.ConfigError, match=r"fused=\[3, 4\] does not divide the 8 rows of '0'"):
        get_peft_model(base, fallow.LoRAConfig(target_modules=["0"], rank=2, fused={"0": [3, 4]}))
    assert not any(isinstance(module, Delta) for module in base.modules())
    assert isinstance(base[0], nn.Linear)


def test_blocks_of_a_fused_weight_are_changed_each_by_itself(x: Tensor):
    base = mlp()
    model = get_peft_model(copy.deepcopy(base), fallow.LoRAConfig(target_modules=["2"], rank=2, fused={"2": 3}))
    fused = next(module for module in model.modules() if isinstance(module, Delta))
    with torch.no_grad():
        fused.parts[1].B.normal_()
    change = model.base_model.model[2].get_delta_weight("default")
    assert float(change[4:8].norm()) > 0.1
    assert float(change[:4].norm()) == float(change[8:].norm()) == 0.0


# -- tied weights -----------------------------------------------------------------------------------------------------


def test_blocks_of_a_fused_weight_act_as_the_options_of_their_method_say():
    weight, x = torch.randn(12, 8), torch.randn(3, 8)
    for name, options in (("bone", {"kind": "bat"}), ("randlora", {"form": "rewritten"}), ("dora", {})):
        network = nn.Sequential(nn.Linear(8, 12, bias=False))
        network[0].weight.data.copy_(weight)
        config = fallow.config_of(method_of(name))(rank=2, target_modules=["0"], fused={"0": 3}, **options)
        model = get_peft_model(network, config)
        for module in model.modules():
            if isinstance(module, fallow.Delta):
                module.randomize()
        with torch.no_grad():
            y = model(x)
            assert (y - x @ weight.T).abs().max() > 1e-3
            torch.testing.assert_close(model.merge_and_unload()(x), y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["lora", "bone"])
def test_a_tied_weight_is_adapted_once_and_acts_in_both_modules(method: str):
    torch.manual_seed(0)
    base = Zoo(tied=True)
    ids = torch.randint(32, (2, 6))
    config = {"lora": fallow.LoRAConfig, "bone": fallow.BoneConfig}[method](target_modules=["tokens"], rank=2)
    model = get_peft_model(copy.deepcopy(base), config)
    assert difference(model(ids), base(ids)) < 1e-6
    stir(model)
    changed = model(ids)
    deltas = [module for module in model.modules() if isinstance(module, Delta)]
    assert len(deltas) == 1
    merged = copy.deepcopy(model).merge_and_unload()
    assert merged.readout.weight is merged.tokens.weight
    assert difference(merged(ids), changed) < 1e-4
    assert difference(changed, base(ids)) > 1e-3


# -- several adapters -------------------------------------------------------------------------------------------------


def test_methods_of_every_mode_live_in_one_model_and_in_one_batch(x: Tensor):
    base = mlp()
    targets = ["0", "2"]
    model = get_peft_model(copy.deepcopy(base), fallow.LoRAConfig(target_modules=targets, rank=2), "add")
    model.add_adapter("rewrite", fallow.DoRAConfig(target_modules=targets, rank=2))
    model.add_adapter("gated", fallow.SMoRAConfig(target_modules=targets, rank=4, active=2))
    stir(model)
    model.eval()
    rows = {}
    with torch.no_grad():
        for name in ("add", "rewrite", "gated"):
            model.set_adapter(name)
            rows[name] = model(x)
        rows["__base__"] = base(x)
        names = ["add", "gated", "__base__", "rewrite", "add"]
        mixed = model(x, adapter_names=names)
    for row, name in enumerate(names):
        assert difference(mixed[row], rows[name][row]) < 1e-6
    assert len({float(rows[name].sum()) for name in rows}) == 4
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))


def test_adapters_that_are_active_together_merge_as_they_act(x: Tensor):
    base = mlp()
    model = get_peft_model(copy.deepcopy(base), fallow.LoRAConfig(target_modules=["0", "2"], rank=2), "a")
    model.add_adapter("b", fallow.DoRAConfig(target_modules=["0", "2"], rank=2))
    stir(model)
    model.base_model.set_adapter(["a", "b"])
    model.eval()
    together = model(x)
    model.merge_adapter(["a", "b"])
    assert difference(model(x), together) < 1e-5
    model.unmerge_adapter()
    weights = model.get_base_model().state_dict()
    for name, tensor in base.state_dict().items():
        assert torch.equal(weights[name.replace("0.", "0.base_layer.").replace("2.", "2.base_layer.")], tensor)


def test_chosen_entries_and_a_low_rank_act_together_but_not_with_what_rewrites(x: Tensor):
    base = mlp()
    model = get_peft_model(copy.deepcopy(base), fallow.SaRAConfig(target_modules=["0", "2"], fraction=0.2), "entries")
    model.add_adapter("low", fallow.LoRAConfig(target_modules=["0", "2"], rank=2))
    model.add_adapter("rewrite", fallow.DoRAConfig(target_modules=["0", "2"], rank=2))
    stir(model)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "entries.values" in name:
                param.add_(0.1)
    model.eval()
    changes = []
    for names in (["entries"], ["low"], ["entries", "low"]):
        model.base_model.set_adapter(names)
        layer = model.base_model.model[0]
        changes.append(layer(x) - base[0](x))
    assert difference(changes[0] + changes[1], changes[2]) < 1e-5
    together = model(x)
    model.merge_adapter(["entries", "low"])
    assert difference(model(x), together) < 1e-5
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))
    model.base_model.set_adapter(["entries", "rewrite"])
    with pytest.raises(fallow.ConfigError, match="cannot be active beside"):
        model(x)


@pytest.mark.parametrize("how", ["linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_adapters_of_different_methods_are_combined_to_a_lora_with_its_error_told(how: str, x: Tensor, tmp_path):
    base = mlp()
    model = get_peft_model(copy.deepcopy(base), fallow.LoRAConfig(target_modules=["0", "2"], rank=2), "a")
    model.add_adapter("b", fallow.BoneConfig(target_modules=["0", "2"], rank=2))
    stir(model)
    options: dict[str, Any] = {"density": 1.0} if how not in ("linear", "cat", "svd") else {}
    model.base_model.add_weighted_adapter(["a", "b"], [0.5, 2.0], "sum", how, **options)
    model.eval()
    layer = model.base_model.model[0]
    wanted = 0.5 * layer.get_delta_weight("a") + 2.0 * layer.get_delta_weight("b")
    if "ties" not in how:  # which drops entries whose signs disagree
        assert difference(layer.get_delta_weight("sum"), wanted) < 1e-5
    assert model.peft_config["sum"].made["error"] < 1e-5
    model.base_model.add_weighted_adapter(["a", "b"], [0.5, 2.0], "cut", "svd", svd_rank=1)
    best = torch.linalg.svdvals(wanted)
    left = torch.linalg.svdvals(wanted - layer.get_delta_weight("cut"))[0]
    assert abs(float(left / best[1]) - 1) < 1e-4
    assert 0.0 < model.peft_config["cut"].made["error"] < 1.0
    model.set_adapter("sum")
    changed = model(x)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "sum")
    assert difference(again(x), changed) < 1e-6


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((["a", "c"], [1.0, 1.0], "new"), "no adapter 'c'"),
        ((["a"], [1.0, 1.0], "new"), "1 adapters and 2 weights"),
        ((["a"], [1.0], "a"), "there is an adapter 'a' already"),
        ((["a"], [1.0], "new", "mean"), "combination_type='mean' must be one of"),
        ((["a"], [1.0], "new", "ties"), "density=None must be"),
        ((["a", "gated"], [1.0, 1.0], "new"), "'smora' depends on its input"),
    ],
)
def test_sums_that_cannot_be_are_refused_before_anything_changes(arguments: Any, told: str):
    model = get_peft_model(mlp(), fallow.LoRAConfig(target_modules=["0"], rank=2), "a")
    model.add_adapter("gated", fallow.SMoRAConfig(target_modules=["0"], rank=4, active=2))
    with pytest.raises(fallow.ConfigError, match=told):
        model.base_model.add_weighted_adapter(*arguments)
    assert set(model.peft_config) == {"a", "gated"}
    assert set(model.base_model.model[0].fallow_delta) == {"a", "gated"}


# -- options of single layers -----------------------------------------------------------------------------------------


def test_ranks_scales_and_any_option_are_told_by_module():
    config = fallow.LoRAConfig(
        target_modules="all-linear",
        rank=2,
        rank_pattern={"0": 3},
        alpha_pattern={"2": 7.0},
        patterns={"4": {"rank": 1}},
    )
    model = get_peft_model(mlp(), config).base_model.model
    deltas = {name: model[int(name)].fallow_delta["default"] for name in ("0", "2", "4")}
    assert {name: delta.A.shape[0] for name, delta in deltas.items()} == {"0": 3, "2": 2, "4": 1}
    assert {name: delta.scaling for name, delta in deltas.items()} == {"0": 1.0, "2": 3.5, "4": 1.0}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"rank": 0}, "rank=0 must be a whole number"),
        ({"rank": 9, "target_modules": ["0"]}, r"rank=9 is above what '0' of \(8, 6\) can have"),
        ({"rank_pattern": {"7": 2}}, "rank_pattern: '7' fits no adapted module; they are 0, 2, 4"),
        ({"patterns": {"0": {"ranks": 2}}}, "'lora' has no option ranks=2"),
        ({"patterns": {"(": {"rank": 2}}}, r"patterns: '\(' is no regular expression"),
        ({"own_loss": "always"}, "own_loss='always' must be one of"),
        ({"target_modules": None}, "target_modules=None adapts nothing"),
        ({"target_modules": "("}, r"target_modules='\(' is no regular expression"),
        ({"target_modules": 3}, "target_modules=3 must be a text or names"),
        ({"exclude_modules": [3]}, r"exclude_modules=\[3\] must be a text or names"),
        ({"target_modules": ["5"]}, r"target_modules=\['5'\] leave nothing of .* what would have fitted: 0, 2, 4"),
        ({"exclude_modules": ["0", "2", "4"]}, r"exclude_modules=\['0', '2', '4'\] leave nothing of"),
        ({"fused": {"0": 3}}, "fused=3 does not divide the 8 rows"),
    ],
)
def test_impossible_configs_are_refused_by_name_and_leave_the_model_as_it_was(given: dict[str, Any], told: str):
    base = mlp()
    before = [type(module) for module in base.modules()]
    with pytest.raises(ValueError, match=told):
        get_peft_model(base, fallow.LoRAConfig(**{"target_modules": "all-linear", "rank": 2, **given}))
    assert [type(module) for module in base.modules()] == before


def test_a_transposed_convolution_is_refused_by_name():
    base = nn.Sequential(nn.ConvTranspose2d(3, 4, 2))
    with pytest.raises(fallow.ModelError, match="ConvTranspose2d is a transposed convolution"):
        get_peft_model(base, fallow.LoRAConfig(target_modules=["0"], rank=2))
    assert isinstance(base[0], nn.ConvTranspose2d)


@pytest.mark.parametrize("config", [fallow.DoRAConfig, fallow.LoRAConfig])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_base_that_holds_nan_is_refused_whether_the_method_reads_it_or_not(config: Any, value: float):
    base = mlp()
    with torch.no_grad():
        base[0].weight[0, 0] = value
    with pytest.raises(fallow.ModelError, match="'0' holds NaN"):
        get_peft_model(base, config(target_modules=["0"], rank=2))
    assert isinstance(base[0], nn.Linear)


# -- files ------------------------------------------------------------------------------------------------------------


def saved(folder, **given: Any) -> None:
    model = get_peft_model(mlp(), fallow.LoRAConfig(**{"target_modules": ["0", "2"], "rank": 2, **given}))
    stir(model)
    model.save_pretrained(folder)


def test_a_file_of_another_base_is_refused_unless_forced(x: Tensor, tmp_path):
    saved(tmp_path)
    other = mlp()
    with torch.no_grad():
        other[0].weight.add_(0.1)
    with pytest.raises(fallow.AdapterError, match="trained on another base"):
        PeftModel.from_pretrained(other, tmp_path)
    assert isinstance(other[0], nn.Linear)
    config = PeftConfig.from_pretrained(tmp_path)
    config.check_base = False
    assert PeftModel.from_pretrained(other, tmp_path, config=config)(x).shape == (5, 4)
    assert PeftModel.from_pretrained(mlp().to(torch.bfloat16), tmp_path)(x.bfloat16()).dtype == torch.bfloat16


def test_a_model_without_the_layers_is_told_what_the_adapter_changes(tmp_path):
    saved(tmp_path)
    with pytest.raises((fallow.AdapterError, ValueError), match=r"changes '2'|shape|another base"):
        PeftModel.from_pretrained(nn.Sequential(nn.Linear(6, 8)), tmp_path)


FAULTS = {
    "missing": "the file lacks",
    "extra": "does not have",
    "misshapen": r"\(3, 3\)",
    "foreign": "no tensor of",
    "unknown": "which the model does not have",
    "infinite": "NaN or infinite",
    "whole numbers": "int32 in the file",
    "cut off": "cannot be read as safetensors",
}


def spoil(folder: Path, fault: str) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    if fault == "cut off":
        file.write_bytes(file.read_bytes()[:-5])
        return
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("2.fallow_delta.A"))
    if fault == "missing":
        tensors.pop(name)
    elif fault == "extra":
        tensors[name.replace("A", "C")] = torch.zeros(1)
    elif fault == "misshapen":
        tensors[name] = torch.zeros(3, 3)
    elif fault == "unknown":
        tensors["base_model.model.7.weight"] = torch.zeros(3, 3)
    elif fault == "infinite":
        tensors[name][0, 0] = float("inf")
    elif fault == "whole numbers":
        tensors[name] = tensors[name].int()
    else:
        tensors = {name.replace("fallow_delta.A", "lora_A.weight"): torch.zeros(3, 3)}
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_does_not_fit_is_refused_by_name_and_leaves_the_model_as_it_was(fault: str, x: Tensor, tmp_path):
    saved(tmp_path)
    spoil(tmp_path, fault)
    base = mlp()
    base[2].bias.requires_grad_(False)
    before, attributes = {name: param.requires_grad for name, param in base.named_parameters()}, set(vars(base))
    with pytest.raises(fallow.AdapterError, match=FAULTS[fault]):
        PeftModel.from_pretrained(base, tmp_path)
    assert {name: param.requires_grad for name, param in base.named_parameters()} == before
    assert [type(module) for module in base.modules()] == [type(module) for module in mlp().modules()]
    assert "peft_config" not in set(vars(base)) - attributes
    model = get_peft_model(base, fallow.RandLoRAConfig(target_modules=["0"], rank=2), adapter_name="first")
    stir(model)
    said, names = model(x), list(model.state_dict())
    with pytest.raises(fallow.AdapterError, match=FAULTS[fault]):
        model.load_adapter(tmp_path, "second")
    assert torch.equal(model(x), said)
    assert list(model.state_dict()) == names
    assert list(model.peft_config) == ["first"]


def test_an_adapter_is_exchanged_in_place_and_the_compiled_model_stays(x: Tensor, tmp_path):
    saved(tmp_path)
    model = get_peft_model(mlp(), fallow.LoRAConfig(target_modules=["0", "2"], rank=2)).eval()
    held = dict(model.named_parameters())
    fallow.hotswap(model, tmp_path)
    wanted = PeftModel.from_pretrained(mlp(), tmp_path).eval()
    assert difference(model(x), wanted(x)) == 0.0
    assert all(param is held[name] for name, param in model.named_parameters())
    saved(tmp_path / "other", rank=1)
    with pytest.raises(fallow.AdapterError, match="rank"):
        fallow.hotswap(model, tmp_path / "other")
    assert difference(model(x), wanted(x)) == 0.0
    saved(tmp_path / "scaled", alpha_pattern={"0": 7.0})  # the same shapes: only the config tells
    with pytest.raises(fallow.AdapterError, match="alpha_pattern"):
        fallow.hotswap(model, tmp_path / "scaled")
    other = mlp()
    with torch.no_grad():
        other[0].weight.add_(0.1)
    moved = get_peft_model(other, fallow.LoRAConfig(target_modules=["0", "2"], rank=2))
    with pytest.raises(fallow.AdapterError, match="another base"):
        fallow.hotswap(moved, tmp_path)
    with pytest.raises(fallow.ConfigError, match="no adapter to exchange"):
        fallow.hotswap(mlp(), tmp_path)


@pytest.mark.parametrize("method", ["lora", "vera", "dora"])
def test_an_adapter_is_exchanged_in_place_without_peft_too(method: str, x: Tensor, tmp_path):
    def attached(base: nn.Module, seed: int = 0, **options: Any) -> nn.Module:
        torch.manual_seed(seed)
        model = fallow.attach(base, method, ["0", "2"], **{"rank": 2, **options})
        stir(model, seed)
        return model.eval()

    given = attached(mlp(), 5)
    fallow.save(given, tmp_path / "given")
    model = attached(mlp())
    held, before = dict(model.named_parameters()), model(x)
    fallow.hotswap(model, tmp_path / "given")
    assert torch.equal(model(x), given(x))
    assert difference(model(x), before) > 1e-3
    assert all(param is held[name] for name, param in model.named_parameters())
    now = model(x)
    for other, told in (
        (attached(mlp(), rank=1), "rank=1 in .* where adapter 'default' has 2"),
        (fallow.attach(mlp(), method, ["0"], rank=2), "adapts '2', not both"),
        (fallow.attach(mlp(), method, ["0", "2"], rank=2, seed=9), "seed=9 in"),
        (fallow.attach(mlp(), method, ["0", "2"], rank=2, patterns={"0": {"rank": 1}}), "options={'rank': 1} in"),
        (fallow.attach(mlp(), "bone", ["0", "2"], rank=2), "method='bone' in"),
    ):
        fallow.save(other, tmp_path / "other")
        with pytest.raises(fallow.AdapterError, match=told):
            fallow.hotswap(model, tmp_path / "other")
    moved = mlp()
    with torch.no_grad():
        moved[0].weight.add_(0.1)
    with pytest.raises(fallow.AdapterError, match="another base: '0' differs"):
        fallow.hotswap(attached(moved), tmp_path / "given")
    assert torch.equal(model(x), now)
    fallow.merge(model)
    with pytest.raises(fallow.ConfigError, match="hotswap: the adapters 'default' are merged"):
        fallow.hotswap(model, tmp_path / "given")


# -- bases that are kept in codes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["int8", "nf4", "fp8"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_coded_bases_train_merge_and_come_back_to_the_same_code(mode: str, method: str):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    quantize_(base, mode)
    x = torch.randn(4, 64)
    before = base(x)
    config = {"lora": fallow.LoRAConfig, "dora": fallow.DoRAConfig}[method](rank=2, target_modules="all-linear")
    model = get_peft_model(base, config)
    assert difference(model(x), before) < 1e-5
    stir(model)
    changed = model(x)
    changed.sum().backward()
    assert all(param.grad is not None for param in model.parameters() if param.requires_grad)
    with torch.no_grad():
        changed = model(x)
        model.merge_adapter()
        assert 0.0 < difference(model(x), changed) < 0.5 * float(changed.abs().max())  # coded anew
        model.unmerge_adapter()
        assert torch.equal(model(x), changed)
        with model.disable_adapter():
            assert torch.equal(model(x), before)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_bitsandbytes_bases_train_and_come_back_to_the_packed_weight(bits: int, method: str):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    plain = nn.Linear(64, 128)
    if bits == 4:
        coded = bnb.nn.Linear4bit(64, 128, compute_dtype=torch.float32, quant_type="nf4")
    else:
        coded = bnb.nn.Linear8bitLt(64, 128, has_fp16_weights=False)
    coded.load_state_dict(plain.state_dict())
    base = nn.Sequential(coded).to("cpu")
    x = torch.randn(4, 64)
    before = base(x)
    config = {"lora": fallow.LoRAConfig, "dora": fallow.DoRAConfig}[method](rank=2, target_modules=["0"])
    model = get_peft_model(base, config)
    assert difference(model(x), before) < (1e-5 if bits == 4 else 5e-2)
    stir(model)
    model(x).sum().backward()
    assert all(param.grad is not None for param in model.parameters() if param.requires_grad)
    packed = coded.weight.data.clone()
    with torch.no_grad():
        changed = model(x)
        model.merge_adapter()
        assert difference(model(x), changed) < 0.5 * float(changed.abs().max())
        model.unmerge_adapter()
        assert torch.equal(coded.weight.data, packed)
        assert difference(model(x), changed) < 1e-5


# -- precision, copies, compilation -----------------------------------------------------------------------------------


def test_half_precision_bases_keep_float32_adapters_and_their_dtype(x: Tensor):
    model = get_peft_model(mlp().to(torch.bfloat16), fallow.LoRAConfig(target_modules=["0", "2"], rank=2))
    stir(model)
    assert {param.dtype for param in model.parameters() if param.requires_grad} == {torch.float32}
    assert model(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        model(x).float().sum().backward()
    assert all(param.grad.dtype == torch.float32 for param in model.parameters() if param.requires_grad)


def test_additive_deltas_compile_into_one_graph(x: Tensor):
    model = get_peft_model(mlp(), fallow.LoRAConfig(target_modules=["0", "2"], rank=2))
    stir(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert difference(compiled(x), model(x)) < 1e-6


def test_copies_have_shared_tensors_of_their_own(x: Tensor):
    model = get_peft_model(mlp(), fallow.VeRAConfig(target_modules=["0", "2"], rank=2))
    stir(model)
    copied = copy.deepcopy(model)
    before = model(x)
    assert torch.equal(copied(x), before)
    stir(copied, seed=5)
    assert torch.equal(model(x), before)
    assert difference(copied(x), before) > 1e-4


def test_models_take_adapters_without_a_wrapper_and_give_them_back(x: Tensor):
    base = mlp()
    plain = copy.deepcopy(base)
    inject_adapter_in_model(fallow.VeRAConfig(target_modules=["0", "2"], rank=2), base)
    stir(base)
    assert difference(base(x), plain(x)) > 1e-4
    assert "shared_deltas" in dict(base.named_children())


def test_a_term_of_the_objective_reaches_any_torch_optimizer_and_can_be_left_to_the_user(x: Tensor):
    for penalty in ("step", "manual"):
        model = get_peft_model(mlp(), fallow.PEGOConfig(target_modules=["0"], rank=1, group=2, own_loss=penalty))
        stir(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        (0.0 * model(x).sum()).backward()
        total = fallow.penalty(model)
        params = [p for p in model.parameters() if p.requires_grad]
        wanted = torch.autograd.grad(total, params, allow_unused=True)
        optimizer.step()
        for param, grad in zip(params, wanted, strict=True):
            expected = torch.zeros_like(param) if grad is None or penalty == "manual" else grad
            assert difference(param.grad, expected) < 1e-6
        assert float(total) > 0


def test_the_blocks_of_a_fused_weight_are_penalised_once(x: Tensor):
    config = fallow.PEGOConfig(target_modules=["2"], rank=1, group=2, fused={"2": 3}, own_loss="manual")
    model = get_peft_model(mlp(), config)
    stir(model)
    fused = next(module for module in model.modules() if isinstance(module, Delta))
    wanted = sum(float(part.loss()) for part in fused.parts)
    assert wanted > 0
    assert abs(float(fallow.penalty(model)) - wanted) < 1e-5 * wanted


def test_a_weight_that_two_convolutions_share_is_changed_in_each_by_its_own_stride():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv1d(4, 4, 3, stride=2, padding=1), nn.Conv1d(4, 4, 3, padding=1))
    base[1].weight = base[0].weight
    image = torch.randn(2, 4, 9)
    model = get_peft_model(copy.deepcopy(base), fallow.LoRAConfig(target_modules=["0"], rank=2))
    stir(model)
    changed = model(image)
    assert changed.shape == base(image).shape
    assert difference(model.merge_and_unload()(image), changed) < 1e-5


def test_steps_are_told_to_deltas_that_are_there_and_counted_only_then(x: Tensor):
    model = get_peft_model(mlp(), fallow.DyLoRAConfig(target_modules=["0"], rank=4))
    assert fallow.step(model) == 1
    model.delete_adapter("default")
    assert fallow.step(model) == 0


def test_versions_of_peft_outside_those_tested_are_told():
    with pytest.raises(fallow.ConfigError, match=r"PEFT 0\.20\.0 is too old for Fallow's adapters, which need 0\.21"):
        check_version("0.20.0")
    with pytest.warns(UserWarning, match=r"PEFT 0\.22\.1 is newer than 0\.21\.2"):
        check_version("0.22.1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_version("0.21.5")
