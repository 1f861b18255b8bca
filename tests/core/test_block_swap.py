"""Swapped blocks: the same numbers as without, never more blocks on the device than promised, each sent for in time."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

import fallow
from fallow.core.block_swap import BlockSwap, blocks_of
from fallow.core.errors import ConfigError, ModelError
from fallow.core.quantized import exchange, layers_of, quantize_, stored

WIDTH = 64


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, *, scale=1.0):
        return x + torch.nn.functional.gelu(self.layer(self.norm(x))) * scale


class Stack(nn.Module):
    """Uses its blocks in another order than it lists them, if asked for."""

    def __init__(self, depth=6, order=None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.order = order or range(depth)
        self.seen = None

    def forward(self, x):
        x = self.first(x)
        for number in self.order:
            x = self.blocks[number](x, scale=0.5)
            if self.seen is not None:
                self.seen()
        return x


def keep_plain(model):
    """The weights of the blocks as stored ones that stay on the device: the same kernels without any swap."""
    for block in model.blocks:
        for _, layer in layers_of(block):
            exchange(model, layer.weight, "plain")


def train(model, method, steps=4):
    if method == "sara":
        optimizer = fallow.SaRA(model, fraction=0.2, lr=1e-2, reselect_at=2)
    else:
        model.requires_grad_(False)
        torch.manual_seed(1)
        inject_adapter_in_model(LoraConfig(r=4, target_modules=["layer"]), model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    torch.manual_seed(2)
    x, losses = torch.randn(5, 8), []
    for _ in range(steps):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("method", ["sara", "lora"])
@pytest.mark.parametrize("code", [None, "nf4", "int8"])
def test_training_is_the_same_with_and_without_swapping(method, code):
    swapped, plain = Stack(), Stack()
    for model in (swapped, plain):
        if code:
            quantize_(model.blocks, code)
    swap = BlockSwap(swapped, 2)
    keep_plain(plain)
    ours, theirs = train(swapped, method), train(plain, method)
    assert ours == theirs
    assert ours[-1] < ours[0]
    swap.close()
    for (name, one), (_, other) in zip(swapped.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(one.detach() + 0, other.detach() + 0), name


def test_training_follows_that_of_an_untouched_network():
    swapped = Stack()
    BlockSwap(swapped, 1)
    assert train(swapped, "sara") == pytest.approx(train(Stack(), "sara"), rel=1e-5)


@pytest.mark.parametrize("on_device", [1, 2, 4])
def test_no_more_blocks_are_on_the_device_than_promised(on_device):
    model = Stack()
    swap = BlockSwap(model, on_device)
    counts = []

    def seen():
        alive = sum(store.parts is not None for held in swap.stores for store in held)
        pending = sum(len(parts) for parts, _ in swap._pending.values())
        counts.append(alive + pending)

    model.seen = seen
    enter = swap._send_for
    swap._send_for = lambda number: (enter(number), seen())
    train(model, "sara")
    assert max(counts) == on_device + 1
    assert len(swap.resident) <= on_device + 1


def test_blocks_that_are_not_on_the_device_hold_no_memory_there():
    model = Stack()
    swap = BlockSwap(model, 1)
    hosts = {part.data_ptr() for held in swap.stores for store in held for part in store.host.values()}
    model(torch.randn(2, 8)).sum().backward()
    on_device = [store.parts["codes"] for held in swap.stores for store in held if store.parts is not None]
    assert len(on_device) == 2
    assert not hosts & {part.data_ptr() for part in on_device}  # copies, which a device's would be
    assert swap.nbytes == [WIDTH * WIDTH * 4] * 6


def test_each_block_is_sent_for_while_the_one_before_computes():
    model = Stack(depth=4)
    swap = BlockSwap(model, 1)
    train(model, "sara", steps=1)
    swap.log.clear()
    model(torch.randn(2, 8)).sum().backward()
    assert list(swap.log) == [
        ("forward", 0),
        ("forward", 1), ("drop", 0), ("upload", 2),
        ("forward", 2), ("drop", 1), ("upload", 3),
        ("forward", 3),
        ("backward", 3),
        ("backward", 2), ("drop", 3), ("upload", 1),
        ("backward", 1), ("drop", 2), ("upload", 0),
        ("backward", 0),
    ]  # fmt: skip


@pytest.mark.parametrize("method", ["sara", "lora"])
def test_after_the_first_pass_no_block_is_late_in_whatever_order_they_are_used(method):
    model = Stack(order=[3, 0, 5, 1, 4, 2])
    swap = BlockSwap(model, 2)
    train(model, method, steps=1)
    assert swap.order == [3, 0, 5, 1, 4, 2]
    model(torch.randn(2, 8)).sum().backward()
    swap.log.clear()
    model(torch.randn(2, 8)).sum().backward()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(2, 8))
    kinds = [kind for kind, _ in swap.log]
    assert kinds.count("late") == 0
    assert kinds.count("forward") == 24


def test_the_inputs_of_a_block_are_all_that_is_kept_for_the_backward_pass():
    from fallow.analysis.memory import LiveBytes

    model, x = Stack(depth=6), torch.randn(64, 8)
    BlockSwap(model, 1)
    model(x).sum().backward()
    with LiveBytes(*[p for p in model.parameters() if type(p) is nn.Parameter], x) as live:
        loss = model(x).sum()
        kept = live.now
        loss.backward()
    inputs = 6 * 64 * WIDTH * 4
    assert kept < inputs + 3 * WIDTH * WIDTH * 4 + 64 * WIDTH * 4 + 1000  # and the blocks that are there


def test_the_blocks_of_a_unet_and_of_a_transformer_are_found(tiny_gpt2):
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), norm_num_groups=8,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    kinds = [type(block).__name__ for block in blocks_of(unet)]
    assert kinds.count("ResnetBlock2D") == 8
    assert kinds.count("Transformer2DModel") == 4
    assert blocks_of(Stack()) == list(Stack().blocks) or len(blocks_of(Stack())) == 6
    assert blocks_of(nn.Linear(8, 8)) == []
    inputs = torch.randn(2, 4, 8, 8), torch.ones(2, dtype=torch.long), torch.randn(2, 5, 32)
    with torch.no_grad():
        before = unet(*inputs).sample
        swap = BlockSwap(unet, 3)
        for _ in range(2):
            torch.testing.assert_close(unet(*inputs).sample, before)
    assert len(swap.resident) <= 4


def test_what_cannot_be_swapped_is_refused_before_anything_changes():
    model = Stack()
    for wrong in (0, 6, True):
        with pytest.raises(ConfigError, match=r"blocks_on_device=.* is impossible with the 6 blocks.*1 to 5"):
            BlockSwap(model, wrong)
    with pytest.raises(ModelError, match="has 0 blocks"):
        BlockSwap(nn.Linear(8, 8), 1)
    with pytest.raises(ModelError, match=r"block 0 of Stack .LayerNorm. has no weights"):
        BlockSwap(model, 1, blocks=[block.norm for block in model.blocks])
    tied = Stack()
    tied.blocks[1].layer.weight = tied.blocks[0].layer.weight
    with pytest.raises(ModelError, match="blocks 0 and 1 of Stack share a weight"):
        BlockSwap(tied, 1)
    trained = Stack()
    optimizer = fallow.SaRA(trained, fraction=0.1, lr=1e-3)
    with pytest.raises(ModelError, match="trained by an optimizer already"):
        BlockSwap(trained, 1)
    optimizer.close()
    adapted = Stack()
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["layer"]), adapted)
    with pytest.raises(ModelError, match="has an adapter; swap first"):
        BlockSwap(adapted, 1)
    compiled = Stack()
    compiled.blocks[0].compile()
    with pytest.raises(ModelError, match="is compiled"):
        BlockSwap(compiled, 1)
    assert not list(stored(model))
    BlockSwap(model, 1)
    model(torch.randn(2, 8)).sum().backward()
    rule = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ModelError, match="cannot be written"):  # all of a weight that waits in host memory
        rule.step()
