"""The benchmark of the weight parameterizations, on a network of width 64."""

from __future__ import annotations

import gc
import importlib
import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"
if str(FOLDER) not in sys.path:
    sys.path.append(str(FOLDER))
deltas, cases, measures, setup, lines = (
    importlib.import_module(f"deltas{part}") for part in ("", "_cases", "_measures", "_setup", "_lines")
)
Small = partial(cases.Setting, width=64)


@pytest.fixture(scope="module", autouse=True)
def setting():
    gc.freeze()  # each measurement collects garbage, among all that other tests have imported
    yield Small("transformer")
    gc.unfreeze()


def test_every_method_of_the_package_is_measured_and_others_are_refused(setting):
    measured = {variant.method for variant in cases.variants(setting)}
    assert measured == {*cases.ours(), "shira"}
    assert [variant.label for variant in cases.variants(setting, ["bone bat", "lora"])] == ["lora", "bone bat"]
    with pytest.raises(ValueError, match="lorra: no such method"):
        list(cases.variants(setting, ["lorra"]))


def test_the_peak_is_what_was_alive_at_once_within_the_span():
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        kept = torch.zeros(1_000_000)
        torch.zeros(9_000_000)  # gone before
        with torch.profiler.record_function("the span"):
            for _ in range(3):
                torch.zeros(2_000_000)
        torch.zeros(9_000_000)
    assert measures.peak_within(profile, "the span") == pytest.approx(4 * 3_000_000, rel=0.01)
    assert kept.numel() == 1_000_000


def test_a_contender_counts_its_trained_numbers_and_its_memory(setting):
    names = setting.targets(False)
    assert len(names) == 36
    contender = measures.Contender("LoRA", setting, cases.lora(names, 4))
    assert contender.trained == 4 * 6 * (4 * 128 + 2 * 320)
    assert contender.peak > 4 * (2 * contender.trained + 6 * 257 * 64 * 4)  # factors, gradients, inputs
    assert contender.peak < measures.nbytes(setting.original) + 4 * 257 * 64 * 1000
    assert contender.timed() > 0


def test_the_lora_beside_a_method_has_the_nearest_number_of_trained_values(setting):
    bench = deltas.Bench(setting, repeats=1)
    (case,) = bench.cases(next(cases.variants(setting, ["bone bat"])))
    alike, own = case["against"]
    assert (alike["kind"], own["kind"], own["name"]) == ("lora", "own", "PEFT MiSS bat")
    assert own["trained"] == case["trained"]
    assert abs(alike["trained"] - case["trained"]) <= 6 * (4 * 128 + 2 * 320) / 2
    assert alike["peak_ratio"] == case["peak"] / alike["peak"]


def test_ratios_are_of_pairs_and_of_the_fastest():
    found = measures.ratio([1.0, 4.0, 3.0], [2.0, 2.0, 2.0])
    assert found == {"time_ratio": 1.5, "time_ratio_of_fastest": 0.5}


def test_a_run_writes_its_figures_and_where_they_were_taken(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(deltas, "Setting", Small)
    place = tmp_path / "figures.json"
    assert deltas.run("transformer", ["lora"], 2, place)
    told = json.loads(place.read_text())
    (case,) = told["cases"]
    assert (case["variant"], case["layers"], len(case["each"])) == ("lora", 36, 2)
    assert case["against"][0]["trained"] == case["trained"] == 8 * 6 * (4 * 128 + 2 * 320)
    assert case["against"][0]["peak_ratio"] < 1.05
    assert told["versions"]["torch"] == torch.__version__
    assert capsys.readouterr().out.count("PEFT LoRA r=8") == 1


def test_what_was_measured_before_stays_where_only_some_are_measured_again(tmp_path):
    place = tmp_path / "figures.json"
    assert deltas.merged(place, [{"variant": "bone"}]) == [{"variant": "bone"}]
    deltas.write(place, {"cases": [{"variant": name, "old": at} for at, name in enumerate(["bone", "vera", "bone"])]})
    fresh = [{"variant": "lora"}, {"variant": "bone", "new": 1}]
    assert deltas.merged(place, fresh) == [{"variant": "bone", "new": 1}, {"variant": "vera", "old": 1}, fresh[0]]


def test_errors_of_decompositions_are_those_of_the_decomposition():
    def first(w, at, rank):
        u, s, vt = torch.linalg.svd(w, full_matrices=False)
        return u[:, at : at + rank], s[:rank], vt[:rank]

    _, falling = next(pair for pair in setup.matrices() if pair[0].startswith("falling"))
    exact = setup.truncated(32, lambda w, rank, _: first(w, 0, rank))(falling)
    assert set(exact) == {"residual", "values", "orthogonal"}
    assert max(exact.values()) < 1e-5
    assert setup.truncated(32, lambda w, rank, _: first(w, 1, rank))(falling)["residual"] > 0.1


def test_code_lines_leave_out_what_is_no_code():
    text = '"""Module\n\ndoc."""\n\n# comment\nx = """a\nb"""\n\n\n'
    text += 'def f():\n    """Doc."""\n    return (\n        1  # one\n    )\n'
    assert lines.lines(text) == (14, 6)


def test_every_method_has_a_row_of_lines_and_a_page_at_most():
    rows = lines.table()
    assert [row["method"] for row in rows] == sorted({*cases.ours(), "shira"})
    assert all(0 < row["code"] < row["lines"] <= 220 for row in rows)
    assert all(row["peft"]["code"] > 0 for row in rows if row["method"] in lines.PARTS)
