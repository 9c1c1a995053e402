"""A complete model on disk, small enough to write in a test: 8 x 8 pixels, 3 classes, random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastode.files import write_json, write_tensors
from fastode.models import FORMAT
from fastode.nets.unet import UNet, UNetConfig

CONFIG = UNetConfig(resolution=8, num_classes=3, channels=(8, 16), blocks=1, attention=(), embedding=16)


def network(config: UNetConfig = CONFIG) -> UNet:
    """Random weights, also where training starts from zero."""
    net = UNet(config)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (0.3 / max(p[0].numel(), 1) ** 0.5))
    return net.eval()


def write(folder: Path, card: dict[str, Any] | None = None, *, name: str = "tiny", config: UNetConfig = CONFIG) -> Path:
    """``folder``/name.safetensors with its card; ``card`` replaces entries (None removes them)."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / f"{name}.safetensors"
    write_tensors(weights, dict(network(config).state_dict()))
    entries = {
        "format": FORMAT,
        "name": name,
        "config": config.to_dict(),
        "prediction": "edm",
        "sigma_data": 0.5,
        "sigma_min": 0.002,
        "sigma_max": 80.0,
        **(card or {}),
    }
    write_json(weights.with_suffix(".json"), {k: v for k, v in entries.items() if v is not None})
    return weights
