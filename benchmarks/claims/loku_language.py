"""A small language model forgets 24 definitions that it knows by heart: LoKU, its loss without its start, ascent.

python benchmarks/claims/loku_language.py --wordnet /usr/share/wordnet --seeds 2

A GPT-2 of 2 blocks and 96 channels learns 400 WordNet glosses of 6 to 16 words, words as tokens, until it recites them.
24 are to be forgotten and the other 376 to be kept; 100 further ones, of the same words, it has never seen. Each method
goes through `fallow.recipes.unlearn`, which is `fallow unlearn`, for 6 epochs of 12 updates of 2 texts of each kind, at
rank 8, at its own rate: the one that on another seed has most MA of what is kept less that of what is forgotten. MA:
memorisation accuracy; EL: extraction likelihood of 3-grams; PPL: perplexity.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import protocol
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from fallow.recipes.unlearn import unlearn
from fallow.recipes.unlearn_config import UnlearnConfig

KNOWN, FORGOTTEN, UNSEEN = 400, 24, 100
WORDS = 600  # in the vocabulary: the most frequent of the glosses' words
EPOCHS, BATCH = 6, 2
LRS = (3e-4, 1e-3, 3e-3, 1e-2)
CONTENDERS = {
    "LoKU": {"method": "loku", "start": "fila"},
    "hinge, zero": {"method": "loku", "start": "zero"},
    "gradient difference": {"method": "gradient-difference"},
    "gradient difference, FILA": {"method": "gradient-difference", "start": "fila"},
    "gradient ascent": {"method": "gradient-ascent"},
}


def glosses(wordnet: Path) -> list[list[str]]:
    """The vocabulary; then the words of each gloss that it holds whole, in an order that hashes decide."""
    found: set[str] = set()
    for file in sorted(wordnet.glob("data.*")):
        for line in file.read_text(encoding="latin-1").splitlines():
            if " | " in line and not line.startswith(" "):
                found.add(line.split(" | ", 1)[1].split(";")[0].strip().lower())
    every = [gloss.split() for gloss in sorted(found, key=lambda gloss: hashlib.sha256(gloss.encode()).digest())]
    if not every:
        raise SystemExit(f"no data.* in {wordnet}: install WordNet's database (apt-get install wordnet-base)")
    counts: dict[str, int] = {}
    for words in every:
        for word in words:
            counts[word] = counts.get(word, 0) + 1
    usual = sorted(counts, key=lambda word: (-counts[word], word))[:WORDS]
    known = set(usual)
    return [usual, *(words for words in every if 6 <= len(words) <= 16 and known.issuperset(words))]


@lru_cache
def prepared(wordnet: Path, seed: int) -> Path:
    """A folder with model/, forget.txt, retain.txt, unseen.txt."""
    place = Path(tempfile.mkdtemp(prefix="fallow-loku-"))
    vocabulary, *every = glosses(wordnet)
    torch.manual_seed(seed)
    lines = [" ".join(every[i]) for i in torch.randperm(len(every))[: KNOWN + UNSEEN].tolist()]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", "<s>", *vocabulary])}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<s>", pad_token="<s>")
    shape = {"n_positions": 24, "n_embd": 96, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 1}
    shape |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=WORDS + 2, **shape)).train()
    told = tokenizer(lines[:KNOWN], return_tensors="pt", padding=True)
    ids, mask = told["input_ids"], told["attention_mask"]
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(60):
        for part in torch.randperm(KNOWN).split(50):
            labels = ids[part].masked_fill(mask[part] == 0, -100)
            optimizer.zero_grad()
            loss = model(input_ids=ids[part], attention_mask=mask[part], labels=labels).loss
            loss.backward()
            optimizer.step()
    model.save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    parts = {"forget": lines[:FORGOTTEN], "retain": lines[FORGOTTEN:KNOWN], "unseen": lines[KNOWN:]}
    for name, some in parts.items():
        (place / f"{name}.txt").write_text("\n".join(some) + "\n", encoding="utf-8")
    return place


def run(wordnet: Path, label: str, lr: float, seed: int, sweep: bool) -> dict[str, float]:
    place = prepared(wordnet, seed)
    with tempfile.TemporaryDirectory() as folder:
        settings = UnlearnConfig(
            model=str(place / "model"), forget=place / "forget.txt", retain=place / "retain.txt",
            reference=place / "unseen.txt", rank=8, lr=lr, epochs=EPOCHS, batch_size=BATCH, accumulation=1, ngram=3,
            extraction_texts=0 if sweep else FORGOTTEN, device="cpu", seed=seed, output=Path(folder) / "run",
            **CONTENDERS[label],
        )  # fmt: skip
        info = unlearn(settings).info
    before, after = info["before"], info["methods"][0]["after"]
    found = {
        "MA forgotten": after["forget"]["accuracy"],
        "MA kept": after["retain"]["accuracy"],
        "PPL kept": min(after["retain"]["perplexity"], 1e6),
        "PPL forgotten": min(after["forget"]["perplexity"], 1e6),
        "seconds": info["methods"][0]["seconds"],
        "set-up": info["methods"][0]["setup_seconds"],
        "score": after["retain"]["accuracy"] - after["forget"]["accuracy"],
    }
    if not sweep:
        found |= {
            "EL forgotten": after["forget"]["extraction"], "MA before": before["forget"]["accuracy"],
            "EL before": before["forget"]["extraction"], "MA unseen": info["reference"]["accuracy"],
            "EL unseen": info["reference"]["extraction"], "PPL kept before": before["retain"]["perplexity"],
            "PPL unseen": info["reference"]["perplexity"],
        }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"), help="folder with data.noun ...")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each contender at its best rate")
    given = parser.parse_args()

    def once(label: str, lr: float, seed: int, sweep: bool) -> dict[str, float]:
        return run(given.wordnet, label, lr, seed, sweep)

    described: dict[str, dict[str, Any]] = {
        label: {**one, "lrs": (*LRS[2:], 3e-2) if label == "hinge, zero" else LRS} for label, one in CONTENDERS.items()
    }
    told = {"note": "WordNet glosses", "known": KNOWN, "forgotten": FORGOTTEN, "epochs": EPOCHS, "batch": BATCH}
    protocol.SWEEP_SEEDS = protocol.SWEEP_SEEDS[:1]  # a seed is a model that has to learn by heart first
    protocol.table("loku-language", described, once, "score", given.seeds, told)


if __name__ == "__main__":
    main()
