"""Which weights of a model can be adapted, and which of them are meant."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any, cast

from torch import Tensor, nn

from fallow.core.delta import Delta, refuse_not_finite
from fallow.core.errors import ConfigError, ModelError, nearest
from fallow.core.foreign_codes import decoded, is_coded
from fallow.core.host.layer import Adapters, owner_of
from fallow.core.sharded import is_dtensor
from fallow.core.stored_weight import StoredWeight
from fallow.core.views import CONVS, ParameterView, View, view_of

Targets = str | Iterable[str]
PRESETS = {"all-linear": ("linear", "attention"), "all-layers": ("linear", "attention", "conv", "embedding", "experts")}
QKV = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
SHOWN = 8  # names that an error tells of


@dataclass(frozen=True, eq=False)
class Spot:
    """A weight that can be adapted. `key`: the module's path, or the Parameter's where its module reads it itself.

    `layer`, `tensor`: the module that runs with the weight, and the weight's name in it. `sort`: see PRESETS.
    """

    key: str
    layer: nn.Module
    tensor: str
    sort: str
    also: str = ""  # another name that it is known by: the attention of a projection

    @property
    def reader(self) -> bool:
        """Whether the module reads the weight itself, so that nothing can act on its input."""
        return self.sort in ("attention", "experts", "parameter")

    @property
    def attribute(self) -> str:
        """Of the layer, where the Deltas are."""
        return f"adapters_{self.tensor.replace('.', '_')}" if self.reader else "adapters"

    def weight(self) -> Tensor:
        return cast(Tensor, attrgetter(self.tensor)(self.layer))

    def parameter(self) -> Tensor:
        """The Parameter itself, not what acts in its place."""
        owner, name = owner_of(self.layer, self.tensor)
        return cast(Tensor, owner._parameters.get(name, getattr(owner, name)))

    def read(self) -> Tensor:
        """Its values, where another library keeps them in a code too."""
        owner, name = owner_of(self.layer, self.tensor)
        return decoded(owner, name) if isinstance(owner._parameters.get(name), Tensor) else self.parameter()

    def view(self) -> View:
        try:
            return ParameterView(self.weight()) if self.reader else view_of(self.layer)
        except ModelError as error:
            raise ModelError(f"'{self.key}': {error}") from None

    def state_key(self, tensor: str) -> str:
        """Of a Delta's tensor, in an adapter file."""
        owner = self.key.removesuffix(self.tensor).rstrip(".") if self.reader else self.key
        owner = self.also if self.sort == "attention" else owner
        return f"{owner}.{self.attribute}.{tensor}".lstrip(".")


def spots(model: nn.Module) -> list[Spot]:
    """Every weight that can be adapted, in the order of the model's modules."""
    found: list[Spot] = []
    ours = {id(inner) for m in model.modules() if isinstance(m, Adapters | Delta) for inner in m.modules()}
    projections: set[int] = set()
    for path, module in model.named_modules():
        if id(module) in ours or id(module) in projections or isinstance(module, nn.RNNBase):
            continue  # recurrent layers keep their weights in a list of their own, where no other can be put
        dot = f"{path}." if path else ""
        if isinstance(module, nn.MultiheadAttention):
            projections.add(id(module.out_proj))
            names = [name for name in QKV if module._parameters.get(name) is not None]
            found += [Spot(dot + name, module, name, "attention", path) for name in names]
            found.append(Spot(f"{dot}out_proj", module, "out_proj.weight", "attention", path))
        elif (sort := _layer_sort(module)) is not None:
            found.append(Spot(path, module, "weight", sort))
        else:
            experts = type(module).__name__.endswith("Experts")
            for name, param in module._parameters.items():
                if param is not None and param.dim() >= 2:
                    sort = "experts" if experts and param.dim() > 2 else "parameter"
                    found.append(Spot(dot + name, module, name, sort))
    return found


def _layer_sort(module: nn.Module) -> str | None:
    if isinstance(module, CONVS):
        return "conv"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if not isinstance(module._parameters.get("weight"), Tensor):
        return None
    plain = hasattr(module, "in_features") and hasattr(module, "out_features")
    return "linear" if plain or type(module).__name__ == "Conv1D" else None


def choose(
    model: nn.Module, found: Sequence[Spot], method: type[Delta], targets: Targets, exclude: Targets | None
) -> list[Spot]:
    """The spots that are meant. ConfigError where a name or pattern matches none of them."""
    if isinstance(targets, str) and targets in PRESETS:
        head = getattr(model, "get_output_embeddings", lambda: None)() if targets == "all-linear" else None
        wanted = [
            spot
            for spot in found
            if spot.sort in PRESETS[targets]
            and spot.layer is not head
            and (not spot.reader or "parameter" in method.supports)
            and (spot.reader or spot.sort in method.supports)
        ]
    else:
        wanted = _matching("targets", targets, found)
    unwanted = set() if exclude is None else {id(spot) for spot in _matching("exclude", exclude, found)}
    chosen = [spot for spot in wanted if id(spot) not in unwanted]
    if not chosen:
        raise ConfigError(
            f"targets={targets!r} with exclude={exclude!r} leaves nothing of {type(model).__name__} that "
            f"'{method.name}' could adapt; {_fitting(found)}"
        )
    return chosen


def _matching(argument: str, given: Targets, found: Sequence[Spot]) -> list[Spot]:
    tests: dict[str, Callable[[str], bool]] = {}
    if isinstance(given, str):
        tests[given] = _pattern(argument, given, given)
        hint = "a text must match whole names, as a regular expression; give a list for their last parts"
    else:
        names = list(given) if isinstance(given, Iterable) else []
        if not names or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"{argument}={given!r} must be a text or names; {_fitting(found)}")
        tests |= {name: partial(_ends, name) for name in names}
        hint = "names are whole ones or their last parts"
    chosen: set[int] = set()
    for label, test in tests.items():
        hits = {id(spot) for spot in found if test(spot.key) or (spot.also and test(spot.also))}
        if not hits:
            raise ConfigError(
                f"{argument}: {label!r} matches no weight that can be adapted ({hint}); {_fitting(found, label)}"
            )
        chosen |= hits
    return [spot for spot in found if id(spot) in chosen]


def _ends(name: str, key: str) -> bool:
    return key == name or key.endswith("." + name)


def _pattern(argument: str, shown: Any, pattern: str) -> Callable[[str], bool]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{argument}={shown!r} is no regular expression: {error}") from None
    return lambda key: compiled.fullmatch(key) is not None


def _fitting(found: Sequence[Spot], near: str = "") -> str:
    last = list(dict.fromkeys(spot.key.rpartition(".")[2] for spot in found if spot.key.rpartition(".")[2]))
    close = nearest(near, [*last, *(spot.key for spot in found)]) if near else ""
    if "did you mean" in close:
        return f"what would have fitted{close}"
    more = f" and {len(last) - SHOWN} more" if len(last) > SHOWN else ""
    return f"what would have fitted: {', '.join(last[:SHOWN])}{more}" if last else "it has no weight that would fit"


def with_patterns(
    chosen: Sequence[Spot], options: Mapping[str, Any], patterns: Mapping[str, Mapping[str, Any]] | None
) -> list[tuple[Spot, dict[str, Any]]]:
    """Each spot with its options: a pattern matches whole names or their last parts, and later ones win.

    ConfigError where one matches none of them.
    """
    told = [(spot, dict(options)) for spot in chosen]
    for pattern, own in (patterns or {}).items():
        test = _pattern("patterns", pattern, rf"(?:.*\.)?(?:{pattern})")
        hits = [given for spot, given in told if test(spot.key) or (spot.also and test(spot.also))]
        if not hits:
            raise ConfigError(f"patterns: {pattern!r} matches none of the targets; {_fitting(chosen, pattern)}")
        for given in hits:
            given.update(own)
    return told


def in_blocks(
    chosen: Sequence[Spot], fused: Mapping[str, int | list[int]] | None
) -> dict[int, tuple[int | list[int], dict[int, dict[str, Any]]]]:
    """What `prepare` takes as blocks; the first pattern that matches a weight's name counts. ConfigError for others."""
    found: dict[int, tuple[int | list[int], dict[int, dict[str, Any]]]] = {}
    for pattern, rows in (fused or {}).items():
        test = _pattern("fused", pattern, rf"(?:.*\.)?(?:{pattern})")
        hits = [spot for spot in chosen if test(spot.key)]
        if not hits:
            raise ConfigError(f"fused: {pattern!r} matches none of the targets; {_fitting(chosen, pattern)}")
        for spot in hits:
            found.setdefault(id(spot.parameter()), (rows, {}))
    return found


def check_weight(spot: Spot) -> None:
    """ModelError for a base weight that cannot carry an adapter."""
    weight, key = spot.parameter(), spot.key
    if weight.is_meta:
        raise ModelError(f"'{key}' is on the meta device and has no values; load the base weights first")
    if is_dtensor(weight):
        raise ModelError(f"'{key}' is sharded already; attach the adapter first, then call fully_shard")
    plain = isinstance(weight, StoredWeight) or (type(weight.data) is Tensor and weight.is_floating_point())
    if not plain and (spot.reader or not is_coded(weight)):
        raise ModelError(
            f"'{key}' is quantised by another library ({type(weight).__name__}, {weight.dtype}), and cannot be read "
            "here; give PEFT the adapter (get_peft_model), or quantise with torchao, bitsandbytes or fallow's quantize_"
        )
    if getattr(spot.layer, "max_norm", None) is not None:
        raise ModelError(f"'{key}' rewrites its own weight in each forward (max_norm); exclude it")
    refuse_not_finite(key, weight)
