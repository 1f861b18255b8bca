"""PEFT's own files of methods that are here too, tensor by tensor: LoRA, DoRA, VeRA, RandLoRA, MiSS.

method      PEFT's tensors                            ours, as matrices
lora, dora  lora_A (r, in[, k]), lora_B (out, r[, 1]) A (r, in * k), B (out, r)
            lora_embedding_A (r, rows), _B (dim, r)   A, B
            lora_magnitude_vector (out,) (1, out, 1)  magnitude (out,)
vera        vera_lambda_b (out,), vera_lambda_d (r,)  b, d
            vera_A (r, in), vera_B (out, r), of all   A, B
randlora    randlora_lambda (r, n), _gamma (n, m)     lambda_ (n, r), gamma
            randlora_A (r, 1, m), _B (M, n, r)        the bases (r, m) and (M, n r), paired in PEFT's order
bone        miss_block (r, out) | (r, q)              shared_block
            miss_block (out / r, r, r) of "bat"       blocks
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fallow.core.errors import AdapterError
from fallow.core.sparse import WEIGHTS
from fallow.recipes.adapter_directory import PREFIX, opened, read_config
from fallow.recipes.formats.layers import Adapter, Factors, finite
from fallow.recipes.formats.patterns import Pattern, number

Shape = tuple[int, int]
ADDED = "lora_embedding_"


@dataclass
class Foreign:
    """An adapter of PEFT's as one of ours. `layers`: by module, tensors under our names; `common`: of all layers.

    `given`: options that single layers have of their own. `odd`: layers that only one kind of module can have.
    """

    method: str
    options: dict[str, Any]
    layers: dict[str, dict[str, Tensor]]
    common: dict[str, Tensor] = field(default_factory=dict)
    given: dict[str, dict[str, Any]] = field(default_factory=dict)
    seed: int = 0
    kinds: tuple[str, ...] = ("linear",)
    embeddings: frozenset[str] = frozenset()


def read_foreign(folder: Path) -> Foreign:
    """The adapter in a folder of PEFT's. AdapterError where it is broken, of another method or with refused options."""
    config = read_config(folder)
    kind = config.get("peft_type")
    if kind not in READERS:
        hint = "; its SHIRA is read by fallow.SHiRA.from_peft(folder, model)" if kind == "SHIRA" else ""
        raise AdapterError(
            f"{folder} is PEFT's {kind!r}, which is none of {', '.join(READERS)}, that can be read here{hint}"
        )
    _refuse(folder, config, REFUSED | MORE.get(str(kind), {}))
    file = folder / WEIGHTS
    with opened(file) as found:
        tensors = {key: finite(key, found.get_tensor(key), file) for key in found.keys()}  # noqa: SIM118
    if not tensors:
        raise AdapterError(f"{file} holds no tensor; train or copy it again")
    return READERS[str(kind)](file, config, tensors)


def of_factors(where: object, adapter: Adapter, part: str) -> Foreign:
    """A LoRA of diffusers' or kohya's, of one part of the pipeline. AdapterError for changes that are no factors."""
    layers, given = {}, {}
    some = adapter.parts[part]
    dora = any(isinstance(one, Factors) and one.magnitude is not None for one in some.values())
    for name, one in some.items():
        if not isinstance(one, Factors) or (one.magnitude is not None) != dora or not name.endswith(".weight"):
            what = "a full change" if not isinstance(one, Factors) else "no DoRA's magnitudes, as others have"
            raise AdapterError(f"{where} has {what} of '{name}'; make a plain LoRA of it with fallow adapter convert")
        up, down = one.matrices(one.up.dtype)
        key = name.removesuffix(".weight")
        layers[key] = {"A": down, "B": up} | ({"magnitude": one.magnitude} if one.magnitude is not None else {})
        given[key] = {"rank": one.rank, "alpha": float(one.alpha)}
    options = {"alpha": None}
    return _with_usual(Foreign("dora" if dora else "lora", options, layers, {}, given, 0, ("linear", "conv")))


# -- one reader for each of PEFT's types -------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Any, str]] = {
    "bias": ("none", "trained biases"),
    "modules_to_save": (None, "modules that were trained whole"),
}
MORE: dict[str, dict[str, tuple[Any, str]]] = {
    "LORA": {
        "lora_bias": (False, "trained biases"),
        "layer_replication": (None, "layers that were doubled"),
        "target_parameters": (None, "parameters that are no layer's"),
        "trainable_token_indices": (None, "trained tokens"),
        "alora_invocation_tokens": (None, "an activation by tokens"),
        "use_qalora": (False, "pooled inputs"),
        "use_bdlora": (None, "block-diagonal factors"),
        "arrow_config": (None, "a router"),
        "kasa_config": (None, "PEFT's KaSA"),
        "monteclora_config": (None, "sampled factors"),
        "velora_config": (None, "compressed activations"),
    },
}
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # starts that take what they give from the base


def _refuse(folder: Path, config: Mapping[str, Any], refused: Mapping[str, tuple[Any, str]]) -> None:
    for name, (usual, what) in refused.items():
        if (value := config.get(name)) not in (usual, None, False, [], {}):
            raise AdapterError(f"{folder} has {what} ({name}={value!r}), which its method has no place for here")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        raise AdapterError(
            f"{folder} began with init_lora_weights={start!r}, which changes the base too; save it with PEFT's "
            "path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        )


def _lora(file: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Foreign:
    dora = bool(config.get("use_dora"))
    names = {
        "lora_A.weight": "A", "lora_B.weight": "B", "lora_embedding_A": "A", "lora_embedding_B": "B",
        "lora_magnitude_vector": "magnitude", "lora_magnitude_vector.weight": "magnitude",
    }  # fmt: skip
    layers = _split(file, tensors, names if dora else {key: own for key, own in names.items() if own != "magnitude"})
    embeddings = {_layer(key, ADDED) for key in tensors if f".{ADDED}" in key}
    alphas = Pattern(file, "alpha_pattern", config.get("alpha_pattern"))
    usual = number(file, "lora_alpha", config.get("lora_alpha"), 8)
    given = {}
    for layer, one in layers.items():
        _complete(file, layer, one, {"A", "B", "magnitude"} if dora else {"A", "B"})
        one["A"], one["B"] = (one[name].flatten(1) if one[name].ndim > 1 else one[name] for name in "AB")
        if not all(one[name].ndim == 2 and one[name].numel() for name in "AB"):
            raise AdapterError(f"{file} is broken at '{layer}': its factors are no matrices; copy it again")
        if dora:
            one["magnitude"] = one["magnitude"].flatten()
        given[layer] = {"rank": one["A"].shape[0], "alpha": float(alphas.of(layer, usual))}
    dropout = number(file, "lora_dropout", config.get("lora_dropout"), 0.0)
    options: dict[str, Any] = {"scaling": "rslora" if config.get("use_rslora") else "standard"}
    if not dora:
        options["dropout"] = float(dropout)
    elif dropout:
        raise AdapterError(
            f"{file.parent} has lora_dropout={dropout}, and DoRA has no dropout here; set it to 0 in its "
            "adapter_config.json, which changes nothing but further training"
        )
    kinds = ("linear", "conv", "embedding")
    made = Foreign("dora" if dora else "lora", options, layers, {}, given, 0, kinds, frozenset(embeddings))
    return _with_usual(made)


def _vera(file: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Foreign:
    rest = dict(tensors)
    held = {own: rest.pop(f"base_model.vera_{own}", None) for own in "AB"}
    layers = _split(file, rest, {"vera_lambda_b": "b", "vera_lambda_d": "d"})
    for layer, one in layers.items():
        _complete(file, layer, one, {"b", "d"})
    saved = bool(config.get("save_projection", True))
    if saved and any(value is None for value in held.values()):
        raise AdapterError(f"{file} lacks the projections vera_A and vera_B that its config promises; copy it again")
    options = {
        "rank": config.get("r"),
        "dropout": float(number(file, "vera_dropout", config.get("vera_dropout"), 0.0)),
        "d_initial": float(number(file, "d_initial", config.get("d_initial"), 0.1)),
        "save_projection": saved,
    }
    common = {name: value for name, value in held.items() if value is not None and saved}
    return Foreign("vera", options, layers, common, {}, _seed(file, config))


def _randlora(file: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Foreign:
    # some versions of PEFT keep the bases in each layer once more
    copied = re.compile(rf"{re.escape(PREFIX)}.+\.randlora_[AB]")
    rest = {key: value for key, value in tensors.items() if not copied.fullmatch(key)}
    a, b = (rest.pop(f"base_model.randlora_{name}", None) for name in "AB")
    layers = _split(file, rest, {"randlora_lambda": "lambda_", "randlora_gamma": "gamma"})
    for layer, one in layers.items():
        _complete(file, layer, one, {"lambda_", "gamma"})
        one["lambda_"] = one["lambda_"].mT.contiguous()
    if a is None or b is None:
        raise AdapterError(
            f"{file} lacks its bases (save_projection={config.get('save_projection')}), which are other numbers here; "
            "save it again with save_projection=True"
        )
    if a.ndim != 3 or b.ndim != 3 or a.shape[1] != 1:
        raise AdapterError(f"{file} is broken: its bases are {tuple(a.shape)} and {tuple(b.shape)}; copy it again")
    options = {
        "rank": config.get("r"),
        "alpha": float(number(file, "randlora_alpha", config.get("randlora_alpha"), 640)),
        "scaling": "peft",
        "pairing": "peft",
        "dropout": float(number(file, "randlora_dropout", config.get("randlora_dropout"), 0.0)),
    }
    common = {"bases_a_0_peft": a.flatten(1), "bases_b_0_peft": b.flatten(1)}
    return Foreign("randlora", options, layers, common, {}, _seed(file, config))


def _miss(file: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Foreign:
    start = config.get("init_weights", True)
    kind = start if start in ("bat", "mini") else "miss"
    layers = _split(file, tensors, {"miss_block": "blocks" if kind == "bat" else "shared_block"})
    options: dict[str, Any] = {"rank": config.get("r"), "kind": kind}
    dropout = float(number(file, "miss_dropout", config.get("miss_dropout"), 0.0))
    options |= {"mini_rank": config.get("mini_r")} if kind == "mini" else {}
    options |= {} if kind == "bat" else {"dropout": dropout}  # which PEFT's bat does not heed either
    return Foreign("bone", options, layers)


READERS: dict[str, Callable[[Path, Mapping[str, Any], Mapping[str, Tensor]], Foreign]] = {
    "LORA": _lora,
    "VERA": _vera,
    "RANDLORA": _randlora,
    "MISS": _miss,
}


def _seed(file: Path, config: Mapping[str, Any]) -> int:
    seed = config.get("projection_prng_key", 0)
    if type(seed) is not int:
        raise AdapterError(f"{file.parent} is broken: projection_prng_key is {seed!r}, no whole number")
    return seed


def _split(file: Path, tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, dict[str, Tensor]]:
    """{layer: {our name: tensor}} of all tensors. AdapterError for one that is none of these."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        tail = next((tail for tail in names if key.endswith(f".{tail}")), None)
        if tail is None or not key.startswith(PREFIX):
            raise AdapterError(f"{file} holds '{key}', which its method has not; it is of another one, or broken")
        layers.setdefault(_layer(key, tail), {})[names[tail]] = value
    return layers


def _layer(key: str, tail: str) -> str:
    return key.removeprefix(PREFIX).rpartition(f".{tail}")[0]


def _complete(file: Path, layer: str, one: Mapping[str, Tensor], wanted: set[str]) -> None:
    if missing := wanted - one.keys():
        raise AdapterError(f"{file} is broken at '{layer}': it lacks {', '.join(sorted(missing))}; copy it again")


def _with_usual(made: Foreign) -> Foreign:
    """Let the commonest rank and alpha be the rule, and `given` what departs from it."""
    for name in ("rank", "alpha"):
        usual = Counter(one[name] for one in made.given.values()).most_common(1)[0][0]
        made.options[name] = usual
        for one in made.given.values():
            if one[name] == usual:
                del one[name]
    made.given = {layer: one for layer, one in made.given.items() if one}
    return made


def exactly(layer: str) -> str:
    """A pattern that fits this module alone."""
    return f"^{re.escape(layer)}"
