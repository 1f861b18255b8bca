"""The rules of the house: imports run one way, every package is declared, files stay short, public names are told."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import fallow

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "fallow"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LONGEST = 220
LONGER = {"selection/selective.py": 510}  # the engine: one class, whose parts share its state
VAGUE = re.compile(r"(^|_)(utils?|helpers?|misc|managers?|handlers?|common|stuff)(_|$)")
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b|raise NotImplementedError")
OWN_PATHS = re.compile(r"(?<![\w.])/(work|root|home/\w+)/")


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(*extras: str) -> set[str]:
    """The packages that pyproject.toml asks for, in the core and in these extras."""
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    return {canonical(Requirement(line).name) for line in lines}


def imported(path: Path) -> Iterator[str]:
    """The packages a file imports, anywhere in it, that are neither Python's nor ours."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        else:
            continue
        for name in names:
            package = name.partition(".")[0]
            if package not in sys.stdlib_module_names and package != "fallow":
                yield package


def tracked(*patterns: str) -> list[Path]:
    return sorted(
        path for pattern in patterns for path in ROOT.glob(pattern) if not {".venv", "assets"} & set(path.parts)
    )


def test_imports_run_one_way_only():
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    pytest.importorskip("importlinter")
    told = subprocess.run([*command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert told.returncode == 0, told.stdout + told.stderr
    assert "1 kept, 0 broken" in told.stdout


def test_every_layer_of_the_house_is_in_the_import_contract():
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    (layers,) = [contract["layers"] for contract in contract["contracts"]]
    named = {name.strip() for layer in layers for name in layer.split("|")}
    present = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert named == {f"fallow.{name}" for name in present - {"__init__"}}


def test_every_import_of_the_package_is_a_declared_dependency():
    distributions = packages_distributions()
    allowed = declared(*PROJECT["optional-dependencies"])
    for path in tracked("src/**/*.py"):
        for package in imported(path):
            names = {canonical(name) for name in distributions.get(package, [package])}
            assert names & allowed, f"{path.relative_to(ROOT)} imports {package}, which pyproject.toml does not declare"


def test_what_is_imported_at_the_top_of_a_module_is_in_the_core_install():
    distributions = packages_distributions()
    for path in tracked("src/**/*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for package in {name.partition(".")[0] for name in names} - {"fallow", *sys.stdlib_module_names}:
                found = {canonical(name) for name in distributions.get(package, [package])}
                assert found & declared(), f"{path.relative_to(ROOT)} imports {package} at the top"


def test_every_declared_package_of_the_set_up_is_pinned_exactly():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"==[\w.]+", str(pin.specifier)) and pin.url is None for pin in pins)
    assert {"torch==2.13.0"} <= set(lines)
    missing = declared("test", "lint", "docs", "metrics") - {canonical(pin.name) for pin in pins}
    assert not missing


def test_method_files_are_short_enough_to_read_in_five_minutes():
    folders = ("selection/*", "objectives/*", "starts/*", "budgets/*", "optim/**/*")
    for path in tracked(*(f"src/fallow/{folder}.py" for folder in folders)):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        longest = LONGER.get(path.relative_to(SOURCE).as_posix(), LONGEST)
        assert lines <= longest, f"{path.relative_to(ROOT)} has {lines} lines, over {longest}: move a part into core/"
    assert all((SOURCE / name).exists() for name in LONGER)


def test_no_file_has_a_name_that_says_nothing():
    vague = [path for path in tracked("src/**/*.py", "tests/**/*.py", "scripts/*.py") if VAGUE.search(path.stem)]
    assert not vague


def test_nothing_is_left_unfinished_and_no_machine_is_named():
    for path in tracked("src/**/*.py", "scripts/*.py", "docs/**/*.md", "*.md", "*.toml", "Makefile", ".ci/run"):
        text = path.read_text(encoding="utf-8")
        for pattern in (UNFINISHED, OWN_PATHS):
            assert not pattern.search(text), f"{path.relative_to(ROOT)}: {pattern.search(text)}"


def test_every_exception_that_is_caught_blindly_says_why():
    for path in tracked("src/**/*.py"):
        lines = path.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines):
            if re.match(r"\s*except( Exception| BaseException)?( as \w+)?:", line):
                near = "\n".join(lines[max(0, number - 1) : number + 2])
                assert "#" in near, f"{path.relative_to(ROOT)}:{number + 1} catches everything and does not say why"


@pytest.mark.parametrize("name", fallow.__all__)
def test_a_public_name_is_importable_and_documented(name):
    assert name in fallow.__dir__()
    assert (getattr(fallow, name).__doc__ or "").strip()
    pages = "".join(path.read_text(encoding="utf-8") for path in tracked("docs/**/*.md"))
    assert f"fallow.{name}" in pages, f"fallow.{name} stands on no page of docs/"


def test_every_module_says_what_it_is_for():
    for path in tracked("src/**/*.py"):
        text = path.read_text(encoding="utf-8")
        assert not text.strip() or ast.get_docstring(ast.parse(text)), path.relative_to(ROOT)
