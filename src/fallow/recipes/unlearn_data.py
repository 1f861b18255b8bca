"""Text to be forgotten and kept: read from files, turned into tokens, and put together to batches."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fallow.core.errors import DataError
from fallow.objectives.rows import IGNORED

PROMPTS, ANSWERS = ("prompt", "question", "input"), ("completion", "answer", "response", "output")


@dataclass(frozen=True)
class Text:
    """`prompt` is given and not scored; `words` are what counts."""

    prompt: str
    words: str

    @property
    def whole(self) -> str:
        space = not self.prompt or self.prompt[-1].isspace() or self.words[:1].isspace()
        return f"{self.prompt}{'' if space else ' '}{self.words}"


@dataclass(frozen=True)
class Example:
    """`ids` (t,); `first`: the first token that counts, at least 1, since nothing foretells the one at 0."""

    ids: Tensor
    first: int


def read_texts(path: Path, name: str) -> list[Text]:
    """The texts of a file; `name` is the setting's. DataError, with the line, where it is missing, empty or broken."""
    try:
        lines = path.expanduser().read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise DataError(f"{name}={path} does not exist; give a .txt or .jsonl file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{name}={path} cannot be read as text ({error}); give a .txt or .jsonl file") from None
    json_lines = path.suffix.lower() in (".jsonl", ".ndjson", ".json")
    found = [
        _of_json(line, f"{name}={path}, line {number}") if json_lines else Text("", line.strip())
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not found:
        raise DataError(f"{name}={path} holds no text; give one on each line")
    return found


def _of_json(line: str, where: str) -> Text:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is no JSON ({error}); a .jsonl file has one object on each line") from None
    if isinstance(entry, str):
        entry = {"text": entry}
    prompt = next((entry[key] for key in PROMPTS if key in entry), "") if isinstance(entry, dict) else ""
    words = next((entry[key] for key in ("text", *ANSWERS) if key in entry), None) if isinstance(entry, dict) else None
    if not isinstance(words, str) or not isinstance(prompt, str) or not words.strip():
        raise DataError(
            f'{where} has no words; give {{"text": ...}}, or {{"prompt": ..., "completion": ...}} with text in both'
        )
    return Text(prompt, words)


def refuse_shared(forget: Sequence[Text], others: Sequence[Text], name: str) -> None:
    """DataError where a text is to be forgotten and is among the others too."""
    both = {text.whole for text in forget} & {text.whole for text in others}
    if both:
        shown = min(both)
        raise DataError(
            f"{len(both)} text{'s are' if len(both) > 1 else ' is'} in forget and in {name}, such as "
            f"'{shown[:60]}'; take them out of one of the two"
        )


def examples_of(texts: Sequence[Text], tokenizer: Any, most: int, name: str) -> list[Example]:
    """Their tokens, at most so many of each. DataError where a text has none that counts."""
    found = []
    for number, text in enumerate(texts, 1):
        ids = tokenizer(text.whole, truncation=True, max_length=most)["input_ids"]
        given = len(tokenizer(text.prompt, truncation=True, max_length=most)["input_ids"]) if text.prompt else 0
        if len(ids) < 2 or given >= len(ids):
            raise DataError(
                f"text {number} of {name} ('{text.whole[:40]}') has {len(ids)} token{'s' * (len(ids) != 1)}, of which "
                f"none counts; give longer texts, or a max_length above {most}"
            )
        found.append(Example(torch.tensor(ids), max(1, given)))
    return found


def batch_of(examples: Sequence[Example], pad: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """input_ids, attention_mask, labels, all (n, t), padded on the right; labels are -100 where nothing counts."""
    longest = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), longest), pad)
    labels, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
    for row, example in enumerate(examples):
        t = len(example.ids)
        ids[row, :t], mask[row, :t] = example.ids, 1
        labels[row, example.first : t] = example.ids[example.first :]
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def pairs(
    forget: Sequence[Example], retain: Sequence[Example], size: int, generator: torch.Generator
) -> Iterator[tuple[list[Example], list[Example]]]:
    """One epoch over what is to be forgotten, in a new order; each with a retained text drawn at random."""
    order = torch.randperm(len(forget), generator=generator).tolist()
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        partners = torch.randint(len(retain), (len(chosen),), generator=generator).tolist()
        yield [forget[i] for i in chosen], [retain[i] for i in partners]
