"""The inverted hinge and gradient ascent: closed forms, masks, stability, and what they do in training."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fallow
from fallow.core.errors import ConfigError, DataError
from fallow.objectives.unlearning import GradientAscent, InvertedHinge, inverted_hinge, log_likelihood

DOUBLE = torch.float64


def closed_form(y, t):
    """Value and gradient on the logits of one row, from the paper."""
    p = F.softmax(y, -1)
    others = p.clone()
    others[t] = -1
    u = int(others.argmax())
    grad = p * (p[u] - p[t])
    grad[t] = p[t] * (1 + p[u] - p[t])
    grad[u] = -p[u] * (1 + p[t] - p[u])
    return 1 + p[t] - p[u], grad


def test_value_and_gradient_of_the_hinge_are_the_closed_form():
    logits = (3 * torch.randn(2, 5, 7, dtype=DOUBLE)).requires_grad_()
    labels = torch.randint(7, (2, 5))
    labels[0, 1:3] = -100
    value = inverted_hinge(logits, labels)
    (grad,) = torch.autograd.grad(value, logits)
    rows = [(i, j) for i in range(2) for j in range(4) if labels[i, j + 1] != -100]
    forms = {at: closed_form(logits.detach()[at], int(labels[at[0], at[1] + 1])) for at in rows}
    torch.testing.assert_close(value, sum(form[0] for form in forms.values()) / len(rows))
    for i in range(2):
        for j in range(5):
            wanted = forms[i, j][1] / len(rows) if (i, j) in forms else torch.zeros(7, dtype=DOUBLE)
            torch.testing.assert_close(grad[i, j], wanted)
    assert grad.sum(-1).abs().max() < 1e-15
    assert torch.autograd.gradcheck(lambda y: inverted_hinge(y, labels), logits)


def test_the_hinge_lies_between_0_and_2_and_ignored_labels_have_no_effect():
    logits, labels = 50 * torch.randn(64, 9), torch.randint(9, (64,))
    single = [float(inverted_hinge(row[None], label[None])) for row, label in zip(logits, labels, strict=True)]
    assert min(single) >= 0
    assert max(single) <= 2
    assert min(single) < 0.01
    assert max(single) > 1.99
    some = labels.clone()
    some[10:] = -100
    torch.testing.assert_close(inverted_hinge(logits, some), torch.tensor(single[:10]).mean())
    changed = logits.clone()
    changed[10:] = 0
    assert torch.equal(inverted_hinge(changed, some), inverted_hinge(logits, some))


def test_the_softmax_is_taken_of_logits_that_look_like_probabilities_too():
    logits, labels = torch.rand(8, 5, dtype=DOUBLE), torch.randint(5, (8,))
    torch.testing.assert_close(inverted_hinge(logits, labels), inverted_hinge(logits + 5, labels))


def test_one_sample_of_two_positions_and_none_that_count():
    logits = torch.randn(1, 2, 5, dtype=DOUBLE)
    value, _ = closed_form(logits[0, 0], 3)
    torch.testing.assert_close(inverted_hinge(logits, torch.tensor([[1, 3]])), value)
    logits.requires_grad_()
    nothing = inverted_hinge(logits, torch.tensor([[1, -100]]))
    nothing.backward()
    assert nothing == 0
    assert logits.grad.abs().max() == 0


def test_gradient_ascent_is_the_cross_entropy_with_the_other_sign():
    logits = torch.randn(2, 5, 7, dtype=DOUBLE, requires_grad=True)
    labels = torch.randint(7, (2, 5))
    labels[1, 3:] = -100
    wanted = -F.cross_entropy(logits[:, :-1].reshape(-1, 7), labels[:, 1:].reshape(-1))
    got = log_likelihood(logits, labels)
    torch.testing.assert_close(got, wanted)
    grads = [torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (got, wanted)]
    torch.testing.assert_close(*grads)


def test_the_hinge_swaps_the_true_class_with_the_runner_up_and_rests_while_ascent_runs_away():
    def train(loss):
        torch.manual_seed(0)
        model, x, label = nn.Linear(4, 6), torch.ones(1, 4), torch.tensor([2])
        with torch.no_grad():
            model.bias.copy_(torch.tensor([0.0, 1.0, 5.0, 3.0, 0.0, 1.0]))  # class 3 is the runner-up
        optimizer = torch.optim.SGD(model.parameters(), 1.0)
        sizes = []
        for _ in range(300):
            logits = model(x)
            logits.retain_grad()
            optimizer.zero_grad()
            value = loss(logits, label)
            value.backward()
            sizes.append(float(logits.grad.abs().max()))
            optimizer.step()
        return F.softmax(model(x).detach(), -1)[0], float(value.detach()), sizes

    p, value, sizes = train(inverted_hinge)
    assert p[2] < 0.01
    assert p.argmax() == 3
    assert p[3] > 0.95
    assert value < 0.05
    assert max(sizes) > 0.3
    assert sizes[-1] < 0.01
    _, value, sizes = train(log_likelihood)
    assert value < -500
    assert sizes[-1] > 0.9


def test_a_class_is_forgotten_and_the_others_kept_by_the_hinge_alone():
    """The specification's experiment with digits, on clusters: gradient difference wrecks what the hinge keeps."""
    torch.manual_seed(0)
    centres = 2 * torch.randn(8, 16)

    def draw(classes, n):
        y = classes[torch.randint(len(classes), (n,))]
        return centres[y] + torch.randn(n, 16), y

    base = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    every, gone = torch.arange(8), torch.tensor([3])
    kept = every[every != 3]
    optimizer = torch.optim.Adam(base.parameters(), 1e-2)
    for _ in range(200):
        x, y = draw(every, 64)
        optimizer.zero_grad()
        F.cross_entropy(base(x), y).backward()
        optimizer.step()

    def unlearn(loss):
        torch.manual_seed(1)
        model = copy.deepcopy(base)
        fallow.attach(model, "lora", ["0", "2", "4"], rank=4, alpha=8.0, start="pissa")
        optimizer = torch.optim.Adam([param for param in model.parameters() if param.requires_grad], 3e-3)
        for _ in range(60):
            (x, y), (others, theirs) = draw(gone, 16), draw(kept, 16)
            optimizer.zero_grad()
            (loss(model(x), y) + F.cross_entropy(model(others), theirs)).backward()
            optimizer.step()
        with torch.no_grad():
            (x, y), (others, theirs) = draw(gone, 200), draw(kept, 800)
            forgotten, known = (float((model(a).argmax(1) == b).float().mean()) for a, b in ((x, y), (others, theirs)))
            return forgotten, known, float(F.cross_entropy(model(x), y))

    forgotten, known, entropy = unlearn(inverted_hinge)
    assert forgotten < 0.05
    assert known > 0.9
    ascended = unlearn(log_likelihood)
    assert ascended[0] < 0.05
    assert ascended[1] < known - 0.2
    assert ascended[2] > 3 * entropy


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_the_value_of_float32_near_ties(dtype):
    logits = torch.randn(4, 40, 500).to(dtype).requires_grad_()
    labels = torch.randint(500, (4, 40))
    for loss in (inverted_hinge, log_likelihood):
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(logits, labels)
        torch.testing.assert_close(value, loss(logits.float(), labels))
        (grad,) = torch.autograd.grad(value, logits)
        assert torch.isfinite(grad).all()
        assert grad.abs().max() > 0


def test_a_batch_may_hold_both_kinds_of_labels():
    logits = torch.randn(2, 5, 7)
    forgotten, kept = torch.randint(7, (2, 5)), torch.randint(7, (2, 5))
    forgotten[1], kept[0] = -100, -100
    batch = {"labels": kept, "forget_labels": forgotten}
    for objective, loss in ((InvertedHinge(0.5), inverted_hinge), (GradientAscent(0.5), log_likelihood)):
        torch.testing.assert_close(objective(None, batch, logits), 0.5 * loss(logits[:1], forgotten[:1]))
        alone = {"labels": forgotten}
        torch.testing.assert_close(objective(None, alone, logits), 0.5 * loss(logits[:1], forgotten[:1]))
        assert objective.inputs == ("forget_labels",)


def test_nonsense_is_refused_by_name():
    with pytest.raises(ConfigError, match="weight=-2 must be a finite number"):
        InvertedHinge(-2)
    with pytest.raises(DataError, match="the batch has no 'labels'"):
        GradientAscent()(None, {}, torch.zeros(1, 2, 3))
    with pytest.raises(DataError, match=r"labels \(4,\) do not fit logits \(3, 6\)"):
        inverted_hinge(torch.zeros(3, 6), torch.zeros(4, dtype=torch.long))
