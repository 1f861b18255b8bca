"""What a file says of its layers is enough to have their views again; what it cannot say is refused."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fallow.core.errors import AdapterError
from fallow.core.layouts import check_layout, layout, odd_of, view_from
from fallow.core.views import view_of

LAYERS = {
    "linear": nn.Linear(3, 5),
    "transposed": Conv1D(5, 3),
    "conv1": nn.Conv1d(3, 5, 2),
    "conv2": nn.Conv2d(3, 5, (1, 2)),
    "conv3": nn.Conv3d(3, 5, (1, 2, 3)),
    "embedding": nn.Embedding(7, 4),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_view_is_the_same_after_its_way_through_a_file(name):
    layer = LAYERS[name]
    told = check_layout("file", name, json.loads(json.dumps(layout(layer, view_of(layer)))))
    view, again = view_of(layer), view_from(told)
    assert tuple(told["shape"]) == tuple(layer.weight.shape)
    assert (type(again), again.shape, again.kind) == (type(view), view.shape, view.kind)
    matrix = again.read(layer.weight.detach())
    assert torch.equal(matrix, view.read(layer.weight.detach()))
    assert torch.equal(again.write(matrix, layer.weight), layer.weight)


def test_layers_on_which_others_act_differently_are_told():
    assert odd_of(nn.Conv1d(4, 4, 1, groups=2)) == "a convolution with groups=2"
    assert odd_of(nn.Conv2d(4, 4, 1, dilation=2)) == "a convolution with dilation=(2, 2)"
    assert "reads the weight itself" in odd_of(nn.MultiheadAttention(4, 1).out_proj)
    assert odd_of(nn.Conv1d(4, 4, 1)) == odd_of(nn.Linear(2, 2)) == ""
    grouped = nn.Conv1d(4, 4, 1, groups=2)
    assert layout(grouped, view_of(grouped)) == {
        "kind": "conv", "shape": [4, 2, 1], "odd": "a convolution with groups=2",
    }  # fmt: skip


@pytest.mark.parametrize(
    "told",
    [
        None, {}, {"kind": "conv"}, {"kind": "rnn", "shape": [2, 2]}, {"kind": "linear", "shape": [2]},
        {"kind": "linear", "shape": [2, 2, 2]}, {"kind": "conv", "shape": [2, 2]}, {"kind": "linear", "shape": [2, 0]},
        {"kind": "linear", "shape": [2**39, 2**39]}, {"kind": "linear", "shape": [True, 2]},
        {"kind": "linear", "shape": [2, 2], "odd": 1}, {"kind": ["linear"], "shape": [2, 2]},
    ],
)  # fmt: skip
def test_hostile_layouts_are_refused(told):
    with pytest.raises(AdapterError, match="of 'x', which is no layer"):
        check_layout("file", "x", told)
