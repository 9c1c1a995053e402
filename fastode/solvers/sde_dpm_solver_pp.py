"""SDE-DPM-Solver++: exponential integrators of the reverse SDE, multistep and single-step."""

from __future__ import annotations

from fastode.program import Form, Trace
from fastode.scalar import sqrt
from fastode.schedules.grid import Level
from fastode.solvers.coefficients import check_choice, check_order, check_unit, ddim_step, history_of, is_first_order
from fastode.solvers.dpm_solver_pp import exponential_step, published_step
from fastode.solvers.stochastic import ancestral, check_noise, ornstein_uhlenbeck, renoised


def sde_dpm_solver_pp(
    p: Trace,
    *,
    order: int = 2,
    solver_type: str = "midpoint",
    eta: float = 1.0,
    s_noise: float = 1.0,
    lower_order_final: bool = True,
    exact: bool = False,
) -> Form:
    """SDE-DPM-Solver++ (arXiv:2211.01095, appendix), multistep, of data prediction: NFE 1 per step, step size h in lam.

    With e = (1 + eta) h, J_k = int_0^e e^-(e-u) u^k/k! du and D1, D2 the divided differences of :func:`dpm_solver_pp`:

        x_t = (sigma_t/sigma_s) e^(-eta h) x + alpha_t (J_0 d + correction) + sigma_t sqrt(1 - e^(-2 eta h)) z
        order 2: J_0/2 D1 ("midpoint") or J_1/e D1 ("heun");     order 3: J_1/e D1 + J_2/e^2 D2

    ``eta=1`` is the reverse SDE (diffusers' "sde-dpmsolver++", order 1 and 2), values between are k-diffusion's
    ``dpmpp_2m_sde``, and ``eta=0`` is :func:`dpm_solver_pp`, number by number. On
    Gaussian data mean and covariance converge at weak order 1 (``order=1``) and 2. The coefficient of D2 in diffusers' order
    3 has a wrong sign and does not vanish with h; this one is k-diffusion's. ``exact=True`` integrates the interpolating
    polynomial, as in dpm_solver_pp.
    """
    check_order(order, (1, 2, 3), "sde_dpm_solver_pp")
    check_choice("solver_type", solver_type, ("midpoint", "heun"))
    check_noise(p, eta, s_noise)
    x, history, steps = p.start(), history_of(p, order, data=True), p.grid.steps
    for i, (_, s, t) in enumerate(p.grid.windows()):
        d = p.denoise(x, s)
        history.push(s, d)
        k = history.reach(min(order, steps - i) if lower_order_final else order)
        down, up = ornstein_uhlenbeck(s, t, eta)
        if k <= 1 or is_first_order(s, t):
            x = ddim_step(x, d, s, Level(t.alpha, down))
        elif exact:
            x = exponential_step(x, history, k, s, t, data=True, eta=eta)
        else:
            x = published_step(x, history, k, s, t, data=True, midpoint=solver_type == "midpoint", eta=eta)
        x = p.land(renoised(p, x, up, s_noise), t)
    return x


def dpmpp_3m_sde(p: Trace, *, eta: float = 1.0, s_noise: float = 1.0) -> Form:
    """DPM-Solver++(3M) SDE of k-diffusion: :func:`sde_dpm_solver_pp` of order 3 whose second step is of "heun" type.

    Orders do not fall at the end, save in a step to sigma = 0. NFE 1 per step; weak order 2 on Gaussian data.
    """
    return sde_dpm_solver_pp(p, order=3, solver_type="heun", eta=eta, s_noise=s_noise, lower_order_final=False)


def dpmpp_sde(p: Trace, *, r: float = 0.5, eta: float = 1.0, s_noise: float = 1.0, brownian: bool = True) -> Form:
    """DPM-Solver++ SDE (k-diffusion's ``sample_dpmpp_sde``, diffusers' DPMSolverSDE): single-step, NFE 2 per step.

    Both the move to the inner level u at lam_s + r h and the move to t are ancestral, and the latter uses
    (1 - 1/(2r)) d + d_u/(2r). ``eta=0`` is DPM-Solver++(2S). Two draws per step. ``brownian=True``: their noises are
    increments of one path over [s, u] and [s, t] in the time rho, as those of k-diffusion's Brownian tree, with
    correlation sqrt((rho_s - rho_u)/(rho_s - rho_t)); False: they are independent. On Gaussian data and at ``eta=1`` the
    weak order is 2 with one path and 1 with independent draws; 1 at an ``eta`` between 0 and 1.
    """
    check_noise(p, eta, s_noise)
    check_unit("r", r)
    x = p.start()
    for _, s, t in p.grid.windows():
        d = p.denoise(x, s)
        if is_first_order(s, t):
            down, up = (t.sigma, 0.0) if t.is_data else ancestral(s, t, eta)
            x = p.land(renoised(p, ddim_step(x, d, s, Level(t.alpha, down)), up, s_noise), t)
            continue
        u = p.grid.between(s, t, r)
        (down_u, up_u), (down, up) = ancestral(s, u, eta), ancestral(s, t, eta)
        target = Level(t.alpha, down)
        weight = (t.alpha - s.alpha * (down / s.sigma)) / (2 * r)
        first = ddim_step(x, d, s, target) - weight * d
        y = ddim_step(x, d, s, Level(u.alpha, down_u))
        if eta:
            z = p.noise()
            y = y + s_noise * up_u * z
            share = sqrt((s.rho - u.rho) / (s.rho - t.rho)) if brownian else 0.0
            first = first + s_noise * up * share * z
            first = first + s_noise * up * sqrt(1 - share**2) * p.noise()
        y, first = p.keep(y), p.keep(first)  # the draws are used up here, next to one another
        x = p.land(first + weight * p.denoise(y, u), t)
    return x
