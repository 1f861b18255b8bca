"""Several processes that train one model together: equal weights, equal choices, one mean of the compact gradients.

    start       rank 0's weights go to every rank; the chosen entries are compared by a hash
    backward    each rank gathers the chosen entries of its own gradients; at the end of the pass the ranks take their
                mean, in buckets of at most 25 MiB: k numbers travel where DistributedDataParallel sends all N
    step        the same on every rank

The mean is taken when a backward pass ends, so that whatever comes next (clipping, a loss scaler) sees the gradient of
the whole batch, as under DistributedDataParallel. Taking it again, after another pass of an accumulation, is right too:
what is equal on all ranks stays as it is, what is new is averaged. Within `no_sync()` of DistributedDataParallel, which
Accelerate uses between the steps of an accumulation, nothing is sent; the next pass outside it, or the step, makes up
for it.
"""

from __future__ import annotations

import hashlib
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fallow.core.compact import Capture, Slot
from fallow.core.errors import ModelError
from fallow.core.sharded import is_dtensor

BUCKET = 25 << 20  # bytes that travel together, as in DistributedDataParallel


def ranks() -> int:
    """How many processes train together; 1 where torch.distributed is not in use."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if ranks() > 1 else 0


@torch.no_grad()
def average_gradients(params: Sequence[Tensor], bucket: int = BUCKET) -> None:
    """Put the mean over all ranks into each `.grad`; a rank without one counts as zero, and gets the mean too.

    Where no rank has a gradient it stays None. Every rank must call this with the same parameters.
    """
    count = ranks()
    if count == 1:
        return
    for some in _buckets(params, bucket):
        present = [param.grad is not None for param in some]
        first = some[0]
        # Who has a gradient travels with the gradients; only a rank that lacks one has to wait and look.
        flags = torch.ones(len(some), dtype=first.dtype, device=first.device)
        if not all(present):
            flags = torch.tensor(present, dtype=first.dtype, device=first.device)
        parts = [first.new_zeros(()).expand(p.numel()) if p.grad is None else p.grad.reshape(-1) for p in some]
        flat = torch.cat([*parts, flags]).div_(count)
        dist.all_reduce(flat)
        sizes = [param.numel() for param in some]
        wanted = present if all(present) else (flat[sum(sizes) :] > 0).tolist()
        for param, part, had, has in zip(some, flat.split([*sizes, len(some)]), present, wanted, strict=False):
            if had:
                assert param.grad is not None
                param.grad.copy_(part.view(param.shape))
            elif has:
                param.grad = torch.empty_like(param).copy_(part.view(param.shape))


@torch.no_grad()
def mean(tensor: Tensor) -> Tensor:
    """The mean over all ranks, in place."""
    if ranks() > 1:
        dist.all_reduce(tensor.div_(ranks()))
    return tensor


def _buckets(tensors: Iterable[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Tensors of one dtype and device together, as many as fit into `size` bytes, at least one; empty ones are left
    out.
    """
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for group in groups.values():
        held: list[Tensor] = []
        taken = 0
        for tensor in group:
            if held and taken + tensor.nbytes > size:
                yield held
                held, taken = [], 0
            held.append(tensor)
            taken += tensor.nbytes
        yield held


@torch.no_grad()
def broadcast(tensors: Iterable[Tensor], bucket: int = BUCKET) -> None:
    """Give every rank the values of rank 0, in place."""
    if ranks() == 1:
        return
    for some in _buckets(tensors, bucket):
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in some])
        dist.broadcast(flat, 0)
        if rank():
            for tensor, part in zip(some, flat.split([tensor.numel() for tensor in some]), strict=True):
                tensor.detach().copy_(part.view(tensor.shape))


def digest(*tensors: Tensor) -> str:
    """16 hexadecimal digits of SHA-256 over the bytes of tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def check_alike(digests: Mapping[str, str]) -> None:
    """ModelError on every rank where one has chosen other entries than rank 0, or of other weights."""
    if ranks() == 1:
        return
    every: list[dict[str, str] | None] = [None] * ranks()
    dist.all_gather_object(every, dict(digests))
    first = every[0]
    assert first is not None
    for number, other in enumerate(every):
        assert other is not None
        if other != first:
            names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
            raise ModelError(
                f"rank {number} trains other entries than rank 0: '{names[0]}' differs (and {len(names) - 1} more); "
                "make the optimizer with the same arguments on every rank, from the same weights, and give selectors "
                "that look at data the same batches"
            )


class Averaging:
    """Takes the mean of compact gradients over the ranks, once after each backward pass.

    `arrived()` is called when a gradient comes, `synchronize()` by whoever needs the mean now; it does nothing where it
    was taken since the last gradient. Weights that are sharded are left to who sharded them.
    """

    def __init__(self, model: nn.Module, capture: Capture) -> None:
        self.capture, self.done, self.held, self.checked = capture, False, False, False
        self._model, self._looked = weakref.ref(model), False
        self._task = -1
        self._wrapper: Callable[[], Any] = lambda: None

    def check(self) -> None:
        """ModelError on every rank where one trains other entries than rank 0, or others of another weight."""
        if ranks() > 1:
            check_alike({slot.name: digest(slot.trained, slot.base) for slot in self._slots()})
            self.checked = True

    def arrived(self) -> None:
        """A gradient came on this rank: take the mean when this backward pass ends, unless within `no_sync()`."""
        if ranks() == 1:
            return
        self.done = False
        if not self._looked:
            self._look_for_wrapper()
        wrapper = self._wrapper()
        if self.held or (wrapper is not None and not wrapper.require_backward_grad_sync):
            return
        task = torch._C._current_graph_task_id()
        if task not in (-1, self._task):
            self._task = task
            torch.autograd.Variable._execution_engine.queue_callback(self.synchronize)

    def synchronize(self) -> None:
        if ranks() == 1 or self.done:
            return
        if not self.checked:  # the ranks met after the optimizer was made
            self.check()
        self.capture.forget()
        average_gradients([slot.proxy for slot in self._slots()])
        self.done = True

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        held, self.held = self.held, True
        try:
            yield
        finally:
            self.held = held

    def _slots(self) -> list[Slot]:
        return [slot for slot in self.capture.slots if slot.part is None]

    def _look_for_wrapper(self) -> None:
        """In the next forward pass, find the DistributedDataParallel around the model, whose no_sync() then counts."""
        self._looked = True
        if (model := self._model()) is None:
            return
        place = weakref.ref(self)

        def look(module: nn.Module, args: Any) -> None:
            hook.remove()
            wrapper = nn.parallel.DistributedDataParallel._get_active_ddp_module()
            if wrapper is not None and (held := place()) is not None:
                held._found(wrapper)

        hook = model.register_forward_pre_hook(look)

    def _found(self, wrapper: Any) -> None:
        self._wrapper = weakref.ref(wrapper)
        mine = {id(param) for slot in self.capture.slots for param in slot.params}
        kept = [param for param in wrapper._module_parameters if id(param) in mine]
        if len(kept) > 1:
            warnings.warn(
                f"DistributedDataParallel keeps dense gradients of {len(kept)} trained weights: it was made before the "
                "optimizer, or around a larger module; call optimizer.ignore_in_ddp(module) before wrapping that",
                stacklevel=2,
            )


def start_alike(weights: Iterable[Tensor]) -> None:
    """Give every rank the weights of rank 0, in place, so that all choose alike; sharded ones are one already."""
    broadcast(weight for weight in weights if not is_dtensor(weight))


def refuse_wrapped(model: nn.Module) -> None:
    """ModelError where the model is within a wrapper that holds its gradients, or its weights, in a form of its own."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ModelError(
            "the model is within DistributedDataParallel, whose buckets hold a dense gradient of every weight; make "
            "the optimizer for the module inside first, and wrap it then"
        )
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise ModelError(
            "FullyShardedDataParallel (FSDP1) melts the weights into flat ones, of which no entries can be chosen; "
            "shard the model with torch.distributed.fsdp.fully_shard (FSDP2)"
        )


IGNORED = "_ddp_params_and_buffers_to_ignore"  # where DistributedDataParallel looks for it, on the module it wraps


def ignore_in_ddp(module: nn.Module, params: Sequence[nn.Parameter]) -> Callable[[], None]:
    """Keep these parameters of a module out of the buckets of a DistributedDataParallel made around it afterwards.

    All but the smallest one: DistributedDataParallel refuses a module without any parameter to average. What it does
    with that one is harmless: it sees no gradient of it. Returns what takes the marks away again.
    """
    anchor = min(params, key=lambda param: param.numel(), default=None)
    wanted = {id(param) for param in params if param is not anchor}
    names = [name for name, param in module.named_parameters(remove_duplicate=False) if id(param) in wanted]
    # Parameters of the outermost module are compared with a dot in front; those of a compiled one by a longer name.
    spelt = [spelling for name in names for spelling in (name, f".{name}", f"_orig_mod.{name}")]
    former = getattr(module, IGNORED, None)
    setattr(module, IGNORED, [*(former or ()), *spelt])
    place = weakref.ref(module)

    def undo() -> None:
        if (held := place()) is None or not hasattr(held, IGNORED):
            return
        if former is None:
            delattr(held, IGNORED)
        else:
            setattr(held, IGNORED, former)

    return undo
