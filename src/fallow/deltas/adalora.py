"""AdaLoRA's form: a change in triplets, a value between a left and a right vector, that may come and go one by one.

"AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", arXiv 2303.10512.

    W' = W + s B diag(g) A        A (r, in), B (out, r), normal of deviation 0.02; g (r,), zero; s = alpha / r
    loss()                        gamma / 2M (||A Aᵀ - I|| + ||Bᵀ B - I||), Frobenius norms, over M weights

The penalty keeps the triplets apart, so that g weighs them as singular values do, and one can be zeroed alone. By
itself this is a LoRA with gates that start at zero. Budgets let it change its rank without another shape:
`fallow.AdaLoRARanks` zeroes g where it is worth least, `fallow.IncreLoRA` begins with few triplets and lets more take
part. What takes part stands in `stage`, which files hold, as well as the scores that the budget goes by:

    stage (r,)    0 not yet: g is 0 and not trained; 1 reserve: A and B are trained, g is held at 1e-5; 2 takes part

So optimizers, DistributedDataParallel and checkpoints see the same tensors throughout, and a run that is interrupted
between two growths resumes bit for bit. `fallow.trim` cuts what does not take part in the end.

Departures: PEFT and the authors divide alpha by r + 1e-5. A start (`start=`) sets g to 1.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from fallow.core.delta import Site, number, whole
from fallow.core.starting import Pair
from fallow.deltas.lora import LoRA

DEVIATION = 0.02


class AdaLoRA(LoRA):
    name = "adalora"
    stage: Tensor  # (r,) whole numbers
    gate: nn.Parameter
    born: Tensor  # (2, r): the step in which A and B, and in which g, began to be trained
    score: Tensor  # (2,): a budget's means of sensitivity and uncertainty

    @dataclasses.dataclass(kw_only=True)
    class Options(LoRA.Options):
        """`rank`: r, of all triplets. `orthogonal`: gamma, in the papers 0.1 to 0.5."""

        orthogonal: float = 0.5

        def check(self) -> None:
            super().check()
            number("orthogonal", self.orthogonal)

    def setup(self, site: Site) -> None:
        super().setup(site)
        rank = self.o.rank
        self.gate = nn.Parameter(torch.zeros(rank))
        self._begin(torch.full((rank,), 2), torch.zeros(2, rank, dtype=torch.int64))
        self.register_buffer("score", torch.zeros(2, dtype=torch.float32))
        site.common.__dict__["layers"] = site.common.__dict__.get("layers", 0) + 1  # M

    def _begin(self, stage: Tensor, born: Tensor) -> None:
        self.register_buffer("stage", stage)
        self.register_buffer("born", born)

    def start(self, rank: int) -> tuple[Tensor, Tensor]:
        """Fresh A (rank, in) and B (out, rank)."""
        out, inner = self.view.shape
        return DEVIATION * torch.randn(rank, inner), DEVIATION * torch.randn(out, rank)

    def factors(self) -> tuple[Tensor, Tensor]:
        gates = torch.where(self.stage == 2, self.gate, self.gate.detach())
        return self.with_start(self.B * (self.scaling * gates), self.A, self.scaling)

    def loss(self) -> Tensor | None:
        if not self.o.orthogonal:
            return None
        there = (self.stage > 0).to(self.A.dtype)
        grams = (self.A @ self.A.T, self.B.T @ self.B)
        apart = [
            ((gram - torch.eye(len(there), dtype=gram.dtype, device=gram.device)) * torch.outer(there, there)).norm()
            for gram in grams
        ]
        layers = self.__dict__["_common"][0].__dict__["layers"]
        return (apart[0] + apart[1]) * (self.o.orthogonal / (2 * layers))

    @torch.no_grad()
    def take(self, pair: Pair) -> None:
        """A start without B leaves B as it is and g zero, so that both can learn."""
        b = self.B.detach().clone()
        super().take(pair)
        if pair.b is None:
            self.B.copy_(b)
        else:
            self.gate.fill_(1.0)

    @classmethod
    def parameter_count(cls, shape: tuple[int, int], options: Any) -> int:
        return int(options.rank) * (shape[0] + shape[1] + 1)

    def importance(self) -> Tensor:
        """s |g_k B_k A_k - B0_k A0_k|, B0 and A0 being what a start took out of the weight."""
        size = self.gate.abs() * self.B.norm(dim=0) * self.A.norm(dim=1)
        if self.o.offset:
            both = self.gate * (self.B * self.start_B).sum(0) * (self.A * self.start_A).sum(1)
            square = size**2 + (self.start_B.norm(dim=0) * self.start_A.norm(dim=1)) ** 2 - 2 * both
            size = square.clamp_min(0).sqrt()
        return (self.scaling * size).detach()

    @torch.no_grad()
    def resize(self, rank: int) -> None:
        """Keep the most important; s stays, and alpha with the new rank says so. Fresh triplets take part at once."""
        whole("rank", rank)
        keep = self.importance().topk(min(rank, len(self.gate))).indices.sort().values
        more = max(0, rank - len(keep))
        s, old, stage, born = self.scaling, self.gate, self.stage, self.born
        self.o = dataclasses.replace(self.o, rank=rank, alpha=s * rank, scaling="standard")
        self.resize_pair(keep, *self.start(more))
        self.gate = nn.Parameter(torch.cat([old[keep], old.new_zeros(more)]), old.requires_grad)
        fresh = (stage.new_full((more,), 2), born.new_zeros(2, more))
        self._begin(torch.cat([stage[keep], fresh[0]]), torch.cat([born[:, keep], fresh[1]], 1))
