"""How long it takes to put each weight parameterization into an encoder, and what its decompositions lose.

    python benchmarks/deltas_setup.py --out benchmarks/results

The encoder is a ViT of 6 layers and width 512 (19.4 M parameters, random), all of its 36 linear layers adapted by
`get_peft_model`; PEFT's own version of a method, where it has one, takes turns with ours. Seconds are the least of the
turns, of processor time and of wall clock, with one thread. The wall clock says little where the machine does other
things: its load is told. `--two-threads` wants an idle machine: where others have the cores, threads spend their time
waiting for each other.

Decompositions are those of the methods, at their default ranks, of matrices (512, 512) and (2048, 512): random ones,
whose flat spectrum is the hardest case of the range finder, and ones whose k-th singular value is 1 / k.

    residual     ||W - U S Vᵀ|| beside the least that this rank can leave, minus 1; of what is whole, beside ||W||
    values       the largest error of a singular value, relative to it
    orthogonal   the largest entry of Uᵀ U - I and Vᵀ V - I
"""

from __future__ import annotations

import argparse
import gc
import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from deltas_cases import Setting, Variant, variants
from peft import PeftConfig, get_peft_model
from torch import Tensor

from deltas import hardware, write
from fallow.core.bases import all_triples, ldu, leading, smallest
from fallow.core.linalg import Triples, low_rank

LONG = 3.0


def attached(setting: Setting, config: PeftConfig) -> tuple[float, float]:
    """(processor, wall) seconds of get_peft_model."""
    net = setting.base()
    wall, processor = time.perf_counter(), time.process_time()
    get_peft_model(net, config)
    return time.process_time() - processor, time.perf_counter() - wall


def least(setting: Setting, makers: dict[str, Callable[[], PeftConfig]], repeats: int) -> dict[str, dict[str, float]]:
    """Of each maker's configs, which take turns; one turn of those that take longer than LONG seconds."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in makers}
    for _ in range(repeats):
        for name, make in makers.items():
            if not taken[name] or taken[name][0][0] < LONG:
                taken[name].append(attached(setting, make()))
    return {
        name: {"processor": min(one for one, _ in pairs), "wall": min(two for _, two in pairs)}
        for name, pairs in taken.items()
    }


def attaching(setting: Setting, variant: Variant, repeats: int, two: bool) -> dict[str, Any]:
    """Ours and PEFT's own on one thread, and ours on two where asked."""
    names = setting.targets(False)
    ours = {"ours": lambda: variant.config(names)}
    peer = variant.peer
    both = ours if peer is None else {**ours, "peft": lambda: peer(names)}
    row: dict[str, Any] = {"variant": variant.label, "method": variant.method, "options": variant.options}
    row["threads 1"] = least(setting, both, repeats)
    if two:
        torch.set_num_threads(2)
        row["threads 2"] = least(setting, ours, repeats)
        torch.set_num_threads(1)
    row["load"] = os.getloadavg()[0]
    return row


# -- decompositions ---------------------------------------------------------------------------------------------------


def matrices() -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for shape in ((512, 512), (2048, 512)):
        flat = torch.randn(shape, generator=generator) / shape[1] ** 0.5
        yield f"random {shape}", flat
        u, s, vt = torch.linalg.svd(flat.double(), full_matrices=False)
        yield f"falling {shape}", ((u / torch.arange(1, s.numel() + 1)) @ vt).float()


Errors = Callable[[Tensor], dict[str, float]]


def truncated(rank: int, find: Callable[[Tensor, int, torch.Generator], Triples]) -> Errors:
    """The errors of the first `rank` triples that `find` gives."""

    def errors(w: Tensor) -> dict[str, float]:
        u, s, vt = (part.double() for part in find(w, rank, torch.Generator().manual_seed(1)))
        exact = torch.linalg.svdvals(w.double())
        over, left = (w.double() - (u * s) @ vt).norm(), exact[rank:].square().sum().sqrt()
        residual = over / left - 1 if rank < exact.numel() else over / exact.norm()
        eye = torch.eye(rank, dtype=torch.float64)
        orthogonal = max((u.T @ u - eye).abs().max(), (vt @ vt.T - eye).abs().max())
        values = ((s - exact[:rank]).abs() / exact[:rank]).max()
        return {"residual": float(residual), "values": float(values), "orthogonal": float(orthogonal)}

    return errors


def dropped(rank: int) -> Errors:
    """Of KaSA's smallest directions: what is taken out beside what should be, and how far it is from it."""

    def errors(w: Tensor) -> dict[str, float]:
        p, q = (part.double() for part in smallest(w, rank))
        u, s, vt = torch.linalg.svd(w.double(), full_matrices=False)
        exact = (u[:, -rank:] * s[-rank:]) @ vt[-rank:]
        return {"residual": float((p @ q - exact).norm() / w.double().norm())}

    return errors


def lu(w: Tensor) -> dict[str, float]:
    lower, d, upper, _ = ldu(w)
    return {"residual": float(((lower.double() * d.double()) @ upper.double() - w.double()).norm() / w.double().norm())}


DECOMPOSITIONS: dict[str, Errors] = {
    "svfit, salt: all": truncated(512, lambda w, rank, generator: all_triples(w)),
    "svfit rank 32: range finder": truncated(32, leading),
    "lora-xs rank 16: range finder": truncated(16, lambda w, rank, g: low_rank(w, rank, generator=g)),
    "lamda rank 64: range finder": truncated(64, lambda w, rank, g: low_rank(w, rank, generator=g)),
    "kasa rank 8: the smallest": dropped(8),
    "loldu: all": lu,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", help="slugs or labels of variants; all by default")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--two-threads", action="store_true", help="ours with two threads besides; on an idle machine")
    parser.add_argument("--out", type=Path, help="a folder for the result file")
    parser.add_argument("--tag", default="epyc", help="the hardware, in the name of the file")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    gc.freeze()
    setting = Setting("transformer", width=512)
    parameters = sum(param.numel() for param in setting.original.parameters())
    place = given.out / f"deltas-setup-{given.tag}.json" if given.out else None
    told: dict[str, Any] = {**hardware(), "parameters": parameters, "repeats": given.repeats, "errors": {}}
    for name, errors in DECOMPOSITIONS.items():
        told["errors"][name] = {shape: errors(w) for shape, w in matrices()}
        for shape, found in told["errors"][name].items():
            print(
                f"{name:32} {shape:20} " + ", ".join(f"{what} {error:.1e}" for what, error in found.items()), flush=True
            )
    told["attaching"] = []
    for variant in variants(setting, given.methods):
        row = attaching(setting, variant, given.repeats, given.two_threads)
        told["attaching"].append(row)
        figures = [
            f"{threads}, {who}: {seconds['processor']:.2f} s processor, {seconds['wall']:.2f} s wall"
            for threads in ("threads 1", "threads 2")
            for who, seconds in row.get(threads, {}).items()
        ]
        print(f"{variant.label:20} {' | '.join(figures)}", flush=True)
        if place is not None:
            write(place, told)


if __name__ == "__main__":
    main()
