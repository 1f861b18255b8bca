"""SaRA: fine-tune the entries of the existing weights whose magnitude is smallest.

"SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation", arXiv 2409.06633.

    select     M = 1[|W0| < theta], one theta for the whole model; v = W0.flat[M], signed
    forward    W, unchanged: after construction the model is the base, bit for bit
    backward   dL/dv = (dL/dW).flat[M]; the dense dL/dW lives only until it is gathered
    low rank   g += lambda * (U Vᵀ).flat[M],   U S Vᵀ = W ⊙ M        (nuclear norm; after clipping, before AdamW)
    update     v = AdamW(v, g);  W.flat[M] = v
    progress   after T_p updates: M1 = M0 ∧ 1[|W| < theta]; what has grown stays where it is, moments go on

The smallest entries of a trained network contribute next to nothing (`fallow probe` shows it), yet become useful when
trained; the paper finds that prompts are followed better than after other selective methods. On mini-sd that did not
show (README, "Measured").

Departures from the official code, which the paper's text supports: the live weights keep their signs (the code writes
|v| into them), the low-rank term reaches the trained values, accumulation and clipping work, the re-selection loses
no step and keeps the moments (`reset_state=True` drops them, as one of the two official optimizers does), weight
decay is 0 (it would pull v back to where it started).
"""

from __future__ import annotations

import math
import pickle
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from fallow.core.compact import gather
from fallow.core.errors import AdapterError
from fallow.core.files import fingerprint
from fallow.core.select import Amount, Patterns, Selection, Target, choose, index_dtype, magnitude, plain_name
from fallow.core.sparse import Entry, SparseDelta
from fallow.objectives.nuclear import Mode, NuclearNorm
from fallow.selection.rules import Rule
from fallow.selection.selective import Selective

FRACTION = 0.05  # about the paper's main setting: 50 of the 860 million entries of Stable Diffusion 1.5


def smallest(targets: Sequence[Target], amount: Amount) -> Selection:
    """Select the entries with the smallest |W|, compared in float32."""
    return choose(targets, magnitude, amount)


def default_lr(threshold: float) -> float:
    """The paper's rule, fitted on Stable Diffusion 1.5 for thresholds of 2e-4 to 5e-3: 1e-3 * exp(-350 * threshold)."""
    return 1e-3 * math.exp(-350 * threshold)


def _lr_of(selection: Selection) -> float:
    assert selection.threshold is not None
    lr = default_lr(selection.threshold)
    if selection.threshold > 5e-3:
        warnings.warn(
            f"threshold={selection.threshold:.3g} is above the range (2e-4 to 5e-3) in which the paper fitted its "
            "rule for the "
            f"learning rate, which gives lr={lr:.2g} here; give lr=, e.g. 5e-4",
            stacklevel=4,
        )
    return lr


class SaRA(Selective):
    """Trains the smallest entries of a model's weights; put it in place of `torch.optim.AdamW(model.parameters())`.

    Args:
        model: the network; its parameters that require a gradient may be trained, all others stay frozen.
        threshold, fraction, budget: give one: |W| < threshold, a share of all entries, or their number; by default a
            share of 0.05. `optimizer.threshold` tells the bound that results.
        lr: step size; by default 1e-3 * exp(-350 * threshold), the paper's rule (with a cosine schedule over the run).
        betas, eps, weight_decay: AdamW's. Decay acts on the trained entries only.
        include, exclude: regular expressions on parameter names.
        rank_weight: lambda of the nuclear-norm term; 0 turns it off, the paper's best is 5e-3 (1e-4 to 1e-2; larger
            keeps the prompt better and learns the new domain less).
        rank_layers: "one" random layer a step, "all", or a number of them; rank_mode: "polar" or the exact "svd".
        rank_min_side, rank_min_selected, rank_convs: which layers the term takes: matrices whose smaller side exceeds
            64 with at least 101 selected entries; convolutions, as (C_out, C_in * kh * kw), only if asked.
        reselect_at: steps (or shares of `total_steps`) after which to re-select; the paper re-selects once, at half.
        reset_state: drop AdamW's moments at a re-selection.
        rule: another torch optimizer in place of AdamW, e.g. `lambda groups: torch.optim.SGD(groups, momentum=0.9)`.
        row_chunk, in_backward, state_bits: less memory, each with its price; see `Selective`.
        seed: of the choice of layers.

    Raises SelectionError, ConfigError or ModelError, before the model is touched.

        optimizer = fallow.SaRA(model, fraction=0.05, rank_weight=5e-3, reselect_at=0.5, total_steps=1000)
        loss.backward(); optimizer.step(); optimizer.zero_grad()
        optimizer.save("style.safetensors")
    """

    def __init__(
        self,
        model: nn.Module,
        threshold: float | None = None,
        fraction: float | None = None,
        budget: int | None = None,
        lr: float | None = None,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        include: Patterns = None,
        exclude: Patterns = None,
        rank_weight: float = 0.0,
        rank_layers: int | str = "one",
        rank_mode: Mode = "polar",
        rank_min_side: int = 64,
        rank_min_selected: int = 101,
        rank_convs: bool = False,
        reselect_at: Iterable[int | float] | int | float = (),
        total_steps: int | None = None,
        reset_state: bool = False,
        rule: Rule | None = None,
        row_chunk: int | str | None = None,
        in_backward: bool = False,
        state_bits: Literal[8, 32] = 32,
        seed: int = 0,
    ) -> None:
        if threshold is None and fraction is None and budget is None:
            fraction = FRACTION
        # Made also where the term is off, so that a mistake in its options is told; nan and negative weights too.
        penalty = NuclearNorm(
            rank_weight if rank_weight != 0 else 1.0,
            rank_layers, rank_mode, rank_min_side, rank_min_selected, rank_convs, seed,
        )  # fmt: skip
        super().__init__(
            model,
            smallest,
            lr=_lr_of if lr is None else lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            threshold=threshold,
            fraction=fraction,
            budget=budget,
            include=include,
            exclude=exclude,
            penalty=penalty if rank_weight != 0 else None,
            reselect_at=reselect_at,
            total_steps=total_steps,
            reset_state=reset_state,
            rule=rule,
            row_chunk=row_chunk,
            in_backward=in_backward,
            state_bits=state_bits,
            metadata={"method": "sara", "rank_weight": rank_weight, "rank_layers": rank_layers, "lr": lr, "seed": seed},
        )

    @staticmethod
    def from_official(path: str | Path, model: nn.Module) -> SparseDelta:
        """Read a checkpoint of the official code (its optimizer's `save_params()`, written by torch.save).

        The file is {"threshold": theta, 0: values, 1: ...}: by position in `model.parameters()`, without indices; which
        entries are meant follows from |W0| < theta, so `model` must be the very base, in the dtype of the training.
        Read with `weights_only=True`, so nothing in it is executed. Returns an adapter to save, load or combine.
        Raises AdapterError where the file is broken, or the model has other numbers of small entries.
        """
        try:
            held = torch.load(path, map_location="cpu", weights_only=True)
            threshold = float(held["threshold"])
        except (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
            raise AdapterError(f"{path} is no checkpoint of the official SaRA code: {error}") from None
        named = [(plain_name(name), param) for name, param in model.named_parameters()]
        if set(held) - {"threshold"} != set(range(len(named))):
            raise AdapterError(
                f"{path} holds {len(held) - 1} parameters, {type(model).__name__} has {len(named)}; give the network "
                "that was trained (the UNet alone)"
            )
        entries = {}
        for position, (name, param) in enumerate(named):
            index = (
                (param.detach().reshape(-1).abs() < threshold).nonzero().view(-1).cpu().to(index_dtype(param.numel()))
            )
            if index.numel() != held[position].numel():
                raise AdapterError(
                    f"{path} holds {held[position].numel()} entries of '{name}', where this model has {index.numel()} "
                    f"below {threshold}; give the base it was trained on, in the same dtype"
                )
            if index.numel():
                change = held[position].detach().float().view(-1) - gather(param, index.to(param.device)).float().cpu()
                dtype = str(param.dtype).removeprefix("torch.")
                entries[name] = Entry(index, change, tuple(param.shape), dtype, fingerprint(param))
        return SparseDelta(entries, "delta", {"method": "sara", "threshold": threshold, "from": "official checkpoint"})
