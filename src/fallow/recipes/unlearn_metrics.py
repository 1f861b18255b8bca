"""How much a language model still knows of a text: memorisation accuracy, extraction likelihood, perplexity.

"Knowledge Unlearning for Mitigating Privacy Risks in Language Models", arXiv 2210.01504, whose measures LoKU reports.
x of T tokens, f(x_<t) what greedy decoding makes of its first t, x_>=t what really follows:

    MA(x)      sum_t 1[argmax p(. | x_<t) = x_t] / (T - 1)
    EL_n(x)    sum_(t=1)^(T-n) overlap_n(f(x_<t), x_>=t) / (T - n)    overlap_n(a, b): the share of a's n-grams in b
    PPL        exp of the mean cross-entropy over all tokens

A text counts as forgotten where MA and EL_n are not above those of text that the model has never seen.
"""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fallow.objectives.rows import target_rows
from fallow.recipes.unlearn_data import Example, batch_of


@torch.no_grad()
def recall(model: nn.Module, examples: Sequence[Example], size: int, pad: int) -> dict[str, float]:
    """`accuracy`: MA, the mean over the texts; `most_accurate`: the highest of one; `perplexity`, over all tokens."""
    device = next(model.parameters()).device
    accuracies: list[float] = []
    loss, tokens = 0.0, 0
    for start in range(0, len(examples), size):
        batch = batch_of(examples[start : start + size], pad, device)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        rows, targets = target_rows(logits, batch["labels"])
        chosen = logits.flatten(0, 1)[rows].float()
        hits = (chosen.argmax(-1) == targets).float()
        each = rows // logits.shape[1]
        count = len(batch["input_ids"])
        sums = torch.zeros(2, count, device=device).index_add_(1, each, torch.stack([hits, torch.ones_like(hits)]))
        accuracies += (sums[0] / sums[1]).tolist()
        loss += float(F.cross_entropy(chosen, targets, reduction="sum"))
        tokens += len(rows)
    return {
        "accuracy": sum(accuracies) / len(accuracies),
        "most_accurate": max(accuracies),
        "perplexity": math.exp(min(loss / tokens, 700.0)),  # the largest that a float holds
    }


@torch.no_grad()
def extraction_likelihood(
    model: nn.Module,
    examples: Sequence[Example],
    n: int,
    every: int = 1,
    size: int = 32,
    say: Callable[[str], None] = lambda text: None,
) -> float | None:
    """EL_n, the mean over the texts of more than n tokens; None where there is none.

    A prompt is part of every prefix. Prefixes of one length go through the model together, so that none is padded.
    `every`: take every so manyth prefix alone.
    """
    wanted = defaultdict(list)
    for number, example in enumerate(examples):
        for t in range(example.first, len(example.ids) - n + 1, every):
            wanted[t].append(number)
    scores: dict[int, list[float]] = defaultdict(list)
    for done, (t, numbers) in enumerate(sorted(wanted.items())):
        say(f"extracting, prefix {done + 1} of {len(wanted)}")
        for start in range(0, len(numbers), size):
            some = [examples[i] for i in numbers[start : start + size]]
            longest = max(len(example.ids) for example in some) - t
            prefix = torch.stack([example.ids[:t] for example in some])
            made = continued(model, prefix, longest)
            for number, example, tokens in zip(numbers[start : start + size], some, made, strict=True):
                real = example.ids[t:].tolist()
                scores[number].append(overlap(tokens[: len(real)], real, n))
    means = [sum(each) / len(each) for each in scores.values()]
    return sum(means) / len(means) if means else None


def overlap(made: Sequence[int], real: Sequence[int], n: int) -> float:
    """The share of the n-grams of `made` that `real` has."""
    grams = [tuple(made[i : i + n]) for i in range(len(made) - n + 1)]
    known = {tuple(real[i : i + n]) for i in range(len(real) - n + 1)}
    return sum(gram in known for gram in grams) / len(grams)


def continued(model: nn.Module, prefix: Tensor, count: int) -> list[list[int]]:
    """`count` tokens that greedy decoding sets behind each prefix (n, t); an end of text does not end it."""
    device = next(model.parameters()).device
    # as transformers calls it, before and from 5.24 on
    cached = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    given: dict[str, Any] = {"input_ids": prefix.to(device)}
    made: list[Tensor] = []
    for _ in range(count):
        outputs = model(**given, use_cache=True)
        token = outputs.logits[:, -1].argmax(-1, keepdim=True)
        made.append(token)
        cache = getattr(outputs, cached, None)
        given = (
            {"input_ids": torch.cat([prefix.to(device), *made], 1)}
            if cache is None
            else {"input_ids": token, cached: cache}
        )
    return torch.cat(made, 1).tolist()
