"""Guidance: combinations of several network outputs at one level. Linear ones fold into the table as extra columns."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from fastode.scalar import Late
from fastode.schedules.grid import Level

GUIDANCE_SCALE = Late("guidance_scale")
"""The strength w, given with each call: one number or one per sample."""


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance D = D_uncond + w (D_cond - D_uncond) (arXiv:2207.12598).

    The strength w belongs to the call, not to this object: ``engine(..., guidance_scale=w)`` with a number or [B] numbers.
    ``interval = (low, high)``: guide only where low < sigma <= high in the EDM frame (arXiv:2404.07724); elsewhere one
    conditional evaluation is made. ``batched``: one call on [uncond; cond], or two calls.
    """

    interval: tuple[float, float] = (0.0, math.inf)
    batched: bool = True

    def __post_init__(self) -> None:
        low, high = self.interval
        if not 0 <= low < high:
            raise ValueError(f"interval: need 0 <= low < high in EDM-frame sigma, got {self.interval}")

    def active(self, level: Level) -> bool:
        """Whether this level is guided; levels known only during the run always are."""
        rho = level.rho
        if isinstance(rho, Late):
            return True
        return self.interval[0] < float(rho.detach() if isinstance(rho, Tensor) else rho) <= self.interval[1]
