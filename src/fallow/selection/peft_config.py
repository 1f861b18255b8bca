"""`SaRAConfig` and `SHiRAConfig`: the selective methods as PEFT adapters.

    model = get_peft_model(model, fallow.SaRAConfig(fraction=0.05, target_modules="all-layers"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)

The entries are chosen once, over all adapted weights together, from the same equations as `fallow.SaRA` and
`fallow.SHiRA`; biases and norms are left to those. What is trained is added to the base, so weight decay pulls towards
the base. SaRA's low-rank term is added by a hook that torch runs right before `optimizer.step()`, so after unscaling
and clipping; its re-selection wants `fallow.step(model)` after it (or `fallow.Callback(model)`).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn

from fallow.core.errors import AdapterError, ConfigError, SelectionError, nearest
from fallow.core.peft_host import FallowConfig, Hosted, Site, host
from fallow.core.schedule import Schedule
from fallow.core.select import Amount, Selection, Selector, Target, index_dtype
from fallow.objectives.nuclear import Mode, NuclearNorm
from fallow.selection.peft_entries import Entries, precision
from fallow.selection.peft_schedule import add_penalty, reselect_later
from fallow.selection.random import random
from fallow.selection.sara import FRACTION, smallest
from fallow.selection.shira import Mask, by_gradient, check_options, struct, wm


@host
@dataclass
class EntriesConfig(FallowConfig):
    """Entries that a file names, of any selective method: what `fallow.from_sparse` makes."""

    method: str = "entries"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.made is not None and not isinstance(self.made.get("entries"), dict):
            raise AdapterError(f"made={self.made!r} tells no number of entries for each layer; copy it again")

    @property
    def amount(self) -> Amount:
        raise ConfigError("an EntriesConfig chooses nothing; give fallow.SaRAConfig or fallow.SHiRAConfig")

    def selector(self) -> Selector:
        raise ConfigError("an EntriesConfig chooses nothing; give fallow.SaRAConfig or fallow.SHiRAConfig")

    @property
    def reselects(self) -> bool:
        return False

    def make(self, model: nn.Module, sites: Sequence[Site]) -> dict[str, Hosted]:
        """The adapter's entries, chosen now, or (with `made`) as many as its file will bring."""
        for site in sites:
            if site.weight.is_meta and self.made is None:
                raise SelectionError(f"'{site.names[0]}' is on the meta device and has no values; load the base first")
        made: dict[str, Entries] = {}
        if self.made is None:
            targets = {site.key: Target(site.names, (site.weight,), site.owners) for site in sites}
            selection = self.selector()(list(targets.values()), self.amount)
            for key, target in targets.items():
                index = selection.index.get(target.name)
                if index is not None and index.numel():
                    index = index.to(target.weight.device, index_dtype(target.numel))
                    made[key] = Entries(index, precision(target.weight), self.check_base, self.reselects)
                    made[key].bind(target.weight, f"'{target.name}'")
            self.made = {
                "entries": {key: d.values.numel() for key, d in made.items()},
                "threshold": selection.threshold,
            }
        else:
            counts = self.made["entries"]
            made = {
                site.key: Entries.awaiting(counts[site.key], site.weight, self.check_base, self.reselects)
                for site in sites
                if site.key in counts
            }
            if missing := set(counts) - set(made):
                raise SelectionError(
                    f"the adapter trains '{min(missing)}', which {type(model).__name__} lacks or target_modules leave "
                    "out; give the base that it was trained on"
                )
        if made and not self.inference_mode:
            self.attach({site.key: site for site in sites if site.key in made}, made)
        return dict(made)

    def attach(self, sites: Mapping[str, Site], made: Mapping[str, Entries]) -> None:
        """Whatever accompanies training."""

    def describing(self, deltas: Mapping[str, nn.Module]) -> EntriesConfig:
        entries = {key: delta.values.numel() for key, delta in deltas.items() if isinstance(delta, Entries)}
        shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(EntriesConfig) if f.name != "method"}
        return EntriesConfig(**copy.copy(shared) | {"made": {"entries": entries, "threshold": None}})


@host
@dataclass
class SaRAConfig(EntriesConfig):
    """SaRA in PEFT: trains the smallest entries of the adapted weights. See `fallow.SaRA` for the arguments.

    One of `threshold`, `fraction` (0.05 by default), `budget`, over all adapted weights together. `reselect_at`: steps,
    or shares of `total_steps`, which `fallow.Callback` knows by itself.
    """

    method: str = "sara"
    threshold: float | None = None
    fraction: float | None = None
    budget: int | None = None
    rank_weight: float = 0.0
    rank_layers: int | str = "one"
    rank_mode: Mode = "polar"
    rank_min_side: int = 64
    rank_min_selected: int = 101
    rank_convs: bool = False
    reselect_at: list[int | float] | int | float = dataclasses.field(default_factory=list)
    total_steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold is None and self.fraction is None and self.budget is None:
            self.fraction = FRACTION
        _ = self.amount
        self._penalty()
        self.reselect_at = Schedule(self.reselect_at, total=self.total_steps, name="reselect_at").at

    @property
    def amount(self) -> Amount:
        return Amount(threshold=self.threshold, fraction=self.fraction, budget=self.budget)

    @property
    def reselects(self) -> bool:
        return bool(self.reselect_at)

    def selector(self) -> Selector:
        return smallest

    def _penalty(self) -> NuclearNorm:
        return NuclearNorm(
            self.rank_weight if self.rank_weight != 0 else 1.0, self.rank_layers, self.rank_mode, self.rank_min_side,
            self.rank_min_selected, self.rank_convs, self.seed,
        )  # fmt: skip

    def attach(self, sites: Mapping[str, Site], made: Mapping[str, Entries]) -> None:
        if self.rank_weight:
            add_penalty(self._penalty(), sites, made)
        if self.reselects:
            assert self.made is not None
            schedule = Schedule(self.reselect_at, total=self.total_steps, name="reselect_at")
            reselect_later(schedule, made, float(self.made["threshold"]))


@host
@dataclass
class SHiRAConfig(EntriesConfig):
    """SHiRA in PEFT: trains a fixed sparse mask of each adapted weight. See `fallow.SHiRA` for the arguments.

    `density` (0.02 by default) or `r` within each layer; `mask`: "rand", "wm", "struct", or "snip" and "grad" with
    `stats`: {weight name: magnitude of its gradient} as of `fallow.core.probe.gradients`, which is not saved.
    """

    method: str = "shira"
    density: float | None = None
    r: int | None = None
    mask: Mask = "rand"
    task: int = 0
    every: int | None = None
    offset: int = 0
    diagonal: bool = True
    columns: bool = False
    stats: Any = dataclasses.field(default=None, repr=False, compare=False)
    unsaved: ClassVar[tuple[str, ...]] = ("stats",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask not in get_args(Mask):
            raise ConfigError(f"mask={self.mask!r} does not exist{nearest(str(self.mask), get_args(Mask))}")
        if self.density is None and self.r is None:
            self.density = 0.02
        _ = self.amount
        check_options(self.mask, self.every, self.offset, self.diagonal, self.columns, self.task)
        if self.mask in ("snip", "grad") and self.stats is None and self.made is None:
            raise ConfigError(
                f"mask={self.mask!r} chooses by gradients; give stats= as of fallow.core.probe.gradients, or "
                "mask='wm' or 'rand'"
            )

    @property
    def amount(self) -> Amount:
        return Amount(density=self.density, r=self.r)

    def selector(self) -> Selector:
        if self.mask in ("snip", "grad"):
            return self._by_stats
        if self.mask == "rand":
            return random(self.seed)
        return wm(self.task) if self.mask == "wm" else struct(self.every, self.offset, self.diagonal, self.columns)

    def _by_stats(self, targets: Sequence[Target], amount: Amount) -> Selection:
        if missing := [target.name for target in targets if target.name not in self.stats]:
            raise SelectionError(f"stats hold no gradient of '{missing[0]}'{nearest(missing[0], self.stats)}")
        grads: dict[str, Tensor] = {target.name: torch.as_tensor(self.stats[target.name]) for target in targets}
        return by_gradient(grads, self.mask == "snip")(targets, amount)

    def to_dict(self) -> dict[str, Any]:
        held = dataclasses.replace(self, stats={} if self.stats is not None else None)
        return {name: value for name, value in super(SHiRAConfig, held).to_dict().items() if name != "stats"}
