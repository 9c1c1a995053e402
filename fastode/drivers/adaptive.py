"""The probability flow with step-size control: our own driver over embedded pairs, and scipy's and torchdiffeq's.

An attempt is a program (:mod:`fastode.drivers.embedded`); the driver reads one error, accepts or rejects, and chooses the
next step. Evaluations are shared where two attempts make the same one: a rejected attempt and the next begin with the same
evaluation, and a pair with FSAL ends with the first of the next step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastode.denoisers.base import Denoiser
from fastode.denoisers.guidance import Guidance
from fastode.drivers.control import PI, PID
from fastode.drivers.embedded import Clock
from fastode.drivers.evaluation import Evaluation, start_state
from fastode.drivers.stepping import Norm, Trial, field_of, solve
from fastode.schedules.grid import Grid, Level
from fastode.schedules.noise import NoiseSchedule

METHODS = ("dopri5", "bosh3", "heun_euler", "dpm_solver_12", "dpm_solver_23", "scipy", "torchdiffeq")
FIXED = ("dopri5", "bosh3", "heun_euler", "rk4")


@dataclass(frozen=True, eq=False)
class AdaptiveResult:
    """``samples``: [B, *sample] at time ``t`` (float64 [B]); ``nfe``, ``accepted``, ``rejected``: int64 [B], evaluations
    and steps of each sample; ``trials``: every attempt in order (empty for scipy and torchdiffeq).

    ``success`` is False where a bound was met before the end; ``message`` then says which, and ``t`` how far it got.
    """

    samples: Tensor
    t: Tensor
    nfe: Tensor
    accepted: Tensor
    rejected: Tensor
    trials: tuple[Trial, ...]
    success: bool
    message: str

    def report(self) -> str:
        """One line per attempt: from, to, the largest error norm, how many samples accepted it."""
        lines = ["       from           to        error  accepted"]
        for trial in self.trials:
            share = f"{int(trial.accepted.sum())}/{len(trial.accepted)}"
            lines.append(
                f"{float(trial.start[0]):11.6g}  {float(trial.end[0]):11.6g}  {float(trial.error.max()):11.4g}  {share:>8}"
            )
        lines.append(
            f"NFE {int(self.nfe.min())} to {int(self.nfe.max())}, accepted {int(self.accepted.max())}, "
            f"rejected {int(self.rejected.max())}; {self.message}"
        )
        return "\n".join(lines)


def adaptive(
    denoiser: Denoiser | Callable[..., Any],
    x: Tensor | None = None,
    *,
    seeds: Sequence[int] | Tensor | None = None,
    schedule: NoiseSchedule | None = None,
    t_start: float | None = None,
    t_end: float | None = None,
    times: Grid | Sequence[float] | Tensor | None = None,
    method: str = "dopri5",
    rtol: float | None = None,
    atol: float | None = None,
    norm: Norm = "each",
    controller: PI | PID | None = None,
    h_init: float | None = None,
    max_nfe: int = 2000,
    denoise: bool = False,
    class_labels: Tensor | Sequence[int] | int | None = None,
    guidance_scale: float | Sequence[float] | Tensor | None = None,
    guidance: Guidance | None = None,
    cond: Mapping[str, Any] | None = None,
    uncond: Mapping[str, Any] | None = None,
) -> AdaptiveResult:
    """Solve the probability-flow ODE dx/dt = (sigma'/sigma) x + (alpha' - alpha sigma'/sigma) D (arXiv:2011.13456, eq. 13).

    Args:
        x: the state at ``t_start``, alpha x_0 + sigma n, [B, *sample] float32 or float64; or ``seeds`` for unit noise times
            sigma. Its frame and the time are those of ``schedule``, by default the denoiser's.
        t_start, t_end: from noise to data by default, forwards if ``t_start < t_end`` on the schedule's time (encoding).
            Where the schedule ends at sigma = 0 (a flow), the default end is t = 0.001 and a last denoise.
        times: fixed steps at these times (a :class:`Grid` gives its ``t``) instead of control; also with ``method="rk4"``.
        method: "dopri5" (order 5(4), 6 NFE per step), "bosh3" (3(2), 3 NFE), "heun_euler" (2(1), 2 NFE): error per step in
            the state at time t; "dpm_solver_12", "dpm_solver_23": arXiv:2206.00927, Appendix C, and k-diffusion's
            ``sample_dpm_adaptive``, steps in lam; "scipy": solve_ivp's RK45 on one flat float64 vector, the sampler of
            score-SDE; "torchdiffeq": its dopri5.
        rtol, atol: 1e-5 each, the published settings of score-SDE; 0.05 and 0.0078 for adaptive DPM-Solver.
        norm: "each": every sample has its own steps, and is the same alone and in any batch; "sample": one step size, for
            the sample with the largest error; "batch": one step size for the root mean square over the batch, which is
            what scipy and published code do. scipy and torchdiffeq are always "batch".
        controller: :class:`PI` or :class:`PID`; by default PI() for the pairs and k-diffusion's PID() for DPM-Solver.
        h_init: first step, in t or lam; by default Hairer's estimate (two evaluations), 0.05 for DPM-Solver.
        max_nfe: evaluations per sample at which to stop, with a warning and ``success=False``.
        denoise: one more evaluation; return D at the end instead of the state.

    Raises ``ValueError`` or ``TypeError`` naming the argument before anything is computed.
    """
    d = Denoiser.of(denoiser)
    chosen = schedule or d.schedule
    if not isinstance(chosen, NoiseSchedule):
        raise TypeError(f"schedule: must be a NoiseSchedule, got {type(chosen).__name__}")
    clock = Clock.of(chosen)
    fixed = None if times is None else fixed_times(times, method)
    first, last, lands = _span(chosen, t_start, t_end, fixed)
    rtol, atol = tolerances(method, rtol, atol)
    _check(method, norm, max_nfe, h_init, controller)
    x = start_state(d, x, seeds, float(chosen.sigma(first)))
    alphas = (1.0, 1.0)
    if clock.schedule is not chosen:  # the clock has alpha = 1 and its time is sigma/alpha
        alphas = float(chosen.alpha(first)), float(chosen.alpha(last))
        first, last = (float(chosen.rho(t)) for t in (first, last))
        fixed = None if fixed is None else [float(chosen.rho(t)) for t in fixed]
    evaluation = Evaluation.of(
        d,
        len(x),
        class_labels=class_labels,
        guidance_scale=guidance_scale,
        guidance=guidance,
        cond=cond,
        uncond=uncond,
        ndim=x.ndim,
    )
    field = field_of(evaluation)
    with torch.no_grad():
        run = solve(
            clock,
            field,
            x / alphas[0] if alphas[0] != 1 else x,
            first,
            last,
            method=method,
            rtol=rtol,
            atol=atol,
            norm=norm,
            controller=controller,
            h_init=h_init,
            max_nfe=max_nfe,
            times=fixed,
        )
        samples, nfe = run.samples, run.nfe
        if (denoise or lands) and run.success:
            alpha, sigma, _, _ = clock.levels(torch.tensor(last))
            samples, nfe = evaluation.at(samples, Level(float(alpha), float(sigma))), nfe + 1
        elif alphas[1] != 1:
            samples = samples * alphas[1]
    t = run.t if clock.schedule is chosen else chosen.time(run.t)
    return AdaptiveResult(samples, t, nfe, run.accepted, run.rejected, tuple(run.trials), run.success, run.message)


# -- arguments -----------------------------------------------------------------------------------------------------------


def fixed_times(times: Any, method: str) -> list[float]:
    if method not in FIXED:
        raise ValueError(f"method: fixed steps are made by {', '.join(FIXED)}, got {method!r}")
    values = times.t if isinstance(times, Grid) else times
    grid = torch.as_tensor(values, dtype=torch.float64).detach()
    if grid.ndim != 1 or len(grid) < 2 or not bool(torch.isfinite(grid).all()):
        raise ValueError(f"times: must be at least two finite numbers, got shape {list(grid.shape)}")
    steps = grid[1:] - grid[:-1]
    if not (bool((steps > 0).all()) or bool((steps < 0).all())):
        raise ValueError("times: must increase or decrease strictly")
    return [float(v) for v in grid]


def _span(
    schedule: NoiseSchedule, t_start: float | None, t_end: float | None, times: list[float] | None
) -> tuple[float, float, bool]:
    """(first, last, whether a denoise at the end takes the place of sigma = 0)."""
    lands = False
    if times is not None:
        if t_start is not None or t_end is not None:
            raise ValueError("times: brings its own ends; leave t_start and t_end out")
        first, last = times[0], times[-1]
    else:
        first = schedule.t_start if t_start is None else float(t_start)
        last = schedule.t_end if t_end is None else float(t_end)
        if t_end is None and float(schedule.sigma(last)) == 0:
            last, lands = 1e-3, True
    for name, value in (("t_start", first), ("t_end", last)):
        if not math.isfinite(value):
            raise ValueError(f"{name}: must be finite, got {value}")
        sigma, alpha = float(schedule.sigma(value)), float(schedule.alpha(value))
        if not (math.isfinite(sigma) and math.isfinite(alpha) and sigma > 0 and alpha >= 0):
            raise ValueError(
                f"{name}: the flow needs 0 < sigma < inf, but {type(schedule).__name__} has sigma {sigma:g} at t = {value:g}"
            )
    if first == last:
        raise ValueError(f"t_start, t_end: must differ, got {first:g} twice")
    return first, last, lands


def tolerances(method: str, rtol: float | None, atol: float | None) -> tuple[float, float]:
    dpm = method.startswith("dpm")
    rtol = (0.05 if dpm else 1e-5) if rtol is None else rtol
    atol = (0.0078 if dpm else 1e-5) if atol is None else atol
    if not (math.isfinite(rtol) and rtol >= 0):
        raise ValueError(f"rtol: must be a finite number of at least 0, got {rtol}")
    if not (math.isfinite(atol) and atol >= 0):
        raise ValueError(f"atol: must be a finite number of at least 0, got {atol}")
    if rtol == 0 and atol == 0:
        raise ValueError("rtol, atol: one of them must be positive")
    return rtol, atol


def _check(method: str, norm: str, max_nfe: int, h_init: float | None, controller: Any) -> None:
    if method not in METHODS and method != "rk4":
        raise ValueError(f"method: must be one of {', '.join(METHODS)}, got {method!r}")
    if norm not in ("each", "sample", "batch"):
        raise ValueError(f"norm: must be 'each', 'sample' or 'batch', got {norm!r}")
    if isinstance(max_nfe, bool) or not isinstance(max_nfe, int) or max_nfe < 1:
        raise ValueError(f"max_nfe: must be a whole number of at least 1, got {max_nfe!r}")
    if h_init is not None and not (math.isfinite(h_init) and h_init > 0):
        raise ValueError(f"h_init: must be positive, got {h_init}")
    if controller is not None and not isinstance(controller, (PI, PID)):
        raise TypeError(f"controller: must be a PI or a PID, got {type(controller).__name__}")
