"""Figures of merit of generated pictures: Frechet distance, text alignment, VLHI.

VLHI is the score of SaRA (arXiv 2409.06633, section 5): over a group of compared runs,
`(max FD - FD) / (max FD - min FD) + (alignment - min) / (max - min)`; 2 is best in both, 0 worst in both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fallow.analysis.features import GarmentNet


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Frechet distance of two sets of features, `(N, D)` and `(M, D)`, taken as Gaussians: computed in float64.

    `|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))`; the trace of the root is the sum of the singular values of
    `C_a^(1/2) C_b^(1/2)`, which stays real and stable where either covariance is singular (few pictures).
    Raises ValueError if a set has fewer than two rows or the widths differ.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(
            f"frechet_distance needs two (N >= 2, D) tensors of equal D, not {tuple(a.shape)} and {tuple(b.shape)}"
        )
    a, b = a.double(), b.double()

    def root(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A square root R of the covariance, `R^T R = C`, of shape (min(N, D), D); and the trace of C."""
        centred = (x - x.mean(0)) / (len(x) - 1) ** 0.5
        _, s, vh = torch.linalg.svd(centred, full_matrices=False)
        return s[:, None] * vh, s.square().sum()

    (root_a, trace_a), (root_b, trace_b) = root(a), root(b)
    shared = torch.linalg.svdvals(root_a @ root_b.T).sum()
    return max(0.0, ((a.mean(0) - b.mean(0)).square().sum() + trace_a + trace_b - 2 * shared).item())


def alignment(net: GarmentNet, pictures: torch.Tensor, wanted: torch.Tensor) -> dict[str, float]:
    """How well pictures `(N, 3, 32, 32)` in [0, 1] show the wanted garments `(N,)`.

    `recognised`: share whose best logit is the wanted garment; `alignment`: mean probability of the wanted garment, in [0, 1].
    """
    logits = net.garment_logits(pictures)
    chance = logits.softmax(1).gather(1, wanted[:, None])
    return {"recognised": (logits.argmax(1) == wanted).float().mean().item(), "alignment": chance.mean().item()}


def vlhi(distances: Sequence[float], alignments: Sequence[float]) -> list[float]:
    """VLHI of each run of a group, in [0, 2]; a measure in which all runs are equal counts 1 for each."""
    if len(distances) != len(alignments) or not distances:
        raise ValueError(
            f"vlhi needs as many distances as alignments, at least one; got {len(distances)} and {len(alignments)}"
        )

    def share(values: Sequence[float], best: float, worst: float) -> list[float]:
        return [1.0 if best == worst else (value - worst) / (best - worst) for value in values]

    by_distance = share(distances, min(distances), max(distances))
    by_alignment = share(alignments, max(alignments), min(alignments))
    return [d + t for d, t in zip(by_distance, by_alignment, strict=True)]
