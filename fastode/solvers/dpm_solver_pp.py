"""DPM-Solver++ multistep, and the exponential Adams-Bashforth step it approximates."""

from __future__ import annotations

from fastode.program import Form, Trace
from fastode.scalar import exp
from fastode.schedules.grid import Level
from fastode.solvers.coefficients import (
    History,
    check_choice,
    check_order,
    combine,
    ddim_step,
    eps_of,
    exp_moment,
    exp_moments,
    functional_weights,
    history_of,
    is_first_order,
    settle,
)


def dpm_solver_pp(
    p: Trace,
    *,
    order: int = 2,
    prediction: str = "x0",
    lower_order_final: bool = True,
    solver_type: str = "midpoint",
    exact: bool = False,
) -> Form:
    """DPM-Solver++ (arXiv:2211.01095, Algorithm 2 and appendix): multistep, NFE 1 per step, step size h in lam.

    With m the prediction (x0, or eps for DPM-Solver's noise form), D1 and D2 its first and second divided differences in
    units of h, and c_k = alpha_t J_k/h^k (x0) or -sigma_t K_k/h^k (eps):

        order 1   DDIM
        order 2   + c_0/2 D1  (``solver_type="midpoint"``, published)   or   + c_1 D1  ("heun")
        order 3   + c_1 D1 + c_2 D2

    Order 3 as published, and as in every public implementation, converges at order 2: the exact coefficient of D2 is
    2 c_2. The default keeps the published one; ``exact=True`` uses the exponential Adams-Bashforth weights of the chosen
    order in every step. Orders build up from 1; ``lower_order_final`` also lets them fall to 1 at the end, for any number
    of steps (diffusers does so below 15). A step to sigma = 0 is always first order.
    """
    check_order(order, (1, 2, 3), "dpm_solver_pp")
    check_choice("prediction", prediction, ("x0", "eps"))
    check_choice("solver_type", solver_type, ("midpoint", "heun"))
    data = prediction == "x0"
    x, history, steps = p.start(), history_of(p, order, data=data), p.grid.steps
    for i, (_, s, t) in enumerate(p.grid.windows()):
        d = p.denoise(x, s)
        history.push(s, d if data or order == 1 else p.keep(eps_of(x, d, s)))
        d = settle(p, history, x, d, s, data=data or order == 1)
        k = history.reach(min(order, steps - i) if lower_order_final else order)
        if k <= 1 or is_first_order(s, t):
            x = p.land(ddim_step(x, d, s, t), t)
        elif exact:
            x = p.land(exponential_step(x, history, k, s, t, data=data), t)
        else:
            x = p.land(published_step(x, history, k, s, t, data=data, midpoint=solver_type == "midpoint"), t)
    return x


def exponential_step(x: Form, history: History, k: int, s: Level, t: Level, *, data: bool, eta: float = 0.0) -> Form:
    """Exponential Adams-Bashforth: exact for predictions that are polynomials of degree k-1 in lam."""
    h = t.lam - s.lam
    nodes = [(1 + eta) * (level.lam - s.lam) for level in history.levels(k)]
    weights = functional_weights(nodes, exp_moments((1 + eta) * h, k, data=data))
    gain, scale = (t.sigma * exp(-eta * h) / s.sigma, t.alpha) if data else (t.alpha / s.alpha, -t.sigma)
    return gain * x + scale * combine(weights, history.forms(k))


def published_step(
    x: Form, history: History, k: int, s: Level, t: Level, *, data: bool, midpoint: bool, eta: float = 0.0
) -> Form:
    """The 2M and 3M formulas as published.

    ``eta`` (data prediction): the part of the SDE step that is not fresh noise. Noise forgets x faster, by e^(-eta h), and
    everything else depends on (1 + eta) h in the place of h.
    """
    h = t.lam - s.lam
    gain, scale = (t.sigma * exp(-eta * h) / s.sigma, t.alpha) if data else (t.alpha / s.alpha, -t.sigma)
    e = (1 + eta) * h
    c = [scale * exp_moment(j, e, data=data) / e**j for j in range(3)]
    m, levels = history.forms(k), history.levels(k)
    base = gain * x + c[0] * m[0]
    r0 = (s.lam - levels[1].lam) / h
    first = (m[0] - m[1]) / r0
    if k == 2:
        return base + (c[0] / 2 if midpoint else c[1]) * first
    r1 = (levels[1].lam - levels[2].lam) / h
    earlier = (m[1] - m[2]) / r1
    slope = first + r0 / (r0 + r1) * (first - earlier)
    curvature = (first - earlier) / (r0 + r1)
    return base + c[1] * slope + c[2] * curvature
