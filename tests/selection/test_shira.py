"""SHiRA against its specification; the numbers in the names are those of the eight checks there."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from torch import Tensor, nn

import fallow
from fallow.core.errors import ConfigError, DataError, SelectionError
from fallow.core.probe import gradients
from fallow.core.select import eligible

MASKS = ("struct", "rand", "wm", "grad", "snip")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(20, 24)
        self.conv = nn.Conv2d(1, 8, 3)
        self.up = nn.Linear(24, 48)
        self.norm = nn.LayerNorm(48)
        self.drop = nn.Dropout(0.5)
        self.down = nn.Linear(48, 24)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        x = x + self.conv(x.unsqueeze(1)).mean()
        return self.down(self.drop(self.norm(self.up(x))))


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


@pytest.fixture
def batches() -> list[Tensor]:
    return [torch.randint(0, 20, (3, 6)) for _ in range(4)]


def make(mask: str, model: nn.Module, batches: list[Tensor], **options) -> fallow.SHiRA:
    data = {"batches": batches, "loss": loss} if mask in ("grad", "snip") else {}
    return fallow.SHiRA(model, mask, **{"density": None if "every" in options else 0.2, **data, **options})


def mask_of(optimizer: fallow.SHiRA, name: str) -> Tensor:
    """Boolean (rows, columns)."""
    slot = optimizer.slots[name]
    flat = torch.zeros(slot.weight.numel(), dtype=torch.bool).index_fill_(0, slot.index.long(), True)
    return flat.view(slot.weight.shape[0], -1)


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Tensor]) -> None:
    model.eval()
    for batch in batches:
        loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("mask", MASKS)
def test_1_a_fresh_adapter_is_the_base_and_trains_exactly_k_entries_of_each_matrix(mask, batches):
    model = Net().eval()
    before = model(batches[0]).detach()
    optimizer = make(mask, model, batches)
    assert torch.equal(model(batches[0]), before)
    assert set(optimizer.slots) == {"conv.weight", "up.weight", "down.weight"}
    for name, slot in optimizer.slots.items():
        n, m = slot.weight.shape[0], slot.weight[0].numel()
        if mask == "struct":
            every = max(1, round(1 / (round(0.2 * n * m) / (n * m) - 1 / max(n, m))))
            rows = math.ceil(n / every)
            expected = rows * m + min(n, m) - len([i for i in range(0, n, every) if i < m])
        else:
            expected = round(0.2 * n * m)
        assert slot.index.numel() == expected, name
    assert optimizer.trained_parameters == sum(proxy.numel() for proxy in optimizer.trainable())
    assert all(not p.requires_grad for n, p in model.named_parameters() if n not in optimizer.slots)


@pytest.mark.parametrize("mask", MASKS)
def test_2_gradients_of_s_are_the_dense_ones_and_nothing_else_moves(mask, batches):
    model = Net().eval()
    base = copy.deepcopy(model)
    optimizer = make(mask, model, batches)
    reference = copy.deepcopy(base)
    loss(model, batches[0]).backward()
    loss(reference, batches[0]).backward()
    for name, slot in optimizer.slots.items():
        expected = reference.get_parameter(name).grad.reshape(-1)[slot.index.long()]
        torch.testing.assert_close(slot.proxy.grad, expected, rtol=1e-7, atol=1e-7)
        assert not slot.proxy.detach().any()  # s = 0
    optimizer.zero_grad()
    fit(model, optimizer, batches)
    for name, param in model.named_parameters():
        differs = (param.detach() != base.get_parameter(name)).view(param.shape[0], -1)
        allowed = mask_of(optimizer, name) if name in optimizer.slots else torch.zeros_like(differs)
        assert not bool((differs & ~allowed).any()), name
    assert float((model.up.weight - base.up.weight).abs().max()) > 0


def test_3_wm_grad_and_snip_take_the_largest_scores_of_each_layer(batches):
    model = Net().eval()
    reference = copy.deepcopy(model)
    for batch in batches:
        loss(reference, batch).backward()
    for mask in ("wm", "grad", "snip"):
        optimizer = make(mask, copy.deepcopy(model), batches)
        for name in optimizer.slots:
            weight = model.get_parameter(name).detach()
            grad = reference.get_parameter(name).grad
            score = {"wm": weight, "grad": grad, "snip": weight * grad}[mask].abs().view(weight.shape[0], -1)
            taken = mask_of(optimizer, name)
            assert score[taken].min() >= score[~taken].max() * (1 - 1e-5)


@pytest.mark.parametrize("columns", [False, True])
def test_3_struct_is_every_fth_row_and_the_diagonal(columns, batches):
    optimizer = make("struct", Net(), batches, every=5, offset=2, columns=columns)
    for name in optimizer.slots:
        taken = mask_of(optimizer, name)
        i, j = torch.arange(taken.shape[0]).view(-1, 1), torch.arange(taken.shape[1]).view(1, -1)
        assert torch.equal(taken, ((j if columns else i) % 5 == 2) | (i == j))


def test_3_rand_depends_on_the_seed_and_the_layer_only():
    def masks(seed: int) -> list[Tensor]:
        model = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 30))
        optimizer = fallow.SHiRA(model, "rand", density=0.1, seed=seed)
        return [optimizer.slots[name].index for name in ("0.weight", "1.weight")]

    one, again, other = masks(1), masks(1), masks(2)
    assert len(one[0].unique()) == 90
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[0], other[0])
    assert not torch.equal(one[0], one[1])


def test_3_a_wm_series_gives_each_task_its_own_entries():
    masks = [
        fallow.SHiRA(mlp_of(3), "wm", density=0.2, task=task).slots["0.weight"].index.tolist() for task in range(5)
    ]
    assert len(set().union(*masks)) == 5 * 180
    with pytest.raises(SelectionError, match="at most 5 tasks fit"):
        fallow.SHiRA(mlp_of(3), "wm", density=0.2, task=5)


def mlp_of(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 10))


def test_4_structs_with_different_offsets_are_orthogonal_without_the_diagonal():
    changes = {}
    for diagonal in (False, True):
        for offset in (0, 1):
            model = mlp_of(0)
            base = model[0].weight.detach().clone()
            optimizer = fallow.SHiRA(model, "struct", every=6, offset=offset, diagonal=diagonal, lr=0.1)
            model(torch.randn(5, 30)).square().sum().backward()
            optimizer.step()
            changes[diagonal, offset] = model[0].weight.detach() - base
    product = changes[False, 0].T @ changes[False, 1]
    assert not product.any()
    assert changes[False, 0].count_nonzero() == 5 * 30
    product = changes[True, 0].T @ changes[True, 1]
    # rows of one meet only the diagonal of the other: both are counted once
    assert product.count_nonzero() <= changes[True, 0].count_nonzero() + changes[True, 1].count_nonzero()


@pytest.mark.parametrize("mask", ["rand", "wm"])
def test_5_the_change_has_a_higher_rank_than_a_lora_of_the_same_size(mask):
    model = nn.Sequential(nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 4))
    base = model[0].weight.detach().clone()
    optimizer = fallow.SHiRA(model, mask, r=2, lr=1e-2, include="0.weight")
    assert optimizer.trained_parameters == 2 * (48 + 48)
    x, y = torch.randn(200, 48), torch.randint(0, 4, (200,))
    for _ in range(5):
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert int(torch.linalg.matrix_rank(model[0].weight.detach() - base)) > 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_6_switching_there_and_back_and_disabling_restore_every_bit(dtype, batches):
    deltas = []
    for mask, seed in (("rand", 0), ("wm", 1)):
        torch.manual_seed(0)
        model = Net().to(dtype)
        optimizer = make(mask, model, batches, lr=1e-2, seed=seed)
        fit(model, optimizer, batches)
        deltas.append(optimizer.delta())
    torch.manual_seed(0)
    model = Net().to(dtype)
    base = copy.deepcopy(model.state_dict())
    adapters = fallow.Adapters(model)
    adapters.add("a", deltas[0])
    first = copy.deepcopy(model.state_dict())
    adapters.add("b", deltas[1], scale=0.0)

    def equals(state: dict[str, Tensor]) -> bool:
        return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())

    assert not equals(base)
    assert equals(first)  # scale 0 adds nothing
    adapters.switch("b")
    assert not equals(first)
    adapters.switch("a")
    assert equals(first)
    with adapters.disabled():
        assert equals(base)
    assert equals(first)
    adapters.set_scales({"a": 1.0, "b": 1.0})
    for name, value in model.state_dict().items():
        total = base[name].float().reshape(-1).clone()
        for delta in deltas:
            if name in delta.entries:
                entry = delta.entries[name]
                total.index_add_(0, entry.index.long(), entry.values.float())
        assert torch.equal(value.reshape(-1), total.to(dtype))


def test_7_a_forward_keeps_no_copy_of_a_weight(batches):
    model = Net()
    optimizer = make("rand", model, batches)
    fit(model, optimizer, batches)
    places = {param.data_ptr() for param in model.parameters()}
    shapes = {tuple(p.shape) for p in model.parameters() if p.ndim > 1} | {(24, 48), (48, 24)}
    copies: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        if tuple(tensor.shape) in shapes and tensor.data_ptr() not in places:
            copies.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(model, batches[0])
    assert copies == []


def test_masters_are_the_changes_so_that_bfloat16_does_not_drift(batches):
    torch.manual_seed(0)
    model = Net().bfloat16()
    optimizer = make("rand", model, batches, lr=1e-5)
    slot = optimizer.slots["up.weight"]
    base = slot.base.clone()
    for _ in range(50):
        slot.proxy.grad = torch.ones_like(slot.proxy)
        optimizer.step()
    torch.testing.assert_close(slot.proxy.detach(), torch.full_like(slot.proxy, -5e-4), rtol=0.01, atol=0)
    assert torch.equal(slot.read(), (base.float() + slot.proxy.detach()).bfloat16())


def test_weight_decay_pulls_towards_the_base(batches):
    model = Net()
    optimizer = make("rand", model, batches, lr=0.1, weight_decay=1.0)
    slot = optimizer.slots["up.weight"]
    slot.proxy.data.fill_(1.0)
    slot.store()
    slot.proxy.grad = torch.zeros_like(slot.proxy)
    optimizer.step()
    torch.testing.assert_close(slot.proxy.detach(), torch.full_like(slot.proxy, 0.9))
    torch.testing.assert_close(slot.read(), slot.base + 0.9)


class TestCalibration:
    def test_gradients_are_summed_or_averaged_in_magnitude_and_leave_no_trace(self, batches):
        model = Net().train()
        reference = copy.deepcopy(model).eval()
        targets = eligible(model, include=["up", "tokens"])
        parts = []
        for batch in batches:
            reference.zero_grad()
            loss(reference, batch).backward()
            parts.append({t.name: reference.get_parameter(t.name).grad.clone() for t in targets})
        summed = gradients(model, targets, batches, loss)
        mean = gradients(model, targets, batches, loss, "mean_abs")
        for target in targets:
            dense = torch.stack([part[target.name] for part in parts])
            torch.testing.assert_close(summed[target.name], dense.sum(0).abs(), rtol=1e-5, atol=1e-8)
            torch.testing.assert_close(mean[target.name], dense.abs().mean(0), rtol=1e-5, atol=1e-8)
        assert model.training
        assert model.drop.training
        assert all(param.grad is None and param.requires_grad for param in model.parameters())

    def test_calibration_without_batches_or_with_broken_ones_is_refused(self, batches):
        with pytest.raises(DataError, match="batches is empty"):
            make("snip", Net(), [])
        with pytest.raises(DataError, match="not finite"):
            fallow.SHiRA(Net(), "grad", batches=batches, loss=lambda model, batch: loss(model, batch) * math.inf)
        with pytest.raises(ConfigError, match="aggregate='max'"):
            make("snip", Net(), batches, aggregate="max")
        with pytest.raises(ConfigError, match="give batches="):
            fallow.SHiRA(Net(), "snip")

    @pytest.mark.parametrize("mask", ["grad", "snip"])
    def test_a_layer_that_no_batch_reaches_is_told(self, mask, batches):
        model = Net()
        model.unused = nn.Linear(10, 10)
        with pytest.warns(UserWarning, match="every score of 'unused.weight' is zero: no calibration batch reaches it"):
            make(mask, model, batches)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            make(mask, Net(), batches)

    def test_snip_is_the_default_with_data_and_rand_without(self, batches):
        assert fallow.SHiRA(Net(), batches=batches, loss=loss).metadata["mask"] == "snip"
        assert fallow.SHiRA(Net()).metadata["mask"] == "rand"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mask": "magnitude"}, ConfigError, "mask='magnitude' does not exist"),
        ({"mask": "rand", "density": 0.1, "r": 2}, SelectionError, "exactly one"),
        ({"mask": "rand", "r": 40}, SelectionError, "asks for 680 entries of 'conv.weight'"),
        ({"mask": "struct", "density": 0.01}, SelectionError, "used up by its diagonal"),
        ({"mask": "struct", "every": 0}, ConfigError, "every=0"),
        ({"mask": "struct", "every": 4, "offset": 4}, ConfigError, "offset=4"),
        (
            {"mask": "struct", "density": 0.3, "offset": 5},
            SelectionError,
            r"offset=5 takes no row.*give offset < 5,",
        ),
        ({"mask": "wm", "task": -1}, ConfigError, "task=-1"),
        ({"mask": "rand", "task": 1}, ConfigError, "0 unless mask='wm'"),
        ({"mask": "rand", "offset": 1}, ConfigError, "belong to mask='struct'"),
    ],
)
def test_impossible_masks_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        fallow.SHiRA(Net(), **options)


def test_include_may_name_what_is_not_adapted_by_default(batches):
    optimizer = fallow.SHiRA(Net(), "rand", density=0.1, include=["tokens", "norm.bias"])
    assert set(optimizer.slots) == {"tokens.weight", "norm.bias"}
