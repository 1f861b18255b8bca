"""Compact gradients: train chosen entries of existing weights without ever keeping a dense gradient.

Three separate parts, so that each may be exchanged (a row-chunked weight gradient replaces the capture, an optimizer in
the backward replaces the rule, a sharded weight replaces the slot's reads and writes):

- `Slot`: one weight's chosen entries. It reads and writes the weight at flat indices and owns the *proxy*, a compact
  `nn.Parameter` that optimizers, schedulers, GradScaler and clipping see in place of the weight. A proxy of float32
  weights is hollow between steps: it has a shape and a gradient, its values are in the weight.
- `Capture`: hooks that gather each dense gradient into the proxy's `.grad` the moment autograd has it, and drop it.
- the rule: any torch optimizer over the proxies (`fallow.core.update` runs it on a bounded part of them at a time).

The model's own Parameters stay leaves with their names, storages and shapes: state_dict, deepcopy, torch.compile and
the hooks of other tools go on working.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fallow.core.coding import PackedIndex
from fallow.core.errors import ModelError
from fallow.core.select import Target
from fallow.core.sharded import local, part_of
from fallow.core.stored_weight import StoredWeight

Form = Literal["value", "delta"]


class Slot:
    """The chosen entries of one weight.

    `index` (n,): sorted flat indices of every entry that training may have moved, `base` (n,): their first values in
    the weight's dtype. `trained` (k,): the indices of those trained now, `live` (k,): their positions in `index`; None
    means all. All four are made anew when asked for: what is kept is a packed code of about 1 byte an index, and the
    first values, in host memory where the weight is on an accelerator (they are needed only to show the base).

    `proxy` (k,): float32 (float64 for float64 weights), in the form "value" the entries' values, in the form "delta"
    what is added to `base`. It is the master copy (`mastered`): the weight's entry always equals round(master). Where
    the weight holds exactly these numbers (form "value", same dtype) `hollow()` lets go of the copy: the proxy keeps
    shape, dtype and gradient, and has values only between `materialise()` and `store()`.
    """

    def __init__(self, target: Target, index: Tensor, form: Form = "value", hollow: bool = False) -> None:
        self.name = target.name
        self.params = target.params
        self.form = form
        self.part = part_of(self.weight)  # None: all of the weight is on this rank
        self.selected = self.over_ranks(index.numel())
        self._count: int | None = None
        self.mastered = True
        self._nothing = torch.zeros(1, dtype=self.precision, device=self.weight.device)
        self._place: tuple[Tensor, Tensor] | None = None  # the weight's memory and the entries in it, while not hollow
        self._trained: PackedIndex | None = None  # None: all of the index
        self._index = PackedIndex(index, local(self.weight).numel())
        first = gather(self.weight, index)
        self._base = self._kept(first)
        self.proxy = nn.Parameter(self._from_values(first.to(self.precision)))
        if hollow:
            self.hollow()

    @property
    def weight(self) -> nn.Parameter:
        return self.params[0]

    @property
    def precision(self) -> torch.dtype:
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32

    @property
    def index(self) -> Tensor:
        """(n,) sorted flat indices, int32 below 2^31 entries; not to be changed."""
        return self._index.decode()

    @property
    def trained(self) -> Tensor:
        """(k,) sorted flat indices of the entries trained now; not to be changed."""
        return self.code.decode()

    @property
    def live(self) -> Tensor | None:
        """(k,) positions in `index` of the entries trained now; None where all are."""
        if self._trained is None:
            return None
        return torch.searchsorted(self.index, self.trained, out_int32=self._index.dtype == torch.int32)

    @property
    def base(self) -> Tensor:
        """(n,) the first values, on the weight's device."""
        return self._base.to(self.weight.device, non_blocking=True)

    def over_ranks(self, count: int) -> int:
        """The sum of such a count over the ranks that hold parts of the weight; each of them must ask."""
        return count if self.part is None else self.part.total(count)

    @property
    def count(self) -> int:
        """The number of entries trained now, over all ranks; the first question after a change is for all of them."""
        if self.part is None:
            return self.proxy.numel()
        if self._count is None:
            self._count = self.over_ranks(self.proxy.numel())
        return self._count

    def base_of_trained(self) -> Tensor:
        base, live = self.base, self.live
        return (base if live is None else base.index_select(0, live)).to(self.precision)

    @property
    def nbytes(self) -> int:
        """What the slot keeps between steps, on whatever device: codes, first values, masters (no gradient)."""
        codes = self._index.nbytes + (0 if self._trained is None else self._trained.nbytes)
        return codes + self._base.nbytes + (self.proxy.nbytes if self.mastered else 0)

    @property
    def code(self) -> PackedIndex:
        """The packed `trained`; another object after each change of what is trained."""
        return self._index if self._trained is None else self._trained

    @property
    def exact(self) -> bool:
        """Whether the weight itself holds the masters."""
        return self.form == "value" and self.weight.dtype == self.proxy.dtype

    def hollow(self) -> None:
        """Keep no copy of values that the weight holds; for rules that look at the proxy only in their steps."""
        if self.exact:
            self.mastered = False
            self.release()

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
        if not self.mastered and self._place is None:
            return gather(self.weight, self.trained).to(self.precision)
        proxy = self.proxy.detach()
        return proxy if self.form == "value" else self.base_of_trained() + proxy

    @torch.no_grad()
    def materialise(self) -> None:
        """Let the proxy have its values, as a rule needs them; follow what others wrote into the weight meanwhile."""
        if not self.mastered and self.weight.dtype != self.proxy.dtype:  # cast since: now it takes a master
            self.proxy.data = self.values().to(self.proxy.dtype, copy=True)
            self.mastered = True
        elif self.mastered:
            self.refresh()
        else:
            self._place = _flat(self.weight, self.trained)
            self.proxy.data = self._place[0].index_select(0, self._place[1])

    @torch.no_grad()
    def store(self) -> None:
        """Write the trained entries back after a step, weight = round(master), and make the proxy hollow again."""
        if self.mastered:
            self.write(self.values(), self.trained)
        elif self._place is not None:
            flat, positions = self._place
            flat.scatter_(0, positions.long(), self.proxy.detach())
            self.release()

    def release(self) -> None:
        """Make the proxy hollow again without writing."""
        if not self.mastered:
            self._place, self.proxy.data = None, self._empty()

    @torch.no_grad()
    def refresh(self) -> None:
        """Follow what others wrote into the weight (load_state_dict, an EMA): where it is not round(master), it
        wins.

        The values are compared each time: writes through `param.data`, as the EMA of diffusers makes them, leave
        autograd's version counter as it was. Without a master there is nothing to follow: the weight is the value.
        """
        if self.mastered:
            present = gather(self.weight, self.trained)
            same = present == self.values().to(present.dtype)
            self.proxy.copy_(torch.where(same, self.proxy, self._from_values(present.to(self.precision))))

    @torch.no_grad()
    def masters(self) -> Tensor:
        """(n,) of every entry of the slot, those put to rest by a re-selection included, what the proxy stands for:
        values, or in the form "delta" changes.
        """
        if not self.mastered:
            return self.read()
        live = self.live
        if live is None:
            return self.proxy.detach()
        rest = self.read().to(self.precision)
        if self.form == "delta":
            rest -= self.base.to(self.precision)
        return rest.index_copy_(0, live.long(), self.proxy.detach())

    @torch.no_grad()
    def put(self, masters: Tensor) -> None:
        """Set what `masters()` gives, and the weight with it."""
        self.write(masters if self.form == "value" else self.base.to(self.precision) + masters)
        if self.mastered:
            live = self.live
            self.proxy.copy_(masters if live is None else masters.index_select(0, live))

    def _from_values(self, values: Tensor) -> Tensor:
        return values.clone() if self.form == "value" else values - self.base_of_trained()

    def _empty(self) -> Tensor:
        """(k,) of one element: shape and dtype without memory; writing into it is an error of torch's."""
        return self._nothing.expand(self.code.size)

    def _kept(self, first: Tensor) -> Tensor:
        """The first values where they are kept: on the host, unless the form "delta" needs them in each step."""
        if first.device.type in ("cpu", "meta") or self.form == "delta":
            return first
        host = torch.empty(first.shape, dtype=first.dtype, pin_memory=first.device.type == "cuda")
        return host.copy_(first)

    # -- gradients ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def accumulate(self, grad: Tensor) -> None:
        """Add the chosen entries of a dense (or sparse row) gradient to the proxy's gradient."""
        self.check(grad.device)
        self.add(gather(grad, self.trained))

    def check(self, device: torch.device) -> None:
        """ModelError where a gradient comes from another device, or weights tied by storage are so no more."""
        if device != self.proxy.device:
            raise ModelError(
                f"'{self.name}' was moved from {self.proxy.device} to {device} after the optimizer was made; "
                "move the model first, then make the optimizer"
            )
        if any(param.data_ptr() != self.weight.data_ptr() for param in self.params[1:]):
            raise ModelError(
                f"'{self.name}' was tied through its storage and is so no more: the model was moved or cast after the "
                "optimizer was made; do that first and tie the whole Parameter"
            )

    def add(self, part: Tensor) -> None:
        """Add the gradient (k,) of the trained entries to the proxy's; it is taken over, so give a tensor of its
        own.
        """
        part = part.to(self.proxy.dtype)
        if self.proxy.grad is None:
            self.proxy.grad = part
        else:
            self.proxy.grad += part

    # -- changes of what is trained -----------------------------------------------------------------------------------

    def narrow(self, kept: Tensor) -> None:
        """Train from now on only the entries at these positions (sorted, of the present proxy); the others stay as
        they are.
        """
        grad, self.proxy.grad = self.proxy.grad, None
        self._trained = PackedIndex(self.trained.index_select(0, kept), self._index.numel)
        self._count = None
        self.proxy.data = self.proxy.data.index_select(0, kept) if self.mastered else self._empty()
        self.proxy.grad = None if grad is None else grad.index_select(0, kept)

    def adopt(self, index: Tensor, base: Tensor, live: Tensor | None, master: Tensor, selected: int) -> None:
        """Take over entries, first values, trained positions and masters, e.g. from a checkpoint; copies them.

        The weight itself is for the caller to `write`: where it holds the values there is no other place for them.
        """
        device, numel = self.weight.device, self._index.numel
        index = index.to(device)
        self._index = PackedIndex(index, numel)
        self._trained = None if live is None else PackedIndex(index.index_select(0, live.to(device)), numel)
        self._base = self._kept(base.to(device, self.weight.dtype, copy=True))
        self.selected = selected
        self.proxy.grad, self._place, self._count = None, None, None
        self.proxy.data = master.to(device, self.precision, copy=True) if self.mastered else self._empty()


class Capture:
    """Gathers gradients into the proxies as soon as autograd has them, and drops the dense ones.

    The gradient of one weight is dense only between its computation and the hook, so one is alive at a time. Several
    backward passes add up (accumulation); so do the several calls of one backward under reentrant checkpointing.

    `spent` is raised by the optimizer after a step: the next gradient then starts anew even where the loop clears only
    `model.zero_grad()`, as the Hugging Face Trainer does, which cannot reach the proxies. `consumer` is called with a
    slot as soon as its gradient is complete. `whole` has the names of weights whose gradient came as one dense tensor.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.slots = list(slots)
        self.spent = False
        self.arrived: Callable[[], None] | None = None  # called when a gradient comes
        self.consumer: Callable[[Slot], None] | None = None
        self.whole: set[str] = set()
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
        """Called by the hooks: drop gradients that a step has already used, and tell who listens."""
        self.forget()
        if self.arrived is not None:
            self.arrived()

    def forget(self) -> None:
        """Drop gradients that a step has already used."""
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
        if grad is None:
            return
        if not (grad.is_sparse and grad._nnz() == 0):  # else it was gathered in row blocks
            self.capture.begin()
            self.slot.accumulate(grad)
            self.capture.whole.add(self.slot.name)
        if self.capture.consumer is not None:
            self.capture.consumer(self.slot)


def trained_by_another(param: nn.Parameter) -> bool:
    """Whether a selective optimizer has entries of this weight in training already."""
    return any(isinstance(hook, _Gather) for hook in (param._post_accumulate_grad_hooks or {}).values())


def _refuse_a_second(name: str, param: nn.Parameter) -> None:
    if trained_by_another(param):
        raise ModelError(f"'{name}' is already trained by another selective optimizer; call its close() first")


def release(
    handles: dict[str, list[RemovableHandle]], trainable: Iterable[nn.Parameter], restore: Callable[[], None] | None
) -> None:
    """Remove the hooks, let these parameters require gradients again, and restore what else was changed."""
    if restore is not None:
        restore()
    for removable in handles.values():
        for handle in removable:
            handle.remove()
    handles.clear()
    for param in trainable:
        param.requires_grad_(True)


def gather(tensor: Tensor, index: Tensor) -> Tensor:
    """(k,) the entries of a tensor of any layout at flat row-major indices, in its dtype; of a sharded one, of the
    part on this rank.

    A sparse gradient (nn.Embedding(sparse=True): rows that were looked up) is read without making it dense; rows that
    it does not hold are zero.
    """
    tensor = local(tensor.detach())
    if isinstance(tensor, StoredWeight):
        return tensor.store.read(index, tensor.dtype)
    if tensor.is_sparse:
        return _gather_rows(tensor, index) if tensor.sparse_dim() == 1 else gather(tensor.to_dense(), index)
    flat, positions = _flat(tensor, index)
    return flat.index_select(0, positions)


@torch.no_grad()
def scatter(tensor: Tensor, index: Tensor, values: Tensor) -> None:
    """Write values (k,), rounded to the tensor's dtype, to flat row-major indices of a dense tensor of any layout."""
    if isinstance(tensor, StoredWeight):
        tensor.store.write(index, values, tensor.dtype)
        return
    flat, positions = _flat(tensor, index)
    flat.scatter_(0, positions.long(), values.to(flat.dtype))  # half the time of index_copy_


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
    if isinstance(tensor, StoredWeight):
        return tensor.store.place(index)
    tensor = local(tensor.detach())
    if tensor.is_contiguous():
        return tensor.view(-1), index
    rest, positions = index.long(), torch.zeros_like(index, dtype=torch.int64)
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        positions += rest % size * stride
        rest = rest // size
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((extent,), (1,)), positions
