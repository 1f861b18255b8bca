"""Memory and time of a training step: SaRA's ways, full AdamW fine-tuning and PEFT's LoRA, on one diffusers UNet.

    python benchmarks/selective_step.py --out benchmarks/results/selective-step-epyc-1-thread.json
    python benchmarks/selective_step.py --device cuda --size sd15 --dtype bfloat16 --out ...      # or --size sdxl

Every variant is a model of its own with the same random weights. Times are taken round robin, one step of each variant
after the other, and reported as medians over the rounds: on a CPU the processor time of this process (`seconds`, on one
thread what the step takes on a free machine) beside the wall clock (`wall`); on a GPU the synchronised wall clock.
Memory is the peak of the bytes alive in a step, everything that the variant made since its model was built included:
on a CPU by torch's allocator events, on a GPU by the caching allocator's figures.

The limits are those that this project set itself for the small size; each is printed with what was measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor, nn

import fallow

Step = Callable[[], None]

SIZES: dict[str, dict[str, Any]] = {
    "35m": {
        "sample_size": 32, "block_out_channels": (128, 256, 384), "cross_attention_dim": 384, "attention_head_dim": 8,
        "layers_per_block": 1, "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    },
    "sd15": {"sample_size": 64, "cross_attention_dim": 768},
    "sdxl": {
        "sample_size": 128, "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20), "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}  # fmt: skip
FRACTION, RANK = 0.1, 64
WAYS: dict[str, dict[str, Any]] = {
    "sara": {},
    "sara row_chunk": {"row_chunk": "1MiB"},
    "sara in_backward": {"in_backward": True},
    "sara 8-bit": {"state_bits": 8},
    "sara leanest": {"row_chunk": "1MiB", "in_backward": True, "state_bits": 8},
}


class Case:
    """One setting: how the UNet is built and what it is fed."""

    def __init__(self, size: str, batch: int, checkpointing: bool, device: str, dtype: torch.dtype) -> None:
        self.size, self.batch, self.checkpointing, self.device, self.dtype = size, batch, checkpointing, device, dtype
        side, width = SIZES[size]["sample_size"], SIZES[size]["cross_attention_dim"]
        generator = torch.Generator().manual_seed(1)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, dtype)

        self.latents, self.text, self.noise = draw(batch, 4, side, side), draw(batch, 77, width), draw(1)
        self.latents.requires_grad_()
        self.extra: dict[str, Any] = {}
        if size == "sdxl":
            times = torch.zeros(batch, 6, device=device, dtype=dtype)
            self.extra = {"added_cond_kwargs": {"text_embeds": draw(batch, 1280), "time_ids": times}}

    def model(self) -> nn.Module:
        from diffusers import UNet2DConditionModel

        torch.manual_seed(0)
        net = UNet2DConditionModel(**SIZES[self.size]).to(self.device, self.dtype).train()
        if self.checkpointing:
            net.enable_gradient_checkpointing()
        return net

    def backward(self, net: nn.Module) -> None:
        at = torch.full((self.batch,), 500, device=self.device)
        net(self.latents, at, self.text, **self.extra).sample.float().square().mean().backward()
        self.latents.grad = None


def frozen(case: Case, net: nn.Module) -> Step:
    net.requires_grad_(False)
    return lambda: case.backward(net)


def gradients(case: Case, net: nn.Module) -> Step:
    def step() -> None:
        case.backward(net)
        net.zero_grad()

    return step


def adamw(case: Case, net: nn.Module) -> Step:
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        case.backward(net)
        optimizer.step()
        optimizer.zero_grad()

    return step


def lora(case: Case, net: nn.Module) -> Step:
    from peft import LoraConfig, inject_adapter_in_model

    names = [name for name, module in net.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    net.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names), net)
    factors = [param for param in net.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=1e-4, fused=True)

    def step() -> None:
        case.backward(net)
        optimizer.step()
        optimizer.zero_grad()

    return step


def sara(**options: Any) -> Callable[[Case, nn.Module], Step]:
    def make(case: Case, net: nn.Module) -> Step:
        optimizer = fallow.SaRA(net, fraction=FRACTION, lr=1e-4, **options)

        def step() -> None:
            case.backward(net)
            optimizer.step()
            optimizer.zero_grad()

        return step

    return make


VARIANTS: dict[str, Callable[[Case, nn.Module], Step]] = {
    "frozen": frozen, "gradients": gradients, "adamw": adamw, "lora": lora,
    **{name: sara(**options) for name, options in WAYS.items()},
}  # fmt: skip


def measure_memory(case: Case, make: Callable[[Case, nn.Module], Step]) -> dict[str, int]:
    """{"peak", "kept"}: bytes alive beyond the model at the height of the third step, and after it."""
    net = case.model()
    gc.collect()
    if case.device != "cpu":
        torch.cuda.synchronize()
        start = torch.cuda.memory_allocated()
        step = make(case, net)
        step()
        step()
        torch.cuda.reset_peak_memory_stats()
        step()
        return {
            "peak": torch.cuda.max_memory_allocated() - start,
            "kept": torch.cuda.memory_allocated() - start,
        }
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step = make(case, net)
        step()
        step()
        with torch.profiler.record_function("the measured step"):
            step()
    events = profile.profiler.kineto_results.events()
    window = next(event for event in events if event.name() == "the measured step")
    first, last = window.start_ns(), window.start_ns() + window.duration_ns()
    alive = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        if event.start_ns() > last:
            break
        alive += event.nbytes()
        if event.start_ns() >= first:
            peak = max(peak, alive)
    return {"peak": peak, "kept": alive}


def measure_time(case: Case, rounds: int, chosen: list[str]) -> dict[str, dict[str, list[float]]]:
    """{variant: {"seconds": [...], "wall": [...]}}, one of each round."""
    steps = {name: VARIANTS[name](case, case.model()) for name in chosen}
    times: dict[str, dict[str, list[float]]] = {name: {"seconds": [], "wall": []} for name in chosen}
    for count in range(rounds + 1):
        for name, step in steps.items():
            wall, processor = time.perf_counter(), time.process_time()
            step()
            if case.device != "cpu":
                torch.cuda.synchronize()
            wall, processor = time.perf_counter() - wall, time.process_time() - processor
            if count:  # the first makes the moments
                times[name]["wall"].append(wall)
                times[name]["seconds"].append(processor if case.device == "cpu" else wall)
    return times


def run(case: Case, rounds: int, chosen: list[str]) -> dict[str, Any]:
    net = case.model()
    trained = round(FRACTION * sum(param.numel() for param in net.parameters()))
    largest = max(param.numel() * param.element_size() for param in net.parameters())
    print(f"\n{case.size}, batch {case.batch}, checkpointing {case.checkpointing}, {case.dtype}, {case.device}")
    print(f"{trained} entries trained, largest dense gradient {largest / 1e6:.1f} MB")
    del net
    memory = {name: measure_memory(case, VARIANTS[name]) for name in chosen}
    times = measure_time(case, rounds, chosen)
    medians = {name: statistics.median(row["seconds"]) for name, row in times.items()}
    for name in chosen:
        peak, kept = memory[name]["peak"] / 1e6, memory[name]["kept"] / 1e6
        extra = peak - memory["frozen"]["peak"] / 1e6
        print(f"{name:18s} {medians[name]:8.3f} s   peak {peak:8.1f} MB   extra {extra:8.1f} MB   kept {kept:7.1f} MB")
    limits = [
        limit
        for name in chosen
        if name.startswith("sara")
        for limit in limits_of(name, memory, medians, trained, largest)
    ]
    for limit in limits:
        verdict = "holds" if limit["holds"] else "does NOT hold"
        print(f"  {limit['variant']:18s} {limit['what']}: {limit['ratio']:.3f} (<= {limit['limit']}) {verdict}")
    return {
        "size": case.size, "batch": case.batch, "checkpointing": case.checkpointing, "dtype": str(case.dtype),
        "trained": trained, "largest_gradient_bytes": largest, "memory": memory, "median_seconds": medians,
        "times": times, "limits": limits,
    }  # fmt: skip


def limits_of(
    name: str, memory: dict[str, dict[str, int]], medians: dict[str, float], trained: int, largest: int
) -> list[dict[str, Any]]:
    extra = {other: memory[other]["peak"] - memory["frozen"]["peak"] for other in memory}
    ratios = [
        ("extra memory / (16 bytes an entry + largest gradient)", extra[name] / (16 * trained + largest), 1.2),
        ("extra memory / full AdamW's", extra[name] / extra["adamw"], 0.4),
        ("step time / full AdamW's", medians[name] / medians["adamw"], 0.75),
        ("step time / LoRA's", medians[name] / medians["lora"], 1.0),
        ("step time / forward and backward with all weight gradients", medians[name] / medians["gradients"], 1.1),
    ]
    return [
        {"variant": name, "what": what, "ratio": ratio, "limit": limit, "holds": ratio <= limit}
        for what, ratio, limit in ratios
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="35m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, nargs="*", choices=[1, 4], default=[1, 4])
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    if given.device == "cpu":
        torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    dtype = getattr(torch, given.dtype)
    every = {1: True, 4: False}  # batch size: with gradient checkpointing
    cases = [Case(given.size, batch, every[batch], given.device, dtype) for batch in given.batches]
    told = {
        "torch": torch.__version__, "device": given.device, "threads": torch.get_num_threads(), "fraction": FRACTION,
        "lora_rank": RANK, "rounds": given.rounds,
    }  # fmt: skip
    results = []
    for case in cases:
        results.append(run(case, given.rounds, given.variants))
        given.out.write_text(json.dumps({**told, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
