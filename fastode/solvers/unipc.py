"""UniPC: a unified predictor-corrector of any order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fastode.program import Form, Trace
from fastode.schedules.grid import Level
from fastode.solvers.coefficients import (
    History,
    check_choice,
    check_order,
    combine,
    ddim_step,
    denoised_of,
    eps_of,
    exp_moment,
    functional_weights,
    history_of,
    is_first_order,
    settle,
)


def unipc(
    p: Trace,
    *,
    order: int = 3,
    variant: str = "bh2",
    prediction: str = "x0",
    corrector: bool = True,
    disable_corrector: Sequence[int] = (),
    lower_order_final: bool = True,
    exact: bool = False,
) -> Form:
    """UniPC (arXiv:2302.04867, Algorithms 5-8): NFE 1 per step, step size h in lam; order ``order`` + 1 with corrector.

    Predictor of order q to level t from m_0 (newest), m_1, ... at r_j = (lam_j - lam_s)/h:

        x_t = DDIM(x; m_0) + S B sum_j rho_j (m_j - m_0)/r_j,     sum_j rho_j r_j^(k-1) = k! M_k / (h^k B)

    with S = alpha_t, M_k = J_k for x0 prediction (S = -sigma_t, M_k = K_k for eps) and B = M_0 (``variant="bh2"``) or h
    ("bh1"). The corrector adds the evaluation at t itself as node r = 1 and redoes the step from the corrected x_s; it
    costs nothing, because that evaluation is needed anyway. The last point is neither evaluated nor corrected.

    As published, the predictor of order 2 and the corrector of order 1 use rho = 1/2 instead of solving; B matters only
    there. ``exact=True`` solves. ``disable_corrector``: steps, counted from 0, whose end is not corrected (diffusers; [0] is
    its usual value under guidance). The history keeps evaluations at predicted points.
    """
    check_order(order, (1, 2, 3), "unipc")
    check_choice("variant", variant, ("bh1", "bh2"))
    check_choice("prediction", prediction, ("x0", "eps"))
    if any(isinstance(i, bool) or not isinstance(i, int) for i in disable_corrector):
        raise ValueError(f"disable_corrector: must be whole numbers, the steps, got {disable_corrector!r}")
    data, bh2 = prediction == "x0", variant == "bh2"
    x, history, steps = p.start(), history_of(p, order + 1, data=data), p.grid.steps
    previous: tuple[Form, Level, int] | None = None  # corrected state, its level, order of the step taken from it
    for i, (_, s, t) in enumerate(p.grid.windows()):
        d = p.denoise(x, s)
        m = d if data else p.keep(eps_of(x, d, s))
        history.push(s, m)
        if corrector and previous is not None and previous[2]:
            x_last, last, k = previous
            x = p.land(_step(x_last, history, k, last, s, data=data, bh2=bh2, exact=exact, correct=True), s)
            d = d if data else denoised_of(x, m, s)
        d = settle(p, history, x, d, s, data=data)
        k = history.reach(min(order, steps - i) if lower_order_final else order)
        previous = (x, s, 0 if is_first_order(s, t) or i in disable_corrector else k)
        if is_first_order(s, t):
            x = p.land(ddim_step(x, d, s, t), t)
        else:
            x = p.land(_step(x, history, k, s, t, data=data, bh2=bh2, exact=exact, correct=False), t)
    return x


def _step(
    x: Form, history: History, k: int, s: Level, t: Level, *, data: bool, bh2: bool, exact: bool, correct: bool
) -> Form:
    """Predictor of order ``k`` from s to t, or its corrector when the newest entry of ``history`` is the one at t."""
    h = t.lam - s.lam
    gain, scale = (t.sigma / s.sigma, t.alpha) if data else (t.alpha / s.alpha, -t.sigma)
    moments = [exp_moment(j, h, data=data) for j in range(k + 1)]
    b: Any = moments[0] if bh2 else h
    forms, levels = history.forms(k + correct), history.levels(k + correct)
    at_t = forms.pop(0) if correct else None
    if correct:
        levels.pop(0)
    m0 = forms[0]
    nodes: list[Any] = [(level.lam - s.lam) / h for level in levels[1:k]]
    changes = [(form - m0) / r for form, r in zip(forms[1:k], nodes, strict=True)]
    if at_t is not None:
        nodes, changes = [*nodes, 1.0], [*changes, at_t - m0]
    if len(nodes) == 1 and not exact:
        weights: list[Any] = [0.5]
    else:
        right = [math.factorial(j) * moments[j] / (h**j * b) for j in range(1, len(nodes) + 1)]
        weights = functional_weights(nodes, right)
    return gain * x + scale * moments[0] * m0 + scale * b * combine(weights, changes)
