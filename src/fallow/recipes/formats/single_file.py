"""Reading one safetensors file of diffusers, kohya or LyCORIS: keys say which, layer by layer.

    diffusers   unet.down_blocks.0...to_q.lora_A.weight, also .lora.down.weight and .processor.to_q_lora.down.weight;
                alphas in the metadata's lora_adapter_metadata, else 1 x
    kohya       lora_unet_down_blocks_0_..._to_q.lora_down.weight, .lora_up.weight, .alpha, .lora_mid.weight (Tucker,
                which is multiplied into down), .dora_scale; diffusers' names or the original network's
    LyCORIS     lora_unet_..., lycoris_...: .diff, .diff_b of a layer, .w_norm, .b_norm of a normalisation

Products of other kinds (LoHa, LoKr, OFT, (IA)3, GLoRA) are refused by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fallow.core.errors import AdapterError
from fallow.recipes.adapter_directory import NETWORKS, PARTS, PREFIX, noted_in, opened
from fallow.recipes.formats import fused, names
from fallow.recipes.formats.layers import Adapter, Dense, Factors, Format, Layer, finite, part_of, plain
from fallow.recipes.formats.patterns import Pattern, number

LORA_METADATA = "lora_adapter_metadata"
FLAT = {
    "lora_unet_": "unet",
    "lora_transformer_": "unet",
    "lycoris_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
}
# suffix of a key -> what the tensor is
ROLES = {
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_mid.weight": "mid",
    "alpha": "alpha",
    "dora_scale": "magnitude",
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_A.default.weight": "down",
    "lora_B.default.weight": "up",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "diff": "weight",
    "diff_b": "bias",
    "w_norm": "weight",
    "b_norm": "bias",
}
# the oldest of diffusers' names: attn1.processor.to_q_lora.down.weight
OLD = re.compile(
    r"(.+?)(?:\.processor)?\.(to_q|to_k|to_v|to_out|q_proj|k_proj|v_proj|out_proj)_lora\.(down|up)\.weight"
)
FOREIGN = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "boft_": "BOFT",
    "on_input": "(IA)3",
    "lora_embedding_": "LoRA of an embedding",
    "set_weight": "a weight in place of another",
    "a1.weight": "GLoRA",
    "scalar": "LyCORIS' trained scalar",
    "lora_B.bias": "LoRA with biases",
    "lora_up.bias": "LoRA with biases",
}


class Key(NamedTuple):
    """A tensor of the file: the layer that it is of as the file names it, and what it is of it."""

    layer: str
    role: str


def split(key: str) -> Key | None:
    """A key's layer and role; None where it is no adapter's."""
    old = OLD.fullmatch(key)
    if old:
        inner = {"to_out": "to_out.0"}.get(old[2], old[2])
        return Key(f"{old[1]}.{inner}", old[3])
    pieces = key.split(".")
    for count in (1, 2, 3):
        role = ROLES.get(".".join(pieces[-count:])) if count < len(pieces) else None
        if role:
            return Key(".".join(pieces[:-count]).replace(".processor.", ".").removesuffix(".processor"), role)
    return None


def is_one(keys: Collection[str]) -> bool:
    """Whether a file of these keys is an adapter of one of these formats (or of a kind that is refused by name)."""
    return any(split(key) or _other_kind(key) for key in keys)


def _other_kind(key: str) -> str | None:
    tail = key.split(".", 1)[-1] if key.startswith(tuple(FLAT)) else key
    return next((kind for mark, kind in FOREIGN.items() if f".{mark}" in f".{tail}" or f".{mark}" in key), None)


def read(file: Path, known: Mapping[str, Collection[str]] | None = None) -> Adapter:
    """The adapter in a file. `known`: by part, the weight names of the network it is for, where there is one.

    Factors are read now, dense changes when they are wanted. Raises AdapterError for a file that is broken, of another
    kind, or names layers that are not known.
    """
    with opened(file) as found:
        metadata = dict(found.metadata() or {})
        keys = list(found.keys())
        grouped = _grouped(file, keys)
        layers = {
            layer: {role: (key, tuple(found.get_slice(key).get_shape())) for role, key in roles.items()}
            for layer, roles in grouped.items()
        }

        def tensor(key: str) -> Tensor:
            return finite(key, found.get_tensor(key), file)

        alphas = _alphas_in(file, metadata)
        made: dict[str, dict[str, Layer]] = {}
        reader = _Reader(file, tensor, alphas, known or {})
        for layer, roles in layers.items():
            for part, name, one in reader.layer(layer, roles):
                of_part = made.setdefault(part, {})
                if name in of_part:
                    raise AdapterError(f"{file} has '{name}' twice, under two names; remove one of them")
                of_part[name] = one
    _settle_parts(made)
    noted = noted_in(file, metadata)
    base = noted.get("base", {}), noted.get("parts", {})
    if not all(isinstance(one, dict) for one in base):
        raise AdapterError(f"{file} has broken metadata; copy it again")
    main = next((part for part in made if part in NETWORKS), None)
    notes = noted.get("metadata", {})
    return Adapter(
        _format(keys, made),
        made,
        {**base[1], **({main: base[0]} if main and base[0] else {})},
        notes if isinstance(notes, dict) else {},
        {name: value for name, value in metadata.items() if name not in ("format", "fallow", LORA_METADATA)},
    )


def _grouped(file: Path, keys: Collection[str]) -> dict[str, dict[str, str]]:
    """layer as the file names it -> role -> key."""
    grouped: dict[str, dict[str, str]] = {}
    for key in keys:
        found = split(key)
        if found is None:
            kind = _other_kind(key)
            if kind:
                raise AdapterError(
                    f"{file} holds {kind} ('{key}'), which Fallow does not read; LoRA (LoCon, DoRA) and full changes "
                    "(.diff) it does: give one of these, or merge it with the program that made it"
                )
            raise AdapterError(f"{file} holds '{key}', which is of no adapter format that Fallow reads; remove it")
        roles = grouped.setdefault(found.layer, {})
        if found.role in roles:
            raise AdapterError(f"{file} is broken: '{roles[found.role]}' and '{key}' are the same; remove one of them")
        roles[found.role] = key
    if not grouped:
        raise AdapterError(f"{file} holds no tensor; train or copy it again")
    return grouped


def _alphas_in(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """diffusers' settings by part: {"unet": {"r": 4, "lora_alpha": 8, ...}}; {} where the file has none."""
    try:
        told = json.loads(metadata.get(LORA_METADATA, "{}"))
    except ValueError as error:
        raise AdapterError(f"{file} has broken metadata ({LORA_METADATA}: {error}); copy it again") from None
    if not isinstance(told, dict):
        raise AdapterError(f"{file} has broken metadata ({LORA_METADATA} is no table); copy it again")
    found: dict[str, Any] = {}
    for key, value in told.items():
        part, dot, name = key.partition(".")
        if dot:
            found.setdefault(part, {})[name] = value
    return found


def alpha_rule(where: object, settings: Mapping[str, Any]) -> Callable[[str, int], float]:
    """(layer, rank) -> alpha such that the scale is alpha / rank, by the settings of a LoraConfig."""
    default = number(where, "lora_alpha", settings.get("lora_alpha"), 8)  # PEFT's own default
    pattern = Pattern(where, "alpha_pattern", settings.get("alpha_pattern"))
    rs = bool(settings.get("use_rslora"))

    def alpha(layer: str, rank: int) -> float:
        found = pattern.of(layer, default)
        return found * math.sqrt(rank) if rs else found

    return alpha


class _Reader:
    def __init__(
        self,
        file: Path,
        tensor: Callable[[str], Tensor],
        settings: Mapping[str, Any],
        known: Mapping[str, Collection[str]],
    ) -> None:
        self.file, self.tensor = file, tensor
        self.rules = {part: alpha_rule(file, told) for part, told in settings.items()}
        self.known = {
            part: {plain(name).rsplit(".", 1)[0] for name in found if "." in name} for part, found in known.items()
        }

    def layer(self, layer: str, roles: Mapping[str, tuple[str, tuple[int, ...]]]) -> list[tuple[str, str, Layer]]:
        """(part, weight name, what changes) of one layer of the file; several where it holds several in one."""
        part, name = self.place(layer)
        dense = [role for role in ("weight", "bias") if role in roles]
        if dense:
            if extra := roles.keys() - {"weight", "bias", "alpha"}:
                raise AdapterError(f"{self.file}: '{layer}' has a full change and {min(extra)} too; remove one of them")
            return [found for role in dense for found in self.dense(part, name, role, *roles[role])]
        for role in ("down", "up"):
            if role not in roles:
                has = ", ".join(key for key, _ in roles.values())
                raise AdapterError(f"{self.file} is incomplete: '{layer}' has {has} and no {role}; copy it again")
        return self.factors(part, name, layer, {role: self.tensor(key) for role, (key, _) in roles.items()})

    def place(self, layer: str) -> tuple[str, str]:
        """Part and diffusers-like dotted name of a layer as the file names it."""
        for prefix, part in FLAT.items():
            if layer.startswith(prefix):
                flat = layer.removeprefix(prefix)
                wanted = self.known.get(part) or (self.known.get("transformer") if part == "unet" else None) or ()
                found = names.dotted(flat, wanted) if "." not in flat else None
                if found is None:
                    raise AdapterError(
                        f"{self.file} changes the layer '{layer}', whose name Fallow cannot read; give an adapter of "
                        "Stable Diffusion 1, 2, XL, 3 or FLUX"
                    )
                return part, plain(found)
        for part in PARTS:
            if layer.startswith(f"{part}."):
                return part, plain(layer.removeprefix(f"{part}."))
        bare = layer.removeprefix(PREFIX).removeprefix("diffusion_model.")
        return "", plain(bare)

    def dense(self, part: str, layer: str, role: str, key: str, shape: tuple[int, ...]) -> list[tuple[str, str, Layer]]:
        cuts = self.original(layer, shape[0] if shape else 0, shape[1] if len(shape) > 1 else 0)
        if cuts is None:
            return [(part, f"{self.diffusers(layer)}.{role}", Dense(partial(_read, self.file, key), shape))]
        if role == "bias" and len(cuts) == 4:
            raise AdapterError(
                f"{self.file}: the bias of {layer}, which is four layers in one, cannot be cut; remove it"
            )
        found: list[tuple[str, str, Layer]] = []
        columns = shape[1] if len(shape) > 1 else shape[0] // len(cuts)
        for name, rows in cuts:
            start, end = rows.bounds(shape[0], columns)
            read = partial(_read_rows, self.file, key, rows, columns)
            found.append((part, f"{name}.{role}", Dense(read, (end - start, *shape[1:]))))
        return found

    def original(self, layer: str, rows: int, columns: int) -> list[tuple[str, fused.Rows]] | None:
        return fused.parts(layer, rows, columns) if fused.is_original(layer) else None

    def diffusers(self, layer: str) -> str:
        found = names.from_ldm(layer) if names.is_ldm(layer) else layer
        if found is None:
            raise AdapterError(f"{self.file} changes '{layer}', which is no layer of Stable Diffusion 1, 2 or XL")
        return found

    def factors(self, part: str, layer: str, given: str, found: dict[str, Tensor]) -> list[tuple[str, str, Layer]]:
        down, up = found["down"], found["up"]
        if "mid" in found:
            down = untucked(self.file, given, down, up, found["mid"])
        if down.ndim not in (2, 3, 4, 5) or up.ndim not in (2, down.ndim) or up.shape[1:2] != down.shape[:1]:
            raise AdapterError(
                f"{self.file} is broken at '{given}': down {tuple(down.shape)} and up {tuple(up.shape)} are no pair of "
                "factors; copy it again"
            )
        if any(side != 1 for side in up.shape[2:]) or not down.numel() or not up.numel():
            raise AdapterError(f"{self.file}: up of '{given}' is {tuple(up.shape)}, which no layer has; copy it again")
        rank = down.shape[0]
        cuts = self.original(layer, up.shape[0], down.shape[1])
        name = layer if cuts is not None else self.diffusers(layer)
        rule = self.rules.get(part)
        alpha = rule(name, rank) if rule else float(rank)
        if "alpha" in found:
            if found["alpha"].numel() != 1:
                raise AdapterError(f"{self.file} is broken: the alpha of '{given}' is no single number; copy it again")
            alpha = float(found["alpha"])
        magnitude = _magnitude(self.file, given, found.get("magnitude"), up.shape[0])
        if cuts is None:
            return [(part, f"{name}.weight", Factors(down, up, alpha, magnitude))]
        whole = Factors(down, up, alpha, magnitude)
        return [(part, f"{name}.weight", _cut(whole, rows)) for name, rows in cuts]


def _cut(whole: Factors, rows: fused.Rows) -> Factors:
    columns = whole.down.shape[1]
    magnitude = None if whole.magnitude is None else fused.cut(whole.magnitude, rows, columns)
    return Factors(whole.down, fused.cut(whole.up, rows, columns), whole.alpha, magnitude)


def untucked(where: object, layer: str, down: Tensor, up: Tensor, mid: Tensor) -> Tensor:
    """LoCon's Tucker form as plain factors: mid (r, s, kh, kw) times down (s, in, 1, 1) is a down (r, in, kh, kw)."""
    matrices = min(up.ndim, down.ndim) > 1 and mid.ndim > 2 and down.numel() == math.prod(down.shape[:2]) > 0
    if not matrices or mid.shape[:2] != (up.shape[1], down.shape[0]):
        raise AdapterError(
            f"{where} is broken at '{layer}': mid {tuple(mid.shape)} does not fit between down {tuple(down.shape)} and "
            f"up {tuple(up.shape)}; copy it again"
        )
    product = torch.einsum("rs...,si->ri...", mid.float(), down.flatten(1).float())
    return product.to(torch.promote_types(mid.dtype, down.dtype))


def _magnitude(where: object, layer: str, found: Tensor | None, rows: int) -> Tensor | None:
    if found is None:
        return None
    if found.numel() != rows or (found.ndim > 1 and found.shape[0] == 1 and found.shape[1] != rows):
        raise AdapterError(
            f"{where}: the DoRA magnitudes of '{layer}' are {tuple(found.shape)}, of its inputs (LyCORIS' "
            "wd_on_output=False), which Fallow does not read; merge it with the program that made it"
        )
    if found.ndim == 2 and found.shape[0] == 1:
        raise AdapterError(
            f"{where}: the DoRA magnitudes of '{layer}' are {tuple(found.shape)}, of its inputs (LyCORIS' "
            "wd_on_output=False), which Fallow does not read; merge it with the program that made it"
        )
    return found.flatten()


def _read(file: Path, key: str) -> Tensor:
    with opened(file) as found:
        return finite(key, found.get_tensor(key), file)


def _read_rows(file: Path, key: str, rows: fused.Rows, columns: int) -> Tensor:
    return fused.cut(_read(file, key), rows, columns)


def _settle_parts(made: dict[str, dict[str, Layer]]) -> None:
    """Give layers without a part (or of a network that is a UNet or a transformer) the part that their names tell."""
    for part in ("", "unet"):
        if part in made:
            layers = made.pop(part)
            right = part_of(layers)
            if part == "unet" and right == "text_encoder":
                right = "unet"
            made[right] = {**made.get(right, {}), **layers}
    third = made.get("text_encoder_3")
    if third and "transformer" in made and fused.is_flux(made["transformer"]):
        made["text_encoder_2"] = made.pop("text_encoder_3")  # kohya numbers T5 as in Stable Diffusion 3


def _format(keys: Collection[str], made: Mapping[str, Mapping[str, Layer]]) -> Format:
    flat = [key for key in keys if key.startswith(tuple(FLAT))]
    if any(isinstance(layer, Dense) for layers in made.values() for layer in layers.values()):
        return "lycoris-diff"
    if not flat:
        return "peft" if all(key.startswith(PREFIX) for key in keys) else "diffusers"
    heads = tuple(f"{prefix}{word}_" for prefix in ("lora_unet_", "lycoris_") for word in names.LDM)
    return "kohya-ldm" if any(key.startswith(heads) for key in flat) else "kohya"
