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
from torch import Tensor

from fallow.core.errors import ConfigError
from fallow.optim import moments, refresh
from fallow.optim.bases import BASES
from fallow.optim.bases.basis import Basis
from fallow.optim.inner import INNER
from fallow.optim.inner.rule import Inner
from fallow.optim.parts import described, make_part, number, one_of
from fallow.optim.residuals import RESIDUALS
from fallow.optim.residuals.residual import Move, Residual
from fallow.optim.site import SIDES, Site
from fallow.optim.writing import move_weight

PARTS: dict[str, tuple[Mapping[str, Any], type]] = {
    "basis": (BASES, Basis), "inner": (INNER, Inner), "residual": (RESIDUALS, Residual),
}  # fmt: skip
TOGETHER = {"cpu": 1 << 20}  # entries of gradients that are treated together: what stays in a core's cache
TOGETHER_ON_ACCELERATOR = 1 << 22  # there launches cost more than memory


class LowRank(torch.optim.Optimizer):
    """A torch optimizer; `params`: tensors, (name, tensor) pairs, or groups, which may have options of their own.

    `rank`: columns of each basis; or a float, the share of the projected side; or None, for a plain group.
    `basis`, `inner`, `residual`: parts by name, as a mapping with options, or made (`optim.bases`, `optim.inner`,
    `optim.residuals`). `scale`: factor of the projected part. `side`: the projected one: short | long | left (out) |
    right (in). `refresh_every` steps the basis is chosen again; `moments`, `stagger`, `lazy`: see `optim.refresh`.
    `betas`, `eps`, `weight_decay` (decoupled): AdamW's; `eps_mode`: torch | galore. `seed`: of everything drawn.

    ConfigError for values that cannot be, when the optimizer or a group is made. TrainingError where a basis is due and
    the gradient is not finite; nothing has changed then.
    """

    def __init__(
        self,
        params: Iterable[Any],
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
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr, "rank": rank, "basis": basis, "inner": inner, "residual": residual, "refresh_every":
            refresh_every, "scale": scale, "side": side, "moments": moments, "stagger": stagger, "lazy": lazy, "betas":
            betas, "eps": eps, "weight_decay": weight_decay, "eps_mode": eps_mode, "seed": seed, "steps": 0,
        }  # fmt: skip
        self._found: dict[Tensor, Site] = {}
        super().__init__(params, defaults)

    # -- what is trained ----------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; ConfigError for options that cannot be, before the group is added."""
        if unknown := [key for key in param_group if key not in {*self.defaults, "params", "param_names"}]:
            raise ConfigError(f"a group has no option '{unknown[0]}'; there are {', '.join(self.defaults)}")
        checked({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["steps"] = 0
        _with_parts(group)
        self._found = {}

    def sites(self) -> list[Site]:
        """Every tensor and how it is seen, in order of the groups."""
        return [self._site(param, group) for group in self.param_groups for param in group["params"]]

    def _site(self, param: Tensor, group: dict[str, Any]) -> Site:
        if not self._found:
            at = 0
            for one in self.param_groups:
                names = one.get("param_names") or [f"parameter {at + i}" for i in range(len(one["params"]))]
                for name, held in zip(names, one["params"], strict=True):
                    self._found[held] = Site(held, one, self.state, at, name)
                    at += 1
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
            for part in _together([site for site in sites if site.rank is None]):
                self._update_plain(part, group)
            group["steps"] += 1
        return loss

    def _choosing(self, sites: Sequence[Site]) -> set[int]:
        """The indices of the sites whose basis is chosen in this step."""
        for site in sites:
            if not site.state:
                self._begin(site)
        waiting = [site for site in sites if site.rank is not None and refresh.due(site, site.group["steps"])]
        looking = [site for site in waiting if site.group["basis"].decomposes]
        found = refresh.usable(looking, [site.gradient() for site in looking])
        zero = {site.index for site, good in zip(looking, found, strict=True) if not good}
        return {site.index for site in waiting} - zero

    def _begin(self, site: Site) -> None:
        site.state["age"] = 0
        moments.begin(site, site.group["inner"].shapes(site.shape))
        if site.rank is not None:
            every, count = site.group["refresh_every"], max(1, len(site.group["params"]))
            at = next(i for i, param in enumerate(site.group["params"]) if param is site.param)
            offset = at * every // count if site.group["stagger"] else 0
            site.state.update(chosen=False, due=0, gap=every, offset=offset)
            site.group["basis"].begin(site)
            moments.begin(site, site.group["residual"].shapes(site))

    def _update_projected(self, sites: Sequence[Site], group: dict[str, Any], choosing: set[int]) -> None:
        basis, inner, residual = group["basis"], group["inner"], group["residual"]
        seen = [residual.incoming(site, site.gradient()) for site in sites]
        due = [(site, one) for site, one in zip(sites, seen, strict=True) if site.index in choosing]
        if due:
            refresh.refresh([site for site, _ in due], [one for _, one in due], group, group["steps"])
        projected = [basis.project(site, one) for site, one in zip(sites, seen, strict=True)]
        for site in sites:
            site.state["age"] += 1
        directions = inner.directions(sites, projected, group)
        for site, one, inside, direction in zip(sites, seen, projected, directions, strict=True):
            correction = inner.correction(site.state["age"], group)
            move = residual.move(site, basis, one, inside, direction, correction)
            move_weight(site, site.weight(), move, group["lr"], group["weight_decay"])

    def _update_plain(self, sites: Sequence[Site], group: dict[str, Any]) -> None:
        gradients = [site.param.grad.detach() for site in sites if site.param.grad is not None]
        for site in sites:
            site.state["age"] += 1
        if group["inner"].step(sites, gradients, group):
            return
        directions = group["inner"].directions(sites, gradients, group)
        for site, direction in zip(sites, directions, strict=True):
            move_weight(site, site.param.detach(), Move(dense=direction), group["lr"], group["weight_decay"])

    # -- resuming -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers, which `torch.load(weights_only=True)` reads."""
        found = super().state_dict()
        for group in found["param_groups"]:
            group.update({key: described(group[key]) for key in PARTS})
        return found

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue bit for bit. Tensors keep their own dtypes, where torch's method gives them the parameter's."""
        super().load_state_dict({**state_dict, "state": {}})
        for group in self.param_groups:
            _with_parts(group)
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


def _together(sites: Sequence[Site]) -> Iterator[list[Site]]:
    """Sites of one shape, dtype and device, as many at a time as are worth treating together."""
    groups: dict[Any, list[Site]] = {}
    for site in sites:
        key = (site.d, site.n, site.rank, site.flipped) if site.rank is not None else None
        groups.setdefault((key, site.param.dtype, site.param.device), []).append(site)
    for (_, _, device), group in groups.items():
        most, part, taken = TOGETHER.get(device.type, TOGETHER_ON_ACCELERATOR), list[Site](), 0
        for site in group:
            if part and taken + site.param.numel() > most:
                yield part
                part, taken = [], 0
            part.append(site)
            taken += site.param.numel()
        yield part


def _with_parts(group: dict[str, Any]) -> None:
    for key, (table, kind) in PARTS.items():
        group[key] = make_part(key, group[key], table, kind)


def checked(options: Mapping[str, Any]) -> None:
    """ConfigError where an option of a group cannot be."""
    made = {key: make_part(key, options[key], table, kind) for key, (table, kind) in PARTS.items()}
    rank = options["rank"]
    if rank is not None:
        share = isinstance(rank, float)
        number("rank", rank, 0, 1 + 1e-12 if share else float("inf"))
        if not rank and not made["residual"].moves_alone:
            raise ConfigError(
                f"rank={rank} leaves nothing to residual='{made['residual'].name}'; give rank of at least 1"
            )
    made["residual"].check(made["basis"])
    if not isinstance(options["lr"], Tensor):
        number("lr", options["lr"], 0)
    betas = options["betas"]
    if not (isinstance(betas, tuple | list) and len(betas) == 2):
        raise ConfigError(f"betas={betas!r} must be two numbers from 0 to below 1, like (0.9, 0.999)")
    for beta in betas:
        number("betas", beta, 0, 1)
    number("eps", options["eps"], 0)
    number("weight_decay", options["weight_decay"], 0)
    number("scale", options["scale"], 0)
    number("seed", options["seed"], 0)
    number("refresh_every", options["refresh_every"], 1)
    if not isinstance(options["refresh_every"], int):
        raise ConfigError(f"refresh_every={options['refresh_every']!r} must be a whole number of steps, 1 or more")
    if options["lazy"] is not None:
        number("lazy", options["lazy"], 0, 1 + 1e-12, closed=False)
    one_of("side", options["side"], SIDES)
    one_of("moments", options["moments"], refresh.MOMENTS)
    one_of("eps_mode", options["eps_mode"], ("torch", "galore"))
