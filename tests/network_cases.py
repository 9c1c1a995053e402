"""Tiny networks of every family with weights that follow a formula, so that any implementation can be given the same."""

from __future__ import annotations

import math
import zlib
from typing import Any

import torch
from torch import Tensor, nn

from fastode.nets.families import build_network

SONG = {"img_resolution": 16, "model_channels": 16, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (8,)}
NCSN = {"embedding_type": "fourier", "channel_mult_noise": 2, "resample_filter": (1, 3, 3, 1)}
WIDE = {"img_resolution": 16, "model_channels": 32, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (8,)}
ADM = {"image_size": 16, "model_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_at": (2,)}
SDE = {"image_size": 16, "nf": 16, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (8,)}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpmpp": ("song", {**SONG, "label_dim": 5, "augment_dim": 9}),
    "ncsnpp residual": ("song", {**SONG, **NCSN, "encoder_type": "residual"}),
    "ncsnpp skip": ("song", {**SONG, **NCSN, "encoder_type": "skip", "decoder_type": "skip", "channel_mult": (1, 1, 2)}),
    "dhariwal": ("dhariwal", {**WIDE, "model_channels": 64, "label_dim": 5}),
    "dhariwal, two outputs": ("dhariwal", {**WIDE, "out_channels": 6}),
    "adm": ("adm", {**ADM, "num_classes": 5, "num_head_channels": 16, "out_channels": 6}),
    "adm, new attention": ("adm", {**ADM, "num_heads": 2, "qkv_order": "qkv"}),
    "adm, plain": ("adm", {**ADM, "num_heads": 2, "use_scale_shift_norm": False, "resblock_updown": False}),
    "consistency": ("adm", {**ADM, "num_head_channels": 16, "qkv_order": "qkv", "use_scale_shift_norm": False,
                            "label_scale": 1000.0}),
    "score-sde ddpmpp": ("ncsnpp", SDE),
    "score-sde ncsnpp": ("ncsnpp", {**SDE, "fir": True, "progressive_input": "residual", "embedding_type": "fourier"}),
    "score-sde skip": ("ncsnpp", {**SDE, "fir": True, "progressive": "output_skip", "progressive_input": "input_skip",
                                  "embedding_type": "fourier", "ch_mult": (1, 1, 2)}),
    "score-sde ddpm": ("ncsnpp", {**SDE, "resblock_type": "ddpm", "skip_rescale": False, "progressive_combine": "cat",
                                  "progressive_input": "input_skip"}),
}  # fmt: skip
"""Name -> (family, config)."""


def noise_level(name: str) -> float:
    """A ``c_noise`` of the size that the family is told: ln(sigma)/4 or ln sigma, or a label of 0 .. 999."""
    return -0.7 if "ncsnpp" in name or "skip" in name or name in ("dhariwal", "consistency") else 437.3


def pattern(shape: torch.Size | tuple[int, ...], seed: int) -> Tensor:
    """Numbers in (-1, 1) by a formula in float64, the same on every machine."""
    k = torch.arange(math.prod(shape), dtype=torch.float64)
    value = torch.sin(12.9898 * k + 78.233 * (seed + 1)) * 43758.5453
    return (2 * (value - value.floor()) - 1).reshape(shape)


def fill(module: nn.Module) -> None:
    """Weights by the formula: matrices of unit gain, vectors near 1 (norms) or near 0. Filters and tables are left alone."""
    tensors = dict(module.named_parameters())
    tensors |= {
        n: t for n, t in module.named_buffers() if n.split(".")[-1] in ("freqs", "W") and n in module.state_dict()
    }
    with torch.no_grad():
        for name, t in tensors.items():
            value = pattern(tuple(t.shape), zlib.crc32(name.encode()) % 1000)
            if name.split(".")[-1] in ("freqs", "W") and t.ndim == 1:
                value = 8 * value
            elif t.ndim > 1:
                fan_in = t.shape[0] if name.endswith(".W") else t[0].numel()
                value = value * math.sqrt(3 / fan_in)
            else:
                value = 0.2 * value + (1.0 if name.endswith("weight") else 0.0)
            t.copy_(value.to(t))


def build(name: str) -> nn.Module:
    family, config = CASES[name]
    module = build_network(family, {**config, "dropout": 0.1})
    fill(module)
    return module.eval().requires_grad_(False)


def inputs(name: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """x [2, 3, 16, 16], c_noise [2], class labels."""
    config = CASES[name][1]
    labels = torch.tensor([3, 1]) if config.get("label_dim") or config.get("num_classes") else None
    return pattern((2, 3, 16, 16), 99).float() * 2, torch.full((2,), noise_level(name)), labels


def sparse(x: Tensor) -> Tensor:
    """Every 13th number: what golden outputs are stored as."""
    return x.flatten()[::13].clone()
