"""The low-rank update written from the equations, in float64, for one matrix: what the optimizer is held to."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


def leading(g: Tensor, rank: int) -> Tensor:
    return torch.linalg.svd(g, full_matrices=False)[0][:, :rank]


@dataclass
class PlainLowRank:
    """W (out, in): refreshed by SVD every `gap` steps, AdamW on R, and the rest dropped, or scaled as Fira does."""

    rank: int
    lr: float
    gap: int
    scale: float = 1.0
    residual: str = "drop"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    decay: float = 0.0
    galore_eps: bool = False
    limit: float = 1.01
    moments: str = "keep"
    t: int = 0
    k: int = 0
    state: dict[str, Tensor] = field(default_factory=dict)

    def step(self, w: Tensor, grad: Tensor) -> Tensor:
        right = w.shape[0] >= w.shape[1]
        g = (grad.mT if right else grad).double()
        s = self.state
        if self.t % self.gap == 0:
            new = leading(g, self.rank)
            if "p" in s:  # of a column and its negative the one nearer to the last
                new = new * torch.where((new * s["p"]).sum(0) < 0, -1.0, 1.0)
            if "p" in s and self.moments == "rotate":
                q = new.mT @ s["p"]
                s["m"], s["v"] = q @ s["m"], q.square() @ s["v"]
            if "p" in s and self.moments == "reset":
                self.k = 0
                s.pop("norm", None)
                s["m"], s["v"] = torch.zeros_like(s["m"]), torch.zeros_like(s["v"])
            s["p"] = new
        self.t, self.k = self.t + 1, self.k + 1
        r = s["p"].mT @ g
        b1, b2 = self.betas
        s["m"] = b1 * s.get("m", torch.zeros_like(r)) + (1 - b1) * r
        s["v"] = b2 * s.get("v", torch.zeros_like(r)) + (1 - b2) * r * r
        c = (1 - b2**self.k) ** 0.5 / (1 - b1**self.k)
        psi = s["m"] / (s["v"].sqrt() + self.eps * (1 if self.galore_eps else (1 - b2**self.k) ** 0.5))
        update = self.scale * s["p"] @ psi
        if self.residual.startswith("fira"):
            a = self.scale if self.residual == "fira-official" else 1.0
            phi = psi.norm(dim=0) / (r.norm(dim=0) + 1e-8)
            rest = phi * (g - a * s["p"] @ r)
            if "norm" in s and s["norm"] > 0 and rest.norm() / (s["norm"] + 1e-8) > self.limit:
                rest = rest * self.limit * (s["norm"] + 1e-8) / rest.norm()
            s["norm"] = rest.norm()
            update = update + rest
        update = self.lr * c * update
        return (1 - self.lr * self.decay) * w - (update.mT if right else update)
