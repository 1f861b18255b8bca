"""What an adapter's file tells other tools."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fallow.core.content_hash import HASH
from fallow.core.errors import ConfigError
from fallow.recipes.pictures import Picture
from fallow.recipes.provenance import Making, adapter_kind, architecture, check_fields, header, tag_frequency
from fallow.recipes.train_config import TrainConfig


def making(pipeline: str = "StableDiffusionPipeline", width: int | None = 768, **settings: object) -> Making:
    pictures = [
        Picture(Path("data/10_dog/a.png"), "sks, dog", 64, 64, repeats=10),
        Picture(Path("data/10_dog/b.png"), "dog, grass", 64, 64, repeats=10),
        Picture(Path("data/1_cat/c.png"), "a cat", 64, 64),
    ]
    config = TrainConfig(data="data", model="some/base", **settings)  # type: ignore[arg-type]
    return Making(
        pipeline, width, "epsilon", config.model_dump(mode="json"), 5e-4, 100, [(64, 64), (64, 64), (96, 48)],
        pictures, [], 2, {"unet.a": "12"}, "2030-01-02",
    )  # fmt: skip


def test_the_fields_that_modelspec_wants_are_there():
    told = header(making(trigger_phrase="sks", metadata={"author": "Me", "license": "MIT"}, method="lora"))
    assert {name: value for name, value in told.items() if name.startswith("modelspec.")} == {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.implementation_version": told["modelspec.implementation_version"],
        "modelspec.title": "lora on data",
        "modelspec.resolution": "64x64",
        "modelspec.date": "2030-01-02",
        "modelspec.prediction_type": "epsilon",
        "modelspec.trigger_phrase": "sks",
        "modelspec.author": "Me",
        "modelspec.license": "MIT",
        HASH: "",
    }
    assert told["modelspec.implementation_version"].startswith("fallow/")


def test_notes_are_in_the_words_of_sd_scripts():
    told = header(making(method="lora", options={"rank": 4, "alpha": 2}, batch_size=4, accumulation=2, loss="huber"))
    assert told["ss_network_module"] == "networks.lora"
    assert (told["ss_network_dim"], told["ss_network_alpha"]) == ("4", "2")
    assert told["ss_base_model_version"] == "sd_v1"
    assert told["ss_sd_model_name"] == "base"
    assert told["ss_learning_rate"] == "0.0005"
    assert told["ss_num_train_images"] == "21"
    assert told["ss_total_batch_size"] == "8"
    assert told["ss_epoch"] == "39"  # 800 pictures seen of 21
    assert told["ss_loss_type"] == "huber"
    assert json.loads(told["ss_tag_frequency"]) == {"10_dog": {"dog": 2, "sks": 1, "grass": 1}, "1_cat": {"a cat": 1}}
    assert json.loads(told["ss_dataset_dirs"])["10_dog"] == {"n_repeats": 10, "img_count": 2}
    assert all(isinstance(value, str) for value in told.values())


def test_other_methods_are_told_by_their_own_name_and_nothing_depends_on_the_day_but_the_date():
    told = header(making(timestep_min=200))
    assert told["modelspec.architecture"] == "stable-diffusion-v1/sparse"
    assert told["modelspec.timestep_range"] == "200,1000"
    assert told["ss_network_module"] == "fallow.sara"
    assert "ss_network_dim" not in told
    later = header(replace(making(timestep_min=200), begun="2031-01-02"))
    assert {name for name in told if told[name] != later[name]} == {"modelspec.date"}
    assert header(replace(making(), base={"unet.a": "13"}))["ss_sd_model_hash"] != told["ss_sd_model_hash"]


@pytest.mark.parametrize(
    ("pipeline", "width", "prediction", "wanted"),
    [
        ("StableDiffusionPipeline", 1024, "epsilon", ("stable-diffusion-v2-512", "sd_v2")),
        ("StableDiffusionPipeline", 1024, "v_prediction", ("stable-diffusion-v2-768-v", "sd_v2_v")),
        ("StableDiffusionXLPipeline", 2048, "epsilon", ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0")),
        ("StableDiffusionPipeline", 32, "epsilon", ("stablediffusion", "")),
        ("PixArtAlphaPipeline", None, "epsilon", ("pixartalpha", "")),
    ],
)
def test_architectures_have_the_names_that_others_know(pipeline, width, prediction, wanted):
    assert architecture(replace(making(pipeline, width), prediction=prediction)) == wanted


def test_tags_of_all_wordings_are_counted():
    assert tag_frequency([Picture(Path("d/a.png"), "a, b\nb", 8, 8)]) == {"d": {"b": 2, "a": 1}}


def test_fields_that_are_no_ones_or_empty_are_refused():
    check_fields({"title": "T", "tags": "a"})
    with pytest.raises(ConfigError, match="metadata has no field 'date'"):
        check_fields({"date": "2030"})
    with pytest.raises(ConfigError, match="the field title is empty"):
        check_fields({"title": " "})


def test_the_architecture_names_a_weight_parameterization_by_its_method():
    kinds = {method: adapter_kind({"method": method}) for method in ("dora", "lora", "sara", "full")}
    assert kinds == {"dora": "dora", "lora": "lora", "sara": "sparse", "full": ""}
