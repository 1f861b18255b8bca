"""Starts on layers that are no plain Linear: blocks of a fused weight, attention, codes, tied weights, others."""

from __future__ import annotations

import copy
from typing import Any

import bitsandbytes
import pytest
import torch
from begun import statistics
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import fallow
from fallow.core.delta import Delta
from fallow.core.quantized import quantize_

RANK = 3


class Packed(nn.Module):
    """Query, key and value in one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(nn.functional.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def deltas(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, Delta) and hasattr(module, "A")]


@pytest.mark.parametrize("host", ["own", "peft"])
def test_each_block_of_a_fused_weight_starts_from_its_own_rows(host):
    base, x, g = Packed(), torch.randn(2, 5, 12), torch.randn(36, 12)
    want = base(x)
    options = {"rank": RANK, "start": fallow.LoRAGA(statistics(gradient={"qkv": g}), scale="unit"), "fused": {"qkv": 3}}
    if host == "own":
        model = fallow.attach(copy.deepcopy(base), "lora", ["qkv"], **options)
    else:
        model = get_peft_model(copy.deepcopy(base), fallow.LoRAConfig(target_modules=["qkv"], **options))
    torch.testing.assert_close(model(x), want, atol=1e-5, rtol=1e-5)
    parts = deltas(model)
    assert len(parts) == 3
    for part, rows in zip(parts, g.split(12), strict=True):
        u, _, vt = torch.linalg.svd(rows)
        torch.testing.assert_close(part.A.T @ part.A, vt[:RANK].T @ vt[:RANK], atol=1e-4, rtol=0)
        others = u[:, RANK : 2 * RANK]
        torch.testing.assert_close(part.B @ part.B.T, others @ others.T, atol=1e-4, rtol=0)


@pytest.mark.parametrize("start", ["pissa", "milora", "olora", "orthogonal"])
def test_a_weight_that_attention_reads_itself_starts_and_loads(start, tmp_path):
    base, x = Attention(), torch.randn(2, 5, 12)
    model = fallow.attach(copy.deepcopy(base), "lora", rank=RANK, alpha=6.0, start=start)
    torch.testing.assert_close(model(x), base(x), atol=1e-5, rtol=1e-5)
    for delta in deltas(model):
        delta.randomize()
    fallow.save(model, tmp_path / "a")
    assert torch.equal(fallow.load(copy.deepcopy(base), tmp_path / "a")(x), model(x))


@pytest.mark.parametrize("start", ["pissa", "milora", "olora"])
def test_a_stack_of_experts_starts_expert_by_expert(start):
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 8, 6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("eoi,bi->beo", self.weight, x)

    base, x = Experts(), torch.randn(4, 6)
    model = fallow.attach(copy.deepcopy(base), "lora", ["weight"], rank=2, start=start)
    assert len(deltas(model)) == 3
    torch.testing.assert_close(model(x), base(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("start", ["pissa", "milora", "olora", "gaussian", "orthogonal"])
def test_bases_of_other_dtypes_start_as_they_are(dtype, start):
    base, x = nn.Sequential(nn.Linear(12, 20)).to(dtype), torch.randn(4, 12, dtype=dtype)
    model = fallow.attach(copy.deepcopy(base), "lora", rank=RANK, alpha=6.0, start=start)
    assert deltas(model)[0].A.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    near = 1e-12 if dtype == torch.float64 else 8e-3
    torch.testing.assert_close(model(x), base(x), atol=near, rtol=near)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_transposed_layers_start_from_their_matrix(start):
    base, x = nn.Sequential(Conv1D(20, 12)), torch.randn(4, 12)
    model = fallow.attach(copy.deepcopy(base), "lora", rank=RANK, start=start)
    torch.testing.assert_close(model(x), base(x), atol=1e-5, rtol=1e-5)
    assert deltas(model)[0].A.shape == (RANK, 12)


@pytest.mark.parametrize("mode", ["int8", "nf4"])
def test_quantised_bases_start_from_the_weight_that_their_codes_stand_for(mode, tmp_path):
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), torch.randn(4, 64)
    quantize_(base, mode)
    want = base(x)
    model = fallow.attach(copy.deepcopy(base), "lora", rank=RANK, alpha=6.0, start="pissa")
    torch.testing.assert_close(model(x), want, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        for delta in deltas(model):
            delta.B += 0.1
    fallow.save(model, tmp_path / "a")
    assert torch.equal(fallow.load(copy.deepcopy(base), tmp_path / "a")(x), model(x))


def test_a_base_in_four_bits_of_bitsandbytes_starts_through_peft_and_loads(tmp_path):
    def base() -> nn.Module:
        torch.manual_seed(0)
        layer = bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32)
        return nn.Sequential(layer).to("cpu")

    x = torch.randn(4, 64, requires_grad=True)  # without a gradient bitsandbytes multiplies in another way
    want = base()(x)
    model = get_peft_model(base(), fallow.LoRAConfig(target_modules=["0"], rank=RANK, start="pissa"))
    torch.testing.assert_close(model(x), want, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        deltas(model)[0].B += 0.1
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(again(x), model(x))
    empty = PeftModel.from_pretrained(base(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(empty(x), model(x))


def test_a_tied_weight_starts_once():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(30, 12), nn.Linear(12, 30, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x))

    base, x = Tied(), torch.randint(30, (2, 4))
    want = base(x)
    model = fallow.attach(base, "lora", ["embed", "head"], rank=RANK, start="pissa")
    torch.testing.assert_close(model(x), want, atol=1e-5, rtol=1e-5)
    assert len(deltas(model)) == 1


def test_a_seed_gives_the_same_start_again_and_patterns_their_own_ranks():
    base = nn.Sequential(nn.Linear(300, 280), nn.Linear(280, 270))
    made = [
        fallow.attach(copy.deepcopy(base), "lora", rank=4, patterns={"1": {"rank": 2}}, start="pissa", seed=seed)
        for seed in (0, 0, 1)
    ]
    first, again, other = (deltas(model) for model in made)
    assert [delta.A.shape[0] for delta in first] == [4, 2]
    assert all(torch.equal(a.A, b.A) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0].A, other[0].A)  # another draw of the range finder, of a weight above 256


def test_more_rank_than_a_layer_has_is_refused_before_the_model_changes():
    base = nn.Sequential(nn.Linear(12, 5))
    with pytest.raises(fallow.ConfigError, match="rank=6 is above what '0' of"):
        fallow.attach(base, "lora", rank=6, start="pissa")
    assert type(base[0]).__name__ == "Linear"
    assert not hasattr(base[0], "adapters")
