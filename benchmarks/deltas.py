"""Time and memory of each weight parameterization beside PEFT's LoRA of as many trained numbers and PEFT's own version.

    python benchmarks/deltas.py --out benchmarks/results
    python benchmarks/deltas.py --model transformer --methods kasa randlora --repeats 9

Networks of random weights, adapted through `get_peft_model`, batch 1, no dropout, no optimizer: a ViT of 6 layers and
width 768 (257 tokens; all its linear layers), in float32 and in bfloat16 (adapters in float32, both hosts' way), and a
diffusers UNet of 35 M parameters (32 x 32 latents; attention and feed-forward, and the convolutions of its residual
blocks for methods that take some). Against PEFT's own version, which takes linear layers only, both have those only.

Times are processor time of this process on one thread. Contenders take turns, so that what else the machine does hits
them alike: a ratio is the median of the turns' ratios. Memory is the peak of the bytes alive in a step beyond the
base's weights, by the allocator's events, with what the adapter holds, activations and gradients. A method's own term
of the objective is in the step, for both.

`--methods` names slugs or variants; figures of others in a result file stay as they are.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from deltas_cases import PEERS_OF_CONVS, Setting, Variant, kasa_term, lora, variants
from deltas_measures import Contender, ratio, turns
from peft import get_peft_model

from fallow.core.errors import FallowError
from fallow.core.files import atomic_write

MODELS = {
    "transformer": ("transformer", torch.float32),
    "transformer-bf16": ("transformer", torch.bfloat16),
    "unet": ("unet", torch.float32),
}


class Bench:
    """All cases of one network. LoRA's contenders are kept, by rank and layers, since many are compared with them."""

    def __init__(self, setting: Setting, repeats: int) -> None:
        self.setting, self.repeats = setting, repeats
        self.kept: dict[tuple[int, int], Contender] = {}
        self.units: dict[int, int] = {}

    def lora_like(self, names: list[str], trained: int) -> Contender:
        """PEFT's LoRA on these layers, with the rank that comes nearest to so many trained numbers."""
        key = hash(tuple(names))
        if key not in self.units:
            self.units[key] = get_peft_model(self.setting.base(), lora(names, 1)).get_nb_trainable_parameters()[0]
        rank = max(1, round(trained / self.units[key]))
        if (key, rank) not in self.kept:
            self.kept[key, rank] = Contender(f"PEFT LoRA r={rank}", self.setting, lora(names, rank))
        return self.kept[key, rank]

    def cases(self, variant: Variant) -> list[dict[str, Any]]:
        """One on the usual layers; where they have convolutions and PEFT's own version takes none, another for it."""
        convs = variant.convs and self.setting.kind == "unet"
        together = not convs or variant.label in PEERS_OF_CONVS
        found = [self.case(variant, convs, alike=True, own=together)]
        if not together and variant.peer is not None:
            found.append(self.case(variant, False, alike=False, own=True))
        return found

    def case(self, variant: Variant, convs: bool, alike: bool, own: bool) -> dict[str, Any]:
        names = self.setting.targets(convs, pictures=variant.method == "wara-spatial")
        ours = Contender(variant.label, self.setting, variant.config(names), variant.context, variant.term)
        others = [("lora", self.lora_like(names, ours.trained))] if alike else []
        if own and variant.peer is not None and variant.label != "lora":
            term = kasa_term if variant.method == "kasa" else (lambda net: None)
            others.append(("own", Contender(variant.peer_name, self.setting, variant.peer(names), term=term)))
        taken = turns([ours, *(other for _, other in others)], self.repeats)
        return {
            "variant": variant.label, "method": variant.method, "options": variant.options,
            "layers": len(names), "convolutions": convs, **told(ours, taken[0]),
            "against": [
                {"kind": kind, "name": other.name, **told(other, seconds), **ratio(taken[0], seconds),
                 "peak_ratio": ours.peak / other.peak}
                for (kind, other), seconds in zip(others, taken[1:], strict=True)
            ],
            "load": os.getloadavg()[0],
        }  # fmt: skip


def told(contender: Contender, seconds: list[float]) -> dict[str, Any]:
    return {
        "trained": contender.trained, "peak": contender.peak, "seconds": statistics.median(seconds), "each": seconds,
    }  # fmt: skip


def row(case: dict[str, Any]) -> str:
    """A line of the printed table."""
    if "refused" in case:
        return f"{case['variant']:20} refused: {case['refused']}"
    where = "linear, conv" if case["convolutions"] else "linear"
    line = f"{case['variant']:20} {where:13} {case['trained']:>9} {case['seconds']:7.3f} s {case['peak'] / 1e6:7.1f} MB"
    for other in case["against"]:
        line += (
            f"  | {other['name']:16} {other['trained']:>9}: time {other['time_ratio']:.3f} "
            f"(fastest {other['time_ratio_of_fastest']:.3f}), peak {other['peak_ratio']:.3f}"
        )
    return line


def hardware() -> dict[str, Any]:
    """Where and with what the figures were taken."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    packages = ("torch", "peft", "transformers", "diffusers")
    return {
        "hardware": f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores",
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def merged(place: Path, fresh: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cases of a result file, in its order, with those measured now in the place of their variants' older ones."""
    old = json.loads(place.read_text(encoding="utf-8"))["cases"] if place.exists() else []
    order = dict.fromkeys(case["variant"] for case in (*old, *fresh))
    now = {case["variant"] for case in fresh}
    return [case for name in order for case in (fresh if name in now else old) if case["variant"] == name]


def write(place: Path, told: dict[str, Any]) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(place) as part:
        part.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def run(model: str, methods: list[str] | None, repeats: int, place: Path | None) -> bool:
    """Measure and write after each method; False where a case failed otherwise than by an error of ours."""
    kind, dtype = MODELS[model]
    setting = Setting(kind, dtype)
    bench, fresh, well = Bench(setting, repeats), [], True
    parameters = sum(param.numel() for param in setting.original.parameters())
    print(f"\n{model}: {parameters / 1e6:.1f} M parameters, {dtype}, load {os.getloadavg()[0]:.1f}", flush=True)
    for variant in variants(setting, methods):
        gc.collect()
        try:
            cases = bench.cases(variant)
        except FallowError as error:
            cases = [{"variant": variant.label, "method": variant.method, "convolutions": False, "refused": str(error)}]
        except Exception:  # a peer's failure must not cost the figures of all others
            traceback.print_exc()
            well = False
            continue
        fresh += cases
        print("\n".join(map(row, cases)), flush=True)
        if place is not None:
            whole = {**hardware(), "model": model, "parameters": parameters, "threads": torch.get_num_threads()}
            write(place, {**whole, "repeats": repeats, "cases": merged(place, fresh)})
    return well


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--methods", nargs="*", help="slugs or labels of variants; all by default")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each contender")
    parser.add_argument("--out", type=Path, help="a folder for the result files")
    parser.add_argument("--tag", default="epyc-1-thread", help="the hardware, in the names of the files")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    gc.freeze()  # the packages' own objects, which collecting takes half a second to look through
    well = True
    for model in given.model:
        place = given.out / f"deltas-{model}-{given.tag}.json" if given.out else None
        well &= run(model, given.methods, given.repeats, place)
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
