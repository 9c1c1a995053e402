"""NCSN++ and DDPM++ of Song et al. 2021 (arXiv:2011.13456), by the parameter names of score-SDE's own checkpoints.

Those name their layers by position, ``all_modules.17``, in the order in which they are run; so does this module. It is the
bare network: the input is centred in [-1, 1] and the output is not divided by sigma, whatever the checkpoint's own code
does; :mod:`fastode.interop.score_sde` says what that means for sigma.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastode.nets.edm_blocks import Exact, Sinusoids, group_norm


@dataclass(frozen=True)
class NCSNppConfig:
    """The ``model`` part of score-SDE's configs under their own names; the defaults make DDPM++ (cont.) for CIFAR-10.

    Left out is what no published checkpoint has and the published PyTorch code cannot run: a residual output pyramid, and
    resampling by learned convolutions through a FIR filter (``resblock_type="ddpm"`` with ``fir``).
    """

    image_size: int = 32
    num_channels: int = 3
    nf: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 2, 2)
    num_res_blocks: int = 4
    attn_resolutions: tuple[int, ...] = (16,)
    dropout: float = 0.1
    resamp_with_conv: bool = True
    fir: bool = False
    fir_kernel: tuple[float, ...] = (1, 3, 3, 1)
    skip_rescale: bool = True
    resblock_type: Literal["biggan", "ddpm"] = "biggan"
    progressive: Literal["none", "output_skip"] = "none"
    progressive_input: Literal["none", "input_skip", "residual"] = "none"
    progressive_combine: Literal["sum", "cat"] = "sum"
    embedding_type: Literal["positional", "fourier"] = "positional"

    def __post_init__(self) -> None:
        for name in ("ch_mult", "attn_resolutions", "fir_kernel"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, allowed in (
            ("resblock_type", ("biggan", "ddpm")),
            ("progressive", ("none", "output_skip")),
            ("progressive_input", ("none", "input_skip", "residual")),
            ("progressive_combine", ("sum", "cat")),
            ("embedding_type", ("positional", "fourier")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.resblock_type == "ddpm" and self.fir:
            raise ValueError("fir: must be False where resblock_type is ddpm")


def _norm(channels: int) -> nn.GroupNorm:
    return group_norm(channels, 1e-6)


def _conv(c_in: int, c_out: int, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2)


def _taps(kernel: Sequence[float], x: Tensor, gain: float) -> Tensor:
    """The separable filter of every channel, [C, 1, k, k]."""
    line = torch.tensor(kernel, dtype=x.dtype, device=x.device)
    line = line / line.sum()
    return (gain * torch.outer(line, line)).expand(x.shape[1], 1, -1, -1)


def grow(x: Tensor, kernel: Sequence[float]) -> Tensor:
    """Twice the resolution by the FIR ``kernel``; (1, 1) is nearest neighbour."""
    pad = (len(kernel) - 1) // 2
    return functional.conv_transpose2d(x, _taps(kernel, x, 4.0), stride=2, padding=pad, groups=x.shape[1])


def shrink(x: Tensor, kernel: Sequence[float]) -> Tensor:
    """Half the resolution by the FIR ``kernel``; (1, 1) is the mean."""
    pad = (len(kernel) - 1) // 2
    return functional.conv2d(x, _taps(kernel, x, 1.0), stride=2, padding=pad, groups=x.shape[1])


class Fourier(Exact):
    """sin and cos of 2 pi W c_noise, W ~ N(0, 16^2) fixed: [B] -> [B, 2 width]. The checkpoint calls the frequencies ``W``."""

    exact = "W"
    W: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("W", 16 * torch.randn(width))

    def forward(self, c_noise: Tensor) -> Tensor:
        angle = c_noise[:, None] * self.W * (2 * math.pi)
        return torch.cat([angle.sin(), angle.cos()], dim=1)


class NIN(nn.Module):
    """A 1 x 1 convolution whose weight is stored [c_in, c_out]."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(c_in, c_out) / math.sqrt(c_in))
        self.b = nn.Parameter(torch.zeros(c_out))

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.W.t()[:, :, None, None], self.b)


class Attention(nn.Module):
    """Self-attention of one head over positions, plus the input."""

    def __init__(self, channels: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.GroupNorm_0 = _norm(channels)
        self.NIN_0, self.NIN_1, self.NIN_2, self.NIN_3 = (NIN(channels, channels) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.GroupNorm_0(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2) for layer in (self.NIN_0, self.NIN_1, self.NIN_2))
        a = functional.scaled_dot_product_attention(q, k, v)
        h = self.NIN_3(a.transpose(1, 2).reshape(x.shape))
        return (x + h) * self.scale


class Residual(nn.Module):
    """Norm, SiLU, (resize), conv, plus the embedding, norm, SiLU, conv, plus the (resized) input.

    ``biggan``: the shortcut is a 1 x 1 convolution, also where only the resolution changes; otherwise a :class:`NIN`.
    """

    def __init__(
        self, c_in: int, c_out: int, embedding: int, config: NCSNppConfig, scale: float, resize: str | None = None
    ) -> None:
        super().__init__()
        self.scale, self.resize, self.dropout = scale, resize, config.dropout
        self.kernel = config.fir_kernel if config.fir else (1.0, 1.0)
        self.GroupNorm_0 = _norm(c_in)
        self.Conv_0 = _conv(c_in, c_out)
        self.Dense_0 = nn.Linear(embedding, c_out)
        self.GroupNorm_1 = _norm(c_out)
        self.Conv_1 = _conv(c_out, c_out)
        self.shortcut = ""
        if config.resblock_type == "biggan" and (c_in != c_out or resize):
            self.Conv_2, self.shortcut = _conv(c_in, c_out, 1), "Conv_2"
        elif config.resblock_type == "ddpm" and c_in != c_out:
            self.NIN_0, self.shortcut = NIN(c_in, c_out), "NIN_0"

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = functional.silu(self.GroupNorm_0(x))
        if self.resize is not None:
            change = grow if self.resize == "up" else shrink
            h, x = change(h, self.kernel), change(x, self.kernel)
        h = self.Conv_0(h) + self.Dense_0(embedding)[:, :, None, None]
        h = functional.silu(self.GroupNorm_1(h))
        if self.dropout:
            h = functional.dropout(h, self.dropout, self.training)
        h = self.Conv_1(h)
        if self.shortcut:
            x = getattr(self, self.shortcut)(x)
        return (x + h) * self.scale


class Resample(nn.Module):
    """Twice or half the resolution around a 3 x 3 convolution, or without one where ``conv`` is False.

    Where ``config.fir``, halving filters first; the border is padded once for the filter and the convolution.
    """

    def __init__(self, c_in: int, c_out: int, config: NCSNppConfig, direction: str, *, conv: bool) -> None:
        super().__init__()
        self.direction, self.taps = direction, config.fir_kernel if config.fir else None
        self.kind = ("Conv2d_0" if config.fir else "Conv_0") if conv else ""
        if conv:
            halving = direction == "down"
            setattr(self, self.kind, nn.Conv2d(c_in, c_out, 3, 1 + halving, padding=int(not halving)))

    def forward(self, x: Tensor) -> Tensor:
        conv = getattr(self, self.kind) if self.kind else nn.Identity()
        if self.direction == "up":
            out: Tensor = conv(grow(x, (1, 1)))
        elif not self.kind:
            out = shrink(x, (1, 1))
        elif self.taps is None:
            out = conv(functional.pad(x, (0, 1, 0, 1)))
        else:
            x = functional.pad(x, (1 + (len(self.taps) - 1) // 2,) * 4)
            out = conv(functional.conv2d(x, _taps(self.taps, x, 1.0), groups=x.shape[1]))
        return out


class Combine(nn.Module):
    """The pyramid of the input through a 1 x 1 convolution, added to the state or put beside it."""

    def __init__(self, c_in: int, c_out: int, method: str) -> None:
        super().__init__()
        self.Conv_0, self.method = _conv(c_in, c_out, 1), method

    def forward(self, pyramid: Tensor, h: Tensor) -> Tensor:
        p = self.Conv_0(pyramid)
        return torch.cat([p, h], dim=1) if self.method == "cat" else p + h


class NCSNpp(nn.Module):
    """Raw network: ``x`` [B, C, H, W] in [-1, 1] plus noise, ``c_noise`` [B] -> [B, C, H, W].

    ``c_noise``: what the embedding is made of, the label for "positional", ln sigma for "fourier". ``features=True`` returns
    ``(F, {"bottleneck": h})``, h the output of the last encoder block at 8 x 8 (of the last one, where no level is 8 x 8).
    """

    def __init__(self, config: NCSNppConfig) -> None:
        super().__init__()
        self.config = c = config
        scale = math.sqrt(0.5) if c.skip_rescale else 1.0
        width, fourier = 4 * c.nf, c.embedding_type == "fourier"
        layers: list[nn.Module] = [Fourier(c.nf)] if fourier else []
        layers += [nn.Linear(2 * c.nf if fourier else c.nf, width), nn.Linear(width, width)]
        self.positions = None if fourier else Sinusoids(c.nf, freqs=_frequencies(c.nf), sin_first=True)

        def residual(c_in: int, c_out: int, resize: str | None = None) -> Residual:
            return Residual(c_in, c_out, width, c, scale, resize)

        def resized(channels: int, direction: str) -> nn.Module:
            if c.resblock_type == "biggan":
                return residual(channels, channels, direction)
            return Resample(channels, channels, c, direction, conv=c.resamp_with_conv)

        sides = [c.image_size // 2**i for i in range(len(c.ch_mult))]
        widths = [c.nf * m for m in c.ch_mult]
        layers.append(_conv(c.num_channels, c.nf))
        now, pyramid, kept = c.nf, c.num_channels, [c.nf]
        for level, (side, out) in enumerate(zip(sides, widths, strict=True)):
            for _ in range(c.num_res_blocks):
                layers.append(residual(now, out))
                now = out
                if side in c.attn_resolutions:
                    layers.append(Attention(now, scale))
                kept.append(now)
            if level + 1 < len(sides):
                layers.append(resized(now, "down"))
                if c.progressive_input == "input_skip":
                    layers.append(Combine(pyramid, now, c.progressive_combine))
                    now = 2 * now if c.progressive_combine == "cat" else now
                elif c.progressive_input == "residual":
                    layers.append(Resample(pyramid, now, c, "down", conv=True))
                    pyramid = now
                kept.append(now)
        layers += [residual(now, now), Attention(now, scale), residual(now, now)]
        for level, (side, out) in reversed(list(enumerate(zip(sides, widths, strict=True)))):
            for _ in range(c.num_res_blocks + 1):
                layers.append(residual(now + kept.pop(), out))
                now = out
            if side in c.attn_resolutions:
                layers.append(Attention(now, scale))
            if c.progressive == "output_skip":
                layers += [_norm(now), _conv(now, c.num_channels)]
            if level:
                layers.append(resized(now, "up"))
        if c.progressive != "output_skip":
            layers += [_norm(now), _conv(now, c.num_channels)]
        self.all_modules = nn.ModuleList(layers)
        self.scale = scale

    def forward(
        self, x: Tensor, c_noise: Tensor, *, features: bool = False
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        c, silu = self.config, functional.silu
        layers = iter(self.all_modules)
        told = c_noise.reshape(-1).expand(x.shape[0])
        e = (next(layers) if self.positions is None else self.positions)(told).to(x.dtype)
        e = next(layers)(e)
        e = silu(next(layers)(silu(e)))
        sides = [c.image_size // 2**i for i in range(len(c.ch_mult))]
        tapped = sides.index(8) if 8 in sides else len(sides) - 1
        kernel = c.fir_kernel if c.fir else (1.0, 1.0)

        h = next(layers)(x)
        skips, pyramid, bottleneck = [h], x, h
        for level, side in enumerate(sides):
            for _ in range(c.num_res_blocks):
                h = next(layers)(h, e)
                if side in c.attn_resolutions:
                    h = next(layers)(h)
                skips.append(h)
            if level == tapped:
                bottleneck = h
            if level + 1 < len(sides):
                down = next(layers)
                h = down(h, e) if c.resblock_type == "biggan" else down(h)
                if c.progressive_input == "input_skip":
                    pyramid = shrink(pyramid, kernel)
                    h = next(layers)(pyramid, h)
                elif c.progressive_input == "residual":
                    h = pyramid = (next(layers)(pyramid) + h) * self.scale
                skips.append(h)
        h = next(layers)(h, e)
        h = next(layers)(h)
        h = next(layers)(h, e)
        for level, side in reversed(list(enumerate(sides))):
            for _ in range(c.num_res_blocks + 1):
                h = next(layers)(torch.cat([h, skips.pop()], dim=1), e)
            if side in c.attn_resolutions:
                h = next(layers)(h)
            if c.progressive == "output_skip":
                norm, conv = next(layers), next(layers)
                made = conv(silu(norm(h)))
                pyramid = made if level == len(sides) - 1 else grow(pyramid, kernel) + made
            if level:
                up = next(layers)
                h = up(h, e) if c.resblock_type == "biggan" else up(h)
        if c.progressive == "output_skip":
            raw = pyramid
        else:
            norm, conv = next(layers), next(layers)
            raw = conv(silu(norm(h)))
        return (raw, {"bottleneck": bottleneck}) if features else raw


def _frequencies(width: int) -> Tensor:
    """10000^(-i/(n-1)), in float32 by this formula, as in training: see :class:`Sinusoids`."""
    half = width // 2
    return torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10000) / (half - 1)))
