"""The shipped feature network: what Inception and CLIP are to real pictures, GarmentNet is to 32x32 garments.

One small convolutional network with two heads. Its 64 features carry garment *and* style, so a Frechet distance in them
sees both; its garment logits say whether a picture shows what the prompt asked for. Trained by
`scripts/pretrain_mini_sd.py --stage features`, apart from mini-sd.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn


def _block(inner: int, outer: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.BatchNorm2d(outer), nn.ReLU())


class GarmentNet(nn.Module):
    """Pictures `(B, 3, 32, 32)` in [0, 1] -> garment logits `(B, 10)` and style-family logits `(B, 6)`."""

    def __init__(self, garments: int = 10, families: int = 6) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _block(3, 32), _block(32, 32), _block(32, 64, 2), _block(64, 64), _block(64, 96, 2), _block(96, 96),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * 96, 64), nn.BatchNorm1d(64), nn.ReLU(),
        )  # fmt: skip
        self.garment, self.family = nn.Linear(64, garments), nn.Linear(64, families)
        self.garment_names: list[str] = []
        self.family_names: list[str] = []

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.body(pictures * 2 - 1)
        return self.garment(features), self.family(features)

    @torch.no_grad()
    def features(self, pictures: torch.Tensor, batch: int = 250) -> torch.Tensor:
        """Features `(N, 64)` of pictures `(N, 3, 32, 32)` in [0, 1]."""
        return torch.cat([self.body(part * 2 - 1) for part in pictures.split(batch)])

    @torch.no_grad()
    def garment_logits(self, pictures: torch.Tensor, batch: int = 250) -> torch.Tensor:
        """Garment logits `(N, 10)` of pictures `(N, 3, 32, 32)` in [0, 1]."""
        return torch.cat([self(part)[0] for part in pictures.split(batch)])

    def save_pretrained(self, folder: Path, garment_names: list[str], family_names: list[str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(
            json.dumps({"garments": garment_names, "families": family_names}, indent=2) + "\n"
        )

    @classmethod
    def from_pretrained(cls, folder: Path) -> GarmentNet:
        """Load from `model.safetensors` and `config.json` in `folder`; in eval mode, on the CPU, float32."""
        config = json.loads((folder / "config.json").read_text())
        net = cls(len(config["garments"]), len(config["families"]))
        net.load_state_dict(load_file(folder / "model.safetensors"))
        net.garment_names, net.family_names = config["garments"], config["families"]
        return net.eval()
