"""The experiment of SaRA's section 3 on a real (tiny) pipeline: zero the small, draw, judge, put back."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fallow.analysis.judges import Aligned
from fallow.core.errors import ConfigError, SelectionError
from fallow.recipes import probe as module
from fallow.recipes.pipelines import load_pipeline
from fallow.recipes.probe import Probe, probe


class Quarters:
    """Features are the mean colour of each quarter of a picture. Keeps what it saw."""

    name = "quarters"

    def __init__(self) -> None:
        self.saw: list[np.ndarray] = []

    def features(self, pictures):
        self.saw.append(np.stack([np.array(p, dtype=np.float32) for p in pictures]))
        found = [np.array(p, dtype=np.float32).reshape(2, 16, 2, 16, 3).mean((1, 3)).ravel() for p in pictures]
        return torch.from_numpy(np.stack(found)) / 255

    def alignment(self, pictures, captions):
        return Aligned(None, None, 0, "it cannot read")


@pytest.fixture
def judge() -> Quarters:
    return Quarters()


@pytest.fixture
def seen(tiny_sd, monkeypatch, judge):
    """The pipelines that were loaded; the judge is one of quarters."""
    loaded = []

    def load(*args, **more):
        loaded.append(load_pipeline(*args, **more))
        return loaded[-1]

    monkeypatch.setattr(module, "load_pipeline", load)
    monkeypatch.setattr(module, "make_judge", lambda *_, **__: judge)
    return loaded


@pytest.fixture
def plan(tiny_sd, tmp_path):
    def make(**settings) -> Probe:
        plain = {
            "model": str(tiny_sd),
            "images": 6,
            "steps": 2,
            "batch": 4,
            "device": "cpu",
            "output": tmp_path / "probe",
        }
        return Probe(**{**plain, "prompts": ["a dress", "a coat"], **settings})

    return make


def test_rows_go_from_nothing_to_most_zeroed_and_the_weights_are_as_before(plan, seen, judge, tiny_sd):
    rows = probe(plan(shares=[0.5, 0.02, 0.9]))["rows"]
    assert [row["share"] for row in rows] == pytest.approx([0, 0.02, 0.5, 0.9], abs=1e-3)
    assert all(a["threshold"] < b["threshold"] and a["zeroed"] < b["zeroed"] for a, b in pairwise(rows))
    assert all(row["zeroed"] == round(row["share"] * row["total"]) for row in rows)
    _, whole, *zeroed = judge.saw  # the reference first
    drift = [np.abs(pictures - whole).mean() for pictures in zeroed]
    assert 0 < drift[0] < 0.1 * drift[1] < 0.1 * drift[2]  # the smallest hardly matter, the others do
    assert rows[0]["alignment"] is None
    fresh = load_pipeline(str(tiny_sd), "cpu").unet
    assert all(torch.equal(a, b) for a, b in zip(seen[0].unet.parameters(), fresh.parameters(), strict=True))


def test_what_is_written_is_what_is_told(plan, seen):
    settings = plan(thresholds=[0.05])
    found = probe(settings)
    assert json.loads((settings.output / "probe.json").read_text()) == found
    assert sorted(p.name for p in settings.output.iterdir()) == ["pictures.png", "probe.json", "probe.png"]
    assert [row["threshold"] for row in found["rows"]] == [0, 0.05]
    width, height = Image.open(settings.output / "pictures.png").size
    assert width == 2 * 130 - 2  # two columns: nothing zeroed, and below 0.05
    assert height == 16 + 6 * 130 - 2
    with pytest.raises(ConfigError, match="would be overwritten"):
        probe(settings)


def test_real_pictures_are_the_reference_where_some_are_given(plan, seen, tmp_path):
    for number in range(5):
        (tmp_path / "set" / "test").mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "set" / "test" / f"{number}.png")
    found = probe(plan(data=str(tmp_path / "set"), shares=[0.5]))
    assert found["reference"] == f"5 real pictures of {tmp_path / 'set'}"
    assert found["rows"][0]["frechet"] > 0


def test_include_restricts_what_is_zeroed(plan, seen):
    every, some = (probe(plan(shares=[0.5], include=i, overwrite=True))["rows"][1]["total"] for i in (None, "attn2"))
    assert some < every / 4


def test_impossible_requests_are_refused_before_anything_is_drawn(plan, seen, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "stills", lambda *_, **__: pytest.fail("drawn"))
    with pytest.raises(ConfigError, match="images=1"):
        probe(plan(images=1))
    with pytest.raises(ConfigError, match="batch=0"):
        probe(plan(batch=0))
    with pytest.raises(SelectionError, match="include"):
        probe(plan(include="nowhere", shares=[0.5]))
    with pytest.raises(SelectionError, match="threshold"):
        probe(plan(thresholds=[0.0]))
    assert not (tmp_path / "probe").exists()


def test_two_runs_draw_the_same(plan, seen):
    first = probe(plan(shares=[0.3]))
    shutil.rmtree(Path(first["written"]["probe.json"]).parent)
    assert probe(plan(shares=[0.3])) == first
