"""The cache of `fallow.probe`, and the state from which an interrupted run goes on.

    probe-<key>.safetensors              what was found
    probe-<key>.rank-<n>.safetensors     what a run has gathered so far; gone when it is done

The key is a hash of the model's weights and buffers, of the batches, the layers, the loss and the request. A function
is known by its name and its code, not by values that it reaches from outside.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fallow.core.distributed import rank, ranks
from fallow.core.errors import AdapterError, DataError
from fallow.core.files import mark, opened_tensors, parse_json, write_tensors
from fallow.core.foreign_codes import decoded
from fallow.core.probing.components import Known
from fallow.core.probing.contribution import Contribution
from fallow.core.probing.covariance import Covariance
from fallow.core.probing.gradients import Gradients
from fallow.core.probing.inputs import Inputs, Stand
from fallow.core.probing.options import Options
from fallow.core.probing.source import digest_of
from fallow.core.statistics import FORMAT, Statistics

STATE = "fallow_probe_state"  # the key of the JSON in the file's header
UNTOLD = {"cache", "data", "save_every", "limit", "progress", "tuned"}  # options that do not decide what is found


# -- keys -------------------------------------------------------------------------------------------------------------


def model_mark(model: nn.Module) -> str:
    """What the values of a model are known by."""
    found = hashlib.sha256()
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            value = decoded(module, name) if name in module._parameters else tensor
            found.update(f"{path}.{name}:{mark(value)};".encode())
    return found.hexdigest()[:16]


def code_of(function: Any) -> str:
    """What a function is known by."""
    if isinstance(function, functools.partial):
        arguments = digest_of([list(function.args), function.keywords])
        return f"{code_of(function.func)}({arguments})"
    plain = getattr(function, "__func__", function)
    code = getattr(plain, "__code__", None)
    name = f"{getattr(plain, '__module__', '')}.{getattr(plain, '__qualname__', type(plain).__qualname__)}"
    return name if code is None else f"{name}:{hashlib.sha256(_bytes_of(code)).hexdigest()[:16]}"


def _bytes_of(code: Any) -> bytes:
    constants = [_bytes_of(value) if hasattr(value, "co_code") else repr(value).encode() for value in code.co_consts]
    return b"|".join([code.co_code, repr(code.co_names).encode(), *constants])


def key_of(
    model: nn.Module, data: Any, layers: Sequence[str], want: frozenset[str], loss: Any, options: Options
) -> str:
    """16 hexadecimal digits, the same on all ranks only where the ranks' models and requests are; `data`: of all."""
    told = {
        field.name: code_of(value) if callable(value := getattr(options, field.name)) else value
        for field in dataclasses.fields(options)
        if field.name not in UNTOLD
    }
    parts = {
        "format": FORMAT,
        "model": model_mark(model),
        "data": data,
        "layers": list(layers),
        "want": sorted(want),
        "loss": None if loss is None else code_of(loss),
        "options": told,
        "tuned": None if options.tuned is None else {name: mark(value) for name, value in options.tuned.items()},
        "ranks": ranks(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def result_at(folder: Path, key: str) -> Path:
    return folder / f"probe-{key}.safetensors"


def state_at(folder: Path, key: str) -> Path:
    return folder / f"probe-{key}.rank-{rank()}.safetensors"


def cached(folder: Path, key: str) -> Statistics | None:
    """What was found before; None where it is not there, damaged, or of something else."""
    try:
        found = Statistics.load(result_at(folder, key))
    except DataError:
        return None
    return found if found.known_as == key else None


# -- the state of a run -----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Place:
    """How far a run is: `done` batches of pass number `turn`, `batches` in all."""

    turn: int = 0
    done: int = 0
    batches: int = 0


def write_state(
    path: Path, key: str, place: Place, inputs: Inputs, gradients: Gradients, contribution: Contribution | None
) -> None:
    """Atomically."""
    tensors: dict[str, Tensor] = {"rng": torch.get_rng_state(), "positions": inputs.generator.get_state()}
    if torch.cuda.is_initialized():
        tensors |= {f"rng:{number}": state for number, state in enumerate(torch.cuda.get_rng_state_all())}
    for prefix, sums in _sums(gradients, contribution).items():
        tensors |= {f"{prefix}:{name}": value for name, value in sums.items()}
    stands = []
    for number, stand in enumerate(inputs.stands()):
        told: dict[str, Any] = {"layers": sorted(stand.layers), "tokens": stand.tokens, "calls": stand.calls}
        if stand.covariance is not None:
            tensors |= {f"covariance:{number}:{name}": value for name, value in stand.covariance.tensors().items()}
            told["covariance"] = stand.covariance.count
        if stand.principal is not None and (known := stand.principal.known) is not None:
            held = {name: value for name, value in vars(known).items() if isinstance(value, Tensor)}
            tensors |= {f"principal:{number}:{name}": value for name, value in held.items()}
            told["principal"] = known.count
        stands.append(told)
    header = {
        "key": key,
        "place": dataclasses.asdict(place),
        "gradients": [gradients.count, gradients.weight],
        "contribution": 0 if contribution is None else contribution.count,
        "stands": stands,
        "done": [stand.done for stand in inputs.stands()],
    }
    write_tensors(path, tensors, {STATE: json.dumps(header)})


def read_state(
    path: Path, key: str, inputs: Inputs, gradients: Gradients, contribution: Contribution | None
) -> Place | None:
    """Put back what `write_state` wrote; None where there is nothing of this run."""
    if not path.is_file():
        return None
    try:
        with opened_tensors(path) as opened:
            header = parse_json((opened.metadata() or {}).get(STATE, "{}"))
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except AdapterError:
        return None
    if header.get("key") != key:
        return None
    torch.set_rng_state(tensors["rng"])
    inputs.generator.set_state(tensors["positions"])
    if torch.cuda.is_available() and (states := [tensors[n] for n in sorted(tensors) if n.startswith("rng:")]):
        torch.cuda.set_rng_state_all(states)
    for prefix, sums in _sums(gradients, contribution).items():
        sums.update(_named(tensors, prefix))
    gradients.count, gradients.weight = header["gradients"]
    if contribution is not None:
        contribution.count = header["contribution"]
    for number, (told, done) in enumerate(zip(header["stands"], header["done"], strict=True)):
        inputs.place(_stand(number, told, tensors, inputs, done))
    return Place(**header["place"])


def _sums(gradients: Gradients, contribution: Contribution | None) -> dict[str, dict[str, Tensor]]:
    found = {
        "gradient": gradients.gradients, "fisher": gradients.fishers, "columns": gradients.columns,
        "rows": gradients.rows,
    }  # fmt: skip
    return found if contribution is None else {**found, "contribution": contribution.rows}


def _named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    start = f"{prefix}:"
    return {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}


def _stand(number: int, told: Mapping[str, Any], tensors: Mapping[str, Tensor], inputs: Inputs, done: bool) -> Stand:
    first = inputs.layers[told["layers"][0]]
    stand = Stand(0, tokens=told["tokens"], calls=told["calls"], layers=set(told["layers"]), done=done)
    if "covariance" in told:
        total = _named(tensors, f"covariance:{number}")["total"]
        stand.covariance = Covariance(total, inputs.options.scale, told["covariance"])
    if "principal" in told:
        device = first.parameter.device
        held: Any = {name: value.to(device) for name, value in _named(tensors, f"principal:{number}").items()}
        known = Known(count=told["principal"], **held)
        stand.principal = dataclasses.replace(inputs.empty, known=known)
    return stand
