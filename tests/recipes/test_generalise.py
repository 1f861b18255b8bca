"""`fallow generalise`: a whole job of a few steps, what decides in it, its files, its table, what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

import fallow
from fallow.cli import app
from fallow.core.errors import ConfigError
from fallow.recipes import generalise as module
from fallow.recipes.contestants import Contestant
from fallow.recipes.generalise import GeneraliseConfig, generalise

FEW: dict[str, Any] = {"steps": 4, "check_every": 2, "base_steps": 4, "seeds": [0], "lrs": [1e-2], "device": "cpu"}
ANGLES = {"domains": ["0", "90", "180"]}


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_each_domain_is_left_out_once_and_methods_are_set_side_by_side(tmp_path: Path) -> None:
    config = GeneraliseConfig(
        **{**FEW, "lrs": [1e-3, 1e-2], "seeds": [0, 1]}, **ANGLES, methods=["pego", "lora:2", "full", "linear"],
        options={"pego": {"rank": 2, "group": 3}}, output=tmp_path / "job",
    )  # fmt: skip
    folder = generalise(config)
    told = result(folder)
    assert told["status"] == "finished"
    assert told["left_out"] == ["0", "90", "180"]
    pego, lora, full, linear = told["methods"]
    for method in told["methods"]:
        assert [(run["seed"], run["split"]) for run in method["runs"]] == [
            (seed, [name]) for seed in (0, 1) for name in ("0", "90", "180")
        ]
        every = [value for run in method["runs"] for value in run["unseen"].values()]
        assert method["figures"]["unseen"]["mean"] == pytest.approx(sum(every) / 6)
        assert method["domains"]["90"]["mean"] == pytest.approx(
            sum(run["unseen"]["90"] for run in method["runs"] if "90" in run["unseen"]) / 2
        )
        assert method["figures"]["worst"]["mean"] <= method["figures"]["unseen"]["mean"]
        assert [one["lr"] for one in method["sweep"]] == [1e-3, 1e-2]
    head = 3 * 128 + 3
    assert linear["trained_numbers"] == head
    assert lora["trained_numbers"] == head + 2 * ((64 + 128) + 2 * (128 + 128))
    assert pego["trained_numbers"] == head + 6 * ((64 + 128) + 2 * (128 + 128))
    assert full["trained_numbers"] == told["total_parameters"] - (10 * 128 + 10) + head
    assert pego["figures"]["cosine"]["mean"] > 0
    assert lora["figures"]["cosine"]["mean"] is None
    assert linear["figures"]["overlap"]["mean"] is None
    page = (folder / "report.html").read_text()
    assert all(text in page for text in ("lora:2", "Each of 0, 90, 180 left out in turn", "Best on unseen domains"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines} == {2, 4}
    assert any(line["penalty"] > 0 for line in lines if line["method"] == "pego")
    assert all(line["penalty"] == 0 for line in lines if line["method"] != "pego")


def test_sources_are_learned_from_together_and_all_others_judged_at_once(tmp_path: Path) -> None:
    folder = generalise(GeneraliseConfig(**FEW, sources=["0", "20"], methods=["lora:2"], output=tmp_path / "job"))
    (method,) = result(folder)["methods"]
    (run,) = method["runs"]
    assert sorted(run["unseen"]) == sorted(["40", "90", "140", "180", "230", "270"])
    assert method["figures"]["worst"]["mean"] == min(run["unseen"].values())
    assert (folder / "adapters" / "lora-2" / "40-and-5-seed-0" / "adapter_config.json").is_file()


def test_the_rate_and_the_step_are_chosen_by_pictures_of_the_sources_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first rate is best on the unseen domain, and so is its first step; both are passed by."""
    looked = iter([0.2, 0.9, 0.7, 0.3, 0.4, 0.6])  # three looks at each rate's training
    judged = iter([0.99, 0.5, 0.2, 0.1, 0.5, 0.8])  # each rate: unseen, seen, held out

    def accuracy(self: Any, data: Any) -> float:
        return next(looked if self.network.training else judged)

    monkeypatch.setattr(module.Classifier, "accuracy", accuracy)
    config = {**FEW, "steps": 6, "lrs": [1e-3, 1e-2]}
    folder = generalise(
        GeneraliseConfig(**config, domains=["0", "90"], sources=["0"], methods=["lora:2"], output=tmp_path / "job")
    )
    (method,) = result(folder)["methods"]
    assert method["lr"] == 1e-2
    assert (method["runs"][0]["best_step"], method["runs"][0]["unseen"]["90"]) == (6, 0.1)
    first = json.loads(next((folder / "runs").glob("*lr0.001*")).read_text())
    assert first["best_step"] == 4


def test_the_saved_adapter_and_classifier_are_those_that_were_judged(tmp_path: Path) -> None:
    config = GeneraliseConfig(**FEW, **ANGLES, sources=["0", "90"], methods=["pego"], output=tmp_path / "job")
    folder = generalise(config)
    run = result(folder)["methods"][0]["runs"][0]
    classifier, found = module._Job(config, module.Console(quiet=True))._fresh(0)
    place = folder / "adapters" / "pego" / "180-seed-0"
    fallow.load(classifier.network, place)
    classifier.renew_head(3)
    classifier.network.load_state_dict(load_file(place / "classifier.safetensors"), strict=False)
    assert classifier.accuracy(found["180"].unseen) == pytest.approx(run["unseen"]["180"], abs=0.003)


@pytest.mark.parametrize("average", ["ema", "swad"])
def test_averages_are_judged_and_kept_as_weights(tmp_path: Path, average: str) -> None:
    options = {**FEW, "steps": 12, "average": average, "ema_decay": 0.5}
    config = GeneraliseConfig(
        **options, **ANGLES, sources=["0", "90"], methods=["pego", "full"], output=tmp_path / "job"
    )
    folder = generalise(config)
    run = result(folder)["methods"][0]["runs"][0]
    classifier, found = module._Job(config, module.Console(quiet=True))._fresh(0)
    classifier.renew_head(3)
    place = folder / "adapters" / "pego" / "180-seed-0"
    weights = load_file(place / "weights.safetensors")
    assert sorted(weights) == ["layers.0.weight", "layers.1.weight", "layers.2.weight"]
    classifier.network.load_state_dict(weights | load_file(place / "classifier.safetensors"), strict=False)
    assert classifier.accuracy(found["180"].unseen) == pytest.approx(run["unseen"]["180"], abs=0.003)
    assert run["overlap"] > 0


def test_query_and_value_and_a_new_classifier_alone_are_trained_in_a_vit(tmp_path: Path) -> None:
    config = GeneraliseConfig(**FEW, **ANGLES, model="vit", methods=["pego"], options={"pego": {"rank": 2, "group": 2}})
    job = module._Job(config, module.Console(quiet=True))
    classifier, found = job._fresh(0)
    job._adapt(Contestant("pego", "pego", {"rank": 2, "group": 2}), classifier, found, 0)
    pixels, labels = found["0"].group.train.batch(torch.arange(8))
    before = classifier.logits(pixels)
    classifier.loss(pixels, labels).backward()
    torch.optim.SGD([p for p in classifier.network.parameters() if p.requires_grad], 0.1).step()
    assert not torch.equal(classifier.logits(pixels), before)
    with_gradients = {name for name, param in classifier.network.named_parameters() if param.grad is not None}
    layers = [f"vit.layers.{at}.attention.{name}_proj" for at in range(3) for name in "qv"]
    wanted = {f"{layer}.adapters.default.{factor}" for layer in layers for factor in "AB"}
    assert with_gradients == wanted | {"classifier.weight", "classifier.bias"}


def test_overlap_and_cosine_are_those_of_dense_matrices() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(10, 12), nn.Linear(12, 3))
    before = {
        name.removesuffix(".weight"): p.detach().clone() for name, p in network.named_parameters() if p.dim() == 2
    }
    fallow.attach(network, "pego", ["0"], rank=2, group=3)
    (delta,) = (module_ for module_ in network.modules() if isinstance(module_, module.PEGO))
    delta.randomize()
    parts = [(delta.B[:, 2 * i : 2 * i + 2] @ delta.A[2 * i : 2 * i + 2]).detach().flatten() for i in range(3)]
    pairs = [abs(float(torch.cosine_similarity(parts[i], parts[j], dim=0))) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert module._cosine(network) == pytest.approx(sum(pairs) / 3, rel=1e-4)
    change = delta.delta_weight().detach()
    fallow.merge(network)
    w = before["0"]
    classifier = module.Classifier(network, "1", 2, 1)
    assert module._overlap(classifier, before) == pytest.approx(
        float((w @ change.T).norm() / w.norm() / change.norm()), rel=1e-3
    )


def test_folders_are_augmented_and_the_shipped_network_takes_styles(
    tmp_path: Path, tiny_vit: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import ViTImageProcessor

    tiny_vit().save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    for domain in ("art", "photo"):
        for name in ("cat", "dog"):
            (tmp_path / "data" / domain / name).mkdir(parents=True)
            for at in range(10):
                pixels = np.random.default_rng(at).integers(0, 256, (9, 9, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / domain / name / f"{at}.png")
    drawn: list[int] = []
    original = module.augmented
    monkeypatch.setattr(module, "augmented", lambda x, chance: drawn.append(len(x)) or original(x, chance))
    config = GeneraliseConfig(
        **{**FEW, "batch_size": 3}, data=str(tmp_path / "data"), model=str(tmp_path / "vit"), resolution=16,
        methods=["pego"], options={"pego": {"rank": 2, "group": 2}}, output=tmp_path / "job",
    )  # fmt: skip
    told = result(generalise(config))
    assert told["classes"] == ["cat", "dog"]
    assert drawn == [3] * 8  # four steps with each of the two domains as the only source
    assert not GeneraliseConfig(data="styles").augments
    assert GeneraliseConfig(data="styles").network == "garment-net"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"methods": ["pega"]}, r"'pega' is no method \(did you mean 'pego'"),
        ({"methods": ["pego"], "options": {"pego": {"side": "left"}}}, "side='left'"),
        ({"sources": ["0", "0"]}, "holds one of them twice"),
        ({"lrs": [-1.0]}, "must all be above 0"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(given: dict[str, Any], message: str) -> None:
    from fallow.recipes.settings import make_config

    with pytest.raises(ConfigError, match=message):
        make_config(GeneraliseConfig, given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sources": ["45"]}, "sources names '45', which is no domain"),
        ({"domains": ["0", "90"], "sources": ["0", "90"]}, "are all domains; leave one out"),
        ({"data": "styles", "model": "mlp"}, "model=mlp has to be taught something first"),
        ({"average": "ema", "methods": ["smora"]}, "no merged weights to average"),
    ],
)
def test_what_cannot_be_is_refused_before_a_folder_is_made(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        generalise(GeneraliseConfig(**{**FEW, "methods": ["lora:2"], **given}, output=tmp_path / "job"))
    assert not (tmp_path / "job").exists()


def test_the_command_prints_a_table_or_json(tmp_path: Path) -> None:
    words = ["generalise", "--methods", "lora:2,linear", "--steps", "2", "--base-steps", "2", "--seeds", "0"]
    words += ["--lrs", "1e-3", "--domains", "0,90", "--device", "cpu", "--output", str(tmp_path / "job")]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0, shown.output
    row = next(line for line in shown.stdout.splitlines() if line.strip().startswith("linear"))
    assert row.split()[1] == "0.001"
    told = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert [method["label"] for method in told["methods"]] == ["lora:2", "linear"]
    assert told["report"] == str(tmp_path / "job" / "report.html")
