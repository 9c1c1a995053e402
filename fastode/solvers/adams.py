"""Adams-Bashforth methods on the noise prediction: iPNDM, iPNDM_v, LMS and DEIS differ only in their weights."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from fastode.program import Form, Trace
from fastode.schedules.grid import Level
from fastode.schedules.spacing import diffusion_time
from fastode.solvers.coefficients import (
    ADAMS_BASHFORTH,
    check_choice,
    check_order,
    combine,
    ddim_step,
    eps_of,
    exp_moments,
    functional_weights,
    history_of,
    power_moments,
    settle,
    time_weights,
)

Weights = Callable[[list[Level], Level], list[Any]]
"""(levels of the stored evaluations, newest first; target level) -> weight of each, in units of rho."""


def multistep(
    p: Trace, order: int, weights: Weights, *, finite_nodes: bool = True, lower_order_final: bool = False
) -> Form:
    """x_t/alpha_t = x/alpha_s + sum_j w_j e_j with noise predictions e_j, for dx/drho = e in the EDM frame.

    Orders build up from 1. With ``finite_nodes`` a level at alpha = 0, where rho is infinite, is left out of the stencil;
    the step from such a level is the first-order step.
    """
    x, history, steps = p.start(), history_of(p, order, data=False), p.grid.steps
    for i, (_, s, t) in enumerate(p.grid.windows()):
        d = p.denoise(x, s)
        history.push(s, p.keep(eps_of(x, d, s)) if order > 1 else eps_of(x, d, s))
        d = settle(p, history, x, d, s, data=False)
        most = min(order, steps - i) if lower_order_final else order
        k = history.reach(most) if finite_nodes else min(most, len(history))
        if s.is_noise or k <= 1:
            x = p.land(ddim_step(x, d, s, t), t)
            continue
        w = weights(history.levels(k), t)
        x = p.land(t.alpha * (x / s.alpha + combine(w, history.forms(k))), t)
    return x


def ipndm(p: Trace, *, order: int = 4) -> Form:
    """iPNDM (arXiv:2204.13902, section 4; arXiv:2202.09778): equal-step Adams-Bashforth weights on any grid; NFE 1 a step.

    w_j = (rho_t - rho_s) a_j with a = (1), (3, -1)/2, (23, -16, 5)/12, (55, -59, 37, -9)/24. Convergence order 2 at best,
    because the weights assume equal steps; yet the best closed-form baseline of the literature at few steps.
    """
    check_order(order, (1, 2, 3, 4), "ipndm")

    def weights(levels: list[Level], t: Level) -> list[Any]:
        h = t.rho - levels[0].rho
        return [h * a for a in ADAMS_BASHFORTH[len(levels)]]

    return multistep(p, order, weights, finite_nodes=False)


def lms(p: Trace, *, order: int = 4) -> Form:
    """Linear multistep in rho (k-diffusion's ``sample_lms``): variable-step Adams-Bashforth, order ``order``, NFE 1 a step.

    w_j = int l_j(rho) drho with Lagrange polynomials l_j in rho, in closed form. Equal to rho-AB DEIS.
    """
    check_order(order, (1, 2, 3, 4), "lms")
    return multistep(p, order, rho_weights)


def ipndm_v(p: Trace, *, order: int = 4, exact: bool = False) -> Form:
    """iPNDM with variable steps, as diff-sampler evaluates it, which is what the published iPNDM_v figures rest on.

    Orders 1 and 2 are variable-step Adams-Bashforth. At orders 3 and 4 the published code differs from it by a misplaced
    parenthesis, a sign and an index; order 4 then misses even a constant slope by up to 2e-5 of its weight.
    ``exact=True`` is variable-step Adams-Bashforth of that order.
    """
    check_order(order, (1, 2, 3, 4), "ipndm_v")
    if exact:
        return multistep(p, order, rho_weights)
    if order == 4:
        p.consistent = False  # the published weights do not sum to the step on a non-uniform grid
    return multistep(p, order, _published_variable_weights)


def deis(p: Trace, *, order: int = 4, space: str = "t", lower_order_final: bool = False) -> Form:
    """DEIS (arXiv:2204.13902): NFE 1 per step, ``order`` = number of stored evaluations used; published tAB3 is order 4.

    w_j = int_s^t l_j(u) drho, Lagrange polynomials l_j in ``space``: "t" (tAB) diffusion time, by quadrature to float64
    accuracy; "rho" (rhoAB) in closed form; "lam" in ln rho (diffusers' DEIS). Time is the schedule's; for EDM and VE grids
    it is that of the variance preserving process with the range 0.002 .. 80 of EDM (as published) or the schedule's own.
    """
    check_order(order, (1, 2, 3, 4), "deis")
    check_choice("space", space, ("t", "rho", "lam"))
    if space == "rho":
        return multistep(p, order, rho_weights, lower_order_final=lower_order_final)
    if space == "lam":
        return multistep(p, order, _lam_weights, lower_order_final=lower_order_final)
    clock = diffusion_time(p.grid.schedule)

    def weights(levels: list[Level], t: Level) -> list[Any]:
        times = [clock.time(level.rho) for level in levels]
        if t.is_data and bool(clock.time(t.rho) == times[0]):  # a table's label 0 and sigma = 0 have one time
            return [t.rho - levels[0].rho, *[0.0] * (len(levels) - 1)]
        return time_weights(clock, times, times[0], clock.time(t.rho), levels[0].rho, t.rho)

    return multistep(p, order, weights, lower_order_final=lower_order_final)


def rho_weights(levels: list[Level], t: Level) -> list[Any]:
    """Variable-step Adams-Bashforth: int l_j(rho) drho over the step."""
    s = levels[0].rho
    return functional_weights([level.rho - s for level in levels], power_moments(t.rho - s, len(levels)))


def _lam_weights(levels: list[Level], t: Level) -> list[Any]:
    s = levels[0]
    if t.is_data:
        return [t.rho - s.rho, *[0.0] * (len(levels) - 1)]
    nodes = [level.lam - s.lam for level in levels]
    return [-t.rho * w for w in functional_weights(nodes, exp_moments(t.lam - s.lam, len(levels), data=False))]


def _published_variable_weights(levels: list[Level], t: Level) -> list[Any]:
    """diff-sampler's iPNDM_v coefficients times the step; h_1, h_2, h_3 are the steps before, newest first."""
    rho = [level.rho for level in levels]
    h = t.rho - rho[0]
    past = [a - b for a, b in pairwise(rho)]
    ratio = h / past[0]
    a: list[Any] = [1 + ratio / 2, -ratio / 2]
    if len(levels) >= 3:
        h1, h2 = past[0], past[1]
        q1 = h1 / h2
        # exact: (1 - h/(3(h+h1)))/2 * h(h+h1)/(h1(h1+h2))
        t1 = 1 / 2 - h * h / (6 * h1 * (h1 + h2))
        a = [a[0] + t1, a[1] - t1 * (1 + q1), t1 * q1]
    if len(levels) == 4:
        h1, h2, h3 = past
        q1, q2 = h1 / h2, h2 / h3
        g = h1 * (h1 + h2) / (h2 * (h2 + h3))
        # exact: a minus sign between the two brackets, and q2 for q1 in the last weight
        t2 = (1 - h / (3 * (h + h1))) / 2 + (1 - h / (2 * (h + h1))) * h / (6 * (h + h1 + h2))
        t2 = t2 * h * (h + h1) * (h + h1 + h2) / (h1 * (h1 + h2) * (h1 + h2 + h3))
        a = [a[0] + t2, a[1] - t2 * (1 + q1 + g), a[2] + t2 * (q1 + g * (1 + q2)), -t2 * g * q1]
    return [h * value for value in a]
