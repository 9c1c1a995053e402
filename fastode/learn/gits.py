"""GITS (Chen et al., ICML 2024, arXiv:2405.11326): a grid chosen among the levels of a dense one by dynamic programming.

Trajectories of a diffusion model have nearly the same shape for all samples: straight, a short bend, straight. So the cost
c_ij of jumping from dense level i to j with one Euler step y_ij = x_i + (sigma_j - sigma_i) d_i, measured on a few
trajectories of a teacher, serves every sample; the best N jumps minimise sum_k gamma^k c over paths from the first dense
level to the last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastode.api import grid_maker
from fastode.artifact import Artifact
from fastode.learn.calibration import Calibration, Save, best_uniform, planned, teacher_of
from fastode.learn.teacher import Error, Teacher, training_seeds
from fastode.schedules.grid import Grid, replace_grid
from fastode.solvers import SOLVERS

METRICS = ("dev", "l1", "l2")


def cost_matrix(states: Sequence[Tensor], directions: Sequence[Tensor], sigmas: Tensor, metric: str = "dev") -> Tensor:
    """c [n, n], float64, mean over the batch; entries on and below the diagonal are 0.

    ``states``: n states [B, *sample] in the EDM frame at the dense levels ``sigmas``; ``directions``: n - 1, d = (x - D)/sigma
    as they were evaluated there. ``metric``: "l1" and "l2" measure y_ij - x_j. "dev" is the distance of y_ij from the
    straight line through the sample's first and last state, minus that of x_j: shape alone, and it may be negative.
    """
    if metric not in METRICS:
        raise ValueError(f"metric: must be one of {', '.join(METRICS)}, got {metric!r}")
    n = len(sigmas)
    if len(states) != n or len(directions) != n - 1:
        raise ValueError(f"states, directions: need {n} and {n - 1}, got {len(states)} and {len(directions)}")
    rows = [x.double().flatten(1) for x in states]
    slopes = [d.double().flatten(1) for d in directions]
    cost = torch.zeros(n, n, dtype=torch.float64)
    first, last = rows[0], rows[-1]
    unit = (last - first) / (last - first).norm(dim=1, keepdim=True)

    def deviation(x: Tensor) -> Tensor:
        along = x - last
        return (along - (along * unit).sum(1, keepdim=True) * unit).norm(dim=1)

    bend = [deviation(x) for x in rows[:-1]] + [torch.zeros(len(last), dtype=torch.float64)]
    for i in range(n - 1):
        for j in range(i + 1, n):
            y = rows[i] + (sigmas[j] - sigmas[i]) * slopes[i]
            if metric == "dev":
                cost[i, j] = (deviation(y) - bend[j]).mean()
            else:
                cost[i, j] = (y - rows[j]).norm(p=1 if metric == "l1" else 2, dim=1).mean()
    return cost


def search(cost: Tensor, jumps: int, gamma: float = 1.15) -> list[int]:
    """Indices 0 = p_0 < ... < p_jumps = n - 1 that minimise sum_k gamma^k c[p_k, p_k+1]; the smallest index wins a tie.

    V_1(i) = c[i, n-1], V_k(j) = min_i c[j, i] + gamma V_{k-1}(i), with back-pointers; jumps n^2 operations.
    """
    n = len(cost)
    if cost.shape != (n, n):
        raise ValueError(f"cost: must be square, got shape {list(cost.shape)}")
    if isinstance(jumps, bool) or not isinstance(jumps, int) or not 1 <= jumps < n:
        raise ValueError(f"jumps: between 1 and {n - 1} over {n} levels, got {jumps!r}")
    if not gamma > 0:
        raise ValueError(f"gamma: must be positive, got {gamma}")
    if bool((torch.isnan(cost) | (cost == -math.inf)).any()):
        raise ValueError("cost: must be numbers, or infinite for jumps that are not allowed")
    c = cost.tolist()
    value = [c[i][n - 1] for i in range(n - 1)]
    pointers: list[list[int]] = []
    for k in range(2, jumps + 1):
        new, pointer = [math.inf] * (n - 1), [-1] * (n - 1)
        for j in range(n - k):
            for i in range(j + 1, n - k + 1):
                total = c[j][i] + gamma * value[i]
                if total < new[j]:
                    new[j], pointer[j] = total, i
        value = new
        pointers.append(pointer)
    path = [0]
    if not math.isfinite(value[0]):
        raise ValueError(f"cost: allows no path of {jumps} jumps")
    for pointer in reversed(pointers):
        path.append(pointer[path[-1]])
    return [*path, n - 1]


def pick(dense: Grid, indices: Sequence[int], name: str) -> Grid:
    """The grid of some levels of ``dense``."""
    where = list(indices)
    return replace_grid(
        dense, sigma=dense.sigma[where], alpha=dense.alpha[where], t=dense.t[where], schedule=dense.schedule, name=name
    )


def train(
    denoiser: Any,
    *,
    solver: str = "ipndm",
    nfe: int = 5,
    options: Mapping[str, Any] | None = None,
    guidance_scale: float | None = None,
    class_labels: Any = None,
    samples: int = 256,
    seed: int = 0,
    teacher: Teacher | None = None,
    save: Save | None = None,
    progress: bool = True,
    minutes: float = math.inf,
    levels: int = 61,
    dense: str | None = "karras",
    metric: str | Sequence[str] = "dev",
    gamma: float | Sequence[float] = 1.15,
    teacher_solver: str = "ipndm",
    teacher_options: Mapping[str, Any] | None = None,
    teacher_afs: bool = False,
) -> Artifact:
    """GITS: the levels of a dense grid that Euler jumps along teacher trajectories like best.

    ``levels`` of the ``dense`` placement (n; a name of ``GRIDS``), followed by ``teacher_solver`` on ``samples``
    trajectories. With several ``metric`` or ``gamma`` the grid with the smallest error of the student on (at most 64 of)
    the same trajectories is taken. With ``afs=True`` among the options one more level is put behind the first, wherever
    the student then ends closest to the teacher; the first of the steps is analytical, so NFE stays. Published code then
    also follows a teacher whose own first step is analytical (``teacher_afs=True``): such a teacher shares the student's
    error, and the extra level always lands right behind the first.
    """
    teacher = teacher_of(denoiser, teacher, guidance_scale=guidance_scale, class_labels=class_labels)
    assert teacher.denoiser.schedule is not None
    plan, chosen = planned(teacher.denoiser, solver, nfe, options)
    afs = bool(chosen.get("afs", False))
    jumps = plan.steps - afs
    if isinstance(levels, bool) or not isinstance(levels, int) or levels <= plan.steps:
        raise ValueError(f"levels: must be more than the {plan.steps} steps, got {levels!r}")
    metrics = [metric] if isinstance(metric, str) else list(metric)
    gammas = [float(gamma)] if isinstance(gamma, (int, float)) else [float(g) for g in gamma]
    for name in metrics:
        if name not in METRICS:
            raise ValueError(f"metric: must be one of {', '.join(METRICS)}, got {name!r}")
    if not gammas or not all(g > 0 for g in gammas):
        raise ValueError(f"gamma: must be positive, got {gamma}")
    guide = SOLVERS[teacher_solver]
    fine = grid_maker(guide, teacher.denoiser.schedule, dense)(steps=levels - 1, final="sigma_min")
    if not bool(torch.isfinite(fine.sigmas).all()):
        raise ValueError("dense: GITS jumps in sigma/alpha, which must be finite at the first level")
    program = guide(fine, **dict(teacher_options or {}), **({"afs": True} if teacher_afs else {}))
    seeds = training_seeds(samples, seed)
    parts = list(teacher.batches(seeds))
    with Calibration(
        "gits", teacher, total=len(parts) + len(metrics) * len(gammas), save=save, progress=progress, minutes=minutes
    ) as run:
        total = {m: torch.zeros(levels, levels, dtype=torch.float64) for m in metrics}
        ends: list[Tensor] = []
        for part in parts:
            states, seen = teacher.follow(program, part)
            frame = [x / a for x, a in zip(states, fine.alpha.tolist(), strict=True)]
            rows = zip(seen, fine.alpha.tolist()[teacher_afs:-1], fine.sigmas.tolist()[teacher_afs:-1], strict=True)
            slopes = [(x / a - d) / r for (x, d), a, r in rows]
            if teacher_afs:
                slopes.insert(0, frame[0] / math.hypot(1, float(fine.sigmas[0])))
            for m in metrics:
                total[m] += len(part) / len(seeds) * cost_matrix(frame, slopes, fine.sigmas, m)
            ends.append(states[-1])
            run.step()
        judged, truth = seeds[:64], torch.cat(ends)[:64]
        settings = {
            "samples": samples, "seed": seed, "levels": levels, "dense": fine.name, "teacher": teacher_solver,
            "teacher_options": dict(teacher_options or {}), "teacher_afs": teacher_afs, "metric": metrics, "gamma": gammas,
        }  # fmt: skip
        tried: list[dict[str, Any]] = []
        seen_paths: dict[tuple[int, ...], float] = {}
        least = math.inf
        for m in metrics:
            for g in gammas:
                cost = total[m].clone()
                if afs:
                    cost[0, 1] = math.inf  # leave room for the extra level
                path = search(cost, jumps, g)
                candidates = [[0, k, *path[1:]] for k in range(1, path[1])] if afs else [path]
                for indices in candidates:
                    grid = pick(fine, indices, f"gits {m} gamma={g:g}")
                    key = tuple(indices)
                    if key not in seen_paths:
                        made = teacher.sample(SOLVERS[solver](grid, **chosen), judged)
                        # the official choice of the extra level: mean Euclidean distance, not RMSE
                        seen_paths[key] = float((made - truth).double().flatten(1).norm(dim=1).mean())
                    tried.append({"metric": m, "gamma": g, "indices": indices, "distance": seen_paths[key]})
                    if seen_paths[key] < least:
                        least = seen_paths[key]
                        run.keep(run.artifact(solver, grid, options=chosen, settings=settings, tried=tried))
                run.step(least)
        if run.best is None:
            raise FloatingPointError("gits: no candidate gave a finite sample")
        best = run.best
        error = Error.between(teacher.sample(best.program(), judged), truth)
        _, _, uniform = best_uniform(teacher, solver, nfe, options, judged)
        run.keep(
            run.artifact(
                solver, best.grid, options=chosen, settings=settings, error=error, uniform=uniform, tried=tried,
                cost={m: c.tolist() for m, c in total.items()} if levels <= 21 else None,
            )
        )  # fmt: skip
    assert run.best is not None
    return run.best
