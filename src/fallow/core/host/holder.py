"""What a model with adapters holds at its root, and making an adapter without touching the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fallow.core.accompany import Penalty, context_of
from fallow.core.budgeting import Budget, shared_out
from fallow.core.delta import Delta, MethodOptions, Site, make_options
from fallow.core.distributed import refuse_wrapped
from fallow.core.errors import ConfigError, ModelError, nearest
from fallow.core.fused import delta_at
from fallow.core.host.layer import Adapters
from fallow.core.host.targets import Spot, check_weight
from fallow.core.host.tied import Tied
from fallow.core.sharded import is_dtensor
from fallow.core.starting import Start, begin, said_of

SHARED = "adapters_shared"  # at the root of the model: a sharded one gathers it before the layers run

Rows = int | list[int]  # how many blocks of one size a weight has, or their sizes
Blocks = tuple[Rows, dict[int, dict[str, Any]]]  # with the options of those that have others


@dataclass(frozen=True)
class Spec:
    """How an adapter was made."""

    method: str
    options: dict[str, Any]
    seed: int
    own_loss: Penalty
    begun: dict[str, Any] = field(default_factory=dict)  # what files say of start, budget and objective


class Shared(nn.ModuleDict):
    """For each adapter the tensors that its layers share, and how it was made.

    A child of the root while there are such tensors, otherwise hidden from torch, so that an nn.Sequential has as many
    children as before.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.specs: dict[str, Spec] = {}
        self.trained_before = [name for name, param in model.named_parameters() if param.requires_grad]

    def forward(self, x: Any) -> Any:
        """As the last child of an nn.Sequential."""
        return x

    def show(self, root: nn.Module) -> None:
        """Be found at the root of the model."""
        root.__dict__[SHARED] = self
        root._modules.pop(SHARED, None)
        if next(self.parameters(), None) is not None or next(self.buffers(), None) is not None:
            root._modules[SHARED] = self

    def hide(self, root: nn.Module) -> None:
        root.__dict__.pop(SHARED, None)
        root._modules.pop(SHARED, None)


def root_of(model: nn.Module) -> tuple[nn.Module, Shared] | None:
    """The module that adapters were attached to, also inside DDP, torch.compile or another wrapper."""
    for module in model.modules():
        if isinstance(shared := module.__dict__.get(SHARED), Shared):
            return module, shared
    return None


def needed(model: nn.Module, *names: str) -> tuple[nn.Module, Shared]:
    """`root_of`; ConfigError where the model has no adapter, or none of one of these names."""
    if (found := root_of(model)) is None:
        raise ConfigError(f"{type(model).__name__} has no adapter; fallow.attach(model, 'lora') adds one")
    for name in names:
        if name not in found[1].specs:
            raise ConfigError(f"there is no adapter '{name}'{nearest(name, found[1].specs)}")
    return found


@dataclass
class Prepared:
    """An adapter that is made and not yet in the model."""

    method: type[Delta]
    name: str
    common: nn.Module
    deltas: list[tuple[Spot, Delta]]
    spec: Spec


def prepare(
    model: nn.Module,
    method: type[Delta],
    planned: Sequence[tuple[Spot, dict[str, Any]]],
    every: Sequence[Spot],
    name: str,
    spec: Spec,
    fresh: bool = True,
    blocks: Mapping[int, Blocks] | None = None,
    start: Start | None = None,
    budget: Budget | None = None,
) -> Prepared:
    """Make the Deltas of an adapter; nothing in the model changes, whatever is wrong. `blocks`: by id of the weight."""
    check_name(model, name)
    refuse_wrapped(model)
    common, context = nn.Module(), context_of(model)
    plan = [(spot, make_options(method, options)) for spot, options in planned]
    for spot, _ in plan:
        check_weight(spot)
    deltas: list[tuple[Spot, Delta]] = []
    for spot, options in _ranked(_once(model, method, plan, every), budget):
        held = spot.layer._modules.get(spot.attribute)
        view = held.view if isinstance(held, Adapters) else spot.view()
        site = Site(spot.key, view, spot.read, common, context, spec.seed, fresh)
        rows, apart = (blocks or {}).get(id(spot.parameter()), (None, {}))
        delta = delta_at(site, method, options, rows, {i: make_options(method, own) for i, own in apart.items()})
        begin(delta, start, site)
        deltas.append((spot, delta.to(site.device).train(spot.layer.training)))
    common.to(deltas[0][0].weight().device)
    return Prepared(method, name, common, deltas, spec)


def _ranked(plan: Sequence[tuple[Spot, MethodOptions]], budget: Budget | None) -> Sequence[tuple[Spot, MethodOptions]]:
    """Each spot with its options at the rank that the budget gives it, without those that get none."""
    if budget is None:
        return plan
    shapes = {spot.key: spot.view().shape for spot, _ in plan}
    shared = shared_out(budget, {spot.key: options for spot, options in plan}, shapes)
    return [(spot, shared[spot.key]) for spot, _ in plan if spot.key in shared]


def check_name(model: nn.Module, name: str) -> None:
    """ConfigError where an adapter cannot have this name; ModelError where the model cannot have adapters."""
    found = root_of(model)
    if found is None and hasattr(model, SHARED):
        raise ModelError(f"{type(model).__name__} has an attribute {SHARED} of its own; rename it to attach adapters")
    if found is not None and found[0] is not model:
        raise ModelError(
            f"a {type(found[0]).__name__} inside this {type(model).__name__} has adapters already; attach to that one"
        )
    if not isinstance(name, str) or not name or "." in name or hasattr(Adapters, name) or hasattr(Shared, name):
        raise ConfigError(f"name={name!r} must be a word without dots, and none that torch's ModuleDict uses")
    if found is None:
        return
    if name in found[1].specs:
        raise ConfigError(f"there is an adapter '{name}' already; detach it first, or give another name")
    refuse_merged(model, "attach")


def refuse_merged(model: nn.Module, what: str) -> None:
    """ConfigError while adapters are merged."""
    for module in model.modules():
        if isinstance(module, Adapters) and module.merged:
            raise ConfigError(
                f"{what}: the adapters {', '.join(map(repr, module.merged))} are merged; call unmerge(model) first"
            )


def _once(
    model: nn.Module, method: type[Delta], plan: Sequence[tuple[Spot, MethodOptions]], every: Sequence[Spot]
) -> list[tuple[Spot, MethodOptions]]:
    """Of spots that share a weight only one, the leader; those whose method never touches the weight stay apart."""
    if method.mode == "output":
        for spot, _ in plan:
            if isinstance(spot.layer.__dict__.get(spot.attribute), Tied):
                raise ModelError(f"'{spot.key}' shares a weight that another adapter changes; detach that one first")
        return list(plan)
    leaders: dict[int, tuple[Spot, MethodOptions]] = {}
    for spot, options in plan:
        group = [other for other in every if other.parameter() is spot.parameter()]
        able = [other for other in group if other.view().kind in method.supports] or [spot]
        settled = [other for other in group if isinstance(other.layer._modules.get(other.attribute), Adapters)]
        if len(settled) > 1:
            raise ModelError(f"'{spot.key}' has an adapter apart from '{settled[0].key}', whose weight it shares")
        first = settled[0] if settled else spot if spot in able else able[0]
        leaders.setdefault(id(spot.parameter()), (first, options))
    return list(leaders.values())


def refuse_sharded(model: nn.Module, what: str) -> None:
    """ModelError where weights are spread over several processes."""
    if any(is_dtensor(param) for param in model.parameters()):
        raise ModelError(f"{what} needs whole weights, and this model is sharded; do it before fully_shard")


def spec_of(
    method: type[Delta],
    options: Mapping[str, Any],
    seed: int,
    own_loss: Penalty,
    begun: Mapping[str, Any] | None = None,
) -> Spec:
    """ConfigError for options that the method does not know, and values that it cannot take."""
    said = {name: said_of(value) for name, value in (begun or {}).items() if value is not None}
    return Spec(method.name, dataclasses.asdict(make_options(method, options)), seed, own_loss, said)
