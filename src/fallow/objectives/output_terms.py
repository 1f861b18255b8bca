"""BA-LoRA's three terms of logits as functions: consistency, diversity, spectral; one file, since all are short.

Z_F (n, d): rows of logits of the tuned model; Z_P (n, d): of the model as it was, on the same inputs.

    consistency      T² KL(softmax(Z_P / T) | softmax(Z_F / T)), of each row     gradient T (p_F - p_P)
    covariance       1/d sum_(i != j) C_ij²,  C = Z_cᵀ Z_c / (n - 1),  Z_c = Z_F - its mean row
    entropy          -sum p log p of softmax over the K largest logits of each row; the others get no gradient
    spectral share   sum_(i <= k) sigma_i / sum_i sigma_i, or / |Z|_F

All are made of log_softmax, never of log(softmax), whose logarithm of an underflow is -inf.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor


def divergence(tuned: Tensor, original: Tensor, temperature: float = 1.0) -> Tensor:
    """T² KL(p_P | p_F) summed over the rows of logits (n, d)."""
    log_p = F.log_softmax(original / temperature, -1)
    log_q = F.log_softmax(tuned / temperature, -1)
    return temperature**2 * F.kl_div(log_q, log_p, reduction="sum", log_target=True)


def normalised_distance(tuned: Tensor, original: Tensor) -> Tensor:
    """|Z_F / |Z_F| - Z_P / |Z_P||² of the rows of logits (n, d), its mean over the columns summed over the rows."""
    gap = F.normalize(tuned, dim=-1) - F.normalize(original, dim=-1)
    return gap.square().sum() / tuned.shape[-1]


def off_diagonal_covariance(logits: Tensor) -> Tensor:
    """1/d of the squares of all covariances between two of the d columns of logits (n, d); 0 of fewer than 2 rows."""
    n, d = logits.shape
    if n < 2:
        return (logits * 0).sum()
    centred = logits - logits.mean(0)
    if n >= d:
        covariance = centred.T @ centred / (n - 1)
        total = covariance.square().sum()
        return (total - covariance.diagonal().square().sum()) / d
    # The squares of all entries of Zᵀ Z are those of Z Zᵀ, which is smaller here.
    total = (centred @ centred.T / (n - 1)).square().sum()
    return (total - (centred.square().sum(0) / (n - 1)).square().sum()) / d


def entropy(logits: Tensor, candidates: int | None = None) -> Tensor:
    """The entropy of softmax over the `candidates` largest of each row of logits (n, d), summed; None: over all."""
    kept = logits if candidates is None else logits.topk(min(candidates, logits.shape[-1])).values
    log_p = F.log_softmax(kept, -1)
    return -(log_p.exp() * log_p).sum()


def spectral_share(logits: Tensor, k: int, against: str = "sum") -> Tensor:
    """sum_(i <= k) sigma_i of logits (n, d) over the "sum" of all, or over the Frobenius "norm"; 0 of a zero matrix.

    Scale-free. It is 1 and has no gradient where k >= min(n, d) and `against` is "sum".
    """
    sigma = singular_values(logits)
    whole = sigma.sum() if against == "sum" else torch.linalg.vector_norm(logits)
    return sigma[:k].sum() / whole.clamp_min(torch.finfo(logits.dtype).tiny)


def singular_values(matrix: Tensor) -> Tensor:
    """(min(n, d),) descending; differentiable once, zero ones with a gradient of zero.

    By the eigenvectors of the smaller Gram matrix, u_i; sigma_i is then the norm of u_iᵀ Z, which is exact to first
    order where the root of an eigenvalue is not. The gradient u_i v_iᵀ needs no gradient of an eigenvector.
    """
    return cast(Tensor, _SingularValues.apply(matrix))


class _SingularValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:
        ctx.wide = matrix.shape[0] <= matrix.shape[1]
        z = matrix if ctx.wide else matrix.T
        u = torch.linalg.eigh(z @ z.T).eigenvectors
        along = u.T @ z
        sigma, order = along.norm(dim=1).sort(descending=True)
        ctx.save_for_backward(u[:, order], along[order], sigma)
        return sigma

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        u, along, sigma = ctx.saved_tensors
        floor = sigma[:1] * torch.finfo(sigma.dtype).eps * max(along.shape)
        weights = torch.where(sigma > floor, upstream / sigma.clamp_min(torch.finfo(sigma.dtype).tiny), 0.0)
        grad: Tensor = (u * weights) @ along
        return grad if ctx.wide else grad.T
