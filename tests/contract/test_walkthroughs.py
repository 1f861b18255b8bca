"""The walkthroughs of the documentation, done as they are written but for the number of steps."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from typer.testing import CliRunner

from fallow.cli import app
from fallow.core.sparse import SparseDelta

PAGES = Path(__file__).parents[2] / "docs" / "walkthroughs"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (PAGES / page).read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_controlnet_is_trained_saved_and_drawn_with(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks("controlnet.md", "python"):
        exec(block.replace("range(600)", "range(2)").replace("num_inference_steps=25", "num_inference_steps=2"), names)
    control, fresh = names["control"], names["fresh"]
    assert all(torch.equal(a, b) for a, b in zip(control.parameters(), fresh.parameters(), strict=True))
    optimizer = names["optimizer"]
    assert optimizer.trained_parameters == round(0.2 * optimizer.total_parameters)
    joints = {name: pair for name, pair in optimizer.selected().items() if name.startswith("controlnet_down_blocks")}
    assert joints
    assert all(chosen == entries for chosen, entries in joints.values())  # what begins at zero is chosen whole
    assert SparseDelta.load(Path("outlines.safetensors")).trained == optimizer.trained_parameters
    assert not any(parameter.requires_grad for parameter in names["pipeline"].unet.parameters())
    drawn = np.stack([np.asarray(picture) for picture in names["pictures"]])
    assert drawn.shape == (8, 32, 32, 3)
    assert drawn.std() > 5


def test_the_subject_is_trained_drawn_and_judged(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fewer = {"--steps": "2", "--class-images": "2", "--images": "4", "--prior-images": "2", "--sample-steps": "2"}
    ran = []
    for line in "".join(blocks("dreambooth.md", "bash")).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        for flag, value in fewer.items():
            if flag in words:
                words[words.index(flag) + 1] = value
        more = ["--samples", "0"] if words[1] == "train" else ["--prior-images", "2"] if words[1] == "evaluate" else []
        told = CliRunner().invoke(app, [*words[1:], *more])
        assert told.exit_code == 0, f"{line}\n{told.output}"
        ran.append(words[1])
    assert ran == ["train", "generate", "evaluate"]
    assert Image.open("bag/beside-base.png").size[0] > 64
    assert len(list(Path("runs/bag/class-pictures").glob("*.png"))) == 2
