"""DDIM, which is Euler's method in the EDM frame."""

from __future__ import annotations

from fastode.program import Form, Trace
from fastode.schedules.grid import Level
from fastode.solvers.coefficients import ddim_step
from fastode.solvers.stochastic import ancestral, check_noise, renoised


def ddim(p: Trace, *, eta: float = 0.0, s_noise: float = 1.0) -> Form:
    """DDIM (arXiv:2010.02502, equation 12): order 1, one evaluation per step, step size in rho = sigma/alpha.

    x_t = (sigma_down/sigma_s) x + (alpha_t - alpha_s sigma_down/sigma_s) d + sigma_up z, with sigma_up^2 + sigma_down^2 =
    sigma_t^2. ``eta`` in [0, 1] scales the noise: 0 is the ODE (Euler in the EDM frame), 1 the ancestral sampler of DDPM.
    ``s_noise`` multiplies the fresh noise.
    """
    check_noise(p, eta, s_noise)
    x = p.start()
    for _, s, t in p.grid.windows():
        d = p.compensated(p.denoise(x, s), s)
        down, up = (t.sigma, 0.0) if t.is_data else ancestral(s, t, eta)
        x = p.land(renoised(p, ddim_step(x, d, s, Level(t.alpha, down)), up, s_noise), t)
    return x
