"""ADM of Dhariwal & Nichol 2021 (arXiv:2105.05233), by the parameter names of OpenAI's own checkpoints.

Guided diffusion, and the networks that Consistency Models (arXiv:2303.01469) trained with EDM preconditioning, which are the
same U-Net told 1000 c_noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastode.nets.edm_blocks import Sinusoids


@dataclass(frozen=True)
class ADMConfig:
    """The arguments of guided diffusion's UNetModel under their own names, apart from these:

    ``attention_at``: factors of downsampling, 2 for half the resolution, at which blocks have attention. ``num_classes``: 0
    for none. ``num_head_channels``: channels of a head, or 0 for ``num_heads`` heads. ``qkv_order``: "heads" where the
    channels of qkv are ordered by head first (guided diffusion's default), "qkv" where by q, k, v first
    (``use_new_attention_order``, and Consistency Models). ``label_scale``: the network is told ``label_scale * c_noise``.
    """

    image_size: int = 64
    in_channels: int = 3
    out_channels: int = 3
    model_channels: int = 192
    channel_mult: tuple[float, ...] = (1, 2, 3, 4)
    num_res_blocks: int = 3
    attention_at: tuple[int, ...] = (2, 4, 8)
    num_classes: int = 0
    num_heads: int = 4
    num_heads_upsample: int = 0
    num_head_channels: int = 0
    qkv_order: Literal["heads", "qkv"] = "heads"
    use_scale_shift_norm: bool = True
    resblock_updown: bool = True
    conv_resample: bool = True
    dropout: float = 0.0
    label_scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("channel_mult", "attention_at"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.qkv_order not in ("heads", "qkv"):
            raise ValueError(f"qkv_order: must be heads or qkv, got {self.qkv_order!r}")
        if self.model_channels % 2 or any(int(m * self.model_channels) % 32 for m in self.channel_mult):
            raise ValueError(
                f"channel_mult, model_channels: widths must be multiples of 32, got {self.channel_mult} of "
                f"{self.model_channels}"
            )


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels)


class Resize(nn.Module):
    """Half or twice the resolution: mean or nearest neighbour, with a convolution of its own where ``conv``."""

    def __init__(self, channels: int, direction: str, *, conv: bool) -> None:
        super().__init__()
        self.direction = direction
        if conv and direction == "down":
            self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        elif conv:
            self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.learned = conv

    def forward(self, x: Tensor) -> Tensor:
        if self.direction == "up":
            x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
            return self.conv(x) if self.learned else x
        return self.op(x) if self.learned else functional.avg_pool2d(x, 2)


class ResBlock(nn.Module):
    """Norm, SiLU, (resize), conv, the embedding, norm, SiLU, conv, plus the (resized) input."""

    def __init__(self, c_in: int, c_out: int, embedding: int, config: ADMConfig, direction: str | None = None) -> None:
        super().__init__()
        self.film = config.use_scale_shift_norm
        self.resize = None if direction is None else Resize(c_in, direction, conv=False)
        self.in_layers = nn.Sequential(_norm(c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * c_out if self.film else c_out))
        last = nn.Conv2d(c_out, c_out, 3, padding=1)
        nn.init.zeros_(last.weight)
        self.out_layers = nn.Sequential(_norm(c_out), nn.SiLU(), nn.Dropout(config.dropout), last)
        self.skip_connection = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.in_layers[1](self.in_layers[0](x))
        if self.resize is not None:
            h, x = self.resize(h), self.resize(x)
        h = self.in_layers[2](h)
        e = self.emb_layers(embedding)[:, :, None, None]
        if self.film:
            scale, shift = e.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + e)
        return self.skip_connection(x) + h


class Attention(nn.Module):
    """Self-attention over positions, plus the input."""

    def __init__(self, channels: int, heads: int, order: str) -> None:
        super().__init__()
        self.heads, self.order = heads, order
        self.norm = _norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)
        nn.init.zeros_(self.proj_out.weight)

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        qkv = self.qkv(self.norm(x).flatten(2))
        if self.order == "heads":
            parts = qkv.reshape(b, self.heads, 3, c // self.heads, -1).permute(2, 0, 1, 4, 3)
        else:
            parts = qkv.reshape(b, 3, self.heads, c // self.heads, -1).permute(1, 0, 2, 4, 3)
        q, k, v = parts.unbind(0)  # each [B, heads, positions, channels]
        a = functional.scaled_dot_product_attention(q, k, v)
        h: Tensor = self.proj_out(a.transpose(2, 3).reshape(b, c, -1))
        return x + h.reshape(b, c, height, width)


class Stage(nn.Sequential):
    """Layers in turn; residual blocks are given the embedding."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x, embedding) if isinstance(layer, ResBlock) else layer(x)
        return x


class ADMUNet(nn.Module):
    """Raw network: ``x`` [B, C, H, W], ``c_noise`` [B], ``class_labels`` [B] int64 -> [B, C, H, W].

    A label equal to ``num_classes``, or none at all, adds nothing to the embedding. ``features=True`` returns ``(F,
    {"bottleneck": h})``, h the output of the middle block. Of more than C output channels (a learned variance) the first C
    are returned.
    """

    def __init__(self, config: ADMConfig) -> None:
        super().__init__()
        self.config = c = config
        width = 4 * c.model_channels
        # In float32 by this formula, as in training: see Sinusoids.
        exponents = torch.arange(c.model_channels // 2, dtype=torch.float32) / (c.model_channels // 2)
        self.embed = Sinusoids(c.model_channels, freqs=torch.exp(-math.log(10000) * exponents))
        self.time_embed = nn.Sequential(nn.Linear(c.model_channels, width), nn.SiLU(), nn.Linear(width, width))
        if c.num_classes:
            self.label_emb = nn.Embedding(c.num_classes, width)

        def attention(channels: int, heads: int) -> Attention:
            return Attention(channels, channels // c.num_head_channels if c.num_head_channels else heads, c.qkv_order)

        def resized(channels: int, direction: str) -> nn.Module:
            if c.resblock_updown:
                return ResBlock(channels, channels, width, c, direction)
            return Resize(channels, direction, conv=c.conv_resample)

        widths = [int(m * c.model_channels) for m in c.channel_mult]
        now, kept = widths[0], [widths[0]]
        self.input_blocks = nn.ModuleList([Stage(nn.Conv2d(c.in_channels, now, 3, padding=1))])
        for level, out in enumerate(widths):
            for _ in range(c.num_res_blocks):
                layers: list[nn.Module] = [ResBlock(now, out, width, c)]
                now = out
                if 2**level in c.attention_at:
                    layers.append(attention(now, c.num_heads))
                self.input_blocks.append(Stage(*layers))
                kept.append(now)
            if level + 1 < len(widths):
                self.input_blocks.append(Stage(resized(now, "down")))
                kept.append(now)
        self.middle_block = Stage(
            ResBlock(now, now, width, c), attention(now, c.num_heads), ResBlock(now, now, width, c)
        )
        self.output_blocks = nn.ModuleList()
        for level, out in reversed(list(enumerate(widths))):
            for i in range(c.num_res_blocks + 1):
                layers = [ResBlock(now + kept.pop(), out, width, c)]
                now = out
                if 2**level in c.attention_at:
                    layers.append(attention(now, c.num_heads_upsample or c.num_heads))
                if level and i == c.num_res_blocks:
                    layers.append(resized(now, "up"))
                self.output_blocks.append(Stage(*layers))
        last = nn.Conv2d(now, c.out_channels, 3, padding=1)
        nn.init.zeros_(last.weight)
        self.out = nn.Sequential(_norm(now), nn.SiLU(), last)

    def forward(
        self, x: Tensor, c_noise: Tensor, class_labels: Tensor | None = None, *, features: bool = False
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        told = c_noise.reshape(-1).expand(x.shape[0]) * self.config.label_scale
        embedding = self.time_embed(self.embed(told).to(x.dtype))
        if self.config.num_classes and class_labels is not None:
            known = class_labels < self.config.num_classes
            rows = self.label_emb(class_labels.clamp(max=self.config.num_classes - 1))
            embedding = embedding + torch.where(known[:, None], rows, torch.zeros_like(rows))
        h, skips = x, []
        for block in self.input_blocks:
            h = block(h, embedding)
            skips.append(h)
        bottleneck = h = self.middle_block(h, embedding)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), embedding)
        raw = self.out(h)[:, : self.config.in_channels]
        return (raw, {"bottleneck": bottleneck}) if features else raw
