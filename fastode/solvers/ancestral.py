"""Ancestral samplers: a deterministic step below the next noise level, then fresh noise up to it."""

from __future__ import annotations

from fastode.program import Form, Trace
from fastode.scalar import sqrt
from fastode.schedules.grid import Level
from fastode.solvers.coefficients import check_choice, ddim_step
from fastode.solvers.ddim import ddim
from fastode.solvers.dpm_solver import second_order
from fastode.solvers.stochastic import ancestral, check_noise, check_s_noise, renoised


def euler_ancestral(p: Trace, *, eta: float = 1.0, s_noise: float = 1.0) -> Form:
    """Euler ancestral (k-diffusion, diffusers): DDIM with ``eta=1``; weak order 1, NFE 1 per step.

    With rho_up = eta rho_t sqrt(1 - rho_t^2/rho_s^2) and rho_down^2 = rho_t^2 - rho_up^2: Euler's step to rho_down, then
    rho_up z. A step to sigma = 0 returns the denoised estimate. ``s_noise`` multiplies the fresh noise.
    """
    return ddim(p, eta=eta, s_noise=s_noise)


def dpm_2_ancestral(p: Trace, *, eta: float = 1.0, s_noise: float = 1.0) -> Form:
    """DPM-2 ancestral (k-diffusion, diffusers' KDPM2 ancestral): DPM-Solver-2 to rho_down, then rho_up z; NFE 2 per step.

    The inner level is the geometric mean of rho_s and rho_down. ``eta=0`` is DPM-Solver-2. At ``eta=1`` rho_down is
    rho_t^2/rho_s: below the target, so the step is longer than that of the ODE solver. Weak order 1, though the marginals
    of Gaussian data converge at order 2.
    """
    return _two_stage(p, eta, s_noise, data=False)


def dpmpp_2s_ancestral(p: Trace, *, eta: float = 1.0, s_noise: float = 1.0) -> Form:
    """DPM-Solver++(2S) ancestral (k-diffusion): single-step DPM-Solver++ to rho_down, then rho_up z; NFE 2 per step.

    Inner level in the middle of lam_s and lam_down. ``eta=0`` is DPM-Solver++(2S). Weak order 1, though the
    marginals of Gaussian data converge at order 2.
    """
    return _two_stage(p, eta, s_noise, data=True)


def _two_stage(p: Trace, eta: float, s_noise: float, *, data: bool) -> Form:
    check_noise(p, eta, s_noise)
    x = p.start()
    for _, s, t in p.grid.windows():
        down, up = (t.sigma, 0.0) if t.is_data else ancestral(s, t, eta)
        target = t if eta == 0 else Level(t.alpha, down)
        x = p.land(renoised(p, second_order(p, x, s, target, 0.5, data=data), up, s_noise), t)
    return x


def ddpm(p: Trace, *, variance_type: str = "fixed_small", s_noise: float = 1.0) -> Form:
    """DDPM's ancestral sampler (arXiv:2006.11239, Algorithm 2): the posterior mean, then noise; NFE 1 per step.

    In the EDM frame: (rho_t^2/rho_s^2) x + (1 - rho_t^2/rho_s^2) d + std z. ``variance_type`` as in diffusers:
    "fixed_small" is the posterior's variance rho_t^2 (1 - rho_t^2/rho_s^2), i.e. DDIM with ``eta=1``; "fixed_large" is
    beta_t = 1 - bar alpha_s/bar alpha_t, which is (1 + rho_t^2)(rho_s^2 - rho_t^2)/(1 + rho_s^2) here: right for data of
    unit variance, too much for a single point. The step to sigma = 0 adds no noise.
    """
    check_choice("variance_type", variance_type, ("fixed_small", "fixed_large"))
    check_s_noise(p, s_noise)
    large = variance_type == "fixed_large"
    if large:
        p.consistent = False
    x = p.start()
    for _, s, t in p.grid.windows():
        d = p.denoise(x, s)
        down, up = (t.sigma, 0.0) if t.is_data else ancestral(s, t, 1.0)
        if large and not t.is_data:
            share = 1.0 if s.is_noise else (s.rho**2 - t.rho**2) / (1 + s.rho**2)
            up = t.alpha * sqrt((1 + t.rho**2) * share)
        x = p.land(renoised(p, ddim_step(x, d, s, Level(t.alpha, down)), up, s_noise), t)
    return x
