from __future__ import annotations

import pytest
import torch

from fallow.core.coding import decode, encode
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
