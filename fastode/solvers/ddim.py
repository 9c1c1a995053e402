"""DDIM, which is Euler's method in the EDM frame."""

from __future__ import annotations

from fastode.program import Form, Trace
from fastode.scalar import sqrt
from fastode.schedules.grid import Level
from fastode.solvers.coefficients import ddim_step


def ddim(p: Trace, *, eta: float = 0.0) -> Form:
    """DDIM (arXiv:2010.02502, equation 12): order 1, one evaluation per step, step size in rho = sigma/alpha.

    x_t = (sigma_down/sigma_s) x + (alpha_t - alpha_s sigma_down/sigma_s) d + sigma_up z, with sigma_up^2 + sigma_down^2 =
    sigma_t^2. ``eta`` in [0, 1] scales the noise: 0 is the ODE (Euler in the EDM frame), 1 the ancestral sampler of DDPM.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: must be in [0, 1], got {eta}")
    x = p.start()
    for _, s, t in p.grid.windows():
        d = p.compensated(p.denoise(x, s), s)
        if eta and not t.is_data:
            down, up = ancestral(s, t, eta)
            x = p.land(ddim_step(x, d, s, Level(t.alpha, down)) + up * p.noise(), t)
        else:
            x = p.land(ddim_step(x, d, s, t), t)
    return x


def ancestral(s: Level, t: Level, eta: float) -> tuple[float, float]:
    """(sigma_down, sigma_up) of a step to ``t``: sigma_up = eta sigma_t sqrt(1 - rho_t^2/rho_s^2), at most sigma_t."""
    ratio = 0.0 if s.is_noise else t.rho / s.rho
    up = eta * t.sigma * sqrt(1 - ratio**2)
    return sqrt(t.sigma**2 - up**2), up
