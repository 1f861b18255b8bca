"""Sparse adapters on disk and in a live model."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fallow
from fallow.core.errors import AdapterError, ConfigError
from fallow.core.files import fingerprint, read_tensors, write_tensors
from fallow.core.sparse import Adapters, Entry, SparseDelta, combine, is_sparse, overlap


def net(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 30), nn.GELU(), nn.Linear(30, 5)).to(dtype)


def adapter(model: nn.Module, seed: int, density: float = 0.1, store: str = "delta") -> SparseDelta:
    rng = torch.Generator().manual_seed(seed)
    entries = {}
    for name, param in model.named_parameters():
        index = (torch.rand(param.numel(), generator=rng) < density).nonzero().view(-1).int()
        change = torch.randn(index.numel(), generator=rng) * 0.1
        if store == "value":
            change = (param.detach().reshape(-1)[index.long()].float() + change).to(param.dtype)
        dtype = str(param.dtype).removeprefix("torch.")
        entries[name] = Entry(index, change, tuple(param.shape), dtype, fingerprint(param))
    return SparseDelta(entries, store, {"method": "test", "lr": 1e-3})


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def plus(model: nn.Module, *parts: tuple[SparseDelta, float]) -> dict[str, Tensor]:
    """The reference: dense float32 sums, rounded once."""
    out = {}
    for name, param in model.named_parameters():
        total = param.detach().float().reshape(-1).clone()
        for delta, scale in parts:
            total.index_add_(0, delta.entries[name].index.long(), delta.entries[name].values, alpha=scale)
        out[name] = total.view(param.shape).to(param.dtype)
    return out


@pytest.mark.parametrize("place", ["a.safetensors", "adapter"])
@pytest.mark.parametrize("store", ["delta", "value"])
@pytest.mark.parametrize("density", [0.001, 0.1, 0.6])
def test_what_is_saved_is_what_is_loaded(tmp_path, place, store, density):
    delta = adapter(net(), 1, density, store)
    path = delta.save(tmp_path / place)
    assert is_sparse(path)
    back = SparseDelta.load(path)
    assert (back.store, back.metadata, back.trained) == (store, delta.metadata, delta.trained)
    for name, entry in delta.entries.items():
        other = back.entries[name]
        assert torch.equal(other.index, entry.index)
        assert torch.equal(other.values, entry.values)
        assert (other.shape, other.dtype, other.fingerprint) == (entry.shape, entry.dtype, entry.fingerprint)


def test_a_directory_has_a_config_and_a_card_and_replaces_an_older_adapter_only(tmp_path):
    delta = adapter(net(), 1)
    folder = delta.save(tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["kind"], config["method"], config["trained"]) == ("sparse", "test", delta.trained)
    assert f"{delta.trained:,} entries" in (folder / "README.md").read_text()
    adapter(net(), 2).save(folder)
    assert not torch.equal(SparseDelta.load(folder).entries["0.weight"].index, delta.entries["0.weight"].index)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.png").touch()
    with pytest.raises(AdapterError, match="in use by something that is no adapter"):
        delta.save(tmp_path / "photos")
    assert (tmp_path / "photos" / "me.png").exists()
    (tmp_path / "file").touch()
    with pytest.raises(AdapterError, match="is a file; give"):
        delta.save(tmp_path / "file")


def test_five_bytes_an_entry_in_float32_and_three_in_bfloat16(tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(512, 512, bias=False)
    delta = adapter(model, 1, 0.05)
    whole, half = delta.save(tmp_path / "a.safetensors"), delta.save(tmp_path / "b.safetensors", torch.bfloat16)
    assert whole.stat().st_size < 5.1 * delta.trained + 1000
    assert half.stat().st_size < 3.1 * delta.trained + 1000
    values = SparseDelta.load(half).entries["weight"].values
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, delta.entries["weight"].values, rtol=2**-8, atol=0)
    with pytest.raises(ConfigError, match=r"must be torch.float32 or torch.bfloat16"):
        delta.save(tmp_path / "c.safetensors", torch.int8)


def test_broken_files_are_told_and_never_half_loaded(tmp_path):
    path = adapter(net(), 1).save(tmp_path / "a.safetensors")
    tensors, header = read_tensors(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    with pytest.raises(AdapterError, match="cut off"):
        SparseDelta.load(path)
    assert not is_sparse(path)

    def broken(message: str, changed: dict[str, Tensor], metadata: dict[str, str] = header) -> None:
        write_tensors(path, changed, metadata)
        with pytest.raises(AdapterError, match=message):
            SparseDelta.load(path)

    broken("'0.weight' lacks", {k: v for k, v in tensors.items() if k != "0.weight.delta"})
    broken("values for", {**tensors, "0.weight.delta": tensors["0.weight.delta"][:-1]})
    broken("broken at '2.bias'.*does not fit 5", {**tensors, "2.bias.idx": torch.full((3,), 200, dtype=torch.uint8)})
    broken("no sparse adapter", tensors, {"format": "pt"})
    broken("version 99", tensors, {**header, "version": "99"})
    broken("broken metadata", tensors, {**header, "fallow": "{"})
    with pytest.raises(AdapterError, match=r"no adapter_model.safetensors"):
        SparseDelta.load(tmp_path)
    with pytest.raises(AdapterError, match="does not exist"):
        SparseDelta.load(tmp_path / "b.safetensors")


def test_an_adapter_knows_its_base(tmp_path):
    delta = adapter(net(0), 1)
    delta.check(net(0))
    delta.check(net(0, torch.bfloat16))
    with pytest.raises(AdapterError, match=r"trained on another base: '0.weight' holds other values"):
        delta.check(net(1))
    delta.check(net(1), force=True)
    with pytest.raises(AdapterError, match=r"changes '0.weight', which ModuleDict lacks"):
        delta.check(nn.ModuleDict({"a": nn.Linear(2, 2)}), force=True)
    small = nn.Sequential(nn.Linear(20, 31), nn.GELU(), nn.Linear(31, 5))
    with pytest.raises(AdapterError, match=r"'0.weight' \(30, 20\), which is \(31, 20\)"):
        delta.check(small, force=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("store", ["delta", "value"])
def test_scales_switching_and_leaving_restore_every_bit(dtype, store):
    model = net(0, dtype)
    base = weights(model)
    a, b, c = (adapter(model, seed, store=store) for seed in (1, 2, 3))
    adapters = Adapters(model)
    adapters.add("a", a)
    with_a = weights(model)
    if store == "value":
        for name, entry in a.entries.items():
            assert torch.equal(with_a[name].reshape(-1)[entry.index.long()], entry.values)
    adapters.add("b", b, scale=0.5)
    adapters.add("c", c, scale=0.0)
    both = weights(model)
    adapters.switch("c")
    adapters.switch("a")
    assert same(weights(model), with_a)
    adapters.set_scales({"a": 1.0, "b": 0.5})
    assert same(weights(model), both)
    with adapters.disabled():
        assert same(weights(model), base)
        adapters.remove("b")
    assert same(weights(model), with_a)
    adapters.set_scales({"a": -2.5})
    adapters.unload()
    assert same(weights(model), base)
    assert adapters.scales == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_are_the_sum_of_their_changes_rounded_once(dtype):
    model = net(0, dtype)
    a, b, c = (adapter(model, seed) for seed in (1, 2, 3))
    expected = plus(model, (a, 0.6), (b, -0.3), (c, 1.4))
    adapters = Adapters(model)
    for name, delta in (("a", a), ("b", b), ("c", c)):
        adapters.add(name, delta, scale=0.0)
    adapters.set_scales({"a": 0.6, "b": -0.3, "c": 1.4})
    assert same(weights(model), expected)
    adapters.merge()
    assert same(weights(model), expected)
    assert adapters.scales == {}


def test_an_adapter_that_does_not_fit_changes_nothing():
    model = net(0)
    good, foreign = adapter(model, 1), adapter(net(9), 2)
    adapters = Adapters(model)
    adapters.add("good", good)
    before = weights(model)
    with pytest.raises(AdapterError, match="another base"):
        adapters.add("foreign", foreign)
    with pytest.raises(ConfigError, match=r"there is an adapter 'good' already"):
        adapters.add("good", good)
    for call in (lambda: adapters.switch("god"), lambda: adapters.set_scales({"god": 1.0})):
        with pytest.raises(ConfigError, match=r"no adapter 'god'.*did you mean 'good'"):
            call()
    with pytest.raises(ConfigError, match="scale=nan"):
        adapters.set_scales({"good": float("nan")})
    assert same(weights(model), before)
    adapters.add("foreign", foreign, force=True)
    assert set(adapters.scales) == {"good", "foreign"}


def test_combined_adapters_are_their_weighted_sum(tmp_path):
    model = net(0)
    a, b = adapter(model, 1), adapter(model, 2)
    both = combine([(a, 0.6), (b, -1.0)])
    assert both.trained == sum(
        len(set(a.entries[name].index.tolist()) | set(b.entries[name].index.tolist())) for name in a.entries
    )
    expected = plus(model, (a, 0.6), (b, -1.0))
    adapters = Adapters(model)
    adapters.add("both", SparseDelta.load(both.save(tmp_path / "both.safetensors")))
    for name, value in weights(model).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-7)
    with pytest.raises(AdapterError, match=r"different bases: '0.weight'"):
        combine([(a, 1.0), (adapter(net(5), 2), 1.0)])
    with pytest.raises(AdapterError, match=r"store='value'"):
        combine([(adapter(net(0), 1, store="value"), 1.0)])
    with pytest.raises(ConfigError, match="nothing to combine"):
        combine([])


def test_overlap_counts_shared_entries_and_the_angle_between_changes():
    model = net(0)
    a, b = adapter(model, 1, 0.3), adapter(model, 2, 0.3)
    found = overlap(a, b)
    for name, param in model.named_parameters():
        one, other = (torch.zeros(param.numel()) for _ in range(2))
        for dense, delta in ((one, a), (other, b)):
            dense[delta.entries[name].index.long()] = delta.entries[name].values
        assert found[name]["shared"] == int(((one != 0) & (other != 0)).sum())
        assert found[name]["cosine"] == pytest.approx(float(torch.cosine_similarity(one, other, dim=0)), abs=1e-6)
    assert found[""]["first"] == a.trained
    itself = overlap(a, a)[""]
    assert itself["shared"] == a.trained
    assert itself["cosine"] == pytest.approx(1.0)


def test_tied_weights_are_changed_once():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.tokens, self.readout = nn.Embedding(12, 6), nn.Linear(6, 12, bias=False)
            self.readout.weight = self.tokens.weight

    model = Tied()
    base = model.tokens.weight.detach().clone()
    optimizer = fallow.SaRA(model, fraction=0.2, lr=0.1)
    model.readout(model.tokens(torch.arange(12))).square().sum().backward()
    optimizer.step()
    delta, trained = optimizer.delta(), model.tokens.weight.detach().clone()
    fresh = Tied()
    adapters = Adapters(fresh)
    adapters.add("a", delta)
    torch.testing.assert_close(fresh.readout.weight.detach(), trained, rtol=0, atol=1e-6)
    adapters.unload()
    assert torch.equal(fresh.tokens.weight.detach(), base)


def test_a_foreign_safetensors_file_is_not_taken_for_an_adapter(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    assert load_file(tmp_path / "a.safetensors")
    assert not is_sparse(tmp_path / "a.safetensors")
    assert not is_sparse(tmp_path / "nowhere")
    model = net()
    with pytest.raises(AdapterError, match="no sparse adapter"):
        Adapters(model).add("a", tmp_path / "a.safetensors")
    assert copy.deepcopy(model.state_dict()).keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    ("described", "says"),
    [
        ({"shape": [10**12, 10**12]}, "that of no tensor"),
        ({"shape": [10**30]}, "its shape .* is none"),
        ({"shape": [-30, 20]}, "its shape .* is none"),
        ({"shape": [30.0, 20]}, "its shape .* is none"),
        ({"shape": "30x20"}, "its shape '30x20' is none"),
        ({"shape": [2, 2]}, "does not fit 4 entries"),
        ({"dtype": "load"}, "its dtype 'load' is none of float32"),
        ({"dtype": None}, "its dtype None is none of"),
        ({"base": 7}, "base is 7, which is no text"),
    ],
)
def test_what_a_hostile_header_claims_is_refused_by_name(tmp_path, described, says):
    path = adapter(net(), 1).save(tmp_path / "a.safetensors")
    tensors, header = read_tensors(path)
    told = json.loads(header["fallow"])
    told["tensors"]["0.weight"] |= described
    write_tensors(path, tensors, {**header, "fallow": json.dumps(told)})
    with pytest.raises(AdapterError, match=rf"broken at '0.weight': .*{says}"):
        SparseDelta.load(path)


def test_values_that_are_no_numbers_are_neither_loaded_nor_saved(tmp_path):
    delta = adapter(net(), 1)
    path = delta.save(tmp_path / "a.safetensors")
    tensors, header = read_tensors(path)
    tensors["2.weight.delta"][3] = float("nan")
    write_tensors(path, tensors, header)
    with pytest.raises(AdapterError, match=r"1 of the \d+ values of '2.weight' are NaN or infinite"):
        SparseDelta.load(path)
    delta.entries["0.bias"].values[0] = float("inf")
    with pytest.raises(AdapterError, match=r"values of '0.bias' are NaN or infinite"):
        delta.save(tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()


def test_a_change_that_the_models_dtype_cannot_hold_is_refused(tmp_path):
    model = net(dtype=torch.float16)
    delta = adapter(model, 1)
    delta.entries["0.weight"].values[0] = 6e4
    with pytest.raises(AdapterError, match=r"'0.weight' by 60000, which is more than torch.float16 can hold"):
        Adapters(model).add("a", delta)


def test_tensors_that_nothing_tells_of_and_metadata_that_are_no_table_are_refused(tmp_path):
    path = adapter(net(), 1).save(tmp_path / "a.safetensors")
    tensors, header = read_tensors(path)
    write_tensors(path, {**tensors, "../../etc/passwd": torch.zeros(1)}, header)
    with pytest.raises(AdapterError, match=r"it holds '../../etc/passwd', which its metadata do not tell of"):
        SparseDelta.load(path)
    for text in ("[" * 50_000, '{"store": "delta", "store": "value", "tensors": {}}', '{"store": NaN}'):
        write_tensors(path, tensors, {**header, "fallow": text})
        with pytest.raises(AdapterError, match="has broken metadata"):
            SparseDelta.load(path)
