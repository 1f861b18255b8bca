"""What is installed, what runs here, what would fail without it, and how much memory a run will need.

check().ok                                      # False where something that is needed is missing
memory(Plan("mini-sd", "sara", fraction=0.1))   # the method beside LoRA and full fine-tuning, in bytes
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import diffusers
import torch
from packaging.requirements import Requirement
from packaging.version import Version
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fallow import assets
from fallow.analysis.memory import Estimate, estimate_dense, estimate_selective
from fallow.core.compact import Form
from fallow.core.errors import ConfigError, ModelError, SelectionError, nearest
from fallow.recipes.families import Family, family_named
from fallow.recipes.low_memory import WHOLE, BasePrecision, keep
from fallow.recipes.methods import METHODS
from fallow.recipes.pictures import buckets
from fallow.recipes.pipelines import is_hub_id, kind_of_model

# What the optional packages are for. Nothing of the two main commands needs any of them.
OPTIONAL = {
    "torchmetrics": "Inception as a judge of `fallow evaluate`, where its weights are given",
    "bitsandbytes": "its kernel for 4-bit bases on CUDA, its optimizers",
    "torchao": "its 8-bit optimizers, as rule=",
    "xformers": "not used: torch's own attention is as lean",
    "ray": "spreading a comparison over a cluster",
    "mkdocs": "building the documentation",
    "pytest": "running the tests",
}
State = Literal["ok", "absent", "warning", "missing"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `missing` means that something which Fallow needs does not work."""

    group: str
    name: str
    state: State
    value: str
    advice: str = ""


@dataclass(frozen=True)
class Checkup:
    """All findings."""

    findings: list[Finding]

    @property
    def ok(self) -> bool:
        """False where something that is needed is missing."""
        return all(finding.state != "missing" for finding in self.findings)


def check(output: Path | None = None) -> Checkup:
    """Look at packages, devices, folders and shipped data. `output`: where runs will go (default: `runs` here)."""
    return Checkup([*_packages(), *_optional(), *_devices(), *_folders(output or Path("runs")), *_shipped()])


def _packages() -> Iterator[Finding]:
    """Python and every package that Fallow requires, against the versions it supports: its own metadata says which."""
    yield Finding("packages", "python", "ok", platform.python_version())
    try:
        required = importlib.metadata.requires("fallow") or []
    except importlib.metadata.PackageNotFoundError:
        advice = "install it: pip install -e ."
        yield Finding("packages", "fallow", "missing", "not installed", advice)
        return
    yield Finding("packages", "fallow", "ok", importlib.metadata.version("fallow"))
    for line in required:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        yield package(requirement)


def package(requirement: Requirement) -> Finding:
    """Whether what is installed satisfies a requirement."""
    try:
        installed = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(
            "packages",
            requirement.name,
            "missing",
            "not installed",
            f"pip install '{requirement.name}{requirement.specifier}'",
        )
    if not requirement.specifier.contains(Version(installed), prereleases=True):
        return Finding(
            "packages",
            requirement.name,
            "missing",
            f"{installed}, needs {requirement.specifier}",
            f"pip install '{requirement.name}{requirement.specifier}'",
        )
    return Finding("packages", requirement.name, "ok", installed)


def _optional() -> Iterator[Finding]:
    for name, purpose in OPTIONAL.items():
        try:
            yield Finding("optional", name, "ok", importlib.metadata.version(name), purpose)
        except importlib.metadata.PackageNotFoundError:
            yield Finding("optional", name, "absent", "not installed", purpose)


def _devices() -> Iterator[Finding]:
    total, limit = installed_memory(), container_limit()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    told = f"{cores} cores, torch uses {torch.get_num_threads()} threads"
    memory = f"{_gb(total)} of memory" if total else "memory unknown"
    if limit and total and limit < total:
        memory += f", this container may use {_gb(limit)}"
    yield Finding("devices", "cpu", "ok", f"{told}; {memory}")
    if torch.get_num_threads() > cores:
        advice = f"set OMP_NUM_THREADS={cores}: more threads than cores are slower"
        yield Finding("devices", "threads", "warning", f"{torch.get_num_threads()} on {cores} cores", advice)
    for number in range(torch.cuda.device_count()):
        yield _gpu(number)
    if torch.backends.mps.is_available():
        yield Finding("devices", "mps", "ok", "available; fp16 and fp32")
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        advice = "mini-sd trains in minutes on a CPU; larger models need a GPU"
        if shutil.which("nvidia-smi"):
            advice = "nvidia-smi is there, but torch sees no GPU: a torch without CUDA, or a driver that is too old"
        yield Finding("devices", "gpu", "warning", "none", advice)
    for precision in ("bf16", "fp16"):
        works = runs_in(precision, "cuda" if torch.cuda.is_available() else "cpu")
        told = "a forward and backward pass runs" if works else "does not run"
        advice = "" if works else f"train without --precision {precision}"
        yield Finding("devices", precision, "ok" if works else "warning", told, advice)


def _gpu(number: int) -> Finding:
    """A GPU by name and memory; torch may see one that it cannot run on, so a sum is tried."""
    name = torch.cuda.get_device_name(number)
    try:
        torch.ones(2, device=f"cuda:{number}").sum().item()
        free, total = torch.cuda.mem_get_info(number)
    except RuntimeError as error:
        advice = "the driver or the build of torch does not fit this GPU; set CUDA_VISIBLE_DEVICES= to train on the CPU"
        return Finding("devices", f"cuda:{number}", "missing", f"{name}: {str(error).splitlines()[0]}", advice)
    major, minor = torch.cuda.get_device_capability(number)
    told = f"{name}, {_gb(free)} of {_gb(total)} free, compute capability {major}.{minor}"
    if free < 1e9:
        return Finding("devices", f"cuda:{number}", "warning", told, "another process holds most of its memory")
    return Finding("devices", f"cuda:{number}", "ok", told)


def runs_in(precision: str, device: str) -> bool:
    """Whether a linear layer and a convolution train under autocast in this precision on this device."""
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    try:
        with torch.random.fork_rng(devices=[]):
            layers = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 2)).to(device)
            with torch.autocast(device, kind):
                loss = layers(torch.ones(1, 2, 4, 4, device=device)).float().square().sum()
            loss.backward()
        return bool(torch.isfinite(loss))
    except RuntimeError:  # torch: this device has no such operator, or none in this precision
        return False


def installed_memory() -> int | None:
    """Bytes of main memory, or None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def container_limit() -> int | None:
    """Bytes that a control group allows this process, or None where there is no limit."""
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            limit = int(Path(file).read_text())
            return limit if limit < 2**60 else None
    return None


def _folders(output: Path) -> Iterator[Finding]:
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME", "~/.cache/huggingface")) / "hub")
    places = (
        ("runs", output, "missing", "give another place with --output"),
        ("temporary files", Path(tempfile.gettempdir()), "missing", "set TMPDIR to a folder that can be written"),
        ("model cache", cache.expanduser(), "warning", "set HF_HOME; only models named by hub id need it"),
    )
    for name, place, state, advice in places:
        reason = unwritable(place)
        if reason:
            yield Finding("folders", name, state, f"{place.absolute()}: {reason}", advice)  # type: ignore[arg-type]
            continue
        free = shutil.disk_usage(_existing(place)).free
        low = free < 2e9
        told = f"{place.absolute()}, {_gb(free)} free"
        yield Finding("folders", name, "warning" if low else "ok", told, "little space is left" if low else "")


def _existing(place: Path) -> Path:
    """The place, or the nearest folder above it that exists."""
    place = place.absolute()
    while not place.exists():
        place = place.parent
    return place


def unwritable(place: Path) -> str | None:
    """Why nothing can be written in this folder (there or not yet), or None. Tried: permissions do not tell all."""
    base = _existing(place)
    if not base.is_dir():
        return f"{base} is no folder"
    try:
        with tempfile.TemporaryFile(dir=base):
            return None
    except OSError as error:
        return error.strerror or "cannot be written"


def _shipped() -> Iterator[Finding]:
    for name, place in (("mini-sd", assets.MINI_SD), ("garment-net", assets.GARMENT_NET)):
        there = place.is_dir() and any(place.rglob("*.safetensors"))
        advice = "" if there else "the installation is incomplete; install Fallow again"
        yield Finding("shipped", name, "ok" if there else "missing", str(place) if there else "not there", advice)
    styles = ", ".join(assets.STYLES) or "none"
    yield Finding("shipped", "style sets", "ok" if assets.STYLES else "warning", styles)


def _gb(number: float | None) -> str:
    return "?" if number is None else f"{number / 1e9:.1f} GB"


# --- memory of a run, before it starts -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """The run whose memory is asked for."""

    model: str = "mini-sd"
    method: str = "sara"
    fraction: float | None = None
    threshold: float | None = None
    budget: int | None = None
    rank: int = 8
    batch_size: int = 4
    resolution: int | None = None
    precision: str = "no"
    gradient_checkpointing: bool = False
    ema: bool = False
    base_precision: str = "float32"
    block_swap: int = 0
    fused_step: bool = False


def memory(plan: Plan) -> list[Estimate]:
    """Estimates for the plan's method, LoRA of the plan's rank, and full fine-tuning, on one network and batch.

    The network is built from its configuration alone, on tensors without data; weights are read (one tensor at a time)
    only to count the entries under a threshold. The fused step is the plan's method's alone, and full fine-tuning needs
    its weights as they are. Raises ModelError, ConfigError or SelectionError.
    """
    source, others = _looked_at(plan)
    names = dict.fromkeys([plan.method, "lora", "full"])
    return [_estimate(plan, source, name, others) for name in names]


def memory_of(plan: Plan) -> Estimate:
    """The first of these alone."""
    source, others = _looked_at(plan)
    return _estimate(plan, source, plan.method, others)


def _looked_at(plan: Plan) -> tuple[Source, int]:
    """Where the plan's model is, and the bytes of its other parts, after refusing what cannot be estimated."""
    if plan.batch_size < 1:
        raise ConfigError(f"batch_size={plan.batch_size} is no batch; give 1 or more")
    known = [name for name in METHODS if name != "peft"]  # which tensors that trains its own options say
    if plan.method not in known:
        raise ConfigError(f"method={plan.method} cannot be estimated{nearest(plan.method, known)}")
    if plan.rank < 1:
        raise ConfigError(f"rank={plan.rank} is too small; give 1 or more")
    if plan.precision not in ("no", "bf16", "fp16"):
        raise ConfigError(f"precision={plan.precision} is unknown; give no, bf16 or fp16")
    if plan.base_precision not in get_args(BasePrecision):
        allowed = ", ".join(get_args(BasePrecision))
        raise ConfigError(f"base_precision={plan.base_precision} is unknown; give one of {allowed}")
    if plan.method in WHOLE and (plan.base_precision != "float32" or plan.block_swap):
        raise ConfigError(
            f"method={plan.method} writes all weights, which base_precision and block_swap keep as they are; leave "
            "them out, or ask about sara, shira or lora"
        )
    source = Source.find(plan.model)
    return source, source.other_weights()


def _estimate(plan: Plan, source: Source, method: str, others: int) -> Estimate:
    common: dict[str, Any] = {"ema": plan.ema, "others": others}
    network = unet_on_meta(plan, source)
    selected = {} if method in ("lora", "full") else selected_entries(plan, source, network)
    fake = FakeTensorMode()
    with fake:
        on_cpu(network)
        if method not in WHOLE:
            keep(network, plan.base_precision, plan.block_swap)
    if method == "lora":  # outside, since PEFT moves its tensors, which fake ones take amiss
        network.requires_grad_(False)
        config = LoraConfig(r=plan.rank, lora_alpha=plan.rank, target_modules=source.family.targets_alone())
        inject_adapter_in_model(config, network, low_cpu_mem_usage=True)
    with fake:
        on_cpu(network)
        loss = batch_loss(plan, source, network)
        if method in ("lora", "full"):
            name = f"lora, rank {plan.rank}" if method == "lora" else "full"
            return estimate_dense(network, loss, method=name, foreach=torch.cuda.is_available(), **common)
        form: Form = "delta" if method == "shira" else "value"
        return estimate_selective(network, loss, selected, method=method, form=form, fused=plan.fused_step, **common)


def unet_on_meta(plan: Plan, source: Source) -> Any:
    """The denoising network as its configuration describes it, without data."""
    network = source.network()
    network.train()
    if plan.gradient_checkpointing and not plan.block_swap:  # which recomputes by itself
        network.enable_gradient_checkpointing()
    return network


def on_cpu(network: nn.Module) -> None:
    """Exchange meta tensors by ones of the device mode that the caller has entered, in place; what is tied stays tied.

    On fake CPU tensors autocast and fused attention take the ways that they take on real ones; on meta they do not.
    """
    made: dict[int, Tensor] = {}
    for module in network.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None or not tensor.is_meta:
                    continue
                if id(tensor) not in made:
                    empty: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype)
                    if isinstance(tensor, nn.Parameter):
                        empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = empty
                held[name] = made[id(tensor)]  # type: ignore[assignment]


@dataclass(frozen=True)
class Source:
    """Where a text-to-image model lies: a pipeline directory, or a hub id of which the configuration is read."""

    name: str
    folder: Path | None

    @classmethod
    def find(cls, name: str) -> Source:
        """Find a shipped model, a directory, or (by downloading its small configuration) a hub id."""
        if name == "mini-sd":
            return cls(name, assets.MINI_SD)
        folder = Path(name).expanduser()
        if folder.is_dir():
            part = family_named(kind_of_model(name), name).network
            if not (folder / part / "config.json").is_file():
                raise ModelError(f"{folder} has no {part}/config.json; give a pipeline as diffusers saves it")
            return cls(name, folder)
        if folder.exists() or not is_hub_id(name):
            raise ModelError(
                f"model {name} is no pipeline directory; give 'mini-sd', a directory, or a hub id like owner/name"
            )
        return cls(name, None)

    @property
    def family(self) -> Family:
        return family_named(kind_of_model(self.name), self.name)

    def network(self) -> Any:
        """The denoising network as its configuration describes it, without data."""
        with torch.device("meta"):
            return getattr(diffusers, self.family.network_class).from_config(self.config())

    def config(self) -> dict[str, Any]:
        """The configuration of the denoising network."""
        family = self.family
        cls = getattr(diffusers, family.network_class)
        try:
            return dict(cls.load_config(str(self.folder or self.name), subfolder=family.network))
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0].rstrip(".")
            raise ModelError(
                f"the configuration of {self.name} cannot be read: {reason}; give 'mini-sd', a pipeline directory, or "
                "the hub id of a model that this machine can download"
            ) from None

    def text_length(self) -> int:
        """Tokens of a prompt, padding included."""
        if self.folder is not None:
            with contextlib.suppress(OSError, ValueError, KeyError):
                return int(
                    json.loads((self.folder / "tokenizer" / "tokenizer_config.json").read_text())["model_max_length"]
                )
        return 77

    def files(self, part: str) -> list[Path]:
        """The safetensors files of one part of the pipeline: one precision of it where several lie there."""
        if self.folder is None:
            return []
        files = sorted((self.folder / part).glob("*.safetensors"))
        plain = [file for file in files if ".fp16." not in file.name and ".non_ema." not in file.name]
        return plain or files

    def other_weights(self) -> int:
        """Bytes, in fp32, of the text encoders and the autoencoder; 0 where their files are not on this machine."""
        from safetensors import safe_open

        total = 0
        for part in (*self.family.text_encoders, "vae"):
            for file in self.files(part):
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118  safe_open is no mapping
                        size = 1
                        for length in opened.get_slice(name).get_shape():
                            size *= length
                        total += 4 * size
        return total


def batch_loss(plan: Plan, source: Source, network: Any) -> Callable[[], Tensor]:
    """The loss of one batch, as the recipe computes it; its tensors are made in the caller's mode."""
    config, family = source.config(), source.family
    side = None
    if plan.resolution is not None:
        # refuses, as training does, what the network cannot halve
        buckets(plan.resolution, pixels_per_latent(source) * family.grid(config))
        side = plan.resolution // pixels_per_latent(source)
    noisy = torch.randn(plan.batch_size, *family.latents(config, side))
    target = torch.randn(noisy.shape)
    conditions = family.blank(config, plan.batch_size, source.text_length())
    when = torch.ones(plan.batch_size)
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(plan.precision)

    def loss() -> Tensor:
        with torch.autocast("cpu", half) if half else contextlib.nullcontext():
            predicted = family.predict(network, noisy, when, conditions)
        return (predicted.float() - target).square().mean()

    return loss


def pixels_per_latent(source: Source) -> int:
    """How many pixels of a side one latent stands for; 8 where the autoencoder is not on this machine."""
    if source.folder is not None:
        with contextlib.suppress(OSError, ValueError, KeyError):
            blocks = json.loads((source.folder / "vae" / "config.json").read_text())["block_out_channels"]
            return int(2 ** (len(blocks) - 1))
    return 8


def selected_entries(plan: Plan, source: Source, network: nn.Module) -> dict[str, int]:
    """How many entries of each tensor the plan selects.

    Exact for a threshold (weights are read one tensor at a time). A fraction or a budget fixes the sum exactly; which
    tensors it falls on is not needed for the memory, so it is spread evenly.
    """
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    total = sum(sizes.values())
    amounts = {"fraction": plan.fraction, "threshold": plan.threshold, "budget": plan.budget}
    given = [name for name, value in amounts.items() if value is not None]
    if len(given) > 1:
        raise SelectionError(f"{' and '.join(given)} are both given; give one of fraction, threshold, budget")
    if plan.threshold is not None:
        counts = under(plan.threshold, source, sizes)
        if not sum(counts.values()):
            raise SelectionError(f"threshold={plan.threshold} selects no weight of {plan.model}; give a larger one")
        return counts
    if plan.budget is not None:
        if not 1 <= plan.budget <= total:
            raise SelectionError(f"budget={plan.budget} is impossible; give 1 to {total:,} entries")
        wanted = plan.budget
    else:
        fraction = 0.05 if plan.fraction is None else plan.fraction
        if not 0 < fraction <= 1:
            raise SelectionError(f"fraction={fraction} is impossible; give a number above 0 and at most 1")
        wanted = round(fraction * total)
    return _spread(wanted, sizes, total)


def _spread(wanted: int, sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """`wanted` entries over tensors in proportion to their sizes, the sum exact."""
    counts, seen, given = {}, 0, 0
    for name, size in sizes.items():
        seen += size
        upto = wanted * seen // total
        counts[name] = upto - given
        given = upto
    return counts


def under(threshold: float, source: Source, sizes: Mapping[str, int]) -> dict[str, int]:
    """How many entries of each tensor are smaller than the threshold; reads one tensor at a time."""
    from safetensors import SafetensorError, safe_open

    files = source.files(source.family.network)
    if not files:
        raise ModelError(
            f"the weights of {source.name} are not here, so a threshold cannot be counted; give fraction or budget"
        )
    counts = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  safe_open is no mapping
                    if name in sizes:
                        counts[name] = int((opened.get_tensor(name).float().abs() < threshold).sum())
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{file} cannot be read ({error}); the download may have been cut off: fetch it again"
            ) from None
    return counts
