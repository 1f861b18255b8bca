"""Pretraining at small scale on real text: full-rank and low-rank optimizers, each at its best learning rate.

    apt-get install wordnet-base          # the corpus: WordNet's 117,000 glosses, a few MB of running English
    python benchmarks/pretraining.py --contenders adamw,galore --sweep        # rates, on a seed that is not reported
    python benchmarks/pretraining.py --seeds 3                                # at the best rate of the sweep
    python benchmarks/pretraining.py --table                                  # what has been run so far

A byte-level LLaMA (4 blocks of width 160) from scratch; the linear layers of attention and MLP are trained by the
contender, embedding, norms and head by plain AdamW at the contender's rate, as in GaLore's setting. Cosine schedule to
a tenth with a tenth of warm-up, clipping at 1. Rank is a quarter of the width, refreshes come every 50 steps.

`loss`: nats a byte on held-out glosses. `state_bytes`: what the optimizer keeps for all weights at the end. `seconds`:
processor time of the training, of which `optimizer_seconds` in `step()`. Every run is written at once to the file of
results, so that several processes may share the work by --contenders; a rate at the edge of those tried is marked.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import fallow
from fallow.deltas.sltrain import sltrain

WIDTH, BLOCKS, LENGTH, BATCH, STEPS, RANK, REFRESH = 160, 4, 128, 8, 300, 40, 50
SWEEP_SEED, SEEDS = 1000, (0, 1, 2)
RESULTS = Path(__file__).parent / "results" / "pretraining-epyc-1-thread.json"
Groups = tuple[list[nn.Parameter], list[nn.Parameter]]  # what the contender trains, and the rest


def corpus(folder: Path) -> tuple[Tensor, Tensor]:
    """Glosses as bytes, for training and held out; every tenth gloss is held out."""
    lines: tuple[list[str], list[str]] = ([], [])
    files = sorted(folder.glob("data.*"))
    if not files:
        raise SystemExit(
            f"no data.* in {folder}: install WordNet's database (apt-get install wordnet-base) or --corpus"
        )
    for file in files:
        for number, line in enumerate(file.read_text(encoding="latin-1").splitlines()):
            if " | " in line:
                lines[number % 10 == 0].append(line.split(" | ", 1)[1].strip())
    return tuple(torch.frombuffer(bytearray("\n".join(part).encode()), dtype=torch.uint8).long() for part in lines)  # type: ignore[return-value]


def batches(text: Tensor, seed: int, count: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        starts = torch.randint(len(text) - LENGTH, (BATCH,), generator=generator)
        yield text[starts[:, None] + torch.arange(LENGTH)]


def network(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=WIDTH, intermediate_size=432, num_hidden_layers=BLOCKS, num_attention_heads=4,
            max_position_embeddings=LENGTH, use_cache=False, tie_word_embeddings=False,
        )
    )  # fmt: skip


# -- contenders -------------------------------------------------------------------------------------------------------


def plain(params: list[nn.Parameter], lr: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(params, lr=lr, weight_decay=0.0)


def low_rank(name: str, **options: Any) -> Callable[[Groups, float], list[torch.optim.Optimizer]]:
    def make(groups: Groups, lr: float) -> list[torch.optim.Optimizer]:
        return [getattr(fallow, name)(groups[0], lr=lr, **options), plain(groups[1], lr)]

    return make


def muon(groups: Groups, lr: float) -> list[torch.optim.Optimizer]:
    rate = {"lr": lr, "weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}
    return [torch.optim.Muon(groups[0], **rate), plain(groups[1], lr)]


ADAM_LIKE, GALORE_LIKE = (1e-3, 3e-3, 1e-2), (3e-3, 1e-2, 3e-2)
CONTENDERS: dict[str, tuple[Callable[[Groups, float], list[torch.optim.Optimizer]], tuple[float, ...]]] = {
    "adamw": (lambda groups, lr: [plain(groups[0] + groups[1], lr)], ADAM_LIKE),
    "galore": (low_rank("GaLore", rank=RANK, refresh_every=REFRESH), GALORE_LIKE),
    "fira": (low_rank("Fira", rank=RANK, refresh_every=REFRESH), GALORE_LIKE),
    "frugal": (low_rank("FRUGAL", rank=0.25, refresh_every=REFRESH), ADAM_LIKE),
    "dct-adamw": (low_rank("DCTAdamW", rank=RANK), ADAM_LIKE),
    "trion": (low_rank("Trion", rank=RANK), GALORE_LIKE),
    "apollo": (low_rank("APOLLO", rank=RANK, refresh_every=REFRESH), GALORE_LIKE),
    "apollo-mini": (low_rank("APOLLOMini", refresh_every=REFRESH), GALORE_LIKE),
    "muon": (muon, ADAM_LIKE),
    "sltrain": (lambda groups, lr: [plain(groups[0] + groups[1], lr)], ADAM_LIKE),
}


def split(model: nn.Module) -> Groups:
    """The matrices of attention and MLP, and all else."""
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and ("self_attn" in name or "mlp" in name)]
    known = {id(p) for p in inner}
    return inner, [p for p in model.parameters() if id(p) not in known]


def state_bytes(optimizers: list[torch.optim.Optimizer]) -> int:
    """Bytes of the tensors that the states hold, each storage once."""
    storages: dict[int, int] = {}

    def gather(value: Any) -> None:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            for inner in value.values():
                gather(inner)
        elif isinstance(value, list | tuple):
            for inner in value:
                gather(inner)

    for optimizer in optimizers:
        gather(optimizer.state_dict()["state"])
    return sum(storages.values())


def run(name: str, lr: float, seed: int, texts: tuple[Tensor, Tensor], steps: int) -> dict[str, Any]:
    model = network(seed)
    if name == "sltrain":
        sltrain(model, RANK, 0.03, alpha=float(RANK), seed=seed)
    make, _ = CONTENDERS[name]
    optimizers = make(split(model), lr)
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    start, spent = time.process_time(), 0.0
    for step, batch in enumerate(batches(texts[0], seed, steps)):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        warm = max(1, steps // 10)
        turn = 0.55 + 0.45 * math.cos(math.pi * max(0, step - warm) / (steps - warm))
        for optimizer, own in zip(optimizers, rates, strict=True):
            for group, rate in zip(optimizer.param_groups, own, strict=True):
                group["lr"] = rate * min((step + 1) / warm, turn)
        before = time.process_time()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        spent += time.process_time() - before
        if not math.isfinite(loss.item()):
            break
    seconds = time.process_time() - start
    model.eval()
    with torch.no_grad():
        held_out = [model(input_ids=batch, labels=batch).loss.item() for batch in batches(texts[1], 7, 20)]
    return {
        "contender": name, "lr": lr, "seed": seed, "steps": steps, "loss": statistics.mean(held_out),
        "state_bytes": state_bytes(optimizers), "trained": sum(p.numel() for p in model.parameters()),
        "seconds": round(seconds, 1), "optimizer_seconds": round(spent, 1), "load": os.getloadavg()[0],
    }  # fmt: skip


# -- results ----------------------------------------------------------------------------------------------------------


def done(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []


def keep(path: Path, row: dict[str, Any]) -> None:
    """Add a run to the file, while other processes do the same."""
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        said = {"hardware": "AMD EPYC VM, CPU, one thread a run", "torch": torch.__version__,
                "setting": {"width": WIDTH, "blocks": BLOCKS, "length": LENGTH, "batch": BATCH, "rank": RANK,
                            "refresh_every": REFRESH}, "runs": [*done(path), row]}  # fmt: skip
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)


def sweep_of(path: Path, name: str) -> dict[float, float]:
    """{rate: held-out loss} on the sweep's seed; a run that diverged counts as infinite."""
    rows = [row for row in done(path) if row["contender"] == name and row["seed"] == SWEEP_SEED]
    return {row["lr"]: row["loss"] if math.isfinite(row["loss"]) else math.inf for row in rows}


def table(path: Path) -> None:
    print("| optimizer | rate | loss, nats a byte | seeds | state, MB | trained, M | seconds | of it in step |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    rows = []
    for name in CONTENDERS:
        mine = [row for row in done(path) if row["contender"] == name and row["seed"] in SEEDS]
        if mine:
            swept = sweep_of(path, name)
            edge = " (edge)" if swept and mine[0]["lr"] in (min(swept), max(swept)) else ""
            rows.append((statistics.mean(row["loss"] for row in mine), name, edge, mine))
    for loss, name, edge, mine in sorted(rows):
        spread = statistics.stdev(row["loss"] for row in mine) if len(mine) > 1 else float("nan")
        print(
            f"| {name} | {mine[0]['lr']:g}{edge} | {loss:.3f} ± {spread:.3f} | {len(mine)} "
            f"| {mine[0]['state_bytes'] / 1e6:.2f} | {mine[0]['trained'] / 1e6:.2f} "
            f"| {statistics.mean(row['seconds'] for row in mine):.0f} "
            f"| {statistics.mean(row['optimizer_seconds'] for row in mine):.1f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--corpus", type=Path, default=Path("/usr/share/wordnet"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, default=0)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--lrs", help="rates to try in place of the contender's own, like 1e-3,3e-3")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.table:
        return table(args.out)
    torch.set_num_threads(1)
    texts = corpus(args.corpus)
    for name in args.contenders.split(","):
        if name not in CONTENDERS:
            raise SystemExit(f"'{name}' is no contender; there are {', '.join(CONTENDERS)}")
        known = {(row["contender"], row["lr"], row["seed"]) for row in done(args.out)}
        rates = [float(lr) for lr in args.lrs.split(",")] if args.lrs else list(CONTENDERS[name][1])
        plan = [(lr, SWEEP_SEED) for lr in rates] if args.sweep else []
        for lr, seed in plan:
            if (name, lr, seed) not in known:
                keep(args.out, run(name, lr, seed, texts, args.steps))
        swept = sweep_of(args.out, name)
        if args.seeds and not swept:
            raise SystemExit(f"{name} has no sweep in {args.out}; run it with --sweep first")
        for seed in SEEDS[: args.seeds]:
            best = min(swept, key=lambda lr: swept[lr])
            if (name, best, seed) not in known:
                keep(args.out, run(name, best, seed, texts, args.steps))
    table(args.out)
    return None


if __name__ == "__main__":
    main()
