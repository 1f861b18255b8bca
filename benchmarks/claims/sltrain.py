"""SLTrain against full rank, low rank and sparse alone, in pretraining a character-level transformer from scratch.

python benchmarks/claims/sltrain.py --seeds 3

Text: sources of Python's standard library, the last tenth held out. 2 blocks of width 128; every linear layer of
attention and MLP has the form named, at rank 16 (an eighth of the width) and density 5%, the rest is trained in full.
Each form runs at its own best learning rate, chosen on a seed that is not reported. `loss`: nats a character, held out.
"""

from __future__ import annotations

import ast
import inspect
import json
import statistics
import tarfile
import time
import typing

import torch
import torch.nn.functional as F
from protocol import RESULTS, arguments
from torch import Tensor, nn

from fallow.deltas.sltrain import SLTrainLinear, sltrain

WIDTH, HEADS, LENGTH, BATCH, STEPS = 128, 4, 64, 16, 300
RANK, DENSITY = 16, 0.05
LRS = (1e-3, 3e-3, 1e-2, 3e-2)
FORMS = ("full", "low rank", "SLTrain", "sparse")


def text() -> Tensor:
    """Character codes (n,), at most 127."""
    sources = "".join(inspect.getsource(module) for module in (ast, inspect, json.decoder, tarfile, typing, statistics))
    return torch.frombuffer(bytearray(sources.encode("ascii", "ignore")), dtype=torch.uint8).long()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in "qkvo"})
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (self.attn[name](h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for name in "qkv")
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.attn["o"](mixed)
        return x + self.mlp(self.norm2(x))


class Characters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(128, WIDTH), nn.Embedding(LENGTH, WIDTH)
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.place.weight, std=0.02)
        self.blocks, self.norm = nn.Sequential(Block(), Block()), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 128)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.blocks(self.token(x) + self.place.weight)))
        return logits


def model_of(form: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = Characters()
    if form == "low rank":
        for name, layer in list(model.named_modules()):
            if isinstance(layer, nn.Linear) and ("attn" in name or "mlp" in name):
                parent, _, last = name.rpartition(".")
                pair = nn.Sequential(
                    nn.Linear(layer.in_features, RANK, bias=False), nn.Linear(RANK, layer.out_features)
                )
                setattr(model.get_submodule(parent), last, pair)
    elif form != "full":
        sltrain(model, RANK if form == "SLTrain" else 0, DENSITY, alpha=float(RANK), seed=seed)
    return model


def run(form: str, lr: float, seed: int) -> dict[str, float]:
    data = text()
    train, held_out = data[: len(data) * 9 // 10], data[len(data) * 9 // 10 :]
    model = model_of(form, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    falling = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=STEPS, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    start = time.process_time()
    for _ in range(STEPS):
        at = torch.randint(len(train) - LENGTH - 1, (BATCH, 1), generator=generator) + torch.arange(LENGTH + 1)
        chunk = train[at]
        F.cross_entropy(model(chunk[:, :-1]).flatten(0, 1), chunk[:, 1:].flatten()).backward()
        optimizer.step()
        falling.step()
        optimizer.zero_grad()
    seconds = time.process_time() - start
    windows = held_out[: (len(held_out) - 1) // LENGTH * LENGTH + 1]
    with torch.no_grad():
        loss = F.cross_entropy(model(windows[:-1].view(-1, LENGTH)).flatten(0, 1), windows[1:])
    ranks = [int(torch.linalg.matrix_rank(m.weight)) for m in model.modules() if isinstance(m, SLTrainLinear)]
    return {
        "loss": float(loss),
        "trained": sum(p.numel() for p in model.parameters()),
        "seconds": seconds,
        "lowest_rank": min(ranks, default=0),
    }


if __name__ == "__main__":
    told = arguments(__doc__, seeds=3)
    torch.set_num_threads(1)
    rows = {}
    for form in FORMS:
        sweep = {lr: run(form, lr, 1000)["loss"] for lr in LRS}
        lr = min(sweep, key=lambda rate: sweep[rate])
        runs = [run(form, lr, seed) for seed in range(told.seeds)]
        losses = [figures["loss"] for figures in runs]
        spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
        rows[form] = {"lr": lr, "at_edge": lr in (LRS[0], LRS[-1]), "sweep": sweep, "runs": runs}
        print(
            f"{form:18} lr {lr:<7g}{'*' if rows[form]['at_edge'] else ' '} loss {statistics.fmean(losses):.3f} ± "
            f"{spread:.3f}  trained {runs[0]['trained']:>7}  {statistics.fmean(r['seconds'] for r in runs):5.1f} s  "
            f"least rank {min(r['lowest_rank'] for r in runs)}",
            flush=True,
        )
    (RESULTS / "claims-sltrain.json").write_text(
        json.dumps({"name": "sltrain", "torch": torch.__version__, "forms": rows}, indent=1) + "\n"
    )
