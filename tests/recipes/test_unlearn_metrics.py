"""Memorisation accuracy, extraction likelihood and perplexity against their definitions, one position at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fallow.recipes.unlearn_data import Example, batch_of, pairs
from fallow.recipes.unlearn_metrics import continued, extraction_likelihood, overlap, recall

WORDS = 9


def model(kind: str = "gpt2") -> nn.Module:
    torch.manual_seed(0)
    if kind == "gpt2":
        shape = {"n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
        made = GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, bos_token_id=0, eos_token_id=0, **shape))
    else:
        shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        made = LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, max_position_embeddings=32, **shape))
    with torch.no_grad():
        for param in made.parameters():
            param.mul_(3)  # so that decoding does not repeat one word
    return made.eval()


def examples() -> list[Example]:
    generator = torch.Generator().manual_seed(1)
    lengths = ((9, 1), (12, 4), (6, 1), (12, 1), (4, 2))
    return [Example(torch.randint(WORDS, (t,), generator=generator), first) for t, first in lengths]


def greedy(network: nn.Module, ids: list[int], count: int) -> list[int]:
    for _ in range(count):
        ids = [*ids, int(network(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())]
    return ids[-count:]


def test_accuracy_and_perplexity_equal_a_loop_over_positions_whatever_the_batch():
    network, texts = model(), examples()
    each, losses = [], []
    with torch.no_grad():
        for text in texts:
            hits = []
            for t in range(text.first, len(text.ids)):
                logits = network(text.ids[None, :t]).logits[0, -1]
                hits.append(float(logits.argmax() == text.ids[t]))
                losses.append(float(F.cross_entropy(logits[None], text.ids[t : t + 1])))
            each.append(sum(hits) / len(hits))
    for size in (1, 2, 8):
        found = recall(network, texts, size, pad=3)
        assert found["accuracy"] == pytest.approx(sum(each) / len(each))
        assert found["most_accurate"] == pytest.approx(max(each))
        assert found["perplexity"] == pytest.approx(float(torch.tensor(losses).mean().exp()), rel=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_greedy_continuations_with_a_cache_are_those_without(kind):
    network = model(kind)
    prefix = torch.randint(WORDS, (3, 5))
    with torch.no_grad():
        assert continued(network, prefix, 7) == [greedy(network, row, 7) for row in prefix.tolist()]


@pytest.mark.parametrize("every", [1, 3])
def test_the_extraction_likelihood_equals_its_definition(every):
    network, texts, n = model(), examples(), 2
    scores = []
    with torch.no_grad():
        for text in texts:
            ids = text.ids.tolist()
            at = range(text.first, len(ids) - n + 1, every)
            scores.append(sum(overlap(greedy(network, ids[:t], len(ids) - t), ids[t:], n) for t in at) / len(at))
    got = extraction_likelihood(network, texts, n, every, size=2)
    assert got == pytest.approx(sum(scores) / len(scores))
    assert 0 < got < 1


def test_what_is_known_by_heart_is_extracted_whole_and_short_texts_have_none():
    class Counting(nn.Module):
        """Says the next number; without a cache."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, use_cache=False):
            from types import SimpleNamespace

            return SimpleNamespace(logits=F.one_hot((input_ids + 1) % WORDS, WORDS).float())

    known, other = Example(torch.arange(8), 1), Example(torch.arange(8).flip(0), 1)
    assert extraction_likelihood(Counting(), [known], 3) == 1.0
    assert extraction_likelihood(Counting(), [other], 3) == 0.0
    assert extraction_likelihood(Counting(), [known, other], 3) == 0.5
    assert extraction_likelihood(Counting(), [known], 9) is None


def test_overlap_counts_the_made_ngrams_that_are_real():
    assert overlap([1, 2, 3, 4], [1, 2, 3, 4], 2) == 1
    assert overlap([1, 2, 3, 1, 2], [9, 1, 2, 8, 8], 2) == 0.5  # 12, 23, 31, 12
    assert overlap([1, 2, 3], [3, 2, 1], 3) == 0


def test_batches_score_the_words_behind_the_prompt_alone():
    batch = batch_of([Example(torch.tensor([5, 6, 7]), 2), Example(torch.tensor([1, 2, 3, 4]), 1)], pad=8)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [1, 2, 3, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 7, -100], [-100, 2, 3, 4]]


def test_an_epoch_has_every_forgotten_text_once_each_with_a_retained_one():
    forget = [Example(torch.tensor([i, i]), 1) for i in range(5)]
    retain = [Example(torch.tensor([10 + i, i]), 1) for i in range(3)]
    epoch = list(pairs(forget, retain, 2, torch.Generator().manual_seed(0)))
    assert [len(one) for one, _ in epoch] == [2, 2, 1]
    assert [len(other) for _, other in epoch] == [2, 2, 1]
    assert sorted(int(each.ids[0]) for one, _ in epoch for each in one) == [0, 1, 2, 3, 4]
    assert {int(each.ids[0]) for _, other in epoch for each in other} <= {10, 11, 12}
