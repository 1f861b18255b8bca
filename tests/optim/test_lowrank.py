"""LowRank's core: held to the plain equations, to AdamW where it must be AdamW, and to its own past when resumed."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from plain_lowrank import PlainLowRank
from torch import nn

from fallow.core.errors import ConfigError, TrainingError
from fallow.optim.lowrank import LowRank

SHAPES = {"wide": (6, 11), "tall": (11, 6), "square": (7, 7), "conv": (5, 3, 2, 2)}


def gradients(
    shape: tuple[int, ...], count: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) * (1 + i % 3) for i in range(count)]


def run(optimizer: torch.optim.Optimizer, param: nn.Parameter, grads: list[torch.Tensor]) -> None:
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.25, "decay": 0.1},
        {"galore_eps": True, "eps": 1e-3},
        {"residual": "fira"},
        {"residual": "fira", "scale": 0.25, "decay": 0.1},
        {"residual": "fira-official", "scale": 0.25},
        {"moments": "rotate"},
        {"moments": "reset", "residual": "fira"},
    ],
    ids=lambda options: "-".join(f"{key}={value}" for key, value in options.items()) or "galore",
)
def test_the_update_equals_the_plain_equations(shape, options):
    grads = gradients(shape, 8)
    param = nn.Parameter(gradients(shape, 1, seed=1)[0])
    plain = PlainLowRank(rank=3, lr=1e-2, gap=3, **options)
    residual = {"name": "fira", "exact": plain.residual == "fira"} if plain.residual != "drop" else "drop"
    own = LowRank(
        [param], 1e-2, 3, basis="svd", residual=residual, refresh_every=3, scale=plain.scale, eps=plain.eps,
        weight_decay=plain.decay, eps_mode="galore" if plain.galore_eps else "torch", moments=plain.moments,
    )  # fmt: skip
    wanted = param.detach().clone().flatten(1)
    for grad in grads:
        run(own, param, [grad])
        wanted = plain.step(wanted, grad.flatten(1))
        torch.testing.assert_close(param.detach().flatten(1), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(6, 11), (11, 6), (7, 7), (1, 9), (9,), ()], ids=str)
def test_a_rank_that_is_full_is_adamw(shape):
    param = nn.Parameter(torch.randn(shape))
    other = nn.Parameter(param.detach().clone())
    run(LowRank([param], 1e-2, 7, weight_decay=0.1), param, gradients(shape, 6, dtype=torch.float32))
    run(torch.optim.AdamW([other], 1e-2, weight_decay=0.1), other, gradients(shape, 6, dtype=torch.float32))
    torch.testing.assert_close(param, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(6, 11), (11, 6), (7, 7)], ids=str)
def test_the_first_step_moves_by_the_sign_within_the_basis(shape):
    param = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    grad = gradients(shape, 1)[0]
    own = LowRank([param], 1e-2, 2, basis="svd", scale=0.5, eps=1e-12)
    run(own, param, [grad])
    p = own.state[param]["basis"]
    g = grad.mT if shape[0] >= shape[1] else grad
    moved = param.detach().mT if shape[0] >= shape[1] else param.detach()
    torch.testing.assert_close(moved, -1e-2 * 0.5 * p @ torch.sign(p.mT @ g), rtol=0, atol=2e-7)
    assert torch.linalg.matrix_rank(moved) == 2
    assert torch.dist(p.mT @ p, torch.eye(2, dtype=p.dtype)) < 1e-10


@pytest.mark.parametrize("basis", ["svd", "rsvd", "warm", "gram"])
def test_the_basis_is_chosen_every_so_many_steps_and_the_weight_moves_within_it_alone(basis):
    param = nn.Parameter(torch.randn(10, 16))
    own = LowRank([param], 1e-2, 4, basis=basis, refresh_every=3)
    changed, last = [], None
    for grad in gradients((10, 16), 8, dtype=torch.float32):
        before = param.detach().clone()
        run(own, param, [grad])
        p = own.state[param]["basis"].clone()
        changed.append(last is None or not torch.equal(p, last))
        last, moved = p, param.detach() - before
        assert (p.mT @ p - torch.eye(4)).abs().max() < 1e-5
        assert (moved - p @ (p.mT @ moved)).abs().max() < 1e-6
    assert changed == [True, False, False, True, False, False, True, False]


def test_a_zero_gradient_chooses_nothing_and_is_tried_again():
    param = nn.Parameter(torch.randn(6, 9))
    own = LowRank([param], 1e-2, 2, refresh_every=100)
    run(own, param, [torch.zeros(6, 9)])
    assert not own.state[param]["chosen"]
    grad = gradients((6, 9), 1, dtype=torch.float32)[0]
    run(own, param, [grad])
    p = own.state[param]["basis"]
    assert own.state[param]["chosen"]
    assert (p.mT @ grad).norm() > 0.7 * grad.norm() * math.sqrt(2 / 6)
    assert own.state[param]["due"] == 100


def test_a_gradient_that_is_not_finite_reaches_no_decomposition_and_changes_nothing():
    params = [nn.Parameter(torch.randn(6, 9)) for _ in range(2)]
    own = LowRank([("first", params[0]), ("second", params[1])], 1e-2, 2, refresh_every=2)
    before = [param.detach().clone() for param in params]
    params[0].grad, params[1].grad = torch.randn(6, 9), torch.full((6, 9), float("nan"))
    with pytest.raises(TrainingError, match=r"gradient of second \(6, 9\)"):
        own.step()
    assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True))


@pytest.mark.parametrize("basis", ["rsvd", "warm"])
def test_a_fast_basis_holds_as_much_of_the_gradient_as_the_decomposition(basis):
    generator = torch.Generator().manual_seed(3)
    u, v = (torch.linalg.qr(torch.randn(n, 60, generator=generator))[0] for n in (60, 90))
    grad = (u * 0.9 ** torch.arange(60)) @ v.mT
    param = nn.Parameter(torch.zeros(60, 90))
    own = LowRank([param], 1e-2, 10, basis=basis, refresh_every=1)
    run(own, param, [grad + 0.001 * noise for noise in gradients((60, 90), 3, dtype=torch.float32)])
    best = torch.linalg.svdvals(grad)[:10].norm()
    assert (own.state[param]["basis"].mT @ grad).norm() >= 0.99 * best


def test_staggered_sites_are_refreshed_one_after_the_other():
    params = [nn.Parameter(torch.randn(5, 8)) for _ in range(3)]
    own = LowRank(params, 1e-2, 2, refresh_every=6, stagger=True)
    seen: list[list[int]] = []
    last = [None] * 3
    for _ in range(12):
        for param in params:
            param.grad = torch.randn(5, 8)
        own.step()
        now = [own.state[param]["basis"].clone() for param in params]
        seen.append([i for i in range(3) if last[i] is None or not torch.equal(now[i], last[i])])
        last = now
    assert seen == [[0, 1, 2], [], [1], [], [2], [], [0], [], [1], [], [2], []]


def test_a_space_that_stays_is_chosen_less_and_less_often_if_lazy():
    still, moving = nn.Parameter(torch.zeros(12, 20)), nn.Parameter(torch.zeros(12, 20))
    own = LowRank([still, moving], 1e-2, 2, basis="svd", refresh_every=2, lazy=0.9)
    kept = gradients((12, 20), 1, dtype=torch.float32)[0]
    for i in range(20):
        still.grad, moving.grad = kept.clone(), gradients((12, 20), 1, seed=i, dtype=torch.float32)[0]
        own.step()
    assert own.state[still]["gap"] == 32
    assert own.state[moving]["gap"] == 2


def resumable(options: dict) -> tuple[nn.Sequential, LowRank]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 4))
    return model, LowRank(model.named_parameters(), 1e-2, 3, refresh_every=4, **options)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for i in steps:
        generator = torch.Generator().manual_seed(i)
        x, y = torch.randn(8, 9, generator=generator), torch.randn(8, 4, generator=generator)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("basis", ["svd", "rsvd", "warm", "gram"])
@pytest.mark.parametrize("residual", ["drop", "fira"])
def test_a_resumed_run_goes_on_bit_for_bit(basis, residual):
    options = {"basis": basis, "residual": residual, "stagger": True}
    model, optimizer = resumable(options)
    train(model, optimizer, range(6))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, range(6, 16))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other, resumed = resumable(options)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(other, resumed, range(6, 16))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_the_states_are_as_large_as_the_formula():
    shapes = [(12, 20), (20, 12), (12, 12)]
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    own = LowRank(params, 1e-2, 5)
    for param in params:
        param.grad = torch.randn_like(param)
    own.step()
    for param, (m, n) in zip(params, shapes, strict=True):
        held = sum(value.numel() for value in own.state[param].values() if isinstance(value, torch.Tensor))
        assert held == 5 * (min(m, n) + 2 * max(m, n))


def test_groups_have_options_of_their_own_and_may_come_later():
    matrices = [nn.Parameter(torch.randn(6, 9)) for _ in range(2)]
    own = LowRank([{"params": [matrices[0]], "rank": 2}], 1e-2)
    own.add_param_group({"params": [matrices[1]], "rank": None})
    for param in matrices:
        param.grad = torch.randn(6, 9)
    own.step()
    assert own.state[matrices[0]]["m"].shape == (2, 9)
    assert own.state[matrices[1]]["m"].shape == (6, 9)
    with pytest.raises(ConfigError, match="a group has no option 'ranks'"):
        own.add_param_group({"params": [nn.Parameter(torch.randn(6, 9))], "ranks": 2})


def test_a_closure_is_called_with_gradients_on():
    param = nn.Parameter(torch.randn(6, 9))
    own = LowRank([param], 1e-2, 2)

    def closure():
        own.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    first = float(own.step(closure).detach())
    assert float(own.step(closure).detach()) < first


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"lr": -1.0}, "lr=-1.0 must be a number at least 0"),
        ({"rank": -2}, "rank=-2"),
        ({"rank": 1.5}, "rank=1.5"),
        ({"rank": 0}, "rank=0 leaves nothing to residual='drop'"),
        ({"basis": "sdv"}, r"basis='sdv' does not exist \(did you mean 'svd'"),
        ({"basis": {"name": "rsvd", "stepz": 1}}, "basis='rsvd' has no option 'stepz'"),
        ({"basis": {"name": "rsvd", "steps": -1}}, "rsvd: steps=-1"),
        ({"inner": "adamv"}, r"inner='adamv' does not exist \(did you mean 'adamw'"),
        ({"residual": "frira"}, r"did you mean 'fira'"),
        ({"residual": {"name": "fira", "limit": 1.0}}, "fira: limit=1.0 must be a number above 1"),
        ({"residual": {"name": "fira", "level": "row"}}, "fira: level='row' does not exist"),
        ({"refresh_every": 0}, "refresh_every=0"),
        ({"refresh_every": 2.5}, "refresh_every=2.5 must be a whole number"),
        ({"moments": "turn"}, "moments='turn' does not exist"),
        ({"betas": (0.9, 1.0)}, "betas=1.0 must be a number at least 0 and below 1"),
        ({"betas": 0.9}, "betas=0.9 must be two numbers"),
        ({"lazy": 0.0}, "lazy=0.0"),
        ({"side": "top"}, "side='top' does not exist"),
        ({"eps_mode": "adam"}, "eps_mode='adam' does not exist"),
        ({"eps": -1e-8}, "eps=-1e-08"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"scale": float("nan")}, "scale=nan"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_when_the_optimizer_is_made(given, said):
    with pytest.raises(ConfigError, match=said):
        LowRank([nn.Parameter(torch.randn(6, 9))], **given)


def test_a_state_of_another_model_or_optimizer_is_refused_and_changes_nothing():
    model, own = resumable({})
    train(model, own, range(3))
    before = own.state_dict()
    larger = nn.Sequential(nn.Linear(9, 13), nn.Tanh(), nn.Linear(13, 13), nn.Tanh(), nn.Linear(13, 4))
    other = LowRank(larger.named_parameters(), 1e-3, 3)
    train(larger, other, range(1))
    foreign = torch.optim.AdamW(model.parameters())
    train(model, foreign, range(1))
    for state, said in (
        (other.state_dict(), "belongs to another model, or to other options"),
        (foreign.state_dict(), "is not a low-rank optimizer's"),
    ):
        with pytest.raises(ConfigError, match=said):
            own.load_state_dict(state)
        after = own.state_dict()
        assert after["param_groups"] == before["param_groups"]
        assert all(torch.equal(after["state"][0][key], before["state"][0][key]) for key in ("m", "v", "basis"))
    train(model, own, range(3, 5))


def test_a_group_that_is_refused_is_not_added():
    own = LowRank([nn.Parameter(torch.randn(6, 9))], 1e-2, 2)
    with pytest.raises(ConfigError, match="some are float16"):
        own.add_param_group({"params": [nn.Parameter(torch.randn(6, 9).half())], "rounding": "stochastic"})
    assert len(own.param_groups) == 1


def test_a_copied_optimizer_goes_on_like_the_one_it_is_a_copy_of():
    model, own = resumable({"residual": "fira"})
    train(model, own, range(3))
    other, copied = copy.deepcopy((model, own))
    for one, optimizer in ((model, own), (other, copied)):
        train(one, optimizer, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_embeddings_and_heads_of_a_model_take_the_plain_rule(tiny_gpt2):
    own = LowRank(tiny_gpt2(), 1e-3, 4)
    projected = {site.name for site in own.sites() if site.rank is not None}
    plain = {site.name for site in own.sites() if site.rank is None}
    assert "transformer.h.0.attn.c_attn.weight" in projected
    assert {"transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.weight"} <= plain
    assert all(name.startswith("transformer.h.") and name.endswith(".weight") for name in projected)


def test_patterns_on_names_choose_what_is_projected():
    model, _ = resumable({})
    names = {
        pattern: [site.name for site in LowRank(model, 1e-3, 2, **given).sites() if site.rank is not None]
        for pattern, given in (("all", {}), ("only", {"include": "^2"}), ("but", {"exclude": ["^2", "^4"]}))
    }
    assert names == {"all": ["0.weight", "2.weight", "4.weight"], "only": ["2.weight"], "but": ["0.weight"]}
    for given, said in (
        ({"include": "^7"}, "include='\\^7' finds no matrix"),
        ({"include": "("}, "is no regular expression"),
    ):
        with pytest.raises(ConfigError, match=said):
            LowRank(model, 1e-3, 2, **given)
    with pytest.raises(ConfigError, match="are patterns on names"):
        LowRank(model.parameters(), 1e-3, 2, exclude="^2")


def test_weights_in_the_channels_last_format_move_like_others():
    grads = gradients((5, 4, 3, 3), 4, dtype=torch.float32)
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        param = nn.Parameter(torch.ones(5, 4, 3, 3).to(memory_format=layout))
        own = LowRank([param], 1e-2, 2, basis="svd")
        run(own, param, [grad.to(memory_format=layout) for grad in grads])
        assert param.is_contiguous(memory_format=layout)
        found.append(param.detach())
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)


def test_a_weight_that_cannot_be_seen_as_a_matrix_is_an_error():
    param = nn.Parameter(torch.randn(6, 5, 2, 2).permute(1, 0, 2, 3))
    param.grad = torch.randn(5, 6, 2, 2)
    with pytest.raises(ConfigError, match="cannot be seen as a matrix without a copy"):
        LowRank([param], 1e-2, 2).step()


@pytest.mark.parametrize("residual", ["drop", "fira", "sign", "sgd", "apollo"])
def test_a_rate_may_be_a_tensor_that_changes(residual):
    found = []
    for wrap in (float, torch.tensor):
        params = [nn.Parameter(torch.ones(6, 9)), nn.Parameter(torch.ones(9))]
        own = LowRank(params, wrap(1e-2), 2, residual=residual, weight_decay=0.1)
        for step in range(4):
            for at, param in enumerate(params):
                param.grad = gradients(tuple(param.shape), 1, seed=2 * step + at, dtype=torch.float32)[0]
            own.step()
            own.param_groups[0]["lr"] = wrap(1e-2 / (step + 1))
        found.append([param.detach() for param in params])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_complex_parameters_are_refused():
    with pytest.raises(ConfigError, match="only real floating-point ones"):
        LowRank([nn.Parameter(torch.randn(6, 9, dtype=torch.complex64))])


@pytest.mark.parametrize("rank", [None, 4])
def test_a_sparse_gradient_is_refused_by_name(rank):
    words = nn.Embedding(40, 12, sparse=True)
    own = LowRank([("words", words.weight)], 1e-2, rank, exclude=())
    words(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ConfigError, match=r"words has a torch\.sparse_coo gradient; give sparse=False"):
        own.step()
