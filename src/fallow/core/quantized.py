"""Quantised bases: put weights that are kept in 4 or 8 bits in the place of a model's own.

    names = quantize_(model, "nf4")            # linear layers and convolutions; names, shapes and classes stay
    optimizer = fallow.SaRA(model)             # trains entries beside the code (core.side_branch)
    get_peft_model(model, LoraConfig(...))     # or adapters beside it

Codes are in `core.weight_codes`, the tensor in `core.stored_weight`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torch import Tensor, nn

from fallow.core.errors import ConfigError, ModelError, nearest
from fallow.core.files import fingerprint
from fallow.core.stored_weight import Store, StoredWeight, as_parameter, of_parameter
from fallow.core.weight_codes import CODES

SMALL = 4096  # entries; smaller weights are not worth a code


def quantize_(
    model: nn.Module,
    mode: str,
    *,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    min_size: int = SMALL,
) -> list[str]:
    """Keep the weights of linear layers and two-dimensional convolutions as `mode` ("fp8", "nf4" or "int8"), in place.

    `include`, `exclude`: regular expressions on the weights' names. Weights of fewer entries than `min_size` stay as
    they are, so do biases, norms, embeddings, and weights tied to other kinds of layers. With "nf4" spatial
    convolutions are kept as fp8, as 4 bits are known to do for matrices only. Dtype and device of a weight are those
    it acts in. Returns the names. Raises ConfigError for an unknown mode or a pattern that matches nothing, ModelError
    where nothing is left to quantise; then nothing is changed.
    """
    allowed = [name for name in CODES if name != "plain"]
    if mode not in allowed:
        raise ConfigError(f"mode={mode!r} is no way to keep weights{nearest(str(mode), allowed)}")
    for name, module in model.named_modules():
        if hasattr(module, "base_layer"):
            raise ModelError(f"'{name}' has an adapter, whose factors are to stay as they are; quantise the base first")
    found = [
        (name, owner) for name, owner in layers_of(model, include, exclude) if owner.weight.numel() >= min_size
    ]  # fmt: skip
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no linear layer or convolution of {min_size} or more entries to quantise"
        )
    for _, owner in found:
        spatial = isinstance(owner, nn.Conv2d) and owner.kernel_size != (1, 1)
        exchange(model, cast(nn.Parameter, owner.weight), "fp8" if mode == "nf4" and spatial else mode)
    return [name for name, _ in found]


def layers_of(
    model: nn.Module, include: str | Iterable[str] | None = None, exclude: str | Iterable[str] | None = None
) -> list[tuple[str, nn.Linear | nn.Conv2d]]:
    """(name of its weight, layer) of every layer whose weight can be stored and is not, each weight once."""
    wanted, unwanted = _patterns("include", include), _patterns("exclude", exclude)
    users: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for param in module._parameters.values():
            users.setdefault(id(param), []).append(module)
    found, seen = [], set()
    for name, module in model.named_modules():
        if not _fits(module) or id(module.weight) in seen or not all(map(_fits, users[id(module.weight)])):
            continue
        seen.add(id(module.weight))
        full = f"{name}.weight" if name else "weight"
        found.append((full, cast("nn.Linear | nn.Conv2d", module)))
    for argument, patterns in (("include", wanted), ("exclude", unwanted)):
        for pattern in patterns:
            if not any(pattern.search(name) for name, _ in found):
                close = nearest(pattern.pattern, [name for name, _ in found])
                raise ConfigError(f"{argument}={pattern.pattern!r} matches no weight that can be quantised{close}")
    return [
        (name, module)
        for name, module in found
        if (not wanted or any(p.search(name) for p in wanted)) and not any(p.search(name) for p in unwanted)
    ]


def exchange(model: nn.Module, weight: nn.Parameter, mode: str) -> nn.Parameter:
    """Put a stored weight in the place of a Parameter, wherever the model has it."""
    with torch.no_grad():
        rows = weight.shape[0]
        store = Store(mode, tuple(weight.shape), CODES[mode].encode(weight.detach().reshape(rows, -1)), weight.device)
        if mode != "plain" and weight.device.type != "meta" and type(weight.data) is Tensor:  # plain ones can be asked
            store.fingerprint = fingerprint(weight)
    made = as_parameter(store, weight.dtype, weight.requires_grad)
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is weight:
                module._parameters[name] = made
    return made


def stored(model: nn.Module) -> Iterator[tuple[str, StoredWeight]]:
    """(name, weight) of every stored weight, tied ones once."""
    for name, param in model.named_parameters():
        if of_parameter(param) is not None:
            yield name, cast(StoredWeight, param)


def dense_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's `state_dict()` with stored weights as they act, in float32: for files, where codes cannot be.

    `load_state_dict` of a model whose weights are stored codes them anew.
    """
    found = model.state_dict()
    return {
        name: value.store.dense(torch.float32) if isinstance(value, StoredWeight) else value
        for name, value in found.items()
    }


def _fits(module: nn.Module) -> bool:
    if not isinstance(module, nn.Linear | nn.Conv2d) or isinstance(
        module, nn.modules.linear.NonDynamicallyQuantizableLinear
    ):
        return False
    weight = module._parameters.get("weight")
    dense = weight is not None and not isinstance(weight, StoredWeight) and weight.is_floating_point()
    return dense and not (isinstance(module, nn.Conv2d) and isinstance(module.padding, str))


def _patterns(argument: str, patterns: str | Iterable[str] | None) -> list[re.Pattern[str]]:
    given = [] if patterns is None else [patterns] if isinstance(patterns, str) else list(patterns)
    try:
        return [re.compile(pattern) for pattern in given]
    except (re.error, TypeError) as error:
        raise ConfigError(f"{argument}={patterns!r} is not a regular expression or a list of them: {error}") from error
