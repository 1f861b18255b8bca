"""Figures of merit of generated pictures: Frechet and kernel distance, text alignment, VLHI.

VLHI is the score of SaRA (arXiv 2409.06633, section 5): over a group of compared runs,
`(max FD - FD) / (max FD - min FD) + (alignment - min) / (max - min)`; 2 is best in both, 0 worst in both.

The Frechet distance of few pictures is biased upwards: two samples of N pictures from one and the same source are some
distance apart, the more the fewer. Whoever prints one also prints N, and the same distance between real and real
pictures as the floor. The kernel distance has no such bias, and is zero on average for equal sources.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from fallow.analysis.features import GarmentNet


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Frechet distance of two sets of features, `(N, D)` and `(M, D)`, taken as Gaussians: computed in float64.

    `|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))`; the trace of the root is the sum of the singular values of
    `C_a^(1/2) C_b^(1/2)`, which stays real and stable where either covariance is singular (few pictures).
    Raises ValueError if a set has fewer than two rows or the widths differ.
    """
    a, b = _checked("frechet_distance", a, b)

    def root(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A square root R of the covariance, `R^T R = C`, of shape (min(N, D), D); and the trace of C."""
        centred = (x - x.mean(0)) / (len(x) - 1) ** 0.5
        _, s, vh = torch.linalg.svd(centred, full_matrices=False)
        return s[:, None] * vh, s.square().sum()

    (root_a, trace_a), (root_b, trace_b) = root(a), root(b)
    shared = torch.linalg.svdvals(root_a @ root_b.T).sum()
    return max(0.0, ((a.mean(0) - b.mean(0)).square().sum() + trace_a + trace_b - 2 * shared).item())


def kernel_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Unbiased squared maximum mean discrepancy of features `(N, D)` and `(M, D)`; may come out slightly negative.

    Kernel `(x.y / D + 1)^3` on features divided by the root mean square of `b`, so that the scale of a judge's features
    does not matter (KID, Binkowski et al., arXiv 1801.01401, has Inception's scale built in).
    Raises ValueError if a set has fewer than two rows or the widths differ.
    """
    a, b = _checked("kernel_distance", a, b)
    scale = b.square().mean().sqrt().clamp(min=1e-12)
    a, b = a / scale, b / scale

    def kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: torch.Tensor) -> torch.Tensor:
        gram = kernel(x, x)
        return (gram.sum() - gram.diagonal().sum()) / (len(x) * (len(x) - 1))

    return (within(a) + within(b) - 2 * kernel(a, b).mean()).item()


def _checked(name: str, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"{name} needs two (N >= 2, D) tensors of equal D, not {tuple(a.shape)} and {tuple(b.shape)}")
    return a.double(), b.double()


def alignment(net: GarmentNet, pictures: torch.Tensor, wanted: torch.Tensor) -> dict[str, float]:
    """How well pictures `(N, 3, 32, 32)` in [0, 1] show the wanted garments `(N,)`.

    `recognised`: share whose best logit is the wanted garment; `alignment`: mean probability of the wanted garment, in
    [0, 1].
    """
    logits = net.garment_logits(pictures)
    chance = logits.softmax(1).gather(1, wanted[:, None])
    return {"recognised": (logits.argmax(1) == wanted).float().mean().item(), "alignment": chance.mean().item()}


def vlhi(distances: Sequence[float], alignments: Sequence[float]) -> list[float]:
    """VLHI of each run of a group, in [0, 2]; a measure in which all runs are equal counts 1 for each.

    Raises ValueError for an empty group, groups of unequal length, or a value that is not finite (no failed runs).
    """
    if len(distances) != len(alignments) or not distances:
        raise ValueError(
            f"vlhi needs as many distances as alignments, at least one; got {len(distances)} and {len(alignments)}"
        )
    if not np.isfinite([*distances, *alignments]).all():
        raise ValueError(f"vlhi needs finite values, not {list(distances)} and {list(alignments)}")

    def share(values: Sequence[float], best: float, worst: float) -> list[float]:
        return [1.0 if best == worst else (value - worst) / (best - worst) for value in values]

    by_distance = share(distances, min(distances), max(distances))
    by_alignment = share(alignments, max(alignments), min(alignments))
    return [d + t for d, t in zip(by_distance, by_alignment, strict=True)]


def to_tensor(pictures: Sequence[Image.Image], size: int) -> torch.Tensor:
    """Pictures of any size -> `(N, 3, size, size)` float32 in [0, 1]: the central square, resized with antialiasing.

    A picture that is `size x size` already comes through exactly. Without the antialias filter, a 512 px picture read
    at every 16th pixel would be judged by its noise.
    """
    out = torch.empty(len(pictures), 3, size, size)
    for place, picture in zip(out, pictures, strict=True):
        pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255
        height, width = pixels.shape[1:]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        pixels = pixels[:, top : top + side, left : left + side]
        if side != size:
            pixels = F.interpolate(pixels[None], (size, size), mode="bicubic", antialias=True, align_corners=False)[0]
        place.copy_(pixels.clamp(0, 1))
    return out
