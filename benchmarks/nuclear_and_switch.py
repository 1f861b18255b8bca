"""Two more times: the nuclear-norm term, and switching an adapter in a model against fusing and unfusing a LoRA.

    python benchmarks/nuclear_and_switch.py --step 1.1 --out benchmarks/results/nuclear-and-switch-epyc-1-thread.json

`--step` is the time of SaRA's step (seconds) that `selective_step.py` found, against which the term's share is told.
Times are processor time of this process on one thread, medians of alternating runs; on a GPU the synchronised clock.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import logging
from peft import LoraConfig, get_peft_model
from selective_step import FRACTION, SIZES
from torch import Tensor, nn

import fallow
from fallow.core.linalg import polar
from fallow.objectives.nuclear import NuclearNorm

SIDE = 1280


def clock(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def alternate(actions: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each action, one after the other, `rounds` times after one that does not count."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for count in range(rounds + 1):
        for name, action in actions.items():
            start = clock(device)
            action()
            if count:
                times[name].append(clock(device) - start)
    return times


def polar_against_svd(device: str) -> dict[str, Any]:
    """The polar factor of a masked 1280 x 1280 matrix, by products and by decomposition."""
    matrix = torch.randn(SIDE, SIDE, device=device) * (torch.rand(SIDE, SIDE, device=device) < FRACTION)

    def exact() -> Tensor:
        u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
        return u @ vt

    ours = polar(matrix)
    cosine = float(nn.functional.cosine_similarity(ours.view(-1), exact().view(-1), dim=0))
    times = alternate({"polar": lambda: polar(matrix), "svd": exact}, 2, device)
    return {"times": times, "cosine": cosine}


def term_of_a_step(device: str, steps: int) -> dict[str, Any]:
    """Seconds of the term in mode "one", layer by layer as drawn, on the 35 M UNet."""
    torch.manual_seed(0)
    net = UNet2DConditionModel(**SIZES["35m"]).to(device)
    optimizer = fallow.SaRA(net, fraction=FRACTION, lr=1e-4)
    term, slots = NuclearNorm(5e-3, "one"), list(optimizer.slots.values())
    times = []
    for _ in range(steps):
        start = clock(device)
        term.add(slots)
        times.append(clock(device) - start)
        for slot in slots:
            slot.proxy.grad = None
    return {"times": times, "layers": len(term.qualify(slots))}


def switching(device: str, rounds: int) -> dict[str, Any]:
    """Switch between two sparse adapters, and between two LoRAs of as many parameters fused into the weights."""
    torch.manual_seed(0)
    first = UNet2DConditionModel(**SIZES["35m"]).to(device)
    entries = 0
    adapters = fallow.Adapters(first)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("a", "b"):
            optimizer = fallow.Random(first, fraction=FRACTION, seed=ord(name))
            values = optimizer.masters()
            optimizer.put({key: value + 1e-3 * torch.randn_like(value) for key, value in values.items()})
            optimizer.save(Path(folder) / f"{name}.safetensors")
            entries = optimizer.trained_parameters
            optimizer.set_scale(0.0)
            optimizer.close()
        for name in ("a", "b"):
            adapters.add(name, Path(folder) / f"{name}.safetensors", scale=0.0)

    second = UNet2DConditionModel(**SIZES["35m"]).to(device)
    targets = [name for name, module in second.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]

    def counted(rank: int) -> int:
        total = 0
        for name, module in second.named_modules():
            if name in targets and isinstance(module, nn.Linear | nn.Conv2d):
                out, inputs = module.weight.shape[0], module.weight[0].numel()
                total += rank * (out + inputs)
        return total

    rank = max(1, round(entries / counted(1)))
    parameters = counted(rank)
    model: Any = get_peft_model(second, LoraConfig(r=rank, target_modules=targets, init_lora_weights=False), "a")
    model.add_adapter("b", LoraConfig(r=rank, target_modules=targets, init_lora_weights=False))
    state = {"sparse": "a", "lora": "a"}
    adapters.set_scales({"a": 1.0})
    model.set_adapter("a")
    model.merge_adapter()

    def other(kind: str) -> str:
        state[kind] = "b" if state[kind] == "a" else "a"
        return state[kind]

    def sparse() -> None:
        adapters.switch(other("sparse"))

    def lora() -> None:
        model.unmerge_adapter()
        model.set_adapter(other("lora"))
        model.merge_adapter()

    times = alternate({"sparse": sparse, "lora": lora}, rounds, device)
    return {"times": times, "entries": entries, "lora_rank": rank, "lora_parameters": parameters}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", type=float, required=True, help="seconds of a step")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    if given.device == "cpu":
        torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    term, factor = term_of_a_step(given.device, 30), polar_against_svd(given.device)
    switch = switching(given.device, 7)
    median = {
        name: statistics.median(values)
        for name, values in {"term": term["times"], **factor["times"], **switch["times"]}.items()
    }
    mean = statistics.mean(term["times"])  # the layer is drawn anew in each step, so the share is that of the mean
    limits = [
        ("share of a step, mode 'one'", mean / given.step, "<=", 0.05),
        ("exact SVD / polar factor, 1280 x 1280", median["svd"] / median["polar"], ">=", 10),
        ("fusing and unfusing LoRA / switching", median["lora"] / median["sparse"], ">=", 5),
    ]
    told = [
        {
            "what": what, "value": value, "limit": f"{sign} {bound}",
            "holds": value <= bound if sign == "<=" else value >= bound,
        }
        for what, value, sign, bound in limits
    ]  # fmt: skip
    for limit in told:
        print(
            f"{limit['what']}: {limit['value']:.3f} ({limit['limit']}) {'holds' if limit['holds'] else 'does NOT hold'}"
        )
    facts = {"torch": torch.__version__, "device": given.device, "threads": torch.get_num_threads(), "step": given.step}
    results = {"term": {**term, "mean": mean}, "polar": factor, "switch": switch, "median_seconds": median}
    given.out.write_text(json.dumps({**facts, **results, "limits": told}, indent=1) + "\n")


if __name__ == "__main__":
    main()
