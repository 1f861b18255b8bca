"""Chosen entries of a base weight as a PEFT adapter: no second weight, no dense gradient kept.

    forward    W.flat[index] = round(first + scale * values),  in place;  then the module's own forward with W
    backward   dL/dvalues = scale * (dL/dW).flat[index];   the dense dL/dW is freed there, layer by layer
    base       W.flat[index] = first,  bit for bit

`values` (k,) is what is trained, 0 at first, float32 whatever the base is (float64 for a float64 base). Several active
adapters are added up in that precision and rounded once. `in_place.py` does the writing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fallow.core.compact import gather
from fallow.core.errors import AdapterError, ModelError
from fallow.core.files import fingerprint, matches
from fallow.core.peft_host import Active, Hosted
from fallow.selection.in_place import InPlace

PRINTS = ("f32", "f16", "bf16")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
PRINT_BYTES = 8 * len(PRINTS) + 1


class Entries(Hosted):
    """`values` (k,) are added to the weight's entries at `index` (k,), sorted flat row-major.

    `base` (25,): fingerprint of the base's entries there, and the dtype of the training. `live` (k,): False for entries
    that a re-selection froze; only where one is planned. `first` (k,): the base's entries, found again on loading.
    """

    kind = InPlace
    values: nn.Parameter
    index: Tensor
    base: Tensor
    live: Tensor | None
    first: Tensor
    held: Tensor | None

    def __init__(self, index: Tensor, precision: torch.dtype, check_base: bool = True, reselects: bool = False) -> None:
        super().__init__()
        device = index.device
        self.values = nn.Parameter(torch.zeros(index.numel(), dtype=precision, device=device))
        self.register_buffer("index", index)
        self.register_buffer("base", torch.zeros(PRINT_BYTES, dtype=torch.uint8, device=device))
        self.register_buffer("live", torch.ones(index.numel(), dtype=torch.bool, device=device) if reselects else None)
        self.register_buffer("first", None, persistent=False)
        self.register_buffer("held", None, persistent=False)
        self.check_base = check_base
        self._bound: tuple[Tensor, int] | None = None
        self._trained: tuple[Tensor, Tensor] | None = None

    @staticmethod
    def awaiting(count: int, weight: Tensor, check_base: bool, reselects: bool) -> Entries:
        """As many entries as a file will bring; AdapterError where a weight of this size cannot have them."""
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= weight.numel():
            raise AdapterError(f"the adapter claims {count!r} entries of a weight of {weight.numel()}; copy it again")
        index = torch.full((count,), -1, dtype=torch.int32 if weight.numel() < 2**31 else torch.int64)
        return Entries(index.to(weight.device), precision(weight), check_base, reselects)

    @property
    def bound(self) -> bool:
        return self._bound is not None and self._bound[0] is self.index and self._bound[1] == self.index._version

    def unbind(self) -> None:
        self._bound = None

    @torch.no_grad()
    def bind(self, weight: Tensor, name: str = "a layer") -> None:
        """Take the base's values at `index`, while the weight shows its base. AdapterError where they do not fit."""
        if self.index.is_meta or weight.is_meta:
            raise ModelError(f"{name} is on the meta device and has no values; load the weights first")
        if self.index.dtype not in (torch.int32, torch.int64):
            raise AdapterError(f"the adapter's indices of {name} are {self.index.dtype}, not int32 or int64")
        if self.index.device != weight.device:
            self.to(weight.device)
        if self.index.numel() and int(self.index[0]) < 0:
            raise AdapterError(
                "the adapter was made from a config whose entries are in a file that was not loaded; load it with "
                "PeftModel.from_pretrained, or set config.made = None to choose anew"
            )
        if bool((self.index[1:] <= self.index[:-1]).any()) or int(self.index[-1]) >= weight.numel():
            raise AdapterError(f"the adapter's indices do not fit {name} {tuple(weight.shape)}; give its own base")
        self.first = gather(weight, self.index)
        if not self.base.any():
            self.base.copy_(_print(self.first))
        elif self.check_base and not _same(self.base, self.first):
            raise AdapterError(
                f"the adapter was trained on another base: {name} holds other values at its entries. Give the base "
                "that it was trained on, or force it: config = PeftConfig.from_pretrained(path); config.check_base = "
                "False; PeftModel.from_pretrained(model, path, config=config)"
            )
        self.held = None if self.live is None or bool(self.live.all()) else self.values.detach().clone()
        self._bound = (self.index, self.index._version)

    def change(self, scale: float = 1.0) -> Tensor:
        """(k,) what is added, after putting back entries that a re-selection froze and momentum has moved."""
        values = self.values.detach()
        if self.held is not None:
            assert self.live is not None
            values.data.copy_(torch.where(self.live, values, self.held))
        return values if scale == 1 else scale * values

    @property
    def trained(self) -> Tensor | None:
        """(j,) places of the entries trained now, None where all are; found once for each re-selection, as a device
        makes one wait for it.
        """
        if self.live is None or self.held is None:
            return None
        if self._trained is None or self._trained[0] is not self.held:
            self._trained = (self.held, self.live.nonzero().view(-1))
        return self._trained[1]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.change()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def freeze(self, live: Tensor) -> None:
        """Train from now on only these (k,) of the entries trained so far; the others stay where they are."""
        assert self.live is not None, "made without a plan to re-select"
        self.change()
        self.live &= live
        self.held = self.values.detach().clone()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Entries:
        bound = self.bound
        super()._apply(fn, recurse)
        if bound:  # moved together with the base: still its values
            self._bound = (self.index, self.index._version)
        return self

    @classmethod
    def combined(cls, parts: Active) -> Entries:
        index = torch.cat([delta.index for delta, _ in parts]).unique()
        values = torch.zeros(index.numel(), dtype=parts[0][0].values.dtype, device=index.device)
        for delta, scale in parts:
            values.index_add_(0, torch.searchsorted(index, delta.index), delta.change(scale).to(values.dtype))
        added = cls(index, values.dtype, parts[0][0].check_base)
        added.values.data.copy_(values)
        return added


def precision(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _print(first: Tensor) -> Tensor:
    digest = b"".join(bytes.fromhex(part.split(":")[1]) for part in fingerprint(first).split(","))
    return torch.tensor([*digest, DTYPES.index(first.dtype)], dtype=torch.uint8)


def _same(base: Tensor, first: Tensor) -> bool:
    held = bytes(base.tolist())
    told = ",".join(f"{name}:{held[8 * i : 8 * i + 8].hex()}" for i, name in enumerate(PRINTS))
    return held[-1] < len(DTYPES) and matches(told, first, DTYPES[held[-1]])
