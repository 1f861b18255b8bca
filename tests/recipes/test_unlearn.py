"""Unlearning end to end on a tiny language model: what is forgotten, kept, saved, shown, and refused."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

import fallow
from fallow.cli import app
from fallow.core.errors import ConfigError, DataError, ModelError, TrainingError
from fallow.recipes.settings import make_config
from fallow.recipes.unlearn import Unlearned, evenly, unlearn
from fallow.recipes.unlearn_config import UnlearnConfig
from fallow.recipes.unlearn_data import read_texts
from fallow.recipes.unlearn_model import _rate
from fallow.report.unlearning import write_unlearning_report

TEXT = "the a red blue green small large cat dog bird sees likes eats finds keeps fish bone seed stone river"
WORDS = TEXT.split()
QUICK = {
    "rank": 4, "epochs": 8, "accumulation": 1, "lr": 5e-3, "ngram": 3, "extraction_every": 4, "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of 26 thousand weights that knows sixteen lines by heart; forget.txt, retain.txt, unseen.txt."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("unlearning")
    chance = random.Random(0)
    lines = [" ".join(chance.choice(WORDS) for _ in range(12)) for _ in range(22)]
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", "<s>", *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<s>", pad_token="<s>")
    torch.manual_seed(0)
    shape = {"n_positions": 24, "n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 1}
    shape |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(WORDS) + 2, **shape)).train()
    ids = tokenizer(lines[:16], return_tensors="pt")["input_ids"]
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, part in (("forget", lines[:4]), ("retain", lines[4:16]), ("unseen", lines[16:])):
        (folder / f"{name}.txt").write_text("\n".join(part) + "\n", encoding="utf-8")
    return folder


def config(place: Path, **given: Any) -> UnlearnConfig:
    usual = {"model": str(place / "model"), "forget": place / "forget.txt", "retain": place / "retain.txt"}
    return make_config(UnlearnConfig, {**usual, **QUICK, **given})


@pytest.fixture(scope="module")
def done(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Unlearned:
    output = tmp_path_factory.mktemp("runs") / "run"
    against = ["gradient-difference", "gradient-ascent"]
    return unlearn(config(place, reference=place / "unseen.txt", against=against, merged=True, output=output))


def logits(model: nn.Module, place: Path) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    lines = (place / "forget.txt").read_text(encoding="utf-8").splitlines()
    with torch.no_grad():
        return model.eval()(**tokenizer(lines, return_tensors="pt")).logits


def test_what_is_to_be_forgotten_is_forgotten_and_the_rest_is_kept(done):
    before, reference = done.info["before"], done.info["reference"]
    after = {each["method"]: each["after"] for each in done.info["methods"]}
    assert before["forget"]["accuracy"] > 0.8
    assert before["forget"]["extraction"] > 0.5
    assert reference["accuracy"] < 0.3
    loku = after["loku"]
    assert loku["forget"]["accuracy"] < 0.6 * before["forget"]["accuracy"]
    assert loku["forget"]["extraction"] < 0.3 * before["forget"]["extraction"]
    assert loku["retain"]["accuracy"] > 0.85 * before["retain"]["accuracy"]
    assert loku["retain"]["perplexity"] < 2 * before["retain"]["perplexity"]
    assert loku["forget"]["accuracy"] < after["gradient-difference"]["forget"]["accuracy"]


def test_methods_start_alike_and_each_is_told_of(done):
    methods = {each["method"]: each for each in done.info["methods"]}
    assert list(methods) == ["gradient-difference", "gradient-ascent", "loku"]
    assert [each["start"] for each in methods.values()] == ["zero", "zero", "fila"]
    assert {each["updates"] for each in methods.values()} == {16}
    assert len({each["trained_parameters"] for each in methods.values()}) == 1
    lines = [json.loads(line) for line in (done.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["method"] for line in lines[::16]] == list(methods)
    assert {"step", "epoch", "lr", "loss", "forget", "retain", "grad_norm"} <= lines[0].keys()
    assert "retain" not in lines[16]
    assert lines[-16]["forget"] > 1.5  # the hinge of what it knows by heart is near 2
    assert all(0 <= line["forget"] <= 2 for line in lines[-16:])


def test_the_adapter_is_of_the_base_and_the_merged_model_is_without_one(done, place):
    base = AutoModelForCausalLM.from_pretrained(place / "model")
    original = logits(base, place)
    fallow.load(base, done.adapter)
    adapted = logits(base, place)
    assert not torch.allclose(adapted, original, atol=0.1)
    with fallow.disabled(base):
        assert torch.equal(logits(base, place), original)  # why the adapter alone removes nothing
    merged = AutoModelForCausalLM.from_pretrained(done.merged)
    assert not any(isinstance(module, fallow.Delta) for module in merged.modules())
    torch.testing.assert_close(logits(merged, place), adapted, rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(done.merged)("the cat")["input_ids"] == [2, 9]
    assert "can be taken off" in done.info["warning"]


def test_the_page_tells_the_figures_and_the_warning_and_is_made_again_from_the_files(done):
    page = done.report.read_text(encoding="utf-8")
    for told in ("memorisation accuracy of what is forgotten", "unseen text", "gradient-ascent", "can be taken off"):
        assert told in page
    assert page.count("<svg") == 2
    assert "http" not in page.split("<body")[-1].replace("http://www.w3.org", "")
    done.report.unlink()
    assert write_unlearning_report(done.folder) == done.report
    again = done.report.read_text(encoding="utf-8")
    assert [len(each.split("<td")) for each in (page, again)] == [page.count("<td") + 1] * 2
    with pytest.raises(DataError, match="is no unlearning run that was measured"):
        write_unlearning_report(done.folder / "adapter")


def test_the_same_settings_give_the_same_adapter(done, place, tmp_path):
    from safetensors.torch import load_file

    settings = config(place, output=tmp_path / "again", extraction_texts=0)
    again = unlearn(settings)
    first, second = (load_file(run.adapter / "adapter_model.safetensors") for run in (done, again))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert again.merged is None
    assert "extraction" not in again.info["before"]["forget"]


def test_prompts_are_given_and_not_scored(place, tmp_path):
    rows = [line.split(" ", 4) for line in (place / "forget.txt").read_text().splitlines()]
    told = [{"prompt": " ".join(row[:4]), "completion": row[4]} for row in rows]
    (tmp_path / "forget.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told), encoding="utf-8")
    texts = read_texts(tmp_path / "forget.jsonl", "forget")
    assert [text.whole for text in texts] == (place / "forget.txt").read_text().splitlines()
    run = unlearn(
        config(place, forget=tmp_path / "forget.jsonl", output=tmp_path / "run", epochs=1, method="gradient-ascent")
    )
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    model = AutoModelForCausalLM.from_pretrained(place / "model")
    first = logits(model, place)[:, 3:-1].log_softmax(-1)
    ids = AutoTokenizer.from_pretrained(place / "model")((place / "forget.txt").read_text().splitlines())["input_ids"]
    each = first.gather(2, torch.tensor(ids)[:, 4:].unsqueeze(2)).mean((1, 2))
    pairs = [(each[i] + each[j]) / 2 for i in range(4) for j in range(i)]
    assert min(abs(lines[0]["loss"] - float(pair)) for pair in pairs) < 1e-4


@pytest.mark.parametrize(("stop", "method"), [("swapped", "gradient-ascent"), ("reference", "loku")])
def test_a_run_ends_when_it_has_forgotten(stop, method, place, tmp_path):
    given = {
        "stop": stop,
        "method": method,
        "reference": place / "unseen.txt",
        "epochs": 40,
        "lr": 1e-2,
        "warmup": 0,
        "extraction_texts": 2,
    }
    run = unlearn(config(place, output=tmp_path / "run", **given))
    (told,) = run.info["methods"]
    assert told["stopped"]
    assert 2 <= told["updates"] < 80
    after, reference = told["after"]["forget"], run.info["reference"]
    if stop == "swapped":
        assert after["most_accurate"] == 0
    else:
        assert after["accuracy"] <= reference["accuracy"]
        assert after["extraction"] <= max(reference["extraction"], 0.1)


def test_a_bf16_base_with_checkpointing_and_accumulated_batches_unlearns_too(place, tmp_path):
    given = {"precision": "bf16", "gradient_checkpointing": True, "accumulation": 2, "start": "pissa", "epochs": 8}
    run = unlearn(config(place, output=tmp_path / "run", targets=["c_attn", "c_fc"], extraction_texts=0, **given))
    (told,) = run.info["methods"]
    assert told["updates"] == 8
    assert told["start"] == "pissa"
    assert told["after"]["forget"]["accuracy"] < run.info["before"]["forget"]["accuracy"]


def test_texts_are_picked_evenly_and_once():
    assert evenly(list(range(10)), 4) == [0, 3, 6, 9]
    assert evenly(list(range(5)), 9) == [0, 1, 2, 3, 4]
    assert evenly(list(range(1001)), 3) == [0, 500, 1000]


def test_the_rate_rises_over_the_warm_up_and_falls_to_zero():
    assert [round(_rate(step, 4, 20), 3) for step in (0, 3, 4, 12, 20)] == [0.2, 0.8, 1.0, 0.5, 0.0]
    assert _rate(0, 0, 5) == 1.0


def test_the_command_line_runs_it_from_a_file_and_prints_json_or_a_table(done, place, tmp_path, monkeypatch):
    toml = tmp_path / "run.toml"
    lines = [f'model = "{place / "model"}"', f'forget = "{place / "forget.txt"}"', "epochs = 1", "accumulation = 1"]
    toml.write_text("\n".join([*lines, 'device = "cpu"', "rank = 2", "ngram = 3", "extraction_texts = 1"]))
    words = ["unlearn", "--config", str(toml), "--retain", str(place / "retain.txt"), "--start", "zero"]
    result = CliRunner().invoke(app, [*words, "--output", str(tmp_path / "one"), "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["status"] == "finished"
    assert told["methods"][0]["method"] == "loku"
    assert told["merged"] is None
    assert Path(told["adapter"], "adapter_model.safetensors").is_file()
    assert "can be taken off" in result.stderr.replace("\n", " ")
    monkeypatch.setattr("fallow.recipes.unlearn.unlearn", lambda settings, console, command: done)
    result = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    for shown in ("forgotten: memorised", "kept: perplexity", "gradient-ascent", "merged model"):
        assert shown in result.stdout
    shown = CliRunner().invoke(app, ["unlearn", "--help"], env={"COLUMNS": "200"}).stdout
    assert "--retain-weight" in shown
    assert shown.count("(required)") == 3
    assert "Undefined" not in shown
    result = CliRunner().invoke(app, ["unlearn", "--forget", "a.txt"], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert "model is not given and has no default; give it" in result.stderr
    assert "retain is not given" in result.stderr


def test_the_python_of_the_documentation_runs(place, tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs/walkthroughs/unlearning.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("my-model").symlink_to(place / "model")
    Path("forget.txt").symlink_to(place / "forget.txt")
    rows = [json.dumps({"text": line}) for line in (place / "retain.txt").read_text().splitlines()]
    Path("retain.jsonl").write_text("\n".join(rows), encoding="utf-8")
    names: dict[str, Any] = {}
    exec(example, names)
    assert names["done"].folder == Path("runs/loku-forget-1")
    assert names["done"].merged == Path("runs/loku-forget-1/merged")
    assert names["done"].info["methods"][-1]["updates"] == 5


# -- what is refused, before anything is written ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"forget": "nowhere.txt"}, DataError, "forget=nowhere.txt does not exist; give a .txt or .jsonl file"),
        ({"retain": "empty.txt"}, DataError, "retain=.*empty.txt holds no text"),
        ({"forget": "broken.jsonl"}, DataError, "broken.jsonl, line 2 is no JSON"),
        ({"forget": "other.jsonl"}, DataError, "other.jsonl, line 1 has no words; give"),
        ({"forget": "number.jsonl"}, DataError, "number.jsonl, line 1 has no words"),
        ({"forget": "picture.txt"}, DataError, "cannot be read as text"),
        ({"retain": "forget.txt"}, DataError, "4 texts are in forget and in retain, such as"),
        ({"forget": "short.txt"}, DataError, r"text 1 of forget \('cat'\) has 1 token, of which none counts"),
        ({"ngram": 13}, ConfigError, "ngram=13 is above the length of every text to forget"),
        ({"ngram": 12, "max_length": 12}, ConfigError, "ngram=12 must be below max_length=12"),
        ({"max_length": 99}, ConfigError, "max_length=99 is above the 24 positions"),
        ({"rank": 4096}, ConfigError, "rank=4096 is above what"),
        ({"targets": ["q_prj"]}, ConfigError, "q_prj"),
        ({"stop": "reference"}, ConfigError, "stop=reference needs reference="),
        ({"against": ["loku"]}, ConfigError, "against=.* names a method twice, or method=loku itself"),
        ({"model": "forget.txt"}, ModelError, "is no causal language model that can be loaded"),
        ({"method": "loko"}, ConfigError, "method loko"),
        ({"start": "eva"}, ConfigError, "start eva"),
        ({"lr": 0}, ConfigError, "lr 0"),
        ({"device": "tpu"}, ConfigError, "device=tpu does not work here"),
    ],
)
def test_nonsense_is_refused_by_name_and_leaves_nothing(given, kind, message, place, tmp_path):
    files = {
        "empty.txt": b"\n \n", "broken.jsonl": b'{"text": "the cat"}\n{"text"\n', "other.jsonl": b'{"words": "cat"}',
        "number.jsonl": b'{"text": 3}', "picture.txt": b"\x89PNG\xff\xfe", "short.txt": b"cat\n",
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    found = {}
    for name, value in given.items():
        here = isinstance(value, str) and value.endswith((".txt", ".jsonl")) and value != "nowhere.txt"
        found[name] = (tmp_path if value in files else place) / value if here else value
    found = {name: str(value) if name == "model" else value for name, value in found.items()}
    with pytest.raises(kind, match=message):
        unlearn(config(place, output=tmp_path / "run", **found))
    assert not (tmp_path / "run").exists()


def test_a_directory_with_something_in_it_is_not_written_to(place, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ConfigError, match="is not empty; give another one"):
        unlearn(config(place, output=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_loss_that_is_no_number_ends_the_run_and_is_told(place, tmp_path, monkeypatch):
    from fallow.recipes import unlearn_model

    monkeypatch.setitem(unlearn_model.FORGETTING, "loku", lambda logits, labels: logits.sum() * float("nan"))
    with pytest.raises(TrainingError, match="the loss of loku is nan and its gradient nan in update 1"):
        unlearn(config(place, output=tmp_path / "run", start="zero"))
    told = json.loads((tmp_path / "run" / "run.json").read_text())
    assert told["status"] == "failed"
    assert "TrainingError" in told["error"]
