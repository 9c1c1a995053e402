"""Training AMED (arXiv:2312.00094): where inside every step the solver evaluates, and how far it goes.

Two ways to be right, and two things that can learn it.

* ``loss="steps"``, the paper's: each step is compared with a teacher that takes M + 1 steps to its one, |x_{i+1} - y_{i+1}|^2,
  and the optimiser moves after every step. Solvers that remember nothing start every step from the teacher's state y_i
  (the official code; ``start="student"`` is Algorithm 1 as printed); solvers with a history start from their own, and what
  they remember carries no gradient.
* ``loss="rollout"``: the whole run is compared with the converged solution at its end only (EPD, arXiv:2507.14797, and
  AdaSDE, arXiv:2510.23285, train AMED's form so), and the gradient goes through all of it.
* ``predictor="features"``: the network of 9,000 parameters that looks at the denoiser's bottleneck.
* ``predictor="table"``: one row of numbers per step.

Nothing has a gradient but the predictor. Memory: a graph covers one step and ``micro`` samples, or one run of ``micro``
samples, whatever the batch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastode.artifact import Artifact
from fastode.learn.amed_plan import Distance, Plan, between, distance_of, placed, plan_of, student
from fastode.learn.calibration import Calibration, Save, teacher_of
from fastode.learn.checkpoint import Checkpoint, Curves
from fastode.learn.levels import Levels
from fastode.learn.parallel import Ranks
from fastode.learn.teacher import Teacher, Trajectories, training_seeds
from fastode.learn.unroll import Evaluation, Evaluator, frozen, steps_of
from fastode.nets.predictor import Predictor, from_numbers, to_numbers
from fastode.program import Program
from fastode.scalar import is_known
from fastode.schedules.grid import Grid
from fastode.solvers import SOLVERS, Solver


def train(
    denoiser: Any,
    *,
    solver: str = "amed",
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
    predictor: Literal["table", "features"] = "table",
    loss: Literal["rollout", "steps"] = "rollout",
    images: int | None = None,
    batch: int = 32,
    micro: int = 32,
    checkpoint: bool = False,
    lr: float | None = None,
    cosine: bool | None = None,
    scale_dir: float | None = None,
    scale_time: float | None = None,
    grid: str | None = None,
    levels: Literal["learned", "fixed"] | None = None,
    place: Literal["base", "middle"] | None = None,
    start: Literal["teacher", "student"] | None = None,
    teacher_solver: str | None = None,
    intermediate: int | None = None,
    module: Any = None,
    folder: str | os.PathLike[str] | None = None,
) -> Artifact:
    """AMED-Solver, or AMED plugged into ``solver``: trains the numbers r, scale_dir, scale_time of every step.

    ``images``: trajectories seen in all, a multiple of ``samples`` if each is to be used alike; ``batch`` of them make one
    step of Adam (in the per-step loss, one for each step of the solver). ``micro``: at most so many at a time, and
    ``checkpoint``: recompute what is inside the network on the way back; both save memory and change nothing else.
    ``lr`` falls by half a ``cosine`` in the roll-out. ``scale_dir``, ``scale_time``: half widths of the ranges around 1.
    ``grid``: a key of ``GRIDS``; default: the placement on which the solver is best to begin with (for AMED-Solver step by
    step: time_uniform, as published). ``levels``: whether its inner levels are learned too, which a roll-out can.
    ``place``: where a table's evaluation points begin, at the levels of the solver's own finer grid ("base") or in the
    geometric middle. ``start``, ``teacher_solver``, ``intermediate``: of the per-step loss; as published by default.
    ``module``: a network, or the name "package.module:function" of what makes one, for a loss in its features.
    ``folder``: checkpoints and curves; a run that was stopped continues there.
    Raises ``ValueError`` naming the argument, ``FloatingPointError`` for a loss that is not finite.
    """
    plan = plan_of(
        predictor=predictor, loss=loss, images=images, batch=batch, micro=micro, lr=lr, cosine=cosine, start=start,
        scale_dir=scale_dir, scale_time=scale_time, levels=levels, place=place, checkpoint=checkpoint, solver=solver, nfe=nfe,
        teacher_solver=teacher_solver, intermediate=intermediate,
    )  # fmt: skip
    teacher = teacher_of(denoiser, teacher, guidance_scale=guidance_scale, class_labels=class_labels)
    plan.check_features(teacher.denoiser)
    distance = distance_of(module, loss)
    chosen = student(solver)
    seeds = training_seeds(samples, seed)
    if grid is None and plan.loss == "steps" and SOLVERS[solver].name == "amed":
        grid = "time_uniform"  # as published
    begun, fixed = placed(chosen, nfe, dict(options or {}), grid, teacher, seeds)
    if plan.levels == "learned" and not Levels.possible(begun):
        if levels is not None:
            raise ValueError(
                f"levels: there is nothing to learn on {begun}: inner levels between two finite ones are moved"
            )
        plan = replace(plan, levels="fixed")
    run_seed = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = plan.make_predictor(teacher, begun)
    trainer = _Trainer(plan, teacher, chosen, solver, begun, fixed, made, distance, seeds, run_seed)
    ranks = trainer.ranks
    store = (
        None
        if folder is None
        else Checkpoint(folder, plan.settings | {"solver": solver, "nfe": nfe, "samples": samples, "seed": seed})
    )
    with (
        Calibration(
            "amed",
            teacher,
            total=plan.updates,
            save=save if ranks.rank == 0 else None,
            progress=progress and ranks.rank == 0,
            minutes=minutes,
        ) as run,
        frozen(teacher.denoiser),
    ):
        if store is not None:
            trainer.done = store.resume(trainer.learned, trainer.optimizer, trainer.curves)

        def artifact(**entries: Any) -> Artifact:
            settings = plan.settings | {"samples": samples, "seed": seed, "processes": ranks.size}
            return run.artifact(
                SOLVERS[solver].name, trainer.grid, method="amed", numbers=to_numbers(made), options=fixed, settings=settings,
                teacher=trainer.teaching(), data="none: trajectories of the model itself", images=trainer.done * batch,
                learned=trainer.table(), loss=trainer.course(), **entries,
            )  # fmt: skip

        run.keep(artifact())
        try:
            while trainer.done < plan.updates and not ranks.any(run.late):
                losses = trainer.update()
                if not all(map(math.isfinite, losses)):
                    run.keep(artifact())  # nothing was learned from this loss: these numbers are the last good ones
                    run.step(math.nan)  # raises
                run.step(sum(losses), r=trainer.shown())
                if trainer.done % 10 == 0 and ranks.rank == 0:
                    run.keep(artifact())
                    if store is not None:
                        store.save(trainer.learned, trainer.optimizer, trainer.curves, trainer.done, every=30.0)
        finally:
            if store is not None and ranks.rank == 0:
                store.save(trainer.learned, trainer.optimizer, trainer.curves, trainer.done)
        before, after = trainer.errors()
        run.keep(artifact(error=after, before=before))
    assert run.best is not None
    return run.best


class _Live:
    """The predictor as one step's program sees it: numbers of earlier steps are those that were used, without a gradient."""

    def __init__(self, predictor: Predictor, step: int, used: Sequence[tuple[Tensor, ...]]) -> None:
        self.predictor, self.step, self.used, self.heads = predictor, step, used, predictor.heads

    def look(self, step: int, t: float, t_next: float) -> Any:
        return self.predictor.look(step, t, t_next)

    def numbers(self, step: int, t: float, t_next: float) -> tuple[Tensor, ...]:
        return self.used[step] if step < self.step else self.predictor.numbers(step, t, t_next)


class _Trainer:
    def __init__(
        self,
        plan: Plan,
        teacher: Teacher,
        solver: Solver,
        base: str,
        grid: Grid,
        options: Mapping[str, Any],
        predictor: Predictor,
        distance: Distance,
        seeds: Tensor,
        draws: torch.Generator,
    ) -> None:
        self.plan, self.teacher, self.solver, self.base = plan, teacher, solver, base
        self.options, self.predictor, self.distance = dict(options), predictor, distance
        self.levels = Levels(grid, learned=plan.levels == "learned")
        self.learned = nn.ModuleDict({"predictor": predictor, "levels": self.levels})
        self.parameters = list(self.learned.parameters())
        self.optimizer = torch.optim.Adam(self.parameters, lr=plan.lr, betas=(0.9, 0.999), eps=1e-8)
        self.ranks = Ranks.here(teacher.device)
        self.evaluator = Evaluator(
            teacher.denoiser,
            guidance=teacher.guidance,
            guidance_scale=teacher.guidance_scale,
            checkpoint=plan.checkpoint,
        )
        order = seeds[torch.randperm(len(seeds), generator=draws)]
        whole = order.split(plan.batch)
        self.sizes = [len(part) for part in whole]
        self.batches = [self.ranks.share(part) for part in whole]
        if min(self.sizes) < self.ranks.size:
            raise ValueError(f"batch: {self.ranks.size} processes cannot share a batch of {min(self.sizes)}")
        self.seeds = seeds
        self.curves = Curves([f"{name} {i + 1}" for i in range(grid.steps) for name in predictor.heads])
        self.done = 0
        self.start_program = self.player()
        self._first: dict[tuple[int, int, int], Evaluation] = {}  # (batch, part, step) -> of a state that never changes

    @property
    def grid(self) -> Grid:
        """As it is now, without a gradient."""
        with torch.no_grad():
            return self.levels()

    def program(self, predictor: Any) -> Program:
        return self.solver(self.levels(), predictor=predictor, **self.options)

    def player(self) -> Program:
        """The program as it is now, without gradients, and untouched by what is learned later."""
        with torch.no_grad():
            return self.program(from_numbers(to_numbers(self.predictor)))

    # -- what is learned from -------------------------------------------------------------------------------------------

    def trajectories(self, seeds: Tensor) -> Trajectories:
        """The states to reach: at the ends for the roll-out, at every level for the steps."""
        if self.plan.loss == "rollout":
            return self.teacher.ends(seeds, self.grid)
        return self.teacher.trajectories(
            seeds,
            self.grid,
            dense=between(self.grid, self.plan.intermediate),
            solver=self.plan.teacher_solver,
            options=self._teacher_options(),
        )

    def _teacher_options(self) -> dict[str, Any]:
        """The student's own options, where the teacher is its base."""
        if self.plan.teacher_solver != SOLVERS[self.base].name:
            return {}
        return {k: v for k, v in self.options.items() if k in SOLVERS[self.base].options and k != "afs"}

    def teaching(self) -> dict[str, Any]:
        if self.plan.loss == "rollout":
            return {"solver": self.teacher.solver, "options": self.teacher.options, "converged": self.teacher.tolerance}
        return {"solver": self.plan.teacher_solver, "intermediate": self.plan.intermediate, **self._teacher_options()}

    # -- one batch ----------------------------------------------------------------------------------------------------------

    def update(self) -> list[float]:
        """Learn from one batch; the losses, one per step (or one in all). Numbers stay as they are if a loss is not finite."""
        number = self.done % len(self.batches)
        if self.plan.cosine:
            share = self.done / max(self.plan.updates, 1)
            for group in self.optimizer.param_groups:
                group["lr"] = self.plan.lr * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * share)))
        count = self.evaluator.count
        losses = self._rollout(number) if self.plan.loss == "rollout" else self._steps(number)
        self.teacher.evaluations += self.evaluator.count - count
        self.done += all(map(math.isfinite, losses))
        return losses

    def _parts(self, number: int) -> list[Tensor]:
        return list(self.batches[number].split(self.plan.micro))

    def _rollout(self, number: int) -> list[float]:
        self.optimizer.zero_grad(set_to_none=True)
        grid = self.grid
        total, notes = 0.0, _Notes(grid.steps, self.predictor.heads)
        for k, seeds in enumerate(self._parts(number)):
            target = self.trajectories(seeds)
            program = self.program(self.predictor)
            x = target.start.to(self.teacher.device)
            play = self.evaluator.play(program, x, self.teacher.condition(seeds), self._known(number, k, program, 0))
            for stage in program.stages:
                play.update(stage, self._evaluate(play, stage, number, k))
            notes.take(program, play, self.predictor, range(grid.steps), grid)
            value = self.distance(play.values[program.result], target.end.to(x)).mean()
            share = len(seeds) / self.sizes[number]  # of the batch on all processes: the loss is its mean
            (value * share).backward()
            total += float(value.detach()) * share
        return self._move([total], notes)

    def _steps(self, number: int) -> list[float]:
        grid, parts, losses = self.grid, self._parts(number), []
        notes = _Notes(grid.steps, self.predictor.heads)
        targets = [self.trajectories(seeds) for seeds in parts]
        held: list[dict[int, Tensor]] = [{} for _ in parts]
        lates: list[dict[str, Any]] = [{} for _ in parts]
        used: list[tuple[Tensor, ...]] = []
        for i in range(grid.steps):
            self.optimizer.zero_grad(set_to_none=True)
            total = 0.0
            for k, (seeds, target) in enumerate(zip(parts, targets, strict=True)):
                live = _Live(self.predictor, i, used)
                program = self.program(live)
                x = target.start.to(self.teacher.device)
                fixed = i == 0 or self.plan.start == "teacher"
                known = self._known(number, k, program, i) if fixed else None
                play = self.evaluator.play(program, x, self.teacher.condition(seeds), known)
                play.values.update(held[k])
                if self.plan.start == "teacher":
                    play.values[program.states[i]] = target.states[i].to(x)
                play.numbers |= {late: lates[k][late.name] for late in program.made if late.name in lates[k]}
                for stage in steps_of(program)[i]:
                    play.update(stage, self._evaluate(play, stage, number, k, keep=fixed))
                notes.take(program, play, self.predictor, [i], grid)
                following = steps_of(program)[i + 1][0].net_in if i + 1 < grid.steps else program.result
                value = self.distance(play.values[following], target.states[i + 1].to(x)).mean()  # before any corrector
                share = len(seeds) / self.sizes[number]  # of the batch on all processes: the loss is its mean
                if value.requires_grad:  # a step of one evaluation (from a flow's start) has nothing to learn
                    (value * share).backward()
                total += float(value.detach()) * share
                held[k] = {v: state.detach() for v, state in play.values.items()}
                lates[k] = {late.name: n.detach() for late, n in play.numbers.items() if late in program.made}
            ends = float(grid[i].rho), float(grid[i + 1].rho)
            used.append(tuple(n.detach() for n in self.predictor.numbers(i, *ends)))
            losses += self._move([total], None)
            if not math.isfinite(losses[-1]):
                return losses
        self._note(losses, notes)
        return losses

    def _evaluate(self, play: Any, stage: Any, number: int, part: int, keep: bool = True) -> Tensor:
        """One evaluation; without a graph where nothing learned comes before it, and then remembered for the next time."""
        free = not play.values[stage.net_in].requires_grad and (is_plain(stage.level) or stage.level.index == 0)
        if not free:
            output: Tensor = play.evaluate(stage)
            return output
        with torch.no_grad():
            made = play.denoise(play.values[stage.net_in], stage, play.numbers)
        if keep and is_first(play.program, stage):
            self._first[number, part, stage.step] = made
        inner, play.denoise = play.denoise, lambda *_: made
        try:
            return play.evaluate(stage)  # the predictor looks at it with a graph of its own
        finally:
            play.denoise = inner

    def _known(self, number: int, part: int, program: Program, step: int) -> dict[int, Evaluation]:
        found = self._first.get((number, part, step))
        if found is None:
            return {}
        return {stage.index: found for stage in steps_of(program)[step] if is_first(program, stage)}

    def _move(self, losses: list[float], notes: _Notes | None) -> list[float]:
        """One step of Adam on the gradients that have been gathered, if the loss is finite."""
        gathered = torch.tensor(losses, dtype=torch.float64, device=self.parameters[0].device)
        self.ranks.sum([gathered])
        losses = gathered.tolist()
        if all(map(math.isfinite, losses)):
            for parameter in self.parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            self.ranks.sum(p.grad for p in self.parameters if p.grad is not None)
            for parameter in self.parameters:
                assert parameter.grad is not None
                torch.nan_to_num(parameter.grad, nan=0.0, posinf=1e5, neginf=-1e5, out=parameter.grad)
            self.optimizer.step()
            if notes is not None:
                self._note(losses, notes)
        return losses

    def _note(self, losses: list[float], notes: _Notes) -> None:
        mean, spread = notes.rows()
        self.curves.loss.append(losses)
        self.curves.mean.append(mean)
        self.curves.spread.append(spread)

    # -- what is shown ------------------------------------------------------------------------------------------------------

    def shown(self) -> str:
        """r of every step, with its spread over the samples where it has one."""
        k = len(self.predictor.heads)
        rows = zip(self.curves.mean[-1][::k], self.curves.spread[-1][::k], strict=True)
        return " ".join(f"{m:.3f}" + (f"±{s:.3f}" if s > 5e-4 else "") for m, s in rows)

    def table(self) -> dict[str, list[float]]:
        """Mean of every number over the last batch, by name."""
        k = len(self.predictor.heads)
        if not self.curves.mean:
            return {}
        return {name: self.curves.mean[-1][j::k] for j, name in enumerate(self.predictor.heads)}

    def course(self) -> dict[str, list[float]]:
        """Losses of the first and the last pass over the trajectories, one number per step or one in all."""
        rows, n = self.curves.loss, len(self.batches)
        if not rows:
            return {}
        return {
            "first": torch.tensor(rows[:n]).mean(0).tolist(),
            "last": torch.tensor(rows[-n:]).mean(0).tolist(),
        }

    def errors(self, most: int = 64) -> tuple[Any, Any]:
        """Before and after, against the converged solution, on trajectories of the training."""
        seeds = self.seeds[:most]
        return self.teacher.error(self.start_program, seeds), self.teacher.error(self.player(), seeds)


class _Notes:
    """Mean and spread of the numbers of every step over the samples of a batch."""

    def __init__(self, steps: int, heads: Sequence[str]) -> None:
        self.heads = heads
        self.seen: list[list[list[Tensor]]] = [[[] for _ in heads] for _ in range(steps)]

    def take(self, program: Program, play: Any, predictor: Predictor, steps: Any, grid: Grid) -> None:
        made = {late.name: play.numbers[late] for late in program.made if late in play.numbers}
        for i in steps:
            for j, name in enumerate(self.heads):
                if f"{name}{i}" in made:
                    self.seen[i][j].append(made[f"{name}{i}"].detach().flatten().cpu())
                else:
                    number = predictor.numbers(i, float(grid[i].rho), float(grid[i + 1].rho))[j]
                    self.seen[i][j].append(number.detach().reshape(1).cpu())

    def rows(self) -> tuple[list[float], list[float]]:
        values = [torch.cat(found) if found else torch.full((1,), math.nan) for step in self.seen for found in step]
        return [float(v.mean()) for v in values], [float(v.std()) if len(v) > 1 else 0.0 for v in values]


def is_plain(level: Any) -> bool:
    """Whether a level is known and without a gradient."""
    return all(is_known(v) and not (isinstance(v, Tensor) and v.requires_grad) for v in (level.alpha, level.sigma))


def is_first(program: Program, stage: Any) -> bool:
    """Whether a stage evaluates the state that its step starts from."""
    return bool(stage.net_in == program.states[stage.step])
