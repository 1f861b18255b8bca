"""What a method can do, found by doing it: one probe for each column of the capability matrix.

A probe takes a `Tried` (a method in a host) and does the thing on a small model. It returns what there is to add to the
yes, or raises: one of our errors, which is the no that a user would get, or `NotApplicable`. Anything else that it
raises is a bug of ours: the matrix has no word for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from delta_checks import LAYERS, Case, One, layer_case, small, tell, trained
from delta_hosts import PeftHost
from entries_hosts import EntriesMethod
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fallow
from fallow.core.errors import ConfigError
from fallow.core.quantized import quantize_

CODED = (2, 16, 64)  # the input of the layers whose weights are kept in codes, which come in blocks
CUT = {"svd": {"svd_rank": 2}, "ties": {}, "dare_linear": {}, "dare_ties": {}, "magnitude_prune": {}}
FULL = 24  # the largest rank of the layer that is written as LoRA


class NotApplicable(Exception):
    """Why there is nothing to try."""


class Refused(Exception):
    """What does not go, where the error is that of another library, and the probe has looked at it."""


@dataclass(frozen=True)
class Tried:
    """A method in a host. `folder` is empty."""

    host: Any
    method: Any
    folder: Path

    @property
    def peft(self) -> bool:
        return isinstance(self.host, PeftHost)

    def on(self, kind: str) -> Case:
        return layer_case(self.host, self.method, kind, self.folder)

    def case(
        self, make: Callable[[], nn.Module], shape: tuple[int, ...] = (2, 16, 12), targets: Any = ("layer",)
    ) -> Case:
        """On another network, for float inputs of that shape, or ids below 24 where it is of length 2."""

        def model() -> nn.Module:
            torch.manual_seed(0)
            return make()

        def run(model: nn.Module) -> Tensor:
            torch.manual_seed(7)
            return model(self.inputs(shape))

        return Case(self.host, self.method, model, run, list(targets), self.folder)

    def inputs(self, shape: tuple[int, ...]) -> Tensor:
        chance = torch.Generator().manual_seed(1)
        return torch.randint(24, shape, generator=chance) if len(shape) == 2 else torch.randn(shape, generator=chance)

    def linear(self) -> Case:
        return self.on("linear")


def same(got: Tensor, wanted: Tensor, rtol: float = 1e-3, atol: float = 1e-4) -> None:
    torch.testing.assert_close(got, wanted, rtol=rtol, atol=atol)


def differs(one: Tensor, other: Tensor) -> None:
    assert float((one - other).abs().max()) > 1e-5, "nothing has changed"


def held_by(case: Case, model: nn.Module) -> list[Tensor]:
    """What is trained."""
    own = getattr(case.host, "trained", None)
    return own(model) if own is not None else list(trained(model).values())


def gradients(case: Case, model: nn.Module, said: Tensor) -> list[Tensor]:
    """Of what is trained; finite, and there."""
    held = held_by(case, model)
    for param in held:
        param.grad = None
    said.float().square().mean().backward()
    found = [param.grad.detach().clone() for param in held if param.grad is not None]
    assert found, "nothing received a gradient"
    assert all(bool(torch.isfinite(grad).all()) for grad in found)
    assert any(float(grad.abs().max()) > 0 for grad in found)
    return found


# -- layers -----------------------------------------------------------------------------------------------------------


def adapts(case: Case) -> None:
    """It starts as the base unless it says why not, acts, gets gradients, and is switched off bit for bit."""
    base = case.says(case.fresh())
    model = case.attach(case.fresh(), draw=False)
    if not case.method.starts:
        same(case.says(model), base, atol=2e-5)
    for delta in case.host.deltas(model).values():
        delta.randomize()
    gradients(case, model, case.run(model.train()))
    differs(case.says(model), base)
    with case.host.disabled(model):
        assert torch.equal(case.says(model), base)


def on_layer(kind: str) -> Callable[[Tried], None]:
    return lambda tried: adapts(tried.on(kind))


class Blocks(Case):
    """A Case whose layer holds three projections."""

    def attach(self, model: nn.Module, name: str = "default", draw: bool = True, seed: int = 5) -> nn.Module:
        torch.manual_seed(seed)
        options = {"fused": {"layer": 3}, **small(self.method)}
        return self.host.attach(model, self.method, options, self.targets, name)


def fused(tried: Tried) -> None:
    case = tried.case(lambda: One(nn.Linear(12, 24)))
    case = Blocks(**vars(case))
    adapts(case)
    model = case.attach(case.fresh())
    deltas = [part for delta in case.host.deltas(model).values() for part in getattr(delta, "parts", [delta])]
    assert len(deltas) == 3
    base = case.says(case.fresh())
    deltas[1].randomize()
    moved = (case.says(model) - base).abs().amax((0, 1))
    if not case.method.starts:
        assert max(float(moved[:8].max()), float(moved[16:].max())) < 1e-5
    assert float(moved[8:16].max()) > 1e-3


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(24, 12)
        self.readout = nn.Linear(12, 24, bias=False)
        self.readout.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.readout(torch.tanh(self.tokens(ids)))


def tied(tried: Tried) -> None:
    case = tried.case(Tied, (2, 5), ["tokens"])
    adapts(case)
    model = case.attach(case.fresh())
    said = case.says(model)
    case.host.merge(model)
    same(case.says(model), said)
    of_base = [p for name, p in model.named_parameters() if "delta" not in name and "adapters" not in name]
    assert len(of_base) == 1, "the weight is not shared any more"


# -- use --------------------------------------------------------------------------------------------------------------


def merge(tried: Tried) -> None:
    case = tried.linear()
    model = case.attach(case.fresh())
    said = case.says(model)
    case.host.merge(model)
    same(case.says(model), said)


def unmerge(tried: Tried) -> None:
    case = tried.linear()
    model = case.attach(case.fresh())
    said, before = case.says(model), {name: value.detach().clone() for name, value in model.named_parameters()}
    case.host.merge(model)
    case.host.unmerge(model)
    assert torch.equal(case.says(model), said)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def disable(tried: Tried) -> None:
    case = tried.linear()
    base, model = case.says(case.fresh()), case.attach(case.fresh())
    said = case.says(model)
    differs(said, base)
    with case.host.disabled(model):
        assert torch.equal(case.says(model), base)
    assert torch.equal(case.says(model), said)


def several(tried: Tried) -> None:
    case = tried.linear()
    model = case.attach(case.fresh())
    said = case.says(model)
    case.attach(model, "other", seed=6)
    differs(case.says(model), said)
    case.host.activate(model, "default")
    assert torch.equal(case.says(model), said)
    case.host.delete(model, "other")
    assert torch.equal(case.says(model), said)


def two(tried: Tried) -> tuple[Case, nn.Module, dict[str, Tensor]]:
    """Two adapters, and what each says alone, and the base."""
    case = tried.linear()
    said = {"__base__": case.says(case.fresh())}
    model = case.attach(case.fresh())
    said["default"] = case.says(model)
    case.attach(model, "other", seed=6)
    said["other"] = case.says(model)
    return case, model, said


def together(tried: Tried) -> str:
    case, model, said = two(tried)
    case.host.activate(model, "default", "other")
    both = case.says(model)
    differs(both, said["default"])
    differs(both, said["other"])
    if case.method.mode == "output":
        return "as they act; it cannot merge"
    case.host.merge(model)
    same(case.says(model), both)
    return ""


def mixed(tried: Tried) -> None:
    case, model, said = two(tried)
    case.host.activate(model, "default")
    tell(case.method, model.eval())
    x = tried.inputs((2, 16, 12))
    for names in (["other", "__base__"], ["default", "other"]):
        with torch.no_grad():
            got = case.host.by_names(model, x, names)
        for row, name in enumerate(names):
            same(got[row], said[name][row], atol=1e-5)


def scale(tried: Tried) -> None:
    case = tried.linear()
    base, model = case.says(case.fresh()), case.attach(case.fresh())
    said = case.says(model)
    case.host.scale(model, 0.5)
    half = case.says(model)
    differs(half, said)
    differs(half, base)
    case.host.scale(model, 0.0)
    same(case.says(model), base, atol=1e-5)
    case.host.scale(model, 1.0)
    assert torch.equal(case.says(model), said)


def save(tried: Tried) -> None:
    case = tried.linear()
    model = case.attach(case.fresh())
    said = case.says(model)
    case.host.save(model, case.folder / "saved")
    loaded = case.host.load(case.fresh(), case.folder / "saved")
    same(case.says(loaded), said, rtol=1e-5, atol=1e-6)


def hotswap(tried: Tried) -> None:
    case = tried.linear()
    given = case.attach(case.fresh())
    said = case.says(given)
    case.host.save(given, case.folder / "given")
    model = case.attach(case.fresh(), seed=6)
    differs(case.says(model), said)
    held = dict(model.named_parameters())
    fallow.hotswap(model, case.folder / "given")
    same(case.says(model), said, rtol=1e-5, atol=1e-6)
    assert all(param is held[name] for name, param in model.named_parameters())


def change(model: nn.Module, name: str) -> Tensor:
    """What an adapter of PEFT's host adds to the weight of `layer`."""
    return model.base_model.model.layer.get_delta_weight(name).detach()


def add_up(tried: Tried, how: str, **options: Any) -> tuple[nn.Module, Tensor]:
    """The model with the two adapters and 0.5 and 2.0 times them in "sum"; the wanted change."""
    if not tried.peft:
        raise NotApplicable("add_weighted_adapter is a call of PEFT's models")
    _, model, _ = two(tried)
    model.base_model.add_weighted_adapter(["default", "other"], [0.5, 2.0], "sum", how, **options)
    return model, 0.5 * change(model, "default") + 2.0 * change(model, "other")


def added(tried: Tried) -> None:
    for how in ("linear", "cat"):
        model, wanted = add_up(tried, how)
        same(change(model, "sum"), wanted, rtol=1e-4, atol=1e-5)
        assert model.peft_config["sum"].made["error"] < 1e-4


def cut(tried: Tried) -> None:
    for how, options in CUT.items():
        told = options or {"density": 1.0}  # nothing is dropped but entries whose signs disagree
        model, wanted = add_up(tried, how, **told)
        got = change(model, "sum")
        if how == "svd":
            best = torch.linalg.svdvals(wanted)[2:].norm()
            same((got - wanted).norm(), best, rtol=1e-2, atol=1e-4)
        elif "ties" not in how:
            same(got, wanted, atol=1e-4)
        assert torch.isfinite(got).all()
        assert float(got.norm()) > 0


def resize(tried: Tried) -> str:
    case = tried.linear()
    model = case.attach(case.fresh())
    said = case.says(model)
    (delta,) = case.host.deltas(model).values()
    rank = delta.importance().numel()
    delta.resize(rank + 1)
    assert delta.importance().numel() == rank + 1
    grown = case.says(model)
    if torch.allclose(grown, said, rtol=1e-3, atol=1e-4):
        return ""
    delta.context["rank"] = rank  # nested ranks, whose scale is that of the rank that acts
    same(case.says(model), said)
    return "the ranks that it had act as before"


# -- bases ------------------------------------------------------------------------------------------------------------


def bf16(tried: Tried) -> None:
    case = tried.linear()
    model = case.attach(case.fresh(torch.bfloat16))
    assert all(param.dtype == torch.float32 for param in held_by(case, model))
    said = case.run(model.train())
    assert said.dtype == torch.bfloat16
    gradients(case, model, said)


def coded(tried: Tried, code: Callable[[nn.Module], Any], near: float = 1e-5) -> tuple[Case, nn.Module, Tensor]:
    """On a base in codes: it starts as that base, trains, and switched off is the base bit for bit."""

    def make() -> nn.Module:
        model = One(nn.Linear(64, 128, bias=not isinstance(tried.method, EntriesMethod)))  # which would train that
        code(model)
        return model

    case = tried.case(make, CODED)
    plain = case.make()
    base = case.says(plain)
    model = case.attach(freeze(case.make()), draw=False)
    if not case.method.starts:
        same(case.says(model), base, atol=near)
    for delta in case.host.deltas(model).values():
        delta.randomize()
    gradients(case, model, case.run(model.train()))
    with case.host.disabled(model):
        assert torch.equal(case.says(model), base)
    return case, model, base


def freeze(model: nn.Module) -> nn.Module:
    for param in model.parameters():
        param.requires_grad = False
    return model


def quantised(mode: str) -> Callable[[Tried], None]:
    def probe(tried: Tried) -> None:
        case, model, _ = coded(tried, lambda model: quantize_(model, mode, min_size=1))
        said = case.says(model)
        case.host.save(model, case.folder / mode)
        again = case.host.load(freeze(case.make()), case.folder / mode)
        same(case.says(again), said, rtol=1e-5, atol=1e-6)

    return probe


def bitsandbytes(bits: int) -> Callable[[Tried], None]:
    def code(model: nn.Module) -> None:
        import bitsandbytes as bnb

        bias = model.layer.bias is not None
        made = (
            bnb.nn.Linear4bit(64, 128, bias=bias, compute_dtype=torch.float32, quant_type="nf4")
            if bits == 4
            else bnb.nn.Linear8bitLt(64, 128, bias=bias, has_fp16_weights=False)
        )
        made.load_state_dict(model.layer.state_dict())
        model.layer = made.to("cpu")

    def probe(tried: Tried) -> None:
        coded(tried, code, 2e-2 if bits == 4 else 5e-2)  # in evaluation its kernels compute in bfloat16 and int8

    return probe


def merge_coded(tried: Tried) -> str:
    case, model, base = coded(tried, lambda model: quantize_(model, "nf4", min_size=1))
    said = case.says(model)
    case.host.merge(model)
    error = float((case.says(model) - said).norm() / said.norm())
    assert 0 < error < 0.5
    case.host.unmerge(model)
    assert torch.equal(case.says(model), said)
    with case.host.disabled(model):
        assert torch.equal(case.says(model), base)
    return ""


# -- training ---------------------------------------------------------------------------------------------------------


def with_the_same_gradients(tried: Tried, other: Callable[[nn.Module, Tensor], Tensor]) -> None:
    case = tried.linear()
    model = case.attach(case.fresh()).train()
    tell(case.method, model)
    x = tried.inputs((2, 16, 12))
    torch.manual_seed(7)
    plain = model(x)
    wanted = gradients(case, model, plain)
    torch.manual_seed(7)
    said = other(model, x)
    same(said, plain)
    for got, grad in zip(gradients(case, model, said), wanted, strict=True):
        same(got, grad)


def checkpointed(tried: Tried) -> None:
    with_the_same_gradients(tried, lambda model, x: checkpoint(model, x, use_reentrant=False))


def compiled(tried: Tried) -> None:
    with_the_same_gradients(tried, lambda model, x: torch.compile(model, fullgraph=True, backend="aot_eager")(x))


def train(tried: Tried) -> str:
    """The command itself, in this process."""
    from typer.testing import CliRunner

    from fallow.cli import app

    slug = tried.method.name
    told = ["train", "--method", slug, "--steps", "1", "--samples", "0", "--output", str(tried.folder / "run")]
    done = CliRunner().invoke(app, [*told, *(word for pair in TO_TRAIN.get(slug, ()) for word in ("--option", pair))])
    if done.exit_code == 2:
        raise ConfigError(said_by(done.stderr))
    assert done.exit_code == 0, f"{slug}: {done.output}\n{done.exception!r}"
    assert list((tried.folder / "run").rglob("*.safetensors"))
    return ""


TO_TRAIN: dict[str, tuple[str, ...]] = {}


def said_by(stderr: str) -> str:
    """The message of an error that the command line has printed."""
    return " ".join(stderr.strip().removeprefix("Error:").split())


# -- conversion -------------------------------------------------------------------------------------------------------


def lora(tried: Tried) -> str:
    """`to_lora` as it is; where that wants a bound, up to one ten-thousandth. PEFT's own LoRA says the same, on every
    layer that both take.
    """
    layer, how = as_lora(tried.case(lambda: One(nn.Linear(FULL, 32)), (2, 16, FULL)), "linear")
    for kind in ("transposed", "conv2d", "conv3d", "embedding"):  # PEFT's runs circular padding in another way
        if LAYERS[kind][0] in tried.method.supports:
            as_lora(tried.on(kind), kind)
    return f"rank {layer['rank']} of {FULL}, {how}"


def as_lora(case: Case, kind: str) -> tuple[dict[str, Any], str]:
    """What `to_lora` tells of the one layer, and how it came to its rank."""
    model = case.attach(case.fresh())
    said = case.says(model)
    folder, how = case.folder / kind, "its own factors"
    try:
        told = fallow.to_lora(model, folder)
    except ConfigError as error:
        if "no product of two factors" not in str(error):
            raise
        told, how = fallow.to_lora(model, folder, error=1e-4), "by error=1e-4"
    assert told["error"] <= 1e-4
    same(case.says(PeftModel.from_pretrained(case.fresh(), folder)), said)
    (layer,) = told["layers"].values()
    return layer, how


PROBES: dict[str, Callable[[Tried], str | None]] = {
    **{kind: on_layer(kind) for kind in LAYERS},
    "fused": fused,
    "tied": tied,
    "merge": merge,
    "unmerge": unmerge,
    "disable": disable,
    "several": several,
    "together": together,
    "mixed": mixed,
    "scale": scale,
    "save": save,
    "hotswap": hotswap,
    "sum": added,
    "sum_cut": cut,
    "resize": resize,
    "bf16": bf16,
    "int8": quantised("int8"),
    "nf4": quantised("nf4"),
    "fp8": quantised("fp8"),
    "bnb8": bitsandbytes(8),
    "bnb4": bitsandbytes(4),
    "merge_coded": merge_coded,
    "checkpointing": checkpointed,
    "compile": compiled,
    "train": train,
    "lora": lora,
}
