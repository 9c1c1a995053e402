"""The SDEs of score-SDE and their predictors: Euler-Maruyama, reverse diffusion, ancestral (arXiv:2011.13456).

Forward dx = f x dt + g dw, and x_t = alpha x_0 + sigma n. A predictor is one step of the reverse SDE at one level, affine
in the state and the score S = (alpha D - x)/sigma^2: a mean, and a standard deviation for fresh noise.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

from fastode.program import Form
from fastode.schedules.grid import Grid, Level
from fastode.schedules.noise import VE, NoiseSchedule, SubVP, VPLinear

Step = Literal["1/N", "spacing"]
PREDICTORS = ("euler_maruyama", "reverse_diffusion", "ancestral", "none")


def score_sde_grid(schedule: NoiseSchedule, levels: int, *, eps: float | None = None) -> Grid:
    """The published times: ``levels`` uniform ones from 1 to ``eps``, spacing (1 - eps)/(levels - 1).

    eps = 1e-3 for VP and sub-VP, 1e-5 for VE, as published. One evaluation (and the corrector's) is made at each level.
    """
    check_sde(schedule)
    if isinstance(levels, bool) or not isinstance(levels, int) or levels < 2:
        raise ValueError(f"levels: must be a whole number of at least 2, got {levels!r}")
    end = (1e-5 if isinstance(schedule, VE) else 1e-3) if eps is None else eps
    if not 0 <= end < 1:
        raise ValueError(f"eps: must be in [0, 1), got {eps}")
    t = torch.linspace(1, end, levels, dtype=torch.float64)
    return Grid(schedule.sigma(t), schedule.alpha(t), t, schedule, "score_sde")


def check_sde(schedule: NoiseSchedule | None) -> VPLinear | VE:
    """Raises ``ValueError`` for schedules that are not one of the three SDEs."""
    if not isinstance(schedule, (VPLinear, VE)):
        raise ValueError(
            "grid: the SDEs of score-SDE are those of VPLinear, SubVP and VE; this grid is on "
            f"{type(schedule).__name__ if schedule is not None else 'no schedule'}"
        )
    return schedule


def drift(schedule: VPLinear | VE, t: float) -> tuple[float, float]:
    """(f, g^2) at time t: (-beta/2, beta) for VP, (-beta/2, beta (1 - alpha^4)) for sub-VP, (0, 2 sigma^2 ln(max/min)) for
    VE."""
    if isinstance(schedule, VE):
        return 0.0, float(schedule.sigma(t)) ** 2 * 2 * math.log(schedule.sigma_max / schedule.sigma_min)
    beta = schedule.beta_min + t * (schedule.beta_max - schedule.beta_min)
    if isinstance(schedule, SubVP):
        # alpha = e^ell, and 1 - e^(4 ell) without cancellation
        ell = -(t**2) * (schedule.beta_max - schedule.beta_min) / 4 - t * schedule.beta_min / 2
        return -beta / 2, beta * -math.expm1(4 * ell)
    return -beta / 2, beta


def index_of(t: float, levels: int) -> int:
    """The discrete level floor(t (N - 1)) of published code (which repeats one level where N > 1/eps)."""
    return int(t * (levels - 1))


def beta_of(schedule: VPLinear, i: int, levels: int) -> float:
    """beta_i of linspace(beta_min/N, beta_max/N, N), the discrete companion of VP."""
    low, high = schedule.beta_min / levels, schedule.beta_max / levels
    return low + (high - low) * i / (levels - 1)


def sigma_of(schedule: VE, i: int, levels: int) -> float:
    """sigma_i of the geometric sequence sigma_min .. sigma_max, the discrete companion of VE; sigma_-1 is 0."""
    if i < 0:
        return 0.0
    return schedule.sigma_min * math.exp(math.log(schedule.sigma_max / schedule.sigma_min) * i / (levels - 1))


def score_of(x: Form, d: Form, s: Level) -> Form:
    """The score (alpha D - x) / sigma^2."""
    return (s.alpha * d - x) / s.sigma**2


def predict(
    predictor: str,
    schedule: VPLinear | VE,
    x: Form,
    score: Form,
    t: float,
    dt: float,
    levels: int,
    probability_flow: bool,
) -> tuple[Form, float]:
    """(mean, standard deviation of the noise) of one step at time ``t``, of length ``dt`` for Euler-Maruyama.

        Euler-Maruyama         x - dt (f x - c g^2 S)                                  g sqrt(dt)
        reverse diffusion, VP  (2 - sqrt(1 - beta_i)) x + c beta_i S                   sqrt(beta_i)
        reverse diffusion, VE  x + c (sigma_i^2 - sigma_(i-1)^2) S                     sqrt(sigma_i^2 - sigma_(i-1)^2)
        ancestral, VP          (x + beta_i S) / sqrt(1 - beta_i)                       sqrt(beta_i)
        ancestral, VE          x + (sigma_i^2 - sigma_(i-1)^2) S    sigma_(i-1) sqrt(sigma_i^2 - sigma_(i-1)^2) / sigma_i

    with c = 1, or 1/2 and no noise for the probability flow. Reverse diffusion of sub-VP is Euler-Maruyama.
    """
    if predictor == "none":
        return x, 0.0
    c = 0.5 if probability_flow else 1.0
    if predictor == "euler_maruyama" or (predictor == "reverse_diffusion" and isinstance(schedule, SubVP)):
        f, g2 = drift(schedule, t)
        mean, std = (1 - dt * f) * x + dt * c * g2 * score, math.sqrt(g2 * dt)
    elif isinstance(schedule, VE):
        i = index_of(t, levels)
        new, old = sigma_of(schedule, i, levels) ** 2, sigma_of(schedule, i - 1, levels) ** 2
        mean, std = x + c * (new - old) * score, math.sqrt(new - old)
        if predictor == "ancestral":
            std *= math.sqrt(old / new)
    else:
        beta = beta_of(schedule, index_of(t, levels), levels)
        if predictor == "ancestral":
            mean = (x + beta * score) / math.sqrt(1 - beta)
        else:
            mean = (2 - math.sqrt(1 - beta)) * x + c * beta * score
        std = math.sqrt(beta)
    return mean, 0.0 if probability_flow else std
