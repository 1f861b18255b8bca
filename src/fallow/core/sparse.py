"""Sparse adapters: what a selective method changed, as a file, and several of them in one model.

    SparseDelta   {weight name: sorted flat indices, changes}; saved, loaded, checked against its base, combined
    Adapters      adapters in a live model: scale, switch, disable, merge; only the entries concerned are touched

On disk: a safetensors file with, for each weight, `<name>.delta` (float32 or bfloat16 changes) or `<name>.value` (the
exact trained values in the weight's dtype), and `<name>.idx` (coded gaps) or `<name>.bits` (a bitmap), see
`core.coding`. Its metadata hold everything else as JSON: method and settings, and for each weight shape, dtype and the
fingerprint of the base. A directory adds `adapter_config.json` and a model card for people; the file alone suffices.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fallow.core.coding import decode, encode
from fallow.core.compact import gather, scatter
from fallow.core.errors import AdapterError, ConfigError, nearest
from fallow.core.files import (
    atomic_directory,
    matches,
    parse_json,
    read_tensors,
    refuse_not_finite,
    write_json,
    write_tensors,
)
from fallow.core.select import named_weights
from fallow.core.sharded import whole

FORMAT, VERSION = "fallow-sparse", 1
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Store = Literal["delta", "value"]
DTYPES = ("float32", "float16", "bfloat16", "float64")  # of weights and of stored values


@dataclass(frozen=True)
class Entry:
    """The changed entries of one weight: `index` (k,) sorted flat row-major, `values` (k,), `shape` and `dtype` of the
    weight, `fingerprint` of the base weight ("" where it is not known).
    """

    index: Tensor
    values: Tensor
    shape: tuple[int, ...]
    dtype: str
    fingerprint: str

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def trained_in(self) -> torch.dtype:
        return getattr(torch, self.dtype)


@dataclass(frozen=True)
class SparseDelta:
    """A sparse adapter. `store` says what the values are: "delta" (added to the base, float32) or "value" (in place of
    it, in the weight's dtype). `metadata`: method and settings, plain JSON values.
    """

    entries: dict[str, Entry]
    store: Store
    metadata: dict[str, Any]

    @property
    def trained(self) -> int:
        """The number of entries in all weights."""
        return sum(entry.index.numel() for entry in self.entries.values())

    # -- files --------------------------------------------------------------------------------------------------------

    def save(self, path: Path, dtype: torch.dtype = torch.float32, notes: Mapping[str, str] | None = None) -> Path:
        """Write `*.safetensors` as one file, any other path as an adapter directory; returns the path.

        AdapterError where a value is no number (training has failed) or other things lie there, StorageError where
        the disk is full or the place cannot be written.

        `dtype`: of stored changes, float32 or bfloat16 (half the size, the change to 8 bits of precision).
        `notes`: what else the file's metadata say, e.g. `modelspec.title`, for other tools.
        """
        if dtype not in (torch.float32, torch.bfloat16):
            raise ConfigError(f"dtype={dtype} must be torch.float32 or torch.bfloat16")
        path = Path(path)
        refuse_not_finite(path, {name: entry.values for name, entry in self.entries.items()})
        tensors: dict[str, Tensor] = {}
        described: dict[str, Any] = {}
        for name, entry in self.entries.items():
            kind, code = encode(entry.index, entry.numel)
            tensors[f"{name}.{'idx' if kind == 'gaps' else 'bits'}"] = code
            tensors[f"{name}.{self.store}"] = entry.values.to(dtype) if self.store == "delta" else entry.values
            described[name] = {"shape": list(entry.shape), "dtype": entry.dtype, "base": entry.fingerprint}
        told = {"store": self.store, "metadata": self.metadata, "tensors": described}
        header = {**(notes or {}), "format": FORMAT, "version": str(VERSION), "fallow": json.dumps(told)}
        if path.suffix == ".safetensors":
            write_tensors(path, tensors, header)
            return path
        if path.exists() and not path.is_dir():
            raise AdapterError(f"{path} is a file; give NAME.safetensors or a directory")
        if path.is_dir() and any(path.iterdir()) and not (path / CONFIG).is_file():
            raise AdapterError(f"{path} is in use by something that is no adapter; give another directory")
        with atomic_directory(path) as partial:
            write_tensors(partial / WEIGHTS, tensors, header)
            config = {"format": FORMAT, "version": VERSION, "kind": "sparse", "store": self.store}
            write_json(partial / CONFIG, config | {"trained": self.trained, **self.metadata})
            (partial / "README.md").write_text(self._card(), encoding="utf-8")
        return path

    @staticmethod
    def load(path: Path) -> SparseDelta:
        """Read a file or an adapter directory. AdapterError where it is missing, broken or no sparse adapter."""
        file = weights_file(Path(path))
        tensors, header = read_tensors(file)
        told = _told(file, header)
        entries = {}
        for name, described in told["tensors"].items():
            try:
                entries[name] = _entry(name, described, told["store"], tensors)
            except KeyError as error:
                raise AdapterError(f"{file} is incomplete: '{name}' lacks {error}; train or copy it again") from None
            except AdapterError as error:
                raise AdapterError(f"{file} is broken at '{name}': {error}; train or copy it again") from None
        if tensors:
            raise AdapterError(
                f"{file} is broken: it holds '{min(tensors)}', which its metadata do not tell of; copy it again"
            )
        refuse_not_finite(file, {name: entry.values for name, entry in entries.items()})
        return SparseDelta(entries, told["store"], told["metadata"])

    def _card(self) -> str:
        method = self.metadata.get("method", "selective")
        rows = "\n".join(
            f"| {key} | {json.dumps(value)} |" for key, value in self.metadata.items() if value is not None
        )
        return (
            f"---\ntags: [fallow, {method}]\n---\n\n# A {method} adapter\n\n"
            f"{self.trained:,} entries of {len(self.entries)} existing weights were trained; nothing is added to the "
            "network. Load it on the base it was trained on:\n\n"
            "```python\nimport fallow\n\nfallow.Adapters(model).add('style', 'path/to/this/directory', scale=1.0)\n"
            f"```\n\n| setting | value |\n| --- | --- |\n{rows}\n"
        )

    # -- the base -----------------------------------------------------------------------------------------------------

    def check(self, model: nn.Module, force: bool = False) -> None:
        """AdapterError unless every weight is in the model in this shape, and (unless `force`) is the base trained on.

        Also where a change is too large for the model's dtype, in which the weight would be infinite.
        Call it while the model shows its base. A base in half precision is recognised as the float32 one it came from.
        """
        named = named_weights(model)
        for name, entry in self.entries.items():
            if name not in named:
                close = nearest(name, list(named)[:500])
                raise AdapterError(f"the adapter changes '{name}', which {type(model).__name__} lacks{close}")
            if tuple(named[name].shape) != entry.shape:
                raise AdapterError(
                    f"the adapter changes '{name}' {entry.shape}, which is {tuple(named[name].shape)} in this model; "
                    "give the base that it was trained on"
                )
            plain = entry.values.numel() and named[name].is_floating_point()
            if plain and entry.values.abs().max() > torch.finfo(named[name].dtype).max / 4:
                raise AdapterError(
                    f"the adapter changes '{name}' by {float(entry.values.abs().max()):g}, which is more than "
                    f"{named[name].dtype} can hold; the file is damaged, or the model has to be loaded in float32"
                )
        if force:
            return
        for name, entry in self.entries.items():
            if entry.fingerprint and not matches(entry.fingerprint, whole(named[name]), entry.trained_in):
                raise AdapterError(
                    f"the adapter was trained on another base: '{name}' holds other values ({entry.dtype} in training, "
                    f"{str(named[name].dtype).removeprefix('torch.')} now). Give the base that it was trained on, or "
                    "force it (force=True, --force) if you know that it is close enough"
                )

    def deltas(self, name: str, base: Tensor) -> Tensor:
        """(k,) what is added to the entries of one weight, given their base values, in float32 (float64 if so)."""
        values = self.entries[name].values.to(base.device)
        wide = torch.float64 if base.dtype == torch.float64 else torch.float32
        return values.to(wide) - base.to(wide) if self.store == "value" else values.to(wide)


def weights_file(path: Path) -> Path:
    """The safetensors file of an adapter given by its file or its directory."""
    if path.is_dir():
        if not (path / WEIGHTS).is_file():
            raise AdapterError(f"{path} is no adapter: it has no {WEIGHTS}; give the adapter/ directory of a run")
        return path / WEIGHTS
    return path


def is_sparse(path: Path) -> bool:
    """Whether a file or directory is a sparse adapter; False also where it cannot be read."""
    try:
        with safe_open(weights_file(Path(path)), framework="pt") as opened:
            return (opened.metadata() or {}).get("format") == FORMAT
    except (SafetensorError, OSError, AdapterError):
        return False


def _entry(name: str, described: Any, store: Store, tensors: dict[str, Tensor]) -> Entry:
    """The entry of one weight, whose tensors are taken out of `tensors`. KeyError for what is missing, AdapterError for
    what cannot be; nothing is as large as a header claims, all as large as what is in the file.
    """
    if not isinstance(described, dict):
        raise AdapterError(f"it is described by {described!r:.60}, which is no table")
    shape, dtype, base = described["shape"], described["dtype"], described["base"]
    if not isinstance(shape, list) or not all(type(side) is int and 0 <= side < 2**48 for side in shape):
        raise AdapterError(f"its shape {shape!r:.60} is none")
    if math.prod(shape) >= 2**48:
        raise AdapterError(f"its shape {shape!r:.60} is that of no tensor")
    if dtype not in DTYPES:
        raise AdapterError(f"its dtype {dtype!r:.60} is none of {', '.join(DTYPES)}")
    if not isinstance(base, str):
        raise AdapterError(f"the fingerprint of its base is {base!r:.60}, which is no text")
    values = tensors.pop(f"{name}.{store}")
    kind = "gaps" if f"{name}.idx" in tensors else "bits"
    index = decode(kind, tensors.pop(f"{name}.{'idx' if kind == 'gaps' else 'bits'}"), math.prod(shape))
    if str(values.dtype).removeprefix("torch.") not in DTYPES:
        raise AdapterError(f"its values are {values.dtype}, which is none of {', '.join(DTYPES)}")
    if index.shape != values.shape:
        raise AdapterError(f"{values.numel()} values for {index.numel()} indices")
    return Entry(index, values.float() if store == "delta" else values, tuple(shape), dtype, base)


def _told(file: Path, header: Mapping[str, str]) -> dict[str, Any]:
    if header.get("format") != FORMAT:
        raise AdapterError(f"{file} is no sparse adapter (its metadata say format {header.get('format')!r})")
    if header.get("version") != str(VERSION):
        raise AdapterError(
            f"{file} has version {header.get('version')} of the format, this Fallow reads {VERSION}; update Fallow"
        )
    try:
        told = parse_json(header["fallow"])
        if told["store"] not in ("delta", "value") or not isinstance(told["tensors"], dict):
            raise ValueError("store or tensors are not what they must be")
        told = {"metadata": {}, **told}
        if not isinstance(told["metadata"], dict):
            raise ValueError("metadata is no table")
        return told
    except (KeyError, ValueError, TypeError) as error:
        raise AdapterError(f"{file} has broken metadata ({error}); train or copy it again") from None


# --- several ---------------------------------------------------------------------------------------------------------


def combine(adapters: Sequence[tuple[SparseDelta, float]], **metadata: Any) -> SparseDelta:
    """One adapter that changes the base by the sum of scale * change of each, over the union of their entries.

    Raises AdapterError where they are of different bases, or hold values instead of changes (these need the base).
    """
    if not adapters:
        raise ConfigError("there is nothing to combine; give one or more adapters")
    entries: dict[str, Entry] = {}
    for adapter, scale in adapters:
        if adapter.store != "delta":
            raise AdapterError("an adapter saved with store='value' holds no changes; save it with store='delta'")
        if not math.isfinite(scale):
            raise ConfigError(f"scale={scale} must be a finite number")
        for name, entry in adapter.entries.items():
            scaled = replace(entry, values=scale * entry.values)
            entries[name] = _sum(name, entries[name], scaled) if name in entries else scaled
    parts = [{"method": adapter.metadata.get("method"), "scale": scale} for adapter, scale in adapters]
    return SparseDelta(entries, "delta", {"method": "combined", "of": parts, **metadata})


def _sum(name: str, one: Entry, other: Entry) -> Entry:
    _same_base(name, one, other)
    index = torch.cat([one.index, other.index]).unique()
    values = torch.zeros(index.numel(), dtype=torch.promote_types(one.values.dtype, other.values.dtype))
    for part in (one, other):
        values.index_add_(0, torch.searchsorted(index, part.index), part.values.to(values.dtype))
    return replace(one, index=index, values=values, fingerprint=one.fingerprint or other.fingerprint)


def _same_base(name: str, one: Entry, other: Entry) -> None:
    prints = {one.fingerprint, other.fingerprint} - {""}
    if one.shape != other.shape or len(prints) > 1:
        raise AdapterError(f"the adapters are of different bases: '{name}' differs; combine adapters of one base")


def overlap(one: SparseDelta, other: SparseDelta) -> dict[str, dict[str, float]]:
    """{weight name: shared, first, second (numbers of entries), cosine of the changes}; "" is the whole of all.

    Two SaRA adapters of one base and threshold share all their entries, two random masks next to none.
    """
    found: dict[str, dict[str, float]] = {}
    sums = {"shared": 0, "first": 0, "second": 0, "dot": 0.0, "a": 0.0, "b": 0.0}
    for name in dict.fromkeys((*one.entries, *other.entries)):
        a, b = one.entries.get(name), other.entries.get(name)
        if a is not None and b is not None:
            _same_base(name, a, b)
        both = torch.isin(a.index, b.index, assume_unique=True) if a is not None and b is not None else None
        part: dict[str, float] = {
            "shared": int(both.sum()) if both is not None else 0,
            "first": a.index.numel() if a is not None else 0,
            "second": b.index.numel() if b is not None else 0,
            "dot": 0.0,
            "a": float(a.values.double().square().sum()) if a is not None else 0.0,
            "b": float(b.values.double().square().sum()) if b is not None else 0.0,
        }
        if a is not None and b is not None and both is not None and part["shared"]:
            at = torch.searchsorted(b.index, a.index[both])
            part["dot"] = float(a.values[both].double() @ b.values[at].double())
        sums = {key: sums[key] + part[key] for key in sums}
        found[name] = _with_cosine(part)
    return {"": _with_cosine(sums), **found}


def _with_cosine(part: Mapping[str, float]) -> dict[str, float]:
    size = math.sqrt(part["a"] * part["b"])
    counts = {key: part[key] for key in ("shared", "first", "second")}
    return {**counts, "cosine": part["dot"] / size if size else 0.0}


class Adapters:
    """Several sparse adapters in one live model; each `name` has a scale, 0 is off.

    The model's weights are the adapted ones (nothing is wrapped, inference costs nothing); the base values of the
    entries concerned are kept, so that every change and every way back is O(trained entries), and bit for bit.

        adapters = fallow.Adapters(pipeline.unet)
        adapters.add("barbie", "barbie.safetensors", scale=0.8)
        adapters.switch("cyberpunk"); adapters.set_scales({"barbie": 0.6, "cyberpunk": 0.6})
        with adapters.disabled(): ...

    Whoever else writes into the weights meanwhile (training, load_state_dict) should `merge()` or `unload()` first.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = getattr(model, "_orig_mod", model)
        self.scales: dict[str, float] = {}
        self._held: dict[str, _Held] = {}

    def add(self, name: str, adapter: SparseDelta | str | Path, scale: float = 1.0, force: bool = False) -> None:
        """Put an adapter into the model at `scale`, beside those that are there. AdapterError where it does not fit."""
        if name in self._held:
            raise ConfigError(f"there is an adapter '{name}' already; remove it first, or give another name")
        _finite(name, scale)
        delta = adapter if isinstance(adapter, SparseDelta) else SparseDelta.load(Path(adapter))
        with self.disabled():
            delta.check(self.model, force)
            self._held[name] = _Held(self.model, delta)
            self.scales[name] = 0.0
        self.set_scales({**self.scales, name: scale})

    def remove(self, name: str) -> None:
        """Take an adapter out of the model."""
        self._known(name)
        self.set_scales({**self.scales, name: 0.0})
        del self._held[name], self.scales[name]

    def switch(self, name: str, scale: float = 1.0) -> None:
        """Show this adapter alone."""
        self._known(name)
        self.set_scales({other: scale if other == name else 0.0 for other in self.scales})

    @torch.no_grad()
    def set_scales(self, scales: Mapping[str, float]) -> None:
        """Show the model as base + sum of scale * change; adapters that are not named are off."""
        for name, scale in scales.items():
            self._known(name)
            _finite(name, scale)
        wanted = {name: float(scales.get(name, 0.0)) for name in self._held}
        if wanted == self.scales:
            return
        for name, scale in self.scales.items():
            if scale:
                self._held[name].restore()
        self.scales = wanted
        active = [(self._held[name], scale) for name, scale in wanted.items() if scale]
        if len(active) == 1:
            active[0][0].show(active[0][1])
        elif active:
            _show_sum(active)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the block the model is the base, bit for bit."""
        scales = dict(self.scales)
        self.set_scales({})
        try:
            yield
        finally:
            self.set_scales({name: scale for name, scale in scales.items() if name in self._held})

    def merge(self) -> None:
        """Leave the weights as they are and forget the adapters: what is shown becomes the model."""
        self._held.clear()
        self.scales.clear()

    def unload(self) -> None:
        """Restore the base and forget the adapters."""
        self.set_scales({})
        self.merge()

    def _known(self, name: str) -> None:
        if name not in self._held:
            raise ConfigError(f"there is no adapter '{name}'{nearest(name, self._held) if self._held else ''}")


def _finite(name: str, scale: float) -> None:
    if not math.isfinite(scale):
        raise ConfigError(f"scale={scale} of '{name}' must be a finite number; 0 is off, 1 as trained")


class _Held:
    """An adapter on the model's device, with the base values of its entries."""

    def __init__(self, model: nn.Module, delta: SparseDelta) -> None:
        named = named_weights(model)
        self.weights = {name: named[name] for name in delta.entries}
        self.index = {name: entry.index.to(named[name].device) for name, entry in delta.entries.items()}
        self.base = {name: gather(named[name], self.index[name]) for name in self.weights}
        self.change = {name: delta.deltas(name, base) for name, base in self.base.items()}
        exact = delta.store == "value"
        self.exact = {name: delta.entries[name].values.to(base) for name, base in self.base.items()} if exact else None

    def restore(self) -> None:
        for name, weight in self.weights.items():
            scatter(weight, self.index[name], self.base[name])

    def show(self, scale: float) -> None:
        for name, weight in self.weights.items():
            if scale == 1 and self.exact is not None:
                values = self.exact[name]
            else:
                change = self.change[name]
                values = torch.add(self.base[name].to(change.dtype), change, alpha=scale)
            scatter(weight, self.index[name], values)


def _show_sum(active: Sequence[tuple[_Held, float]]) -> None:
    """Base + the sum of all, added in float32 and rounded once; the model must show the base."""
    weights: dict[str, nn.Parameter] = reduce(lambda found, pair: {**pair[0].weights, **found}, active, {})
    for name, weight in weights.items():
        parts = [(held, scale) for held, scale in active if name in held.weights]
        if len(parts) == 1:
            union = parts[0][0].index[name]
        else:
            union = torch.cat([held.index[name] for held, _ in parts]).unique()
        total = gather(weight, union).to(parts[0][0].change[name].dtype)
        for held, scale in parts:
            total.index_add_(0, torch.searchsorted(union, held.index[name]), held.change[name], alpha=scale)
        scatter(weight, union, total)
