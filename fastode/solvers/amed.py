"""AMED-Solver, and AMED as a plug-in of other solvers: one learned evaluation point inside every step.

arXiv:2312.00094. Trajectories almost lie in a plane, so that in every step from t to t' one point tau has nearly the mean
direction of the whole step. A small network, or a table, chooses it: tau = t'^r t^(1-r), with r in (0, 1) per sample; it may
also correct the length of the step by c = ``scale_dir`` and the noise level that the network is told by a = ``scale_time``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from fastode.program import Form, Late, Trace
from fastode.schedules.grid import Grid, Level
from fastode.solvers.coefficients import check_unit, ddim_step, eps_of, is_first_order
from fastode.solvers.solver import Solver

OUTPUT = "bottleneck"
Numbers = tuple[Any, Any, Any]


def amed(
    p: Trace,
    *,
    r: float | Sequence[float] = 0.5,
    scale_dir: float | Sequence[float] = 1.0,
    scale_time: float | Sequence[float] = 1.0,
    predictor: Any = None,
) -> Form:
    """AMED-Solver (arXiv:2312.00094, eq. 11): order 2, NFE 2 per step, step size in rho = sigma / alpha.

    In the EDM frame, with e = (x - D(x, t)) / t and tau = t'^r t^(1-r):

        y = x + (tau - t) e,      x' = x + c (t' - t) (y - D(y, a tau)) / tau

    ``r``, ``scale_dir`` = c and ``scale_time`` = a are numbers, one for all steps or one per step, or come from
    ``predictor`` (:mod:`fastode.nets.predictor`), then per sample. r = 1/2, c = a = 1 is DPM-Solver-2. A step to sigma = 0
    or from alpha = 0 is a DDIM step.
    """
    ask = _source(p, r, scale_dir, scale_time, predictor)
    x = p.start()
    for i, (_, s, t) in enumerate(p.grid.windows()):
        if is_first_order(s, t):
            x = p.land(ddim_step(x, p.denoise(x, s), s, t), t)
            continue
        numbers, bind = ask(i, s, t)
        d = p.denoise(x, s)
        bind()
        r_i, c, a = numbers
        u = p.grid.between(s, t, r_i)
        y = p.keep(ddim_step(x, d, s, u))
        change = c * (t.rho - s.rho)
        base = p.keep(t.alpha * (x / s.alpha + (change / u.sigma) * y))  # one buffer instead of x and y
        x = p.land(base - (t.alpha * change / u.rho) * p.denoise(y, told(u, a)), t)
    return x


def amed_dpm_solver_2(
    p: Trace, *, r: Any = 0.5, scale_dir: Any = 1.0, scale_time: Any = 1.0, predictor: Any = None
) -> Form:
    """The plug-in on DPM-Solver-2: x' = x + c (t' - t) [e_tau / (2 r) + (1 - 1/(2 r)) e], tau chosen as in ``amed``."""
    ask = _source(p, r, scale_dir, scale_time, predictor)
    x = p.start()
    for i, (_, s, t) in enumerate(p.grid.windows()):
        if is_first_order(s, t):
            x = p.land(ddim_step(x, p.denoise(x, s), s, t), t)
            continue
        numbers, bind = ask(i, s, t)
        d = p.denoise(x, s)
        bind()
        r_i, c, a = numbers
        u = p.grid.between(s, t, r_i)
        y = p.keep(ddim_step(x, d, s, u))
        change, share = c * (t.rho - s.rho), 1 / (2 * r_i)
        base = p.keep(t.alpha * (x / s.alpha + change * (1 - share) * eps_of(x, d, s)))
        x = p.land(base + t.alpha * change * share * eps_of(y, p.denoise(y, told(u, a)), u), t)
    return x


def plugin(base: Solver) -> Solver:
    """``base`` with AMED plugged in: it runs on the levels t_0, tau_0, t_1, tau_1, ..., t_n (arXiv:2312.00094, section 3.4).

    tau_i is chosen as in ``amed``, after the evaluation at t_i; the change over the second half of each step is multiplied
    by c, and the evaluation at tau_i is told a tau_i. "Change" is what the method adds to the state: all but the term of x,
    which keeps its factor alpha_t / alpha_s where a method integrates noise predictions, and sigma_t / sigma_s where it
    integrates data predictions. NFE 2 per step for solvers with one evaluation per step. DPM-Solver-2 keeps its own form,
    with tau as its inner level.

    Options: those of ``base``, and ``r``, ``scale_dir``, ``scale_time``, ``predictor`` of ``amed``. Raises ``ValueError`` for
    solvers that place their own inner levels, or need times where a level is not known yet.
    """
    if base.name == "dpm_solver_2":
        return Solver("amed_dpm_solver_2", amed_dpm_solver_2, base.final, base.grid)
    if base.name not in MULTISTEP:
        raise ValueError(f"solver: AMED plugs into {', '.join([*MULTISTEP, 'dpm_solver_2'])}, got {base.name!r}")

    def formula(
        p: Trace, *, r: Any = 0.5, scale_dir: Any = 1.0, scale_time: Any = 1.0, predictor: Any = None, **options: Any
    ) -> Form:
        settings = {**base.options, **options}
        if base.name == "deis" and settings["space"] == "t":
            raise ValueError("space: with AMED, deis works in 'rho' or 'lam'; its times would be known only in the run")
        data = base.name in ("dpm_solver_pp", "unipc") and settings["prediction"] == "x0"
        inner = _Refined(p, _source(p, r, scale_dir, scale_time, predictor), data)
        return base.formula(inner, **options)

    return Solver(f"amed_{base.name}", formula, base.final, base.grid, extra=base.options)


MULTISTEP = ("ddim", "ipndm", "ipndm_v", "lms", "deis", "dpm_solver_pp", "unipc")
"""Solvers with one evaluation per level, which run on any levels."""


def told(level: Level, scale_time: Any) -> Level:
    """``level`` as the network is told it: a times as noisy. The state there is not rescaled."""
    return level if isinstance(scale_time, float) and scale_time == 1 else Level(level.alpha, scale_time * level.sigma)


def _source(
    p: Trace, r: Any, scale_dir: Any, scale_time: Any, predictor: Any
) -> Callable[[int, Level, Level], tuple[Numbers, Callable[[], None]]]:
    """``ask(i, s, t)`` -> (r, c, a) of step i, and what to call when the evaluation at s has been requested."""
    steps = p.grid.steps
    given = {
        name: _per_step(name, value, steps)
        for name, value in (("r", r), ("scale_dir", scale_dir), ("scale_time", scale_time))
    }
    for value in given["r"]:
        check_unit("r", value)
    neutral = all(value == 1 for name in ("scale_dir", "scale_time") for value in given[name])
    p.consistent = p.consistent and (neutral if predictor is None else predictor.heads == ("r",))

    def ask(i: int, s: Level, t: Level) -> tuple[Numbers, Callable[[], None]]:
        if predictor is None:
            return (given["r"][i], given["scale_dir"][i], given["scale_time"][i]), _nothing
        look = predictor.look(i, _number(s.rho), _number(t.rho))
        if look is None or (i == 0 and p.afs):
            made = [n if n.requires_grad else float(n) for n in predictor.numbers(i, _number(s.rho), _number(t.rho))]
            return _named(predictor.heads, made), _nothing
        lates = [Late(f"{name}{i}") for name in predictor.heads]
        return _named(predictor.heads, lates), lambda: p.bind(lates, look, outputs=(OUTPUT,))

    return ask


def _named(heads: Sequence[str], values: Sequence[Any]) -> Numbers:
    found = dict(zip(heads, values, strict=True))
    return found["r"], found.get("scale_dir", 1.0), found.get("scale_time", 1.0)


def _nothing() -> None:
    pass


def _number(value: Any) -> float:
    return float(value.detach()) if isinstance(value, Tensor) else float(value)


def _per_step(name: str, value: Any, steps: int) -> list[Any]:
    """One number per step. Raises ``ValueError`` for a list of another length."""
    if isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.ndim == 0):
        return [float(value) if isinstance(value, (int, float)) else value] * steps
    values = [v if isinstance(v, Tensor) and v.requires_grad else float(v) for v in value]
    if len(values) != steps:
        raise ValueError(f"{name}: need one number, or one for each of {steps} steps, got {len(values)}")
    return values


class _Levels:
    """The refined levels as a solver sees them. The inner level of a step is made when the step comes up, and its numbers
    may still be unknown then."""

    def __init__(self, grid: Grid, refine: Callable[[int, Level, Level], Level]) -> None:
        self.grid, self._refine = grid, refine
        self.schedule, self.name = grid.schedule, grid.name
        self.steps = sum(1 if is_first_order(s, t) else 2 for _, s, t in grid.windows())

    def __len__(self) -> int:
        return self.steps + 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self.grid, name)

    def windows(self) -> Iterator[tuple[Level | None, Level, Level]]:
        last: Level | None = None
        for i, (_, s, t) in enumerate(self.grid.windows()):
            if is_first_order(s, t):
                yield last, s, t
            else:
                u = self._refine(i, s, t)
                yield last, s, u
                yield s, u, t
                s = u
            last = s


class _Refined:
    """The trace as a solver sees it that AMED is plugged into: refined levels, evaluations there told a times their noise,
    and the second half of each step scaled by c about its starting point."""

    def __init__(
        self, p: Trace, ask: Callable[[int, Level, Level], tuple[Numbers, Callable[[], None]]], data: bool
    ) -> None:
        self._p, self._ask, self._data = p, ask, data
        self.grid = _Levels(p.grid, self._refine)
        self._binds: dict[int, Callable[[], None]] = {}  # index of t_i -> called when it has been evaluated
        self._told: dict[Level, Any] = {}  # tau_i -> a
        self._scale: dict[int, tuple[Any, Level]] = {}  # index of t_{i+1} -> c, and tau_i
        self._states: dict[Level, Form] = {}  # tau_i -> the state there

    def _refine(self, i: int, s: Level, t: Level) -> Level:
        (r, c, a), bind = self._ask(i, s, t)
        u = self._p.grid.between(s, t, r)
        assert s.index is not None and t.index is not None
        self._binds[s.index] = bind
        self._told[u] = a
        self._scale[t.index] = (c, u)
        return u

    def __getattr__(self, name: str) -> Any:
        return getattr(self._p, name)

    @property
    def consistent(self) -> bool:
        return self._p.consistent

    @consistent.setter
    def consistent(self, value: bool) -> None:
        self._p.consistent = value

    def denoise(self, x: Form, level: Level) -> Form:
        d = self._p.denoise(x, told(level, self._told.get(level, 1.0)))
        if level.index is not None:
            self._binds.pop(level.index, _nothing)()
        return d

    def land(self, form: Form, level: Level) -> Form:
        if level.index is None:
            self._states[level] = kept = self._p.land(form, level)
            return kept
        c, u = self._scale.get(level.index, (1.0, level))
        if u in self._states and not (isinstance(c, float) and c == 1):
            gain = level.sigma / u.sigma if self._data else level.alpha / u.alpha
            anchor = gain * self._states[u]
            form = anchor + c * (form - anchor)
        return self._p.land(form, level)
