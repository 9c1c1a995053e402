"""Operations on the denoised estimate that are not linear in it. They cost one launch each and are never on by default."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastode.denoisers.base import Denoiser


@dataclass(frozen=True)
class Clip:
    """D <- clip(D, low, high), for data in a known range."""

    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"low, high: need low < high, got {self.low} and {self.high}")

    def __call__(self, denoised: Tensor) -> Tensor:
        return denoised.clamp(self.low, self.high)


@dataclass(frozen=True)
class DynamicThreshold:
    """Imagen's dynamic thresholding (arXiv:2205.11487, section 2.3), per sample.

    s = max(floor, q-quantile of |D| over the sample); D <- clip(D, -s, s) / s * floor. For pixel data in [-1, 1].
    """

    quantile: float = 0.995
    floor: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.quantile <= 1:
            raise ValueError(f"quantile: must be in (0, 1], got {self.quantile}")
        if not self.floor > 0:
            raise ValueError(f"floor: must be positive, got {self.floor}")

    def __call__(self, denoised: Tensor) -> Tensor:
        flat = denoised.flatten(1).abs()
        # Linear interpolation between order statistics, by selection: torch.quantile refuses more than 2^24 elements.
        position = self.quantile * (flat.shape[1] - 1)
        k = int(position)
        low = flat.kthvalue(k + 1, dim=1).values
        high = flat.kthvalue(min(k + 2, flat.shape[1]), dim=1).values
        s = (low + (position - k) * (high - low)).clamp(min=self.floor)
        s = s.reshape(-1, *[1] * (denoised.ndim - 1))
        return torch.maximum(torch.minimum(denoised, s), -s) / s * self.floor


def clipped(denoiser: Denoiser | Callable[..., Any], low: float = -1.0, high: float = 1.0) -> Denoiser:
    """``denoiser`` with its estimate clipped to [low, high]."""
    base = Denoiser.of(denoiser)
    return replace(base, transforms=(*base.transforms, Clip(low, high)))


def thresholded(denoiser: Denoiser | Callable[..., Any], quantile: float = 0.995, floor: float = 1.0) -> Denoiser:
    """``denoiser`` with dynamic thresholding."""
    base = Denoiser.of(denoiser)
    return replace(base, transforms=(*base.transforms, DynamicThreshold(quantile, floor)))
