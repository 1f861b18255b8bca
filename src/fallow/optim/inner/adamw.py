"""AdamW (arXiv 1711.05101) as the inner rule: two moments of what the basis lets through.

    M <- b1 M + (1 - b1) R      V <- b2 V + (1 - b2) R o R      N = [M / (1 - b1^k)] / (sqrt(V / (1 - b2^k)) + eps)

k counts updates since the moments began. `eps_mode="galore"` adds eps to the uncorrected sqrt(V), as GaLore's code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from fallow.optim import moments
from fallow.optim.inner.rule import Inner
from fallow.optim.site import Site
from fallow.optim.writing import rounded_into

FUSED = ("cpu", "cuda", "xpu", "mps")


@dataclass(frozen=True)
class AdamW(Inner):
    name: ClassVar[str] = "adamw"
    powers: ClassVar[Mapping[str, int]] = {"m": 1, "v": 2}

    def correction(self, age: int, group: Mapping[str, Any]) -> float:
        beta1, beta2 = group["betas"]
        return (1 - beta2**age) ** 0.5 / (1 - beta1**age)

    def directions(self, sites: Sequence[Site], inputs: Sequence[Tensor], group: Mapping[str, Any]) -> list[Tensor]:
        # the fused kernel from zero at a rate of -1, without decay, leaves exactly the direction
        found = [torch.zeros_like(one, memory_format=torch.contiguous_format) for one in inputs]
        self._moved(sites, found, inputs, group, -1.0, 0.0)
        return found

    def step(self, sites: Sequence[Site], group: Mapping[str, Any]) -> Sequence[Site]:
        exact = [site for site in sites if site.data.dtype == site.work]
        others = [site for site in sites if site.data.dtype != site.work]
        large = [site for site in others if moments.in_parts(site.data, site.grad)]
        lr, decay = group["lr"], group["weight_decay"]
        gradients = [site.grad.to(site.work) for site in exact]
        self._moved(exact, [site.data for site in exact], gradients, group, lr, decay)
        for site in large:
            self._in_parts(site, site.data.view(-1), site.grad.view(-1), group, lr, decay)
        return [site for site in others if site not in large]

    def _moved(
        self, sites: Sequence[Site], params: Sequence[Tensor], gradients: Sequence[Tensor], group: Mapping[str, Any],
        lr: Any, decay: float,
    ) -> None:  # fmt: skip
        large = {i for i, site in enumerate(sites) if self._apart(site, params[i], gradients[i])}
        for i in large:
            self._in_parts(sites[i], params[i].view(-1), gradients[i].view(-1), group, lr, decay)
        ages = sorted(set(range(len(sites))) - large, key=lambda at: sites[at].state["age"])
        for age, chosen in groupby(ages, key=lambda at: sites[at].state["age"]):
            at = list(chosen)
            own = [sites[i] for i in at]
            self._of_age(age, own, [params[i] for i in at], [gradients[i] for i in at], group, lr, decay)

    @staticmethod
    def _apart(site: Site, param: Tensor, gradient: Tensor) -> bool:
        return moments.small(site, "m") and moments.in_parts(param, gradient)

    def _in_parts(
        self, site: Site, param: Tensor, gradient: Tensor, group: Mapping[str, Any], lr: Any, decay: float
    ) -> None:
        """The update of a large flat tensor, a part at a time: what is kept small is never decoded as a whole."""
        size = moments.part_size(param.device)
        lost = site.state["lost"].view(-1) if param.dtype != site.work and "lost" in site.state else None
        for start in range(0, param.numel(), size):
            part = slice(start, start + size)
            weight, held = param[part], None if lost is None else lost[part]
            exact = weight.to(site.work) if held is None else weight.to(site.work) + held
            m, v = (moments.read_part(site, key, start, weight.numel()) for key in ("m", "v"))
            self._kernel(site.state["age"], [exact], [gradient[part].to(site.work)], [m], [v], group, lr, decay)
            moments.write_part(site, "m", start, m)
            moments.write_part(site, "v", start, v)
            if exact.dtype != weight.dtype:
                rounded_into(site, weight, exact, held, start)

    def _of_age(
        self, age: int, sites: list[Site], params: list[Tensor], gradients: list[Tensor], group: Mapping[str, Any],
        lr: Any, decay: float,
    ) -> None:  # fmt: skip
        first, second = [moments.read(site, "m") for site in sites], [moments.read(site, "v") for site in sites]
        self._kernel(age, params, gradients, first, second, group, lr, decay)
        for site, m, v in zip(sites, first, second, strict=True):
            moments.write(site, "m", m)
            moments.write(site, "v", v)

    @staticmethod
    def _kernel(
        age: int, params: list[Tensor], gradients: list[Tensor], first: list[Tensor], second: list[Tensor],
        group: Mapping[str, Any], lr: Any, decay: float,
    ) -> None:  # fmt: skip
        beta1, beta2 = group["betas"]
        eps = group["eps"] / ((1 - beta2**age) ** 0.5 if group["eps_mode"] == "galore" else 1.0)
        device = params[0].device
        fused = device.type in FUSED
        counts = torch.full((len(params),), float(age - 1), device=device if fused else "cpu").unbind()
        adamw(
            params, gradients, first, second, [], list(counts), foreach=not fused, fused=fused, amsgrad=False,
            beta1=beta1, beta2=beta2, lr=lr, weight_decay=decay, eps=eps, maximize=False,
        )  # fmt: skip


@dataclass(frozen=True)
class AdamW8bit(AdamW):
    """The same with moments of a byte each, whatever the group's `state_dtype`."""

    name: ClassVar[str] = "adamw8bit"
    form: ClassVar[str | None] = "8bit"
