"""Whether every adapted weight takes part in the training."""

from __future__ import annotations

import weakref

from torch import nn

from fallow.core.errors import TrainingError
from fallow.core.host.holder import needed, root_of
from fallow.core.host.layer import sites

SHOWN = 5  # names that an error tells of


def check_gradients(model: nn.Module) -> int:
    """Call it after a backward: how many adapted weights received a gradient, which all that are trained must have.

    TrainingError names those without: their modules did not run, or whoever calls them reads `.weight` past them.
    """
    needed(model)
    got, lacking = _look(model)
    if lacking or not got:
        raise TrainingError(_told(lacking, got))
    return got


def _look(model: nn.Module) -> tuple[int, list[str]]:
    """How many trained sites have a gradient, and the keys of those without."""
    got, lacking = 0, []
    for _, site in sites(model):
        for delta, _ in site.acting:
            own = [param for param in delta.parameters() if param.requires_grad]
            params = own or [param for param in delta.all_parameters() if param.requires_grad]
            if any(param.grad is not None for param in params):
                got += 1
            elif params:
                lacking.append(site.key)
    return got, lacking


def _told(lacking: list[str], got: int) -> str:
    more = f" and {len(lacking) - SHOWN} more" if len(lacking) > SHOWN else ""
    if not lacking:
        return "no adapted weight is trained; activate(model, name) first, and leave its parameters trainable"
    return (
        f"{len(lacking)} of {got + len(lacking)} adapted weights received no gradient: "
        f"{', '.join(map(repr, lacking[:SHOWN]))}{more}. Their modules did not run in this pass, or their weights are "
        "read past them: exclude= them, or attach(..., expect_gradients=False) where some are not meant to run always"
    )


class FirstStep:
    """Looks for the gradients once, at the first step that still has some; a Schedule to `fallow.step`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = weakref.ref(model)
        self.steps = 0
        self.done = False

    def resolve(self, total: int) -> None:
        """The length of the run plays no part."""

    def advance(self) -> bool:
        self.steps += 1
        model = self.model()
        if self.done or model is None or root_of(model) is None:
            return False
        got, lacking = _look(model)
        if got and lacking:
            raise TrainingError(_told(lacking, got))
        self.done = bool(got)  # without any they are cleared already; the next step may come before that
        return False
