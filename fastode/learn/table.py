"""Learned tables: every weight between two evaluations, and every level the network is told, as free numbers.

Any deterministic solver is a table (:mod:`fastode.solvers.table`); learning starts from it and goes in two stages.

1. *Fit*: row by row, the weights are the ridge regression of the exact flow's state at the next point on what the student
   holds there, x_k and m_0 .. m_k. No gradient through the network; it costs one run of the student.
2. *Descent*: all free numbers together, by gradient through the whole program, on the distance of the end points.

Named constraints leave some of the numbers alone: "s4s" frees the weights of outputs (S4S, arXiv:2502.17423; with told
levels S4S-Alt without its grid), "gs" corrects the solver's own coefficients on a grid that moves, and ties the input gain to
the told level (GS, arXiv:2510.17699), "told" only tells levels. LD3 is a grid with told levels (:mod:`fastode.learn.ld3`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from fastode.artifact import Artifact
from fastode.learn.calibration import Calibration, Save, teacher_of
from fastode.learn.descent import Loss, descend
from fastode.learn.ld3 import Gaps, started
from fastode.learn.teacher import Error, Teacher, training_seeds
from fastode.program import Program
from fastode.scalar import sqrt
from fastode.schedules.grid import Grid, Level
from fastode.solvers import SOLVERS
from fastode.solvers.table import LearnedTable, number, tabulate

FORMS: dict[str, frozenset[str]] = {
    "full": frozenset(("grid", "a", "b", "told")),
    "gs": frozenset(("grid", "a", "b", "told", "gain")),
    "general": frozenset(("a", "b", "told")),
    "s4s": frozenset(("b", "told")),
    "weights": frozenset(("a", "b")),
    "told": frozenset(("told",)),
}
"""Which numbers of the table each form frees."""

TOLD_RANGE = 0.5
"""Told levels stay within a factor exp(+-0.5) of the point's own."""


class FreeTable:
    """The table of ``solver`` on ``grid`` with free numbers, all 0 at the start; leaves with gradients.

    A number is a relative change: ``a[k, j]`` of the weight of x_j by size_{k+1}/size_j, ``b[k, j]`` of m_j by
    size_{k+1}/sigma_data, where size_k^2 = (alpha_k sigma_data)^2 + sigma_k^2 is the variance of x_k. So one rate serves all.
    With a free grid they are changes of the solver's table on the grid as it is. ``memory``: how many outputs a row may read
    (None: all).
    """

    def __init__(
        self,
        solver: str,
        grid: Grid,
        options: Mapping[str, Any],
        free: frozenset[str],
        *,
        sigma_data: float = 0.5,
        memory: int | None = None,
    ) -> None:
        if memory is not None and memory < 1:
            raise ValueError(f"memory: at least 1 output, or None for all; got {memory}")
        self.solver, self.options, self.free, self.sigma_data = solver, dict(options), free, sigma_data
        self.start = grid
        self._gaps = Gaps(grid) if "grid" in free else None
        self._base = tabulate(SOLVERS[solver](grid, **options))
        base, n = self._base, self._base.nfe
        levels = [*zip(base.alpha, base.sigma, strict=True), (grid[-1].alpha, grid[-1].sigma)]
        self.size = [math.hypot(number(a) * sigma_data, number(s)) for a, s in levels]
        self.a = torch.zeros(n, n, dtype=torch.float64, requires_grad="a" in free)
        self.b = torch.zeros(n, n, dtype=torch.float64, requires_grad="b" in free)
        self.told = torch.zeros(n, dtype=torch.float64, requires_grad="told" in free)
        far = n if memory is None else memory
        # the newest point, and whatever the solver reads itself
        self.reads_a = [[j for j in range(k + 1) if j == k or base.a[k][j] != 0] for k in range(n)]
        self.reads_b = [[j for j in range(k + 1) if k - j < far or base.b[k][j] != 0] for k in range(n)]

    def parameters(self, lr: float = 1.0) -> tuple[list[Tensor], list[float]]:
        """The leaves, and a rate for each: levels move ten times faster than weights."""
        found = [(self._gaps.theta, 10 * lr)] if self._gaps is not None else []
        found += [(p, lr * (10 if p is self.told else 1)) for p in (self.a, self.b, self.told) if p.requires_grad]
        return [p for p, _ in found], [r for _, r in found]

    def grid(self) -> Grid:
        return self.start if self._gaps is None else self._gaps.grid()

    def program(self) -> Program:
        return self.table().program(self.grid(), name=f"{self.solver} table")

    def table(self) -> LearnedTable:
        """The table of the numbers as they are."""
        base = self._base if self._gaps is None else tabulate(SOLVERS[self.solver](self._gaps.grid(), **self.options))
        n = base.nfe
        a, b = [list(row) for row in base.a], [list(row) for row in base.b]
        for k in range(n):
            if "a" in self.free:
                for j in self.reads_a[k]:
                    a[k][j] = a[k][j] + self.a[k, j] * (self.size[k + 1] / self.size[j])
            if "b" in self.free:
                for j in self.reads_b[k]:
                    b[k][j] = b[k][j] + self.b[k, j] * (self.size[k + 1] / self.sigma_data)
        told, gain = list(base.told), list(base.gain)
        if "told" in self.free:
            told = [t * torch.exp(TOLD_RANGE * torch.tanh(p)) for t, p in zip(told, self.told, strict=True)]
        if "gain" in self.free:
            for k in range(n):
                square = (base.sigma[k] / base.alpha[k]) ** 2
                gain[k] = gain[k] * sqrt((1 + told[k] ** 2 * square) / (1 + base.told[k] ** 2 * square))
        return replace(
            base, a=tuple(map(tuple, a)), b=tuple(map(tuple, b)), told=tuple(told), gain=tuple(gain)
        )  # fmt: skip


def fit(free: FreeTable, teacher: Teacher, seeds: Tensor, *, ridge: float = 1e-5, rows: int | None = None) -> None:
    """Change the weights of ``free`` row by row by regression; ``rows`` only fits the last so many (1: the end point alone).

    Raises ``ValueError`` if more than the last is to be fitted where the points of the table are not of falling noise, so
    that no trajectory passes them in turn.
    """
    if not ridge > 0:
        raise ValueError(f"ridge: must be positive, got {ridge}")
    with torch.no_grad():
        grid, numbers = free.grid(), free.table().tensors()
    base = LearnedTable.of_tensors(numbers)
    n = base.nfe
    first = n - (n if rows is None else rows)
    if rows == 1:
        truth = teacher.ends(seeds, grid)
        targets = {n - 1: truth.end}
    else:
        points = _points(base, grid)
        truth = teacher.trajectories(seeds, points)
        ahead = len(points) - n  # 1, or 2 with an analytical first step: the start itself is then no point
        targets = {k: truth.states[k + ahead] for k in range(n)}
    x = [float(base.first) * truth.start]
    m: list[Tensor] = []
    for k in range(n):
        m.append(_denoised(teacher, x[k], base, k, seeds))
        own_a = [j for j in free.reads_a[k] if "a" in free.free]
        own_b = [j for j in free.reads_b[k] if "b" in free.free]
        made = torch.zeros_like(x[0])
        for c, v in [*zip(base.a[k], x, strict=True), *zip(base.b[k], m, strict=True)]:
            made = made + float(c) * v
        if k >= first and own_a + own_b:
            features = [x[j] / free.size[j] for j in own_a] + [m[j] / free.sigma_data for j in own_b]
            goal = (targets[k] - made) / free.size[k + 1]
            columns = torch.stack([f.double().flatten() for f in features])
            count = columns.shape[1]
            gram = columns @ columns.T / count + ridge * torch.eye(len(features), dtype=torch.float64)
            change = torch.linalg.solve(gram, columns @ goal.double().flatten() / count)
            with torch.no_grad():
                for j, c in zip(own_a, change[: len(own_a)], strict=True):
                    free.a[k, j] += c
                for j, c in zip(own_b, change[len(own_a) :], strict=True):
                    free.b[k, j] += c
            for c, f in zip(change.tolist(), features, strict=True):
                made = made + free.size[k + 1] * c * f
        x.append(made)


def _denoised(teacher: Teacher, x: Tensor, base: LearnedTable, k: int, seeds: Tensor) -> Tensor:
    """Output k at points [N, *sample], batch by batch, on the CPU."""
    from fastode.denoisers.guidance import GUIDANCE_SCALE

    level = Level(float(base.alpha[k]), float(base.told[k]) * float(base.sigma[k]))
    known = {} if teacher.guidance_scale is None else {GUIDANCE_SCALE: float(teacher.guidance_scale)}
    parts = []
    with torch.no_grad():
        for rows, some in zip(x.split(teacher.batch), seeds.split(teacher.batch), strict=True):
            condition = teacher.denoiser.check_condition(len(some), teacher.condition(some), teacher.guidance)
            y = (float(base.gain[k]) * rows).to(teacher.device)
            made = teacher.denoiser.denoise(y, level, condition, guidance=teacher.guidance, known=known)
            parts.append(made.cpu())
            teacher.evaluations += len(some)
    return torch.cat(parts)


def _levels(base: LearnedTable, grid: Grid) -> tuple[list[Any], list[Any], list[Any]]:
    """alpha, sigma and sigma/alpha from the first level of ``grid`` over the points in turn to its last."""
    ends = grid[0], grid[-1]
    alpha, sigma = list(map(number, base.alpha)), list(map(number, base.sigma))
    if base.rows[0] == -1:
        alpha, sigma = [ends[0].alpha, *alpha], [ends[0].sigma, *sigma]
    alpha, sigma = [*alpha, ends[1].alpha], [*sigma, ends[1].sigma]
    return alpha, sigma, [s / a if a else math.inf for a, s in zip(alpha, sigma, strict=True)]


def _falling(base: LearnedTable, grid: Grid) -> bool:
    rho = _levels(base, grid)[2]
    return all(a > b for a, b in pairwise(rho))


def _points(base: LearnedTable, grid: Grid) -> Grid:
    """The levels of the table's points in turn, between the ends of ``grid``."""
    if not _falling(base, grid):
        raise ValueError("fit: the solver's points are not of falling noise, so no trajectory passes them in turn")
    alpha, sigma, _ = _levels(base, grid)
    return Grid(sigma, alpha, schedule=grid.schedule, name="points of a table")


def train(
    denoiser: Any,
    *,
    solver: str = "dpm_solver_pp",
    nfe: int = 5,
    options: Mapping[str, Any] | None = None,
    guidance_scale: float | None = None,
    class_labels: Any = None,
    samples: int = 64,
    seed: int = 0,
    teacher: Teacher | None = None,
    save: Save | None = None,
    progress: bool = True,
    minutes: float = math.inf,
    grid: Grid | str | None = None,
    form: Literal["full", "gs", "general", "s4s", "weights", "told"] = "full",
    memory: int | None = None,
    fitted: bool = True,
    ridge: float = 1e-5,
    steps: int = 150,
    batch: int = 16,
    lr: float = 1e-3,
    loss: Loss = "l2",
    checkpoint: bool = True,
    radius: float = 0.0,
) -> Artifact:
    """A learned table, started from ``solver``: weights between evaluations and levels told to the network.

    ``form`` frees: "full" all weights, told levels and the grid; "gs" the same with the input gain tied to the told
    levels; "general" all but the grid; "s4s" the weights of outputs and told levels; "weights" only weights; "told" only
    told levels. ``memory``: outputs a row may read. ``fitted``: begin with the row-by-row regression (all rows, or only
    the last where that is better), with this ``ridge``; ``steps=0`` ends there, and the calibration then needs no
    gradient at all. Starts on ``grid`` (levels, a name, or an artifact's file;
    default: the solver's best uniform placement). The state with the smallest error
    on the ``samples`` trajectories is kept.
    """
    if form not in FORMS:
        raise ValueError(f"form: must be one of {', '.join(FORMS)}, got {form!r}")
    teacher = teacher_of(denoiser, teacher, guidance_scale=guidance_scale, class_labels=class_labels)
    seeds = training_seeds(samples, seed)
    settings: dict[str, Any] = {
        "samples": samples, "seed": seed, "form": form, "memory": memory, "fitted": fitted, "ridge": ridge, "steps": steps,
        "batch": batch, "lr": lr, "loss": loss, "radius": radius,
    }  # fmt: skip
    with Calibration("table", teacher, total=steps, save=save, progress=progress, minutes=minutes) as run:
        start, chosen, uniform = started(teacher, solver, nfe, options, grid, seeds)
        settings |= {"start": start.name, "options": chosen}
        truth = teacher.ends(seeds, start)

        def new() -> FreeTable:
            return FreeTable(
                solver, start, chosen, FORMS[form], sigma_data=teacher.denoiser.sigma_data, memory=memory
            )  # fmt: skip

        def error_of(table: FreeTable) -> Error:
            with torch.no_grad():
                return Error.between(teacher.sample(table.program(), seeds), truth.end)

        def artifact(error: Error) -> Artifact:
            return run.artifact(
                solver, free.grid(), method="table", numbers=free.table().tensors(), options={"form": form},
                settings=settings, error=error, uniform=uniform,
            )  # fmt: skip

        free = new()
        weights = bool(FORMS[form] & {"a", "b"})
        if fitted and weights:
            least = error_of(free).rmse
            for rows in (None, 1) if _falling(free.table(), start) else (1,):
                tried = new()
                fit(tried, teacher, seeds, ridge=ridge, rows=rows)
                value = error_of(tried).rmse
                if value < least:
                    least, free = value, tried
        leaves, rates = free.parameters(lr)
        error = descend(
            run, leaves, free.program, truth, truth, artifact, steps=steps, batch=batch, lr=rates, loss=loss,
            checkpoint=checkpoint, radius=radius, seed=seed,
        )  # fmt: skip
        if fitted and weights and steps:  # the last row is linear in its weights: its best is known
            fit(free, teacher, seeds, ridge=ridge, rows=1)
            polished = error_of(free)
            if polished.rmse < error.rmse:
                run.keep(artifact(polished))
    assert run.best is not None
    return run.best
