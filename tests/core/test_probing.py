"""`fallow.probe`: mean gradients, a model that is left as it was, one error for each mistake, cache and resuming."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from fallow.core.errors import ConfigError, DataError, ModelError
from fallow.core.probe import probe, probe_bytes
from fallow.core.probing.watching import Watching

Batch = tuple[Tensor, Tensor]


class Block(nn.Module):
    """Query, key and value of one input, a layer that is called twice, one that never runs."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.twice, self.idle, self.head = nn.Linear(width, width), nn.Linear(width, 4), nn.Linear(width, 5)
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(width)
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        mixed = torch.softmax(self.q(x) @ self.k(x).mT, -1) @ self.v(x)
        return self.head(self.drop(self.norm(self.twice(torch.tanh(self.twice(mixed))).mean(1))))


def batches(count: int = 3, size: int = 4, width: int = 12) -> list[Batch]:
    return [(torch.randn(size, 6, width), torch.randint(5, (size,))) for _ in range(count)]


def state(model: nn.Module) -> dict[str, Any]:
    """All that a probe must leave alone."""
    hooks = sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()
    ) + sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())
    return {
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "modes": [m.training for m in model.modules()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "required": [p.requires_grad for p in model.parameters()],
        "hooks": hooks,
        "fast path": torch.backends.mha.get_fastpath_enabled(),
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def with_marks() -> Block:
    """A model in a state that nobody would call the default one."""
    model = Block()
    model.q.weight.requires_grad_(False)
    model.k.weight.grad = torch.ones_like(model.k.weight)
    model.norm.eval()
    return model


# -- gradients --------------------------------------------------------------------------------------------------------


def test_gradients_are_those_of_the_mean_loss_and_nothing_of_the_model_changes() -> None:
    model, data = with_marks(), batches()
    before = state(model)
    stats = probe(model, data, {"gradient"})
    assert same(state(model), before)
    model.eval()
    names = ["q", "k", "v", "twice", "head"]
    weights = [model.get_submodule(name).weight.requires_grad_(True) for name in names]
    mean = torch.stack([F.cross_entropy(model(x), y) for x, y in data]).mean()
    for name, expected in zip(names, torch.autograd.grad(mean, weights), strict=True):
        assert torch.allclose(stats[name].gradient, expected, atol=1e-6)
        assert stats[name].gradient.dtype == torch.float32
    assert stats.missing == ("idle",)
    assert stats.batches == 3


@pytest.mark.parametrize("want", ["gradient", "input_covariance", "fisher", "activation"])
def test_a_batch_that_raises_leaves_the_model_as_it_was(want: str) -> None:
    model = with_marks()
    before = state(model)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        probe(model, [*batches(1), (torch.randn(2, 6, 11), torch.zeros(2, dtype=torch.long))], want)
    assert same(state(model), before)


def test_training_mode_drops_out_and_puts_running_means_back() -> None:
    model, data = with_marks(), batches()
    model.norm.train()
    before = state(model)
    torch.manual_seed(1)
    dropped = probe(model, data, "gradient", train=True)["head"].gradient
    assert same(state(model), before)
    torch.manual_seed(2)
    assert not torch.allclose(dropped, probe(model, data, "gradient", train=True)["head"].gradient)
    plain = [probe(model, data, "gradient")["head"].gradient for _ in range(2)]
    assert torch.equal(*plain)


def test_a_loss_in_float16_is_scaled_and_its_gradient_is_not() -> None:
    model, data = Block(), batches()

    def small(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch[0]).double(), batch[1]) * 1e-7

    full = probe(model, data, "gradient", small)["q"].gradient
    half = model.half()
    pairs = [(x.half(), y) for x, y in data]
    lost = probe(half, pairs, "gradient", small)["q"].gradient
    kept = probe(half, pairs, "gradient", small, loss_scale=2.0**16)["q"].gradient
    assert (kept - full).norm() / full.norm() < 0.02
    assert (lost - full).norm() / full.norm() > 0.5


def test_every_kind_of_batch_has_its_loss(tiny_gpt2: Callable[[], nn.Module]) -> None:
    model, data = Block(), batches(1)
    pair = probe(model, data, "gradient")["q"].gradient

    def closure(model: nn.Module) -> Tensor:
        return F.cross_entropy(model(data[0][0]), data[0][1])

    assert torch.allclose(probe(model, [closure], "gradient")["q"].gradient, pair)
    assert torch.allclose(probe(model, lambda: iter(data), "gradient")["q"].gradient, pair)
    gpt2, ids = tiny_gpt2(), torch.randint(64, (2, 8))
    text = probe(gpt2, [{"input_ids": ids, "labels": ids}], "gradient")["transformer.h.0.attn.c_attn"]
    assert text.shape == (96, 32)  # out, in: transformers' Conv1D stores it transposed
    gpt2.eval()
    gpt2(input_ids=ids, labels=ids).loss.backward()
    stored = gpt2.transformer.h[0].attn.c_attn.weight.grad
    assert torch.allclose(text.gradient, stored.T, atol=1e-7)


def test_a_tied_weight_has_one_sum_and_each_layer_sees_it_its_own_way(tiny_gpt2: Callable[[], nn.Module]) -> None:
    model, ids = tiny_gpt2(), torch.randint(64, (2, 8))
    stats = probe(model, [{"input_ids": ids, "labels": ids}] * 2, "gradient", targets=["wte", "lm_head"])
    table, head = stats["transformer.wte"], stats["lm_head"]
    assert (table.shape, head.shape) == ((32, 64), (64, 32))
    assert table.gradient.data_ptr() == head.gradient.data_ptr()
    model.eval()
    model(input_ids=ids, labels=ids).loss.backward()
    assert torch.allclose(head.gradient, model.lm_head.weight.grad, atol=1e-6)
    assert torch.equal(table.gradient, head.gradient.T)


def test_only_one_dense_gradient_is_alive_at_a_time(peak_bytes: Callable[[Callable[[], object]], int]) -> None:
    def layers() -> nn.Sequential:
        return nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(8)))

    model, data = layers(), [(torch.randn(2, 256), torch.randint(256, (2,)))] * 2
    one = 4 * 256 * 256
    sums = peak_bytes(lambda: probe(model, data, "gradient"))
    assert 8 * one <= sums < 10.5 * one  # of 8 layers the sums, and the gradient of one or two on their way
    few = peak_bytes(lambda: probe(model, data, "gradient", sketch=4))
    assert few < 4 * one


# -- mistakes ---------------------------------------------------------------------------------------------------------

MISTAKES: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("unknown", {"want": "gradeint"}, ConfigError, "'gradeint' cannot be gathered.*did you mean 'gradient'"),
    ("nothing", {"want": ()}, ConfigError, "asks for nothing"),
    ("option", {"want": "gradient", "sketsch": 4}, ConfigError, "no option 'sketsch'.*did you mean 'sketch'"),
    ("stray", {"want": "gradient", "points": 9}, ConfigError, "points= is for want='contribution'"),
    ("sketch", {"want": "gradient", "sketch": 0}, ConfigError, "sketch=0 must be a whole number"),
    ("ranks", {"want": "activation", "rank": 20}, ConfigError, "rank=20 is above components=16"),
    ("empty", {"want": "gradient", "batches": []}, DataError, "batches is empty"),
    ("none", {"want": "gradient", "batches": None}, ConfigError, "batches is a NoneType"),
    ("closure", {"want": "gradient", "batches": [lambda m: m(0)]}, ConfigError, "cannot tell batches apart"),
    ("targets", {"want": "gradient", "targets": ["qq"]}, ConfigError, "'qq' matches no weight"),
    ("tensor", {"want": "gradient", "batches": [torch.randn(2, 6, 12)]}, ConfigError, "no loss of a batch that is a T"),
    ("triple", {"want": "input_covariance", "batches": [(1, 2, 3)]}, ConfigError, "a tuple of 3"),
    ("vector", {"want": "gradient", "loss": lambda m, b: m(b[0])}, ConfigError, r"of the shape \(4, 5\)"),
    ("detached", {"want": "gradient", "loss": lambda m, b: m(b[0]).sum().detach()}, ConfigError, "does not depend on"),
    ("untuned", {"want": "contribution"}, ConfigError, "give tuned="),
    ("limit", {"want": "gradient", "limit": 1000}, ConfigError, r"limit=1000 bytes: this probe keeps at most 2.74 kB"),
    ("data", {"want": "gradient", "data": "x"}, ConfigError, "give cache="),
    ("mask", {"want": "activation", "mask": 3}, ConfigError, "mask=3 must be a key"),
    ("nan", {"want": "gradient", "loss": lambda m, b: m(b[0]).sum() * torch.nan}, DataError, "gradient of 'q' is not"),
    ("idle", {"want": "gradient", "targets": ["idle"]}, ConfigError, "does not depend on"),
    ("unseen", {"want": "input_covariance", "targets": ["idle"]}, DataError, "none of the 1 layers gave input_cov"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "error", "told"), [case[1:] for case in MISTAKES], ids=[case[0] for case in MISTAKES]
)
def test_a_mistake_is_one_error_by_name_and_nothing_is_written(
    given: dict[str, Any], error: type[Exception], told: str, tmp_path: Path
) -> None:
    model = Block()
    before = state(model)
    more = {} if "data" in given else {"cache": tmp_path / "cache"}
    with pytest.raises(error, match=told):
        probe(model, **({"batches": batches(1)} | more | given))
    assert same(state(model), before)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_batches_without_labels_are_refused_by_what_they_hold(tiny_gpt2: Callable[[], nn.Module]) -> None:
    with pytest.raises(DataError, match=r"gave no loss, for want of 'labels' \(the batch holds input_ids\)"):
        probe(tiny_gpt2(), [{"input_ids": torch.randint(64, (2, 8))}], "gradient")


def test_weights_without_values_and_wrapped_models_are_refused() -> None:
    with torch.device("meta"):
        model = Block()
    with pytest.raises(ModelError, match="'q' is on the meta device"):
        probe(model, batches(1), "gradient")


def test_bytes_are_told_before_the_run() -> None:
    model = Block()
    needed = probe_bytes(model, {"gradient", "fisher", "input_covariance", "activation"}, components=4)
    weights = 4 * 12 * 12 + 4 * 12 + 5 * 12
    assert needed.kept == {
        "gradient": 4 * weights, "fisher": 4 * weights, "input_covariance": 4 * 6 * 144,
        "activation": 4 * 6 * (4 * 12 + 3 * 12),
    }  # fmt: skip
    assert "keeps at most" in str(needed)
    sketched = probe_bytes(nn.Linear(1000, 800), "gradient", targets=".*", sketch=8)
    assert sketched.total == 2 * 4 * (8 * 800 + 17 * 1000)


def test_spectra_need_no_batches() -> None:
    model = Block()
    stats = probe(model, None, "spectrum")
    assert torch.allclose(stats["head"].spectrum, torch.linalg.svdvals(model.head.weight), atol=1e-6)
    assert stats.missing == ()
    assert model.runs == 0


def test_a_bar_says_what_is_kept_and_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    model = Block()
    probe(model, batches(2), "gradient", progress=True)
    assert "probe: keeps at most 2.74 kB" in capsys.readouterr().out.replace("\n", " ")
    told = io.StringIO()
    with Watching("keeps little", 4, 2, Console(file=told, force_terminal=True, width=120)) as bar:
        bar.step(0, 2)
        bar.step(1, 4)
    assert "pass 2 of at most 2" in told.getvalue()
    assert "4/4" in told.getvalue()


# -- files ------------------------------------------------------------------------------------------------------------

EVERYTHING = {"gradient", "input_covariance", "activation", "fisher"}


def equal(one: Any, other: Any) -> bool:
    for name in one:
        for field in ("gradient", "covariance", "fisher"):
            if not same(getattr(one[name], field), getattr(other[name], field)):
                return False
        if (one[name].activation is None) != (other[name].activation is None):
            return False
        if one[name].activation is not None and not same(vars(one[name].activation), vars(other[name].activation)):
            return False
    return list(one) == list(other) and one.missing == other.missing and one.batches == other.batches


def test_what_is_cached_is_found_without_a_forward_pass_and_only_for_the_same_request(tmp_path: Path) -> None:
    model, data = Block(), batches()
    first = probe(model, data, EVERYTHING, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    runs = model.runs
    again = probe(model, data, EVERYTHING, cache=tmp_path)
    assert model.runs == runs
    assert equal(first, again)
    others: list[Callable[[], Any]] = [
        lambda: probe(model, data[:2], EVERYTHING, cache=tmp_path),
        lambda: probe(model, data, {"gradient"}, cache=tmp_path),
        lambda: probe(model, data, EVERYTHING, cache=tmp_path, center=False),
        lambda: probe(model, data, EVERYTHING, cache=tmp_path, exclude=["head"]),
        lambda: probe(model, data, EVERYTHING, lambda m, b: m(b[0]).sum(), cache=tmp_path),
        lambda: probe(model, data, EVERYTHING, lambda m, b: m(b[0]).mean(), cache=tmp_path),
        lambda: (model.q.weight.data.add_(1e-6), probe(model, data, EVERYTHING, cache=tmp_path)),
    ]
    for number, other in enumerate(others):
        before = model.runs
        other()
        assert model.runs > before, number
    assert len(list(tmp_path.iterdir())) == 1 + len(others)


def test_a_damaged_or_renamed_cache_is_not_used(tmp_path: Path) -> None:
    model, data = Block(), batches()
    probe(model, data, "gradient", cache=tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    probe(model, data, "fisher", cache=tmp_path)
    other = next(path for path in tmp_path.iterdir() if path != file)
    for content in (whole[:-4], other.read_bytes()):
        file.write_bytes(content)
        runs = model.runs
        assert probe(model, data, "gradient", cache=tmp_path)["q"].gradient is not None
        assert model.runs > runs
    assert file.read_bytes() == whole


def test_batches_that_are_named_are_not_read_beforehand(tmp_path: Path) -> None:
    model, data = Block(), batches()
    probe(model, iter(data), "gradient", cache=tmp_path, data="three batches")
    runs = model.runs
    probe(model, iter(()), "gradient", cache=tmp_path, data="three batches")
    assert model.runs == runs
    with pytest.raises(ConfigError, match="goes through the batches more than once, and a list_iterator"):
        probe(model, iter(data), "gradient", cache=tmp_path)


def test_shuffled_batches_are_refused_by_the_cache(tmp_path: Path) -> None:
    calls: list[int] = []

    def drawn() -> Iterator[Batch]:
        calls.append(1)
        return iter(batches(2))

    with pytest.raises(DataError, match="batch 0 is another one than when the batches were read through"):
        probe(Block(), drawn, "gradient", cache=tmp_path)
    assert len(calls) == 2


@pytest.mark.parametrize("options", [{}, {"train": True}, {"per_sample": True, "sketch": 2}, {"passes": 2}])
def test_a_run_that_was_broken_off_goes_on_bit_for_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    model, data = Block(), batches(5)

    def breaking(model: nn.Module, batch: Batch) -> Tensor:
        if stop and batch[0] is data[4][0]:
            raise KeyboardInterrupt
        return F.cross_entropy(model(batch[0]), batch[1])

    stop = False
    torch.manual_seed(5)
    whole = probe(model, data, EVERYTHING, breaking, cache=tmp_path / "whole", save_every=2, **options)
    stop = True
    torch.manual_seed(5)
    with pytest.raises(KeyboardInterrupt):
        probe(model, data, EVERYTHING, breaking, cache=tmp_path / "broken", save_every=2, **options)
    (left,) = (tmp_path / "broken").iterdir()
    assert ".rank-0." in left.name
    stop, runs = False, model.runs
    torch.manual_seed(99)
    resumed = probe(model, data, EVERYTHING, breaking, cache=tmp_path / "broken", save_every=2, **options)
    assert equal(whole, resumed)
    first = len(data) * (5 if options.get("per_sample") else 1)
    assert model.runs - runs < first + (5 if options.get("passes") else 0)
    assert not left.exists()
    assert [path.read_bytes() for path in (tmp_path / "broken").iterdir()] == [
        path.read_bytes() for path in (tmp_path / "whole").iterdir()
    ]


# -- the page ---------------------------------------------------------------------------------------------------------


def test_the_examples_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs/concepts/probe.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for example in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(example, names)
    assert names["statistics"]["0"].fisher.shape == (32, 16)
    assert same(names["statistics"]["0"].fisher, names["again"]["0"].fisher)
    assert len(list((tmp_path / "probes").iterdir())) == 1
