"""The kinds of text-to-image model that Fallow trains, by diffusers' pipeline class."""

from __future__ import annotations

from typing import Any

from fallow.core.errors import ModelError
from fallow.recipes.families.animatediff import AnimateDiff
from fallow.recipes.families.family import Ask, Conditions, Family
from fallow.recipes.families.flux import Flux
from fallow.recipes.families.pixart import PixArt
from fallow.recipes.families.stable_diffusion_3 import StableDiffusion3
from fallow.recipes.families.stable_diffusion_xl import StableDiffusionXL

__all__ = ["FAMILIES", "Ask", "Conditions", "Family", "family_named", "family_of"]

KINDS: tuple[Family, ...] = (Family(), StableDiffusionXL(), StableDiffusion3(), Flux(), PixArt(), AnimateDiff())
FAMILIES: dict[str, Family] = {name: family for family in KINDS for name in family.pipelines}


def family_named(kind: str, model: str = "") -> Family:
    """The family of a diffusers pipeline class. ModelError, which tells what there is, for one that is unknown."""
    if kind not in FAMILIES:
        known = ", ".join(dict.fromkeys(one.title for one in FAMILIES.values()))
        raise ModelError(f"model {model} is a {kind or 'pipeline without a class'}; Fallow works with {known}")
    return FAMILIES[kind]


def family_of(pipeline: Any) -> Family:
    """The family of a loaded pipeline. ModelError for a kind that is unknown."""
    return family_named(type(pipeline).__name__)
