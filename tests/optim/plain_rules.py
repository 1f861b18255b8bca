"""The inner and residual rules written from their equations, in float64, with dense matrices, for one matrix.

The basis is taken from the optimizer (bases have tests of their own); everything else is done again plainly.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class PlainRule:
    """G (d, n) and P (d, r), or a set of entries as P (d n, k) acting on vec(G), to the change of W."""

    def __init__(
        self, inner: dict[str, Any], residual: dict[str, Any], out_in: tuple[int, int], **options: Any
    ) -> None:
        self.inner, self.residual, self.out_in = inner, residual, out_in
        self.o = {"betas": (0.9, 0.999), "eps": 1e-8, "scale": 1.0, "moments": "keep", **options}
        self.s: dict[str, Tensor] = {}
        self.k = 0
        self.p: Tensor | None = None

    def change(self, grad: Tensor, p: Tensor | None, anew: bool) -> Tensor:
        """The direction that lr multiplies; `p` None where nothing is projected. `anew`: chosen again in this step."""
        g = grad.double()
        if self.residual["name"] in ("feedback", "momentum"):
            g = g + self.s.get("held", torch.zeros_like(g))
        if p is None:
            c = self.residual.get("share", 1.0)
            return c * (g.sign() if self.residual["name"] == "sign" else g)
        p = p.double()
        entries = p.shape[0] != g.shape[0]
        if self.p is not None and anew:
            self._carry(p.mT @ self.p)
        self.p = p
        r = p.mT @ (g.reshape(-1) if entries else g)
        self.k += 1
        direction, correction = getattr(self, f"_{self.inner['name'].replace('8bit', '')}")(r)
        inside, rest = p @ r, None
        rest = g - inside.view_as(g)
        lifted = self.o["scale"] * (p @ direction).view_as(g)
        return getattr(self, f"_after_{self.residual['name']}")(g, r, direction, correction, rest, lifted, p)

    def _carry(self, q: Tensor) -> None:
        if self.o["moments"] == "reset":
            self.s = {key: value for key, value in self.s.items() if key == "held"}
            self.k = 0
        elif self.o["moments"] == "rotate":
            for key, power in (("m", 1), ("v", 2), ("row", 2)):
                if key in self.s:
                    self.s[key] = (q if power == 1 else q.square()) @ self.s[key]

    # -- inner ---------------------------------------------------------------------------------------------------------

    def _ema(self, key: str, value: Tensor, beta: float) -> Tensor:
        self.s[key] = beta * self.s.get(key, torch.zeros_like(value)) + (1 - beta) * value
        return self.s[key]

    def _adamw(self, r: Tensor) -> tuple[Tensor, float]:
        b1, b2 = self.o["betas"]
        m, v = self._ema("m", r, b1) / (1 - b1**self.k), self._ema("v", r * r, b2) / (1 - b2**self.k)
        return m / (v.sqrt() + self.o["eps"]), (1 - b2**self.k) ** 0.5 / (1 - b1**self.k)

    def _lion(self, r: Tensor) -> tuple[Tensor, float]:
        b1, b2 = self.o["betas"]
        u = torch.sign(b1 * self.s.get("m", torch.zeros_like(r)) + (1 - b1) * r)
        self._ema("m", r, b2)
        return u, 1.0

    def _sgdm(self, r: Tensor) -> tuple[Tensor, float]:
        mu = self.inner.get("momentum", 0.9)
        m = self.s["m"] = mu * self.s.get("m", torch.zeros_like(r)) + r
        n = r + mu * m if self.inner.get("nesterov") else m
        return (n.sign() if self.inner.get("sign") else n), 1.0

    def _adafactor(self, r: Tensor) -> tuple[Tensor, float]:
        b2 = 1 - self.k**-0.8
        square = r * r + 1e-30
        if r.ndim > 1:
            row, column = self._ema("row", square.mean(1), b2), self._ema("column", square.mean(0), b2)
            u = r / torch.sqrt(torch.outer(row, column) / row.mean())
        else:
            u = r / self._ema("v", square, b2).sqrt()
        return u / max(1.0, float(u.square().mean().sqrt())), 1.0

    def _polar(self, r: Tensor) -> tuple[Tensor, float]:
        mu = self.inner.get("momentum", 0.95)
        m = self.s["m"] = mu * self.s.get("m", torch.zeros_like(r)) + r
        b = r + mu * m if self.inner.get("nesterov", True) else m
        u, _, vt = torch.linalg.svd(b, full_matrices=False)
        return math.sqrt(max(1.0, self.out_in[0] / self.out_in[1])) * u @ vt, 1.0

    # -- residual ------------------------------------------------------------------------------------------------------

    def _after_drop(self, g, r, n, c, rest, lifted, p):
        return lifted

    def _limit(self, s: Tensor) -> Tensor:
        if "norm" in self.s and self.s["norm"] > 0 and s.norm() > 1.01 * (self.s["norm"] + 1e-8):
            s = s * 1.01 * (self.s["norm"] + 1e-8) / s.norm()
        self.s["norm"] = s.norm()
        return s

    def _after_fira(self, g, r, n, c, rest, lifted, p):
        phi = (n / c).norm(dim=0) / (r.norm(dim=0) + 1e-8)
        return lifted + c * self._limit(phi * rest)

    def _after_apollo(self, g, r, n, c, rest, lifted, p):
        s = (n / c).norm(dim=0) / (r.norm(dim=0) + 1e-8)
        return c * math.sqrt(self.o["scale"]) * self._limit(s * g)

    def _after_sign(self, g, r, n, c, rest, lifted, p):
        rest = torch.where(rest.abs() <= 1e-12 * g.abs().max(), 0.0, rest)
        return lifted + self.residual.get("share", 1.0) * rest.sign()

    def _after_sgd(self, g, r, n, c, rest, lifted, p):
        return lifted + self.residual.get("share", 1.0) * rest

    def _after_feedback(self, g, r, n, c, rest, lifted, p):
        self.s["held"] = rest
        return lifted

    def _after_momentum(self, g, r, n, c, rest, lifted, p):
        self.s["held"] = g - (1 - self.residual.get("momentum", 0.95)) * (g - rest)
        return lifted
