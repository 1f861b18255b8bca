"""comparison.html: the table, the pictures and the failures, from the files alone."""

from __future__ import annotations

import json
import re

import pytest
from run_folders import change
from test_run import Wellformed, images

from fallow.core.errors import DataError
from fallow.report.comparison import strip, write_comparison_page


def page(folder):
    source = write_comparison_page(folder).read_text(encoding="utf-8")
    parser = Wellformed()
    parser.feed(source)
    assert not parser.open
    return source, re.sub(r"\s+", " ", " ".join(parser.text))


def test_table_ranks_the_methods_by_vlhi_with_their_spread(comparison):
    _, text = page(comparison)
    assert "Highest VLHI: sara" in text
    assert text.index("sara 1.80 ± 0.10 6.500 ± 0.500 0.880 ± 0.020") < text.index("lora 1.30 ± 0.10 9.200")
    assert "base model – 30.00 0.880 90%" in text
    assert "real pictures – 1.100 0.910 95%" in text


def test_failures_are_named_with_their_reason_and_escaped(comparison):
    source, text = page(comparison)
    assert "1 run failed" in text
    assert "full, lr 0.001, seed 0: RuntimeError: <out of memory>" in text
    assert "<out of memory>" not in source


def test_pictures_stand_side_by_side_and_the_page_is_one_file(comparison):
    source, _ = page(comparison)
    assert [image.size for image in images(source)] == [(32, 32), (32, 32), (96, 32), (96, 32)]
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", source)
    assert "http" not in source
    assert "<script" not in source
    assert source.count("<svg") == 9


def test_quality_is_drawn_against_parameters_memory_and_time(comparison):
    source, _ = page(comparison)
    for what in ("Trained parameters", "Peak memory", "Seconds for a step"):
        assert f'aria-label="{what} against Frechet distance"' in source


def test_number_of_pictures_and_the_floor_are_said(comparison):
    _, text = page(comparison)
    assert "64 generated pictures" in text
    assert "100 real ones, in the features" in text
    assert "biased upwards" in text
    assert "chosen on the same real pictures that the result is measured on" in text
    change(comparison, "comparison.json", reference_unseen=True, memory_measured="main memory of the whole process")
    _, text = page(comparison)
    assert "100 real ones that no method was trained on, in the features" in text
    assert "Peak memory: main memory of the whole process." in text


def test_a_comparison_that_is_still_going_says_how_far_it_is(comparison):
    change(comparison, "comparison.json", status="unfinished")
    assert "6 of 7 runs are done" in page(comparison)[1]


def test_a_comparison_whose_pictures_and_runs_are_gone_still_has_its_table(comparison):
    for path in sorted(comparison.rglob("*"), reverse=True):
        if path.name != "comparison.json" and not (comparison / "comparison.json").is_relative_to(path):
            path.rmdir() if path.is_dir() else path.unlink()
    source, text = page(comparison)
    assert "Highest VLHI: sara" in text
    assert images(source) == []


def test_pictures_of_real_size_come_into_a_row_smaller(tmp_path):
    from run_folders import picture

    row = strip(
        [picture(tmp_path / "a.png", 512, 256), tmp_path / "missing.png", picture(tmp_path / "b.png", 512, 512)]
    )
    assert row.size == (384, 192)
    assert strip([tmp_path / "missing.png"]) is None


def test_a_folder_without_a_comparison_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds no comparison\.json"):
        write_comparison_page(tmp_path)
    (tmp_path / "comparison.json").write_text(json.dumps([1])[:1])
    with pytest.raises(DataError, match=r"holds no comparison\.json"):
        write_comparison_page(tmp_path)
