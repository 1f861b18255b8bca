"""What CorDA's decomposition costs and how near it comes, beside the official way: an inverse and all triples in
float32.

python benchmarks/claims/corda_decomposition.py

One thread; processor seconds, the least of three. `cosine`: the least of the principal angles between the 16 left
singular vectors that are taken and those of a full decomposition in float64.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import torch
from protocol import RESULTS, arguments
from torch import Tensor

from fallow.starts.corda import context_svd

RANK = 16


def official(w: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    d, unit = 0.01, torch.eye(len(c))
    while True:
        damped = c + d * c.diagonal().mean() * unit
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, unit) < 0.05:
            u, s, v = torch.linalg.svd(w @ damped, full_matrices=False)
            return u, s, v @ inverse
        d *= 2


def seconds(run: Callable[[], object]) -> float:
    taken = []
    for _ in range(3):
        start = time.process_time()
        run()
        taken.append(time.process_time() - start)
    return min(taken)


def cosine(u: Tensor, exact: Tensor) -> float:
    return float(torch.linalg.svdvals(u.double().T @ exact).min())


def measure(out: int, inner: int) -> dict[str, object]:
    torch.manual_seed(0)
    turn = torch.linalg.qr(torch.randn(inner, inner))[0]
    x = torch.randn(4 * inner, inner) * torch.arange(1, inner + 1) ** -0.7 @ turn
    w, c = torch.randn(out, inner) / inner**0.5, x.T @ x / len(x)
    damped = c.double() + 0.01 * c.double().diagonal().mean() * torch.eye(inner, dtype=torch.float64)
    exact = torch.linalg.svd(w.double() @ damped, full_matrices=False)[0]
    theirs = official(w, c)[0]
    parts = {"first": exact[:, :RANK], "last": exact[:, -RANK:]}
    by_parts: dict[str, object] = {
        part: {
            "seconds": seconds(lambda part=part: context_svd(w, c, RANK, part)),  # type: ignore[misc]
            "cosine": cosine(context_svd(w, c, RANK, part)[0], parts[part]),  # type: ignore[arg-type]
        }
        for part in parts
    }
    cosines = {"first": cosine(theirs[:, :RANK], parts["first"]), "last": cosine(theirs[:, -RANK:], parts["last"])}
    return {
        "shape": (out, inner),
        "official": {"seconds": seconds(lambda: official(w, c)), "cosine": cosines},
        **by_parts,
    }


if __name__ == "__main__":
    arguments(__doc__)
    torch.set_num_threads(1)
    cases = [measure(*shape) for shape in ((1024, 1024), (768, 3072))]
    print(json.dumps(cases, indent=1))
    told = {"name": "corda-decomposition", "rank": RANK, "torch": torch.__version__, "cases": cases}
    (RESULTS / "claims-corda-decomposition.json").write_text(json.dumps(told, indent=1) + "\n")
