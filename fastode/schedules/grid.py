"""The time grid a solver is compiled for: a decreasing sequence of noise levels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastode.schedules.noise import NoiseSchedule

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


@dataclass(frozen=True, eq=False)
class Level:
    """One time point: a state there is ``alpha x_0 + sigma n``.

    The numbers are Python floats, or float64 tensors where a grid is learned or a level is known only during the run.
    ``index`` is the position in the grid; inner levels of single-step methods have ``None``.
    """

    alpha: Any
    sigma: Any
    t: Any = None
    index: int | None = None

    @property
    def rho(self) -> Any:
        """sigma / alpha, the noise level in the EDM frame (infinite at alpha = 0)."""
        if isinstance(self.alpha, float) and self.alpha == 0:
            return math.inf
        return self.sigma / self.alpha

    @property
    def lam(self) -> Any:
        """Half log-SNR ln(alpha / sigma): -inf at alpha = 0, +inf at sigma = 0."""
        from fastode.scalar import log

        return -log(self.rho)

    @property
    def is_data(self) -> bool:
        """True at sigma = 0, where the state is the image itself."""
        return isinstance(self.sigma, float) and self.sigma == 0

    @property
    def is_noise(self) -> bool:
        """True at alpha = 0, where the state carries no signal (the start of a flow)."""
        return isinstance(self.alpha, float) and self.alpha == 0


@dataclass(frozen=True, eq=False)
class Grid:
    """Levels ``(alpha_i, sigma_i)``, i = 0 .. n, with strictly decreasing ``sigma / alpha``; the solver makes n steps.

    ``sigma``, ``alpha``: one number or n + 1 numbers; kept in float64, and differentiable when they require a gradient.
    ``t``: time of each level; by default ``schedule.time``, or the EDM-frame sigma itself where there is no schedule.
    The last level may be 0, the first may have ``alpha = 0``. Nothing is ever appended.

    Raises ``ValueError`` for fewer than two levels, levels that are negative or not finite, or not decreasing.
    """

    sigma: Tensor
    alpha: Tensor = field(default=1.0)  # type: ignore[assignment]
    t: Tensor = field(default=None)  # type: ignore[assignment]
    schedule: NoiseSchedule | None = None
    name: str = "explicit"

    def __init__(
        self,
        sigma: ArrayLike | Tensor | Sequence[float],
        alpha: ArrayLike | Tensor | Sequence[float] | float = 1.0,
        t: ArrayLike | Tensor | Sequence[float] | None = None,
        schedule: NoiseSchedule | None = None,
        name: str = "explicit",
    ) -> None:
        levels = _levels("sigma", sigma)
        if levels.ndim != 1 or len(levels) < 2:
            raise ValueError(
                f"sigma: a grid needs at least two levels in one dimension, got shape {tuple(levels.shape)}"
            )
        scale = _levels("alpha", alpha)
        if scale.ndim == 0:
            scale = scale.expand(len(levels))
        if scale.shape != levels.shape:
            raise ValueError(
                f"alpha: must be one number or {len(levels)} numbers like sigma, got shape {tuple(scale.shape)}"
            )
        for label, values in (("sigma", levels), ("alpha", scale)):
            if not bool(torch.isfinite(values).all()):
                raise ValueError(
                    f"{label}: every level must be finite, got {_first_bad(values, ~torch.isfinite(values))}"
                )
            if bool((values < 0).any()):
                raise ValueError(f"{label}: levels cannot be negative, got {_first_bad(values, values < 0)}")
        if bool(((levels == 0) & (scale == 0)).any()):
            raise ValueError("sigma, alpha: a level with sigma = 0 and alpha = 0 is empty")
        # Compare sigma_i alpha_j rather than ratios, so that a first level with alpha = 0 (rho = inf) is in order.
        falling = levels[1:] * scale[:-1] < levels[:-1] * scale[1:]
        if not bool(falling.all()):
            i = int((~falling).nonzero()[0])
            raise ValueError(
                f"sigma: levels must decrease strictly (sigma/alpha, from noise to data), but level {i} is "
                f"{float(levels[i]):.6g} and level {i + 1} is {float(levels[i + 1]):.6g}"
            )
        if t is not None:
            time = _levels("t", t)
            if time.shape != levels.shape:
                raise ValueError(f"t: must have {len(levels)} entries like sigma, got shape {tuple(time.shape)}")
        elif schedule is not None:
            time = schedule.time(_ratio(levels, scale))
        else:
            time = _ratio(levels, scale)
        for key, value in (("sigma", levels), ("alpha", scale), ("t", time), ("schedule", schedule), ("name", name)):
            object.__setattr__(self, key, value)

    @classmethod
    def of(cls, grid: Grid | ArrayLike | Tensor | Sequence[float]) -> Grid:
        """``grid`` itself, or the grid of a sequence of EDM-frame sigmas, taken as given."""
        if isinstance(grid, Grid):
            return grid
        if isinstance(grid, (str, bytes)) or not (hasattr(grid, "__len__") or hasattr(grid, "__array__")):
            raise TypeError(f"grid: must be a Grid or a sequence of EDM-frame sigmas, got {type(grid).__name__}")
        return cls(grid)

    @property
    def sigmas(self) -> Tensor:
        """Levels in the EDM frame, sigma / alpha: float64 [n + 1]."""
        return _ratio(self.sigma, self.alpha)

    @property
    def steps(self) -> int:
        """Number of steps n, one less than levels."""
        return len(self.sigma) - 1

    def __len__(self) -> int:
        return len(self.sigma)

    def __getitem__(self, index: int) -> Level:
        i = range(len(self))[index]
        alpha, sigma, t = self.alpha[i], self.sigma[i], self.t[i]
        # Pure noise and data are fixed, also on a learned grid: solvers take other formulas there, by exact zeros.
        if (alpha.requires_grad or sigma.requires_grad) and bool(alpha != 0) and bool(sigma != 0):
            return Level(alpha, sigma, t, i)
        return Level(float(alpha.detach()), float(sigma.detach()), float(t.detach()), i)

    def __iter__(self) -> Iterator[Level]:
        return (self[i] for i in range(len(self)))

    def windows(self) -> Iterator[tuple[Level | None, Level, Level]]:
        """(previous, current, next) levels of every step; previous is None on the first."""
        levels = list(self)
        for i in range(self.steps):
            yield (levels[i - 1] if i else None), levels[i], levels[i + 1]

    def frame(self, alpha: ArrayLike | Tensor | float) -> Grid:
        """The same EDM-frame levels with another signal scale (for instance ``alpha = 1``: the VE view of a VP grid)."""
        scale = _levels("alpha", alpha).expand(len(self))
        return replace_grid(self, sigma=self.sigmas * scale, alpha=scale)

    def between(self, s: Level, t: Level, r: Any) -> Level:
        """The inner level at lam = lam_s + r (lam_t - lam_s), i.e. rho = rho_t^r rho_s^(1-r); ``r`` may be late.

        On a schedule its signal scale is the schedule's. Elsewhere it is interpolated geometrically; any choice gives the
        same sample, since the denoiser is always told sigma / alpha.
        """
        from fastode.scalar import exp

        lam = s.lam + r * (t.lam - s.lam)
        return self.at_rho(exp(-lam), s, t, r)

    def at_rho(self, rho: Any, s: Level, t: Level, r: Any) -> Level:
        """The inner level at noise ``rho`` between ``s`` and ``t``; ``r`` places its signal scale off a schedule."""
        if isinstance(rho, (float, Tensor)) and self.schedule is not None:
            time = self.schedule.time(rho)
            alpha: Any = self.schedule.alpha(time)
            alpha = alpha if isinstance(rho, Tensor) else float(alpha)
            return Level(alpha, alpha * rho, float(time.detach()))
        if isinstance(s.alpha, float) and s.alpha == t.alpha:
            alpha = s.alpha
        else:
            alpha = s.alpha ** (1 - r) * t.alpha**r
        return Level(alpha, alpha * rho, None)

    def at_time(self, s: Level, t: Level, share: float) -> Level:
        """The inner level at time ``t_s + share (t_t - t_s)``; without a schedule, time is the EDM-frame sigma."""
        time = s.t + share * (t.t - s.t)
        if self.schedule is not None:
            alpha, sigma = self.schedule.alpha(time), self.schedule.sigma(time)
            learned = isinstance(time, Tensor) and time.requires_grad
            return Level(alpha, sigma, time) if learned else Level(float(alpha), float(sigma), time)
        rho = s.rho + share * (t.rho - s.rho)
        alpha = s.alpha + share * (t.alpha - s.alpha)
        return Level(alpha, alpha * rho, time)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "sigma": self.sigma.tolist(),
            "alpha": self.alpha.tolist(),
            "t": self.t.tolist(),
        }

    def __repr__(self) -> str:
        values = ", ".join(f"{v:.5g}" for v in self.sigmas.tolist())
        return f"Grid({self.name}: {values})"


def replace_grid(grid: Grid, **changes: Any) -> Grid:
    values = {"sigma": grid.sigma, "alpha": grid.alpha, "t": grid.t, "schedule": None, "name": grid.name} | changes
    return Grid(**values)


def _levels(name: str, values: Any) -> Tensor:
    try:
        return torch.as_tensor(values, dtype=torch.float64) if not isinstance(values, Tensor) else values.double().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: must be a sequence of numbers, got {type(values).__name__}") from error


def _ratio(sigma: Tensor, alpha: Tensor) -> Tensor:
    """sigma / alpha, infinite where alpha = 0, and without a gradient there."""
    noise = alpha == 0
    return torch.where(noise, math.inf, sigma / torch.where(noise, 1.0, alpha))


def _first_bad(values: Tensor, bad: Tensor) -> str:
    i = int(bad.nonzero()[0]) if bad.ndim else 0
    return f"{float(values.flatten()[i])} at level {i}"
