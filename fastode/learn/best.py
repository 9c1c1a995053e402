"""The best solver for a model and a number of evaluations: every method is tried, measured on noise it has not seen, and
the winner is written with the whole table of what was tried.

The order is that of composition: uncalibrated solvers on their usual placements, then every method on the best of them, then
every method that takes a grid once more on the best grid that was found.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastode.artifact import Artifact
from fastode.learn.calibration import GRID_NAMES, Calibration, Save, planned, teacher_of
from fastode.learn.teacher import Error, Teacher, held_out_seeds
from fastode.schedules.grid import Grid
from fastode.solvers import SOLVERS

BASES = ("unipc", "dpm_solver_pp", "ipndm", "ipndm_v", "deis")
"""Solvers whose usual placements are tried, one evaluation per step each."""


def train(
    denoiser: Any,
    *,
    solver: str | None = None,
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
    held_out: int = 64,
    methods: Sequence[str] | str | None = None,
    bases: Sequence[str] | str = BASES,
) -> Artifact:
    """The best of all methods: each is calibrated, measured on ``held_out`` other seeds, and compared.

    ``solver``: only calibrate this one (default: the best uncalibrated of ``bases``). ``methods``: keys of ``TRAINERS``
    (default: all others). A method that cannot do it, or fails, is listed with its reason. ``minutes`` are shared evenly
    between the calibrations still to come. The winner's card holds ``tried``: method, solver, grid, error, seconds, evaluations
    and peak memory of each, the uncalibrated ones first; ``save`` receives the best so far, so an interrupted search keeps it.
    """
    from fastode.learn.methods import TRAINERS, trainer

    teacher = teacher_of(denoiser, teacher, guidance_scale=guidance_scale, class_labels=class_labels)
    names = [methods] if isinstance(methods, str) else list(methods if methods is not None else TRAINERS)
    names = [n for n in names if trainer(n) is not train]
    if not names:
        raise ValueError("methods: nothing to try")
    candidates = [bases] if isinstance(bases, str) else list(bases)
    if solver is not None:
        candidates = [solver]
    seeds = held_out_seeds(held_out, seed + 1)  # not those that the command line measures on
    tried: list[dict[str, Any]] = []
    least: float = math.inf
    rounds = 2 * len(names)
    with Calibration("best", teacher, total=1 + rounds, save=save, progress=progress, minutes=minutes) as run:

        def consider(found: Artifact, error: Error, what: dict[str, Any]) -> None:
            nonlocal least
            tried.append(what | {"rmse": error.rmse, "deviation": error.deviation})
            if error.rmse < least:
                least = error.rmse
                card = {**found.card, **run.card(calibration="best", winner=what["method"], error=error, tried=tried)}
                run.keep(replace(found, card=card))

        uniform: list[tuple[float, str, Grid, dict[str, Any]]] = []
        for name in candidates:
            for grid, chosen in _placements(teacher, name, nfe, options):
                began, before = time.monotonic(), teacher.evaluations
                error = teacher.error(SOLVERS[name](grid, **chosen), seeds)
                uniform.append((error.rmse, name, grid, chosen))
                artifact = run.artifact(name, grid, options=chosen)
                consider(artifact, error, _row("uncalibrated", artifact, began, teacher.evaluations - before))
        if not uniform:
            raise ValueError(f"nfe: none of {', '.join(candidates)} makes exactly {nfe} evaluations here")
        base = min(uniform, key=lambda u: u[0])
        run.step(least)
        best_grid: tuple[float, Grid] | None = None
        todo = [(n, False) for n in names] + [(n, True) for n in names if "grid" in _takes(n)]
        for k, (name, again) in enumerate(todo):
            if run.late:
                break
            if again and best_grid is None:
                continue
            left = (minutes * 60 - run.seconds) / 60 / (len(todo) - k)
            own: dict[str, Any] = {"options": base[3]}
            if "grid" in _takes(name):
                own["grid"] = best_grid[1] if again and best_grid is not None else base[2]
            began, before = time.monotonic(), teacher.evaluations
            what = f"{name} on {best_grid[1].name}" if again and best_grid is not None else name
            try:
                found = trainer(name)(
                    teacher.denoiser, solver=base[1], nfe=nfe, guidance_scale=teacher.guidance_scale,
                    samples=samples, seed=seed, teacher=teacher, progress=False, minutes=max(left, 1e-3), **own,
                )  # fmt: skip
                cost = teacher.evaluations - before
                error = teacher.error(found.program(), seeds)
            except (ValueError, TypeError, RuntimeError, ArithmeticError, ImportError) as failure:
                tried.append({"method": what, "failed": " ".join(str(failure).split())[:300]})
                run.step()
                continue
            consider(found, error, _row(what, found, began, cost))
            if found.method == "grid" and (best_grid is None or error.rmse < best_grid[0]):
                best_grid = error.rmse, found.grid
            run.step(least)
        assert run.best is not None
        finished = {**run.best.card, **run.card(tried=tried, uniform=Error(base[0], math.nan, held_out))}
        run.keep(replace(run.best, card=finished))
    assert run.best is not None
    return run.best


def table(artifact: Artifact) -> str:
    """What :func:`train` tried, best first, as text."""
    rows = sorted(artifact.card["tried"], key=lambda r: r.get("rmse", math.inf))
    lines = [f"{'method':<34} {'solver':<16} {'levels':<28} {'RMSE':>8} {'±':>7} {'seconds':>8} {'evaluations':>12}"]
    for r in rows:
        if "failed" in r:
            lines.append(f"{r['method'][:34]:<34} failed: {r['failed']}")
        else:
            lines.append(
                f"{r['method'][:34]:<34} {r['solver']:<16} {r['grid'][:28]:<28} {r['rmse']:>8.4f} {r['deviation']:>7.4f} "
                f"{r['seconds']:>8.1f} {r['evaluations']:>12,}"
            )
    return "\n".join(lines)


def _row(method: str, artifact: Artifact, began: float, evaluations: int) -> dict[str, Any]:
    return {
        "method": method,
        "solver": artifact.solver,
        "options": dict(artifact.options),
        "grid": artifact.grid.name,
        "nfe": artifact.nfe,
        "seconds": round(time.monotonic() - began, 2),
        "evaluations": evaluations,
        "peak_memory_bytes": artifact.card.get("peak_memory_bytes"),
    }


def _takes(name: str) -> frozenset[str]:
    from fastode.learn.methods import trainer

    return frozenset(inspect.signature(trainer(name)).parameters)


def _placements(
    teacher: Teacher, solver: str, nfe: int, options: Mapping[str, Any] | None
) -> list[tuple[Grid, dict[str, Any]]]:
    found = []
    for name in GRID_NAMES:
        try:
            grid, chosen = planned(teacher.denoiser, solver, nfe, options, name)
            SOLVERS[solver](grid, **chosen)
        except (ValueError, ZeroDivisionError):
            continue
        found.append((grid, chosen))
    return found
