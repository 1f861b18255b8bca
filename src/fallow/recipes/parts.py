"""Several parts of a pipeline in training together: the denoising network, and text encoders beside it.

    whole = Parts({"unet": pipeline.unet, "text_encoder": pipeline.text_encoder})

Names of weights are those in the pipeline: `unet.conv_in.weight`. An adapter of several parts is a directory with an
adapter directory for each, under the part's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from torch import nn

from fallow.core.files import atomic_directory

Value = TypeVar("Value")


class Parts(nn.ModuleDict):
    """Parts by their names in the pipeline, as one network."""


def parts_of(network: nn.Module) -> dict[str, nn.Module]:
    """The parts by name; a network that stands alone has the name ""."""
    return dict(network.items()) if isinstance(network, Parts) else {"": network}


def of_part(values: Mapping[str, Value], part: str) -> dict[str, Value]:
    """What belongs to one part of values by weight name, under the names within the part."""
    prefix = f"{part}." if part else ""
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def write_each(network: nn.Module, folder: Path, write: Callable[[str, nn.Module, Path], object]) -> None:
    """`write(name, part, folder)` for the network alone, or for each part into a directory of its own."""
    parts = parts_of(network)
    if list(parts) == [""]:
        write("", network, folder)
        return
    with atomic_directory(folder) as partial:
        for name, part in parts.items():
            write(name, part, partial / name)
