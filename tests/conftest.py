"""One thread, fixed seeds, and the small models that tests share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
from torch import nn

from zoo import Zoo


@pytest.fixture(autouse=True)
def one_thread_and_a_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:  # it compiles one function a few times only, and all tests share the engine's
        torch._dynamo.reset()


@pytest.fixture
def peak_bytes() -> Callable[[Callable[[], object]], int]:
    """Runs an action and gives the peak of the bytes allocated and alive during it, counted by torch's allocator."""

    def measure(action: Callable[[], object]) -> int:
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            action()
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))

    return measure


@pytest.fixture
def zoo() -> Callable[..., Zoo]:
    return Zoo


@pytest.fixture
def mlp() -> Callable[..., nn.Sequential]:
    """Layers of 80 and more units, so that two of its matrices qualify for SaRA's low-rank term."""

    def make(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(80, 96), nn.GELU(), nn.Linear(96, 80), nn.LayerNorm(80), nn.Linear(80, 10)).to(
            dtype
        )

    return make


@pytest.fixture
def tiny_unet() -> Callable[[], nn.Module]:
    """diffusers' UNet2DConditionModel with cross-attention; latents (B, 4, 8, 8), text (B, 5, 16)."""
    from diffusers import UNet2DConditionModel

    def make() -> nn.Module:
        return UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=8,
            norm_num_groups=8,
        )

    return make


@pytest.fixture
def tiny_gpt2() -> Callable[[], nn.Module]:
    """transformers' GPT-2, whose embedding and output layer share their weight; ids below 64."""
    from transformers import GPT2Config, GPT2LMHeadModel

    def make() -> nn.Module:
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
        )

    return make


@pytest.fixture
def tiny_vit() -> Callable[[], nn.Module]:
    """transformers' ViT; pixels (B, 3, 16, 16), 5 classes."""
    from transformers import ViTConfig, ViTForImageClassification

    def make() -> nn.Module:
        return ViTForImageClassification(
            ViTConfig(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=64,
                image_size=16,
                patch_size=4,
                num_labels=5,
            )
        )

    return make
