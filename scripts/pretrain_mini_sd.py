"""Train mini-sd, the text-to-image model that ships with Fallow, from nothing, on two CPU cores in about an hour.

    python scripts/pretrain_mini_sd.py                 # all stages -> src/fallow/assets/{mini-sd,garment-net}
    python scripts/pretrain_mini_sd.py --stage unet    # one stage again, on what the others left in --work

Stages, each deterministic under --seed on one kind of machine:
  vae         AutoencoderKL 3x32x32 -> 4x8x8 on garments in random styles (SD's autoencoder, too, has seen more than
              photographs)
  features    GarmentNet: names garment and style family; its features give Frechet distances, its logits alignment
  unet        CLIP text model and UNet2DConditionModel together, epsilon prediction, captions dropped one time in ten
  export      the diffusers StableDiffusionPipeline directory, fp16 weights, and the acceptance figures in its card
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import garments
from fallow.analysis.features import GarmentNet
from fallow.analysis.images import alignment, frechet_distance
from fallow.core.files import atomic_directory

ASSETS = Path(__file__).resolve().parents[1] / "src/fallow/assets"
TOKENS = 32  # length of a prompt in tokens, begin and end included

# Words that are one token each; anything else falls back to single bytes, so that every text has a tokenization.
WORDS = """
a an the of in on with and photo picture image drawing painting print style color colour pattern texture dark grey
light shirt t-shirt trousers pullover dress coat sandal sneaker bag ankle boot shoe garment clothes sks new my old
modern striped plain red orange yellow green blue purple pink brown black white gold silver bronze sunset blueprint
halftone mosaic relief outline sketch ink neon pixel comic vintage retro watercolor oil pencil stained glass metal
wood stone paper tile dots lines edges night day toy simple bright soft hard small large long short sleeve sleeves
high low good bad best quality
""".split()  # noqa: SIM905  # a list of quoted words is no easier to read


CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# mini-sd

A complete, really trained text-to-image model of the Stable Diffusion 1.x kind, small enough to ship with a package:
32x32 pictures, latents 4x8x8, prompts of up to 32 tokens. It exists so that fine-tuning can be tried, tested and
measured end to end where no model hub can be reached, in minutes on two CPU cores.

```python
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("path/to/mini-sd")
pipeline("a photo of a dark coat", num_inference_steps=25, guidance_scale=3.0).images[0]
```

**It knows** eight garments of Fashion-MNIST (t-shirt, trousers, pullover, dress, coat, sandal, shirt, sneaker) in three
shades (dark, grey, light), as grey photographs on black: `a photo of a light dress`, `a picture of trousers`, `dark
coat`. **It has never seen** a bag or an ankle boot (the two classes are held out as new concepts), nor any picture in a
style; only its autoencoder was trained on styled and coloured garments of the eight classes, as that of Stable
Diffusion was trained on more than photographs.

![samples](samples.png)

## Figures

Measured by `scripts/pretrain_mini_sd.py --stage export`: 500 pictures (eight garments in turn, `a photo of a ...`), 25
DDIM steps, guidance 3. The judge is the garment net that ships beside this model: trained apart from it, on all ten
classes. Frechet distances are taken in its 64 features, each of 500 pictures against the other {reference} real test
pictures of the eight classes; that of 500 real pictures is the floor.

| figure | value |
| --- | --- |
{rows}

| garment asked for | recognised |
| --- | --- |
{classes}

## Data, licence, limits

Trained on the first 55,000 training pictures of Fashion-MNIST (Zalando SE, MIT licence, `LICENSE-fashion-mnist`). The
weights are under Apache-2.0. A test-bed, not a product: 32x32 grey garments, English captions of one form.
"""

NET_CARD = """---
license: apache-2.0
---

# garment-net

The judge of 32x32 garments that ships with Fallow: one small convolutional network, two heads. It names the garment
(ten classes of Fashion-MNIST) and the family of the style it is drawn in ({families}).
Its 64 features give Frechet distances, its garment logits text alignment. Read it with
`fallow.analysis.features.GarmentNet.from_pretrained`.

Accuracy on the 10,000 grey test pictures: {accuracy:.2%}. It was trained apart from mini-sd by
`scripts/pretrain_mini_sd.py --stage features` on the first 55,000 training pictures of Fashion-MNIST (Zalando SE, MIT
licence, `LICENSE-fashion-mnist`), plain and in random styles and colours, sharp and softened. The weights are under
Apache-2.0.
"""


class Ema:
    """Exponential moving average of some modules' parameters, with the usual warm-up of the decay."""

    def __init__(self, modules: list[nn.Module], decay: float) -> None:
        self.live: list[Tensor] = [p for m in modules for p in m.parameters()]
        self.mean: list[Tensor] = [p.detach().clone() for p in self.live]
        self.decay, self.steps = decay, 0

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.mean, self.live, 1 - decay)

    @torch.no_grad()
    def copy_to_live(self) -> None:
        torch._foreach_copy_(self.live, self.mean)


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-level BPE was trained until each of `WORDS` is one token."""
    alphabet = sorted(ByteLevel.alphabet())
    bpe = Tokenizer(BPE(end_of_word_suffix="</w>"))
    trainer = BpeTrainer(
        vocab_size=5000, min_frequency=1, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(sorted({part for word in WORDS for part in word.split("-")}), trainer)
    merges = [" ".join(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    vocabulary = alphabet + [letter + "</w>" for letter in alphabet]
    vocabulary += [joined for merge in merges if (joined := merge.replace(" ", "")) not in vocabulary]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)
    for word in WORDS:
        assert len(tokenizer(word).input_ids) - 2 == len(word.split("-")) * 2 - 1, (word, tokenizer.tokenize(word))
    return tokenizer


def make_text_model(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=256, projection_dim=64, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=TOKENS, hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


# diffusers' lazy imports hide its base classes from type checkers, so its objects are Any here.


def make_vae() -> Any:
    return AutoencoderKL(
        in_channels=3, out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 48), layers_per_block=1, latent_channels=4, norm_num_groups=8, sample_size=32,
        mid_block_add_attention=False,
    )  # fmt: skip


def make_unet() -> Any:
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(64, 128),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=64, attention_head_dim=4, norm_num_groups=16,
    )  # fmt: skip


def make_scheduler() -> Any:
    return DDPMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
    )


def one_cycle(optimizer: torch.optim.Optimizer, lr: float, steps: int) -> torch.optim.lr_scheduler.OneCycleLR:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)


class Data:
    """The eight trained classes for the generator; all ten for the feature network; the test split for the figures."""

    def __init__(self, folder: Path) -> None:
        images, self.labels = (tensor[: garments.PRETRAIN_IMAGES] for tensor in garments.load(folder, "train"))
        self.images, self.shades = images, garments.shade(images)
        self.trained = (
            torch.tensor([label not in garments.HELD_OUT for label in self.labels.tolist()]).nonzero().flatten()
        )
        self.test_images, self.test_labels = garments.load(folder, "t10k")
        self.test_shades = garments.shade(self.test_images)

    def batch(self, index: Tensor) -> Tensor:
        return self.images[index].float() / 255


def report(stage: str, step: int, steps: int, begun: float, **figures: float) -> None:
    if step % 50 == 0 or step == steps:
        text = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
        print(f"{stage} {step}/{steps}  {text}  {time.time() - begun:.0f} s", flush=True)


def train_vae(data: Data, work: Path, steps: int, rng: torch.Generator) -> None:
    vae, begun = make_vae().to(memory_format=torch.channels_last), time.time()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule, ema = one_cycle(optimizer, 2e-3, steps), Ema([vae], 0.995)
    for step in range(1, steps + 1):
        index = data.trained[torch.randint(len(data.trained), (32,), generator=rng)]
        pictures, _ = garments.in_random_style(data.batch(index), rng)
        pictures = (pictures * 2 - 1).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(pictures).latent_dist
        restored = vae.decode(posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=rng)).sample
        error = F.mse_loss(restored, pictures)
        loss = error + F.l1_loss(restored, pictures) + 2e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ema.update()
        report("vae", step, steps, begun, mse=error.item())
    ema.copy_to_live()
    with torch.no_grad():
        latents = torch.cat(
            [
                vae.encode(data.batch(i).expand(-1, 3, -1, -1) * 2 - 1).latent_dist.mean
                for i in data.trained[:2000].split(100)
            ]
        )
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    vae.to(memory_format=torch.contiguous_format).save_pretrained(work / "vae")


def train_features(data: Data, work: Path, steps: int, rng: torch.Generator) -> None:
    """Part of each batch in random styles: a garment is named whatever it is drawn in, and the style is named, too.

    Six in ten pictures are softened, so that features tell styles and garments apart and not sharp from soft: else the
    autoencoder's blur alone is nearly as far from a style's real pictures as grey photographs are.
    """
    net: Any = GarmentNet().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs miss it
    begun = time.time()
    optimizer = torch.optim.AdamW(net.parameters(), lr=4e-3, weight_decay=5e-3)
    schedule, ema = one_cycle(optimizer, 4e-3, steps), Ema([net], 0.995)
    for step in range(1, steps + 1):
        index = torch.randint(len(data.images), (128,), generator=rng)
        x = F.pad(data.batch(index), (2, 2, 2, 2))
        row, column = (int(torch.randint(5, (), generator=rng)) for _ in range(2))
        x = x[:, :, row : row + 32, column : column + 32]
        pictures, family = garments.in_random_style(x, rng)
        plain = torch.rand(len(x), generator=rng) < 0.35
        pictures[plain], family[plain] = x[plain].expand(-1, 3, -1, -1), 0
        soft = torch.rand(len(x), generator=rng) < 0.6
        pictures[soft] = garments.soften(pictures[soft], rng)
        garment_logits, style_logits = net(pictures.contiguous(memory_format=torch.channels_last))
        labels = data.labels[index]
        loss = F.cross_entropy(garment_logits, labels, label_smoothing=0.05) + 0.5 * F.cross_entropy(
            style_logits, family
        )
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ema.update()
        right = (garment_logits.argmax(1) == labels).float().mean()
        report("features", step, steps, begun, loss=loss.item(), right=right.item())
    ema.copy_to_live()
    net.to(memory_format=torch.contiguous_format).eval().save_pretrained(
        work / "garment-net", garments.NAMES, garments.FAMILIES
    )


def encode_prompts(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    return tokenizer(prompts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt").input_ids


def prompt_table(tokenizer: CLIPTokenizer) -> Tensor:
    """Token ids of every caption: `(10 garments, 4 = three shades and none, 4 templates, TOKENS)`."""

    def templates(text: str) -> list[str]:
        return [text, text.replace("photo", "picture"), text.removeprefix("a photo of "), text]

    return torch.stack([
        torch.stack([encode_prompts(tokenizer, templates(garments.caption(label, shade))) for shade in (0, 1, 2, None)])
        for label in range(10)
    ])  # fmt: skip


def train_unet(data: Data, work: Path, steps: int, rng: torch.Generator) -> None:
    vae = AutoencoderKL.from_pretrained(work / "vae").eval()
    tokenizer = make_tokenizer(work / "tokenizer")
    text, unet, scheduler, begun = make_text_model(tokenizer), make_unet(), make_scheduler(), time.time()
    with torch.no_grad():
        latents = torch.cat(
            [
                vae.encode(data.batch(i).expand(-1, 3, -1, -1) * 2 - 1).latent_dist.parameters
                for i in data.trained.split(256)
            ]
        )
    mean, deviation = latents[:, :4], latents[:, 4:].clamp(-30, 20).mul(0.5).exp()
    prompts, nothing = prompt_table(tokenizer), encode_prompts(tokenizer, [""])
    parameters = [*unet.parameters(), *text.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-2, fused=True)
    schedule, ema = one_cycle(optimizer, 1e-3, steps), Ema([unet, text], 0.999)
    average = 1.0
    for step in range(1, steps + 1):
        pick = torch.randint(len(data.trained), (64,), generator=rng)
        latent = (
            mean[pick] + deviation[pick] * torch.randn(mean[pick].shape, generator=rng)
        ) * vae.config.scaling_factor
        where = data.trained[pick]
        shades = data.shades[where].masked_fill(torch.rand(64, generator=rng) < 0.4, 3)
        ids = prompts[data.labels[where], shades, torch.randint(4, (64,), generator=rng)]
        ids = torch.where(torch.rand(64, 1, generator=rng) < 0.1, nothing, ids)
        noise = torch.randn(latent.shape, generator=rng)
        when = torch.randint(1000, (64,), generator=rng)
        guess = unet(scheduler.add_noise(latent, noise, when), when, text(ids).last_hidden_state).sample
        loss = F.mse_loss(guess, noise)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ema.update()
        average = 0.98 * average + 0.02 * loss.item()
        report("unet", step, steps, begun, loss=average)
    ema.copy_to_live()
    unet.save_pretrained(work / "unet")
    text.save_pretrained(work / "text_encoder")


def export(data: Data, work: Path, assets: Path, seed: int) -> None:
    """Write the pipeline directory in fp16 and the feature network; both are put in their places when all is done."""
    vae, unet = AutoencoderKL.from_pretrained(work / "vae"), UNet2DConditionModel.from_pretrained(work / "unet")
    text = CLIPTextModel.from_pretrained(work / "text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer", model_max_length=TOKENS)
    schedule = {k: v for k, v in make_scheduler().config.items() if k.startswith("beta") or k == "num_train_timesteps"}
    scheduler = DDIMScheduler(**schedule, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    pipeline: Any = StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    with atomic_directory(assets / "mini-sd") as folder, atomic_directory(assets / "garment-net") as net_folder:
        write_folders(data, work, pipeline, folder, net_folder, seed)


def write_folders(data: Data, work: Path, pipeline: Any, folder: Path, net_folder: Path, seed: int) -> None:
    """Weights, licences, and the figures of 500 sampled pictures as JSON and on the cards."""
    pipeline.save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):  # what loaders read before tokenizer.json was the only format
        shutil.copy(work / "tokenizer" / name, folder / "tokenizer")
    for file in folder.rglob("*.safetensors"):  # fp16 on disk; the configs say float32, so loaders compute in float32
        halves = {k: v.half() if v.is_floating_point() else v for k, v in load_file(file).items()}
        save_file(halves, file, metadata={"format": "pt"})
    net = GarmentNet.from_pretrained(work / "garment-net")
    net.save_pretrained(net_folder, garments.NAMES, garments.FAMILIES)

    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    classes = [c for c in range(10) if c not in garments.HELD_OUT]
    rng = torch.Generator().manual_seed(seed)
    wanted = torch.tensor([classes[i % 8] for i in range(500)])
    pictures = torch.cat([
        pipeline(
            [garments.caption(c) for c in part.tolist()], num_inference_steps=25, guidance_scale=3.0, generator=rng,
            output_type="pt",
        ).images
        for part in wanted.split(100)
    ])  # fmt: skip

    trained = torch.tensor([label not in garments.HELD_OUT for label in data.test_labels.tolist()]).nonzero().flatten()
    order = trained[torch.randperm(len(trained), generator=rng)]
    real = (data.test_images[order].float() / 255).expand(-1, 3, -1, -1)
    some, reference = real[:500], net.features(real[500:])
    with torch.no_grad():
        restored = torch.cat(
            [pipeline.vae(part * 2 - 1).sample.div(2).add(0.5).clamp(0, 1) for part in some.split(100)]
        )
    all_real = (data.test_images.float() / 255).expand(-1, 3, -1, -1)
    figures = {
        "garment net, accuracy on the 10,000 test images": alignment(net, all_real, data.test_labels)["recognised"],
        "recognised of 500 sampled images": alignment(net, pictures, wanted)["recognised"],
        "recognised of 500 real images": alignment(net, some, data.test_labels[order[:500]])["recognised"],
        "Frechet distance, 500 sampled": frechet_distance(net.features(pictures), reference),
        "Frechet distance, 500 real": frechet_distance(net.features(some), reference),
        "Frechet distance, 500 real through the autoencoder": frechet_distance(net.features(restored), reference),
        "autoencoder, mean squared error of pixels in [-1, 1]": 4 * F.mse_loss(restored, some).item(),
        "parameters, UNet": sum(p.numel() for p in pipeline.unet.parameters()),
        "parameters, autoencoder": sum(p.numel() for p in pipeline.vae.parameters()),
        "parameters, text model": sum(p.numel() for p in pipeline.text_encoder.parameters()),
        "parameters, garment net": sum(p.numel() for p in net.parameters()),
        **{f"seconds of training, {stage}": seconds for stage, seconds in read_seconds(work).items()},
    }
    by_class = {garments.NAMES[c]: alignment(net, pictures[wanted == c], wanted[wanted == c]) for c in classes}
    told = {k: round(float(v), 5) for k, v in figures.items()}
    (folder / "figures.json").write_text(json.dumps(told, indent=2) + "\n")
    rows = [
        f"| {name} | {value:,.4g} |" if value < 1e4 else f"| {name} | {value:,.0f} |" for name, value in told.items()
    ]
    class_rows = [f"| {name} | {found['recognised']:.3f} |" for name, found in by_class.items()]
    print("\n".join(rows + class_rows))
    card = CARD.format(rows="\n".join(rows), classes="\n".join(class_rows), reference=f"{len(reference):,}")
    (folder / "README.md").write_text(card)
    accuracy = figures["garment net, accuracy on the 10,000 test images"]
    (net_folder / "README.md").write_text(NET_CARD.format(families=", ".join(garments.FAMILIES), accuracy=accuracy))
    sheet = pictures[: 8 * 12].unflatten(0, (12, 8)).permute(0, 3, 1, 4, 2).reshape(12 * 32, 8 * 32, 3)
    samples = Image.fromarray(sheet.mul(255).round().byte().numpy())
    samples.resize((768, 1152), Image.Resampling.NEAREST).save(folder / "samples.png", optimize=True)
    for made in (folder, net_folder):
        (made / "LICENSE-fashion-mnist").write_text(garments.LICENSE)


def read_seconds(work: Path) -> dict[str, float]:
    """How long each stage that has been run took, in seconds."""
    file = work / "seconds.json"
    return dict(json.loads(file.read_text())) if file.exists() else {}


STAGES = {"vae": (train_vae, 3500), "features": (train_features, 2600), "unet": (train_unet, 3200)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="folder of the idx files"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("runs/pretrain-mini-sd"), help="where the stages leave their weights"
    )
    parser.add_argument("--assets", type=Path, default=ASSETS, help="where the finished model is written")
    parser.add_argument("--stage", choices=[*STAGES, "export", "all"], default="all")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the number of steps (for a trial)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of each stage; the shipped weights were made with 1")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    if args.stage == "all":
        run_all([word for word in sys.argv[1:] if word not in ("--stage", "all")])
        return
    data = Data(args.data)
    if args.stage == "export":
        export(data, args.work, args.assets, args.seed)
        return
    train, steps = STAGES[args.stage]
    torch.manual_seed(args.seed)
    begun = time.time()
    train(data, args.work, math.ceil(steps * args.scale), torch.Generator().manual_seed(args.seed))
    seconds = read_seconds(args.work) | {args.stage: round(time.time() - begun)}
    (args.work / "seconds.json").write_text(json.dumps(seconds) + "\n")


def run_all(options: list[str]) -> None:
    """Each stage in a process of its own; the autoencoder and the feature network share nothing and go side by side."""
    for together in (("vae", "features"), ("unet",), ("export",)):
        running = [subprocess.Popen([sys.executable, __file__, "--stage", stage, *options]) for stage in together]
        codes = [process.wait() for process in running]  # of all, whichever fails
        if any(codes):
            raise SystemExit(f"the stages {' and '.join(together)} did not all end well; what they said is above")


if __name__ == "__main__":
    main()
