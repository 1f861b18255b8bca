"""How to let each method of a comparison train about as many numbers as the others.

    options_for("bone", {}, budget=100_000, model="mini-sd")    # {"rank": 39}

A selection trains as many entries as it is told. LoRA's rank is a whole number, and so is what sizes any other weight
parameterization (its rank, LoCA's components, NOLA's bases, what MoS pays for): the value is taken with which it comes
nearest, its other options as they are. Some have a least or a most, VeRA's vector of outputs or SVFit's singular
values, and then train more or less than they should; the comparison shows how many.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fallow.core.delta import Delta, make_options
from fallow.core.errors import ConfigError
from fallow.recipes.doctor import Source
from fallow.recipes.methods import AMOUNTS, DELTAS, delta_of

SIZES = {"loca": "components", "nola": "num_basis", "mos": "equivalent_rank"}  # of others it is the rank
UNBOUND = ("loca", "nola", "vera")  # whose size may be above the layers' sides


def options_for(
    method: str, options: Mapping[str, Any], budget: int | None, model: str, name: str = ""
) -> dict[str, Any]:
    """The options with which a method trains about `budget` numbers of a model; none where no budget is given.

    `options`: what it is told already. `name`: what messages call it. Full fine-tuning trains everything, and what
    another PEFT config trains is for its own options to say. ConfigError where the options say an amount themselves.
    """
    if budget is None or method in ("full", "peft"):
        return {}
    sizes = {"rank", "r"} if method == "lora" else {SIZES.get(method, "rank")} if method in DELTAS else set(AMOUNTS)
    if taken := options.keys() & sizes:
        raise ConfigError(
            f"budget={budget} and the option {min(taken)} of {name or method} exclude each other; give one"
        )
    if method == "lora":
        return {"rank": max(1, round(budget / lora_parameters(model, options.get("target_modules"))))}
    if method in DELTAS:
        return _nearest_size(delta_of(method), options, budget, model)
    if method == "shira":
        include = Source.find(model).family.include or ""
        shapes = {name: found for name, found in _shapes(model).items() if re.search(include, name)}
        entries = sum(numel for shape, numel in shapes.values() if len(shape) >= 2)
        return {"density": min(1.0, budget / entries)}
    return {"budget": budget}


def lora_parameters(model: str, targets: Sequence[str] | str | None) -> int:
    """What LoRA of rank 1 trains on these modules of a model's network: rows + columns of each matrix.

    ConfigError where none of the network's matrices is among them.
    """
    # A convolution's factors are (rank, C_in, kh, kw) and (C_out, rank, 1, 1).
    return sum(map(sum, _matrices(model, targets)))


def is_target(layer: str, targets: Sequence[str] | str) -> bool:
    """Whether PEFT takes a layer for one of these: names or their ends, or one regular expression for whole names."""
    if isinstance(targets, str):
        return re.fullmatch(targets, layer) is not None
    return any(layer == target or layer.endswith(f".{target}") for target in targets)


def _nearest_size(delta: type[Delta], options: Mapping[str, Any], budget: int, model: str) -> dict[str, Any]:
    shapes = _matrices(model, options.get("target_modules"))
    size = SIZES.get(delta.name, "rank")
    fields = delta.Options.__dataclass_fields__
    given = {name: value for name, value in options.items() if name in fields}
    most = min(math.prod(shape) for shape in shapes) if delta.name in UNBOUND else min(min(shape) for shape in shapes)
    counts: dict[int | str, int] = {}
    whole = ["full"] if fields[size].default == "full" else []
    for value in [*whole, *range(1, min(most, budget) + 1)]:
        try:
            counts[value] = _trained(delta, make_options(delta, {**given, size: value}), shapes)
        except ConfigError:  # a value that does not go with the other options
            continue
    if not counts:
        make_options(delta, {**given, size: 1})  # says which of the options is to blame
    return {size: min(counts, key=lambda value: abs(counts[value] - budget))}


def _trained(delta: type[Delta], options: Any, shapes: Sequence[tuple[int, int]]) -> int:
    """How many numbers are trained in layers of these (out, in)."""
    own = sum(number * delta.parameter_count(shape, options) for shape, number in Counter(shapes).items())
    return own + delta.shared_count(list(shapes), options)


def _matrices(model: str, targets: Sequence[str] | str | None) -> list[tuple[int, int]]:
    """(out, in) of each weight of these modules, or of the family's own choice. ConfigError where there is none."""
    names = Source.find(model).family.targets_alone() if targets is None else targets
    found = [
        (shape[0], math.prod(shape[1:]))
        for name, (shape, _) in _shapes(model).items()
        if len(shape) >= 2 and is_target(name.removesuffix(".weight"), names)
    ]
    if not found:
        raise ConfigError(f"target_modules={names} names no layer of {model}; give others")
    return found


def _shapes(model: str) -> dict[str, tuple[tuple[int, ...], int]]:
    """Shape and entries of each parameter of a model's network, from its configuration alone."""
    network = Source.find(model).network()
    return {name: (tuple(p.shape), p.numel()) for name, p in network.named_parameters()}
