"""Networks that name what a picture shows: small ones that are taught in seconds, the shipped one, transformers' own.

    mlp          pixels - 128 - 128 - 128 - classes
    vit          transformers' ViT: 3 layers of 48, patches of a quarter of the side
    garment-net  the judge of 32 x 32 garments that ships; its statistics of batches stay as they are
    PATH         an image classifier of transformers, by folder or hub id, with a new classifier where the classes are
                 others; or a CLIP, with a new one on its projected features, as PEGO has it

A network is adapted as any other model; here stands only how to ask it, to teach it and to count what it knows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fallow import assets
from fallow.analysis.features import GarmentNet
from fallow.core.delta import method_of
from fallow.core.errors import ModelError
from fallow.core.host.targets import Targets, choose, spots
from fallow.recipes.labelled import Labelled

SMALL = ("mlp", "vit")  # taught on the spot
CHECKED = 500  # pictures that are asked about at a time
Loss = Callable[[Tensor, Tensor], Tensor]


class Perceptron(nn.Module):
    """Pixels (n, channels, side, side) -> logits (n, classes), over three hidden layers."""

    def __init__(self, pixels: int, classes: int, width: int = 128) -> None:
        super().__init__()
        sizes = (pixels, width, width, width)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.classifier = nn.Linear(width, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        x = pixels.flatten(1)
        for layer in self.layers:
            x = layer(x).relu()
        logits: Tensor = self.classifier(x)
        return logits


class Garments(nn.Module):
    """The shipped garment-net with its logits of garments alone; pixels (n, 3, 32, 32) in [0, 1] -> (n, 10)."""

    def __init__(self, judge: GarmentNet) -> None:
        super().__init__()
        self.body, self.classifier = judge.body, judge.garment

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.body(pixels * 2 - 1))
        return logits


class ClipFeatures(nn.Module):
    """The image side of transformers' CLIP, its class token projected, and a linear classifier of that by chance."""

    def __init__(self, clip: Any, classes: int) -> None:
        super().__init__()
        self.vision_model, self.visual_projection = clip.vision_model, clip.visual_projection
        self.classifier = nn.Linear(clip.visual_projection.out_features, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        features = self.visual_projection(self.vision_model(pixel_values=pixels).pooler_output)
        logits: Tensor = self.classifier(features)
        return logits


class Classifier:
    """A network with how its pictures have to be. `head`: the name of the layer that gives the logits.

    `side`, `channels`: of its pictures; `mean`, `std`: what their values in [0, 1] are brought to before they go in.
    """

    def __init__(
        self, network: nn.Module, head: str, side: int, channels: int,
        mean: Sequence[float] = (0.0,), std: Sequence[float] = (1.0,),
    ) -> None:  # fmt: skip
        self.network, self.head, self.side, self.channels = network, head, side, channels
        self.fresh_head = False  # whether the layer of logits knows nothing yet
        self.mean = torch.tensor(list(mean)).view(-1, 1, 1)
        self.std = torch.tensor(list(std)).view(-1, 1, 1)

    def to(self, device: torch.device) -> Classifier:
        self.network.to(device)
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        return self

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def prepared(self, pixels: Tensor) -> Tensor:
        """As the network takes them: on its device, in its size, grey in as many channels as it has, normalised."""
        pixels = pixels.to(self.device)
        if pixels.shape[-1] != self.side:
            pixels = F.interpolate(pixels, (self.side, self.side), mode="bilinear", antialias=True)
        return (pixels.expand(-1, self.channels, -1, -1) - self.mean) / self.std

    def logits(self, pixels: Tensor) -> Tensor:
        """(n, classes) of pixels (n, channels, side, side) in [0, 1]."""
        found = self.network(self.prepared(pixels))
        logits: Tensor = getattr(found, "logits", found)
        return logits

    def loss(self, pixels: Tensor, labels: Tensor, classes: Sequence[int] | None = None) -> Tensor:
        """Cross entropy among these classes alone; all where none are named. Labels are places among all."""
        logits, labels = self.logits(pixels), labels.to(self.device)
        if classes is not None and len(classes) < logits.shape[1]:
            kept = torch.tensor(classes, device=logits.device)
            logits, labels = logits[:, kept], torch.searchsorted(kept, labels)
        return F.cross_entropy(logits, labels)

    def renew_head(self, classes: int) -> None:
        """A new layer of logits, by chance, for so many classes."""
        owner, _, name = self.head.rpartition(".")
        old: Any = self.network.get_submodule(self.head)
        made = nn.Linear(old.in_features, classes).to(old.weight.device, old.weight.dtype)
        setattr(self.network.get_submodule(owner), name, made)
        self.fresh_head = True

    @property
    def head_parameters(self) -> list[str]:
        """The names of the parameters of the layer of logits."""
        return [name for name, _ in self.network.named_parameters() if name.startswith(f"{self.head}.")]

    @torch.no_grad()
    def accuracy(self, data: Labelled) -> float:
        """The share of pictures that it names rightly, all classes being possible."""
        was, right = self.network.training, 0
        self.network.eval()
        for index in torch.arange(len(data)).split(CHECKED):
            pixels, labels = data.batch(index)
            right += int((self.logits(pixels).argmax(1).cpu() == labels).sum())
        self.network.train(was)
        return right / len(data)


# -- where they come from -------------------------------------------------------------------------------------------


def make_classifier(model: str, classes: Sequence[str], side: int, channels: int) -> Classifier:
    """A classifier of these classes by the name of its network; see the top of this file.

    `side`, `channels`: of the pictures, where the network has none of its own. ModelError where it cannot be loaded.
    """
    if model == "mlp":
        return Classifier(Perceptron(channels * side * side, len(classes)), "classifier", side, channels)
    if model == "vit":
        return Classifier(_small_vit(len(classes), side, channels), "classifier", side, channels)
    if model == "garment-net":
        judge = GarmentNet.from_pretrained(assets.GARMENT_NET)
        found = Classifier(Garments(judge), "classifier", 32, 3)
        if list(classes) != judge.garment_names:
            found.renew_head(len(classes))
        return found
    return _of_transformers(model, classes)


def own_side(model: str) -> int:
    """The side of the pictures that a network takes; 32 for what has none or cannot be read."""
    if model in (*SMALL, "garment-net"):
        return 32
    from transformers import AutoConfig

    try:
        config: Any = AutoConfig.from_pretrained(model)
    except (OSError, ValueError):
        return 32
    side = getattr(getattr(config, "vision_config", config), "image_size", None) or 224
    return int(side if isinstance(side, int) else side[0])


def _small_vit(classes: int, side: int, channels: int) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    if side % 4:
        raise ModelError(f"model=vit takes pictures of a side that 4 divides, not {side}")
    shape = ViTConfig(
        image_size=side, patch_size=side // 4, num_channels=channels, hidden_size=48, num_hidden_layers=3,
        num_attention_heads=3, intermediate_size=96,
    )  # fmt: skip
    shape.num_labels = classes
    network: nn.Module = ViTForImageClassification(shape)
    return network


def _of_transformers(model: str, classes: Sequence[str]) -> Classifier:
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModelForImageClassification,
        CLIPModel,
    )

    try:
        network: Any
        if is_clip := AutoConfig.from_pretrained(model).model_type == "clip":
            network = CLIPModel.from_pretrained(model, use_safetensors=True)
        else:
            network = AutoModelForImageClassification.from_pretrained(model, use_safetensors=True)
        told = preparation(AutoImageProcessor.from_pretrained(model).to_dict())
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"model={model} is no image classifier that can be loaded ({reason}); give mlp, vit, garment-net, or the "
            "folder or hub id of one that transformers knows, with safetensors"
        ) from None
    known = getattr(getattr(network.config, "vision_config", network.config), "image_size", None)
    side = told["side"] if known is None else own_side(model)
    if is_clip:
        clip = ClipFeatures(network, len(classes))
        found = Classifier(clip, "classifier", side, len(told["mean"]), told["mean"], told["std"])
        found.fresh_head = True
        return found
    found = Classifier(network, _head_of(network), side, len(told["mean"]), told["mean"], told["std"])
    names = [network.config.id2label[at] for at in range(network.config.num_labels)]
    if names != list(classes):
        found.renew_head(len(classes))
        network.config.num_labels = len(classes)
        network.num_labels = len(classes)
    return found


def preparation(processor: dict[str, Any]) -> dict[str, Any]:
    size = processor.get("size") or {}
    side = size if isinstance(size, int) else size.get("height") or size.get("shortest_edge") or 224
    mean, std = processor.get("image_mean") or [0.5] * 3, processor.get("image_std") or [0.5] * 3
    return {"side": int(side), "mean": list(mean), "std": list(std)}


def _head_of(network: nn.Module) -> str:
    """The last Linear of as many outputs as there are labels."""
    wanted = getattr(network.config, "num_labels", None)
    found = [
        name for name, layer in network.named_modules() if isinstance(layer, nn.Linear) and layer.out_features == wanted
    ]
    if not found:
        raise ModelError(f"{type(network).__name__} has no linear layer of {wanted} outputs to take for its classifier")
    return found[-1]


def to_training(network: nn.Module) -> None:
    """Training mode, in which dropout acts; statistics of batches stay those of the pretrained network."""
    network.train()
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


# -- teaching -------------------------------------------------------------------------------------------------------


def endless(data: Labelled, batch: int, seed: int) -> Iterator[Tensor]:
    """Places in batches, each time round in another order drawn from the seed; every batch is full."""
    generator, left = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.int64)
    while True:
        while len(left) < batch:
            left = torch.cat([left, torch.randperm(len(data), generator=generator)])
        taken, left = left[:batch], left[batch:]
        yield taken


def teach(
    classifier: Classifier, data: Labelled, steps: int, lr: float = 1e-3, batch: int = 64, seed: int = 0,
    change: Callable[[Tensor, torch.Generator], Tensor] | None = None,
) -> None:  # fmt: skip
    """All weights, by Adam at a constant rate. `change`: pixels of a batch -> others, by chance."""
    optimizer = torch.optim.Adam(classifier.network.parameters(), lr)
    batches, chance = endless(data, batch, seed), torch.Generator().manual_seed(seed)
    to_training(classifier.network)
    for _ in range(steps):
        pixels, labels = data.batch(next(batches))
        optimizer.zero_grad()
        classifier.loss(pixels if change is None else change(pixels, chance), labels).backward()
        optimizer.step()
    classifier.network.eval()


def fitting_ranks(
    network: nn.Module, method: str, targets: Targets, exclude: Targets | None, rank: int, modules: int = 1
) -> dict[str, dict[str, int]]:
    """`patterns` of `fallow.attach` for those of the targets that are too small for `modules` times a rank."""
    chosen = choose(network, spots(network), method_of(method), targets, exclude)
    most = {spot.key: max(1, min(spot.view().shape) // modules) for spot in chosen}
    return {re.escape(key): {"rank": own} for key, own in most.items() if own < rank}
