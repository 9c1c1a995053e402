"""Learning numbers of a program by gradient: the program is run on the reference backend, end to end.

Memory is bounded by checkpointing: only the states between evaluations are kept, and each evaluation is made again when
its gradient is needed, so a batch costs the activations of one evaluation whatever the NFE.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as checkpointed

from fastode.artifact import Artifact
from fastode.backends import reference
from fastode.denoisers.guidance import GUIDANCE_SCALE
from fastode.learn.calibration import Calibration
from fastode.learn.teacher import Error, Teacher, Trajectories
from fastode.program import Program, Stage
from fastode.scalar import Late

Loss = Literal["l2", "l1", "huber"]


def rollout(program: Program, teacher: Teacher, x: Tensor, seeds: Tensor, *, checkpoint: bool = True) -> Tensor:
    """The end point of ``program`` from ``x`` [B, *sample] under the teacher's condition, with gradients to every number
    of the program that has them, and to ``x``."""
    denoiser = teacher.denoiser
    condition = denoiser.check_condition(len(seeds), teacher.condition(seeds), teacher.guidance)
    known: dict[Late, Any] = {} if teacher.guidance_scale is None else {GUIDANCE_SCALE: float(teacher.guidance_scale)}

    def denoise(point: Tensor, stage: Stage, late: Mapping[Late, Any]) -> Tensor:
        def evaluate(state: Tensor) -> Tensor:
            return denoiser.denoise(state, stage.level, condition, guidance=teacher.guidance, known=late)

        if not (checkpoint and torch.is_grad_enabled()):
            return evaluate(point)
        made: Tensor = checkpointed(evaluate, point, use_reentrant=False, preserve_rng_state=False)
        return made

    teacher.evaluations += program.nfe * len(seeds) * (2 if checkpoint and torch.is_grad_enabled() else 1)
    end, _ = reference.run(program, denoise, x.to(teacher.device), known=known)
    return end


def distance(made: Tensor, truth: Tensor, loss: Loss) -> Tensor:
    """Mean over batch and elements: squares, absolute values, or the pseudo-Huber distance of arXiv:2310.14189 (per sample,
    c = 0.00054 sqrt(d))."""
    difference = made - truth
    if loss == "l2":
        return difference.square().mean()
    if loss == "l1":
        return difference.abs().mean()
    d = difference[0].numel()
    c = 0.00054 * math.sqrt(d)
    return ((difference.square().flatten(1).sum(1) + c * c).sqrt() - c).mean() / d


def descend(
    run: Calibration,
    parameters: Sequence[Tensor],
    program: Callable[[], Program],
    train: Trajectories,
    judge: Trajectories,
    artifact: Callable[[Error], Artifact],
    *,
    steps: int,
    batch: int,
    lr: float | Sequence[float],
    loss: Loss = "l2",
    clip: float = 1.0,
    look: int = 25,
    checkpoint: bool = True,
    radius: float = 0.0,
    seed: int = 0,
) -> Error:
    """Adam with a cosine rate on ``parameters`` for ``steps`` batches of ``train``; the best state on ``judge`` is kept.

    ``program()`` compiles from the parameters as they are. ``lr``: one rate, or one for each parameter. Every ``look``
    steps, and at both ends, the program is measured on ``judge``; ``artifact(error)`` is kept in ``run`` if it is better than
    all before, and the parameters end there. ``radius``: soft teacher forcing (LD3, arXiv:2405.15506): the start of each
    sample may move inside a ball of this radius around its own by one gradient step per visit, where that lowers its loss.
    Returns the error kept.
    """
    if steps < 0 or batch < 1:
        raise ValueError(f"steps, batch: must be at least 0 and 1, got {steps} and {batch}")
    if loss not in ("l2", "l1", "huber"):
        raise ValueError(f"loss: must be l2, l1 or huber, got {loss!r}")
    if not radius >= 0:
        raise ValueError(f"radius: must be at least 0, got {radius}")
    teacher = run.teacher
    rates = [float(lr)] * len(parameters) if isinstance(lr, (int, float)) else [float(r) for r in lr]
    optimizer = torch.optim.Adam([{"params": [p], "lr": r} for p, r in zip(parameters, rates, strict=True)])
    shape = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: 0.5 * (1 + math.cos(math.pi * min(k / max(steps, 1), 1))) * 0.98 + 0.02
    )
    draws = torch.Generator().manual_seed(seed)
    start, truth = train.start.clone(), train.end
    least = Error(math.inf, 0.0, 0)
    kept = [p.detach().clone() for p in parameters]

    def measure() -> None:
        nonlocal least
        with torch.no_grad():
            error = Error.between(teacher.sample(program(), judge.seeds), judge.end)
        if error.rmse < least.rmse:
            least = error
            for place, p in zip(kept, parameters, strict=True):
                place.copy_(p.detach())
            run.keep(artifact(error))

    measure()
    order: list[int] = []
    try:
        for k in range(steps):
            if run.late:
                if k % look:
                    measure()
                break
            if len(order) < min(batch, len(start)):
                order = torch.randperm(len(start), generator=draws).tolist()
            rows, order = order[:batch], order[batch:]
            seeds = train.seeds[rows]
            x, goal = start[rows].to(teacher.device), truth[rows].to(teacher.device)
            if radius:
                x.requires_grad_(True)
            end = rollout(program(), teacher, x, seeds, checkpoint=checkpoint)
            value = distance(end, goal, loss)
            found = torch.autograd.grad(value, [*parameters, *([x] if radius else [])], allow_unused=True)
            run.step(value.detach(), rmse=f"{least.rmse:.4f}")
            gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=False)]
            if not all(bool(torch.isfinite(g).all()) for g in gradients):
                raise FloatingPointError(f"gradient: not finite at step {k + 1}; the last good state was kept")
            size = math.sqrt(sum(float(g.square().sum()) for g in gradients))
            for p, g in zip(parameters, gradients, strict=True):
                p.grad = g * min(1.0, clip / size) if size > 0 else g
            if radius and found[-1] is not None:
                start[rows] = _moved(
                    program, teacher, x.detach(), found[-1], end.detach(), goal, train.start[rows], seeds, radius
                )
            optimizer.step()
            shape.step()
            if (k + 1) % look == 0 or k + 1 == steps:
                measure()
    finally:
        with torch.no_grad():
            for place, p in zip(kept, parameters, strict=True):
                p.copy_(place)
    return least


def _moved(
    program: Callable[[], Program],
    teacher: Teacher,
    x: Tensor,
    gradient: Tensor,
    end: Tensor,
    goal: Tensor,
    origin: Tensor,
    seeds: Tensor,
    radius: float,
) -> Tensor:
    """Starts moved against the gradient, back into the ball, where the sample's own loss falls; [B, *sample] on the CPU."""
    view = (-1, *[1] * (x.ndim - 1))
    unit = gradient / gradient.flatten(1).norm(dim=1).clamp(min=1e-30).view(view)
    tried = x - radius * unit
    away = tried - origin.to(x)
    tried = origin.to(x) + away * (radius / away.flatten(1).norm(dim=1).clamp(min=radius)).view(view)
    with torch.no_grad():
        again = rollout(program(), teacher, tried, seeds, checkpoint=False)
    before = (end - goal).square().flatten(1).mean(1)
    better = ((again - goal).square().flatten(1).mean(1) < before).view(view)
    return torch.where(better, tried, x).cpu()
