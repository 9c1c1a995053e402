"""DDPM++ and NCSN++ of Song et al. 2021 (arXiv:2011.13456), as Karras et al. 2022 (arXiv:2206.00364) trained them.

Parameters have the names of EDM's checkpoints. The raw network ``F(x, c_noise, class_labels)`` is defined here; what its
output means is a matter of the :class:`~fastode.denoisers.Denoiser` around it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastode.nets.edm_blocks import Block, Conv, RandomFourier, Sinusoids, group_norm, last_at, one_hot


@dataclass(frozen=True)
class SongConfig:
    """The arguments of EDM's SongUNet under their own names; the defaults make DDPM++ at 32 x 32.

    NCSN++: ``embedding_type="fourier"``, ``encoder_type="residual"``, ``channel_mult_noise=2``,
    ``resample_filter=(1, 3, 3, 1)``. ``label_dim``: number of classes, 0 for none. ``augment_dim``: width of the augmentation
    labels of training.
    """

    img_resolution: int = 32
    in_channels: int = 3
    out_channels: int = 3
    label_dim: int = 0
    augment_dim: int = 0
    model_channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 2, 2)
    channel_mult_emb: int = 4
    num_blocks: int = 4
    attn_resolutions: tuple[int, ...] = (16,)
    dropout: float = 0.1
    label_dropout: float = 0.0
    embedding_type: Literal["positional", "fourier"] = "positional"
    channel_mult_noise: int = 1
    encoder_type: Literal["standard", "skip", "residual"] = "standard"
    decoder_type: Literal["standard", "skip"] = "standard"
    resample_filter: tuple[float, ...] = (1, 1)

    def __post_init__(self) -> None:
        for name in ("channel_mult", "attn_resolutions", "resample_filter"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, allowed in (
            ("embedding_type", ("positional", "fourier")),
            ("encoder_type", ("standard", "skip", "residual")),
            ("decoder_type", ("standard", "skip")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")


class SongUNet(nn.Module):
    """Raw network: ``x`` [B, C, H, W], ``c_noise`` [B], ``class_labels`` [B] int64 -> [B, C, H, W].

    A label equal to ``label_dim``, or none at all, is "no class". ``features=True`` returns ``(F, {"bottleneck": h})``, h the
    output of the last encoder block at 8 x 8. Of more than C output channels the first C are returned.
    """

    def __init__(self, config: SongConfig) -> None:
        super().__init__()
        self.config = c = config
        noise, width = c.model_channels * c.channel_mult_noise, c.model_channels * c.channel_mult_emb
        self.map_noise: nn.Module = (
            Sinusoids(noise, endpoint=True, sin_first=True)
            if c.embedding_type == "positional"
            else RandomFourier(noise)
        )
        self.map_label = nn.Linear(c.label_dim, noise) if c.label_dim else None
        self.map_augment = nn.Linear(c.augment_dim, noise, bias=False) if c.augment_dim else None
        self.map_layer0 = nn.Linear(noise, width)
        self.map_layer1 = nn.Linear(width, width)

        def block(c_in: int, c_out: int, *, attention: bool = False, resample: Any = None) -> Block:
            return Block(
                c_in,
                c_out,
                width,
                heads=int(attention),
                resample=resample,
                taps=c.resample_filter,
                project=True,
                adaptive=False,
                scale=math.sqrt(0.5),
                eps=1e-6,
                dropout=c.dropout,
            )

        widths = [c.model_channels * m for m in c.channel_mult]
        sides = [c.img_resolution >> level for level in range(len(widths))]
        self.enc = nn.ModuleDict()
        now, side_input = c.model_channels, c.in_channels  # channels of the state, and of the input's own pyramid
        kept: list[int] = []
        for level, (side, out) in enumerate(zip(sides, widths, strict=True)):
            at = f"{side}x{side}"
            if level == 0:
                self.enc[f"{at}_conv"] = Conv(c.in_channels, now, 3)
            else:
                self.enc[f"{at}_down"] = block(now, now, resample="down")
                if c.encoder_type == "skip":
                    shrink = Conv(side_input, side_input, 0, resample="down", taps=c.resample_filter)
                    self.enc[f"{at}_aux_down"] = shrink
                    self.enc[f"{at}_aux_skip"] = Conv(side_input, now, 1)
                elif c.encoder_type == "residual":
                    shrink = Conv(side_input, now, 3, resample="down", taps=c.resample_filter, late=True)
                    self.enc[f"{at}_aux_residual"] = shrink
                    side_input = now
            kept.append(now)
            for i in range(c.num_blocks):
                self.enc[f"{at}_block{i}"] = block(now, out, attention=side in c.attn_resolutions)
                now = out
                kept.append(now)
        self.dec = nn.ModuleDict()
        for level, (side, out) in reversed(list(enumerate(zip(sides, widths, strict=True)))):
            at, lowest = f"{side}x{side}", level == len(widths) - 1
            if lowest:
                self.dec[f"{at}_in0"] = block(now, now, attention=True)
                self.dec[f"{at}_in1"] = block(now, now)
            else:
                self.dec[f"{at}_up"] = block(now, now, resample="up")
            for i in range(c.num_blocks + 1):
                attention = i == c.num_blocks and side in c.attn_resolutions
                self.dec[f"{at}_block{i}"] = block(now + kept.pop(), out, attention=attention)
                now = out
            if c.decoder_type == "skip" or level == 0:
                if c.decoder_type == "skip" and not lowest:
                    grow = Conv(c.out_channels, c.out_channels, 0, resample="up", taps=c.resample_filter)
                    self.dec[f"{at}_aux_up"] = grow
                self.dec[f"{at}_aux_norm"] = group_norm(now, 1e-6)
                self.dec[f"{at}_aux_conv"] = Conv(now, c.out_channels, 3)
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
        h, pyramid = x, x
        bottleneck = x
        skips: list[Tensor] = []
        for name, layer in self.enc.items():
            if name.endswith("_aux_down"):
                pyramid = layer(pyramid)
            elif name.endswith("_aux_skip"):
                h = skips[-1] = h + layer(pyramid)
            elif name.endswith("_aux_residual"):
                h = skips[-1] = pyramid = (h + layer(pyramid)) / math.sqrt(2)
            else:
                h = layer(h) if name.endswith("_conv") else layer(h, embedding)
                skips.append(h)
            if name == self.tap:
                bottleneck = h
        raw: Tensor | None = None
        normed = h
        for name, layer in self.dec.items():
            if name.endswith("_aux_up"):
                raw = layer(raw)
            elif name.endswith("_aux_norm"):
                normed = layer(h)
            elif name.endswith("_aux_conv"):
                out = layer(functional.silu(normed))
                raw = out if raw is None else raw + out
            else:
                h = layer(torch.cat([h, skips.pop()], dim=1) if "_block" in name else h, embedding)
        assert raw is not None
        raw = raw[:, : self.config.in_channels]
        return (raw, {"bottleneck": bottleneck}) if features else raw

    def _embed(self, x: Tensor, c_noise: Tensor, labels: Tensor | None, augment: Tensor | None) -> Tensor:
        e = self.map_noise(c_noise.reshape(-1).expand(x.shape[0])).to(x.dtype)
        if self.map_label is not None:
            classes = self.config.label_dim
            e = e + self.map_label(self._labels(labels, x) * math.sqrt(classes))
        if self.map_augment is not None and augment is not None:
            e = e + self.map_augment(augment)
        return functional.silu(self.map_layer1(functional.silu(self.map_layer0(e))))

    def _labels(self, labels: Tensor | None, x: Tensor) -> Tensor:
        """Classes as one-hot rows; in training some are dropped."""
        rows = one_hot(labels, self.config.label_dim, x)
        if self.training and self.config.label_dropout:
            rows = rows * (torch.rand(x.shape[0], 1, device=x.device) >= self.config.label_dropout)
        return rows
