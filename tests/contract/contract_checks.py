"""What every selective method must keep to, whatever it selects, and the networks on which that is checked.

Each check takes the method's class, a subject (a network with its batches and its loss) and a folder. A method is built
through its public class alone, so these checks run on any class of the catalogue, and on one that a user registers.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint_sequential

import fallow
from fallow.core.errors import ConfigError, ModelError, SelectionError

SHARE, LR = 0.05, 1e-2


@dataclass(frozen=True)
class Subject:
    """`make()` gives the same network each time; `batch(seed)` its inputs; `output(model, batch, lean)` what it says,
    with gradient checkpointing where `lean`.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[int], tuple[Tensor, ...]]
    output: Callable[[nn.Module, tuple[Tensor, ...], bool], Tensor]

    def says(self, model: nn.Module, batch: tuple[Tensor, ...], lean: bool = False) -> Tensor:
        """The network's output on inputs of its own dtype; dropout falls the same way in each call."""
        dtype = next(model.parameters()).dtype
        torch.manual_seed(7)
        return self.output(model, tuple(x.to(dtype) if x.is_floating_point() else x for x in batch), lean)

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...], lean: bool = False) -> Tensor:
        return (self.says(model, batch, lean).float() - 0.5).square().mean()


def subject(kind: str, fixture: Callable[[str], Any]) -> Subject:
    """The network of that kind; `fixture` is pytest's `request.getfixturevalue`."""
    return SUBJECTS[kind](fixture)


def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def same_each_time() -> nn.Module:
        torch.manual_seed(0)
        return make()

    return same_each_time


def drawn(*shapes: tuple[int, ...]) -> Callable[[int], tuple[Tensor, ...]]:
    def batch(seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.randn(shape, generator=generator) for shape in shapes)

    return batch


def in_sequence(model: nn.Module, batch: tuple[Tensor, ...], lean: bool) -> Tensor:
    assert isinstance(model, nn.Sequential)
    return checkpoint_sequential(model, 2, batch[0], use_reentrant=False) if lean else model(batch[0])


def linear(fixture: Callable[[str], Any]) -> Subject:
    return Subject(fixture("mlp"), drawn((4, 80)), in_sequence)


def convolutional(fixture: Callable[[str], Any]) -> Subject:
    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 12, 3), nn.GroupNorm(3, 12), nn.SiLU(), nn.Conv2d(12, 16, 3), nn.Flatten(), nn.Linear(256, 5)
        )

    return Subject(seeded(make), drawn((4, 3, 8, 8)), in_sequence)


def transformer(fixture: Callable[[str], Any]) -> Subject:
    def batch(seed: int) -> tuple[Tensor, ...]:
        return (torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(seed)),)

    def output(model: Any, batch: tuple[Tensor, ...], lean: bool) -> Tensor:
        if lean:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model(input_ids=batch[0], use_cache=False).logits

    return Subject(seeded(lambda: fixture("tiny_gpt2")().train()), batch, output)


def unet(fixture: Callable[[str], Any]) -> Subject:
    def output(model: Any, batch: tuple[Tensor, ...], lean: bool) -> Tensor:
        if lean:
            model.enable_gradient_checkpointing()
        return model(batch[0], torch.tensor([3, 7]), batch[1]).sample

    return Subject(seeded(lambda: fixture("tiny_unet")().train()), drawn((2, 4, 8, 8), (2, 5, 16)), output)


def dit(fixture: Callable[[str], Any]) -> Subject:
    from diffusers import DiTTransformer2DModel

    def make() -> nn.Module:
        return DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8, patch_size=2,
            num_embeds_ada_norm=10,
        ).train()  # fmt: skip

    def output(model: Any, batch: tuple[Tensor, ...], lean: bool) -> Tensor:
        if lean:
            model.enable_gradient_checkpointing()
        return model(batch[0], torch.tensor([3, 7]), torch.tensor([1, 4])).sample

    return Subject(seeded(make), drawn((2, 4, 8, 8)), output)


SUBJECTS = {"linear": linear, "conv": convolutional, "transformer": transformer, "unet": unet, "dit": dit}


def build(method: type, model: nn.Module, subject: Subject, **options: Any) -> fallow.Selective:
    """The method through its public class: a twentieth of the entries, and batches where it cannot do without."""
    accepted = inspect.signature(method).parameters
    asked: dict[str, Any] = {"fraction" if "fraction" in accepted else "density": SHARE, "lr": LR, **options}
    if "batches" in accepted and accepted["batches"].default is inspect.Parameter.empty:
        asked |= {"batches": [subject.batch(100), subject.batch(101)], "loss": subject.loss}
    if "dense_steps" in accepted:
        asked["dense_steps"] = 2
    return method(model, **asked)


def train(model: nn.Module, optimizer: fallow.Selective, subject: Subject, seeds: range, **how: Any) -> None:
    """One step for each group of `accumulate` seeds."""
    accumulate, lean = how.get("accumulate", 1), how.get("lean", False)
    for seed in seeds:
        (subject.loss(model, subject.batch(seed), lean) / accumulate).backward()
        if (seed + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert one.keys() == other.keys()
    differing = [name for name in one if not torch.equal(one[name], other[name])]
    assert not differing, differing


def starts_as_the_base(method: type, subject: Subject, folder: Path) -> None:
    model = subject.make()
    before, said = weights(model), subject.says(model, subject.batch(0))
    build(method, model, subject)
    assert_same(weights(model), before)
    assert torch.equal(subject.says(model, subject.batch(0)), said)


def trains_as_many_entries_as_asked(method: type, subject: Subject, folder: Path) -> None:
    model = subject.make()
    sizes = {name: param.numel() for name, param in model.named_parameters()}
    optimizer = build(method, model, subject)
    chosen = optimizer.selected()
    if "fraction" in inspect.signature(method).parameters:
        assert optimizer.trained_parameters == round(SHARE * sum(sizes.values()))
    else:
        assert {name: k for name, (k, _) in chosen.items()} == {name: round(SHARE * sizes[name]) for name in chosen}
    assert all(n == sizes[name] for name, (_, n) in chosen.items())
    assert sum(proxy.numel() for proxy in optimizer.trainable()) == optimizer.trained_parameters
    for slot in optimizer.slots.values():
        assert bool((slot.index.diff() > 0).all())
        assert 0 <= slot.index.min() <= slot.index.max() < slot.weight.numel()


def gathers_the_true_gradient_and_keeps_no_dense_one(method: type, subject: Subject, folder: Path) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        model = subject.make().to(dtype)
        plain = copy.deepcopy(model)
        optimizer = build(method, model, subject)
        for seed in (0, 1):  # accumulated over two batches
            subject.loss(model, subject.batch(seed)).backward()
            subject.loss(plain, subject.batch(seed)).backward()
            assert all(param.grad is None for param in model.parameters())
        for slot in optimizer.slots.values():
            dense = plain.get_parameter(slot.name).grad
            true = torch.zeros(slot.index.numel()) if dense is None else dense.reshape(-1)[slot.index.long()]
            got = torch.zeros_like(true) if slot.proxy.grad is None else slot.proxy.grad
            torch.testing.assert_close(got, true.to(got.dtype), rtol=tolerance, atol=tolerance)
        optimizer.step()
        assert all(param.grad is None for param in model.parameters())
        optimizer.close()


def learns_and_moves_nothing_else(method: type, subject: Subject, folder: Path) -> None:
    model = subject.make()
    before = weights(model)
    optimizer = build(method, model, subject)
    first = subject.loss(model, subject.batch(0)).item()
    for _ in range(6):
        train(model, optimizer, subject, range(1))
    assert subject.loss(model, subject.batch(0)).item() < first
    for name, param in model.named_parameters():
        moved = (param.detach() != before[name]).reshape(-1)
        if name in optimizer.slots:
            moved[optimizer.slots[name].index.long()] = False
        assert not bool(moved.any()), name


def loads_onto_a_fresh_base(method: type, subject: Subject, folder: Path) -> None:
    model = subject.make()
    optimizer = build(method, model, subject)
    train(model, optimizer, subject, range(3))
    said = subject.says(model, subject.batch(0))
    for store, name, tolerance in (("value", "exact.safetensors", 0.0), ("delta", "adapter", 1e-5)):
        optimizer.save(folder / name, store=store)
        fresh = subject.make()
        fallow.Adapters(fresh).add("it", folder / name)
        torch.testing.assert_close(subject.says(fresh, subject.batch(0)), said, rtol=tolerance, atol=tolerance)
        again = subject.make()
        other = build(method, again, subject)
        other.load(folder / name)
        torch.testing.assert_close(subject.says(again, subject.batch(0)), said, rtol=tolerance, atol=tolerance)
        other.close()
    with pytest.raises(fallow.AdapterError, match="another base"):
        fallow.Adapters(spoilt(subject.make())).add("it", folder / "adapter")


def spoilt(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.5)
    return model


def shares_a_model_with_a_second_adapter(method: type, subject: Subject, folder: Path) -> None:
    changes = []
    for start in (0, 10):
        model = subject.make()
        optimizer = build(method, model, subject)
        train(model, optimizer, subject, range(start, start + 2))
        changes.append(optimizer.delta())
        optimizer.close()
    model = subject.make()
    base = weights(model)
    adapters = fallow.Adapters(model)
    adapters.add("one", changes[0], scale=0.5)
    alone = weights(model)
    adapters.add("two", changes[1], scale=0.75)
    expected = {name: base[name].double().reshape(-1).clone() for name in {**changes[0].entries, **changes[1].entries}}
    for change, scale in zip(changes, (0.5, 0.75), strict=True):
        for name, entry in change.entries.items():
            expected[name].index_add_(0, entry.index.long(), scale * entry.values.double())
    for name, values in expected.items():
        torch.testing.assert_close(
            model.get_parameter(name).detach().double().reshape(-1), values, rtol=1e-6, atol=1e-7
        )
    with adapters.disabled():
        assert_same(weights(model), base)
    adapters.remove("two")
    assert_same(weights(model), alone)
    adapters.unload()
    assert_same(weights(model), base)


def shows_the_base_at_scale_zero_and_comes_back(method: type, subject: Subject, folder: Path) -> None:
    model = subject.make()
    base = weights(model)
    optimizer = build(method, model, subject)
    train(model, optimizer, subject, range(2))
    trained = weights(model)
    with optimizer.disabled():
        assert_same(weights(model), base)
    assert_same(weights(model), trained)
    optimizer.set_scale(0.5)
    optimizer.set_scale(0.0)
    assert_same(weights(model), base)
    with pytest.raises(ConfigError, match="set_scale"):
        optimizer.step()
    optimizer.set_scale(1.0)
    assert_same(weights(model), trained)


def keeps_float32_masters_of_bfloat16_weights(method: type, subject: Subject, folder: Path) -> None:
    model = subject.make().to(torch.bfloat16)
    base = weights(model)
    optimizer = build(method, model, subject, lr=1e-5)
    train(model, optimizer, subject, range(2))
    assert all(proxy.dtype == torch.float32 for proxy in optimizer.trainable())
    moved = 0
    for slot in optimizer.slots.values():
        change = slot.values() - slot.base.float()
        moved += int((change != 0).sum())  # steps of 1e-5 vanish in bfloat16 weights, not in the masters
        assert torch.equal(slot.read(), slot.values().to(torch.bfloat16))
    assert moved > 0.5 * optimizer.trained_parameters
    with optimizer.disabled():
        assert_same(weights(model), base)


def takes_the_same_steps_under_checkpointing_and_accumulation(method: type, subject: Subject, folder: Path) -> None:
    ends = []
    for lean in (False, True):
        model = subject.make().double()
        optimizer = build(method, model, subject)
        train(model, optimizer, subject, range(4), accumulate=2, lean=lean)
        ends.append(weights(model))
        optimizer.close()
    for name in ends[0]:
        torch.testing.assert_close(ends[0][name], ends[1][name], rtol=0, atol=1e-9)


def resumes_bit_for_bit(method: type, subject: Subject, folder: Path) -> None:
    model = subject.make()
    optimizer = build(method, model, subject)
    train(model, optimizer, subject, range(2))
    torch.save(optimizer.state_dict(), folder / "state.pt")
    train(model, optimizer, subject, range(2, 4))
    resumed = subject.make()
    other = build(method, resumed, subject)
    other.load_state_dict(torch.load(folder / "state.pt", weights_only=True))
    train(resumed, other, subject, range(2, 4))
    assert_same(weights(resumed), weights(model))


def repeats_itself(method: type, subject: Subject, folder: Path) -> None:
    ends, chosen = [], []
    for _ in range(2):
        model = subject.make()
        optimizer = build(method, model, subject)
        chosen.append({name: slot.index for name, slot in optimizer.slots.items()})
        train(model, optimizer, subject, range(2))
        ends.append(weights(model))
        optimizer.close()
    assert_same(chosen[0], chosen[1])
    assert_same(ends[0], ends[1])


def leaves_frozen_weights_alone_and_says_so(method: type, subject: Subject, folder: Path) -> None:
    model = subject.make()
    name, frozen = max(model.named_parameters(), key=lambda pair: pair[1].numel())
    frozen.requires_grad_(False)
    optimizer = build(method, model, subject)
    assert name not in optimizer.selected()
    assert not frozen.requires_grad
    optimizer.close()
    with pytest.raises(SelectionError, match="leave no trainable weight"):
        build(method, model, subject, include=[f"^{name.replace('.', '[.]')}$"])
    with pytest.raises(SelectionError, match="matches no parameter"):
        build(method, model, subject, include=["no_such_layer"])
    model.requires_grad_(False)
    with pytest.raises(ModelError, match=f"every parameter of {type(model).__name__} is frozen"):
        build(method, model, subject)


CHECKS = (
    starts_as_the_base,
    trains_as_many_entries_as_asked,
    gathers_the_true_gradient_and_keeps_no_dense_one,
    learns_and_moves_nothing_else,
    loads_onto_a_fresh_base,
    shares_a_model_with_a_second_adapter,
    shows_the_base_at_scale_zero_and_comes_back,
    keeps_float32_masters_of_bfloat16_weights,
    takes_the_same_steps_under_checkpointing_and_accumulation,
    resumes_bit_for_bit,
    repeats_itself,
    leaves_frozen_weights_alone_and_says_so,
)
