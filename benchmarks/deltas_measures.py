"""How `deltas.py` measures: peak memory from the allocator's events, times of turns that contenders take."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from deltas_cases import Setting
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn

Term = Callable[[Any], Tensor | None]
Context = Callable[[nn.Module], AbstractContextManager[None]]


class Contender:
    """An adapted network and its step: forward, own term of the objective if it has one, backward, gradients freed.

    `peak`: the most bytes alive in the second step beyond the base's weights, by the allocator's events: adapter,
    activations, gradients, temporaries within kernels. `trained`: numbers.
    """

    def __init__(
        self,
        name: str,
        setting: Setting,
        config: PeftConfig,
        context: Context = lambda net: nullcontext(),
        term: Term = lambda net: None,
    ) -> None:
        self.name, self.setting, self.context, self.term = name, setting, context, term
        gc.collect()  # what an earlier profile has seen made must not be seen to go in this one
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            self.net: PeftModel = get_peft_model(setting.base(), config)
            self.step()
            with torch.profiler.record_function("the measured step"):
                self.step()
        self.trained: int = self.net.get_nb_trainable_parameters()[0]
        self.peak = peak_within(profile, "the measured step") - nbytes(setting.original)

    def step(self) -> None:
        with self.context(self.net):
            loss = self.setting.forward(self.net)
            extra = self.term(self.net)
            (loss if extra is None else loss + extra).backward()
        self.net.zero_grad(set_to_none=True)

    def timed(self) -> float:
        """Seconds of processor time of a step."""
        begun = time.process_time()
        self.step()
        return time.process_time() - begun


def nbytes(net: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*net.parameters(), *net.buffers()))


def peak_within(profile: Any, name: str) -> int:
    """The most bytes that were alive within the span of that name, of those allocated since profiling began."""
    events = profile.profiler.kineto_results.events()
    window = next(event for event in events if event.name() == name)
    first, last = window.start_ns(), window.start_ns() + window.duration_ns()
    alive = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        if event.start_ns() > last:
            break
        if event.start_ns() >= first:
            peak = max(peak, alive)
        alive += event.nbytes()
        if event.start_ns() >= first:
            peak = max(peak, alive)
    return peak


def turns(contenders: Sequence[Contender], repeats: int) -> list[list[float]]:
    """Seconds of each step of each contender, who take turns, forth and back. No garbage is collected meanwhile."""
    taken: list[list[float]] = [[] for _ in contenders]
    gc.disable()
    try:
        for count in range(repeats):
            order = range(len(contenders))
            for at in order if count % 2 == 0 else reversed(order):
                taken[at].append(contenders[at].timed())
    finally:
        gc.enable()
    return taken


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Of paired times: the median of the pairs' ratios, and the ratio of the fastest."""
    pairs = [one / other for one, other in zip(ours, theirs, strict=True)]
    return {"time_ratio": statistics.median(pairs), "time_ratio_of_fastest": min(ours) / min(theirs)}
