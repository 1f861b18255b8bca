"""Which tensors of a model a low-rank optimizer projects, where it is told more than the tensors.

Embeddings and output heads have gradients of high rank in few rows, and their papers leave them, like norms and biases,
to the plain rule. Given a module, or (name, tensor) pairs, so do we; of bare tensors nothing is known, and every matrix
is projected that `largest_side` does not leave out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from fallow.core.errors import ConfigError
from fallow.core.select import Patterns

PLAIN = r"(^|[._])(lm_head|embed_out|classifier|score|head|heads|wte|wpe|\w*embed\w*)([._]|$)"


def grouped(params: Any, include: Patterns, exclude: Patterns) -> Any:
    """The groups of a module, or of named tensors: projected ones, and plain ones with rank=None.

    `include`: only matrices whose name one of these regular expressions finds. `exclude`: none that one of these finds;
    embeddings and heads where it is not given. Groups and bare tensors come back as they are: ConfigError where
    patterns are given for them.
    """
    if isinstance(params, nn.Module):
        named, plain = [(n, p) for n, p in params.named_parameters() if p.requires_grad], _embeddings(params)
    else:
        params = list(params)
        named = params if params and all(_is_pair(one) for one in params) else []
        plain = set[int]()
        if not named:
            if include is not None or exclude is not None:
                raise ConfigError(
                    "include and exclude are patterns on names; give the model, or its named_parameters()"
                )
            return params
    refused = _compiled(PLAIN if exclude is None else exclude, "exclude")
    wanted = _compiled(".*" if include is None else include, "include")
    groups: dict[bool, list[tuple[str, Tensor]]] = {True: [], False: []}
    for name, param in named:
        inside = param.ndim > 1 and any(one.search(name) for one in wanted) and not any(o.search(name) for o in refused)
        groups[inside and (exclude is not None or id(param) not in plain)].append((name, param))
    if include is not None and not groups[True]:
        raise ConfigError(f"include={include!r} finds no matrix; there are {', '.join(n for n, _ in named[:8])}, ...")
    return [group for group in ({"params": groups[True]}, {"params": groups[False], "rank": None}) if group["params"]]


def _is_pair(one: Any) -> bool:
    return isinstance(one, tuple) and len(one) == 2 and isinstance(one[0], str)


def _compiled(patterns: Patterns, what: str) -> list[re.Pattern[str]]:
    listed: Iterable[str] = [patterns] if isinstance(patterns, str) else patterns or ()
    try:
        return [re.compile(pattern) for pattern in listed]
    except re.error as error:
        raise ConfigError(f"{what}={patterns!r} is no regular expression: {error}") from None


def _embeddings(model: nn.Module) -> set[int]:
    """Weights of embeddings, of output layers that a model tells of, and so of those tied to one."""

    def found() -> Iterator[nn.Module]:
        yield from (module for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag))
        for module in model.modules():
            output = getattr(module, "get_output_embeddings", lambda: None)()
            if isinstance(output, nn.Module):
                yield output

    return {id(param) for module in found() for param in module.parameters(recurse=False)}
