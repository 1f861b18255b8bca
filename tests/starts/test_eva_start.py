"""EVA's start against its equations: directions of the inputs, whitening, first gradients, parity with PEFT."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.eva import get_eva_state_dict
from sklearn.datasets import load_digits
from torch import nn

import fallow
from fallow.core.delta import Site
from fallow.core.errors import ConfigError, DataError
from fallow.core.statistics import Components, LayerStatistics, Statistics
from fallow.core.views import view_of
from fallow.starts.eva import EVA
from observed import layer_inputs, observed

hosts = pytest.mark.parametrize("host", ["own", "peft"])
TARGETS = ["query", "key", "value", "out"]


class Attention(nn.Module):
    """Query, key and value share their input; (B, T, 12)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.query, self.key, self.value = (nn.Linear(12, 12, bias=n > 0) for n in range(3))
        self.out = nn.Linear(12, 20)

    def forward(self, x):
        return self.out(nn.functional.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x)))


def batches(count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, 13) ** -1.0
    return [torch.randn(4, 9, 12, generator=generator) * scale + 0.3 for _ in range(count)]


def started(host, start, rank=4, **given):
    if host == "own":
        return fallow.attach(Attention(), "lora", TARGETS, rank=rank, start=start, **given)
    config = fallow.LoRAConfig(rank=rank, target_modules=TARGETS, start=start, **given)
    return get_peft_model(Attention(), config)


def deltas(model):
    found = {m.site_name.split(".")[-1]: m for m in model.modules() if isinstance(m, fallow.Delta)}
    return {name: found[name] for name in TARGETS}


@hosts
def test_a_starts_on_the_leading_directions_and_the_output_is_the_bases(host):
    x, base = batches(), Attention()
    model = started(host, EVA(observed(base, x)), alpha=8.0)
    assert torch.equal(model(x[0]), base(x[0]))
    for name, inputs in layer_inputs(base, x).items():
        delta, stacked = deltas(model)[name], torch.cat(inputs)
        assert delta.B.abs().max() == 0
        torch.testing.assert_close(delta.A @ delta.A.T, torch.eye(4), atol=1e-5, rtol=0)
        v = torch.linalg.svd(stacked - stacked.mean(0), full_matrices=False)[2][:4]
        torch.testing.assert_close((delta.A @ v.T).abs(), torch.eye(4), atol=1e-4, rtol=0)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 4 * (3 * 24 + 32)


@hosts
def test_whitened_rows_are_divided_once_also_where_layers_share_an_input(host):
    statistics = observed(Attention(), batches())
    before = {name: one.activation.directions.clone() for name, one in statistics.items()}
    model = started(host, EVA(statistics, whiten=True))
    for name, delta in deltas(model).items():
        sizes = statistics[name].activation.singular[:4]
        torch.testing.assert_close(delta.A.norm(dim=1), sizes**-0.5, rtol=1e-5, atol=0)
        assert torch.equal(statistics[name].activation.directions, before[name])
    places = {delta.A.untyped_storage().data_ptr() for delta in deltas(model).values()}
    assert len(places) == 4
    with torch.no_grad():
        deltas(model)["query"].A.zero_()
    assert deltas(model)["key"].A.abs().max() > 0


def test_layers_that_share_their_components_do_not_share_memory():
    one = observed(Attention(), batches())["query"]
    shared = Statistics(dict.fromkeys(("query", "key"), one), 3)
    sites = [Site(n, view_of(nn.Linear(12, 12)), lambda: torch.zeros(12, 12), nn.Module()) for n in shared]
    for start in (EVA(shared), EVA(shared, whiten=True)):
        a, b = (start.pair(site, 4, 1.0).a for site in sites)
        assert torch.equal(a, b)
        a.zero_()
        assert b.abs().max() > 0
        assert one.activation.directions.abs().max() > 0


@hosts
def test_a_trained_start_is_whole_again_from_its_file_without_the_data(host, tmp_path):
    model, x = started(host, EVA(observed(Attention(), batches()))), batches()[0]
    for delta in deltas(model).values():
        delta.randomize()
    said = model.eval()(x)
    if host == "own":
        fallow.save(model, tmp_path / "it")
        again = fallow.load(Attention(), tmp_path / "it")
    else:
        model.save_pretrained(tmp_path / "it")
        again = PeftModel.from_pretrained(Attention(), tmp_path / "it")
    assert torch.equal(again.eval()(x), said)
    fallow.to_lora(model, tmp_path / "plain")
    plain = PeftModel.from_pretrained(Attention(), tmp_path / "plain").eval()
    torch.testing.assert_close(plain(x), said, atol=1e-5, rtol=1e-5)


class Digits(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


def first_gradients(a_of, model, x, y):
    """|dL/dB| of each layer, B zero and A given, by plain LoRA beside the layers."""
    model, bs = copy.deepcopy(model), []
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear):
            b, a = torch.zeros(layer.out_features, 4, requires_grad=True), a_of(name)
            layer.register_forward_hook(lambda _, given, out, a=a, b=b: out + given[0] @ a.T @ b.T)
            bs.append(b)
    nn.functional.cross_entropy(model(x), y).backward()
    return torch.stack([b.grad.norm() for b in bs])


def test_the_first_gradients_are_larger_than_from_random_or_least_directions_where_nothing_is_centred():
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32)[:600], torch.tensor(labels)[:600]
    model = Digits()
    inputs = layer_inputs(model, [x])
    found = {center: observed(model, [x], 64, center) for center in (True, False)}

    def by(center, cut=slice(4)):
        return first_gradients(lambda name: found[center][name].activation.directions[cut], model, x, y)

    def orthonormal(name):
        return torch.linalg.qr(torch.randn(inputs[name][0].shape[1], 4))[0].T

    random = torch.stack([first_gradients(orthonormal, model, x, y) for _ in range(5)]).mean(0)
    uncentred, centred, least = by(False), by(True), by(False, slice(-4, None))
    assert (uncentred > 1.5 * random).all()
    assert (least < random).all()
    assert centred[0] < uncentred[0]  # pixels have a mean, which is the largest direction there is
    for name, layer_seen in inputs.items():  # the theorem: tr(A E[x xT] AT) is the largest there is
        second = layer_seen[0].T @ layer_seen[0] / len(layer_seen[0])
        a = found[False][name].activation.directions[:4]
        best = torch.linalg.eigvalsh(second)[-4:].sum()
        torch.testing.assert_close((a @ second @ a.T).trace(), best, rtol=1e-4, atol=0)
        other = found[True][name].activation.directions[:4]
        assert (other @ second @ other.T).trace() <= best * (1 + 1e-5)


def test_a_constant_input_gives_random_orthonormal_rows_and_a_flat_direction_keeps_its_length():
    torch.manual_seed(0)
    layer = nn.Linear(12, 20)
    site = Site("layer", view_of(layer), lambda: layer.weight, nn.Module())

    def start(x, **given):
        seen = observed(nn.Sequential(layer), [x])["0"]
        return EVA(Statistics({"layer": seen}, 1), **given).pair(site, 4, 1.0)

    for whiten in (False, True):
        pair = start(torch.full((30, 12), 0.7), whiten=whiten)
        assert pair.b is None
        torch.testing.assert_close(pair.a @ pair.a.T, torch.eye(4), atol=1e-5, rtol=0)
    assert torch.equal(pair.a, start(torch.full((30, 12), 0.7)).a)  # from the site's seed
    nan = Components(
        torch.eye(4, 12), torch.zeros(4), torch.full((4,), float("nan")), torch.zeros(12), torch.ones(4), 30
    )
    found = EVA(Statistics({"layer": LayerStatistics((20, 12), activation=nan)}, 1)).pair(site, 4, 1.0)
    torch.testing.assert_close(found.a @ found.a.T, torch.eye(4), atol=1e-5, rtol=0)
    flat = start(torch.randn(30, 2) @ torch.randn(2, 12), whiten=True)  # two directions vary
    assert torch.isfinite(flat.a).all()
    torch.testing.assert_close(flat.a[2:].norm(dim=1), torch.ones(2), atol=1e-5, rtol=0)
    assert (flat.a[:2].norm(dim=1) != 1).all()


def test_more_rank_than_there_are_directions_is_refused():
    statistics = observed(Attention(), batches(), count=6)
    with pytest.raises(DataError, match=r"rank=7 of 'query' is above the 6 directions of its inputs"):
        started("own", EVA(statistics), rank=7)
    assert deltas(started("own", EVA(statistics), rank=6))["query"].A.shape == (6, 12)


def test_what_is_missing_or_wrong_is_refused_by_name():
    with pytest.raises(ConfigError, match="statistics=list"):
        EVA([])
    with pytest.raises(ConfigError, match="whiten='yes'"):
        EVA(observed(Attention(), batches()), whiten="yes")
    with pytest.raises(ConfigError, match="start='eva' needs data"):
        started("own", "eva")
    without = Statistics({name: LayerStatistics((12, 12)) for name in TARGETS}, 1, ("gradient",))
    with pytest.raises(DataError, match=r"no activation of 'query'.*want=\{'activation'\}"):
        started("own", EVA(without))


@pytest.mark.parametrize("whiten", [False, True])
def test_directions_are_those_of_peft(whiten):
    """Where its components have converged and no input is shared, whose whitening PEFT does several times."""

    def network():
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8))

    seen = [torch.randn(64, 12) * torch.arange(1, 13) ** -2.0 for _ in range(8)]
    config = LoraConfig(
        r=3, target_modules=["0", "2"], init_lora_weights="eva", eva_config=EvaConfig(rho=1.0, tau=0.999, whiten=whiten)
    )
    theirs = get_eva_state_dict(
        network(), seen, config, forward_fn=lambda model, x: model(x), prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None, show_progress_bar=False,
    )  # fmt: skip
    model = fallow.attach(network(), "lora", rank=3, start=EVA(observed(network(), seen), whiten))
    for name, delta in ((m.site_name, m) for m in model.modules() if isinstance(m, fallow.Delta)):
        ours, other = (rows / rows.norm(dim=1, keepdim=True) for rows in (delta.A.detach(), theirs[name]))
        assert (ours * other).sum(1).min() > 0.99
        if not whiten:
            torch.testing.assert_close(delta.A.detach().norm(dim=1), theirs[name].float().norm(dim=1))
