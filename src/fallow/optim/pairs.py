"""The factor pairs (A, B, s) of the LoRAs that a model trains, W' = W + s B A, whoever holds them.

    our LoRA       in `fallow.attach` and in `get_peft_model(model, fallow.LoRAConfig(...))`, any kind of layer
    PEFT's LoRA    linear layers, convolutions, embeddings, attention

A is seen as (r, in), B as (out, r); of a convolution `in` holds the kernel too. Rules of update stack pairs of one
shape, so that no loop runs over layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from fallow.core.delta import REGISTRY, Delta
from fallow.core.errors import ConfigError, ModelError
from fallow.core.host.layer import sites, weight_at
from fallow.core.sharded import is_dtensor
from fallow.core.views import View, view_of


@dataclass(frozen=True, eq=False)
class Pair:
    """`a`, `b`: the Parameters, of whatever shape. `scale()`: s as it is now. `layer`: the module whose output holds
    the adapter's. `view`: its weight as a matrix. `read()`: that frozen weight, as it is stored. `parts`: PEFT's
    modules of A and B, or our Delta.
    """

    name: str
    a: nn.Parameter
    b: nn.Parameter
    scale: Callable[[], float]
    layer: nn.Module
    view: View
    read: Callable[[], Tensor]
    parts: tuple[nn.Module, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(out, in, r)"""
        return self.b.shape[0], self.a[0].numel(), self.a.shape[0]


def find_pairs(model: nn.Module, rule: str) -> list[Pair]:
    """All pairs of which both factors are in training. ConfigError, naming `rule`, where there is none or one is of a
    kind whose product is not s B A; ModelError for factors that are spread over several processes.
    """
    found = {id(pair.a): pair for pair in (*_attached(model), *_peft_host(model), *_peft(model, rule))}
    pairs = [pair for pair in found.values() if pair.a.requires_grad and pair.b.requires_grad]
    if not pairs:
        frozen = f"; the {len(found)} that it has are frozen" if found else ""
        held = sorted({module.name for module in model.modules() if isinstance(module, Delta)})
        other = f"; it has {', '.join(held)}, which this rule does not know" if held and not found else ""
        raise ConfigError(
            f"{rule} found no LoRA in training in {type(model).__name__}{frozen}{other}; add one first, with "
            "fallow.attach(model, 'lora', rank=8) or PEFT's get_peft_model"
        )
    for pair in pairs:
        if is_dtensor(pair.a) or is_dtensor(pair.b):
            raise ModelError(
                f"{rule} needs whole factors, and those of '{pair.name}' are sharded; leave adapters out of fully_shard"
            )
    return pairs


def refuse_started(pairs: Iterable[Pair], rule: str) -> None:
    """ConfigError where a pair began with something that is subtracted again: B A is then not what W changes by."""
    for pair in pairs:
        if any(getattr(getattr(part, "o", None), "offset", 0) for part in pair.parts):
            raise ConfigError(
                f"{rule} looks at the rows of B A, and '{pair.name}' changes by B A - B0 A0, having a start; leave "
                "start= out, or take 'gaussian' or 'orthogonal'"
            )


def _is_pair(delta: Any) -> bool:
    plain = REGISTRY.get("lora")  # filled when the parameterizations are imported, and so before any of them exists
    return (
        plain is not None
        and isinstance(delta, Delta)
        and type(delta).factors is plain.factors
        and set(delta._parameters) == {"A", "B"}
    )


def _scale(delta: Any, scales: Mapping[str, float], adapter: str) -> float:
    return float(scales[adapter] * (1.0 if delta is None else delta.scaling))


def _attached(model: nn.Module) -> Iterator[Pair]:
    for module, site in sites(model):
        for adapter, delta in site.items():
            if adapter in site.active and _is_pair(delta):
                held: Any = delta
                yield Pair(
                    site.key, held.A, held.B, partial(_scale, held, site.scale, adapter),
                    module, site.view, partial(weight_at, module, site), (held,),
                )  # fmt: skip


def _peft_host(model: nn.Module) -> Iterator[Pair]:
    for name, module in model.named_modules():
        layer: Any = module
        if isinstance(module._modules.get("fallow_delta"), nn.ModuleDict):
            for adapter, delta in layer.fallow_delta.items():
                if adapter in layer.active_adapters and _is_pair(delta):
                    yield Pair(
                        name, delta.A, delta.B, partial(_scale, delta, layer.scaling, adapter),
                        module, delta.view, layer.read, (delta,),
                    )  # fmt: skip


def _peft(model: nn.Module, rule: str) -> Iterator[Pair]:
    for name, module in model.named_modules():
        layer: Any = module
        if not hasattr(module, "lora_embedding_A") or not hasattr(module, "lora_A"):
            continue
        for adapter in [*layer.lora_A, *layer.lora_embedding_A]:
            if adapter not in layer.active_adapters:
                continue
            _refuse_unlike(name, layer, adapter, rule)
            parts: tuple[nn.Module, ...] = ()
            if adapter in layer.lora_A:
                parts = (layer.lora_A[adapter], layer.lora_B[adapter])
                a, b = (cast(Any, part).weight for part in parts)
            else:
                a, b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
            base = layer.get_base_layer()
            view = view_of(base, "in_proj_weight" if isinstance(base, nn.MultiheadAttention) else "weight")
            yield Pair(
                name, a, b, partial(_scale, None, layer.scaling, adapter), module, view,
                partial(_dequantised, base), parts,
            )  # fmt: skip


def _refuse_unlike(name: str, layer: Any, adapter: str, rule: str) -> None:
    variant = getattr(layer, "lora_variant", {}).get(adapter)
    if variant is not None or getattr(layer, "use_dora", {}).get(adapter):
        raise ConfigError(
            f"{rule} cannot train '{name}', a LoRA with something beside its factors ({type(variant).__name__}); take "
            "a plain LoRA, without use_dora and the like"
        )
    if getattr(layer.get_base_layer(), "groups", 1) > 1 or type(layer).__name__ == "ParamWrapper":
        raise ConfigError(
            f"{rule} cannot train '{name}', where PEFT's LoRA holds one product for each group or expert; leave that "
            "layer out of target_modules"
        )


def _dequantised(layer: nn.Module) -> Tensor:
    weight = cast(Tensor, getattr(layer, "weight", None) if hasattr(layer, "weight") else layer.in_proj_weight)
    if weight.is_floating_point() and not hasattr(weight, "quant_state"):
        return weight.detach()
    from peft.utils.integrations import dequantize_module_weight

    return cast(Tensor, dequantize_module_weight(layer)).detach()


# -- stacks of one shape ----------------------------------------------------------------------------------------------


class Stack:
    """Pairs of one shape (out, in, r), dtype and device, as tensors (k, ...) of at least float32."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs = list(pairs)
        self.out, self.inner, self.rank = pairs[0].shape
        self.dtype = torch.promote_types(pairs[0].a.dtype, torch.float32)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Copies of A (k, r, in) and B (k, out, r)."""
        return self._stacked([p.a for p in self.pairs]), self._stacked([p.b for p in self.pairs])

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Those of A and B, in the same shapes; a missing one is zero."""
        return self._stacked([_grad(p.a) for p in self.pairs]), self._stacked([_grad(p.b) for p in self.pairs])

    def scales(self) -> Tensor:
        """s (k, 1, 1)"""
        values = torch.tensor([pair.scale() for pair in self.pairs], dtype=self.dtype)
        return values.to(self.pairs[0].a.device, non_blocking=True).view(-1, 1, 1)

    def _stacked(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack([tensor.detach().flatten(1) for tensor in tensors]).to(self.dtype)


def _grad(param: nn.Parameter) -> Tensor:
    return torch.zeros_like(param) if param.grad is None else param.grad


def stacked(pairs: Iterable[Pair]) -> list[Stack]:
    """Pairs sorted into stacks, in the order of their first members."""
    groups: dict[Any, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault((pair.shape, pair.a.dtype, pair.a.device), []).append(pair)
    return [Stack(members) for members in groups.values()]


def row_norms_squared(a: Tensor, b: Tensor) -> Tensor:
    """|(B A)_i|² (..., out) of A (..., r, in), B (..., out, r), by B (A Aᵀ) Bᵀ: no matrix (out, in) is formed."""
    return ((b @ (a @ a.mT)) * b).sum(-1).clamp_min(0)
