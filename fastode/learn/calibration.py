"""What every calibration keeps account of: progress, time, evaluations, memory, and the last state that was good."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastode.api import grid_maker
from fastode.artifact import Artifact, identity
from fastode.denoisers.base import Denoiser
from fastode.learn.teacher import Error, Teacher
from fastode.schedules.grid import Grid
from fastode.solvers import SOLVERS

Save = Callable[[Artifact], Any]

GRID_NAMES = ("karras", "log_snr", "time_uniform", "quadratic")
"""The placements a solver's best uncalibrated grid is chosen from."""


class Calibration:
    """One calibration run; a context manager.

    ``keep(artifact)`` remembers the best state so far. However the run ends (done, interrupted, an error) that state is
    given to ``save``; in between it is saved every ``every`` seconds. ``step(loss)`` advances the bar and raises
    ``FloatingPointError`` on a loss that is not finite. ``minutes`` is the time it may take: ``late`` says it is over.
    """

    def __init__(
        self,
        method: str,
        teacher: Teacher,
        *,
        total: int | None = None,
        save: Save | None = None,
        progress: bool = True,
        minutes: float = math.inf,
        every: float = 30.0,
    ) -> None:
        if not minutes > 0:
            raise ValueError(f"minutes: must be positive, got {minutes}")
        self.method, self.teacher = method, teacher
        self._save, self._every, self._minutes = save, every, minutes
        self._started = self._saved = time.monotonic()
        self._before = teacher.evaluations
        self._bar = tqdm(total=total, unit="step", desc=f"train {method}", disable=not progress)
        self._steps = 0
        self._dirty = False
        self.best: Artifact | None = None

    def __enter__(self) -> Calibration:
        if self.teacher.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.teacher.device)
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        self._flush()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    @property
    def late(self) -> bool:
        """Whether the allotted time is over."""
        return self.seconds > 60 * self._minutes

    def step(self, loss: float | Tensor | None = None, **shown: Any) -> None:
        self._steps += 1
        if loss is not None:
            value = float(loss)
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"loss: {value} at step {self._steps} of {self.method}; the last good state was kept"
                )
            shown = {"loss": f"{value:.5g}", **shown}
        self._bar.update()
        if shown:
            self._bar.set_postfix(shown, refresh=False)

    def keep(self, artifact: Artifact) -> None:
        for name, value in artifact.numbers.items():
            if not bool(torch.isfinite(value).all()):
                raise FloatingPointError(f"{name}: not finite at step {self._steps}; the last good state was kept")
        self.best, self._dirty = artifact, True
        if time.monotonic() - self._saved > self._every:
            self._flush()

    def _flush(self) -> None:
        if self._save is not None and self.best is not None and self._dirty:
            self._saved, self._dirty = time.monotonic(), False
            self._save(self.best)

    def card(self, **entries: Any) -> dict[str, Any]:
        """How it was made: settings as given, then seconds, evaluations (samples times evaluations each) and the peak of
        memory so far (of the device, or of the whole process)."""
        return {
            **{k: v.__dict__ if isinstance(v, Error) else v for k, v in entries.items()},
            "seconds": round(self.seconds, 2),
            "evaluations": self.teacher.evaluations - self._before,
            "peak_memory_bytes": peak_memory(self.teacher.device),
            "steps": self._steps,
            "torch": torch.__version__,
        }

    def artifact(
        self,
        solver: str,
        grid: Grid,
        *,
        method: str = "grid",
        numbers: Mapping[str, Tensor] | None = None,
        options: Mapping[str, Any] | None = None,
        **entries: Any,
    ) -> Artifact:
        """An artifact for the teacher's model with the card of this run; ``entries`` go into the card."""
        plain = Grid(grid.sigma.detach(), grid.alpha.detach(), grid.t.detach(), grid.schedule, grid.name)
        kept = {k: v.detach().cpu().clone() for k, v in (numbers or {}).items()}
        model = identity(self.teacher.denoiser, guidance_scale=self.teacher.guidance_scale)
        card = self.card(calibration=self.method, **entries)
        return Artifact(method, solver, plain, kept, dict(options or {}), model, card)


def peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def teacher_of(
    denoiser: Any, teacher: Teacher | None, *, guidance_scale: float | None = None, class_labels: Any = None, **own: Any
) -> Teacher:
    """``teacher``, or a new one for ``denoiser`` under this condition. Raises if a teacher of another condition is given."""
    if teacher is None:
        return Teacher(denoiser, guidance_scale=guidance_scale, class_labels=class_labels, **own)
    if teacher.denoiser is not Denoiser.of(denoiser) and isinstance(denoiser, Denoiser):
        raise ValueError("teacher: it was made for another denoiser")
    if guidance_scale is not None and teacher.guidance_scale != guidance_scale:
        raise ValueError(
            f"guidance_scale: the teacher was made with {teacher.guidance_scale}, this calibration asks for {guidance_scale}"
        )
    return teacher


def planned(
    denoiser: Denoiser, solver: str, nfe: int, options: Mapping[str, Any] | None = None, grid: str | None = None
) -> tuple[Grid, dict[str, Any]]:
    """A grid by name (default: the solver's usual one) and options with exactly ``nfe`` evaluations."""
    assert denoiser.schedule is not None
    chosen = SOLVERS[solver]
    return chosen.plan(nfe, grid_maker(chosen, denoiser.schedule, grid), **dict(options or {}))


def best_uniform(
    teacher: Teacher, solver: str, nfe: int, options: Mapping[str, Any] | None, seeds: Tensor
) -> tuple[Grid, dict[str, Any], Error]:
    """Of the usual placements of levels, the one with the smallest error on ``seeds``: what a calibrated solver must beat."""
    found: list[tuple[Grid, dict[str, Any], Error]] = []
    why: ValueError | None = None
    for name in GRID_NAMES:
        try:
            grid, chosen = planned(teacher.denoiser, solver, nfe, options, name)
            program = SOLVERS[solver](grid, **chosen)
        except (ValueError, ZeroDivisionError) as error:
            why = why or (error if isinstance(error, ValueError) else None)
            continue
        found.append((grid, chosen, teacher.error(program, seeds)))
    if not found:
        raise why or ValueError(f"nfe: {solver} makes no grid of {nfe} evaluations for this schedule")
    return min(found, key=lambda f: f[2].rmse)
