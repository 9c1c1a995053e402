"""Single-step exponential integrators: DPM-Solver-2 and -3, and the single-step forms of DPM-Solver++."""

from __future__ import annotations

from typing import Any

from fastode.program import Form, Trace
from fastode.schedules.grid import Level
from fastode.solvers.coefficients import (
    check_choice,
    check_order,
    check_unit,
    ddim_step,
    eps_of,
    exp_moment,
    is_first_order,
)


def dpm_solver_2(p: Trace, *, r: float = 0.5) -> Form:
    """DPM-Solver-2 (arXiv:2206.00927, Algorithm 4): order 2, NFE 2 per step, step size h in lam, noise prediction.

    u = state at lam_s + r h by DDIM;  x_t = DDIM(x; e) - sigma_t (e^h - 1)/(2r) (e_u - e).  r = 1 is Heun's method.
    """
    check_unit("r", r)
    x = p.start()
    for _, s, t in p.grid.windows():
        x = p.land(second_order(p, x, s, t, r, data=False), t)
    return x


def dpm_solver_3(p: Trace, *, r1: float = 1 / 3, r2: float = 2 / 3, lower_order_final: bool = False) -> Form:
    """DPM-Solver-3 (arXiv:2206.00927, Algorithm 5): order 3, NFE 3 per step, step size in lam, noise prediction.

    ``lower_order_final``: the last two steps are DPM-Solver-2 and DDIM, as in DPM-Solver-fast.
    """
    _check_nodes(r1, r2)
    x, steps = p.start(), p.grid.steps
    for i, (_, s, t) in enumerate(p.grid.windows()):
        order = min(3, steps - i) if lower_order_final else 3
        if order == 3:
            x = p.land(third_order(p, x, s, t, r1, r2, data=False), t)
        elif order == 2:
            x = p.land(second_order(p, x, s, t, 0.5, data=False), t)
        else:
            x = p.land(ddim_step(x, p.denoise(x, s), s, t), t)
    return x


def dpm_solver_pp_s(
    p: Trace,
    *,
    order: int = 2,
    r: float = 0.5,
    r1: float = 1 / 3,
    r2: float = 2 / 3,
    prediction: str = "x0",
) -> Form:
    """Single-step DPM-Solver++ (arXiv:2211.01095, Algorithm 1 at order 2): NFE ``order`` per step, data prediction.

    2S: x_t = DDIM(x; d) + alpha_t (1 - e^-h)/(2r) (d_u - d), with d_u at the DDIM state on lam_s + r h. 3S uses nodes
    ``r1`` and ``r2``. A step to sigma = 0 is first order.
    """
    check_order(order, (2, 3), "dpm_solver_pp_s")
    check_choice("prediction", prediction, ("x0", "eps"))
    check_unit("r", r)
    _check_nodes(r1, r2)
    data = prediction == "x0"
    x = p.start()
    for _, s, t in p.grid.windows():
        if order == 2:
            x = p.land(second_order(p, x, s, t, r, data=data), t)
        else:
            x = p.land(third_order(p, x, s, t, r1, r2, data=data), t)
    return x


def second_order(p: Trace, x: Form, s: Level, t: Level, r: Any, *, data: bool) -> Form:
    """One step of DPM-Solver(++)-2; ``r`` in (0, 1] places the inner level and may be late."""
    d = p.denoise(x, s)
    if is_first_order(s, t):
        return ddim_step(x, d, s, t)
    u = p.grid.between(s, t, r)
    x_u = p.inner(ddim_step(x, d, s, u), u)
    weight = _weight(0, s, t, data) / (2 * r)
    first = p.keep(ddim_step(x, d, s, t) - weight * _predicted(x, d, s, data))  # one buffer instead of x and d
    return first + weight * _predicted(x_u, p.denoise(x_u, u), u, data)


def third_order(p: Trace, x: Form, s: Level, t: Level, r1: float, r2: float, *, data: bool) -> Form:
    """One step of DPM-Solver(++)-3."""
    d = p.denoise(x, s)
    if is_first_order(s, t):
        return ddim_step(x, d, s, t)
    u, v = p.grid.between(s, t, r1), p.grid.between(s, t, r2)
    x_u = p.inner(ddim_step(x, d, s, u), u)
    w_v, w_t = r2 / r1 * _weight(1, s, v, data), _weight(1, s, t, data) / r2
    m = _predicted(x, d, s, data)
    x_v, x_t = p.keep(ddim_step(x, d, s, v) - w_v * m), p.keep(ddim_step(x, d, s, t) - w_t * m)
    x_v = p.inner(x_v + w_v * _predicted(x_u, p.denoise(x_u, u), u, data), v)
    return x_t + w_t * _predicted(x_v, p.denoise(x_v, v), v, data)


def _weight(k: int, s: Level, t: Level, data: bool) -> Any:
    """c_k: coefficient of the k-th derivative in units of h^k, alpha_t J_k/h^k or -sigma_t K_k/h^k."""
    h = t.lam - s.lam
    scale = t.alpha if data else -t.sigma
    return scale * exp_moment(k, h, data=data) / h**k


def _predicted(x: Form, d: Form, s: Level, data: bool) -> Form:
    """The quantity that the method holds constant: the denoised estimate, or the noise."""
    return d if data else eps_of(x, d, s)


def _check_nodes(r1: float, r2: float) -> None:
    if not 0 < r1 < r2 <= 1:
        raise ValueError(f"r1, r2: need 0 < r1 < r2 <= 1, got {r1} and {r2}")
