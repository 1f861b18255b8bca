"""`fallow.probe`: one pass over some batches that gathers what starts, budgets and objectives need to know beforehand.

    stats = fallow.probe(model, batches, want={"gradient", "input_covariance"})
    fallow.attach(model, "lora", rank=8, start=fallow.LoRAGA(stats))

    gradient           mean of dL/dW over the batches                           LoRA-GA, LoRA-SB
    input_covariance   C = 1/K sum Xᵀ X of a layer's inputs                     CorDA
    activation         principal components of a layer's inputs                 EVA
    fisher             mean of squared gradients                                LoKU (FILA)
    contribution       integrated gradients between two states of a model       CoLoRA
    spectrum           singular values of the weights                           LaMDA++

Hooks take what they need layer by layer and are gone afterwards, also after an error; the model is as it was.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from fallow.core.distributed import rank
from fallow.core.errors import ModelError
from fallow.core.host.targets import Targets
from fallow.core.probing.batches import Loss, default_loss
from fallow.core.probing.contribution import check_tuned
from fallow.core.probing.files import cached, key_of, result_at, state_at
from fallow.core.probing.layers import Layer, layers_of
from fallow.core.probing.memory import Bytes, bytes_of, refuse_above
from fallow.core.probing.of_targets import Aggregate, gradients
from fallow.core.probing.options import Options, check, options_of, wanted
from fallow.core.probing.ranks import all_agree, gathered
from fallow.core.probing.results import results
from fallow.core.probing.run import Keeping, Run
from fallow.core.probing.source import Source, digest_of
from fallow.core.probing.watching import Watching
from fallow.core.statistics import Statistics

__all__ = ["Aggregate", "Loss", "default_loss", "gradients", "probe", "probe_bytes"]


def probe(
    model: nn.Module,
    batches: Any,
    want: str | Iterable[str],
    loss: Loss | None = None,
    targets: Targets = "all-linear",
    exclude: Targets | None = None,
    **options: Any,
) -> Statistics:
    """Statistics of the layers of a model over some batches, {name of a layer: what was found}; the model is unchanged.

    `batches`: a list or loader of batches, an iterator, or a function that returns one. A batch is a dict, whose loss
    is `model(**batch).loss`; a pair (inputs, class numbers), whose loss is the cross entropy of `model(inputs)`; a
    tensor, where no loss is needed; a function of the model that returns the loss; or what `loss(model, batch)` takes,
    which returns a scalar. Its tensors are moved to the model's device. For "spectrum" alone `batches` may be None.
    `want`: see `fallow.core.probe`. `targets`, `exclude`: as those of `fallow.attach`. `options`: the fields of
    `fallow.core.probing.options.Options`.

    Layers of which something asked for was not seen are in `.missing`. Of several processes each gives batches of its
    own, and all get what was found in all of them. ConfigError, ModelError, DataError, by name, for what cannot be; the
    cache is written only when everything is there.
    """
    asked, o = wanted(want), options_of(options)
    layers = _checked(model, asked, o, targets, exclude)
    source = Source(() if batches is None and asked == {"spectrum"} else batches, o.max_batches)
    if o.passes > 1:
        source.needed_again(f"passes={o.passes}")
    run = Run(model, layers, asked, loss, o)
    folder = None if o.cache is None else Path(o.cache)
    if folder is None:
        _go(run, layers, source, None)
        return results(run, layers, asked)
    digests = _digests(source, o)
    known = gathered(digests if o.data is None else o.data)
    key = key_of(model, known, [layer.name for layer in layers], asked, loss, o)
    found = cached(folder, key)
    if all_agree(found is not None) and found is not None:
        return found
    state = state_at(folder, key)
    _go(run, layers, source, Keeping(state, key, digests))
    made = results(run, layers, asked, key)
    if rank() == 0:
        made.save(result_at(folder, key))
    state.unlink(missing_ok=True)
    return made


def probe_bytes(
    model: nn.Module,
    want: str | Iterable[str],
    targets: Targets = "all-linear",
    exclude: Targets | None = None,
    **options: Any,
) -> Bytes:
    """How many bytes `probe` of the same arguments keeps at most, beside the model; nothing runs. Errors as there."""
    asked, o = wanted(want), options_of(options)
    check(asked, o)
    return bytes_of(model, layers_of(model, targets, exclude), asked, o)


def _checked(
    model: nn.Module, asked: frozenset[str], o: Options, targets: Targets, exclude: Targets | None
) -> list[Layer]:
    """The layers, after all that can be wrong beforehand."""
    check(asked, o)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ModelError("the model is within DistributedDataParallel; give fallow.probe the module inside, `.module`")
    layers = layers_of(model, targets, exclude)
    if o.tuned is not None:
        check_tuned(model, layers, o.tuned)
    refuse_above(o.limit, bytes_of(model, layers, asked, o))
    return layers


def _digests(source: Source, o: Options) -> list[str] | None:
    """Of all batches, which are read through once; None where the user names them."""
    if o.data is not None:
        return None
    source.needed_again("cache=, which knows batches by their values,")
    return [digest_of(batch) for batch in source]


def _go(run: Run, layers: list[Layer], source: Source, keeping: Keeping | None) -> None:
    if run.want == {"spectrum"}:
        return
    needed = bytes_of(run.model, layers, run.want, run.options)
    watching = Watching(str(needed), source.length, run.options.passes) if run.options.progress else nullcontext()
    with watching as bar:
        run(source, keeping, bar.step if bar is not None else lambda turn, done: None)
