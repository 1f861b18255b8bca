"""How long the file of each method is, beside what the installed PEFT has of the method.

    python benchmarks/deltas_lines.py --out benchmarks/results

`code`: lines that are neither blank nor comment nor docstring. Of PEFT, a method with a folder of its own counts all of
it; of those that live within LoRA's, the classes and files named here, without what LoRA's own files do for them. What
all methods share is told once: our contract, engine and hosts. Core modules that a method's file imports are named.
"""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import io
import json
import tokenize
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import peft

import fallow
import fallow.deltas
from fallow.core.delta import REGISTRY
from fallow.core.files import atomic_write

TUNERS = Path(peft.__file__).parent / "tuners"
SOURCE = Path(fallow.__file__).parent
PARTS: dict[str, list[str]] = {  # of peft/tuners: folders, files, and classes of a file whose name has a word in it
    "lora": ["lora/config.py", "lora/layer.py", "lora/model.py"],
    "dora": ["lora/dora.py", "lora/variants.py:Dora"],
    "kasa": ["lora/variants.py:Kasa", "lora/variants.py:kasa", "lora/config.py:Kasa"],
    "vera": ["vera"],
    "randlora": ["randlora"],
    "bone": ["miss"],
    "shira": ["shira"],
}
SHARED = ("core/delta.py", "core/engine.py", "core/views.py", "core/host", "core/peft_host")


def lines(text: str) -> tuple[int, int]:
    """(all lines, code lines) of a Python source."""
    quiet = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    coded: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in quiet:
            coded |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                coded -= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return len(text.splitlines()), len(coded)


def of_part(folder: Path, part: str) -> tuple[int, int]:
    """(all, code) lines of a folder, a file, or of a file's top-level classes and functions named like a word."""
    place, _, word = part.partition(":")
    if (folder / place).is_dir():
        return total(lines(path.read_text(encoding="utf-8")) for path in sorted((folder / place).rglob("*.py")))
    text = (folder / place).read_text(encoding="utf-8")
    if not word:
        return lines(text)
    named = [node for node in ast.parse(text).body if word in getattr(node, "name", "")]
    return total(lines(ast.get_source_segment(text, node) or "") for node in named)


def total(pairs: Iterable[tuple[int, int]]) -> tuple[int, int]:
    found = list(pairs)
    return sum(one for one, _ in found), sum(code for _, code in found)


def core_of(text: str) -> list[str]:
    """The modules of fallow.core and fallow.deltas that a source imports, but for contract and errors."""
    found = {node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom) and node.module}
    plain = {"fallow.core.delta", "fallow.core.errors", "fallow.core.views"}
    return sorted(name for name in found - plain if name.startswith(("fallow.core", "fallow.deltas")))


def table() -> list[dict[str, Any]]:
    """A row for each method, in the order of their names."""
    ours = [name for name, method in REGISTRY.items() if method.__module__.startswith("fallow.deltas.")]
    files = {name: SOURCE / f"deltas/{name.replace('-', '_')}.py" for name in ours}
    files["shira"] = SOURCE / "selection/shira.py"
    rows = []
    for name, path in sorted(files.items()):
        text = path.read_text(encoding="utf-8")
        whole, code = lines(text)
        row: dict[str, Any] = {"method": name, "lines": whole, "code": code, "imports": core_of(text)}
        if name in PARTS:
            theirs, their_code = total(of_part(TUNERS, part) for part in PARTS[name])
            row["peft"] = {"parts": PARTS[name], "lines": theirs, "code": their_code}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a folder for deltas-lines.json")
    given = parser.parse_args()
    rows = table()
    shared = {part: dict(zip(("lines", "code"), of_part(SOURCE, part), strict=True)) for part in SHARED}
    for row in rows:
        peer = f"   PEFT {row['peft']['lines']} ({row['peft']['code']} code)" if "peft" in row else ""
        print(f"{row['method']:14} {row['lines']:4} lines, {row['code']:4} code{peer}")
    for part, counts in shared.items():
        print(f"shared: {part:16} {counts['lines']:5} lines, {counts['code']:5} code")
    if given.out:
        told = {"peft": importlib.metadata.version("peft"), "methods": rows, "shared": shared}
        with atomic_write(given.out / "deltas-lines.json") as part:
            part.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
