"""LowRank: train all weights with optimizer states of low rank; one optimizer made of exchangeable parts.

    optimizer = LowRank(model.parameters(), lr=1e-3, rank=128, basis="warm", inner="adamw", residual="fira")

    every step      R = Pᵀ G     N = inner(R)     W <- (1 - lr wd) W - lr ( scale P N + residual(G - P R) )
    now and then    P = basis(G)

for each matrix W, G (d, n) seen with its projected side first (`optim.site`), P (d, r), states as large as R (r, n).
GaLore (arXiv 2403.03507), Fira (2410.01623), FRUGAL (2411.07837), DCT-AdamW (2505.17967), APOLLO (2412.05270) and more
are names for combinations. Tensors that are no matrices, groups with `rank=None` and matrices whose projected side is
at most `rank` take the inner rule plainly: with AdamW that is torch's AdamW.

Departures from the papers' codes: weight decay comes first, as in torch's AdamW and not after the update; conv weights
are matrices; all states are plain tensors and numbers; a refresh that meets a zero gradient is tried again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fallow.core.errors import ConfigError
from fallow.core.select import Patterns
from fallow.optim import moments as states
from fallow.optim import refresh
from fallow.optim.bases.basis import Basis
from fallow.optim.groups import grouped
from fallow.optim.inner.rule import Inner
from fallow.optim.options import PARTS, check_options, with_parts
from fallow.optim.parts import described
from fallow.optim.residuals.residual import Move, Residual
from fallow.optim.site import Site
from fallow.optim.writing import begin_rounding, check_rounding, move_weight

TOGETHER = {"cpu": 1 << 20}  # entries of gradients that are treated together: what stays in a core's cache
TOGETHER_ON_ACCELERATOR = 1 << 22  # there launches cost more than memory


class LowRank(torch.optim.Optimizer):
    """A torch optimizer; `params`: a model, tensors, (name, tensor) pairs, or groups, which may have own options.

    Of a model or pairs, embeddings and heads are left to the plain rule; `include`, `exclude`: regular expressions on
    names in their place (`optim.groups`). `largest_side`: matrices with a longer side are plain too.
    `rank`: columns of each basis; or a float, the share of the projected side; or None, for a plain group.
    `basis`, `inner`, `residual`: parts by name, as a mapping with options, or made (`optim.bases`, `optim.inner`,
    `optim.residuals`). `scale`: factor of the projected part. `side`: the projected one: short | long | left (out) |
    right (in). `refresh_every` steps the basis is chosen again; `moments`, `stagger`, `lazy`: see `optim.refresh`.
    `betas`, `eps`, `weight_decay` (decoupled): AdamW's; `eps_mode`: torch | galore. `plain_scale`: factor of `lr` for
    tensors that take the inner rule plainly, `plain_inner`: another rule for them. `state_dtype`: fp32 | bf16 | 8bit |
    4bit; `basis_dtype`: fp32 | bf16 | int8 | nf4 (`optim.moments`). `rounding` of weights of low precision: nearest |
    stochastic | compensated (`optim.writing`). `seed`: of everything drawn.

    ConfigError for values that cannot be, when the optimizer or a group is made. TrainingError where a basis is due and
    the gradient is not finite; nothing has changed then.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 1e-3,
        rank: int | float | None = 128,
        *,
        basis: str | Mapping[str, Any] | Basis = "warm",
        inner: str | Mapping[str, Any] | Inner = "adamw",
        residual: str | Mapping[str, Any] | Residual = "drop",
        refresh_every: int = 200,
        scale: float = 1.0,
        side: str = "short",
        moments: str = "keep",
        stagger: bool = False,
        lazy: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        eps_mode: str = "torch",
        plain_scale: float = 1.0,
        plain_inner: str | Mapping[str, Any] | Inner | None = None,
        state_dtype: str = "fp32",
        basis_dtype: str | None = None,
        rounding: str = "nearest",
        seed: int = 0,
        include: Patterns = None,
        exclude: Patterns = None,
        largest_side: int | None = None,
    ) -> None:
        apart = ("self", "params", "include", "exclude", "__class__")
        defaults = {key: value for key, value in locals().items() if key not in apart}
        self._found: dict[Tensor, Site] = {}
        super().__init__(grouped(params, include, exclude), defaults | {"steps": 0})

    # -- what is trained ----------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; ConfigError for options that cannot be, before the group is added."""
        if unknown := [key for key in param_group if key not in {*self.defaults, "params", "param_names"}]:
            raise ConfigError(f"a group has no option '{unknown[0]}'; there are {', '.join(self.defaults)}")
        check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check_rounding(group["rounding"], group["params"])
        group["steps"] = 0
        with_parts(group)
        self._found = {}

    def sites(self) -> list[Site]:
        """Every tensor and how it is seen, in order of the groups."""
        return [self._site(param, group) for group in self.param_groups for param in group["params"]]

    def _site(self, param: Tensor, group: dict[str, Any]) -> Site:
        if not self._found:
            at = 0
            for one in self.param_groups:
                names = one.get("param_names") or [f"parameter {at + i}" for i in range(len(one["params"]))]
                made = [
                    Site(held, one, self.state, at + i, name)
                    for i, (name, held) in enumerate(zip(names, one["params"], strict=True))
                ]
                projected = [site for site in made if site.rank is not None]
                for place, site in enumerate(projected):
                    site.place, site.peers = place, len(projected)
                self._found.update((site.param, site) for site in made)
                at += len(made)
        return self._found[param]

    # -- training -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of the tensors that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moving = [
            (group, [self._site(param, group) for param in group["params"] if param.grad is not None])
            for group in self.param_groups
        ]
        choosing = self._choosing([site for _, sites in moving for site in sites])
        for group, sites in moving:
            for part in _together([site for site in sites if site.rank is not None]):
                self._update_projected(part, group, choosing)
            for part in _together([site for site in sites if site.plain]):
                self._update_plain(part, group)
            group["steps"] += 1
        return loss

    def _choosing(self, sites: Sequence[Site]) -> set[int]:
        """The indices of the sites whose basis is chosen in this step."""
        for site in sites:
            if not site.state:
                self._begin(site)
        waiting = [site for site in sites if site.rank is not None and refresh.due(site, site.group["steps"])]
        looking = [site for site in waiting if refresh.looks(site.group)]
        found = refresh.usable(looking, [site.gradient() for site in looking])
        zero = {site.index for site, good in zip(looking, found, strict=True) if not good}
        return {site.index for site in waiting} - zero

    def _begin(self, site: Site) -> None:
        begin(site)

    def _update_projected(self, sites: Sequence[Site], group: dict[str, Any], choosing: set[int]) -> None:
        """Sites of one shape: choose bases where that is due, project, and move the weights."""
        basis, inner, residual = group["basis"], group["inner"], group["residual"]
        seen = {site.index: residual.incoming(site, site.gradient()) for site in sites}
        if due := [site for site in sites if site.index in choosing]:
            refresh.refresh(due, [seen[site.index] for site in due], group, group["steps"])
        inside = [site for site in sites if site.active]
        projected = [basis.project(site, seen[site.index]) for site in inside]
        for site in inside:
            site.state["age"] += 1
        directions = inner.directions(inside, projected, group) if inside else []
        lr, decay = group["lr"], group["lr"] * group["weight_decay"]
        for site, within, direction in zip(inside, projected, directions, strict=True):
            correction = inner.correction(site.state["age"], group)
            move_weight(site, residual.move(site, basis, seen[site.index], within, direction, correction), lr, decay)
        for site in sites:
            if not (site.active or site.plain):
                move_weight(site, residual.alone(site, seen[site.index]), lr, decay)

    def _update_plain(self, sites: Sequence[Site], group: dict[str, Any]) -> None:
        """Tensors that take the inner rule as it is, those of an active block at the projected ones' rate."""
        factor = group["plain_scale"] if sites[0].rank is None else group["scale"]
        lr, inner = group["lr"] * factor, sites[0].inner
        options = {**group, "lr": lr, "weight_decay": group["weight_decay"] / factor if factor else 0.0}
        gradients = [site.param.grad.detach().to(site.work) for site in sites if site.param.grad is not None]
        for site in sites:
            site.state["age"] += 1
        if factor and inner.step(sites, gradients, options):
            return
        directions = inner.directions(sites, gradients, options)
        for site, direction in zip(sites, directions, strict=True):
            move_weight(site, Move(dense=direction), lr, group["lr"] * group["weight_decay"])

    # -- resuming -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers, which `torch.load(weights_only=True)` reads."""
        found = super().state_dict()
        for group in found["param_groups"]:
            group.update({key: described(group[key]) for key in PARTS if group[key] is not None})
        return found

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue bit for bit. Tensors keep their own dtypes, where torch's method gives them the parameter's."""
        super().load_state_dict({**state_dict, "state": {}})
        for group in self.param_groups:
            with_parts(group)
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        own = [param for group in self.param_groups for param in group["params"]]
        for number_, param in zip(saved, own, strict=True):
            held = state_dict["state"].get(number_)
            if held is not None:
                self.state[param] = {key: _own(value, param) for key, value in held.items()}
        self._found = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._found = {}


def _own(value: Any, param: Tensor) -> Any:
    return value.to(param.device, copy=True) if isinstance(value, Tensor) else value


def begin(site: Site) -> None:
    """Make everything that is kept for a site, of its final shapes."""
    group, state = site.group, site.state
    state["age"] = 0
    begin_rounding(site)
    if site.rank is None or site.active:
        states.begin_inner(site)
    if site.rank is None:
        return
    every = group["refresh_every"]
    offset = site.place * every // site.peers if group["stagger"] else 0
    state.update(chosen=False, due=0, gap=every, offset=offset)
    if site.rank:
        group["basis"].begin(site)
        group["residual"].begin(site)


def _together(sites: Sequence[Site]) -> Iterator[list[Site]]:
    """Sites that are treated alike, of one dtype and device, projected ones of one shape; as many at a time as is worth
    while.
    """
    groups: dict[Any, list[Site]] = {}
    for site in sites:
        shape = (site.d, site.n, site.rank, site.flipped) if site.rank is not None else type(site.inner)
        groups.setdefault((shape, site.param.dtype, site.param.device), []).append(site)
    for (_, _, device), group in groups.items():
        most, part, taken = TOGETHER.get(device.type, TOGETHER_ON_ACCELERATOR), list[Site](), 0
        for site in group:
            if part and taken + site.param.numel() > most:
                yield part
                part, taken = [], 0
            part.append(site)
            taken += site.param.numel()
        yield part
