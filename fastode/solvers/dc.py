"""DC-Solver: dynamic compensation, a modifier of predictor-corrector and multistep solvers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastode.program import Form, Program, Trace
from fastode.scalar import Late, Scalar
from fastode.schedules.grid import Grid, Level
from fastode.schedules.spacing import diffusion_time
from fastode.solvers.coefficients import check_choice, combine, functional_weights
from fastode.solvers.solver import Solver

SPACES = ("t", "lam")


def dc(
    base: Solver,
    grid: Any,
    ratios: Sequence[Scalar],
    *,
    dc_order: int = 2,
    dc_space: str = "t",
    **options: Any,
) -> Program:
    """``base`` with dynamic compensation (arXiv:2409.03755): NFE and order of evaluations as ``base`` with ``options``.

    A predictor-corrector remembers m_i, evaluated at the predicted x_i, and steps with it from the corrected x_i. Before
    the step from level i the newest entry of the history is replaced, for that step and for good, by

        m_i <- sum_{k=0}^{K} l_k(t') m_{i-k},     t' = ratio_i t_i + (1 - ratio_i) t_{i-1}

    with Lagrange polynomials l_k on (t_i, .., t_{i-K}), K = ``dc_order``, over entries that are themselves compensated. The
    corrector at level i+1 sees the compensated history and its own evaluation as it is. A ratio of exactly 1 changes
    nothing; all ratios 1 are ``base``, bit for bit. The history is what ``base`` remembers: denoised estimates or noise.

    ``ratios``: one per step; the first ``dc_order``, whose history is too short, must be 1. ``dc_space`` is the variable of the
    interpolation: "t" as published (diffusion time; labels on a discrete schedule; the time of the fitted VP process where
    time is the noise level itself), or "lam". Raises ``ValueError`` naming the argument, also for a ``base`` that keeps
    no history to compensate.
    """
    trace = Compensating(
        Grid.of(grid), ratios, dc_order=dc_order, dc_space=dc_space, afs=bool(options.get("afs", False))
    )
    program = base.record(trace, **options)
    if not trace.asked:
        raise ValueError(f"solver: {base.name} steps from no history that could be compensated")
    return replace(program, name=f"dc_{base.name}")


class Compensating(Trace):
    """A trace that hands solvers compensated outputs; see :func:`dc`."""

    def __init__(
        self, grid: Grid, ratios: Sequence[Scalar], *, dc_order: int = 2, dc_space: str = "t", afs: bool = False
    ) -> None:
        super().__init__(grid, afs=afs)
        check_choice("dc_space", dc_space, SPACES)
        if isinstance(dc_order, bool) or dc_order not in (1, 2, 3):
            raise ValueError(f"dc_order: must be 1, 2 or 3, got {dc_order!r}")
        if len(ratios) != grid.steps:
            raise ValueError(f"ratios: need one per step, {grid.steps} for this grid, got {len(ratios)}")
        for i, ratio in enumerate(ratios):
            early = i < dc_order and not _is_one(ratio)
            if early or (isinstance(ratio, (int, float)) and not abs(ratio) < float("inf")):
                what = f"must be 1 at the first {dc_order} steps" if early else "must be finite"
                raise ValueError(f"ratios: {what}, got {ratio!r} at step {i}")
        self.asked = 0
        self._ratios, self._size, self._space = list(ratios), dc_order + 1, dc_space
        self._clock = diffusion_time(grid.schedule)
        self._entries: list[tuple[Level, Form]] = []  # newest first, compensated

    def compensated(self, form: Form, level: Level) -> Form:
        assert level.index is not None
        self.asked += 1
        ratio = self._ratios[level.index]
        self._entries = [(level, form), *self._entries][: self._size]
        usable = [e for e in self._entries if self._space == "t" or not e[0].is_noise]
        if _is_one(ratio) or len(usable) < self._size:
            return form
        times = [self._time(at) for at, _ in usable]
        length = times[1] - times[0]
        nodes = [(t - times[0]) / length for t in times]  # 0 at t_i and 1 at t_{i-1}, so that t' is at 1 - ratio
        moments: list[Any] = [(1.0 - ratio) ** k if k else 1.0 for k in range(self._size)]
        used = self.keep(combine(functional_weights(nodes, moments), [f for _, f in usable]))
        self._entries[0] = (level, used)
        return used

    def _time(self, level: Level) -> Any:
        if self._space == "lam":
            return level.lam
        time = self._clock.time(level.rho)
        return time if time.requires_grad else float(time)


def _is_one(ratio: Any) -> bool:
    return isinstance(ratio, (int, float)) and not isinstance(ratio, bool) and ratio == 1


def free_ratios(steps: int, dc_order: int = 2) -> list[Scalar]:
    """Ratios that are still to be found: 1 where they must be, late numbers elsewhere."""
    return [1.0 if i < dc_order else Late(f"ratio{i}") for i in range(steps)]
