"""The methods that the recipe trains with, by name: which weights move, under which optimizer, and what is saved.

    sara, largest, random, lt-sft, shira    some entries of the existing weights (fallow.selection)
    lora, peft                              PEFT's LoRA, or any other PEFT config (`peft_type=LOHA`, ...)
    dora, kasa, loca, ...                   any other weight parameterization of this package that can be merged
    full                                    every weight

A method's options are the arguments of its class or of its PEFT config, under their own names; with a start, a budget
or an objective lora is this package's own. New methods are a row of METHODS.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

from fallow.catalogue import card, methods
from fallow.core.delta import Delta, make_options
from fallow.core.errors import ConfigError, FallowError, SelectionError, nearest
from fallow.core.peft_host import FallowConfig
from fallow.core.select import Amount
from fallow.recipes.adapter_files import base_fingerprints, check_peft, save_full, save_peft
from fallow.recipes.from_data import from_data
from fallow.recipes.optimizers import ADAMW as ADAMW_ALONE
from fallow.recipes.optimizers import OPTIMIZERS, Rule
from fallow.recipes.parts import of_part, parts_of
from fallow.recipes.trained import DeltaTraining, DenseTraining, Order, SelectiveTraining, Trained
from fallow.selection.largest import Largest
from fallow.selection.lt_sft import LTSFT
from fallow.selection.random import Random
from fallow.selection.sara import SaRA
from fallow.selection.selective import Selective
from fallow.selection.shira import SHiRA

BEGUN = frozenset(("start", "budget", "objective"))  # options of every weight parameterization of this package
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]  # what LoRA is put on unless target_modules says otherwise
RANK_WEIGHT = 5e-3  # of SaRA's nuclear-norm term: the paper's best
RESELECT_AT = 0.5  # SaRA's progressive re-selection: once, at half of the run, as in the paper
ADAMW = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}  # torch's own, of the dense methods
AMOUNTS = tuple(field.name for field in dataclasses.fields(Amount))
SEEDS = 2**63  # seeds are below: torch's generators take no others
# What the plain arguments of the selective classes must be, by their annotation; the classes check all others.
PLAIN: dict[Any, tuple[Callable[[Any], bool], str]] = {
    int: (lambda value: isinstance(value, int) and not isinstance(value, bool), "a whole number"),
    float: (lambda value: _is_number(value), "a number"),
    bool: (lambda value: isinstance(value, bool), "true or false"),
    tuple[float, float]: (
        lambda value: isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_number, value)),
        "two numbers, like [0.9, 0.999]",
    ),
}
STORES = ("delta", "value")


# -- how each is made --------------------------------------------------------------------------------------------------


def _selective(cls: type[Selective], **own: Any) -> Callable[[Order], Trained]:
    """`own`: arguments from the order, as functions of it, unless an option of that name is given."""

    def make(order: Order) -> Trained:
        options = dict(order.options)
        store = options.pop("store", "delta")
        if store not in STORES:
            raise ConfigError(f"store={store!r} must be 'delta' (scales and merges) or 'value' (bit-exact)")
        if order.lr is not None:
            options["lr"] = order.lr
        if order.include is not None:
            options.setdefault("include", order.include)
        if not order.rule.plain:
            if OPTIMIZERS[order.rule.name].projects:
                raise ConfigError(
                    f"optimizer={order.rule.name} projects gradients of whole matrices, and {cls.__name__} trains "
                    "single entries; take it with method full, or with one that trains matrices, like lora"
                )
            told = {name: options.pop(name) for name in ADAMW_ALONE if name in options}
            options["rule"] = dataclasses.replace(order.rule, options={**told, **order.rule.options})
        for name, value in own.items():
            if name not in options:
                options[name] = value(order)
        return SelectiveTraining(_called(cls, order.network, options), _count(order.network), store)

    return make


def _sara(order: Order) -> Trained:
    """SaRA as the paper trains it: with the nuclear-norm term where a layer can take it, and one re-selection."""
    make = _selective(
        SaRA,
        seed=lambda order: order.seed,
        reselect_at=lambda order: RESELECT_AT,
        total_steps=lambda order: order.steps,
    )
    if "rank_weight" in order.options:
        return make(order)
    try:
        return make(dataclasses.replace(order, options={**order.options, "rank_weight": RANK_WEIGHT}))
    except SelectionError:  # no matrix is large enough for the term; any other reason is raised again by the next line
        return make(order)


def _shira(order: Order) -> Trained:
    """SHiRA with the mask that its paper recommends, which looks at batches, unless another is asked for."""
    mask = order.options.get("mask", "snip")
    make = _selective(
        SHiRA,
        mask=lambda order: mask,
        seed=lambda order: order.seed,
        batches=lambda order: order.batches if mask in ("snip", "grad") else None,
        loss=lambda order: order.loss,
    )
    return make(order)


def _called(cls: type[Selective], network: nn.Module, options: dict[str, Any]) -> Selective:
    annotations = get_type_hints(cls.__init__)
    for name, value in options.items():
        _check_plain(name, value, annotations.get(name))
    if "betas" in options:
        options["betas"] = tuple(options["betas"])
    return cls(network, **options)


def _lora(order: Order) -> Trained:
    options = dict(order.options)
    if BEGUN & options.keys():  # which PEFT's own LoRA has not
        return _with_peft(order, "lora", _delta_config("lora"), {"seed": order.seed, **options})
    rank = options.pop("rank", options.pop("r", 8))
    alpha = options.pop("alpha", options.pop("lora_alpha", rank))
    return _with_peft(order, "lora", _config_class("LORA"), {"r": rank, "lora_alpha": alpha, **options})


def _from_data(order: Order, part: nn.Module, cls: Any, options: dict[str, Any]) -> dict[str, Any]:
    """With the starts and budgets made that have to see the pictures."""
    if not BEGUN & options.keys():
        return options
    return from_data(order, part, options, options.get("rank", getattr(cls.delta.Options(), "rank", 8)))


def _peft(order: Order) -> Trained:
    options = dict(order.options)
    return _with_peft(order, "peft", _config_class(_peft_type(options.pop("peft_type", None))), options)


def _with_peft(order: Order, method: str, cls: Any, options: dict[str, Any]) -> Trained:
    """Any tuner of PEFT, put into the network in place; its own tensors are trained and nothing else."""
    from peft import inject_adapter_in_model

    adamw = _adamw(options, order.rule)
    kind = cls.__name__.removesuffix("Config")
    total = _count(order.network)
    with torch.random.fork_rng(devices=_cuda(order.network)):
        torch.manual_seed(order.seed)
        try:
            configs = {
                name: cls(**_from_data(order, part, cls, _targeted(cls, order, name, options)))
                for name, part in parts_of(order.network).items()
            }
            for config in configs.values():
                check_peft(config)
            order.network.requires_grad_(False)
            for name, part in parts_of(order.network).items():
                inject_adapter_in_model(configs[name], part)
        except FallowError:  # ours says by itself what is wrong
            raise
        except (ValueError, TypeError, NotImplementedError, KeyError) as error:
            said = str(error).strip().splitlines() or [type(error).__name__]
            raise ConfigError(f"PEFT refuses the options of {method} ({kind}): {said[0]}") from error
    if not any(parameter.requires_grad for parameter in order.network.parameters()):
        raise ConfigError(f"{method} ({kind}) trains nothing in this network; give other target_modules")
    lr = METHODS[method].lr if order.lr is None else order.lr
    assert lr is not None
    told = (order.network, lr, adamw, order.rule, total, save_peft, {"method": method})
    return DeltaTraining(*told, steps=order.steps) if issubclass(cls, FallowConfig) else DenseTraining(*told)


def _delta(slug: str) -> Callable[[Order], Trained]:
    """A weight parameterization of this package, through its PEFT config."""

    def make(order: Order) -> Trained:
        return _with_peft(order, slug, _delta_config(slug), {"seed": order.seed, **order.options})

    return make


def _delta_config(slug: str) -> Any:
    return import_module("fallow.deltas._peft").CONFIGS[f"{card(slug).name}Config"]


def delta_of(slug: str) -> type[Delta]:
    """The class of a weight parameterization."""
    found: type[Delta] = _delta_config(slug).delta
    return found


def _targeted(cls: Any, order: Order, part: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with the part's own target_modules, unless it is the network's and they are given."""
    if "target_modules" not in _fields_of(cls):
        return dict(options)
    own = {"target_modules": order.targets.get(part, LORA_TARGETS)}
    return {**options, **own} if part.startswith("text_encoder") else {**own, **options}


def _full(order: Order) -> Trained:
    lr = METHODS["full"].lr if order.lr is None else order.lr
    assert lr is not None
    for name, parameter in order.network.named_parameters():
        parameter.requires_grad_(order.include is None or re.search(order.include, name) is not None)
    adamw = _adamw(dict(order.options), order.rule)
    prints = base_fingerprints(order.network)  # now, while the weights are the base's

    def save(network: nn.Module, folder: Path, metadata: dict[str, Any], notes: Mapping[str, str] | None) -> Path:
        part = next((name for name, module in parts_of(order.network).items() if module is network), "")
        return save_full(network, folder, of_part(prints, part), metadata, notes)

    return DenseTraining(order.network, lr, adamw, order.rule, _count(order.network), save, {"method": "full"})


def _adamw(options: dict[str, Any], rule: Rule) -> dict[str, Any]:
    """Take AdamW's own arguments out of the options; of other rules only the weight decay, 0 if not given."""
    defaults = ADAMW if rule.name == "adamw" else {**ADAMW, "weight_decay": 0.0}
    taken = {name: options.pop(name, default) for name, default in defaults.items()}
    for name, value in taken.items():
        _check_plain(name, value, tuple[float, float] if name == "betas" else float)
    return {**taken, "betas": tuple(taken["betas"])}


def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _cuda(network: nn.Module) -> list[torch.device]:
    return list({parameter.device for parameter in network.parameters() if parameter.device.type == "cuda"})


# -- which there are, and what they take ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """One row: how to make it, the options it takes given those that stand there, its learning rates.

    `lr`: its own, None where the class decides (SaRA's follows from its threshold). `rates`: what a comparison tries on
    networks of Stable Diffusion's size. `small`: its own on mini-sd, whose network is a 270th of that and wants larger
    steps: after 500 on the set `bronze`, SaRA is 36.6 from it by its own rule (5.2e-4), 21.4 with 2e-3, 18.3 with 5e-3.
    """

    make: Callable[[Order], Trained]
    options: Callable[[Mapping[str, Any]], list[str]]
    lr: float | None
    rates: tuple[float, float, float]
    small: float


def _arguments(cls: type[Selective], *provided: str) -> Callable[[Mapping[str, Any]], list[str]]:
    """Those of the constructor, without what the recipe provides and without `rule`, which is no plain value."""
    apart = {"self", "model", "lr", "rule", *provided}
    return lambda options: [*(n for n in inspect.signature(cls.__init__).parameters if n not in apart), "store"]


def _peft_type(name: Any) -> str:
    names = sorted(str(kind.value) for kind in PEFT_TYPE_TO_CONFIG_MAPPING)
    if name is None:
        raise ConfigError(f"the method peft needs peft_type, one of {', '.join(names)}")
    if str(name).upper() not in names:
        raise ConfigError(f"peft_type={name} does not exist{nearest(str(name).upper(), names)}")
    return str(name).upper()


def _config_class(kind: str) -> Any:
    return next(cls for name, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items() if name.value == kind)


def _fields_of(cls: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(cls) if field.init and field.name not in ("peft_type",)]


def _lora_options(options: Mapping[str, Any]) -> list[str]:
    if BEGUN & options.keys():
        return _delta_options("lora")(options)
    return ["rank", "alpha", *sorted(BEGUN), *_fields_of(_config_class("LORA")), *ADAMW]


def _peft_options(options: Mapping[str, Any]) -> list[str]:
    return ["peft_type", *_fields_of(_config_class(_peft_type(options.get("peft_type")))), *ADAMW]


def _delta_options(slug: str) -> Callable[[Mapping[str, Any]], list[str]]:
    """Those of its config without what PEFT keeps for itself, and what would train or place something else."""
    hidden = {"made", "modules_to_save", "trainable_token_indices", "init_weights", "method"}
    hidden |= {field.name for field in dataclasses.fields(PeftConfig)}
    return lambda _: [*(name for name in _fields_of(_delta_config(slug)) if name not in hidden), *ADAMW]


APART = {card.slug: card.apart for card in methods() if card.apart}  # ready, but not for this recipe, and why
DELTAS = [
    card.slug
    for card in methods()
    if card.ready and card.home.startswith("fallow.deltas.") and card.slug not in ("lora", *APART)  # lora is PEFT's own
]
METHODS: dict[str, Method] = {
    "sara": Method(_sara, _arguments(SaRA, "total_steps"), None, (2e-4, 6e-4, 2e-3), 3e-3),
    "shira": Method(_shira, _arguments(SHiRA, "batches", "loss"), 5e-4, (2e-4, 6e-4, 2e-3), 3e-3),
    "largest": Method(_selective(Largest), _arguments(Largest), 5e-4, (2e-4, 6e-4, 2e-3), 3e-3),
    "random": Method(
        _selective(Random, seed=lambda order: order.seed), _arguments(Random), 5e-4, (2e-4, 6e-4, 2e-3), 3e-3
    ),
    "lt-sft": Method(
        _selective(LTSFT, batches=lambda order: order.batches, loss=lambda order: order.loss),
        _arguments(LTSFT, "batches", "loss"), 5e-4, (2e-4, 6e-4, 2e-3), 3e-3,
    ),
    "lora": Method(_lora, _lora_options, 5e-4, (3e-4, 1e-3, 3e-3), 3e-3),
    "peft": Method(_peft, _peft_options, 5e-4, (3e-4, 1e-3, 3e-3), 3e-3),
    **{
        slug: Method(_delta(slug), _delta_options(slug), 5e-4, (3e-4, 1e-3, 3e-3), 3e-3)
        for slug in DELTAS
    },
    "full": Method(_full, lambda options: list(ADAMW), 5e-5, (3e-5, 1e-4, 3e-4), 3e-4),
}  # fmt: skip


def own_rate(method: str, model: str) -> float | None:
    """The learning rate of a method on a model; None where the method's class decides."""
    return METHODS[method].small if model == "mini-sd" else METHODS[method].lr


def check_method(method: str, said: str) -> None:
    """ConfigError, which begins with `said`, for a method that does not exist, or that no recipe trains."""
    if method in APART:
        raise ConfigError(
            f"{said} is not trained by this command: {APART[method]}; in Python, fallow.attach(model, '{method}') or "
            f"get_peft_model takes it"
        )
    if method not in METHODS:
        raise ConfigError(f"{said} does not exist{nearest(method, METHODS)}")


def check_options(method: str, options: Mapping[str, Any]) -> None:
    """ConfigError for a method or an option that does not exist, with the nearest that does; SelectionError for amounts
    that cannot be.
    """
    check_method(method, f"method={method}")
    allowed = METHODS[method].options(options)
    for name in options:
        if name not in allowed:
            raise ConfigError(f"the method {method} has no option '{name}'{nearest(name, allowed)}")
        if options[name] is None:
            raise ConfigError(f"the option {name} of the method {method} has no value; give one, or leave it out")
    amounts = {name: options[name] for name in AMOUNTS if name in options and options[name] is not None}
    if amounts and method not in ("lora", "peft", "full", *DELTAS):  # where a budget is one of ranks
        Amount(**amounts)
    if method in DELTAS:
        delta = delta_of(method)
        own = {field.name for field in dataclasses.fields(delta.Options)}
        make_options(delta, {name: value for name, value in options.items() if name in own})


def _check_plain(name: str, value: Any, annotation: Any) -> None:
    """ConfigError for the value of an option that is not of the plain kind that its annotation says."""
    if annotation in PLAIN:
        fits, wanted = PLAIN[annotation]
        if not fits(value):
            raise ConfigError(f"{name}={value!r} must be {wanted}")
    if name == "seed" and not 0 <= value < SEEDS:
        raise ConfigError(f"seed={value} must be from 0 to 2**63 - 1")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def make_method(method: str, order: Order) -> Trained:
    """Put the network into training by a method.

    Raises ConfigError, ModelError, SelectionError or DataError where its options do not fit the network; then nothing
    was trained.
    """
    check_options(method, order.options)
    return METHODS[method].make(order)
