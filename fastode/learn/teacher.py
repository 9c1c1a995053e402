"""What calibrated solvers learn from: trajectories of the exact flow, and the error of a program against them.

A :class:`Teacher` belongs to one model under one condition (labels in turn, guidance strength). It solves the ODE from the
start noise of given seeds on a grid refined between the student's levels until the result no longer changes, and hands
out the states at those levels. Nothing carries a gradient. Results are kept in memory, and in a folder where one is given.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastode.artifact import identity
from fastode.denoisers.base import Condition, Denoiser
from fastode.denoisers.guidance import Guidance
from fastode.engine import Engine
from fastode.files import write_tensors
from fastode.noise import check_seeds, normal
from fastode.program import Program
from fastode.schedules.grid import Grid
from fastode.solvers import SOLVERS

FIRST_TRAINING_SEED = 1_000_000_000
FIRST_HELD_OUT_SEED = 2_000_000_000


def training_seeds(count: int, seed: int = 0) -> Tensor:
    """``count`` seeds to learn from, int64; far from the small numbers that people sample with."""
    return FIRST_TRAINING_SEED + 1_000_000 * int(seed) + torch.arange(_count("samples", count))


def held_out_seeds(count: int, seed: int = 0) -> Tensor:
    """``count`` seeds to measure on: none is ever a training seed."""
    return FIRST_HELD_OUT_SEED + 1_000_000 * int(seed) + torch.arange(_count("held_out", count))


@dataclass(frozen=True, eq=False)
class Trajectories:
    """States of N trajectories at the levels of ``grid``, in its frame: ``states`` [n + 1, N, *sample].

    ``denoised`` [n, N, *sample]: the estimate at each level but the last, where it was asked for. ``labels`` [N] or None.
    ``evaluations``: per sample. ``change``: root mean square change of the end points when the refinement was doubled
    last, on a few of the samples; NaN where the grid was prescribed.
    """

    seeds: Tensor
    labels: Tensor | None
    grid: Grid
    states: Tensor
    denoised: Tensor | None
    evaluations: int
    change: float

    @property
    def start(self) -> Tensor:
        return self.states[0]

    @property
    def end(self) -> Tensor:
        return self.states[-1]


@dataclass(frozen=True)
class Error:
    """Root mean square error of samples against the flow's end points, with its standard error over ``samples``."""

    rmse: float
    deviation: float
    samples: int

    @classmethod
    def between(cls, made: Tensor, truth: Tensor) -> Error:
        """Of [N, *sample]; the standard error is that of the mean square, carried through the root."""
        squares = (made.double() - truth.double()).square().flatten(1).mean(1)
        n, root = len(squares), float(squares.mean().sqrt())
        spread = float(squares.std()) / math.sqrt(n) if n > 1 else math.nan
        return cls(root, spread / (2 * root) if root > 0 else 0.0, n)

    def __str__(self) -> str:
        return f"{self.rmse:.4f} ± {self.deviation:.4f}"


class Teacher:
    """Reference trajectories of ``denoiser``, and runs of programs beside them.

    Args:
        denoiser: a :class:`Denoiser` or a plain callable ``D(x, sigma)`` with a known ``sample_shape``.
        sample_shape: shape of one sample where the denoiser does not know it.
        guidance_scale: classifier-free guidance of this strength, everywhere.
        class_labels: labels that the seeds get in turn: seed s gets ``labels[s % len(labels)]``. Default: every class.
        solver, options: makes the converged solution.
        tolerance: refine until the end points of a few samples change by less than this root mean square, relative to
            their own. At most ``most`` evaluations per trajectory; a teacher that has not converged by then warns.
        batch: samples at a time. cache: a folder that keeps trajectories between runs.

    ``evaluations`` counts all network evaluations made so far, samples times evaluations each.
    """

    def __init__(
        self,
        denoiser: Any,
        *,
        sample_shape: Sequence[int] | None = None,
        guidance_scale: float | None = None,
        class_labels: Sequence[int] | Tensor | None = None,
        solver: str = "unipc",
        options: Mapping[str, Any] | None = None,
        tolerance: float = 3e-3,
        most: int = 128,
        batch: int = 64,
        cache: str | os.PathLike[str] | None = None,
    ) -> None:
        self.denoiser = Denoiser.of(denoiser)
        shape = sample_shape if sample_shape is not None else self.denoiser.sample_shape
        if shape is None:
            raise ValueError(f"sample_shape: {self.denoiser.name} does not know the shape of a sample; give it")
        self.sample_shape = tuple(int(n) for n in shape)
        if not tolerance > 0:
            raise ValueError(f"tolerance: must be positive, got {tolerance}")
        self.guidance = None if guidance_scale is None else Guidance()
        self.guidance_scale = guidance_scale
        self.solver, self.options = solver, dict(options or {})
        SOLVERS[solver].check(self.options)
        self.tolerance, self.most, self.batch = tolerance, _count("most", most), _count("batch", batch)
        self.cycle = self._cycle(class_labels)
        self.device = self.denoiser.device or torch.device("cpu")
        self.evaluations = 0
        self._folder = None if cache is None else Path(cache)
        self._memory: dict[str, Trajectories] = {}
        self._refinement: dict[str, tuple[int, float]] = {}
        self._identity: dict[str, Any] | None = None
        self.denoiser.check_condition(1, self.condition(torch.zeros(1, dtype=torch.int64)), self.guidance)

    def _cycle(self, labels: Any) -> Tensor | None:
        if labels is not None:
            return torch.as_tensor(labels, dtype=torch.int64).reshape(-1)
        return torch.arange(self.denoiser.num_classes) if self.denoiser.num_classes else None

    # -- conditions and starts ----------------------------------------------------------------------------------------

    def labels(self, seeds: Tensor) -> Tensor | None:
        """[N] int64, or None for a model without classes."""
        return None if self.cycle is None else self.cycle[seeds.cpu() % len(self.cycle)]

    def condition(self, seeds: Tensor) -> Condition:
        labels = self.labels(seeds)
        return Condition(None if labels is None else labels.to(self.device))

    def start(self, seeds: Tensor, grid: Grid) -> Tensor:
        """The states at the first level that ``Engine(...)(seeds=seeds)`` starts from, [N, *sample] float32."""
        return normal(seeds, 0, self.sample_shape, device=self.device).mul_(float(grid.sigma[0]))

    def batches(self, seeds: Tensor) -> Iterator[Tensor]:
        return iter(seeds.split(self.batch))

    # -- running programs -----------------------------------------------------------------------------------------------

    def sample(self, program: Program, seeds: Sequence[int] | Tensor) -> Tensor:
        """What ``program`` makes of ``seeds``: [N, *sample] float32, on the CPU."""
        rows = check_seeds(seeds)
        return torch.cat([self._run(program, part)[-1] for part in self.batches(rows)])

    def error(self, program: Program, seeds: Sequence[int] | Tensor) -> Error:
        """Of ``program`` against the converged flow between the ends of its grid."""
        rows = check_seeds(seeds)
        return Error.between(self.sample(program, rows), self.ends(rows, program.grid).end)

    def _run(self, program: Program, seeds: Tensor) -> list[Tensor]:
        """The final states of one batch, as a list of one."""
        self.evaluations += program.nfe * len(seeds)
        with torch.no_grad():
            return [self._engine(program, seeds)(self.start(seeds, program.grid), **self._call(seeds)).cpu()]

    def follow(self, program: Program, seeds: Tensor) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
        """One batch run step by step, nothing kept: the states at all grid levels, and at all but the last what was
        evaluated there and its denoised estimate (the first evaluation of each step), on the CPU."""
        seen: list[tuple[Tensor, Tensor]] = []

        def look(step: int, sigma: float, state: Tensor, estimate: Tensor) -> None:
            seen.append((state.clone().cpu(), estimate.clone().cpu()))

        self.evaluations += program.nfe * len(seeds)
        with torch.no_grad():
            x = self.start(seeds, program.grid)
            run = self._engine(program, seeds)(x, return_trajectory=True, callback=look, **self._call(seeds))
        return [state.cpu() for state in run.states], seen

    def _engine(self, program: Program, seeds: Tensor) -> Engine:
        return Engine(program, self.denoiser, (len(seeds), *self.sample_shape), guidance=self.guidance, graph=False)

    def _call(self, seeds: Tensor) -> dict[str, Any]:
        return {"seeds": seeds, "class_labels": self.labels(seeds), "guidance_scale": self.guidance_scale}

    # -- trajectories -----------------------------------------------------------------------------------------------------

    def ends(self, seeds: Sequence[int] | Tensor, grid: Grid) -> Trajectories:
        """Start and converged end point of each seed, for any grid with these ends."""
        return self.trajectories(seeds, outline(grid))

    def trajectories(
        self,
        seeds: Sequence[int] | Tensor,
        grid: Grid,
        *,
        intermediate: int | None = None,
        dense: Grid | None = None,
        solver: str | None = None,
        options: Mapping[str, Any] | None = None,
        denoised: bool = False,
    ) -> Trajectories:
        """States of ``seeds`` at the levels of ``grid``.

        Without more, of the converged flow. ``intermediate=M``: of ``solver`` (default: the teacher's) on exactly M extra
        levels in every interval; ``dense``: on that grid, which must contain the levels of ``grid``. With ``denoised``
        also the estimate at each level, as it was evaluated there.
        """
        rows = check_seeds(seeds)
        name = self.solver if solver is None else solver
        chosen = self.options if solver is None and options is None else dict(options or {})
        where = None if dense is None else _positions(grid, dense)
        key = self._key(rows, grid, intermediate, dense, name, chosen)
        found = self._memory.get(key) or self._read(key, rows, grid)
        if found is not None and not (denoised and found.denoised is None):
            self._memory[key] = found
            return found
        change = math.nan
        if dense is None and intermediate is None:
            intermediate, change = self._converged(rows, grid, name, chosen)
        fine = dense if dense is not None else refine(grid, intermediate or 0)
        stride = (intermediate or 0) + 1
        places = where if where is not None else list(range(0, len(fine), stride))
        program = SOLVERS[name](fine, **chosen)
        states: list[list[Tensor]] = []
        estimates: list[list[Tensor]] = []
        for part in self.batches(rows):
            reached, seen = self.follow(program, part)
            states.append([reached[i] for i in places])
            estimates.append([seen[i][1] for i in places[:-1]] if denoised else [])
        made = Trajectories(
            rows,
            self.labels(rows),
            grid,
            torch.stack([torch.cat(level) for level in zip(*states, strict=True)]),
            torch.stack([torch.cat(level) for level in zip(*estimates, strict=True)]) if denoised else None,
            program.nfe,
            change,
        )
        if not bool(torch.isfinite(made.end).all()):
            raise FloatingPointError(f"teacher: {name} on {len(fine)} levels returned NaN or infinity")
        self._memory[key] = made
        self._write(key, made)
        return made

    def _converged(self, seeds: Tensor, grid: Grid, solver: str, options: dict[str, Any]) -> tuple[int, float]:
        """Levels to insert into every interval, and the last change; found on a few samples, once per pair of ends."""
        key = json.dumps([_levels(grid), solver, options], default=str)
        if key not in self._refinement:
            few = seeds[: min(8, self.batch)]
            inside = max(1, math.ceil(16 / grid.steps)) - 1
            last = self._run(SOLVERS[solver](refine(grid, inside), **options), few)[-1]
            while True:
                inside = 2 * inside + 1
                program = SOLVERS[solver](refine(grid, inside), **options)
                now = self._run(program, few)[-1]
                change = float((now - last).double().square().mean().sqrt() / now.double().square().mean().sqrt())
                last = now
                if change < self.tolerance or not math.isfinite(change):
                    break
                if 2 * program.nfe > self.most:
                    warnings.warn(
                        f"teacher: not converged after {program.nfe} evaluations: end points still change by {change:.1e} "
                        f"(tolerance {self.tolerance:.1e}); raise `most` or `tolerance`",
                        RuntimeWarning,
                        stacklevel=4,
                    )
                    break
            self._refinement[key] = inside, change
        return self._refinement[key]

    # -- keeping them -----------------------------------------------------------------------------------------------------

    def _key(self, seeds: Tensor, grid: Grid, m: Any, dense: Grid | None, solver: str, options: Any) -> str:
        if self._identity is None:
            self._identity = identity(self.denoiser, guidance_scale=self.guidance_scale)
        what = [
            self._identity, str(self.denoiser.dtype), seeds.tolist(), None if self.cycle is None else self.cycle.tolist(),
            _levels(grid), m, None if dense is None else _levels(dense), solver, options, self.tolerance, self.most,
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(what, default=str).encode()).hexdigest()[:32]

    def _file(self, key: str) -> Path | None:
        if self._folder is None or (self._identity or {}).get("weights") is None:
            return None  # nothing tells this model from another one
        return self._folder / f"{key}.safetensors"

    def _read(self, key: str, seeds: Tensor, grid: Grid) -> Trajectories | None:
        path = self._file(key)
        if path is None or not path.exists():
            return None
        from safetensors.torch import load_file

        kept = load_file(path)
        evaluations, change = kept["record"].tolist()
        return Trajectories(
            seeds, self.labels(seeds), grid, kept["states"], kept.get("denoised"), int(evaluations), change
        )

    def _write(self, key: str, made: Trajectories) -> None:
        path = self._file(key)
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            "states": made.states,
            "record": torch.tensor([made.evaluations, made.change], dtype=torch.float64),
        }
        write_tensors(path, tensors if made.denoised is None else {**tensors, "denoised": made.denoised})


def outline(grid: Grid) -> Grid:
    """The first and the last level of ``grid``."""
    ends = [0, len(grid) - 1]
    sigma, alpha, t = (v.detach()[ends] for v in (grid.sigma, grid.alpha, grid.t))
    return Grid(sigma, alpha, t, grid.schedule, f"ends of {grid.name}")


def refine(grid: Grid, inside: int) -> Grid:
    """``grid`` with ``inside`` levels put into every interval: uniform in rho^(1/7) as on Karras grids, or uniform in time
    where rho is infinite at one end. The given levels stay as they are."""
    if inside < 0:
        raise ValueError(f"intermediate: must be at least 0, got {inside}")
    share = torch.arange(1, inside + 1, dtype=torch.float64) / (inside + 1)
    sigma, alpha, t, rho = grid.sigma.detach(), grid.alpha.detach(), grid.t.detach(), grid.sigmas.detach()
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for i in range(grid.steps):
        parts.append((sigma[i : i + 1], alpha[i : i + 1], t[i : i + 1]))
        if math.isfinite(float(rho[i])):
            a, b = rho[i] ** (1 / 7), rho[i + 1] ** (1 / 7)
            between = (a + share * (b - a)) ** 7
            if grid.schedule is not None and not bool((alpha == 1).all()):
                time = grid.schedule.time(between)
                scale = grid.schedule.alpha(time)
            else:
                scale = alpha[i] + share * (alpha[i + 1] - alpha[i])
                time = between if grid.schedule is None else grid.schedule.time(between)
            parts.append((scale * between, scale, time))
        else:
            assert grid.schedule is not None
            time = t[i] + share * (t[i + 1] - t[i])
            parts.append((grid.schedule.sigma(time), grid.schedule.alpha(time), time))
    parts.append((sigma[-1:], alpha[-1:], t[-1:]))
    s, a, u = (torch.cat(values) for values in zip(*parts, strict=True))
    return Grid(s, a, u, grid.schedule, f"{grid.name}, {inside} inside")


def _positions(grid: Grid, dense: Grid) -> list[int]:
    """Where the levels of ``grid`` are in ``dense``."""
    found = []
    for rho in grid.sigmas.tolist():
        far = (dense.sigmas - rho).abs() if math.isfinite(rho) else (~torch.isinf(dense.sigmas)).double()
        i = int(far.argmin())
        if not float(far[i]) <= 1e-9 * (abs(rho) if math.isfinite(rho) else 1):
            raise ValueError(f"dense: must contain every level of the grid; sigma {rho:.6g} is missing")
        found.append(i)
    return found


def _levels(grid: Grid) -> list[list[str]]:
    """The levels to twelve digits: placements differ in the last bits of the same two ends."""
    return [[f"{v:.12g}" for v in values.tolist()] for values in (grid.sigma, grid.alpha)]


def _count(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: must be a whole number of at least 1, got {value!r}")
    return value
