"""Several methods on the same pictures: trained, judged, chosen, and put on one page."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fallow.core.errors import ConfigError, FallowError
from fallow.recipes import compare as module
from fallow.recipes.compare import CompareConfig, anchored_score, compare, equal_parameters, own_rates
from fallow.recipes.equal_parameters import lora_parameters
from fallow.recipes.methods import METHODS, make_method
from fallow.recipes.pipelines import load_pipeline
from fallow.recipes.trained import Order


@pytest.fixture
def halves(pictures: Path) -> Path:
    """A set with a training and a test half."""
    folder = pictures.parent / "set"
    folder.mkdir()
    pictures.rename(folder / "train")
    (folder / "test").mkdir()
    lines = []
    for number in range(6):
        pixels = np.random.default_rng(90 + number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "test" / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"a bag {number % 3}"}))
    (folder / "test" / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def settings(
    tiny_sd: Path, halves: Path, tmp_path: Path, quick: None, grey_judge: None
) -> Callable[..., CompareConfig]:
    def make(**more: Any) -> CompareConfig:
        few: dict[str, Any] = {
            "methods": ["sara", "lora"], "steps": 2, "batch_size": 2, "images": 4, "prior_images": 2, "seeds": [0],
            "sample_steps": 2, "train": {"samples": 0, "save_every": 0}, "device": "cpu", "output": tmp_path / "out",
        }  # fmt: skip
        return CompareConfig(model=str(tiny_sd), data=str(halves), **few | more)

    return make


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "comparison.json").read_text())


def test_four_methods_are_trained_judged_and_set_side_by_side(settings):
    methods = ["sara", "shira", "lora", "full"]
    folder = compare(settings(methods=methods, lrs={name: [1e-3] for name in methods}))
    told = result(folder)
    assert told["status"] == "finished"
    assert (told["finished"], told["planned"]) == (4, 4)
    assert [method["method"] for method in told["methods"]] == methods
    for method in told["methods"]:
        assert method["failed"] == 0
        assert method["frechet"] > 0
        assert method["vlhi"] is not None
        assert method["trained_parameters"] > 0
        assert method["adapter_bytes"] > 0
        run = folder / method["runs"][0]["folder"]
        assert (run / "adapter" / "adapter_model.safetensors").is_file()
        assert len(list((run / "evaluation").glob("picture-*.png"))) == 4
    assert told["reference_unseen"] is True
    assert "memory" in told["memory_measured"]
    page = (folder / "comparison.html").read_text()
    assert all(name in page for name in methods)


def test_pictures_without_captions_are_compared_with_one_prompt(settings, halves):
    for half in ("train", "test"):
        (halves / half / "metadata.jsonl").unlink()
    told = result(compare(settings(methods=["lora"], lrs={"lora": [1e-3]}, prompt="a bag")))
    assert (told["finished"], told["prompts"][0]) == (1, "a bag")


def test_each_method_gets_its_own_rates_and_the_best_goes_to_every_seed(settings):
    folder = compare(settings(methods=["sara", "full"], seeds=[0, 1], lrs={"full": [1e-5, 1e-3]}))
    sara, full = result(folder)["methods"]
    assert [run["lr"] for run in sara["sweep"]] == list(METHODS["sara"].rates)
    assert [run["lr"] for run in full["sweep"]] == [1e-5, 1e-3]
    for method in (sara, full):
        best = max(method["sweep"], key=lambda run: run["score"])
        assert [(run["lr"], run["seed"]) for run in method["runs"]] == [(best["lr"], 0), (best["lr"], 1)]
    assert result(folder)["finished"] == 7


def test_a_finished_run_is_not_repeated_and_a_half_made_one_is(settings, monkeypatch):
    config = settings(methods=["sara"], lrs={"sara": [1e-3, 2e-3]})
    folder = compare(config)
    unfinished = folder / result(folder)["methods"][0]["sweep"][1]["folder"]
    (unfinished / "run.json").write_text(json.dumps({"status": "running"}))
    trained = []
    real = module.train
    monkeypatch.setattr(module, "train", lambda config, **more: trained.append(config.lr) or real(config, **more))
    compare(config)
    assert trained == [2e-3]


def test_a_method_that_fails_is_reported_and_the_others_go_on(settings):
    config = settings(methods=["sara", "lora"], lrs={"sara": [1e-3], "lora": [1e-3]}, options={"lora": {"rank": 0}})
    told = result(compare(config))
    assert [method["failed"] for method in told["methods"]] == [0, 1]
    assert "PEFT refuses" in told["methods"][1]["sweep"][0]["error"]
    with pytest.raises(FallowError, match="no run succeeded"):
        compare(settings(methods=["lora"], lrs={"lora": [1e-3]}, options={"lora": {"rank": 0}}))


@pytest.mark.parametrize("method", ["sara", "largest", "random", "lt-sft", "shira", "lora"])
def test_a_budget_makes_each_method_train_about_as_many(settings, tiny_sd, method):
    options = equal_parameters(method, settings(methods=[method], budget=4000))
    network = load_pipeline(str(tiny_sd), device="cpu").unet
    batches = [(torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 16, 16))]
    order = Order(network, 1e-3, options, 2, 0, batches, lambda unet, batch: unet(*batch).sample.square().mean())
    made = make_method(method, order)
    near = {"lora": 0.3, "shira": 0.05}.get(method, 0)  # a rank is whole; a density is rounded in each layer
    assert made.trained_parameters == pytest.approx(4000, rel=near, abs=0)


SIZED = ["bone", "loca", "lora-xs", "mos", "nola", "randlora", "svfit", "tlora", "vera"]  # each sized in its own way


@pytest.mark.parametrize("method", SIZED)
def test_a_budget_sizes_each_weight_parameterization_as_near_as_its_size_goes(settings, tiny_sd, method):
    network = load_pipeline(str(tiny_sd), device="cpu").unet

    def trained(options: dict[str, Any]) -> int:
        return make_method(
            method, Order(deepcopy(network), 1e-3, options, 2, 0, [], lambda *_: None)
        ).trained_parameters

    given = {"mos": {"private_rank": 0, "rank": 16}, "randlora": {"scaling": "peft"}}.get(method, {})
    found = equal_parameters(method, settings(methods=[method], budget=4000, options={method: given}))
    ((name, value),) = found.items()
    reached = trained({**given, name: value})
    if value == "full":  # which is above every number
        assert reached < 4000
        value = 0
    for other in (value - 1, value + 1):
        try:
            assert abs(reached - 4000) <= abs(trained({**given, name: other}) - 4000)
        except ConfigError:  # beyond what the layers or the other options allow
            continue


def test_a_budget_leaves_full_alone_and_excludes_amounts_of_the_options(settings):
    assert equal_parameters("full", settings(budget=4000)) == {}
    assert equal_parameters("sara", settings()) == {}
    with pytest.raises(ConfigError, match="budget=4000 and the option fraction of sara"):
        equal_parameters("sara", settings(budget=4000, options={"sara": {"fraction": 0.1}}))
    with pytest.raises(ConfigError, match="budget=4000 and the option rank of lora"):
        equal_parameters("lora", settings(budget=4000, options={"lora": {"rank": 4}}))
    with pytest.raises(ConfigError, match="budget=4000 and the option components of loca"):
        equal_parameters("loca", settings(methods=["loca"], budget=4000, options={"loca": {"components": 4}}))
    with pytest.raises(ConfigError, match="names no layer"):
        equal_parameters("lora", settings(budget=4000, options={"lora": {"target_modules": "to_z"}}))


def test_a_variant_is_a_contestant_with_options_and_rates_of_its_own(settings):
    config = settings(
        methods=["sara"], variants={"plain": "sara"}, lrs={"sara": [1e-3], "plain": [2e-3]},
        options={"plain": {"fraction": 0.01}},
    )  # fmt: skip
    folder = compare(config)
    sara, plain = result(folder)["methods"]
    assert [sara["label"], plain["label"]] == ["sara", "plain"]
    assert plain["runs"][0]["lr"] == 2e-3
    assert plain["trained_parameters"] == pytest.approx(sara["trained_parameters"] / 5, rel=0.01)
    info = json.loads((folder / plain["runs"][0]["folder"] / "run.json").read_text())
    assert info["method"] == "sara"
    assert "plain" in (folder / "comparison.html").read_text()


def test_keys_of_flags_reach_methods_whose_names_have_a_hyphen(settings):
    assert settings(methods=["lt-sft"], lrs={"lt_sft": [1e-3]}).lrs == {"lt-sft": [1e-3]}


def test_a_comparison_over_ray_is_the_one_of_a_single_process(settings, tmp_path):
    pytest.importorskip("ray")
    some = {"methods": ["sara"], "variants": {"broken": "lora"}, "options": {"broken": {"rank": 0}}}
    some["lrs"] = {"sara": [1e-3, 2e-3], "broken": [1e-3]}
    # The workers are processes of their own, which judge with the shipped net: only what was trained is the same.
    over_ray = compare(settings(**some, output=tmp_path / "ray", ray="local"))
    told = result(over_ray)
    assert [method["failed"] for method in told["methods"]] == [0, 1]
    assert "PEFT refuses" in told["methods"][1]["sweep"][0]["error"]
    alone = compare(settings(**some, output=tmp_path / "alone"))
    for run in told["methods"][0]["sweep"]:
        assert run["frechet"] > 0
        one, other = (load_file(folder / run["folder"] / "adapter" / "adapter_model.safetensors")
                      for folder in (over_ray, alone))  # fmt: skip
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_comparison_over_ray_repeats_nothing_that_is_finished(settings, monkeypatch):
    pytest.importorskip("ray")
    from fallow.recipes import ray_cluster

    jobs = []
    monkeypatch.setattr(ray_cluster, "spread", lambda address, todo, cpus: iter(jobs.append(list(todo)) or []))
    config = settings(methods=["sara"], lrs={"sara": [1e-3, 2e-3]})
    compare(config)
    compare(config.model_copy(update={"ray": "local", "lrs": {"sara": [1e-3, 2e-3, 4e-3]}}))
    assert [[job[0].lr for job in some] for some in jobs] == [[4e-3], []]


def test_an_unreachable_cluster_is_told_in_one_line(settings):
    pytest.importorskip("ray")
    with pytest.raises(ConfigError, match=r"ray=127\.0\.0\.1:1 cannot be reached"):
        compare(settings(methods=["lora"], lrs={"lora": [1e-3]}, ray="127.0.0.1:1"))


def test_what_cannot_be_compared_is_told_before_the_first_run(settings, monkeypatch):
    monkeypatch.setattr(module, "train", lambda *a, **k: pytest.fail("something was trained"))
    for more, said in (
        ({"methods": ["sara", "sara"]}, "twice"),
        ({"methods": ["sara", "loar"]}, r"'loar' does not exist \(did you mean 'lora'\?\)"),
        ({"lrs": {"full": [1e-3]}}, "not among methods"),
        ({"variants": {"lora": "sara"}}, "names one 'lora', which is a method"),
        ({"variants": {"plain": "saraa"}}, r"'saraa' of plain does not exist \(did you mean 'sara'\?\)"),
        ({"train": {"stpes": 3}}, r"there is no setting 'stpes' \(did you mean 'steps'\?\)"),
        ({"options": {"sara": {"fractoin": 0.1}}}, "did you mean 'fraction'"),
    ):
        with pytest.raises(ValueError, match=said):  # pydantic wraps what the configuration itself finds
            compare(settings(**more))


def test_own_rates_are_three_ascending_for_every_method(settings):
    for method in METHODS:
        rates = own_rates(method, settings())
        assert len(rates) == 3
        assert rates == sorted(rates)
    assert own_rates("sara", CompareConfig()) == [1e-3, 3e-3, 9e-3]  # mini-sd's


def test_the_anchored_score_is_one_for_the_base_and_two_for_real_pictures():
    base = {"frechet": 30.0, "alignment": 0.9}
    assert anchored_score(base, 30.0, 2.0, 0.9) == pytest.approx(1)
    assert anchored_score({"frechet": 2.0, "alignment": 0.9}, 30.0, 2.0, 0.9) == pytest.approx(2)
    assert anchored_score({"frechet": 2.0, "alignment": None}, 30.0, 2.0, 0.9) == pytest.approx(1)


@pytest.mark.parametrize("kind", ["sdxl", "sd3", "flux", "pixart", "animatediff"])
def test_lora_of_every_family_is_counted_from_its_configuration_as_peft_makes_it(kind, tiny_family):
    from peft import LoraConfig, inject_adapter_in_model

    from fallow.recipes.families import family_of
    from fallow.recipes.pipelines import load_pipeline, trained_part

    model = str(tiny_family(kind))
    pipeline = load_pipeline(model, "cpu")
    network = trained_part(pipeline)
    network.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=1, target_modules=family_of(pipeline).targets_alone()), network)
    assert lora_parameters(model, None) == sum(p.numel() for p in network.parameters() if p.requires_grad)
