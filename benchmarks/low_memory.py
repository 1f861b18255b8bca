"""Memory and time of a training step by how the frozen base is kept, on one diffusers UNet of about 35 M parameters.

    python benchmarks/low_memory.py --out benchmarks/results/low-memory-epyc-1-thread.json
    python benchmarks/low_memory.py --device cuda --precision bf16 --out ...

Every way is a model of its own with the same random weights, batch 1, gradient checkpointing, SaRA on 10 % of the
entries or LoRA of rank 64. `bytes_between_steps` is what is alive between two steps (network, optimizer, gradients of
none), `peak` the most that was alive within one, both of tensors on the device: on the CPU by counting storages as
torch makes them, on a GPU by the caching allocator. Blocks in host memory are told apart (`host`); on the CPU "uploads"
are copies within main memory. Times are medians over the rounds, on a CPU of processor time.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

import fallow
from fallow.analysis.memory import LiveBytes
from fallow.core.quantized import stored
from fallow.recipes.low_memory import keep

UNET: dict[str, Any] = {
    "sample_size": 32, "block_out_channels": (128, 256, 384), "cross_attention_dim": 384, "attention_head_dim": 8,
    "layers_per_block": 1, "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {
    "sara float32": {},
    "sara bf16": {"base": "bf16"},
    "sara fp8": {"base": "fp8"},
    "sara int8": {"base": "int8"},
    "sara nf4": {"base": "nf4"},
    "sara float32, swap": {"swap": 14},
    "sara nf4, swap": {"base": "nf4", "swap": 14},
    "sara nf4, swap, fused": {"base": "nf4", "swap": 14, "fused": True},
    "lora float32": {"method": "lora"},
    "lora nf4": {"method": "lora", "base": "nf4"},
    "lora nf4, swap": {"method": "lora", "base": "nf4", "swap": 14},
}


class Way:
    """One way to keep the base: a network in training and its step."""

    def __init__(self, settings: dict[str, Any], device: str, autocast: torch.dtype | None) -> None:
        self.device, self.autocast = device, autocast or (torch.bfloat16 if settings.get("base") == "bf16" else None)
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(1)
        shapes = ((1, 4, 32, 32), (1, 77, 384))
        self.latents, self.text = (torch.randn(*shape, generator=generator).to(device) for shape in shapes)
        self.live = LiveBytes()
        with self.counted():
            self.network = UNet2DConditionModel(**UNET).to(device).train()
            swap = settings.get("swap", 0)
            if not swap:
                self.network.enable_gradient_checkpointing()
            self.swap = keep(self.network, settings.get("base", "float32"), swap, torch.device(device))
            self.optimizer = self.trained(settings)
        self.entries = sum(p.numel() for group in self.optimizer.param_groups for p in group["params"])

    def counted(self) -> Any:
        return self.live if self.device == "cpu" else torch.enable_grad()

    def trained(self, settings: dict[str, Any]) -> torch.optim.Optimizer:
        if settings.get("method") == "lora":
            self.network.requires_grad_(False)
            targets = ["to_q", "to_k", "to_v", "to_out.0"]
            inject_adapter_in_model(LoraConfig(r=64, lora_alpha=64, target_modules=targets), self.network)
            return torch.optim.AdamW([p for p in self.network.parameters() if p.requires_grad], lr=1e-4)
        return fallow.SaRA(self.network, fraction=0.1, lr=1e-4, in_backward=settings.get("fused", False))

    def step(self) -> float:
        """One step; returns its loss."""
        with torch.autocast(self.device, self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            predicted: Tensor = self.network(self.latents, torch.tensor(500, device=self.device), self.text).sample
        loss = predicted.float().square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def host(self) -> int:
        """Bytes of codes that wait in host memory."""
        held = [weight.store.host or {} for _, weight in stored(self.network)]
        return sum(part.nbytes for parts in held for part in parts.values())

    def memory(self) -> tuple[int, int]:
        """Bytes alive between two steps, and the most within one."""
        for _ in range(2):
            with self.counted():
                self.step()
        gc.collect()
        if self.device != "cpu":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            between = torch.cuda.memory_allocated()
            self.step()
            torch.cuda.synchronize()
            return between, torch.cuda.max_memory_allocated()
        # What waits in host memory is of the same kind as what is on the device here, and counted apart.
        waiting = self.host()
        between = self.live.now
        self.live.peak = between
        with self.live:
            self.step()
        return between - waiting, self.live.peak - waiting

    def timed(self) -> float:
        if self.device != "cpu":
            torch.cuda.synchronize()
            begun = time.perf_counter()
            self.step()
            torch.cuda.synchronize()
            return time.perf_counter() - begun
        begun = time.process_time()
        self.step()
        return time.process_time() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="*", default=list(WAYS))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    autocast = torch.bfloat16 if given.precision == "bf16" else None
    figures: dict[str, dict[str, Any]] = {}
    for name in given.ways:
        gc.collect()
        way = Way(WAYS[name], given.device, autocast)
        between, peak = way.memory()
        seconds = [way.timed() for _ in range(given.rounds)]
        figures[name] = {
            "bytes_between_steps": between, "peak": peak, "host": way.host(), "trained": way.entries,
            "seconds": statistics.median(seconds), "each": seconds,
        }  # fmt: skip
        told = f"{between / 1e6:8.1f} MB between, {peak / 1e6:8.1f} MB peak, {way.host() / 1e6:7.1f} MB in host memory"
        print(f"{name:24} {told}, {figures[name]['seconds']:.2f} s", flush=True)
        del way
    if given.out:
        parameters = sum(p.numel() for p in _bare().parameters())
        hardware = torch.cuda.get_device_name() if given.device != "cpu" else "CPU, 1 thread"
        whole = {
            "hardware": hardware, "torch": torch.__version__, "parameters": parameters, "precision": given.precision,
            "ways": figures,
        }  # fmt: skip
        given.out.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def _bare() -> nn.Module:
    with torch.device("meta"):
        return UNet2DConditionModel(**UNET)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
