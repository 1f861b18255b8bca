"""The probes of selective methods, where something else is to be done than with a Delta."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from capability_probes import (
    NotApplicable,
    Refused,
    Tied,
    Tried,
    adapts,
    change,
    compiled,
    differs,
    same,
    two,
    with_the_same_gradients,
)
from delta_checks import Case
from entries_hosts import OwnEntries, PeftEntries
from torch import Tensor

import fallow
from fallow.core.sparse import combine


def not_applicable(why: str) -> Callable[[Tried], None]:
    def probe(tried: Tried) -> None:
        raise NotApplicable(why)

    return probe


def files(tried: Tried) -> tuple[Case, list[Path], list[Tensor]]:
    """Two adapters in files, and what each says."""
    case = tried.linear()
    said = []
    paths = [case.folder / "one", case.folder / "two"]
    for seed, path in enumerate(paths):
        model = case.attach(case.fresh(), seed=seed)
        said.append(case.says(model))
        case.host.save(model, path)
    return case, paths, said


def unloaded(tried: Tried) -> str:
    case, (path, _), (said, _) = files(tried)
    model = case.fresh()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapters = fallow.Adapters(model)
    adapters.add("one", path)
    same(case.says(model), said, atol=1e-5)
    adapters.unload()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return "fallow.Adapters.unload()"


def several_files(tried: Tried) -> str:
    case, paths, _ = files(tried)
    model = case.fresh()
    adapters = fallow.Adapters(model)
    adapters.add("one", paths[0])
    alone = case.says(model)
    adapters.add("two", paths[1])
    adapters.switch("two")
    differs(case.says(model), alone)
    adapters.switch("one")
    assert torch.equal(case.says(model), alone)
    adapters.remove("two")
    assert torch.equal(case.says(model), alone)
    return "fallow.Adapters"


def files_together(tried: Tried) -> str:
    case, paths, said = files(tried)
    model, base = case.fresh(), case.fresh()
    adapters = fallow.Adapters(model)
    for path in paths:
        adapters.add(path.name, path)
    for one in said:
        differs(case.says(model), one)
    changes = [fallow.SparseDelta.load(path) for path in paths]
    for name, weight in base.named_parameters():
        for delta in changes:
            if name in delta.entries:
                entry = delta.entries[name]
                weight.data.view(-1).index_add_(0, entry.index.long(), entry.values)
    same(case.says(model), case.says(base), atol=1e-5)
    return "fallow.Adapters"


def combined(tried: Tried) -> str:
    case, paths, _ = files(tried)
    deltas = [fallow.SparseDelta.load(path) for path in paths]
    one, other = case.fresh(), case.fresh()
    fallow.Adapters(one).add("sum", combine([(deltas[0], 0.5), (deltas[1], 2.0)]))
    both = fallow.Adapters(other)
    both.add("one", deltas[0], 0.5)
    both.add("two", deltas[1], 2.0)
    same(case.says(one), case.says(other), atol=1e-5)
    return "fallow adapter combine"


def tied_entries(tried: Tried) -> None:
    adapts(tried.case(Tied, (2, 5), ["tokens"]))


def compiled_in_parts(tried: Tried) -> None:
    """Values are written into the weight before a forward, and checked before its backward: graphs break there."""
    try:
        compiled(tried)
    except torch._dynamo.exc.TorchDynamoException:
        torch._dynamo.reset()
        with_the_same_gradients(tried, lambda model, x: torch.compile(model, backend="aot_eager")(x))
        raise Refused(
            "it writes into the weight before each forward; without fullgraph it compiles, in parts"
        ) from None


def added_entries(tried: Tried) -> str:
    _, model, _ = two(tried)
    model.base_model.add_weighted_adapter(["default", "other"], [0.5, 2.0], "sum", "linear")
    same(change(model, "sum"), 0.5 * change(model, "default") + 2.0 * change(model, "other"), atol=1e-5)
    return "linear, the one sum of chosen entries"


ONE_WEIGHT = "the change stands in the weight, which serves the whole batch"
NO_RANK = "chosen entries have no rank"
CONVERTED = "chosen entries are of no low rank; `fallow adapter convert --rank` comes near"
OF_BOTH = {
    "fused": not_applicable("chosen entries of a fused weight are entries like all others"),
    "resize": not_applicable(NO_RANK),
    "lora": not_applicable(CONVERTED),
}
OTHERWISE: dict[type, dict[str, Callable[[Tried], str | None]]] = {
    OwnEntries: {
        **OF_BOTH,
        "tied": tied_entries,
        "merge": not_applicable("it trains in place: the weight holds the change from the first step on"),
        "unmerge": unloaded,
        "several": several_files,
        "together": files_together,
        "mixed": not_applicable(ONE_WEIGHT),
        "hotswap": not_applicable("fallow.Adapters shows another file in the same weights: switch()"),
        "sum": combined,
        "sum_cut": not_applicable("sums of chosen entries are exact; nothing is cut"),
        "merge_coded": not_applicable("the entries stand beside the code, which stays"),
    },
    PeftEntries: {**OF_BOTH, "sum": added_entries, "compile": compiled_in_parts},
}
