"""Layers that the U-Nets of Karras et al. 2022 (arXiv:2206.00364) are made of, by the names of their checkpoints.

Their two architectures, DDPM++ / NCSN++ (:mod:`fastode.nets.song`) and ADM (:mod:`fastode.nets.dhariwal`), are one residual
block with different settings: how the embedding enters, how the sum is scaled, what resampling is made with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Resampling = Literal["up", "down"]


def group_norm(channels: int, eps: float = 1e-5) -> nn.GroupNorm:
    """At most 32 groups, of at least 4 channels."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps=eps)


class Conv(nn.Module):
    """Convolution of odd ``kernel``, before it a separable FIR resampling by 2; ``kernel = 0`` resamples only.

    ``taps``: the filter along one side, (1, 1) for nearest neighbour and mean, (1, 3, 3, 1) for StyleGAN2's. ``late``: when
    shrinking, convolve first. Away from the border the order makes no difference; there it does.
    """

    resample_filter: Tensor | None

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: int,
        *,
        resample: Resampling | None = None,
        taps: Sequence[float] = (1, 1),
        late: bool = False,
    ) -> None:
        super().__init__()
        self.kernel, self.resample, self.late = kernel, resample, late
        self.weight = nn.Parameter(torch.empty(c_out, c_in, kernel, kernel)) if kernel else None
        self.bias = nn.Parameter(torch.zeros(c_out)) if kernel else None
        if self.weight is not None:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        line = torch.tensor(taps, dtype=torch.float32)
        self.register_buffer("resample_filter", None if resample is None else torch.outer(line, line)[None, None])
        if self.resample_filter is not None:
            self.resample_filter /= line.sum() ** 2

    def forward(self, x: Tensor) -> Tensor:
        edge = 0 if self.resample_filter is None else (self.resample_filter.shape[-1] - 1) // 2
        pad = self.kernel // 2
        if self.late and self.weight is not None:
            return self._shrink(functional.conv2d(x, self.weight, self.bias, padding=pad + edge), 0)
        if self.resample == "down":
            x = self._shrink(x, edge)
        elif self.resample == "up":
            assert self.resample_filter is not None
            taps = (4 * self.resample_filter).expand(x.shape[1], -1, -1, -1).to(x.dtype)
            x = functional.conv_transpose2d(x, taps, stride=2, padding=edge, groups=x.shape[1])
        return x if self.weight is None else functional.conv2d(x, self.weight, self.bias, padding=pad)

    def _shrink(self, x: Tensor, pad: int) -> Tensor:
        assert self.resample_filter is not None
        taps = self.resample_filter.expand(x.shape[1], -1, -1, -1).to(x.dtype)
        return functional.conv2d(x, taps, stride=2, padding=pad, groups=x.shape[1])


class Block(nn.Module):
    """Norm, SiLU, conv, the embedding, norm, SiLU, conv, plus the input; then self-attention of ``heads`` if any.

    ``adaptive``: the embedding scales and shifts the normalised map, norm(h) (1 + scale) + shift, otherwise it is added before
    the norm. ``scale`` multiplies every sum of a branch and its input. ``project``: the input gets a 1 x 1 convolution of
    its own when it is resampled, also where the number of channels stays.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        embedding: int,
        *,
        heads: int = 0,
        resample: Resampling | None = None,
        taps: Sequence[float] = (1, 1),
        project: bool = False,
        adaptive: bool = True,
        scale: float = 1.0,
        eps: float = 1e-5,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.c_in, self.c_out = c_in, c_out
        self.heads, self.adaptive, self.scale, self.dropout = heads, adaptive, scale, dropout
        self.norm0 = group_norm(c_in, eps)
        self.conv0 = Conv(c_in, c_out, 3, resample=resample, taps=taps)
        self.affine = nn.Linear(embedding, 2 * c_out if adaptive else c_out)
        self.norm1 = group_norm(c_out, eps)
        self.conv1 = Conv(c_out, c_out, 3)
        self.skip: Conv | None = None
        if c_in != c_out or resample is not None:
            self.skip = Conv(c_in, c_out, int(project or c_in != c_out), resample=resample, taps=taps)
        if heads:
            self.norm2 = group_norm(c_out, eps)
            self.qkv = Conv(c_out, 3 * c_out, 1)
            self.proj = Conv(c_out, c_out, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """``x`` [B, c_in, h, w], ``embedding`` [B, width] -> [B, c_out, h', w']."""
        h = self.conv0(functional.silu(self.norm0(x)))
        from_embedding = self.affine(embedding)[:, :, None, None]
        if self.adaptive:
            scale, shift = from_embedding.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm1(h), scale + 1)
        else:
            h = self.norm1(h + from_embedding)
        h = functional.silu(h)
        if self.dropout:
            h = functional.dropout(h, self.dropout, self.training)
        h = self._sum(self.conv1(h), x if self.skip is None else self.skip(x))
        return self._sum(self.proj(self._attend(h)), h) if self.heads else h

    def _sum(self, branch: Tensor, x: Tensor) -> Tensor:
        return branch + x if self.scale == 1 else (branch + x) * self.scale

    def _attend(self, h: Tensor) -> Tensor:
        b, c, height, width = h.shape
        # The checkpoints order the output channels of qkv by head, then by channel, then by q, k, v.
        qkv = self.qkv(self.norm2(h)).reshape(b, self.heads, c // self.heads, 3, height * width)
        q, k, v = qkv.permute(3, 0, 1, 4, 2).unbind(0)  # each [B, heads, positions, channels]
        a = functional.scaled_dot_product_attention(q, k, v)
        return a.transpose(2, 3).reshape(b, c, height, width)


class Exact(nn.Module):
    """Base of embeddings whose frequencies, the buffer named ``exact``, stay in float32 whatever the network is cast to: an
    angle of 999 in bfloat16 would be wrong by several turns."""

    exact = "freqs"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Exact:
        kept = getattr(self, self.exact)
        super()._apply(fn, recurse)
        setattr(self, self.exact, kept.to(getattr(self, self.exact).device))
        return self


class Sinusoids(Exact):
    """cos and sin of ``c_noise`` at frequencies 10000^(-i/n), i = 0 .. n-1: [B] -> [B, width].

    ``endpoint``: the last frequency is 1/10000 itself (n - 1 in the exponent), as in DDPM++; ``sin_first`` orders the halves.
    ``freqs``: frequencies already made, [width / 2].
    """

    freqs: Tensor

    def __init__(
        self, width: int, *, endpoint: bool = False, sin_first: bool = False, freqs: Tensor | None = None
    ) -> None:
        super().__init__()
        self.sin_first = sin_first
        steps = torch.arange(width // 2, dtype=torch.float32) / (width // 2 - int(endpoint))
        # In float32, as in training: at c_noise = 999 the rounding of a frequency moves the angle by up to 1e-4.
        self.register_buffer("freqs", (1 / 10000) ** steps if freqs is None else freqs, persistent=False)

    def forward(self, c_noise: Tensor) -> Tensor:
        angle = c_noise[:, None] * self.freqs
        halves = (angle.sin(), angle.cos()) if self.sin_first else (angle.cos(), angle.sin())
        return torch.cat(halves, dim=1)


class RandomFourier(Exact):
    """sin and cos of 2 pi f c_noise at fixed random frequencies f ~ N(0, 16^2), which belong to the weights."""

    freqs: Tensor

    def __init__(self, width: int, scale: float = 16.0) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.randn(width // 2) * scale)

    def forward(self, c_noise: Tensor) -> Tensor:
        angle = c_noise[:, None] * (2 * math.pi * self.freqs)
        return torch.cat([angle.sin(), angle.cos()], dim=1)


def one_hot(class_labels: Tensor | None, classes: int, like: Tensor) -> Tensor:
    """[B, classes] of ``class_labels`` [B]; all zero, "no class", where the label is ``classes`` or there is none."""
    if class_labels is None:
        return like.new_zeros(like.shape[0], classes)
    return (class_labels[:, None] == torch.arange(classes, device=like.device)).to(like.dtype)


def last_at(names: Sequence[str], side: int = 8) -> str:
    """The encoder block whose output is the bottleneck feature: the last one at 8 x 8, or the last one where no level is.

    ``8x8_block3`` in the networks for CIFAR-10 and FFHQ, ``8x8_block2`` in the one for ImageNet-64: what AMED's predictor
    reads (arXiv:2312.00094).
    """
    at_side = [name for name in names if name.startswith(f"{side}x{side}_block")]
    return (at_side or [name for name in names if "_block" in name])[-1]
