"""Configs of weight parameterizations for PEFT, made from each method's own options.

    get_peft_model(model, fallow.LoRAConfig(rank=8, target_modules="all-linear", rank_pattern={"q_proj": 16}))

`config_of(Method)` is a dataclass of the fields below and of the method's Options. What a layer is told apart from the
rest stands in `patterns`: {regular expression of module names: {option: value}}; later ones win.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from fallow.core.accompany import Penalty, accompany, penalty_of
from fallow.core.budgeting import budget_of, shared_out
from fallow.core.delta import REGISTRY, Delta, MethodOptions, Site, make_options, one_of, refuse_not_finite
from fallow.core.errors import AdapterError, ConfigError, nearest
from fallow.core.files import fingerprint, matches
from fallow.core.fused import delta_at, single
from fallow.core.layouts import layout
from fallow.core.peft_host import contract
from fallow.core.peft_host.contract import METHODS, FallowConfig
from fallow.core.schedule import carry
from fallow.core.starting import begin, said_of, start_of
from fallow.core.stored_weight import StoredWeight
from fallow.core.views import view_of
from fallow.core.weakly import Weakly

BEGUN = ("start", "budget", "objective")  # fields that may hold objects
SAMPLED = 256  # entries of each weight that a base is known by


@dataclass
class DeltaConfig(FallowConfig):
    """The fields that all weight parameterizations share, beside those of `FallowConfig`.

    `patterns`, `rank_pattern`, `alpha_pattern`: options of single modules, by regular expressions that match the end of
    their names. `fused`: {expression: number of equal row blocks, or their sizes} for layers that hold several
    projections, each of which gets a Delta of its own. `target_parameters`: weights of two or more dimensions that
    their module reads itself, such as stacks of experts. `init_weights=False`: start from a random change. `own_loss`:
    whether the method's term of the objective is added before each optimizer step, or by the user ("manual").
    `start`, `budget`, `objective`: what the factors are at first, which layer gets how much rank, a penalty of the
    weights; objects, or names where no data is needed: see `fallow.core.starting`, `budgeting` and `objective`. Files
    hold their names and plain options; when one is loaded, start and budget have done their work.
    """

    patterns: dict[str, dict[str, Any]] = field(default_factory=dict)
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    fused: dict[str, int | list[int]] = field(default_factory=dict)
    target_parameters: list[str] | None = None
    trainable_token_indices: Any = None
    init_weights: bool = True
    own_loss: Penalty = "step"
    start: Any = None
    budget: Any = None
    objective: Any = None
    in_place: ClassVar[bool] = False
    delta: ClassVar[type[Delta]]

    def __post_init__(self) -> None:
        if self.target_modules == "all-linear" and self.target_parameters:
            self.target_modules = []
        super().__post_init__()
        one_of("own_loss", self.own_loss, ("step", "manual"))
        if self.made is None:
            start_of(self.start)
            budget_of(self.budget)
            penalty_of(self.objective)
        for name, patterns in self._by_module():
            for pattern in patterns:
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ConfigError(f"{name}: {pattern!r} is no regular expression: {error}") from None
        self.options_for("")
        for extra in self.patterns.values():
            make_options(self.delta, {**self._given(), **extra})

    def __reduce__(self) -> Any:  # the class is made from the method, so it is found by its name
        return _unfilled, (self.method,), {name: value for name, value in self.__dict__.items() if name != "_deltas"}

    def __deepcopy__(self, memo: dict[int, Any]) -> DeltaConfig:
        """In a copy of its model it follows the copies of its Deltas, which PEFT keeps before their configs."""
        made = memo[id(self)] = _unfilled(self.method)
        deltas = self.__dict__.get("_deltas")
        made.__dict__.update(copy.deepcopy({n: v for n, v in self.__dict__.items() if n != "_deltas"}, memo))
        if deltas is not None:
            made.__dict__["_deltas"] = deltas.known_to(memo)
        return made

    def _short(self) -> list[tuple[str, Mapping[str, Any]]]:
        return [("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)]

    def _by_module(self) -> list[tuple[str, Mapping[str, Any]]]:
        return [("patterns", self.patterns), ("fused", self.fused), *self._short()]

    def _given(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self.delta.Options)}

    def options_for(self, key: str) -> MethodOptions:
        """The method's options in the module of this name. ConfigError for what it cannot take."""
        given = self._given()
        for name, patterns in self._short():
            for pattern, value in patterns.items():
                if _fits(pattern, key):
                    given[name.removesuffix("_pattern")] = value
        for pattern, extra in self.patterns.items():
            if _fits(pattern, key):
                given.update(extra)
        return make_options(self.delta, given | self._changed().get(key, {}))

    def apart(self, key: str) -> dict[int, MethodOptions]:
        """Those of single blocks of a module that have others than the module; see `fallow.core.fused`."""
        numbers = {name: name.removeprefix(f"{key}.") for name in self._changed() if name.startswith(f"{key}.")}
        whole = dataclasses.asdict(self.options_for(key))
        return {
            int(number): make_options(self.delta, whole | self._changed()[name])
            for name, number in numbers.items()
            if number.isdecimal()
        }

    def _changed(self) -> dict[str, dict[str, Any]]:
        """The options that single Deltas have got since they were made, as by a new rank; by key."""
        changed: dict[str, dict[str, Any]] = (self.made or {}).get("options", {})
        return changed

    def follow(self, deltas: Mapping[str, nn.Module]) -> None:
        """Tell in files what becomes of the options of these, as by a new rank."""
        self.__dict__["_deltas"] = Weakly({key: delta for key, delta in deltas.items() if isinstance(delta, Delta)})

    def to_dict(self) -> dict[str, Any]:
        """What PEFT writes, as the adapter is now."""
        if self.made is not None and "_deltas" in self.__dict__:
            self.made = {name: value for name, value in self.made.items() if name != "options"}
            changed = {}
            for key, delta in self.__dict__["_deltas"].items():
                told = dataclasses.asdict(self.options_for(key))
                for name, part in single(key, delta):
                    own = dataclasses.asdict(part.o)
                    if differs := {option: value for option, value in own.items() if told[option] != value}:
                        changed[name] = differs
            if changed:
                self.made["options"] = changed
        written = {**super().to_dict(), **{name: said_of(getattr(self, name)) for name in BEGUN}}
        return cast("dict[str, Any]", written)

    def make(self, model: nn.Module, sites: Sequence[contract.Site]) -> dict[str, nn.Module]:
        """A Delta for each site. ConfigError for a pattern that fits none, AdapterError for another base."""
        for name, patterns in self._by_module():
            for pattern in patterns:
                if not any(_fits(pattern, site.key) for site in sites):
                    raise ConfigError(
                        f"{name}: {pattern!r} fits no adapted module; they are {', '.join(s.key for s in sites[:8])}"
                    )
        fresh = self.made is None
        start, budget = (start_of(self.start), budget_of(self.budget)) if fresh else (None, None)
        options = {site.key: self.options_for(site.key) for site in sites}
        if fresh:
            shapes = {site.key: view_of(site.layer.get_base_layer(), site.tensor).shape for site in sites}
            options = shared_out(budget, options, shapes)
        left_out = set((self.made or {}).get("left_out", ())) | {site.key for site in sites if site.key not in options}
        sites = [site for site in sites if site.key not in left_out]
        self._check_base(model, sites)
        if left_out and self.made is not None:
            self.made["left_out"] = sorted(left_out)
        made: dict[str, Delta] = {}
        for site in sites:
            view = view_of(site.layer.get_base_layer(), site.tensor)
            place = Site(site.key, view, site.layer.read, site.common, site.context, self.seed, fresh)
            if fresh:
                refuse_not_finite(site.key, site.weight)
            rows = next((n for pattern, n in self.fused.items() if _fits(pattern, site.key)), None)
            delta = delta_at(place, self.delta, options[site.key], rows, self.apart(site.key))
            begin(delta, start, place)
            if not self.init_weights:
                delta.randomize()
            made[site.key] = cast(Delta, moved(delta, place.device))
        self.follow(made)
        accompany(made, self.own_loss, penalty_of(self.objective))
        if budget is not None and (changing := budget.follow(made)) is not None:
            carry(next(iter(made.values())), changing)
        return dict(made)

    def _check_base(self, model: nn.Module, sites: Sequence[contract.Site]) -> None:
        sample = _sample(sites)
        told = {
            "sites": [site.key for site in sites],
            "base": None if sample is None else fingerprint(sample),
            "layers": {site.key: _layout(site) for site in sites},
        }
        if self.made is None:
            self.made = told
            return
        self.made = {**told, **self.made}
        print_of_base, keys = self.made["base"], {site.key for site in sites}
        if missing := [key for key in self.made.get("sites", []) if key not in keys]:
            raise AdapterError(
                f"the adapter changes '{missing[0]}', which {type(model).__name__} lacks or target_modules leave out; "
                f"this model has {', '.join(sorted(keys)[:6])}: give the base that it was trained on"
            )
        if self.check_base and print_of_base and sample is not None and not matches(print_of_base, sample):
            raise AdapterError(
                "the adapter was trained on another base: the weights differ. Give the base that it was trained on, or "
                "force it: config = PeftConfig.from_pretrained(path); config.check_base = False; "
                "PeftModel.from_pretrained(model, path, config=config)"
            )


def _unfilled(method: str) -> DeltaConfig:
    """A config of this method without any field, for copies. AdapterError where this Fallow lacks the method."""
    if method not in METHODS:
        raise AdapterError(f"method={method!r} is not hosted by this Fallow{nearest(method, METHODS)}; update Fallow")
    kind = cast("type[DeltaConfig]", METHODS[method])
    return kind.__new__(kind)


def moved(module: nn.Module, device: torch.device) -> nn.Module:
    """To a device, but for tensors on the meta device, whose values a file will bring."""
    return module._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))


def _fits(pattern: str, key: str) -> bool:
    return re.fullmatch(rf"(.*\.)?({pattern})", key) is not None


def _layout(site: contract.Site) -> dict[str, Any]:
    base = site.layer.get_base_layer()
    return layout(base, view_of(base, site.tensor))


def _sample(sites: Sequence[contract.Site]) -> Tensor | None:
    """Some entries of each weight; None where a weight is coded, so that its values are not the original's."""
    if any(site.layer.quantization_backend is not None for site in sites):
        return None
    return sample_of([site.weight for site in sites])


def sample_of(weights: Sequence[Tensor]) -> Tensor | None:
    """The entries by which a base of these weights is known; None where there are none to be seen."""
    parts: list[Tensor] = []
    for weight in weights:
        if isinstance(weight, StoredWeight) or weight.is_meta or not weight.is_floating_point():
            return None
        flat = weight.detach().reshape(-1)
        parts.append(flat[:: max(1, flat.numel() // SAMPLED)][:SAMPLED].cpu())
    same = len({part.dtype for part in parts}) == 1
    return torch.cat(parts if same else [part.float() for part in parts]) if parts else None


def config_of(method: type[Delta]) -> type[DeltaConfig]:
    """The config class of a method; made once, known to PEFT's files from then on."""
    held = METHODS.get(method.name)
    if held is not None and getattr(held, "delta", None) is method:
        return held  # type: ignore[return-value]
    own = [(f.name, f.type, _again(f)) for f in dataclasses.fields(method.Options)]
    if taken := {name for name, _, _ in own} & {f.name for f in dataclasses.fields(DeltaConfig)}:
        raise ConfigError(
            f"'{method.name}' has an option {sorted(taken)[0]}, which is a field of all configs; rename it"
        )
    made = dataclasses.make_dataclass(
        f"{method.__name__}Config",
        [("method", str, field(default=method.name)), *own],
        bases=(DeltaConfig,),
        namespace={"delta": method, "__doc__": _told(method), "__module__": __name__},
    )
    METHODS[method.name] = made
    return made


def _again(told: dataclasses.Field[Any]) -> Any:
    if told.default_factory is not dataclasses.MISSING:
        return field(default_factory=told.default_factory)
    return field(default=told.default)


def _told(method: type[Delta]) -> str:
    options = (method.Options.__doc__ or "").strip()
    first = (method.__doc__ or method.__name__).strip().splitlines()[0]
    return f"{first}\n\n{options}\n\nFor the other fields see `fallow.core.peft_host.DeltaConfig`."


def describe(config: FallowConfig, deltas: Mapping[str, nn.Module], error: float) -> FallowConfig:
    """The config of an adapter made of others, of which `config` is the first's: a LoRA's, where they are Deltas."""
    if not any(isinstance(delta, Delta) for delta in deltas.values()):
        return config.describing(deltas)
    ranks = {re.escape(key): delta.o.rank for key, delta in deltas.items() if isinstance(delta, Delta)}
    shared = {f.name: copy.deepcopy(getattr(config, f.name)) for f in dataclasses.fields(FallowConfig)}
    first = config.made or {}
    known = {key: told for key, told in first.get("layers", {}).items() if key in deltas}
    made = {"sites": list(deltas), "base": first.get("base"), "layers": known, "error": error}
    described = config_of(REGISTRY["lora"])(
        **shared | {"method": "lora", "made": made},
        rank_pattern=ranks,
        alpha_pattern={key: float(rank) for key, rank in ranks.items()},
        target_parameters=getattr(config, "target_parameters", None),
    )
    described.follow(deltas)
    return described


def configs() -> dict[str, type[DeltaConfig]]:
    """{`LoRAConfig`: the class} of every method known now."""
    return {f"{method.__name__}Config": config_of(method) for method in REGISTRY.values()}
