"""How the states of an optimizer are kept: read as tensors to compute with, written back in their own form.

    fp32    the tensor itself (a float64 parameter's is float64)
    bf16    2 bytes an entry, rounded up or down so that the mean over steps is exact (`core.small_floats`): a second
            moment that moves by a thousandth a step, below what bfloat16 can tell apart, moves all the same
    8bit    a byte, and 4 for each block of 256        4bit    half a byte, and 4 for each block of 128

States of fewer than SMALL entries, and all of float64 parameters, stay as they are. A dense basis has forms of its own:
fp32, bf16, int8 (a scale for each row) and nf4 (`core.weight_codes`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fallow.core.errors import ConfigError
from fallow.core.small_floats import M4, M8, V4, V8, Format, decode, encode, to_bfloat16
from fallow.core.weight_codes import CODES
from fallow.optim.site import Site

FORMS = ("fp32", "bf16", "8bit", "4bit")
BASIS_FORMS = ("fp32", "bf16", "int8", "nf4")
SMALL = 1024
PART = {"cpu": 1 << 18}  # entries of small states that are decoded at once, where entries can be treated apart
PART_ON_ACCELERATOR = 1 << 24
FORMATS = {("8bit", 1): M8, ("8bit", 2): V8, ("4bit", 1): M4, ("4bit", 2): V4}


def form_of(site: Site) -> str:
    return site.inner.form or site.group["state_dtype"]


def begin(site: Site, shapes: Mapping[str, Sequence[int]], form: str = "fp32") -> None:
    """Make states of these shapes, all zero."""
    device = site.param.device
    for key, shape in shapes.items():
        count = math.prod(shape)
        if count < SMALL or site.work == torch.float64 or form == "fp32":
            site.state[key] = torch.zeros(tuple(shape), dtype=site.work, device=device)
        elif form == "bf16":
            site.state[key] = torch.zeros(tuple(shape), dtype=torch.bfloat16, device=device)
        else:
            kind = FORMATS[form, site.inner.powers[key]]
            blocks = -(-count // kind.block)
            site.state[f"{key}_code"] = torch.zeros(
                blocks * kind.block * kind.bits // 8, dtype=torch.uint8, device=device
            )
            site.state[f"{key}_scale"] = torch.zeros(blocks, dtype=torch.float32, device=device)


def begin_inner(site: Site) -> None:
    """Make the inner rule's states."""
    begin(site, site.inner.shapes(site.shape), form_of(site))


def read(site: Site, key: str) -> Tensor:
    """The state as a tensor of the dtype that is computed in; the kept one itself, where it is kept so."""
    held = site.state.get(key)
    if held is not None:
        return held.to(site.work)
    shape = site.inner.shapes(site.shape)[key]
    kind = FORMATS[form_of(site), site.inner.powers[key]]
    return decode(site.state[f"{key}_code"], site.state[f"{key}_scale"], math.prod(shape), kind).view(shape)


def write(site: Site, key: str, value: Tensor) -> None:
    """Keep what `read` gave and the step has changed."""
    held, step = site.state.get(key), site.state["age"]
    if held is value:
        return
    if held is not None:
        held.copy_(to_bfloat16(value, step) if held.dtype == torch.bfloat16 else value)
        return
    codes, scale = encode(value.reshape(-1), FORMATS[form_of(site), site.inner.powers[key]], step)
    site.state[f"{key}_code"].copy_(codes)
    site.state[f"{key}_scale"].copy_(scale)


def _keys(site: Site) -> list[str]:
    every = (key + end for key in site.inner.shapes(site.shape) for end in ("", "_code", "_scale"))
    return [key for key in every if key in site.state]


def part_size(device: torch.device) -> int:
    """How many entries are decoded at once, a multiple of every block."""
    return PART.get(device.type, PART_ON_ACCELERATOR)


def in_parts(*tensors: Tensor) -> bool:
    """Whether tensors of one size are treated a part at a time: large ones that lie flat."""
    return all(one.is_contiguous() and one.numel() > part_size(one.device) for one in tensors)


def small(site: Site, key: str) -> bool:
    """Whether the state is kept in a form of 2 bytes or fewer."""
    held = site.state.get(key)
    return held is None or held.dtype == torch.bfloat16


def read_part(site: Site, key: str, start: int, count: int) -> Tensor:
    """(count,) of a state, seen flat, from `start` on, a multiple of `part_size`; as `read`, the kept one if it can."""
    if (held := site.state.get(key)) is not None:
        return held.view(-1)[start : start + count].to(site.work)
    kind = FORMATS[form_of(site), site.inner.powers[key]]
    codes, scales = _part_of(site, key, kind, start, count)
    return decode(codes, scales, count, kind)


def write_part(site: Site, key: str, start: int, value: Tensor) -> None:
    """Keep what `read_part` gave and the step has changed, to the bit what `write` keeps."""
    if (held := site.state.get(key)) is not None:
        if held.dtype == torch.bfloat16:
            held.view(-1)[start : start + value.numel()].copy_(to_bfloat16(value, site.state["age"], start))
        return
    kind = FORMATS[form_of(site), site.inner.powers[key]]
    codes, scales = _part_of(site, key, kind, start, value.numel())
    new, scale = encode(value, kind, site.state["age"], start)
    codes.copy_(new)
    scales.copy_(scale)


def _part_of(site: Site, key: str, kind: Format, start: int, count: int) -> tuple[Tensor, Tensor]:
    first, blocks, each = start // kind.block, -(-count // kind.block), kind.block * kind.bits // 8
    codes = site.state[f"{key}_code"].narrow(0, first * each, blocks * each)
    return codes, site.state[f"{key}_scale"].narrow(0, first, blocks)


def fitting(site: Site) -> None:
    """ConfigError where loaded states are not of this tensor, or of other options."""
    for key, shape in site.inner.shapes(site.shape).items():
        held = site.state.get(key)
        wanted = tuple(shape)
        if site.part is not None:
            wanted = (*shape[:-1], site.whole_n) if site.active else tuple(site.param.shape)
        if held is not None and tuple(held.shape) != wanted:
            raise ConfigError(
                f"the state '{key}' of {site.name} {tuple(site.param.shape)} is {tuple(held.shape)}, not {wanted}: it "
                "belongs to another model, or to other options"
            )
    if "age" not in site.state:
        raise ConfigError(f"the state of {site.name} has no age; it is not a low-rank optimizer's")


def zero(site: Site) -> None:
    """Start the inner rule's states anew."""
    for key in _keys(site):
        site.state[key].zero_()


def drop(site: Site) -> None:
    """Let the inner rule's states go."""
    for key in _keys(site):
        del site.state[key]


# -- a dense basis ----------------------------------------------------------------------------------------------------


def basis_form(site: Site) -> str:
    """What the group says; where it says nothing, bf16 beside moments of 8 or 4 bits."""
    if site.work == torch.float64:
        return "fp32"
    return site.group["basis_dtype"] or ("bf16" if form_of(site) in ("8bit", "4bit") else "fp32")


def begin_basis(site: Site, shape: tuple[int, int]) -> None:
    """Make room for P (d, r), all zero."""
    write_basis(site, torch.zeros(shape, dtype=site.work, device=site.param.device))


def read_basis(site: Site) -> Tensor:
    """P (d, r)"""
    if (held := site.state.get("basis")) is not None:
        return held.to(site.work)
    out = torch.empty(site.rank or 0, site.d, dtype=site.work, device=site.param.device)
    parts = {key.removeprefix("basis_"): value for key, value in site.state.items() if key.startswith("basis_")}
    CODES[basis_form(site)].decode(parts, out)
    return out.mT


def write_basis(site: Site, basis: Tensor) -> None:
    form = basis_form(site)
    if form in ("fp32", "bf16"):
        found = {"basis": basis.to(site.work if form == "fp32" else torch.bfloat16)}
    else:  # a scale for each column
        found = {f"basis_{key}": value for key, value in CODES[form].encode(basis.mT.contiguous()).items()}
    for key, value in found.items():
        if key in site.state:
            site.state[key].copy_(value)
        else:
            site.state[key] = value.clone(memory_format=torch.contiguous_format)
