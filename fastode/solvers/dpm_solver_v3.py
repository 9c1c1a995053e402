"""DPM-Solver-v3: a predictor-corrector in the parameterisation that statistics of the model say is the flattest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastode.program import Form, Program, Trace
from fastode.schedules.grid import Grid, Level
from fastode.schedules.spacing import diffusion_time
from fastode.solvers.coefficients import check_choice, check_order, exp_moment, lagrange_basis

CHUNK = 2**22
"""Numbers of one table that are integrated at a time."""


@dataclass(frozen=True, eq=False)
class Statistics:
    """Empirical model statistics l, s, b [N + 1, *sample] on N + 1 levels uniform in ``lam`` [N + 1], noise first; float64.

    With y = x/alpha, f = e^-lam eps - l y is as insensitive to x as a diagonal l can make it, and along the flow its
    derivative is s f + b as nearly as an element-wise regression can make it. Axes of size 1 are shared by all elements.
    Raises ``ValueError`` for tables that do not fit each other, are not finite, or are not uniform.
    """

    lam: Tensor
    l: Tensor  # noqa: E741 (the paper's name)
    s: Tensor
    b: Tensor

    def __post_init__(self) -> None:
        for name in ("lam", "l", "s", "b"):
            value = getattr(self, name).detach().to("cpu", torch.float64)
            object.__setattr__(self, name, value)
            if not bool(torch.isfinite(value).all()):
                at = int((~torch.isfinite(value)).reshape(len(value), -1).any(1).nonzero()[0])
                raise ValueError(f"{name}: the statistics are not finite at level {at} of {len(value) - 1}")
        n = len(self.lam) - 1
        if n < 1 or self.lam.ndim != 1:
            raise ValueError(f"lam: need at least two levels in one dimension, got shape {list(self.lam.shape)}")
        steps = self.lam.diff()
        if not float(steps[0]) > 0 or float((steps - steps[0]).abs().max()) > 1e-8 * float(steps[0]):
            raise ValueError("lam: must increase by the same step everywhere")
        for name in ("l", "s", "b"):
            shape = getattr(self, name).shape
            if shape != self.l.shape or shape[0] != n + 1:
                raise ValueError(f"{name}: must be [{n + 1}, *sample] like l, got shape {list(shape)}")

    @property
    def step(self) -> float:
        return float(self.lam[-1] - self.lam[0]) / (len(self.lam) - 1)

    def position(self, lam: float) -> float:
        """Where ``lam`` lies among the levels, 0 .. N. Raises ``ValueError`` outside, a rounding allowed."""
        n = len(self.lam) - 1
        at = (lam - float(self.lam[0])) / (float(self.lam[-1]) - float(self.lam[0])) * n
        if not -1e-3 <= at <= n + 1e-3:
            low, high = (math.exp(-float(v)) for v in (self.lam[-1], self.lam[0]))
            raise ValueError(
                f"grid: the statistics cover sigma/alpha from {high:.6g} down to {low:.6g}, got {math.exp(-lam):.6g}"
            )
        return min(max(at, 0.0), float(n))

    def at(self, positions: Tensor, name: str, *, cubic: bool = False) -> Tensor:
        """The table ``name`` at ``positions`` [m], interpolated: [m, *sample]."""
        table = getattr(self, name)
        n = len(table) - 1
        k = positions.floor().clamp(0, n - 1).long()
        r = (positions - k).reshape(-1, *[1] * (table.ndim - 1))
        if not cubic:
            return table[k] + r * (table[k + 1] - table[k])
        # four points, fewer at the ends, where the outer ones are extrapolated linearly
        first, last = (k == 0).reshape(r.shape), (k == n - 1).reshape(r.shape)
        before = torch.where(first, 2 * table[k] - table[k + 1], table[(k - 1).clamp(min=0)])
        after = torch.where(last, 2 * table[k + 1] - table[k], table[(k + 2).clamp(max=n)])
        p, q = table[k], table[k + 1]
        return (
            -r * (r - 1) * (r - 2) / 6 * before
            + (r + 1) * (r - 1) * (r - 2) / 2 * p
            - (r + 1) * r * (r - 2) / 2 * q
            + (r + 1) * r * (r - 1) / 6 * after
        )


@dataclass(frozen=True)
class Interval:
    """Integrals over one step from s: L = int l, S = int s, B = int e^-S b, E_k = int e^(L+S) u^k/k!, J = int e^(L+S) B.

    All start at 0 at s, so no large cumulative sums are subtracted. Numbers, or tensors [*sample].
    """

    L: Any
    S: Any
    B: Any
    E: tuple[Any, ...]
    J: Any


def dpm_solver_v3(
    grid: Any,
    statistics: Statistics,
    *,
    order: int = 3,
    p_pseudo: bool = False,
    corrector: bool = True,
    c_pseudo: bool = False,
    lower_order_final: bool = True,
    half: str | None = None,
    degenerate: bool = False,
    refine: int = 10,
    interpolation: str = "linear",
    afs: bool = False,
) -> Program:
    """DPM-Solver-v3 (arXiv:2310.13268): NFE 1 per step, step size in lam, orders 1 to 3 (4 works), per-element weights.

    With f_k the parameterised output at node k, g_k = e^(S_s - S_k) f_k - e^(S_s) (B_k - B_s) and its derivatives g^(k) at s
    by differences,

        x_t = alpha_t e^-L (x_s/alpha_s - J - sum_k E_k g^(k)),      f = (1 - l) x/alpha - D = (sigma eps - l x)/alpha

    (integrals from s, see :class:`Interval`). f is formed from the denoised estimate, the same number as from the noise and
    about 100 times better conditioned. ``corrector``: the evaluation at a predicted point also redoes the step to it, with
    the order of its predictor (``c_pseudo``: one more, by one-sided differences); f is kept. ``p_pseudo``: one-sided
    differences in the predictor. ``half="late"`` corrects in the second half of time only, as the paper says for strong
    guidance, ``"early"`` in the first, as its code does. ``degenerate``: l = 1, s = b = 0, the exponential Adams-Bashforth
    method of ``dpm_solver_pp(exact=True)``.

    ``refine``: levels per level of the statistics on which they are integrated (trapezoid); between levels they are
    interpolated, "linear" or "cubic". 1 is the published quadrature on the statistics' own levels, on which the grid must
    then lie (:func:`snap`): at 5 steps and 120 levels it costs 20 to 80 times the error. The program's option
    "largest_weight" tells how much a rounding of the network can grow: some 10 where it is harmless, thousands at order 3 in
    5 steps. Raises ``ValueError`` naming the argument. Not exact on a single data point (``consistent`` is False), since the
    statistics are the model's.
    """
    check_order(order, (1, 2, 3, 4), "dpm_solver_v3")
    check_choice("interpolation", interpolation, ("linear", "cubic"))
    if half not in (None, "late", "early"):
        raise ValueError(f"half: must be None, 'late' or 'early', got {half!r}")
    if isinstance(refine, bool) or not isinstance(refine, int) or refine < 1:
        raise ValueError(f"refine: must be a whole number of at least 1, got {refine!r}")
    levels = Grid.of(grid)
    p = Trace(levels, afs=afs)
    p.consistent = False
    table = _Table(levels, statistics, order, refine, interpolation == "cubic", degenerate)
    clock = diffusion_time(levels.schedule)
    middle = float(clock.time(levels[0].rho)) / 2

    def corrects(level: Level) -> bool:
        late = float(clock.time(level.rho)) <= middle
        return corrector and (half is None or (late if half == "late" else not late))

    x, outputs = p.start(), []  # outputs: f at level 0, 1, ...
    last: tuple[Form, int] | None = None  # the state at the level before, and the order of the step from it
    for m, (_, s, t) in enumerate(p.grid.windows()):
        d = p.denoise(x, s)
        outputs.append(p.keep(((1 - table.l(m)) / s.alpha) * x - d))
        if last is not None and corrects(s):
            q = last[1] + c_pseudo
            if q > 1:
                nodes = [m - 1, m, *range(m - 2, m - q, -1)]
                x = p.land(_step(p, table, last[0], outputs, m - 1, m, nodes, c_pseudo), s)
        k = min(m + 1, order, levels.steps - m if lower_order_final else order)
        last = (x, k)
        x = p.land(_step(p, table, x, outputs, m, m + 1, range(m, m - k, -1), p_pseudo), t)
    options = {
        "order": order, "p_pseudo": p_pseudo, "corrector": corrector, "c_pseudo": c_pseudo,
        "lower_order_final": lower_order_final, "half": half, "degenerate": degenerate, "largest_weight": table.largest,
    }  # fmt: skip
    return p.program(x, name="dpm_solver_v3", options=options)


def _step(
    p: Trace, table: _Table, x: Form, outputs: Sequence[Form], s: int, t: int, nodes: Sequence[int], pseudo: bool
) -> Form:
    """Folded form of the step from level ``s`` to ``t``: a x + sum_j w_j f_j + c, with f at ``nodes``, the first being s."""
    level = p.grid
    alpha_s, alpha_t = float(level[s].alpha), float(level[t].alpha)
    span = table.interval(s, t)
    shrink = _exp(-span.L)
    offsets = [float(level[j].lam - level[s].lam) for j in nodes]
    derivatives = _pseudo(offsets) if pseudo else _true(offsets)
    made = (alpha_t / alpha_s * shrink) * x
    constant = -alpha_t * shrink * span.J
    for j, node in enumerate(nodes):
        kappa = sum((span.E[k] * row[j] for k, row in enumerate(derivatives) if k), span.E[0] if j == 0 else 0.0)
        growth, shift = table.relative(s, node)
        weight = -alpha_t * shrink * kappa * growth
        table.largest = max(table.largest, float(torch.as_tensor(weight).abs().max()))
        made = made + weight * outputs[node]
        constant = constant + alpha_t * shrink * kappa * shift
    return made + constant * p.one()


def _true(offsets: Sequence[float]) -> list[list[float]]:
    """[k][j]: k-th derivative at offset 0 of the polynomial through all nodes, from its value at node j."""
    basis = lagrange_basis(offsets)
    return [[math.factorial(k) * float(poly[k]) for poly in basis] for k in range(len(offsets))]


def _pseudo(offsets: Sequence[float]) -> list[list[float]]:
    """[k][j]: k! times the divided difference on the first k + 1 nodes."""
    n = len(offsets)
    return [
        [
            math.factorial(k) / math.prod(offsets[j] - offsets[i] for i in range(k + 1) if i != j) if j <= k else 0.0
            for j in range(n)
        ]
        for k in range(n)
    ]


class _Table:
    """Integrals between the levels of a grid, and l there."""

    def __init__(
        self, grid: Grid, statistics: Statistics, order: int, refine: int, cubic: bool, degenerate: bool
    ) -> None:
        self._statistics, self._refine, self._cubic = statistics, refine, cubic
        self._degenerate, self._orders = degenerate, order + 1
        self.largest = 0.0
        self._lam = [float(level.lam) for level in grid]
        bad = next((i for i, v in enumerate(self._lam) if not math.isfinite(v)), None)
        if bad is not None:
            raise ValueError(
                f"grid: lam must be finite at every level, got sigma/alpha {float(grid[bad].rho):g} at {bad}"
            )
        self._at = [statistics.position(v) for v in self._lam]
        if refine == 1 and (off := [i for i, v in enumerate(self._at) if abs(v - round(v)) > 1e-6]):
            raise ValueError(
                f"refine: on the statistics' own levels (refine=1) the grid must lie on them; level {off[0]} is at "
                f"{self._at[off[0]]:.4f}: use snap(grid, statistics)"
            )
        self._steps = [self._integrate(i) for i in range(grid.steps)]

    def l(self, level: int) -> Any:  # noqa: E743
        if self._degenerate:
            return 1.0
        where = torch.tensor([self._at[level]], dtype=torch.float64)
        return _shared(self._statistics.at(where, "l", cubic=self._cubic)[0])

    def interval(self, s: int, t: int) -> Interval:
        assert t == s + 1
        return self._steps[s]

    def relative(self, s: int, node: int) -> tuple[Any, Any]:
        """(e^(S_s - S_node), e^(S_s) (B_node - B_s)): from f at ``node`` to g relative to level ``s``."""
        if node == s:
            return 1.0, 0.0
        if node == s + 1:
            return _exp(-self._steps[s].S), self._steps[s].B
        growth, shift = 1.0, 0.0
        for i in range(s - 1, node - 1, -1):
            growth = growth * _exp(self._steps[i].S)  # e^(S_s - S_i)
            shift = shift - growth * self._steps[i].B
        return growth, shift

    def _integrate(self, i: int) -> Interval:
        h = self._lam[i + 1] - self._lam[i]
        if self._degenerate and self._refine > 1:
            grow = math.exp(h)
            return Interval(h, 0.0, 0.0, tuple(grow * exp_moment(k, h, data=True) for k in range(self._orders)), 0.0)
        first, last = self._at[i], self._at[i + 1]
        if self._refine == 1:
            where = torch.arange(round(first), round(last) + 1, dtype=torch.float64)
        else:
            count = max(1, math.ceil((last - first) * self._refine - 1e-9))
            where = torch.linspace(first, last, count + 1, dtype=torch.float64)
        return integrate(self._statistics, where, h, self._orders, cubic=self._cubic, degenerate=self._degenerate)


def integrate(
    statistics: Statistics,
    where: Tensor,
    h: float,
    orders: int = 4,
    *,
    cubic: bool = False,
    degenerate: bool = False,
) -> Interval:
    """Integrals by cumulative trapezoids over evenly spaced ``where`` [m] (positions among the levels), a length ``h`` of
    lam; in float64, a block of elements at a time."""
    shape = statistics.l.shape[1:]
    tables = [getattr(statistics, n).reshape(len(statistics.lam), -1) for n in ("l", "s", "b")]
    size = tables[0].shape[1]
    u = torch.linspace(0, h, len(where), dtype=torch.float64)[:, None]
    dx = h / (len(where) - 1)
    made: list[list[Tensor]] = []
    block = max(1, CHUNK // len(where))
    for start in range(0, size, block):
        part = Statistics(statistics.lam, *(t[:, start : start + block] for t in tables))
        l, s, b = (part.at(where, n, cubic=cubic) for n in ("l", "s", "b"))  # noqa: E741
        if degenerate:
            l, s, b = torch.ones_like(l), torch.zeros_like(s), torch.zeros_like(b)  # noqa: E741
        big_l, big_s = _cumulative(l, dx), _cumulative(s, dx)
        big_b = _cumulative(torch.exp(-big_s) * b, dx)
        weight = torch.exp(big_l + big_s)
        moments = [torch.trapezoid(weight * u**k / math.factorial(k), dx=dx, dim=0) for k in range(orders)]
        made.append([big_l[-1], big_s[-1], big_b[-1], torch.trapezoid(weight * big_b, dx=dx, dim=0), *moments])
    whole = [_shared(torch.cat(parts).reshape(shape)) for parts in zip(*made, strict=True)]
    for name, value in zip(("L", "S", "B", "J", *(f"E{k}" for k in range(orders))), whole, strict=True):
        if not bool(torch.isfinite(torch.as_tensor(value)).all()):
            raise ValueError(f"statistics: the integral {name} is not finite; l or s is too large")
    return Interval(whole[0], whole[1], whole[2], tuple(whole[4:]), whole[3])


def snap(grid: Grid, statistics: Statistics) -> Grid:
    """``grid`` with every level moved to the nearest one of the statistics, on its schedule: what published code samples on.

    Raises ``ValueError`` where two levels fall together.
    """
    if grid.schedule is None:
        raise ValueError("grid: needs a schedule, which says what alpha and sigma are at the moved levels")
    at = [round(statistics.position(float(level.lam))) for level in grid]
    for i, (a, b) in enumerate(pairwise(at)):
        if a >= b:
            raise ValueError(f"grid: levels {i} and {i + 1} fall on the same level of the statistics; take more levels")
    rho = torch.exp(-statistics.lam[at])
    same = bool((grid.alpha == grid.alpha[0]).all())
    time = grid.schedule.time(rho)
    alpha = grid.alpha[:1].expand(len(rho)) if same else grid.schedule.alpha(time)
    return Grid(alpha * rho, alpha, time, grid.schedule, f"{grid.name} snapped")


def _cumulative(y: Tensor, dx: float) -> Tensor:
    return torch.cat([torch.zeros_like(y[:1]), torch.cumulative_trapezoid(y, dx=dx, dim=0)])


def _shared(value: Tensor) -> Any:
    return float(value) if value.numel() == 1 else value


def _exp(value: Any) -> Any:
    return torch.exp(value) if isinstance(value, Tensor) else math.exp(value)
