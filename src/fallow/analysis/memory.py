"""How much memory a run will take, told before it starts.

Two parts add up. What the method keeps for each trained entry is arithmetic:

    selective   packed index 1.08 (at 10 % density; 1.16 at 5 %) + first value 4 (`disabled()` needs it) + gradient 4
                + Adam's two moments 8 = 17 bytes an entry of an fp32 weight, whose values live in the weight. Of a
                bf16 weight: first value 2, and an fp32 master 4, so 19; where changes are trained (SHiRA) 21 and 19
    low rank    factors 4 + gradient 4 + moments 8 = 16 bytes a factor entry, on top of the frozen weights
    full        moments 8 bytes a weight, and its dense gradient (4), which outlives the backward pass

What a step needs besides (activations kept for the backward pass, and dense gradients on their way) is measured: one
forward and one backward pass are run while every storage that torch makes is counted as long as it lives. On *fake*
tensors, which have shapes and no data, that costs a second or two and no memory, for a network of any size.

The update that follows needs temporaries when the activations have gone: one fp32 copy of all that is trained where
AdamW works on all tensors at once (foreach: its way on a GPU), three of the largest tensor where it goes one by one.

The figure is what tensors hold. Not in it: the allocator's rounding and cache, kernels' workspaces, the CUDA context
(about 0.5 GB).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fallow.core.coding import PackedIndex, packed
from fallow.core.compact import Form
from fallow.core.stored_weight import StoredWeight
from fallow.core.update import PART

VALUE = GRADIENT = 4  # bytes: compact values and compact gradients are fp32 whatever the weights are
MOMENTS = 8  # Adam's m and v, fp32


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations inside the `with` block make, for as long as they live.

    `now` and `peak` are bytes. Storages that were there before (`known`: modules or tensors) do not count. Works on
    real, meta and fake tensors of any device. What a kernel allocates and frees within itself is not seen.
    """

    def __init__(self, *known: nn.Module | Tensor):
        super().__init__()
        self.now = 0
        self.peak = 0
        tensors: list[Tensor] = []
        for one in known:
            tensors += _memory_of(one) if isinstance(one, nn.Module) else [one]
        # A storage is known by its address; the dead are struck off, since an address is used again.
        self._alive: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count the storages of its results that are new."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and not isinstance(leaf, StoredWeight):  # which is another view of its code
                self._count(leaf)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def gone(_: Any) -> None:
            if self._alive.pop(key, None) is not None:
                self.now -= size

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


@dataclass(frozen=True)
class StepMemory:
    """Bytes that one forward and backward pass holds besides weights and optimizer state."""

    activations: int  # alive between forward and backward: what autograd has kept
    peak: int  # the most that was alive at once: activations, dense gradients, temporaries
    largest_gradient: int  # the biggest dense weight gradient of any trained tensor
    gradients: int  # dense gradients left behind by the backward pass


@dataclass(frozen=True)
class Estimate:
    """Memory of a run of one method, in bytes, and how many entries it trains."""

    method: str
    trained: int
    total_parameters: int
    weights: int  # the trained network, frozen entries included
    added: int  # tensors that the method adds to the network (low-rank factors)
    indices: int
    values: int  # fp32 values of the selected entries, the masters
    first_values: int  # what the selected entries were, in the weights' dtype
    gradients: int  # compact gradients
    moments: int
    step: StepMemory
    update: int = 0  # temporaries of the optimizer's update
    ema: int = 0
    others: int = 0  # parts of the pipeline that are not trained

    @property
    def state(self) -> int:
        """What the method keeps besides the weights, from step to step."""
        return self.added + self.indices + self.values + self.first_values + self.gradients + self.moments + self.ema

    @property
    def total(self) -> int:
        """The peak of a training step, in which activations, dense gradients and the update's temporaries overlap.

        Compact gradients are counted as alive throughout, as they are when gradients are accumulated.
        """
        return self.weights + self.others + self.state + self.passing

    @property
    def passing(self) -> int:
        """The most that lives only within a step: in the backward pass or, where that is more, in the update."""
        return max(self.step.peak, self.step.gradients + self.update)

    def rows(self) -> list[tuple[str, int]]:
        """The parts that add up to `total`, named."""
        return [
            ("weights of the network", self.weights),
            ("other parts of the pipeline", self.others),
            ("added tensors", self.added),
            ("indices of selected entries", self.indices),
            ("fp32 values of selected entries", self.values),
            ("first values of selected entries", self.first_values),
            ("compact gradients", self.gradients),
            ("Adam's moments", self.moments),
            ("moving average", self.ema),
            ("activations, gradients of a step", self.passing),
        ]

    def as_dict(self) -> dict[str, Any]:
        """Plain figures for JSON; bytes."""
        return {
            "method": self.method,
            "trained": self.trained,
            "total_parameters": self.total_parameters,
            **{name.replace(" ", "_").replace("'", ""): size for name, size in self.rows()},
            "of_which_activations": self.step.activations,
            "of_which_largest_dense_gradient": self.step.largest_gradient,
            "dense_gradients_left_after_backward": self.step.gradients,
            "temporaries_of_the_update": self.update,
            "total": self.total,
        }


def measure_step(network: nn.Module, loss: Callable[[], Tensor], *, drop_gradients: bool) -> StepMemory:
    """Run one forward and backward pass of `loss()` and count what lives meanwhile.

    `drop_gradients`: free each dense gradient as soon as it is complete, as the compact engine does once it has
    gathered the selected entries. Which parameters are trained is read from their `requires_grad`. The gradients are
    cleared before and after. Under a FakeTensorMode nothing is computed or allocated.
    """
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("no parameter of the network requires a gradient; there is no training step to measure")
    for parameter in trained:
        parameter.grad = None
    hooks = []
    if drop_gradients:
        hooks = [parameter.register_post_accumulate_grad_hook(_drop) for parameter in trained]
    try:
        with LiveBytes(network) as live:
            value = loss()
            activations = live.now
            value.backward()
    finally:
        for hook in hooks:
            hook.remove()
    left = sum(_bytes(parameter.grad) for parameter in trained if parameter.grad is not None)
    for parameter in trained:
        parameter.grad = None
    return StepMemory(activations, live.peak, max(_bytes(parameter) for parameter in trained), left)


def estimate_selective(
    network: nn.Module,
    loss: Callable[[], Tensor],
    selected: Mapping[str, int],
    *,
    method: str = "sara",
    form: Form = "value",
    fused: bool = False,
    ema: bool = False,
    others: int = 0,
) -> Estimate:
    """A selective method that trains `selected[name]` entries of each parameter tensor, as values or as changes
    (`form`).

    Tensors with none are frozen, which also saves their weight gradient and the activations kept for it. `fused`: the
    update happens in the backward pass, so that one compact gradient is alive at a time. The network is used up: of
    weights that are kept as codes the selected entries are put beside the code, where their values lie.
    """
    parameters = dict(network.named_parameters())
    for name, parameter in parameters.items():
        parameter.requires_grad_(selected.get(name, 0) > 0)
        if isinstance(parameter, StoredWeight) and selected.get(name, 0):
            entries = torch.arange(selected[name], dtype=torch.int32, device=parameter.device)
            parameter.store.keep(PackedIndex(entries, parameter.numel()), parameter.dtype)
    trained = sum(selected.values())
    return Estimate(
        method=method,
        trained=trained,
        total_parameters=sum(parameter.numel() for parameter in parameters.values()),
        weights=_weights(network),
        added=0,
        indices=sum(packed(count, parameters[name].numel())[1] for name, count in selected.items()),
        values=sum(count * _values_of(parameters[name], form) for name, count in selected.items()),
        first_values=sum(
            count * parameters[name].element_size()
            for name, count in selected.items()
            if form == "delta" or not isinstance(parameters[name], StoredWeight)
        ),
        gradients=GRADIENT * (max(selected.values(), default=0) if fused else trained),
        moments=trained * MOMENTS,
        step=measure_step(network, loss, drop_gradients=True),
        update=_selective_update({name: (count, _exact(parameters[name], form)) for name, count in selected.items()}),
        ema=trained * VALUE if ema else 0,
        others=others,
    )


def estimate_dense(
    network: nn.Module,
    loss: Callable[[], Tensor],
    *,
    method: str,
    foreach: bool = False,
    ema: bool = False,
    others: int = 0,
) -> Estimate:
    """Full fine-tuning, or adapters already put into the network: whatever requires a gradient is trained by AdamW.

    Trained tensors whose name carries `lora_` (PEFT's mark) count as added to the network's weights.
    """
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    added = sum(_bytes(parameter) for name, parameter in network.named_parameters() if "lora_" in name)
    count = sum(parameter.numel() for parameter in trained)
    return Estimate(
        method=method,
        trained=count,
        total_parameters=sum(p.numel() for name, p in network.named_parameters() if "lora_" not in name),
        weights=_weights(network) - added,
        added=added,
        indices=0,
        values=0,
        first_values=0,
        gradients=0,  # dense: they are in the step's peak
        moments=sum(parameter.numel() for parameter in trained) * MOMENTS,
        step=measure_step(network, loss, drop_gradients=False),
        update=_update([parameter.numel() for parameter in trained], foreach),
        ema=count * VALUE if ema else 0,
        others=others,
    )


def _update(counts: Collection[int], foreach: bool) -> int:
    """Bytes that AdamW holds during an update of tensors of so many entries, besides its moments."""
    return VALUE * (sum(counts) if foreach else 3 * max(counts, default=0))


def _exact(parameter: Tensor, form: Form) -> bool:
    """Whether a weight holds its trained values itself, so that no master is kept."""
    return form == "value" and parameter.dtype in (torch.float32, torch.float64)


def _values_of(parameter: Tensor, form: Form) -> int:
    """Bytes of one trained value: of its master, and beside a code also of what stands for the weight's own."""
    master = 0 if _exact(parameter, form) else VALUE
    return master + (parameter.element_size() if isinstance(parameter, StoredWeight) else 0)


def _selective_update(selected: Mapping[str, tuple[int, bool]]) -> int:
    """Bytes that an update holds: the values and 32-bit positions of one part of the entries without a master, and
    64-bit positions of the tensor that is written back.
    """
    counts = [count for count, _ in selected.values()]
    largest = max(counts, default=0)
    hollow = sum(count for count, exact in selected.values() if exact)
    return 8 * min(hollow, max(PART["cpu"], largest)) + 8 * largest


def _weights(network: nn.Module) -> int:
    """Bytes of all parameters and buffers on the device; what is tied counts once, of codes those that are there."""
    tensors = _memory_of(network)
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def _memory_of(network: nn.Module) -> list[Tensor]:
    """The plain tensors that a network consists of, without trained entries beside codes."""
    found: list[Tensor] = []
    for tensor in (*network.parameters(), *network.buffers()):
        found += (tensor.store.parts or {}).values() if isinstance(tensor, StoredWeight) else [tensor]
    return found


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _drop(parameter: Tensor) -> None:
    parameter.grad = None
