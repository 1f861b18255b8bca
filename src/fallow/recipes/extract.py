"""An adapter from two checkpoints: what fine-tuning changed, as its largest entries or as low-rank factors.

extract("mini-sd", "tuned", Path("style"), kind="lora", truncation=Truncation(energy=0.9))
extract("mini-sd", "tuned", Path("style.safetensors"), kind="sara", most=Most(fraction=0.05))

One tensor of each checkpoint is in memory at a time. Linear layers and convolutions have factors (a convolution as the
matrix (out, in * kh * kw)); biases, norms and embeddings have none, and what they changed is told.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fallow.core.errors import ConfigError, ModelError
from fallow.core.files import fingerprint
from fallow.core.linalg import Truncation
from fallow.core.sparse import Entry, SparseDelta, Store
from fallow.recipes import convert
from fallow.recipes.adapter_directory import NETWORKS, PARTS
from fallow.recipes.approximation import Losses, Most, factored, largest
from fallow.recipes.checkpoint_tensors import Stored, network_tensors, real
from fallow.recipes.formats.layers import Adapter, Layers

Kind = Literal["sara", "lora"]


@dataclass(frozen=True)
class Pair:
    """A weight as it is in both checkpoints."""

    part: str
    name: str
    base: Stored
    tuned: Stored

    def read(self, where: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Base and tuned values in float32 (float64 stays), in the tuned one's shape. ModelError where broken."""
        base, tuned = real(self.base.read(), self.name, where[0]), real(self.tuned.read(), self.name, where[1])
        return base.view(tuned.shape), tuned


def extract(
    base: str,
    tuned: str,
    output: Path,
    *,
    kind: str = "lora",
    to: str | None = None,
    parts: Sequence[str] | None = None,
    truncation: Truncation | None = None,
    most: Most | None = None,
    threshold: float | None = None,
    store: Store = "delta",
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Write an adapter of what differs (JSON-able report, as that of `convert`).

    `to`: a format, by default peft for lora and fallow for sara. `parts`: of the pipeline, by default the network that
    denoises. `most`: of sara, a share or number of all entries of the network; `threshold`: only entries whose base
    value is below it in size, which are those that SaRA trains; `store` as in `SparseDelta`. Raises ConfigError for
    settings that do not fit, ModelError for checkpoints that cannot be read or are not of one model.
    """
    if kind not in get_args(Kind):
        raise ConfigError(f"kind={kind} is unknown; give lora or sara")
    to = to or ("peft" if kind == "lora" else "fallow")
    convert.check_format(to)
    _check(kind, to, parts, truncation, most, threshold, store)
    convert.check_output(output, to, overwrite)
    where = (base, tuned)
    pairs, remarks = _pairs(base, tuned, parts)
    losses = Losses()
    if kind == "lora":
        adapter, more = _lora(pairs, where, truncation or Truncation(energy=0.9), dtype, losses, say)
        written = convert.write(adapter, to, output)
        remarks += more
    else:
        delta = _sparse(pairs, where, most or Most(), threshold, store, losses, say)
        written = delta.save(output) if to == "fallow" else convert.write(convert.of_sparse(delta), to, output)
    return {"from": [base, tuned], **convert.report(written, to, losses, remarks)}


def _check(
    kind: str,
    to: str,
    parts: Sequence[str] | None,
    truncation: Truncation | None,
    most: Most | None,
    threshold: float | None,
    store: str,
) -> None:
    if kind == "lora":
        if to not in convert.FACTORS:
            raise ConfigError(f"kind=lora cannot be written as {to}; give --to {', '.join(convert.FACTORS)}")
        if threshold is not None or (most is not None and most != Most()):
            raise ConfigError("fraction, budget and threshold choose entries, which kind=sara has; give rank or energy")
        if store != "delta":
            raise ConfigError("store is of sparse adapters; leave it out, or give --kind sara")
    else:
        if to not in ("fallow", "lycoris-diff"):
            raise ConfigError(f"kind=sara cannot be written as {to}; give --to fallow or --to lycoris-diff")
        if truncation is not None:
            raise ConfigError("rank, energy and ratio are of factors, which kind=lora has; give --fraction or --budget")
        if threshold is not None and not 0 < threshold < math.inf:
            raise ConfigError(f"threshold={threshold} selects no weight; give a size above 0, such as 0.002")
        if store not in get_args(Store):
            raise ConfigError(f"store={store} is unknown; give delta or value")
        if store == "value" and to != "fallow":
            raise ConfigError("store=value is of Fallow's own format; give --to fallow")
        if parts is not None and any(part not in NETWORKS for part in parts):
            raise ConfigError("a sparse adapter is of the denoising network alone; leave --part out, or --kind lora")
    for part in parts or ():
        if part not in PARTS:
            raise ConfigError(f"part={part} is no part that adapters change; give {', '.join(PARTS)}")


def _pairs(base: str, tuned: str, parts: Sequence[str] | None) -> tuple[list[Pair], list[str]]:
    """The tensors of these parts in both, and remarks on what is compared with nothing."""
    (first, _), (second, _) = network_tensors(base), network_tensors(tuned)
    wanted = list(parts) if parts else [part for part in NETWORKS if part in first and part in second]
    if not wanted:
        raise ModelError(
            f"{base} holds {', '.join(first)} and {tuned} {', '.join(second)}, which have no denoising network in "
            "common; give two checkpoints of one model, or --part"
        )
    pairs: list[Pair] = []
    remarks: list[str] = []
    for part in wanted:
        if part not in first or part not in second:
            raise ModelError(f"{base if part not in first else tuned} has no {part}; leave it out of --part")
        one, other = first[part], second[part]
        for name in one:
            if name not in other:
                continue
            shapes = one[name].shape, other[name].shape
            if math.prod(shapes[0]) != math.prod(shapes[1]) or shapes[0][:2] != shapes[1][:2]:
                raise ModelError(
                    f"{name} is {shapes[0]} in {base} and {shapes[1]} in {tuned}; give checkpoints of one model"
                )
            pairs.append(Pair(part, name, one[name], other[name]))
        for place, only in ((base, one.keys() - other.keys()), (tuned, other.keys() - one.keys())):
            if only:
                remarks.append(f"{len(only)} tensors of {part} are in {place} alone, such as {min(only)}")
    if not pairs:
        raise ModelError(f"{base} and {tuned} have no tensor in common; give two checkpoints of one model")
    rest = [part for part in first if part in second and part not in wanted]
    if rest:
        remarks.append(f"{', '.join(rest)} was not compared; --part compares it")
    return pairs, remarks


def _notes(kind: str, where: Sequence[str], **told: Any) -> dict[str, Any]:
    names = {"base": Path(where[0]).name, "tuned": Path(where[1]).name}
    return {
        "method": f"extracted {kind}",
        **names,
        **{name: value for name, value in told.items() if value is not None},
    }


def _lora(
    pairs: Sequence[Pair],
    where: Sequence[str],
    how: Truncation,
    dtype: torch.dtype,
    losses: Losses,
    say: Callable[[str], None],
) -> tuple[Adapter, list[str]]:
    parts: dict[str, Layers] = {}
    prints: dict[str, dict[str, Any]] = {}
    left: list[str] = []
    square = 0.0
    several = len({pair.part for pair in pairs}) > 1
    for number, pair in enumerate(pairs):
        say(f"{number + 1}/{len(pairs)} {pair.name}")
        base, tuned = pair.read(where)
        change = tuned - base
        if not bool(change.any()):
            continue
        if not convert.takes_factors(pair.name, change.shape):
            left.append(pair.name)
            square += float(change.double().square().sum())
            continue
        made, norm, missing = factored(change, how, dtype)
        losses.add(f"{pair.part}.{pair.name}" if several else pair.name, norm, missing, rank=made.rank)
        parts.setdefault(pair.part, {})[pair.name] = made
        stored = pair.base.read()
        prints.setdefault(pair.part, {})[pair.name] = [fingerprint(stored), str(stored.dtype).removeprefix("torch.")]
    if not parts:
        raise ModelError(f"no linear layer or convolution of {where[1]} differs from {where[0]}'s; there is no adapter")
    told = _notes("lora", where, rank=how.rank, energy=how.energy, ratio=how.ratio, most=how.most)
    remarks = [convert.left_out(left, square, square + losses.square)] if left else []
    return Adapter("peft", parts, prints, told | {"error": losses.error}), remarks


def _sparse(
    pairs: Sequence[Pair],
    where: Sequence[str],
    most: Most,
    threshold: float | None,
    store: Store,
    losses: Losses,
    say: Callable[[str], None],
) -> SparseDelta:
    def changes() -> Iterator[tuple[str, Tensor]]:
        for number, pair in enumerate(pairs):
            say(f"{number + 1}/{len(pairs)} {pair.name}")
            base, tuned = pair.read(where)
            change = tuned - base
            yield pair.name, change if threshold is None else torch.where(base.abs() < threshold, change, 0.0)

    total = sum(math.prod(pair.tuned.shape) for pair in pairs)
    by_name = {pair.name: pair for pair in pairs}
    entries = {}
    for name, change, index in largest(changes, total, most):
        base, tuned = by_name[name].base.read(), by_name[name].tuned.read()
        whole = tuned.to(change.dtype) - base.to(change.dtype).view(tuned.shape)
        norm, at = float(whole.double().norm()), index.long()
        values = change.flatten()[at]
        kept = float(values.double().norm())
        losses.add(name, norm, math.sqrt(max(norm**2 - kept**2, 0.0)), entries=index.numel())
        if index.numel():
            stored = values.float() if store == "delta" else tuned.flatten()[at].to(base.dtype)
            dtype = str(base.dtype).removeprefix("torch.")
            entries[name] = Entry(index, stored, tuple(tuned.shape), dtype, fingerprint(base))
    if not entries:
        raise ModelError(
            f"nothing of {where[1]} differs from {where[0]} where entries may be taken; there is no adapter"
        )
    told = _notes("sara", where, fraction=most.fraction, budget=most.budget, threshold=threshold)
    return SparseDelta(entries, store, told | {"error": losses.error})
