"""D-ODE solvers: one distilled number per state, a modifier of single-step and multistep solvers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastode.program import Atom, Form, Program, Trace
from fastode.scalar import Late, Scalar
from fastode.schedules.grid import Grid, Level
from fastode.solvers.coefficients import check_choice, eps_of
from fastode.solvers.solver import Solver

SINGLE_STEP = ("heun", "edm", "dpm_solver_2", "dpm_solver_3", "dpm_solver_pp_s")
"""Solvers with inner states, which are corrected too, along raw outputs of the network."""

DENOISED = ("heun", "edm")
"""Of the solvers without an option ``prediction``, those whose published form differs denoised estimates."""


def d_ode(
    base: Solver,
    grid: Any,
    lambdas: Sequence[Scalar],
    *,
    output: str | None = None,
    first: str | None = None,
    unit: str = "output",
    **options: Any,
) -> Program:
    """``base``, and added to every state u that it makes: u <- u + lambda_k Delta_k (arXiv:2309.16421). NFE as ``base``.

    Delta_k = O_k - O_{k-1} is the last change of the output, so that lambda is a gain of the extrapolation along it:

    * multistep solvers: O is the *combined* output of a step, the one with which a DDIM step makes u, that is u = g x + c O
      with g = alpha_t/alpha_s, c = sigma_t - g sigma_s (noise), or g = sigma_t/sigma_s, c = alpha_t - g alpha_s (denoised);
    * single-step solvers: O are the network's outputs as they are, and inner states are corrected as well.

    ``lambdas``: one per corrected state, see :func:`corrections`. ``output``: "eps" or "x0"; default: what ``base``
    predicts, and "x0" for Heun and EDM. ``first``: what stands for the output before the first: "start", the start noise
    at unit size (default for eps: D-DDIM, D-iPNDM, D-DEIS, D-DPM-Solver), or "none", no correction there (default for x0).
    ``unit``: lambda multiplies the difference of outputs itself ("output"; D-DDIM, D-iPNDM, D-DEIS, D-EDM), or its
    part in the step ("step": times c, or times the coefficient of the newest output in u; D-DPM-Solver).

    A lambda of exactly 0 changes nothing; all 0 are ``base``, bit for bit. Costs one stored output. Raises ``ValueError``
    naming the argument, also for a ``base`` that lands on a level twice (UniPC's corrector).
    """
    trace = _trace(base, grid, lambdas, output, first, unit, options)
    program = base.record(trace, **options)
    if len(lambdas) != len(trace.made):
        raise ValueError(f"lambdas: {base.name} corrects {len(trace.made)} states on this grid, got {len(lambdas)}")
    return replace(program, name=f"d_{base.name}")


@dataclass(frozen=True, eq=False)
class Correction:
    """One corrected state: stored as ``value``, at ``level``; ``weight``: what one unit of lambda is in units of the step
    (see ``unit``). ``free`` is False where there is no direction to correct along."""

    value: int
    level: Level
    weight: float
    free: bool


def corrections(
    base: Solver,
    grid: Any,
    *,
    output: str | None = None,
    first: str | None = None,
    unit: str = "output",
    **options: Any,
) -> tuple[Program, list[Correction]]:
    """The program with all lambdas late, named "lambda0", "lambda1", ..., and the states they correct."""
    trace = _trace(base, grid, None, output, first, unit, options)
    program = base.record(trace, **options)
    return replace(program, name=f"d_{base.name}"), trace.made


def _trace(base: Solver, grid: Any, lambdas: Any, output: Any, first: Any, unit: str, options: Any) -> Distilling:
    asked = {**base.options, **options}
    if asked.get("corrector", False):
        raise ValueError(f"corrector: D-ODE corrects each state once, {base.name} needs corrector=False")
    if asked.get("eta", 0.0):
        raise ValueError("eta: D-ODE needs a deterministic solver, eta=0")
    kind = output or asked.get("prediction") or ("x0" if base.name in DENOISED else "eps")
    check_choice("output", kind, ("eps", "x0"))
    start = first or ("start" if kind == "eps" else "none")
    check_choice("first", start, ("start", "none"))
    check_choice("unit", unit, ("output", "step"))
    for k, value in enumerate(lambdas or ()):
        if isinstance(value, (int, float)) and not math.isfinite(value):
            raise ValueError(f"lambdas: must be finite, got {value!r} at state {k}")
    return Distilling(
        Grid.of(grid), lambdas, data=kind == "x0", start=start == "start", step_unit=unit == "step",
        combined=base.name not in SINGLE_STEP, afs=bool(options.get("afs", False)),
    )  # fmt: skip


class Distilling(Trace):
    """A trace that adds lambda times the last change of the output to every state; see :func:`d_ode`."""

    def __init__(
        self,
        grid: Grid,
        lambdas: Sequence[Scalar] | None,
        *,
        data: bool,
        start: bool,
        step_unit: bool,
        combined: bool,
        afs: bool = False,
    ) -> None:
        super().__init__(grid, afs=afs)
        self.made: list[Correction] = []
        self._lambdas = None if lambdas is None else list(lambdas)
        self._data, self._step_unit, self._combined = data, step_unit, combined
        first = grid[0]
        size = math.hypot(float(first.alpha), float(first.sigma))
        self._outputs: list[Form] = [self.start() / size] if start and not first.is_noise else []
        self._from: tuple[Form, Level] = (self.start(), first)
        self._landed = {0}
        self._newest = -1  # index of the evaluation asked for last

    def denoise(self, x: Form, level: Level) -> Form:
        d = super().denoise(x, level)
        self._newest += 1 if d.single() is not None else 0
        if not self._combined and not (level.is_noise and not self._data):
            self._outputs.append(self.keep(d) if self._data else self.keep(eps_of(x, d, level)))
        return d

    def inner(self, form: Form, level: Level) -> Form:
        return self._corrected(form, level) if not self._combined else self.keep(form)

    def land(self, form: Form, level: Level) -> Form:
        if level.index in self._landed:
            raise ValueError(f"solver: D-ODE corrects each state once, this one lands on level {level.index} again")
        if level.index is not None:
            self._landed.add(level.index)
        kept = super().land(self._corrected(form, level), level)
        self._from = (kept, level)
        return kept

    def _corrected(self, form: Form, level: Level) -> Form:
        """``form`` with its correction, noted in ``made``."""
        x, s = self._from
        gain, weight = self._ddim(s, level)
        if self._combined and weight is not None:
            self._outputs.append((form - gain * x) / weight)
        elif not self._combined:
            weight = self._part(form, level)
        free = weight is not None and len(self._outputs) >= 2
        k = len(self.made)
        scale: Any = (
            Late(f"lambda{k}") if self._lambdas is None else self._lambdas[k] if k < len(self._lambdas) else 0.0
        )
        used = isinstance(scale, (int, float)) and scale == 0
        if free and not used:
            delta = self._outputs[-1] - self._outputs[-2]
            if k == 0:  # the start noise is no output: it is not what a single data point would give
                self.consistent = False
            form = form + (scale * weight if self._step_unit else scale) * delta
        elif not free and not used and self._lambdas is not None:
            raise ValueError(
                f"lambdas: state {k} has no change of the output to go along, so it must be 0, got {scale!r}"
            )
        kept = self.keep(form)
        (atom,) = kept.terms
        size = 1.0 if weight is None or self._step_unit else abs(float(weight))
        self.made.append(Correction(atom.index, level, size, free))
        if self._combined and self._outputs:
            self._outputs = [self.keep(self._outputs[-1])]
        return kept

    def _ddim(self, s: Level, t: Level) -> tuple[Any, Any]:
        """(g, c) of x_t = g x + c O; c is None where the output means nothing (noise prediction from alpha = 0)."""
        if self._data:
            gain = t.sigma / s.sigma
            return gain, t.alpha - gain * s.alpha
        if s.is_noise:
            return 0.0, None
        gain = t.alpha / s.alpha
        return gain, t.sigma - gain * s.sigma

    def _part(self, form: Form, level: Level) -> Any:
        """The coefficient of the newest output in ``form``: as an estimate it is c, as noise -c sigma/alpha."""
        c: Any = form.terms.get(Atom("output", self._newest, "denoised"))
        if c is None or self._data:
            return c
        at = self._points[self._newest][1]
        return None if at.is_noise else -c * at.sigma / at.alpha
