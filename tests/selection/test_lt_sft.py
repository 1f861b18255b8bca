from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fallow
from fallow.core.errors import ConfigError, DataError, ModelError, SelectionError
from fallow.core.quantized import quantize_


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(8, 80), torch.randint(0, 10, (8,))) for _ in range(3)]


def test_the_entries_that_a_dense_run_moved_most_are_trained_from_their_first_values(mlp, batches):
    model = mlp()
    base = copy.deepcopy(model.state_dict())
    reference = copy.deepcopy(model)
    dense = torch.optim.AdamW(reference.parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(5):
        dense.zero_grad()
        loss(reference, batches[step % 3]).backward()
        dense.step()
    moved = torch.cat([(p.detach() - base[n]).abs().reshape(-1) for n, p in reference.named_parameters()])
    optimizer = fallow.LTSFT(model, fraction=0.05, batches=batches, loss=loss, dense_steps=5, dense_lr=1e-3)
    assert all(torch.equal(value, base[name]) for name, value in model.state_dict().items())
    assert optimizer.trained_parameters == round(0.05 * moved.numel())
    least = moved.sort(descending=True).values[optimizer.trained_parameters - 1]
    for name, slot in optimizer.slots.items():
        change = (reference.get_parameter(name).detach() - base[name]).abs().reshape(-1)
        assert change[slot.index.long()].min() >= least
    loss(model, batches[0]).backward()
    optimizer.step()
    changed = sum(int((value != base[name]).sum()) for name, value in model.state_dict().items())
    assert 0 < changed <= optimizer.trained_parameters


def test_buffers_are_rewound_and_a_diverging_dense_phase_leaves_the_model_as_it_was(batches):
    model = nn.Sequential(nn.Linear(80, 10), nn.BatchNorm1d(10))
    base = copy.deepcopy(model.state_dict())
    fallow.LTSFT(model, batches=batches, loss=loss, dense_steps=2).close()
    assert all(torch.equal(value, base[name]) for name, value in model.state_dict().items())
    with pytest.raises(DataError, match="diverged"):
        fallow.LTSFT(model, batches=batches, loss=lambda m, b: loss(m, b) * float("nan"), dense_steps=3)
    assert all(torch.equal(value, base[name]) for name, value in model.state_dict().items())
    assert all(param.requires_grad and param.grad is None for param in model.parameters())


def test_impossible_requests_are_refused(mlp, batches):
    with pytest.raises(ConfigError, match="dense_steps=0"):
        fallow.LTSFT(mlp(), batches=batches, loss=loss, dense_steps=0)
    with pytest.raises(DataError, match="walked only once"):
        fallow.LTSFT(mlp(), batches=iter(batches), loss=loss, dense_steps=10)
    with pytest.raises(SelectionError, match="outside"):
        fallow.LTSFT(mlp(), fraction=2.0, batches=batches, loss=loss)
    model = mlp()
    quantize_(model, "int8")
    with pytest.raises(ModelError, match=r"dense phase trains whole weights, and '0\.weight' is quantised"):
        fallow.LTSFT(model, batches=batches, loss=loss)


def test_a_weight_tied_by_its_storage_moves_by_the_gradients_of_both_uses():
    class Tied(nn.Module):
        def __init__(self, one_parameter: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(12, 12, bias=False), nn.Linear(12, 12, bias=False)
            self.b.weight = self.a.weight if one_parameter else nn.Parameter(self.a.weight.data)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x)))

    data = [(torch.randn(6, 12), torch.randint(0, 12, (6,))) for _ in range(2)]
    chosen = [
        fallow.LTSFT(Tied(one), budget=20, batches=data, loss=loss, dense_steps=4, dense_lr=1e-2)
        .slots["a.weight"]
        .index
        for one in (True, False)
    ]
    assert chosen[0].tolist() == chosen[1].tolist()
    assert len(chosen[0]) == 20
