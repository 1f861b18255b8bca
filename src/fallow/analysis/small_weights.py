"""Do the smallest weights matter? The experiment that SaRA rests on (arXiv 2409.06633, section 3), for any module.

`zero_small`: set every entry with |p| < theta to zero, judge the model, put the entries back bit for bit; for a list
of thetas. The paper finds that neither Frechet distance nor text alignment moves by 1% up to theta = 1e-3 in Stable
Diffusion.

`SmallShare`: mark the entries that are small at the start, M0 = 1[|p0| < theta], then train everything, and see how
many of M0 are still small, and how many others became so. In the paper 1.00% falls to 0.01%, while others rise to
0.99%: entries are small by the noise of training and not by their place, and so can learn when they are trained.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fallow.core.errors import SelectionError

BINS = 1 << 16  # the upper half of a float32's 32 bits


def eligible(model: nn.Module, include: str | None = None, exclude: str | None = None) -> dict[str, torch.Tensor]:
    """The floating-point parameters by name, tied ones once; `include` and `exclude` are regular expressions on names.

    Raises SelectionError where nothing is left, or one of them is no regular expression.
    """
    for name, pattern in (("include", include), ("exclude", exclude)):
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise SelectionError(f"{name}={pattern!r} is no regular expression: {error}") from None
    chosen = {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point()
        and parameter.numel()
        and (include is None or re.search(include, name))
        and not (exclude is not None and re.search(exclude, name))
    }
    if not chosen:
        raise SelectionError(f"include={include!r}, exclude={exclude!r} leave no floating-point parameter of the model")
    return chosen


def threshold_of(parameters: Mapping[str, torch.Tensor], shares: Sequence[float]) -> list[float]:
    """For each share in (0, 1) a theta: the entries with |p| < theta are that share of all, as nearly as ties allow.

    Exact, without sorting or copying the model: the ordering of non-negative floats is that of their bits, so a
    histogram of the upper 16 bits finds the bin of each answer, and a second pass sorts that bin alone. Memory: 20
    bytes for each entry of the largest tensor, and the entries of the bins.
    Raises SelectionError for a share outside (0, 1).
    """
    for share in shares:
        if not 0 < share < 1:
            raise SelectionError(f"share {share} is not between 0 and 1; 0.1 means the smallest tenth of the entries")
    total = sum(p.numel() for p in parameters.values())
    histogram = torch.zeros(BINS, dtype=torch.int64)
    for p in parameters.values():
        histogram += torch.bincount(_bits(p) >> 16, minlength=BINS).cpu()
    ends = histogram.cumsum(0)
    # theta is the entry of this rank, so that rank many lie below it
    ranks = [min(round(share * total), total - 1) for share in shares]
    bins = [int(torch.searchsorted(ends, rank, right=True)) for rank in ranks]
    inside: dict[int, list[torch.Tensor]] = {found: [] for found in bins}
    for p in parameters.values():
        bits = _bits(p)
        upper = bits >> 16
        for found, parts in inside.items():
            parts.append(bits[upper == found].cpu())
    thresholds = []
    for rank, found in zip(ranks, bins, strict=True):
        ordered = torch.cat(inside[found]).sort().values
        before = int(ends[found - 1]) if found else 0
        thresholds.append(ordered[rank - before].to(torch.int32).view(torch.float32).item())
    return thresholds


def _bits(p: torch.Tensor) -> torch.Tensor:
    """The bits of |p| as float32, flat, int64 in [0, 2^31)."""
    return p.detach().flatten().float().abs().view(torch.int32).long()


@contextmanager
def without_small(parameters: Mapping[str, torch.Tensor], threshold: float) -> Iterator[int]:
    """Inside, every entry with |p| < threshold is 0; afterwards all are as before, bit for bit. Yields how many.

    Raises SelectionError for a threshold that is not above 0.
    """
    if not threshold > 0:
        raise SelectionError(f"threshold={threshold} zeroes nothing; give a threshold above 0")
    kept: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    try:
        with torch.no_grad():
            for p in parameters.values():
                small = p.float().abs() < threshold
                kept.append((p, small, p[small]))
                p[small] = 0
        yield sum(values.numel() for _, _, values in kept)
    finally:
        with torch.no_grad():
            for p, small, values in kept:
                p[small] = values


def asked_thresholds(
    parameters: Mapping[str, torch.Tensor], thresholds: Sequence[float] = (), shares: Sequence[float] = ()
) -> list[float]:
    """The thresholds, and those that the shares of the entries amount to, in order.

    Raises SelectionError for thresholds or shares that are not above 0, or where there are none.
    """
    if not thresholds and not shares:
        raise SelectionError("nothing to zero: give thresholds=[1e-3, ...] or shares=[0.1, ...]")
    for threshold in thresholds:
        if not threshold > 0:
            raise SelectionError(f"threshold={threshold} zeroes nothing; give a threshold above 0")
    quantiles = threshold_of(parameters, shares)
    for share, threshold in zip(shares, quantiles, strict=True):
        if not threshold > 0:
            raise SelectionError(f"share {share} of the entries is exactly zero already; give a larger share")
    return sorted({*thresholds, *quantiles})


def zero_small(
    model: nn.Module,
    judge: Callable[[nn.Module], Mapping[str, float | None]],
    *,
    thresholds: Sequence[float] = (),
    shares: Sequence[float] = (),
    include: str | None = None,
    exclude: str | None = None,
) -> list[dict[str, Any]]:
    """Judge the model as it is, then without its entries below each threshold (absolute, or as a share of the entries).

    Returns a row for each: `threshold` (0 for the model as it is), `zeroed` and `total` entries, `share` = zeroed /
    total, and what `judge(model)` returned. The rows are in the order of the thresholds. The model leaves as it came,
    bit for bit, also if the judge raises.
    Raises SelectionError for thresholds or shares that are not above 0, or where there are none.
    """
    parameters = eligible(model, include, exclude)
    asked = asked_thresholds(parameters, thresholds, shares)
    total = sum(p.numel() for p in parameters.values())
    rows = [{"threshold": 0.0, "zeroed": 0, "total": total, "share": 0.0, **judge(model)}]
    for threshold in asked:
        with without_small(parameters, threshold) as zeroed:
            rows.append(
                {"threshold": threshold, "zeroed": zeroed, "total": total, "share": zeroed / total, **judge(model)}
            )
    return rows


class SmallShare:
    """Where the small entries of a model are while all of it is trained; one bit for each parameter is kept.

        watch = SmallShare(model, share=0.01)
        for step in range(steps):
            ...
            if step % 100 == 0: watch.observe(step)
        watch.records     # [{"step", "still_small", "became_small", "left"}, ...]

    `still_small`: share of *all* entries that are in M0 and below theta now; `became_small`: below theta now and not
    in M0;
    `left`: share of M0 that is not below theta any more. Theta is fixed at the start: `threshold`, or the quantile
    `share`.
    Raises SelectionError unless exactly one of the two is given, or where it marks nothing or everything.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        threshold: float | None = None,
        share: float | None = None,
        include: str | None = None,
        exclude: str | None = None,
    ) -> None:
        if (threshold is None) == (share is None):
            raise SelectionError(f"give a threshold or a share, one of them; got threshold={threshold}, share={share}")
        self._parameters = eligible(model, include, exclude)
        self.threshold = threshold_of(self._parameters, [share])[0] if threshold is None and share else threshold or 0.0
        self.total = sum(p.numel() for p in self._parameters.values())
        self._start = {name: _packed(p.float().abs() < self.threshold) for name, p in self._parameters.items()}
        self.marked = sum(_ones(packed) for packed in self._start.values())
        if self.marked in (0, self.total):
            marks = "nothing" if not self.marked else "every entry"
            raise SelectionError(f"threshold={self.threshold:g} marks {marks} of {self.total:,}; choose another")
        self.records: list[dict[str, Any]] = []
        self.observe(0)

    @torch.no_grad()
    def observe(self, step: int) -> dict[str, Any]:
        """Count now; the record is appended to `records` and returned."""
        still = small = 0
        for name, p in self._parameters.items():
            now = _packed(p.float().abs() < self.threshold)
            small += _ones(now)
            still += _ones(now & self._start[name])
        record = {
            "step": step,
            "still_small": still / self.total,
            "became_small": (small - still) / self.total,
            "left": 1 - still / self.marked,
        }
        self.records.append(record)
        return record


_COUNTS = torch.tensor([bin(byte).count("1") for byte in range(256)])
_PLACES = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8)


def _packed(mask: torch.Tensor) -> torch.Tensor:
    """A bool tensor as bits, eight to a byte, on the CPU: `(ceil(numel / 8),)` uint8."""
    flat = mask.flatten()
    padded = torch.zeros(-(-len(flat) // 8) * 8, dtype=torch.uint8, device=flat.device)
    padded[: len(flat)] = flat
    return (padded.view(-1, 8) * _PLACES.to(flat.device)).sum(1, dtype=torch.uint8).cpu()


def _ones(packed: torch.Tensor) -> int:
    return int(_COUNTS[packed.long()].sum())
