"""Every layer's weight as one matrix (out, in), so that a method is written once for all kinds of layers.

    view.read(weight)       the layer's weight as (out, in); write() is the way back
    view.op(x, W, bias)     what the layer does with a whole (out, in) matrix in place of its weight
    view.down(x, A)         A (r, in) applied the way the layer applies its weight: its hidden channels are r
    view.up(h, B)           B (out, r) on the channels of such a hidden result: the layer's outputs
    view.mix(h, M)          M (s, r) on the hidden channels: others, s of them
    view.scale(h, g)        the hidden channels times g (r,)

    linear     Linear, transformers' Conv1D (stored transposed)       x (..., in), h (..., r)
    conv       Conv1d/2d/3d, grouped ones too; the kernel is a part of `in`      x (N, C, ...), h (N, groups * r, ...)
    embedding  Embedding; out is its width, in its number of rows                x int (...), h (..., r)
    parameter  a weight that its module reads itself: attention's in_proj, stacks of experts (E, out, in) as rows of one
               matrix, in E `blocks`, each of which hosts give a Delta of its own. There is no way through the input;
               the module runs with the changed weight in its place.

Hidden results of grouped convolutions hold r channels for each group, all made by the one A; `up` gives each group its
rows of B. So use up, mix and scale on them, not operators of your own.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, cast

import torch.nn.functional as F
from torch import Tensor, nn

from fallow.core.errors import ModelError

Kind = Literal["linear", "conv", "embedding", "parameter"]
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONV = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


class View:
    """A Linear, whose weight is the matrix. `shape`: (out, in)."""

    kind: ClassVar[Kind] = "linear"
    channels: ClassVar[int] = -1  # the dimension of x and h that holds the channels
    blocks: int | None = None  # of a stack of matrices
    alone: int = 1  # the dimensions of a sample without a batch; 0 where there is no such thing

    def __init__(self, out_features: int, in_features: int) -> None:
        self.shape = (out_features, in_features)

    def read(self, weight: Tensor) -> Tensor:
        return weight

    def write(self, matrix: Tensor, like: Tensor) -> Tensor:
        """The (out, in) matrix in the shape and memory format of the layer's weight `like`; its own dtype."""
        return matrix.reshape(like.shape)

    def op(self, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, matrix, bias)

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        return F.linear(x, a)

    def up(self, h: Tensor, b: Tensor) -> Tensor:
        return F.linear(h, b)

    def mix(self, h: Tensor, m: Tensor) -> Tensor:
        return F.linear(h, m)

    def scale(self, h: Tensor, gates: Tensor) -> Tensor:
        return h * gates


class TransposedView(View):
    """transformers' Conv1D, whose weight is (in, out)."""

    def read(self, weight: Tensor) -> Tensor:
        return weight.T

    def write(self, matrix: Tensor, like: Tensor) -> Tensor:
        return matrix.T.contiguous()


class ConvView(View):
    """A convolution: (out, in / groups * kernel), rows ordered as the weight flattened."""

    kind = "conv"
    channels = 1

    def __init__(self, layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
        super().__init__(layer.weight.shape[0], layer.weight[0].numel())
        self.kernel, self.groups, self.stride = layer.weight.shape[1:], layer.groups, layer.stride
        self.alone = len(self.kernel)
        self.padding, self.dilation, self.padding_mode = layer.padding, layer.dilation, layer.padding_mode
        self.around = layer._reversed_padding_repeated_twice
        self.conv = cast(Any, _CONV[layer.weight.dim()])

    def read(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def op(self, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self.around, mode=self.padding_mode), 0
        kernel = matrix.reshape(-1, *self.kernel)
        return cast(Tensor, self.conv(x, kernel, bias, self.stride, padding, self.dilation, self.groups))

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        return self.op(x, a if self.groups == 1 else a.repeat(self.groups, 1))

    def up(self, h: Tensor, b: Tensor) -> Tensor:
        return cast(Tensor, self.conv(h, b.reshape(*b.shape, *[1] * (h.dim() - 2)), groups=self.groups))

    def mix(self, h: Tensor, m: Tensor) -> Tensor:
        return self.up(h, m if self.groups == 1 else m.repeat(self.groups, 1))

    def scale(self, h: Tensor, gates: Tensor) -> Tensor:
        repeats = h.shape[1] // gates.shape[0]
        return h * (gates if repeats == 1 else gates.repeat(repeats)).view(-1, *[1] * (h.dim() - 2))


class EmbeddingView(TransposedView):
    """An Embedding: (width, rows of the table). x is a tensor of integers."""

    kind = "embedding"
    alone = 0

    def __init__(self, layer: nn.Embedding) -> None:
        super().__init__(layer.embedding_dim, layer.num_embeddings)
        self.padding_idx = layer.padding_idx

    def op(self, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.embedding(x, matrix.T, self.padding_idx)

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        return self.op(x, a)


class ParameterView(View):
    """A parameter of two or more dimensions that its module reads itself: all but the last are rows.

    `blocks`: how many matrices a stack of them holds.
    """

    kind = "parameter"
    alone = 0

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight[..., 0].numel(), weight.shape[-1])
        self.blocks = weight.shape[0] if weight.dim() == 3 else None

    def read(self, weight: Tensor) -> Tensor:
        return weight.reshape(self.shape)

    def op(self, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        raise ModelError("this weight is read by its module itself; there is no input to put through it")

    down = up = mix = scale = op  # type: ignore[assignment]


def view_of(layer: nn.Module, tensor: str = "weight") -> View:
    """The view of a layer's weight. ModelError for a module that has no such weight, or a weight of one dimension."""
    if isinstance(layer, TRANSPOSED):
        raise ModelError(f"{type(layer).__name__} is a transposed convolution, whose weight is no (out, in) matrix")
    if isinstance(layer, CONVS):
        return ConvView(layer)
    if isinstance(layer, nn.Embedding):
        return EmbeddingView(layer)
    weight = getattr(layer, tensor, None)
    if not isinstance(weight, Tensor):
        raise ModelError(f"{type(layer).__name__} has no tensor '{tensor}' to adapt; leave it out of the targets")
    if tensor == "weight" and type(layer).__name__ == "Conv1D":
        return TransposedView(weight.shape[1], weight.shape[0])
    if tensor == "weight" and hasattr(layer, "in_features") and hasattr(layer, "out_features"):
        return View(
            cast(int, layer.out_features), cast(int, layer.in_features)
        )  # not from the weight: quantised ones are packed
    if weight.dim() < 2:
        raise ModelError(f"'{tensor}' of {type(layer).__name__} has {weight.dim()} dimensions; a matrix is needed")
    return ParameterView(weight)
