"""What the benchmark of all weight parameterizations found, as tables: each where its result file is, else nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fallow import catalogue

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
NETWORKS = ("transformer", "transformer-bf16", "unet")


def filled(markdown: str, results: Path = RESULTS) -> str:
    """A page's text with tables in the place of its marks, `<!-- figures: unet -->` and the like."""
    for name, make in MAKERS.items():
        mark = f"<!-- figures: {name} -->"
        if mark in markdown:
            markdown = markdown.replace(mark, "\n".join(make(results)) or "These figures were not taken.")
    return markdown


def _found(results: Path, start: str, model: str = "") -> dict[str, Any]:
    """The last result file whose name begins so, of this network; {} where there is none."""
    files = sorted(results.glob(f"{start}*.json"), reverse=True)
    runs = (json.loads(path.read_text(encoding="utf-8")) for path in files)
    return next((run for run in runs if not model or run.get("model") == model), {})


def times(model: str) -> Callable[[Path], Iterator[str]]:
    def table(results: Path) -> Iterator[str]:
        run = _found(results, "deltas-", model)
        if not run:
            return
        loads = [case["load"] for case in run["cases"] if "load" in case]
        turns = [len(case["each"]) for case in run["cases"] if "each" in case]
        versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        yield (
            f"{run['hardware']}, {run['threads']} thread; {versions}. {min(turns)} turns or more, while the "
            f"machine did other things (load {min(loads):.0f} to {max(loads):.0f})."
        )
        yield ""
        yield "| method | layers | trained | LoRA's rank | its trained | time | peak | PEFT's own: time | peak |"
        yield "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
        yield from map(_time_row, run["cases"])
        deltas = {card.slug for card in catalogue.methods() if card.ready and card.idea == "delta"}
        ready = deltas - {"peft"} | {"shira"}
        if left := sorted(ready - {case["method"] for case in run["cases"]}):
            yield ""
            yield f"Not measured on this network yet: {', '.join(left)}."

    return table


def _time_row(case: dict[str, Any]) -> str:
    if "refused" in case:
        return f"| {case['variant']} | refused: {case['refused']} | | | | | | | |"
    layers = f"{case['layers']}, some conv" if case["convolutions"] else str(case["layers"])
    cells = [case["variant"], layers, f"{case['trained']:,}"]
    others = {other["kind"]: other for other in case["against"]}
    lora = others.get("lora")
    own = lora if case["variant"] == "lora" else others.get("own")
    cells += [lora["name"].partition("r=")[2], f"{lora['trained']:,}", *_ratios(lora)] if lora else [""] * 4
    cells += _ratios(own) if own else [""] * 2
    return f"| {' | '.join(cells)} |"


def _ratios(other: dict[str, Any]) -> list[str]:
    return [f"{other['time_ratio']:.2f}", f"{other['peak_ratio']:.2f}"]


def setting_up(results: Path) -> Iterator[str]:
    run = _found(results, "deltas-setup-")
    if not run:
        return
    loads = [row["load"] for row in run["attaching"]]
    yield f"{run['hardware']}; load {min(loads):.0f} to {max(loads):.0f}; the least of {run['repeats']} turns, seconds."
    yield ""
    two = any("threads 2" in row for row in run["attaching"])
    yield "| method | one thread | PEFT's own |" + (" two threads, both together | on the clock |" if two else "")
    yield "| --- | ---: | ---: |" + (" ---: | ---: |" if two else "")
    for row in run["attaching"]:
        one, both = row["threads 1"], row.get("threads 2", {}).get("ours", {})
        times = [one["ours"]["processor"], one.get("peft", {}).get("processor")]
        times += [both.get("processor"), both.get("wall")] if two else []
        cells = [row["variant"], *("" if seconds is None else f"{seconds:.2f}" for seconds in times)]
        yield f"| {' | '.join(cells)} |"


def errors(results: Path) -> Iterator[str]:
    run = _found(results, "deltas-setup-")
    if not run:
        return
    yield "| decomposition | matrix | residual | singular values | orthogonality |"
    yield "| --- | --- | ---: | ---: | ---: |"
    for name, shapes in run["errors"].items():
        for shape, found in shapes.items():
            cells = [f"{found[key]:.1e}" if key in found else "" for key in ("residual", "values", "orthogonal")]
            yield f"| {' | '.join([name, shape, *cells])} |"


def lengths(results: Path) -> Iterator[str]:
    run = _found(results, "deltas-lines")
    if not run:
        return
    yield f"| method | lines | of code | PEFT {run['peft']} | of code |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    for row in run["methods"]:
        peer = row.get("peft")
        theirs = [f"{peer['lines']:,} ({', '.join(peer['parts'])})", f"{peer['code']:,}"] if peer else ["", ""]
        yield f"| {' | '.join([row['method'], str(row['lines']), str(row['code']), *theirs])} |"
    for part, counts in run["shared"].items():
        yield f"| shared by all: `{part}` | {counts['lines']:,} | {counts['code']:,} | | |"


MAKERS: dict[str, Callable[[Path], Iterator[str]]] = {
    **{name: times(name) for name in NETWORKS},
    "setup": setting_up, "errors": errors, "lines": lengths,
}  # fmt: skip
