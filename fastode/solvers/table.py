"""Tables of learned numbers, played as they are, and the published methods that are such tables.

Everything that evaluates the network a fixed number of times and is linear in between is one table. With x_k the point of
evaluation k, x_K the result, and m_k = D(gain_k x_k; told_k sigma_k):

    x_0 = first * start,        x_{k+1} = sum_{j<=k} A_kj x_j + sum_{j<=k} B_kj m_j

``told`` scales the noise level that the network is told (its preconditioning with it); the arithmetic of the step stays on
the point's own level. That is how AMED, EPD and DyWeight use their time factors, and LD3, S4S and GS their time offsets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastode.program import Form, Program, Trace
from fastode.scalar import Late, Scalar, is_zero, sqrt
from fastode.schedules.grid import Grid, Level
from fastode.solvers.coefficients import ADAMS_BASHFORTH, combine

Row = tuple[Scalar, ...]


@dataclass(frozen=True, eq=False)
class LearnedTable:
    """The numbers of a table with K evaluations; floats, or float64 tensors without dimensions where they are learned.

    ``a``, ``b``: K rows, row k with k + 1 entries. ``alpha``, ``sigma``: the frame each x_k lives in. ``told``, ``gain``: K
    factors. ``first``: of the start (1 without an analytical first step). ``rows[i]``: which x_k is the state at grid
    level i; -1 is the start itself. A table holds for its grid, its first step and its range of sigma only.
    """

    a: tuple[Row, ...]
    b: tuple[Row, ...]
    alpha: Row
    sigma: Row
    told: Row
    gain: Row
    rows: tuple[int, ...]
    first: Scalar = 1.0

    def __post_init__(self) -> None:
        n = len(self.a)
        for name in ("b", "alpha", "sigma", "told", "gain"):
            if len(getattr(self, name)) != n:
                raise ValueError(f"{name}: must have {n} entries like a, got {len(getattr(self, name))}")
        for name in ("a", "b"):
            for k, row in enumerate(getattr(self, name)):
                if len(row) != k + 1:
                    raise ValueError(f"{name}: row {k} must have {k + 1} entries, got {len(row)}")
        if any(not -1 <= r <= n for r in self.rows):
            raise ValueError(f"rows: must be in -1 .. {n}, got {self.rows}")
        if is_zero(self.first):
            raise ValueError("first: must not be 0")

    @property
    def nfe(self) -> int:
        return len(self.a)

    def program(self, grid: Grid, *, name: str = "table", options: Mapping[str, Any] | None = None) -> Program:
        """Compile on the grid it was made for. Raises ``ValueError`` if it does not name a state for every level."""
        if len(self.rows) != len(grid):
            raise ValueError(f"rows: name {len(self.rows)} states, the grid has {len(grid)} levels")
        p = Trace(grid)
        p.consistent = False  # learned numbers need not be exact on a single data point
        level_of = {r: grid[i] for i, r in enumerate(self.rows)}
        start = p.start()
        points: list[Form] = []
        outputs: list[Form] = []
        x = self.first * start
        for k in range(self.nfe):
            x = p.land(x, level_of[k]) if k in level_of else p.keep(x)
            points.append(x)
            told = self.sigma[k] if _is_one(self.told[k]) else self.told[k] * self.sigma[k]
            y = x if _is_one(self.gain[k]) else self.gain[k] * x
            outputs.append(p.denoise(y, Level(self.alpha[k], told)))
            x = combine(self.a[k], points) + combine(self.b[k], outputs)
        x = p.land(x, level_of[self.nfe]) if self.nfe in level_of else p.keep(x)
        return p.program(x, name=name, options=options)

    def tensors(self) -> dict[str, Tensor]:
        """As numbers for an artifact: float64, ``a`` and ``b`` [K, K] with zeros above the diagonal."""
        n = self.nfe
        square = {"a": torch.zeros(n, n, dtype=torch.float64), "b": torch.zeros(n, n, dtype=torch.float64)}
        for name, matrix in square.items():
            for k, row in enumerate(getattr(self, name)):
                matrix[k, : k + 1] = torch.tensor([number(c) for c in row], dtype=torch.float64)
        flat = {
            name: torch.tensor([number(c) for c in getattr(self, name)], dtype=torch.float64)
            for name in ("alpha", "sigma", "told", "gain")
        }
        first = torch.tensor(number(self.first), dtype=torch.float64)
        return {**square, **flat, "first": first, "rows": torch.tensor(self.rows, dtype=torch.int64)}

    @classmethod
    def of_tensors(cls, numbers: Mapping[str, Tensor]) -> LearnedTable:
        """Read what :meth:`tensors` made. Raises ``ValueError`` naming what is missing or not finite."""
        for name in ("a", "b", "alpha", "sigma", "told", "gain", "first", "rows"):
            if name not in numbers:
                raise ValueError(f"{name}: this table has none")
            if not bool(torch.isfinite(numbers[name]).all()):
                raise ValueError(f"{name}: must be finite")
        a, b = numbers["a"], numbers["b"]
        if a.ndim != 2 or a.shape != b.shape or a.shape[0] != a.shape[1]:
            raise ValueError(f"a, b: must be square and alike, got {list(a.shape)} and {list(b.shape)}")
        flat: dict[str, Row] = {name: tuple(numbers[name].tolist()) for name in ("alpha", "sigma", "told", "gain")}
        return cls(
            a=tuple(tuple(row[: k + 1]) for k, row in enumerate(a.tolist())),
            b=tuple(tuple(row[: k + 1]) for k, row in enumerate(b.tolist())),
            rows=tuple(int(r) for r in numbers["rows"].tolist()),
            first=float(numbers["first"]),
            **flat,
        )


def tabulate(program: Program) -> LearnedTable:
    """Any deterministic program as a table: everything stored in between is written out in points and outputs.

    Differentiable where the program is. Raises ``ValueError`` for programs with noise, added constants, late or
    per-element numbers, or a grid level at which nothing is evaluated.
    """
    if program.draws or program.late:
        raise ValueError(f"solver: {program.name} has noise or late numbers, a table has not")
    n = program.nfe
    start: tuple[str, int] = ("start", 0)
    known: dict[int, dict[tuple[str, int], Scalar]] = {0: {start: 1.0}}
    made: list[dict[tuple[str, int], Scalar]] = []

    def write(table: Any, stage: int) -> None:
        for value, form in table.rows():
            total: dict[tuple[str, int], Scalar] = {}
            for atom, c in form.terms.items():
                if atom.kind == "one" or (isinstance(c, Tensor) and c.ndim):
                    raise ValueError(f"solver: {program.name} adds constants or differs between elements")
                parts: dict[tuple[str, int], Scalar]
                parts = known[atom.index] if atom.kind == "value" else {("m", stage): 1.0}
                for key, w in parts.items():
                    term = c if _is_one(w) else c * w
                    total[key] = total[key] + term if key in total else term
            known[value] = total

    write(program.init, -1)
    for k, stage in enumerate(program.stages):
        made.append(known[stage.net_in])
        known[stage.net_in] = {("x", k): 1.0}
        write(stage.table, k)
    made.append(known[program.result])
    if set(made[0]) != {start}:
        raise ValueError(f"solver: {program.name} does not start from its first level")
    first = made[0][start]
    at = {s.level.index: k for k, s in reversed(list(enumerate(program.stages))) if s.level.index is not None}
    at.setdefault(0, -1)
    at.setdefault(len(program.grid) - 1, n)
    missing = [i for i in range(len(program.grid)) if i not in at]
    if missing:
        raise ValueError(f"solver: {program.name} evaluates nothing at grid level {missing[0]}")

    def entry(parts: dict[tuple[str, int], Scalar], kind: str, j: int) -> Scalar:
        found = parts.get((kind, j), 0.0)
        if kind == "x" and j == 0 and start in parts:
            found = found + parts[start] / first if not is_zero(found) else parts[start] / first
        return found

    return LearnedTable(
        a=tuple(tuple(entry(made[k + 1], "x", j) for j in range(k + 1)) for k in range(n)),
        b=tuple(tuple(entry(made[k + 1], "m", j) for j in range(k + 1)) for k in range(n)),
        alpha=tuple(s.level.alpha for s in program.stages),
        sigma=tuple(s.level.sigma for s in program.stages),
        told=(1.0,) * n,
        gain=(1.0,) * n,
        rows=tuple(at[i] for i in range(len(program.grid))),
        first=first,
    )


def retold(program: Program, told: Sequence[Scalar] | Tensor) -> Program:
    """``program`` whose evaluation k is told ``told[k]`` times its noise level; the arithmetic of the steps stays.

    Raises ``ValueError`` unless there is one factor for each evaluation.
    """
    factors = list(told)
    if len(factors) != program.nfe:
        raise ValueError(f"told: need one factor for each of {program.nfe} evaluations, got {len(factors)}")
    plain = [float(f) if isinstance(f, Tensor) and not f.requires_grad else f for f in factors]
    stages = tuple(
        s if _is_one(f) else replace(s, level=Level(s.level.alpha, f * s.level.sigma, None, s.level.index))
        for s, f in zip(program.stages, plain, strict=True)
    )
    return replace(program, stages=stages, consistent=False)


# -- published tables ------------------------------------------------------------------------------------------------------


def epd(
    grid: Any,
    r: Sequence[Any],
    w: Sequence[Any] | None = None,
    c: Sequence[Any] | None = None,
    a: Sequence[Any] | None = None,
    *,
    afs: bool = True,
    plugin_order: int = 1,
) -> Program:
    """EPD-Solver (arXiv:2507.14797): K points per step, all from the direction at its start; NFE (K + 1) steps - afs.

    With t, t' the step's levels in rho and d the direction at t (analytical in the first step with ``afs``):

        tau_k = t'^r_k t^(1-r_k),   x_k = x + (tau_k - t) d,   d_k = (x_k - D(x_k; a_k tau_k)) / tau_k
        x' = x + (t' - t) sum_k w_k c_k d_k

    ``r``, ``w``, ``c``, ``a``: [steps][K]; w sums to 1 in every step (default: equal), c and a default to 1. K = 1 is
    AMED-Solver with one r, c, a for all samples. ``plugin_order`` m > 1 is EPD-Plugin: the points come from Adams-Bashforth
    of order m over the directions at the grid levels. The K evaluations of a step do not depend on each other.
    """
    levels = Grid.of(grid)
    rs = _per_step("r", r, levels.steps)
    points = len(rs[0])
    ws = [[1 / points] * points] * levels.steps if w is None else _per_step("w", w, levels.steps, points)
    cs = [[1.0] * points] * levels.steps if c is None else _per_step("c", c, levels.steps, points)
    told = [[1.0] * points] * levels.steps if a is None else _per_step("a", a, levels.steps, points)
    if plugin_order not in ADAMS_BASHFORTH:
        raise ValueError(f"plugin_order: must be one of {', '.join(map(str, ADAMS_BASHFORTH))}, got {plugin_order!r}")
    p = Trace(levels, afs=afs)
    p.consistent = False
    x, past = p.start(), list[Form]()
    for i, (_, s, t) in enumerate(levels.windows()):
        if s.is_noise or t.is_data:
            raise ValueError("grid: EPD needs finite levels above sigma = 0")
        d = (x - s.alpha * p.denoise(x, s)) / s.sigma
        past = [p.keep(d) if plugin_order > 1 else d, *past][:plugin_order]
        slope = combine(ADAMS_BASHFORTH[len(past)], past)
        total = Form({})
        for k in range(points):
            mid = levels.between(s, t, rs[i][k])
            y = p.keep(mid.alpha * (x / s.alpha + (mid.rho - s.rho) * slope))
            estimate = p.denoise(y, _told(mid, told[i][k]))
            total = total + ws[i][k] * cs[i][k] * ((y - mid.alpha * estimate) / mid.sigma)
        x = p.land(t.alpha * (x / s.alpha + (t.rho - s.rho) * total), t)
    return p.program(x, name="epd", options={"afs": afs, "points": points})


def dyweight(
    grid: Any, weights: Sequence[Any], told: Sequence[Any] | None = None, *, afs: bool = True, epsilon: float = 1e-8
) -> Program:
    """DyWeight (arXiv:2603.11607): free multistep weights on directions, whose sum moves the level the state lives on.

    Step i, with directions d_j = (x_j - D(x_j; s_j tau_j)) / (tau_j + epsilon) and tau_0 = t_0:

        x_{i+1} = x_i + (t_{i+1} - tau_i) sum_j W_ij d_j,      tau_{i+1} = tau_i + (t_{i+1} - tau_i) sum_j W_ij

    ``weights``: one row for each step, oldest direction first, newest last. ``told``: s, one factor for each evaluation
    (with ``afs`` the first direction is analytical and has none). In the EDM frame. NFE one per step, minus afs.
    """
    levels = Grid.of(grid)
    if not bool((levels.alpha == 1).all()):
        raise ValueError("grid: DyWeight tables live in the EDM frame (alpha = 1)")
    if len(weights) != levels.steps:
        raise ValueError(f"weights: need one row for each of {levels.steps} steps, got {len(weights)}")
    count = levels.steps - afs
    factors = [1.0] * count if told is None else [_plain(s) for s in told]
    if len(factors) != count:
        raise ValueError(f"told: need one factor for each of {count} evaluations, got {len(factors)}")
    p = Trace(levels, afs=afs)
    p.consistent = False
    x, past = p.start(), list[Form]()
    tau: Any = levels[0].sigma
    for i, (_, _, t) in enumerate(levels.windows()):
        row = [_plain(v) for v in weights[i]]
        if not 1 <= len(row) <= i + 1:
            raise ValueError(f"weights: row {i} must have 1 to {i + 1} entries, got {len(row)}")
        s = 1.0 if afs and i == 0 else factors[i - afs]
        d = p.keep((x - p.denoise(x, Level(1.0, s * tau, None, i))) / (tau + epsilon))
        past.append(d)
        x = p.land(x + (t.sigma - tau) * combine(row, past[-len(row) :]), t)
        tau = tau + (t.sigma - tau) * sum(row[1:], row[0])
    return p.program(x, name="dyweight", options={"afs": afs})


def generalized(
    program: Program,
    *,
    a: Mapping[tuple[int, int], Scalar] | None = None,
    c: Mapping[tuple[int, int], Scalar] | None = None,
    told: Sequence[Scalar] | None = None,
) -> LearnedTable:
    """GS, the generalised solver (arXiv:2510.17699): additive corrections to a solver's table, and told levels of its own.

    In the frame of unit variance, z_k = x_k / size_k with size^2 = alpha^2 + sigma^2 (rho = sigma/alpha):
    ``a[k, j]``, ``c[k, j]`` are added to the weights of z_j and of output m_j in the step from z_k to z_{k+1} (GS's own signs
    are theirs negated). ``told[k]``: the network is asked at told_k rho_k, about the input rescaled to unit variance there,
    gain = sqrt((1 + (told rho)^2)/(1 + rho^2)), and m = z - (1/told)(gain z - D) in EDM-frame units. All zero and told = 1
    is ``program`` itself; the paper's base is DPM-Solver++(3M) without lower order at the end.
    """
    base = tabulate(program)
    n = base.nfe
    size = [sqrt(al * al + si * si) for al, si in zip(base.alpha, base.sigma, strict=True)]
    last = program.grid[-1]
    size.append(sqrt(last.alpha * last.alpha + last.sigma * last.sigma))
    factors = [1.0] * n if told is None else [_plain(f) for f in told]
    if len(factors) != n:
        raise ValueError(f"told: need one factor for each of {n} evaluations, got {len(factors)}")
    gain: list[Any] = []
    for k, f in enumerate(factors):
        rho = base.sigma[k] / base.alpha[k]
        gain.append(1.0 if _is_one(f) else sqrt((1 + f * f * rho * rho) / (1 + rho * rho)))
    rows_a: list[list[Any]] = [list(row) for row in base.a]
    rows_b: list[list[Any]] = [list(row) for row in base.b]
    for (k, j), v in (a or {}).items():
        _check_place("a", k, j, n)
        rows_a[k][j] = rows_a[k][j] + _plain(v) * size[k + 1] / size[j]
    for (k, j), v in (c or {}).items():
        _check_place("c", k, j, n)
        rows_b[k][j] = rows_b[k][j] + _plain(v) * size[k + 1]
    for k in range(n):
        for j in range(k + 1):
            if not _is_one(factors[j]) and not is_zero(rows_b[k][j]):
                b = rows_b[k][j]
                # m_j = x_j/alpha_j (1 - gain/told) + D/told
                rows_a[k][j] = rows_a[k][j] + b * (1 - gain[j] / factors[j]) / base.alpha[j]
                rows_b[k][j] = b / factors[j]
    return replace(
        base,
        a=tuple(tuple(row) for row in rows_a),
        b=tuple(tuple(row) for row in rows_b),
        told=tuple(factors),
        gain=tuple(gain),
    )


def _per_step(name: str, values: Sequence[Any], steps: int, points: int | None = None) -> list[list[Any]]:
    rows = [list(row) if isinstance(row, (list, tuple)) or _ndim(row) else [row] for row in values]
    if len(rows) != steps:
        raise ValueError(f"{name}: need one row for each of {steps} steps, got {len(rows)}")
    count = len(rows[0]) if points is None else points
    for i, row in enumerate(rows):
        if len(row) != count or not row:
            raise ValueError(f"{name}: row {i} must have {count} numbers, got {len(row)}")
    return [[_plain(v) for v in row] for row in rows]


def _ndim(value: Any) -> int:
    return int(getattr(value, "ndim", 0))


def _check_place(name: str, k: int, j: int, n: int) -> None:
    if not 0 <= j <= k < n:
        raise ValueError(f"{name}: entries are (k, j) with 0 <= j <= k < {n}, got {(k, j)}")


def _told(level: Level, factor: Any) -> Level:
    return level if _is_one(factor) else Level(level.alpha, factor * level.sigma, None, level.index)


def _plain(value: Any) -> Any:
    """A float unless a gradient flows through it."""
    return value if isinstance(value, Late) or (isinstance(value, Tensor) and value.requires_grad) else float(value)


def number(value: Any) -> float:
    """A known number as a float, whether or not it carries a gradient."""
    return float(value.detach()) if isinstance(value, Tensor) else float(value)


def _is_one(value: Any) -> bool:
    return isinstance(value, (int, float)) and value == 1
