"""Compensation ratios of DC-Solver (arXiv:2409.03755), found step by step on a few trajectories."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastode.artifact import Artifact
from fastode.learn.calibration import Calibration, Save, teacher_of
from fastode.learn.replay import Evaluate, Evaluator, Replay, ends, levels_for, published_states
from fastode.learn.teacher import Teacher, training_seeds
from fastode.scalar import Late
from fastode.schedules.grid import Grid
from fastode.solvers import SOLVERS
from fastode.solvers.coefficients import check_choice
from fastode.solvers.dc import dc, free_ratios
from fastode.solvers.solver import Solver

FEWEST = 10
"""Noises below which ratios fit the noises rather than the model (4 made held-out samples worse on a toy)."""


@dataclass(frozen=True)
class Search:
    """``ratios``: one per step. ``losses``: mean square error of each state reached, and of the same with ratio 1."""

    ratios: list[float]
    losses: list[float]
    plain: list[float]


def search(
    base: Solver,
    grid: Grid,
    evaluate: Evaluate,
    x: Tensor,
    targets: Sequence[Tensor],
    *,
    dc_order: int = 2,
    dc_space: str = "t",
    method: str = "exact",
    tolerance: float = 1e-4,
    iterations: int = 40,
    lr: float = 0.1,
    bounded: bool = False,
    tick: Callable[[Search, int], bool | None] | None = None,
    **options: Any,
) -> Search:
    """Greedy ratios: that of step i minimises the mean square error of the state at level i + 1, as compensated and
    corrected so far. ``x`` [B, *sample] starts at the first level, ``targets[i]`` is the true state at level i + 1.

    ``method="exact"``: where no evaluation corrects the state reached (the last step, plain multistep solvers) the error is
    a polynomial in the ratio and minimised in closed form; elsewhere Brent's method to ``tolerance``, about 10 evaluations.
    ``method="adamw"``: the published search, ``iterations`` of AdamW with rate ``lr`` from ratio 1, gradient through the
    network; it stops 0.003 to 0.05 short of the minimum. ``bounded``: its optional form ratio = 1 + tanh(.)/2.

    ``tick(found so far, step)`` is called after every step; True ends the search, with 1 for the ratios not yet found.
    A step whose search meets a non-finite error keeps the last good ratio; none is ever worse than 1 on these samples,
    except under "adamw", whose last iterate counts, as published.
    """
    check_choice("method", method, ("exact", "adamw"))
    if len(targets) != grid.steps:
        raise ValueError(f"targets: need the state after each of {grid.steps} steps, got {len(targets)}")
    program = dc(base, grid, free_ratios(grid.steps, dc_order), dc_order=dc_order, dc_space=dc_space, **options)
    free = {int(late.name.removeprefix("ratio")): late for late in program.late}
    replay = Replay(program, evaluate, x)
    found = Search([1.0] * grid.steps, [math.nan] * grid.steps, [math.nan] * grid.steps)
    ratios, losses, plain = found.ratios, found.losses, found.plain
    for i in sorted(free):
        with torch.no_grad():
            trial, corrected = _step(replay, i, free[i])

        def loss(ratio: Any, trial: Any = trial, target: Tensor = targets[i]) -> Tensor:
            return (trial(ratio) - target).square().mean()

        with torch.no_grad():
            plain[i] = float(loss(1.0))
            if method == "exact" and not corrected:
                ratios[i] = _polynomial_minimum(trial, targets[i], dc_order)
            elif method == "exact":
                ratios[i] = _brent(loss, tolerance)
        if method == "adamw":
            ratios[i] = _adamw(loss, iterations, lr, bounded)
        with torch.no_grad():
            losses[i] = float(loss(ratios[i]))
        if method == "exact" and not losses[i] <= plain[i]:
            ratios[i], losses[i] = 1.0, plain[i]
        replay.known[free[i]] = ratios[i]
        if tick is not None and tick(found, i):
            break
    return found


def _step(replay: Replay, i: int, late: Late) -> tuple[Callable[[Any], Tensor], bool]:
    """(state reached by step ``i`` as a function of its ratio, whether an evaluation corrects it)."""
    program = replay.program
    at = [s.index for s in program.stages if s.level.index == i][-1]
    replay.advance(at)
    state = program.states[i + 1]
    corrected = replay.writer(state) > at

    def reach(ratio: Any) -> Tensor:
        memo: dict[int, Any] = {}
        known = {late: ratio}
        if not corrected:
            return replay.row(state, known=known, memo=memo)
        rows = {v: replay.row(v, known=known, memo=memo) for v in program.stages[at].table.writes}
        after = program.stages[at + 1]
        output = replay.evaluate(rows[after.net_in], after.level)
        form = dict(after.table.rows())[state]
        return replay.weigh(form, known=known, memo=memo, values={**replay.values, **rows}, output=output)

    return reach, corrected


def _polynomial_minimum(trial: Callable[[Any], Tensor], target: Tensor, degree: int) -> float:
    """Minimum of |trial(r) - target|^2 where the state is a polynomial of ``degree`` in the ratio: from inner products."""
    import numpy

    nodes = [1.0 + k for k in range(degree + 1)]
    errors = torch.stack([(trial(r) - target).double().flatten() for r in nodes])
    # Newton's form on the nodes: coefficients of (r - 1)^k
    vandermonde = torch.tensor([[(r - 1.0) ** k for k in range(degree + 1)] for r in nodes], dtype=torch.float64)
    powers = torch.linalg.solve(vandermonde, errors.cpu())
    gram = (powers @ powers.T).numpy()
    if not numpy.isfinite(gram).all():
        return 1.0
    square = numpy.zeros(2 * degree + 1)
    for j in range(degree + 1):
        for k in range(degree + 1):
            square[j + k] += gram[j, k]
    error = numpy.polynomial.Polynomial(square)
    roots = error.deriv().roots()
    real = roots[abs(roots.imag) < 1e-9 * (1 + abs(roots.real))].real
    return 1.0 if not len(real) else float(1 + min(real, key=error))


def _brent(loss: Callable[[Any], Tensor], tolerance: float) -> float:
    try:
        from scipy.optimize import minimize_scalar
    except ImportError as error:
        raise ImportError("the search for ratios needs scipy: pip install 'fastode[learn]'") from error

    def guarded(ratio: float) -> float:
        value = float(loss(ratio))
        return value if math.isfinite(value) else math.inf

    return float(minimize_scalar(guarded, bracket=(1.0, 1.1), method="brent", tol=tolerance).x)


def _adamw(loss: Callable[[Any], Tensor], iterations: int, lr: float, bounded: bool) -> float:
    parameter = torch.nn.Parameter(
        torch.zeros((), dtype=torch.float64) if bounded else torch.ones((), dtype=torch.float64)
    )
    optimizer = torch.optim.AdamW([parameter], lr=lr)
    good = 1.0
    for _ in range(iterations):
        optimizer.zero_grad()
        value = loss(1 + torch.tanh(parameter) / 2 if bounded else parameter)
        value.backward()
        slope = parameter.grad
        if slope is None or not (math.isfinite(float(value.detach())) and math.isfinite(float(slope))):
            return good
        good = float((1 + torch.tanh(parameter) / 2 if bounded else parameter).detach())
        optimizer.step()
    return float((1 + torch.tanh(parameter) / 2 if bounded else parameter).detach())


def train(
    denoiser: Any,
    *,
    solver: str = "unipc",
    nfe: int = 5,
    options: Mapping[str, Any] | None = None,
    guidance_scale: float | None = None,
    class_labels: Any = None,
    samples: int = 10,
    seed: int = 0,
    teacher: Teacher | None = None,
    save: Save | None = None,
    progress: bool = True,
    minutes: float = math.inf,
    grid: str | Grid | None = None,
    dc_order: int = 2,
    dc_space: str = "t",
    method: str = "exact",
    targets: str = "exact",
    tolerance: float = 1e-4,
    iterations: int = 40,
    lr: float = 0.1,
    bounded: bool = False,
) -> Artifact:
    """DC-Solver: compensation ratios of a multistep solver (arXiv:2409.03755), found step by step on ``samples`` noises.

    ``grid``: a name in ``GRIDS``, or levels as they are; default: the solver's usual grid with ``nfe`` evaluations.
    ``targets="exact"``: states of the converged flow on the levels themselves. ``"published"``: 200 DDIM steps in uniform
    time and, for each level, the last of their states before it. The rest: see :func:`search`. The card tells the error of
    the end points on the training noises with the ratios and without.

    Cost: NFE - 2 searches of about 10 evaluations each ("adamw": 40 with gradients) and the teacher's, all on ``samples``
    noises; the paper uses 10. Raises ``ValueError`` naming the argument.
    """
    teacher = teacher_of(denoiser, teacher, guidance_scale=guidance_scale, class_labels=class_labels)
    check_choice("targets", targets, ("exact", "published"))
    levels, own = levels_for(teacher.denoiser, solver, nfe, options, grid)
    base = SOLVERS[solver]
    if levels.steps <= dc_order:
        raise ValueError(
            f"nfe: the first {dc_order} steps are not compensated, so {levels.steps} steps leave nothing to learn"
        )
    if samples < 2:
        raise ValueError(f"samples: ratios need at least 2 noises (published: {FEWEST}), got {samples}")
    if samples < FEWEST:
        warnings.warn(f"samples: {samples} noises are few; ratios may fit them and no others", stacklevel=2)
    modified = {**own, "dc_order": dc_order, "dc_space": dc_space}
    dc(base, levels, [1.0] * levels.steps, **modified)  # complains about what cannot be compensated
    seeds = training_seeds(samples, seed)
    with Calibration(
        "dc", teacher, total=levels.steps - dc_order, save=save, progress=progress, minutes=minutes
    ) as run:
        evaluate = Evaluator(teacher, seeds)
        x = teacher.start(seeds, levels).double()
        if targets == "exact":
            truth = list(teacher.trajectories(seeds, levels).states[1:].to(x))
        else:
            truth = published_states(evaluate, levels, list(levels)[1:], x)

        def artifact(ratios: Sequence[float], **entries: Any) -> Artifact:
            numbers = {"ratios": torch.tensor(ratios, dtype=torch.float64)}
            return run.artifact(
                solver, levels, method="dc", numbers=numbers, options=modified, samples=samples, search=method,
                targets=targets, **entries,
            )  # fmt: skip

        def tick(found: Search, i: int) -> bool:
            run.step(found.losses[i], ratio=f"{found.ratios[i]:.4f}")
            run.keep(artifact(found.ratios))
            return run.late

        found = search(
            base, levels, evaluate, x, truth, dc_order=dc_order, dc_space=dc_space, method=method, tolerance=tolerance,
            iterations=iterations, lr=lr, bounded=bounded, tick=tick, **own,
        )  # fmt: skip
        before, after = ends(teacher, base(levels, **own), dc(base, levels, found.ratios, **modified), seeds, truth[-1])
        searched = [i for i, loss in enumerate(found.losses) if not math.isnan(loss)]
        made = artifact(
            found.ratios,
            losses=[found.losses[i] for i in searched],
            losses_at_ratio_1=[found.plain[i] for i in searched],
            rmse_before=before,
            rmse_after=after,
        )
        run.keep(made)
    return made
