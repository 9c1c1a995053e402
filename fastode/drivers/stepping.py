"""The loop of the adaptive driver: attempts, their errors, and what each sample does next."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fastode.backends import reference
from fastode.drivers.control import PI, PID
from fastode.drivers.embedded import TABLEAUS, Attempt, Clock, dpm_solver, runge_kutta
from fastode.drivers.evaluation import Evaluation
from fastode.program import Stage
from fastode.scalar import evaluate
from fastode.schedules.grid import Level

Norm = Literal["each", "sample", "batch"]
Field = Callable[[Tensor, list[Level], "Tensor | None"], tuple[Tensor, "Tensor | None"]]
"""D and (for likelihoods) div D at states, on one level or one per row, for the given rows of the batch (None: all)."""


@dataclass(frozen=True, eq=False)
class Trial:
    """One attempt: for which samples (None: all), from where to where (float64 [n]), its error norms, and the verdict."""

    samples: Tensor | None
    start: Tensor
    end: Tensor
    error: Tensor
    accepted: Tensor


def field_of(evaluation: Evaluation) -> Field:
    """D as a function of states, their levels (one, or one per row) and the rows of the batch that they are."""

    def field(x: Tensor, levels: list[Level], rows: Tensor | None) -> tuple[Tensor, Tensor | None]:
        some = evaluation if rows is None else evaluation.take(rows)
        return (some.at(x, levels[0]) if len(levels) == 1 else some.rows(x, levels)), None

    return field


@dataclass(eq=False)
class Run:
    """What :func:`solve` returns; ``quantity`` is the integral of b div D along the way, [B]."""

    samples: Tensor
    quantity: Tensor | None
    t: Tensor
    nfe: Tensor
    accepted: Tensor
    rejected: Tensor
    trials: list[Trial]
    success: bool = True
    message: str = "reached the end"


def solve(
    clock: Clock,
    field: Field,
    x: Tensor,
    t_start: float,
    t_end: float,
    *,
    method: str,
    rtol: float,
    atol: float,
    norm: Norm = "each",
    controller: PI | PID | None = None,
    h_init: float | None = None,
    max_nfe: int = 2000,
    times: Sequence[float] | None = None,
    integral: bool = False,
) -> Run:
    """The driver itself, in the frame of ``clock``. ``integral``: ``field`` also returns div D [B], which is integrated."""
    if method in ("scipy", "torchdiffeq"):
        from fastode.drivers import blackbox

        return blackbox.solve(clock, field, x, t_start, t_end, method=method, rtol=rtol, atol=atol, integral=integral)
    attempt = dpm_solver(int(method[-1])) if method.startswith("dpm") else runge_kutta(TABLEAUS[method])
    driver = _Driver(clock, field, attempt, x, rtol, atol, norm, integral)
    if times is not None:
        return driver.fixed(times)
    rule = controller or (PI() if attempt.scale == "hairer" else PID())
    return driver.controlled(t_start, t_end, rule, h_init, max_nfe)


class _Driver:
    """The state of one integration. ``n`` step sizes: one per sample, or one."""

    def __init__(
        self,
        clock: Clock,
        field: Field,
        attempt: Attempt,
        x: Tensor,
        rtol: float,
        atol: float,
        norm: Norm,
        integral: bool,
    ) -> None:
        self.clock, self.field, self.attempt, self.norm = clock, field, attempt, norm
        self.rtol, self.atol = rtol, atol
        batch = len(x)
        self.x, self.previous = x, x  # ``previous``: the lower-order state of the last step, for DPM-Solver's scale
        self.q = x.new_zeros(batch, dtype=torch.float64) if integral else None
        self.count = batch if norm == "each" else 1
        self.first: Tensor | None = None  # D at the present state of each sample, where known
        self.first_q: Tensor | None = None
        self.fresh = torch.zeros(batch, dtype=torch.bool)  # whether it is known
        self.nfe = torch.zeros(batch, dtype=torch.int64)
        self.accepted, self.rejected = torch.zeros_like(self.nfe), torch.zeros_like(self.nfe)
        self.trials: list[Trial] = []

    # -- evaluations -----------------------------------------------------------------------------------------------------

    def _levels(self, alpha: Tensor, sigma: Tensor, rows: int) -> list[Level]:
        pairs = list(zip(alpha.reshape(-1).tolist(), sigma.reshape(-1).tolist(), strict=True))
        if len(pairs) not in (1, rows):
            raise AssertionError("one level, or one per row")
        return [Level(a, s) for a, s in pairs]

    def _evaluate(self, x: Tensor, alpha: Tensor, sigma: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor | None]:
        self.nfe[slice(None) if rows is None else rows] += 1
        return self.field(x, self._levels(alpha, sigma, len(x)), rows)

    def _open(self, position: Tensor, rows: Tensor) -> None:
        """Make sure that D is known at the present state of ``rows``, whose positions are ``position`` [n]."""
        missing = rows[~self.fresh[rows]]
        if not len(missing):
            return
        at = position if self.count == 1 else position[~self.fresh[rows]]
        alpha, sigma, _, _ = self.clock.levels(self._time(at))
        every = len(missing) == len(self.x)
        d, q = self._evaluate(self.x if every else self.x[missing], alpha, sigma, None if every else missing)
        if every or self.first is None:
            self.first, self.first_q = d, q
        else:
            self.first = self.first.index_copy(0, missing.to(d.device), d)
            if q is not None and self.first_q is not None:
                self.first_q = self.first_q.index_copy(0, missing.to(q.device), q)
        self.fresh[missing] = True

    def _time(self, position: Tensor) -> Tensor:
        return position if self.attempt.variable == "t" else self.clock.schedule.time(torch.exp(-position))

    # -- one attempt -----------------------------------------------------------------------------------------------------

    def _attempt(
        self, start: Tensor, end: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, tuple[Tensor, Tensor | None]]:
        """(x_new, error, q_new, q_error, last evaluation) of a step of ``rows`` from ``start`` to ``end`` [n]."""
        self._open(start, rows)
        every = len(rows) == len(self.x)
        assert self.first is not None
        pick = slice(None) if every else rows.to(self.x.device)
        x, program = self.x[pick], self.attempt.program
        known, (weights, error_weights) = self.attempt.numbers(self.clock, start, end)
        shape = () if self.count == 1 else (-1, *[1] * (x.ndim - 1))
        known = {late: value.reshape(shape) for late, value in known.items()}
        memo: dict[int, Any] = {}
        divergences: list[Tensor | None] = []
        latest: tuple[Tensor, Tensor | None] = (x, None)

        def denoise(point: Tensor, stage: Stage, late: Mapping[Any, Any]) -> Tensor:
            nonlocal latest
            if stage.index == 0:
                assert self.first is not None
                d, q = self.first[pick], None if self.first_q is None else self.first_q[pick]
            else:
                alpha, sigma = (evaluate(v, late, memo) for v in (stage.level.alpha, stage.level.sigma))
                d, q = self._evaluate(point, alpha, sigma, None if every else rows)
            divergences.append(q)
            latest = d, q
            return d

        error, values = reference.run(program, denoise, x, known=known, keep=True)
        q_new = q_error = None
        if self.q is not None:
            parts = [q for q in divergences if q is not None]
            q_new = self.q[pick] + sum(w.to(q.device) * q for w, q in zip(weights, parts, strict=True))
            q_error = sum(
                (w.to(q.device) * q for w, q in zip(error_weights, parts, strict=True)), torch.zeros_like(q_new)
            )
        return values[program.states[1]], error, q_new, q_error, latest

    def _norms(self, x: Tensor, ratio: Tensor, q_ratio: Tensor | None) -> Tensor:
        """Root mean squares of ``ratio`` [B, *sample] (and the integral's [B]) as [n] numbers on the host."""
        square = ratio.double().flatten(1).square().sum(1)
        size = ratio[0].numel()
        if q_ratio is not None:
            square, size = square + q_ratio.square(), size + 1
        each = square / size
        if self.norm == "each":
            return each.sqrt().cpu()
        return (each.max() if self.norm == "sample" else each.mean()).sqrt().reshape(1).cpu()

    def _error(
        self, x: Tensor, x_new: Tensor, error: Tensor, q: tuple[Tensor, Tensor, Tensor] | None, rows: Tensor
    ) -> Tensor:
        if self.attempt.scale == "dpm":
            last = self.previous[rows.to(x.device)]
            scale = torch.clamp(self.rtol * torch.maximum((x_new + error).abs(), last.abs()), min=self.atol)
            return self._norms(x, error / scale, None)
        scale = self.atol + self.rtol * torch.maximum(x.abs(), x_new.abs())
        q_ratio = None
        if q is not None:
            old, new, q_error = q
            q_ratio = q_error / (self.atol + self.rtol * torch.maximum(old.abs(), new.abs()))
        return self._norms(x, error / scale, q_ratio)

    # -- the two ways to go ----------------------------------------------------------------------------------------------

    def fixed(self, times: Sequence[float]) -> Run:
        """The given steps, no error is read."""
        rows = torch.arange(len(self.x))
        grid = torch.tensor(list(times), dtype=torch.float64)
        for start, end in itertools.pairwise(grid):
            s, t = start.expand(self.count), end.expand(self.count)
            x, _, q, _, (d, d_q) = self._attempt(s, t, rows)
            self.x, self.q = x, q
            self.accepted += 1
            self.fresh[:] = self.attempt.fsal
            self.first, self.first_q = d, d_q
        return self._run(grid[-1].expand(self.count))

    def controlled(self, t_start: float, t_end: float, rule: PI | PID, h_init: float | None, max_nfe: int) -> Run:
        first, last = (self._position(t) for t in (t_start, t_end))
        sign = math.copysign(1.0, last - first)
        here = torch.full((self.count,), first, dtype=torch.float64)
        memory = rule.memory(self.count)
        everyone = torch.arange(len(self.x))
        if h_init is not None:
            h = torch.full_like(here, h_init)
        elif self.attempt.scale == "dpm":
            h = torch.full_like(here, 0.05)
        else:
            h = self._first_step(here, last, sign)
        bound = ""
        while True:
            groups = (here != last).nonzero().flatten()
            if not len(groups):
                break
            rows = everyone if self.count == 1 else groups
            start = here[groups]
            stages = len(self.attempt.program.stages)
            if int(self.nfe[rows].max()) + stages > max_nfe:
                bound = f"max_nfe: the tolerance was not met within {max_nfe} evaluations"
                break
            if bool((h[groups] < 10 * torch.finfo(torch.float64).eps * start.abs()).any()):
                bound = "rtol, atol: the step size fell below the rounding of the time; the tolerance cannot be met"
                break
            left = (last - start).abs()
            end = torch.where(h[groups] >= left, torch.full_like(start, last), start + sign * h[groups])
            self._step(start, end, groups, rows, here, h, rule, memory)
        if bound:
            warnings.warn(f"adaptive: {bound}; stopped at {float(self._time(here).max()):.6g}", stacklevel=5)
        return self._run(self._time(here) if bound else torch.full_like(here, t_end), bound)

    def _step(
        self,
        start: Tensor,
        end: Tensor,
        groups: Tensor,
        rows: Tensor,
        here: Tensor,
        h: Tensor,
        rule: PI | PID,
        memory: Tensor,
    ) -> None:
        """One attempt and its verdict, written into ``here``, ``h``, ``memory`` and the states."""
        pick = rows.to(self.x.device)
        x_new, error, q_new, q_error, (d, d_q) = self._attempt(start, end, rows)
        q = None
        if self.q is not None and q_new is not None and q_error is not None:
            q = self.q[pick], q_new, q_error
        size = self._error(self.x[pick], x_new, error, q, rows)
        accepted, factor, memory[:, groups] = rule.decide(size, self.attempt.order, memory[:, groups])
        self.trials.append(Trial(None if len(rows) == len(self.x) else rows, start, end, size, accepted))
        # scipy's step is what was tried, cut at the end; k-diffusion's what was proposed.
        base = (end - start).abs() if self.attempt.scale == "hairer" else h[groups]
        h[groups] = base * factor
        here[groups] = torch.where(accepted, end, start)
        taken = rows if self.count == 1 and bool(accepted) else rows[accepted.expand(len(rows))]
        self.accepted[taken] += 1
        self.rejected[rows] += 1
        self.rejected[taken] -= 1
        if not len(taken):
            return
        if len(taken) == len(self.x):
            self.x, self.previous = x_new, x_new + error
            self.q = q_new
            self.first, self.first_q = d, d_q
        else:
            local = accepted.expand(len(rows)).to(pick.device)
            at = pick[local]

            def put(whole: Tensor, part: Tensor) -> Tensor:
                return whole.index_copy(0, at, part[local])

            self.x, self.previous = put(self.x, x_new), put(self.previous, x_new + error)
            if self.q is not None and q_new is not None:
                self.q = put(self.q, q_new)
            if self.attempt.fsal and self.first is not None:
                self.first = put(self.first, d)
                if self.first_q is not None and d_q is not None:
                    self.first_q = put(self.first_q, d_q)
        self.fresh[taken] = self.attempt.fsal

    def _first_step(self, here: Tensor, last: float, sign: float) -> Tensor:
        """Hairer, Norsett and Wanner, Solving ODEs I, II.4: two evaluations, of which the first step uses one."""
        rows = torch.arange(len(self.x))
        self._open(here, rows)
        span = torch.full_like(here, abs(last - float(here[0])))
        scale = self.atol + self.rtol * self.x.abs()
        q_scale = self.atol  # the integral starts at 0

        def slope(x: Tensor, d: Tensor, q: Tensor | None, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor | None]:
            shape = (-1, *[1] * (x.ndim - 1))
            a_x, b_x = (v.reshape(shape).to(device=x.device, dtype=x.dtype) for v in (a, b))
            return a_x * x + b_x * d, None if q is None else b.to(q.device) * q

        def size(value: Tensor, q: Tensor | None) -> Tensor:
            return self._norms(self.x, value / scale, None if q is None else q / q_scale)

        assert self.first is not None
        alpha, sigma, a, b = self.clock.levels(here)
        f0, g0 = slope(self.x, self.first, self.first_q, a, b)
        zero = None if self.q is None else self.q
        d0, d1 = size(self.x, zero), size(f0, g0)
        h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), torch.full_like(d0, 1e-6), 0.01 * d0 / d1).minimum(span)
        shape = (-1, *[1] * (self.x.ndim - 1))
        step = (sign * h0).reshape(shape).to(device=self.x.device, dtype=self.x.dtype)
        probe = self.x + step * f0
        alpha, sigma, a, b = self.clock.levels(here + sign * h0)
        d, q = self._evaluate(probe, alpha, sigma, None)
        f1, g1 = slope(probe, d, q, a, b)
        d2 = size(f1 - f0, None if g1 is None or g0 is None else g1 - g0) / h0
        flat = (d1 <= 1e-15) & (d2 <= 1e-15)
        h1 = torch.where(
            flat,
            (h0 * 1e-3).clamp(min=1e-6),
            (0.01 / torch.maximum(d1, d2).clamp(min=1e-300)) ** (1 / self.attempt.order),
        )
        return torch.minimum(100 * h0, h1).minimum(span)

    def _position(self, t: float) -> float:
        if self.attempt.variable == "t":
            return t
        alpha, sigma, _, _ = self.clock.levels(torch.tensor(t))
        if float(alpha) == 0 or float(sigma) == 0:
            raise ValueError(
                f"t_start, t_end: {self.attempt.name} steps in lam = ln(alpha/sigma), which is infinite at t = {t:g}"
            )
        return float(torch.log(alpha / sigma))

    def _run(self, t: Tensor, bound: str = "") -> Run:
        t = t.expand(len(self.x)).clone()
        return Run(
            self.x,
            self.q,
            t,
            self.nfe,
            self.accepted,
            self.rejected,
            self.trials,
            not bound,
            bound or "reached the end",
        )
