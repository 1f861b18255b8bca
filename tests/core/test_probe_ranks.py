"""Statistics of several processes: each has batches of its own, all get what was found in all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fallow.core.distributed import rank
from fallow.core.probe import probe
from ranks import run_ranks

WANT = {"gradient", "input_covariance", "activation", "fisher", "contribution"}


class Routed(nn.Module):
    """Two layers share an input; `rare` runs in the last batch only, `never` in none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.rare, self.never = (nn.Linear(6, 6) for _ in range(4))
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.q(x) * self.k(x)
        return self.out(self.rare(h) if bool(x[0, 0] > 50) else h)


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    found = [(torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)) for _ in range(4)]
    found[3][0][0, 0] = 60.0
    return found


def found(batches: list[tuple[Tensor, Tensor]], folder: str = "") -> dict[str, Any]:
    model = Routed()
    end = {name: value + 0.1 for name, value in model.state_dict().items()}
    more = {"cache": folder} if folder else {}
    stats = probe(model, batches, WANT, tuned=end, points=2, components=6, center=True, **more)
    cells: dict[str, Any] = {"missing": list(stats.missing), "batches": stats.batches}
    for name, one in stats.items():
        cells[name] = {
            "gradient": one.gradient, "covariance": one.covariance, "fisher": one.fisher, "rows": one.contribution_rows,
            "singular": None if one.activation is None else one.activation.singular,
            "directions": None if one.activation is None else one.activation.directions,
            "counts": [one.tokens, one.calls], "input of": one.input_of,
        }  # fmt: skip
    return cells


def uneven() -> dict[str, Any]:
    """The first process has one batch, the other three; components of exact directions settle in the second."""
    rows = torch.zeros(8, 6)
    rows[:4, 0], rows[4:, 1] = 2.0, 1.0
    stats = probe(nn.Sequential(Routed().q), [rows] * (3 if rank() else 1), "activation", components=2, center=False)
    found = stats["0"].activation
    return {"tokens": found.tokens, "directions": found.directions, "converged": found.converged}


def together(folder: str) -> list[dict[str, Any]]:
    mine = data()[2 * rank() : 2 * rank() + 2]
    return [found(mine), found(mine, folder), found(mine, folder), uneven()]


def test_two_processes_find_what_one_does(tmp_path: Any) -> None:
    one, other = run_ranks(together, str(tmp_path))
    alone = found(data())
    for ours in (one.pop(), other.pop()):
        assert ours["tokens"] == 8 + 16  # the second stops after two of its three
        assert torch.allclose(ours["directions"], torch.eye(6)[:2], atol=1e-6)
        assert ours["converged"].tolist() == [False, False]  # the first has seen one batch
    for ours in (*one, *other):
        assert ours["missing"] == alone["missing"] == ["never"]
        assert ours["batches"] == 4
        for name in ("q", "k", "rare", "out"):
            assert ours[name]["counts"] == alone[name]["counts"]
            assert ours[name]["input of"] == alone[name]["input of"]
            for field in ("gradient", "covariance", "fisher", "rows", "singular"):
                assert torch.allclose(ours[name][field], alone[name][field], rtol=1e-4, atol=1e-5), (name, field)
            assert torch.equal(ours[name]["directions"], one[0][name]["directions"])
        overlap = ours["q"]["directions"] @ alone["q"]["directions"].T
        assert torch.allclose(overlap.diagonal().abs(), torch.ones(6), atol=1e-3)
    assert len(list(tmp_path.iterdir())) == 1  # the first process alone writes, and the states are gone
