"""A model that is lent for some passes and comes back as it was, whatever happens in between."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def borrowed(model: nn.Module, trained: Sequence[Tensor] = (), train: bool = False) -> Iterator[None]:
    """Within the block only the Parameters `trained` require gradients, none has one, and all modules are in eval mode.

    `train`: in training mode, and the buffers (running means) are put back too. Afterwards modes, gradients and
    requires_grad are those of before. torch's fast path of transformer layers, which passes their children by, is off.
    """
    modes = {module: module.training for module in model.modules()}
    required = {param: (param.requires_grad, param.grad) for param in model.parameters()}
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()] if train else []
    fast = torch.backends.mha.get_fastpath_enabled()
    wanted = {id(param) for param in trained}
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for param in required:
            if param.is_floating_point() or param.is_complex():
                param.requires_grad_(id(param) in wanted)
            param.grad = None
        model.train(train)
        with torch.inference_mode(False):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, mode in modes.items():
            module.training = mode
        for param, (requires_grad, grad) in required.items():
            if param.requires_grad != requires_grad:
                param.requires_grad_(requires_grad)
            param.grad = grad
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
