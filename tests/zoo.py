"""A small network with a layer of every kind."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Zoo(nn.Module):
    """A layer of every kind that weights come in; takes token ids (B, T), gives (B, 10)."""

    def __init__(self, tied: bool = True, sparse: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(32, 16, sparse=sparse)
        self.norm = nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)  # fused query, key and value
        self.experts = nn.Parameter(torch.randn(3, 16, 16) * 0.1)
        self.conv = nn.Conv2d(1, 4, 3)
        self.group = nn.GroupNorm(2, 4)
        self.readout = nn.Linear(16, 32, bias=False)
        if tied:
            self.readout.weight = self.tokens.weight
        self.head = nn.Linear(32, 10)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.tokens(ids))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + torch.einsum("btd,nde->bte", x, self.experts)
        image = self.group(self.conv(x.unsqueeze(1))).mean((1, 2))
        return self.head(self.readout(x.mean(1)) + nn.functional.pad(image, (0, 32 - image.shape[1])))
