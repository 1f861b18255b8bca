"""What `fallow.probe` found in the layers of a model: what starts and budgets ask for.

    stats = fallow.probe(model, batches, want={"gradient", "input_covariance"})
    stats["blocks.0.fc1"].gradient           (out, in), by the name of the layer
    stats.save("stats.safetensors"); fallow.Statistics.load("stats.safetensors")

A file is one safetensors file whose header holds the rest as JSON. What several layers have in common, such as the
covariance of the input that query, key and value share, is one tensor in memory and in the file.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fallow.core.errors import AdapterError, DataError, nearest
from fallow.core.files import opened_tensors, parse_json, write_tensors
from fallow.core.linalg import Triples, low_rank

HEADER = "fallow_statistics"  # the key of the JSON in the file's header
FORMAT = 1
# What `fallow.probe` is asked for, where it has another name here.
ASKED = {"covariance": "input_covariance"}


class Place(Protocol):
    """What is asked of a Site: the name of its layer, and which rows of the layer's weight it is."""

    @property
    def name(self) -> str: ...
    @property
    def layer(self) -> str: ...
    @property
    def rows(self) -> slice | None: ...
    @property
    def shape(self) -> tuple[int, int]: ...


@dataclass(frozen=True)
class Sketch:
    """A gradient G (out, in) that was never kept: G Omega (out, k) and Psi G (l, in), l = min(2k + 1, out).

    Omega (in, k) and Psi (l, out) are Gaussian and follow from `seed`. Both parts are float32 on the CPU and linear in
    G, so that means of sketches are sketches of means (Tropp et al., arXiv 1609.00048).
    """

    columns: Tensor
    rows: Tensor
    seed: int

    @staticmethod
    def sizes(shape: tuple[int, int], k: int) -> tuple[int, int]:
        """(k, l) for a gradient of this shape."""
        return min(k, *shape), min(2 * min(k, *shape) + 1, shape[0])

    @staticmethod
    def projections(shape: tuple[int, int], k: int, seed: int) -> tuple[Tensor, Tensor]:
        """Omega (in, k) and Psi (l, out)."""
        width, height = Sketch.sizes(shape, k)
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape[1], width, generator=generator), torch.randn(height, shape[0], generator=generator)

    def leading(self, rank: int) -> Triples:
        """U (out, r), S (r,), Vᵀ (r, in) of the best that the sketch tells of G; r <= k.

        Good to a few times the tail beyond rank k / 2, so k is to be at least twice the rank that is asked for.
        """
        shape = self.columns.shape[0], self.rows.shape[1]
        psi = self.projections(shape, self.columns.shape[1], self.seed)[1].double()
        basis = torch.linalg.qr(self.columns.double())[0]
        core = torch.linalg.lstsq(psi @ basis, self.rows.double(), driver="gelsd").solution
        u, s, vt = torch.linalg.svd(core, full_matrices=False)
        return (basis @ u)[:, :rank].float(), s[:rank].float(), vt[:rank].float()


@dataclass(frozen=True)
class Components:
    """The principal components of a layer's inputs (EVA), q of them, the largest first.

    `directions` (q, in): orthonormal rows, whose largest entry is positive. `singular` (q,): singular values of the
    stacked inputs. `ratios` (q,): the share of the variance that each explains, 0 for an input that does not vary.
    `mean` (in,): of the inputs; 0 where they were not centred. `converged` (q,): bool, whether the last batch turned
    it by no more than was allowed. `tokens`: rows of input that were seen. All float32 on the CPU.
    """

    directions: Tensor
    singular: Tensor
    ratios: Tensor
    mean: Tensor
    converged: Tensor
    tokens: int


@dataclass(frozen=True)
class LayerStatistics:
    """What was found in one layer; None where it was not asked for, or the layer never ran. Float32 on the CPU.

    `shape`: (out, in). `gradient` (out, in): mean over the batches of dL/dW. `gradient_sketch`: in its place where a
    sketch was asked for. `covariance` (in, in): 1/K sum of Xᵀ X over K batches, X normalised. `activation`: principal
    components of the inputs. `fisher` (out, in): mean of squared gradients, weighted by label tokens. `contribution`:
    the mean of |integrated gradients| over the weights (FAIG); `contribution_rows` (out,): of each row. `spectrum`
    (min(out, in),): singular values of W; of a stack of E matrices (E, min(out / E, in)). `tokens`: rows of input;
    `calls`: how often the layer ran. `input_of`: the layer whose input this one shares, itself where it has its own.
    `shows_input`: False where no hook can see its inputs as rows: of embeddings, and of weights that their module reads
    itself, but for the first projections of attention.
    """

    shape: tuple[int, int]
    gradient: Tensor | None = None
    gradient_sketch: Sketch | None = None
    covariance: Tensor | None = None
    tokens: int = 0
    calls: int = 0
    activation: Components | None = None
    fisher: Tensor | None = None
    contribution: float | None = None
    contribution_rows: Tensor | None = None
    spectrum: Tensor | None = None
    input_of: str = ""
    shows_input: bool = True

    def leading_gradient(self, rank: int, generator: torch.Generator | None = None) -> Triples:
        """U (out, r), S (r,), Vᵀ (r, in): the leading singular triples of the gradient, or of what its sketch tells.

        DataError where there is neither.
        """
        if self.gradient is not None:
            return low_rank(self.gradient, rank, generator=generator)
        if self.gradient_sketch is None:
            raise DataError('there is no gradient in these statistics; give fallow.probe want={"gradient"}')
        return self.gradient_sketch.leading(rank)

    def cut(self, rows: slice) -> LayerStatistics:
        """Of these rows of the weight alone. What tells nothing of them is left out: a sketch, and the spectrum of what
        is not one of a stack of matrices.
        """
        part = None if self.contribution_rows is None else self.contribution_rows[rows]
        return dataclasses.replace(
            self,
            shape=(len(range(*rows.indices(self.shape[0]))), self.shape[1]),
            gradient=None if self.gradient is None else self.gradient[rows],
            gradient_sketch=None,
            fisher=None if self.fisher is None else self.fisher[rows],
            contribution=None if part is None else float(part.double().mean()),
            contribution_rows=part,
            spectrum=self._spectrum_of(rows),
        )

    def _spectrum_of(self, rows: slice) -> Tensor | None:
        if self.spectrum is None or self.spectrum.dim() == 1:
            return None
        size = self.shape[0] // len(self.spectrum)
        first, last, _ = rows.indices(self.shape[0])
        return self.spectrum[first // size] if last - first == size and first % size == 0 else None


@dataclass(frozen=True, eq=False)
class Statistics(Mapping[str, LayerStatistics]):
    """{name of the layer: what was found there}.

    `batches`: how many were seen. `want`: what was asked for. `missing`: layers of which something that was asked for
    is not there, because they never ran, or no gradient came to them. `known_as`: the key under which a cache has it.
    """

    layers: dict[str, LayerStatistics]
    batches: int
    want: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    known_as: str = ""

    def __getitem__(self, name: str) -> LayerStatistics:
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __repr__(self) -> str:
        lacking = f", {len(self.missing)} missing" if self.missing else ""
        return f"Statistics({', '.join(self.want)}: {len(self)} layers, {self.batches} batches{lacking})"

    def at(self, site: Place, *needs: str) -> LayerStatistics:
        """What was found at a Site, cut to its rows where it is a block of a fused weight.

        `needs`: fields of LayerStatistics that must be there; "gradient" is also met by a sketch. DataError, by the
        layer's name, where one is not, or the layer was not probed, or has another shape.
        """
        found = self.layers.get(site.layer)
        if found is None:
            close = nearest(site.layer, self)
            raise DataError(
                f"'{site.layer}' is not among the {len(self)} layers of these statistics"
                f"{close if 'did you mean' in close else ''}; "
                "give fallow.probe the targets that the adapter has"
            )
        found = found if site.rows is None else found.cut(site.rows)
        if found.shape != tuple(site.shape):
            raise DataError(
                f"the statistics of '{site.layer}' are of a weight of {found.shape}, and '{site.name}' is of "
                f"{tuple(site.shape)}; they were gathered from another model: gather them from this one"
            )
        for need in needs:
            met = found.gradient_sketch if need == "gradient" and found.gradient is None else getattr(found, need)
            if met is None:
                raise DataError(self._lacking(site, need))
        return found

    def _lacking(self, site: Place, need: str) -> str:
        asked = ASKED.get(need, need)
        whole = self.layers[site.layer]
        of_all = whole.gradient_sketch if need == "gradient" else whole.spectrum if need == "spectrum" else None
        if site.rows is not None and of_all is not None:
            return f"the {need} of '{site.name}' cannot be told: it is a block of '{site.layer}', probed as a whole"
        if not whole.shows_input and need in ("covariance", "activation"):
            return (
                f"'{site.layer}' is an embedding, or is read by its module itself, so that no input of it can be seen "
                f"and there is no {need}; exclude it from the targets, or start it otherwise"
            )
        if site.layer in self.missing and asked in self.want:
            return (
                f"'{site.layer}' never ran in the {self.batches} batches that fallow.probe was given, did not count "
                f"for the loss, or attends to two inputs, so there is no {need} of it; give batches that use it, or "
                "exclude it"
            )
        return f"there is no {need} of '{site.layer}' in these statistics; give fallow.probe want={{'{asked}'}}"

    # -- files --------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, atomically. StorageError where the system refuses it."""
        tensors: dict[str, Tensor] = {}
        written: dict[tuple[Any, ...], str] = {}

        def put(name: str, tensor: Tensor) -> str:
            known = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
            key = written.setdefault(known, name) if tensor.numel() else name
            if key == name:
                own = tensor.numel() == tensor.untyped_storage().nbytes() // tensor.element_size()
                tensors[name] = tensor.contiguous() if own else tensor.clone()
            return key

        told = {
            "format": FORMAT,
            "batches": self.batches,
            "want": list(self.want),
            "missing": list(self.missing),
            "known_as": self.known_as,
            "layers": {name: _told(name, layer, put) for name, layer in self.layers.items()},
        }
        write_tensors(path, tensors, {HEADER: json.dumps(told)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """What `save` wrote. DataError where it is missing, damaged, or something else."""
        path = Path(path)
        if not path.is_file():
            raise DataError(f"{path} does not exist; give a file that Statistics.save wrote")
        try:
            with opened_tensors(path) as opened:
                header = (opened.metadata() or {}).get(HEADER)
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except AdapterError:
            raise DataError(
                f"{path} cannot be read as safetensors; it may have been cut off: gather it again"
            ) from None
        if header is None:
            raise DataError(f"{path} holds no statistics; give a file that Statistics.save wrote")
        try:
            told = parse_json(header)
            if told["format"] != FORMAT:
                raise DataError(
                    f"{path} is of format {told['format']}, and this version reads {FORMAT}; gather it again"
                )
            layers = {name: _layer(layer, tensors) for name, layer in told["layers"].items()}
            return cls(layers, told["batches"], tuple(told["want"]), tuple(told["missing"]), told["known_as"])
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path} is damaged ({error}); gather the statistics again") from None


_PARTS = {"gradient_sketch": Sketch, "activation": Components}


def _told(prefix: str, part: Any, put: Any) -> dict[str, Any]:
    """The fields of a dataclass as JSON; tensors as the names under which they are put."""
    told: dict[str, Any] = {}
    for one in dataclasses.fields(part):
        value = getattr(part, one.name)
        if isinstance(value, Tensor):
            told[one.name] = {"tensor": put(f"{prefix}:{one.name}", value)}
        elif dataclasses.is_dataclass(value):
            told[one.name] = _told(f"{prefix}:{one.name}", value, put)
        elif value is not None:
            told[one.name] = value
    return told


def _given(told: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in told.items():
        if isinstance(value, dict):
            found[name] = tensors[value["tensor"]] if "tensor" in value else _PARTS[name](**_given(value, tensors))
        else:
            found[name] = value
    return found


def _layer(told: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LayerStatistics:
    out, into = told["shape"]
    return LayerStatistics(**{**_given(told, tensors), "shape": (out, into)})
