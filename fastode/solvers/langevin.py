"""Predictor-corrector sampling: a step of the reverse SDE, and Langevin steps at the level where it stands."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastode.program import Form, Trace
from fastode.schedules.grid import Level
from fastode.schedules.noise import VE, SubVP, VPLinear
from fastode.solvers.coefficients import check_choice
from fastode.solvers.score_sde import PREDICTORS, beta_of, check_sde, index_of, predict, score_of
from fastode.solvers.solver import Solver

CORRECTORS = ("none", "langevin", "annealed")


def predictor_corrector(
    p: Trace,
    *,
    predictor: str = "reverse_diffusion",
    corrector: str = "none",
    snr: float = 0.16,
    corrector_steps: int = 1,
    probability_flow: bool = False,
    final: str = "mean",
    step: str = "1/N",
    levels: int | None = None,
    norm: str = "sample",
    first: str = "corrector",
    mask: Tensor | None = None,
) -> Form:
    """Predictor-corrector samplers of score-SDE (arXiv:2011.13456, Algorithms 2 and 3): weak order 1, step size in t.

    At each of the grid's N levels (:func:`score_sde_grid`) ``corrector_steps`` corrections and one prediction are made, one
    evaluation each: NFE N (M + 1). The corrections, with fresh noise z and the score S, are

        x <- x + h S + sqrt(2 h) z,    h = 2 a (snr |z| / |S|)^2  ("langevin"),    h = 2 a (snr sigma)^2  ("annealed")

    with a = 1 for VE and 1 - beta_i for VP and sub-VP (published code has no such number for sub-VP and fails there). The
    predictions are those of :func:`predict`.

    ``norm``: |z| and |S| are Euclidean norms of each sample; "batch": their means over the batch, as in published code,
    where a sample's result depends on its batch mates. ``final``: what the last prediction returns: its "mean" (published,
    a denoising without a further evaluation), with noise ("noisy"), or "none": stop at the last level. ``step``: the step
    of Euler-Maruyama, "1/N" as published (N steps make a full unit of time, although the grid stops at eps) or the grid's
    "spacing". ``levels``: N of the discrete companions beta_i and sigma_i, by default the grid's. ``first``: published code
    runs the corrector before the predictor at each level, the paper's listing after it ("predictor").

    ``mask``: [*sample], 1 on elements that are given: inpainting (appendix I.2). The start must then hold the data y there,
    without noise. After each level's corrections, and after the prediction, given elements are overwritten by alpha y +
    sigma z with fresh noise of the same level; the result has alpha y there (the data itself on VE). Published code
    returns the rest with the last step's noise (``final="noisy"``), although it means not to.
    """
    check_choice("predictor", predictor, PREDICTORS)
    check_choice("corrector", corrector, CORRECTORS)
    check_choice("final", final, ("mean", "noisy", "none"))
    check_choice("step", step, ("1/N", "spacing"))
    check_choice("norm", norm, ("sample", "batch"))
    check_choice("first", first, ("corrector", "predictor"))
    schedule = check_sde(p.grid.schedule)
    given = None if mask is None else check_mask(mask)
    if not (math.isfinite(snr) and snr > 0):
        raise ValueError(f"snr: must be positive, got {snr}")
    if isinstance(corrector_steps, bool) or not isinstance(corrector_steps, int) or corrector_steps < 1:
        raise ValueError(f"corrector_steps: must be a whole number of at least 1, got {corrector_steps!r}")
    if levels is not None and (isinstance(levels, bool) or not isinstance(levels, int) or levels < 2):
        raise ValueError(f"levels: must be a whole number of at least 2, got {levels!r}")
    if predictor == "ancestral" and (isinstance(schedule, SubVP) or probability_flow):
        why = "sub-VP has no ancestral sampler" if isinstance(schedule, SubVP) else "the probability flow has none"
        raise ValueError(f"predictor: {why}; use reverse_diffusion or euler_maruyama")
    if predictor == "none" and corrector == "none":
        raise ValueError("predictor, corrector: one of them must do something")
    grid = list(p.grid)
    count = levels or len(grid)
    discrete = predictor in ("reverse_diffusion", "ancestral") and not isinstance(schedule, SubVP)
    if isinstance(schedule, VPLinear) and (discrete or corrector != "none") and schedule.beta_max >= count:
        raise ValueError(
            f"levels: beta_i reaches beta_max/N = {schedule.beta_max:g}/{count}, and must stay below 1; use more levels, or "
            "euler_maruyama without a corrector"
        )
    p.consistent = False  # the reverse SDE is discretised: not exact, not even on a single data point
    repeats = corrector_steps if corrector != "none" else 0

    def correct(x: Form, s: Level) -> Form:
        i = index_of(s.t, count)
        a = 1.0 if isinstance(schedule, VE) else 1 - beta_of(schedule, i, count)
        for _ in range(repeats):
            x = p.land(langevin_step(p, x, s, corrector, snr, a, norm), s)
        return p.land(impute(x, s), s) if repeats else x

    def impute(x: Form, s: Level, *, noisy: bool = True) -> Form:
        if given is None:
            return x
        known = (given * s.alpha) * p.start()
        return (1 - given) * x + (known + (given * s.sigma) * p.noise() if noisy else known)

    x = p.start()
    for k, s in enumerate(grid):
        last = k == len(grid) - 1
        if first == "corrector":
            x = correct(x, s)
        if last and final == "none":
            x = p.keep(impute(x, s, noisy=False))
            break
        if predictor != "none":
            length = 1 / count if step == "1/N" else (s.t if last else s.t - grid[k + 1].t)
            score = score_of(x, p.denoise(x, s), s)
            mean, std = predict(predictor, schedule, x, score, s.t, length, count, probability_flow)
            quiet = not std or (last and final == "mean")
            x = p.keep(mean if quiet else mean + std * p.noise())
        x = p.keep(impute(x, s, noisy=not last))
        if not last:
            x = p.land(x, grid[k + 1])
            if first == "predictor":
                x = correct(x, grid[k + 1])
    return x


def check_mask(mask: Tensor) -> Tensor:
    """``mask`` in float64. Raises ``ValueError`` unless it is [*sample] in [0, 1]."""
    if not isinstance(mask, Tensor) or mask.ndim < 1:
        raise ValueError("mask: must be a tensor [*sample], 1 on elements that are given")
    value = mask.double()
    if not bool(((value >= 0) & (value <= 1)).all()):
        raise ValueError("mask: must be in [0, 1]")
    return value


def langevin_step(p: Trace, x: Form, s: Level, corrector: str, snr: float, a: float, norm: str) -> Form:
    """One Langevin correction at level ``s``: one evaluation, one draw."""
    score, z = score_of(x, p.denoise(x, s), s), p.noise()
    if corrector == "annealed":
        h: Any = 2 * a * (snr * s.sigma) ** 2
    elif norm == "sample":
        h = 2 * a * (snr * p.norm(z) / p.norm(score)) ** 2
    else:
        (ratio,) = p.late(("ratio",), _ratio_of_means, norms=(z, score))
        h = 2 * a * (snr * ratio) ** 2
    return x + h * score + (2 * h) ** 0.5 * z


def _ratio_of_means(noise: Tensor, score: Tensor) -> tuple[Tensor]:
    """mean |z| / mean |S| over the batch: one number for all."""
    return (torch.mean(noise.double()) / torch.mean(score.double()),)


pc = Solver("pc", predictor_corrector)
"""The predictor-corrector sampler as a solver; its grids are those of :func:`score_sde_grid`."""

PUBLISHED: dict[str, dict[str, Any]] = {
    "cifar10_ve": {
        "schedule": VE(0.01, 50.0),
        "levels": 1000,
        "options": {"predictor": "reverse_diffusion", "corrector": "langevin", "snr": 0.16},
    },
    "cifar10_ddpm": {"schedule": VPLinear(), "levels": 1000, "options": {"predictor": "ancestral"}},
    "cifar10_vp": {"schedule": VPLinear(), "levels": 1000, "options": {"predictor": "euler_maruyama"}},
    "cifar10_subvp": {"schedule": SubVP(), "levels": 1000, "options": {"predictor": "euler_maruyama"}},
    "celeba64_ve": {
        "schedule": VE(0.01, 90.0),
        "levels": 1000,
        "options": {"predictor": "reverse_diffusion", "corrector": "langevin", "snr": 0.17},
    },
    "bedroom256_ve": {
        "schedule": VE(0.01, 378.0),
        "levels": 2000,
        "options": {"predictor": "reverse_diffusion", "corrector": "langevin", "snr": 0.075},
    },
    "church256_ve": {
        "schedule": VE(0.01, 380.0),
        "levels": 2000,
        "options": {"predictor": "reverse_diffusion", "corrector": "langevin", "snr": 0.075},
    },
    "ffhq256_ve": {
        "schedule": VE(0.01, 348.0),
        "levels": 2000,
        "options": {"predictor": "reverse_diffusion", "corrector": "langevin", "snr": 0.075},
    },
    "ffhq1024_ve": {
        "schedule": VE(0.01, 1348.0),
        "levels": 2000,
        "options": {"predictor": "reverse_diffusion", "corrector": "langevin", "snr": 0.15},
    },
    "cifar10_ncsn": {
        "schedule": VE(0.01, 1.0),
        "levels": 10,
        "options": {"predictor": "none", "corrector": "annealed", "snr": 0.316, "corrector_steps": 100},
    },
    "cifar10_ncsnv2": {
        "schedule": VE(0.01, 50.0),
        "levels": 232,
        "options": {"predictor": "none", "corrector": "annealed", "snr": 0.176, "corrector_steps": 5},
    },
    "celeba_ncsnv2": {
        "schedule": VE(0.01, 90.0),
        "levels": 500,
        "options": {"predictor": "none", "corrector": "annealed", "snr": 0.128, "corrector_steps": 5},
    },
    "bedroom128_ncsnv2": {
        "schedule": VE(0.01, 190.0),
        "levels": 1086,
        "options": {"predictor": "none", "corrector": "annealed", "snr": 0.095, "corrector_steps": 3},
    },
}
"""The published settings, by data set: schedule, number of levels, options of :data:`pc` (the paper's section 4, appendix G,
and the public configurations)."""


def published(name: str) -> tuple[Any, dict[str, Any]]:
    """(grid, options) of a published setting: ``pc(grid, **options)`` is its program."""
    from fastode.solvers.score_sde import score_sde_grid

    if name not in PUBLISHED:
        raise ValueError(f"name: published settings are {', '.join(PUBLISHED)}, got {name!r}")
    setting = PUBLISHED[name]
    return score_sde_grid(setting["schedule"], setting["levels"]), dict(setting["options"])
