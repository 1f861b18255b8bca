"""LoRA-Pro against its theorem, written with dense matrices in float64."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from factor_models import HOSTS, adapted, loss_of, train, values
from torch import Tensor, nn

import fallow
from fallow.core.errors import ConfigError, ModelError, TrainingError
from fallow.optim import weight_moments
from fallow.optim.lora_pro import LoRAPro, adjusted, grams
from fallow.optim.pairs import find_pairs

BALANCES = ("sylvester", "symmetry", "zero")


def problem(seed: int = 0, k: int = 3, out: int = 9, inner: int = 7, r: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """A (k, r, in), B (k, out, r), g (k, out, in) in float64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((k, r, inner), (k, out, r), (k, out, inner))
    return tuple(torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)


def rule(a: Tensor, b: Tensor, g: Tensor, s: float, balance: str, damping: float = 0.0) -> tuple[Tensor, Tensor]:
    scale = torch.full((len(a), 1, 1), s, dtype=a.dtype)
    return adjusted(a, b, s * b.mT @ g, s * g @ a.mT, scale, grams(a, b, damping), balance)


def moved(a: Tensor, b: Tensor, directions: tuple[Tensor, Tensor], s: float) -> Tensor:
    return s * (b @ directions[0] + directions[1] @ a)


def projectors(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return b @ torch.linalg.pinv(b), torch.linalg.pinv(a) @ a


def solve_sylvester(left: Tensor, right: Tensor, value: Tensor) -> Tensor:
    """X of left X + X right = value, by the system of all its entries."""
    unit = torch.eye(len(left), dtype=left.dtype)
    system = torch.kron(left, unit) + torch.kron(unit, right.T.contiguous())
    return torch.linalg.solve(system, value.flatten()).view_as(value)


# -- the theorem ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("s", [1.0, 2.0, 5.665])
@pytest.mark.parametrize("balance", BALANCES)
def test_w_moves_by_what_is_nearest_to_the_full_gradient(balance, s):
    a, b, g = problem()
    made = moved(a, b, rule(a, b, g, s, balance), s)
    p_b, p_a = projectors(a, b)
    unit = torch.eye(9, dtype=torch.float64)
    torch.testing.assert_close(made, p_b @ g + (unit - p_b) @ g @ p_a, rtol=1e-10, atol=1e-10)
    for i in range(len(a)):  # least squares over all directions of both factors
        of_a = torch.kron(b[i].contiguous(), torch.eye(7, dtype=torch.float64))
        of_b = torch.kron(torch.eye(9, dtype=torch.float64), a[i].T.contiguous())
        both = s * torch.cat([of_a, of_b], 1)
        best = both @ torch.linalg.lstsq(both, g[i].flatten().unsqueeze(1), driver="gelsd").solution
        torch.testing.assert_close(made[i].flatten(), best.squeeze(1), rtol=1e-10, atol=1e-10)
    unit_a = torch.eye(7, dtype=torch.float64)
    torch.testing.assert_close(g - made, (unit - p_b) @ g @ (unit_a - p_a), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("balance", BALANCES)
def test_it_is_nearer_than_any_multiple_of_loras_own_gradient_and_descends(balance):
    a, b, g = problem(1)
    s = 2.0
    directions = rule(a, b, g, s, balance)
    made = moved(a, b, directions, s)
    raw_a, raw_b = s * b.mT @ g, s * g @ a.mT
    raw = moved(a, b, (raw_a, raw_b), s)
    multiple = (raw * g).sum((1, 2), keepdim=True) / raw.square().sum((1, 2), keepdim=True)
    assert ((made - g).norm(dim=(1, 2)) < 0.98 * (multiple * raw - g).norm(dim=(1, 2))).all()
    inner = (raw_a * directions[0]).sum((1, 2)) + (raw_b * directions[1]).sum((1, 2))
    torch.testing.assert_close(inner, made.square().sum((1, 2)), rtol=1e-10, atol=1e-10)


def test_the_sylvester_equation_is_solved_entry_by_entry():
    a, b, g = problem(2)
    s = 2.0
    plain, chosen = (rule(a, b, g, s, balance) for balance in ("zero", "sylvester"))
    for i in range(len(a)):
        raw = s * b[i].T @ g[i]
        right = -torch.linalg.inv(b[i].T @ b[i]) @ raw @ a[i].T / s**2
        x = solve_sylvester(b[i].T @ b[i], a[i] @ a[i].T, right)
        torch.testing.assert_close(chosen[0][i], plain[0][i] + x @ a[i], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(chosen[1][i], plain[1][i] - b[i] @ x, rtol=1e-10, atol=1e-10)


def test_no_other_x_comes_nearer_to_loras_own_gradients():
    a, b, g = problem(3)
    raw_a, raw_b = b.mT @ g, g @ a.mT

    def far(of_a: Tensor, of_b: Tensor) -> Tensor:
        return (of_a - raw_a).square().sum((1, 2)) + (of_b - raw_b).square().sum((1, 2))

    of_a, of_b = rule(a, b, g, 1.0, "sylvester")
    for seed in range(20):
        x = 0.1 * torch.randn(3, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        assert (far(of_a + x @ a, of_b - b @ x) >= far(of_a, of_b)).all()


def test_symmetry_gives_both_factors_equal_parts_of_what_both_can_reach():
    a, b, g = problem(4)
    of_a, of_b = rule(a, b, g, 2.0, "symmetry")
    p_b, p_a = projectors(a, b)
    torch.testing.assert_close(b @ of_a @ p_a, p_b @ of_b @ a, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("balance", BALANCES)
def test_a_zero_b_leaves_a_where_it_is_and_moves_w_within_as_rows(balance):
    a, b, g = problem(5)
    b.zero_()
    of_a, of_b = rule(a, b, g, 2.0, balance, damping=1e-6)
    assert (of_a == 0).all()
    torch.testing.assert_close(moved(a, b, (of_a, of_b), 2.0), g @ projectors(a, b)[1], rtol=1e-5, atol=1e-5)


def test_what_w_moves_by_does_not_depend_on_how_the_product_is_split():
    a, b, g = problem(6)
    first, other = (moved(c * a, b / c, rule(c * a, b / c, g, 2.0, "zero"), 2.0) for c in (1.0, 7.0))
    torch.testing.assert_close(first, other, rtol=1e-10, atol=1e-10)


def test_a_tiny_b_is_treated_as_a_large_one():
    a, b, g = problem(7)
    for damping in (1e-6, 0.0):
        made = [moved(a, c * b, rule(a, c * b, g, 2.0, "sylvester", damping), 2.0) for c in (1.0, 1e-6)]
        torch.testing.assert_close(made[0], made[1], rtol=1e-6, atol=1e-6)


# -- the optimizer ----------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """One linear layer (out 5, in 4), y = W x in float64, with gradients given by hand: loss = <g, W'>."""

    def __init__(self, rank: int, start: str = "zero") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 5, bias=False, dtype=torch.float64)
        fallow.attach(self, "lora", ["layer"], rank=rank, alpha=2.0 * rank)
        self.pair = find_pairs(self, "test")[0]
        if start != "zero":
            self.pair.b.data = torch.randn(5, rank, dtype=torch.float64)

    def weight(self) -> Tensor:
        return (self.layer.weight + self.pair.scale() * self.pair.b @ self.pair.a).detach()

    def feel(self, g: Tensor) -> None:
        self.zero_grad()
        (self.layer(torch.eye(4, dtype=torch.float64)).T * g).sum().backward()


def given(seed: int) -> Tensor:
    return torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_first_step_of_sgd_moves_w_by_the_projected_gradient():
    model, g = Layer(2), given(0)
    before, a = model.weight(), model.pair.a.detach().clone()
    optimizer = LoRAPro(model, lr=1e-3, mode="sgd", damping=0.0)
    model.feel(g)
    optimizer.step()
    assert torch.equal(model.pair.a, a)
    torch.testing.assert_close(model.weight() - before, -1e-3 * g @ torch.linalg.pinv(a) @ a, rtol=1e-10, atol=1e-14)


def test_sgd_of_full_rank_is_full_sgd_to_first_order():
    model = Layer(4, start="random")
    optimizer = LoRAPro(model, lr=1e-6, mode="sgd", damping=0.0)
    for step in range(3):
        before = model.weight()
        model.feel(given(step))
        optimizer.step()
        moved_by = model.weight() - before
        assert (moved_by + 1e-6 * given(step)).norm() / moved_by.norm() < 1e-4


def test_full_mode_with_a_square_a_is_adamw_on_w():
    model = Layer(4)
    lr, w = 1e-4, nn.Parameter(model.weight())
    optimizer, reference = LoRAPro(model, lr=lr, damping=0.0), torch.optim.AdamW([w], lr=lr, weight_decay=0.0)
    start = model.weight()
    for step in range(5):
        model.feel(given(step))
        optimizer.step()
        w.grad = given(step)
        reference.step()
        if step == 0:
            torch.testing.assert_close((model.weight() - start).abs(), torch.full_like(start, lr), rtol=1e-5, atol=0)
    assert (model.weight() - w).norm() / (w - start).norm() < 1e-2


def dense_step(a: Tensor, b: Tensor, g: Tensor, s: float, state: dict, lr: float, wd: float) -> tuple[Tensor, Tensor]:
    """Algorithm 2 for one layer, with every matrix formed."""
    b1, b2, eps = 0.9, 0.999, 1e-8
    inv_b, inv_a = torch.linalg.inv(b.T @ b), torch.linalg.inv(a @ a.T)
    full = moved(a, b, (inv_b @ b.T @ g / s, (torch.eye(len(b)) - b @ inv_b @ b.T).double() @ g @ a.T @ inv_a / s), s)
    state["m"] = b1 * state["m"] + (1 - b1) * full
    state["v"] = b2 * state["v"] + (1 - b2) * full**2
    state["t"] += 1
    u = (state["m"] / (1 - b1 ** state["t"])) / ((state["v"] / (1 - b2 ** state["t"])).sqrt() + eps)
    of_a, of_b = inv_b @ b.T @ u / s, (u - b @ inv_b @ b.T @ u) @ a.T @ inv_a / s
    x = solve_sylvester(b.T @ b, a @ a.T, -of_a @ a.T)
    decay = (1 - lr * wd) ** 0.5
    return decay * a - lr * (of_a + x @ a), decay * b - lr * (of_b - b @ x)


@pytest.mark.parametrize("block", [1 << 20, 9])
def test_full_mode_is_the_algorithm_written_with_dense_matrices(block, monkeypatch):
    monkeypatch.setattr(weight_moments, "BLOCK", block)  # 9 numbers: two rows of the layer at a time
    model = Layer(2, start="random")
    optimizer = LoRAPro(model, lr=1e-2, damping=0.0, weight_decay=0.1)
    a, b = model.pair.a.detach().clone(), model.pair.b.detach().clone()
    state = {"m": 0.0, "v": 0.0, "t": 0}
    for step in range(4):
        model.feel(given(step))
        optimizer.step()
        a, b = dense_step(a, b, given(step), 2.0, state, 1e-2, 0.1)
        torch.testing.assert_close(model.pair.a.detach(), a, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(model.pair.b.detach(), b, rtol=1e-9, atol=1e-9)


def test_efficient_mode_is_adamw_on_the_adjusted_gradients():
    model = Layer(2, start="random")
    optimizer = LoRAPro(model, lr=1e-2, mode="efficient", damping=0.0)
    a, b = nn.Parameter(model.pair.a.detach().clone()), nn.Parameter(model.pair.b.detach().clone())
    reference = torch.optim.AdamW([a, b], lr=1e-2, weight_decay=0.0)
    for step in range(4):
        model.feel(given(step))
        optimizer.step()
        one = rule(a.data[None], b.data[None], given(step)[None], 2.0, "sylvester")
        a.grad, b.grad = (direction[0] for direction in one)
        reference.step()
        torch.testing.assert_close(model.pair.a, a, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(model.pair.b, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("mode", ["full", "efficient", "sgd"])
def test_every_host_is_trained_alike_and_the_rest_by_its_plain_rule(host, mode):
    model = adapted(host)
    head = [param for name, param in model.named_parameters() if "head" in name and param.requires_grad]
    expected = [param.detach().clone() for param in head]
    optimizer = LoRAPro(model, lr=1e-2, mode=mode)
    loss_of(model).backward()
    plain = torch.optim.SGD if mode == "sgd" else torch.optim.AdamW
    reference = plain([nn.Parameter(p) for p in expected], lr=1e-2, weight_decay=0.0)
    for param, other in zip(head, reference.param_groups[0]["params"], strict=True):
        other.grad = param.grad.clone()
    optimizer.step()
    reference.step()
    for param, other in zip(head, reference.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(param, other)
    if mode == "sgd":
        optimizer.param_groups[0]["lr"] = 0.3
    losses = train(model, optimizer, [0] * 40)
    assert losses[-1] < 0.7 * losses[0]


def test_the_three_hosts_take_the_same_steps():
    ends = []
    for host in HOSTS:
        model = adapted(host)
        for pair in find_pairs(model, "test"):  # the same values, whichever order the host draws them in
            seed = sorted(["embed", "conv", "first", "second"]).index(pair.name.split(".")[-1])
            generator = torch.Generator().manual_seed(seed)
            pair.a.data = torch.randn(pair.a.shape, generator=generator)
            pair.b.data = torch.randn(pair.b.shape, generator=generator)
        torch.manual_seed(9)
        next(m for n, m in model.named_modules() if n.endswith("head")).weight.data = torch.randn(4, 6)
        next(m for n, m in model.named_modules() if n.endswith("head")).bias.data.zero_()
        ends.append(train(model, LoRAPro(model, lr=1e-3), 4))
    assert ends[0] == pytest.approx(ends[1], rel=1e-4)
    assert ends[0] == pytest.approx(ends[2], rel=1e-4)


def state_numbers(optimizer: torch.optim.Optimizer, pair) -> int:
    held = [v for p in (pair.a, pair.b) for key, v in optimizer.state[p].items() if key != "step"]
    return sum(value.numel() for value in held)


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, lambda m, n, r: 2 * m * n),
        ({"factored": True}, lambda m, n, r: m * n + m + n),
        ({"mode": "efficient"}, lambda m, n, r: 2 * r * (m + n)),
        ({"mode": "sgd"}, lambda m, n, r: 0),
    ],
)
def test_the_states_are_of_the_size_that_is_told(options, count):
    model = adapted("fallow")
    optimizer = LoRAPro(model, lr=1e-3, **options)
    train(model, optimizer, 1)
    for pair in optimizer.pairs:
        assert state_numbers(optimizer, pair) == count(*pair.shape)


@pytest.mark.parametrize(
    "options",
    [{}, {"mode": "efficient"}, {"factored": True, "max_norm": 0.1}, {"momentum_dtype": torch.bfloat16}],
)
def test_a_resumed_run_goes_on_bit_for_bit(options):
    model = adapted("fallow")
    optimizer = LoRAPro(model, lr=1e-2, **options)
    train(model, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, range(3, 6))
    file.seek(0)
    held = torch.load(file, weights_only=True)
    again = adapted("fallow", seed=5)
    other = LoRAPro(again, lr=1e-2, **options)
    again.load_state_dict(held["model"])
    other.load_state_dict(held["optimizer"])
    train(again, other, range(3, 6))
    assert all(torch.equal(value, values(again)[name]) for name, value in values(model).items())


def test_a_bf16_momentum_takes_two_bytes_and_ends_near():
    ends = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = adapted("fallow")
        optimizer = LoRAPro(model, lr=1e-2, momentum_dtype=dtype)
        ends[dtype] = train(model, optimizer, [0] * 30)[-1]
        assert all(optimizer.state[pair.b]["exp_avg"].dtype == dtype for pair in optimizer.pairs)
    assert ends[torch.bfloat16] == pytest.approx(ends[torch.float32], rel=0.1)


def test_a_factored_second_moment_is_that_of_adafactor():
    model = Layer(4)
    optimizer = LoRAPro(model, lr=1e-4, factored=True, damping=0.0)
    row, column = torch.zeros(5, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for step in range(2):
        g = given(step)
        if step == 0:  # B is zero, and A square: the gradient of W is seen whole
            row, column = 0.001 * g.square().mean(1), 0.001 * g.square().mean(0)
        model.feel(g)
        optimizer.step()
        if step == 0:
            state = optimizer.state[model.pair.b]
            torch.testing.assert_close(state["row"].squeeze(), row, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(state["column"].squeeze(), column, rtol=1e-9, atol=1e-12)
            u = g / (torch.outer(row, column) / row.mean() / 0.001).sqrt()
            torch.testing.assert_close(model.weight() - model.layer.weight, -1e-4 * u, rtol=1e-6, atol=1e-10)


def test_clipping_is_by_the_norm_that_w_moves_by():
    free, clipped = Layer(2, start="random"), Layer(2, start="random")
    g = given(0)
    made = moved(free.pair.a.data, free.pair.b.data, rule(free.pair.a.data[None], free.pair.b.data[None], g[None], 2.0,
                 "zero"), 2.0)[0]  # fmt: skip
    for model, most in ((free, None), (clipped, float(made.norm()) / 4)):
        optimizer = LoRAPro(model, lr=1e-4, mode="sgd", damping=0.0, max_norm=most)
        before = model.weight()
        model.feel(g)
        optimizer.step()
        model.moved = model.weight() - before
    assert float(clipped.moved.norm() / free.moved.norm()) == pytest.approx(0.25, rel=1e-3)


def test_a_pair_without_a_gradient_stays_with_its_moments():
    model = adapted("fallow")
    optimizer = LoRAPro(model, lr=1e-2)
    train(model, optimizer, 1)
    pair = next(pair for pair in optimizer.pairs if pair.name == "second")
    before, state = values(model), copy.deepcopy(optimizer.state[pair.b])
    optimizer.zero_grad()
    loss_of(model).backward()
    pair.a.grad = pair.b.grad = None
    optimizer.step()
    assert all(torch.equal(state[key], optimizer.state[pair.b][key]) for key in state)
    after = values(model)
    still = {name for name in before if torch.equal(before[name], after[name])}
    moving = {name for name in before if ".adapters." in name or "head" in name} - still
    assert {name.split(".")[0] for name in moving} == {"embed", "conv", "first", "head"}
    assert any(name.startswith("second.adapters") for name in still)


def test_groups_have_their_own_rates_and_closures_are_called_once():
    model = adapted("fallow")
    pairs = find_pairs(model, "test")
    first = [param for pair in pairs[:2] for param in (pair.a, pair.b)]
    rest = [param for pair in pairs[2:] for param in (pair.a, pair.b)]
    optimizer = LoRAPro(model, lr=1e-2, params=[{"params": first}, {"params": rest, "lr": 0.0}])
    before, calls = values(model), []

    def closure() -> Tensor:
        calls.append(1)
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    assert calls == [1]
    after = {id(param): param for param in model.parameters()}
    names = {id(param): name for name, param in model.named_parameters()}
    assert all(not torch.equal(before[names[id(param)]], after[id(param)]) for param in first)
    assert all(torch.equal(before[names[id(param)]], after[id(param)]) for param in rest)


def test_unscaled_gradients_of_a_scaler_make_the_same_step():
    plain, scaled = adapted("fallow"), adapted("fallow")
    optimizers = [LoRAPro(model, lr=1e-2) for model in (plain, scaled)]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    loss_of(plain).backward()
    scaler.scale(loss_of(scaled)).backward()
    optimizers[0].step()
    scaler.step(optimizers[1])
    for name, value in values(plain).items():
        torch.testing.assert_close(value, values(scaled)[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mode": "fast"}, "mode='fast' must be one of 'full', 'efficient', 'sgd'"),
        ({"balance": "none"}, "balance='none' must be one of"),
        ({"lr": -1.0}, "lr of LoRAPro=-1.0 must be"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\) of LoRAPro"),
        ({"damping": -1e-6}, "damping=-1e-06"),
        ({"max_norm": 0.0}, "max_norm=0.0 must be a finite number above"),
        ({"mode": "efficient", "factored": True}, "factored=True"),
        ({"mode": "sgd", "momentum_dtype": torch.bfloat16}, "momentum_dtype=torch.bfloat16"),
    ],
)
def test_impossible_settings_are_refused_when_it_is_made(options, said):
    with pytest.raises(ConfigError, match=said):
        LoRAPro(adapted("fallow"), **options)


def test_a_group_with_half_a_pair_and_one_without_any_are_refused():
    model = adapted("fallow")
    pair = find_pairs(model, "test")[0]
    with pytest.raises(ConfigError, match=f"needs A and B of '{pair.name}' in the same param group"):
        LoRAPro(model, params=[pair.a])
    with pytest.raises(ConfigError, match="holds no LoRA factor"):
        LoRAPro(model, params=[nn.Parameter(torch.ones(2))])


def test_values_that_are_no_numbers_are_told_in_words():
    model = adapted("fallow")
    optimizer = LoRAPro(model, lr=1e-2)
    loss_of(model).backward()
    optimizer.pairs[0].b.data.fill_(float("nan"))
    with pytest.raises(TrainingError, match="NaN or infinite"):
        optimizer.step()


def test_sharded_factors_are_refused():
    model = adapted("fallow")
    find_pairs(model, "test")[0].a.placements = ("Shard(0)",)
    with pytest.raises(ModelError, match="needs whole factors"):
        LoRAPro(model)
