"""What a hosted method brings: a config that makes Deltas, and the Kind that lets them act."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import peft
from packaging.version import Version
from peft.config import PeftConfig
from torch import Tensor, nn

from fallow.core.errors import AdapterError, ConfigError, nearest
from fallow.core.files import opened_tensors

if TYPE_CHECKING:
    from fallow.core.peft_host.layer import FallowLayer

NAME = "FALLOW"
OLDEST, TESTED = "0.21.0", "0.21.2"  # of PEFT
METHODS: dict[str, type[FallowConfig]] = {}

Active = Sequence[tuple[Any, float]]  # what acts in a layer with its scales, in the order in which it is active


@dataclass(frozen=True)
class Site:
    """One weight that is to be adapted: `key`, the module's path, and every name that the weight has in the model.

    `tensor`: its name in its module. `layer`: what stands in its module's place. `common`: the module for what all
    sites of the adapter share. `context`: values given for a forward.
    """

    key: str
    names: tuple[str, ...]
    owners: tuple[nn.Module, ...]
    weight: nn.Parameter
    tensor: str
    layer: FallowLayer
    common: nn.Module
    context: dict[str, Any]


class Hosted(nn.Module):
    """What one adapter is in one layer, where it is no `fallow.core.delta.Delta`.

    Parameters are trained, buffers saved. Its tensors are flat: no submodules.
    """

    kind: ClassVar[Any]  # made with a FallowLayer, it is its Kind

    @classmethod
    def combined(cls, parts: Active) -> Hosted:
        """A new one that changes the weight by the sum of scale * change."""
        raise ConfigError(f"{cls.__name__} cannot be added up; merge the adapters one after the other instead")


class Kind(Protocol):
    """How what is of one sort acts in one layer, whose `FallowLayer` it is made with."""

    def forward(self, layer: FallowLayer, active: Active, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`call(*args, **kwargs)` with these acting; `layer` is the leader or one tied to it."""
        ...

    def weight(self, active: Active) -> Tensor:
        """The weight with these acting, differentiable: for parents that read `child.weight` themselves."""
        ...

    def settle(self, active: Active) -> None:
        """Leave the base weight as it is merged with these Deltas; with none, bit for bit the base."""
        ...

    def check(self, active: Active) -> None:
        """Refuse to merge values that are not finite."""
        ...

    def change(self, delta: Any, scale: float) -> Tensor:
        """What it adds to the weight, in the weight's shape."""
        ...

    def suspect(self) -> None:
        """Values may have been written in ways that no version counter shows; the next forward must not rely on it."""
        ...

    def loaded(self) -> None:
        """Values or base weights were loaded; the weight shows its base."""
        ...


class _Type(str):
    """What PEFT and transformers use of a member of PeftType: equality and hash of str, `.value`, `.name`."""

    value = name = property(str.__str__)


def check_version(version: str) -> None:
    """ConfigError for a PEFT that is too old, a warning for one that is newer than all that this was tested with."""
    if Version(version) < Version(OLDEST):
        raise ConfigError(
            f"PEFT {version} is too old for Fallow's adapters, which need {OLDEST} or newer: pip install -U peft"
        )
    if Version(version).release[:2] > Version(TESTED).release[:2]:
        warnings.warn(
            f"PEFT {version} is newer than {TESTED}, the last that Fallow was tested with; if adapters misbehave, "
            f"pip install peft=={TESTED}",
            stacklevel=2,
        )


check_version(peft.__version__)
PEFT_TYPE: Any = _Type(NAME)


class _ByMethod(type):
    """`FallowConfig(method="sara", ...)`, which is what PEFT calls when it reads a file, makes a `SaRAConfig`."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls is not FallowConfig:
            return super().__call__(*args, **kwargs)
        method = kwargs.get("method")
        if method not in METHODS:
            raise AdapterError(
                f"method={method!r} is not hosted by this Fallow{nearest(str(method), METHODS)}; update Fallow"
            )
        known = {field.name for field in dataclasses.fields(METHODS[method])}
        if unknown := sorted(set(kwargs) - known):
            warnings.warn(f"the config of '{method}' has unknown fields, which are ignored: {unknown}", stacklevel=3)
        return METHODS[method](*args, **{name: value for name, value in kwargs.items() if name in known})


@dataclass
class FallowConfig(PeftConfig, metaclass=_ByMethod):
    """What every hosted method can be told.

    `target_modules`: names of modules (or their last parts), a regular expression that must match whole names,
    "all-linear", or "all-layers" (every Linear, convolution, embedding and attention block). `exclude_modules`,
    `layers_to_transform`, `layers_pattern`, `modules_to_save`: as in PEFT. `seed`: of what is drawn. `check_base`:
    refuse to load onto another base than the one trained on. `expect_gradients`: whether the first optimizer step
    refuses adapted weights that have no gradient; see `fallow.core.gradients`. `made`: filled in when an adapter is
    made, so that loading repeats no choice; None chooses anew.
    """

    method: str = ""
    target_modules: list[str] | str | None = "all-linear"
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    seed: int = 0
    check_base: bool = True
    expect_gradients: bool = True
    made: dict[str, Any] | None = None
    in_place: ClassVar[bool] = True  # whether it writes into base weights, which must then be plain tensors

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        if not self.target_modules and not getattr(self, "target_parameters", None):
            raise ConfigError(f"target_modules={self.target_modules!r} adapts nothing; give 'all-linear' or names")
        for name in ("target_modules", "exclude_modules"):
            setattr(self, name, _names(name, getattr(self, name)))
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ConfigError(f"layers_pattern={self.layers_pattern!r} needs layers_to_transform=")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """PEFT's own. AdapterError where the tensors beside a local config cannot be read."""
        file = Path(pretrained_model_name_or_path, subfolder or "", "adapter_model.safetensors")
        if file.is_file():
            with opened_tensors(file):
                pass
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)

    def make(self, model: nn.Module, sites: Sequence[Site]) -> Mapping[str, nn.Module]:
        """{site.key: Hosted or Delta} of an adapter, made in one pass over all sites; sets `made`. Some may be left."""
        raise ConfigError(f"{type(self).__name__} is of no method; give e.g. fallow.SaRAConfig")

    def describing(self, deltas: Mapping[str, nn.Module]) -> FallowConfig:
        """A copy of this config whose `made` tells of these Deltas, by site; for adapters made of others."""
        raise ConfigError(f"{type(self).__name__} is of no method; give e.g. fallow.SaRAConfig")


def _names(argument: str, given: Any) -> Any:
    """A text as it is, names as a set. ConfigError for a text that is no regular expression, and for other things."""
    if isinstance(given, str):
        try:
            re.compile(given)
        except re.error as error:
            raise ConfigError(f"{argument}={given!r} is no regular expression: {error}") from None
    elif isinstance(given, list | tuple | set | frozenset) and all(isinstance(name, str) for name in given):
        return set(given)
    elif given is not None:
        raise ConfigError(f"{argument}={given!r} must be a text or names")
    return given


def host(config: type[FallowConfig]) -> type[FallowConfig]:
    """Class decorator: files that name this method are read as this config."""
    METHODS[config.method] = config
    return config
