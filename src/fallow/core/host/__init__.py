"""Adapters in a model without PEFT: the layers keep their places, names, weights and types.

    model = fallow.attach(model, "lora", rank=8)              # in place; only the adapter is trained from now on
    fallow.save(model, "style"); fallow.load(model, "style")
    with fallow.disabled(model): ...                          # the base model, bit for bit

The class of an adapted layer is exchanged for a subclass of the same name; its Deltas become a child `adapters`, what
they share one at the root of the model. So base checkpoints, sharding plans and name-based optimizers go on working,
and `detach` leaves the model as it was. Methods cannot tell this host from PEFT's: both run `fallow.core.engine`.
"""

from fallow.core.accompany import condition, penalty
from fallow.core.gradients import check_gradients
from fallow.core.host.adapters import activate, attach, detach, disabled, mixed, set_scale
from fallow.core.host.files import load, save
from fallow.core.host.merging import merge, unmerge

__all__ = [
    "activate",
    "attach",
    "check_gradients",
    "condition",
    "detach",
    "disabled",
    "load",
    "merge",
    "mixed",
    "penalty",
    "save",
    "set_scale",
    "unmerge",
]
