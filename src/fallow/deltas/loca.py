"""LoCA: the update is a few cosine components, whose places in the spectrum are trained too.

"LoCA: Location-Aware Cosine Adaptation for Parameter-Efficient Fine-Tuning", arXiv 2502.06820.

    D = alpha C_outᵀ S C_in      S (out, in), S[l1_k, l2_k] += a_k, k = 1 .. n; C: orthonormal DCT-II
    u = start + rate * moves     in [0, 1], (2, n)        l = round(u (out - 1)), round(u (in - 1))

    trained     a (n,), zero, and moves (2, n), zero, in turns: B_a steps a alone, B_l steps the places alone; after
                B_s steps a alone
    gradients   of the spectrum K = C_out G C_inᵀ of that of D: K[l] for a; for a place, central differences of K
                times a / 2 (one-sided at borders, still / 2), clipped to [-1, 1]

Departures. The paper trains u with a learning rate of its own; here u moves `rate` times as fast as the optimizer's
step says, which is the same under Adam, and weight decay pulls places to their start, not to low frequencies. The
official code turns the schedule in every forward of a layer; here an optimizer step does, so that accumulation and
recomputation do not. The tensor out of turn gets no gradient (None), so that no optimizer moves it. Places pushed over
the border are put back, else they would be stuck. The clip acts on gradients as they come: keep a GradScaler's scale
out, use bf16. DistributedDataParallel needs find_unused_parameters=True.

A Linear takes its inputs through C and S, and D is never made, unless that costs more. There, and in other layers, D is
formed, by FFT or (few components) from rows of C, in both passes; G is, like in full training, transient.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from fallow.core.delta import Delta, MethodOptions, Site, number, one_of, whole
from fallow.core.dense import dense
from fallow.core.errors import ConfigError
from fallow.core.transforms import dct2, dct_rows, idct2
from fallow.deltas.loca_linear import CosineLinear, neighbours

FEW = 64  # components up to which rows of C cost less than the FFT
UNTOLD = 1000  # B_s where the length of training is unknown, as in the official code


class LoCA(Delta):
    name = "loca"
    any_dtype = True

    @dataclasses.dataclass(kw_only=True)
    class Options(MethodOptions):
        """`components`: n. `alpha`: the scale of D. `dropout`: on the layer's input. `coefficient_steps`: B_a,
        optimizer steps of a turn. `location_steps`: B_l, likewise. `location_until`: B_s; None for a tenth of training;
        0 for random places that stay, which need no moves. `rate`: of a place's step to a coefficient's, lr_u / lr_a.
        `dct`: how D is formed, "fast" (FFT), "gather" (rows of C), or the cheaper, "auto". `compat`: places end at
        0.999, as in the official code, and the highest frequencies of sides above 500 are out of reach.
        """

        components: int = 1000
        alpha: float = 1.0
        dropout: float = 0.0
        coefficient_steps: int = 10
        location_steps: int = 20
        location_until: int | None = None
        rate: float = 0.02
        dct: Literal["auto", "fast", "gather"] = "auto"
        compat: bool = False

        def check(self) -> None:
            whole("components", self.components)
            number("alpha", self.alpha, open_below=True)
            number("dropout", self.dropout, 0.0, 0.99)
            whole("coefficient_steps", self.coefficient_steps)  # places have no gradient while coefficients are zero
            whole("location_steps", self.location_steps)
            if self.location_until is not None:
                whole("location_until", self.location_until, 0)
            number("rate", self.rate, open_below=True)
            one_of("dct", self.dct, ("auto", "fast", "gather"))
            one_of("compat", self.compat, (True, False))

    def setup(self, site: Site) -> None:
        entries = site.shape[0] * site.shape[1]
        if self.o.components > entries:
            raise ConfigError(
                f"components={self.o.components} are more than the {entries} entries of '{site.name}'; give fewer"
            )
        self.fast = self.o.components > FEW if self.o.dct == "auto" else self.o.dct == "fast"
        self.a = nn.Parameter(torch.zeros(self.o.components))
        start = torch.rand(2, self.o.components, generator=site.generator())
        self.register_buffer("start", start, persistent=False)
        self.register_buffer("last", torch.tensor(site.shape).unsqueeze(1).to(start) - 1, persistent=False)
        self.learned = self.o.location_until != 0
        if self.learned:
            self.moves = nn.Parameter(torch.zeros_like(start))
            self.register_buffer("locating", torch.tensor(False))  # saved, so that training goes on in its phase
            self.register_load_state_dict_post_hook(_resume)
        self.in_turn = False  # `locating`, without asking the device

    def _places(self, moves: Tensor | None) -> Tensor:
        """u within its borders, times the last index: (2, n) of positions, not yet rounded."""
        start, last = cast(Tensor, self.start), cast(Tensor, self.last)
        u = start if moves is None else start + self.o.rate * moves
        return u.clamp(0, 0.999 if self.o.compat else 1) * last

    @property
    def locations(self) -> Tensor:
        """l: (2, n) whole numbers, row and column in the spectrum."""
        return self._places(self.moves if self.learned else None).round().long()

    def _make(self, a: Tensor, moves: Tensor | None = None) -> Tensor:
        # the Function sees the gradient before alpha's chain rule, which is where the paper clips
        return self.o.alpha * cast(Tensor, _Components.apply(a, self._places(moves), self.view.shape, self.fast))

    def _numbers(self) -> tuple[Tensor, ...]:
        if not self.learned:
            return (self.a,)
        return (self.a.detach(), self.moves) if self.in_turn else (self.a, self.moves.detach())

    def delta_weight(self) -> Tensor:
        return self._make(*self._numbers())

    def delta_forward(self, x: Tensor) -> Tensor:
        return dense(self.view, x, self._make, *self._numbers())

    def joins(self, x: Tensor) -> bool:
        """Whether taking rows of x through the spectrum costs less than forming D twice and three products with it:
        measured on a CPU, where a product of large matrices takes 1 for each multiplication.
        """
        (out, width), rows = self.view.shape, x.numel() // x.shape[-1]
        each = 110 * (out + width) + 95 * self.o.components
        return rows > 0 and rows * (each - out * width) < 450 * out * width

    def linear(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        numbers = self._numbers()
        places = self._places(numbers[1] if self.learned else None)
        made: Tensor = CosineLinear.apply(x, w, bias, numbers[0], places, self.o.alpha)
        return made

    @torch.no_grad()
    def on_step(self, step: int, total: int | None) -> None:
        if not self.learned:
            return
        until = self.o.location_until
        if until is None:
            until = UNTOLD if total is None else total // 10
        before = self.o.coefficient_steps
        self.in_turn = step < until and step % (before + self.o.location_steps) >= before
        cast(Tensor, self.locating).fill_(self.in_turn)
        start = cast(Tensor, self.start)
        self.moves.clamp_(-start / self.o.rate, (1 - start) / self.o.rate)
        (self.a if self.in_turn else self.moves).grad = None

    @classmethod
    def parameter_count(cls, shape: tuple[int, int], options: Any) -> int:
        """n that the update consists of, and 2 n for the places while they are learned."""
        return int(options.components) * (1 if options.location_until == 0 else 3)


def _resume(delta: LoCA, _: Any) -> None:
    delta.in_turn = bool(delta.locating)


class _Components(torch.autograd.Function):
    """C_outᵀ S C_in of coefficients (n,) and positions (2, n), which it rounds. It keeps these two."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, positions: Tensor, shape: tuple[int, int], fast: bool) -> Tensor:
        place = positions.round().long()
        ctx.save_for_backward(a, place)
        ctx.shape, ctx.fast = shape, fast
        if fast:
            spectrum = a.new_zeros(shape[0] * shape[1]).index_add_(0, place[0] * shape[1] + place[1], a)
            return idct2(spectrum.view(shape))
        rows, columns = (dct_rows(place[side], shape[side], a.dtype) for side in (0, 1))
        return (rows * a.unsqueeze(1)).T @ columns

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, place = ctx.saved_tensors
        need_a, need_places = ctx.needs_input_grad[:2]
        (i, j), (p, q), (below, above) = place, ctx.shape, neighbours(place, ctx.shape)
        if ctx.fast:
            k = dct2(grad)
            grad_a = k[i, j]
            if need_places:
                down, right = k[above[0], j] - k[below[0], j], k[i, above[1]] - k[i, below[1]]
        else:
            left = dct_rows(i, p, a.dtype) @ grad  # (n, in): rows of K before the transform of the columns
            grad_a = (left * dct_rows(j, q, a.dtype)).sum(1)
            if need_places:
                across = dct_rows(j, q, a.dtype) @ grad.T
                down = (across * (dct_rows(above[0], p, a.dtype) - dct_rows(below[0], p, a.dtype))).sum(1)
                right = (left * (dct_rows(above[1], q, a.dtype) - dct_rows(below[1], q, a.dtype))).sum(1)
        places = (torch.stack([down, right]) * (a / 2)).clamp_(-1, 1) if need_places else None
        return grad_a if need_a else None, places, None, None
