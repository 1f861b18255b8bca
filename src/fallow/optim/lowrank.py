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

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from fallow.core.errors import ConfigError
from fallow.core.select import Patterns
from fallow.optim import resuming, updating
from fallow.optim.bases.basis import Basis
from fallow.optim.groups import grouped
from fallow.optim.in_backward import InBackward
from fallow.optim.inner.rule import Inner
from fallow.optim.options import check_mode, check_options, with_parts
from fallow.optim.residuals.residual import Residual
from fallow.optim.sharing import check_sharded
from fallow.optim.site import Site, sites_of
from fallow.optim.writing import check_rounding, check_stored


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
    stochastic | compensated (`optim.writing`). `products` with a dense basis: fp32 | bf16, which is twice as fast where
    the hardware has it, on fp32 states and weights. `seed`: of everything drawn.

    `mode`: step; or in_backward, which moves each weight within the backward pass and frees its gradient, with
    `accumulate` passes a step and `max_norm` to clip by (`optim.in_backward`); `step()` then ends the step.

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
        products: str = "fp32",
        rounding: str = "nearest",
        seed: int = 0,
        include: Patterns = None,
        exclude: Patterns = None,
        largest_side: int | None = None,
        mode: str = "step",
        accumulate: int = 1,
        max_norm: float | None = None,
    ) -> None:
        apart = ("self", "params", "include", "exclude", "mode", "accumulate", "max_norm", "__class__")
        defaults = {key: value for key, value in locals().items() if key not in apart}
        check_mode(mode, accumulate, max_norm)
        self._found: dict[Tensor, Site] = {}
        self.in_backward = InBackward(self, accumulate, max_norm) if mode == "in_backward" else None
        self._step_supports_amp_scaling = mode == "in_backward"  # so that GradScaler leaves the refusal to step()
        super().__init__(grouped(params, include, exclude), defaults | {"steps": 0})

    # -- what is trained ----------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; ConfigError for options that cannot be, before the group is added."""
        if unknown := [key for key in param_group if key not in {*self.defaults, "params", "param_names"}]:
            raise ConfigError(f"a group has no option '{unknown[0]}'; there are {', '.join(self.defaults)}")
        check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["steps"] = 0
        with_parts(group)
        try:
            check_rounding(group["rounding"], group["params"])
            check_sharded(group)
            check_stored(sites_of([group], self.state))
        except ConfigError:
            self.param_groups.pop()
            raise
        self._found = {}
        if self.in_backward is not None:
            self.in_backward.attach(group["params"])

    def sites(self) -> list[Site]:
        """Every tensor and how it is seen, in order of the groups."""
        return [self.site_of(param) for group in self.param_groups for param in group["params"]]

    def site_of(self, param: Tensor) -> Site:
        """How a tensor of the optimizer is seen."""
        if not self._found:
            self._found = {site.param: site for site in sites_of(self.param_groups, self.state)}
        return self._found[param]

    # -- training -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of the tensors that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.in_backward is None:
            self.update([site for site in self.sites() if site.param.grad is not None])
        else:
            self.in_backward.finish(scaled=hasattr(self, "found_inf"))
        for group in self.param_groups:
            group["steps"] += 1
        return loss

    def update(self, sites: Sequence[Site]) -> None:
        """Move the weights of these sites, which have gradients. TrainingError where a basis cannot be chosen."""
        for site in sites:
            if not site.state:
                self._begin(site)
        choosing = updating.choosing(sites)
        for group in self.param_groups:
            own = [site for site in sites if site.group is group]
            for part in updating.together([site for site in own if site.rank is not None]):
                self._update_projected(part, group, choosing)
            for part in updating.together([site for site in own if site.plain]):
                self._update_plain(part, group)

    def measuring(self) -> AbstractContextManager[None]:
        """Within the block backward passes only measure the norm by which `max_norm` clips the next one.

        ConfigError but for mode="in_backward" with one pass a step.
        """
        if self.in_backward is None:
            raise ConfigError("measuring() is for mode='in_backward'; otherwise torch.nn.utils.clip_grad_norm_ clips")
        return self.in_backward.measuring()

    def close(self) -> None:
        """Take the hooks of mode="in_backward" away; there are none in the other."""
        if self.in_backward is not None:
            self.in_backward.close()

    def _begin(self, site: Site) -> None:
        updating.begin(site)

    def _update_projected(self, sites: Sequence[Site], group: dict[str, Any], choosing: set[int]) -> None:
        """Sites of one shape, with gradients."""
        seen = updating.look(sites, group, choosing)
        updating.move(sites, seen, updating.project(sites, seen), group)

    def _update_plain(self, sites: Sequence[Site], group: dict[str, Any]) -> None:
        """Sites that take the inner rule as it is, with gradients."""
        updating.move_plain(sites, group)

    # -- resuming -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers, which `torch.load(weights_only=True)` reads; of sharded weights DTensors too."""
        return resuming.saved(super().state_dict(), self.sites())

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue bit for bit. Tensors keep their own dtypes, where torch's method gives them the parameter's.

        ConfigError where the state is another optimizer's or model's; then nothing is changed.
        """
        resuming.check(state_dict)
        before = {"state": self.state, "param_groups": [dict(group) for group in self.param_groups]}
        super().load_state_dict({**state_dict, "state": {}})
        try:
            for group in self.param_groups:
                with_parts(group)
            self.state.update(resuming.states(state_dict, self.param_groups))
            self._found = {}
            resuming.fit(self.sites())
        except ConfigError:
            self.__setstate__(before)
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._found = {}
        self.__dict__.setdefault("in_backward", None)  # a copy has no hooks
