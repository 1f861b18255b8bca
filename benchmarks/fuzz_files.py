"""Damaged and hostile files: each is either read, or refused with one FallowError, and nothing else happens.

    python benchmarks/fuzz_files.py --mutants 10000 --output benchmarks/results/fuzz-epyc-1-thread.json

Mutants are used in forked processes, some in each, with limits on memory and time and an audit hook that notes what
reading must not do: write, remove or rename a file, start a process, connect, import a module, compile a text. What is
read must leave a network of finite weights. The mutators know the formats: safetensors headers, JSON, TOML. A mutant
that ends otherwise than read or refused is used again in a process of its own, and that counts.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import faulthandler
import functools
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

SECONDS = 60  # for one mutant, on a machine that does other things too
TOGETHER = 26  # mutants in one process
MEMORY = 2 << 30  # bytes of address space that one may take beside what the process has
HOSTILE: list[str] = [  # as they stand in JSON
    "null", "true", "-1", "0", "1.5", "1000000000000", "-9223372036854775808", "1" * 5000, "1e999", "NaN", "-Infinity",
    '""', '"../../../../etc/passwd"', '"/etc/passwd"', '"__import__(\'os\').system(\'true\')"', '"\\u0000"',
    '"' + "a" * 100_000 + '"', "[]", "{}", "[" * 3000 + "]" * 3000, '{"a":' * 3000 + "1" + "}" * 3000,
    "[" + "0," * 5000 + "0]", '"(a+)+$"', '"float8_e4m3fn"', '"antigravity"', "[[1, 2], {}, null]",
]  # fmt: skip
HOSTILE_TOML = [
    "nan", "inf", "-1", "0", "1e400", "9" * 400, "''", "'../../etc/passwd'", "true", "[]", "{}", "[" * 500 + "]" * 500,
    "1979-05-27", "'\\u0000'", "'" + "a" * 100_000 + "'", "0x7fffffffffffffffffff", "{a = {b = {c = 1}}}",
]  # fmt: skip


# -- mutants ----------------------------------------------------------------------------------------------------------


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        if out:
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def flip_bits_early(data: bytes, rng: random.Random) -> bytes:
    """Where headers are."""
    return flip_bits(data[:600], rng) + data[600:]


def cut_off(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.choice((0, 7, 8, rng.randrange(len(data) + 1), max(0, len(data) - 1)))]


def lengthen(data: bytes, rng: random.Random) -> bytes:
    return data + rng.randbytes(rng.choice((1, 8, 5000)))


def overwrite(data: bytes, rng: random.Random) -> bytes:
    at, size = rng.randrange(len(data) + 1), rng.choice((1, 16, 256))
    return data[:at] + rng.choice((b"\0" * size, b"\xff" * size, rng.randbytes(size))) + data[at + size :]


def edit_json(data: bytes, rng: random.Random) -> bytes:
    """One value, key or whole branch of a JSON document becomes another; numbers that json cannot write included."""
    try:
        document = json.loads(data)
    except ValueError:
        return flip_bits(data, rng)
    mark = "@@hostile@@"
    places = list(_places(document))
    if not places:
        return rng.choice(HOSTILE).encode()
    holder, key = rng.choice(places)
    kind = rng.randrange(6)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        other = rng.choice([*holder, "../../x", "", "x" * 5000])
        holder[other] = holder.pop(key)
    elif kind == 2 and isinstance(holder, dict):  # a key that stands twice
        text = json.dumps(document)
        head = json.dumps({key: holder[key]})[1:-1]
        return text.replace(head, f"{head}, {json.dumps(key)}: {rng.choice(HOSTILE)}", 1).encode()
    else:
        holder[key] = mark
    return json.dumps(document).replace(f'"{mark}"', rng.choice(HOSTILE)).encode()


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    """(holder, key) of everything in a document."""
    keys = list(document) if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else []
    for key in keys:
        yield document, key
        yield from _places(document[key])


def edit_lines(data: bytes, rng: random.Random) -> bytes:
    """A line of JSON lines."""
    lines = data.splitlines() or [b""]
    at = rng.randrange(len(lines))
    lines[at] = rng.choice((edit_json, edit_json, flip_bits, cut_off))(lines[at], rng)
    return b"\n".join([*lines, lines[at]] if rng.random() < 0.1 else lines)


def edit_toml(data: bytes, rng: random.Random) -> bytes:
    lines = data.decode().splitlines()
    at = rng.randrange(len(lines))
    key = lines[at].split("=")[0].strip()
    new = rng.choice((f"{key} = {rng.choice(HOSTILE_TOML)}", f"{key}s = 1", f"[{key}]", f"{key}.x = 1", "\0"))
    lines = [*lines[:at], new, *lines[at + 1 :]] if rng.random() < 0.8 else [*lines, new]
    return "\n".join(lines).encode(errors="surrogatepass")


def edit_tensors(data: bytes, rng: random.Random) -> bytes:
    """What only one who knows safetensors can do to a file: the rest of it stays consistent."""
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), bytearray(data[8 + size :])
    names = [name for name in header if name != "__metadata__"]
    name = rng.choice(names)
    begin, end = header[name]["data_offsets"]
    kind = rng.randrange(13)
    if kind == 0:  # the length of the header lies
        return (
            rng.choice((0, 1, size - 1, size + 1, len(data), 1 << 40, (1 << 64) - 1)).to_bytes(8, "little") + data[8:]
        )
    if kind == 1:
        header[name]["dtype"] = rng.choice(("F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "X", 7))
    elif kind == 2:
        header[name]["shape"] = rng.choice(
            ([10**12], [10**12, 10**12], [-1], [0], [], [1 << 63], [1.5], ["1"], None, [*header[name]["shape"], 1])
        )
    elif kind == 3:
        header[name]["data_offsets"] = rng.choice(([end, begin], [0, 1 << 62], [-8, end], [begin, end - 1], [begin]))
    elif kind == 4:
        header[rng.choice(("../../../tmp/x", "/etc/passwd", "", "\0", "x" * 10_000, name.upper()))] = header.pop(name)
    elif kind == 5 and len(names) > 1:  # two tensors change places
        other = rng.choice([one for one in names if one != name])
        header[name], header[other] = header[other], header[name]
    elif kind == 6:
        header.pop(name)
        if rng.random() < 0.5:  # and what it held
            return _safetensors(header, bytes(body), drop=(begin, end))
    elif kind in (7, 8):  # no numbers among the values
        dtype = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}.get(header[name]["dtype"])
        if dtype is not None and end > begin:
            values = np.frombuffer(bytes(body[begin:end]), dtype).copy()
            values[rng.randrange(len(values))] = rng.choice((np.nan, np.inf, -np.inf, np.finfo(dtype).max))
            body[begin:end] = values.tobytes()
        else:
            body[begin:end] = rng.choice((b"\xff\x7f", b"\xc0\x7f", b"\x7f\x7f")) * ((end - begin) // 2) + bytes(
                (end - begin) % 2
            )
    elif kind == 9:  # indices, or whatever it is, become noise
        body[begin:end] = rng.choice((rng.randbytes(end - begin), b"\xff" * (end - begin), bytes(end - begin)))
    elif kind == 10:
        told = header.setdefault("__metadata__", {})
        key = rng.choice(list(told) or ["fallow"])
        told[key] = rng.choice(("", "{", "[" * 5000, "x" * 100_000, "2", "pt", None, 7, {"a": 1}))
    else:
        told = header.setdefault("__metadata__", {})
        key = "fallow" if "fallow" in told else rng.choice(list(told) or ["format"])
        told[key] = edit_json(told.get(key, "{}").encode(), rng).decode(errors="replace")
    return _safetensors(header, bytes(body))


def _safetensors(header: dict[str, Any], body: bytes, drop: tuple[int, int] | None = None) -> bytes:
    if drop is not None:
        body = body[: drop[0]] + body[drop[1] :]
        for told in header.values():
            if "data_offsets" in told and told["data_offsets"][0] >= drop[1]:
                told["data_offsets"] = [offset - (drop[1] - drop[0]) for offset in told["data_offsets"]]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


BYTES = (flip_bits, flip_bits_early, cut_off, lengthen, overwrite)
KNOWING: dict[str, tuple[Callable[[bytes, random.Random], bytes], ...]] = {
    ".safetensors": (edit_tensors,) * 10, ".json": (edit_json,) * 10, ".jsonl": (edit_lines,) * 10,
    ".toml": (edit_toml,) * 10,
}  # fmt: skip


# -- what is mutated, and how it is used ------------------------------------------------------------------------------


@dataclass
class Sample:
    """Files of one kind by their names, which of them are mutated, and what is done with them.

    `use(folder)` gives the networks that came of it; `sign(files)` makes a mutant bear the digests of what it holds.
    """

    kind: str
    files: dict[str, bytes]
    mutated: list[str]
    use: Callable[[Path], list[nn.Module]]
    sign: Callable[[dict[str, bytes]], None] | None = None


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@functools.cache
def _unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(16,), layers_per_block=1, cross_attention_dim=16, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), mid_block_type=None,
        norm_num_groups=8,
    ).eval()  # fmt: skip


def tiny_unet() -> nn.Module:
    """The same weights at every call."""
    return copy.deepcopy(_unet())


def put_on(path: Path) -> list[nn.Module]:
    """Look into an adapter, and put it on a network: as it is, then by force."""
    from fallow.core.errors import FallowError
    from fallow.recipes.adapter_files import apply_adapter
    from fallow.recipes.adapters import describe

    describe(path)
    network = tiny_unet()
    try:
        apply_adapter(network, path)
    except FallowError:
        apply_adapter(network, path, force=True)
    return [network]


def live(path: Path) -> list[nn.Module]:
    """Put a sparse adapter into a live model, at two scales, and combine it with itself."""
    from fallow.core.sparse import Adapters, SparseDelta, combine

    network = tiny_unet()
    adapters = Adapters(network)
    adapters.add("one", path, scale=0.5, force=True)
    adapters.set_scales({"one": 1.0})
    delta = SparseDelta.load(path)
    if delta.store == "delta":
        combine([(delta, 0.5), (delta, -0.25)])
    return [network]


def adapters(folder: Path) -> Iterator[Sample]:
    """One of every format, of a tiny UNet."""
    from peft import LoraConfig, inject_adapter_in_model
    from safetensors.torch import save

    import fallow
    from fallow.recipes.adapter_files import base_fingerprints, save_full, save_peft

    def trained(method: Any, **options: Any) -> Any:
        network = tiny_unet()
        optimizer = method(network, lr=1e-2, **options)
        noise, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16)
        network(noise, torch.tensor([3]), text).sample.square().mean().backward()
        optimizer.step()
        return optimizer

    few = trained(fallow.SaRA, fraction=0.02)
    few.save(folder / "few.safetensors")
    trained(fallow.SHiRA, mask="rand", density=0.3).save(folder / "many.safetensors", store="value")
    for name in ("few", "many"):
        data = (folder / f"{name}.safetensors").read_bytes()
        for how, use in (("applied", put_on), ("live", live)):
            yield Sample(
                f"sparse ({name}), {how}", {"a.safetensors": data}, ["a.safetensors"],
                lambda place, use=use: use(place / "a.safetensors"),
            )  # fmt: skip
    few.save(folder / "directory")
    both = ["adapter_model.safetensors", "adapter_config.json"]
    yield Sample("sparse directory", contents(folder / "directory"), both, put_on)

    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    network = tiny_unet()
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False), network)
    save_peft(network, folder / "lora", {"method": "lora"})
    yield Sample("peft", contents(folder / "lora"), both, put_on)

    network = tiny_unet()
    prints = base_fingerprints(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.01)
    save_full(network, folder / "full", prints, {"method": "full"})
    yield Sample("full", contents(folder / "full"), both, put_on)

    layers = {n: m for n, m in tiny_unet().named_modules() if isinstance(m, nn.Linear) and n.endswith(tuple(targets))}
    kohya, diffusers = {}, {}
    for name, layer in layers.items():
        down, up = torch.randn(2, layer.in_features) * 0.1, torch.randn(layer.out_features, 2) * 0.1
        flat = f"lora_unet_{name.replace('.', '_')}"
        kohya |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up, f"{flat}.alpha": torch.tensor(1.0)}
        diffusers |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
    told = {"ss_network_dim": "2", "ss_network_alpha": "1.0", "modelspec.title": "a"}
    for kind, tensors in (("kohya", kohya), ("diffusers", diffusers)):
        yield Sample(
            kind,
            {"a.safetensors": save(tensors, told)},
            ["a.safetensors"],
            lambda place: put_on(place / "a.safetensors"),
        )


def checkpoint(folder: Path, model: str, data: str) -> Sample:
    """A checkpoint of a run of two steps; mutants are loaded into the run that stands ready."""
    from fallow.recipes import checkpoints, text_to_image
    from fallow.recipes.train_config import TrainConfig

    class Ready(Exception):
        """The run is there; nothing is to be trained."""

    few: dict[str, Any] = {"steps": 2, "batch_size": 1, "samples": 0, "device": "cpu", "save_every": 1}
    ready: list[Any] = []
    walk = text_to_image.Run.walk

    def keep(run: Any, *rest: Any) -> None:
        ready.append(run)
        if len(ready) == 2:
            raise Ready
        walk(run, *rest)

    text_to_image.Run.walk = keep  # type: ignore[method-assign]
    written = text_to_image.write_run_report
    text_to_image.write_run_report = lambda place: place / "report.html"
    try:
        for name in ("whole", "ready"):
            with contextlib.suppress(Ready):
                settings = {**few, "model": model, "data": data, "output": folder / name}
                text_to_image.train(TrainConfig(**settings, options={"fraction": 0.05, "reselect_at": 1}))
    finally:
        text_to_image.Run.walk = walk  # type: ignore[method-assign]
        text_to_image.write_run_report = written
    run = ready[1]

    def use(place: Path) -> list[nn.Module]:
        run.go_on_from(checkpoints.load_checkpoint(place))
        return [run.network]

    def sign(files: dict[str, bytes]) -> None:
        """As one would who wants the mutant to be read: with the digests of what it holds."""
        weights, state = (next(name for name in files if name.endswith(end)) for end in ("state.safetensors", ".json"))
        try:
            told = json.loads(files[state])
            whole = folder / "signed"
            whole.write_bytes(files[weights])
            told["sha256"] = {
                "state.safetensors": checkpoints._of_file(whole),
                "state": checkpoints._of_state(told["state"]),
            }
            files[state] = json.dumps(told).encode()
        except (ValueError, KeyError, TypeError, RecursionError):
            return

    step = "checkpoints/step-000002"
    files = {f"{step}/{name}": data for name, data in contents(folder / "whole" / step).items()}
    return Sample("checkpoint", files, list(files), use, sign)


def configs() -> Iterator[Sample]:
    from fallow.cli.flags import make_config
    from fallow.recipes.compare import CompareConfig
    from fallow.recipes.settings import to_toml
    from fallow.recipes.train_config import TrainConfig

    for model in (TrainConfig, CompareConfig):
        text = to_toml(model(), exclude={"output", "resume"} & set(model.model_fields)).encode()

        def use(place: Path, model: Any = model) -> list[nn.Module]:
            make_config(model, {}, place / "run.toml")
            return []

        yield Sample(f"configuration ({model.__name__})", {"run.toml": text}, ["run.toml"], use)


def captions(folder: Path) -> Sample:
    from fallow.recipes.pictures import read_pictures

    Image.init()  # Pillow brings its formats when it meets the first picture that none of the usual ones reads
    pixels = np.random.default_rng(0).integers(0, 255, (3, 16, 16, 3), dtype=np.uint8)
    for number in range(3):
        Image.fromarray(pixels[number]).save(folder / f"{number}.png")
    lines = [json.dumps({"file_name": f"{number}.png", "text": f"a bag {number}"}) for number in range(3)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))

    def use(place: Path) -> list[nn.Module]:
        for picture in read_pictures(place):
            inside = picture.path.resolve().is_relative_to(place.resolve())
            assert inside, f"a picture outside the folder is read: {picture.path}"
        return []

    return Sample("metadata.jsonl and pictures", contents(folder), ["metadata.jsonl", "metadata.jsonl", "1.png"], use)


def samples(folder: Path, model: str, data: str) -> list[Sample]:
    for name in ("adapters", "pictures"):
        (folder / name).mkdir()
    return [
        *adapters(folder / "adapters"), checkpoint(folder, model, data), *configs(), captions(folder / "pictures")
    ]  # fmt: skip


# -- one mutant -------------------------------------------------------------------------------------------------------

FORBIDDEN = (
    "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.chown", "os.symlink", "os.link", "os.truncate",
    "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "pty.spawn", "subprocess.Popen",
    "socket.connect", "socket.getaddrinfo", "tempfile.mkstemp", "tempfile.mkdtemp", "pickle.find_class",
    "shutil.rmtree", "shutil.move", "shutil.copyfile",
)  # fmt: skip


class Watch:
    """Notes what reading must not do, within `with`; an audit hook stays for the life of its process."""

    def __init__(self, known: set[str]) -> None:
        self.noted: list[str] = []
        self.known, self.on = known, False
        sys.addaudithook(self.hook)

    def __enter__(self) -> list[str]:
        self.noted, self.on = [], True
        return self.noted

    def __exit__(self, *_: object) -> None:
        self.on = False

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            path, _, flags = args
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if writes and not isinstance(path, int) and path != os.devnull:
                self.noted.append(f"opened {path!r} for writing")
        elif event == "import":
            if args[0].split(".")[0] not in self.known:
                self.noted.append(f"imported {args[0]}")
        elif event == "compile":
            text = args[0].decode(errors="replace") if isinstance(args[0], bytes) else args[0]
            if text is not None and not re.fullmatch(r"[\w.\[\], |]+", str(text)):  # typing compiles names of classes
                self.noted.append(f"compiled {text!r:.80}")
        elif event in FORBIDDEN:
            self.noted.append(f"{event} {args!r:.80}")


def judge(sample: Sample, folder: Path, files: dict[str, bytes], watch: Watch) -> dict[str, Any]:
    """Use a mutant: read, refused, or (which must not be) anything else."""
    from fallow.core.errors import FallowError

    write(folder, files)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    raised: BaseException | None = None
    with watch as noted:
        try:
            networks = sample.use(folder)
            bad = [n for one in networks for n, p in one.named_parameters() if not torch.isfinite(p).all()]
            found = {"end": "read"} if not bad else {"end": "not finite", "said": bad[0]}
        except FallowError as error:
            said = str(error)
            found = {"end": "refused" if said.strip() and "Traceback" not in said else "mute", "said": said[:300]}
        except BaseException as error:
            raised = error
    if raised is not None:
        trace = "".join(traceback.format_exception(raised)[-4:])
        found = {"end": "exception", "said": f"{type(raised).__name__}: {raised}"[:300], "trace": trace[-1500:]}
    if noted:
        found = {"end": "forbidden", "said": noted[0]}
    if contents(folder) != files:
        found = {"end": "forbidden", "said": "the files of the mutant are others now"}
    found["megabytes"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    found["seconds"] = time.perf_counter() - start
    return found


def in_a_process(actions: Iterable[Callable[[], dict[str, Any]]], count: int) -> Iterator[dict[str, Any]]:
    """What the actions return, one after another in a forked process; ends early with `crash` or `hang`."""
    read, send = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        space = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (space + MEMORY, space + MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        faulthandler.disable()  # pytest's writes the traceback of a crash to a copy of stderr
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        try:
            for action in actions:
                told = json.dumps(action()).encode() + b"\n"
                while told:
                    told = told[os.write(send, told) :]
        finally:
            os._exit(0)
    os.close(send)
    waiting, done, end = b"", 0, None
    while done < count and end is None:
        ready, _, _ = select.select([read], [], [], SECONDS)
        part = os.read(read, 1 << 16) if ready else b""
        end = None if part else "crash" if ready else "hang"
        *lines, waiting = (waiting + part).split(b"\n")
        for line in lines:
            done += 1
            yield json.loads(line)
    if end == "hang":
        os.kill(child, signal.SIGKILL)
    os.close(read)
    _, status = os.waitpid(child, 0)
    if end is not None:
        yield {"end": end, "said": f"wait status {status}"}


def mutate(sample: Sample, rng: random.Random) -> tuple[str, dict[str, bytes]]:
    files = dict(sample.files)
    file = rng.choice(sample.mutated)
    mutators = [*BYTES, *KNOWING.get(Path(file).suffix, ())]
    mutator = rng.choice(mutators)
    files[file] = mutator(files[file], rng)
    if sample.sign is not None and rng.random() < 0.8:
        sample.sign(files)
    return f"{mutator.__name__} of {file}", files


class Fuzz:
    """Mutants by their numbers, the samples in turn; counts by kind, and everything that must not be."""

    def __init__(self, seed: int, model: str, data: str, place: Path) -> None:
        torch.set_num_threads(1)
        self.seed, self.place, self.begun = seed, place, time.perf_counter()
        self.by_kind: dict[str, collections.Counter[str]] = {}
        self.wrong: list[dict[str, Any]] = []
        self.done, self.most, self.slowest = 0, 0.0, 0.0
        (place / "samples").mkdir()
        self.samples = samples(place / "samples", model, data)
        for sample in self.samples:  # each is read as it is; what that imports is then no news
            write(place / "whole", sample.files)
            sample.use(place / "whole")
        loaded = {name.split(".")[0] for name in sys.modules}
        self.known = loaded | set(sys.stdlib_module_names) - {"antigravity", "this"}

    def use(self, numbers: Iterable[int], folder: str = "mutant") -> Iterator[Callable[[], dict[str, Any]]]:
        """What is done with each mutant, in the process that does it."""
        watch = Watch(self.known)
        for number in numbers:
            sample, _, files = self.mutant(number)
            yield lambda sample=sample, files=files: judge(sample, self.place / folder, files, watch)

    def mutant(self, number: int) -> tuple[Sample, str, dict[str, bytes]]:
        sample = self.samples[number % len(self.samples)]
        return (sample, *mutate(sample, random.Random(f"{self.seed}/{number}")))

    def run(self, first: int, last: int) -> None:
        """The mutants from `first` up to, not with, `last`."""
        while first < last:
            some = range(first, min(first + TOGETHER, last))
            for found in in_a_process(self.use(some), len(some)):
                if found["end"] not in ("read", "refused"):
                    found = next(in_a_process(self.use([first], "alone"), 1))
                self.note(first, found)
                first += 1

    def note(self, number: int, found: dict[str, Any]) -> None:
        kind = self.samples[number % len(self.samples)].kind
        self.by_kind.setdefault(kind, collections.Counter())[found["end"]] += 1
        self.most = max(self.most, found.get("megabytes", 0.0))
        self.slowest = max(self.slowest, found.get("seconds", 0.0))
        self.done += 1
        if found["end"] not in ("read", "refused"):
            self.wrong.append({"number": number, "kind": kind, "how": self.mutant(number)[1], **found})

    def result(self) -> dict[str, Any]:
        return {
            "mutants": self.done, "seed": self.seed, "ends": dict(sum(self.by_kind.values(), collections.Counter())),
            "by_kind": {kind: dict(ends) for kind, ends in self.by_kind.items()}, "wrong": self.wrong,
            "most_megabytes_beside_the_process": round(self.most, 1), "slowest_seconds": round(self.slowest, 2),
            "seconds": round(time.perf_counter() - self.begun, 1), "torch": torch.__version__,
        }  # fmt: skip


def write(folder: Path, files: dict[str, bytes]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="mini-sd", help="whose checkpoints are mutated")
    parser.add_argument("--data", default="blueprint")
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        fuzz = Fuzz(asked.seed, asked.model, asked.data, Path(scratch))
        for first in range(0, asked.mutants, 10 * TOGETHER):
            fuzz.run(first, min(first + 10 * TOGETHER, asked.mutants))
            result = fuzz.result()
            print(result["mutants"], result["ends"], result["seconds"], flush=True)
            if asked.output is not None:
                asked.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({name: value for name, value in result.items() if name != "wrong"}, indent=2))
    sys.exit(bool(result["wrong"]))


if __name__ == "__main__":
    main()
