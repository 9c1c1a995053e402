"""DPM-Solver-v3 calibrated on a model: its statistics, and the options the paper found best for each NFE."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastode.artifact import Artifact
from fastode.learn import ems
from fastode.learn.calibration import Calibration, Save, teacher_of
from fastode.learn.replay import Evaluator, levels_for
from fastode.learn.teacher import Teacher, training_seeds
from fastode.schedules.grid import Grid
from fastode.schedules.noise import EDM, NoiseSchedule
from fastode.solvers.coefficients import check_choice
from fastode.solvers.dpm_solver_v3 import Statistics, dpm_solver_v3

PUBLISHED = {
    "edm": (1200, 1024),
    "edm, 10 steps or more": (120, 4096),
    "vp": (1200, 4096),
    "latent": (120, 1024),
    "guided": (250, 1024),
}
"""Levels N and images K of the published statistics."""


def recommended(nfe: int, schedule: NoiseSchedule | None, *, guided: bool = False) -> dict[str, Any]:
    """The published options for ``nfe`` steps: those of the scripts for CIFAR-10 with EDM and with ScoreSDE (VP), and of
    guided sampling."""
    if guided:
        return {"order": 2, "c_pseudo": True}
    if nfe <= 5:
        return {"p_pseudo": True, "lower_order_final": False}
    if isinstance(schedule, EDM):
        return {"corrector": nfe == 6}
    return {"corrector": nfe not in (9, 10)}


CANDIDATES: tuple[dict[str, Any], ...] = (
    {"order": 2, "c_pseudo": True},
    {"order": 3, "c_pseudo": True},
    {"order": 3},
    {"order": 3, "p_pseudo": True, "lower_order_final": False},
    {"order": 3, "corrector": False},
)
"""Published settings of one model or another; which is best depends on the model and the NFE."""


def train(
    denoiser: Any,
    *,
    solver: str = "unipc",
    nfe: int = 5,
    options: Mapping[str, Any] | None = None,
    guidance_scale: float | None = None,
    class_labels: Any = None,
    samples: int = 1024,
    seed: int = 0,
    teacher: Teacher | None = None,
    save: Save | None = None,
    progress: bool = True,
    minutes: float = math.inf,
    grid: str | Grid | None = None,
    levels: int = 1200,
    data: Tensor | None = None,
    statistics: str | Statistics | None = None,
    derivative: str = "auto",
    reduce: str = "element",
    smooth: int | None = None,
    choose: str = "published",
) -> Artifact:
    """DPM-Solver-v3: statistics of the model (arXiv:2310.13268) on ``levels`` + 1 levels from ``samples`` images.

    ``options``: of :func:`fastode.solvers.dpm_solver_v3.dpm_solver_v3`, over those of :func:`recommended`. ``grid``: a name
    in ``GRIDS`` (default: uniform lam), or levels as they are. ``solver``: what it is compared with. ``data``: images
    [K, *sample] of the training set; by default the model's own, from the teacher, as published for Stable Diffusion.
    ``statistics``: an earlier artifact or its file, to serve another NFE without estimating again. ``derivative``: see
    :func:`fastode.learn.ems.moments`; ``reduce``, ``smooth``: see :func:`fastode.learn.ems.statistics`.
    ``choose="measured"`` takes, of the settings published for one model or another and (without ``grid``) of uniform lam and
    uniform time, what has the smallest error on 64 training noises.

    Cost: ``levels`` x ``samples`` x two Jacobian-vector products, each about 3 evaluations. Published:
    1200 x 1024 (EDM, below 10 steps), 120 x 4096 (10 and more), 1200 x 4096 (ScoreSDE), 120 x 1024 (latent), 250 x 1024 (Stable
    Diffusion). 120 x 64 is enough to see the method work on small images. Raises ``ValueError`` naming the argument.
    """
    teacher = teacher_of(denoiser, teacher, guidance_scale=guidance_scale, class_labels=class_labels)
    model = teacher.denoiser
    chosen, _ = levels_for(model, solver, nfe, {}, grid)
    if chosen.steps != nfe:
        raise ValueError(f"solver: v3 makes one evaluation per step, {solver} plans {chosen.steps} steps for {nfe}")
    own = {**recommended(nfe, model.schedule, guided=guidance_scale is not None), **(options or {})}
    check_choice("choose", choose, ("published", "measured"))
    if samples < 2:
        raise ValueError(f"samples: statistics need at least 2 images (published: 1024 to 4096), got {samples}")
    lam = ems.uniform_levels([float(v) for v in chosen.sigmas[[0, -1]]], levels)
    with Calibration("v3", teacher, total=len(lam), save=save, progress=progress, minutes=minutes) as run:
        entries: dict[str, Any] = {"samples": samples, "levels": levels, "reduce": reduce, "smooth": smooth}
        if statistics is None:
            if samples < 32:
                warnings.warn(f"samples: {samples} images are few for a regression per element", stacklevel=2)
            seeds = training_seeds(samples, seed)
            images = teacher.ends(seeds, chosen).end if data is None else data
            alpha = float(chosen.alpha[-1]) if data is None else 1.0
            found, entries["derivative"] = estimate(
                teacher, images.to(teacher.device) / alpha, seeds, lam, run, derivative, reduce, smooth
            )
            entries["data"] = "generated" if data is None else "given"
        else:
            found = read(statistics, teacher, guidance_scale)
        if choose == "measured":
            chosen, own, entries["tried"] = measured(teacher, found, chosen, grid, nfe, solver, options, seed)
        program = dpm_solver_v3(chosen, found, **own)
        weight = program.options["largest_weight"]
        made = run.artifact(
            solver, chosen, method="dpm_solver_v3", options=own, largest_weight=weight, **entries,
            numbers={"lam": found.lam, "l": found.l, "s": found.s, "b": found.b},
        )  # fmt: skip
        run.keep(made)
    made.check(model, guidance_scale=guidance_scale)
    return made


def measured(
    teacher: Teacher,
    found: Statistics,
    planned: Grid,
    grid: str | Grid | None,
    nfe: int,
    solver: str,
    options: Mapping[str, Any] | None,
    seed: int,
) -> tuple[Grid, dict[str, Any], list[dict[str, Any]]]:
    """The grid and options with the smallest error on 64 training noises, and all that were tried."""
    grids = [planned]
    if grid is None:
        grids = [levels_for(teacher.denoiser, solver, nfe, {}, name)[0] for name in ("log_snr", "time_uniform")]
    seeds, best, tried = training_seeds(64, seed), None, []
    for levels in grids:
        for candidate in CANDIDATES:
            own = {**candidate, **(options or {})}
            rmse = teacher.error(dpm_solver_v3(levels, found, **own), seeds).rmse
            tried.append({"grid": levels.name, **own, "rmse": rmse})
            if best is None or rmse < best[0]:
                best = rmse, levels, own
    assert best is not None
    return best[1], best[2], tried


def estimate(
    teacher: Teacher,
    images: Tensor,
    seeds: Tensor,
    lam: Tensor,
    run: Calibration,
    derivative: str = "auto",
    reduce: str = "element",
    smooth: int | None = None,
) -> tuple[Statistics, str]:
    """Statistics of the teacher's model on ``images`` [K, *sample] in the frame alpha = 1, and how they were differentiated."""
    if len(images) != len(seeds):
        raise ValueError(f"data: need {len(seeds)} images, one per sample, got {len(images)}")
    if tuple(images.shape[1:]) != teacher.sample_shape:
        raise ValueError(f"data: must be [K, {', '.join(map(str, teacher.sample_shape))}], got {list(images.shape)}")

    def tick(_: int) -> bool:
        run.step()
        return run.late

    moments = ems.moments(
        lambda rows: Evaluator(teacher, seeds[rows], check=False), images, lam, seeds,
        derivative=derivative, batch=teacher.batch, tick=tick,
    )  # fmt: skip
    return ems.statistics(moments, smooth=smooth, reduce=reduce), moments.derivative


def read(statistics: str | Statistics | Artifact, teacher: Teacher, guidance_scale: float | None) -> Statistics:
    """Statistics from an artifact, which must belong to the teacher's model."""
    if isinstance(statistics, Statistics):
        return statistics
    artifact = statistics if isinstance(statistics, Artifact) else Artifact.load(Path(statistics))
    if artifact.method != "dpm_solver_v3":
        raise ValueError(f"statistics: must be a dpm_solver_v3 artifact, got {artifact.method!r}")
    artifact.check(teacher.denoiser, guidance_scale=guidance_scale)
    return Statistics(**artifact.numbers)
