"""Blocks of a network that wait in host memory and come to the device one ahead of the computation.

    swap = BlockSwap(network, blocks_on_device=4)        # before the optimizer or the adapter is made

    device   | the first N - 1 blocks, always | block i, computing | block i + 1, on its way |      at most N + 1
    host     | the weights of all other blocks, pinned

Each block is recomputed in the backward pass (gradient checkpointing), where the blocks come in reverse order. Uploads
run on a stream of their own; a block waits for its own upload only. Nothing is ever downloaded: the weights of linear
layers and convolutions in the blocks become stored weights (`core.stored_weight`; quantised ones stay what they are),
so trained entries, LoRA factors, norms and biases are on the device throughout and the codes never change.

The order of the blocks is learned in the first pass; until then the listed order is expected. Where there is no
accelerator the same code copies from one place of main memory to another.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fallow.core.errors import ConfigError, ModelError
from fallow.core.quantized import SMALL, exchange, layers_of, stored
from fallow.core.stored_weight import Store, as_parameter, of_parameter
from fallow.core.weight_codes import Parts

REMEMBERED = 4096  # entries of the log


class BlockSwap:
    """Keeps at most `blocks_on_device` + 1 of a network's blocks on its device.

    `blocks`: in the order of their use; by default `blocks_of(network)`. `device`: where to compute, by default where
    the weights are; a network that does not fit there is given on the CPU, and what is in no block is moved.

    `log`: ("upload" | "forward" | "backward" | "drop" | "late", block) in order, the last 4,096; "late" where a block
    was needed that nobody had sent for, as in the first pass. Raises ConfigError or ModelError, before anything is
    changed: for a number of blocks that leaves nothing to swap, for blocks that share weights or hold none, and for
    networks that have adapters or a selective optimizer already, or were compiled.
    """

    def __init__(
        self,
        network: nn.Module,
        blocks_on_device: int,
        blocks: Sequence[nn.Module] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.blocks = list(blocks_of(network) if blocks is None else blocks)
        self._check(network, blocks_on_device)
        self.device = torch.device(device) if device is not None else next(network.parameters()).device
        self.window = 2  # the block that computes, and the next
        self.log: deque[tuple[str, int]] = deque(maxlen=REMEMBERED)
        self.order = list(range(len(self.blocks)))
        self._learned: list[int] | None = []
        self._turn: int | None = None  # the last block of a backward pass; not the first where that trains nothing
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._entered: tuple[bool, int] | None = None  # the block before this: whether in a backward pass, and which
        self._pending: dict[int, tuple[list[Parts], Any]] = {}
        self._on_device: list[int] = []  # swapped blocks only
        for block in self.blocks:
            for _, layer in layers_of(block):
                if layer.weight.numel() >= SMALL:
                    exchange(network, cast(nn.Parameter, layer.weight), "plain")
        if device is not None:
            self._move(network)
        self.stores = [[weight.store for _, weight in stored(block)] for block in self.blocks]
        self.always = blocks_on_device - 1
        self._forwards = [block.forward for block in self.blocks]
        for number, block in enumerate(self.blocks):
            if number >= self.always:
                for store in self.stores[number]:
                    _to_host(store, self.device)
            else:
                for store in self.stores[number]:
                    store.parts = {name: part.to(self.device) for name, part in store.fetch().items()}
            block.forward = self._wrapped(number, block.forward)

    @property
    def nbytes(self) -> list[int]:
        """Bytes of each block's codes, which is what moves."""
        return [sum(part.nbytes for store in held for part in _code(store).values()) for held in self.stores]

    @property
    def resident(self) -> list[int]:
        """The blocks on the device or on their way there."""
        return sorted({*range(self.always), *self._on_device, *self._pending})

    def close(self) -> None:
        """Bring all blocks to the device for good; the layers compute from stored weights as before."""
        for number in range(self.always, len(self.blocks)):
            self._bring(number)
            for store in self.stores[number]:
                store.host = None
        for block, forward in zip(self.blocks, self._forwards, strict=True):
            block.forward = forward

    # -- walking ------------------------------------------------------------------------------------------------------

    def _wrapped(self, number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def compute(*args: Any, **kwargs: Any) -> Any:
            self._enter(number)
            return forward(*args, **kwargs)

        @functools.wraps(forward)
        def recomputed(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return compute(*args, **kwargs)
            return checkpoint(compute, *args, use_reentrant=False, **kwargs)

        return recomputed

    def _enter(self, number: int) -> None:
        """Have this block on the device, send for the next, let the others go."""
        back = torch._C._current_graph_task_id() != -1  # a block that computes within a backward pass is recomputed
        if not back and self._entered is not None and self._entered[0]:
            self._turn = self._entered[1]
        self._entered = back, number
        self.log.append(("backward" if back else "forward", number))
        if not back:
            self._learn(number)
        if number < self.always:
            return
        if number not in self._on_device and number not in self._pending:
            self._drop_all_but({number})
            self.log.append(("late", number))
        self._bring(number)
        following = self._following(number, back)
        self._drop_all_but({number, following})
        if following not in self._on_device and following not in self._pending:
            self._send_for(following)

    def _following(self, number: int, back: bool) -> int:
        """The swapped block that is wanted after this one."""
        order = [one for one in self.order if one >= self.always]
        at = order.index(number)
        if back and at > 0:
            return order[0] if number == self._turn else order[at - 1]
        if back:
            return order[min(1, len(order) - 1)]  # the next pass begins with these two
        if at + 1 < len(order):
            return order[at + 1]
        return order[at - 1] if torch.is_grad_enabled() else order[0]  # a backward pass follows, or another forward

    def _learn(self, number: int) -> None:
        if self._learned is None:
            return
        if number in self._learned:
            return
        self._learned.append(number)
        if len(self._learned) == len(self.blocks):
            self.order, self._learned = self._learned, None

    # -- moving -------------------------------------------------------------------------------------------------------

    def _send_for(self, number: int) -> None:
        """Begin the upload of a block."""
        self.log.append(("upload", number))
        if self.stream is None:
            self._pending[number] = [_uploaded(store, self.device) for store in self.stores[number]], None
            return
        with torch.cuda.stream(self.stream):
            parts = [_uploaded(store, self.device) for store in self.stores[number]]
            self._pending[number] = parts, self.stream.record_event()

    def _bring(self, number: int) -> None:
        """Let the block have its codes on the device, waiting for an upload that is under way."""
        if number in self._on_device:
            return
        if number not in self._pending:
            self._send_for(number)
        uploaded, event = self._pending.pop(number)
        if event is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(event)
            for parts in uploaded:
                for part in parts.values():
                    part.record_stream(current)  # its memory is of the other stream's; not to be reused before this one
        for store, parts in zip(self.stores[number], uploaded, strict=True):
            store.parts = parts
        self._on_device.append(number)

    def _drop_all_but(self, wanted: set[int]) -> None:
        for number in [*self._on_device, *self._pending]:
            if number not in wanted:
                self.log.append(("drop", number))
                self._pending.pop(number, None)
                if number in self._on_device:
                    self._on_device.remove(number)
                    for store in self.stores[number]:
                        store.parts = None

    # -- before -------------------------------------------------------------------------------------------------------

    def _check(self, network: nn.Module, blocks_on_device: int) -> None:
        count, kind = len(self.blocks), type(network).__name__
        if count < 2:
            raise ModelError(f"{kind} has {count} blocks that could be swapped; give blocks=, or do without")
        if isinstance(blocks_on_device, bool) or not 1 <= blocks_on_device < count:
            raise ConfigError(
                f"blocks_on_device={blocks_on_device} is impossible with the {count} blocks of {kind}; give 1 to "
                f"{count - 1}"
            )
        holders: dict[int, int] = {}
        for number, block in enumerate(self.blocks):
            weights = {id(layer.weight) for _, layer in layers_of(block)} | {id(w) for _, w in stored(block)}
            if not weights:
                raise ModelError(f"block {number} of {kind} ({type(block).__name__}) has no weights to swap")
            for weight in weights:
                if holders.setdefault(weight, number) != number:
                    raise ModelError(f"blocks {holders[weight]} and {number} of {kind} share a weight; untie it")
        for name, module in network.named_modules():
            if hasattr(module, "base_layer"):
                raise ModelError(f"'{name}' has an adapter; swap first, then put the adapter on")
            if module._compiled_call_impl is not None or hasattr(module, "_orig_mod"):
                raise ModelError(f"'{name or kind}' is compiled and would hold its weights; leave torch.compile out")
        for name, param in network.named_parameters():
            if param._post_accumulate_grad_hooks:
                raise ModelError(f"'{name}' is trained by an optimizer already; swap first, then make the optimizer")

    def _move(self, network: nn.Module) -> None:
        """Put on the device what is in no stored weight; those compute there from codes that stay where they are."""
        for module in network.modules():
            for name, param in module._parameters.items():
                held = of_parameter(param)
                if param is not None and held is not None and held.device != self.device:
                    held.device = self.device
                    module._parameters[name] = as_parameter(held, param.dtype, param.requires_grad)
        for weight in (weight for _, weight in stored(network)):
            if not any(weight is one for block in self.blocks for _, one in stored(block)):
                weight.store.parts = {name: part.to(self.device) for name, part in weight.store.fetch().items()}
        network.to(self.device)


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The blocks of a diffusers or transformers network: the layers of each stage of a UNet, else the members of its
    lists of blocks. Empty where there are none.
    """
    if all(hasattr(network, name) for name in ("down_blocks", "up_blocks")):
        stages = [*cast(Any, network).down_blocks, getattr(network, "mid_block", None), *cast(Any, network).up_blocks]
        found = [layer for stage in stages if stage is not None for layer in _members(stage)]
    else:
        found = _members(network)
        while not found:
            inner = max(network.children(), key=_size, default=None)
            if inner is None:
                return []
            network, found = inner, _members(inner)
    return [block for block in found if any(layer.weight.numel() >= SMALL for _, layer in layers_of(block)) or any(
        True for _ in stored(block)
    )]  # fmt: skip


def _members(module: nn.Module) -> list[nn.Module]:
    return [member for child in module.children() if isinstance(child, nn.ModuleList) for member in child]


def _size(module: nn.Module) -> int:
    return sum(param.numel() for param in module.parameters())


def _code(store: Store) -> Parts:
    return store.host if store.host is not None else store.fetch()


def _to_host(store: Store, device: torch.device) -> None:
    """Keep the code in host memory, pinned where an accelerator will read it."""
    pinned = device.type == "cuda"
    store.host = {name: _host_copy(part, pinned) for name, part in store.fetch().items()}
    store.parts = None


def _host_copy(part: Tensor, pinned: bool) -> Tensor:
    if not pinned and part.device.type == "cpu":
        return part
    return torch.empty(part.shape, dtype=part.dtype, pin_memory=pinned).copy_(part)


def _uploaded(store: Store, device: torch.device) -> Parts:
    assert store.host is not None, "a swapped code is in host memory"
    if device.type == "cpu":
        return {name: part.clone() for name, part in store.host.items()}
    return {name: part.to(device, non_blocking=True) for name, part in store.host.items()}
