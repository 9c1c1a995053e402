"""SA-Solver: stochastic Adams predictor and corrector."""

from __future__ import annotations

import math
from typing import Any

from fastode.program import Form, Trace
from fastode.scalar import exp
from fastode.schedules.grid import Level
from fastode.solvers.coefficients import (
    History,
    check_order,
    combine,
    exp_moments,
    functional_weights,
    history_of,
    is_first_order,
)
from fastode.solvers.stochastic import check_s_noise, ornstein_uhlenbeck, renoised


def sa_solver(
    p: Trace,
    *,
    predictor_order: int = 2,
    corrector_order: int = 2,
    tau: float = 1.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    lower_order_final: bool = True,
    exact: bool = False,
) -> Form:
    """SA-Solver (arXiv:2309.05019, Algorithm 1) of data prediction: NFE 1 per step, step size h in lam.

    The SDE has tau^2 times the noise of the reverse diffusion where ``s_tmin`` <= rho_s <= ``s_tmax`` (EDM-frame sigmas;
    the paper's intervals), none elsewhere; ``tau=0`` is an ODE solver. With e = (1 + tau^2) h, over nodes l_j,

        x_t = (sigma_t/sigma_s) e^(-tau^2 h) x + alpha_t sum_j w_j d_j + sigma_t sqrt(1 - e^(-2 tau^2 h)) z

    the w_j integrating the interpolating polynomial exactly. The predictor's nodes are the last ``predictor_order``
    evaluations. The corrector, ``corrector_order`` nodes with the one at t among them (0: no corrector), repeats the step
    with the same z; it costs nothing, since that evaluation is needed anyway. The last point is not corrected, and the
    history keeps evaluations at predicted points. Of two nodes, the published code weighs the first difference by e/2
    instead of J_1/e, as UniPC does; ``exact=True`` integrates. Orders build up from 1; ``lower_order_final`` lets them
    fall at the end. On Gaussian data mean and covariance converge at weak order 2 from two nodes on.
    """
    check_order(predictor_order, (1, 2, 3, 4), "sa_solver")
    check_order(corrector_order, (0, 1, 2, 3, 4), "sa_solver")
    if not 0 <= tau < math.inf:
        raise ValueError(f"tau: must be a number of at least 0, got {tau}")
    if not 0 <= s_tmin <= s_tmax:
        raise ValueError(f"s_tmin, s_tmax: need 0 <= s_tmin <= s_tmax, got {s_tmin} and {s_tmax}")
    check_s_noise(p, s_noise, used=tau > 0)
    x, steps = p.start(), p.grid.steps
    history = history_of(p, max(predictor_order, corrector_order), data=True)
    previous: tuple[Form, Form, Level, float, int] | None = (
        None  # state, fresh noise, level, eta, order of its corrector
    )
    for i, (_, s, t) in enumerate(p.grid.windows()):
        history.push(s, p.denoise(x, s))
        if previous is not None and previous[-1]:
            x_last, fresh, last, eta, k = previous
            x = p.land(adams_step(x_last, history, k, last, s, eta, exact=exact) + fresh, s)
        eta = tau**2 if s_tmin <= s.rho <= s_tmax else 0.0
        left = steps - i if lower_order_final else 10**6
        k = max(1, history.reach(min(predictor_order, left)))
        down, up = ornstein_uhlenbeck(s, t, eta)
        fresh = renoised(p, Form({}), up, s_noise)
        k_corrector = min(corrector_order, left + 1, history.reach(len(history)) + 1)
        previous = (x, fresh, s, eta, 0 if is_first_order(s, t) else k_corrector)
        if is_first_order(s, t):
            gain = down / s.sigma
            x = p.land(gain * x + (t.alpha - s.alpha * gain) * history.forms(1)[0] + fresh, t)
        else:
            x = p.land(adams_step(x, history, k, s, t, eta, exact=exact) + fresh, t)
    return x


def adams_step(x: Form, history: History, k: int, s: Level, t: Level, eta: float, *, exact: bool) -> Form:
    """The step from s to t without its noise, on the newest ``k`` entries of ``history``, which may include one at t."""
    h = t.lam - s.lam
    rate = 1 + eta
    nodes: list[Any] = [rate * (level.lam - s.lam) for level in history.levels(k)]
    moments = exp_moments(rate * h, k, data=True)
    if k == 2 and not exact:
        moments[1] = (rate * h) ** 2 / 2
    gain = t.sigma * exp(-eta * h) / s.sigma
    return gain * x + t.alpha * combine(functional_weights(nodes, moments), history.forms(k))
