"""Kill a training run at random moments; every resume must end in the very weights of the run that was not killed.

    python benchmarks/kill_and_resume.py --kills 100 --output benchmarks/results/kill-and-resume-epyc-1-thread.json

Each run is a process of its own, forked from one that has imported everything, and is ended by SIGKILL at a moment
drawn evenly from the time that a whole run takes: start-up, steps, checkpoints, drawings, the end. Besides,
`kill_at_every_call` ends the writing of a checkpoint and of an adapter at each single call that touches the disk.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

METHODS: dict[str, dict[str, Any]] = {
    "sara": {"method": "sara", "options": {"fraction": 0.1, "reselect_at": [3, 5]}, "ema": True},
    "lora": {"method": "lora", "options": {"rank": 2, "lora_dropout": 0.3}},
    "full": {"method": "full", "ema": True},
}
SECONDS = 300  # after which a process that should have ended counts as hanging
TOUCHES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "tempfile.mkstemp")


# -- what is trained --------------------------------------------------------------------------------------------------


def tiny_pipeline(folder: Path) -> str:
    """A Stable Diffusion pipeline of random weights, with mini-sd's tokenizer; 32x32 pictures."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from fallow.assets import MINI_SD

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(MINI_SD / "tokenizer")
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, projection_dim=16, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, norm_num_groups=4,
        block_out_channels=(8, 8, 8), layers_per_block=1, latent_channels=4, mid_block_add_attention=False,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=16, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=8,
    )  # fmt: skip
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
    StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def pictures(folder: Path) -> str:
    folder.mkdir()
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a bag {number // 2}")
    return str(folder)


# -- processes --------------------------------------------------------------------------------------------------------


def forked(action: Callable[[Callable[[str], None]], None]) -> tuple[int, int]:
    """Begin an action in a process of its own; returns it, and where it tells what it is doing."""
    read, send = os.pipe()
    child = os.fork()
    if child:
        os.close(send)
        return child, read
    os.close(read)
    code = 1
    try:
        torch.set_num_threads(1)

        def tell(text: str) -> None:
            os.write(send, text.encode() + b"\n")

        action(tell)
        code = 0
    except BaseException:  # told to whoever waits; this process has no other way
        os.write(send, ("ERROR " + traceback.format_exc()[-1500:].replace("\n", "\\n") + "\n").encode())
    finally:
        os._exit(code)


def ended(child: int, read: int) -> tuple[int, list[str]]:
    """The exit code of a process (-9 where it was killed) and all that it told; TimeoutError where it hangs."""
    told, until = b"", time.monotonic() + SECONDS
    while True:
        if not select.select([read], [], [], max(0.0, until - time.monotonic()))[0]:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise TimeoutError(f"a process did not end in {SECONDS} seconds; it told: {told[-300:]!r}")
        part = os.read(read, 1 << 16)
        if not part:
            break
        told += part
    os.close(read)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), told.decode(errors="replace").splitlines()


def training(settings: dict[str, Any], page: bool) -> Callable[[Callable[[str], None]], None]:
    """`train` with these settings, telling in which part of it the process is."""

    def action(tell: Callable[[str], None]) -> None:
        from fallow.recipes import text_to_image
        from fallow.recipes.train_config import TrainConfig

        run = text_to_image.Run
        for name, phase in (("walk", "steps"), ("save", "checkpoint"), ("draw_samples", "drawing"), ("finish", "end")):
            setattr(run, name, telling(getattr(run, name), phase, tell))
        if not page:
            text_to_image.write_run_report = lambda folder: folder / "report.html"
        tell("start-up")
        text_to_image.train(TrainConfig(**settings))
        tell("done")

    return action


def telling(method: Callable[..., Any], phase: str, tell: Callable[[str], None]) -> Callable[..., Any]:
    """The method, which tells when it begins and when it is over."""

    def told(*arguments: Any) -> Any:
        tell(phase)
        found = method(*arguments)
        tell("steps")
        return found

    return told


class Trial:
    """Whole runs, killed runs and their resumes, in one folder."""

    def __init__(self, place: Path, page: bool) -> None:
        self.place, self.page = place, page
        self.data, self.model = pictures(place / "data"), tiny_pipeline(place / "model")
        self.whole: dict[str, tuple[Path, float]] = {}

    def settings(self, method: str, folder: Path) -> dict[str, Any]:
        return {
            "model": self.model, "data": self.data, "output": folder, "device": "cpu", "steps": 6, "batch_size": 2,
            "save_every": 2, "samples": 1, "sample_every": 3, "sample_steps": 1, "log_every": 2, "lr": 1e-3,
            **METHODS[method],
        }  # fmt: skip

    def reference(self, method: str) -> tuple[Path, float]:
        """The run that is not killed, and the seconds that it took."""
        if method not in self.whole:
            folder, begun = self.place / f"whole-{method}", time.perf_counter()
            code, told = ended(*forked(training(self.settings(method, folder), self.page)))
            if code:
                raise RuntimeError(f"the whole run failed: {told[-1]}")
            self.whole[method] = folder, time.perf_counter() - begun
        return self.whole[method]

    def kill(self, method: str, number: int, share: float) -> dict[str, Any] | None:
        """Kill a run after this share of a whole run's time and resume it. None where it had ended before."""
        whole, seconds = self.reference(method)
        folder = self.place / f"killed-{number}"
        child, read = forked(training(self.settings(method, folder), self.page))
        time.sleep(share * seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        code, told = ended(child, read)
        if code == 0:
            return None
        if code != -signal.SIGKILL:
            raise RuntimeError(f"a run failed before it was killed: {told[-1]}")
        begun = (folder / "config.toml").is_file()
        saved = sorted(place.name for place in folder.glob("checkpoints/step-*"))
        again = {"resume": folder} if begun else self.settings(method, folder)
        code, resumed = ended(*forked(training(again, self.page)))
        found = {
            "method": method, "share": round(share, 4), "phase": told[-1] if told else "start-up",
            "checkpoint": saved[-1] if saved else None, "resumed": begun, "exit": code,
        }  # fmt: skip
        if code:
            return {**found, "said": resumed[-1][-600:], "tensors_equal": False}
        adapters = [place / "adapter" / "adapter_model.safetensors" for place in (whole, folder)]
        return {
            **found,
            "tensors_equal": same_tensors(*adapters),
            "bytes_equal": adapters[0].read_bytes() == adapters[1].read_bytes(),
            "losses_equal": losses(whole) == losses(folder),
            "left_behind": [str(place.relative_to(folder)) for place in temporary(folder)],
        }


def same_tensors(one: Path, other: Path) -> bool:
    """Names, values and metadata, bit for bit; safetensors leaves the order of metadata to chance, so bytes differ."""
    from fallow.core.files import read_tensors

    (first, told), (second, also_told) = read_tensors(one), read_tensors(other)
    return told == also_told and first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def temporary(folder: Path) -> list[Path]:
    """What should not be there any more."""
    return [place for place in folder.rglob(".*") if place.suffix in (".partial", ".former") or place.name == ".lock"]


def kill_at_random(
    kills: int, seed: int, methods: list[str], page: bool, told: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """So many kills, the moments spread evenly over the time of a run; `told` gets what is known after each."""
    rng, begun = np.random.default_rng(seed), time.perf_counter()
    trials: list[dict[str, Any]] = []
    too_late, result = 0, {}
    part = rng.permutation(kills)
    with tempfile.TemporaryDirectory() as scratch:
        trial = Trial(Path(scratch), page)
        for number in range(kills):
            method, found = methods[number % len(methods)], None
            while found is None:
                share = float(part[number] + rng.random()) / kills if too_late <= kills else 0.9 * rng.random()
                found = trial.kill(method, number + 1000 * too_late, share)
                too_late += found is None
            trials.append(found)
            result = {**counted(trials), "ended_before_the_kill": too_late, "seed": seed, "torch": torch.__version__}
            result |= {"seconds": round(time.perf_counter() - begun, 1), "trials": trials}
            told(result)
    return result


def counted(trials: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "kills": len(trials),
        "tensors_equal": sum(one["tensors_equal"] for one in trials),
        "bytes_equal": sum(one.get("bytes_equal", False) for one in trials),
        "losses_equal": sum(one.get("losses_equal", False) for one in trials),
        "left_something_behind": sum(bool(one.get("left_behind")) for one in trials),
        "phases": dict(collections.Counter(one["phase"] for one in trials)),
        "resumed_from_a_checkpoint": sum(one["checkpoint"] is not None for one in trials),
    }


# -- at every call ----------------------------------------------------------------------------------------------------


def kill_at_every_call(prepare: Callable[[Path], None], action: Callable[[Path], None]) -> Iterator[Path]:
    """For n = 1, 2, ...: a prepared folder in which the action was killed at its n-th call that touches the disk.

    Such calls are the opening of a file for writing, making, renaming, removing, changing rights, fsync, and the
    writing of tensors, which is stopped half-way. Ends with the folder in which the action ran to its end.
    """
    number = 0
    with tempfile.TemporaryDirectory() as scratch:
        while True:
            number += 1
            folder = Path(scratch) / str(number)
            folder.mkdir()
            prepare(folder)
            code, told = ended(*forked(lambda _, folder=folder, number=number: _dying(action, folder, number)))
            yield folder
            if code != -signal.SIGKILL:
                if code:
                    raise RuntimeError(told[-1])
                return


def _dying(action: Callable[[Path], None], folder: Path, number: int) -> None:
    from fallow.core import files

    counted = [0]

    def count() -> None:
        counted[0] += 1
        if counted[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes or event in TOUCHES:
            count()

    fsync, save, exchange = os.fsync, files.save_file, files._exchange

    def half(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
        save(tensors, file, metadata)
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        count()
        file.write_bytes(whole)

    os.fsync = lambda handle: (count(), fsync(handle))[1]
    files.save_file = half
    files._exchange = lambda *names: (count(), exchange(*names), count())[1]
    sys.addaudithook(hook)
    action(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--no-page", action="store_true", help="runs write no page, which is most of their time")
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    import fallow.recipes.text_to_image  # noqa: F401  once, for all processes

    def told(result: dict[str, Any]) -> None:
        print(f"{result['kills']} of {asked.kills}: {result['trials'][-1]}", flush=True)
        if asked.output is not None:
            asked.output.write_text(json.dumps(result, indent=2) + "\n")

    result = kill_at_random(asked.kills, asked.seed, asked.methods.split(","), not asked.no_page, told)
    print(json.dumps({name: value for name, value in result.items() if name != "trials"}, indent=2))
    sys.exit(result["tensors_equal"] < result["kills"])


if __name__ == "__main__":
    main()
