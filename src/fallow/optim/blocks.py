"""The blocks of a network, and what stands before and after them.

blocks       "auto": the members of the outermost ModuleLists; a path such as "model.layers"; a class such as
             "ResnetBlock2D", whose outermost modules are meant; modules; or a list of such
embeddings   what is registered before the first block: token and position embeddings, conv_in, patch embeddings
norms        normalisations outside of blocks
head         what is registered after the first block: the output layer, conv_out, and what lies between blocks
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import nn

from fallow.core.errors import ConfigError, ModelError, nearest

Side = Literal["embeddings", "norms", "head"]
Blocks = str | nn.Module | Sequence[str | nn.Module]


def find_blocks(model: nn.Module, blocks: Blocks = "auto") -> dict[str, nn.Module]:
    """{path: block}, in the order of the model. ConfigError where a name means nothing, or there are less than two;
    ModelError for blocks that lie in each other or share a parameter.
    """
    if isinstance(blocks, str) and blocks == "auto":
        found = {id(block) for lists in _outermost_lists(model) for block in lists}
    else:
        wanted = [blocks] if isinstance(blocks, str | nn.Module) and not isinstance(blocks, nn.ModuleList) else blocks
        found = {id(block) for one in wanted for block in _meant(model, one)}
    named = {name: module for name, module in model.named_modules() if id(module) in found}
    if len(named) < 2:
        lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
        raise ConfigError(
            f"blocks={_told(blocks)} finds {len(named)} blocks in {type(model).__name__}, and two are needed; name a "
            f"list of blocks or their class (there are {', '.join(lists) or 'no lists of modules'})"
        )
    _refuse_overlap(named)
    return named


def _told(blocks: Blocks) -> str:
    return repr(blocks) if isinstance(blocks, str) else f"({type(blocks).__name__})"


def _outermost_lists(model: nn.Module) -> Iterator[nn.ModuleList]:
    for child in model.children():
        if isinstance(child, nn.ModuleList) and len(child) > 1:
            yield child
        else:
            yield from _outermost_lists(child)


def _meant(model: nn.Module, one: Any) -> list[nn.Module]:
    if isinstance(one, nn.ModuleList | nn.Sequential):
        return list(one)
    if isinstance(one, nn.Module):
        return [one]
    paths = dict(model.named_modules())
    if one in paths:
        module = paths[one]
        return list(module) if isinstance(module, nn.ModuleList | nn.Sequential) else [module]
    if found := list(_of_class(model, one)):
        return found
    classes = {type(module).__name__ for module in paths.values()}
    raise ConfigError(
        f"blocks={one!r} is neither a module of {type(model).__name__} nor a class"
        f"{nearest(str(one), [*paths, *classes])}"
    )


def _of_class(model: nn.Module, name: str) -> Iterator[nn.Module]:
    for child in model.children():
        if type(child).__name__ == name:
            yield child
        else:
            yield from _of_class(child, name)


def _refuse_overlap(blocks: dict[str, nn.Module]) -> None:
    owners: dict[int, str] = {}
    for name, block in blocks.items():
        for param in block.parameters():
            other = owners.setdefault(id(param), name)
            if other != name:
                raise ModelError(
                    f"the blocks '{other}' and '{name}' share a parameter, so none can be frozen by itself"
                )


def outside(model: nn.Module, blocks: dict[str, nn.Module]) -> dict[nn.Parameter, set[Side]]:
    """Each parameter that lies in no block, with what it is; a tied one is several things."""
    inside = {id(param) for block in blocks.values() for param in block.parameters()}
    starts, passed = {id(block) for block in blocks.values()}, False
    found: dict[nn.Parameter, set[Side]] = {}
    for module in _with_repeats(model):
        passed = passed or id(module) in starts
        side: Side = "norms" if "norm" in type(module).__name__.lower() else "head" if passed else "embeddings"
        for param in module._parameters.values():
            if param is not None and id(param) not in inside:
                found.setdefault(param, set()).add(side)
    return found


def _with_repeats(model: nn.Module) -> Iterator[nn.Module]:
    return (module for _, module in model.named_modules(remove_duplicate=False))


@torch.no_grad()
def weight_norms(model: nn.Module, blocks: Blocks = "auto") -> list[float]:
    """The mean norm of the matrices of each block. The paper's p(l) is that of a LoRA-tuned network, merged, divided by
    that of a fully tuned one.
    """
    return [
        _mean([p.norm() for p in block.parameters() if p.dim() > 1]) for block in find_blocks(model, blocks).values()
    ]


@torch.no_grad()
def gradient_norms(model: nn.Module, blocks: Blocks = "auto") -> list[float]:
    """The norm of each block's gradient, as some backward passes left it. ConfigError where a block has none."""
    found = []
    for name, block in find_blocks(model, blocks).items():
        grads = [param.grad.norm() for param in block.parameters() if param.grad is not None]
        if not grads:
            raise ConfigError(f"'{name}' has no gradient; take a backward pass with every block in training first")
        found.append(float(torch.stack(grads).norm()))
    return found


def _mean(values: list[torch.Tensor]) -> float:
    return float(torch.stack(values).mean()) if values else 0.0
