"""Restart: any solver, walking back up to a higher noise level a few times on its way down."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from fastode.program import Form, Trace
from fastode.program.leg import level_at, walk
from fastode.schedules.grid import Grid, Level
from fastode.schedules.noise import Discrete, NoiseSchedule
from fastode.schedules.spacing import karras, leading
from fastode.solvers.coefficients import check_choice
from fastode.solvers.heun import churned
from fastode.solvers.solver import GridError, Solver
from fastode.solvers.spec import Spec, bound
from fastode.solvers.stochastic import check_s_noise, renoised

Interval = tuple[int, int, float, float]
"""(N_R, K, t_min, t_max): points of the way back down, rounds, and the two EDM-frame noise levels."""


@dataclass(frozen=True)
class Preset:
    """A published setting: what goes into :func:`restart`, and the ``steps`` of its main grid."""

    steps: int
    intervals: tuple[Interval, ...]
    base: str = "edm"
    gamma: float = 0.0
    s_noise: float = 1.0
    spacing: str = "karras"
    inner: str | None = None
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def grid(self, schedule: NoiseSchedule) -> Grid:
        """The main grid of the published figure on ``schedule``."""
        if self.spacing == "time":
            if not isinstance(schedule, Discrete):
                raise ValueError(f"schedule: this setting needs a table of labels, got {type(schedule).__name__}")
            return leading(schedule, self.steps, offset=1, final="sigma_min")
        return karras(schedule, self.steps, sigma_min=self.sigma_min, sigma_max=self.sigma_max, final="zero")


_TOP, _A, _B, _C, _D = (19.35, 40.79), (1.09, 1.92), (0.59, 1.09), (0.30, 0.59), (0.06, 0.30)


def _imagenet(steps: int, *rounds: tuple[int, int, tuple[float, float]]) -> Preset:
    return Preset(steps, tuple((n, k, *ends) for n, k, ends in rounds), gamma=0.05, s_noise=1.003)


def _dpm_solver_3(steps: int, top: float) -> Preset:
    base = "dpm_solver_3(lower_order_final=true)"
    return Preset(steps, ((3, 1, 0.06, top),), base, inner="dpm_solver_3", sigma_min=0.010486, sigma_max=152.167)


def _stable_diffusion(*intervals: Interval) -> Preset:
    return Preset(30, intervals, "ddim", spacing="time", inner="heun")


PRESETS: dict[str, Preset] = {
    "cifar10-vp-43": Preset(18, ((3, 2, 0.06, 0.30),)),
    "cifar10-vp-55": Preset(18, ((3, 5, 0.06, 0.30),)),
    "cifar10-vp-75": Preset(18, ((3, 10, 0.06, 0.30),)),
    "cifar10-vp-115": Preset(18, ((3, 20, 0.06, 0.30),)),
    "cifar10-vp-519": Preset(20, ((9, 30, 0.06, 0.20),)),
    "cifar10-vp-18": _dpm_solver_3(5, 1.0),
    "cifar10-vp-21": _dpm_solver_3(6, 1.0),
    "cifar10-vp-24": _dpm_solver_3(7, 1.0),
    "cifar10-vp-27": _dpm_solver_3(8, 0.3),
    "cifar10-edm-43": Preset(18, ((3, 2, 0.14, 0.30),)),
    "imagenet64-39": _imagenet(14, (3, 1, _TOP), (3, 1, _A), (3, 1, _D)),
    "imagenet64-67": _imagenet(18, (5, 1, _TOP), (5, 1, _A), (5, 1, _B), (5, 1, _D)),
    "imagenet64-99": _imagenet(18, (3, 1, _TOP), (4, 1, _A), (4, 4, _B), (4, 1, _C), (4, 4, _D)),
    "imagenet64-165": _imagenet(18, (3, 1, _TOP), (4, 1, _A), (4, 5, _B), (4, 5, _C), (4, 10, _D)),
    "imagenet64-203": _imagenet(36, (4, 1, _TOP), (4, 1, _A), (4, 5, _B), (4, 5, _C), (6, 6, _D)),
    "imagenet64-385": _imagenet(36, (3, 1, _TOP), (6, 1, _A), (6, 5, _B), (6, 5, _C), (6, 20, _D)),
    "imagenet64-535": _imagenet(36, (6, 1, _TOP), (6, 1, _A), (7, 6, _B), (7, 6, _C), (7, 25, _D)),
    "imagenet64-623": _imagenet(36, (10, 3, _TOP), (10, 3, _A), (7, 6, _B), (7, 6, _C), (7, 25, _D)),
    "sd15-w2": _stable_diffusion((5, 2, 1.0, 9.0), (5, 2, 5.0, 10.0)),
    "sd15-w3": _stable_diffusion((10, 2, 0.1, 3.0)),
    "sd15-w5": _stable_diffusion((10, 2, 0.1, 2.0)),
    "sd15-w8": _stable_diffusion((10, 2, 0.1, 2.0)),
}
"""The paper's settings (arXiv:2306.14878, tables 1 to 10), by data set, model, and NFE or guidance strength."""


def restart(
    base: Spec | None = None,
    *,
    preset: str | None = None,
    intervals: Iterable[Interval] | str = (),
    s_noise: float | None = None,
    gamma: float | None = None,
    inner: Spec | None = None,
    spacing: str | None = None,
    **options: Any,
) -> Solver:
    """A solver that does what ``base`` does, with Restart's rounds; ``options`` are those of ``base``.

        fastode.sample(model, seeds=range(8), solver=restart("edm", intervals=[(3, 2, 0.06, 0.30)]), nfe=43)
        fastode.sample(model, seeds=range(8), solver=restart(preset="imagenet64-39"), nfe=39)

    See :func:`with_restarts`, which is ``SOLVERS["restart"]``, for the method and its settings. Raises what it raises.
    """
    chosen: Spec = base if base is not None else _preset(preset).base
    if options:
        chosen = (chosen[0], {**chosen[1], **options}) if isinstance(chosen, tuple) else (chosen, options)
    solver, _ = bound("base", chosen)
    formula = partial(
        with_restarts,
        base=chosen,
        preset=preset,
        intervals=intervals if isinstance(intervals, str) else tuple(intervals),
        s_noise=s_noise,
        gamma=gamma,
        inner=inner,
        spacing=spacing,
    )
    if preset is None:
        return Solver("restart", formula, final=solver.final, grid=solver.grid)
    return Solver("restart", formula, final="sigma_min" if PRESETS[preset].spacing == "time" else "zero")


def with_restarts(
    p: Trace,
    *,
    base: Spec | None = None,
    preset: str | None = None,
    intervals: Sequence[Interval] | str = (),
    s_noise: float | None = None,
    gamma: float | None = None,
    s_tmin: float = 0.01,
    s_tmax: float = 1.0,
    inner: Spec | None = None,
    spacing: str | None = None,
) -> Form:
    """Restart (arXiv:2306.14878, Algorithm 2): ``base``, plus rounds of much noise at once and a solve back down.

    An interval (N_R, K, t_min, t_max): t_min is moved to the nearest positive level of the grid below the first. Each time
    the solver comes to that level, K times: noise is added up to t_max, in the EDM frame

        x <- x + s_noise sqrt(t_max^2 - t_min^2) z,

    and ``inner`` (by default ``base``) solves from t_max back to t_min over N_R levels, N_R - 1 steps: ``spacing`` "karras"
    (rho = 7), or "time" (whole labels on tabulated schedules; t_max is then moved to the nearest one). With Heun on a grid
    that ends at 0, NFE = 2 steps - 1 + sum_j K_j 2 (N_R,j - 1). ``intervals`` is a list, or text "3,2,0.06,0.3; 4,1,1,2".
    ``preset``: one of ``PRESETS``, whose values stand where none is given. Default base: "edm".

    ``gamma`` > 0: a step of a round that starts between ``s_tmin`` and ``s_tmax`` first raises its level by (1 + gamma), as
    EDM's churn; the paper does so on ImageNet (0.05). Without it, the last round goes on into the rest of the run, so that
    a multistep base starts anew at the top of every round and nowhere else. K = 0, or a t_max equal to the level at t_min,
    is ``base`` itself. The rounds belong to the step that ends at t_min's level: the state there is that of after the last
    round, and evaluations in a round count as part of that step.

    Raises ``ValueError`` for intervals that are malformed, outside the grid, empty on it, or at the same level.
    """
    chosen = _preset(preset)
    main = bound("base", base if base is not None else chosen.base)[1]
    back = inner if inner is not None else chosen.inner
    solve_back = None if back is None else bound("inner", back)[1]
    spacing = chosen.spacing if spacing is None else spacing
    check_choice("spacing", spacing, ("karras", "time"))
    gamma = chosen.gamma if gamma is None else gamma
    if not 0 <= gamma < 1:
        raise ValueError(f"gamma: must be in [0, 1), got {gamma}")
    s_noise = chosen.s_noise if s_noise is None else s_noise
    spots = _spots(p.grid, _intervals(intervals) or chosen.intervals, spacing)
    check_s_noise(p, s_noise, used=bool(spots))
    rounds = _Rounds(p, solve_back or main, s_noise, gamma, s_tmin, s_tmax)
    x, levels = p.start(), list(p.grid)
    if not spots:
        return main(p)
    ahead = levels
    for spot in spots:
        i, after = spot.index, levels[spot.index + 1 :]
        here = next(k for k, level in enumerate(ahead) if level.index == i)
        x = walk(p, main, x, [*ahead[:here], _nowhere(levels[i]), *after], stop=here)
        joined = not gamma and solve_back is None
        for k in range(spot.rounds):
            last = k == spot.rounds - 1
            x = rounds.up(x, levels[i], spot.down[0])
            ahead = [*spot.down, levels[i] if last else _nowhere(levels[i]), *after]
            if not (last and joined):
                x = rounds.down(x, ahead, len(spot.down))
        if not joined:
            ahead = levels[i:]
    return walk(p, main, x, ahead) if len(ahead) > 1 else x


@dataclass(frozen=True, eq=False)
class _Spot:
    """The grid level ``index`` where rounds are made, and the levels of a round from t_max to just above it."""

    index: int
    rounds: int
    down: list[Level] = field(repr=False)


@dataclass(frozen=True, eq=False)
class _Rounds:
    """The two halves of a round."""

    p: Trace
    formula: Callable[[Trace], Form]
    s_noise: float
    gamma: float
    s_tmin: float
    s_tmax: float

    def up(self, x: Form, s: Level, t: Level) -> Form:
        """Noise from level s to the noisier level t."""
        gain = t.alpha / s.alpha
        fresh = (t.sigma**2 - (gain * s.sigma) ** 2) ** 0.5
        return self.p.keep(renoised(self.p, gain * x, fresh, self.s_noise))

    def down(self, x: Form, levels: list[Level], stop: int) -> Form:
        """Solve from ``levels[0]`` to ``levels[stop]``; with churn, every step is a run of its own."""
        if not self.gamma:
            return walk(self.p, self.formula, x, levels, stop=stop)
        for k in range(stop):
            s = levels[k]
            if self.s_tmin <= s.rho <= self.s_tmax:
                x, s = churned(self.p, x, s, self.gamma, self.s_noise)
            x = walk(self.p, self.formula, x, [s, *levels[k + 1 :]], stop=1)
        return x


def _spots(grid: Grid, intervals: Sequence[Interval], spacing: str) -> list[_Spot]:
    """The intervals placed on ``grid``, in the order in which they fire."""
    sigmas = [float(s) for s in grid.sigmas.detach()]
    positive = [i for i, s in enumerate(sigmas) if i and s > 0]
    spots: dict[int, _Spot] = {}
    for interval in intervals:
        points, rounds, t_min, t_max = interval
        if not positive or not sigmas[positive[-1]] <= t_min * (1 + 1e-9) or not t_max <= sigmas[0] * (1 + 1e-9):
            raise GridError(
                f"intervals: [t_min, t_max] must lie in the grid, between {sigmas[positive[-1]] if positive else 0:.6g} "
                f"and {sigmas[0]:.6g}, got [{t_min:g}, {t_max:g}]"
            )
        i = min(positive, key=lambda k: abs(sigmas[k] - t_min))
        top = _label(grid, t_max)[1] if spacing == "time" else t_max
        if rounds == 0 or abs(top - sigmas[i]) <= 1e-12 * sigmas[i]:
            continue
        if top < sigmas[i]:
            raise GridError(
                f"intervals: t_min = {t_min:g} falls on the level {sigmas[i]:.6g} of this grid, which is not below "
                f"t_max = {t_max:g}"
            )
        if i in spots:
            raise GridError(
                f"intervals: two of them fall on the same level {sigmas[i]:.6g} of this grid, got {interval}"
            )
        spots[i] = _Spot(i, rounds, _down(grid, i, top, points, spacing))
    return [spots[i] for i in sorted(spots)]


def _down(grid: Grid, index: int, top: float, points: int, spacing: str) -> list[Level]:
    """Levels from ``top`` to just above level ``index``."""
    if spacing == "time":
        schedule = grid.schedule
        assert schedule is not None
        times = torch.linspace(_label(grid, top)[0], float(grid.t[index]), points, dtype=torch.float64)
        times = times.round() if isinstance(schedule, Discrete) else times
        return [Level(float(schedule.alpha(t)), float(schedule.sigma(t)), float(t)) for t in times[:-1]]
    low, high = float(grid.sigmas[index].detach()) ** (1 / 7), top ** (1 / 7)
    sigmas = [top, *((high + j / (points - 1) * (low - high)) ** 7 for j in range(1, points - 1))]
    first = float(grid.sigmas[0].detach())
    return [level_at(grid, min(s, first)) for s in sigmas]


def _label(grid: Grid, rho: float) -> tuple[float, float]:
    """The time nearest to noise ``rho``, a whole label on tabulated schedules, and the noise there."""
    if grid.schedule is None:
        raise ValueError("spacing: 'time' needs a grid with a schedule, got one without")
    t = grid.schedule.time(rho)
    if isinstance(grid.schedule, Discrete):
        t = min((t.floor(), t.ceil()), key=lambda label: abs(float(grid.schedule.rho(label)) - rho))  # type: ignore[union-attr]
    return float(t), float(grid.schedule.rho(t))


def _nowhere(level: Level) -> Level:
    """``level`` as one whose state is not that of the grid: there are rounds still to come."""
    return replace(level, index=None)


def _preset(name: str | None) -> Preset:
    if name is None:
        return Preset(0, ())
    if name not in PRESETS:
        raise ValueError(f"preset: must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]


def _intervals(given: Sequence[Interval] | str) -> tuple[Interval, ...]:
    """``intervals`` as numbers, each checked by itself."""
    rows: list[Any] = list(given)
    if isinstance(given, str):
        rows = [row.split(",") for row in given.split(";") if row.strip()]
    made = []
    for row in rows:
        try:
            points, rounds, t_min, t_max = row
            numbers = int(points), int(rounds), float(t_min), float(t_max)
        except (TypeError, ValueError):
            raise ValueError(f"intervals: must be (N_R, K, t_min, t_max) each, got {row!r}") from None
        if numbers[:2] != (float(points), float(rounds)) or numbers[0] < 2 or numbers[1] < 0:
            raise ValueError(f"intervals: N_R must be a whole number of at least 2 and K of at least 0, got {row!r}")
        if not 0 < numbers[2] <= numbers[3]:
            raise ValueError(f"intervals: need 0 < t_min <= t_max, got {row!r}")
        made.append(numbers)
    return tuple(made)
