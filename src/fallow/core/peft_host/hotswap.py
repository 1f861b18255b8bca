"""Another file's adapter in the place of a loaded one: values are copied, no module or Parameter is exchanged.

So a compiled model need not be compiled again, and a server changes adapters at the price of reading the file.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from fallow.core.errors import AdapterError, ConfigError, nearest
from fallow.core.host.files import exchange
from fallow.core.host.holder import root_of
from fallow.core.peft_host.deltas import DeltaConfig
from fallow.core.peft_host.layer import FallowLayer
from fallow.core.peft_host.tuner import FallowModel

FILE = "adapter_model.safetensors"
# What tensors do not tell: a scale from another `alpha`, or bases from another seed, would act silently.
SAME = (
    "method", "target_modules", "target_parameters", "fused", "patterns", "rank_pattern", "alpha_pattern", "seed",
)  # fmt: skip


@torch.no_grad()
def hotswap(model: nn.Module, path: str | PathLike[str], adapter_name: str = "default") -> None:
    """Let `adapter_name` be the adapter saved in the folder `path`: same method, options, layers and base; of either
    host, as `fallow.save` or `save_pretrained` wrote it.

    AdapterError for a file that differs in these or that is broken, ConfigError for an adapter that is not there or is
    merged; the model is then as before.
    """
    held: dict[str, Any] = getattr(model, "peft_config", {})
    if not held and root_of(model) is not None:
        exchange(model, Path(path), adapter_name)
        return
    if not held:
        raise ConfigError(f"{type(model).__name__} has no adapter to exchange; load one first")
    if adapter_name not in held:
        raise ConfigError(f"there is no adapter '{adapter_name}' to exchange{nearest(adapter_name, held)}")
    if any(adapter_name in layer.merged_adapters for layer in model.modules() if isinstance(layer, FallowLayer)):
        raise ConfigError(f"adapter '{adapter_name}' is merged; unmerge it before it is exchanged")
    given, own = PeftConfig.from_pretrained(str(path)), held[adapter_name]
    if not isinstance(given, DeltaConfig) or not isinstance(own, DeltaConfig):
        raise AdapterError(f"{path} is no weight parameterization of Fallow's; load it with load_adapter instead")
    for name in (*SAME, *own._given()):
        if (told := getattr(given, name, None)) != getattr(own, name):
            raise AdapterError(
                f"{name}={told!r} in {path}, where adapter '{adapter_name}' has {getattr(own, name)!r}; load it as "
                "another adapter instead"
            )
    if given._changed() != (own.to_dict()["made"] or {}).get("options", {}):
        raise AdapterError(
            f"{path} has layers of other ranks than adapter '{adapter_name}'; load it as another adapter"
        )
    bases = [(config.made or {}).get("base") for config in (given, own)]
    if given.check_base and None not in bases and bases[0] != bases[1]:
        raise AdapterError(f"{path} was trained on another base than adapter '{adapter_name}'; load it onto its own")
    try:
        tensors = load_file(Path(path) / FILE)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{Path(path) / FILE} cannot be read: {error}") from error
    mapped = FallowModel._remap_adapter_state_dict_for_load(model, own, adapter_name, tensors)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in mapped:
            tensor.copy_(mapped[name])
