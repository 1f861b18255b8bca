"""A network with a layer of every kind that PEFT's LoRA knows, for tests of files."""

from __future__ import annotations

import dataclasses

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import fallow
from fallow.core.delta import Delta, method_of
from fallow.core.views import view_of

LAYERS = ["tokens", "linear", "turned", "one", "two", "three"]
IDS = torch.arange(18).view(3, 6) % 24
OPTIONS = {"loca": {"components": 20}, "pego": {"group": 1}, "smora": {"active": 1}, "bone": {"mini_rank": 4}}


class EveryKind(nn.Module):
    """Takes token ids (B, T), gives (B, 8)."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.tokens = nn.Embedding(24, 16)
        self.linear = nn.Linear(16, 12)
        self.turned = Conv1D(8, 12)
        self.one = nn.Conv1d(8, 8, 3, padding=1)
        self.two = nn.Conv2d(1, 4, 3, padding=1, stride=2)
        self.three = nn.Conv3d(4, 6, (3, 3, 1), padding=(1, 1, 0))
        self.head = nn.Linear(6, 8, bias=False)
        nn.init.normal_(self.turned.weight, std=0.3)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.linear(self.tokens(ids)))
        x = self.one(self.turned(x).mT).unsqueeze(1)
        x = self.three(self.two(x).unsqueeze(-1)).mean((2, 3, 4))
        return self.head(x)


def adapted(
    method: str, host: str, network: nn.Module, layers: list[str] | None = None, **options: object
) -> nn.Module:
    """The network with a random adapter of the method, in eval mode."""
    kind = method_of(method)
    known = {field.name for field in dataclasses.fields(kind.Options)}
    given = {"rank": 2} | OPTIONS.get(method, {}) if "rank" in known else dict(OPTIONS.get(method, {}))
    layers = layers or [name for name in LAYERS if view_of(network.get_submodule(name)).kind in kind.supports]
    torch.manual_seed(1)
    if host == "peft":
        config = fallow.config_of(kind)(target_modules=layers, **given | options)
        return _randomized(get_peft_model(network, config))
    return _randomized(fallow.attach(network, method, targets=layers, **given | options))


@torch.no_grad()
def run(model: nn.Module) -> Tensor:
    return model(IDS)


def _randomized(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, Delta):
            module.randomize()
    return model.eval()
