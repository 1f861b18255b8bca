"""A network's own parameters under their own names, whatever PEFT or torch.compile has put around them."""

from __future__ import annotations

from typing import Any

from torch import nn

from fallow.core.select import plain_name


def bare_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """The network's own parameters under their own names, without those of PEFT's layers in it.

    A layer that PEFT has taken keeps its weight as `<layer>.base_layer.weight`; here it is `<layer>.weight`.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    own = bare(network)
    added = {
        id(parameter)
        for module in own.modules()
        if isinstance(module, BaseTunerLayer)
        for name in module.adapter_layer_names
        if isinstance(held := getattr(module, name, None), (nn.Module, nn.ParameterDict))
        for parameter in held.parameters()
    }
    named = {name: p for name, p in own_parameters(own).items() if id(p) not in added}
    return {name.replace(".base_layer.", "."): p for name, p in named.items()}


def own_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Each parameter once, under its plain name, also where blocks of the network have been compiled."""
    return {plain_name(name): parameter for name, parameter in network.named_parameters()}


def bare(network: nn.Module) -> Any:
    """The network within a PeftModel or what torch.compile made; any other as it is."""
    inner: Any = getattr(network, "_orig_mod", network)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def adapted_names(network: nn.Module) -> set[str]:
    """Names, in the bare network, of the parameters of the layers that PEFT adapts."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = set()
    for place, module in bare(network).named_modules():
        if isinstance(module, BaseTunerLayer):
            found |= {f"{place}.{name}" for name, _ in module.get_base_layer().named_parameters()}
    return found
