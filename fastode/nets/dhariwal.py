"""ADM of Dhariwal & Nichol 2021 (arXiv:2105.05233), as Karras et al. 2022 (arXiv:2206.00364) trained it on ImageNet-64.

Parameters have the names of EDM's checkpoints; those of OpenAI's own are read by :mod:`fastode.nets.adm`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastode.nets.edm_blocks import Block, Conv, Sinusoids, group_norm, last_at, one_hot


@dataclass(frozen=True)
class DhariwalConfig:
    """The arguments of EDM's DhariwalUNet under their own names; the defaults make the network for ImageNet-64.

    ``label_dim``: number of classes, 0 for none. Attention heads have 64 channels.
    """

    img_resolution: int = 64
    in_channels: int = 3
    out_channels: int = 3
    label_dim: int = 0
    augment_dim: int = 0
    model_channels: int = 192
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    channel_mult_emb: int = 4
    num_blocks: int = 3
    attn_resolutions: tuple[int, ...] = (32, 16, 8)
    dropout: float = 0.1
    label_dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("channel_mult", "attn_resolutions"):
            object.__setattr__(self, name, tuple(getattr(self, name)))


class DhariwalUNet(nn.Module):
    """Raw network: ``x`` [B, C, H, W], ``c_noise`` [B], ``class_labels`` [B] int64 -> [B, C, H, W].

    A label equal to ``label_dim``, or none at all, is "no class". ``features=True`` returns ``(F, {"bottleneck": h})``, h the
    output of the last encoder block at 8 x 8. Of more than C output channels (a learned variance) the first C are returned.
    """

    def __init__(self, config: DhariwalConfig) -> None:
        super().__init__()
        self.config = c = config
        width = c.model_channels * c.channel_mult_emb
        self.map_noise = Sinusoids(c.model_channels)
        self.map_augment = nn.Linear(c.augment_dim, c.model_channels, bias=False) if c.augment_dim else None
        self.map_layer0 = nn.Linear(c.model_channels, width)
        self.map_layer1 = nn.Linear(width, width)
        self.map_label = nn.Linear(c.label_dim, width, bias=False) if c.label_dim else None

        def block(c_in: int, c_out: int, *, attention: bool = False, resample: Any = None) -> Block:
            heads = c_out // 64 if attention else 0
            return Block(c_in, c_out, width, heads=heads, resample=resample, dropout=c.dropout)

        widths = [c.model_channels * m for m in c.channel_mult]
        sides = [c.img_resolution >> level for level in range(len(widths))]
        self.enc = nn.ModuleDict()
        now, kept = widths[0], []
        for level, (side, out) in enumerate(zip(sides, widths, strict=True)):
            first = Conv(c.in_channels, now, 3) if level == 0 else block(now, now, resample="down")
            self.enc[f"{side}x{side}_{'conv' if level == 0 else 'down'}"] = first
            kept.append(now)
            for i in range(c.num_blocks):
                self.enc[f"{side}x{side}_block{i}"] = block(now, out, attention=side in c.attn_resolutions)
                now = out
                kept.append(now)
        self.dec = nn.ModuleDict()
        for level, (side, out) in reversed(list(enumerate(zip(sides, widths, strict=True)))):
            if level == len(widths) - 1:
                self.dec[f"{side}x{side}_in0"] = block(now, now, attention=True)
                self.dec[f"{side}x{side}_in1"] = block(now, now)
            else:
                self.dec[f"{side}x{side}_up"] = block(now, now, resample="up")
            for i in range(c.num_blocks + 1):
                self.dec[f"{side}x{side}_block{i}"] = block(now + kept.pop(), out, attention=side in c.attn_resolutions)
                now = out
        self.out_norm = group_norm(now)
        self.out_conv = Conv(now, c.out_channels, 3)
        self.tap = last_at(list(self.enc))

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        class_labels: Tensor | None = None,
        *,
        augment_labels: Tensor | None = None,
        features: bool = False,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        embedding = self._embed(x, c_noise, class_labels, augment_labels)
        h, bottleneck = x, x
        skips: list[Tensor] = []
        for name, layer in self.enc.items():
            h = layer(h) if name.endswith("_conv") else layer(h, embedding)
            skips.append(h)
            if name == self.tap:
                bottleneck = h
        for name, layer in self.dec.items():
            h = layer(torch.cat([h, skips.pop()], dim=1) if "_block" in name else h, embedding)
        raw = self.out_conv(functional.silu(self.out_norm(h)))[:, : self.config.in_channels]
        return (raw, {"bottleneck": bottleneck}) if features else raw

    def _embed(self, x: Tensor, c_noise: Tensor, labels: Tensor | None, augment: Tensor | None) -> Tensor:
        e = self.map_noise(c_noise.reshape(-1).expand(x.shape[0])).to(x.dtype)
        if self.map_augment is not None and augment is not None:
            e = e + self.map_augment(augment)
        e = self.map_layer1(functional.silu(self.map_layer0(e)))
        if self.map_label is not None:
            rows = one_hot(labels, self.config.label_dim, x)
            if self.training and self.config.label_dropout:
                rows = rows * (torch.rand(x.shape[0], 1, device=x.device) >= self.config.label_dropout)
            e = e + self.map_label(rows)
        return functional.silu(e)
