"""`fallow train` and `fallow compare`: their flags are the fields of TrainConfig and CompareConfig."""

from __future__ import annotations

import shlex
import sys
from json import loads as load
from pathlib import Path
from typing import Any

import typer

from fallow.cli import flags, show
from fallow.core.errors import ConfigError

TRAIN_HELP = """Adapt a text-to-image model to a folder of pictures.

Without arguments: SaRA on the model and a style set that ship with Fallow, in minutes on a CPU. Settings come from
--config and from flags, and flags win. The run directory holds the resolved config.toml, which runs it again.
"""
TRAIN_EXAMPLE = (
    "Example: [bold]fallow train --data my-pictures --method sara --fraction 0.05 --steps 500[/]\n\n"
    "Pictures with captions in metadata.jsonl, or in a .txt beside each, or one --prompt for all."
)
OWN_ARGUMENTS = "The method's own arguments (each the same as --option KEY=VALUE)"
# The headings of `fallow train --help`, each with its settings.
HEADINGS = {
    "Model, pictures, method": "model data concepts prompt method output seed device",
    "Training": "lr lr_blocks optimizer optimizer_options steps batch_size accumulation schedule warmup max_grad_norm "
    "train_text_encoder ema ema_decay",
    "Pictures and clips": "resolution bucket flip frames",
    "Captions": "caption_dropout shuffle_caption keep_tokens tag_dropout wildcards trigger_phrase caption_prefix "
    "caption_suffix",
    "Masks": "masks alpha_mask unmasked_weight normalize_masked_loss",
    "Prior preservation": "class_data class_prompt class_images prior_weight",
    "Validation": "validation validation_share validation_every validation_draws keep_best",
    "Memory and speed": "precision gradient_checkpointing low_memory base_precision block_swap fused_step",
    "Loss and noise": "loss huber_delta huber_schedule min_snr debiased_estimation noise_offset "
    "multires_noise_iterations multires_noise_discount ip_noise_gamma timestep_min timestep_max zero_terminal_snr "
    "prediction timestep_density timestep_weighting",
    "Drawings, checkpoints, what the adapter says": "samples sample_prompts sample_every sample_steps guidance "
    "save_every keep log_every metadata",
}
COMPARE_HELP = "Train several methods on the same pictures, each at its own learning rates, and judge them alike."
COMPARE_EXAMPLE = "Example: [bold]fallow compare --methods sara,lora,full --seeds 0,1[/]"


def register(app: typer.Typer) -> None:
    """Announce the two commands; the real ones, with all flags, are made when one of them is called."""
    for name, help in (("train", TRAIN_HELP), ("compare", COMPARE_HELP)):
        app.command(name, help=help)(lambda: None)


def train_command() -> Any:
    """The command `train`, with a flag for every field of TrainConfig."""
    from fallow.recipes.train_config import TrainConfig

    path = flags.option("config", Path | None, "--config", "-c", help="A TOML file with settings; flags win over it.")
    resume = flags.option("resume", Path | None, "--resume", help="Go on with this run from its last checkpoint.")
    json = flags.option("json", bool, "--json", help="Print the result as JSON, and nothing else on stdout.")
    processes = flags.option(
        "processes",
        int | None,
        "--processes",
        metavar="<int>",
        help="Share each batch between so many processes on this machine, one to a GPU (default: 1).",
    )
    pairs = flags.option(
        "option",
        list[str] | None,
        "--option",
        "-O",
        metavar="KEY=VALUE",
        help="An argument of the method's own; repeatable.",
    )
    direct = [
        flags.option(name, str | None, f"--{name}", help=help, metavar=metavar, panel=OWN_ARGUMENTS)
        for name, metavar, help in (
            ("fraction", "<float>", "Share of the entries to train, above 0 and at most 1."),
            ("threshold", "<float>", "Train the entries smaller than this."),
            ("budget", "<int|str>", "Train this many entries; or how ranks are shared out (eva, lamda ...)."),
            ("rank", "<int>", "Rank, of methods that have one (lora)."),
            ("start", "<str>", "Where low-rank factors start: pissa, milora, lora-ga, corda, eva ..."),
            ("mask", "<str>", "Which mask SHiRA trains: snip, wm, grad, rand or struct."),
        )
    ]
    return flags.command_from(
        TrainConfig,
        run_train,
        [path, resume, json, processes, pairs, *direct],
        name="train",
        help=TRAIN_HELP,
        epilog=TRAIN_EXAMPLE,
        hidden=["options"],
        panels={field: heading for heading, names in HEADINGS.items() for field in names.split()},
    )


def run_train(
    given: dict[str, Any],
    *,
    config: Path | None,
    resume: Path | None,
    json: bool | None,
    processes: int | None,
    option: list[str] | None,
    **direct: str | None,
) -> None:
    """Train, then say where everything is and what it took."""
    from fallow.recipes import processes as shared
    from fallow.recipes.text_to_image import train
    from fallow.recipes.train_config import TrainConfig

    own = flags.key_values(option or []) | {
        name: flags.literal(value) for name, value in direct.items() if value is not None
    }
    if own:
        given["options"] = own
    if resume is not None and config is not None:
        raise ConfigError(
            "--resume and --config are both given; a run goes on with its own config.toml, so leave --config out"
        )
    if resume is not None:
        given["resume"] = resume
    settings = flags.make_config(TrainConfig, given, config)
    if processes is not None and not shared.started():
        shared.check_count(processes, settings.device)
        if processes > 1:
            ended = shared.launch(processes, sys.argv[1:], debug="--debug" in sys.argv)
            if ended.code:
                show.error(ended.message, title=ended.title)
            raise typer.Exit(ended.code)
    with show.only_json(bool(json)):
        outcome = train(settings, console=show.console(stderr=True), command=flags.command_line())
    if outcome.main:
        show_run(outcome, bool(json))


def show_run(outcome: Any, json: bool) -> None:
    """What a finished run has made, and how to go on from it."""
    info = outcome.info
    if json:
        places = {"folder": outcome.folder, "adapter": outcome.adapter, "report": outcome.report}
        show.result({**places, **{name: value for name, value in info.items() if name != "trained_where"}})
        return
    trained, total = info["trained_parameters"], info["total_parameters"]
    drawing = (list(filter(str.strip, info["prompts"]))[:1] or ["A PROMPT"]) + (
        [] if info["model"] == "mini-sd" else ["--model", info["model"]]
    )
    show.facts(
        f"{info['method']} on {info['data']}",
        [
            ("report", outcome.report),
            ("adapter", f"{outcome.adapter} ({show.size(info['adapter_bytes'])})"),
            ("trained", f"{trained:,} of {total:,} parameters ({show.share(trained, total)})"),
            ("time", f"{show.duration(info['seconds'])} for {info['steps']:,} steps"),
            ("memory", f"{show.size(info['peak_memory_bytes'])} ({info['memory_measured']})"),
            ("draw with it", shlex.join(["fallow", "generate", *drawing, "--adapter", str(outcome.adapter)])),
        ],
    )  # fmt: skip


def compare_command() -> Any:
    """The command `compare`, with a flag for every field of CompareConfig."""
    from fallow.recipes.compare import CompareConfig

    path = flags.option("config", Path | None, "--config", "-c", help="A TOML file with settings; flags win over it.")
    json = flags.option("json", bool, "--json", help="Print the comparison as JSON, and nothing else on stdout.")
    return flags.command_from(
        CompareConfig, run_compare, [path, json], name="compare", help=COMPARE_HELP, epilog=COMPARE_EXAMPLE,
        commas=["methods"],
    )  # fmt: skip


def run_compare(given: dict[str, Any], *, config: Path | None, json: bool | None) -> None:
    """Compare, then show the table and where the page is."""
    from fallow.recipes.compare import CompareConfig, compare

    settings = flags.make_config(CompareConfig, given, config)
    with show.only_json(bool(json)):
        folder = compare(settings, console=show.console(stderr=True))
    result = load((folder / "comparison.json").read_text(encoding="utf-8"))
    if json:
        show.result({"folder": folder, **result})
        return
    columns = [
        "method", "lr", "Frechet", "alignment", "prior Frechet", "VLHI", "trained", "seconds", "memory", "adapter",
    ]  # fmt: skip
    show.table("", columns, [_compared(method) for method in result["methods"]], right=range(1, len(columns)))
    show.facts("", [("page", folder / "comparison.html")])


def _compared(method: dict[str, Any]) -> list[str]:
    """A row of the table; figures are means over the seeds, a method whose runs all failed has none."""
    figures = [show.number(method[name]) for name in ("lr", "frechet", "alignment", "prior_frechet", "vlhi")]
    trained, seconds = method["trained_parameters"], method["seconds"]
    return [
        method["label"], *figures, "-" if trained is None else f"{trained:,.0f}",
        "-" if seconds is None else show.duration(seconds), show.size(method["peak_memory_bytes"]),
        show.size(method["adapter_bytes"]),
    ]  # fmt: skip
