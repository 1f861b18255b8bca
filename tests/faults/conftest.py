"""The programs of benchmarks/, which the tests run at a smaller size."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


def program(name: str) -> ModuleType:
    """A program of benchmarks/ as a module; once for the session."""
    if name not in sys.modules:
        file = Path(__file__).parents[2] / "benchmarks" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(scope="session")
def kill_and_resume() -> ModuleType:
    return program("kill_and_resume")


@pytest.fixture(scope="session")
def fuzz_files() -> ModuleType:
    return program("fuzz_files")
