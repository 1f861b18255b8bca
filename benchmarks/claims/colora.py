"""CoLoRA's ranks against even and shuffled ones, at equal numbers, where a restoration network meets a new degradation.

python benchmarks/claims/colora.py --seeds 3

A small UNet (32 and 64 channels, 94 thousand numbers, global residual) is trained to undo random chains of blur and
noise on 24 x 24 crops of one photograph, scikit-learn's "china", then adapted to a veil of haze with noise, seen on 32
crops of its "flower", by LoRA in all its layers at 7 % of the weights; judged by PSNR on other crops of "flower".
Contributions are those of 16 of the 32 crops, between the pretrained network and one that was trained on all weights
for 60 steps.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from protocol import arguments, table
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

import fallow
from fallow.budgets.uniform import Uniform

SIDE, STEPS, SHARE = 24, 200, 0.07
LRS = (3e-3, 1e-2, 3e-2)
RATES = {
    "CoLoRA": LRS,
    "shuffled scores": LRS,
    "even shares": (*LRS, 1e-1),
    "rank 3 in all": (*LRS, 1e-1),  # more numbers than the others
    "all weights": (1e-3, 3e-3, 1e-2),
}


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.above = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.down, self.middle = nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.Conv2d(64, 64, 3, padding=1)
        self.up, self.below = nn.Conv2d(64, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.last = nn.Conv2d(32, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        high = self.above(self.first(x).relu()).relu()
        low = self.middle(self.down(high).relu()).relu()
        joined = self.up(F.interpolate(low, scale_factor=2.0)).relu() + high
        return x + self.last(self.below(joined).relu())


@lru_cache
def photograph(name: str) -> Tensor:
    """(3, H, W) in [0, 1], at half of its size."""
    pixels = torch.tensor(load_sample_image(name)).permute(2, 0, 1).float() / 255
    return F.avg_pool2d(pixels[None], 2)[0]


def crops(name: str, count: int, generator: torch.Generator) -> Tensor:
    picture = photograph(name)
    height, width = picture.shape[1:]
    tops = torch.randint(height - SIDE, (count,), generator=generator).tolist()
    lefts = torch.randint(width - SIDE, (count,), generator=generator).tolist()
    return torch.stack([picture[:, t : t + SIDE, x : x + SIDE] for t, x in zip(tops, lefts, strict=True)])


def noise(x: Tensor, generator: torch.Generator) -> Tensor:
    size = 0.02 + 0.13 * torch.rand(len(x), 1, 1, 1, generator=generator)
    return (x + size * torch.randn(x.shape, generator=generator)).clamp(0, 1)


def blur(x: Tensor, generator: torch.Generator) -> Tensor:
    width = 0.4 + 1.2 * float(torch.rand((), generator=generator))
    kernel = torch.exp(-(torch.arange(-3, 4) ** 2) / (2 * width**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, 7)
    x = F.conv2d(F.pad(x, (3, 3, 0, 0), "replicate"), kernel[:, :, None, :], groups=3)
    return F.conv2d(F.pad(x, (0, 0, 3, 3), "replicate"), kernel[:, :, :, None], groups=3)


def chain(x: Tensor, generator: torch.Generator) -> Tensor:
    """One or both, in either order."""
    order = torch.randperm(2, generator=generator)[: 1 + int(torch.randint(2, (), generator=generator))]
    for place in order.tolist():
        x = (noise, blur)[place](x, generator)
    return x


def haze(x: Tensor, generator: torch.Generator) -> Tensor:
    """A veil that is denser towards one side of the crop, then noise."""
    dense = 0.3 + 0.4 * torch.rand(len(x), 1, 1, 1, generator=generator)
    slope = torch.linspace(-0.2, 0.2, SIDE).view(1, 1, 1, SIDE)
    light = (1 - dense - slope).clamp(0.1, 1)
    veiled = x * light + 0.85 * (1 - light)
    return (veiled + 0.03 * torch.randn(x.shape, generator=generator)).clamp(0, 1)


def difference(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().sum()


def learn(model: nn.Module, params: list[nn.Parameter], lr: float, steps: int, draw: Any) -> None:
    optimizer = torch.optim.Adam(params, lr)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        batch = draw()
        (difference(model, batch) / batch[1].numel()).backward()
        optimizer.step()
        optimizer.zero_grad()


@lru_cache
def pretrained(seed: int) -> UNet:
    torch.manual_seed(seed)
    model, generator = UNet(), torch.Generator().manual_seed(seed)

    def draw() -> tuple[Tensor, Tensor]:
        clean = crops("china.jpg", 8, generator)
        return chain(clean, generator), clean

    learn(model, list(model.parameters()), 1e-3, 800, draw)
    return model.eval()


@lru_cache
def task(seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed + 77)
    clean = {
        name: crops("flower.jpg", count, generator) for name, count in (("train", 32), ("held", 64), ("test", 128))
    }
    return {name: (haze(x, generator), x) for name, x in clean.items()}


@lru_cache
def scores(seed: int) -> Any:
    """What each layer contributed on the way to a short full run."""
    model, (x, y) = copy.deepcopy(pretrained(seed)), task(seed)["train"]
    generator = torch.Generator().manual_seed(seed)
    learn(model, list(model.parameters()), 1e-3, 60, lambda: _some(x, y, generator))
    tuned, fresh = model.state_dict(), copy.deepcopy(pretrained(seed))
    return fallow.probe(
        fresh,
        [(x[:16], y[:16])],
        want={"contribution"},
        loss=difference,
        targets="all-layers",
        tuned=tuned,
        points=16,
    )


def _some(x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    chosen = torch.randint(len(x), (8,), generator=generator)
    return x[chosen], y[chosen]


def ranks(label: str, seed: int) -> dict[str, int]:
    """Of each layer; within one budget of numbers, but for "rank 3 in all"."""
    found = scores(seed)
    shapes = {name: one.shape for name, one in found.items()}
    if label == "rank 3 in all":
        return dict.fromkeys(shapes, 3)
    if label == "even shares":  # of each layer's weights
        even = {n: type(one)(one.shape, contribution=1.0) for n, one in found.items()}
        return fallow.CoLoRARanks(type(found)(even, 1), SHARE).ranks(shapes, 1)
    if label == "CoLoRA":
        return fallow.CoLoRARanks(found, SHARE).ranks(shapes, 1)
    values = [one.contribution for one in found.values()]
    random.Random(seed).shuffle(values)
    moved = {n: type(one)(one.shape, contribution=v) for (n, one), v in zip(found.items(), values, strict=True)}
    return fallow.CoLoRARanks(type(found)(moved, 1), SHARE).ranks(shapes, 1)


@torch.no_grad()
def psnr(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    errors = (model(data[0]).clamp(0, 1) - data[1]).square().mean((1, 2, 3))
    return float((-10 * errors.log10()).mean())


def run(label: str, lr: float, seed: int, sweep: bool) -> dict[str, float]:
    model: Any = copy.deepcopy(pretrained(seed))
    torch.manual_seed(seed + 1)
    before = psnr(model, task(seed)["test"])
    if label != "all weights":
        fallow.attach(model, "lora", "all-layers", rank=1, budget=Uniform(ranks(label, seed)))
    params = [param for param in model.parameters() if param.requires_grad]
    (x, y), generator = task(seed)["train"], torch.Generator().manual_seed(seed + 2)
    learn(model, params, lr, STEPS, lambda: _some(x, y, generator))
    return {
        "held": psnr(model, task(seed)["held"]),
        "psnr": psnr(model, task(seed)["test"]),
        "before": before,
        "trained": sum(param.numel() for param in params),
    }


if __name__ == "__main__":
    contenders: Mapping[str, Mapping[str, Any]] = {
        label: {"method": "full" if label == "all weights" else "lora", "lrs": lrs} for label, lrs in RATES.items()
    }
    told = {"note": "haze on 32 crops, 7 % of the weights", "steps": STEPS}
    table("colora", contenders, run, "held", arguments(__doc__).seeds, told)
