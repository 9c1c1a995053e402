"""All steps of a program at once: ParaDiGMS, Picard sweeps over a sliding window (arXiv:2305.16317).

The points at which a program evaluates the denoiser depend on earlier evaluations alone, through its tables. A sweep
evaluates a window of points in one batched call, at guesses of the points, and plays the tables of the window with what
came back: a triangular linear map, which gives better guesses. The front of the window is exact, so every sweep settles
at least one evaluation; what does not move any more is settled too, and the window slides past it.

Nothing here knows a solver. Values that tables read across the window's front (a multistep history) are the program's
own, made from settled evaluations; the published code restarts at first order there.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fastode.denoisers.base import Denoiser
from fastode.denoisers.guidance import GUIDANCE_SCALE, Guidance
from fastode.draws import Seeded
from fastode.drivers.evaluation import Evaluation, start_state
from fastode.drivers.sweeps import Cost, Window, bounds, float_level, last_uses, play, responses
from fastode.drivers.workers import Workers
from fastode.engine import Engine, NoiseSource
from fastode.noise import check_seeds
from fastode.program import Program

Mode = Literal["parallel", "sequential", "auto"]


@dataclass(frozen=True, eq=False)
class ParallelResult:
    """``samples``: [B, *sample]. ``sweeps``: batched calls one after the other; ``evaluations``: of each sample, in all;
    ``sequential``: evaluations of the sequential run; ``strides``: how far the window slid after each sweep; ``window``:
    its length in the end. ``converged`` is False if ``max_sweeps`` came first. ``parallel`` is False where "auto" chose
    the sequential run."""

    samples: Tensor
    sweeps: int
    evaluations: int
    sequential: int
    strides: tuple[int, ...]
    window: int
    converged: bool
    parallel: bool
    seconds: float

    @property
    def depth(self) -> float:
        """Sequential evaluations over sweeps: the speed-up if a batched call took as long as a single one."""
        return self.sequential / self.sweeps


class Parallel:
    """``Parallel(program, denoiser, shape)(seeds=...)`` is the program's sample, made in few sweeps.

    Args:
        program: any program whose numbers are known before the run (guidance apart), of any solver.
        shape: ``(B, *sample)``. The batch shares one window: its slowest sample sets the pace, as published.
        window: evaluations per sweep; by default all.
        tolerance: tau. A point has settled if its change per element, mean square, is at most tau^2 times the variance of
            the ancestral step that leaves its level, for every sample. 0: only what does not change at all, and then the
            result is that of the sequential run, bit for bit where the network's output does not depend on its batch.
        response: how an estimate is assumed to follow its point while guesses move, D += r (x - x_old). "gaussian" is the
            answer of Gaussian data, r = alpha v/(alpha^2 v + sigma^2), with v the square of the denoiser's sigma_data, or
            the number given instead; "data" holds D (r = 0), "noise" the noise (r = 1/alpha), "increments" the step's
            increment, as published. The fixed point is the same.
        fill: what stands for points that enter the window: "predict" plays the tables with the newest estimate, "copy"
            the newest point, as published.
        max_sweeps: a bound to stop at, with a warning; by default none is needed, sweeps never exceed evaluations.
        mode: "parallel"; "sequential"; or "auto", which measures both at the first call (see :meth:`warmup`) and takes
            the faster.
        group: a torch.distributed process group, or True for the default one: windows are spread over its processes,
            which all call this with the same arguments and get the same samples.
    """

    def __init__(
        self,
        program: Program,
        denoiser: Denoiser | Callable[..., Any],
        shape: Sequence[int],
        *,
        window: int | None = None,
        tolerance: float = 0.1,
        response: str | float = "gaussian",
        fill: Literal["predict", "copy"] = "predict",
        max_sweeps: int | None = None,
        mode: Mode = "parallel",
        group: Any = None,
        dtype: torch.dtype = torch.float32,
        guidance: Guidance | bool | None = None,
    ) -> None:
        if not isinstance(program, Program):
            raise TypeError(f"program: must be a Program such as SOLVERS['ddim'](grid), got {type(program).__name__}")
        if program.binds or program.late - {GUIDANCE_SCALE}:
            names = sorted(late.name for late in {*program.made, *program.late} - {GUIDANCE_SCALE})
            raise ValueError(
                f"program: {program.name} makes numbers in the run ({names}); such steps cannot be guessed"
            )
        if not program.stages:
            raise ValueError(f"program: {program.name} evaluates nothing")
        n = program.nfe
        if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
            raise ValueError(f"window: must be a whole number of at least 1, got {window!r}")
        if not (math.isfinite(tolerance) and tolerance >= 0):
            raise ValueError(f"tolerance: must be a finite number of at least 0, got {tolerance}")
        if max_sweeps is not None and (
            isinstance(max_sweeps, bool) or not isinstance(max_sweeps, int) or max_sweeps < 1
        ):
            raise ValueError(f"max_sweeps: must be a whole number of at least 1, got {max_sweeps!r}")
        if mode not in ("parallel", "sequential", "auto"):
            raise ValueError(f"mode: must be 'parallel', 'sequential' or 'auto', got {mode!r}")
        if fill not in ("predict", "copy"):
            raise ValueError(f"fill: must be 'predict' or 'copy', got {fill!r}")
        self.guidance = Guidance() if guidance is True else (guidance or None)
        # Checks the shape, dtype and levels, and is the sequential run.
        self.engine = Engine(program, denoiser, shape, "reference", dtype=dtype, guidance=self.guidance)
        self.program, self.denoiser = program, self.engine.denoiser
        self.shape, self.dtype, self.device = self.engine.shape, dtype, self.engine.device
        self.window = n if window is None else min(window, n)
        self.tolerance, self.fill, self.mode = tolerance, fill, mode
        self.max_sweeps = n if max_sweeps is None else max_sweeps
        self.workers = Workers(group)
        self.cost: Cost | None = None
        self._levels = [float_level(stage.level) for stage in program.stages]
        self._response = responses(response, self._levels, program, self.denoiser.sigma_data**2)
        self._bounds = bounds(program, tolerance)
        self._last_use = last_uses(program)

    def __call__(
        self,
        x: Tensor | None = None,
        *,
        seeds: Sequence[int] | Tensor | None = None,
        class_labels: Tensor | Sequence[int] | int | None = None,
        guidance_scale: float | Sequence[float] | Tensor | None = None,
        cond: Mapping[str, Any] | None = None,
        uncond: Mapping[str, Any] | None = None,
        noise: NoiseSource | None = None,
    ) -> ParallelResult:
        """Sample from the state ``x`` at the first level or from ``seeds``; arguments as :meth:`Engine.__call__`.

        The draws of a stochastic program are the same in every sweep: those of the seeds, or ``noise``.
        """
        call: dict[str, Any] = {
            "class_labels": class_labels,
            "guidance_scale": guidance_scale,
            "cond": cond,
            "uncond": uncond,
        }
        evaluation, start, source = self._prepare(x, seeds, noise, call)
        if self.mode == "auto" and self.cost is None:
            self.cost = self._measure(evaluation, start, source)
        if self.mode == "sequential" or (self.mode == "auto" and self.cost is not None and not self.cost.pays):
            began = time.perf_counter()
            samples = self.engine(start, noise=source, **call)
            seconds = time.perf_counter() - began
            n = self.program.nfe
            return ParallelResult(samples, n, n, n, (1,) * n, 1, True, False, seconds)
        return self._run(evaluation, start, source)

    def warmup(
        self, x: Tensor | None = None, *, seeds: Any = None, noise: NoiseSource | None = None, **call: Any
    ) -> Cost:
        """Time a network call on one point and on a window, and count the sweeps of one run; "auto" obeys the result."""
        if x is None and seeds is None:
            seeds = range(self.shape[0])
        self.cost = self._measure(*self._prepare(x, seeds, noise, call))
        return self.cost

    def _prepare(
        self, x: Tensor | None, seeds: Any, noise: NoiseSource | None, call: dict[str, Any]
    ) -> tuple[Evaluation, Tensor, Callable[[int], Tensor] | None]:
        first = float(self.program.grid[0].sigma)
        start = start_state(self.denoiser, x, seeds, first, dtype=self.dtype).to(self.device)
        if tuple(start.shape) != self.shape:
            raise ValueError(f"x: this sampler was built for shape {list(self.shape)}, got {list(start.shape)}")
        source = self._noise(noise, seeds)
        evaluation = Evaluation.of(self.denoiser, self.shape[0], guidance=self.guidance, ndim=len(self.shape), **call)
        return evaluation, start, source

    # -- the sweeps ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _run(self, evaluation: Evaluation, x: Tensor, noise: Callable[[int], Tensor] | None) -> ParallelResult:
        began, program, n = time.perf_counter(), self.program, self.program.nfe
        draws = Window(noise)
        values: dict[int, Tensor] = {0: x}
        play(program.init, values, None, draws, x)
        window, front, sweeps, evaluations = self.window, 0, 0, 0
        strides: list[int] = []
        points = self._entering(values, 0, min(window, n), torch.zeros_like(x), x, draws)
        estimates: list[Tensor] = []
        end = len(points)
        while front < n:
            if sweeps == self.max_sweeps:
                break
            try:
                estimates = self._evaluate(evaluation, points, front)
            except _OutOfMemory as error:
                if window == 1:
                    raise error.cause from None
                window = max(1, min(window, len(points)) // 2)
                warnings.warn(
                    f"window: {len(points)} points of {self.shape[0]} samples do not fit into memory; going on with {window}",
                    stacklevel=3,
                )
                points, end = points[:window], front + window
                continue
            sweeps, evaluations = sweeps + 1, evaluations + len(points)
            # Play the window with the new estimates; each follows its point as far as the response says.
            moved, answers, scratch = self._replay(values, points, estimates, front, draws)
            stride = self._stride(points, moved, front)
            for k in range(stride):
                play(program.stages[front + k].table, values, answers[k], draws, x)
                self._drop(values, front + k)
            front += stride
            strides.append(stride)
            draws.forget(front, program)
            new_end = min(front + window, n)
            entering = self._entering(scratch, end, new_end, answers[-1], None, draws)
            points, end = moved[stride:] + entering, new_end
        converged = front == n
        if not converged:
            warnings.warn(
                f"parallel: tolerance {self.tolerance:g} was not met within max_sweeps = {self.max_sweeps}; stopped at "
                f"evaluation {front} of {n}, the rest is the last guess",
                stacklevel=3,
            )
            self._finish(values, points, estimates, strides[-1] if strides else 0, front, draws)
        return ParallelResult(
            values[program.result].clone(),
            sweeps,
            evaluations,
            n,
            tuple(strides),
            window,
            converged,
            True,
            time.perf_counter() - began,
        )

    def _evaluate(self, evaluation: Evaluation, points: list[Tensor], front: int) -> list[Tensor]:
        """D at every point of the window, in one call per process."""
        batch = self.shape[0]

        def part(low: int, high: int) -> Tensor:
            levels = self._levels[front + low : front + high]
            try:
                if high - low == 1:
                    return evaluation.at(points[low], levels[0])
                tiled = evaluation.tiled(high - low)
                return tiled.rows(torch.cat(points[low:high]), [level for level in levels for _ in range(batch)])
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
                    raise _OutOfMemory(error) from error
                raise

        return list(self.workers.spread(part, len(points), points[0], _OutOfMemory).split(batch))

    def _replay(
        self, values: dict[int, Tensor], points: list[Tensor], estimates: list[Tensor], front: int, draws: Window
    ) -> tuple[list[Tensor], list[Tensor], dict[int, Tensor]]:
        """(new points, estimates there, values after the window)."""
        scratch, moved, answers = dict(values), [], []
        for k, (old, d) in enumerate(zip(points, estimates, strict=True)):
            stage = self.program.stages[front + k]
            point, response = scratch[stage.net_in], self._response[front + k]
            answer = d if response == 0 or point is old else d + response * (point - old)
            moved.append(point)
            answers.append(answer)
            play(stage.table, scratch, answer, draws, point)
            self._drop(scratch, front + k)
        return moved, answers, scratch

    def _stride(self, points: list[Tensor], moved: list[Tensor], front: int) -> int:
        """One more than the settled points behind the front, whose own is exact; at most the window."""
        if len(points) == 1:
            return 1
        changes = []
        for old, new in zip(points[1:], moved[1:], strict=True):
            changes.append((new - old).double().flatten(1).square().mean(1).max())
        change = self.workers.agree(torch.stack(changes)).cpu()
        limits = torch.tensor(self._bounds[front + 1 : front + len(points)], dtype=torch.float64)
        open_points = (~(change <= limits)).nonzero().flatten()  # NaN is not settled
        return 1 + (int(open_points[0]) if len(open_points) else len(changes))

    def _entering(
        self,
        scratch: dict[int, Tensor],
        start: int,
        end: int,
        estimate: Tensor,
        copied: Tensor | None,
        draws: Window,
    ) -> list[Tensor]:
        """Guesses of points ``start`` .. ``end`` - 1, from the values before them."""
        if start >= end:
            return []
        scratch = dict(scratch)
        if self.fill == "copy":
            newest = scratch[self.program.stages[start].net_in] if copied is None else copied
            guesses = [newest] * (end - start)
            return [scratch[self.program.stages[0].net_in], *guesses[1:]] if start == 0 else guesses
        points = []
        for i in range(start, end):
            stage = self.program.stages[i]
            points.append(scratch[stage.net_in])
            play(stage.table, scratch, estimate, draws, estimate)
            self._drop(scratch, i)
        return points

    def _finish(
        self,
        values: dict[int, Tensor],
        points: list[Tensor],
        estimates: list[Tensor],
        stride: int,
        front: int,
        draws: Window,
    ) -> None:
        """Play what is left with the newest estimates there are."""
        known = estimates[stride:]
        last = known[-1] if known else (estimates[-1] if estimates else torch.zeros_like(points[0]))
        for i in range(front, self.program.nfe):
            k = i - front
            stage = self.program.stages[i]
            play(stage.table, values, known[k] if k < len(known) else last, draws, last)
            self._drop(values, i)

    def _drop(self, values: dict[int, Tensor], stage: int) -> None:
        for value in [v for v in values if self._last_use.get(v, -1) <= stage and v != self.program.result]:
            del values[value]

    # -- cost and noise --------------------------------------------------------------------------------------------------

    def _measure(self, evaluation: Evaluation, x: Tensor, noise: Callable[[int], Tensor] | None) -> Cost:
        def timed(points: list[Tensor]) -> float:
            best = math.inf
            for _ in range(3):
                self._wait()
                began = time.perf_counter()
                self._evaluate(evaluation, points, 0)
                self._wait()
                best = min(best, time.perf_counter() - began)
            return best

        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = self._run(evaluation, x, noise)  # also finds the window that fits
            self._wait()
            one, whole = timed([x]), timed([x] * run.window)
        calls = run.sweeps * one + max(0.0, whole - one) / max(1, run.window - 1) * (run.evaluations - run.sweeps)
        overhead = max(0.0, run.seconds - calls) / run.sweeps
        # The first run of a process also warms up the network; the tables cost at most about a call per sweep.
        overhead = min(overhead, whole)
        numbers = self.workers.agree(torch.tensor([one, whole, overhead], dtype=torch.float64)).tolist()
        n = self.program.nfe
        return Cost(numbers[0], numbers[1], numbers[2], run.window, run.sweeps, run.evaluations, n)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _noise(self, noise: NoiseSource | None, seeds: Any) -> Callable[[int], Tensor] | None:
        count = self.program.draws
        if noise is not None:
            source = noise if callable(noise) else list(noise).__getitem__
            if not callable(noise) and len(list(noise)) < count:
                raise ValueError(f"noise: this program makes {count} draws, got {len(list(noise))}")

            def checked(k: int) -> Tensor:
                z = source(k)
                if not isinstance(z, Tensor) or tuple(z.shape) != self.shape:
                    got = list(z.shape) if isinstance(z, Tensor) else type(z).__name__
                    raise ValueError(f"noise: draw {k} must have shape {list(self.shape)}, got {got}")
                return z.to(device=self.device, dtype=self.dtype)

            return checked
        if not count:
            return None
        if seeds is None:
            seeds = self.workers.agree(torch.randint(0, 2**62, (self.shape[0],)))
        return Seeded(check_seeds(seeds, self.shape[0]), self.shape[1:], self.dtype, self.device)


class _OutOfMemory(Exception):
    def __init__(self, cause: BaseException | None = None) -> None:
        super().__init__(str(cause))
        self.cause = cause or torch.OutOfMemoryError("another process ran out of memory")
