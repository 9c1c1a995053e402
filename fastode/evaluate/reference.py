"""Converged solutions of the probability-flow ODE from given seeds: what few-step samples are measured against.

The solution is that of UniPC of order 3 with many steps. How many is decided by a check: halving the step must change the
samples by less than ``bound`` (root mean square, in the units of the samples). Solutions are kept on disk under a name made
from the weights of the model, the seeds, conditions, and the grid; models without weights (plain functions) are not kept.
"""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastode.api import grid_maker
from fastode.artifact import identity
from fastode.denoisers import Condition, Denoiser, Guidance
from fastode.engine import Engine, NonFiniteError
from fastode.evaluate.cache import folder
from fastode.files import write_tensors
from fastode.program import Program
from fastode.schedules.grid import Grid, Level
from fastode.solvers import SOLVERS
from fastode.solvers.coefficients import exp_moments, functional_weights

SOLVER, STEPS, BOUND, LIMIT = "unipc", 32, 0.005, 256


class NotConvergedError(ValueError):
    """Halving the step still changes the solution; or it is not finite."""


@dataclass(frozen=True)
class Check:
    """``steps`` suffice: twice as many change the samples by ``change`` (root mean square), less than ``bound``."""

    steps: int
    change: float
    bound: float


class Converged:
    """Converged solutions for one model and one strength of guidance.

    ``batch``: samples at a time. ``cache``: folder of the kept solutions; None keeps nothing. ``model``: the identity of the
    model (:func:`fastode.artifact.identity`) where it is known already. ``evaluations`` counts network evaluations made.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        guidance_scale: float | None = None,
        batch: int = 64,
        backend: str = "auto",
        cache: Path | None = None,
        model: dict[str, Any] | None = None,
    ) -> None:
        if denoiser.sample_shape is None:
            raise ValueError("denoiser: its sample_shape must be known")
        if batch < 1:
            raise ValueError(f"batch: must be at least 1, got {batch}")
        self.denoiser, self.guidance_scale = denoiser, guidance_scale
        self.batch, self.backend, self.cache = batch, backend, cache
        self.model = dict(model or identity(denoiser, guidance_scale=guidance_scale))
        self.evaluations = 0
        self._engines: dict[tuple[int, int], Engine] = {}

    @classmethod
    def cached(cls, denoiser: Denoiser, **arguments: Any) -> Converged:
        """With the usual folder of the cache."""
        return cls(denoiser, cache=folder("solutions"), **arguments)

    def program(self, steps: int) -> Program:
        """UniPC of order 3 on Karras levels, or on uniform times where the noise has no finite range (a flow)."""
        schedule = self.denoiser.schedule
        assert schedule is not None
        finite = schedule.sigma_max < math.inf and schedule.sigma_min > 0
        make = grid_maker(SOLVERS[SOLVER], schedule, "karras" if finite else "time_uniform")
        return SOLVERS[SOLVER](make(steps=steps, final="sigma_min"))

    def check(
        self,
        seeds: Sequence[int],
        labels: Sequence[int] | None = None,
        *,
        steps: int = STEPS,
        bound: float = BOUND,
        limit: int = LIMIT,
    ) -> Check:
        """The least of ``steps``, 2 ``steps``, ... that is converged on ``seeds``.

        Raises :class:`NotConvergedError` with the change that was reached where ``limit`` steps are not.
        """
        if not bound > 0:
            raise ValueError(f"bound: must be positive, got {bound}")
        n, coarse = steps, self.solve(seeds, labels, steps=steps)
        while True:
            fine = self.solve(seeds, labels, steps=2 * n)
            change = float((fine.double() - coarse.double()).square().mean().sqrt())
            if change < bound:
                return Check(n, change, bound)
            if 2 * n > limit:
                raise NotConvergedError(
                    f"bound: {n} steps and {2 * n} differ by {change:.3g} (root mean square), not less than {bound:g}; "
                    "a network in half precision has a floor of its own: raise the bound, or use float32"
                )
            n, coarse = 2 * n, fine

    def solve(self, seeds: Sequence[int], labels: Sequence[int] | None = None, *, steps: int = STEPS) -> Tensor:
        """Samples [B, *sample] of ``seeds`` with ``steps`` steps; from the cache where they are known."""
        program = self.program(steps)
        path = self._path("samples", program.grid, seeds, labels)
        kept = _read(path, "samples")
        if kept is not None and kept["samples"].shape == (len(seeds), *self._shape):
            return kept["samples"]
        samples = torch.cat([part for part, _, _ in self._run(program, seeds, labels, states=False)])
        _write(path, {"samples": samples})
        return samples

    def trajectory(
        self, seeds: Sequence[int], labels: Sequence[int] | None = None, *, steps: int = STEPS
    ) -> Trajectory:
        """The whole way of ``seeds``, readable at any level."""
        program = self.program(steps)
        path = self._path("trajectory", program.grid, seeds, labels)
        kept = _read(path, "states", "denoised")
        if kept is None:
            parts = list(self._run(program, seeds, labels, states=True))
            states, denoised = (torch.cat([p[i] for p in parts], 1) for i in (1, 2))
            _write(path, {"states": states, "denoised": denoised})
        else:
            states, denoised = kept["states"], kept["denoised"]
        return Trajectory(program.grid, states, denoised)

    # -- inner parts -----------------------------------------------------------------------------------------------------

    @property
    def _shape(self) -> tuple[int, ...]:
        assert self.denoiser.sample_shape is not None
        return tuple(self.denoiser.sample_shape)

    def _run(self, program: Program, seeds: Sequence[int], labels: Sequence[int] | None, *, states: bool) -> Any:
        """Samples, states [L, B, *sample] and their denoised estimates, batch by batch."""
        rows = list(seeds)
        for first in range(0, len(rows), self.batch):
            part = rows[first : first + self.batch]
            size = min(self.batch, len(rows))
            filled = part + [part[-1]] * (size - len(part))  # one engine for all batches
            chosen = None if labels is None else list(labels[first : first + self.batch])
            if chosen is not None:
                chosen += [chosen[-1]] * (size - len(part))
            key = (program.grid.steps, size)
            if key not in self._engines:
                guided = self.guidance_scale is not None
                self._engines = {
                    key: Engine(program, self.denoiser, (size, *self._shape), self.backend, guidance=guided)
                }
            engine = self._engines[key]
            scale = self.guidance_scale
            try:
                made = engine(seeds=filled, class_labels=chosen, guidance_scale=scale, return_trajectory=states)
            except NonFiniteError as error:
                raise NotConvergedError(f"reference: {error}") from error
            self.evaluations += program.nfe * len(filled)
            if not states:
                yield made[: len(part)].cpu(), None, None
                continue
            estimates = [
                _denoise(self.denoiser, state, level, chosen, self.guidance_scale)
                for state, level in zip(made.states, program.grid, strict=True)
            ]
            self.evaluations += len(estimates) * len(filled)
            yield (
                made.samples,
                torch.stack(made.states)[:, : len(part)].cpu(),
                torch.stack(estimates)[:, : len(part)].cpu(),
            )

    def _path(self, kind: str, grid: Grid, seeds: Sequence[int], labels: Sequence[int] | None) -> Path | None:
        if self.cache is None or self.model.get("weights") is None:
            return None
        what = {
            "kind": kind,
            "model": self.model,
            "network": str(self.denoiser.dtype),
            "device": str(self.denoiser.device or "cpu").split(":")[0],
            "solver": SOLVER,
            "grid": grid.to_dict(),
            "seeds": [int(s) for s in seeds],
            "labels": None if labels is None else [int(c) for c in labels],
        }
        name = hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()
        return self.cache / f"{name[:40]}.safetensors"


class Trajectory:
    """A converged trajectory, readable at any level between its ends.

    Between two nodes the exact solution of the linear part is used and D is interpolated in lam = ln(alpha/sigma) through
    the nearest nodes (EDM frame)::

        x(t) = e^(-h) x(s) + int_0^h e^(-(h - u)) D(lam_s + u) du,    h = lam_t - lam_s

    ``states``, ``denoised``: [L, B, *sample] at the levels of ``grid``, in the grid's frame.
    """

    def __init__(self, grid: Grid, states: Tensor, denoised: Tensor, *, nodes: int = 6) -> None:
        self.grid, self.states, self.denoised, self.nodes = grid, states.double(), denoised.double(), nodes
        self._levels = [level for level in grid if not level.is_noise and not level.is_data]
        self._lam = [float(level.lam) for level in self._levels]
        self._first = 1 if grid[0].is_noise else 0

    def at(self, level: Level) -> Tensor:
        """The states [B, *sample] at ``level``, in its frame. Levels past the last node are the denoised estimate there."""
        if level.is_noise:
            return float(level.sigma) * self.states[0] / float(self.grid[0].sigma)
        alpha = float(level.alpha)
        if level.is_data:
            return alpha * self._node(len(self._lam) - 1)[1]
        lam = float(level.lam)
        i = min(max(bisect_left(self._lam, lam) - 1, 0), len(self._lam) - 1)
        if i + 1 < len(self._lam) and self._lam[i + 1] - lam < lam - self._lam[i]:
            i += 1  # from the nearest node, forwards or backwards
        h = lam - self._lam[i]
        x, _ = self._node(i)
        if abs(h) < 1e-12:
            return alpha * x
        outside = not self._lam[0] <= lam <= self._lam[-1]  # towards pure noise or data: there D is nearly constant
        count = 1 if outside else min(self.nodes, len(self._lam))
        low = i if outside else min(max(i - count // 2 + (h > 0), 0), len(self._lam) - count)
        where = [self._lam[j] - self._lam[i] for j in range(low, low + count)]
        weights = functional_weights(where, exp_moments(h, count, data=True))
        total = math.exp(-h) * x
        for w, j in zip(weights, range(low, low + count), strict=True):
            total = total + float(w) * self._node(j)[1]
        return alpha * total

    def _node(self, i: int) -> tuple[Tensor, Tensor]:
        """State and denoised estimate at finite node ``i``, in the EDM frame."""
        j = i + self._first
        return self.states[j] / float(self.grid[j].alpha), self.denoised[j]


def _denoise(denoiser: Denoiser, x: Tensor, level: Level, labels: Any, scale: float | None) -> Tensor:
    """D at one level, in the dtype of ``x``."""
    from fastode.denoisers.guidance import GUIDANCE_SCALE

    if level.is_data:
        return x
    guidance = Guidance() if scale is not None else None
    chosen = None if labels is None else torch.as_tensor(labels)
    condition = denoiser.check_condition(len(x), Condition(chosen), guidance)
    known = {} if scale is None else {GUIDANCE_SCALE: float(scale)}
    with torch.no_grad():
        return denoiser.denoise(x, level, condition, guidance=guidance, known=known)


def _read(path: Path | None, *names: str) -> dict[str, Tensor] | None:
    """What is kept; None where it is not, or a file is damaged: it can always be made again."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path is None or not path.exists():
        return None
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError):
        return None
    return tensors if set(names) <= set(tensors) else None


def _write(path: Path | None, tensors: dict[str, Tensor]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, tensors)
