"""Deltas in a model without PEFT: in place, off again, and loud where something cannot be."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fallow
from fallow.core import schedule
from fallow.core.delta import Delta, MethodOptions
from fallow.core.errors import AdapterError, ConfigError, FallowError, ModelError, TrainingError
from fallow.core.files import read_tensors
from fallow.core.host.layer import sites


class Stretch(Delta):
    """W' = W diag(exp(s)); counts its steps, and has a penalty."""

    name = "host-test-stretch"

    def setup(self, site: Any) -> None:
        self.s = nn.Parameter(torch.zeros(site.shape[1]))
        self.steps: list[tuple[int, int | None]] = []

    def transform(self, w: Tensor) -> Tensor:
        return w * self.s.exp().to(w.dtype)

    def loss(self) -> Tensor:
        return self.s.square().sum()

    def on_step(self, step: int, total: int | None) -> None:
        self.steps.append((step, total))


class Gate(Delta):
    """y' = y + g (x a) for a Linear, times a value given for the forward; lives on input and output."""

    name = "host-test-gate"
    supports = ("linear",)

    def setup(self, site: Any) -> None:
        self.a = nn.Parameter(torch.zeros(site.shape[1]))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + (x @ self.a).unsqueeze(-1) * self.context.get("strength", 1.0)


class Pooled(Delta):
    """D = gain * u vᵀ; all layers share u, frozen and drawn from the seed, and v, trained."""

    name = "host-test-pooled"
    supports = ("linear",)

    @dataclasses.dataclass(kw_only=True)
    class Options(MethodOptions):
        width: int = 64

    def setup(self, site: Any) -> None:
        width = self.o.width
        self.share("u", site, lambda: torch.randn(width, generator=site.generator("u", shared=True)))
        self.share("v", site, lambda: nn.Parameter(torch.randn(width)))
        self.gain = nn.Parameter(torch.zeros(1))

    def factors(self) -> tuple[Tensor, Tensor]:
        out, inner = self.view.shape
        return self.shared("u")[:out].unsqueeze(1) * self.gain, self.shared("v")[:inner].unsqueeze(0)


@pytest.fixture(autouse=True)
def plain_attention():
    """torch's fused attention rounds otherwise than its plain one, which it takes where gradients are needed."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 4)).to(dtype)


def changed(model: nn.Module, *names: str) -> nn.Module:
    """With every Delta (of these adapters) away from its start."""
    for _, site in sites(model):
        for name, delta in site.items():
            if not names or name in names:
                delta.randomize()
    return model


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "classes": {name: type(module) for name, module in model.named_modules()},
        "hooks": sum(len(module._forward_pre_hooks) for module in model.modules()),
        "trained": [name for name, param in model.named_parameters() if param.requires_grad],
        "values": {name: value.clone() for name, value in model.state_dict().items()},
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    now = snapshot(model)
    assert all(now[key] == before[key] for key in ("classes", "hooks", "trained"))
    assert now["values"].keys() == before["values"].keys()
    for name, value in before["values"].items():
        assert torch.equal(now["values"][name], value), name


@torch.no_grad()
def says(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    return getattr(out, "logits", out)


X = torch.randn(3, 8, generator=torch.Generator().manual_seed(5))
IDS = torch.randint(32, (2, 6), generator=torch.Generator().manual_seed(5))


# -- on and off -------------------------------------------------------------------------------------------------------


def test_attaching_changes_no_name_no_weight_and_no_output_and_detaching_leaves_nothing(zoo):
    model = zoo().eval()
    model.head.bias.requires_grad_(False)
    before, said = snapshot(model), says(model, IDS)
    fallow.attach(model, "lora", "all-layers", rank=2)
    fallow.attach(model, "lora", ["experts", "head"], "second", rank=1)
    assert isinstance(model, zoo)
    assert isinstance(model.conv, nn.Conv2d)
    assert before["values"].keys() <= model.state_dict().keys()
    assert all("adapters" in name for name, param in model.named_parameters() if param.requires_grad)
    torch.testing.assert_close(says(model, IDS), said)  # torch's attention rounds otherwise for frozen weights
    assert list(inspect.signature(model.forward).parameters) == ["ids"]
    assert fallow.detach(model) is model
    assert_unchanged(model, before)
    assert torch.equal(says(model, IDS), said)


def test_training_moves_the_adapter_and_not_one_bit_of_the_base():
    model = net()
    base = {name: value.clone() for name, value in model.state_dict().items()}
    fallow.attach(model, "lora", rank=2)
    optimizer = torch.optim.SGD([param for param in model.parameters() if param.requires_grad], 0.5)
    losses = []
    for _ in range(8):
        loss = (model(X) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(model.state_dict()[name], value) for name, value in base.items())


@pytest.mark.parametrize("make", [lambda m: copy.deepcopy(m), lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_an_adapted_model_is_one_of_its_own(zoo, make):
    model = changed(fallow.attach(zoo().eval(), "lora", ["attention", "head", "tokens"], rank=2))
    other = make(model)
    assert torch.equal(says(other, IDS), says(model, IDS))
    said = says(model, IDS)
    fallow.detach(other)
    assert type(other) is zoo
    assert torch.equal(says(model, IDS), said)


def test_an_adapted_layer_takes_its_input_by_name_and_stays_usable_by_its_attributes():
    layer = changed(fallow.attach(nn.Linear(8, 4), "lora", ".*", rank=2))
    assert torch.equal(layer(input=X), layer(X))
    assert layer.in_features == 8
    assert "default.A" in dict(layer.adapters.named_parameters())


@pytest.mark.parametrize("method", ["lora", Stretch])
def test_it_compiles_into_one_graph(method):
    model = changed(fallow.attach(net(), method, **({"rank": 2} if method == "lora" else {})))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), model(X))
    compiled(X).sum().backward()
    assert fallow.check_gradients(compiled) == 3


# -- targets ----------------------------------------------------------------------------------------------------------


def keys(model: nn.Module) -> list[str]:
    return [site.key for _, site in sites(model)]


def test_targets_are_presets_last_parts_of_names_or_one_expression_for_whole_names(zoo, tiny_gpt2):
    linear = ["attention.in_proj_weight", "attention.out_proj", "readout", "head"]
    cases = {
        "all-linear": linear,
        "all-layers": ["tokens", *linear[:2], "conv", "head"],
        ("head", "conv"): ["conv", "head"],
        ("attention",): linear[:2],
        ("out_proj",): ["attention.out_proj"],
        ("experts",): ["experts"],
        "h.*|attention": [*linear[:2], "head"],
    }
    for targets, wanted in cases.items():
        model = fallow.attach(zoo(tied=targets == "all-layers"), "lora", targets, rank=2)
        assert sorted(keys(model)) == sorted(wanted), targets
    gpt2 = fallow.attach(tiny_gpt2(), "lora", rank=2)
    assert len(keys(gpt2)) == 8
    assert not any("lm_head" in key or "wte" in key for key in keys(gpt2))
    some = fallow.attach(tiny_gpt2(), "lora", exclude=["c_proj"], rank=2)
    assert {key.rpartition(".")[2] for key in keys(some)} == {"c_attn", "c_fc"}
    assert keys(fallow.attach(zoo(tied=False), Gate)) == ["readout", "head"]  # presets leave out what it cannot take


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"targets": ["heat"]}, "'heat' matches no weight.*did you mean 'head'"),
        ({"targets": ["head", "to_q"]}, "'to_q' matches no weight.*would have fitted: experts, tokens"),
        ({"targets": "eads?"}, "must match whole names.*give a list"),
        ({"targets": "["}, "no regular expression"),
        ({"targets": []}, "must be a text or names"),
        ({"targets": 3}, "targets=3 must be a text or names"),
        ({"targets": None}, "targets=None must be a text or names"),
        ({"targets": ["head"], "exclude": ["heed"]}, "exclude: 'heed' matches no weight.*head"),
        ({"targets": ["head"], "exclude": "h.*"}, "leaves nothing of Zoo that 'lora' could adapt"),
        ({"targets": ["head"], "patterns": {"conv": {"rank": 4}}}, "'conv' matches none of the targets"),
        ({"targets": ["head"], "patterns": {"head": {"rang": 4}}}, "no option rang=4"),
        ({"targets": ["head"], "rank": 11}, "rank=11 is above what 'head' of .10, 32. can have"),
        ({"targets": ["head"], "name": "a.b"}, "name='a.b' must be a word without dots"),
        ({"targets": ["head"], "name": "keys"}, "name='keys' must be a word"),
        ({"targets": ["head"], "method": "loraa"}, "did you mean 'lora'"),
        ({"targets": ["conv"], "method": Gate}, "cannot adapt 'conv', a layer of the kind 'conv'"),
    ],
)
def test_what_cannot_be_is_refused_by_name_and_the_model_stays_as_it_was(zoo, how, told):
    model = zoo()
    before = snapshot(model)
    with pytest.raises(FallowError, match=told):
        fallow.attach(model, **{"method": "lora", **({"rank": 2} if "method" not in how else {}), **how})
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda m: m.head.weight.data[0].fill_(float("nan")), "'head' holds NaN"),
        (lambda m: m.head.weight.data[1].fill_(float("inf")), "'head' holds NaN or infinite"),
        (lambda m: m.head.to("meta"), "'head' is on the meta device"),
        (
            lambda m: setattr(m.head, "weight", nn.Parameter(torch.zeros(10, 32, dtype=torch.uint8), False)),
            "'head' is quantised by another library .Parameter, torch.uint8.",
        ),
        (lambda m: setattr(m.tokens, "max_norm", 1.0), "'tokens' rewrites its own weight"),
        (lambda m: setattr(m, "adapters_shared", 1), "attribute adapters_shared of its own"),
    ],
)
def test_a_base_that_cannot_carry_it_is_refused_and_stays_as_it_was(zoo, spoil, told):
    model = zoo()
    spoil(model)
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ModelError, match=told):
        fallow.attach(model, "lora", ["tokens", "conv", "head"], rank=2)
    assert [type(module) for module in model.modules()] == classes
    assert all(param.requires_grad for param in model.parameters() if param.is_floating_point())


def test_patterns_give_layers_options_of_their_own_and_the_last_one_wins():
    patterns = {"2|4": {"rank": 3}, "4": {"rank": 1}}
    model = fallow.attach(net(), "lora", rank=2, patterns=patterns)
    ranks = {site.key: site["default"].A.shape[0] for _, site in sites(model)}
    assert ranks == {"0": 2, "2": 3, "4": 1}


def test_a_model_inside_one_with_adapters_or_around_one_is_told_of():
    model = nn.ModuleDict({"inner": net()})
    fallow.attach(model["inner"], "lora", rank=2)
    with pytest.raises(ModelError, match="Sequential inside this ModuleDict has adapters already"):
        fallow.attach(model, "lora", rank=2, name="outer")
    fallow.set_scale(model, 0.5)  # what is not about attaching finds them inside a wrapper
    assert model["inner"][0].adapters.scale == {"default": 0.5}
    with pytest.raises(ConfigError, match=r"Linear has no adapter; fallow.attach"):
        fallow.merge(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=r"there is no adapter 'defalt'.*'default'"):
        fallow.activate(model, "defalt")


# -- weights that modules read themselves, and shared ones ------------------------------------------------------------


def with_changes(model: nn.Module) -> nn.Module:
    """A plain copy of the adapted model whose weights have the changes in them."""
    other = copy.deepcopy(model)
    fallow.merge(other)
    return fallow.detach(other)


@pytest.mark.parametrize("method", ["lora", Stretch])
@pytest.mark.parametrize("targets", [["attention"], ["experts"], ["tokens"], ["readout"], "all-layers"])
def test_every_module_runs_with_the_changed_weight_and_gradients_are_those_of_it(zoo, method, targets):
    model = zoo().double().eval()
    changed(fallow.attach(model, method, targets, **({"rank": 2} if method == "lora" else {})))
    plain = with_changes(model)
    torch.testing.assert_close(says(model, IDS), says(plain, IDS), rtol=1e-9, atol=1e-11)
    model(IDS).square().sum().backward()
    plain.requires_grad_(True)
    plain(IDS).square().sum().backward()
    assert fallow.check_gradients(model) == len(keys(model))
    for _, site in sites(model):
        name = site.key if site.key in dict(plain.named_parameters()) else f"{site.key}.weight"
        name = name.replace("readout", "tokens")  # by which torch names the shared weight
        delta = site["default"]
        base = site.view.read(model.get_parameter(name).detach())
        dense = site.view.read(plain.get_parameter(name).grad)
        params = list(delta.parameters())
        expected = torch.autograd.grad(delta.new_weight(base), params, dense)
        for param, grad in zip(params, expected, strict=True):
            torch.testing.assert_close(param.grad, grad, rtol=1e-8, atol=1e-10)


def test_a_shared_weight_is_adapted_once_and_both_of_its_modules_run_it(zoo):
    model = fallow.attach(zoo().eval(), "lora", ["tokens", "readout"], rank=2)
    assert keys(model) == ["tokens"]
    assert sum("adapters" in name for name, _ in model.named_parameters()) == 2
    only = {}
    for module in ("tokens", "readout"):
        other = changed(copy.deepcopy(model))
        seen = []
        other.get_submodule(module).register_forward_hook(lambda m, x, y, seen=seen: seen.append((x[0], y)))
        other(IDS)
        ((x, y),) = seen
        only[module] = float((y - says_plain(other, module, x)).detach().abs().max())
    assert min(only.values()) > 1e-3


def says_plain(model: nn.Module, module: str, x: Tensor) -> Tensor:
    with fallow.disabled(model), torch.no_grad():
        return model.get_submodule(module)(x)


def test_an_adapter_of_input_and_output_leaves_the_other_module_of_a_shared_weight_alone(zoo):
    model = fallow.attach(zoo(), Gate, ["readout"])
    assert keys(model) == ["readout"]
    assert type(model.tokens) is nn.Embedding
    with pytest.raises(ModelError, match="shares a weight that another adapter changes"):
        fallow.attach(fallow.attach(zoo(), "lora", ["tokens"], rank=2), Gate, ["readout"], "gate")


def test_the_fast_path_of_torchs_encoder_in_inference_does_not_pass_the_adapter_by():
    torch.backends.mha.set_fastpath_enabled(True)
    torch.manual_seed(0)
    make = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(make, 2).eval()
    x, padding = torch.randn(2, 5, 16), torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    for targets in (["linear1"], ["self_attn"]):
        model = changed(fallow.attach(copy.deepcopy(encoder), "lora", targets, rank=2))
        with torch.no_grad():
            quick = model(x, src_key_padding_mask=padding)
        slow = model.train()(x, src_key_padding_mask=padding)
        torch.testing.assert_close(quick[~padding], slow[~padding], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(slow, encoder.train()(x, src_key_padding_mask=padding), atol=1e-3)
        fallow.detach(model.eval())
        assert not any(module._forward_pre_hooks for module in model.modules())
        assert model.use_nested_tensor


# -- merging, scales, several -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_is_unmerged_and_unmerging_and_disabling_are_bit_exact(dtype):
    model = fallow.attach(net(dtype), "lora", rank=2)
    base = {name: value.clone() for name, value in model.state_dict().items() if "adapters" not in name}
    x = X.to(dtype)
    with fallow.disabled(model):
        plain = says(model, x)
    said = says(changed(model), x)
    fallow.merge(model)
    torch.testing.assert_close(says(model, x), said, rtol=1e-5 if dtype == torch.float32 else 0.1, atol=0.05)
    assert not torch.equal(says(model, x), plain)
    merged = says(model, x)
    with fallow.disabled(model):
        assert torch.equal(says(model, x), plain)
        with fallow.disabled(model):
            assert torch.equal(says(model, x), plain)
        assert torch.equal(says(model, x), plain)
    assert torch.equal(says(model, x), merged)
    fallow.unmerge(model)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in base.items())
    assert torch.equal(says(model, x), said)


def test_adapters_of_several_methods_act_in_their_order_and_merge_as_they_act():
    model = fallow.attach(net(), "lora", rank=2)
    fallow.attach(model, Stretch, name="stretch")
    changed(model)
    alone = says(model, X)
    fallow.activate(model, "default", "stretch")
    fallow.set_scale(model, 0.5)
    both = says(model, X)
    fallow.activate(model, "stretch")
    assert torch.equal(says(model, X), alone)
    fallow.activate(model, "stretch", "default")
    fallow.merge(model, "stretch")
    torch.testing.assert_close(says(model, X), alone, rtol=1e-5, atol=1e-6)
    fallow.merge(model, "default")  # beside what is merged; both act on the one base
    torch.testing.assert_close(says(model, X), both, rtol=1e-5, atol=1e-5)
    for refused in (
        lambda: fallow.activate(model, "default"),
        lambda: fallow.set_scale(model, 0.1),
        lambda: fallow.detach(model, "default"),
        lambda: fallow.attach(model, "lora", name="third", rank=1),
        lambda: fallow.mixed(model, ["default"]).__enter__(),
    ):
        with pytest.raises(ConfigError, match="'stretch', 'default' are merged; call unmerge"):
            refused()
    with pytest.raises(ConfigError, match="merge: 'default' is not active or merged already"):
        fallow.merge(model, "default")
    fallow.unmerge(model)
    fallow.detach(model, "default")
    assert torch.equal(says(model, X), alone)
    fallow.merge(model)
    merged = says(model, X)
    assert type(fallow.detach(model)[0]) is nn.Linear
    assert torch.equal(says(model, X), merged)


def test_a_scale_counts_the_change_and_must_be_a_number():
    model = changed(fallow.attach(nn.Linear(8, 4), "lora", ".*", rank=2))
    with fallow.disabled(model):
        base = says(model, X)
    whole = says(model, X)
    fallow.set_scale(model, 0.25)
    torch.testing.assert_close(says(model, X), base + 0.25 * (whole - base))
    for bad in (float("nan"), "1", True):
        with pytest.raises(ConfigError, match="must be a finite number"):
            fallow.set_scale(model, bad)


def test_what_cannot_merge_is_refused_before_a_weight_is_written():
    model = fallow.attach(net(), "lora", ["0"], rank=2)
    fallow.attach(model, Gate, ["2"], "gate")
    fallow.activate(model, "default", "gate")
    base = [value.clone() for value in changed(model).state_dict().values()]
    with pytest.raises(ConfigError, match="'host-test-gate' at '2' acts on the layer's input and output"):
        fallow.merge(model)
    assert all(torch.equal(now, value) for now, value in zip(model.state_dict().values(), base, strict=True))
    fallow.merge(model, "default")
    said = says(model, X)
    fallow.unmerge(model)
    fallow.activate(model, "default")
    with torch.no_grad():
        model[4].weight.data.copy_(model[4].weight)
    torch.testing.assert_close(says(model, X), said, rtol=1e-5, atol=1e-6)


def test_a_merge_that_would_not_be_finite_leaves_the_model_as_it_was():
    model = changed(fallow.attach(net(torch.float16), "lora", rank=2))
    said = [param.clone() for param in model.parameters()]
    model[4].adapters.default.B.data.fill_(1e30)
    said = [param.clone() for param in model.parameters()]
    with pytest.raises(ModelError, match=r"makes the weight of '4' NaN or infinite in torch.float16"):
        fallow.merge(model)
    assert all(torch.equal(param, value) for param, value in zip(model.parameters(), said, strict=True))
    assert model[0].adapters.merged == []
    assert len(model[0].adapters.acting) == 1


def test_each_sample_of_a_mixed_batch_has_its_own_adapter():
    model = fallow.attach(net(), "lora", rank=2)
    fallow.attach(model, Stretch, ["0", "4"], "stretch")
    changed(model)
    wanted = {}
    for name in ("default", "stretch"):
        fallow.activate(model, name)
        wanted[name] = says(model, X)
    with fallow.disabled(model):
        wanted["__base__"] = says(model, X)
    names = ["stretch", "__base__", "default"]
    fallow.activate(model, "stretch", "default")  # both are trained
    with fallow.mixed(model, names):
        said = model(X)
    said.sum().backward()
    fallow.activate(model, "stretch")
    for row, name in enumerate(names):
        torch.testing.assert_close(said[row], wanted[name][row])
    assert model[2].adapters.default.A.grad.abs().sum() > 0
    torch.testing.assert_close(says(model, X), wanted["stretch"])
    with pytest.raises(ConfigError, match=r"has 2 names, but a layer is given 3 rows"), fallow.mixed(model, names[:2]):
        model(X)
    with pytest.raises(ConfigError, match="there is no adapter 'strech'"), fallow.mixed(model, ["strech"] * 3):
        model(X)
    torch.testing.assert_close(says(model, X), wanted["stretch"])


def test_a_weight_that_its_module_reads_cannot_be_mixed(zoo):
    model = fallow.attach(zoo(), "lora", ["experts"], rank=2)
    told = "'experts' is read by its module as a whole"
    with pytest.raises(ConfigError, match=told), fallow.mixed(model, ["default", "__base__"]):
        model(IDS)


# -- files ------------------------------------------------------------------------------------------------------------


def saved(tmp_path: Path, zoo: Any) -> tuple[Path, Any, Tensor]:
    model = zoo().eval()
    base = copy.deepcopy(model)
    fallow.attach(model, "lora", "all-layers", rank=2, patterns={"conv": {"rank": 3}})
    fallow.attach(model, "lora", ["experts"], "other", rank=1)
    fallow.activate(model, "default")
    changed(model)
    return fallow.save(model, tmp_path / "adapter"), base, says(model, IDS)


def test_a_saved_adapter_acts_on_a_fresh_base_as_before(zoo, tmp_path):
    path, base, said = saved(tmp_path, zoo)
    assert sorted(file.name for file in path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((path / "adapter_config.json").read_text())
    assert config["method"] == "lora"
    assert config["weights"]["conv"]["options"] == {"rank": 3}
    assert "tokens.adapters.A" in load_file(path / "adapter_model.safetensors")
    for place in (path, path / "adapter_model.safetensors"):
        model = fallow.load(copy.deepcopy(base), place, "loaded")
        assert torch.equal(says(model, IDS), said)
        assert all(param.requires_grad == ("adapters" in name) for name, param in model.named_parameters())
    fallow.merge(model)
    again = fallow.save(model, tmp_path / "again.safetensors", "loaded")  # of the base, not of what is merged
    assert torch.equal(says(fallow.load(copy.deepcopy(base), again), IDS), said)


def test_shared_tensors_are_saved_once_and_frozen_random_ones_not_at_all(tmp_path):
    model = changed(fallow.attach(net(), Pooled, seed=3))
    with torch.no_grad():
        model.adapters_shared.default.v.add_(1.0)
    tensors, _ = read_tensors(fallow.save(model, tmp_path / "pool.safetensors"))
    assert sorted(tensors) == ["0.adapters.gain", "2.adapters.gain", "4.adapters.gain", "adapters_shared.v"]
    other = fallow.load(net(), tmp_path / "pool.safetensors")
    assert torch.equal(says(other, X), says(model, X))
    assert not torch.equal(other.adapters_shared.default.u, fallow.attach(net(), Pooled).adapters_shared.default.u)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda t, h: t.pop("conv.adapters.A"), "lacks 'conv.adapters.A'"),
        (lambda t, h: t.update({"conv.adapters.C": torch.ones(1)}), "holds 'conv.adapters.C'"),
        (lambda t, h: t.update({"conv.adapters.A": torch.ones(2, 9)}), r"'conv.adapters.A' as \(2, 9\)"),
        (lambda t, h: t.update({"conv.adapters.A": torch.ones(3, 9, dtype=torch.int32)}), "torch.int32"),
        (lambda t, h: t["conv.adapters.A"].fill_(float("nan")), "NaN or infinite"),
        (lambda t, h: h.update(format="pt"), "was not written by fallow.save"),
        (lambda t, h: h.update(version="9"), "has version 9"),
        (lambda t, h: h.update(fallow="{"), "broken metadata"),
        (lambda t, h: h.update(fallow='{"method": "lora"}'), "broken metadata"),
        (lambda t, h: h.update(fallow=h["fallow"].replace('"lora"', '"lora_"')), "'lora_', which this Fallow lacks"),
        (lambda t, h: h.update(fallow=h["fallow"].replace('"lora"', '"vera"')), "no option|lacks"),
        (lambda t, h: h.update(fallow=h["fallow"].replace('"conv"', '"cone"')), "'cone', which Zoo lacks.*'conv'"),
        (lambda t, h: h.update(fallow=h["fallow"].replace("[4, 9]", "[4, 8]")), r"of \[4, 8\], which is \[4, 9\]"),
        (lambda t, h: h.update(fallow=h["fallow"].replace('"rank": 2', '"rank": 0')), "rank=0 must be"),
        (lambda t, h: h.update(fallow=h["fallow"].replace('"rank": 2', '"rank": [2]')), "rank=.2. must be"),
    ],
)
def test_a_file_that_is_not_right_is_refused_and_the_model_stays_as_it_was(zoo, tmp_path, spoil, told):
    path, base, _ = saved(tmp_path, zoo)
    tensors, header = read_tensors(path) if path.is_file() else read_tensors(path / "adapter_model.safetensors")
    spoil(tensors, header)
    save_file(tensors, tmp_path / "spoilt.safetensors", header)
    before = snapshot(base)
    with pytest.raises(AdapterError, match=told):
        fallow.load(base, tmp_path / "spoilt.safetensors")
    assert_unchanged(base, before)


def test_another_base_is_refused_unless_forced(zoo, tmp_path):
    path, base, _ = saved(tmp_path, zoo)
    with torch.no_grad():
        base.head.weight.add_(1)
    before = snapshot(base)
    with pytest.raises(AdapterError, match="trained on another base: 'head' holds other values"):
        fallow.load(base, path)
    assert_unchanged(base, before)
    fallow.load(base, path, force=True)
    half = fallow.load(zoo_like(path, zoo).to(torch.bfloat16), path)  # the same base, rounded
    assert half.head.adapters.default.A.dtype == torch.float32
    with pytest.raises(AdapterError, match="lacks"):
        fallow.load(net(), path)


def zoo_like(path: Path, zoo: Any) -> nn.Module:
    torch.manual_seed(0)
    return zoo()


def test_nothing_of_another_kind_is_written_over(tmp_path):
    model = fallow.attach(net(), "lora", rank=2)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(AdapterError, match="in use by something that is no adapter"):
        fallow.save(model, tmp_path / "notes")
    with pytest.raises(AdapterError, match="is a file"):
        fallow.save(model, tmp_path / "file")
    with torch.no_grad():
        model[0].adapters.default.A.fill_(float("nan"))
    with pytest.raises(AdapterError, match="NaN"):
        fallow.save(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


# -- in training ------------------------------------------------------------------------------------------------------


class Passing(nn.Module):
    """Has a layer that never runs, and one whose weight it reads past it."""

    def __init__(self) -> None:
        super().__init__()
        self.runs, self.idle, self.passed = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.runs(x), self.passed.weight)


def test_an_adapter_that_gets_no_gradient_is_an_error_at_the_first_step():
    model = fallow.attach(Passing(), "lora", rank=2)
    with pytest.raises(TrainingError, match="3 of 3 adapted weights"):
        fallow.check_gradients(model)
    assert fallow.step(model) == 0  # nothing to judge by yet
    model(X).sum().backward()
    with pytest.raises(TrainingError, match="2 of 3 adapted weights received no gradient: 'idle', 'passed'"):
        fallow.step(model)
    with pytest.raises(TrainingError, match="read past them"):
        fallow.check_gradients(model)
    allowed = fallow.attach(Passing(), "lora", rank=2, expect_gradients=False)
    allowed(X).sum().backward()
    fallow.step(allowed)
    fallow.detach(model)
    fallow.attach(model, "lora", exclude=["idle", "passed"], rank=2)
    model(X).sum().backward()
    assert fallow.check_gradients(model) == 1
    fallow.step(model)
    model.requires_grad_(False)
    with pytest.raises(TrainingError, match="no adapted weight is trained"):
        fallow.check_gradients(model)


def test_methods_have_their_steps_penalty_and_values_for_a_forward():
    model = fallow.attach(net(), Stretch, own_loss="manual")
    schedule.resolve(model, 5)
    model(X).sum().backward()
    assert fallow.step(model) == 1
    schedule.resume(model, 3)
    fallow.step(model)
    assert model[0].adapters.default.steps == [(1, 5), (4, 5)]
    assert fallow.penalty(model) == 0
    changed(model)
    wanted = sum(float(site["default"].s.detach().square().sum()) for _, site in sites(model))
    torch.testing.assert_close(fallow.penalty(model).item(), wanted)
    fallow.attach(model, Gate, name="gate")
    assert fallow.penalty(model) == 0  # of those that are trained
    changed(model, "gate")
    said = says(model, X)
    with fallow.condition(model, strength=0.0):
        silent = says(model, X)
    with fallow.disabled(model):
        assert torch.equal(says(model, X), silent)
    assert torch.equal(says(model, X), said)
    fallow.detach(model)
    fallow.step(model)
    with pytest.raises(ConfigError, match="no adapter to read strength"), fallow.condition(model, strength=1.0):
        model(X)


def test_a_quantised_base_is_adapted_and_not_merged_into():
    from fallow.core.quantized import quantize_

    model = net()
    quantize_(model, "int8", min_size=1)
    fallow.attach(model, "lora", rank=2)
    fallow.attach(model, Stretch, name="stretch")
    changed(model)
    assert float((says(model, X) - says(net(), X)).abs().max()) > 1e-3
    fallow.activate(model, "default", "stretch")
    model(X).sum().backward()
    assert fallow.check_gradients(model) == 6
    with pytest.raises(ModelError, match="'0' is quantised"):
        fallow.merge(model)
