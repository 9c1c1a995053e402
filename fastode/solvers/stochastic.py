"""What the stochastic solvers share: how much of the noise at the next level is kept and how much is drawn afresh.

Every step here is a deterministic step to ``down`` (a state of the next level's signal scale with less noise than it should
have) followed by fresh noise of standard deviation ``up``, with down^2 + up^2 = sigma_t^2.
"""

from __future__ import annotations

import math
from typing import Any

from fastode.program import Form, Trace
from fastode.scalar import exp, expm1, sqrt
from fastode.schedules.grid import Level


def ancestral(s: Level, t: Level, eta: float) -> tuple[Any, Any]:
    """(down, up) of DDIM and k-diffusion's ancestral steps: up = eta sigma_t sqrt(1 - rho_t^2/rho_s^2).

    At ``eta=1`` this is the posterior q(x_t | x_s, x_0) of the forward process; ``eta=0`` is the ODE.
    """
    if eta == 0:
        return t.sigma, 0.0
    ratio = 0.0 if s.is_noise else t.rho / s.rho
    if eta == 1:  # also without the square root of zero, which has no derivative
        return t.sigma * ratio, t.sigma * sqrt((1 - ratio) * (1 + ratio))
    down = sqrt((1 - eta) * (1 + eta) + (eta * ratio) ** 2)  # not sqrt(1 - up^2): a long step would cancel
    return t.sigma * down, eta * t.sigma * sqrt((1 - ratio) * (1 + ratio))


def ornstein_uhlenbeck(s: Level, t: Level, eta: float) -> tuple[Any, Any]:
    """(down, up) of the SDE whose noise is ``eta`` times that of the reverse diffusion, solved exactly for constant x_0.

    down = sigma_t e^(-eta h), up = sigma_t sqrt(1 - e^(-2 eta h)), h = lam_t - lam_s. ``eta=1`` is the reverse SDE, and
    then equal to :func:`ancestral`; in between the two interpolate differently.
    """
    if eta == 0 or t.is_data:
        return t.sigma, 0.0
    if s.is_noise:
        return 0.0, t.sigma
    h = t.lam - s.lam
    return t.sigma * exp(-eta * h), t.sigma * sqrt(-expm1(-2 * eta * h))


def renoised(p: Trace, x: Form, up: Any, s_noise: float) -> Form:
    """``x`` plus fresh noise of standard deviation ``up``; nothing is drawn where that is a plain 0."""
    if isinstance(up, (int, float)) and up == 0:
        return x
    return x + (up if s_noise == 1 else s_noise * up) * p.noise()


def check_noise(p: Trace, eta: float, s_noise: float) -> None:
    """Options of every stochastic solver. Noise scaled by ``s_noise`` is no longer that of any level, so the program is
    then not exact on a single data point."""
    if isinstance(eta, bool) or not isinstance(eta, (int, float)) or not 0 <= eta <= 1:
        raise ValueError(f"eta: must be in [0, 1], got {eta}")
    check_s_noise(p, s_noise, used=eta != 0)


def check_s_noise(p: Trace, s_noise: float, *, used: bool = True) -> None:
    if isinstance(s_noise, bool) or not isinstance(s_noise, (int, float)) or not 0 <= s_noise < math.inf:
        raise ValueError(f"s_noise: must be a number of at least 0, got {s_noise}")
    if used and s_noise != 1:
        p.consistent = False
