"""Step-size control: from the error of an attempt to a decision and the next step size. All in float64 on the host.

A controller is a frozen set of constants; what it remembers between attempts is a small tensor per step size (one for a
shared step, one per sample for independent steps), so that samples never see each other's errors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PI:
    """The proportional-integral controller of Hairer and Wanner (Solving ODEs II, IV.2), with scipy's rules at beta = 0.

    An attempt with error norm e <= 1 is accepted. With k the order of the error in h, the next step is h times
    safety e^-(1/k - 3/4 beta) e_last^beta within [shrink, grow]; after a rejection the step does not grow at once, and a
    rejected step shrinks by safety e^-(1/k).
    """

    beta: float = 0.04
    safety: float = 0.9
    shrink: float = 0.2
    grow: float = 10.0

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 0.25:
            raise ValueError(f"beta: must be in [0, 0.25), got {self.beta}")
        if not 0 < self.safety <= 1:
            raise ValueError(f"safety: must be in (0, 1], got {self.safety}")
        if not 0 < self.shrink < 1 < self.grow:
            raise ValueError(f"shrink, grow: need 0 < shrink < 1 < grow, got {self.shrink} and {self.grow}")

    def memory(self, count: int) -> Tensor:
        """[2, n]: the last accepted error, and 1 where the last attempt was rejected."""
        return torch.stack([torch.full((count,), 1e-4), torch.zeros(count)]).double()

    def decide(self, error: Tensor, order: int, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(accepted, factor, memory) for errors [n]."""
        accepted = error < 1
        last, rejected = memory
        small = error.clamp(min=1e-300)
        grown = self.safety * small ** -(1 / order - 0.75 * self.beta) * (last**self.beta if self.beta else 1.0)
        grown = torch.where(error == 0, torch.full_like(error, self.grow), grown).clamp(self.shrink, self.grow)
        grown = torch.where(rejected > 0, grown.clamp(max=1.0), grown)
        shrunk = (self.safety * small ** (-1 / order)).clamp(min=self.shrink, max=1.0)
        factor = torch.where(accepted, grown, shrunk)
        kept = torch.where(accepted, error.clamp(min=1e-4), last)
        return accepted, factor, torch.stack([kept, (~accepted).double()])


@dataclass(frozen=True)
class PID:
    """The controller of k-diffusion's adaptive DPM-Solver: coefficients p, i, d of the logarithmic error.

    factor = limit(e^-b1 e_last^-b2 e_before^-b3) with limit(f) = 1 + arctan(f - 1); accepted if factor >= safety. The
    defaults are k-diffusion's; p = 0, i = 1, d = 0 is h e^(-1/order), the rule of DPM-Solver's Appendix C.
    """

    p: float = 0.0
    i: float = 1.0
    d: float = 0.0
    safety: float = 0.81

    def __post_init__(self) -> None:
        if not 0 < self.safety <= 1:
            raise ValueError(f"safety: must be in (0, 1], got {self.safety}")

    def memory(self, count: int) -> Tensor:
        """[2, n]: inverse errors of the last two accepted steps; 0 before the first."""
        return torch.zeros(2, count, dtype=torch.float64)

    def decide(self, error: Tensor, order: int, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inverse = 1 / (error + 1e-8)
        first, second = (torch.where(m == 0, inverse, m) for m in memory)
        b1, b2, b3 = (self.p + self.i + self.d) / order, -(self.p + 2 * self.d) / order, self.d / order
        factor = 1 + torch.atan(inverse**b1 * first**b2 * second**b3 - 1)
        accepted = factor >= self.safety
        # k-diffusion fills an empty memory at the first attempt, whether or not that is accepted.
        memory = torch.stack([torch.where(accepted, inverse, first), torch.where(accepted, first, second)])
        return accepted, factor, memory
