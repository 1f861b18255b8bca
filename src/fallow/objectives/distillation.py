"""Feature distillation: each block of the adapted network goes on saying what it said in the original.

"PELA: Learning Parameter-Efficient Models with Low-Rank Approximation", arXiv 2310.10700. f_l: the output of block l of
n, y: the logits, of the tuned (S) and of the original network (T) on the same inputs; means over all entries:

    term = features / n * sum_l mean (f_l^S - f_l^T)² + logits * mean (y^S - y^T)²

The teacher is the same network with its adapters off, in evaluation mode (the official ALBEF code leaves its dropout
on), or another module with the same blocks. The tuned network runs once, what its blocks put out is what autograd keeps
anyway; the teacher's features are compared block by block and let go. A difference is kept in the features' own dtype.

Means over entries and blocks: independent of width, length and depth, as far as features of all widths are of one size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fallow.core.delta import Delta, number
from fallow.core.errors import ConfigError, DataError
from fallow.core.objective import Objective
from fallow.objectives.rows import logits_of
from fallow.objectives.teacher import Teacher, as_it_was


def mean_square(tuned: Tensor, original: Tensor) -> Tensor:
    """mean (f - t)² in float32 or wider, a scalar; differentiable once, in `tuned`."""
    return cast(Tensor, _MeanSquare.apply(tuned, original))


class _MeanSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tuned: Tensor, original: Tensor) -> Tensor:
        wide = torch.float64 if tuned.dtype == torch.float64 else torch.float32
        gap = tuned - original.to(tuned.dtype)
        ctx.save_for_backward(gap)
        return torch.linalg.vector_norm(gap, dtype=wide).square() / gap.numel()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (gap,) = ctx.saved_tensors
        return (gap * (2 * upstream / gap.numel())).to(gap.dtype), None


@dataclass
class FeatureDistillation(Objective):
    """`features`, `logits`: what both terms count. `blocks`: the path of the ModuleList or Sequential whose members are
    the blocks; None for the longest ModuleList. `teacher`: None, the network with its adapters off; or another module.

    It sees the blocks from `enter(model)` on, which `fallow.add_objective` calls, and which a bare loop calls before
    its first forward; `leave()` ends it.
    """

    name: ClassVar[str] = "feature-distillation"
    features: float = 1.0
    logits: float = 0.0
    blocks: str | None = None
    teacher: Teacher | None = None

    def __post_init__(self) -> None:
        number("features", self.features)
        number("logits", self.logits)
        if self.teacher is not None and not isinstance(self.teacher, nn.Module):
            raise ConfigError(f"teacher={type(self.teacher).__name__} must be a module with the same blocks, or None")
        self.seen: dict[int, Tensor] = {}
        self.handles: list[RemovableHandle] = []

    def enter(self, model: nn.Module) -> None:
        """ConfigError where the model has no such blocks, or another number of them than the teacher."""
        self.leave()
        own = blocks_of(model, self.blocks)
        if isinstance(self.teacher, nn.Module) and len(blocks_of(self.teacher, self.blocks)) != len(own):
            raise ConfigError(f"the teacher has not {len(own)} blocks as the model; give one of the same depth")
        self.handles = [block.register_forward_hook(partial(self._keep, i)) for i, block in enumerate(own)]

    def leave(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles, self.seen = [], {}

    def _keep(self, i: int, block: nn.Module, args: Any, output: Any) -> None:
        # Not what checkpointing runs again within the backward, nor what runs without gradients.
        if torch.is_grad_enabled() and block.training and torch._C._current_graph_task_id() == -1:
            self.seen[i] = _tensor(output)

    def __call__(self, model: nn.Module, batch: Any, outputs: Any) -> Tensor:
        """After a forward in training mode. ConfigError where `enter` has not been called before it."""
        seen, self.seen = self.seen, {}
        if self.features and not seen:
            raise ConfigError(
                "feature-distillation has seen no block: call objective.enter(model) before the forward, and run it in "
                "training mode with gradients; checkpointing must be that with use_reentrant=False"
            )
        terms: list[Tensor] = []
        teacher = self.teacher if isinstance(self.teacher, nn.Module) else model
        with as_it_was(model, self.teacher) as original, _compared(teacher, self.blocks, seen, terms):
            before = original(batch)
        total = self.features / max(1, len(terms)) * torch.stack(terms).sum() if self.features else None
        if self.logits:
            distance = self.logits * mean_square(logits_of(outputs), logits_of(before))
            total = distance if total is None else total + distance.to(total)
        return torch.zeros((), device=logits_of(outputs).device) if total is None else total


@contextmanager
def _compared(teacher: nn.Module, path: str | None, seen: dict[int, Tensor], terms: list[Tensor]) -> Iterator[None]:
    """Within the block the teacher's blocks are compared with what was seen, which is let go; `terms` gets the
    values.
    """

    def compare(i: int, block: nn.Module, args: Any, output: Any) -> None:
        if i not in seen:
            return
        tuned, original = seen.pop(i), _tensor(output)
        if tuned.shape != original.shape:
            raise DataError(f"block {i}: features {tuple(tuned.shape)}, the teacher's {tuple(original.shape)}")
        with torch.enable_grad():
            terms.append(mean_square(tuned, original))

    handles = [block.register_forward_hook(partial(compare, i)) for i, block in enumerate(blocks_of(teacher, path))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensor(output: Any) -> Tensor:
    found = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(found, Tensor):
        raise ConfigError(f"a block puts out {type(found).__name__}, not a tensor; name other blocks")
    return found


def blocks_of(model: nn.Module, path: str | None = None) -> list[nn.Module]:
    """The members of the ModuleList or Sequential at this path (or whose path ends so), or of the longest ModuleList.

    ConfigError where there is none.
    """
    adapters = {id(part) for module in model.modules() if isinstance(module, Delta) for part in module.modules()}
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and id(module) not in adapters
    }
    if path is not None:
        named = [module for name, module in lists.items() if name == path or name.endswith(f".{path}")]
    else:
        named = sorted((m for m in lists.values() if isinstance(m, nn.ModuleList)), key=len, reverse=True)
    if not named or not len(named[0]):
        known = ", ".join(name or "the model itself" for name in lists) or "none"
        raise ConfigError(f"blocks={path!r} is no list of blocks of {type(model).__name__}; its lists: {known}")
    return list(named[0])
