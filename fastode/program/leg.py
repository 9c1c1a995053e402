"""Part of a recording on a grid of its own: how solvers are put together without knowing of one another.

A formula runs over one decreasing grid from its start. A sampler that walks back up (Restart), or changes its method on the
way (Sampler Scheduler), is a sequence of such runs. :func:`walk` lets a formula record one of them into the trace of the
whole: from a given state, over levels of its own, as far as a given one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastode.program.form import Form
from fastode.program.trace import Past, Trace
from fastode.schedules.grid import Grid, Level


class Leg(Trace):
    """What a formula sees as its trace: own grid and start; all that it records goes into ``parent``."""

    __slots__ = ("_begin", "_hands_over", "_parent", "_places", "_stop", "grid")

    def __init__(
        self, parent: Trace, grid: Grid, begin: Form, places: Mapping[int, int], stop: int | None, hands_over: bool
    ) -> None:
        self.__dict__ = parent.__dict__  # one recording: every attribute that is not one of the slots is the parent's
        self.grid, self._begin, self._places, self._stop = grid, begin, places, stop
        self._parent, self._hands_over = parent, hands_over

    def start(self) -> Form:
        return self._begin

    def past(self, count: int, *, quiet: bool = False) -> list[Past]:
        if not self._hands_over:
            return []
        return [e for e in reversed(self._evaluated) if e.draws == self._draws or not quiet][:count]

    def denoise(self, x: Form, level: Level) -> Form:
        return self._parent.denoise(x, self._placed(level))

    def land(self, form: Form, level: Level) -> Form:
        kept = self._parent.land(form, self._placed(level))
        if self._stop is not None and level.index == self._stop:
            raise _Landed(self, kept)
        return kept

    def _placed(self, level: Level) -> Level:
        """``level`` with its index in the parent's grid, or None where it is no level of that."""
        return level if level.index is None else replace(level, index=self._places.get(level.index))


class _Landed(Exception):
    """No error: how a formula is left where its leg ends."""

    def __init__(self, leg: Leg, form: Form) -> None:
        self.leg, self.form = leg, form


def walk(
    p: Trace,
    formula: Callable[[Trace], Form],
    x: Form,
    levels: Sequence[Level],
    *,
    stop: int | None = None,
    hands_over: bool = False,
) -> Form:
    """Record ``formula`` from state ``x`` at ``levels[0]``; it is left as soon as it lands on ``levels[stop]``.

    ``levels`` go on to the end of the run, so that a formula's rules about last steps mean the run's last steps, not those
    of its part. Their ``index`` is that of ``p``'s grid, or None for levels in between, whose states are nobody's business.
    ``hands_over``: evaluations made so far at grid levels are the formula's history (:meth:`Trace.past`).
    """
    places = {i: level.index for i, level in enumerate(levels) if level.index is not None}
    whole = p.grid
    grid = Grid(
        _stacked([level.sigma for level in levels]),
        _stacked([level.alpha for level in levels]),
        _stacked([_time(level, whole) for level in levels]),
        schedule=whole.schedule,
        name=whole.name,
    )
    leg = Leg(p, grid, x, places, stop, hands_over)
    try:
        made = formula(leg)
    except _Landed as landed:
        if landed.leg is not leg:
            raise
        return landed.form
    if stop is not None:
        raise ValueError(f"formula: it ended without a state at level {stop} of its part (sigma {levels[stop].rho})")
    return made


def level_at(grid: Grid, rho: float) -> Level:
    """The level of noise ``rho`` in the frame of ``grid``, between two of its levels."""
    sigmas = [float(s) for s in grid.sigmas.detach()]
    for i, (high, low) in enumerate(pairwise(sigmas)):
        if low <= rho <= high:
            known = low > 0 and high < math.inf
            share = math.log(rho / high) / math.log(low / high) if known else 0.5
            return grid.at_rho(rho, grid[i], grid[i + 1], share)
    raise ValueError(f"rho: the grid goes from {sigmas[0]:.6g} to {sigmas[-1]:.6g}, got {rho}")


def _stacked(values: list[Any]) -> Tensor:
    return torch.stack([torch.as_tensor(v, dtype=torch.float64) for v in values])


def _time(level: Level, grid: Grid) -> Any:
    if level.t is not None:
        return level.t
    return level.rho if grid.schedule is None else grid.schedule.time(level.rho)
