"""Random numbers that depend on their place alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fallow.core import noise
from fallow.core.delta import Delta, Site
from fallow.core.views import View


def test_a_larger_matrix_begins_with_the_smaller_one() -> None:
    small, large = noise.matrix(3, (5, 7)), noise.matrix(3, (600, 900))
    assert torch.equal(large[:5, :7], small)
    assert torch.equal(noise.uniform(3, range(250, 260), 900) * 3.0**0.5, large[250:260])


def test_numbers_stay_the_same_for_ever() -> None:
    """Files hold a seed in place of them."""
    rows = torch.arange(2, dtype=torch.int32)
    assert noise.bits(0, rows, rows).tolist() == [[-2069283264, -1284382020], [585959137, 1218276851]]


def test_compiled_code_gets_the_same_numbers() -> None:
    """Fused with other operators, the hash would be computed in 64 bits."""
    compiled = torch.compile(lambda: noise.part(5, range(3, 20), 33), fullgraph=True)
    assert torch.equal(compiled(), noise.matrix(5, (20, 33))[3:])


def test_they_are_uniform_and_independent_between_rows_columns_and_keys() -> None:
    one, other = noise.matrix(1, (512, 4096)), noise.matrix(2, (512, 4096))
    assert abs(one.mean().item()) < 2e-3
    assert one.std().item() == pytest.approx(1.0, abs=2e-3)
    counts = torch.histc(one, 256, -(3.0**0.5), 3.0**0.5)
    assert ((counts - 8192) ** 2 / 8192).sum() / 255 == pytest.approx(1.0, abs=0.35)  # chi square
    for a, b in ((one, one), (one, other), (one[:, :512].T, one[:, :512].T)):
        gram = a @ b.T / a.shape[1]
        if b is not other:
            gram.fill_diagonal_(0)
        assert gram.abs().max() < 6 / a.shape[1] ** 0.5
    assert torch.linalg.svdvals(one[:, :512])[0] / 512**0.5 == pytest.approx(2.0, abs=0.06)  # Marchenko-Pastur


def test_numbers_of_a_row_are_all_different() -> None:
    drawn = noise.bits(9, torch.tensor([4], dtype=torch.int32), torch.arange(200_000, dtype=torch.int32))
    assert drawn.unique().numel() == 200_000


@pytest.mark.parametrize("zeros", [0.5, 2 / 3])
def test_sparse_ones_hold_three_values_of_variance_one(zeros: float) -> None:
    drawn = noise.matrix(5, (500, 800), zeros)
    c = (1 - zeros) ** -0.5
    assert drawn.unique().tolist() == pytest.approx([-c, 0, c])
    assert (drawn == 0).float().mean().item() == pytest.approx(zeros, abs=0.01)
    assert drawn.std().item() == pytest.approx(1.0, abs=0.01)


def test_torch_generators_are_left_alone() -> None:
    before = torch.random.get_rng_state()
    noise.matrix(0, (50, 50))
    assert torch.equal(before, torch.random.get_rng_state())


class Slicing(Delta):
    """Shares one matrix that each layer slices."""

    def setup(self, site: Site) -> None:
        self.share_matrix("bases", site, site.shape, self.draw)

    @staticmethod
    def draw(shape: tuple[int, int]) -> Tensor:
        return noise.matrix(0, shape)

    def delta_weight(self) -> Tensor:
        return self.shared("bases")[: self.view.shape[0], : self.view.shape[1]]


def test_a_shared_matrix_grows_with_what_layers_need_and_keeps_its_beginning() -> None:
    def slicing(out: int, inner: int, common: nn.Module) -> Slicing:
        return Slicing(Site("layer", View(out, inner), lambda: torch.zeros(out, inner), common))

    common = nn.Module()
    first = slicing(4, 9, common)
    kept = first.delta_weight().clone()
    second, third = slicing(6, 5, common), slicing(2, 2, common)
    assert common.bases.shape == (6, 9)
    assert torch.equal(first.delta_weight(), kept)
    starts = {delta.delta_weight().data_ptr() for delta in (first, second, third)}
    assert starts == {common.bases.data_ptr()}
    assert not common.state_dict()

    other = nn.Module()
    slicing(6, 5, other), slicing(4, 9, other)
    assert torch.equal(other.bases, common.bases)
