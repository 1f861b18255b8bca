"""LoCA against its equations, SciPy and true differences."""

from __future__ import annotations

import copy

import pytest
import scipy.fft
import torch
from one_layer import LAYERS, OneLayer, inputs, with_matrix
from torch import Tensor, nn

from fallow.core.errors import ConfigError
from fallow.core.transforms import dct_matrix
from fallow.core.views import view_of
from fallow.deltas.loca import LoCA, _Components

ALL = sorted(LAYERS)
WAYS = ["fast", "gather"]


def adapted(kind: str, dtype: torch.dtype = torch.float64, **options: object) -> tuple[OneLayer, Tensor]:
    torch.manual_seed(0)
    layer = LAYERS[kind]().to(dtype)
    model, x = OneLayer(layer, "loca", **{"components": 9, "alpha": 1.5, **options}), inputs(layer)
    model.delta.randomize()
    return model, x


def place(model: OneLayer, locations: list[list[int]]) -> None:
    """Put the components there, a quarter of a position to the right of it."""
    delta = model.delta
    u = (torch.tensor(locations, dtype=delta.start.dtype) + 0.25) / delta.last
    with torch.no_grad():
        delta.moves.copy_((u.clamp(0, 1) - delta.start) / delta.o.rate)


def spectrum(model: OneLayer) -> Tensor:
    s = torch.zeros(model.view.shape, dtype=torch.float64)
    return s.index_put_(tuple(model.delta.locations), model.delta.a.detach().double(), accumulate=True)


@pytest.mark.parametrize("kind", ALL)
def test_output_is_unchanged_at_the_start_bit_for_bit(kind: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    model, x = OneLayer(layer, "loca", components=5), inputs(layer)
    assert torch.equal(model(x), layer(x))
    assert not model.delta.delta_weight().any()
    assert model.delta.locations.unique().numel() > 3


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ALL)
def test_update_is_scipys_inverse_transform_of_the_sparse_spectrum(kind: str, way: str) -> None:
    model, x = adapted(kind, dct=way)
    want = 1.5 * torch.from_numpy(scipy.fft.idctn(spectrum(model).numpy(), norm="ortho"))
    torch.testing.assert_close(model.delta.delta_weight().detach(), want, atol=1e-12, rtol=0)
    w = model.view.read(model.layer.weight) + want
    layer = model.layer
    y = torch.func.functional_call(layer, {"weight": model.view.write(w, layer.weight)}, (x,))
    torch.testing.assert_close(model(x), y)
    torch.testing.assert_close(model.by_merged(x), y)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ALL)
def test_gradients_of_coefficients_and_of_the_input_are_autograds_through_the_matrices(kind: str, way: str) -> None:
    model, x = adapted(kind, dct=way)
    delta, layer = model.delta, model.layer
    a = delta.a.detach().clone().requires_grad_()
    l1, l2 = delta.locations
    c1, c2 = (dct_matrix(n, torch.float64) for n in model.view.shape)
    w = view_of(layer).read(layer.weight) + 1.5 * (c1[l1] * a[:, None]).T @ c2[l2]
    x_ = x.clone().requires_grad_() if x.is_floating_point() else x
    want = with_matrix(layer, w, x_)
    weights = torch.randn_like(want)
    (want * weights).sum().backward()
    mine = x.clone().requires_grad_() if x.is_floating_point() else x
    (model(mine) * weights).sum().backward()
    torch.testing.assert_close(delta.a.grad, a.grad)
    assert delta.moves.grad is None
    if x.is_floating_point():
        torch.testing.assert_close(mine.grad, x_.grad)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_gradients_of_places_are_clipped_central_differences_one_sided_at_borders(way: str, size: float) -> None:
    model, _ = adapted("linear", dct=way)  # D (20, 12)
    place(model, [[0, 19, 7, 7, 3, 3, 19, 0, 9], [0, 11, 0, 11, 5, 5, 0, 11, 9]])
    delta = model.delta
    delta.in_turn = True
    g = size * torch.randn(20, 12, dtype=torch.float64)
    delta.delta_weight().backward(g)
    k = dct_matrix(20, torch.float64) @ (1.5 * g) @ dct_matrix(12, torch.float64).T  # what the Function sees
    want = torch.zeros(2, 9, dtype=torch.float64)
    clipped = 0
    for n, (i, j) in enumerate(delta.locations.T.tolist()):
        half = float(delta.a.detach()[n]) / 2
        down = half * (k[min(i + 1, 19), j] - k[max(i - 1, 0), j])
        right = half * (k[i, min(j + 1, 11)] - k[i, max(j - 1, 0)])
        clipped += int(abs(down) > 1) + int(abs(right) > 1)
        u = delta.start[:, n] + delta.o.rate * delta.moves.detach()[:, n]
        inside = (u <= 1 + 1e-9) & (u >= 0)
        want[:, n] = torch.stack([down.clamp(-1, 1) * 19, right.clamp(-1, 1) * 11]) * delta.o.rate * inside
    torch.testing.assert_close(delta.moves.grad, want)
    assert delta.a.grad is None
    assert clipped == 0


@pytest.mark.parametrize("fast", [True, False])
def test_the_clip_is_at_one(fast: bool) -> None:
    a = torch.full((3,), 50.0, dtype=torch.float64)
    at = torch.tensor([[2.0, 5.2, 0.0], [3.0, 1.0, 4.0]], dtype=torch.float64, requires_grad=True)
    _Components.apply(a, at, (8, 6), fast).backward(torch.randn(8, 6, dtype=torch.float64))
    assert float(at.grad.abs().max()) == 1.0


def test_the_gradient_of_a_place_is_half_the_true_difference_to_first_order() -> None:
    """L = |D - T|^2 / 2 with tiny coefficients."""
    target = torch.randn(10, 8, dtype=torch.float64)

    def loss(row: float) -> Tensor:
        at = torch.tensor([[row], [3.0]], dtype=torch.float64)
        return (_Components.apply(a, at, (10, 8), True) - target).square().sum() / 2

    a = torch.tensor([1e-4], dtype=torch.float64)
    at = torch.tensor([[4.0], [3.0]], dtype=torch.float64, requires_grad=True)
    ((_Components.apply(a, at, (10, 8), True) - target).square().sum() / 2).backward()
    true = (loss(5.0) - loss(3.0)) / 2
    assert float(at.grad[0]) == pytest.approx(float(true), rel=1e-3)
    assert abs(float(true)) > 1e-6


@pytest.mark.parametrize("accumulate", [1, 4])
def test_coefficients_and_places_are_trained_in_turns_and_what_is_frozen_does_not_move(accumulate: int) -> None:
    model, x = adapted("linear", torch.float32, location_until=90, rate=0.1)
    target = model.layer(x) + torch.randn(3, 5, 20)
    delta = model.delta
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == 27
    for step in range(120):
        before = delta.a.detach().clone(), delta.moves.detach().clone()
        for _ in range(accumulate):
            (model(x) - target).square().mean().backward()
        optimizer.step()
        moved = not torch.equal(before[0], delta.a), not torch.equal(before[1], delta.moves)
        optimizer.zero_grad(set_to_none=step % 2 == 0)  # zeros would let momentum go on
        delta.on_step(step + 1, None)
        places = step < 90 and step % 30 >= 10
        assert moved == (not places, places), step


@pytest.mark.parametrize(("total", "last"), [(500, 49), (None, 989)])
def test_places_are_learned_for_a_tenth_of_training_or_a_thousand_steps(total: int | None, last: int) -> None:
    delta = adapted("linear")[0].delta
    turns = []
    for step in range(1, 1100):
        delta.on_step(step, total)
        turns.append(delta.in_turn)
    assert max(step for step, turn in enumerate(turns, 1) if turn) == last
    assert sum(turns[:30]) == 20


def test_a_place_beyond_the_border_is_put_back_where_it_can_move_again() -> None:
    delta = adapted("linear")[0].delta
    with torch.no_grad():
        delta.moves.fill_(1e3)
        delta.moves[0].neg_()
    delta.on_step(15, 1000)
    assert delta.locations.tolist() == [[0] * 9, [11] * 9]
    u = delta.start + delta.o.rate * delta.moves
    torch.testing.assert_close(u, torch.tensor([[0.0], [1.0]], dtype=u.dtype).expand(2, 9))
    assert (delta.moves.abs() < 100).all()


def test_equal_places_add_up_and_whole_number_places_give_the_update_bit_for_bit() -> None:
    model, _ = adapted("linear", torch.float32, components=3, dct="fast")
    place(model, [[4, 4, 2], [6, 6, 1]])
    delta = model.delta
    want = delta.delta_weight().detach()
    single = scipy.fft.idctn(spectrum(model).numpy(), norm="ortho")
    assert float(spectrum(model)[4, 6]) == pytest.approx(float(delta.a.detach()[:2].sum()))
    torch.testing.assert_close(want, 1.5 * torch.from_numpy(single).float())
    kept = delta.locations.to(torch.int16)
    with torch.no_grad():
        delta.moves.copy_((kept / delta.last - delta.start) / delta.o.rate)
    assert torch.equal(delta.delta_weight(), want)


def test_compat_keeps_places_off_the_last_index_of_wide_sides_only() -> None:
    layer = nn.Linear(768, 4, bias=False)
    for compat, last in ((False, 767), (True, 766)):
        delta = OneLayer(layer, "loca", components=2, compat=compat).delta
        with torch.no_grad():
            delta.moves.fill_(1e6)
        assert delta.locations.tolist() == [[3, 3], [last, last]]


@pytest.mark.parametrize(("until", "trained"), [(None, 30), (0, 10)])
def test_trained_numbers_are_n_and_twice_n_for_places_while_they_are_learned(until: int | None, trained: int) -> None:
    options = LoCA.Options(components=10, location_until=until)
    delta = OneLayer(nn.Linear(12, 20), LoCA, components=10, location_until=until).delta
    assert delta.a.numel() == 10
    assert sum(p.numel() for p in delta.parameters()) == trained == LoCA.parameter_count((20, 12), options)


def test_random_places_that_stay_train_coefficients_only() -> None:
    model, x = adapted("linear", location_until=0)
    before = model.delta.locations
    model(x).sum().backward()
    assert [name for name, p in model.delta.named_parameters()] == ["a"]
    model.delta.on_step(12, 1000)
    assert torch.equal(model.delta.locations, before)


def test_training_goes_on_from_a_state_dict_bit_for_bit_in_the_middle_of_a_turn() -> None:
    model, x = adapted("linear", torch.float32, location_until=90, rate=0.1)
    optimizer = torch.optim.AdamW(model.delta.parameters(), lr=1e-2)

    def run(model: OneLayer, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            (model(x) - 1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            model.delta.on_step(step + 1, None)

    run(model, optimizer, range(17))
    again = OneLayer(copy.deepcopy(model.layer), "loca", components=9, alpha=1.5, location_until=90, rate=0.1)
    resumed = torch.optim.AdamW(again.delta.parameters(), lr=1e-2)
    again.delta.load_state_dict(model.delta.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert again.delta.in_turn
    run(model, optimizer, range(17, 35))
    run(again, resumed, range(17, 35))
    assert torch.equal(again.delta.a, model.delta.a)
    assert torch.equal(again.delta.moves, model.delta.moves)
    assert torch.equal(again(x), model(x))
    assert sum(t.numel() for t in model.delta.state_dict().values()) == 3 * 9 + 1


def test_scale_counts_the_change() -> None:
    model, x = adapted("conv")
    base, once = model.layer(x), model(x)
    model.scale = -0.5
    torch.testing.assert_close(model(x), base - 0.5 * (once - base))
    torch.testing.assert_close(model.by_merged(x), base - 0.5 * (once - base))


@pytest.mark.parametrize("kind", ["linear", "conv", "embedding"])
def test_bf16_layers_give_bf16_close_to_float64_and_gradients_in_float32(kind: str) -> None:
    model, x = adapted(kind, torch.bfloat16)
    exact = copy.deepcopy(model).double()
    want = exact.by_merged(x.double() if x.is_floating_point() else x)
    got = model(x)
    assert got.dtype == torch.bfloat16
    assert model.delta.a.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, atol=0.06, rtol=0.03)
    got.float().sum().backward()
    assert model.delta.a.grad.dtype == torch.float32


def test_autocast_multiplies_in_half_precision_and_gives_the_layers_own_dtype() -> None:
    model, x = adapted("linear", torch.float32)
    want = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, atol=0.06, rtol=0.03)
    got.float().sum().backward()
    assert model.delta.a.grad.abs().max() > 0


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("way", WAYS)
def test_nothing_as_large_as_the_weight_is_kept_for_the_backward(kind: str, way: str) -> None:
    layer = nn.Linear(64, 96) if kind == "linear" else nn.Conv2d(16, 32, 3)
    model = OneLayer(layer, "loca", components=20, dct=way)
    model.delta.in_turn = True
    x = torch.randn(2, 64) if kind == "linear" else torch.randn(2, 16, 5, 5)
    kept: list[int] = []
    own = {p.data_ptr() for p in model.parameters()}

    def keep(t: Tensor) -> Tensor:
        if t.data_ptr() not in own:
            kept.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = model(x)
    assert max(kept) <= x.numel()
    y.sum().backward()


@pytest.mark.parametrize("places", [False, True])
@pytest.mark.parametrize("size", [1e-3, 30.0])
def test_taking_inputs_through_the_spectrum_is_the_product_with_the_formed_update(
    size: float, places: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = OneLayer(nn.Linear(30, 20, dtype=torch.float64), "loca", components=300, alpha=1.5)
    with torch.no_grad():  # half of the places stand at a border
        model.delta.a.normal_(0, size)
        model.delta.moves.uniform_(-50, 50)
    model.delta.in_turn = places
    x = torch.randn(4, 250, 30, dtype=torch.float64, requires_grad=True)  # pieces of 436 rows
    weights = torch.randn(4, 250, 20, dtype=torch.float64)
    found = []
    for joined in (True, False):
        monkeypatch.setattr(LoCA, "joins", lambda delta, x, joined=joined: joined)
        y = model(x)
        assert ("CosineLinear" in type(y.grad_fn).__name__) == joined
        own = model.delta.moves if places else model.delta.a
        found.append((y, *torch.autograd.grad((y * weights).sum(), [x, own])))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)
    at_the_clip = (found[0][2].abs() * model.delta.o.rate**-1 / model.delta.last).isclose(torch.ones(()).double())
    assert bool(at_the_clip.any()) == (places and size > 1)
    frozen = model(x.detach())
    torch.testing.assert_close(torch.autograd.grad((frozen * weights).sum(), own)[0], found[0][2])


def test_many_tokens_of_a_narrow_layer_and_none_meet_the_formed_update() -> None:
    delta = OneLayer(nn.Linear(128, 128), "loca").delta
    assert [delta.joins(torch.empty(rows, 128)) for rows in (0, 16, 4096)] == [False, True, False]
    assert OneLayer(nn.Linear(768, 768), "loca").delta.joins(torch.empty(4096, 768))


@pytest.mark.parametrize("places", [False, True])
def test_the_compiled_layer_is_the_layer(places: bool) -> None:
    model, x = adapted("linear", torch.float32)
    model.delta.in_turn = places
    want = model(x)
    (want**2).sum().backward()
    name = "moves" if places else "a"
    grad = getattr(model.delta, name).grad.clone()
    model.zero_grad()
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    (got**2).sum().backward()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(getattr(model.delta, name).grad, grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("components", 0),
        ("alpha", 0.0),
        ("dropout", 1.0),
        ("coefficient_steps", 0),
        ("location_steps", 0),
        ("location_until", -1),
        ("rate", 0.0),
        ("dct", "slow"),
        ("compat", 2),
    ],
)
def test_impossible_options_are_refused_by_name(option: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{option}="):
        LoCA.Options(**{option: value})


def test_more_components_than_entries_are_refused() -> None:
    with pytest.raises(ConfigError, match="components=1000 are more than the 240 entries of 'layer'"):
        OneLayer(nn.Linear(12, 20), "loca")


def learned(until: int, target: Tensor, steps: int, n: int) -> float:
    """The share of the target's energy left after training."""
    layer = nn.Linear(32, 32, bias=False)
    nn.init.zeros_(layer.weight)
    delta = OneLayer(layer, "loca", components=n, location_until=until, rate=0.2).delta
    optimizer = torch.optim.Adam(delta.parameters(), lr=5e-2)
    for step in range(steps):
        optimizer.zero_grad()
        ((delta.delta_weight() - target).square().sum() / 2).backward()
        optimizer.step()
        delta.on_step(step + 1, steps)
    return float((delta.delta_weight() - target).square().sum() / target.square().sum())


def test_learned_places_find_a_smooth_spectrum_that_random_ones_miss() -> None:
    i = torch.arange(32.0)
    blob = torch.exp(-((i[:, None] - 10) ** 2 + (i - 7) ** 2) / (2 * 4.0**2))
    c = dct_matrix(32)
    target = c.T @ blob @ c
    fixed, moving = learned(0, target, 500, 30), learned(400, target, 500, 30)
    assert fixed > 0.9
    assert moving < fixed - 0.05
