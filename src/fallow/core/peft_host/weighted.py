"""One adapter made of several: `model.add_weighted_adapter(["a", "b"], [0.7, 0.3], "both", "svd", svd_rank=16)`.

    linear, cat         sum of weight * change, exact: factors side by side, rank = the sum of the ranks
    svd                 the best rank-`svd_rank` product for that sum
    ties, dare_linear, dare_ties, magnitude_prune    of the changes themselves (density=, majority_sign_method=), then
                        the best product as above

The changes are of whatever methods, if they can be merged; what is made is a LoRA, which every program reads. Chosen
entries add up as entries ("linear").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, ties
from torch import Tensor, nn

from fallow.core.delta import Delta, Site, method_of
from fallow.core.errors import ConfigError
from fallow.core.linalg import Truncation
from fallow.core.low_rank_form import of_dense, of_factors
from fallow.core.peft_host.acting import Acting

if TYPE_CHECKING:
    from fallow.core.peft_host.layer import FallowLayer

Combination = Literal["linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
BY_SVD = ("svd", "ties", "dare_linear", "dare_ties", "magnitude_prune")
DENSE: dict[str, Any] = {
    "ties": ties,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
    "magnitude_prune": magnitude_prune,
}


@torch.no_grad()
def combined(
    layer: FallowLayer,
    key: str,
    parts: Sequence[tuple[Any, float]],
    how: str,
    svd_rank: int | None,
    density: float,
    majority_sign_method: str,
) -> tuple[Delta, float]:
    """A LoRA in the place of (Delta, weight) parts of a layer, and the relative error of its product."""
    for delta, _ in parts:
        if not isinstance(delta, Delta):
            raise ConfigError(f"chosen entries and other methods do not add up to one adapter, as '{key}' would need")
        if not delta.mergeable:
            raise ConfigError(f"'{delta.name}' depends on its input, so it cannot be combined with others; at '{key}'")
    acting = cast(Acting, layer.kinds[Acting])
    view = acting.view
    how_far = None if how not in BY_SVD or svd_rank is None else Truncation(svd_rank)
    if how not in DENSE and all(delta.exact for delta, _ in parts):
        pairs = [(delta.factors(), weight) for delta, weight in parts]
        b = torch.cat([b * weight for (b, _), weight in pairs], 1)
        a = torch.cat([a for (_, a), _ in pairs])
        if how_far is None:
            return product(layer, key, view, b, a), 0.0
        form = of_factors(b, a, how_far)
    else:
        changes = [view.read(acting.change(delta, 1.0)).float() for delta, _ in parts]
        weights = torch.tensor([weight for _, weight in parts], device=changes[0].device)
        if how in ("ties", "dare_ties"):
            whole = DENSE[how](changes, weights, density, majority_sign_method)
        elif how in DENSE:
            whole = DENSE[how](changes, weights, density)
        else:
            whole = torch.stack([w * change for w, change in zip(weights, changes, strict=True)]).sum(0)
        form = of_dense(whole, how_far or Truncation(min(whole.shape)))
    return product(layer, key, view, form.b, form.a), form.error


def product(layer: FallowLayer, key: str, view: Any, b: Tensor, a: Tensor) -> Delta:
    """A LoRA with these factors."""
    rank = a.shape[0]
    method = method_of("lora")
    site = Site(key, view, layer.read, nn.Module(), fresh=False)
    made = method(site, rank=rank, alpha=float(rank))
    made.A, made.B = nn.Parameter(a.contiguous()), nn.Parameter(b.contiguous())
    return made
