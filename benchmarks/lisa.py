"""Memory and time of a training step with LISA, full fine-tuning and LoRA, on a LLaMA-like model of 29.5 M numbers.

    python benchmarks/lisa.py --out benchmarks/results/lisa-epyc-1-thread.json

Eight blocks of width 512, random weights, 4 sequences of 64 tokens, AdamW. Each way makes `--steps` steps, LISA with
an interval of 4 so that blocks change meanwhile. `states`: the bytes of the moments at the end; `between`: what is
alive between two steps, the weights included; `peak`: the most within the steps, by counting storages as torch makes
them (on a GPU by the caching allocator). `seconds`: the median step, of processor time on a CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import fallow
from fallow.analysis.memory import LiveBytes

CONFIG: dict[str, Any] = {
    "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8,
    "max_position_embeddings": 64,
}  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "LISA 2": {"lisa": {"active": 2}},
    "LISA 2, states kept": {"lisa": {"active": 2, "state": "keep"}},
    "LISA 1": {"lisa": {"active": 1}},
    "LISA 2, checkpointed": {"lisa": {"active": 2}, "checkpointing": True},
    "LISA 2, ends frozen": {"lisa": {"active": 2, "train_embeddings": False, "train_head": False}},
    "LoRA r=16": {"lora": 16},
}


def tensors(states: Any) -> int:
    return sum(v.nbytes for state in states.values() for v in state.values() if isinstance(v, torch.Tensor))


def measured(settings: dict[str, Any], device: str, steps: int) -> dict[str, Any]:
    torch.manual_seed(0)
    live = LiveBytes()
    with live:
        model: nn.Module = LlamaForCausalLM(LlamaConfig(**CONFIG)).to(device).train()
        if settings.get("checkpointing"):
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if rank := settings.get("lora"):
            fallow.attach(model, "lora", rank=rank)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
        if "lisa" in settings:
            fallow.LISA(model, optimizer, interval=4, **settings["lisa"])
    ids = torch.randint(CONFIG["vocab_size"], (4, 64), generator=torch.Generator().manual_seed(1)).to(device)
    clock = time.process_time if device == "cpu" else time.perf_counter

    def step() -> float:
        begun = clock()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device != "cpu":
            torch.cuda.synchronize()
        return clock() - begun

    peak = 0
    if device == "cpu":
        with live:
            for _ in range(steps):
                step()
        between, peak = live.now, live.peak
    else:
        torch.cuda.reset_peak_memory_stats()
        for _ in range(steps):
            step()
        between, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    return {
        "weights": sum(param.nbytes for param in model.parameters()),
        "states": tensors(optimizer.state),
        "between": between,
        "peak": peak,
        "seconds": statistics.median(step() for _ in range(steps)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    figures = {}
    print(f"{'':26}" + "".join(f"{key:>12}" for key in ("states", "between", "peak", "seconds")))
    for way in given.ways:
        found = figures[way] = measured(WAYS[way], given.device, given.steps)
        cells = [f"{found[key] / 2**20:9.1f} MB" for key in ("states", "between", "peak")]
        print(f"{way:26}" + "".join(cells) + f"{found['seconds']:12.3f}", flush=True)
    if given.out:
        told = {"device": given.device, "torch": torch.__version__, "threads": torch.get_num_threads()}
        given.out.write_text(
            json.dumps({**told, "model": CONFIG, "steps": given.steps, "ways": figures}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
