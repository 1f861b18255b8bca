"""From the sums of a run, over all ranks, to Statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fallow.core.errors import DataError
from fallow.core.probing.layers import Layer
from fallow.core.probing.ranks import common_owners, gathered, merged, summed
from fallow.core.probing.run import Run
from fallow.core.probing.spectra import spectrum
from fallow.core.statistics import LayerStatistics, Sketch, Statistics


def results(run: Run, layers: Sequence[Layer], want: frozenset[str], key: str = "") -> Statistics:
    """What was found. DataError where a value is not finite, or nothing at all was reached."""
    parts: dict[str, dict[str, Any]] = {layer.name: {"shows_input": layer.shows_input} for layer in layers}
    for found in (_of_inputs(run, layers, want), _of_gradients(run, layers, want), _of_contribution(run, layers)):
        for name, values in found.items():
            parts[name] |= values
    if "spectrum" in want:
        for layer in layers:
            parts[layer.name]["spectrum"] = spectrum(layer)
    statistics = {layer.name: LayerStatistics(layer.shape, **parts[layer.name]) for layer in layers}
    missing = tuple(name for name, one in statistics.items() if _lacks(one, want))
    if len(missing) == len(statistics) and "spectrum" not in want:
        raise DataError(
            f"none of the {len(layers)} layers gave {', '.join(sorted(want))} in {run.place.batches} batches: they did "
            "not run, do not count for the loss, or show no input; look at the targets, the loss and the masks"
        )
    _refuse_not_finite(statistics)
    batches = sum(gathered(run.place.batches))
    return Statistics(statistics, batches, tuple(sorted(want)), missing, key)


def _lacks(one: LayerStatistics, want: frozenset[str]) -> bool:
    needed = {
        "gradient": one.gradient if one.gradient is not None else one.gradient_sketch, "fisher": one.fisher,
        "input_covariance": one.covariance, "activation": one.activation, "contribution": one.contribution,
        "spectrum": one.spectrum,
    }  # fmt: skip
    return any(needed[name] is None for name in want)


def _refuse_not_finite(statistics: dict[str, LayerStatistics]) -> None:
    for name, one in statistics.items():
        sketch = None if one.gradient_sketch is None else one.gradient_sketch.columns
        parts = {
            "gradient": one.gradient, "gradient sketch": sketch, "input covariance": one.covariance,
            "Fisher diagonal": one.fisher, "contribution": one.contribution_rows,
            "principal components": None if one.activation is None else one.activation.directions,
        }  # fmt: skip
        for what, tensor in parts.items():
            if tensor is not None and not _finite(tensor):
                raise DataError(
                    f"the {what} of '{name}' is not finite; look at the batches and the loss, and give a model in "
                    "float16 a loss_scale, or run it in float32"
                )


def _finite(tensor: Tensor) -> bool:
    """Without a temporary of its size."""
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _of_inputs(run: Run, layers: Sequence[Layer], want: frozenset[str]) -> dict[str, dict[str, Any]]:
    inputs = run.inputs
    names = [layer.name for layer in layers if layer.shows_input]
    inner = {layer.name: layer.shape[1] for layer in layers}
    mine = {
        name: next(other for other in names if other in inputs.at[name].layers) for name in names if name in inputs.at
    }
    owner = common_owners(mine, names)
    owners = list(dict.fromkeys(owner.values()))
    at = {name: inputs.at[name] for name in owners if name in inputs.at}
    covariances = {n: c.total for n, s in at.items() if (c := s.covariance) is not None and c.total is not None}
    summed(covariances, {name: (inner[name], inner[name]) for name in owners}, run.device)
    own = {n: s.principal for n, s in at.items() if s.principal is not None}
    principals = merged(own, inputs.empty, run.device)
    told = gathered({n: (s.tokens, s.calls, s.covariance.count if s.covariance else 0) for n, s in at.items()})
    counts = {name: [sum(part) for part in zip(*(t[name] for t in told if name in t), strict=True)] for name in owners}
    for name, total in covariances.items():
        total.div_(counts[name][2])
    components = {name: part.known.result() for name, part in principals.items() if part.known is not None}
    return {
        name: {
            "covariance": covariances.get(first), "activation": components.get(first), "tokens": counts[first][0],
            "calls": counts[first][1], "input_of": first,
        }
        for name, first in owner.items()
    }  # fmt: skip


def _of_gradients(run: Run, layers: Sequence[Layer], want: frozenset[str]) -> dict[str, dict[str, Any]]:
    gradients = run.gradients
    if not gradients.want:
        return {}
    count = sum(gathered(gradients.count))
    weight = sum(gathered(gradients.weight))
    if "fisher" in want and not weight:
        raise DataError("no batch holds a label token that counts (all are -100), so there is no Fisher diagonal")
    whole = {key: tuple(same[0].parameter.shape) for key, same in gradients.sharing.items()}
    coded = {key: same[0].shape for key, same in gradients.sharing.items() if same[0].coded}
    k = run.options.sketch or 1
    sizes = {layer.name: (layer.shape, Sketch.sizes(layer.shape, k)) for layer in layers}
    _mean(gradients.gradients, {**whole, **coded}, count, run.device)
    _mean(gradients.fishers, {**whole, **coded}, weight, run.device)
    _mean(gradients.columns, {name: (shape[0], size[0]) for name, (shape, size) in sizes.items()}, count, run.device)
    _mean(gradients.rows, {name: (size[1], shape[1]) for name, (shape, size) in sizes.items()}, count, run.device)
    return {
        layer.name: {
            "gradient": gradients.matrix(layer, gradients.gradients), "gradient_sketch": gradients.sketch_of(layer),
            "fisher": gradients.matrix(layer, gradients.fishers),
        }
        for layer in layers
    }  # fmt: skip


def _mean(sums: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], count: float, device: torch.device) -> None:
    summed(sums, shapes, device)
    for total in sums.values():
        total.div_(count)


def _of_contribution(run: Run, layers: Sequence[Layer]) -> dict[str, dict[str, Any]]:
    held = run.contribution
    if held is None:
        return {}
    count = sum(gathered(held.count))
    summed(held.rows, {layer.name: (layer.shape[0],) for layer in layers}, run.device)
    means = {name: (rows / count).float() for name, rows in held.rows.items()}
    return {
        name: {"contribution": float(rows.double().mean()), "contribution_rows": rows} for name, rows in means.items()
    }
