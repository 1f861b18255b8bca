"""CLIP as a classifier whose classes are texts, and the loss by which CoDyRA trains it (arXiv 2412.01004).

    logits = tau F Eᵀ        F (n, d): normalised features of the pictures; E (K, d): of the classes' texts; tau: frozen
    loss   = CE(tau F Eᵀ with the columns of earlier classes left out, y)
           + mean over all K classes of CE_soft(tau E Fᵀ, Y)     Y[c, b] = 1[y_b = c], targets that need not sum to one

A class without a picture in the batch adds nothing to the second mean, but counts in it. There is no classifier to
train, and a class that was never seen is judged by its text alone. The texts' features are computed once where the text
encoder is frozen; where it is adapted, those of the task's classes in each step, with gradient, and those of the other
classes when the task starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fallow.core.errors import ConfigError, ModelError
from fallow.recipes.classifiers import Classifier, preparation

TEMPLATE = "a photo of a {}."


def contrastive_loss(features: Tensor, texts: Tensor, labels: Tensor, scale: Tensor | float, earlier: int) -> Tensor:
    """The loss above. `features` (n, d), `texts` (K, d), both normalised, the first `earlier` of other tasks;
    `labels` (n,): places among the K.
    """
    by_picture = scale * features @ texts[earlier:].T
    by_text = F.log_softmax(scale * texts @ features.T, 1)
    wanted = F.one_hot(labels, len(texts)).T.to(by_text.dtype)
    return F.cross_entropy(by_picture, labels - earlier) - (wanted * by_text).sum(1).mean()


class TextClassifier(Classifier):
    """transformers' CLIPModel. `head` is none; `classes`: the words that stand in the template.

    `adapts_text`: whether the text encoder is trained. ModelError where the model cannot be loaded.
    """

    def __init__(self, model: str, classes: Sequence[str], template: str = TEMPLATE, adapts_text: bool = True) -> None:
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        if "{}" not in template:
            raise ConfigError(f"template={template!r} has no place for the class; give one like {TEMPLATE!r}")
        try:
            network: Any = CLIPModel.from_pretrained(model, use_safetensors=True)
            told = preparation(AutoImageProcessor.from_pretrained(model).to_dict())
            tokens = AutoTokenizer.from_pretrained(model)(
                [template.format(name.replace("_", " ")) for name in classes], padding=True, return_tensors="pt"
            )
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ModelError(f"model={model} is no CLIP that can be loaded ({reason}); give another") from None
        side = int(network.config.vision_config.image_size)
        super().__init__(network, "", side, 3, told["mean"], told["std"])
        network.logit_scale.requires_grad_(False)
        self.adapts_text = adapts_text
        self.tokens = {name: tokens[name] for name in ("input_ids", "attention_mask")}
        self.known: Tensor | None = None  # (K, d), without gradient

    @property
    def targets(self) -> str:
        """The linear layers of attention and MLP in the encoders that are trained: a pattern of their names."""
        encoders = "vision_model|text_model" if self.adapts_text else "vision_model"
        return rf"(?:.*\.)?(?:{encoders})\..*\.(?:[qkv]_proj|out_proj|fc[12])"

    def texts(self, index: Sequence[int] | None = None) -> Tensor:
        """(k, d): normalised features of these classes' texts; of all where none are named."""
        kept = slice(None) if index is None else torch.tensor(index)
        tokens = {name: value[kept].to(self.device) for name, value in self.tokens.items()}
        return F.normalize(_pooled(self.network.get_text_features(**tokens)), dim=1)  # type: ignore[operator]

    def pictures(self, pixels: Tensor) -> Tensor:
        """(n, d): normalised features."""
        found = self.network.get_image_features(pixel_values=self.prepared(pixels))  # type: ignore[operator]
        return F.normalize(_pooled(found), dim=1)

    @torch.no_grad()
    def remember_texts(self) -> None:
        """Compute the features of all texts with the model as it is: at the start and at the end of a task."""
        self.known = self.texts()

    def logits(self, pixels: Tensor) -> Tensor:
        if self.known is None:
            self.remember_texts()
        assert self.known is not None
        scale: Any = self.network.logit_scale
        return scale.exp() * self.pictures(pixels) @ self.known.T

    def loss(
        self, pixels: Tensor, labels: Tensor, classes: Sequence[int] | None = None, seen: Sequence[int] = ()
    ) -> Tensor:
        """`classes`: of the task; `seen`: of earlier ones."""
        if self.known is None:
            self.remember_texts()
        assert self.known is not None
        own = list(range(len(self.known))) if classes is None else list(classes)
        earlier = [one for one in seen if one not in own]
        current = self.texts(own) if self.adapts_text and torch.is_grad_enabled() else self.known[own]
        order = torch.tensor([*earlier, *own])
        places = (labels[:, None] == order).int().argmax(1).to(self.device)
        scale: Any = self.network.logit_scale
        texts = torch.cat([self.known[earlier], current])
        return contrastive_loss(self.pictures(pixels), texts, places, scale.exp(), len(earlier))


def _pooled(found: Any) -> Tensor:
    """The features: what transformers gives, or within what it gives."""
    features: Tensor = found if isinstance(found, Tensor) else found.pooler_output
    return features
