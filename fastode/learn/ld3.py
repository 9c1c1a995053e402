"""Grids learned by gradient through the program (LD3: Tong et al., ICLR 2025, arXiv:2405.15506).

Levels are lam_i = lam_0 + (lam_n - lam_0) cumsum(softmax(theta))_i, decreasing in noise by construction and exact at both
ends (uniform in time instead of lam where lam is infinite). With ``told`` each evaluation may also be told another level:
a factor exp(delta) on its noise, |delta| at most half the smallest gap in lam, none on the first. What is learned is the
squared distance of the end point from that of the exact flow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastode.artifact import Artifact
from fastode.learn.calibration import Calibration, Save, best_uniform, planned, teacher_of
from fastode.learn.descent import Loss, descend
from fastode.learn.teacher import Error, Teacher, training_seeds
from fastode.program import Program
from fastode.schedules.grid import Grid
from fastode.solvers import SOLVERS
from fastode.solvers.table import retold


class Gaps:
    """The levels of a grid as softmax gaps. ``theta``: logits [n], a leaf with a gradient, that give ``grid`` back.

    ``grid()`` is the differentiable grid of the logits as they are. ``told(delta)``: factors for ``retold`` from free
    numbers [NFE - 1], bounded to half the smallest gap by tanh.
    """

    def __init__(self, grid: Grid) -> None:
        self.base = grid
        rho = grid.sigmas.detach()
        self.by_time = not bool(torch.isfinite(rho).all() and (rho > 0).all())
        if self.by_time and grid.schedule is None:
            raise ValueError("grid: levels at sigma = 0 or alpha = 0 can only be learned on a schedule")
        self._position = grid.t.detach() if self.by_time else -rho.log()
        gaps = self._position.diff().abs()
        self.theta = (gaps / gaps.sum()).log().requires_grad_(True)

    def grid(self) -> Grid:
        share = torch.softmax(self.theta, 0).cumsum(0)[:-1]
        first, last = self._position[0], self._position[-1]
        inner = first + (last - first) * share
        base, schedule = self.base, self.base.schedule
        if self.by_time:
            assert schedule is not None
            sigma, alpha, t = schedule.sigma(inner), schedule.alpha(inner), inner
        else:
            rho = torch.exp(-inner)
            if schedule is None or bool((base.alpha == 1).all()):
                alpha = torch.ones_like(rho)
                t = rho if schedule is None else schedule.time(rho)
            else:
                t = schedule.time(rho)
                alpha = schedule.alpha(t)
            sigma = alpha * rho

        def pinned(inside: Tensor, ends: Tensor) -> Tensor:
            return torch.cat([ends[:1].detach(), inside, ends[-1:].detach()])

        return Grid(
            pinned(sigma, base.sigma),
            pinned(alpha, base.alpha),
            pinned(t, base.t),
            schedule,
            f"learned from {base.name}",
        )

    def told(self, delta: Tensor) -> list[Any]:
        share = torch.softmax(self.theta, 0)
        span = (self._position[-1] - self._position[0]).abs() if not self.by_time else 1.0
        bound = 0.5 * span * share.min()
        return [1.0, *torch.exp(bound * torch.tanh(delta))]


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
    grid: Grid | str | None = None,
    told: bool = True,
    steps: int = 150,
    batch: int = 16,
    lr: float = 2e-2,
    loss: Loss = "l2",
    checkpoint: bool = True,
    radius: float = 0.0,
) -> Artifact:
    """A grid, and with ``told`` the levels told to the network, learned by gradient through ``solver``.

    Starts from ``grid`` (levels, a name, or an artifact's file;
    default: the solver's best uniform placement) and takes ``steps`` Adam steps of
    ``batch`` of the ``samples`` trajectories. The state with the smallest error on all of them is kept, so the result is
    never worse there than the start: a few numbers against thousands of pixels are not what overfits. ``radius``: the
    paper's soft teacher forcing; its value is 0.001 d / NFE^2 for samples of d elements, which serves perceptual losses;
    0 learns the trajectory itself.
    """
    teacher = teacher_of(denoiser, teacher, guidance_scale=guidance_scale, class_labels=class_labels)
    seeds = training_seeds(samples, seed)
    with Calibration("ld3", teacher, total=steps, save=save, progress=progress, minutes=minutes) as run:
        start, chosen, uniform = started(teacher, solver, nfe, options, grid, seeds)
        gaps = Gaps(start)
        truth = teacher.ends(seeds, start)
        delta = torch.zeros(SOLVERS[solver](start, **chosen).nfe - 1, dtype=torch.float64, requires_grad=True)

        def program() -> Program:
            made = SOLVERS[solver](gaps.grid(), **chosen)
            return retold(made, gaps.told(delta)) if told else made

        def artifact(error: Error) -> Artifact:
            numbers = {}
            if told:
                numbers["told"] = torch.tensor(
                    [float(torch.as_tensor(f).detach()) for f in gaps.told(delta)], dtype=torch.float64
                )
            return run.artifact(
                solver, gaps.grid(), numbers=numbers, options=chosen, settings=settings, error=error, uniform=uniform
            )

        settings = {
            "samples": samples, "seed": seed, "steps": steps, "batch": batch, "lr": lr, "loss": loss, "told": told,
            "radius": radius, "start": start.name,
        }  # fmt: skip
        descend(
            run, [gaps.theta, *([delta] if told else [])], program, truth, truth, artifact, steps=steps, batch=batch,
            lr=[lr, 5 * lr][: 1 + told], loss=loss, checkpoint=checkpoint, radius=radius, seed=seed,
        )  # fmt: skip
    assert run.best is not None
    return run.best


def started(
    teacher: Teacher, solver: str, nfe: int, options: Mapping[str, Any] | None, grid: Grid | str | None, seeds: Tensor
) -> tuple[Grid, dict[str, Any], Error | None]:
    """The grid and options that learning starts from: as given, that of an artifact, a placement by name, or the solver's
    best uniform placement with its error on ``seeds``."""
    if grid is None:
        return best_uniform(teacher, solver, nfe, options, seeds)
    if isinstance(grid, str) and not grid.endswith(".safetensors"):
        return (*planned(teacher.denoiser, solver, nfe, options, grid), None)
    levels = Artifact.load(grid).grid if isinstance(grid, str) else grid
    _, chosen = planned(teacher.denoiser, solver, nfe, options)
    made = SOLVERS[solver](levels, **chosen).nfe
    if made != nfe:
        raise ValueError(f"grid: {solver} makes {made} evaluations on it, not {nfe}")
    return levels, chosen, None
