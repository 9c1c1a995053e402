"""A small class-conditional U-Net in the style of ADM / EDM's DDPM++, sized for images of 32 x 32.

It computes the raw output ``F`` of Karras et al. 2022 (arXiv:2206.00364), equation 7,

    D(x; sigma) = c_skip(sigma) x + c_out(sigma) F(c_in(sigma) x; c_noise(sigma), class)

and knows nothing about ``sigma``: what its output means is decided in :mod:`fastode.denoisers`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class UNetConfig:
    """Everything needed to rebuild a :class:`UNet`; stored in the weights' JSON card.

    ``num_classes = 0`` makes an unconditional network. ``attention`` lists the resolutions (side lengths) that get
    a self-attention layer after each block. ``patch`` folds p x p pixels into channels before the first convolution and
    unfolds them after the last: at p = 2 the most expensive level of a 32 x 32 network disappears.
    """

    resolution: int = 32
    in_channels: int = 1
    num_classes: int = 10
    channels: tuple[int, ...] = (32, 64, 96)
    blocks: int = 2
    attention: tuple[int, ...] = (8,)
    embedding: int = 128
    dropout: float = 0.0
    patch: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(int(c) for c in self.channels))
        object.__setattr__(self, "attention", tuple(int(r) for r in self.attention))
        down = self.patch * 2 ** (len(self.channels) - 1)
        if self.resolution % down:
            raise ValueError(
                f"resolution: {self.resolution} is not divisible by {down}, "
                f"which {len(self.channels)} levels of channels on patches of {self.patch} need"
            )
        if any(c % 8 for c in self.channels):
            raise ValueError(f"channels: every width must be a multiple of 8, got {self.channels}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups=math.gcd(8, channels), num_channels=channels, eps=1e-5)


def _zero(module: nn.Module) -> nn.Module:
    """Start a residual branch at zero, so that the network begins as its skip connections."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class NoiseEmbedding(nn.Module):
    """Sines and cosines of ``c_noise`` ([B], = ln(sigma)/4 for EDM) at geometric frequencies 1/2 .. 32: [B, width].

    Computed in float32 also in a narrower network: an angle of 35 with 8 bits is wrong by 0.1.
    """

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        frequencies = torch.exp(torch.linspace(math.log(0.5), math.log(32.0), width // 2))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NoiseEmbedding:
        exact = self.frequencies
        super()._apply(fn, recurse)
        self.frequencies = exact.to(self.frequencies.device)
        return self

    def forward(self, c_noise: Tensor) -> Tensor:
        angle = c_noise[:, None] * self.frequencies
        return torch.cat([angle.cos(), angle.sin()], dim=1)


class Block(nn.Module):
    """Residual block: norm, SiLU, conv, norm with scale and shift from the embedding, SiLU, conv; then attention."""

    def __init__(self, c_in: int, c_out: int, embedding: int, *, attention: bool, dropout: float) -> None:
        super().__init__()
        self.norm0 = _group_norm(c_in)
        self.conv0 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.affine = nn.Linear(embedding, 2 * c_out)
        self.norm1 = _group_norm(c_out)
        self.dropout = dropout
        self.conv1 = _zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attention = Attention(c_out) if attention else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv0(functional.silu(self.norm0(x)))
        scale, shift = self.affine(embedding)[:, :, None, None].chunk(2, dim=1)
        h = functional.silu(torch.addcmul(shift, self.norm1(h), scale + 1))
        if self.dropout:
            h = functional.dropout(h, p=self.dropout, training=self.training)
        h = (self.conv1(h) + self.skip(x)) * math.sqrt(0.5)
        return h if self.attention is None else self.attention(h)


class Attention(nn.Module):
    """Self-attention over positions, heads of 32 channels or fewer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = max(1, channels // 32)
        if channels % self.heads:
            self.heads = 1
        self.norm = _group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = _zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, 3, self.heads, c // self.heads, h * w).transpose(3, 4).unbind(1)
        a = functional.scaled_dot_product_attention(q, k, v)
        return (x + self.out(a.transpose(2, 3).reshape(b, c, h, w))) * math.sqrt(0.5)


class UNet(nn.Module):
    """Raw network ``F(x, c_noise, class_labels)``: [B, C, H, W], [B], [B] int64 -> [B, C, H, W].

    ``class_labels`` equal to ``num_classes`` (or ``None``) is the "no class" input that label dropout trains, and what
    classifier-free guidance subtracts.

    With ``features=True`` the call returns ``(F, {"bottleneck": h})``: ``h`` is the output of the middle block,
    [B, channels[-1], resolution / 2^(levels-1), ...]. Learned solvers read it; it is a plain output, never a hook,
    so it survives compilation and export.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        width = config.embedding
        self.noise = NoiseEmbedding(config.channels[0] * 2)
        self.map0 = nn.Linear(config.channels[0] * 2, width)
        self.map1 = nn.Linear(width, width)
        self.label = nn.Embedding(config.num_classes + 1, width) if config.num_classes else None

        def block(c_in: int, c_out: int, resolution: int) -> Block:
            return Block(c_in, c_out, width, attention=resolution in config.attention, dropout=config.dropout)

        pixels = config.in_channels * config.patch**2
        self.input = nn.Conv2d(pixels, config.channels[0], 3, padding=1)
        self.down = nn.ModuleList()
        self.shrink = nn.ModuleList()
        widths = [config.channels[0]]
        c, resolution = config.channels[0], config.resolution // config.patch
        for level, c_level in enumerate(config.channels):
            for _ in range(config.blocks):
                self.down.append(block(c, c_level, resolution))
                c = c_level
                widths.append(c)
            if level + 1 < len(config.channels):
                self.shrink.append(nn.Conv2d(c, c, 3, stride=2, padding=1))
                resolution //= 2
                widths.append(c)
        self.middle = block(c, c, resolution)
        self.up = nn.ModuleList()
        self.grow = nn.ModuleList()
        for level, c_level in reversed(list(enumerate(config.channels))):
            for _ in range(config.blocks + 1):
                self.up.append(block(c + widths.pop(), c_level, resolution))
                c = c_level
            if level:
                self.grow.append(nn.Conv2d(c, c, 3, padding=1))
                resolution *= 2
        self.output_norm = _group_norm(c)
        self.output = _zero(nn.Conv2d(c, pixels, 3, padding=1))

    def forward(
        self, x: Tensor, c_noise: Tensor, class_labels: Tensor | None = None, *, features: bool = False
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        embedding = functional.silu(self.map0(self.noise(c_noise.reshape(-1).expand(x.shape[0])).to(x.dtype)))
        embedding = self.map1(embedding)
        if self.label is not None:
            if class_labels is None:
                class_labels = torch.full((x.shape[0],), self.config.num_classes, device=x.device, dtype=torch.int64)
            embedding = embedding + self.label(class_labels)
        embedding = functional.silu(embedding)

        levels, blocks = len(self.config.channels), self.config.blocks
        h = self.input(functional.pixel_unshuffle(x, self.config.patch))
        skips = [h]
        for level in range(levels):
            for i in range(blocks):
                h = self.down[level * blocks + i](h, embedding)
                skips.append(h)
            if level + 1 < levels:
                h = self.shrink[level](h)
                skips.append(h)
        h = self.middle(h, embedding)
        bottleneck = h
        for level in range(levels):
            for i in range(blocks + 1):
                h = self.up[level * (blocks + 1) + i](torch.cat([h, skips.pop()], dim=1), embedding)
            if level + 1 < levels:
                h = self.grow[level](functional.interpolate(h, scale_factor=2.0, mode="nearest"))
        raw = functional.pixel_shuffle(self.output(functional.silu(self.output_norm(h))), self.config.patch)
        return (raw, {"bottleneck": bottleneck}) if features else raw


def parameter_count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def build(config: UNetConfig | dict[str, Any] | None = None, **overrides: Any) -> UNet:
    """Make a U-Net from a config, a dict read from a card, or keyword overrides of the defaults."""
    values = config.to_dict() if isinstance(config, UNetConfig) else dict(config or {})
    values.update(overrides)
    unknown: Sequence[str] = sorted(set(values) - set(UNetConfig.__dataclass_fields__))
    if unknown:
        raise ValueError(f"config: unknown U-Net fields {unknown}; known are {sorted(UNetConfig.__dataclass_fields__)}")
    return UNet(UNetConfig(**values))
