"""Hooks that see the inputs of layers, and take each input once however many layers share it.

Query, key and value are given the very same tensor, so that what is gathered of it is the same. A layer stands at a
sum, and layers that have seen the same tensors so far stand at the same one:

    call of q with x      q moves from S to S' = S + x; the step is noted: (x, S) -> S'
    call of k with x      k moves from S to S' too: no work
    call of v with z      v moves to S'' = S + z, a sum of its own from now on

What is compared is the identity of the tensor and its version, not its values. A sum at which nobody stands any more is
gone; one at which a layer stands alone is changed in place. So sharing costs nothing where it holds, follows from no
first batch, and where layers part it ends without an error.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fallow.core.errors import DataError
from fallow.core.probing.components import Convergence, Known, Principal
from fallow.core.probing.covariance import Covariance
from fallow.core.probing.layers import Layer
from fallow.core.probing.options import Options


@dataclass(eq=False)
class Stand:
    """What layers that saw the same inputs have gathered. `number`: another one after each change."""

    number: int
    covariance: Covariance | None = None
    principal: Principal | None = None
    tokens: int = 0
    calls: int = 0
    layers: set[str] = field(default_factory=set)
    done: bool = False  # its components are settled, and nothing else is gathered


class Inputs:
    """Gathers covariances and principal components of the inputs of layers.

    `steps`: how often something was gathered; fewer than calls of layers where inputs are shared.
    """

    def __init__(self, layers: Sequence[Layer], want: frozenset[str], options: Options) -> None:
        self.layers = {layer.name: layer for layer in layers if layer.shows_input}
        self.options, self.want = options, want
        self.generator = torch.Generator().manual_seed(options.seed)
        self.empty = Principal(options.components, options.center)
        self.settle = Convergence(options.tolerance, options.converged)
        self.at: dict[str, Stand] = {}
        self.steps = 0
        self.active = want
        self._number = 0
        self._open = False
        self._masks: Sequence[Tensor] = ()
        self._noted: dict[tuple[Any, ...], tuple[weakref.ref[Tensor], int, weakref.ref[Stand], int]] = {}
        self._handles: list[Any] = []

    def watch(self) -> None:
        """Put the hooks on; `leave` takes them off."""
        for layer in self.layers.values():
            hook = self._hook(layer)
            self._handles.append(layer.spot.layer.register_forward_hook(hook, with_kwargs=True))

    def leave(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def begin(self, masks: Sequence[Tensor]) -> None:
        """Before a forward pass, whose tokens have these masks."""
        self._open, self._masks = True, masks

    def end(self) -> None:
        """After a forward pass: what is computed again for the backward does not count."""
        self._open, self._masks = False, ()
        self._noted.clear()

    def _hook(self, layer: Layer) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self._open and (x := layer.given(args, kwargs)) is not None:
                self._seen(layer, x)

        return hook

    @torch.no_grad()
    def _seen(self, layer: Layer, x: Tensor) -> None:
        here = self.at.get(layer.name)
        if here is not None and here.done:
            return
        step = (id(x), 0 if here is None else here.number, layer.reading)
        known = self._noted.get(step)
        if known is not None:
            tensor, version, there, number = known
            stand = there()
            if tensor() is x and version == _version(x) and stand is not None and stand.number == number:
                self._move(layer.name, here, stand)
                return
        alone = here is not None and here.layers == {layer.name}
        stand = self._added(layer, here, x, alone)
        self._move(layer.name, here, stand)
        self._noted[step] = (weakref.ref(x), _version(x), weakref.ref(stand), stand.number)

    def _added(self, layer: Layer, here: Stand | None, x: Tensor, alone: bool) -> Stand:
        seen = layer.rows(x.detach(), self._masks, self.options.positions, self.generator)
        rows = seen.values
        self.steps += 1
        self._number += 1
        found = Stand(self._number) if here is None else here
        covariance, principal = found.covariance, found.principal
        if "input_covariance" in self.active and len(rows):
            covariance = covariance or Covariance(None, self.options.scale)
            of_each = seen.sample_of_each() if self.options.scale_by == "sample" else None
            covariance = covariance.added(rows, alone or here is None, of_each)
        if "activation" in self.active:
            principal = self._principal(layer, principal or self.empty, rows)
        into = found if alone else Stand(self._number)
        into.number, into.covariance, into.principal = self._number, covariance, principal
        into.tokens, into.calls = found.tokens + len(rows), found.calls + 1
        return into

    def _principal(self, layer: Layer, before: Principal, rows: Tensor) -> Principal:
        try:
            return before.added(rows, self.settle)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            if bool(torch.isfinite(rows).all()):
                raise
            raise DataError(
                f"'{layer.name}' was given NaN or infinite inputs; look at the batches, and run a model in float16 in "
                "another dtype"
            ) from None

    def _move(self, name: str, here: Stand | None, there: Stand) -> None:
        if here is not None:
            here.layers.discard(name)
        there.layers.add(name)
        self.at[name] = there

    def place(self, stand: Stand) -> None:
        """Put layers back at a sum that was saved."""
        self._number += 1
        stand.number = self._number
        self.at.update(dict.fromkeys(stand.layers, stand))

    # -- convergence --------------------------------------------------------------------------------------------------

    def stands(self) -> list[Stand]:
        """The distinct sums, in the order of the layers."""
        return list({id(self.at[name]): self.at[name] for name in self.layers if name in self.at}.values())

    def settled(self) -> bool:
        """Whether the components of all layers that were seen are; those that are need no hook any more, until a
        distribution of ranks wants more of them.
        """
        seen = [(stand, known) for stand in self.stands() if stand.principal and (known := stand.principal.known)]
        if not seen:
            return False
        needed = self._needed(seen)
        missing = [(~known.converged[:need]).sum() for (_, known), need in zip(seen, needed, strict=True)]
        counts = torch.stack(missing).tolist()
        enough = [count == 0 and stand.calls > 1 for count, (stand, _) in zip(counts, seen, strict=True)]
        for (stand, _), is_enough in zip(seen, enough, strict=True):
            stand.done = is_enough and self.active == {"activation"}
        return all(enough)

    def _needed(self, seen: Sequence[tuple[Stand, Known]]) -> list[int]:
        """How many components of each must be settled: all, or as many as EVA gives a layer of them rank."""
        if self.options.rank is None:
            return [len(known.singular) for _, known in seen]
        ratios = [known.ratios for stand, known in seen for _ in stand.layers]
        pooled = torch.cat(ratios)
        kept = pooled.argsort(descending=True, stable=True)[: self.options.rank * len(ratios)]
        taken = torch.zeros(len(pooled), dtype=torch.bool, device=pooled.device)
        taken[kept] = True
        sums = torch.stack([part.sum() for part in taken.split([len(ratio) for ratio in ratios])]).tolist()
        most, first = [], 0
        for stand, _ in seen:
            most.append(max(sums[first : first + len(stand.layers)]))
            first += len(stand.layers)
        return most


def _version(x: Tensor) -> int:
    """Another one after each change in place."""
    return 0 if x.is_inference() else x._version
