"""Weights that several solvers share: integrals of interpolating polynomials, computed in float64.

Interpolation weights are linear functionals of the Lagrange basis. If a functional L has moments ``L[u^k]``, the weight of
node j is ``L[l_j] = sum_k coefficient_k(l_j) L[u^k]``: plain arithmetic on the nodes, so it works for numbers, for tensors
with gradients and for late numbers alike, and needs no linear solve.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastode.program import Form, Trace
from fastode.scalar import Moment, Scalar
from fastode.schedules.grid import Level
from fastode.schedules.noise import Discrete, NoiseSchedule

ADAMS_BASHFORTH: dict[int, tuple[float, ...]] = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
"""Classical equal-step weights, newest evaluation first."""


def ddim_step(x: Form, d: Form, s: Level, t: Level) -> Form:
    """The first-order step x_t = (sigma_t/sigma_s) x + (alpha_t - alpha_s sigma_t/sigma_s) d; exact for constant d.

    Every first-order step is this one, whatever a solver predicts. It needs no logarithm, so it is also the step from
    alpha = 0 and the step to sigma = 0.
    """
    gain = t.sigma / s.sigma
    return gain * x + (t.alpha - s.alpha * gain) * d


def eps_of(x: Form, d: Form, s: Level) -> Form:
    """Noise prediction (x - alpha d) / sigma."""
    return (x - s.alpha * d) / s.sigma


def denoised_of(x: Form, eps: Form, s: Level) -> Form:
    """Denoised estimate (x - sigma eps) / alpha of a noise prediction."""
    return (x - s.sigma * eps) / s.alpha


def is_first_order(s: Level, t: Level) -> bool:
    """True where lam is infinite at one end, so that no expansion in the step size exists."""
    return s.is_noise or t.is_data


def lagrange_basis(nodes: Sequence[Scalar]) -> list[list[Any]]:
    """Monomial coefficients (constant first) of each Lagrange polynomial l_j on ``nodes``."""
    basis = []
    for j, node in enumerate(nodes):
        poly: list[Any] = [1.0]
        for i, other in enumerate(nodes):
            if i == j:
                continue
            scale = node - other
            # multiply by (u - other) / scale
            shifted = [0.0, *poly]
            poly = [(shifted[k] - (other * poly[k] if k < len(poly) else 0.0)) / scale for k in range(len(shifted))]
        basis.append(poly)
    return basis


def functional_weights(nodes: Sequence[Scalar], moments: Sequence[Scalar]) -> list[Any]:
    """Weights w_j with sum_j w_j nodes_j^k = moments_k for k < len(nodes)."""
    return [sum((c * m for c, m in zip(poly, moments, strict=True)), 0.0) for poly in lagrange_basis(nodes)]


def power_moments(h: Scalar, count: int) -> list[Any]:
    """int_0^h u^k du for k < count: with them :func:`functional_weights` gives variable-step Adams-Bashforth weights."""
    return [h ** (k + 1) / (k + 1) for k in range(count)]


def exp_moment(k: int, h: Scalar, *, data: bool) -> Any:
    """int_0^h e^{-(h-u)} u^k/k! du for data prediction, int_0^h e^{h-u} u^k/k! du for noise prediction.

    These are the phi functions of exponential integrators, see :class:`~fastode.scalar.Moment`.
    """
    return Moment(k, -1 if data else 1)(h)


def exp_moments(h: Scalar, count: int, *, data: bool) -> list[Any]:
    """int_0^h e^{-+(h-u)} u^k du, k < count: moments for exponential Adams-Bashforth weights."""
    return [math.factorial(k) * exp_moment(k, h, data=data) for k in range(count)]


def time_weights(clock: NoiseSchedule, nodes: Sequence[Any], s: Any, t: Any, rho_s: Any, rho_t: Any) -> list[Any]:
    """DEIS weights int_s^t l_j(u) drho(u), Lagrange polynomials in the time u of ``clock`` (arXiv:2204.13902, eq. 15).

    By parts, int l drho = [l rho] - int l' rho du: only rho(u) itself is needed, not its derivative. Gauss-Legendre on the
    host; panels end at the knots of tabulated schedules, where rho(u) has kinks.
    """
    start, end = torch.as_tensor(s, dtype=torch.float64), torch.as_tensor(t, dtype=torch.float64)
    x, w = _gauss_legendre()
    cuts = _panels(clock, float(start.detach()), float(end.detach()))
    edges = start + (end - start) * cuts
    half = (edges[1:] - edges[:-1]) / 2
    u = (edges[:-1] + half)[:, None] + half[:, None] * x
    values = clock.rho(u) * half[:, None] * w
    weights = []
    # Polynomials in the local variable v = (u - s)/(t - s) keep the basis well scaled.
    length = end - start
    local = [(torch.as_tensor(n, dtype=torch.float64) - start) / length for n in nodes]
    v = (u - start) / length
    for poly in lagrange_basis(local):
        at_end = sum(poly, start=torch.zeros((), dtype=torch.float64))
        slope = sum((k * c * v ** (k - 1) for k, c in enumerate(poly) if k), start=torch.zeros_like(v))
        weights.append(at_end * rho_t - poly[0] * rho_s - (slope * values).sum() / length)
    keep = any(isinstance(n, Tensor) and n.requires_grad for n in (*nodes, s, t, rho_s, rho_t))
    return weights if keep else [float(w) for w in weights]


def _gauss_legendre() -> tuple[Tensor, Tensor]:
    import numpy

    x, w = numpy.polynomial.legendre.leggauss(32)
    return torch.from_numpy(x), torch.from_numpy(w)


def _panels(clock: NoiseSchedule, start: float, end: float) -> Tensor:
    """Break points in [0, 1] between ``start`` and ``end``."""
    if not isinstance(clock, Discrete):
        return torch.linspace(0, 1, 9, dtype=torch.float64)
    low, high = min(start, end), max(start, end)
    knots = torch.arange(math.floor(low) + 1, math.ceil(high), dtype=torch.float64)
    inner = (knots - start) / (end - start)
    return torch.cat([torch.zeros(1, dtype=torch.float64), inner.sort().values, torch.ones(1, dtype=torch.float64)])


def combine(weights: Sequence[Scalar], forms: Sequence[Form]) -> Form:
    """sum_j weights_j forms_j."""
    total = Form({})
    for w, form in zip(weights, forms, strict=True):
        total = total + w * form
    return total


class History:
    """Evaluations of earlier steps, newest first: (level, stored form). Solvers read the stencil they need from it."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._items: list[tuple[Level, Form]] = []

    def push(self, level: Level, form: Form) -> None:
        self._items = [(level, form), *self._items][: self._size]

    def __len__(self) -> int:
        return len(self._items)

    def forms(self, count: int) -> list[Form]:
        return [form for _, form in self._items[:count]]

    def levels(self, count: int) -> list[Level]:
        return [level for level, _ in self._items[:count]]

    def replace(self, form: Form) -> None:
        """Another form in the place of the newest one."""
        self._items[0] = (self._items[0][0], form)

    def reach(self, count: int) -> int:
        """How many of the newest ``count`` lie at finite lam; a level with alpha = 0 carries no node to interpolate on."""
        usable = 0
        for level, _ in self._items[:count]:
            if level.is_noise:
                break
            usable += 1
        return usable


def settle(p: Trace, history: History, x: Form, d: Form, s: Level, *, data: bool) -> Form:
    """The denoised estimate to step from. That is ``d``, unless the trace compensates the newest entry of ``history``,
    which is then replaced for good; ``data``: the history holds denoised estimates, else noise predictions."""
    stored = history.forms(1)[0]
    used = p.compensated(stored, s)
    if used is stored:
        return d
    history.replace(used)
    return used if data else denoised_of(x, used, s)


def history_of(p: Trace, size: int, *, data: bool) -> History:
    """The history that a multistep formula starts with: empty, or the evaluations that the run has made before it.

    ``data``: it holds denoised estimates; otherwise noise predictions.
    """
    history = History(size)
    for level, x, d, _ in reversed(p.past(size - 1, quiet=not data)):
        history.push(level, d if data else p.keep(eps_of(x, d, level)))
    return history


def check_order(order: int, allowed: Sequence[int], solver: str) -> int:
    if isinstance(order, bool) or order not in allowed:
        raise ValueError(f"order: {solver} has orders {', '.join(map(str, allowed))}, got {order!r}")
    return order


def check_choice(name: str, value: str, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise ValueError(f"{name}: must be {' or '.join(repr(a) for a in allowed)}, got {value!r}")
    return value


def check_unit(name: str, value: float, *, low: float = 0.0, high: float = 1.0) -> float:
    if isinstance(value, (int, float)) and not (low < value <= high):
        raise ValueError(f"{name}: must be in ({low:g}, {high:g}], got {value!r}")
    return value
