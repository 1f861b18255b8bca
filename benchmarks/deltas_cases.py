"""What `deltas.py` compares: two networks, each method at its defaults and some variants, and what PEFT has of them."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import torch
from diffusers.utils import logging
from peft import LoraConfig, MissConfig, PeftConfig, PeftModel, RandLoraConfig, ShiraConfig, VeraConfig
from peft.tuners.lora.config import KasaConfig
from torch import Tensor, nn

import fallow
import fallow.deltas  # which makes all methods known
from fallow.core.delta import REGISTRY
from fallow.core.peft_host import config_of

UNET: dict[str, Any] = {
    "sample_size": 32, "block_out_channels": (128, 256, 384), "cross_attention_dim": 384, "attention_head_dim": 8,
    "layers_per_block": 1, "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
LINEAR = re.compile(r"(attention\.\w_proj|mlp\.fc\d|to_[qkv]|to_out\.0|ff\.net\.0\.proj|ff\.net\.2)$")
CONV = re.compile(r"resnets\.\d\.conv[12]$")
TEXT = re.compile(r"attn2\.to_[kv]$")  # the layers of the UNet whose input is no picture


class Setting:
    """A network of random weights, its input, and which of its layers are adapted."""

    def __init__(self, kind: str, dtype: torch.dtype = torch.float32, width: int = 768) -> None:
        self.kind, self.dtype, self.width = kind, dtype, width
        generator = torch.Generator().manual_seed(1)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        self.inputs = (draw(1, 3, 256, 256),) if kind == "transformer" else (draw(1, 4, 32, 32), draw(1, 77, 384))

    def base(self) -> nn.Module:
        """A fresh copy of the network."""
        return copy.deepcopy(self.original)

    @cached_property
    def original(self) -> nn.Module:
        """The network, frozen: a ViT of 6 layers (257 tokens), or a diffusers UNet of about 35 M parameters."""
        torch.manual_seed(0)
        if self.kind == "transformer":
            from transformers import ViTConfig, ViTModel

            sizes = {"num_attention_heads": self.width // 64, "intermediate_size": 4 * self.width, "image_size": 256}
            config = ViTConfig(hidden_size=self.width, num_hidden_layers=6, patch_size=16, **sizes)
            net: nn.Module = ViTModel(config, add_pooling_layer=False)
        else:
            from diffusers import UNet2DConditionModel

            logging.set_verbosity_error()
            net = UNet2DConditionModel(**UNET)
        return net.to(self.dtype).requires_grad_(False).train()

    def targets(self, convs: bool, pictures: bool = False) -> list[str]:
        """The names of the usual layers; of the UNet's two convolutions a block too, and not those that see text."""
        names = [name for name, _ in self.original.named_modules()]
        text = [name for name in names if pictures and TEXT.search(name)]
        return [n for n in names if (LINEAR.search(n) or (convs and CONV.search(n))) and n not in text]

    def forward(self, net: nn.Module) -> Tensor:
        """A scalar to go backward from."""
        if self.kind == "transformer":
            out: Tensor = net(self.inputs[0]).last_hidden_state
        else:
            out = net(self.inputs[0], torch.tensor([500]), self.inputs[1]).sample
        return out.float().square().mean()


Peer = Callable[[list[str]], PeftConfig]


@dataclasses.dataclass(frozen=True)
class Variant:
    """A method with options. `peer`: PEFT's own version of it, with the same settings, and what it is called."""

    label: str
    method: str
    options: dict[str, Any]
    peer: Peer | None = None
    peer_name: str = ""

    @property
    def convs(self) -> bool:
        """Whether the method claims convolutions."""
        return self.method != "shira" and "conv" in REGISTRY[self.method].supports

    def config(self, names: list[str]) -> PeftConfig:
        if self.method == "shira":
            return fallow.SHiRAConfig(target_modules=names, **self.options)
        made: PeftConfig = config_of(REGISTRY[self.method])(
            target_modules=names, own_loss="manual", **undropped(self.method), **self.options
        )
        return made

    def context(self, net: nn.Module) -> AbstractContextManager[None]:
        """What a forward must tell the method."""
        return fallow.condition(net, quality=torch.tensor([0.7])) if self.method == "petalface" else nullcontext()

    def term(self, net: nn.Module) -> Tensor | None:
        """The method's own term of the objective."""
        return None if self.method == "shira" else fallow.penalty(net)


def undropped(method: str) -> dict[str, Any]:
    """No dropout, which LoRA does not have here either."""
    fields = {field.name for field in dataclasses.fields(REGISTRY[method].Options)}
    return {name: 0.0 for name in ("dropout", "branch_dropout") if name in fields}


def lora(names: list[str], rank: int = 8) -> PeftConfig:
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=names)


def _kasa(names: list[str]) -> PeftConfig:
    return LoraConfig(r=8, lora_alpha=16, kasa_config=KasaConfig(), target_modules=names)


def kasa_term(net: PeftModel) -> Tensor | None:
    """The own term of PEFT's KaSA, which it leaves to its user."""
    term: Tensor | None = net.base_model._get_kasa_loss()
    return term


PEERS: dict[str, tuple[str, Peer]] = {  # by label
    "lora": ("PEFT LoRA", lora),
    "dora": ("PEFT DoRA", lambda names: LoraConfig(r=8, lora_alpha=8, use_dora=True, target_modules=names)),
    "vera": ("PEFT VeRA", lambda names: VeraConfig(r=256, target_modules=names)),
    "randlora": ("PEFT RandLoRA", lambda names: RandLoraConfig(r=32, target_modules=names)),
    "bone": ("PEFT MiSS", lambda names: MissConfig(r=64, target_modules=names)),
    "bone mini": (
        "PEFT MiSS mini",
        lambda names: MissConfig(r=64, mini_r=64, init_weights="mini", target_modules=names),
    ),
    "bone bat": ("PEFT MiSS bat", lambda names: MissConfig(r=64, init_weights="bat", target_modules=names)),
    "kasa": ("PEFT KaSA", _kasa),
    "shira": ("PEFT SHiRA", lambda names: ShiraConfig(r=8, target_modules=names)),
}
PEERS_OF_CONVS = ("lora", "dora")  # the others take linear layers only
PEERS["randlora peft"] = PEERS["randlora rewritten"] = PEERS["randlora"]
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "bone mini": ("bone", {"kind": "mini"}),
    "bone bat": ("bone", {"kind": "bat"}),
    "randlora peft": ("randlora", {"scaling": "peft", "pairing": "peft"}),
    "randlora rewritten": ("randlora", {"form": "rewritten"}),
    "svfit rank 32": ("svfit", {"rank": 32}),
    "svfit rewritten": ("svfit", {"form": "rewritten"}),
    "loldu rank 32": ("loldu", {"rank": 32}),
    "salt without relu": ("salt", {"relu": "none"}),
    "wara weight": ("wara", {"variant": "weight"}),
}
DEFAULTS: dict[str, dict[str, Any]] = {"wara-spatial": {}, "shira": {"r": 8}}


def ours() -> list[str]:
    """The methods of the package, without those that a program registers of its own."""
    return sorted(name for name, method in REGISTRY.items() if method.__module__.startswith("fallow.deltas."))


def variants(setting: Setting, chosen: Sequence[str] | None = None) -> Iterator[Variant]:
    """Every method at its defaults, then the variants; of those with `chosen` slugs or labels. ValueError for others.

    The transformer in bfloat16 is given those variants only that have a peer, the UNet none but the defaults.
    """
    full = setting.kind == "transformer" and setting.dtype == torch.float32
    every = {name: (name, DEFAULTS.get(name, {})) for name in ours()} | {"shira": ("shira", {"r": 8})} | MORE
    if unknown := set(chosen or ()) - set(every):
        raise ValueError(f"{', '.join(sorted(unknown))}: no such method; choose from {', '.join(every)}")
    for label, (method, options) in every.items():
        few = label not in MORE or (label in PEERS and setting.kind == "transformer")
        if not (method in chosen or label in chosen if chosen else full or few):
            continue
        if method == "wara-spatial" and setting.kind == "unet":
            options = {**options, "prefix": 0}
        peer_name, peer = PEERS.get(label, ("", None))
        yield Variant(label, method, options, peer, peer_name)
