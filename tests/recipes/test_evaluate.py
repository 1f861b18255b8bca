"""Evaluation: what is measured against what, on which seeds, and what is said where something cannot be told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fallow.analysis.images import frechet_distance
from fallow.analysis.judges import Aligned
from fallow.core.errors import ConfigError, DataError
from fallow.recipes import evaluate as module
from fallow.recipes.evaluate import Evaluation, evaluate, opened, own_prompts
from fallow.recipes.pictures import read_pictures


def painted(seed: int, red: float) -> Image.Image:
    """Noise around a colour: `red` in [0, 1] from blue to red."""
    rng = np.random.default_rng(seed)
    colour = np.array([red, 0.5, 1 - red]) * 200
    return Image.fromarray((colour + rng.integers(0, 56, (32, 32, 3))).clip(0, 255).astype(np.uint8))


class Colours:
    """Judges colours: features are the mean colour of each quarter; alignment is redness, of captions that say red."""

    name = "colours"

    def features(self, pictures):
        quarters = [np.array(p, dtype=np.float32).reshape(2, 16, 2, 16, 3).mean((1, 3)).ravel() / 255 for p in pictures]
        return torch.from_numpy(np.stack(quarters))

    def alignment(self, pictures, captions):
        red = [np.array(p)[..., 0].mean() / 255 for p, c in zip(pictures, captions, strict=True) if "red" in c]
        if not red:
            return Aligned(None, None, 0, "no caption says red")
        return Aligned(float(np.mean(red)), float(np.mean([r > 0.5 for r in red])), len(red))


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """A model that paints blue, an adapter that makes it red, and red real pictures; every call is noted."""
    calls: dict[str, Any] = {"drawn": [], "loaded": 0}

    def load(model, device=None, **_):
        calls["loaded"] += 1
        return {"red": 0.1}

    def adapt(pipeline, adapters, force=False):
        for _, scale in adapters:
            pipeline["red"] += 0.8 * scale

    def draw(pipeline, prompts, *, seeds, steps, guidance, **_):
        calls["drawn"].append((pipeline["red"], tuple(prompts), tuple(seeds), steps, guidance))
        return [painted(seed, pipeline["red"]) for seed in seeds]

    monkeypatch.setattr(module, "load_pipeline", load)
    monkeypatch.setattr(module, "apply_adapters", adapt)
    monkeypatch.setattr(module, "stills", draw)
    monkeypatch.setattr(module, "make_judge", lambda *a, **k: Colours())
    monkeypatch.setattr(module, "adapter_size", lambda path: (1300, 5200))
    for half, count, start in (("train", 30, 0), ("test", 20, 500)):
        folder = tmp_path / "red-things" / half
        folder.mkdir(parents=True)
        lines = []
        for i in range(count):
            painted(900_000 + start + i, 0.9).save(folder / f"{i:03d}.png")
            lines.append(json.dumps({"file_name": f"{i:03d}.png", "text": f"a red thing {i}"}))
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    calls["data"] = str(tmp_path / "red-things")
    return calls


def test_an_adapter_that_fits_the_data_comes_near_the_floor_and_the_base_model_does_not(world):
    evaluation = Evaluation(data=world["data"], images=40, prior_images=10)
    base = evaluation.measure().figures
    adapted = evaluation.measure([("red.safetensors", 1.0)]).figures
    assert adapted["frechet"] < 3 * adapted["frechet_floor"] < 0.1 * base["frechet"]
    assert adapted["alignment"] > 0.7 > 0.4 > base["alignment"]
    assert adapted["recognised"] == 1.0
    assert base["recognised"] == 0.0
    assert adapted["alignment_real"] == pytest.approx(adapted["alignment"], abs=0.02)


def test_distance_is_taken_to_the_test_half_and_the_floor_from_the_training_half(world):
    evaluation = Evaluation(data=world["data"], images=25, prior_images=0)
    judge = Colours()
    half = {
        name: judge.features([Image.open(path) for path in sorted((Path(world["data"]) / name).glob("*.png"))])
        for name in ("train", "test")
    }
    assert torch.equal(evaluation.real_features, half["test"])
    assert evaluation.floor == pytest.approx(frechet_distance(half["train"][:25], half["test"]))
    measured = evaluation.measure()
    assert measured.figures["frechet"] == pytest.approx(
        frechet_distance(judge.features(measured.pictures), half["test"])
    )
    assert measured.figures["reference_images"] == 20
    assert measured.figures["floor_images"] == 25
    assert measured.figures["images"] == 25


def test_prompts_are_the_captions_of_the_test_half_in_turn_and_seeds_do_not_depend_on_the_batch(world):
    one = Evaluation(data=world["data"], images=45, prior_images=0, batch=45, steps=7, guidance=2.5).measure()
    two = Evaluation(data=world["data"], images=45, prior_images=0, batch=8).measure()
    assert one.prompts[:2] == ["a red thing 0", "a red thing 1"]
    assert one.prompts[20] == "a red thing 0"
    assert [p.tobytes() for p in one.pictures] == [p.tobytes() for p in two.pictures]
    assert one.figures["frechet"] == two.figures["frechet"]
    assert len(set(world["drawn"][0][2])) == 45
    assert world["drawn"][0][3:] == (7, 2.5)
    assert max(len(prompts) for _, prompts, *_ in world["drawn"][1:]) == 8


def test_several_seeds_draw_other_pictures_and_give_mean_and_spread(world):
    figures = evaluate(data=world["data"], images=10, prior_images=0, seed=3, repeats=3)
    values = [one["frechet"] for one in figures["by_seed"]]
    assert [one["seed"] for one in figures["by_seed"]] == figures["seeds"] == [3, 4, 5]
    assert len(set(values)) == 3
    assert figures["frechet"] == pytest.approx(np.mean(values))
    assert figures["frechet_spread"] == pytest.approx(np.std(values, ddof=1))
    again = evaluate(data=world["data"], images=10, prior_images=0, seed=4)
    assert again["frechet"] == values[1]
    assert again["frechet_spread"] is None


def test_prior_of_the_base_model_is_untouched_and_that_of_an_adapter_is_its_drift(world):
    evaluation = Evaluation(data=world["data"], images=4, prior_images=12, prior_prompts=["a red hat", "a blue sky"])
    base, light, heavy = (evaluation.measure(a).figures for a in ([], [("x", 0.2)], [("x", 1.0)]))
    assert base["prior_frechet"] == pytest.approx(0, abs=1e-9)
    assert 0 < light["prior_frechet"] < heavy["prior_frechet"]
    assert heavy["prior_alignment_base"] == base["prior_alignment"] < heavy["prior_alignment"]
    drawn = [call for call in world["drawn"] if call[1][0] == "a red hat"]
    assert len(drawn) == 3  # the base model's once for all three
    assert len({seeds for _, _, seeds, *_ in drawn}) == 1  # the same noise


def test_prior_can_be_measured_against_real_pictures(world):
    figures = evaluate(data=world["data"], images=4, prior_images=12, prior_data=str(Path(world["data"]) / "train"))
    assert figures["prior_frechet"] > 0.1
    assert figures["prior_reference"].endswith("train")


def test_what_cannot_be_told_is_none_with_a_reason_and_never_a_number(world):
    for line in (metadata := Path(world["data"]) / "test" / "metadata.jsonl").read_text().splitlines()[:1]:
        assert "red" in line
    metadata.write_text(metadata.read_text().replace("red", "round"))
    figures = evaluate(data=world["data"], images=4, prior_images=0)
    assert figures["alignment"] is None
    assert figures["recognised"] is None
    assert figures["frechet"] > 0
    assert "alignment: no caption says red" in figures["notes"]
    assert "prior preservation was not measured (prior_images=0)" in figures["notes"]
    json.dumps(figures, allow_nan=False)


def test_a_folder_without_a_test_half_is_judged_on_itself_and_it_is_said(world):
    figures = evaluate(data=str(Path(world["data"]) / "train"), images=4, prior_images=0)
    assert any("train has no test half" in note for note in figures["notes"])
    assert figures["reference_images"] == 30
    assert figures["floor_images"] == 15
    assert figures["reference_unseen"] is False
    assert evaluate(data=world["data"], images=4, prior_images=0)["reference_unseen"] is True


def test_pictures_without_captions_are_judged_with_the_prompt_that_they_were_trained_with(world):
    for half in ("train", "test"):
        (Path(world["data"]) / half / "metadata.jsonl").unlink()
    with pytest.raises(DataError, match="one prompt for all"):
        evaluate(data=world["data"], images=4, prior_images=0)
    figures = evaluate(data=world["data"], images=4, prior_images=0, prompt="a red thing")
    assert world["drawn"][-1][1] == ("a red thing",) * 4
    assert figures["aligned_images"] == 4


def test_output_holds_the_figures_and_every_picture(world, tmp_path):
    figures = evaluate(data=world["data"], images=5, prior_images=0, output=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == figures
    assert len(list((tmp_path / "out").glob("picture-*.png"))) == 5


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"images": 1}, "images=1"),
        ({"repeats": 0}, "repeats=0"),
        ({"seed": -1}, "seed=-1"),
        ({"prior_images": 1}, "prior_images=1"),
        ({"steps": 0}, "steps=0"),
    ],
)
def test_impossible_requests_are_refused_before_the_model_is_loaded(world, wrong, says):
    with pytest.raises(ConfigError, match=says):
        evaluate(data=world["data"], **wrong)
    assert world["loaded"] == 0


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_drawn(world, tmp_path):
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="is, or lies in, a file; give a folder"):
            evaluate(data=world["data"], images=4, output=output)
    assert (world["loaded"], world["drawn"]) == (0, [])


def test_the_garment_net_on_large_pictures_is_said_to_tell_little(world, monkeypatch, tmp_path):
    class Garments(Colours, module.GarmentJudge):
        def __init__(self):
            pass

    monkeypatch.setattr(module, "make_judge", lambda *a, **k: Garments())
    small = evaluate(data=world["data"], images=4, prior_images=0)
    assert not any("garment net" in note for note in small["notes"])
    (tmp_path / "large" / "test").mkdir(parents=True)
    for name in ("a", "b"):
        painted(0, 0.5).resize((128, 96)).save(tmp_path / "large" / "test" / f"{name}.png")
    monkeypatch.setattr(module, "opened", lambda pictures: [painted(0, 0.5) for _ in pictures])
    large = evaluate(data=str(tmp_path / "large"), images=4, prior_images=0, prompt="a red thing")
    assert sum("its figures say little: give weights" in note for note in large["notes"]) == 1


def test_one_picture_is_not_enough_to_compare_with(world, tmp_path):
    (tmp_path / "one").mkdir()
    painted(0, 0.5).save(tmp_path / "one" / "a.png")
    (tmp_path / "one" / "a.txt").write_text("a red thing")
    with pytest.raises(DataError, match="has 1 picture to compare with"):
        evaluate(data=str(tmp_path / "one"))


def test_a_real_pipeline_is_judged_with_and_without_its_adapter(world, tiny_sd, tmp_path, monkeypatch):
    from fallow.recipes import adapter_files, pipelines

    monkeypatch.undo()
    monkeypatch.setattr(module, "make_judge", lambda *a, **k: Colours())
    unet = pipelines.load_pipeline(str(tiny_sd), "cpu").unet
    prints = adapter_files.base_fingerprints(unet)
    with torch.no_grad():
        unet.conv_out.bias.add_(2.0)
    path = adapter_files.save_full(unet, tmp_path / "full", prints, {"method": "full"})
    evaluation = Evaluation(
        model=str(tiny_sd), data=world["data"], images=6, prior_images=4, steps=2, batch=4, device="cpu"
    )
    base, adapted, half = (evaluation.measure(a).figures for a in ([], [(path, 1.0)], [(path, 0.5)]))
    assert adapted["frechet"] != half["frechet"] != base["frechet"]
    assert base["prior_frechet"] == pytest.approx(0, abs=1e-12)
    assert 1e-6 < half["prior_frechet"] < adapted["prior_frechet"]
    assert adapted["trained_parameters"] == sum(p.numel() for p in unet.parameters())
    assert adapted["adapter_bytes"] == sum(f.stat().st_size for f in path.iterdir())
    assert base["trained_parameters"] == base["adapter_bytes"] == 0
    again = evaluation.measure([(path, 1.0)]).figures
    assert again["frechet"] == adapted["frechet"]
    json.dumps(adapted, allow_nan=False)


def test_pictures_are_judged_as_they_are_looked_at(tmp_path):
    turned = Image.new("RGBA", (40, 20), (255, 0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "a.png", exif=exif)
    found = opened(read_pictures(tmp_path, prompt=""))[0]
    assert (found.size, found.getpixel((5, 5))) == ((20, 40), (255, 255, 255))


def test_prior_prompts_are_of_the_domain_that_the_judge_knows():
    assert own_prompts("mini-sd", "dinov2", None) == own_prompts("merged", None, None) == module.GARMENT_PROMPTS
    assert own_prompts("merged", "dinov2", None) == own_prompts("x/y", None, "clip") == module.EVERYDAY_PROMPTS
