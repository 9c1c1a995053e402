"""Attempts: programs of one step that also return an estimate of its error. Levels and step size are late numbers.

An attempt is compiled once and played with new numbers each time. Its two states are the point it starts from and the
step; its result is the error estimate, a linear form of the same evaluations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from fastode.program import Form, Program, Trace
from fastode.scalar import Late, exp, expm1, log
from fastode.schedules.grid import Grid, Level
from fastode.schedules.noise import EDM, Discrete, NoiseSchedule
from fastode.solvers.coefficients import ddim_step, eps_of, exp_moment


@dataclass(frozen=True)
class Tableau:
    """An explicit embedded Runge-Kutta pair: nodes c, rows A, weights b, weights of the error estimate b - b*.

    ``fsal``: the last stage lies at the end of the step, so its evaluation opens the next one. Raises ``ValueError`` if
    the rows do not sum to the nodes, or the weights not to 1 and 0.
    """

    name: str
    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    error: tuple[float, ...]
    order: int
    error_order: int
    fsal: bool

    def __post_init__(self) -> None:
        for c, row in zip(self.c, self.a, strict=True):
            if abs(sum(row) - c) > 1e-12:
                raise ValueError(f"{self.name}: a row sums to {sum(row)}, its node is {c}")
        if abs(sum(self.b) - 1) > 1e-12 or abs(sum(self.error)) > 1e-12:
            raise ValueError(f"{self.name}: weights must sum to 1, error weights to 0")

    @property
    def stages(self) -> int:
        return len(self.c)


DORMAND_PRINCE = Tableau(
    name="dopri5",
    c=(0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    a=(
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    b=(35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0),
    error=(71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
    order=5,
    error_order=5,
    fsal=True,
)
"""Dormand and Prince 1980, order 5(4): scipy's RK45, MATLAB's ode45. Six evaluations per step."""

BOGACKI_SHAMPINE = Tableau(
    name="bosh3",
    c=(0.0, 1 / 2, 3 / 4, 1.0),
    a=((), (1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
    b=(2 / 9, 1 / 3, 4 / 9, 0.0),
    error=(-5 / 72, 1 / 12, 1 / 9, -1 / 8),
    order=3,
    error_order=3,
    fsal=True,
)
"""Bogacki and Shampine 1989, order 3(2): scipy's RK23. Three evaluations per step."""

HEUN_EULER = Tableau(
    name="heun_euler",
    c=(0.0, 1.0),
    a=((), (1.0,)),
    b=(1 / 2, 1 / 2),
    error=(-1 / 2, 1 / 2),
    order=2,
    error_order=2,
    fsal=False,
)
"""Heun's method with Euler inside, order 2(1). Two evaluations per step."""

RK4 = Tableau(
    name="rk4",
    c=(0.0, 1 / 2, 1 / 2, 1.0),
    a=((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)),
    b=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
    error=(0.0, 0.0, 0.0, 0.0),
    order=4,
    error_order=4,
    fsal=False,
)
"""The classical rule, for fixed steps only: it estimates no error."""

TABLEAUS = {t.name: t for t in (DORMAND_PRINCE, BOGACKI_SHAMPINE, HEUN_EULER, RK4)}


@dataclass(frozen=True, eq=False)
class Clock:
    """The time a driver integrates in, and the probability flow there.

    On a schedule x_t = alpha x_0 + sigma n the flow is dx/dt = a x + b D with

        a = sigma'/sigma,   b = alpha' - alpha sigma'/sigma.

    The schedule's own time and frame, as in score-SDE: for EDM that is sigma, for VE ln sigma up to a factor, for a flow
    dx/dt is the velocity. The label of a :class:`Discrete` table is no smooth time, so there the flow is that of EDM.
    """

    schedule: NoiseSchedule

    @classmethod
    def of(cls, schedule: NoiseSchedule) -> Clock:
        return cls(EDM(schedule.sigma_min, schedule.sigma_max) if isinstance(schedule, Discrete) else schedule)

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(alpha, sigma, a, b) at times ``t``, float64 of its shape."""
        with torch.enable_grad():
            time = t.detach().double().requires_grad_()
            alpha, sigma = self.schedule.alpha(time), self.schedule.sigma(time)
            (d_sigma,) = torch.autograd.grad(sigma.sum(), time, retain_graph=True)
            d_alpha = torch.zeros_like(time)
            if alpha.requires_grad:
                (d_alpha,) = torch.autograd.grad(alpha.sum(), time)
        alpha, sigma = alpha.detach(), sigma.detach()
        a = d_sigma / sigma
        return alpha, sigma, a, d_alpha - alpha * a


Numbers = dict[Late, Any]
Weights = tuple[list[Tensor], list[Tensor]]


@dataclass(frozen=True, eq=False)
class Attempt:
    """A compiled attempt in the variable "t" (time) or "lam" (half log-SNR).

    ``numbers(clock, s, t)`` gives its late numbers for steps from positions ``s`` to ``t`` (float64 [n]), and the weights
    with which div D of each stage enters the integral of the divergence, and the error of that integral.
    ``order`` is the order of the error estimate in the step; ``scale`` says what errors are measured against.
    """

    name: str
    program: Program
    numbers: Callable[[Clock, Tensor, Tensor], tuple[Numbers, Weights]]
    order: int
    fsal: bool
    scale: Literal["hairer", "dpm"]
    variable: Literal["t", "lam"]


def _nominal() -> Trace:
    p = Trace(Grid([2.0, 1.0]))  # the numbers of these two levels are never used: the attempt's own are late
    p.consistent = False
    return p


@cache
def runge_kutta(tableau: Tableau) -> Attempt:
    """One step of an embedded pair for dx/dt = a(t) x + b(t) D as a program.

    X_i = x + sum_j A_ij k_j,  k_i = (h a_i) X_i + (h b_i) D(X_i, t_i),  x_new = x + sum b_i k_i,  error = sum e_i k_i.
    """
    p, n = _nominal(), tableau.stages
    levels = [Level(Late(f"alpha{i}"), Late(f"sigma{i}")) for i in range(n)]
    gains = [(Late(f"ha{i}"), Late(f"hb{i}")) for i in range(n)]
    end = Level(1.0, 1.0, None, 1)
    x = p.start()
    slopes: list[Form] = []
    for i in range(n):
        point = x
        for weight, slope in zip(tableau.a[i], slopes, strict=True):
            point = point + weight * slope
        if i == n - 1 and tableau.fsal:
            point = p.land(point, end)
        d = p.denoise(point, levels[i])
        slopes.append(p.keep(gains[i][0] * point + gains[i][1] * d))
    if not tableau.fsal:
        step = x
        for weight, slope in zip(tableau.b, slopes, strict=True):
            step = step + weight * slope
        p.land(step, end)
    error = Form({})
    for weight, slope in zip(tableau.error, slopes, strict=True):
        error = error + weight * slope
    program = p.program(error, name=tableau.name)
    nodes = torch.tensor(tableau.c, dtype=torch.float64)[:, None]

    def numbers(clock: Clock, t: Tensor, end: Tensor) -> tuple[Numbers, Weights]:
        times = t + nodes * (end - t)
        times[nodes[:, 0] == 1] = end  # exactly, not t + (end - t)
        alpha, sigma, a, b = clock.levels(times)
        h = end - t
        known: Numbers = {}
        for i in range(n):
            known |= {levels[i].alpha: alpha[i], levels[i].sigma: sigma[i]}
            known |= {gains[i][0]: h * a[i], gains[i][1]: h * b[i]}
        return known, (
            [w * h * b[i] for i, w in enumerate(tableau.b)],
            [w * h * b[i] for i, w in enumerate(tableau.error)],
        )

    return Attempt(tableau.name, program, numbers, tableau.error_order, tableau.fsal, "hairer", "t")


@cache
def dpm_solver(order: int) -> Attempt:
    """DPM-Solver-12 or -23 (arXiv:2206.00927, Appendix C): a step of order 2 or 3 in lam with the step of one order less
    from the same evaluations.

    With h = lam_t - lam_s, K_1(h) = e^h - 1 - h, and inner points u, v at r1 h and r2 h by DDIM and a correction:

        12:  low = DDIM,   high = low - sigma_t (e^h - 1) (e_u - e),                                   r1 = 1/2
        23:  low = DDIM - sigma_t (e^h - 1)/(2 r1) (e_u - e),  high = DDIM - sigma_t K_1/(h r2) (e_v - e),  r1, r2 = 1/3, 2/3
    """
    p = _nominal()
    s, t = Level(Late("alpha_s"), Late("sigma_s")), Level(Late("alpha_t"), Late("sigma_t"), None, 1)
    h = t.lam - s.lam
    x = p.start()
    d = p.denoise(x, s)
    e, base = eps_of(x, d, s), ddim_step(x, d, s, t)
    r1, r2 = (0.5, 1.0) if order == 2 else (1 / 3, 2 / 3)
    u = _between(s, t, r1)
    x_u = p.keep(ddim_step(x, d, s, u))
    slope = p.keep(eps_of(x_u, p.denoise(x_u, u), u) - e)
    second = base - t.sigma * expm1(h) / (2 * r1) * slope
    if order == 2:
        low, high = base, second
    else:
        v = _between(s, t, r2)
        x_v = p.keep(ddim_step(x, d, s, v) - v.sigma * r2 / r1 * exp_moment(1, r2 * h, data=False) / (r2 * h) * slope)
        curve = eps_of(x_v, p.denoise(x_v, v), v) - e
        low, high = second, base - t.sigma * exp_moment(1, h, data=False) / (h * r2) * curve
    p.land(high, t)
    program = p.program(low - high, name=f"dpm_solver_{order - 1}{order}")

    def numbers(clock: Clock, start: Tensor, end: Tensor) -> tuple[Numbers, Weights]:
        time = clock.schedule.time(torch.exp(-torch.stack([start, end])))
        alpha, sigma, _, _ = clock.levels(time)
        return {s.alpha: alpha[0], s.sigma: sigma[0], t.alpha: alpha[1], t.sigma: sigma[1]}, ([], [])

    return Attempt(program.name, program, numbers, order, False, "dpm", "lam")


def _between(s: Level, t: Level, r: float) -> Level:
    """The level at lam_s + r h. Its signal scale is interpolated geometrically: the denoiser is told sigma/alpha."""
    alpha = exp((1 - r) * log(s.alpha) + r * log(t.alpha))
    return Level(alpha, alpha * exp(-(s.lam + r * (t.lam - s.lam))))
