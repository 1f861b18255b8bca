"""report.html: complete in itself, right in what it says, whole whatever the run left behind."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from run_folders import change, make_run, picture

from fallow.core.errors import DataError
from fallow.report.run import block_of, kind_of, read_run, write_run_report

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Wellformed(HTMLParser):
    """Collects the text; fails where a tag is closed that is not open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & {*self.open}:
            self.text.append(data)


def page(folder: Path) -> tuple[str, str]:
    """The page's source, checked to be well-formed, and its words."""
    source = write_run_report(folder).read_text(encoding="utf-8")
    parser = Wellformed()
    parser.feed(source)
    assert not parser.open
    assert "script" not in parser.tags
    return source, re.sub(r"\s+", " ", " ".join(parser.text))


def images(source: str) -> list[Image.Image]:
    return [
        Image.open(io.BytesIO(base64.b64decode(found)))
        for found in re.findall(r'src="data:image/(?:png|jpeg);base64,([^"]+)"', source)
    ]


def test_page_is_one_file_without_any_url_or_script(run):
    source, _ = page(run)
    assert "http" not in source.replace("http-equiv", "")
    assert "//" not in re.sub(r"base64,[^\"]+", "", source)
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", source)
    assert "url(" not in re.sub(r"url\(#", "", source)
    assert source.count("<svg") == 5  # loss, rate, memory, gradient norm, blocks


def test_headline_says_what_the_run_recorded(run):
    _, text = page(run)
    assert "sara on blueprint" in text
    assert "Trained parameters 1,300 5% of 26,000" in text
    assert "Training time 3 min 12 s 40 steps" in text
    assert "Per step 0.38 s 2.6 steps/s" in text
    assert "Peak memory 951 MB" in text
    assert "Adapter 5.2 kB 4 bytes per parameter" in text
    assert "entries below 0.002 trained" in text
    assert "unfinished" not in text


def test_pictures_are_inside_and_the_same_to_the_pixel(run):
    source, text = page(run)
    inlined = images(source)
    assert len(inlined) == 5
    assert inlined[0].tobytes() == Image.open(run / "samples" / "before.png").tobytes()
    assert inlined[1].tobytes() == Image.open(run / "samples" / "after.png").tobytes()
    assert "step 10" in text
    assert "a photo of a coat" in text


def test_trained_shares_are_summed_by_block_and_by_kind_of_layer(run):
    _, text = page(run)
    assert "down_blocks.0 2 800 15,000 5.33%" in text
    assert "self-attention 200 5,000 4%" in text
    assert "cross-attention 400 10,000 4%" in text
    assert "convolution 700 11,000 6.36%" in text
    assert "all 1,300 26,000 5%" in text


@pytest.mark.parametrize(
    ("name", "block", "kind"),
    [
        ("down_blocks.1.resnets.0.conv1.weight", "down_blocks.1", "convolution"),
        ("mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight", "mid_block.attentions.0", "cross-attention"),
        ("transformer_blocks.11.attn1.to_q.weight", "transformer_blocks.11", "self-attention"),
        ("time_embedding.linear_1.weight", "time_embedding", "time embedding"),
        ("up_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj.weight", "up_blocks.0", "feed-forward"),
        ("conv_norm_out.weight", "conv_norm_out", "norm"),
        ("text_model.encoder.layers.3.self_attn.k_proj.weight", "text_model", "self-attention"),
        ("bias", "bias", "other"),
        ("unet.conv_in.weight", "unet.conv_in", "convolution"),
        ("unet.mid_block.resnets.0.conv1.weight", "unet.mid_block.resnets.0", "convolution"),
        ("text_encoder.encoder.layers.1.self_attn.k_proj.weight", "text_encoder.encoder.layers.1", "self-attention"),
    ],
)
def test_parameters_find_their_block_and_kind(name, block, kind):
    assert (block_of(name), kind_of(name)) == (block, kind)


def test_events_are_told_in_words(run):
    _, text = page(run)
    assert "20 reselect kept 25 of 100 trained entries (25%)" in text


def test_validation_has_a_curve_and_its_lowest_loss_but_no_events(run):
    with (run / "metrics.jsonl").open("a") as file:
        for step, loss in ((0, 0.61), (20, 0.52), (40, 0.57)):
            file.write(json.dumps({"event": "validation", "step": step, "validation_loss": loss}) + "\n")
    change(run, validation={"loss": 0.57, "best": {"step": 20, "loss": 0.52}})
    page = write_run_report(run).read_text()
    assert "lowest, after step 20" in page
    assert "loss on pictures held out" in page
    assert "validation_loss" not in page


def test_command_config_and_environment_are_there_to_run_it_again(run):
    source, text = page(run)
    assert "fallow train --data blueprint" in text
    assert html.escape('model = "mini-sd"', quote=False) in html.unescape(source)
    assert "torch 2.13.0" in text
    assert "cores 2" in text


def test_a_command_with_arguments_in_a_list_is_quoted_for_the_shell(run):
    change(run, command=["fallow", "train", "--prompt", "a photo of a cat"])
    _, text = page(run)
    assert "fallow train --prompt 'a photo of a cat'" in text


def test_all_text_is_escaped(tmp_path):
    run = make_run(tmp_path / "<b>run")
    evil = "<script>alert(1)</script>"
    change(
        run,
        prompts=[evil],
        command=evil,
        method=evil,
        data=f"x{evil}",
        hardware={evil: evil},
        status="failed",
        error=evil,
    )
    change(run, trained_where={evil: [1, 2]})
    (run / "config.toml").write_text(f'prompt = "{evil}"\n')
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"event": evil, "step": 3, "said": evil}) + "\n")
    source, text = page(run)
    assert "<script" not in source
    assert text.count("<script>alert(1)</script>") >= 7


def test_an_empty_run_directory_with_only_a_config_gives_a_page_that_says_unfinished(tmp_path):
    (tmp_path / "config.toml").write_text('method = "lora"\ndata = "my/pictures"\nmodel = "some/model"\n')
    source, text = page(tmp_path)
    assert "lora on pictures" in text
    assert "This run is unfinished." in text
    assert "No step was logged." in text
    assert "<svg" not in source
    assert "Trained parameters" not in text


def test_a_failed_run_says_why(run):
    change(run, status="failed", error="loss is NaN at step 31")
    _, text = page(run)
    assert "This run is failed." not in text
    assert "This run failed." in text
    assert "loss is NaN at step 31" in text


def test_every_figure_may_be_missing(run):
    (run / "metrics.jsonl").unlink()
    for name in list(json.loads((run / "run.json").read_text())):
        change(run, **{name: None})
        page(run)
    assert json.loads((run / "run.json").read_text()) == {}


@pytest.mark.parametrize("name", ["before", "after", "examples", "step-000010"])
def test_missing_and_broken_pictures_are_left_out(run, name):
    (run / "samples" / f"{name}.png").write_bytes(b"\x89PNG\r\n\x1a\nnot a picture")
    assert len(images(page(run)[0])) == 4
    (run / "samples" / f"{name}.png").unlink()
    assert len(images(page(run)[0])) == 4


def test_half_a_line_of_a_killed_run_and_a_broken_file_are_said_and_survived(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "lo')
    (run / "run.json").write_text("{")
    source, text = page(run)
    assert "1 line of metrics.jsonl could not be read" in text
    assert "run.json cannot be read" in text
    assert source.count("<svg") == 4


def test_losses_that_are_not_numbers_do_not_break_the_curves(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "loss": NaN, "lr": null}\n{"step": 42, "loss": Infinity}\n')
    steps, losses = read_run(run).series("loss")
    assert steps[-2:] == [41, 42]
    assert losses[-2:] == [None, None]
    assert page(run)[0].count("<svg") == 5


def test_one_logged_step_gives_curves_of_one_point(tmp_path):
    run = make_run(tmp_path / "short", steps=1)
    assert page(run)[0].count("<svg") == 5


def test_many_samples_are_thinned_evenly_and_the_page_says_so(run):
    for step in range(30, 500, 10):
        picture(run / "samples" / f"step-{step:06d}.png", 8, 8, seed=step)
    source, text = page(run)
    assert len(images(source)) == 3 + 12
    assert "12 of 49 samples" in text
    assert "step 10 " in text
    assert "step 490" in text


def test_a_heavy_picture_is_inlined_smaller(run):
    picture(run / "samples" / "after.png", 2000, 1000)
    after = images(page(run)[0])[1]
    assert after.size == (1600, 800)
    assert after.format == "JPEG"


def test_evaluation_of_the_run_is_shown_beside_its_floor(run):
    evaluation = {
        "images": 64, "reference_images": 100, "judge": "garment net", "frechet": 6.25, "frechet_floor": 1.5,
        "alignment": None, "alignment_real": 0.9, "recognised": None, "recognised_real": 0.95, "prior_images": 0,
        "notes": ["alignment: no caption names a class"],
    }  # fmt: skip
    (run / "evaluation").mkdir()
    (run / "evaluation" / "evaluation.json").write_text(json.dumps(evaluation))
    _, text = page(run)
    assert "Frechet distance 6.250 1.500" in text
    assert "Text alignment – 0.900" in text
    assert "Note: alignment: no caption names a class" in text
    assert "training never saw" not in text
    change(run, "evaluation/evaluation.json", reference_unseen=True)
    assert "against 100 real ones that training never saw" in page(run)[1]


def test_a_folder_that_is_no_run_is_refused_by_name(tmp_path):
    with pytest.raises(DataError, match=r"is not a run: it has no config\.toml"):
        write_run_report(tmp_path)
    with pytest.raises(DataError, match=r"nowhere is no folder"):
        write_run_report(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_writing_again_replaces_the_page_and_leaves_nothing_beside_it(run):
    page(run)
    before = {path.name for path in run.iterdir()}
    page(run)
    assert {path.name for path in run.iterdir()} == before
