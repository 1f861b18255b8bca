"""The two hosts of Deltas behind one set of words, so that the same checks run on both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import fallow
from fallow.core.delta import Delta
from fallow.core.host.layer import sites
from fallow.core.peft_host import FallowLayer, config_of


class OwnHost:
    """fallow.attach and its kin."""

    name: ClassVar[str] = "own"

    def attach(
        self, model: nn.Module, method: type[Delta], options: Mapping[str, Any], targets: Any, name: str = "default"
    ) -> nn.Module:
        return fallow.attach(model, method, targets, name, seed=3, **options)

    def deltas(self, model: nn.Module, name: str = "default") -> dict[str, Delta]:
        """By the key of their weight, and of a stack of experts by its place."""
        held = {site.key: site[name] for _, site in sites(model) if name in site}
        parts = {key: getattr(delta, "parts", [delta]) for key, delta in held.items()}
        return {f"{key}.{i}": part for key, several in parts.items() for i, part in enumerate(several)}

    def activate(self, model: nn.Module, *names: str) -> None:
        fallow.activate(model, *names)

    def by_names(self, model: nn.Module, x: Tensor, names: list[str]) -> Tensor:
        """Each row of x with the adapter of its name."""
        with fallow.mixed(model, names):
            return model(x)

    def delete(self, model: nn.Module, name: str) -> None:
        fallow.detach(model, name)

    def scale(self, model: nn.Module, scale: float) -> None:
        fallow.set_scale(model, scale)

    @contextmanager
    def disabled(self, model: nn.Module) -> Iterator[None]:
        with fallow.disabled(model):
            yield

    def merge(self, model: nn.Module) -> None:
        fallow.merge(model)

    def unmerge(self, model: nn.Module) -> None:
        fallow.unmerge(model)

    def save(self, model: nn.Module, folder: Path) -> None:
        fallow.save(model, folder)

    def load(self, base: nn.Module, folder: Path) -> nn.Module:
        return fallow.load(base, folder)


class PeftHost:
    """get_peft_model and what PEFT's models offer."""

    name: ClassVar[str] = "peft"

    def attach(
        self, model: nn.Module, method: type[Delta], options: Mapping[str, Any], targets: Any, name: str = "default"
    ) -> nn.Module:
        parameters = {"target_modules": None, "target_parameters": targets} if targets == ["stack"] else {}
        config = config_of(method)(**{"target_modules": targets, "seed": 3, **parameters, **options})
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
            model.set_adapter(name)
            return model
        return get_peft_model(model, config, adapter_name=name)

    def layers(self, model: nn.Module) -> dict[str, FallowLayer]:
        return {path: layer for path, layer in model.named_modules() if isinstance(layer, FallowLayer)}

    def deltas(self, model: nn.Module, name: str = "default") -> dict[str, Delta]:
        held = {p: layer.fallow_delta[name] for p, layer in self.layers(model).items() if name in layer.fallow_delta}
        parts = {path: getattr(delta, "parts", [delta]) for path, delta in held.items()}  # one for each expert
        return {f"{path}.{i}": part for path, several in parts.items() for i, part in enumerate(several)}

    def activate(self, model: nn.Module, *names: str) -> None:
        if len(names) == 1:
            model.set_adapter(names[0])
        else:
            model.base_model.set_adapter(list(names))

    def by_names(self, model: nn.Module, x: Tensor, names: list[str]) -> Tensor:
        """Each row of x with the adapter of its name."""
        return model(x, adapter_names=names)

    def delete(self, model: nn.Module, name: str) -> None:
        model.delete_adapter(name)

    def scale(self, model: nn.Module, scale: float) -> None:
        for layer in self.layers(model).values():
            layer.set_scale("default", scale)

    @contextmanager
    def disabled(self, model: nn.Module) -> Iterator[None]:
        with model.disable_adapter():
            yield

    def merge(self, model: nn.Module) -> None:
        model.merge_adapter()

    def unmerge(self, model: nn.Module) -> None:
        model.unmerge_adapter()

    def save(self, model: nn.Module, folder: Path) -> None:
        model.save_pretrained(folder, save_embedding_layers=False)

    def load(self, base: nn.Module, folder: Path) -> nn.Module:
        return PeftModel.from_pretrained(base, folder, is_trainable=True)


HOSTS = (OwnHost(), PeftHost())
