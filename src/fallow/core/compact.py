"""Compact gradients: train chosen entries of existing weights without ever keeping a dense gradient.

Three separate parts, so that each may be exchanged (a row-chunked weight gradient replaces the capture, an optimizer in
the backward replaces the rule, a sharded weight replaces the slot's reads and writes):

- `Slot`: one weight's chosen entries. It reads and writes the weight at flat indices and owns the *proxy*, a compact
  `nn.Parameter` that optimizers, schedulers, GradScaler and clipping see in place of the weight.
- `Capture`: hooks that gather each dense gradient into the proxy's `.grad` the moment autograd has it, and drop it.
- the rule: any torch optimizer over the proxies (see `fallow.selection.selective`).

The model's own Parameters stay leaves with their names, storages and shapes: state_dict, deepcopy, torch.compile and
the hooks of other tools go on working.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fallow.core.errors import ModelError
from fallow.core.select import Target

Form = Literal["value", "delta"]


class Slot:
    """The chosen entries of one weight.

    `index` (n,): sorted flat indices of every entry that training may have moved, `base` (n,): their first values in
    the weight's dtype. `live` (k,): which of them are trained now, as positions in `index`; None means all.
    `proxy` (k,): float32 (float64 for float64 weights). In the form "value" it holds the entries' values, in the form
    "delta" what is added to `base`. It is the master copy: the weight's entry always equals round(master).
    """

    def __init__(self, target: Target, index: Tensor, form: Form = "value") -> None:
        self.name = target.name
        self.params = target.params
        self.form = form
        self.index = index
        self.live: Tensor | None = None
        self.selected = index.numel()
        self.base = self.read()
        self.proxy = nn.Parameter(self._from_values(self.base.to(self.precision)))

    @property
    def weight(self) -> nn.Parameter:
        return self.params[0]

    @property
    def precision(self) -> torch.dtype:
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32

    @property
    def trained(self) -> Tensor:
        """(k,) sorted flat indices of the entries trained now."""
        return self.index if self.live is None else self.index.index_select(0, self.live)

    def base_of_trained(self) -> Tensor:
        base = self.base if self.live is None else self.base.index_select(0, self.live)
        return base.to(self.precision)

    # -- the weight ---------------------------------------------------------------------------------------------------

    def read(self) -> Tensor:
        """(n,) the weight's present values at `index`, in its dtype."""
        return gather(self.weight, self.index)

    @torch.no_grad()
    def write(self, values: Tensor, index: Tensor | None = None) -> None:
        """Put values (rounded to the weight's dtype) into the weight at `index`, by default all of the slot's."""
        scatter(self.weight, self.index if index is None else index, values)

    def values(self) -> Tensor:
        """(k,) the trained entries' values at the proxy's precision."""
        proxy = self.proxy.detach()
        return proxy if self.form == "value" else self.base_of_trained() + proxy

    def store(self) -> None:
        """Write the trained entries back after a step: weight = round(master)."""
        self.write(self.values(), self.trained)

    @torch.no_grad()
    def refresh(self) -> None:
        """Follow what others wrote into the weight (load_state_dict, an EMA): where it is not round(master), it
        wins.

        The values are compared each time: writes through `param.data`, as the EMA of diffusers makes them, leave
        autograd's version counter as it was.
        """
        present = gather(self.weight, self.trained)
        if self.form == "value" and present.dtype == self.proxy.dtype:
            self.proxy.copy_(present)
            return
        same = present == self.values().to(present.dtype)
        self.proxy.copy_(torch.where(same, self.proxy, self._from_values(present.to(self.precision))))

    def _from_values(self, values: Tensor) -> Tensor:
        return values.clone() if self.form == "value" else values - self.base_of_trained()

    # -- gradients ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def accumulate(self, grad: Tensor) -> None:
        """Add the chosen entries of a dense (or sparse row) gradient to the proxy's gradient."""
        if grad.device != self.proxy.device:
            raise ModelError(
                f"'{self.name}' was moved from {self.proxy.device} to {grad.device} after the optimizer was made; "
                "move the model first, then make the optimizer"
            )
        if any(param.data_ptr() != self.weight.data_ptr() for param in self.params[1:]):
            raise ModelError(
                f"'{self.name}' was tied through its storage and is so no more: the model was moved or cast after the "
                "optimizer was made; do that first and tie the whole Parameter"
            )
        part = gather(grad, self.trained).to(self.proxy.dtype)
        if self.proxy.grad is None:
            self.proxy.grad = part
        else:
            self.proxy.grad += part

    # -- changes of what is trained -----------------------------------------------------------------------------------

    def narrow(self, kept: Tensor) -> None:
        """Train from now on only the entries at these positions (sorted, of the present proxy); the others stay as
        they are.
        """
        self.live = kept if self.live is None else self.live.index_select(0, kept)
        grad, self.proxy.grad = self.proxy.grad, None
        self.proxy.data = self.proxy.data.index_select(0, kept)
        self.proxy.grad = None if grad is None else grad.index_select(0, kept)

    def adopt(self, index: Tensor, base: Tensor, live: Tensor | None, master: Tensor, selected: int) -> None:
        """Take over entries, first values, trained positions and master values, e.g. from a checkpoint; copies them."""
        device = self.weight.device
        self.index, self.base = index.to(device, copy=True), base.to(device, self.weight.dtype, copy=True)
        self.live = None if live is None else live.to(device, copy=True)
        self.selected = selected
        self.proxy.grad = None
        self.proxy.data = master.to(device, self.precision, copy=True)


class Capture:
    """Gathers gradients into the proxies as soon as autograd has them, and drops the dense ones.

    The gradient of one weight is dense only between its computation and the hook, so one is alive at a time. Several
    backward passes add up (accumulation); so do the several calls of one backward under reentrant checkpointing.

    `spent` is raised by the optimizer after a step: the next gradient then starts anew even where the loop clears only
    `model.zero_grad()`, as the Hugging Face Trainer does, which cannot reach the proxies.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.slots = list(slots)
        self.spent = False
        self.handles: dict[str, list[RemovableHandle]] = {}
        for slot in self.slots:
            for param in slot.params:
                _refuse_a_second(slot.name, param)
        for slot in self.slots:
            self.attach(slot)

    def attach(self, slot: Slot) -> None:
        """Compute this weight's gradient and gather it."""
        for param in slot.params:
            param.requires_grad_(True)
            param.grad = None  # a dense gradient from before would be kept alive and counted
        hook = _Gather(self, slot)
        self.handles[slot.name] = [param.register_post_accumulate_grad_hook(hook) for param in slot.params]

    def detach(self, slot: Slot) -> None:
        """Stop computing this weight's gradient at all: saves the matrix product of its weight gradient."""
        for handle in self.handles.pop(slot.name, []):
            handle.remove()
        for param in slot.params:
            param.requires_grad_(False)

    def begin(self) -> None:
        """Called by the hooks: drop gradients that a step has already used."""
        if self.spent:
            self.spent = False
            for slot in self.slots:
                slot.proxy.grad = None


class _Gather:
    """The hook of one weight."""

    def __init__(self, capture: Capture, slot: Slot) -> None:
        self.capture, self.slot = capture, slot

    def __call__(self, param: Tensor) -> None:
        grad, param.grad = param.grad, None
        if grad is not None:
            self.capture.begin()
            self.slot.accumulate(grad)


def _refuse_a_second(name: str, param: nn.Parameter) -> None:
    if any(isinstance(hook, _Gather) for hook in (param._post_accumulate_grad_hooks or {}).values()):
        raise ModelError(f"'{name}' is already trained by another selective optimizer; call its close() first")


def release(handles: dict[str, list[RemovableHandle]], trainable: Iterable[nn.Parameter]) -> None:
    """Remove the hooks and let these parameters require gradients again."""
    for removable in handles.values():
        for handle in removable:
            handle.remove()
    handles.clear()
    for param in trainable:
        param.requires_grad_(True)


def gather(tensor: Tensor, index: Tensor) -> Tensor:
    """(k,) the entries of a tensor of any layout at flat row-major indices, in its dtype.

    A sparse gradient (nn.Embedding(sparse=True): rows that were looked up) is read without making it dense; rows that
    it does not hold are zero.
    """
    tensor = tensor.detach()
    if tensor.is_sparse:
        return _gather_rows(tensor, index) if tensor.sparse_dim() == 1 else gather(tensor.to_dense(), index)
    flat, positions = _flat(tensor, index)
    return flat.index_select(0, positions)


@torch.no_grad()
def scatter(tensor: Tensor, index: Tensor, values: Tensor) -> None:
    """Write values (k,), rounded to the tensor's dtype, to flat row-major indices of a dense tensor of any layout."""
    flat, positions = _flat(tensor, index)
    flat.index_copy_(0, positions.long(), values.to(flat.dtype))


def _gather_rows(tensor: Tensor, index: Tensor) -> Tensor:
    tensor = tensor.coalesce()
    held, values = tensor.indices()[0], tensor.values()
    if held.numel() == 0:
        return values.new_zeros(index.numel())
    values = values.reshape(held.numel(), -1)
    row, column = index.long() // values.shape[1], index.long() % values.shape[1]
    at = torch.searchsorted(held, row).clamp_(max=held.numel() - 1)
    return torch.where(held[at] == row, values[at, column], 0)


def _flat(tensor: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """A one-dimensional view of the tensor's memory, and where in it the row-major `index` lies.

    The two differ for weights in another memory format, e.g. channels_last convolutions.
    """
    tensor = tensor.detach()
    if tensor.is_contiguous():
        return tensor.view(-1), index
    rest, positions = index.long(), torch.zeros_like(index, dtype=torch.int64)
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        positions += rest % size * stride
        rest = rest // size
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((extent,), (1,)), positions
