"""Every ready weight parameterization keeps the contract: on all layers it takes, in networks, on both hosts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.register_assert_rewrite("contract_checks", "delta_checks")

from contract_checks import subject  # noqa: E402
from delta_checks import (  # noqa: E402
    LAYERS,
    ON_LAYERS,
    is_whole_again_from_its_file,
    keeps_nothing_of_the_weights_size_for_the_backward,
    layer_case,
    learns_the_same_under_checkpointing_and_goes_on_bit_for_bit,
    network_case,
    refuses,
    small,
)
from delta_hosts import HOSTS  # noqa: E402

import fallow.deltas  # noqa: E402
from fallow.catalogue import methods  # noqa: E402
from fallow.core.delta import REGISTRY, Delta  # noqa: E402

CLASSES = [card.load() for card in methods() if card.ready and card.home.startswith("fallow.deltas.") and card.home]
METHODS = [cls for cls in CLASSES if isinstance(cls, type) and issubclass(cls, Delta)]
NETWORKS = {  # of a transformer, a UNet and a diffusion transformer some layers of each kind
    "transformer": ["c_attn", "c_proj"],
    "unet": ["to_q", "to_out.0", "conv1", "conv_in", "time_emb_proj"],
    "dit": ["to_q", "proj_out_1", "proj", "ff.net.2"],
}


ON_TOKENS = {"wara-spatial": ["c_attn", "to_q", "ff.net.2"]}  # methods that need a grid of tokens as input


def targets(method: type[Delta], network: str) -> list[str]:
    convs = {"conv1", "conv_in", "proj"}
    wanted = [name for name in NETWORKS[network] if "conv" in method.supports or name not in convs]
    return [name for name in wanted if name in ON_TOKENS.get(method.name, wanted)]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("method", METHODS, ids=lambda cls: cls.name)
@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.name)
def test_on_a_layer(host, method, kind, tmp_path: Path):
    if LAYERS[kind][0] not in method.supports:
        refuses(layer_case(host, method, kind, tmp_path))
        return
    for check in ON_LAYERS:
        check(layer_case(host, method, kind, tmp_path / check.__name__))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", METHODS, ids=lambda cls: cls.name)
@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.name)
def test_in_a_network(host, method, network, request, tmp_path: Path):
    net = subject(network, request.getfixturevalue)
    case = network_case(host, method, net, targets(method, network), tmp_path)
    learns_the_same_under_checkpointing_and_goes_on_bit_for_bit(case, net)
    is_whole_again_from_its_file(case)


@pytest.mark.parametrize("method", METHODS, ids=lambda cls: cls.name)
def test_what_is_kept_for_the_backward(method, tmp_path: Path):
    keeps_nothing_of_the_weights_size_for_the_backward(layer_case(HOSTS[0], method, "linear", tmp_path))


def test_every_weight_parameterization_of_the_package_has_a_card():
    ours = {name for name, cls in REGISTRY.items() if cls.__module__.startswith(fallow.deltas.__name__)}
    assert ours == {cls.name for cls in METHODS}
    assert {re.sub(r"[^a-z0-9-]", "", cls.name) for cls in METHODS} == {cls.name for cls in METHODS}
    assert all(isinstance(small(cls), dict) for cls in METHODS)
