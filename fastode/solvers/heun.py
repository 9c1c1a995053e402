"""Heun's method in the EDM frame: the sampler of Karras et al., with and without churn."""

from __future__ import annotations

import math

from fastode.program import Form, Trace
from fastode.schedules.grid import Level
from fastode.solvers.coefficients import ddim_step, eps_of, is_first_order
from fastode.solvers.stochastic import check_s_noise, renoised


def heun(
    p: Trace, *, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0
) -> Form:
    """Heun's trapezoidal rule for dx/drho = eps (arXiv:2206.00364, Algorithms 1 and 2): order 2, NFE 2 per step.

    With e = (x - alpha_s d)/sigma_s and e' the same at the Euler point on level t,

        x_t/alpha_t = x/alpha_s + (rho_t - rho_s)(e + e')/2 .

    A step to sigma = 0 (or from alpha = 0) is the first-order step, one evaluation. On a grid that ends at 0 this is EDM's
    sampler with 2n - 1 evaluations; on a grid that ends at sigma_min every step is corrected.

    Churn (Algorithm 2): where ``s_tmin`` <= rho_s <= ``s_tmax`` (EDM-frame sigmas), a step first raises the noise level to
    rho_s (1 + gamma), gamma = min(``s_churn``/steps, sqrt(2) - 1), by adding noise of standard deviation ``s_noise`` times
    what that takes, and starts there. The paper's ImageNet-64 setting: 40, 0.05, 50, 1.003 with 256 steps.
    """
    gamma = check_churn(p, s_churn, s_tmin, s_tmax, s_noise)
    x = p.start()
    for _, s, t in p.grid.windows():
        if gamma and not s.is_noise and s_tmin <= s.rho <= s_tmax:
            x, s = churned(p, x, s, gamma, s_noise)
        d = p.denoise(x, s)
        if is_first_order(s, t):
            x = p.land(ddim_step(x, d, s, t), t)
            continue
        euler = p.inner(ddim_step(x, d, s, t), t)
        half = (t.rho - s.rho) / 2
        first = p.keep(x / s.alpha + half * eps_of(x, d, s))  # one buffer instead of x and d
        x = p.land(t.alpha * (first + half * eps_of(euler, p.denoise(euler, t), t)), t)
    return x


def edm(p: Trace, *, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0) -> Form:
    """EDM's sampler: Heun with the last step to sigma = 0, and optional churn (arXiv:2206.00364, Algorithms 1 and 2).

    The same rule as :func:`heun`; its usual grid is ``karras(schedule, steps, final="zero")``, NFE 2 steps - 1.
    """
    return heun(p, s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise)


def churned(p: Trace, x: Form, s: Level, gamma: float, s_noise: float) -> tuple[Form, Level]:
    """``x`` with noise added up to (1 + gamma) times its level, signal scale unchanged; and that level."""
    up = s.sigma * math.sqrt(gamma * (2 + gamma))
    return p.keep(renoised(p, x, up, s_noise)), Level(s.alpha, s.sigma * (1 + gamma))


def check_churn(p: Trace, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float) -> float:
    """gamma, which is the same wherever it is not 0."""
    if not 0 <= s_churn < math.inf:
        raise ValueError(f"s_churn: must be a number of at least 0, got {s_churn}")
    if not 0 <= s_tmin <= s_tmax:
        raise ValueError(f"s_tmin, s_tmax: need 0 <= s_tmin <= s_tmax, got {s_tmin} and {s_tmax}")
    check_s_noise(p, s_noise, used=s_churn > 0)
    return min(s_churn / p.whole.steps, math.sqrt(2) - 1)
