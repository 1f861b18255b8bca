"""`report.html` of a run: what was trained, what it cost, what it draws now.

Reads only the files of the run directory (config.toml, run.json, metrics.jsonl, samples/, evaluation/), so that a
page can be made again at any time, also of a run that was stopped or failed. Whatever is missing is left out of the
page.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fallow.core.errors import DataError
from fallow.report import plots
from fallow.report.page import count, data_size, duration, figure, percent, picture_fit, picture_uri, render

MOST_SAMPLES = 12  # pictures of the training's progress on the page; the others stay in samples/

# A layer's kind, by its name; the first that matches. Names of diffusers' UNets and transformers, then of others.
KINDS: list[tuple[str, str]] = [
    ("self-attention", r"\.attn1\.|self_attn|\.attn\.|attention\.self"),
    ("cross-attention", r"\.attn2\.|cross_attn|encoder_attn|add_[kqv]_proj|to_add_out"),
    ("feed-forward", r"\.ff\.|\.ff_context\.|\.mlp\.|feed_forward|\.fc[12]\."),
    ("time embedding", r"time_emb|time_embedding|time_text_embed"),
    ("norm", r"norm|\.ln_|layernorm"),
    ("convolution", r"conv|resnets|samplers"),
    ("projection", r"proj"),
    ("embedding", r"embed"),
]


@dataclass
class Run:
    """A run directory, read; every part may be missing."""

    folder: Path
    info: dict[str, Any] = field(default_factory=dict)
    config: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    evaluation: dict[str, Any] | None = None
    broken: list[str] = field(default_factory=list)  # what could not be read, said on the page

    def series(self, name: str) -> tuple[list[int], list[float | None]]:
        """Steps and values of one logged figure; lines without it are left out."""
        lines = [line for line in self.metrics if name in line]
        return [int(line["step"]) for line in lines], [_number(line[name]) for line in lines]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def read_run(folder: str | Path) -> Run:
    """Read a run directory. Raises DataError where it does not exist or holds none of a run's files."""
    folder = Path(folder)
    run = Run(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; give the directory of a run, with its config.toml and metrics.jsonl")
    if not any((folder / name).exists() for name in ("config.toml", "run.json", "metrics.jsonl", "samples")):
        raise DataError(f"{folder} is not a run: it has no config.toml, run.json, metrics.jsonl or samples")

    def read_json(name: str) -> dict[str, Any]:
        try:
            found = json.loads((folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            run.broken.append(f"{name} cannot be read ({error})")
            return {}
        return found if isinstance(found, dict) else {}

    run.info = read_json("run.json")
    run.evaluation = read_json("evaluation/evaluation.json") or None
    try:
        run.config = (folder / "config.toml").read_text(encoding="utf-8")
        run.settings = tomllib.loads(run.config)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        run.broken.append(f"config.toml cannot be read ({error})")
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    lost = 0
    for line in lines:
        try:
            entry = json.loads(line)
            entry["step"] = int(entry["step"])
        except (ValueError, TypeError, KeyError):
            lost += bool(line.strip())  # a run that was killed leaves half a line
            continue
        (run.events if "event" in entry else run.metrics).append(entry)
    if lost:
        run.broken.append(f"{lost} line{'s' if lost > 1 else ''} of metrics.jsonl could not be read")
    return run


# The parts of a pipeline that names begin with where more than one is trained.
PARTS = r"unet|transformer|text_encoder(_\d+)?"


def block_of(name: str) -> str:
    """The block of the network a parameter belongs to: `down_blocks.0`, `conv_in`, `unet.conv_in` of several parts."""
    part, dot, rest = name.partition(".")
    if dot and re.fullmatch(PARTS, part):
        return f"{part}.{block_of(rest)}"
    parts = name.split(".")
    for depth, part in enumerate(parts[1:], start=1):
        if part.isdigit():
            return ".".join(parts[: depth + 1])
        if depth == 2:
            break
    return parts[0]


def kind_of(name: str) -> str:
    """The kind of layer a parameter belongs to, by its name."""
    dotted = f".{name}."
    return next((kind for kind, pattern in KINDS if re.search(pattern, dotted)), "other")


@dataclass
class Share:
    """So many parameters of a part of the network are trained."""

    name: str
    trained: int
    numel: int
    tensors: int

    @property
    def share(self) -> float:
        return self.trained / self.numel if self.numel else 0.0


def _grouped(where: dict[str, tuple[int, int]], group: Any) -> list[Share]:
    groups: dict[str, Share] = {}
    for name, (trained, numel) in where.items():
        part = groups.setdefault(group(name), Share(group(name), 0, 0, 0))
        part.trained, part.numel, part.tensors = part.trained + trained, part.numel + numel, part.tensors + 1
    return list(groups.values())


def _depth_order(part: Share) -> tuple[int, list[Any]]:
    """From the input to the output of a UNet; others by their numbers."""
    order = ("conv_in", "time_", "down_", "mid_", "up_", "conv_norm_out", "conv_out")
    name = part.name.removeprefix("unet.")
    place = next((i for i, start in enumerate(order) if name.startswith(start)), len(order))
    return place, [int(p) if p.isdigit() else -1 for p in part.name.split(".")]


def _trained_where(info: dict[str, Any]) -> dict[str, tuple[int, int]]:
    recorded = info.get("trained_where")
    if not isinstance(recorded, dict):
        return {}
    return {
        name: (int(pair[0]), int(pair[1]))
        for name, pair in recorded.items()
        if isinstance(pair, (list, tuple)) and len(pair) == 2
    }


def _picture(path: Path) -> dict[str, Any] | None:
    return None if (uri := picture_uri(path)) is None else {"uri": uri, "fit": picture_fit(path)}


def _progress(samples: Path) -> tuple[list[dict[str, Any]], int]:
    """The samples drawn during training, evenly thinned; and how many there are in all."""
    found = sorted(
        (int(match[1]), path)
        for path in (samples.glob("step-*.png") if samples.is_dir() else ())
        if (match := re.fullmatch(r"step-(\d+)", path.stem))
    )
    kept = found
    if len(found) > MOST_SAMPLES:
        last = len(found) - 1
        kept = [found[round(i * last / (MOST_SAMPLES - 1))] for i in range(MOST_SAMPLES)]
    shown = [{**picture, "step": step} for step, path in kept if (picture := _picture(path))]
    return shown, len(found)


def _headline(run: Run) -> list[tuple[str, str, str]]:
    """Label, figure, and a remark, for the tiles at the top; what was not recorded has no tile."""
    info, tiles = run.info, []
    trained, total = info.get("trained_parameters"), info.get("total_parameters")
    if trained is not None:
        remark = f"{percent(trained / total)} of {count(total)}" if total else ""
        tiles.append(("Trained parameters", count(trained), remark))
    if info.get("seconds") is not None:
        steps = info.get("steps")
        tiles.append(("Training time", duration(info["seconds"]), f"{steps:,} steps" if steps else ""))
    if info.get("seconds_per_step") is not None:
        each = info["seconds_per_step"]
        tiles.append(("Per step", duration(each), f"{1 / each:.3g} steps/s" if each else ""))
    if info.get("peak_memory_bytes"):
        told = str(info.get("memory_measured") or "while training")
        tiles.append(("Peak memory", data_size(info["peak_memory_bytes"]), told))
    if info.get("adapter_bytes"):
        remark = f"{info['adapter_bytes'] / trained:.2g} bytes per parameter" if trained else ""
        tiles.append(("Adapter", data_size(info["adapter_bytes"]), remark))
    losses = [value for value in run.series("loss")[1] if value is not None]
    if losses:
        tiles.append(("Loss at the end", figure(float(plots.smoothed(losses)[-1])), "moving average"))
    best = (info.get("validation") or {}).get("best") or {}
    if best.get("loss") is not None:
        tiles.append(("Validation loss", figure(float(best["loss"])), f"lowest, after step {best['step']:,}"))
    return tiles


def _curves(run: Run) -> Iterable[tuple[Any, str]]:
    """The figures of training and what they are called aloud; those without data are left out."""
    noted = [event for event in run.events if event.get("event") in ("reselect", "resume", "stop", "nan")]
    yield plots.loss_curve(*run.series("loss"), noted), "Loss over the steps"
    yield plots.curve(*run.series("lr"), title="Learning rate", label="learning rate", colour=1), "Learning rate"
    steps, memory = run.series("memory_bytes")
    mega = [None if value is None else value / 1e6 for value in memory]
    yield plots.curve(steps, mega, title="Memory", label="memory in use (MB)", colour=2), "Memory over the steps"
    yield (
        plots.curve(
            *run.series("grad_norm"), title="Gradient norm", label="norm before clipping", colour=3, noisy=True
        ),
        "Gradient norm over the steps",
    )
    told = [(event["step"], event.get("validation_loss")) for event in run.events if event.get("event") == "validation"]
    at, measured = [step for step, _ in told], [loss for _, loss in told]
    label = "loss on pictures held out"
    yield plots.curve(at, measured, title="Validation", label=label, colour=4, from_zero=False), "Validation loss"


def _told(event: dict[str, Any]) -> str:
    """What an event means, in words; unknown ones as their fields."""
    kept, of = event.get("kept"), event.get("of")
    if event.get("event") == "reselect" and isinstance(kept, int) and isinstance(of, int):
        share = percent(kept / of) if of else "–"
        return f"kept {kept:,} of {of:,} trained entries ({share}): those still below the threshold"
    rest = {k: v for k, v in event.items() if k not in ("event", "step", "time")}
    return ", ".join(f"{k} {v}" for k, v in rest.items())


def _title(run: Run) -> tuple[str, str, str]:
    info, settings = run.info, run.settings
    method = str(info.get("method") or settings.get("method") or "run")
    data = str(info.get("data") or settings.get("data") or run.folder.name)
    model = str(info.get("model") or settings.get("model") or "")
    return method, Path(data).name, Path(model).name


def write_run_report(folder: str | Path) -> Path:
    """Write `report.html` into the run directory `folder` and return its path.

    Raises DataError where `folder` is no run directory.
    """
    run = read_run(folder)
    samples = run.folder / "samples"
    where = _trained_where(run.info)
    blocks = sorted(_grouped(where, block_of), key=_depth_order)
    kinds = sorted(_grouped(where, kind_of), key=lambda part: -part.trained)
    method, data, model = _title(run)
    progress, progress_total = _progress(samples)
    bars = plots.block_bars([(b.name, b.trained, b.numel) for b in blocks]) if blocks else None
    prompts, command = run.info.get("prompts"), run.info.get("command")
    return render(
        "run.html",
        run.folder / "report.html",
        title=f"{method} on {data}",
        method=method,
        data=data,
        model=model,
        folder=run.folder.resolve().name,
        error=run.info.get("error"),
        threshold=run.info.get("threshold"),
        hardware=run.info.get("hardware"),
        versions=run.info.get("versions"),
        command=shlex.join(map(str, command)) if isinstance(command, list) else str(command or ""),
        status=str(run.info.get("status") or "unfinished"),
        tiles=_headline(run),
        before=_picture(samples / "before.png"),
        after=_picture(samples / "after.png"),
        examples=_picture(samples / "examples.png"),
        prompts=[str(prompt) for prompt in prompts] if isinstance(prompts, list) else [],
        progress=progress,
        progress_total=progress_total,
        curves=[plots.inline_svg(plot, label) for plot, label in _curves(run) if plot is not None],
        bars=plots.inline_svg(bars, "Trained share of each block") if bars else None,
        blocks=blocks,
        kinds=kinds,
        events=[(e["step"], str(e["event"]), _told(e)) for e in run.events if e.get("event") != "validation"],
        evaluation=run.evaluation,
        config=run.config,
        broken=run.broken,
    )
