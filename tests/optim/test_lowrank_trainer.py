"""Low-rank optimizers under the Hugging Face Trainer and Accelerate: trained, saved, resumed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fallow

WORDS, WIDTH = 40, 24
PAGE = Path(__file__).parents[2] / "docs/concepts/low-rank-optimizers.md"
accelerate = pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")


class Net(nn.Module):
    """A language model's parts in small: an embedding, blocks, a norm, a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norm, self.lm_head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden = self.embed(x)
        for block in self.blocks:
            hidden = hidden + torch.tanh(block(hidden))
        logits = self.lm_head(self.norm(hidden))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def texts() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(WORDS, (9,), generator=generator) for _ in range(64)]
    return [{"x": row[:-1], "labels": row[1:]} for row in rows]


@pytest.fixture(autouse=True)
def no_state_of_accelerate_is_left() -> Iterator[None]:
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def trained(
    folder: Path, options: dict[str, Any], resume: Path | None = None, whole: bool = False, lisa: bool = False,
    bf16: bool = False, clip: float = 1.0,
) -> tuple[nn.Module, Any, float]:  # fmt: skip
    """The model, its optimizer and the last loss after 10 steps of 2 passes; saved after 6."""
    model = Net()
    given = {"lr": 1e-2, "rank": 4, "scale": 1.0, "refresh_every": 4, **options} | ({"model": model} if whole else {})
    arguments = transformers.TrainingArguments(
        folder, max_steps=10, per_device_train_batch_size=4, gradient_accumulation_steps=2, save_steps=6, report_to=[],
        use_cpu=True, disable_tqdm=True, lr_scheduler_type="linear", bf16=bf16, weight_decay=0.01, logging_steps=1,
        max_grad_norm=clip,
    )  # fmt: skip
    follow = fallow.LISA(model, active=1, interval=3) if lisa else None
    trainer = transformers.Trainer(
        model, arguments, train_dataset=texts(), optimizer_cls_and_kwargs=(fallow.GaLore, given),
        callbacks=[fallow.Callback(follow)] if follow is not None else None,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume and str(resume))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    own = trainer.optimizer
    while not isinstance(own, fallow.GaLore):
        own = own.optimizer
    return model, own, losses[0] - losses[-1]


@pytest.mark.parametrize(
    "options",
    [
        {"bf16": True},
        {"options": {"state_dtype": "8bit", "stagger": True, "residual": "fira"}, "whole": True},
        {"lisa": True, "whole": True},
    ],
    ids=str,
)
def test_the_trainer_trains_with_galore_and_resumes_bit_for_bit(tmp_path, options):
    options = {"options": {}, **options}
    model, own, fallen = trained(tmp_path / "whole", **options)
    assert fallen > 0.1
    assert own.param_groups[0]["steps"] == 10
    resumed, other, _ = trained(tmp_path / "rest", resume=tmp_path / "whole" / "checkpoint-6", **options)
    assert other.param_groups[0]["steps"] == 10
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
    if options.get("lisa"):
        assert sum(param in own.state for block in model.blocks for param in block.parameters()) <= 2


def test_of_the_trainers_own_groups_every_matrix_is_projected_and_of_the_model_what_the_paper_projects(tmp_path):
    _, own, _ = trained(tmp_path / "groups", {})
    assert [group["weight_decay"] for group in own.param_groups] == [0.01, 0.0]
    assert sum(site.rank is not None for site in own.sites()) == 5
    _, own, _ = trained(tmp_path / "sides", {"largest_side": WORDS - 1})
    assert sum(site.rank is not None for site in own.sites()) == 3
    _, own, _ = trained(tmp_path / "model", {"weight_decay": 0.02}, whole=True)
    assert {site.name for site in own.sites() if site.rank is not None} == {f"blocks.{i}.weight" for i in range(3)}
    assert all(group["weight_decay"] == 0.02 for group in own.param_groups)


def test_the_example_of_the_page_trains(tmp_path):
    (text,) = re.findall(r"```python\n(trainer = .*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    model = Net()
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    given = {"Trainer": transformers.Trainer, "fallow": fallow, "model": model, "arguments": arguments, "data": texts()}
    exec(text, given)
    assert not any(torch.equal(a, b) for a, b in zip(model.parameters(), Net().parameters(), strict=True))
    assert sum(site.rank is not None for site in given["trainer"].optimizer.optimizer.sites()) == 3


def test_an_optimizer_that_is_made_beforehand_trains_alike(tmp_path):
    model = Net()
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=10, per_device_train_batch_size=4, gradient_accumulation_steps=2, report_to=[],
        use_cpu=True, disable_tqdm=True, save_strategy="no", lr_scheduler_type="linear",
    )  # fmt: skip
    own = fallow.GaLore(model, lr=1e-2, rank=4, scale=1.0, refresh_every=4, weight_decay=0.01)
    transformers.Trainer(model, arguments, train_dataset=texts(), optimizers=(own, None)).train()
    other, _, _ = trained(tmp_path / "named", {"weight_decay": 0.01}, whole=True)
    for one, expected in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, expected, rtol=0, atol=1e-7)


def test_updates_in_the_backward_pass_of_the_trainer_are_those_after_it(tmp_path):
    after, _, _ = trained(tmp_path / "after", {}, whole=True, clip=0.0)
    within, own, _ = trained(tmp_path / "within", {"mode": "in_backward", "accumulate": 2}, whole=True)
    assert own.param_groups[0]["steps"] == 10
    for one, other in zip(after.parameters(), within.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def looped(folder: Path, steps: range, start: Path | None = None, save_after: int | None = None) -> list[Tensor]:
    """Accelerate's loop with accumulation; the weights at its end."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    model = Net()
    own = fallow.Fira(model, lr=1e-2, rank=4, refresh_every=4, state_dtype="8bit")
    model, optimizer = accelerator.prepare(model, own)
    if start is not None:
        accelerator.load_state(str(start))
    data = texts()
    for step in steps:
        for half in range(2):
            rows = data[4 * (2 * step + half) : 4 * (2 * step + half) + 4]
            with accelerator.accumulate(model):
                batch = {key: torch.stack([row[key] for row in rows]) for key in ("x", "labels")}
                accelerator.backward(model(**batch)["loss"])
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        if step == save_after:
            accelerator.save_state(str(folder))
    assert own.param_groups[0]["steps"] == steps.stop
    return [param.detach() for param in model.parameters()]


def test_accelerate_accumulates_saves_and_resumes_bit_for_bit(tmp_path):
    whole = looped(tmp_path / "at-4", range(7), save_after=4)
    rest = looped(tmp_path / "none", range(5, 7), start=tmp_path / "at-4")
    assert all(torch.equal(one, other) for one, other in zip(whole, rest, strict=True))


def test_the_loss_scaler_of_accelerate_divides_its_scale_out_and_skips_infinite_steps():
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.Accelerator(cpu=True)
    found = []
    for scale in (None, 1024.0):
        model = Net()
        own = fallow.GaLore(model, lr=1e-2, rank=4)
        scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
        optimizer = accelerate.optimizer.AcceleratedOptimizer(own, device_placement=False, scaler=scaler)
        for step, row in enumerate(texts()[:4]):
            loss = model(row["x"][None], row["labels"][None])["loss"]
            loss = loss * float("inf") if step == 2 and scaler is not None else loss
            (scaler.scale(loss) if scaler is not None else loss).backward()
            if step != 2 or scaler is not None:
                optimizer.step()
            optimizer.zero_grad()
            assert optimizer.step_was_skipped == (step == 2 and scaler is not None)
        assert own.param_groups[0]["steps"] == 3
        found.append(torch.cat([param.detach().flatten() for param in model.parameters()]))
    torch.testing.assert_close(found[0], found[1])
