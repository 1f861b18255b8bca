"""What each ready method can do, as it was found by doing it: `capabilities.json`, which a script writes.

    capabilities("mosa")["merge"]["peft"]      # Cell("no", "'mosa' depends on its input ...")

`scripts/probe_capabilities.py` tries every method on small models and writes down what happened; nothing in the table
is declared by a method. A test tries again and fails where the table says something else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Literal, get_args

from fallow.core.errors import ConfigError, nearest

Answer = Literal["yes", "no", "n/a"]
Host = Literal["own", "peft"]
FILE = "capabilities.json"


@dataclass(frozen=True)
class Capability:
    """One column: `group`, what it belongs to; `title`, in a few words; `meaning`, what was done to find it out."""

    key: str
    group: str
    title: str
    meaning: str


@dataclass(frozen=True)
class Cell:
    """`note`: of a yes, what there is to add; of a no, the error that a user gets; of an n/a, why."""

    answer: Answer
    note: str = ""

    @classmethod
    def read(cls, text: str) -> Cell:
        answer, _, note = text.partition(": ")
        if answer not in get_args(Answer):
            raise ConfigError(f"{FILE} holds {text!r}, which is no answer{nearest(answer, get_args(Answer))}")
        return cls(answer, note)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"{self.answer}: {self.note}" if self.note else self.answer


LAYERS, USE, BASES, TRAINING, CONVERSION = "layers", "use", "bases", "training", "conversion"
COLUMNS: dict[str, Capability] = {
    row[0]: Capability(*row)
    for row in (
        ("linear", LAYERS, "Linear", "`nn.Linear`"),
        ("transposed", LAYERS, "Conv1D", "transformers' `Conv1D`, a linear layer that is stored transposed"),
        ("conv1d", LAYERS, "Conv1d", "`nn.Conv1d`, circular padding"),
        ("conv2d", LAYERS, "Conv2d", "`nn.Conv2d`, stride 2"),
        ("conv3d", LAYERS, "Conv3d", "`nn.Conv3d`"),
        ("grouped", LAYERS, "grouped conv", "`nn.Conv2d` of two groups"),
        ("embedding", LAYERS, "Embedding", "`nn.Embedding`"),
        ("fused", LAYERS, "fused QKV", "one Linear that holds three projections, each with a change of its own"),
        ("attention", LAYERS, "MultiheadAttention", "`nn.MultiheadAttention`, whose weights it reads itself"),
        ("experts", LAYERS, "3-D experts", "a stack of matrices (3, out, in) in one Parameter"),
        ("tied", LAYERS, "tied weight", "an Embedding whose weight is also the output layer's; acts in both"),
        ("merge", USE, "merge", "the merged weight gives the output of the unmerged adapter"),
        ("unmerge", USE, "unmerge bit for bit", "all weights and outputs are bit for bit as before the merge"),
        ("disable", USE, "disable bit for bit", "the base's output bit for bit, and the adapter's again after it"),
        ("several", USE, "several adapters", "two adapters in a model; switched, and one deleted, bit for bit"),
        ("together", USE, "active together", "two adapters active at once, which merge as they act"),
        ("mixed", USE, "mixed batch", "each sample of a batch with the adapter of its name, or none"),
        ("scale", USE, "scaling", "scale 0 gives the base's output, 0.5 another one, 1 the adapter's again"),
        ("save", USE, "save and load", "a saved adapter on a fresh base gives the same output"),
        ("hotswap", USE, "hotswap", "another file's values in the place of a loaded adapter, no Parameter exchanged"),
        ("sum", USE, "weighted sum", "`add_weighted_adapter`, `linear` and `cat`: the weighted sum, exactly"),
        ("sum_cut", USE, "sum by svd, ties, dare", "`svd`, `ties`, `dare_linear`, `dare_ties`, `magnitude_prune`"),
        ("resize", USE, "change of rank", "`importance()`, then `resize()` one up: the output stays"),
        ("bf16", BASES, "bf16", "a bfloat16 base; the adapter is trained in float32"),
        ("int8", BASES, "int8", '`quantize_(model, "int8")`: trains, and the base stays bit for bit'),
        ("nf4", BASES, "nf4", '`quantize_(model, "nf4")`, likewise'),
        ("fp8", BASES, "fp8", '`quantize_(model, "fp8")`, likewise'),
        ("bnb8", BASES, "bitsandbytes 8 bit", "`bitsandbytes.nn.Linear8bitLt`, on the CPU"),
        ("bnb4", BASES, "bitsandbytes 4 bit", "`bitsandbytes.nn.Linear4bit`, nf4, on the CPU"),
        ("merge_coded", BASES, "merge into nf4", "merged by coding anew; the old code comes back bit for bit"),
        ("checkpointing", TRAINING, "checkpointing", "the same gradients with `torch.utils.checkpoint`"),
        ("compile", TRAINING, "torch.compile", "`fullgraph=True`, `aot_eager`: the same output and gradients"),
        ("train", TRAINING, "fallow train", "`fallow train --method` on mini-sd, one step, adapter saved"),
        (
            "lora",
            CONVERSION,
            "exact LoRA",
            "`to_lora` on Linear, Conv1D, Conv2d, Conv3d and Embedding, where it takes them; PEFT's own LoRA, loading "
            "the folder, gives the same output. The rank is that of `Linear(24, 32)`",
        ),
    )
}


@cache
def _stored() -> dict[str, dict[str, dict[Host, Cell]]]:
    told = json.loads((resources.files(__package__) / FILE).read_text("utf-8"))
    return {slug: {key: _by_host(cell) for key, cell in cells.items()} for slug, cells in told.items()}


def _by_host(told: str | Mapping[Host, str]) -> dict[Host, Cell]:
    """A plain text is of both hosts."""
    return {host: Cell.read(told if isinstance(told, str) else told[host]) for host in get_args(Host)}


def probed() -> list[str]:
    """The slugs of the methods that the table has, in alphabetical order."""
    return sorted(_stored())


def capabilities(slug: str) -> dict[str, dict[Host, Cell]]:
    """{column: {"own": cell, "peft": cell}} of a method, in the order of COLUMNS; empty where it was not probed.

    "own" is `fallow.attach` (of selective methods, the optimizer over the model), "peft" is `get_peft_model`.
    """
    found = _stored().get(slug, {})
    return {key: found[key] for key in COLUMNS if key in found}
