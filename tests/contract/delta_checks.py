"""What every weight parameterization must keep to, on each kind of layer and in whole networks, whichever host has it.

Each check takes a host, a method, a subject and a folder. Values are drawn by `randomize`, so that adapters of all
methods change something; what a method computes from its weights is copied between the precisions that are compared.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_checks import Subject
from delta_hosts import OwnHost
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fallow.core import schedule
from fallow.core.delta import Delta, make_options
from fallow.core.errors import ConfigError, FallowError, ModelError

SMALL: dict[str, dict[str, Any]] = {  # options with which a method fits the small layers here
    "loca": {"components": 20},
    "smora": {"rank": 4, "active": 2},
    "pego": {"group": 2},
    "wara-spatial": {"prefix": 0},
}
CONTEXT: dict[str, dict[str, Any]] = {"petalface": {"quality": 0.7}}  # what a forward must tell
LEAN: dict[str, dict[str, Any]] = {"salt": {"relu": "none"}}  # the relu of a (k, k) matrix needs it in the backward


def small(method: type[Delta]) -> dict[str, Any]:
    rank = {"rank": 2} if "rank" in {field.name for field in dataclasses.fields(method.Options)} else {}
    return {**rank, **SMALL.get(method.name, {})}


class Experts(nn.Module):
    """Three linear maps in one Parameter (3, 8, 12), one for each third of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(0.3 * torch.randn(3, 8, 12))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("btc,eoc->beto", x, self.stack)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


LAYERS: dict[str, tuple[str, Callable[[], nn.Module], tuple[int, ...], Any]] = {  # kind of view, layer, input, targets
    "linear": ("linear", lambda: nn.Linear(12, 20), (2, 16, 12), ["layer"]),
    "transposed": ("linear", lambda: Conv1D(20, 12), (2, 16, 12), ["layer"]),
    "conv1d": ("conv", lambda: nn.Conv1d(4, 8, 3, padding=1, padding_mode="circular"), (2, 4, 9), ["layer"]),
    "conv2d": ("conv", lambda: nn.Conv2d(4, 8, 3, stride=2, padding=1), (2, 4, 9, 9), ["layer"]),
    "conv3d": ("conv", lambda: nn.Conv3d(2, 6, 2), (2, 2, 4, 4, 4), ["layer"]),
    "grouped": ("conv", lambda: nn.Conv2d(8, 12, 3, groups=2, padding=1), (2, 8, 6, 6), ["layer"]),
    "embedding": ("embedding", lambda: nn.Embedding(24, 12), (), ["layer"]),
    "attention": ("parameter", Attention, (2, 5, 8), ["inner"]),
    "experts": ("parameter", Experts, (2, 5, 12), ["stack"]),
}


class One(nn.Module):
    """A layer between two operations without weights, so that it has a gradient to pass on."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x))


def tell(method: type[Delta], model: nn.Module) -> None:
    """For good, so that a backward that runs layers again finds it too."""
    for delta in model.modules():
        if isinstance(delta, Delta):
            delta.context.update(CONTEXT.get(method.name, {}))


@dataclasses.dataclass(frozen=True)
class Case:
    """A method in a model: `make` and `forward` are of the model, `targets` what of it is adapted."""

    host: Any
    method: type[Delta]
    make: Callable[[], nn.Module]
    forward: Callable[..., Tensor]
    targets: Any
    folder: Path

    def attach(self, model: nn.Module, name: str = "default", draw: bool = True, seed: int = 5) -> nn.Module:
        """The method in the model, away from its start where `draw`."""
        torch.manual_seed(seed)
        model = self.host.attach(model, self.method, small(self.method), self.targets, name)
        if draw:
            for delta in self.host.deltas(model, name).values():
                delta.randomize()
        return model

    def fresh(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        return self.make().to(dtype).requires_grad_(False)

    def run(self, model: nn.Module) -> Tensor:
        tell(self.method, model)
        return self.forward(model)

    @torch.no_grad()
    def says(self, model: nn.Module) -> Tensor:
        return self.run(model.eval())


def layer_case(host: Any, method: type[Delta], kind: str, folder: Path) -> Case:
    _, make, shape, targets = LAYERS[kind]

    def model() -> nn.Module:
        torch.manual_seed(0)
        return One(make())

    def run(model: nn.Module) -> Tensor:
        chance = torch.Generator().manual_seed(1)
        x = torch.randn(shape, generator=chance) if shape else torch.randint(24, (2, 5), generator=chance)
        dtype = next(p.dtype for name, p in model.named_parameters() if "delta" not in name and "adapters" not in name)
        torch.manual_seed(7)
        return model(x.to(dtype) if shape else x)

    return Case(host, method, model, run, targets, folder)


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


def tensors(case: Case, model: nn.Module) -> dict[str, Tensor]:
    """All that the adapter has, by where it is."""
    found: dict[str, Tensor] = {}
    for key, delta in case.host.deltas(model).items():
        found |= {f"{key}:{name}": t for name, t in [*delta.named_parameters(), *delta.named_buffers()]}
        common = delta.__dict__["_common"][0]
        found |= {f":{name}": t for name, t in [*common.named_parameters(), *common.named_buffers()]}
    return found


# -- on each kind of layer --------------------------------------------------------------------------------------------


def starts_as_the_base_and_trains_as_many_numbers_as_it_says(case: Case) -> None:
    base = case.says(case.fresh())
    model = case.attach(case.fresh(), draw=False)
    if not case.method.starts:
        torch.testing.assert_close(case.says(model), base, rtol=1e-4, atol=2e-5)
    deltas = case.host.deltas(model)
    shapes = [delta.view.shape for delta in deltas.values()]
    options = make_options(case.method, small(case.method))
    count = sum(case.method.parameter_count(shape, options) for shape in shapes)
    assert sum(p.numel() for p in trained(model).values()) == count + case.method.shared_count(shapes, options)
    again = tensors(case, case.attach(case.fresh(), draw=False))
    for name, tensor in tensors(case, model).items():
        assert torch.equal(tensor, again[name]), f"{name} differs under the same seed"


def has_the_gradients_of_float64(case: Case) -> None:
    rough, exact = case.attach(case.fresh()), case.attach(case.fresh(torch.float64))
    theirs = tensors(case, exact)
    with torch.no_grad():
        for name, tensor in tensors(case, rough).items():
            theirs[name].copy_(tensor)
    said, true = case.run(rough.eval()), case.run(exact.eval())
    torch.testing.assert_close(said.double(), true, rtol=1e-3, atol=1e-4)
    said.square().mean().backward()
    true.square().mean().backward()
    got, wanted = trained(rough), trained(exact)
    assert got.keys() == wanted.keys()
    assert any(param.grad is not None for param in got.values())
    for name, param in got.items():
        if param.grad is None:
            assert wanted[name].grad is None
            continue
        grad = wanted[name].grad
        size = float(grad.abs().max()) + 1e-6
        assert float((param.grad.double() - grad).abs().max()) <= 2e-3 * size, name


def saves_merges_scales_and_switches(case: Case) -> None:
    model = case.attach(case.fresh())
    base = case.says(case.fresh())
    said = case.says(model)
    assert float((said - base).abs().max()) > 1e-4, "randomize() changes nothing"
    with case.host.disabled(model):
        assert torch.equal(case.says(model), base)
    assert torch.equal(case.says(model), said)
    case.host.save(model, case.folder / "adapter")
    loaded = case.host.load(case.fresh(), case.folder / "adapter")
    torch.testing.assert_close(case.says(loaded), said, rtol=1e-5, atol=1e-6)
    assert trained(loaded).keys() == trained(model).keys()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    if case.method.mode == "output":
        with pytest.raises((ConfigError, FallowError), match=case.method.name):
            case.host.merge(model)
    else:
        case.host.merge(model)
        torch.testing.assert_close(case.says(model), said, rtol=1e-3, atol=1e-4)
        case.host.unmerge(model)
    for name, param in model.named_parameters():
        assert torch.equal(param, weights[name]), name
    assert torch.equal(case.says(model), said)
    case.host.scale(model, 0.0)
    torch.testing.assert_close(case.says(model), base, rtol=1e-4, atol=1e-5)
    case.host.scale(model, 1.0)
    case.attach(model, "other", seed=6)
    assert float((case.says(model) - said).abs().max()) > 1e-5
    case.host.activate(model, "default")
    assert torch.equal(case.says(model), said)
    case.host.delete(model, "other")
    assert torch.equal(case.says(model), said)


def trains_in_float32_on_a_bfloat16_base(case: Case) -> None:
    model = case.attach(case.fresh(torch.bfloat16), draw=False)
    assert all(param.dtype == torch.float32 for param in trained(model).values())
    for delta in case.host.deltas(model).values():
        delta.randomize()
    out = case.run(model.train())
    assert out.dtype == torch.bfloat16
    out.float().square().mean().backward()
    grads = [param.grad for param in trained(model).values() if param.grad is not None]
    assert grads
    assert all(bool(torch.isfinite(grad).all()) for grad in grads)
    exact = case.attach(case.fresh(torch.bfloat16).float())
    theirs = tensors(case, exact)
    with torch.no_grad():
        for name, tensor in tensors(case, model).items():
            theirs[name].copy_(tensor)
    true = case.says(exact)
    wrong = (case.says(model).float() - true).abs()
    # a layer that chooses by its input may choose otherwise for a rounded one
    wrong = wrong.mean() if case.method.mode == "output" else wrong.max()
    assert float(wrong) <= 0.05 * max(1.0, float(true.abs().max()))


ON_LAYERS = (
    starts_as_the_base_and_trains_as_many_numbers_as_it_says,
    has_the_gradients_of_float64,
    saves_merges_scales_and_switches,
    trains_in_float32_on_a_bfloat16_base,
)


def refuses(case: Case) -> None:
    """A layer that the method does not take, by name; the model stays as it was."""
    model = case.fresh()
    before = [type(module) for module in model.modules()]
    with pytest.raises(ModelError, match=f"'{case.method.name}' cannot adapt '.*layer.*'"):
        case.attach(model)
    if isinstance(case.host, OwnHost):
        assert [type(module) for module in model.modules()] == before


# -- in whole networks ------------------------------------------------------------------------------------------------


def network_case(host: Any, method: type[Delta], subject: Subject, targets: Any, folder: Path) -> Case:
    return Case(host, method, subject.make, lambda model: subject.says(model, subject.batch(0)), targets, folder)


def learns_the_same_under_checkpointing_and_goes_on_bit_for_bit(case: Case, subject: Subject) -> None:
    """A run of two steps, of which the first accumulates two batches; the same first step with gradient checkpointing;
    and the second step taken up from a state dict.
    """

    def step(model: nn.Module, optimizer: Any, seeds: range, lean: bool = False) -> None:
        for seed in seeds:
            (subject.loss(model.train(), subject.batch(seed), lean) / len(seeds)).backward()
        optimizer.step()
        schedule.step(model)
        optimizer.zero_grad()

    def start() -> tuple[nn.Module, Any]:
        model = case.attach(case.fresh(), draw=False)
        schedule.resolve(model, 2)
        tell(case.method, model)
        return model, torch.optim.AdamW(list(trained(model).values()), lr=1e-2)

    def values(model: nn.Module) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    model, optimizer = start()
    own = {id(tensor) for tensor in tensors(case, model).values()}
    base = {name: p.detach().clone() for name, p in model.named_parameters() if id(p) not in own}
    began = {name: param.detach().clone() for name, param in trained(model).items()}
    step(model, optimizer, range(2))
    middle, kept = values(model), copy.deepcopy(optimizer.state_dict())
    step(model, optimizer, range(2, 3))
    params = dict(model.named_parameters())
    assert sum(not torch.equal(params[name], value) for name, value in began.items()) >= 0.5 * len(began)
    assert all(torch.equal(params[name], value) for name, value in base.items())

    lean, other = start()
    step(lean, other, range(2), lean=True)
    for name, value in values(lean).items():
        torch.testing.assert_close(value, middle[name], rtol=1e-3, atol=1e-4)

    again, other = start()
    again.load_state_dict(middle)
    other.load_state_dict(kept)
    schedule.resume(again, 1)
    step(again, other, range(2, 3))
    ends = values(again)
    for name, value in values(model).items():
        assert torch.equal(ends[name], value), name


def is_whole_again_from_its_file(case: Case) -> None:
    model = case.attach(case.fresh(), draw=False)
    for param in trained(model).values():
        param.data.add_(0.02 * torch.randn_like(param))
    said = case.says(model)
    case.host.save(model, case.folder / "adapter")
    loaded = case.host.load(case.fresh(), case.folder / "adapter")
    torch.testing.assert_close(case.says(loaded), said, rtol=1e-4, atol=1e-5)
    if case.method.mode != "output":
        case.host.merge(model)
        torch.testing.assert_close(case.says(model), said, rtol=5e-3, atol=1e-3)
        case.host.unmerge(model)
        assert torch.equal(case.says(model), said)


def keeps_nothing_of_the_weights_size_for_the_backward(case: Case) -> None:
    """Linear(64, 64) on 8 rows: the input has 512 numbers, the weight 4096."""
    torch.manual_seed(0)
    model = case.host.attach(
        One(nn.Linear(64, 64)), case.method, {**small(case.method), **LEAN.get(case.method.name, {})}, ["layer"]
    ).train()
    for delta in case.host.deltas(model).values():
        delta.randomize()
    tell(case.method, model)
    held = [*model.parameters(), *model.buffers(), *tensors(case, model).values()]
    known = {tensor.untyped_storage().data_ptr() for tensor in held}
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            sizes.append(tensor.untyped_storage().nbytes() // tensor.element_size())
        return tensor

    x = torch.randn(2, 4, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(x)
    out.sum().backward()
    assert max(sizes, default=0) < 4096, sorted(sizes)[-3:]
