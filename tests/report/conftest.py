"""A run and a comparison on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_folders import make_comparison, make_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "sara-blueprint-1")


@pytest.fixture
def comparison(tmp_path: Path) -> Path:
    return make_comparison(tmp_path / "compare-blueprint")
