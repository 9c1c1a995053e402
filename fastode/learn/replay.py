"""What greedy calibration needs: the model as a function of state and level, and a program played stage by stage."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastode.backends import reference
from fastode.denoisers.base import Denoiser
from fastode.denoisers.guidance import GUIDANCE_SCALE
from fastode.learn.calibration import planned
from fastode.learn.teacher import Teacher
from fastode.program import Form, Program
from fastode.scalar import Late
from fastode.schedules.grid import Grid, Level
from fastode.schedules.spacing import diffusion_time
from fastode.solvers import SOLVERS

Evaluate = Callable[[Tensor, Level], Tensor]
"""(state [B, *sample], its level) -> denoised estimate, in the dtype of the state."""


class Evaluator:
    """D(x, level) of the teacher's model for the trajectories of ``seeds``, in the dtype of x, in the teacher's batches, with
    gradients. Adds to the teacher's count of evaluations. Raises ``FloatingPointError`` where D is not finite (not with
    ``check=False``: under torch.func nothing can be looked at)."""

    def __init__(self, teacher: Teacher, seeds: Tensor, *, check: bool = True) -> None:
        self.teacher, self.seeds, self.check = teacher, seeds, check
        scale = teacher.guidance_scale
        self._known: dict[Late, Any] = {} if scale is None else {GUIDANCE_SCALE: float(scale)}
        d, guidance = teacher.denoiser, teacher.guidance
        self._parts = [
            (len(part), d.check_condition(len(part), teacher.condition(part), guidance))
            for part in teacher.batches(seeds)
        ]

    def __call__(self, x: Tensor, level: Level) -> Tensor:
        denoise, guidance = self.teacher.denoiser.denoise, self.teacher.guidance
        sizes = [size for size, _ in self._parts]
        made = torch.cat(
            [
                denoise(part, level, condition, guidance=guidance, known=self._known)
                for part, (_, condition) in zip(x.split(sizes), self._parts, strict=True)
            ]
        )
        self.teacher.evaluations += len(x)
        if self.check and not bool(torch.isfinite(made).all()):
            raise FloatingPointError(f"network: returned NaN or infinity at sigma {float(level.rho):.6g}")
        return made


class Replay:
    """A program whose late numbers are found one after another, played up to the stage that needs the next one.

    ``values`` holds every value written so far. ``known`` gives the late numbers; :meth:`row` computes a value of the
    stage that was evaluated last without storing it, for any value of a number under trial.
    """

    def __init__(self, program: Program, evaluate: Evaluate, x: Tensor) -> None:
        self.program, self.evaluate = program, evaluate
        self.values: dict[int, Tensor] = {0: x}
        self.known: dict[Late, Any] = {}
        self.stage = -1
        self.output: Tensor | None = None
        self._forms: dict[int, Form] = dict(program.init.rows())
        self._written = False

    def advance(self, stage: int) -> None:
        """Write what lies between and evaluate ``stage``: its output is at hand, its rows are not written yet."""
        while self.stage < stage:
            self.write()
            self.stage += 1
            at = self.program.stages[self.stage]
            self.output = self.evaluate(self.values[at.net_in], at.level)
            self._forms, self._written = dict(at.table.rows()), False

    def write(self) -> None:
        """Write the rows of the stage that was evaluated last."""
        if not self._written:
            memo: dict[int, Any] = {}
            new = {v: self.row(v, memo=memo) for v in self._forms}
            self.values.update(new)
            self._written = True

    def row(self, value: int, *, known: Mapping[Late, Any] | None = None, memo: dict[int, Any] | None = None) -> Tensor:
        """What ``value`` becomes; ``known`` adds to or replaces numbers of ``self.known``."""
        return self.weigh(self._forms[value], known=known, memo=memo)

    def weigh(
        self,
        form: Form,
        *,
        known: Mapping[Late, Any] | None = None,
        memo: dict[int, Any] | None = None,
        values: Mapping[int, Tensor] | None = None,
        output: Tensor | None = None,
    ) -> Tensor:
        """A row on other ``values`` or another ``output`` than those at hand."""
        held = self.values if values is None else values
        out = self.output if output is None else output
        return reference.weigh(form, held, out, known={**self.known, **(known or {})}, memo=memo)

    def form(self, value: int) -> Form:
        return self._forms[value]

    def writer(self, value: int) -> int:
        """The stage that writes ``value``."""
        return next(s.index for s in self.program.stages if value in s.table.writes)


def published_states(
    evaluate: Evaluate, grid: Grid, levels: Sequence[Level], x: Tensor, *, steps: int = 200
) -> list[Tensor]:
    """What DC-Solver's published search takes for the truth: ``steps`` DDIM steps in uniform time over the range of ``grid``
    and, for each level, the last state at a time *before* it, up to one reference step too noisy."""
    clock = diffusion_time(grid.schedule)
    ends = [float(clock.time(level.rho)) for level in (grid[0], grid[len(grid) - 1])]
    times = torch.linspace(ends[0], ends[1], steps + 1, dtype=torch.float64)
    rho = clock.rho(times)
    if grid.schedule is clock:
        sigma, alpha = clock.sigma(times), clock.alpha(times)
    else:
        sigma, alpha = rho * grid.alpha[0], grid.alpha[:1].expand(len(rho))
    dense = Grid(sigma, alpha, schedule=grid.schedule)
    wanted = [int((times > float(clock.time(level.rho))).sum()) - 1 for level in levels]
    found: dict[int, Tensor] = {}

    def visit(stage: Any, state: Tensor, _: Tensor) -> None:
        if stage.level.index in wanted:
            found[stage.level.index] = state

    with torch.no_grad():
        reference.run(SOLVERS["ddim"](dense), lambda y, stage, __: evaluate(y, stage.level), x, visit=visit)
    return [found[k] for k in wanted]


def levels_for(
    denoiser: Denoiser, solver: str, nfe: int, options: Mapping[str, Any] | None, grid: str | Grid | None
) -> tuple[Grid, dict[str, Any]]:
    """The levels to calibrate on and the solver's options: as given, or planned for exactly ``nfe`` evaluations."""
    if isinstance(grid, Grid):
        chosen = dict(options or {})
        made = SOLVERS[solver](grid, **chosen).nfe
        if made != nfe:
            raise ValueError(f"nfe: {solver} makes {made} evaluations on this grid, got {nfe}")
        return grid, chosen
    return planned(denoiser, solver, nfe, options, grid)


def ends(teacher: Teacher, before: Program, after: Program, seeds: Tensor, truth: Tensor) -> tuple[float, float]:
    """Root mean square errors of the end points that two programs reach. Warns where calibration made them worse: what
    makes every step better by itself need not make the end better, least of all where samples are torn between modes."""
    made = [float((teacher.sample(p, seeds) - truth.cpu()).double().square().mean().sqrt()) for p in (before, after)]
    if not made[1] < made[0]:
        warnings.warn(
            f"calibration: end points are off by {made[1]:.4g} on the training noises, {made[0]:.4g} without it; every step "
            "by itself is better, the whole is not",
            RuntimeWarning,
            stacklevel=3,
        )
    return made[0], made[1]
