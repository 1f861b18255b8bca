"""Time and memory of GaLore's update beside galore-torch, in one process on the same gradients.

    pip install --no-deps galore-torch
    python benchmarks/low_rank_step.py --out benchmarks/results/low-rank-step-epyc-1-thread.json

The shapes of LLaMA-60M (8 blocks of width 512, 32,000 words; 58 M weights), rank 128, random gradients with a decaying
spectrum that drift slowly, refreshes every 200 steps. `step`: an ordinary step; `refresh`: a step with all refreshes;
`per_200`: 199 + 1 of them. Steps of the two take turns; figures are medians of processor time. `state_bytes`: what
the states hold, with projectors that hide in objects; `peak`: the most alive within a step beyond weights, gradients
and states. `parts`: where our ordinary step goes, by running its pieces alone.

`--refresh` measures the choice of a basis of one 4096 x 4096 gradient at rank 128: against the full decomposition, and
the share of the energy that exact singular vectors hold.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fallow
from fallow.analysis.memory import LiveBytes
from fallow.core.subspaces import exact, power_step, randomised

WIDTH, INNER, BLOCKS, WORDS, RANK, GAP = 512, 1376, 8, 32000, 128, 200


def shapes() -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Projected matrices, and the rest."""
    block = [(WIDTH, WIDTH)] * 4 + [(INNER, WIDTH)] * 2 + [(WIDTH, INNER)]
    return block * BLOCKS, [(WORDS, WIDTH), (WORDS, WIDTH)] + [(WIDTH,)] * (2 * BLOCKS + 1)


def gradient(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Random, with singular values that fall like 1 / sqrt(i)."""
    if len(shape) == 1 or shape[0] > 2000:
        return 1e-3 * torch.randn(*shape, generator=generator)
    rank = min(shape)
    left, right = (torch.randn(side, rank, generator=generator) for side in shape)
    return 1e-3 * (left / torch.arange(1.0, rank + 1).sqrt()) @ right.mT / rank**0.5


class Side:
    """Weights with their gradients, and an optimizer over them."""

    def __init__(self, make: Callable[[list[nn.Parameter], list[nn.Parameter]], torch.optim.Optimizer]) -> None:
        generator = torch.Generator().manual_seed(0)
        projected, plain = shapes()
        self.projected = [nn.Parameter(0.02 * torch.randn(*one, generator=generator)) for one in projected]
        self.plain = [nn.Parameter(0.02 * torch.randn(*one, generator=generator)) for one in plain]
        for param in self.params:
            param.grad = gradient(param.shape, generator)
        self.noise = [0.1 * gradient(param.shape, generator) for param in self.projected[:7]]
        self.optimizer = make(self.projected, self.plain)
        self.count = 0

    @property
    def params(self) -> list[nn.Parameter]:
        return self.projected + self.plain

    def drift(self) -> None:
        """Another gradient, near the last one; not part of what is measured."""
        for at, param in enumerate(self.projected):
            assert param.grad is not None
            param.grad.add_(self.noise[at % 7].roll(self.count, 0), alpha=0.3)
        self.count += 1

    def step(self) -> float:
        self.drift()
        start = time.process_time()
        self.optimizer.step()
        return time.process_time() - start

    def peak(self) -> int:
        """Bytes that an ordinary step needs for the time of it."""
        held = tensors(self.optimizer.state)
        with LiveBytes(*self.params, *(p.grad for p in self.params if p.grad is not None), *held) as live:
            self.optimizer.step()
        return live.peak


def tensors(value: Any, depth: int = 0) -> list[Tensor]:
    """All tensors of a state, also those of objects within it."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [found for one in value.values() for found in tensors(one, depth)]
    if isinstance(value, list | tuple):
        return [found for one in value for found in tensors(one, depth)]
    if hasattr(value, "__dict__") and depth < 3:
        return tensors(vars(value), depth + 1)
    return []


def state_bytes(optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> int:
    storages = {}
    for param in params:
        for found in tensors(optimizer.state[param]):
            storages[found.untyped_storage().data_ptr()] = found.untyped_storage().nbytes()
    return sum(storages.values())


def ours(**options: Any) -> Callable[[list[nn.Parameter], list[nn.Parameter]], torch.optim.Optimizer]:
    def make(projected: list[nn.Parameter], plain: list[nn.Parameter]) -> torch.optim.Optimizer:
        return fallow.GaLore([{"params": projected}, {"params": plain, "rank": None}], rank=RANK, refresh_every=GAP,
                             **options)  # fmt: skip

    return make


def theirs(projected: list[nn.Parameter], plain: list[nn.Parameter]) -> torch.optim.Optimizer:
    try:
        from galore_torch import GaLoreAdamW
    except ImportError as error:
        raise SystemExit(f"galore-torch is missing ({error}): pip install --no-deps galore-torch") from None
    group = {"params": projected, "rank": RANK, "update_proj_gap": GAP, "scale": 0.25, "proj_type": "std"}
    return GaLoreAdamW([group, {"params": plain}], lr=0.01, no_deprecation_warning=True)


def together(steps: int) -> dict[str, Any]:
    makers = {
        "galore-torch": theirs, "fallow": ours(), "fallow svd": ours(basis="svd"),
        "fallow 8-bit states": ours(state_dtype="8bit"), "fallow bf16 states": ours(state_dtype="bf16"),
    }  # fmt: skip
    rows: dict[str, Any] = {name: {"first": 0.0, "steps": [], "refresh": []} for name in makers}
    sides = {name: Side(make) for name, make in makers.items()}
    for name, side in sides.items():
        rows[name]["first"] = side.step()
    for _ in range(steps):
        for name, side in sides.items():
            rows[name]["steps"].append(side.step())
    for name, side in sides.items():  # the next refresh, as if the gap had passed
        for param in side.projected:
            held = side.optimizer.state[param]
            if name == "galore-torch":
                held["step"] = GAP
            else:
                held["due"] = 0
        rows[name]["refresh"].append(side.step())
    for name, side in sides.items():
        row = rows[name]
        row["step"], row["refresh"] = statistics.median(row["steps"]), row["refresh"][0]
        row["per_200"] = 199 * row["step"] + row["refresh"]
        row["refreshes_per_200"] = row["refresh"] - row["step"]
        row["state_bytes"] = state_bytes(side.optimizer, side.params)
        row["state_bytes_projected"] = state_bytes(side.optimizer, side.projected)
        row["peak"] = side.peak()
    base, mine = rows["galore-torch"], rows["fallow"]
    ratios = {key: mine[key] / base[key] for key in ("step", "per_200", "refreshes_per_200", "state_bytes", "peak")}
    ratios["extra_memory"] = (mine["state_bytes"] + mine["peak"]) / (base["state_bytes"] + base["peak"])
    small = rows["fallow 8-bit states"]
    ratios["8-bit states to 32-bit states, projected"] = small["state_bytes_projected"] / mine["state_bytes_projected"]
    ratios["8-bit states to 32-bit states, all"] = small["state_bytes"] / mine["state_bytes"]
    return {"rows": rows, "ratios": ratios, "parts": parts(sides["fallow"])}


def timed(work: Callable[[], Any], rounds: int = 5) -> float:
    work()
    spent = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        spent.append(time.process_time() - start)
    return statistics.median(spent)


def parts(side: Side) -> dict[str, float]:
    """Seconds of the bare pieces of an ordinary step, from torch's own operators on the same tensors."""
    pairs = []
    for param in side.projected:
        seen = param.detach().mT if param.shape[0] >= param.shape[1] else param.detach()
        grad = param.grad.mT if param.shape[0] >= param.shape[1] else param.grad  # type: ignore[union-attr]
        basis = torch.linalg.qr(torch.randn(seen.shape[0], RANK))[0]
        pairs.append((seen, grad, basis, torch.randn(RANK, seen.shape[1])))
    small = torch.optim.AdamW([nn.Parameter(n.clone()) for *_, n in pairs], fused=True)
    plain = torch.optim.AdamW([nn.Parameter(p.detach().clone()) for p in side.plain], fused=True)
    for optimizer in (small, plain):
        for param in optimizer.param_groups[0]["params"]:
            param.grad = torch.randn_like(param)
    return {
        "project": timed(lambda: [p.mT @ g for _, g, p, _ in pairs]),
        "project back into the weight": timed(lambda: [w.addmm_(p, n, alpha=-1e-9) for w, _, p, n in pairs]),
        "AdamW of the projected": timed(small.step),
        "AdamW of embedding, head and norms": timed(plain.step),
    }


def refresh(side: int = 4096, rank: int = RANK) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    start = gradient_of(side, generator)
    later = start + 0.3 * gradient_of(side, generator)
    probe = torch.randn(side, rank + 10, generator=generator)
    first = randomised(start, rank, probe)
    spent: dict[str, Any] = {
        "rsvd": timed(lambda: randomised(later, rank, probe), 1),
        "warm": timed(lambda: power_step(later, first), 1),
    }
    before = time.process_time()
    best = exact(later, rank)
    spent["svd"] = time.process_time() - before
    held = {
        "rsvd": randomised(later, rank, probe), "warm": power_step(later, first), "old basis": first, "svd": best,
    }  # fmt: skip
    whole = float((best.mT @ later).norm())
    return {
        "seconds": spent,
        "energy_of_svd": {name: float((basis.mT @ later).norm()) / whole for name, basis in held.items()},
        "faster_than_svd": {name: spent["svd"] / spent[name] for name in ("rsvd", "warm")},
    }


def gradient_of(side: int, generator: torch.Generator) -> Tensor:
    """(side, side) with singular values that fall like 1 / i down to noise."""
    left, right = (torch.randn(side, 512, generator=generator) for _ in range(2))
    return (left / torch.arange(1.0, 513)) @ right.mT / side + 1e-4 * torch.randn(side, side, generator=generator)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--refresh", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"hardware": "AMD EPYC VM, CPU, one thread", "torch": torch.__version__}
    found["load"] = os.getloadavg()[0]
    if args.refresh:
        found["refresh"] = refresh()
    else:
        found |= together(args.steps)
    print(json.dumps({key: value for key, value in found.items() if key != "rows"}, indent=1))
    for name, row in found.get("rows", {}).items():
        print(name, {key: value for key, value in row.items() if key != "steps"})
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
