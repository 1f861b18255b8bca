"""Which entries of which weights are trained: eligible tensors, amounts, and an exact choice by score.

Nothing here knows a method. A method says how an entry scores (its magnitude, its gradient, chance) and whether the low
or the high scores are wanted; `choose` does the rest, exactly: by threshold, by a share or a number over the whole
model, or by a density within each layer. Ties are broken by model order, then by the lowest flat index, so that a
budget is always met to the entry and the same weights always give the same choice.

Memory: one tensor's scores at a time. The k-th score of the whole model is found from 16-bit digits of the scores' bit
patterns (non-negative floats sort like integers), in two passes for float32, so nothing is ever sorted or concatenated.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor, nn

from fallow.core.errors import ModelError, SelectionError, nearest
from fallow.core.sharded import Together, local
from fallow.core.stored_weight import StoredWeight

WRITABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CHUNK = 1 << 22  # entries whose digits are counted at once: a temporary of 16-32 MiB
DIGIT = 16
ALONE = Together(())  # asks no other rank

Patterns = str | Iterable[str] | None
Score = Callable[["Target"], Tensor]


@dataclass(frozen=True)
class Target:
    """One weight of the model, counted once however many names, modules or Parameters share it."""

    names: tuple[str, ...]
    params: tuple[nn.Parameter, ...]
    owners: tuple[nn.Module, ...]

    @property
    def name(self) -> str:
        """The first of its names in model order; the one that files and reports use."""
        return self.names[0]

    @property
    def weight(self) -> nn.Parameter:
        return self.params[0]

    @property
    def numel(self) -> int:
        return self.params[0].numel()


@dataclass(frozen=True)
class Selection:
    """The chosen entries: sorted flat (row-major) indices per tensor, int32 below 2^31 entries, on the weight's device.

    Of a weight that is sharded over several ranks (FSDP2): the entries within this rank's part, by their place in it.

    `threshold` is the bound that separates chosen from unchosen scores: `score < threshold` where low scores were
    wanted, `score >= threshold` where high ones were; None where the choice was not by one bound for the whole model.
    """

    index: dict[str, Tensor]
    threshold: float | None = None

    @property
    def count(self) -> int:
        return sum(index.numel() for index in self.index.values())


class Selector(Protocol):
    """What a selective method brings: targets and an amount in, a Selection out."""

    def __call__(self, targets: Sequence[Target], amount: Amount) -> Selection: ...


@dataclass(frozen=True)
class Amount:
    """How much is trained; exactly one of the fields is given.

    Over the whole model: `threshold` (a bound on the score), `fraction` of all eligible entries (rounded to the nearest
    number), `budget` (that number itself). Within each layer: `density` (the share of its entries), or `r`
    (r * (rows + columns) entries, the size of a LoRA of rank r).
    """

    threshold: float | None = None
    fraction: float | None = None
    budget: int | None = None
    density: float | None = None
    r: int | None = None

    def __post_init__(self) -> None:
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        if len(given) != 1:
            said = " and ".join(f"{name}={value!r}" for name, value in given.items()) or "none"
            raise SelectionError(f"give exactly one of threshold, fraction, budget, density, r; given: {said}")
        name, value = next(iter(given.items()))
        whole = name in ("budget", "r")
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            raise SelectionError(f"{name}={value!r} must be {'a whole number' if whole else 'a number'}")
        if name == "threshold" and not value > 0:  # `not >` so that nan is refused too
            raise SelectionError(
                f"threshold={value} selects no weight; give threshold > 0 or fraction in (0, 1], e.g. fraction=0.05"
            )
        if name in ("fraction", "density") and not 0 < value <= 1:
            raise SelectionError(f"{name}={value} is outside (0, 1]; 0.05 trains five per cent of the entries")
        if whole and value < 1:
            raise SelectionError(f"{name}={value} selects no weight; give a whole number of at least 1")

    @property
    def per_layer(self) -> bool:
        return self.density is not None or self.r is not None

    def of_model(self, total: int) -> int:
        """The number of entries wanted of `total` eligible ones."""
        if self.budget is not None:
            if self.budget > total:
                raise SelectionError(f"budget={self.budget} exceeds the {total} eligible entries; give at most {total}")
            return int(self.budget)
        assert self.fraction is not None, "a threshold has no count before the scores are known"
        count = round(self.fraction * total)
        if count == 0:
            raise SelectionError(
                f"fraction={self.fraction} of {total} eligible entries selects no weight; give at least {1 / total:.3g}"
            )
        return count

    def of_layer(self, target: Target) -> int:
        """The number of entries wanted of one layer; a conv counts as (C_out, C_in * kh * kw)."""
        if self.density is not None:
            return round(self.density * target.numel)
        assert self.r is not None, "fraction, budget and threshold count over the whole model"
        rows, columns = matrix_shape(target.weight)
        count = self.r * (rows + columns)
        if count > target.numel:
            raise SelectionError(
                f"r={self.r} asks for {count} entries of '{target.name}', which has {target.numel}; "
                f"give r <= {target.numel // (rows + columns)}, or exclude it, or use density="
            )
        return count

    def __str__(self) -> str:
        return next(f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) is not None)


def matrix_shape(weight: Tensor) -> tuple[int, int]:
    """The (rows, columns) under which a weight of any shape is seen: the first dimension, and all others together."""
    rows = weight.shape[0] if weight.ndim else 1
    return rows, weight.numel() // max(rows, 1)


def plain_name(name: str) -> str:
    """The name without what torch.compile puts into it where it wraps a model or one of its blocks."""
    return name.replace("_orig_mod.", "")


def named_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """{plain name: Parameter}, a tied one under each of its names."""
    return {plain_name(name): param for name, param in model.named_parameters(remove_duplicate=False)}


def index_dtype(numel: int) -> torch.dtype:
    return torch.int32 if numel < 2**31 else torch.int64


def eligible(
    model: nn.Module,
    include: Patterns = None,
    exclude: Patterns = None,
    *,
    keep: Callable[[Target], bool] | None = None,
) -> list[Target]:
    """The trainable floating-point weights of a model, in model order, each once by storage.

    `include` and `exclude` are regular expressions searched in every name of a weight (a tied weight has several); a
    pattern that matches nothing is an error, since a typing mistake would otherwise train, or spare, the wrong weights.
    `keep` decides on types and dimensions, e.g. `lambda t: t.weight.ndim == 2`; it is asked about weights that no
    `include` names. Parameters that do not require a gradient are left alone: frozen stays frozen.

    Raises ModelError when the model has no weight to train, SelectionError when the patterns leave none.
    """
    wanted, unwanted = _compile("include", include), _compile("exclude", exclude)
    found = _unique_weights(model)
    if not found:
        raise ModelError(f"{type(model).__name__} has no parameters; give the network that is to be fine-tuned")
    for argument, patterns in (("include", wanted), ("exclude", unwanted)):
        for pattern in patterns:
            if not any(pattern.search(name) for target in found for name in target.names):
                names = [name for target in found for name in target.names]
                close = difflib.get_close_matches(pattern.pattern, names, n=1, cutoff=0.3) or names[:5]
                raise SelectionError(
                    f"{argument}={pattern.pattern!r} matches no parameter{nearest(pattern.pattern, close)}"
                )
    trainable = [
        t for t in found if t.weight.dtype in WRITABLE and t.numel and any(param.requires_grad for param in t.params)
    ]
    if not trainable:
        raise ModelError(
            f"every parameter of {type(model).__name__} is frozen or quantised; call requires_grad_(True) on what "
            "may be trained"
        )
    for target in trainable:
        if target.weight.is_meta:
            raise ModelError(f"'{target.name}' is on the meta device and has no values; load the weights first")

    def passes(target: Target) -> bool:
        if any(pattern.search(name) for pattern in unwanted for name in target.names):
            return False
        if wanted:
            return any(pattern.search(name) for pattern in wanted for name in target.names)
        return keep is None or keep(target)

    chosen = [target for target in trainable if passes(target)]
    if not chosen:
        own = "" if keep is None or wanted else " that this method takes by itself (include= names others)"
        raise SelectionError(
            f"include={include!r}, exclude={exclude!r} leave no trainable weight of {len(trainable)}{own}; "
            f"names look like '{trainable[0].name}'"
        )
    return chosen


def _compile(argument: str, patterns: Patterns) -> list[re.Pattern[str]]:
    if patterns is None:
        return []
    try:
        return [re.compile(pattern) for pattern in ([patterns] if isinstance(patterns, str) else patterns)]
    except (re.error, TypeError) as error:
        raise SelectionError(
            f"{argument}={patterns!r} is not a regular expression or a list of them: {error}"
        ) from error


def _unique_weights(model: nn.Module) -> list[Target]:
    groups: dict[object, tuple[dict[str, None], dict[int, nn.Parameter], dict[int, nn.Module]]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, param in module.named_parameters(recurse=False, remove_duplicate=False):
            names, params, owners = groups.setdefault(_place(param), ({}, {}, {}))
            names[plain_name(f"{prefix}.{name}" if prefix else name)] = None
            params[id(param)] = param
            owners[id(module)] = module
    targets = [Target(tuple(n), tuple(p.values()), tuple(o.values())) for n, p, o in groups.values()]
    _refuse_overlaps(targets)
    return targets


def _place(param: Tensor) -> object:
    """Equal for Parameters that are the same numbers in memory: one object, or two tied through their storage."""
    if param.is_meta or param.numel() == 0 or type(param.data) is not Tensor:
        return id(param)
    return (param.device, param.data_ptr(), tuple(param.shape), param.stride())


def _refuse_overlaps(targets: Iterable[Target]) -> None:
    """Two weights that share memory under different shapes cannot be trained as one, nor as two."""
    spans = []
    for target in targets:
        weight = target.weight
        if weight.is_meta or weight.numel() == 0 or type(weight.data) is not Tensor:
            continue
        extent = 1 + sum((size - 1) * stride for size, stride in zip(weight.shape, weight.stride(), strict=True))
        spans.append(
            (str(weight.device), weight.data_ptr(), weight.data_ptr() + extent * weight.element_size(), target)
        )
    spans.sort(key=lambda span: span[:3])
    for (device, _, end, one), (other_device, start, _, other) in pairwise(spans):
        if device == other_device and start < end and (one.weight.requires_grad or other.weight.requires_grad):
            raise ModelError(
                f"'{one.name}' {tuple(one.weight.shape)} and '{other.name}' {tuple(other.weight.shape)} share memory "
                "under "
                "different shapes; untie them (clone one) or tie the whole Parameter"
            )


def magnitude(target: Target) -> Tensor:
    """|W| in float32 (float64 for float64 weights), so that low precision never decides a comparison."""
    if isinstance(target.weight, StoredWeight):
        return target.weight.store.magnitude()
    weight = local(target.weight.detach())
    return (weight if weight.dtype == torch.float64 else weight.float()).abs()


def seeded(seed: int, name: str) -> torch.Generator:
    """A CPU generator of its own for each name, equal on every machine and rank."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def choose(
    targets: Sequence[Target], score: Score, amount: Amount, *, largest: bool = False, skip: int = 0
) -> Selection:
    """The entries with the lowest (or largest) scores, in the amount asked for, exactly.

    `score(target)` gives a finite non-negative float tensor of the weight's shape; it may be called several times and
    must answer the same. `skip` leaves out that many layer shares from the front of each layer's order: with density d,
    skip=t takes ranks t*K .. (t+1)*K - 1, so a series of tasks gets disjoint entries.

    Raises SelectionError when nothing, or by a threshold everything, would be selected, and on NaN or infinite scores.
    """
    together = Together(target.weight for target in targets)
    if amount.threshold is not None:
        selection = _by_threshold(targets, score, float(amount.threshold), largest, together)
    elif amount.per_layer:
        selection = _by_layer(targets, score, amount, largest, skip, together)
    else:
        selection = _by_count(targets, score, amount, largest, together)
    return checked(selection, targets, amount)


def checked(selection: Selection, targets: Sequence[Target], amount: Amount) -> Selection:
    """The selection itself, after refusing one that trains nothing, or everything where nobody asked for it by
    number.
    """
    total = sum(target.numel for target in targets)
    together = Together(target.weight for target in targets)
    held = [(t.weight, selection.index[t.name].numel()) for t in targets if t.name in selection.index]
    count = together.entries(held)
    if count == 0:
        raise SelectionError(
            f"{amount} selects no weight of {total} eligible entries; raise it, or give fraction=0.05 to take the "
            "share that "
            "the paper trains"
        )
    if count == total and amount.threshold is not None:
        raise SelectionError(
            f"{amount} selects every one of the {total} eligible entries, which is full fine-tuning; lower it, or give "
            "fraction=0.05 (torch.optim.AdamW trains everything with less bookkeeping)"
        )
    return selection


def _by_threshold(
    targets: Sequence[Target], score: Score, threshold: float, largest: bool, together: Together
) -> Selection:
    index = {}
    for target in targets:
        value = _finite(target, score, together).reshape(-1)
        index[target.name] = _indices(value >= threshold if largest else value < threshold)
    return Selection(index, threshold)


def _by_layer(
    targets: Sequence[Target], score: Score, amount: Amount, largest: bool, skip: int, together: Together
) -> Selection:
    index = {}
    for target in targets:
        share = amount.of_layer(target)
        if (skip + 1) * share > target.numel:
            raise SelectionError(
                f"{amount} for task {skip} asks for ranks {skip * share} to {(skip + 1) * share - 1} of "
                f"'{target.name}', which has "
                f"{target.numel} entries; at most {target.numel // max(share, 1)} tasks fit without overlap"
            )
        key, width = _keys(_finite(target, score, together), largest)
        mask = _first(target, key, width, (skip + 1) * share)
        if skip:
            mask &= ~_first(target, key, width, skip * share)
        index[target.name] = _indices(mask)
    return Selection(index)


def _by_count(targets: Sequence[Target], score: Score, amount: Amount, largest: bool, together: Together) -> Selection:
    count = amount.of_model(sum(target.numel for target in targets))
    double = any(target.weight.dtype == torch.float64 for target in targets)

    def keys() -> Iterator[tuple[Tensor, int]]:
        for target in targets:
            value = _finite(target, score, together)
            yield _keys(value.double() if double else value, largest)

    def counted() -> Iterator[tuple[Tensor, int]]:
        for target, (key, width) in zip(targets, keys(), strict=True):
            yield key if together.counted(target.weight) else key[:0], width

    cut, ties = _kth(counted, count, together)
    index = {}
    for target, (key, _) in zip(targets, keys(), strict=True):
        mask, ties = _up_to(key, cut, ties, target.weight, together)
        index[target.name] = _indices(mask)
    value = _value(cut, double, largest)
    # The stored bound must reproduce the choice with the strict `<` of a threshold.
    return Selection(index, value if largest else _next_float(value, double))


def _finite(target: Target, score: Score, together: Together) -> Tensor:
    """The scores of this rank's part of the weight, checked over all ranks."""
    value = together.part(target.weight, score(target))
    # The maximum of non-negative scores is NaN where any is, and one pass.
    if together.any(target.weight, value.numel() > 0 and not float(value.max()) < math.inf):
        raise SelectionError(
            f"'{target.name}' has NaN or infinite scores; the weights or gradients are broken before training"
        )
    return value


def _indices(mask: Tensor) -> Tensor:
    return mask.nonzero().view(-1).to(index_dtype(mask.numel()))


def _keys(score: Tensor, largest: bool) -> tuple[Tensor, int]:
    """Integers that order like the scores (reversed for `largest`), flat, and their width in bits."""
    wide = score.dtype == torch.float64
    bits = score.reshape(-1).view(torch.int64 if wide else torch.int32)
    return (_infinity(wide) - bits if largest else bits), 64 if wide else 32


def _infinity(wide: bool) -> int:
    return 0x7FF0000000000000 if wide else 0x7F800000


def _value(key: int, wide: bool, largest: bool) -> float:
    bits = _infinity(wide) - key if largest else key
    integer, real = (torch.int64, torch.float64) if wide else (torch.int32, torch.float32)
    return float(torch.tensor(bits, dtype=integer).view(real))


def _next_float(value: float, wide: bool) -> float:
    here = torch.tensor(value, dtype=torch.float64 if wide else torch.float32)
    return float(torch.nextafter(here, torch.full_like(here, math.inf)))


def _kth(keys: Callable[[], Iterable[tuple[Tensor, int]]], k: int, together: Together = ALONE) -> tuple[int, int]:
    """The k-th lowest key (from 1) of all ranks and how many of the entries equal to it are among the first k."""
    prefix, remaining, width = 0, k, 64
    shift = width
    while shift > 0:
        histogram = torch.zeros(1 << DIGIT, dtype=torch.int64)
        for key, width in keys():
            top = min(shift, width)
            for chunk in key.split(CHUNK):
                if top < width:
                    chunk = chunk[(chunk >> top) == prefix]
                digits = (chunk >> (top - DIGIT)) & ((1 << DIGIT) - 1)
                histogram += torch.bincount(digits, minlength=1 << DIGIT).cpu()
        reached = together.sum(histogram).cumsum(0)
        digit = int(torch.searchsorted(reached, remaining))
        remaining -= int(reached[digit - 1]) if digit else 0
        prefix = prefix << DIGIT | digit
        shift = min(shift, width) - DIGIT
    return prefix, remaining


def largest_in_stream(scores: Callable[[], Iterable[Tensor]], count: int) -> Iterator[Tensor]:
    """Masks (flat, boolean) of the `count` largest of all entries of a stream of finite non-negative float32 tensors.

    `scores()` is called three times and must give the same each time, one tensor after the other; ties go to the first.
    """

    def keys() -> Iterator[tuple[Tensor, int]]:
        for score in scores():
            yield _keys(score, largest=True)

    cut, ties = _kth(keys, count) if count else (-1, 0)
    for key, _ in keys():
        mask, ties = _up_to(key, cut, ties)
        yield mask


def _first(target: Target, key: Tensor, width: int, count: int) -> Tensor:
    """Boolean mask of the `count` lowest keys of one tensor, ties by lowest index."""
    if count == 0:
        return torch.zeros_like(key, dtype=torch.bool)
    alone = Together([target.weight])
    cut, ties = _kth(lambda: [(key, width)], count, alone)
    return _up_to(key, cut, ties, target.weight, alone)[0]


def _up_to(
    key: Tensor, cut: int, ties: int, weight: Tensor | None = None, together: Together = ALONE
) -> tuple[Tensor, int]:
    """Mask of keys below `cut` and of the first `ties` equal to it; and how many ties are left for the tensors to
    come.
    """
    mask = key < cut
    equal, every = together.first(weight, (key == cut).nonzero().view(-1), ties)
    mask[equal] = True
    return mask, ties - min(every, ties)


def totals(selection: Mapping[str, Tensor], targets: Sequence[Target]) -> dict[str, tuple[int, int]]:
    """{name: (selected, entries)} in model order."""
    return {t.name: (selection[t.name].numel() if t.name in selection else 0, t.numel) for t in targets}
