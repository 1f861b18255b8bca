"""Memory, time and file size of `fallow.SHiRAConfig` beside PEFT's own SHiRA and LoRA, at equal trained parameters.

    python benchmarks/peft_adapters.py --out benchmarks/results/peft-adapters-epyc-1-thread.json

A GPT-2 of 6 layers and width 512 without dropout, all its linear layers adapted, AdamW. Memory: the peak of the bytes
alive during one step, beyond what is alive before it (`step`), and what the adapter, its gradients and the optimizer's
moments hold beside the model (`held`), by torch's allocator events. Times are taken round robin, one step of each after
the other: medians of the processor time of this process. SHiRA in PEFT takes no GPT-2 layers (`Conv1D`), so all get
`nn.Linear` in their place.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, ShiraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import fallow

RANK, BATCH, LENGTH = 16, 2, 64


def base() -> nn.Module:
    torch.manual_seed(0)
    rest = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=1024, n_embd=512, n_layer=6, n_head=8, **rest))
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Conv1D):
                linear = nn.Linear(child.weight.shape[0], child.nf)
                linear.weight.data.copy_(child.weight.data.T)
                linear.bias.data.copy_(child.bias.data)
                setattr(parent, name, linear)
    return model


def targets(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]


def configs() -> dict[str, Callable[[list[str]], PeftConfig]]:
    return {
        "fallow SHiRA": lambda names: fallow.SHiRAConfig(r=RANK, target_modules=names),
        "PEFT SHiRA": lambda names: ShiraConfig(r=RANK, target_modules=names),
        "PEFT LoRA": lambda names: LoraConfig(r=RANK, target_modules=names),
    }


class Case:
    def __init__(self, make: Callable[[list[str]], PeftConfig]) -> None:
        model = base()
        begun = time.process_time()
        self.model: PeftModel = get_peft_model(model, make(targets(model)))
        self.wrapping = time.process_time() - begun
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4, fused=True)
        self.ids = torch.randint(0, 1024, (BATCH, LENGTH))

    def step(self) -> None:
        self.model(self.ids, labels=self.ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def infer(self) -> None:
        with torch.no_grad():
            self.model(self.ids)


def alive(action: Callable[[], object]) -> tuple[int, int]:
    """(peak, left): bytes allocated and alive at the height of an action, and after it."""
    gc.collect()
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        action()
        gc.collect()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sums = list(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    return max(sums), sums[-1]


def timed(action: Callable[[], None]) -> float:
    begun = time.process_time()
    action()
    return time.process_time() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    torch.set_num_threads(1)
    bare = base().requires_grad_(False)
    total = sum(param.numel() * param.element_size() for param in bare.parameters())
    found: dict[str, dict[str, Any]] = {}
    cases: dict[str, Case] = {}
    for name, make in configs().items():
        made: list[Case] = []
        held = alive(lambda make=make, made=made: made.append(Case(make)))[1] - total
        case = cases[name] = made[0]
        case.step()
        moments = sum(
            value.numel() * value.element_size()
            for state in case.optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        )
        with tempfile.TemporaryDirectory() as folder:
            case.model.save_pretrained(folder)
            size = (Path(folder) / "adapter_model.safetensors").stat().st_size
        trained = case.model.get_nb_trainable_parameters()[0]
        found[name] = {
            "trained": trained, "held": held + moments, "step": alive(case.step)[0], "file": size,
            "wrapping_seconds": case.wrapping,
        }  # fmt: skip
    times: dict[str, dict[str, list[float]]] = {name: {"step": [], "inference": []} for name in cases}
    for _ in range(given.rounds):
        for name, case in cases.items():
            times[name]["step"].append(timed(case.step))
            times[name]["inference"].append(timed(case.infer))
    for name, taken in times.items():
        for kind, seconds in taken.items():
            found[name][f"{kind}_seconds"] = statistics.median(seconds)
    told = {"torch": torch.__version__, "model_bytes": total, "rounds": given.rounds, "cases": found, "times": times}
    for name, row in found.items():
        print(
            f"{name:13} {row['trained']:>8} trained, {row['held'] / 2**20:.1f} MiB held, "
            f"{row['step'] / 2**20:.1f} MiB and {1000 * row['step_seconds']:.0f} ms a step, "
            f"{1000 * row['inference_seconds']:.0f} ms without gradient, {row['file'] / 2**20:.2f} MiB in the file, "
            f"{1000 * row['wrapping_seconds']:.0f} ms to wrap"
        )
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
