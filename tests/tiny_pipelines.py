"""Pipelines of diffusers with tiny random networks, made on the spot."""

from __future__ import annotations

from typing import Any

import torch

EMBEDS, POOLED = 16, 32


def unet2d(**config: Any) -> Any:
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
    }
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    return UNet2DModel(**{**sizes, **blocks, "attention_head_dim": 4, **config}).eval()


def ddpm(scheduler: Any, **config: Any) -> Any:
    from diffusers import DDPMPipeline

    return _quiet(DDPMPipeline(unet2d(**config), scheduler))


def vae(**config: Any) -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    return AutoencoderKL(**{"block_out_channels": (8,), "norm_num_groups": 4, **blocks, **config}).eval()


def dit(scheduler: Any) -> Any:
    from diffusers import DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(2)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, norm_num_groups=4,
        sample_size=8, patch_size=2, num_embeds_ada_norm=1000,
    ).eval()  # fmt: skip
    for p in transformer.parameters():  # its last layers start at zero
        torch.nn.init.normal_(p, std=0.1)
    return _quiet(DiTPipeline(transformer, vae(latent_channels=4), scheduler))


def stable_diffusion(scheduler: Any, cls: str = "StableDiffusionPipeline") -> Any:
    import diffusers

    torch.manual_seed(3)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=EMBEDS,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip
    pipe = getattr(diffusers, cls)(
        vae=vae(latent_channels=4), text_encoder=None, tokenizer=None, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    return _quiet(pipe)


def sd3(scheduler: Any) -> Any:
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(4)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=EMBEDS, caption_projection_dim=16, pooled_projection_dim=POOLED, out_channels=4,
        pos_embed_max_size=8,
    ).eval()  # fmt: skip
    empty = dict.fromkeys(
        ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    )
    decoder = vae(latent_channels=4, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1)
    return _quiet(StableDiffusion3Pipeline(transformer=transformer, scheduler=scheduler, vae=decoder, **empty))


def flux(scheduler: Any) -> Any:
    from diffusers import FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(5)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=EMBEDS, pooled_projection_dim=POOLED, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip
    empty = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    decoder = vae(latent_channels=1, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0)
    return _quiet(FluxPipeline(transformer=transformer, scheduler=scheduler, vae=decoder, **empty))


def embeds(kind: str, batch: int = 1) -> dict[str, torch.Tensor]:
    """Prompt embeddings in the place of text encoders."""
    g = torch.Generator().manual_seed(6)
    given = {"prompt_embeds": torch.randn(batch, 7, EMBEDS, generator=g)}
    if kind != "flux":
        given["negative_prompt_embeds"] = torch.randn(batch, 7, EMBEDS, generator=g)
    if kind in ("sd3", "flux"):
        given["pooled_prompt_embeds"] = torch.randn(batch, POOLED, generator=g)
    if kind == "sd3":
        given["negative_pooled_prompt_embeds"] = torch.randn(batch, POOLED, generator=g)
    return given


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe
