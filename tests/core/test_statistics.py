"""Statistics by layer: cut to blocks, refused by name, saved and loaded as they are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fallow.core.errors import DataError
from fallow.core.files import write_tensors
from fallow.core.statistics import Components, LayerStatistics, Sketch, Statistics


@dataclass
class Place:
    layer: str
    shape: tuple[int, int]
    rows: slice | None = None

    @property
    def name(self) -> str:
        return self.layer if self.rows is None else f"{self.layer}.1"


def _sketch(gradient: torch.Tensor, k: int, seed: int = 3) -> Sketch:
    omega, psi = Sketch.projections((gradient.shape[0], gradient.shape[1]), k, seed)
    return Sketch(gradient @ omega, psi @ gradient, seed)


def _statistics() -> Statistics:
    shared = torch.randn(4, 4)
    found = torch.tensor([True, False])
    components = Components(
        torch.eye(4)[:2], torch.tensor([2.0, 1.0]), torch.tensor([0.7, 0.2]), torch.randn(4), found, 9
    )
    first = LayerStatistics(
        (6, 4), torch.randn(6, 4), covariance=shared, tokens=9, calls=3, activation=components, fisher=torch.rand(6, 4),
        contribution=2.5, contribution_rows=torch.arange(6.0), spectrum=torch.rand(4), input_of="q",
    )  # fmt: skip
    second = LayerStatistics((6, 4), gradient_sketch=_sketch(torch.randn(6, 4), 2), covariance=shared, input_of="q")
    return Statistics({"q": first, "k": second, "idle": LayerStatistics((2, 4))}, 3, ("gradient",), ("idle",))


def test_what_was_saved_is_loaded_bit_for_bit_and_what_layers_share_is_one_tensor(tmp_path: Path) -> None:
    stats = _statistics()
    stats.save(tmp_path / "stats.safetensors")
    loaded = Statistics.load(tmp_path / "stats.safetensors")
    assert list(loaded) == ["q", "k", "idle"]
    assert (loaded.batches, loaded.want, loaded.missing) == (3, ("gradient",), ("idle",))
    for field in ("gradient", "covariance", "fisher", "spectrum", "contribution_rows"):
        assert torch.equal(getattr(loaded["q"], field), getattr(stats["q"], field))
    assert (loaded["q"].contribution, loaded["q"].tokens, loaded["q"].calls) == (2.5, 9, 3)
    assert (loaded["q"].shape, loaded["idle"].gradient) == ((6, 4), None)
    assert (loaded["q"].activation.converged.tolist(), loaded["q"].activation.tokens) == ([True, False], 9)
    assert torch.equal(loaded["k"].gradient_sketch.columns, stats["k"].gradient_sketch.columns)
    assert loaded["q"].covariance is loaded["k"].covariance
    assert (tmp_path / "stats.safetensors").stat().st_size < 4 * (24 * 2 + 16 + 60) + 3500  # the covariance once


def test_a_block_gets_its_own_rows_of_gradient_fisher_and_contribution() -> None:
    stats = _statistics()
    part = stats.at(Place("q", (2, 4), slice(2, 4)), "gradient", "fisher", "covariance")
    assert torch.equal(part.gradient, stats["q"].gradient[2:4])
    assert torch.equal(part.fisher, stats["q"].fisher[2:4])
    assert (part.contribution, part.shape) == (2.5, (2, 4))  # the mean of rows 2 and 3
    assert part.covariance is stats["q"].covariance
    with pytest.raises(DataError, match=r"spectrum of 'q.1' cannot be told: it is a block of 'q'"):
        stats.at(Place("q", (2, 4), slice(2, 4)), "spectrum")
    with pytest.raises(DataError, match=r"gradient of 'k.1' cannot be told: it is a block"):
        stats.at(Place("k", (2, 4), slice(2, 4)), "gradient")


def test_what_is_missing_is_refused_by_the_name_of_the_layer() -> None:
    stats = _statistics()
    assert stats.at(Place("k", (6, 4)), "gradient").gradient is None  # its sketch is there
    with pytest.raises(DataError, match=r"'idle' never ran in the 3 batches"):
        stats.at(Place("idle", (2, 4)), "gradient")
    with pytest.raises(DataError, match=r"no fisher of 'k'.*want=\{'fisher'\}"):
        stats.at(Place("k", (6, 4)), "fisher")
    with pytest.raises(DataError, match=r"want=\{'input_covariance'\}"):
        stats.at(Place("idle", (2, 4)), "covariance")
    with pytest.raises(DataError, match=r"'idl' is not among the 3 layers.*did you mean 'idle'"):
        stats.at(Place("idl", (2, 4)))
    with pytest.raises(DataError, match=r"of a weight of \(6, 4\), and 'q' is of \(6, 5\)"):
        stats.at(Place("q", (6, 5)))


def test_a_file_that_is_none_or_another_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        Statistics.load(tmp_path / "none.safetensors")
    write_tensors(tmp_path / "other.safetensors", {"a": torch.ones(2)})
    with pytest.raises(DataError, match="holds no statistics"):
        Statistics.load(tmp_path / "other.safetensors")
    _statistics().save(tmp_path / "stats.safetensors")
    whole = (tmp_path / "stats.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-10])
    with pytest.raises(DataError, match="cut off"):
        Statistics.load(tmp_path / "cut.safetensors")


def test_a_sketch_of_a_gradient_of_low_rank_tells_its_singular_triples() -> None:
    gradient = (torch.randn(40, 3) * torch.tensor([5.0, 2.0, 0.5])) @ torch.linalg.qr(torch.randn(30, 3))[0].mT
    u, s, vt = _sketch(gradient, 8).leading(3)
    assert torch.allclose((u * s) @ vt, gradient, atol=1e-4)
    exact = torch.linalg.svdvals(gradient)[:3]
    assert torch.allclose(s, exact, rtol=1e-4)
    # and of a decaying one its leading ones, from twice as many columns as are asked for
    tail = torch.linalg.qr(torch.randn(40, 30))[0] * (0.5 ** torch.arange(30.0))
    decaying = tail @ torch.linalg.qr(torch.randn(30, 30))[0]
    u, s, vt = _sketch(decaying, 10).leading(4)
    best = LayerStatistics((40, 30), decaying).leading_gradient(4)
    overlap = torch.linalg.svdvals(u.mT @ best[0])
    assert torch.allclose(overlap, torch.ones(4), atol=1e-2)
