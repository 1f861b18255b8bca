"""The probes find out methods that do not do what they should."""

from __future__ import annotations

from pathlib import Path
from tempfile import mkdtemp

import pytest

pytest.register_assert_rewrite("contract_checks", "delta_checks", "capability_probes")

import torch  # noqa: E402
from capability_probes import PROBES, Tried  # noqa: E402
from capability_table import answer  # noqa: E402
from delta_hosts import HOSTS  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from fallow.core.delta import REGISTRY, Delta, Site  # noqa: E402
from fallow.core.errors import ConfigError  # noqa: E402


class Honest(Delta):
    """W' = W + diag(d) U with a frozen U from the seed."""

    def setup(self, site: Site) -> None:
        self.d = nn.Parameter(torch.zeros(site.shape[0], 1))
        self.register_buffer("u", self.drawn(site), persistent=False)

    def drawn(self, site: Site) -> Tensor:
        return torch.randn(site.shape, generator=site.generator())

    def delta_weight(self) -> Tensor:
        return self.d * self.u


class MergesAnother(Honest):
    def delta_forward(self, x: Tensor) -> Tensor:
        return 1.1 * super().delta_forward(x)


class Forgets(Honest):
    def drawn(self, site: Site) -> Tensor:
        return torch.randn(site.shape)


class ReadsValues(Honest):
    def delta_forward(self, x: Tensor) -> Tensor:
        return super().delta_forward(x) if float(x.sum()) < 1e9 else x


class StartsElsewhere(Honest):
    def setup(self, site: Site) -> None:
        super().setup(site)
        nn.init.ones_(self.d)


class Detached(Honest):
    def delta_weight(self) -> Tensor:
        return super().delta_weight().detach()


class WritesIntoTheBase(Honest):
    def transform(self, w: Tensor) -> Tensor:
        return w.add_(self.delta_weight())


class SeesTheWholeBatch(Honest):
    def delta_forward(self, x: Tensor) -> Tensor:
        return super().delta_forward(x) * x.shape[0]


class Refuses(Honest):
    def delta_weight(self) -> Tensor:
        raise ConfigError(f"'{self.name}' will not do it; take another")


class Fails(Honest):
    def delta_weight(self) -> Tensor:
        raise KeyError("d")


@pytest.fixture
def tried(monkeypatch, tmp_path):
    """A method, known by name, in one of the hosts, with a folder of its own."""

    def make(method: type[Delta], host: int) -> Tried:
        monkeypatch.setattr(method, "name", method.__name__.lower())
        monkeypatch.setitem(REGISTRY, method.name, method)
        return Tried(HOSTS[host], method, Path(mkdtemp(dir=tmp_path)))

    return make


@pytest.mark.parametrize("host", [0, 1], ids=["own", "peft"])
@pytest.mark.parametrize(
    ("method", "column"),
    [
        (MergesAnother, "merge"),
        (MergesAnother, "together"),
        (Forgets, "save"),
        (Forgets, "nf4"),
        (ReadsValues, "compile"),
        (StartsElsewhere, "linear"),
        (StartsElsewhere, "int8"),
        (Detached, "linear"),
        (Detached, "checkpointing"),
        (SeesTheWholeBatch, "mixed"),
        (WritesIntoTheBase, "disable"),
        (Fails, "merge"),
    ],
)
def test_a_method_that_breaks_its_word_is_found_out_and_one_that_keeps_it_is_not(method, column, host, tried):
    assert answer(column, tried(Honest, host)).answer == "yes"
    with pytest.raises((AssertionError, KeyError, RuntimeError)):  # none of ours, so no answer
        answer(column, tried(method, host))


@pytest.mark.parametrize("host", [0, 1], ids=["own", "peft"])
def test_an_error_of_ours_is_a_no_and_its_words_are_kept(host, tried):
    cell = answer("merge", tried(Refuses, host))
    assert (cell.answer, cell.note) == ("no", "'refuses' will not do it; take another")


def test_every_column_but_the_command_can_be_tried_on_a_method_of_ones_own(tried):
    cells = {column: answer(column, tried(Honest, 1)) for column in PROBES if column != "train"}
    assert {column for column, cell in cells.items() if cell.answer != "yes"} == {"resize"}
