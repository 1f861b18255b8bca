"""Fisher diagonals, sketches, and integrated gradients, against their equations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fallow.core.errors import ConfigError, DataError, ModelError
from fallow.core.probe import probe
from fallow.core.probing.contribution import integrated

Batch = tuple[Tensor, Tensor]


def network(seed: int = 0, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(10, 16, bias=bias), nn.Tanh(), nn.Linear(16, 16, bias=bias), nn.Tanh(), nn.Linear(16, 4)
    )


def batches(sizes: tuple[int, ...] = (4, 6, 2)) -> list[Batch]:
    return [(torch.randn(size, 10), torch.randint(4, (size,))) for size in sizes]


def gradient(model: nn.Module, x: Tensor, y: Tensor, name: str) -> Tensor:
    weight = model.get_submodule(name).weight
    return torch.autograd.grad(F.cross_entropy(model(x), y, ignore_index=-100), weight)[0]


# -- Fisher -----------------------------------------------------------------------------------------------------------


def test_fisher_is_the_mean_of_squared_batch_gradients_weighted_by_label_tokens() -> None:
    model, data = network(), batches()
    data[1][1][:2] = -100
    stats = probe(model, data, {"fisher", "gradient"})
    counts = [4, 4, 2]
    for name in ("0", "2", "4"):
        squares = [c * gradient(model, x, y, name).square() for c, (x, y) in zip(counts, data, strict=True)]
        assert torch.allclose(stats[name].fisher, torch.stack(squares).sum(0) / 10, rtol=1e-5, atol=1e-12)
        mean = torch.stack([gradient(model, x, y, name) for x, y in data]).mean(0)
        assert torch.allclose(stats[name].gradient, mean, rtol=1e-5, atol=1e-8)
    alone = probe(model, data, "fisher", tokens=lambda batch: 1)
    flat = torch.stack([gradient(model, x, y, "0").square() for x, y in data]).mean(0)
    assert torch.allclose(alone["0"].fisher, flat, rtol=1e-5, atol=1e-12)


def test_fisher_of_single_samples_does_not_depend_on_the_batches() -> None:
    model, data = network(), batches()
    data[0][1][1] = -100
    whole = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    squares = [gradient(model, x[None], y[None], "2").square() for x, y in zip(*whole, strict=True) if y != -100]
    expected = torch.stack(squares).mean(0)
    for given in (data, [whole]):
        stats = probe(model, given, {"fisher", "gradient"}, per_sample=True)
        assert torch.allclose(stats["2"].fisher, expected, rtol=1e-5, atol=1e-12)
    of_means = probe(model, [whole], "fisher")["2"].fisher
    assert of_means.mean() < 0.5 * expected.mean()  # the mean of a batch is much smaller, and by how much its size says
    mean = torch.stack([gradient(model, x, y, "2") for x, y in data]).mean(0)
    both = probe(model, data, {"fisher", "gradient"}, per_sample=True)
    assert torch.allclose(both["2"].gradient, mean, rtol=1e-5, atol=1e-8)


def test_batches_in_which_no_label_counts_are_refused() -> None:
    data = [(torch.randn(2, 10), torch.full((2,), -100))]
    with pytest.raises(DataError, match="no batch holds a label token that counts"):
        probe(network(), data, "fisher", lambda model, batch: model(batch[0]).sum())


def test_a_gradient_that_comes_in_two_parts_is_not_squared() -> None:
    class Reentrant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(10, 10)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = torch.utils.checkpoint.checkpoint(self.a, x.requires_grad_(), use_reentrant=True)
            return x

    model, data = Reentrant(), batches((3,))
    stats = probe(model, data, "gradient")
    hidden = model.a(model.a(data[0][0]))
    expected = torch.autograd.grad(F.cross_entropy(hidden, data[0][1]), model.a.weight)[0]
    assert torch.allclose(stats["a"].gradient, expected, atol=1e-6)
    with pytest.raises(ConfigError, match=r"'a' got a second gradient.*use_reentrant=False"):
        probe(model, data, "fisher")


# -- sketches and codes -----------------------------------------------------------------------------------------------


def test_a_sketch_is_that_of_the_mean_gradient_and_small_layers_are_kept_whole() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(60, 50), nn.Tanh(), nn.Linear(50, 4))
    data = [(torch.randn(3, 60), torch.randint(4, (3,))) for _ in range(2)]
    full, some = probe(model, data, "gradient"), probe(model, data, "gradient", sketch=8)
    sketch = some["0"].gradient_sketch
    assert some["0"].gradient is None
    omega, psi = sketch.projections((50, 60), 8, sketch.seed)
    assert torch.allclose(sketch.columns, full["0"].gradient @ omega, atol=1e-6)
    assert torch.allclose(sketch.rows, psi @ full["0"].gradient, atol=1e-6)
    assert torch.allclose(some["2"].gradient, full["2"].gradient, atol=1e-8)  # (4, 50): a sketch would be larger
    u, s, vt = some["0"].leading_gradient(3)  # of six samples, so of rank 6
    exact = full["0"].leading_gradient(3)
    assert torch.allclose((u * s) @ vt, (exact[0] * exact[1]) @ exact[2], atol=1e-5)


def test_weights_in_a_foreign_code_get_the_gradient_of_the_weight_that_they_stand_for() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))
    for at in (0, 2):
        coded = bnb.nn.Linear4bit(64, 64, quant_type="nf4")
        coded.load_state_dict({key: value.clone() for key, value in model[at].state_dict().items()})
        model[at] = coded.to("cpu")
    from fallow.core.foreign_codes import decoded

    plain = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))
    for at in (0, 2, 4):
        weight = decoded(model[at]) if at < 4 else model[at].weight
        plain[at].load_state_dict({"weight": weight.detach().float(), "bias": model[at].bias})

    def twice(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model[4](torch.tanh(model[2](model[2](torch.tanh(model[0](batch[0])))))), batch[1])

    data = [(torch.randn(3, 64), torch.randint(4, (3,))) for _ in range(2)]
    stats, expected = (probe(of, data, {"gradient", "fisher"}, twice) for of in (model, plain))
    for name in ("0", "2", "4"):
        for field in ("gradient", "fisher"):
            one, other = getattr(stats[name], field), getattr(expected[name], field)
            assert (one - other).norm() / other.norm() < 2e-2, (name, field)


# -- contribution -----------------------------------------------------------------------------------------------------


def tuned(model: nn.Module, scale: float = 0.3, only: tuple[str, ...] = ()) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        name: value + scale * torch.randn(value.shape, generator=generator)
        if not only or name.startswith(only)
        else value
        for name, value in model.state_dict().items()
    }


def square(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]) - batch[1]).square().sum()


def pairs(count: int = 5) -> list[Batch]:
    return [(torch.randn(count, 10), torch.randn(count, 4))]


@pytest.mark.parametrize(("points", "error"), [(64, 1e-3), (16, 1.6e-2)])
def test_integrated_gradients_sum_to_the_change_of_the_loss(points: int, error: float) -> None:
    model, (batch,) = network(), pairs()
    end = tuned(model)
    params = dict(model.named_parameters())
    before = {name: param.detach().clone() for name, param in params.items()}
    found = integrated(model, params, end, square, batch, points)
    assert all(torch.equal(param, before[name]) for name, param in params.items())
    with torch.no_grad():
        start = square(model, batch)
        model.load_state_dict(end)
        change = square(model, batch) - start
    total = sum(value.double().sum() for value in found.values())
    assert abs(total - change) / abs(change) < error


def test_contribution_is_the_mean_over_samples_of_absolute_values() -> None:
    model, (batch,) = network(), pairs()
    end = tuned(model)
    stats = probe(model, [batch], "contribution", square, tuned=end, points=8)
    weight = {"2.weight": model[2].weight}
    one_by_one = [
        integrated(model, weight, end, square, (batch[0][i : i + 1], batch[1][i : i + 1]), 8) for i in range(5)
    ]
    expected = torch.stack([part["2.weight"].abs() for part in one_by_one]).mean(0)
    assert stats["2"].contribution == pytest.approx(float(expected.mean()), rel=1e-5)
    assert torch.allclose(stats["2"].contribution_rows, expected.mean(1), rtol=1e-5)
    together = integrated(model, weight, end, square, batch, 8)["2.weight"].abs() / 5
    assert (expected >= together - 1e-6).all()
    assert (expected > together + 1e-3).any()  # samples cancel in the gradient of a batch
    half = probe(
        model, [(batch[0][:2], batch[1][:2]), (batch[0][2:], batch[1][2:])], "contribution", square, tuned=end, points=8
    )
    assert half["2"].contribution == pytest.approx(stats["2"].contribution, rel=1e-5)


def test_a_layer_that_alone_was_changed_has_all_of_the_contribution() -> None:
    model, data = network(), pairs()
    stats = probe(model, data, "contribution", square, tuned=tuned(model, only=("2.",)), points=4)
    assert stats["2"].contribution > 0
    assert stats["0"].contribution == stats["4"].contribution == 0.0


def test_buffers_move_too_and_come_back() -> None:
    model = nn.Sequential(nn.Linear(10, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 4))
    end = {name: value + 0.5 if value.is_floating_point() else value for name, value in model.state_dict().items()}
    (batch,) = pairs()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.eval()
    found = integrated(model, dict(model.named_parameters()), end, square, batch, 64)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        start = square(model, batch)
        model.load_state_dict(end)
        change = square(model, batch) - start
    buffers = change - sum(value.double().sum() for value in found.values())
    assert abs(buffers) > 0.01 * abs(change)  # what the running means and variances did


def test_an_error_in_the_middle_of_the_path_brings_the_model_back() -> None:
    model, data = network(), pairs()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calls: list[int] = []

    def failing(model: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 11:
            raise RuntimeError("stopped")
        return square(model, batch)

    with pytest.raises(RuntimeError, match="stopped"):
        probe(model, data, "contribution", failing, tuned=tuned(model), points=8)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(param.grad is None for param in model.parameters())


def test_a_tuned_state_that_does_not_fit_is_refused_by_name() -> None:
    model, data = network(), pairs()
    end = tuned(model)
    lacking = {name: value for name, value in end.items() if name != "2.weight"}
    with pytest.raises(DataError, match=r"tuned= lacks '2.weight' \(did you mean"):
        probe(model, data, "contribution", square, tuned=lacking)
    with pytest.raises(DataError, match=r"has '0.weight' of \(16, 9\), where the model has \(16, 10\)"):
        probe(model, data, "contribution", square, tuned={**end, "0.weight": torch.randn(16, 9)})
    with pytest.raises(DataError, match=r"NaN or infinite values in '4.weight'"):
        probe(model, data, "contribution", square, tuned={**end, "4.weight": end["4.weight"] * torch.nan})
    with pytest.raises(ConfigError, match=r"cannot be split into samples \(first dimensions: \[2, 3\]\)"):
        probe(model, [(torch.randn(2, 10), torch.randn(3, 4))], "contribution", lambda m, b: m(b[0]).sum(), tuned=end)
    from fallow.core.quantized import quantize_

    large = nn.Sequential(nn.Linear(80, 80))
    end = dict(large.state_dict())
    quantize_(large, "int8")
    with pytest.raises(ModelError, match="'0' is kept in a code"):
        probe(large, [(torch.randn(2, 80),)], "contribution", lambda m, b: m(b[0]).sum(), tuned=end)


def test_gradients_and_contributions_are_gathered_in_one_pass_without_getting_into_each_others_way() -> None:
    model, data = network(), pairs()
    end = tuned(model)
    both = probe(model, data, {"gradient", "contribution", "fisher"}, square, tuned=end, points=4)
    apart = probe(model, data, "gradient", square), probe(model, data, "contribution", square, tuned=end, points=4)
    assert torch.equal(both["2"].gradient, apart[0]["2"].gradient)
    assert both["2"].contribution == apart[1]["2"].contribution


def test_contribution_of_a_language_model_with_tied_weights(tiny_gpt2: Callable[[], nn.Module]) -> None:
    model, ids = tiny_gpt2(), torch.randint(64, (3, 8))
    end = tuned(model, 0.05)
    end["lm_head.weight"] = end["transformer.wte.weight"]
    stats = probe(model, [{"input_ids": ids, "labels": ids}], "contribution", tuned=end, points=2)
    layer = stats["transformer.h.0.attn.c_attn"]
    assert layer.contribution_rows.shape == (96,)
    assert layer.contribution == pytest.approx(float(layer.contribution_rows.mean()), rel=1e-5)
    assert layer.contribution > 0
