"""The pages of the objectives with cards: what they tell users to write runs, and nothing on them is left out."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import fallow
from fallow.catalogue import card
from fallow.objectives.unlearning import inverted_hinge

sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))

from method_pages import method_page

SLUGS = ["ba-lora", "loku"]


@pytest.fixture
def names():
    """What the examples take for granted: a language model, batches of text, some to forget and some to keep."""
    torch.manual_seed(0)
    shape = {"n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    ids = [torch.randint(11, (2, 9)) for _ in range(6)]
    batches = [{"input_ids": each, "labels": each} for each in ids]
    model = GPT2LMHeadModel(GPT2Config(vocab_size=11, **shape)).train()
    return {"model": model, "batches": batches, "forget": batches[:3], "retain": batches[3:]}


@pytest.mark.parametrize("slug", SLUGS)
def test_the_example_trains(slug, names):
    before = {name: value.clone() for name, value in names["model"].state_dict().items()}
    exec(card(slug).use, names)
    model = names["model"]
    if slug == "loku":
        outputs = model(**names["forget"][0])
        assert 0 < inverted_hinge(outputs.logits, names["forget"][0]["labels"]) < 2
        fallow.detach(model)  # what was merged stays
        moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
        assert {name.rsplit(".", 2)[-2] for name in moved} == {"c_attn", "c_proj", "c_fc"}
    else:
        assert set(names["objective"].terms) == {"consistency", "diversity", "spectral"}
        assert names["objective"].terms["consistency"] > 0
        with fallow.disabled(model):
            assert all(torch.equal(before[name], value) for name, value in model.state_dict().items() if name in before)


@pytest.mark.parametrize("slug", SLUGS)
def test_a_page_has_all_its_parts(slug):
    shown, page = card(slug), method_page(card(slug))
    parts = re.findall(r"^## (.*)$", page, flags=re.MULTILINE)
    assert parts == ["Equation", "When to use it", "Use", "Cost", "Claimed and found", "The method", "Reference"]
    assert f"**The claim:** {shown.claim}." in page
    assert f"::: {shown.home}.{shown.name}" in page
    assert f"`fallow train` has no `--method {slug}`: {shown.apart}." in page
    assert "concepts/objectives.md" in page
    for field in ("equation", "when", "cost", "found", "use"):
        assert len(getattr(shown, field)) > 200, field
