"""CoDyRA: one task after another, each with a gated low rank whose threshold rises in the second half of its training.

"Adaptive Rank, Reduced Forgetting: Knowledge Retention in Continual Learning Vision-Language Models with Dynamic
Rank-Selective LoRA", arXiv 2412.01004.

    W_t = W_(t-1) + B diag(w) A      A (r, in); B (out, r), zero; w (r,), normal; no alpha / r
    step i > T_d = dense T           w <- T(w, kappa_i)    kappa_i = max_kappa (i - T_d) / (T - T_d)

T is the soft threshold of SoRA, whose gates these are, called `gate`. At the end of a task the change is merged and a
fresh adapter takes the next one; gates at zero are no part of it. The less the rank, the less is forgotten.

Departures: the paper prints the proximal step with a plus sign, where minus is right. kappa rises in every step, where
the official code has 50 levels, of which a run of fewer than 50 sparse steps reaches none. A packed attention weight,
which they split in three, is one matrix here, with one rank for query, key and value.

With the official settings chance decides: a gate can travel 0.125 at most, the threshold takes 0.65 in all, so about
half of the normal starts fall whatever the data say. `gate_init="ones"` and a learning rate of 10 to 100 times for the
parameters called `gate` let the data decide.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from fallow.core.delta import MethodOptions, number, whole
from fallow.core.errors import ConfigError
from fallow.core.factor_pair import PairOptions
from fallow.deltas.sora import SoRA, check_gates


class CoDyRA(SoRA):
    name = "codyra"

    @dataclasses.dataclass(kw_only=True)
    class Options(PairOptions):
        """`rank`: r, of which gates may fall. `max_kappa`: the last threshold. `dense`: share of the run before any
        threshold. `threshold_mode`: "constant", kappa as above, or "lr", times the learning rate's share of its highest
        value, as in SoRA. `gate_init`: "normal", where chance decides who falls first, or "ones". `compat_2xi`: the
        official code's threshold, which zeroes all below 2 kappa.
        """

        rank: int = 16
        max_kappa: float = 5e-3
        dense: float = 0.5
        threshold_mode: str = "constant"
        gate_init: str = "normal"
        compat_2xi: bool = False

        def check(self) -> None:
            super().check()
            whole("rank", self.rank)
            number("max_kappa", self.max_kappa)
            number("dense", self.dense, most=1.0)
            check_gates(self)

    @property
    def scaling(self) -> float:
        return 1.0

    def loss(self) -> Tensor | None:
        """None: the penalty is in the proximal step."""
        return None

    def xi(self, step: int, total: int | None) -> float:
        """kappa of step `step`, from 1. ConfigError where the length of the run is not known."""
        if not self.o.max_kappa:
            return 0.0
        if total is None:
            raise ConfigError(
                "'codyra' raises its threshold over the run, whose length is not known; say it once: "
                "fallow.core.schedule.resolve(model, total)"
            )
        dense = self.o.dense * total
        share = 0.0 if step <= dense else min(1.0, (step - dense) / (total - dense))
        return float(self.o.max_kappa * share * self.lr_share(step, total))

    def resized_options(self, rank: int, s: float) -> MethodOptions:
        changed: MethodOptions = dataclasses.replace(self.o, rank=rank)
        return changed
