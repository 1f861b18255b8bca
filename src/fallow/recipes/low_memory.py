"""Training on small GPUs: what the frozen weights are kept in, which blocks wait in host memory, the fused step.

    base_precision   float32 | bf16 | fp8 | nf4 | int8     how linear layers and convolutions are kept
    block_swap       n blocks wait in host memory and are uploaded one ahead of the computation
    fused_step       each weight is updated as soon as its gradient is there, so that gradients never add up
    low_memory       all that costs no quality worth mentioning: fp8, bf16 compute, checkpointing, the fused step

Trained entries and adapters stay in full precision whatever the base is kept in (`core.quantized`, `core.side_branch`,
`core.block_swap`, `core.in_backward`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from fallow.analysis.memory import Estimate
from fallow.core.block_swap import BlockSwap, blocks_of
from fallow.core.errors import ConfigError, FallowError
from fallow.core.quantized import layers_of, quantize_

if TYPE_CHECKING:
    from fallow.recipes.train_config import TrainConfig

BasePrecision = Literal["float32", "bf16", "fp8", "nf4", "int8"]
QUANTISED = ("fp8", "nf4", "int8")
WHOLE = ("full", "lt-sft")  # methods that write all of a weight, at least for some time
ADAPTERS = ("lora", "peft")
PRESET = {"base_precision": "fp8", "precision": "bf16", "gradient_checkpointing": True, "fused_step": True}


def settle(config: TrainConfig) -> None:
    """Fill in what `low_memory` and the settings here imply, where nothing is given; then refuse what cannot be.

    Raises ConfigError.
    """
    given = set(config.model_fields_set)

    def imply(name: str, value: Any) -> None:
        if name not in given:
            setattr(config, name, value)

    if config.low_memory:
        alone = config.method not in WHOLE
        for name, value in PRESET.items():
            if name == "fused_step":
                value = alone and config.method not in ADAPTERS and not _adds_gradients(config)
            if name != "base_precision" or alone:
                imply(name, value)
    if config.base_precision == "bf16":
        imply("precision", "bf16")
    if config.fused_step:
        imply("max_grad_norm", 0.0)
    check(config)


def check(config: TrainConfig) -> None:
    """ConfigError for settings that exclude each other."""
    if config.method in WHOLE:
        if config.base_precision != "float32":
            raise ConfigError(
                f"base_precision={config.base_precision} keeps frozen weights, and the method {config.method} writes "
                "them all; leave it out, or train with sara, shira or lora"
            )
        if config.block_swap:
            raise ConfigError(
                f"block_swap={config.block_swap} uploads weights and never brings them back, and the method "
                f"{config.method} writes them all; leave it out, or train with sara, shira or lora"
            )
    if config.base_precision == "bf16" and config.precision != "bf16":
        raise ConfigError(
            f"base_precision=bf16 needs precision=bf16, and it is {config.precision}; give that, or leave it out"
        )
    if config.train_text_encoder and (config.base_precision in QUANTISED or config.block_swap):
        named = f"block_swap={config.block_swap}" if config.block_swap else f"base_precision={config.base_precision}"
        raise ConfigError(f"{named} is for the denoising network; train_text_encoder would have to go without")
    if is_fused(config):
        _check_fused(config, "fused_step" if config.fused_step else "the option in_backward")


def is_fused(config: TrainConfig) -> bool:
    """Whether weights are updated within the backward pass."""
    return config.fused_step or config.options.get("in_backward") is True


def _check_fused(config: TrainConfig, name: str) -> None:
    if config.method in (*ADAPTERS, "full"):
        raise ConfigError(
            f"{name} is for methods that train entries of the weights, and {config.method} is none; leave it out"
        )
    if config.options.get("in_backward") is False:
        raise ConfigError("fused_step and the option in_backward=false contradict each other; leave one out")
    if config.accumulation > 1:
        raise ConfigError(
            f"{name} updates a weight at its first gradient, and accumulation={config.accumulation} waits for more; "
            "take a larger batch_size with gradient_checkpointing, or leave one of them out"
        )
    if config.class_prompt is not None:
        raise ConfigError(f"{name} makes one backward pass a step, and class_prompt a second; leave one of them out")
    if config.max_grad_norm:
        raise ConfigError(
            f"{name} never has all gradients together, which max_grad_norm={config.max_grad_norm} clips; give 0"
        )
    if config.precision == "fp16":
        raise ConfigError(f"{name} cannot take back an update that overflowed, as precision=fp16 must; give bf16")


def _adds_gradients(config: TrainConfig) -> bool:
    """Whether several gradients have to come together before an update."""
    given = config.model_fields_set
    clipped = "max_grad_norm" in given and config.max_grad_norm > 0
    return config.accumulation > 1 or config.class_prompt is not None or clipped or config.precision == "fp16"


def loading_device(config: TrainConfig) -> str | None:
    """Where to load the pipeline: in main memory, where the network is to be made smaller before it comes to a GPU."""
    return "cpu" if config.base_precision in QUANTISED or config.block_swap else config.device


def method_options(config: TrainConfig) -> dict[str, Any]:
    """The method's options with what the fused step adds."""
    return {**config.options, "in_backward": True} if config.fused_step else config.options


def prepare(pipeline: Any, network: nn.Module, config: TrainConfig, device: torch.device) -> BlockSwap | None:
    """Keep the network as the settings say, and bring the pipeline to its device; before anything is trained.

    Raises ConfigError where there are not as many blocks, ModelError where nothing can be quantised or swapped.
    """
    swap = keep(network, config.base_precision, config.block_swap, device)
    if loading_device(config) != config.device:
        pipeline.to(device)
    return swap


def keep(
    network: nn.Module, base_precision: str, block_swap: int = 0, device: torch.device | None = None
) -> BlockSwap | None:
    """Keep the frozen weights in a precision, and so many blocks in host memory."""
    if base_precision == "bf16":
        for _, layer in layers_of(network):
            layer.weight.data = layer.weight.data.to(torch.bfloat16)
    elif base_precision != "float32":
        quantize_(network, base_precision)
    if not block_swap:
        return None
    blocks = blocks_of(network)
    if block_swap >= len(blocks):
        raise ConfigError(
            f"block_swap={block_swap} of {len(blocks)} blocks of this network leaves none on the device; give at most "
            f"{len(blocks) - 1}"
        )
    return BlockSwap(network, len(blocks) - block_swap, blocks, device)


def is_low(config: TrainConfig) -> bool:
    """Whether a run saves memory by any of the settings here."""
    return config.low_memory or config.base_precision != "float32" or config.block_swap > 0 or config.fused_step


def told(config: TrainConfig) -> str:
    """A line with the memory that the run will take; empty where nothing was asked for or nobody can tell."""
    if not is_low(config):
        return ""
    try:
        estimate = estimated(config)
    except FallowError:  # of another family than the estimate knows; training says itself what it cannot do
        return ""
    parts = (estimate.total, estimate.weights, estimate.others, estimate.state, estimate.passing)
    total, weights, others, state, passing = (
        f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB" for size in parts
    )
    return (
        f"memory: about {total} ({weights} of the network as {_kept(config)}, {others} of other parts, {state} of the "
        f"method, {passing} in a step), and what the device's own software takes"
    )


def estimated(config: TrainConfig) -> Estimate:
    """The memory of a run, before it starts, without allocating anything; see `fallow doctor`."""
    from fallow.recipes.doctor import Plan, memory_of  # it checks plans by `keep`, from here

    options: Mapping[str, Any] = config.options
    amounts = {name: options.get(name) for name in ("fraction", "threshold", "budget")}
    plan = Plan(
        model=config.model, method=config.method, **amounts, rank=int(options.get("rank", options.get("r", 8))),
        batch_size=config.batch_size, resolution=config.resolution, precision=config.precision,
        gradient_checkpointing=config.gradient_checkpointing, ema=config.ema, base_precision=config.base_precision,
        block_swap=config.block_swap, fused_step=config.fused_step,
    )  # fmt: skip
    return memory_of(plan)


def _kept(config: TrainConfig) -> str:
    waiting = f", {config.block_swap} blocks in host memory" if config.block_swap else ""
    return config.base_precision + waiting
