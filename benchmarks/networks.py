"""The networks of `trajectory`: raw networks ``F(x, c_noise, class_labels)`` of EDM preconditioning."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastode import Denoiser, load
from fastode.nets.unet import build


@dataclass(frozen=True)
class Network:
    """``gpu_only``: too slow on a CPU to be timed there by default."""

    name: str
    gpu_only: bool = False


NETWORKS = (Network("mnist"), Network("transformer-5M"), Network("transformer-57M", True), Network("unet-106M", True))


class Transformer(nn.Module):
    """A plain transformer over patches; noise level and class come in as one more token each."""

    def __init__(
        self, *, resolution: int, channels: int, patch: int, width: int, depth: int, classes: int = 10
    ) -> None:
        super().__init__()
        self.patch, self.side, self.classes = patch, resolution // patch, classes
        pixels = channels * patch**2
        self.input = nn.Linear(pixels, width)
        self.position = nn.Parameter(0.02 * torch.randn(1, self.side**2, width))
        self.register_buffer("frequencies", torch.exp(torch.linspace(math.log(0.5), math.log(32.0), width // 2)))
        self.noise = nn.Linear(width, width)
        self.label = nn.Embedding(classes + 1, width)
        layer = nn.TransformerEncoderLayer(
            width, width // 64, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, pixels)

    def forward(self, x: Tensor, c_noise: Tensor, class_labels: Tensor | None = None) -> Tensor:
        b, c = x.shape[:2]
        p = self.patch
        tokens = nn.functional.pixel_unshuffle(x, p).flatten(2).transpose(1, 2)
        angle = c_noise.reshape(-1, 1).expand(b, 1) * self.frequencies
        level = self.noise(torch.cat([angle.cos(), angle.sin()], dim=1).to(x.dtype))
        if class_labels is None:
            class_labels = torch.full((b,), self.classes, device=x.device, dtype=torch.int64)
        extra = torch.stack([level, self.label(class_labels)], dim=1)
        tokens = self.layers(torch.cat([extra, self.input(tokens) + self.position], dim=1))[:, 2:]
        tokens = self.output(self.norm(tokens)).transpose(1, 2).reshape(b, c * p * p, self.side, self.side)
        return nn.functional.pixel_shuffle(tokens, p)


def make(name: str, device: str = "cpu") -> Denoiser:
    """The bundled model, or a network of that size with random weights."""
    if name == "mnist":
        return load(name, device=device)
    torch.manual_seed(0)
    classes, shape = 10, (3, 32, 32)
    if name == "unet-106M":
        size = {"channels": (192, 384, 640), "blocks": 2, "attention": (8,), "embedding": 768}
        module: nn.Module = build(size, resolution=shape[1], in_channels=shape[0], num_classes=classes)
    elif name == "transformer-57M":
        module = Transformer(resolution=shape[1], channels=shape[0], patch=2, width=768, depth=8, classes=classes)
    elif name == "transformer-5M":
        shape = (1, 32, 32)
        module = Transformer(resolution=shape[1], channels=shape[0], patch=4, width=256, depth=6, classes=classes)
    else:
        raise ValueError(f"name: must be one of {', '.join(n.name for n in NETWORKS)}, got {name!r}")
    module = module.eval().requires_grad_(False).to(device)
    return Denoiser(module, num_classes=classes, null_label=classes, sample_shape=shape, name=name)
