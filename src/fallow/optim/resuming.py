"""What a low-rank optimizer's `state_dict` holds, and how another takes it up: plain values, in their own dtypes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fallow.core.errors import ConfigError
from fallow.optim.moments import fitting
from fallow.optim.options import PARTS
from fallow.optim.parts import described
from fallow.optim.sharing import restore, saved_state
from fallow.optim.site import Site


def saved(found: dict[str, Any], sites: Sequence[Site]) -> dict[str, Any]:
    """torch's `state_dict` with parts by their names and options, and what follows slices of weights as DTensors."""
    for group in found["param_groups"]:
        group.update({key: described(group[key]) for key in PARTS if group[key] is not None})
    for number, site in enumerate(sites):
        if site.part is not None and number in found["state"]:
            found["state"][number] = saved_state(site)
    return found


def check(state_dict: Mapping[str, Any]) -> None:
    """ConfigError where this is the state of another kind of optimizer."""
    if not all("basis" in group for group in state_dict["param_groups"]):
        raise ConfigError("this state is not a low-rank optimizer's; its groups have no basis")


def states(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[Tensor, dict[str, Any]]:
    """The saved states by the parameters of these groups: copies on their devices, in the dtypes they were saved in."""
    saved_numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    own = [param for group in groups for param in group["params"]]
    return {
        param: {key: _copied(value, param) for key, value in state_dict["state"][number].items()}
        for number, param in zip(saved_numbers, own, strict=True)
        if number in state_dict["state"]
    }


def fit(sites: Sequence[Site]) -> None:
    """Take up the states as loaded. ConfigError where they are not of these tensors, or of other options."""
    for site in sites:
        if site.state:
            fitting(site)
            if site.part is not None:
                restore(site, dict(site.state))


def _copied(value: Any, param: Tensor) -> Any:
    return value.to(param.device, copy=True) if isinstance(value, Tensor) else value
