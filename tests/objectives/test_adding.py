"""Objectives in training: in a bare loop, in the Hugging Face Trainer, before an optimizer's step, on both hosts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import fallow
from fallow.core import schedule
from fallow.core.errors import ConfigError
from fallow.objectives.adding import add_objective
from fallow.objectives.ba_lora import BALoRA
from fallow.objectives.distillation import FeatureDistillation
from fallow.objectives.low_rank import LowRankChange
from fallow.objectives.unlearning import InvertedHinge, inverted_hinge

WORDS = 11


def language_model(seed: int = 0, hosted: str = "own", **options) -> nn.Module:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=WORDS, n_positions=16, n_embd=8, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    model = GPT2LMHeadModel(config)
    if hosted == "peft":
        model = get_peft_model(model, fallow.LoRAConfig(rank=2, target_modules=["c_attn", "c_fc"], **options))
    else:
        fallow.attach(model, "lora", ["c_attn", "c_fc"], rank=2, **options)
    for module in model.modules():
        if isinstance(module, fallow.Delta):
            module.randomize()
    return model.train()


def samples(n: int = 8, t: int = 7):
    generator = torch.Generator().manual_seed(1)
    found = []
    for i in range(n):
        ids = torch.randint(WORDS, (t,), generator=generator)
        labels = ids.clone()
        labels[: 1 + i % 4] = -100  # transformers counts the first label, which has no logit, too
        found.append({"input_ids": ids, "labels": labels})
    return found


def collated(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def trained(model):
    return {name: param.detach().clone() for name, param in model.named_parameters() if param.requires_grad}


def arguments(folder, **given):
    plain = {"per_device_train_batch_size": 4, "num_train_epochs": 1, "learning_rate": 0.1, "max_grad_norm": 0}
    return TrainingArguments(
        str(folder), report_to=[], save_strategy="no", logging_steps=1, optim="sgd", lr_scheduler_type="constant",
        use_cpu=True, dataloader_pin_memory=False, disable_tqdm=True, **{**plain, **given},
    )  # fmt: skip


class InOrder(Trainer):
    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def test_the_models_loss_becomes_the_sum_in_training_alone_and_a_loop_gets_the_same_by_hand():
    model, batch = language_model(), collated(samples(4))
    plain = model(**batch)
    objective = BALoRA("nlg", 1.0, 0.5, 0.5, k=2, candidates=3)
    wanted = plain.loss + objective(model, batch, plain)
    added = add_objective(model, BALoRA("nlg", 1.0, 0.5, 0.5, k=2, candidates=3))
    got = model(**batch)
    torch.testing.assert_close(got.loss, wanted)
    torch.testing.assert_close(added.last, (wanted - plain.loss).detach())
    params = [param for param in model.parameters() if param.requires_grad]
    grads = [torch.autograd.grad(loss, params, retain_graph=True) for loss in (got.loss, wanted)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(model(batch["input_ids"], labels=batch["labels"]).loss, wanted)
    assert torch.equal(model.eval()(**batch).loss, plain.loss)
    with torch.no_grad():
        assert torch.equal(model.train()(**batch).loss, plain.loss)
    added.remove()
    assert torch.equal(model(**batch).loss, plain.loss)


@pytest.mark.parametrize("hosted", ["own", "peft"])
def test_the_trainer_trains_with_it_like_a_bare_loop(hosted, tmp_path):
    data = samples()
    given = {"consistency": 1.0, "diversity": 0.5, "spectral": 0.5, "k": 2, "schedule": "linear"}

    loop = language_model(hosted=hosted)
    objective = BALoRA("nlg", **given)
    objective.resolve(2)
    optimizer = torch.optim.SGD([param for param in loop.parameters() if param.requires_grad], 0.1)
    for step in range(2):
        batch = collated(data[4 * step : 4 * step + 4])
        outputs = loop(**batch)
        (outputs.loss + objective(loop, batch, outputs)).backward()
        optimizer.step()
        optimizer.zero_grad()
        objective.advance()

    model = language_model(hosted=hosted)
    added = add_objective(model, BALoRA("nlg", **given))
    InOrder(
        model, arguments(tmp_path), train_dataset=data, data_collator=collated, callbacks=[fallow.Callback(model)]
    ).train()
    assert (added.objective.steps, added.objective.total) == (2, 2)
    without = language_model(hosted=hosted)
    InOrder(without, arguments(tmp_path), train_dataset=data, data_collator=collated).train()
    for name, wanted in trained(loop).items():
        torch.testing.assert_close(trained(model)[name], wanted, rtol=1e-5, atol=1e-6)
    assert any(not torch.allclose(trained(without)[name], wanted, atol=1e-4) for name, wanted in trained(loop).items())


def test_accumulated_batches_of_unlike_lengths_give_the_step_of_all_of_them_together(tmp_path):
    def run(**given):
        model = language_model()
        add_objective(model, BALoRA("nlg", 1.0, 0.5, 0.0, candidates=3))
        InOrder(model, arguments(tmp_path, **given), train_dataset=samples(), data_collator=collated).train()
        return trained(model)

    whole = run(per_device_train_batch_size=8)
    parts = run(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    for name, wanted in whole.items():
        torch.testing.assert_close(parts[name], wanted, rtol=1e-4, atol=1e-6)


def test_distillation_works_in_the_trainer_with_checkpointing(tmp_path):
    def run(**given):
        model = language_model()
        added = add_objective(model, FeatureDistillation(5.0, 1.0, blocks="h"))
        InOrder(model, arguments(tmp_path, **given), train_dataset=samples(), data_collator=collated).train()
        assert not added.objective.seen
        return trained(model)

    plain = run()
    checked = run(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False})
    for name, wanted in plain.items():
        torch.testing.assert_close(checked[name], wanted, rtol=1e-4, atol=1e-6)


def test_what_is_to_be_forgotten_goes_by_the_model_and_reaches_the_objective(tmp_path):
    data = samples()
    for i, row in enumerate(data):
        row["forget_labels"] = torch.full_like(row["labels"], -100)
        if i % 2:
            row["forget_labels"], row["labels"] = row["labels"], row["forget_labels"]
    model = language_model()
    batch = collated(data[:4])
    kept = {name: batch[name] for name in ("input_ids", "labels")}
    plain = model(**kept)
    wanted = plain.loss + 2 * inverted_hinge(plain.logits, batch["forget_labels"])
    add_objective(model, InvertedHinge(2.0))
    torch.testing.assert_close(model(**batch).loss, wanted)
    before = float(inverted_hinge(model(**batch).logits, batch["forget_labels"]).detach())
    InOrder(
        model, arguments(tmp_path, num_train_epochs=20, remove_unused_columns=False), train_dataset=data,
        data_collator=collated,
    ).train()  # fmt: skip
    assert float(inverted_hinge(model(**batch).logits, batch["forget_labels"]).detach()) < before


def test_a_classifier_keeps_more_of_what_it_was_under_label_noise():
    """The terms move their own measures; a small copy of the specification's experiment."""

    def train(**weights):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 12))
        fallow.attach(model, "lora", ["0", "2"], rank=4, start="pissa")
        x = torch.randn(64, 6)
        with fallow.disabled(model), torch.no_grad():
            before = model(x)
        noisy = before.argmax(1).where(torch.rand(64) > 0.4, torch.randint(12, (64,)))
        objective = BALoRA("nlu", **{"consistency": 0, "diversity": 0, "spectral": 0, "k": 2, **weights})
        optimizer = torch.optim.Adam([param for param in model.parameters() if param.requires_grad], 1e-2)
        for _ in range(80):
            logits = model(x)
            loss = F.cross_entropy(logits, noisy) + objective(model, x, logits)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        logits = model(x).detach()
        kl = F.kl_div(F.log_softmax(logits, -1), F.log_softmax(before, -1), reduction="batchmean", log_target=True)
        covariance = torch.cov(logits.T)
        sigma = torch.linalg.svdvals(logits)
        apart = covariance.square().sum() - covariance.diagonal().square().sum()
        return float(kl), float(apart) / 12, float(sigma[:2].sum() / sigma.sum())

    plain = train()
    assert train(consistency=0.15)[0] < 0.7 * plain[0]
    assert train(diversity=0.03)[1] < 0.5 * plain[1]
    assert train(spectral=1.0)[2] > plain[2] + 0.01


@pytest.mark.parametrize("hosted", ["own", "peft"])
def test_a_penalty_of_the_weights_is_added_before_the_step_by_either_host(hosted):
    given = {"objective": LowRankChange(0.3)}
    model, plain = language_model(hosted=hosted, **given), language_model(hosted=hosted)
    batch = collated(samples(4))
    steps = []
    for each in (model, plain):
        before = trained(each)
        optimizer = torch.optim.SGD([param for param in each.parameters() if param.requires_grad], 1.0)
        each(**batch).loss.backward()
        optimizer.step()
        steps.append({name: value - before[name] for name, value in trained(each).items()})
    fresh = language_model(hosted=hosted)
    wanted = LowRankChange(0.3)(fresh, None, None)
    params = dict(fresh.named_parameters())
    names = list(steps[0])
    for name, grad in zip(names, torch.autograd.grad(wanted, [params[name] for name in names]), strict=True):
        torch.testing.assert_close(steps[0][name] - steps[1][name], -grad, rtol=1e-3, atol=1e-5)
        assert grad.abs().max() > 0


@pytest.mark.parametrize("told", ["orthonormal", LowRankChange(0.3), [LowRankChange(0.3), "weight-perturbation"]])
@pytest.mark.parametrize("hosted", ["own", "peft"])
def test_a_loaded_adapter_that_is_trained_on_has_its_penalty_again(hosted, told, tmp_path):
    model = language_model(hosted=hosted, objective=told)
    torch.manual_seed(0)
    if hosted == "own":
        fallow.save(model, tmp_path / "adapter")
        again = fallow.load(GPT2LMHeadModel(model.config), tmp_path / "adapter")
        fallow.save(again, tmp_path / "twice")
        told_twice = [(tmp_path / name / "adapter_config.json").read_text() for name in ("adapter", "twice")]
        assert told_twice[0] == told_twice[1]
    else:
        model.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(
            GPT2LMHeadModel(model.base_model.model.config), tmp_path / "adapter", is_trainable=True
        )
    assert fallow.penalty(model) > 0
    torch.testing.assert_close(fallow.penalty(again), fallow.penalty(model))


def test_the_loops_of_the_documentation_train():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.v_proj = nn.Linear(12, 12), nn.Linear(12, 12)

        def forward(self, x):
            return self.v_proj(torch.tanh(self.q_proj(x)))

    page = (Path(__file__).parents[2] / "docs/concepts/objectives.md").read_text(encoding="utf-8")
    weights, outputs, *_ = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    for example in (weights, outputs + "\nassert float(objective.terms['consistency']) >= 0"):
        torch.manual_seed(0)
        names = {"model": Attention(), "batches": [torch.randn(4, 12) for _ in range(3)]}
        names["loss"] = lambda model, batch: (model(batch) - 1).square().mean()
        exec(example, names)
        assert any(param.grad is None or param.grad.abs().max() > 0 for param in names["model"].parameters())


def test_what_cannot_be_added_is_refused_with_what_to_do():
    model = language_model()
    with pytest.raises(ConfigError, match="is one of the weights alone; give it to"):
        add_objective(model, "low-rank-change")
    with pytest.raises(ConfigError, match=r"objective='ba-lore' is none \(did you mean 'ba-lora'"):
        add_objective(model, "ba-lore")
    added = add_objective(model, "ba-lora")
    batch = collated(samples(2))
    with pytest.raises(ConfigError, match="put out no loss to add objective 'ba-lora' to; give it labels"):
        model(input_ids=batch["input_ids"])
    assert not added.busy
    assert added.objective in schedule.attached(model)
    with pytest.raises(ConfigError, match="is of the model's outputs"):
        fallow.attach(language_model(), "lora", ["c_proj"], name="second", objective="ba-lora")
