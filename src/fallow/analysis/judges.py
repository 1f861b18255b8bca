"""Who looks at the pictures: the shipped GarmentNet, or Inception, CLIP, DINOv2, ... where their weights are given.

A judge turns pictures into features (for the Frechet distance) and says how well pictures show what their captions ask
for (text alignment). What it cannot say it leaves out with a reason, never with a number.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from fallow.analysis.features import GarmentNet
from fallow.analysis.images import alignment, to_tensor
from fallow.assets import GARMENT_NET
from fallow.core.errors import ModelError


@dataclass
class Aligned:
    """Text alignment of a set of pictures; `value` and `recognised` are None where the judge cannot tell (`reason`)."""

    value: float | None  # mean over the judged: GarmentNet's probability in [0, 1], CLIP's score in [0, 100]
    recognised: float | None  # share of the judged pictures that show the class their caption names, in [0, 1]
    judged: int  # how many of the pictures were judged
    reason: str | None = None  # why not all of them, or none


class Judge(Protocol):
    """What `fallow evaluate` needs of a judge."""

    name: str

    def features(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """Features `(N, D)`, float32."""
        ...

    def alignment(self, pictures: Sequence[Image.Image], captions: Sequence[str]) -> Aligned:
        """How well each picture shows its caption."""
        ...


def class_in(caption: str, names: Sequence[str]) -> int | None:
    """Which of the class names a caption asks for: its index, or None where the caption has none of them.

    Whole words, upper or lower case, plural or not; a space, a hyphen or nothing may stand between the parts of a name
    (`t-shirt`, `T shirts`, `tshirt`). The longest name in the caption wins, so a t-shirt is no shirt; of two equally
    long ones, the one that stands first.
    """
    found: list[tuple[int, int, int]] = []
    for index, name in enumerate(names):
        singular = name[:-1] if name.endswith("s") and not name.endswith("ss") else name  # trousers, but a dress
        parts = r"[\s-]?".join(re.escape(part) for part in re.split(r"[\s-]+", singular))
        for hit in re.finditer(rf"(?<![\w-]){parts}(?:s|es)?(?![\w-])", caption, re.IGNORECASE):
            found.append((-len(name), hit.start(), index))
    return min(found)[2] if found else None


class GarmentJudge:
    """The shipped network: 64 features, and ten garments found in the captions by `class_in`."""

    def __init__(self, folder: str | Path = GARMENT_NET) -> None:
        folder = Path(folder)
        try:
            self.net = GarmentNet.from_pretrained(folder)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ModelError(
                f"the garment net in {folder} cannot be read ({error}); it needs config.json and model.safetensors"
            ) from error
        self.name = "garment net"

    def features(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        return self.net.features(to_tensor(pictures, 32))

    def alignment(self, pictures: Sequence[Image.Image], captions: Sequence[str]) -> Aligned:
        wanted = [class_in(caption, self.net.garment_names) for caption in captions]
        keep = [i for i, label in enumerate(wanted) if label is not None]
        names = ", ".join(self.net.garment_names)
        if not keep:
            example = f" (the first is '{captions[0]}')" if captions else ""
            return Aligned(None, None, 0, f"no caption names a class of the garment net{example}; it knows: {names}")
        reason = None
        if len(keep) < len(captions):
            lost = next(captions[i] for i, label in enumerate(wanted) if label is None)
            reason = (
                f"{len(captions) - len(keep)} of {len(captions)} captions name no class of the garment net "
                f"(such as '{lost}'); alignment is that of the others"
            )
        found = alignment(self.net, to_tensor([pictures[i] for i in keep], 32), torch.tensor([wanted[i] for i in keep]))
        return Aligned(found["alignment"], found["recognised"], len(keep), reason)


class ModelJudge:
    """Frechet distances in the features of a given vision model; text alignment by a given CLIP.

    `vision`: a transformers folder with any vision model (DINOv2, ViT, CLIP: the pooled output is taken), or the file
    of FID's own Inception weights (`*.pth`, read by torchmetrics with torch-fidelity). Without it, CLIP's image
    embedding.
    `clip`: a transformers CLIP folder. Alignment is `max(0, 100 cos(picture, caption))`, as torchmetrics' CLIPScore.
    """

    def __init__(
        self, vision: str | Path | None = None, clip: str | Path | None = None, *, device: str = "cpu", batch: int = 32
    ) -> None:
        if vision is None and clip is None:
            raise ModelError("a model judge needs vision=PATH, clip=PATH, or both")
        self.device, self.batch = torch.device(device), batch
        self.inception: Any = None
        self.vision: Any = None
        self.clip: Any = None
        for what, path in (("vision", vision), ("clip", clip)):
            if path is not None and not Path(path).exists():
                raise ModelError(f"{what}={path} does not exist; give a folder or file on this machine")
        if vision is not None and Path(vision).is_file():
            self.inception = _inception(Path(vision)).to(self.device)
        elif vision is not None:
            self.vision, self.vision_pictures = _vision(Path(vision))
            self.vision.to(self.device)
        if clip is not None:
            self.clip, self.clip_inputs = _clip(Path(clip))
            self.clip.to(self.device)
        kind = "Inception" if self.inception is not None else None if vision is None else Path(vision).name
        self.name = f"{kind or 'CLIP'} features, {'CLIP' if clip is not None else 'no'} alignment"

    @torch.inference_mode()
    def features(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        return torch.cat([self._features(pictures[i : i + self.batch]) for i in range(0, len(pictures), self.batch)])

    def _features(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        rgb = [picture.convert("RGB") for picture in pictures]
        if self.inception is not None:
            # in its own size: FID's resizing is part of the network. Pictures of several sizes go one by one
            pixels = [torch.from_numpy(np.array(picture)).permute(2, 0, 1).to(self.device) for picture in rgb]
            same = len({p.shape for p in pixels}) == 1
            parts = [torch.stack(pixels)] if same else [p[None] for p in pixels]
            return torch.cat([self.inception(part).flatten(1).float().cpu() for part in parts])
        if self.vision is not None:
            inputs = self.vision_pictures(images=rgb, return_tensors="pt").to(self.device)
            output = self.vision(**inputs)
            pooled = getattr(output, "pooler_output", None)
            return (pooled if pooled is not None else output.last_hidden_state.mean(1)).float().cpu()
        return self._clip_pictures(rgb).cpu()

    def _clip_pictures(self, rgb: list[Image.Image]) -> torch.Tensor:
        """CLIP's projected picture embeddings, `(N, D)`."""
        inputs = self.clip_inputs(images=rgb, return_tensors="pt").to(self.device)
        return self.clip.visual_projection(self.clip.vision_model(**inputs).pooler_output).float()

    @torch.inference_mode()
    def alignment(self, pictures: Sequence[Image.Image], captions: Sequence[str]) -> Aligned:
        if self.clip is None:
            return Aligned(None, None, 0, "text alignment needs a CLIP: give clip=PATH")
        scores = []
        for i in range(0, len(pictures), self.batch):
            rgb = [picture.convert("RGB") for picture in pictures[i : i + self.batch]]
            inputs = self.clip_inputs(
                text=list(captions[i : i + self.batch]), return_tensors="pt", padding=True, truncation=True
            ).to(self.device)
            words = self.clip.text_projection(self.clip.text_model(**inputs).pooler_output).float()
            scores.append(torch.cosine_similarity(self._clip_pictures(rgb), words).cpu())
        mean = 100 * torch.cat(scores).mean().item()
        return Aligned(max(0.0, mean), None, len(captions))


def _vision(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoImageProcessor, AutoModel

    try:
        model = AutoModel.from_pretrained(folder, local_files_only=True)
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"vision={folder} is no transformers vision model ({error})") from error
    return getattr(model, "vision_model", model).eval(), processor  # of a two-tower model, the tower that sees


def _clip(folder: Path) -> tuple[Any, Any]:
    from transformers import CLIPModel, CLIPProcessor

    try:
        kind = json.loads((folder / "config.json").read_text()).get("model_type")
        if kind != "clip":
            raise ValueError(f"its config.json says model_type {kind!r}")
        model = CLIPModel.from_pretrained(folder, local_files_only=True)
        processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"clip={folder} is no transformers CLIP folder ({error})") from error
    return model.eval(), processor


def _inception(weights: Path) -> Any:
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3

        net = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(weights))
    except ImportError as error:
        raise ModelError(
            "FID's Inception needs torchmetrics with torch-fidelity: pip install 'torchmetrics[image]'; "
            "or give a transformers folder such as DINOv2's"
        ) from error
    except Exception as error:  # torch.load raises many kinds for a file that is not the right one
        raise ModelError(f"vision={weights} does not hold FID's Inception weights ({error})") from error
    return net.eval()


def make_judge(vision: str | Path | None = None, clip: str | Path | None = None, *, device: str = "cpu") -> Judge:
    """The given models as a judge; the shipped GarmentNet where none is given."""
    return GarmentJudge() if vision is None and clip is None else ModelJudge(vision, clip, device=device)
