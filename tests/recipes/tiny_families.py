"""A whole pipeline of each family with random weights, small enough that a step costs a blink."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SIDE = 32  # pixels; latents are 8x8
TOKENS = 16  # that CLIP reads of a prompt


def clip(tokenizer: Any, kind: str = "CLIPTextModel", width: int = 16, layers: int = 2) -> Any:
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=32, projection_dim=width,
        num_hidden_layers=layers, num_attention_heads=2, max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return getattr(transformers, kind)(config)


def t5(width: int = 16) -> tuple[Any, Any]:
    """T5's encoder and a tokenizer of single letters."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    letters = [(letter, -2.0) for letter in "▁abcdefghijklmnopqrstuvwxyz0123456789.,-"]
    tokenizer = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *letters], extra_ids=0)
    config = T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=4, d_ff=32, num_layers=1, num_heads=2)
    return T5EncoderModel(config), tokenizer


def vae(channels: int = 4, blocks: int = 3, **more: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks, up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(8,) * blocks, layers_per_block=1, latent_channels=channels, norm_num_groups=4,
        sample_size=SIDE, mid_block_add_attention=False, **more,
    )  # fmt: skip


def ddim(**more: Any) -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, **more,
    )  # fmt: skip


UNET = {
    "sample_size": SIDE // 4, "block_out_channels": (16, 32), "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 16, "attention_head_dim": 4, "norm_num_groups": 8,
}  # fmt: skip


def stable_diffusion(tokenizer: Any) -> Any:
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    return StableDiffusionPipeline(
        vae=vae(), text_encoder=clip(tokenizer), tokenizer=tokenizer, unet=UNet2DConditionModel(**UNET),
        scheduler=ddim(prediction_type="v_prediction"), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def stable_diffusion_xl(tokenizer: Any) -> Any:
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel(
        **UNET | {"cross_attention_dim": 32}, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=4 * 6 + 16,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=vae(), text_encoder=clip(tokenizer), text_encoder_2=clip(tokenizer, "CLIPTextModelWithProjection"),
        tokenizer=tokenizer, tokenizer_2=tokenizer, unet=unet, scheduler=ddim(), add_watermarker=False,
    )  # fmt: skip


def stable_diffusion_3(tokenizer: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=SIDE // 4, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32, out_channels=4,
        pos_embed_max_size=16,
    )  # fmt: skip
    encoder, reader = t5(32)
    kind = "CLIPTextModelWithProjection"
    return StableDiffusion3Pipeline(
        vae=vae(shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False), transformer=transformer,
        text_encoder=clip(tokenizer, kind), text_encoder_2=clip(tokenizer, kind), text_encoder_3=encoder,
        tokenizer=tokenizer, tokenizer_2=tokenizer, tokenizer_3=reader,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


def flux(tokenizer: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    encoder, reader = t5()
    return FluxPipeline(
        vae=vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False), transformer=transformer,
        text_encoder=clip(tokenizer), text_encoder_2=encoder, tokenizer=tokenizer, tokenizer_2=reader,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )  # fmt: skip


def pixart(tokenizer: Any) -> Any:
    """Of 1024 pixels by its configuration, so that it takes sizes; it is trained and drawn at 32."""
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

    transformer = PixArtTransformer2DModel(
        sample_size=128, patch_size=2, in_channels=4, out_channels=8, num_layers=1, attention_head_dim=8,
        num_attention_heads=3, cross_attention_dim=24, caption_channels=16,
    )  # fmt: skip
    encoder, reader = t5()
    return PixArtAlphaPipeline(
        vae=vae(), transformer=transformer, text_encoder=encoder, tokenizer=reader,
        scheduler=DPMSolverMultistepScheduler(),
    )  # fmt: skip


def animatediff(tokenizer: Any) -> Any:
    from diffusers import AnimateDiffPipeline, MotionAdapter, UNet2DConditionModel

    motion = MotionAdapter(
        block_out_channels=(16, 32), motion_layers_per_block=1, motion_num_attention_heads=2, motion_norm_num_groups=8,
        motion_max_seq_length=8, use_motion_mid_block=False,
    )  # fmt: skip
    return AnimateDiffPipeline(
        vae=vae(), text_encoder=clip(tokenizer), tokenizer=tokenizer, unet=UNet2DConditionModel(**UNET),
        motion_adapter=motion, scheduler=ddim(),
    )  # fmt: skip


KINDS = {
    "sd-v": stable_diffusion, "sdxl": stable_diffusion_xl, "sd3": stable_diffusion_3, "flux": flux,
    "pixart": pixart, "animatediff": animatediff,
}  # fmt: skip


def save(kind: str, tokenizer: Any, folder: Path) -> Path:
    """Write the pipeline of a kind; the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        pipeline = KINDS[kind](tokenizer)
    network = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    with torch.no_grad():  # nothing at exactly zero, as some layers begin: gradients must reach everything
        for name, weight in network.named_parameters():
            if not weight.any():
                weight.normal_(0, 0.02, generator=torch.Generator().manual_seed(len(name)))
    pipeline.save_pretrained(folder)
    return folder
