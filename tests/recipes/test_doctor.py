"""What the doctor finds, and that the memory it tells before a run is what the run holds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file

from fallow import SaRA, assets
from fallow.analysis.memory import LiveBytes
from fallow.core.errors import ConfigError, ModelError, SelectionError
from fallow.recipes import doctor
from fallow.recipes.doctor import Plan, check, memory, package, runs_in, unwritable
from fallow.recipes.methods import LORA_TARGETS
from fallow.recipes.pipelines import load_pipeline, trained_part

BATCH = 4


def held_by_training(unet, optimizer_of, steps: int = 3) -> int:
    """The most bytes that tensors hold in a training step, besides the network; the first update, too, is over."""
    rng = torch.Generator().manual_seed(0)
    noisy = torch.randn(BATCH, 4, 8, 8, generator=rng)
    text = torch.randn(BATCH, 16, 16, generator=rng)
    with LiveBytes(unet, noisy, text) as live:
        optimizer = optimizer_of()
        for _ in range(steps):
            live.peak = 0
            (unet(noisy, torch.ones(BATCH, dtype=torch.long), text).sample - noisy).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return live.peak


def told(estimate) -> int:
    """Of an estimate, what is not there before training."""
    return estimate.total - estimate.weights - estimate.added - estimate.others


@pytest.fixture
def unet(tiny_sd):
    return load_pipeline(str(tiny_sd), "cpu").unet.train()


def plan(tiny_sd: Path, **settings) -> Plan:
    return Plan(**{"model": str(tiny_sd), "batch_size": BATCH, **settings})


def test_full_training_holds_what_was_told(tiny_sd, unet):
    found = {estimate.method: estimate for estimate in memory(plan(tiny_sd))}
    assert list(found) == ["sara", "lora, rank 8", "full"]
    held = held_by_training(unet, lambda: torch.optim.AdamW(unet.parameters(), foreach=torch.cuda.is_available()))
    assert told(found["full"]) == pytest.approx(held, rel=0.05)
    assert found["full"].weights == 4 * sum(p.numel() for p in unet.parameters())
    assert found["full"].trained == sum(p.numel() for p in unet.parameters())


def test_sara_holds_what_was_told(tiny_sd, unet):
    optimizers = []

    def make():
        optimizers.append(SaRA(unet, fraction=0.1, lr=1e-3))
        return optimizers[0]

    held = held_by_training(unet, make)
    optimizers[0].close()
    found = memory(plan(tiny_sd, method="sara", fraction=0.1))[0]
    assert found.trained == round(0.1 * sum(p.numel() for p in unet.parameters()))
    assert told(found) == pytest.approx(held, rel=0.1)


def test_lora_holds_what_was_told(tiny_sd, unet):
    unet.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=4, target_modules=LORA_TARGETS), unet)
    factors = [p for p in unet.parameters() if p.requires_grad]
    held = held_by_training(unet, lambda: torch.optim.AdamW(factors, foreach=torch.cuda.is_available()))
    found = memory(plan(tiny_sd, method="lora", rank=4))[0]
    assert found.trained == sum(p.numel() for p in factors)
    assert told(found) == pytest.approx(held, rel=0.1)


def test_other_parts_are_those_of_the_pipeline(tiny_sd):
    pipeline = load_pipeline(str(tiny_sd), "cpu")
    expected = 4 * sum(p.numel() for part in (pipeline.vae, pipeline.text_encoder) for p in part.parameters())
    assert memory(plan(tiny_sd))[0].others == pytest.approx(expected, rel=0.01)


def test_a_threshold_is_counted_on_the_weights(tiny_sd):
    tensors = load_file(tiny_sd / "unet" / "diffusion_pytorch_model.safetensors")
    expected = sum(int((t.abs() < 0.01).sum()) for t in tensors.values())
    assert memory(plan(tiny_sd, threshold=0.01))[0].trained == expected > 1000


@pytest.fixture(scope="module")
def activations(tiny_sd) -> int:
    return memory(plan(tiny_sd, method="full"))[0].step.activations


@pytest.mark.parametrize(
    ("change", "least", "most"),
    [
        ({"batch_size": 2 * BATCH}, 1.8, 2.2),
        ({"resolution": 64}, 2.5, 8),
        ({"gradient_checkpointing": True}, 0.05, 0.8),
        ({"precision": "bf16"}, 0.4, 0.99),
    ],
)
def test_batch_resolution_checkpointing_and_precision_change_the_activations(tiny_sd, activations, change, least, most):
    found = memory(plan(tiny_sd, method="full", **change))[0].step.activations
    assert least * activations < found < most * activations


@pytest.mark.parametrize(
    ("wrong", "kind", "says"),
    [
        ({"model": "./nowhere"}, ModelError, "model ./nowhere is no pipeline directory; give 'mini-sd'"),
        ({"model": "minisd"}, ModelError, "model minisd is no pipeline directory"),
        ({"batch_size": 0}, ConfigError, "batch_size=0"),
        ({"rank": 0}, ConfigError, "rank=0"),
        ({"precision": "fp8"}, ConfigError, "precision=fp8"),
        ({"resolution": 2}, ConfigError, "resolution=2 is not a multiple of 8.*give 8 or 16"),
        ({"resolution": 36}, ConfigError, "resolution=36 is not a multiple of 8.*give 32 or 40"),
        ({"method": "saar"}, ConfigError, r"method=saar cannot be estimated \(did you mean 'sara'"),
        ({"method": "peft"}, ConfigError, "method=peft cannot be estimated"),
        ({"threshold": -1.0}, SelectionError, "selects no weight"),
        ({"fraction": 1.5}, SelectionError, "fraction=1.5"),
        ({"budget": 10**9}, SelectionError, "budget=1000000000 is impossible"),
        ({"fraction": 0.1, "budget": 5}, SelectionError, "both given"),
    ],
)
def test_what_cannot_be_estimated_is_refused(tiny_sd, wrong, kind, says):
    with pytest.raises(kind, match=says):
        memory(plan(tiny_sd, **wrong))


def test_a_folder_without_a_unet_and_a_truncated_one_are_told(tiny_sd, tmp_path):
    with pytest.raises(ModelError, match=r"has no model_index\.json"):
        memory(Plan(str(tmp_path)))
    model = Path(shutil.copytree(tiny_sd, tmp_path / "model"))
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ModelError, match="cut off"):
        memory(Plan(str(model), threshold=0.01))


def test_figures_are_json(tiny_sd):
    for estimate in memory(plan(tiny_sd)):
        figures = json.loads(json.dumps(estimate.as_dict(), allow_nan=False))
        assert figures["total"] == estimate.total


# -- the machine ------------------------------------------------------------------------------------------------------


def test_a_checkup_names_packages_devices_folders_and_what_ships(tmp_path, monkeypatch, tiny_sd):
    monkeypatch.setattr(assets, "MINI_SD", tiny_sd)
    found = {(f.group, f.name): f for f in check(tmp_path / "runs").findings}
    assert found["packages", "torch"].state == "ok"
    assert (
        found["packages", "torch"].value == torch.__version__.split("+")[0] or "+" in found["packages", "torch"].value
    )
    assert found["folders", "runs"].state in ("ok", "warning")
    assert found["shipped", "mini-sd"].state == "ok"
    assert ("devices", "cpu") in found
    monkeypatch.setattr(assets, "MINI_SD", tmp_path / "gone")
    again = check(tmp_path / "runs")
    assert not again.ok
    missing = next(f for f in again.findings if f.name == "mini-sd")
    assert (missing.state, missing.advice) == ("missing", "the installation is incomplete; install Fallow again")


def test_a_package_that_is_missing_or_too_old_comes_with_the_command_that_helps():
    assert package(Requirement("numpy>=1")).state == "ok"
    old = package(Requirement("numpy>=99"))
    assert (old.state, old.advice) == ("missing", "pip install 'numpy>=99'")
    absent = package(Requirement("no-such-package-here>=1"))
    assert (absent.state, absent.value) == ("missing", "not installed")


def test_a_place_that_cannot_be_written_is_told_with_the_reason(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    assert unwritable(tmp_path / "deep" / "er") is None
    assert not (tmp_path / "deep").exists()
    assert unwritable(tmp_path / "file" / "x").endswith("is no folder")

    def refuse(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    assert unwritable(tmp_path) == "Read-only file system"


def test_a_precision_that_fails_is_said_not_to_run(monkeypatch):
    assert runs_in("bf16", "cpu")
    before = torch.get_rng_state()
    runs_in("bf16", "cpu")
    assert torch.equal(torch.get_rng_state(), before)

    def refuse(*_, **__):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(torch, "autocast", refuse)
    assert not runs_in("bf16", "cpu")


@pytest.mark.parametrize("kind", ["sdxl", "sd3", "flux", "pixart", "animatediff"])
def test_every_family_is_estimated_from_its_configuration(kind, tiny_family):
    plan = Plan(str(tiny_family(kind)), "sara", fraction=0.1, batch_size=2, resolution=32)
    found = memory(plan)
    network = trained_part(load_pipeline(plan.model, "cpu"))
    total = sum(p.numel() for p in network.parameters())
    sara, lora, full = found
    assert (sara.trained, full.trained, sara.total_parameters) == (round(0.1 * total), total, total)
    assert 0 < lora.added < full.step.gradients
    assert full.total > lora.total > 4 * total
    assert all(estimate.others > 0 for estimate in found)
