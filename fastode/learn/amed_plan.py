"""Settings of AMED's training, and where its levels begin."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastode.api import grid_maker
from fastode.denoisers.base import Denoiser
from fastode.learn.calibration import GRID_NAMES
from fastode.learn.teacher import Teacher, refine, training_seeds
from fastode.learn.unroll import feature_distance, squared
from fastode.nets.predictor import AMEDPredictor, Predictor, StepTable
from fastode.schedules.grid import Grid
from fastode.schedules.spacing import GRIDS
from fastode.solvers import SOLVERS, Solver, plugin
from fastode.solvers.amed import OUTPUT

Distance = Callable[[Tensor, Tensor], Tensor]

ONE_STEP = ("amed", "ddim", "dpm_solver_2")
"""Students that remember nothing from one step to the next."""


def student(base: str) -> Solver:
    """AMED-Solver itself for "amed", else AMED plugged into the solver of that name."""
    return SOLVERS[base] if SOLVERS[base].name == "amed" else plugin(SOLVERS[base])


@dataclass(frozen=True)
class Plan:
    """Settings of one run, checked, with nothing left to choose."""

    predictor: str
    loss: str
    images: int
    batch: int
    micro: int
    checkpoint: bool
    lr: float
    cosine: bool
    scale_dir: float
    scale_time: float
    levels: str
    place: str
    start: str
    teacher_solver: str
    intermediate: int

    @property
    def updates(self) -> int:
        """Batches."""
        return math.ceil(self.images / self.batch)

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def check_features(self, denoiser: Denoiser) -> None:
        if self.predictor == "features" and OUTPUT not in (denoiser.features or ()):
            raise ValueError(
                f"predictor: {denoiser.name} offers no {OUTPUT!r} to look at; train with predictor='table', or give the "
                "network a `features` argument"
            )

    def make_predictor(self, teacher: Teacher, grid: Grid) -> Predictor:
        c, a = self.scale_dir, self.scale_time
        if self.predictor == "features":
            return AMEDPredictor(feature_size(teacher, grid), scale_dir=c, scale_time=a).to(teacher.device)
        table = StepTable(grid.steps, scale_dir=c, scale_time=a)
        if self.place == "base":
            r = inner_points(grid)
            with torch.no_grad():
                table.free[:, 0] = torch.logit(torch.tensor(r, dtype=torch.float64))
        return table


def plan_of(**given: Any) -> Plan:
    """Fill in what was left open. Raises ``ValueError`` naming what cannot be."""
    for name, known in (("predictor", ("table", "features")), ("loss", ("rollout", "steps"))):
        if given[name] not in known:
            raise ValueError(f"{name}: must be {' or '.join(map(repr, known))}, got {given[name]!r}")
    choices = {"place": ("base", "middle"), "start": ("teacher", "student"), "levels": ("learned", "fixed")}
    for name, known in choices.items():
        if given[name] not in (*known, None):
            raise ValueError(f"{name}: must be {' or '.join(map(repr, known))}, got {given[name]!r}")
    base, nfe = SOLVERS[given.pop("solver")].name, given.pop("nfe")
    table, rollout = given["predictor"] == "table", given["loss"] == "rollout"
    own = {
        "images": 3200 if table else 10_000,
        "lr": 0.1 if table else 5e-3,
        "cosine": rollout,
        "scale_dir": 0.05 if table else 0.01,
        "scale_time": 0.2 if table else 0.0,
        "levels": "learned" if rollout and table else "fixed",
        "place": "base" if base != "amed" else "middle",
        "start": "teacher" if base in ONE_STEP else "student",
        "teacher_solver": base if base != "amed" else "dpm_solver_2" if nfe < 5 else "heun",
        "intermediate": 1 if base in ("amed", "dpm_solver_2") else 2,
    }
    if given["levels"] == "learned" and not rollout:
        raise ValueError("levels: a step is compared at the levels of the teacher; learn them with loss='rollout'")
    if given["start"] == "teacher" and base not in ONE_STEP:
        raise ValueError(f"start: {base} has a history, which a step from the teacher's state does not; use 'student'")
    plan = Plan(**{name: own[name] if value is None else value for name, value in given.items()})
    for name in ("images", "batch", "micro"):
        value = getattr(plan, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: must be a whole number of at least 1, got {value!r}")
    if not plan.lr > 0:
        raise ValueError(f"lr: must be positive, got {plan.lr}")
    if isinstance(plan.intermediate, bool) or not isinstance(plan.intermediate, int) or plan.intermediate < 0:
        raise ValueError(f"intermediate: must be a whole number of at least 0, got {plan.intermediate!r}")
    _ = SOLVERS[plan.teacher_solver]
    return plan


def placed(
    chosen: Solver, base: str, nfe: int, options: dict[str, Any], grid: str | None, teacher: Teacher, seeds: Tensor
) -> tuple[Grid, dict[str, Any]]:
    """A grid and options with ``nfe`` evaluations; without a name, the placement on which the student begins best."""
    for name in ("r", "scale_dir", "scale_time", "predictor"):
        if name in options:
            raise ValueError(f"options: {name} is what is learned; leave it out")
    schedule = teacher.denoiser.schedule
    assert schedule is not None
    names = [grid] if grid is not None else ["time_uniform"] if SOLVERS[base].name == "amed" else list(GRID_NAMES)
    found: list[tuple[Grid, dict[str, Any]]] = []
    why: ValueError | None = None
    for name in names:
        try:
            found.append(chosen.plan(nfe, grid_maker(chosen, schedule, name), **options))
        except ValueError as error:
            why = why or error
    if not found:
        raise ValueError(
            f"{why}. AMED makes two evaluations per step, one less in all with the analytical first step (afs): even "
            "numbers need afs=False, odd ones afs=True"
        )
    if len(found) == 1:
        return found[0]

    def begins(plan: tuple[Grid, dict[str, Any]]) -> float:
        return teacher.error(chosen(plan[0], r=inner_points(plan[0]), **plan[1]), seeds[:32]).rmse

    return min(found, key=begins)


def between(grid: Grid, inside: int) -> Grid:
    """``grid`` with ``inside`` levels more in every interval, placed as its own: by the same formula with more steps."""
    fine = finer(grid, (inside + 1) * grid.steps)
    return refine(grid, inside) if fine is None else fine


def finer(grid: Grid, steps: int) -> Grid | None:
    """The placement that ``grid`` is named after, with ``steps`` steps, if the levels of ``grid`` are among its own."""
    words = grid.name.split()
    if grid.schedule is None or not words or words[0] not in GRIDS or steps % grid.steps:
        return None
    own = {k: float(v) for k, v in re.findall(r"(\w+)=([\d.]+)", grid.name)}
    final = "zero" if grid[-1].is_data else "sigma_min"
    try:
        fine = GRIDS[words[0]](grid.schedule, steps, **{"final": final, **own})
    except (TypeError, ValueError):
        return None
    picked = fine.sigmas[:: steps // grid.steps]
    close = torch.allclose(picked, grid.sigmas, rtol=1e-9, atol=0) and len(picked) == len(grid)
    return fine if close else None


def inner_points(grid: Grid) -> list[float]:
    """r of each step for which the inner levels are those of the same placement with twice the steps; 1/2 where there is
    none."""
    fine = finer(grid, 2 * grid.steps)
    found = []
    for i in range(grid.steps):
        t, t_next = float(grid[i].rho), float(grid[i + 1].rho)
        if fine is None or not (0 < t_next < t < math.inf):
            found.append(0.5)
            continue
        r = math.log(t / float(fine[2 * i + 1].rho)) / math.log(t / t_next)
        found.append(min(max(r, 0.01), 0.99))
    return found


def feature_size(teacher: Teacher, grid: Grid) -> int:
    """Pooled numbers per sample that the denoiser offers, found by one evaluation."""
    seeds = training_seeds(1)
    with torch.no_grad():
        _, made = teacher.denoiser.denoise_and_features(
            teacher.start(seeds, grid), grid[0], teacher.condition(seeds), names=(OUTPUT,)
        )
    return made[OUTPUT].mean(1).flatten(1).shape[1]


def distance_of(module: Any, loss: str) -> Distance:
    if module is None:
        return squared
    if loss != "rollout":
        raise ValueError("module: a loss in features is for samples, so for loss='rollout'")
    if isinstance(module, str):
        where, colon, name = module.partition(":")
        if not colon:
            raise ValueError(f"module: must look like package.module:function, got {module!r}")
        module = getattr(importlib.import_module(where), name)()
    if not callable(module):
        raise TypeError(f"module: must be a network or the name of what makes one, got {type(module).__name__}")
    return feature_distance(module)
