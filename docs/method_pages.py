"""The page of each method, made from its card, its class and what was measured.

# Bone        what it does; paper, defaults, where it is tested
## Equation, ## When to use it
## Use        in PEFT, without PEFT, on the command line; the tests run what stands there
## Options    read from the class
## Cost       the formula, and the figures of benchmarks/results
## Found      what the paper claims, what we measured
## The method, ## Reference        the module's own text, and its class
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from measured_cost import measured

from fallow.catalogue import Card
from fallow.catalogue.option import options_of

ROOT = Path(__file__).resolve().parents[1]
UNNAMED = {"peft": "Any PEFT method", "full": "Full fine-tuning"}
OPTIONS = {"sara": "--fraction 0.05", "shira": "--mask snip", "lora": "--rank 8", "peft": "--option peft_type=LOHA"}
IDEAS = {
    "selection": "some entries of the existing weights are trained in place",
    "delta": "a frozen weight is changed by a few trained tensors",
    "full": "every weight is trained",
}
TARGETS = '["q_proj", "v_proj"]'


BELOW = "see [The method](#the-method)"


@dataclass(frozen=True)
class Example:
    """How a weight parameterization is used: its options; a learning rate; lines of a loop that only it needs.

    `told`: whether it must know the length of the run. `at_steps`: what it does after an optimizer step. `around`: the
    `with` of each forward. `after`: lines once it is trained. `lora`:
    what `to_lora` is told, "" where a plain LoRA is exact. `functions`: what there is for users beside the class.
    """

    options: str = ""
    lr: str = "5e-4"
    told: bool = False
    at_steps: str = ""
    around: str = ""
    after: tuple[str, ...] = ()
    lora: str = ", rank=16"
    merges: bool = True
    functions: tuple[str, ...] = ()


EXAMPLES: dict[str, Example] = {
    "adalora": Example("rank=8", "1e-3", lora=""),
    "bone": Example("rank=64", "1e-3", lora=""),
    "codyra": Example("rank=16", told=True, at_steps="lets gates fall", lora=""),
    "diffora": Example("rank=8, alpha=16", lora=""),
    "dora": Example("rank=8, alpha=16"),
    "dylora": Example(
        'rank=8, update="full"',
        at_steps="draws the next rank",
        after=("with fallow.condition(model, rank=4):", "    ...  # the model at rank 4, in eval mode", ""),
        lora="",
    ),
    "hydra": Example("rank=2, sequential_rank=2", "1e-3"),
    "kasa": Example("rank=8", lora=""),
    "lamda": Example("rank=64, freeze=0.3", "2e-3", told=True, at_steps="freezes columns of B", lora=""),
    "loca": Example("components=1000", "5e-3", told=True, at_steps="changes between places and coefficients"),
    "loldu": Example("", "5e-3"),
    "lora": Example("rank=8, alpha=16", lora=""),
    "lora-xs": Example("rank=16", "5e-3", lora=""),
    "mos": Example("rank=8, equivalent_rank=2", lora=""),
    "mosa": Example("rank=16, experts=4", "1e-3", lora="", functions=("mosa.symmetric_kl",)),
    "nola": Example("num_basis=128, rank=16", "1e-2", lora=""),
    "pego": Example("rank=4, group=4", lora=""),
    "petalface": Example(
        "rank=8",
        around="fallow.condition(model, quality=scores(batch)):  # one in [0, 1] for each sample",
        lora="",
        merges=False,
        functions=("petalface.calibrated",),
        after=(
            "with fallow.condition(model, quality=0.9):  # for inputs of that quality alone",
            "    merged = model.merge_and_unload()",
        ),
    ),
    "randlora": Example("rank=32", "1e-3"),
    "salt": Example("ratio=0.1, rank=8", "2e-3"),
    "sltrain": Example("rank=8, density=0.03", functions=("sltrain_linear.sltrain", "sltrain_linear.SLTrainLinear")),
    "smora": Example("rank=64, active=8", told=True, at_steps="moves the balance", merges=False),
    "sora": Example("rank=8", "1e-3", told=True, at_steps="lets gates fall", lora=""),
    "svfit": Example("", "5e-3"),
    "tlora": Example("transform_rank=2, rank=4", "5e-4"),
    "vera": Example("rank=256", "4e-3"),
    "wara": Example("rank=8", "1e-3", lora=""),
    "wara-spatial": Example("rank=8", merges=False),
}


def title(card: Card) -> str:
    return card.name or UNNAMED[card.slug]


def is_delta(card: Card) -> bool:
    """Whether it is a weight parameterization of this package."""
    return card.ready and card.home.startswith("fallow.deltas.")


def method_page(card: Card) -> str:
    """The page in Markdown."""
    paper = f"[{card.title}]({card.link}), arXiv {card.arxiv}" if card.link else ""
    idea = f"{card.idea}: {IDEAS[card.idea]}" if card.idea in IDEAS else card.idea
    tested = ", ".join(f"`{path}`" for path in card.tested.split(", "))
    facts = [("Name", f"`{card.slug}`"), ("Paper", paper), ("Idea", idea), ("Defaults", card.defaults)]
    facts += [("Tested in", tested)]
    lines = [f"# {title(card)}", "", f"{card.purpose[0].upper()}{card.purpose[1:]}.", "", "| | |", "| --- | --- |"]
    lines += [f"| {name} | {text} |" for name, text in facts if text]
    lines += [
        *_section("Equation", card.equation),
        *_section("When to use it", card.when),
        "",
        "## Use",
        "",
        *_use(card),
    ]
    lines += [*_options(card), *_section("Cost", card.cost), *measured(card.slug)]
    lines += ["", "## Claimed and found", "", f"**The claim:** {card.claim}."]
    lines += ["", "**What we measured:**", "", card.found.strip()] if card.found else []
    if card.home:
        lines += ["", "## The method", "", _module_text(card), "", "## Reference", "", *_reference(card)]
    return "\n".join(lines) + "\n"


def _section(name: str, text: str) -> list[str]:
    return ["", f"## {name}", "", text.strip("\n")] if text else []


def _reference(card: Card) -> Iterator[str]:
    if is_delta(card):
        yield f"`fallow.{card.name}Config` is its configuration in PEFT, `fallow.{card.name}` what stands in a layer."
        yield "Saving, loading, several adapters, merging and the classes' reference are those of"
        yield "[all of them](../concepts/deltas.md)."
        for name in EXAMPLES[card.slug].functions if card.slug in EXAMPLES else ():
            yield from ("", f"::: fallow.deltas.{name}", "    options:", "      members: [to_dense]")
    elif card.idea == "update rule":
        yield from (f"::: {card.home}.{card.name}", "    options:", "      members: [bind, release]", "")
        yield "Others of its kind: [low-rank optimizers](../concepts/low-rank-optimizers.md),"
        yield "[LISA and rules for LoRA](../concepts/optimizers.md)."
    elif card.idea == "start and budget":
        yield from (f"::: {card.home}.{card.name}", "    options:", "      members: []", "")
        yield "Others of its kind, and what takes them: [starts](../concepts/starts.md),"
        yield "[budgets](../concepts/budgets.md)."
    elif card.idea == "objective":
        yield from (f"::: {card.home}.{card.name}", "    options:", "      members: []", "")
        yield "Others of its kind, in loops and in the Trainer: [objectives](../concepts/objectives.md)."
    else:
        yield from (f"::: {card.home}.{card.name}", "    options:", "      members: [from_official, from_peft]", "")
        yield "Saving, loading, scales and resuming are those of [every selective method](../python.md)."


# -- how to use it ----------------------------------------------------------------------------------------------------


def _use(card: Card) -> Iterator[str]:
    if is_delta(card):
        example = EXAMPLES.get(card.slug, Example())
        yield from ("In PEFT:", "", "```python", *in_peft(card), "```", "")
        if example.at_steps:
            yield from (
                "The Hugging Face Trainer takes `callbacks=[fallow.Callback(model)]` for what happens at steps.",
                "",
            )
        yield from ("Without PEFT, in any torch model, with the same loop:", "")
        yield from ("```python", *without_peft(card), "```", "")
        if card.slug == "sltrain":
            yield from ("From scratch, in place of the layers themselves:", "", "```python", *PRETRAINING, "```", "")
    elif card.use or card.idea in ("selection", "update rule"):
        yield from ("```python", card.use.strip("\n") or "\n".join(over_a_model(card)), "```", "")
    if line := command(card):
        yield from ("On the command line:", "", "```bash", line, "```")
    elif card.apart:
        yield f"`fallow train` has no `--method {card.slug}`: {card.apart}."


PRETRAINING = [
    "import torch",
    "",
    "from fallow.deltas.sltrain import sltrain",
    "",
    'names = sltrain(model, rank=64)  # linear layers whose path holds "attn", "attention" or "mlp"',
    "optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)",
    "for batch in batches:",
    "    loss(model, batch).backward()",
    "    optimizer.step()",
    "    optimizer.zero_grad()",
    "for name in names:",
    "    model.set_submodule(name, model.get_submodule(name).to_dense())  # plain Linear layers again",
]


def in_peft(card: Card) -> list[str]:
    """The lines of the example with PEFT, in which `model`, `batches` and `loss` are the user's."""
    example = EXAMPLES.get(card.slug, Example())
    given = f"{example.options}, " if example.options else ""
    parameters = "[param for param in model.parameters() if param.requires_grad]"
    lines = ["import torch", "from peft import get_peft_model", "", "import fallow"]
    lines += ["from fallow.core import schedule", ""] if example.told else [""]
    lines += [f'config = fallow.{card.name}Config({given}target_modules={TARGETS})  # or "all-linear"']
    lines += ["model = get_peft_model(model, config)"]
    lines += ["schedule.resolve(model, len(batches))  # how long the run is, in steps"] if example.told else []
    lines += [f"optimizer = torch.optim.AdamW({parameters}, lr={example.lr})", "", *_loop(example), ""]
    lines += ['model.save_pretrained("adapter")', *example.after]
    lines += (
        [f'fallow.to_lora(model, "plain-lora"{example.lora})  # for whatever loads LoRA alone']
        if example.merges
        else []
    )
    lines += ["merged = model.merge_and_unload()  # W' in the place of W"] if example.merges else []
    return lines


def _loop(example: Example) -> Iterator[str]:
    yield "for batch in batches:"
    if example.around:
        yield from (f"    with {example.around}", "        loss(model, batch).backward()")
    else:
        yield "    loss(model, batch).backward()"
    yield "    optimizer.step()"
    if example.at_steps:
        yield f"    fallow.step(model)  # {example.at_steps}"
    yield "    optimizer.zero_grad()"


def without_peft(card: Card) -> list[str]:
    """The lines of the example without PEFT; `other` is a second model of the same base."""
    example = EXAMPLES.get(card.slug, Example())
    given = f", {example.options}" if example.options else ""
    lines = ["import fallow", "", f'fallow.attach(model, "{card.slug}", {TARGETS}{given})', "..."]
    lines += ['fallow.save(model, "adapter")', 'fallow.load(other, "adapter")']
    return (
        [*lines, "fallow.merge(other)  # fallow.unmerge(other) takes it out again, bit for bit"]
        if example.merges
        else lines
    )


def command(card: Card) -> str:
    """The line that trains with it, "" where the recipe does not."""
    if card.apart or card.idea not in IDEAS:
        return ""
    options = EXAMPLES[card.slug].options if card.slug in EXAMPLES and card.slug not in OPTIONS else ""
    plain = [f" --option {part.replace(chr(34), '')}" for part in options.split(", ") if part]
    return f"fallow train --method {card.slug}{''.join(plain)}" + (
        f" {OPTIONS[card.slug]}" if card.slug in OPTIONS else ""
    )


def over_a_model(card: Card) -> list[str]:
    """The lines of the example of an optimizer over a model: the selective ones can save what they trained."""
    more = ", batches=batches, loss=loss" if card.slug == "lt-sft" else ""
    return [
        "import fallow",
        "",
        f"optimizer = fallow.{card.name}(model{more})  # in place of torch.optim.AdamW(model.parameters())",
        "for batch in batches:",
        "    loss(model, batch).backward()",
        "    optimizer.step()",
        "    optimizer.zero_grad()",
        *(['optimizer.save("adapter.safetensors")'] if card.idea == "selection" else []),
    ]


# -- what there is to be set, and the module's own words ---------------------------------------------------------------


def _options(card: Card) -> list[str]:
    rows = [
        f"| `{option.name}` | `{option.default}` | {_cell(option.meaning).replace('see above', BELOW)} |"
        for option in options_of(card)
    ]
    if not rows:
        return []
    shared = "Those that all methods share (`target_modules`, `patterns`, `fused`, `seed`, ...) stand"
    head = ["", "## Options", "", "| name | default | meaning |", "| --- | --- | --- |"]
    return [*head, *rows, "", f"{shared} in [Weight parameterizations](../concepts/deltas.md)."]


def _cell(text: str) -> str:
    """One line of text with nothing in it that Markdown would take for its own, but code."""
    plain = {"<": "&lt;"}  # which Markdown takes no backslash for
    return re.sub(r"`[^`]*`|[*_<|]", lambda f: f[0] if len(f[0]) > 1 else plain.get(f[0], f"\\{f[0]}"), text)


def _module_text(card: Card) -> str:
    """The text at the top of the method's module; indented lines become a block of code, as they are meant."""
    path = ROOT / "src" / Path(*card.home.split(".")).with_suffix(".py")
    text = path.read_text(encoding="utf-8").split('"""')[1]
    return "\n".join(line if line.startswith("    ") else _cell(line) for line in text.strip().splitlines())
