"""Tensors of checkpoints on disk by diffusers' names, one read at a time.

A checkpoint is a pipeline directory, the directory of one of its parts, a part's safetensors file, or the single file
of a whole model in its authors' names (Stable Diffusion 1, 2, XL, 3, FLUX), of which fused layers are cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fallow import assets
from fallow.core.errors import ModelError
from fallow.recipes.adapter_directory import PARTS
from fallow.recipes.formats import fused, names
from fallow.recipes.formats.layers import part_of, plain

# what tensors of single files begin with -> the part; of other beginnings nothing is known
WITHIN = {
    "model.diffusion_model.": "",
    "cond_stage_model.transformer.": "text_encoder",
    "conditioner.embedders.0.transformer.": "text_encoder",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "text_encoders.t5xxl.transformer.": "text_encoder_3",
}


@dataclass(frozen=True)
class Stored:
    """A tensor on disk, or the rows of one that are a layer's."""

    file: Path
    key: str
    shape: tuple[int, ...]
    rows: fused.Rows | None = None
    columns: int = 0

    def read(self) -> Tensor:
        """The tensor on the CPU in the dtype it is stored in."""
        with safe_open(self.file, framework="pt") as opened:
            found: Tensor = opened.get_tensor(self.key)
        return found if self.rows is None else fused.cut(found, self.rows, self.columns)


def network_tensors(model: str | Path) -> tuple[dict[str, dict[str, Stored]], list[str]]:
    """({part: {weight name: tensor}}, names of what is of no part that adapters change, such as the autoencoder).

    Raises ModelError where there is no such checkpoint, or it cannot be read.
    """
    place = assets.MINI_SD if str(model) == "mini-sd" else Path(model).expanduser()
    found = tensors_in(place)
    made: dict[str, dict[str, Stored]] = {}
    others: list[str] = []
    shapes = _shapes(found)
    loose: dict[str, Stored] = {}
    for name, (file, key) in found.items():
        folder, slash, inner = name.partition("/")
        stored = Stored(file, key, shapes[name])
        if slash and folder in PARTS and "/" not in inner:
            made.setdefault(folder, {})[plain(inner)] = stored
        elif slash:
            others.append(name)
        else:
            loose[name] = stored
    heads = [head for head in WITHIN if any(name.startswith(head) for name in loose)]
    for name, stored in loose.items():
        head = next((head for head in heads if name.startswith(head)), None)
        if heads and head is None:
            others.append(name)
            continue
        part, inner = (WITHIN[head], name.removeprefix(head)) if head else ("", name)
        parts = [(inner, stored)] if part else _diffusers(inner, stored, shapes, head or "")
        if not parts:
            others.append(name)
        for own, piece in parts:
            made.setdefault(part, {})[plain(own)] = piece
    if "" in made:
        network = made.pop("")
        made[part_of(network)] = network
    if not made:
        raise ModelError(
            f"{model} holds no network that Fallow knows (its first tensor is {min(found)}); give a pipeline, its unet "
            "or transformer, or the single file of a model"
        )
    return made, others


def _diffusers(name: str, stored: Stored, shapes: dict[str, tuple[int, ...]], head: str) -> list[tuple[str, Stored]]:
    """diffusers' name of a tensor, or of its parts; [] where it has none."""
    layer, dot, role = name.rpartition(".")
    if not dot:
        return [(name, stored)]
    if names.is_ldm(layer):
        own = names.from_ldm(layer)
        return [] if own is None else [(f"{own}.{role}", stored)]
    if not fused.is_original(layer):
        return [(name, stored)]
    weight = shapes.get(f"{head}{layer}.weight", stored.shape)
    columns = weight[1] if len(weight) > 1 else weight[0]
    cuts = fused.parts(layer, stored.shape[0], columns)
    found = []
    for own, rows in cuts or []:
        start, end = rows.bounds(stored.shape[0], columns)
        piece = Stored(stored.file, stored.key, (end - start, *stored.shape[1:]), rows, columns)
        found.append((f"{own}.{role}", piece))
    return found


def _shapes(found: dict[str, tuple[Path, str]]) -> dict[str, tuple[int, ...]]:
    by_file: dict[Path, list[tuple[str, str]]] = {}
    for name, (file, key) in found.items():
        by_file.setdefault(file, []).append((name, key))
    shapes = {}
    for file, keys in by_file.items():
        with safe_open(file, framework="pt") as opened:
            for name, key in keys:
                shapes[name] = tuple(opened.get_slice(key).get_shape())
    return shapes


def tensors_in(place: Path) -> dict[str, tuple[Path, str]]:
    """Name -> (file, key) of every tensor of a checkpoint. In a directory the names begin with the part's folder.

    Where a folder holds several precisions of the same weights, the plain one counts. Raises ModelError.
    """
    if place.is_file():
        files = [place]
    elif place.is_dir():
        files = [file for file in sorted(place.rglob("*.safetensors")) if not _variant(file)]
        files = files or sorted(place.rglob("*.safetensors"))
    else:
        raise ModelError(f"{place} does not exist; give a safetensors file, or a directory that holds some")
    if not files:
        raise ModelError(f"{place} holds no safetensors file; give a model, a pipeline or an adapter")
    found: dict[str, tuple[Path, str]] = {}
    for file in files:
        inner = file.parent.relative_to(place).as_posix() if place.is_dir() else "."
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118  safe_open is no mapping
                    found[key if inner == "." else f"{inner}/{key}"] = (file, key)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} cannot be read ({error}); it may have been cut off: copy it again") from None
    return found


def _variant(file: Path) -> bool:
    return ".fp16." in file.name or ".non_ema." in file.name


def real(tensor: Tensor, name: str, where: object) -> Tensor:
    """In float32 (float64 stays). ModelError where it holds NaN or infinite values."""
    wide = tensor if tensor.dtype == torch.float64 else tensor.float()
    if wide.numel() and not bool(torch.isfinite(wide).all()):
        raise ModelError(f"'{name}' of {where} holds NaN or infinite values; the checkpoint is broken: give another")
    return wide
