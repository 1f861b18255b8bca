from __future__ import annotations

import pytest
import torch

from fallow.core.coding import PackedIndex, decode, encode, packed
from fallow.core.errors import AdapterError


@pytest.mark.parametrize("density", [0.0, 1e-5, 1e-3, 0.02, 0.1, 0.3, 0.9, 1.0])
def test_every_density_comes_back_exactly_in_the_expected_size(density):
    numel = 300_000
    index = (torch.rand(numel) < density).nonzero().view(-1).int()
    kind, code = encode(index, numel)
    back = decode(kind, code, numel)
    assert torch.equal(back, index)
    assert back.dtype == torch.int32
    size = code.numel() * code.element_size()
    if 0.02 <= density <= 0.1:
        assert kind == "gaps"
        assert size <= 1.02 * index.numel()  # one byte an entry, and few escapes
    elif density == 1e-3:
        assert size <= 2 * index.numel()
    elif density >= 0.3:
        assert (kind, size) == ("bits", numel // 8)


@pytest.mark.parametrize(
    "index", [[], [0], [254], [255], [256], [0, 255, 511], [65535], [70000, 140_001, 140_002], [199_999]]
)
def test_gaps_around_the_escape_values_come_back(index):
    made = torch.tensor(index, dtype=torch.int32)
    kind, code = encode(made, 200_000)
    assert decode(kind, code, 200_000).tolist() == index


def test_tensors_of_2_to_the_31_entries_have_wide_indices():
    index = torch.tensor([5, 2**31 + 7])
    kind, code = encode(index, 2**32)
    assert decode(kind, code, 2**32).dtype == torch.int64
    assert decode(kind, code, 2**32).tolist() == index.tolist()


@pytest.mark.parametrize(
    ("kind", "code", "message"),
    [
        ("gaps", torch.tensor([3, 255], dtype=torch.uint8), "end in the middle"),
        ("gaps", torch.tensor([3, 97], dtype=torch.uint8), "index of 101 does not fit 100"),
        ("gaps", torch.tensor([3.0]), "uint8 or uint16"),
        ("bits", torch.zeros(12, dtype=torch.uint8), "12 bytes"),
    ],
)
def test_broken_codes_are_refused(kind, code, message):
    with pytest.raises(AdapterError, match=message):
        decode(kind, code, 100)


@pytest.mark.parametrize(
    ("density", "bits"), [(0.0, 0), (1e-5, 0), (1e-3, 16), (0.004, 16), (0.02, 8), (0.1, 8), (0.9, 8), (1.0, 8)]
)
def test_an_index_packed_in_memory_comes_back_exactly_and_has_the_foretold_size(density, bits):
    numel = 300_001
    index = (torch.rand(numel) < density).nonzero().view(-1).int()
    held = PackedIndex(index, numel)
    assert torch.equal(held.decode(), index)
    assert (held.decode().dtype, held.size, held.bits) == (torch.int32, index.numel(), bits)
    kept = held.low.nbytes + (0 if held.counts is None else held.counts.nbytes)
    assert held.nbytes == kept == packed(index.numel(), numel)[1]
    if density == 0.1:
        assert held.nbytes < 1.09 * index.numel()
    if density == 0.02:
        assert held.nbytes < 1.42 * index.numel()
    assert held.nbytes <= 4 * index.numel()


def test_an_index_packed_in_memory_may_lie_beyond_thirty_two_bits_and_at_the_edges_of_blocks():
    index = torch.cat([torch.arange(0, 2**33, 2**14), torch.tensor([2**33 - 1])])
    held = PackedIndex(index, 2**33)
    assert held.bits == 16
    assert torch.equal(held.decode(), index)
    for size in (1, 255, 256, 257, 512, 65536, 65537):
        edges = sorted({0, size // 2, max(0, size - 2), size - 1})
        assert PackedIndex(torch.tensor(edges, dtype=torch.int32), size).decode().tolist() == edges
