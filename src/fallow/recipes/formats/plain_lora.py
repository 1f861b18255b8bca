"""Any mergeable adapter as a plain LoRA in PEFT's folder, which web UIs, vLLM and PEFT itself load.

fallow.to_lora(model, "style")                 # exact, where the method's change is a product of two factors
fallow.to_lora(model, "style", error=0.05)     # the smallest ranks whose change misses a twentieth
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fallow.core.errors import ConfigError
from fallow.core.files import fingerprint, write_json, write_tensors
from fallow.core.held_deltas import Held, HeldAdapter, held_adapter
from fallow.core.layouts import odd_of
from fallow.core.low_rank_form import bound, low_rank_form, refuse_without_form
from fallow.core.sparse import CONFIG, WEIGHTS
from fallow.core.views import ConvView, EmbeddingView, TransposedView
from fallow.recipes.adapter_directory import PREFIX, card, new_directory, noted
from fallow.recipes.approximation import Losses
from fallow.recipes.formats.patterns import exact_targets, settings

USE = "from peft import PeftModel\n\nPeftModel.from_pretrained(model, 'path/to/this')"


def to_lora(
    model: nn.Module,
    path: str | PathLike[str],
    adapter_name: str = "default",
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Write an adapter of either host as a LoRA folder of PEFT's, at scale 1; the model stays as it is.

    Without a bound methods whose change is B A keep their rank, exactly, and others are refused. `rank`: at most this
    in every layer; `energy`: the share of the squared change that is kept in each; `error`: the relative error allowed
    in each, ||change - B A|| / ||change||. Returns {written, method, error (over all layers), largest (of a layer),
    layers: {name: {rank, norm, error}}}. Every layer has alpha = rank, so that programs which know one alpha are right.

    ConfigError for a method that cannot be merged or needs a bound, and for layers that PEFT's LoRA does otherwise:
    grouped or dilated convolutions, Parameters that a module reads itself, weights that several modules share.
    """
    how = bound(rank, energy, error)
    held = held_adapter(model, adapter_name)
    for one in held.deltas:
        refuse_for_lora(one)
        refuse_without_form(one.delta, how)
    found = {one.key: low_rank_form(one.delta, one.matrix, how) for one in held.deltas}
    losses = Losses()
    tensors: dict[str, Tensor] = {}
    for one in held.deltas:
        form = found[one.key]
        losses.add(one.key, form.norm, form.missing, rank=form.rank)
        tensors |= lora_tensors(one, form.a.to(dtype), form.b.to(dtype))
    told = settings({key: (form.rank, float(form.rank)) for key, form in found.items()}, dora=False)
    metadata = {"method": "lora", "from": held.method, "options": held.options, "error": losses.error}
    write_folder(Path(path), held, told, tensors, "LoRA", metadata)
    largest = max((layer["error"] for layer in losses.layers.values()), default=0.0)
    report = {"written": str(path), "method": held.method, "error": losses.error, "largest": largest}
    return {**report, "layers": losses.layers}


def refuse_for_lora(one: Held, what: str = "LoRA") -> None:
    """ConfigError where PEFT has no layer of its LoRA for this one, or one that does something else."""
    if one.view.kind == "parameter":
        raise ConfigError(
            f"'{one.key}' is read by its module itself, where PEFT has no {what}; merge the adapter, or leave it out"
        )
    if len(one.names) > 1:
        raise ConfigError(
            f"the weight of '{one.key}' is shared by {', '.join(one.names)}, and PEFT's {what} acts in one of them; "
            "merge the adapter, or untie the weight before training"
        )
    refuse_odd(one.key, one.layer, what)


def refuse_odd(key: str, layer: Any, what: str = "LoRA") -> None:
    """ConfigError for layers that PEFT's run otherwise than the layer itself."""
    if odd := odd_of(layer):
        raise ConfigError(
            f"'{key}' is {odd}, for which PEFT's {what} computes something else; merge the adapter, or leave that "
            "layer out"
        )


def lora_tensors(one: Held, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """The factors A (r, in), B (out, r) under PEFT's names and in its shapes."""
    place = f"{PREFIX}{one.key}"
    if isinstance(one.view, EmbeddingView):
        return {f"{place}.lora_embedding_A": a, f"{place}.lora_embedding_B": b}
    if isinstance(one.view, ConvView):
        a, b = a.reshape(-1, *one.view.kernel), b.reshape(*b.shape, *[1] * len(one.view.kernel[1:]))
    return {f"{place}.lora_A.weight": a, f"{place}.lora_B.weight": b}


def write_folder(
    path: Path,
    held: HeldAdapter,
    told: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    title: str,
    metadata: Mapping[str, Any],
) -> None:
    """A folder of PEFT's, whole or not at all; the file's header says what `metadata` does, and which base it is of."""
    transposed = [
        isinstance(one.view, TransposedView) and not isinstance(one.view, EmbeddingView) for one in held.deltas
    ]
    config = {"bias": "none", "inference_mode": True, "task_type": None, "base_model_name_or_path": None, **told}
    config["target_modules"] = exact_targets([one.key for one in held.deltas])
    if told["peft_type"] != "MISS":
        config["fan_in_fan_out"] = all(transposed)
    kept = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with new_directory(path) as partial:
        write_tensors(partial / WEIGHTS, kept, noted(fingerprints(held), metadata))
        write_json(partial / CONFIG, config)
        (partial / "README.md").write_text(card(title, metadata, USE), encoding="utf-8")


def fingerprints(held: HeldAdapter) -> dict[str, list[str]]:
    """By weight, what its base is known by, and its dtype; nothing of quantised ones."""
    found = {}
    for one in held.deltas:
        weight = one.read().detach()
        if weight.is_floating_point() and not weight.is_meta:
            name = one.key if one.view.kind == "parameter" else f"{one.key}.weight"
            found[name] = [fingerprint(weight), str(weight.dtype).removeprefix("torch.")]
    return found
