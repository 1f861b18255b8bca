"""The rule behind a selective optimizer: the torch optimizer over its proxies, and what it keeps for each entry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fallow.core.errors import ConfigError
from fallow.core.states8bit import AdamW8bit

Groups = list[dict[str, Any]]
Rule = Callable[[Groups], torch.optim.Optimizer]


def make_rule(
    proxies: Mapping[str, nn.Parameter], rule: Rule | None, options: Mapping[str, Any], state_bits: int
) -> tuple[torch.optim.Optimizer, list[str]]:
    """The optimizer over the proxies, and their names in the order of its groups; `options` are AdamW's."""
    if state_bits not in (8, 32):
        raise ConfigError(f"state_bits={state_bits!r} must be 8 or 32, the bits of each of AdamW's moments")
    if state_bits == 8 and rule is not None:
        raise ConfigError("state_bits=8 is about AdamW's moments; leave rule out, or give a rule of 8 bits alone")
    if rule is not None:
        return _foreign(proxies, rule, options)
    params = list(proxies.values())
    if state_bits == 8:
        return AdamW8bit(params, **options), list(proxies)
    fused = all(proxy.device.type in ("cpu", "cuda", "xpu", "mps") for proxy in params)
    try:  # one fused kernel over all proxies where the device has it, else torch's own choice
        return torch.optim.AdamW(params, **options, fused=fused or None), list(proxies)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"AdamW refuses its options: {error}") from error


def _foreign(
    proxies: Mapping[str, nn.Parameter], rule: Rule, options: Mapping[str, Any]
) -> tuple[torch.optim.Optimizer, list[str]]:
    if tuple(options["betas"]) != (0.9, 0.999) or options["eps"] != 1e-8:
        raise ConfigError(
            f"betas={options['betas']} and eps={options['eps']} are AdamW's and would be ignored; give them to "
            "the rule, e.g. rule=lambda groups: torch.optim.Adam(groups, betas=(0.9, 0.99))"
        )
    group = {"params": list(proxies.values()), "lr": options["lr"], "weight_decay": options["weight_decay"]}
    made = rule([{**group, "names": list(proxies)}])
    named = {id(proxy): name for name, proxy in proxies.items()}
    grouped = [named[id(param)] for own in made.param_groups for param in own["params"]]
    for own in made.param_groups:
        own.pop("names", None)
    return made, grouped


def check_moments(rule: torch.optim.Optimizer, proxies: Mapping[str, nn.Parameter]) -> None:
    """ConfigError where a foreign rule keeps moments that cannot be narrowed entry by entry."""
    if isinstance(rule, AdamW8bit):
        return
    for name, proxy in proxies.items():
        for key, value in rule.state.get(proxy, {}).items():
            blocked = isinstance(value, Tensor) and value.ndim > 0 and not per_entry(value, proxy.numel())
            if blocked or (isinstance(value, Tensor) and type(value) not in (Tensor, nn.Parameter)):
                raise ConfigError(
                    f"{type(rule).__name__} keeps '{key}' of '{name}' in another form than one number an "
                    "entry, which a re-selection cannot narrow; give reset_state=True, or state_bits=8 in place of "
                    "the rule"
                )


def narrow_moments(rule: torch.optim.Optimizer, proxy: nn.Parameter, size: int, index: Tensor) -> None:
    """Keep the moments of the entries at `index` of a proxy that had `size`."""
    if isinstance(rule, AdamW8bit):
        rule.narrow(proxy, index)
    else:
        state = rule.state.get(proxy, {})
        state.update({key: value[index] for key, value in state.items() if per_entry(value, size)})


def per_entry(value: Any, size: int) -> bool:
    """Whether it is a tensor of one number for each of `size` entries."""
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == size
