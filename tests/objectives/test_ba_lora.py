"""BA-LoRA: each term against its plain form, its masks, schedules, and its teacher."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fallow
from fallow.core.errors import ConfigError, DataError
from fallow.objectives import rows
from fallow.objectives.ba_lora import BALoRA
from fallow.objectives.output_terms import (
    divergence,
    entropy,
    normalised_distance,
    off_diagonal_covariance,
    singular_values,
    spectral_share,
)
from fallow.objectives.rows import Job, sum_over_rows
from fallow.objectives.teacher import resting, without_adapters

DOUBLE = torch.float64


class Words(nn.Module):
    """A language model of sorts: logits (n, t, v) of each token by itself, with dropout."""

    def __init__(self, words: int = 13, width: int = 8) -> None:
        super().__init__()
        self.table, self.drop = nn.Embedding(words, width), nn.Dropout(0.5)
        self.body, self.head = nn.Linear(width, width), nn.Linear(width, words)

    def forward(self, input_ids):
        return {"logits": self.head(self.drop(torch.tanh(self.body(self.table(input_ids)))))}


def tuned(start=None, **options):
    torch.manual_seed(0)
    model = Words().to(DOUBLE)
    fallow.attach(model, "lora", ["body", "head"], rank=2, start=start, **options)
    return model


def batch_of(n: int = 3, t: int = 6):
    ids = torch.randint(13, (n, t))
    labels = ids.clone()
    labels[:, :2] = -100
    labels[0, 4:] = -100
    return {"input_ids": ids, "labels": labels}


def changed(model):
    for delta in model.modules():
        if isinstance(delta, fallow.Delta):
            delta.randomize()
    return model


def plain_terms(objective, logits, original, labels=None):
    """L_CR, L_DR, L_SVDR from the equations, over rows gathered one by one."""
    if objective.task == "nlu":
        z, p = logits, original
    else:
        where = [(i, j) for i in range(labels.shape[0]) for j in range(labels.shape[1] - 1) if labels[i, j + 1] != -100]
        z, p = (torch.stack([each[i, j] for i, j in where]) for each in (logits, original))
    t, k = objective.temperature, objective.leading
    kl = [
        t**2 * sum(F.softmax(b / t, -1) * (F.log_softmax(b / t, -1) - F.log_softmax(a / t, -1)))
        for a, b in zip(z, p, strict=True)
    ]
    sigma = torch.linalg.svdvals(z)
    if objective.task == "nlu":
        c = torch.cov(z.T)
        d = z.shape[1]
        diversity = sum(c[i, j] ** 2 for i in range(d) for j in range(d) if i != j) / d
        return torch.stack(kl).mean(), diversity, -sigma[:k].sum() / sigma.sum()
    kept = [F.softmax(row.sort(descending=True).values[: objective.candidates], -1) for row in z]
    diversity = torch.stack([(q * q.log()).sum() for q in kept]).mean()
    return torch.stack(kl).mean(), diversity, -sigma[:k].sum() / z.norm()


@pytest.mark.parametrize("task", ["nlg", "nlu"])
def test_the_sum_and_its_gradient_equal_the_equations(task, monkeypatch):
    monkeypatch.setattr(rows, "CHUNK", 30)  # two rows at a time
    model, batch = changed(tuned()).eval(), batch_of()
    objective = BALoRA(task, 0.3, 0.7, 0.2, k=3, candidates=4)
    with torch.no_grad(), without_adapters(model):
        original = model(batch["input_ids"])["logits"]
    logits = model(batch["input_ids"])["logits"]
    if task == "nlu":
        logits, original = logits[:, 0], original[:, 0]
        objective.teacher = lambda batch: original
    terms = plain_terms(objective, logits, original, batch["labels"])
    wanted = sum(weight * term for weight, term in zip((0.3, 0.7, 0.2), terms, strict=True))
    got = objective(model, batch, {"logits": logits})
    torch.testing.assert_close(got, wanted)
    for name, term in zip(("consistency", "diversity", "spectral"), terms, strict=True):
        torch.testing.assert_close(objective.terms[name], term.detach())
    params = [param for param in model.parameters() if param.requires_grad]
    grads = [torch.autograd.grad(term, params, retain_graph=True) for term in (got, wanted)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("start", [None, "pissa"])
def test_at_the_start_the_consistency_is_zero_whatever_the_start(start):
    model, batch = tuned(start), batch_of()
    model.drop.p = 0.0
    objective = BALoRA("nlg", 1.0, 0, 0)
    value = objective(model, batch, model(batch["input_ids"]))
    assert abs(float(value.detach())) < 1e-12
    value = BALoRA("nlg", 1.0, 0, 0)(changed(model), batch, model(batch["input_ids"]))
    assert float(value.detach()) > 5e-4


def test_without_weights_nothing_is_added_and_no_teacher_runs():
    model, batch = tuned("pissa"), batch_of()
    outputs = model(batch["input_ids"])
    calls = []
    handle = model.register_forward_hook(lambda *a: calls.append(1))
    value = BALoRA("nlg", 0, 0, 0)(model, batch, outputs)
    handle.remove()
    assert float(value) == 0
    assert not value.requires_grad
    assert not calls


def test_the_gradient_of_the_consistency_is_the_gap_of_probabilities():
    tuned_, original = (torch.randn(7, 5, dtype=DOUBLE) for _ in range(2))
    t = 2.0
    tuned_.requires_grad_()
    value = sum_over_rows(tuned_, Job(torch.arange(7), lambda z, at: divergence(z, original[at], t))) / 7
    wanted = t**2 * F.kl_div(
        F.log_softmax(tuned_ / t, -1), F.log_softmax(original / t, -1), reduction="batchmean", log_target=True
    )
    torch.testing.assert_close(value, wanted)
    (grad,) = torch.autograd.grad(value, tuned_)
    torch.testing.assert_close(grad, t * (F.softmax(tuned_ / t, -1) - F.softmax(original / t, -1)).detach() / 7)


@pytest.mark.parametrize("shape", [(9, 4), (4, 9)])
def test_the_covariance_term_equals_a_loop_over_pairs_and_ignores_shifts_and_diagonal_covariance(shape):
    z = torch.randn(*shape, dtype=DOUBLE)
    c, d = torch.cov(z.T), shape[1]
    wanted = sum(c[i, j] ** 2 for i in range(d) for j in range(d) if i != j) / d
    torch.testing.assert_close(off_diagonal_covariance(z), wanted)
    torch.testing.assert_close(off_diagonal_covariance(z + torch.randn(d, dtype=DOUBLE)), wanted)
    # centred columns that are orthogonal
    q = torch.linalg.qr(torch.cat([torch.ones(9, 1, dtype=DOUBLE), torch.randn(9, 3, dtype=DOUBLE)], 1))[0][:, 1:]
    assert off_diagonal_covariance(q * torch.tensor([1.0, 2.0, 3.0], dtype=DOUBLE)) < 1e-25
    assert off_diagonal_covariance(z[:1]) == 0


@pytest.mark.parametrize("shape", [(11, 6), (6, 11)])
def test_the_spectral_shares_have_their_bounds_are_free_of_scale_and_differentiate(shape):
    low = torch.randn(shape[0], 2, dtype=DOUBLE) @ torch.randn(2, shape[1], dtype=DOUBLE)
    assert spectral_share(low, 2) == pytest.approx(1.0)
    z = torch.randn(*shape, dtype=DOUBLE, requires_grad=True)
    torch.testing.assert_close(singular_values(z), torch.linalg.svdvals(z))
    for against, most, least in (("sum", 1.0, 0.0), ("norm", math.sqrt(3), 3 / math.sqrt(6))):
        share = spectral_share(z, 3, against)
        assert least <= share.detach() <= most
        torch.testing.assert_close(spectral_share(z * 1e3, 3, against), share)
        assert torch.autograd.gradcheck(lambda m, how=against: spectral_share(m, 3, how), z)
    zero = torch.zeros(*shape, requires_grad=True)
    spectral_share(zero, 3).backward()
    assert zero.grad.abs().max() == 0
    rank_one = torch.outer(torch.randn(shape[0]), torch.randn(shape[1])).requires_grad_()
    spectral_share(rank_one, 3).backward()
    assert torch.isfinite(rank_one.grad).all()


def test_the_entropy_of_all_candidates_is_the_full_one_and_the_others_have_no_gradient():
    z = torch.randn(4, 10, dtype=DOUBLE)
    full = torch.distributions.Categorical(logits=z).entropy().sum()
    for candidates in (None, 10, 99):
        torch.testing.assert_close(entropy(z, candidates), full)
    torch.testing.assert_close(entropy(torch.zeros(1, 10), 6), torch.tensor(math.log(6)))
    z.requires_grad_()
    (grad,) = torch.autograd.grad(entropy(z, 3), z)
    kept = z.detach().topk(3).indices
    assert grad.gather(1, kept).abs().min() > 0
    assert grad.scatter(1, kept, 0.0).abs().max() == 0


def test_prompts_padding_and_last_positions_change_no_term_and_the_mask_is_that_of_the_cross_entropy():
    model, batch = changed(tuned()).eval(), batch_of()
    labels = batch["labels"]
    counts = torch.zeros_like(labels, dtype=torch.bool)
    counts[:, :-1] = labels[:, 1:] != -100
    logits = torch.randn(3, 6, 13, dtype=DOUBLE, requires_grad=True)
    original = torch.randn(3, 6, 13, dtype=DOUBLE)
    objective = BALoRA("nlg", 0.3, 0.7, 0.2, k=3, candidates=4, teacher=lambda batch: original)
    value = objective(model, batch, logits)
    (grad,) = torch.autograd.grad(value, logits)
    assert torch.equal(grad.abs().sum(-1) > 0, counts)
    loss = F.cross_entropy(logits[:, :-1].reshape(-1, 13), labels[:, 1:].reshape(-1))
    (of_loss,) = torch.autograd.grad(loss, logits)
    assert torch.equal(of_loss.abs().sum(-1) > 0, counts)
    noise = torch.randn_like(logits) * ~counts.unsqueeze(-1)
    torch.testing.assert_close(objective(model, batch, logits + noise), value)
    official = BALoRA("nlg", 0.3, 0.7, 0.2, k=3, candidates=4, shift=False, teacher=lambda batch: original)
    (grad,) = torch.autograd.grad(official(model, batch, logits), logits)
    assert torch.equal(grad.abs().sum(-1) > 0, labels != -100)


def test_a_batch_without_targets_gives_zero_with_a_graph():
    model, batch = tuned(), batch_of()
    batch["labels"][:] = -100
    value = BALoRA("nlg")(model, batch, model(batch["input_ids"]))
    assert float(value.detach()) == 0
    value.backward()
    assert model.head.adapters["default"].B.grad.abs().max() == 0


def test_one_classified_sample_has_no_covariance_and_a_number():
    logits = torch.randn(1, 5, requires_grad=True)
    objective = BALoRA("nlu", teacher=lambda batch: torch.randn(1, 5))
    value = objective(nn.Linear(2, 2), {}, logits)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(logits.grad).all()
    assert objective.terms["diversity"] == 0
    assert objective.terms["spectral"] == -1


def test_the_schedules_have_their_values_at_the_start_half_way_and_at_the_end():
    def at(share, **given):
        objective = BALoRA("nlg", 1.0, 2.0, 4.0, **given)
        objective.resolve(1000)
        objective.steps = round(1000 * share)
        return objective.now()

    assert at(0, consistency_schedule="cosine") == (1.0, 2.0, 4.0)
    assert at(0.5, consistency_schedule="cosine")[0] == pytest.approx(0.55)
    assert at(1, consistency_schedule="cosine")[0] == pytest.approx(0.1)
    assert [at(share, schedule="linear")[1] for share in (0, 0.05, 0.1, 1)] == pytest.approx([0, 1, 2, 2])
    assert [at(share, schedule="quadratic")[2] for share in (0, 0.05, 0.1, 1)] == pytest.approx([0, 1, 4, 4])
    assert [at(share, schedule="two-phase")[1] for share in (0.1, 0.2, 0.225, 0.25, 1)] == pytest.approx(
        [0, 0, 1, 2, 2]
    )
    assert BALoRA("nlg").now() == (0.025, 0.005, 0.005)
    assert BALoRA("nlu").now() == (0.15, 0.03, 0.03)
    assert BALoRA("nlu", variant="v1").now() == (1e-4, 3e-4, 1e-4)
    with pytest.raises(ConfigError, match="need the length of the run"):
        BALoRA("nlg", schedule="linear").now()


def test_the_first_versions_terms_are_kept():
    z, p = (torch.randn(6, 5, dtype=DOUBLE) for _ in range(2))
    nlu = BALoRA("nlu", 1.0, 0.0, 0.0, variant="v1", teacher=lambda batch: p)
    unit = [each / each.norm(dim=1, keepdim=True) for each in (z, p)]
    torch.testing.assert_close(nlu(None, {}, z), F.mse_loss(*unit))
    torch.testing.assert_close(normalised_distance(z, p) / 6, F.mse_loss(*unit))
    batch = {"labels": torch.arange(7).view(1, 7)}
    z, p = (torch.randn(1, 7, 5, dtype=DOUBLE) for _ in range(2))
    nlg = BALoRA("nlg", 1.0, 2.0, 4.0, variant="v1", teacher=lambda batch: p)
    log = [F.log_softmax(each[0, :-1], -1) for each in (z, p)]
    kl = F.kl_div(*log, reduction="batchmean", log_target=True)
    full = torch.distributions.Categorical(logits=z[0, :-1]).entropy().mean()
    sigma = torch.linalg.svdvals(z[0, :-1])
    torch.testing.assert_close(nlg(None, batch, z), kl - 2 * full - 4 * sigma[:3].sum() / sigma.sum())


def test_a_prediction_is_held_by_its_squared_distance():
    model, x = changed(tuned()), torch.randint(13, (2, 4))
    model.drop.p = 0.0
    outputs = model(x)
    with without_adapters(model):
        original = model(x)["logits"]
    value = BALoRA("prediction", 0.5)(model, {"input_ids": x}, outputs)
    torch.testing.assert_close(value, 0.5 * F.mse_loss(outputs["logits"].float(), original.float()), rtol=1e-5, atol=0)
    with pytest.raises(ConfigError, match="diversity and spectral must be 0"):
        BALoRA("prediction", 0.5, 0.1)


def test_many_rows_are_thinned_evenly_for_the_spectrum_alone():
    logits = torch.randn(1, 41, 6, dtype=DOUBLE)
    batch = {"labels": torch.zeros(1, 41, dtype=torch.long)}
    objective = BALoRA("nlg", 0, 0, 1.0, k=2, spectral_rows=5)
    some = logits[0, [0, 9, 19, 29, 39]]
    sigma = torch.linalg.svdvals(some)
    torch.testing.assert_close(objective(None, batch, logits), -sigma[:2].sum() / some.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_have_the_terms_of_float32(dtype):
    original = torch.randn(2, 60, 50).to(dtype)
    logits = (torch.randn(2, 60, 50) * 8).to(dtype).requires_grad_()
    wide = logits.detach().float().requires_grad_()
    batch = {"labels": torch.zeros(2, 60, dtype=torch.long)}
    objective = BALoRA("nlg", 0.025, 0.005, 0.005, teacher=lambda batch: original)
    with torch.autocast("cpu", torch.bfloat16):
        value = objective(None, batch, logits)
    assert value.dtype == torch.float32
    exact = objective(None, batch, wide)
    torch.testing.assert_close(value, exact)
    grads = torch.autograd.grad(value, logits)[0].float(), torch.autograd.grad(exact, wide)[0]
    assert (grads[0] - grads[1]).norm() < 0.02 * grads[1].norm()


def test_the_terms_keep_one_gradient_and_make_a_few_rows_at_a_time(peak_bytes, monkeypatch):
    monkeypatch.setattr(rows, "CHUNK", 1 << 14)
    logits = torch.randn(1, 400, 1024).requires_grad_()
    original = torch.randn(1, 400, 1024)
    batch = {"labels": torch.zeros(1, 400, dtype=torch.long)}
    one = logits.numel() * 4
    objective = BALoRA("nlg", 1.0, 1.0, 1.0, spectral_rows=32, teacher=lambda batch: original)
    assert peak_bytes(lambda: objective(None, batch, logits)) < 1.6 * one

    def plainly():
        wide, before = logits.float()[0, :-1], original.float()[0, :-1]
        kl = F.kl_div(F.log_softmax(wide, -1), F.log_softmax(before, -1), reduction="batchmean", log_target=True)
        log = F.log_softmax(wide, -1)
        return kl + (log.exp() * log).sum(-1).mean()

    assert peak_bytes(plainly) > 3 * one


def test_the_teacher_leaves_the_model_as_it_was():
    model = changed(tuned())
    model.body.eval()
    model.head.adapters["default"].A.requires_grad_(False)
    training = {name: module.training for name, module in model.named_modules()}
    frozen = {name: param.requires_grad for name, param in model.named_parameters()}
    state = torch.get_rng_state()
    BALoRA("nlg")(model, batch_of(), torch.randn(3, 6, 13, dtype=DOUBLE).requires_grad_())
    torch.set_rng_state(state)
    with without_adapters(model), resting(model):
        assert not model.drop.training
    with pytest.raises(RuntimeError), without_adapters(model), resting(model):
        raise RuntimeError
    assert {name: module.training for name, module in model.named_modules()} == training
    assert {name: param.requires_grad for name, param in model.named_parameters()} == frozen


def test_pefts_own_adapters_are_switched_off_without_thawing_what_is_frozen():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = Words()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["body", "head"], init_lora_weights=False)).eval()
    fallow_too = get_peft_model(Words(), fallow.LoRAConfig(rank=2, target_modules=["body"], init_weights=False)).eval()
    x = torch.randint(13, (2, 4))
    for wrapped in (model, fallow_too):
        name, frozen = next((n, p) for n, p in wrapped.named_parameters() if p.requires_grad)
        frozen.requires_grad_(False)
        with wrapped.disable_adapter():
            wanted = wrapped(input_ids=x)["logits"]
        frozen.requires_grad_(False)
        with without_adapters(wrapped):
            assert torch.equal(wrapped(input_ids=x)["logits"], wanted)
        assert not frozen.requires_grad, name
        assert not torch.equal(wrapped(input_ids=x)["logits"], wanted)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"task": "qa"}, "task='qa' must be one of"),
        ({"temperature": 0}, "temperature=0 must be a finite number above"),
        ({"k": 0}, "k=0 must be a whole number"),
        ({"candidates": 1}, "candidates=1 must be a whole number of at least 2"),
        ({"diversity": -1}, "diversity=-1 must be a finite number at least"),
        ({"schedule": "sudden"}, "schedule='sudden' must be one of"),
        ({"teacher": 3}, "teacher=3 must be a module"),
    ],
)
def test_nonsense_is_refused_by_name(given, message):
    with pytest.raises(ConfigError, match=message):
        BALoRA(**given)


def test_outputs_and_batches_that_do_not_fit_are_refused():
    model, batch = tuned(), batch_of()
    outputs = model(batch["input_ids"])
    with pytest.raises(DataError, match="the batch has no 'labels'"):
        BALoRA("nlg")(model, {"input_ids": batch["input_ids"]}, outputs)
    with pytest.raises(DataError, match=r'task="nlu" needs logits \(samples, classes\), and they are \(3, 6, 13\)'):
        BALoRA("nlu")(model, batch, outputs)
    with pytest.raises(DataError, match=r"labels \(3, 5\) do not fit logits \(3, 6, 13\)"):
        BALoRA("nlg")(model, {"labels": torch.zeros(3, 5, dtype=torch.long)}, outputs)
    with pytest.raises(ConfigError, match="has no adapter to switch off, so it cannot be its own teacher"):
        BALoRA("nlg")(Words(), batch, outputs)
    with pytest.raises(DataError, match=r"the teacher's logits are \(1, 2\)"):
        BALoRA("nlg", teacher=lambda batch: torch.zeros(1, 2))(model, batch, outputs)
    with pytest.raises(ConfigError, match="outputs=str have no logits"):
        BALoRA("nlg")(model, batch, "words")
