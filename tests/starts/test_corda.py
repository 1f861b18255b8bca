"""CorDA against its equations: the decomposition, both starts on both hosts, compression, parity with PEFT."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from torch import nn

import fallow
from fallow.core.delta import Site
from fallow.core.errors import ConfigError, DataError
from fallow.core.linalg import EXACT_BELOW
from fallow.core.statistics import LayerStatistics, Statistics
from fallow.core.views import view_of
from fallow.starts.corda import CorDA, context_svd, damping
from observed import covariance_of, layer_inputs, observed

SHAPES = {"square": (24, 24), "tall": (40, 16), "wide": (16, 40)}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
modes = pytest.mark.parametrize("mode", ["ipa", "kpa"])


def context(n, tokens=400, decay=1.5):
    """Inputs (tokens, n) that vary much more in some directions than in others."""
    scale = torch.arange(1, n + 1).float() ** -decay
    return (torch.randn(tokens, n) * scale) @ torch.linalg.qr(torch.randn(n, n))[0]


def known(shape, inputs=None, **given):
    x = context(shape[1]) if inputs is None else inputs
    one = LayerStatistics(shape, covariance=covariance_of([x]), tokens=len(x), calls=1)
    return Statistics({"layer": replace(one, **given)}, 1, ("input_covariance",))


def site_of(layer, name="layer"):
    return Site(name, view_of(layer), lambda: layer.weight, nn.Module())


def damped(c, d=0.01):
    return c + d * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype)


def reference(w, c, d=0.01):
    """U, S, V̂ᵀ with an explicit inverse, as the official code has it; float64."""
    c = damped(c.double(), d)
    u, s, v = torch.linalg.svd(w.double() @ c, full_matrices=False)
    return u, s, v @ torch.linalg.inv(c)


def chosen(triples, cut):
    u, s, v = triples
    return u[:, cut], s[cut], v[cut]


class Net(nn.Module):
    """Square, tall and wide layers, a convolution with a stride, some without bias; images (B, 2, 6, 6)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(2, 10, 3, stride=2, padding=1)
        self.square, self.tall = nn.Linear(90, 90), nn.Linear(90, 120, bias=False)
        self.wide = nn.Linear(120, 7)

    def forward(self, x):
        x = self.conv(x).relu().flatten(1)
        return self.wide(self.tall(self.square(x).relu()).relu())


IMAGES = [torch.randn(80, 2, 6, 6, generator=torch.Generator().manual_seed(n)) for n in range(3)]


def started(host, model, start, rank=4, alpha=None, method="lora"):
    targets = ["conv", "square", "tall", "wide"]
    if host == "own":
        return fallow.attach(model, method, targets, rank=rank, alpha=alpha, start=start)
    config = fallow.LoRAConfig(rank=rank, alpha=alpha, target_modules=targets, start=start)
    return get_peft_model(model, config)


def deltas(model):
    return [module for module in model.modules() if isinstance(module, fallow.Delta)]


@shapes
def test_all_components_give_the_weight_back_in_the_metric_of_the_context(shape):
    w, c = torch.randn(shape), covariance_of([context(shape[1])])
    for part in ("first", "last"):
        u, s, v = context_svd(w, c, None, part)
        k = min(shape)
        assert u.shape == (shape[0], k)
        assert v.shape == (k, shape[1])
        torch.testing.assert_close(u * s @ v, w, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(u.T @ u, torch.eye(k), atol=1e-5, rtol=0)
        rows = v.double() @ damped(c.double())
        torch.testing.assert_close(rows @ rows.T, torch.eye(k).double(), atol=2e-3, rtol=0)
        assert (s[:-1] >= s[1:]).all()
    u, s, v = context_svd(w.double(), c.double())
    rows = v @ damped(c.double())
    torch.testing.assert_close(rows @ rows.T, torch.eye(min(shape)).double(), atol=1e-10, rtol=0)


@shapes
@pytest.mark.parametrize("part", ["first", "last"])
def test_chosen_components_are_those_of_the_explicit_inverse(shape, part):
    w, c = torch.randn(shape), covariance_of([context(shape[1])])
    u, s, v = context_svd(w, c, 5, part)
    cut = slice(5) if part == "first" else slice(-5, None)
    ru, rs, rv = chosen(reference(w, c), cut)
    torch.testing.assert_close(s.double(), rs, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close((u * s @ v).double(), ru * rs @ rv, atol=2e-4, rtol=1e-3)


@modes
@pytest.mark.parametrize("host", ["own", "peft"])
@pytest.mark.parametrize("alpha", [None, 8.0])
def test_the_output_is_the_bases_at_first_in_every_layer(mode, host, alpha):
    base = Net()
    statistics = observed(base, IMAGES)
    model = started(host, Net(), CorDA(statistics, mode), alpha=alpha).eval()
    torch.testing.assert_close(model(IMAGES[0]), base(IMAGES[0]), atol=1e-4, rtol=1e-4)
    for delta, layer in zip(deltas(model), (base.conv, base.square, base.tall, base.wide), strict=True):
        w = view_of(layer).read(layer.weight.detach())
        wanted = reference(w, statistics[delta.site_name].covariance)
        u = wanted[0][:, :4] if mode == "ipa" else wanted[0][:, -4:]
        scale = 1.0 if alpha is None else 2.0
        torch.testing.assert_close(scale * delta.B @ delta.A, (u @ u.T @ w.double()).float(), atol=1e-4, rtol=1e-3)


@modes
@pytest.mark.parametrize("host", ["own", "peft"])
def test_a_trained_start_is_saved_and_is_a_plain_lora_on_the_original_base(mode, host, tmp_path):
    statistics = observed(Net(), IMAGES)
    model = started(host, Net(), CorDA(statistics, mode))
    for delta in deltas(model):
        delta.B.data += 0.1 * torch.randn_like(delta.B)
    said = model.eval()(IMAGES[0])
    assert (said - Net()(IMAGES[0])).abs().max() > 1e-2
    if host == "own":
        fallow.save(model, tmp_path / "own")
        again = fallow.load(Net(), tmp_path / "own")
    else:
        model.save_pretrained(tmp_path / "own")
        again = PeftModel.from_pretrained(Net(), tmp_path / "own")
    torch.testing.assert_close(again.eval()(IMAGES[0]), said, atol=1e-5, rtol=1e-5)
    fallow.to_lora(model, tmp_path / "plain")
    plain = PeftModel.from_pretrained(Net(), tmp_path / "plain").eval()
    torch.testing.assert_close(plain(IMAGES[0]), said, atol=1e-4, rtol=1e-4)


@shapes
def test_with_white_inputs_ipa_is_pissa(shape):
    w = torch.randn(shape)
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    best = u[:, :6] * s[:6] @ v[:6]
    found = context_svd(w, torch.eye(shape[1]), 6)
    torch.testing.assert_close(found[0] * found[1] @ found[2], best, atol=1e-5, rtol=1e-4)


@shapes
def test_dropping_the_last_components_is_the_best_compression_for_the_context(shape):
    w, c = torch.randn(shape), covariance_of([context(shape[1], decay=1.0)])
    keep, metric = min(shape) // 2, damped(c)
    s = reference(w, c)[1]
    u, values, v = context_svd(w, c, keep)
    ours = ((w - u * values @ v) @ metric).norm()
    torch.testing.assert_close(ours.double(), s[keep:].square().sum().sqrt(), rtol=1e-4, atol=0)
    pu, ps, pv = torch.linalg.svd(w, full_matrices=False)
    plain = ((w - pu[:, :keep] * ps[:keep] @ pv[:keep]) @ metric).norm()
    assert plain > 1.3 * ours
    for _ in range(5):  # nor does any other rank-k matrix near ours do better
        other = (u * values + 1e-3 * torch.randn_like(u)) @ (v + 1e-3 * torch.randn_like(v))
        assert ((w - other) @ metric).norm() >= ours * (1 - 1e-5)


def test_half_of_the_components_err_less_than_plain_svd_on_such_data_and_not_on_white_noise():
    w, x = torch.randn(40, 40), context(40, 2000, decay=1.0)
    fresh, white = x[1000:], torch.randn(1000, 40)
    u, s, v = context_svd(w, covariance_of([x[:1000]]), 20)
    pu, ps, pv = torch.linalg.svd(w)
    ours, plain = u * s @ v, pu[:, :20] * ps[:20] @ pv[:20]

    def error(compressed, inputs):
        return (inputs @ (w - compressed).T).norm() / (inputs @ w.T).norm()

    assert error(ours, fresh) < 0.7 * error(plain, fresh)
    assert error(ours, white) > error(plain, white)


@shapes
def test_the_two_starts_share_no_direction(shape):
    w, c = torch.randn(shape), covariance_of([context(shape[1])])
    first, last = context_svd(w, c, 5, "first")[0], context_svd(w, c, 5, "last")[0]
    assert (first.T @ last).abs().max() < 1e-5


@pytest.mark.parametrize("shape", [(400, 320), (320, 400)])
def test_the_last_components_of_a_large_layer_come_from_the_smaller_side(shape, monkeypatch):
    assert min(shape) > EXACT_BELOW
    sizes, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: sizes.append(len(matrix)) or eigh(matrix))
    w, c = torch.randn(shape), covariance_of([context(shape[1], 800, decay=0.5)])
    u, s, v = context_svd(w, c, 6, "last")
    assert sizes == [320]
    ru, rs, rv = reference(w, c)
    torch.testing.assert_close(s.double(), rs[-6:], rtol=1e-4, atol=0)
    torch.testing.assert_close((u * s @ v).double(), ru[:, -6:] * rs[-6:] @ rv[-6:], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(u.T @ u, torch.eye(6), atol=1e-5, rtol=0)


def test_the_first_components_of_a_large_layer_are_nearly_the_exact_ones():
    w, c = torch.randn(320, 400), covariance_of([context(400, 800, decay=1.0)])
    u, s, _ = context_svd(w, c, 6, generator=torch.Generator().manual_seed(0))
    ru, rs, _ = reference(w, c)
    torch.testing.assert_close(s.double(), rs[:6], rtol=1e-4, atol=0)
    assert torch.linalg.svdvals(u.double().T @ ru[:, :6]).min() > 0.9999


@modes
@pytest.mark.parametrize("sigma_fuse", ["UV", "U", "V"])
def test_where_the_singular_values_go_changes_the_factors_and_not_their_product(mode, sigma_fuse):
    layer, statistics = nn.Linear(16, 40), known((40, 16))
    both = CorDA(statistics, mode).pair(site_of(layer), 5, 2.0)
    pair = CorDA(statistics, mode, sigma_fuse).pair(site_of(layer), 5, 2.0)
    torch.testing.assert_close(pair.b @ pair.a, both.b @ both.a, atol=1e-5, rtol=1e-4)
    cut = slice(5) if mode == "ipa" else slice(-5, None)
    s = chosen(reference(layer.weight.detach(), statistics["layer"].covariance), cut)[1]
    lengths = {"UV": (s / 2).sqrt(), "U": s / 2, "V": torch.ones(5).double()}[sigma_fuse]
    torch.testing.assert_close(pair.b.norm(dim=0).double(), lengths, rtol=1e-3, atol=1e-6)


def test_the_balance_of_a_and_b_follows_the_size_of_the_inputs_or_is_even():
    layer, one = nn.Linear(16, 40), known((40, 16))
    four = known((40, 16), covariance=4 * one["layer"].covariance)
    a, b = (CorDA(statistics).pair(site_of(layer), 5, 1.0) for statistics in (one, four))
    torch.testing.assert_close(b.a, a.a / 2, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(b.b, a.b * 2, rtol=1e-4, atol=1e-6)
    c, d = (CorDA(statistics, balance="equal").pair(site_of(layer), 5, 1.0) for statistics in (one, four))
    torch.testing.assert_close(c.a.norm(), c.b.norm())
    torch.testing.assert_close(c.b @ c.a, a.b @ a.a, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(c.a, d.a, rtol=1e-4, atol=1e-6)


def test_the_diagonal_is_raised_until_the_covariance_is_sound():
    c = covariance_of([context(40, decay=3.0)])
    mean = float(c.diagonal().mean())
    assert damping(c) == pytest.approx(0.01 * mean)
    assert damping(c, 0.5) == pytest.approx(0.5 * mean)
    negative = c - 0.05 * mean * torch.eye(40)  # indefinite, as rounding may leave it
    below = float(negative.diagonal().mean())
    found = damping(negative) / below
    assert found == pytest.approx(0.01 * 2**3, rel=1e-4)  # 0.01, 0.02, 0.04 times 0.95 do not make up for 0.05
    assert torch.linalg.eigvalsh(negative + 0.5 * found * below * torch.eye(40)).min() < 0
    # the official test, from C each time and not from what was damped before
    vector = torch.randn(300)
    steep = torch.outer(vector, vector) * 1e3
    steep += 1e-5 * torch.eye(300)
    d = damping(steep, 1e-6, 0.05) / float(steep.diagonal().mean())
    power = torch.log2(torch.tensor(d / 1e-6))
    assert power > 0.5
    assert float(power) == pytest.approx(round(float(power)), abs=1e-3)
    unit = torch.eye(300)
    for factor, sound in ((1.0, True), (0.5, False)):
        raised = steep + factor * d * steep.diagonal().mean() * unit
        assert bool((raised @ torch.linalg.inv(raised) - unit).norm() < 0.05) is sound


def test_few_tokens_run_and_are_told_of_once():
    layer, few = nn.Linear(64, 32), context(64, 10)
    with pytest.warns(UserWarning, match=r"'layer' has seen fewer tokens than inputs") as told:
        start = CorDA(known((32, 64), few), "kpa")
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pair = start.pair(site_of(layer), 8, 1.0)
    assert torch.isfinite(pair.a).all()
    u, _, _ = context_svd(layer.weight.detach(), covariance_of([few]), None, "last")
    w = layer.weight.detach()
    torch.testing.assert_close(u @ u.T @ w, w, atol=1e-5, rtol=1e-4)
    both = {"layer": known((32, 64), few)["layer"], "more": known((32, 64), few)["layer"]}
    with pytest.warns(UserWarning, match=r"'layer' and 1 other layers have"):
        CorDA(Statistics(both, 1))


@modes
def test_components_that_a_weight_lacks_start_as_lora_does_and_learn(mode):
    layer = nn.Linear(16, 12)
    with torch.no_grad():
        layer.weight[4:] = 0  # rank 4
    pair = CorDA(known((12, 16)), mode).pair(site_of(layer), 8, 1.0)
    dead = pair.b.norm(dim=0) == 0
    assert int(dead.sum()) == (4 if mode == "ipa" else 8)
    assert (pair.a.norm(dim=1) > 1e-3).all()
    assert pair.a[dead].abs().max() <= 1 / 4  # uniform in +-1 / sqrt(in)
    if mode == "ipa":
        torch.testing.assert_close(pair.b @ pair.a, layer.weight.detach(), atol=1e-5, rtol=1e-4)


def test_a_covariance_that_is_none_is_refused_by_the_layers_name():
    layer = nn.Linear(16, 40)
    broken = known((40, 16))["layer"].covariance.clone()
    broken[3, 3] = float("nan")
    bad = [
        (known((40, 16), covariance=broken), r"'layer': the covariance of its inputs is not finite"),
        (known((40, 16), covariance=torch.zeros(16, 16)), r"'layer': the covariance of its inputs is zero"),
        (known((40, 16), covariance=None), r"no covariance of 'layer'.*want=\{'input_covariance'\}"),
        (known((40, 12)), r"'layer'.*\(40, 12\)"),
        (Statistics({}, 1), r"'layer' is not among the 0 layers"),
    ]
    for statistics, message in bad:
        with pytest.raises(DataError, match=message):
            CorDA(statistics).pair(site_of(layer), 4, 1.0)


def test_bad_options_are_refused_by_name():
    statistics = known((40, 16))
    bad = [
        ({"mode": "ipm"}, "mode='ipm' must be one of 'ipa', 'kpa'"),
        ({"sigma_fuse": "S"}, "sigma_fuse='S'"),
        ({"balance": "none"}, "balance='none'"),
        ({"damp": 0.0}, "damp=0.0"),
        ({"tolerance": 0.0}, "tolerance=0.0"),
    ]
    for given, message in bad:
        with pytest.raises(ConfigError, match=message):
            CorDA(statistics, **given)
    with pytest.raises(ConfigError, match="statistics=dict"):
        CorDA({})
    with pytest.raises(ConfigError, match="needs data"):
        started("own", Net(), "corda")
    for rank in (0, 17):
        with pytest.raises(ConfigError, match=f"rank={rank} must be from 1 to 16"):
            context_svd(torch.randn(40, 16), torch.eye(16), rank)
    with pytest.raises(ConfigError, match="part='middle'"):
        context_svd(torch.randn(40, 16), torch.eye(16), 3, "middle")


@pytest.mark.parametrize(("mode", "theirs"), [("ipa", "ipm"), ("kpa", "kpm")])
def test_products_are_those_of_peft(mode, theirs):
    def network():
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 12))

    batches = [context(12, 50, decay=1.0).abs() for _ in range(6)]
    config = LoraConfig(
        r=3, lora_alpha=3, target_modules=["0", "2", "4"], init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=theirs),
    )  # fmt: skip
    peer = network()
    preprocess_corda(peer, config, run_model=lambda: [peer(batch) for batch in batches])
    peer = get_peft_model(peer, config)
    model = fallow.attach(network(), "lora", rank=3, start=CorDA(observed(network(), batches), mode))
    with torch.no_grad():
        for name, delta in zip("024", deltas(model), strict=True):
            layer = peer.base_model.model.get_submodule(name)
            pair = layer.lora_B["default"].weight, layer.lora_A["default"].weight
            torch.testing.assert_close(delta.B @ delta.A, pair[0] @ pair[1], atol=1e-4, rtol=1e-3)
            for ours, their in zip(
                (delta.B.norm(dim=0), delta.A.norm(dim=1)), (pair[0].norm(dim=0), pair[1].norm(dim=1)), strict=True
            ):
                torch.testing.assert_close(ours, their, rtol=2e-3, atol=1e-5)


def test_two_adapters_of_one_statistics_have_the_same_split():
    statistics = observed(Net(), IMAGES)
    one, two = (started("own", Net(), CorDA(statistics), alpha=8.0) for _ in range(2))
    for first, second in zip(deltas(one), deltas(two), strict=True):
        assert torch.equal(first.A, second.A)
        assert torch.equal(first.B, second.B)


def test_a_block_of_a_fused_weight_has_its_own_components():
    torch.manual_seed(4)
    net = nn.Sequential(nn.Linear(16, 30))
    batches = [context(16, 60)]
    statistics = observed(net, batches)
    model = fallow.attach(copy.deepcopy(net), "lora", ["0"], rank=3, fused={"0": 3}, start=CorDA(statistics))
    assert layer_inputs(net, batches)["0"][0].shape == (60, 16)
    parts = [delta for delta in deltas(model) if not hasattr(delta, "parts")]
    for delta, rows in zip(parts, net[0].weight.detach().split(10), strict=True):
        u = reference(rows, statistics["0"].covariance)[0][:, :3]
        torch.testing.assert_close(delta.B @ delta.A, (u @ u.T @ rows.double()).float(), atol=1e-5, rtol=1e-3)
