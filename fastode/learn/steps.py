"""Optimised time steps (Xue et al., CVPR 2024, arXiv:2402.17376): levels that minimise a bound of the global error.

In u = x/sigma a step of any solver adds a weighted sum of denoised estimates, u_{s+1} = u_s + sum_j w_sj D_j; the weights are
read off the program (:func:`step_weights`). If the estimate at level i is wrong by at most e_i = sigma_i^p / alpha_i (of the
variance preserving process; p = 1 for pixels, 2 for latents), the sample is wrong by at most

    J = |w_0 e| + |w_{N-1} e| + sum_{0 < s < c} |w_s e| + sum_i | sum_{c <= s < N-1} w_si e_i |

with Euclidean norms over j: errors of the first, the last and the first c steps are never let cancel. No network is called.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy
import torch

from fastode.artifact import Artifact
from fastode.learn.calibration import GRID_NAMES, Calibration, Save, best_uniform, planned, teacher_of
from fastode.learn.teacher import Teacher, training_seeds
from fastode.program import Program
from fastode.scalar import Late
from fastode.schedules.grid import Grid
from fastode.schedules.noise import EDM, NoiseSchedule
from fastode.schedules.spacing import GRIDS, explicit
from fastode.solvers import SOLVERS

Minimizer = Literal["smoothed", "trust-constr"]

PAPER = ("dpm_solver_pp", {"order": 3, "exact": True})
"""The solver whose weights the paper writes down: exponential Adams-Bashforth of order 3, lower at both ends."""

LARGEST_RATIO, SMALLEST_GAP = 5.0, 1e-3


@dataclass(frozen=True, eq=False)
class Placement:
    """An optimised grid: where it was started, the objective there, and whether its gaps are plausible."""

    grid: Grid
    value: float
    start: str
    plausible: bool


def step_weights(program: Program) -> numpy.ndarray:
    """w [steps, NFE]: what each step adds to x/sigma, as weights of the denoised estimates. Sums over steps are
    ``program.unroll()`` over the last sigma. Raises ``ValueError`` where x/sigma or the weights have no value."""
    if program.late:
        raise ValueError(f"solver: {program.name} has late coefficients; its weights are not known before a run")
    if program.draws:
        raise ValueError(f"solver: {program.name} injects noise; the bound is for deterministic solvers")
    if not bool((program.grid.sigma > 0).all()):
        raise ValueError("grid: the bound is on x/sigma, so the last level must be above sigma = 0")
    made: dict[int, numpy.ndarray] = {0: numpy.zeros(program.nfe)}
    for stage, table in enumerate((program.init, *(s.table for s in program.stages)), -1):
        for write, form in table.rows():
            row = numpy.zeros(program.nfe)
            for atom, c in form.terms.items():
                if isinstance(c, Late) or atom.kind not in ("value", "output"):
                    continue
                if atom.kind == "value":
                    row += float(c) * made[atom.index]
                else:
                    row[stage] += float(c)
            made[write] = row
    scaled = [made[v] / s for v, s in zip(program.states, program.grid.sigma.tolist(), strict=True)]
    return numpy.diff(numpy.stack(scaled), axis=0)


def objective(program: Program, *, power: float = 1.0, truncate: int = 3, smooth: float = 0.0) -> float:
    """J of ``program`` on its grid; ``smooth`` = d replaces every |y| by sqrt(y^2 + d^2)."""
    rho = program.sigmas.numpy()
    # sigma^p / alpha with alpha = 1/sqrt(1 + rho^2), sigma = rho alpha
    error = step_weights(program) * (rho**power * (1 + rho**2) ** ((1 - power) / 2))
    n = len(error)
    alone = sorted({0, n - 1, *range(1, min(truncate, n - 1))})
    total = float(numpy.sqrt((error[alone] ** 2).sum(1) + smooth**2).sum())
    rest = error[max(truncate, 1) : n - 1].sum(0)
    return total + float(numpy.sqrt(rest**2 + smooth**2).sum())


def plausible(lam: Sequence[float] | numpy.ndarray) -> bool:
    """False for grids that win by cancellation: a gap below 0.001, or neighbouring gaps more than fivefold apart."""
    gaps = numpy.diff(numpy.asarray(lam, dtype=float))
    ratio = gaps[1:] / gaps[:-1] if len(gaps) > 1 else numpy.ones(1)
    return bool((gaps >= SMALLEST_GAP).all() and (numpy.maximum(ratio, 1 / ratio) <= LARGEST_RATIO).all())


def optimise(
    schedule: NoiseSchedule,
    steps: int,
    *,
    solver: str = PAPER[0],
    options: Mapping[str, Any] | None = None,
    power: float = 1.0,
    truncate: int = 3,
    minimizer: Minimizer = "smoothed",
    starts: Sequence[str] = GRID_NAMES,
    tick: Callable[[], Any] | None = None,
) -> list[Placement]:
    """Minimise J over the inner levels of ``steps`` steps on ``schedule``, from every start; best plausible first.

    ``solver``, ``options``: whose weights (default: the paper's). ``power``: p. ``truncate``: c; 0 must not be minimised
    well, see :func:`plausible`. ``starts``: names of ``GRIDS``; uniform lam, uniform t, Karras and quadratic t are the
    paper's. ``minimizer``: "trust-constr", the paper's, stalls on the kinks of J from about 8 steps; "smoothed" moves
    softmax gaps by L-BFGS while the kinks sharpen, and ends lower. Float64 throughout; needs scipy.
    """
    try:
        from scipy import optimize
    except ImportError as error:
        raise ImportError("optimised steps need scipy: pip install 'fastode[grids]'") from error
    if minimizer not in ("smoothed", "trust-constr"):
        raise ValueError(f"minimizer: must be 'smoothed' or 'trust-constr', got {minimizer!r}")
    if not power > 0:
        raise ValueError(f"power: must be positive, got {power}")
    if isinstance(truncate, bool) or not isinstance(truncate, int) or truncate < 0:
        raise ValueError(f"truncate: must be a whole number of at least 0, got {truncate!r}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 2:
        raise ValueError(f"steps: at least 2, or there is no level to move; got {steps!r}")
    if not (0 < schedule.sigma_min < schedule.sigma_max < math.inf):
        raise ValueError(
            f"schedule: the bound needs 0 < sigma_min < sigma_max < inf in the EDM frame, got {schedule.sigma_min:g} and "
            f"{schedule.sigma_max:g}; learn a grid by gradient instead"
        )
    chosen, own = SOLVERS[solver], dict(PAPER[1] if options is None and solver == PAPER[0] else options or {})
    first, last = -math.log(schedule.sigma_max), -math.log(schedule.sigma_min)

    def grid_of(inner: numpy.ndarray) -> Grid:
        sigmas = numpy.exp(-numpy.concatenate([[first], inner, [last]]))
        sigmas[0], sigmas[-1] = schedule.sigma_max, schedule.sigma_min
        return explicit(schedule, torch.from_numpy(sigmas))

    def value(inner: numpy.ndarray, smooth: float = 0.0) -> float:
        try:
            program = chosen(grid_of(inner), **own)
        except (ValueError, ZeroDivisionError):  # two levels fell together: as bad as can be
            return 1e6
        return objective(program, power=power, truncate=truncate, smooth=smooth)

    def smoothed(inner: numpy.ndarray) -> numpy.ndarray:
        logits = numpy.log(numpy.diff(numpy.concatenate([[first], inner, [last]])))
        logits -= logits[-1]

        def levels(theta: numpy.ndarray) -> numpy.ndarray:
            gaps = numpy.exp(numpy.append(theta, 0.0) - max(theta.max(), 0.0))
            return first + (last - first) * numpy.cumsum(gaps)[:-1] / gaps.sum()

        theta = logits[:-1]
        for smooth in (1.0, 0.2, 0.05, 0.01, 2e-3, 4e-4, 1e-4):
            theta = optimize.minimize(lambda th, d=smooth: value(levels(th), d), theta, method="L-BFGS-B").x
            if tick is not None:
                tick()
        return levels(theta)

    def trusted(inner: numpy.ndarray) -> numpy.ndarray:
        # gaps of [first, inner, last] at least 0
        matrix = numpy.zeros((steps, steps - 1))
        matrix[numpy.arange(steps - 1), numpy.arange(steps - 1)] = 1
        matrix[numpy.arange(1, steps), numpy.arange(steps - 1)] = -1
        low = numpy.concatenate([[first], numpy.zeros(steps - 2), [-last]])
        bounds = optimize.LinearConstraint(matrix, low, numpy.inf)
        with numpy.errstate(all="ignore"):
            found = optimize.minimize(value, inner, method="trust-constr", constraints=[bounds]).x
        if tick is not None:
            tick()
        return numpy.sort(found)

    placements = []
    for name in starts:
        begun = -GRIDS[name](schedule, steps).sigmas.log().numpy()
        inner = (smoothed if minimizer == "smoothed" else trusted)(begun[1:-1])
        lam = numpy.concatenate([[first], inner, [last]])
        if not (numpy.diff(lam) > 0).all():
            continue
        found = grid_of(inner)
        grid = Grid(found.sigma, found.alpha, found.t, schedule, f"optimised p={power:g}")
        placements.append(Placement(grid, value(inner), name, plausible(lam)))
    return sorted(placements, key=lambda p: (not p.plausible, p.value))


def train(
    denoiser: Any,
    *,
    solver: str = "unipc",
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
    powers: Sequence[float] | float = (1.0, 2.0),
    weights: str = "both",
    truncate: int = 3,
    minimizer: Minimizer = "smoothed",
) -> Artifact:
    """Optimised time steps: the grid of ``solver`` that minimises the bound, chosen among few by trajectories.

    Minimises with each of ``powers``, for the solver's own ``weights`` ("solver"), the paper's ("paper") or "both", and
    takes the plausible result with the smallest error on ``samples`` trajectories; with one power and one kind of weights
    only the starts compete. The card lists all of them, and the best uniform placement beside.
    """
    if weights not in ("solver", "paper", "both"):
        raise ValueError(f"weights: must be 'solver', 'paper' or 'both', got {weights!r}")
    teacher = teacher_of(denoiser, teacher, guidance_scale=guidance_scale, class_labels=class_labels)
    schedule = teacher.denoiser.schedule or EDM()
    grid, chosen = planned(teacher.denoiser, solver, nfe, options)
    values = [powers] if isinstance(powers, (int, float)) else list(powers)
    kinds: list[tuple[str, str, dict[str, Any]]] = []
    if weights != "paper":
        kinds.append(("solver", solver, chosen))
    if weights != "solver":
        kinds.append(("paper", PAPER[0], dict(PAPER[1]) | ({"afs": True} if chosen.get("afs") else {})))
    seeds = training_seeds(samples, seed)
    tried: list[dict[str, Any]] = []
    with Calibration(
        "steps", teacher, total=7 * 4 * len(kinds) * len(values), save=save, progress=progress, minutes=minutes
    ) as run:
        settings = {"samples": samples, "seed": seed, "truncate": truncate, "minimizer": minimizer}
        least = math.inf
        for kind, whose, own in kinds:
            for power in values:
                if run.late and tried:
                    break
                found = optimise(
                    schedule, grid.steps, solver=whose, options=own, power=power, truncate=truncate,
                    minimizer=minimizer, tick=run.step,
                )  # fmt: skip
                for place in _distinct([p for p in found if p.plausible]):
                    error = teacher.error(SOLVERS[solver](place.grid, **chosen), seeds)
                    tried.append(
                        {
                            "weights": kind, "power": power, "start": place.start, "objective": place.value,
                            "rmse": error.rmse, "sigmas": place.grid.sigmas.tolist(),
                        }
                    )  # fmt: skip
                    if error.rmse < least:
                        least = error.rmse
                        run.keep(
                            run.artifact(
                                solver, place.grid, options=chosen, settings=settings, error=error, tried=tried
                            )
                        )
        if run.best is None:
            raise ValueError("steps: every minimum was a grid of cancelling errors; use truncate=3")
        best = run.best
        _, _, uniform = best_uniform(teacher, solver, nfe, options, seeds)
        run.keep(
            run.artifact(
                solver,
                best.grid,
                options=chosen,
                settings=settings,
                error=best.card["error"],
                uniform=uniform,
                tried=tried,
            )
        )
    assert run.best is not None
    return run.best


def _distinct(placements: Sequence[Placement], tolerance: float = 0.02) -> list[Placement]:
    """One of each group of placements whose levels agree to ``tolerance`` in lam."""
    kept: list[Placement] = []
    for place in placements:
        lam = place.grid.sigmas.log()
        if all(float((lam - other.grid.sigmas.log()).abs().max()) > tolerance for other in kept):
            kept.append(place)
    return kept
