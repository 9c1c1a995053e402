"""D-ODE solvers (arXiv:2309.16421): one number per state, fitted so that few steps land where many would."""

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
from fastode.learn.polish import polish
from fastode.learn.replay import Evaluate, Evaluator, Replay, ends, levels_for
from fastode.learn.teacher import Teacher, training_seeds
from fastode.scalar import Late
from fastode.schedules.grid import Grid, Level
from fastode.schedules.spacing import GRIDS
from fastode.solvers import SOLVERS
from fastode.solvers.coefficients import check_choice
from fastode.solvers.d_ode import SINGLE_STEP, corrections, d_ode
from fastode.solvers.solver import Solver


@dataclass(frozen=True)
class Fit:
    """``lambdas``: one per corrected state. ``losses``: mean square error of each state, and ``plain`` of the same state,
    reached from the same corrected one before it, without its own correction."""

    lambdas: list[float]
    losses: list[float]
    plain: list[float]


def distil(
    base: Solver,
    grid: Grid,
    evaluate: Evaluate,
    x: Tensor,
    targets: Sequence[Tensor],
    *,
    damping: float = 0.0,
    tick: Callable[[Fit, int], bool | None] | None = None,
    **options: Any,
) -> Fit:
    """Greedy least squares: with u the state that ``base`` makes next, y its target and Delta the change of the output,

        lambda = <Delta, y - u> / (<Delta, Delta> + damping <u, u> / c^2),      u <- u + lambda Delta

    in closed form, over batch and elements, in float64. c is the weight of the output in the step. At high noise outputs
    hardly change, and without ``damping`` lambdas of 1e3 fit nothing but noise. ``x`` [B, *sample] starts at the first
    level; ``targets[k]``: the true state for the k-th of :func:`corrections`. A fit that is not finite leaves 0.
    ``tick(found so far, k)`` is called after every state; True ends the fit, with 0 for what is missing.
    """
    if not damping >= 0:
        raise ValueError(f"damping: must be at least 0, got {damping}")
    program, states = corrections(base, grid, **options)
    if len(targets) != len(states):
        raise ValueError(f"targets: need one for each of {len(states)} states, got {len(targets)}")
    lates = {late.name: late for late in program.late}
    replay = Replay(program, evaluate, x)
    found = Fit(*([0.0] * len(states) for _ in range(3)))
    with torch.no_grad():
        for k, (state, y) in enumerate(zip(states, targets, strict=True)):
            replay.advance(replay.writer(state.value))
            late = lates.get(f"lambda{k}")
            u = replay.row(state.value, known={} if late is None else {late: 0.0})
            error = (y - u).double()
            found.losses[k] = found.plain[k] = float(error.square().mean())
            if late is not None:
                delta = replay.weigh(_slope(replay, state.value, late)).double()
                norm = float(delta.square().sum()) + damping * float(u.double().square().sum()) / state.weight**2
                value = float((delta * error).sum()) / norm if norm > 0 else 0.0
                loss = float((error - value * delta).square().mean())
                if math.isfinite(value) and loss <= found.plain[k]:
                    found.lambdas[k], found.losses[k] = value, loss
                replay.known[late] = found.lambdas[k]
            if tick is not None and tick(found, k):
                break
    return found


def _slope(replay: Replay, value: int, late: Late) -> Any:
    """d(row)/d(lambda) as a row: the row is linear in it."""
    from fastode.program import Form
    from fastode.scalar import evaluate

    form = replay.form(value)
    at = [{a: evaluate(c, {**replay.known, late: v}) for a, c in form.terms.items()} for v in (0.0, 1.0)]
    return Form({a: at[1][a] - at[0][a] for a in at[0]})


def train(
    denoiser: Any,
    *,
    solver: str = "ddim",
    nfe: int = 5,
    options: Mapping[str, Any] | None = None,
    guidance_scale: float | None = None,
    class_labels: Any = None,
    samples: int = 100,
    seed: int = 0,
    teacher: Teacher | None = None,
    save: Save | None = None,
    progress: bool = True,
    minutes: float = math.inf,
    grid: str | Grid | None = None,
    targets: str = "aligned",
    scale: int | None = None,
    damping: float = 1e-6,
    refine: int = 0,
    output: str | None = None,
    first: str | None = None,
    unit: str = "output",
) -> Artifact:
    """D-ODE: D-DDIM, D-iPNDM, D-DPM-Solver, D-DEIS, D-EDM and their like (arXiv:2309.16421), distilled on ``samples`` noises.

    ``grid``: a name in ``GRIDS``, or levels as they are; default: the solver's usual grid with ``nfe`` evaluations.
    ``targets="aligned"``: true states on the very levels that the solver reaches, of the converged flow, or with ``scale`` S
    of the solver itself with S steps inside each. ``"published"``: the published distillation takes every S-th state
    (default 10) of its teacher's own, S times finer grid, whose levels are not the student's: noisier by up to one student
    step. The teacher is the solver itself, for single-step solvers DDIM. Use it for reproduction only.
    ``damping``: see :func:`distil`; the paper has 0. ``refine``: this many iterations that move all lambdas together to
    bring the end points, rather than each state, closer. ``output``, ``first``, ``unit``: see :func:`fastode.solvers.d_ode`.

    Cost: NFE + the teacher's evaluations on ``samples`` noises (the paper: 20 to 100). Raises ``ValueError`` naming the
    argument.
    """
    teacher = teacher_of(denoiser, teacher, guidance_scale=guidance_scale, class_labels=class_labels)
    check_choice("targets", targets, ("aligned", "published"))
    levels, own = levels_for(teacher.denoiser, solver, nfe, options, grid)
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, int) or scale < 1):
        raise ValueError(f"scale: must be a whole number of at least 1, got {scale!r}")
    if samples < 2:
        raise ValueError(f"samples: lambdas need at least 2 noises (published: 20 to 100), got {samples}")
    if samples < 10:
        warnings.warn(f"samples: {samples} noises are few; lambdas may fit them and no others", stacklevel=2)
    base = SOLVERS[solver]
    modified = {**own, "output": output, "first": first, "unit": unit}
    program, states = corrections(base, levels, **modified)
    seeds = training_seeds(samples, seed)
    with Calibration("d_ode", teacher, total=len(states), save=save, progress=progress, minutes=minutes) as run:
        evaluate = Evaluator(teacher, seeds)
        x = teacher.start(seeds, levels).double()
        if targets == "aligned":
            truth = aligned_targets(teacher, seeds, levels, [s.level for s in states], base, own, scale)
        else:
            name = grid if isinstance(grid, str) else None if isinstance(grid, Grid) else base.grid
            truth = published_targets(teacher, seeds, levels, name, base, own, len(states), scale or 10)
        truth = [y.to(x) for y in truth]

        def artifact(lambdas: Sequence[float], **entries: Any) -> Artifact:
            numbers = {"lambdas": torch.tensor(lambdas, dtype=torch.float64)}
            return run.artifact(
                solver, levels, method="d_ode", numbers=numbers, options=modified, samples=samples, targets=targets,
                scale=scale, damping=damping, refine=refine, **entries,
            )  # fmt: skip

        def tick(found: Fit, k: int) -> bool:
            run.step(found.losses[k], value=f"{found.lambdas[k]:.4g}")
            run.keep(artifact(found.lambdas))
            return run.late

        found = distil(base, levels, evaluate, x, truth, damping=damping, tick=tick, **modified)
        lambdas = found.lambdas
        if refine:
            lates = {late.name: late for late in program.late}
            free = [k for k, s in enumerate(states) if f"lambda{k}" in lates]
            moved = polish(
                program, evaluate, x, truth[-1], {lates[f"lambda{k}"]: lambdas[k] for k in free},
                scales=[1 / states[k].weight for k in free], iterations=refine, late=lambda: run.late,
            )  # fmt: skip
            lambdas = [moved.get(lates[f"lambda{k}"], 0.0) if k in free else 0.0 for k in range(len(states))]
        before, after = ends(teacher, base(levels, **own), d_ode(base, levels, lambdas, **modified), seeds, truth[-1])
        made = artifact(lambdas, losses=found.losses, losses_at_0=found.plain, rmse_before=before, rmse_after=after)
        run.keep(made)
    return made


def aligned_targets(
    teacher: Teacher,
    seeds: Tensor,
    grid: Grid,
    levels: Sequence[Level],
    base: Solver,
    options: Mapping[str, Any],
    scale: int | None,
) -> list[Tensor]:
    """The state at each of ``levels``, which are grid levels and levels inside the steps."""
    places = sorted({float(v.rho): v for v in [grid[0], *levels]}.items(), reverse=True)
    merged: list[tuple[float, Level]] = []
    for rho, level in places:  # an inner level and a grid level may differ in the last bits
        if not merged or rho < merged[-1][0] * (1 - 1e-12):
            merged.append((rho, level))
    joined = Grid(
        [float(v.sigma) for _, v in merged], [float(v.alpha) for _, v in merged],
        [float(v.t) for _, v in merged] if all(v.t is not None for _, v in merged) else None, grid.schedule,
    )  # fmt: skip
    how: dict[str, Any] = {} if scale is None else {"intermediate": scale - 1, "solver": base.name, "options": options}
    states = teacher.trajectories(seeds, joined, **how).states
    rhos = [rho for rho, _ in merged]

    def place(level: Level) -> int:
        rho = float(level.rho)
        return min(range(len(rhos)), key=lambda i: abs(rhos[i] - rho) if math.isfinite(rhos[i]) else math.inf)

    return [states[place(level)] for level in levels]


def published_targets(
    teacher: Teacher,
    seeds: Tensor,
    grid: Grid,
    name: str | None,
    base: Solver,
    options: Mapping[str, Any],
    count: int,
    scale: int,
) -> list[Tensor]:
    """Every ``scale``-th state of a teacher with ``scale`` times ``count`` steps on a grid of the same kind."""
    if name is None:
        raise ValueError("targets: the published ones come from a finer grid of the same name; give grid by name")
    assert grid.schedule is not None
    final = "zero" if grid[len(grid) - 1].is_data else "sigma_min"
    fine = GRIDS[name](grid.schedule, scale * count, final=final)
    single = base.name in SINGLE_STEP
    made = teacher.trajectories(
        seeds, fine, dense=fine, solver="ddim" if single else base.name, options={} if single else dict(options)
    )
    return [made.states[(k + 1) * scale] for k in range(count)]
