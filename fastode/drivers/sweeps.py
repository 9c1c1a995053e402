"""The arithmetic of Picard sweeps: tables played on tensors, assumed responses, what counts as settled, and the cost."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fastode.program import Program, Table
from fastode.scalar import Late
from fastode.schedules.grid import Level
from fastode.solvers.ddim import ancestral

RESPONSES = ("gaussian", "data", "noise", "increments")


@dataclass(frozen=True)
class Cost:
    """What the warm-up measured. ``call``, ``window_call``: seconds of a network call on one point and on a window;
    ``overhead``: seconds per sweep besides the call; ``sweeps``, ``evaluations``: of one parallel run."""

    call: float
    window_call: float
    overhead: float
    window: int
    sweeps: int
    evaluations: int
    steps: int

    @property
    def sequential(self) -> float:
        """Predicted seconds of the sequential run."""
        return self.steps * self.call

    @property
    def parallel(self) -> float:
        """Predicted seconds of the parallel run; a call on n points is taken as affine in n."""
        if self.window == 1:
            return self.sweeps * (self.call + self.overhead)
        slope = max(0.0, (self.window_call - self.call) / (self.window - 1))
        return self.sweeps * (self.call - slope + self.overhead) + slope * self.evaluations

    @property
    def speedup(self) -> float:
        return self.sequential / self.parallel

    @property
    def pays(self) -> bool:
        return self.speedup > 1

    def __str__(self) -> str:
        return (
            f"sequential {self.sequential:.3g} s ({self.steps} calls of {self.call * 1e3:.3g} ms), parallel "
            f"{self.parallel:.3g} s ({self.sweeps} sweeps, {self.evaluations} evaluations, {self.window_call * 1e3:.3g} ms "
            f"per window of {self.window}): {'pays' if self.pays else 'does not pay'}, {self.speedup:.2f}x"
        )


@dataclass(eq=False)
class Window:
    """The draws of the present window, each made once."""

    source: Callable[[int], Tensor] | None
    made: dict[int, Tensor] = field(default_factory=dict)

    def __call__(self, index: int) -> Tensor:
        assert self.source is not None
        if index not in self.made:
            self.made[index] = self.source(index)
        return self.made[index]

    def forget(self, front: int, program: Program) -> None:
        """Drop what no stage from ``front`` on reads."""
        if self.made:
            needed = {a.index for s in program.stages[front:] for a in s.table.columns if a.kind == "noise"}
            self.made = {k: z for k, z in self.made.items() if k in needed}


def play(
    table: Table, values: dict[int, Tensor], output: Tensor | None, draws: Callable[[int], Tensor], like: Tensor
) -> None:
    """``values`` after one table: the sums of the reference backend, in its order, so that they are equal bit for bit."""
    made: dict[int, Tensor] = {}
    for write, form in table.rows():
        total: Tensor | None = None
        for atom, coefficient in form.terms.items():
            c = coefficient.to(device=like.device, dtype=like.dtype) if isinstance(coefficient, Tensor) else coefficient
            if atom.kind == "value":
                source = values[atom.index]
            elif atom.kind == "output":
                assert output is not None
                source = output
            else:
                source = draws(atom.index) if atom.kind == "noise" else like.new_ones(()).expand_as(like)
            term = source * c if isinstance(c, Tensor) or c != 1 else source
            total = term if total is None else total + term
        made[write] = like.new_zeros(()).expand_as(like) if total is None else total
    values.update(made)


def float_level(level: Level) -> Level:
    def number(value: Any) -> float:
        return float(value.detach()) if isinstance(value, Tensor) else float(value)

    return Level(number(level.alpha), number(level.sigma))


def responses(response: str | float, levels: list[Level], program: Program, variance: float) -> list[float]:
    """dD/dx as it is assumed at every evaluation."""
    if isinstance(response, str):
        if response not in RESPONSES:
            raise ValueError(
                f"response: must be one of {', '.join(RESPONSES)} or the data's variance, got {response!r}"
            )
        if response == "data":
            return [0.0] * len(levels)
        if response == "noise":
            return [0.0 if s.alpha == 0 else 1 / s.alpha for s in levels]
        if response == "increments":
            return _increments(program)
    elif isinstance(response, bool) or not (math.isfinite(response) and response > 0):
        raise ValueError(f"response: the data's variance must be positive, got {response!r}")
    else:
        variance = float(response)
    return [s.alpha * variance / (s.alpha**2 * variance + s.sigma**2) for s in levels]


def _increments(program: Program) -> list[float]:
    """With x' = A x + B D + ... the next point, x' - x is held if D answers a move of x by (1 - A)/B times it."""
    made = []
    for i, stage in enumerate(program.stages):
        following = program.stages[i + 1].net_in if i + 1 < program.nfe else program.result
        terms = dict(stage.table.rows()).get(following)
        gain = weight = 0.0
        for atom, c in () if terms is None else terms.terms.items():
            if isinstance(c, Late) or (isinstance(c, Tensor) and c.ndim):
                continue
            if atom.kind == "output":
                weight = float(c)
            elif atom.kind == "value" and atom.index == stage.net_in:
                gain = float(c)
        made.append((1 - gain) / weight if weight else 0.0)
    return made


def bounds(program: Program, tolerance: float) -> list[float]:
    """tau^2 times the variance of the ancestral step that leaves the level of every evaluation; 0 for the last step to 0."""
    grid = [float_level(level) for level in program.grid]
    made = []
    for stage in program.stages:
        i = min(stage.step, len(grid) - 2)
        made.append(tolerance**2 * float(ancestral(grid[i], grid[i + 1], 1.0)[1]) ** 2)
    return made


def last_uses(program: Program) -> dict[int, int]:
    last: dict[int, int] = {}
    for stage in program.stages:
        last[stage.net_in] = stage.index
        for atom in stage.table.columns:
            if atom.kind == "value":
                last[atom.index] = stage.index
    return last
