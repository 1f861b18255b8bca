"""AdamW whose two moments take a byte each: small floats, scaled block by block of 256 entries (`core.small_floats`).

    m   sign + 4 bits of exponent + 3 of mantissa      relative step 2^-3, range 2^-15 to 1 of the block's largest |m|
    v   5 bits of exponent + 3 of mantissa             relative step 2^-3 (so 2^-4 in sqrt(v)), range 2^-31 to 1

Rounding is dithered, so v, which changes by a thousandth a step, moves at all; and v never rounds to zero, which would
make an entry jump. Tensors of fewer than `SMALL` entries keep float32 moments. The update itself is torch's AdamW on
decoded moments.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from fallow.core.errors import ConfigError
from fallow.core.small_floats import M8, V8, decode, encode

SMALL = 1024


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with moments of 8 bits; for one-dimensional or other dense float32 parameters on any device."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if not (0 <= betas[0] < 1 and 0 <= betas[1] < 1 and eps >= 0 and weight_decay >= 0):
            raise ConfigError(
                f"AdamW8bit refuses betas={betas}, eps={eps}, weight_decay={weight_decay}: betas must be in [0, 1), "
                "the others at least 0"
            )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of the parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moving = [param for param in group["params"] if param.grad is not None]
            moments = [self._moments(param) for param in moving]
            if moving:
                adamw(
                    moving, [param.grad for param in moving], [m for m, _ in moments], [v for _, v in moments], [],
                    [self.state[param]["step"] for param in moving], foreach=False, fused=_fused(moving), amsgrad=False,
                    beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"], eps=group["eps"],
                    weight_decay=group["weight_decay"], maximize=False,
                )  # fmt: skip
            for param, (m, v) in zip(moving, moments, strict=True):
                self._keep(param, m, v)
        return loss

    def narrow(self, param: nn.Parameter, kept: Tensor) -> None:
        """Keep the moments of these entries (positions) of a one-dimensional parameter only."""
        if self.state.get(param):
            m, v = (moment.view(-1).index_select(0, kept) for moment in self._moments(param))
            self._keep(param, m, v)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would make floats of the codes."""
        super().load_state_dict(state_dict)
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        own = [param for group in self.param_groups for param in group["params"]]
        for number, param in zip(saved, own, strict=True):
            held = state_dict["state"].get(number, {})
            for key in ("m_code", "v_code"):
                if key in held:
                    self.state[param][key] = held[key].to(param.device, copy=True)

    def _moments(self, param: Tensor) -> tuple[Tensor, Tensor]:
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device if _fused([param]) else "cpu")
            state["updates"] = 0
            return torch.zeros_like(param), torch.zeros_like(param)
        if "m" in state:
            return state["m"], state["v"]
        size = state["size"]
        m = decode(state["m_code"], state["m_scale"], size, M8)
        v = decode(state["v_code"], state["v_scale"], size, V8)
        return (m, v) if size != param.numel() else (m.view(param.shape), v.view(param.shape))

    def _keep(self, param: Tensor, m: Tensor, v: Tensor) -> None:
        state, size = self.state[param], m.numel()
        for name in ("m", "v", "m_code", "m_scale", "v_code", "v_scale", "size"):
            state.pop(name, None)
        state["updates"] += 1
        if size < SMALL or param.dtype != torch.float32:
            state["m"], state["v"] = m, v
            return
        state["size"] = size
        state["m_code"], state["m_scale"] = encode(m.view(-1), M8, state["updates"])
        state["v_code"], state["v_scale"] = encode(v.view(-1), V8, state["updates"])


def _fused(params: list[Any]) -> bool:
    return all(param.device.type in ("cpu", "cuda", "xpu", "mps") for param in params)
