"""One page in one file: templates, figures as people read them, pictures and plots inlined.

A page must open from a mail attachment in ten years: no script, no URL, everything inside. All text is escaped.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image, UnidentifiedImageError

from fallow.core.files import atomic_write

HEAVIEST = 1_500_000  # bytes; a heavier picture is inlined smaller, the original stays in the run directory
WIDEST = 1600  # pixels of such a picture


def count(value: float | None) -> str:
    """`3,152` below a million, then `3.15 M`, `1.20 B`."""
    if value is None:
        return "–"
    for size, unit in ((1e9, "B"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:,.0f}"


def data_size(value: float | None) -> str:
    """Bytes -> `12.3 MB`; powers of 1000, as disks and model hubs count."""
    if value is None:
        return "–"
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value < 1000 * size else f"{value / size:,.0f} {unit}"
    return f"{value:.0f} B"


def duration(seconds: float | None) -> str:
    """`0.38 s`, `42 s`, `3 min 12 s`, `2 h 05 min`."""
    if seconds is None:
        return "–"
    if seconds < 10:
        return f"{seconds:.2f} s" if seconds >= 0.1 else f"{1000 * seconds:.3g} ms"
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def percent(share: float | None) -> str:
    """`5.00%`; three figures, so that 0.0512% shows too."""
    if share is None:
        return "–"
    value = 100 * share
    return f"{value:.0f}%" if value >= 99.5 or value == 0 else f"{value:.3g}%"


def share(value: float | None) -> str:
    """A share as per cent to one decimal, without the sign: `94.3`."""
    return "–" if value is None else f"{100 * value:.1f}"


def figure(value: float | None, digits: int = 3) -> str:
    """A measured figure to `digits` decimals, fewer where it is large; a dash for None."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    size = abs(value)
    return f"{value:.{digits if size < 10 else 2 if size < 100 else 1}f}"


def rate(value: float | None) -> str:
    """A learning rate: `0.0005`, `5e-05`."""
    return "–" if value is None else f"{value:.3g}"


def picture_uri(source: Path | Image.Image) -> str | None:
    """A picture as a data URI, heavy ones smaller and as JPEG; None where the file is missing or cannot be read."""
    if isinstance(source, Path):
        try:
            raw = source.read_bytes()
            with Image.open(io.BytesIO(raw)) as image:
                image.load()
                kind = image.format
                if len(raw) <= HEAVIEST and kind in ("PNG", "JPEG", "WEBP"):
                    return f"data:image/{kind.lower()};base64,{base64.b64encode(raw).decode()}"
                source = image.convert("RGB")
        except (OSError, UnidentifiedImageError, SyntaxError, ValueError):
            return None
        heavy = len(raw) > HEAVIEST
    else:
        heavy = source.width * source.height > HEAVIEST
    buffer = io.BytesIO()
    if heavy:
        source = source.convert("RGB")
        source.thumbnail((WIDEST, WIDEST), Image.Resampling.LANCZOS)
        source.save(buffer, "JPEG", quality=88)
        return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    source.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def picture_fit(source: Path | Image.Image) -> str:
    """`small` for a picture that is to be enlarged with its pixels kept square, else nothing."""
    if isinstance(source, Path):
        with Image.open(source) as image:
            return "small" if image.width <= 700 else ""
    return "small" if source.width <= 700 else ""


def pairs(value: Any) -> list[tuple[str, str]]:
    """Whatever was recorded (a mapping, a list, one text) as rows of a table."""
    if isinstance(value, dict):
        return [(str(k), ", ".join(map(str, v)) if isinstance(v, (list, tuple)) else str(v)) for k, v in value.items()]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [("", str(item)) for item in value]
    return [] if value in (None, "") else [("", str(value))]


def render(template: str, target: Path, **context: Any) -> Path:
    """Write the template, filled, to `target` (atomically); returns `target`."""
    environment = Environment(
        loader=PackageLoader("fallow.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "count": count, "data_size": data_size, "duration": duration, "percent": percent, "figure": figure,
        "rate": rate, "pairs": pairs, "share": share,
    }  # fmt: skip
    text = environment.get_template(template).render(**context)
    with atomic_write(target) as partial:
        Path(partial).write_text(text, encoding="utf-8")
    return target
