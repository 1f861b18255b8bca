"""Selective: train some entries of the existing weights, in place, as a drop-in torch optimizer.

    optimizer = Selective(model, smallest, fraction=0.05, lr=5e-4)      # any model, any training loop

Every selective method is this class with a selector (which entries) and options:

    select     index = selector(weights, amount)                 sorted flat indices, once
    backward   g += (dL/dW).flat[index];  drop dL/dW             one dense gradient alive at a time
    step       g += penalty;  v = AdamW(v, g);  W.flat[index] = round(v)
    reselect   keep only entries with |v| < threshold            at given steps, inside the first choice

v has k entries, so training costs for each of them: the packed index 1 byte, the first value 4, the gradient 4 and two
moments 8, about 17 k bytes, whatever the size of the model (no gradient with `in_backward`, 2 bytes for the moments
with `state_bits=8`). Of float32 weights the values live in the weight alone; low-precision weights add a float32 master
of 4 bytes, without which steps below 2^-9 |w| would vanish in bfloat16. Everything else is frozen bit for bit. Source:
the engine that SaRA (arXiv 2409.06633) and SHiRA (arXiv 2406.13175) describe.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from fallow.core.chunked import RowBlocks
from fallow.core.compact import Capture, Form, Slot, release, trained_by_another
from fallow.core.distributed import Averaging, ignore_in_ddp, rank, refuse_wrapped, start_alike
from fallow.core.errors import ConfigError, ModelError
from fallow.core.in_backward import InBackward, check_in_backward
from fallow.core.schedule import Schedule
from fallow.core.select import Amount, Patterns, Selection, Selector, Target, checked, eligible, named_weights
from fallow.core.sharded import summed
from fallow.core.side_branch import kept_as, slot_of
from fallow.core.sparse import SparseDelta
from fallow.core.update import Update
from fallow.selection.resuming import (
    STATE_VERSION,
    by_proxy,
    checked_state,
    gathered_moments,
    put_back,
    scattered_moments,
    several_groups,
    tensors_of,
)
from fallow.selection.rules import Rule, check_moments, make_rule, narrow_moments
from fallow.selection.showing import Showing


class Penalty(Protocol):
    """A term that is added to the compact gradients inside the step, such as the nuclear norm."""

    def check(self, slots: Sequence[Slot]) -> None: ...
    def add(self, slots: Sequence[Slot]) -> None: ...
    def draw(self, slots: Sequence[Slot]) -> list[Slot]: ...
    def add_to(self, slots: Sequence[Slot]) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Selective(torch.optim.Optimizer):
    """Trains the entries of `model` that `selector` chooses; see the module's text for the method.

    Amount, exactly one: `threshold` | `fraction` | `budget` over the whole model, `density` | `r` within each layer.
    `include`, `exclude`: regular expressions on parameter names; `keep`: further condition on a Target.
    `lr`: a number, or a function of the Selection. `betas`, `eps`, `weight_decay`: AdamW's, on the chosen entries only
    (in the form "value" decay pulls them towards 0, in the form "delta" towards their first values).
    `rule`: another torch optimizer over the proxies, e.g. `lambda groups: torch.optim.SGD(groups, momentum=0.9)`; the
    one group that it gets has `names` beside `params`, by which it may make several, of other rates.
    `penalty`: a term added to the gradients after clipping. `reselect_at`: steps, or shares of `total_steps`, after
    which only entries still under the threshold stay in training; moments are kept unless `reset_state`.
    `row_chunk`: compute weight gradients of Linear and Conv layers in blocks of so many rows, or of such a size
    ("16MiB"); `dense_gradients` names the weights that go another way. `in_backward`: update each weight within the
    backward pass, which excludes clipping, accumulation and loss scaling; `step()` then ends the pass. `state_bits`: 8
    keeps AdamW's moments in a byte each (`core.states8bit`).
    `metadata`: what else the adapter's file says, e.g. the method's name; plain JSON values.

    Frozen parameters stay frozen; every other parameter that is not chosen stops requiring a gradient until `close()`.
    Move the model to its device and dtype first. Raises SelectionError, ModelError or ConfigError before touching it.
    """

    def __init__(
        self,
        model: nn.Module,
        selector: Selector,
        *,
        lr: float | Callable[[Selection], float] = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        threshold: float | None = None,
        fraction: float | None = None,
        budget: int | None = None,
        density: float | None = None,
        r: int | None = None,
        include: Patterns = None,
        exclude: Patterns = None,
        keep: Callable[[Target], bool] | None = None,
        form: Form = "value",
        rule: Rule | None = None,
        penalty: Penalty | None = None,
        reselect_at: Iterable[int | float] | int | float = (),
        total_steps: int | None = None,
        reset_state: bool = False,
        row_chunk: int | str | None = None,
        in_backward: bool = False,
        state_bits: Literal[8, 32] = 32,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        amount = Amount(threshold, fraction, budget, density, r)
        self.schedule = Schedule(reselect_at, total=total_steps, name="reselect_at")
        model = getattr(model, "_orig_mod", model)  # the module itself, where torch.compile has wrapped it
        refuse_wrapped(model)
        targets = eligible(model, include, exclude, keep=keep)
        start_alike([target.weight for target in targets])
        selection = checked(selector(targets, amount), targets, amount)
        if self.schedule.at and selection.threshold is None:
            raise ConfigError(f"reselect_at={self.schedule.at} needs one threshold for the model; {amount} gives none")
        rate = lr(selection) if callable(lr) else lr
        if not 0 <= rate < float("inf"):
            raise ConfigError(f"lr={rate} must be a number >= 0")
        self.model, self.penalty, self.reset_state, self.form = model, penalty, reset_state, form
        self.threshold, self.events = selection.threshold, list[dict[str, Any]]()
        self.total_parameters = sum(target.numel for target in targets)
        self._numel = {target.name: target.numel for target in targets}
        made = (
            slot_of(target, selection.index[target.name], form, hollow=rule is None)
            for target in targets
            if target.name in selection.index
        )
        self.slots = {slot.name: slot for slot in made if slot.selected}
        self._showing = Showing(model, self.slots)
        if penalty is not None:
            penalty.check(list(self.slots.values()))
        options = {"lr": rate, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        proxies = {name: slot.proxy for name, slot in self.slots.items()}
        self.rule, self._grouped = make_rule(proxies, rule, options, state_bits)
        super().__init__(self.rule.param_groups, self.rule.defaults)
        self._follow_rule()
        self.metadata = {
            "method": "selective", "threshold": self.threshold, "fraction": fraction, "budget": budget, "density":
            density, "r": r, "include": _listed(include), "exclude": _listed(exclude), "reselect_at": self.schedule.at,
            **kept_as(self.slots.values()), **(metadata or {}),
        }  # fmt: skip
        trainable = [param for param in model.parameters() if param.requires_grad and not trained_by_another(param)]
        if in_backward:
            check_in_backward(self.slots.values(), self.update)
        self.capture = Capture(list(self.slots.values()))
        self.averaging = Averaging(model, self.capture)
        self.averaging.check()
        self.capture.arrived = self.averaging.arrived
        self._marks: list[Callable[[], None]] = []  # what takes the marks for DistributedDataParallel away again
        self.ignore_in_ddp(model)
        if row_chunk is not None and any(slot.part is not None for slot in self.slots.values()):
            raise ConfigError(
                f"row_chunk={row_chunk!r} computes gradients of whole weights, and these are sharded; leave it out"
            )
        self._blocks = RowBlocks(model, self.capture, row_chunk) if row_chunk is not None else None
        self.in_backward: InBackward | None = None
        if in_backward:
            own = weakref.ref(self)

            def slots() -> list[Slot]:
                return [] if (one := own()) is None else [one.slots[name] for name in one._grouped]

            def refusal() -> str:
                return "" if (one := own()) is None else one._showing.refusal()

            self.in_backward = self.capture.consumer = InBackward(self.update, slots, penalty, refusal)
            self._step_supports_amp_scaling = True  # so that GradScaler leaves the refusal to step()
        chosen = {id(param) for slot in self.slots.values() for param in slot.params}
        for param in trainable:
            if id(param) not in chosen:
                param.requires_grad_(False)
        # Also where the optimizer is dropped without close(): a model with stray hooks would lose its gradients.
        self._finalizer = weakref.finalize(
            self, _let_go, self.capture.handles, trainable, self._blocks.close if self._blocks else None, self._marks
        )
        self._finalizer.atexit = False

    # -- what is trained ----------------------------------------------------------------------------------------------

    def trainable(self) -> list[nn.Parameter]:
        """The compact proxies, one per weight: for `clip_grad_norm_`, and what `param_groups` hold."""
        if self.in_backward is not None:
            raise ConfigError(
                "in_backward=True uses each gradient within the backward pass, so there are none to clip; leave "
                "clipping out (max_grad_norm=0), or give in_backward=False"
            )
        return self._proxies()

    def _proxies(self) -> list[nn.Parameter]:
        return [self.slots[name].proxy for name in self._grouped]

    @property
    def dense_gradients(self) -> list[str]:
        """The weights larger than a block of `row_chunk` whose whole gradient is made all the same; known for certain
        after a backward pass.
        """
        return [] if self._blocks is None else self._blocks.dense

    @property
    def trained_parameters(self) -> int:
        """The number of entries chosen at first."""
        return sum(slot.selected for slot in self.slots.values())

    @property
    def live_parameters(self) -> int:
        """The number of entries in training now; fewer than chosen after a re-selection."""
        return sum(self.slots[name].count for name in self._grouped)

    def selected(self) -> dict[str, tuple[int, int]]:
        """{name: (entries chosen at first, entries)} of every eligible weight, in model order."""
        return {name: (self.slots[name].selected if name in self.slots else 0, n) for name, n in self._numel.items()}

    # -- training -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of the chosen entries; weights without a gradient are skipped, as AdamW does."""
        if not self._finalizer.alive:
            raise ConfigError("this optimizer was closed; make a new one to train on")
        if reason := self._showing.refusal():
            raise ConfigError(reason)
        if self.in_backward is not None and hasattr(self, "found_inf"):  # GradScaler's way of telling
            raise ConfigError(
                "in_backward=True has used the scaled gradients before GradScaler could unscale them; train in "
                "bfloat16 without loss scaling, or give in_backward=False"
            )
        self.schedule.check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.synchronize()
        slots = [self.slots[name] for name in self._grouped]
        if self.in_backward is not None:
            if not self.in_backward.done:
                self._check_in_reach()
            self.in_backward.finish()
        else:
            if self.capture.spent or all(slot.proxy.grad is None for slot in slots):  # none since the last step
                self._check_in_reach()
            if self.penalty is not None:
                for slot in slots:
                    slot.refresh()
                self.penalty.add(slots)
            self.update.apply(slots)
            self.capture.spent = True
        if self.schedule.advance():
            self.reselect()
        return loss

    def masters(self) -> dict[str, Tensor]:
        """{name: (n,)} the exact values behind all entries chosen at first, for an average; float32 (or float64)."""
        self._showing.check_trained_shown()
        return {name: slot.masters() for name, slot in self.slots.items()}

    def put(self, masters: Mapping[str, Tensor]) -> None:
        """Set what `masters()` gives and the weights with it, e.g. to an average."""
        self._showing.check_trained_shown()
        for name, slot in self.slots.items():
            slot.put(masters[name])

    # -- several processes --------------------------------------------------------------------------------------------

    def synchronize(self) -> None:
        """Give every rank the mean of the compact gradients, for whatever looks at them before `step()`.

        It happens by itself at the end of each backward pass and, at the latest, in `step()`; nothing where it has
        happened since the last gradient. Gradients of sharded weights are averaged by who sharded them.
        """
        self.averaging.synchronize()

    def no_sync(self) -> AbstractContextManager[None]:
        """Within the block backward passes send nothing: the first ones of an accumulation, where no
        DistributedDataParallel (whose own `no_sync()` counts too) is around the model.
        """
        return self.averaging.no_sync()

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self.averaging.done = False

    def ignore_in_ddp(self, module: nn.Module) -> None:
        """Keep the trained weights out of the buckets of a DistributedDataParallel made around `module` afterwards.

        Needed only where that is a larger module than the one the optimizer was made for.
        """
        self._marks.append(ignore_in_ddp(module, [param for slot in self.slots.values() for param in slot.params]))

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale the gradients down to this 2-norm over all of them; returns the norm that they had.

        `nn.utils.clip_grad_norm_(optimizer.trainable(), max_norm)` does the same, but where weights are sharded: it
        sees this rank's part alone.
        """
        self.synchronize()
        pairs = [(slot, slot.proxy.grad) for slot in self.slots.values() if slot.proxy.grad is not None]
        norm = nn.utils.get_total_norm([grad for slot, grad in pairs if slot.part is None])
        group = next((slot.part.group for slot in self.slots.values() if slot.part is not None), None)
        if group is not None:
            sharded = nn.utils.get_total_norm([grad for slot, grad in pairs if slot.part is not None])
            device = next(slot.proxy.device for slot in self.slots.values() if slot.part is not None)
            norm = (norm.to(device).square() + summed(sharded.to(device).square(), group)).sqrt()
        nn.utils.clip_grads_with_norm_([slot.proxy for slot, _ in pairs], max_norm, norm)
        return norm

    @torch.no_grad()
    def reselect(self) -> None:
        """Keep in training only entries whose magnitude is still below the threshold; the others stay where they are.

        Happens by itself at `reselect_at`.
        """
        if self.threshold is None:
            raise ConfigError("nothing to re-select by: the choice was not made by one threshold for the model")
        if not self.reset_state:
            check_moments(self.rule, {name: self.slots[name].proxy for name in self._grouped})
        step, of, bound = self.schedule.steps, self.live_parameters, self.threshold
        kept = {
            name: (self._showing.values(self.slots[name]).abs() < bound).nonzero().view(-1) for name in self._grouped
        }
        sizes = {name: self.slots[name].over_ranks(index.numel()) for name, index in kept.items()}
        left = sum(sizes.values())
        self.events.append({"event": "reselect", "step": step, "kept": left, "of": of})
        if left == 0:  # freezing everything would end the run with an error of autograd's; train on instead
            self.events[-1] |= {"kept": of, "note": "no entry is below the threshold; all stay in training"}
            return
        for name, index in kept.items():
            slot, size = self.slots[name], self.slots[name].proxy.numel()
            slot.narrow(index.to(torch.int32) if size < 2**31 else index)
            if self.reset_state:
                self.state.pop(slot.proxy, None)
            else:
                narrow_moments(self.rule, slot.proxy, size, index)
            if sizes[name] == 0 and name in self.capture.handles:
                self.capture.detach(slot)
        self.averaging.check()

    # -- the adapter in the model -------------------------------------------------------------------------------------

    def set_scale(self, scale: float) -> None:
        """Show the model as base + scale * change: 0 is the base bit for bit, 1 the trained weights bit for bit."""
        self._showing.set_scale(scale)

    def disabled(self) -> AbstractContextManager[None]:
        """Within the block the model is the base, bit for bit."""
        return self._showing.disabled()

    def delta(self, store: Literal["delta", "value"] = "delta", **metadata: Any) -> SparseDelta:
        """What training changed, as a sparse adapter: float32 changes, or the exact values in the weights' dtype."""
        return self._showing.delta(store, self.metadata | metadata)

    def save(self, path: str | PathLike[str], store: Literal["delta", "value"] = "delta", **metadata: Any) -> Path:
        """Write the adapter: `*.safetensors` gives one file, any other path an adapter directory.

        Where weights are sharded every rank must call it, and rank 0 writes.
        """
        adapter, path = self.delta(store, **metadata), Path(path)
        if rank() and any(slot.part is not None for slot in self.slots.values()):
            return path
        return adapter.save(path)

    def load(self, path: str | PathLike[str], scale: float = 1.0, force: bool = False) -> None:
        """Put a saved adapter in place of what was trained, shown at `scale` (0 to 2; more scale, more of the adapter).

        Entries of the file that this optimizer does not train are applied too and stay as they are. AdamW's moments
        start anew. Raises AdapterError where the file is broken or belongs to another base, unless forced.
        """
        self._showing.take(SparseDelta.load(Path(path)), force, self._untrained)
        self.state.clear()
        self.averaging.check()
        self.set_scale(scale)

    # -- resuming -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs besides the base model: plain tensors and numbers, safe for `weights_only`.

        Where weights are sharded every rank must call it, and each gets the state of the whole.
        """
        own = {
            "version": STATE_VERSION,
            "form": self.form,
            "rule": type(self.rule).__name__,
            "tensors": tensors_of(self.slots, self._showing),
            "grouped": list(self._grouped),
            "threshold": self.threshold,
            "steps": self.schedule.steps,
            "total_steps": self.schedule.total,
            "events": [dict(event) for event in self.events],
            "penalty": self.penalty.state_dict() if self.penalty is not None else None,
        }
        state = self.rule.state_dict()
        return {**state, "state": gathered_moments(state["state"], by_proxy(self.slots, self.rule)), "selective": own}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue bit for bit, re-selections included: the chosen entries and their values are the file's.

        Raises AdapterError when the state is not a selective optimizer's or belongs to another model or rule, and
        ConfigError after `close()`; then nothing is changed.
        """
        if not self._finalizer.alive:
            raise ConfigError("this optimizer was closed; make a new one to load a state into")
        named = named_weights(self.model)
        own = checked_state(state_dict, self.form, self.rule, named, self._grouped)
        self.set_scale(0.0)
        self._showing.settle()
        if self.in_backward is not None:
            self.in_backward.restart()
        for slot in self.slots.values():
            if slot.name in self.capture.handles:
                self.capture.detach(slot)
        slots = {name: self.slots.get(name) or self._untrained(name, named[name]) for name in own["tensors"]}
        put_back(slots, own["tensors"])
        self.slots.clear()
        self.slots.update(slots)
        self._grouped = list(own["grouped"])
        for name in self._grouped:
            if slots[name].count:
                self.capture.attach(slots[name])
        self.capture.slots, self.capture.spent = list(slots.values()), False
        if not several_groups(self.rule, state_dict):
            self.rule.param_groups[0]["params"] = self._proxies()
        # A copy: torch would take over the very tensors and change them in the next step.
        moments = scattered_moments(state_dict["state"], by_proxy(self.slots, self.rule), own["tensors"])
        self.rule.load_state_dict(copy.deepcopy({"state": moments, "param_groups": state_dict["param_groups"]}))
        self._follow_rule()
        self.threshold, self.events = own["threshold"], [dict(event) for event in own["events"]]
        self.metadata["threshold"] = self.threshold
        self.averaging.check()
        self.schedule.steps, self.schedule.total = own["steps"], own["total_steps"] or self.schedule.total
        if self.penalty is not None and own["penalty"] is not None:
            self.penalty.load_state_dict(own["penalty"])

    def close(self) -> None:
        """Remove the hooks and let the model's parameters require gradients as before; the trained weights stay."""
        self._finalizer()

    def __getstate__(self) -> dict[str, Any]:
        raise ConfigError(
            "a selective optimizer belongs to its model and can be neither copied nor pickled; make a new one on the "
            "copy of the model and give it state_dict()"
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only for torch's own constructor: what is trained is chosen once, from the model."""
        if "_finalizer" in self.__dict__:
            raise ConfigError(
                "a selective optimizer takes no further groups; give other parameters to an optimizer of their own, "
                "and call requires_grad_(True) on them, since making this one has frozen them"
            )
        super().add_param_group(param_group)

    # -- parts --------------------------------------------------------------------------------------------------------

    def _follow_rule(self) -> None:
        """Groups and moments are the rule's own, so schedulers that change ours change the rule's."""
        self.update = Update(self.rule)
        if self.update.per_tensor:
            for slot in self.slots.values():
                slot.hollow()
        self.param_groups, self.state = self.rule.param_groups, self.rule.state

    def _check_in_reach(self) -> None:
        """ModelError where no gradient can arrive any more, for which steps would change nothing and say nothing."""
        present = {id(param) for param in self.model.parameters()}
        slots = [slot for slot in self.slots.values() if slot.name in self.capture.handles]
        if slots and not any(id(param) in present for slot in slots for param in slot.params):
            raise ModelError(
                f"'{slots[0].name}' is another Parameter than when the optimizer was made, which therefore trains "
                "nothing; load weights without assign=True, or make the optimizer afterwards"
            )
        if slots and not any(param.requires_grad for slot in slots for param in slot.params):
            raise ModelError(
                f"'{slots[0].name}' and all other trained weights were frozen after the optimizer was made, e.g. by "
                "requires_grad_(False) or PEFT; do that first, then make the optimizer"
            )

    def _untrained(self, name: str, param: nn.Parameter) -> Slot:
        """A slot of a weight that this optimizer did not choose, with no entry yet."""
        empty = torch.zeros(0, dtype=torch.int32 if param.numel() < 2**31 else torch.int64, device=param.device)
        return slot_of(Target((name,), (param,), ()), empty, self.form, self.update.per_tensor)


def _let_go(
    handles: dict[str, Any],
    trainable: Iterable[nn.Parameter],
    restore: Callable[[], None] | None,
    marks: Iterable[Callable[[], None]],
) -> None:
    """Give the model back as it was: no hooks, no marks for DistributedDataParallel, gradients where there were."""
    release(handles, trainable, restore)
    for undo in marks:
        undo()


def _listed(patterns: Patterns) -> list[str] | None:
    return None if patterns is None else [patterns] if isinstance(patterns, str) else list(patterns)
