"""Checkpoints of guided diffusion (arXiv:2105.05233) and of Consistency Models' EDM networks (arXiv:2303.01469) as denoisers.

Both are bare state dicts. Most of a network can be read off its tensors; what cannot is asked for, or known by the name of
a published file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastode.denoisers.base import Denoiser
from fastode.interop.unpickle import load_pickle, tensors_of
from fastode.interop.weights import fit
from fastode.nets.adm import ADMConfig, ADMUNet
from fastode.schedules.noise import EDM, Discrete

_GUIDED = {"image_size": 256, "num_head_channels": 64, "noise_schedule": "linear"}
PRESETS: dict[str, dict[str, Any]] = {
    "64x64_diffusion": {**_GUIDED, "image_size": 64, "new_attention_order": True, "noise_schedule": "cosine"},
    "128x128_diffusion": {"image_size": 128, "num_heads": 4, "noise_schedule": "linear"},
    "256x256_diffusion": _GUIDED,
    "256x256_diffusion_uncond": _GUIDED,
    "512x512_diffusion": {**_GUIDED, "image_size": 512},
    **{f"lsun_{kind}": _GUIDED for kind in ("bedroom", "cat", "horse", "horse_nodropout")},
    "edm_imagenet64_ema": {"image_size": 64, "num_head_channels": 64},
    "edm_bedroom256_ema": {"image_size": 256, "num_head_channels": 64},
    "edm_cat256_ema": {"image_size": 256, "num_head_channels": 64},
}
"""Options of the published checkpoints, by the names of their files."""


def load(path: str | os.PathLike[str], **options: Any) -> Denoiser:
    """A checkpoint such as ``256x256_diffusion.pt`` or ``edm_imagenet64_ema.pt`` as a :class:`Denoiser`.

    A network whose attention has two-dimensional convolutions is one of Consistency Models': prediction "edm", sigma in
    0.002 .. 80. Others are guided diffusion's: "eps" on a DDPM table, learned variances left out. (Networks distilled to
    consistency models themselves have the same tensors; what they compute is not a denoised estimate.)

    ``options``, which published files bring along: ``image_size``; ``num_head_channels`` or ``num_heads``;
    ``new_attention_order`` (False); ``noise_schedule``, "linear" or "cosine"; ``diffusion_steps`` (1000).

    Raises ``FileNotFoundError``; ``UnsafePickle``; ``ValueError`` for options that are missing or unknown, and for missing,
    extra or misshapen weights.
    """
    name = Path(path).stem
    return of(tensors_of(load_pickle(path)), name=name, **{**PRESETS.get(name, {}), **options})


def of(
    tensors: Mapping[str, Tensor],
    *,
    name: str = "adm",
    image_size: int | None = None,
    num_head_channels: int | None = None,
    num_heads: int | None = None,
    new_attention_order: bool = False,
    noise_schedule: str | None = None,
    diffusion_steps: int = 1000,
) -> Denoiser:
    """As :func:`load`, from the state dict."""
    consistency = any(k.endswith(".qkv.weight") and v.ndim == 4 for k, v in tensors.items())
    if image_size is None:
        raise ValueError(f"image_size: {name} does not say; give the side length of its images")
    if (num_head_channels is None) == (num_heads is None):
        raise ValueError(f"num_head_channels: {name} does not say; give num_head_channels or num_heads")
    if noise_schedule not in ((None,) if consistency else ("linear", "cosine")):
        raise ValueError(
            f"noise_schedule: must be {'left out for EDM networks' if consistency else 'linear or cosine'}, "
            f"got {noise_schedule!r}"
        )
    config = ADMConfig(
        image_size=image_size,
        num_head_channels=num_head_channels or 0,
        num_heads=num_heads or 1,
        qkv_order="qkv" if consistency or new_attention_order else "heads",
        label_scale=1000.0 if consistency else 1.0,
        **read_architecture(tensors, name),
    )
    flat = {  # two-dimensional convolutions of one position are one-dimensional ones
        k: v[..., 0] if v.ndim == 4 and re.search(r"\.(qkv|proj_out)\.weight$", k) else v for k, v in tensors.items()
    }
    network = fit(ADMUNet(config), flat, where=name)
    return Denoiser(
        network,
        prediction="edm" if consistency else "eps",
        schedule=EDM() if consistency else guided_schedule(str(noise_schedule), diffusion_steps),
        num_classes=config.num_classes,
        sample_shape=(config.in_channels, image_size, image_size),
        name=name,
    )


def guided_schedule(kind: str, steps: int = 1000) -> Discrete:
    """Guided diffusion's tables: "linear" betas from 0.1/T to 20/T, or "cosine"."""
    if kind == "cosine":
        return Discrete.squared_cosine(steps)
    return Discrete.linear(0.1 / steps, 20 / steps, steps)


def read_architecture(tensors: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """What the names and shapes of a state dict say about its network, as fields of :class:`ADMConfig`."""
    try:
        channels = tensors["time_embed.0.weight"].shape[1]
        in_channels = tensors["input_blocks.0.0.weight"].shape[1]
        out_channels = tensors["out.2.weight"].shape[0]
        # A level of the decoder ends with the block that resizes: a second residual block, or a convolution.
        ends = sorted(
            int(found[1])
            for key in tensors
            if (found := re.fullmatch(r"output_blocks\.(\d+)\.(?:[12]\.in_layers\.0|[12]\.conv)\.weight", key))
        )
        blocks, levels = ends[0], len(ends) + 1
        first = [1 + level * (blocks + 1) for level in range(levels)]  # of each level in the encoder
        widths = [tensors[f"input_blocks.{i}.0.in_layers.2.weight"].shape[0] for i in first]
        film = tensors["input_blocks.1.0.emb_layers.1.weight"].shape[0] == 2 * widths[0]
        mults = [w / channels for w in widths]
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise ValueError(f"weights: {name} is not a state dict of guided diffusion's UNetModel ({error})") from error
    resized_by_conv = any(re.fullmatch(r"output_blocks\.\d+\.[12]\.conv\.weight", key) for key in tensors)
    return {
        "in_channels": in_channels,
        "out_channels": out_channels,
        "model_channels": channels,
        "channel_mult": tuple(int(m) if m == int(m) else m for m in mults),
        "num_res_blocks": blocks,
        "attention_at": tuple(2**i for i, k in enumerate(first) if f"input_blocks.{k}.1.qkv.weight" in tensors),
        "num_classes": tensors["label_emb.weight"].shape[0] if "label_emb.weight" in tensors else 0,
        "use_scale_shift_norm": film,
        "resblock_updown": not resized_by_conv,
    }
