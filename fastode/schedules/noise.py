"""Noise schedules: how signal scale ``alpha`` and noise level ``sigma`` of ``x_t = alpha x_0 + sigma n`` depend on time.

Every schedule works in float64, on floats and on tensors, and is differentiable. ``rho = sigma / alpha`` is the noise
level in the EDM frame, where the signal has scale 1; it orders all schedules the same way and is what they are inverted by.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

Number = float | Tensor


def _tensor(value: Number) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


class NoiseSchedule(ABC):
    """Base of all schedules. Times run from ``t_start`` (noise) to ``t_end`` (data)."""

    @property
    @abstractmethod
    def t_start(self) -> float: ...

    @property
    @abstractmethod
    def t_end(self) -> float: ...

    @abstractmethod
    def alpha(self, t: Number) -> Tensor: ...

    @abstractmethod
    def sigma(self, t: Number) -> Tensor: ...

    @abstractmethod
    def time(self, rho: Number) -> Tensor:
        """The time at which sigma / alpha is ``rho``; inverse of :meth:`rho`."""

    def rho(self, t: Number) -> Tensor:
        """sigma / alpha, the noise level in the EDM frame; infinite where alpha = 0."""
        return self.sigma(t) / self.alpha(t)

    def lam(self, t: Number) -> Tensor:
        """Half log signal-to-noise ratio ln(alpha / sigma)."""
        return -torch.log(self.rho(t))

    def label(self, t: Number) -> Tensor:
        """What a network trained on this schedule is told about time ``t``."""
        return _tensor(t)

    @property
    def sigma_max(self) -> float:
        """Largest noise level in the EDM frame; infinite for schedules that reach alpha = 0."""
        return float(self.rho(self.t_start))

    @property
    def sigma_min(self) -> float:
        return float(self.rho(self.t_end))


@dataclass(frozen=True)
class EDM(NoiseSchedule):
    """alpha = 1, sigma = t (Karras et al. 2022, arXiv:2206.00364). The network is told ln(sigma)/4."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        _check_range("sigma_min", self.sigma_min, "sigma_max", self.sigma_max)

    @property
    def t_start(self) -> float:
        return self.sigma_max

    @property
    def t_end(self) -> float:
        return self.sigma_min

    def alpha(self, t: Number) -> Tensor:
        return torch.ones_like(_tensor(t))

    def sigma(self, t: Number) -> Tensor:
        return _tensor(t)

    def time(self, rho: Number) -> Tensor:
        return _tensor(rho)

    def label(self, t: Number) -> Tensor:
        return torch.log(_tensor(t)) / 4


@dataclass(frozen=True)
class VE(NoiseSchedule):
    """alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t, t in [0, 1] (arXiv:2011.13456).

    The network is told ``told``: "sigma"; "log_half_sigma", ln(sigma/2), as EDM's networks are (arXiv:2206.00364, Table 1);
    or "index", the position (1 - t)(steps - 1) in a table of ``steps`` levels that begins at ``sigma_max``.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    told: Literal["sigma", "log_half_sigma", "index"] = "sigma"
    steps: int = 1000

    def __post_init__(self) -> None:
        _check_range("sigma_min", self.sigma_min, "sigma_max", self.sigma_max)
        if self.told not in ("sigma", "log_half_sigma", "index"):
            raise ValueError(f"told: must be sigma, log_half_sigma or index, got {self.told!r}")

    @property
    def t_start(self) -> float:
        return 1.0

    @property
    def t_end(self) -> float:
        return 0.0

    def alpha(self, t: Number) -> Tensor:
        return torch.ones_like(_tensor(t))

    def sigma(self, t: Number) -> Tensor:
        return self.sigma_min * torch.exp(_tensor(t) * math.log(self.sigma_max / self.sigma_min))

    def time(self, rho: Number) -> Tensor:
        return torch.log(_tensor(rho) / self.sigma_min) / math.log(self.sigma_max / self.sigma_min)

    def label(self, t: Number) -> Tensor:
        if self.told == "index":
            return (1 - _tensor(t)) * (self.steps - 1)
        return self.sigma(t) if self.told == "sigma" else torch.log(self.sigma(t) / 2)


@dataclass(frozen=True)
class VPLinear(NoiseSchedule):
    """Variance preserving, beta(t) = beta_min + t (beta_max - beta_min), t in [t_min, 1] (arXiv:2011.13456).

    alpha = exp(-t^2 (beta_max - beta_min)/4 - t beta_min/2), sigma^2 = 1 - alpha^2. The network is told
    ``label_scale * t`` (999 t in score-SDE).
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-3
    label_scale: float = 999.0

    def __post_init__(self) -> None:
        if not 0 < self.t_min < 1:
            raise ValueError(f"t_min: must be in (0, 1), got {self.t_min}")
        if not self.beta_max > max(self.beta_min, 0):
            raise ValueError(f"beta_max: must exceed beta_min = {self.beta_min} and 0, got {self.beta_max}")

    @classmethod
    def fitted(cls, sigma_min: float = 0.002, sigma_max: float = 80.0, t_min: float = 1e-3) -> VPLinear:
        """The VP time in which an EDM range is [t_min, 1]: rho(1) = sigma_max, rho(t_min) = sigma_min.

        This is the time used for "time uniform" grids and tAB-DEIS on EDM networks (diff-sampler, EDM's ``vp_sigma``).
        ``beta_min`` comes out slightly negative for 0.002 .. 80, harmless on [t_min, 1].
        """
        _check_range("sigma_min", sigma_min, "sigma_max", sigma_max)
        beta_d = 2 * (math.log1p(sigma_min**2) / t_min - math.log1p(sigma_max**2)) / (t_min - 1)
        beta_min = math.log1p(sigma_max**2) - beta_d / 2
        return cls(beta_min=beta_min, beta_max=beta_min + beta_d, t_min=t_min)

    @property
    def t_start(self) -> float:
        return 1.0

    @property
    def t_end(self) -> float:
        return self.t_min

    def _exponent(self, t: Number) -> Tensor:
        """int_0^t beta = -2 ln alpha."""
        t = _tensor(t)
        return t * t * (self.beta_max - self.beta_min) / 2 + t * self.beta_min

    def alpha(self, t: Number) -> Tensor:
        return torch.exp(-self._exponent(t) / 2)

    def sigma(self, t: Number) -> Tensor:
        return torch.sqrt(-torch.expm1(-self._exponent(t)))

    def rho(self, t: Number) -> Tensor:
        return torch.sqrt(torch.expm1(self._exponent(t)))

    def time(self, rho: Number) -> Tensor:
        # Root of the quadratic in the form without cancellation: q = int beta = ln(1 + rho^2).
        q = torch.log1p(_tensor(rho) ** 2)
        slope = self.beta_max - self.beta_min
        root = torch.sqrt(self.beta_min**2 + 2 * slope * q)
        return 2 * q / (root + self.beta_min) if self.beta_min >= 0 else (root - self.beta_min) / slope

    def label(self, t: Number) -> Tensor:
        return _tensor(t) * self.label_scale


@dataclass(frozen=True)
class SubVP(VPLinear):
    """Sub-VP: alpha as in :class:`VPLinear`, sigma = 1 - alpha^2 (arXiv:2011.13456, equation 29)."""

    def sigma(self, t: Number) -> Tensor:
        return -torch.expm1(-self._exponent(t))

    def rho(self, t: Number) -> Tensor:
        return 2 * torch.sinh(self._exponent(t) / 2)

    def time(self, rho: Number) -> Tensor:
        # rho = 1/alpha - alpha, so ln(1/alpha) = asinh(rho/2), and VP's rho is sqrt(alpha^-2 - 1).
        return super().time(torch.sqrt(torch.expm1(2 * torch.asinh(_tensor(rho) / 2))))


@dataclass(frozen=True)
class Cosine(NoiseSchedule):
    """alpha = cos(pi/2 (t + s)/(1 + s)) / cos(pi/2 s/(1 + s)), variance preserving (Nichol & Dhariwal, arXiv:2102.09672).

    Times from ``t_max`` (0.9946 in DPM-Solver, where alpha is still positive) to ``t_min``.
    """

    s: float = 0.008
    t_max: float = 0.9946
    t_min: float = 1e-3
    label_scale: float = 999.0

    def __post_init__(self) -> None:
        if not 0 < self.t_min < self.t_max <= 1:
            raise ValueError(f"t_max, t_min: need 0 < t_min < t_max <= 1, got {self.t_min}, {self.t_max}")

    @property
    def t_start(self) -> float:
        return self.t_max

    @property
    def t_end(self) -> float:
        return self.t_min

    def _angle(self, t: Number) -> Tensor:
        return math.pi / 2 * (_tensor(t) + self.s) / (1 + self.s)

    @property
    def _norm(self) -> float:
        return math.cos(math.pi / 2 * self.s / (1 + self.s))

    def alpha(self, t: Number) -> Tensor:
        return torch.cos(self._angle(t)) / self._norm

    def sigma(self, t: Number) -> Tensor:
        # 1 - alpha^2 without cancellation: (cos^2 a0 - cos^2 a) / cos^2 a0 = sin(a - a0) sin(a + a0) / cos^2 a0.
        a, a0 = self._angle(t), math.pi / 2 * self.s / (1 + self.s)
        return torch.sqrt(torch.sin(a - a0) * torch.sin(a + a0)) / self._norm

    def time(self, rho: Number) -> Tensor:
        alpha = torch.rsqrt(1 + _tensor(rho) ** 2)
        return torch.acos(alpha * self._norm) * 2 / math.pi * (1 + self.s) - self.s

    def label(self, t: Number) -> Tensor:
        return _tensor(t) * self.label_scale


@dataclass(frozen=True, eq=False)
class Discrete(NoiseSchedule):
    """A DDPM table of T levels (arXiv:2006.11239), made continuous between its entries; times are labels 0 .. T-1.

    ``alphas_bar[k]`` is the cumulative product at label k: alpha^2 = alphas_bar, sigma^2 = 1 - alphas_bar. Between labels
    ln rho is linear (``interpolation="log_sigma"``, as in k-diffusion), rho is linear (``"sigma"``, diffusers) or ln alpha
    is linear (``"log_alpha"``, DPM-Solver). The network is told the label, fractional where need be; with ``rounded`` that
    of the entry whose rho is nearest, as EDM does with improved DDPM's networks.
    """

    alphas_bar: tuple[float, ...]
    interpolation: Literal["log_sigma", "sigma", "log_alpha"] = "log_sigma"
    rounded: bool = False
    _table: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        bar = torch.tensor(self.alphas_bar, dtype=torch.float64)
        if len(bar) < 2 or bool((bar[1:] >= bar[:-1]).any()) or not (bar[0] < 1 and bar[-1] >= 0):
            raise ValueError("alphas_bar: must be at least two decreasing numbers in [0, 1)")
        if self.interpolation not in ("log_sigma", "sigma", "log_alpha"):
            raise ValueError(f"interpolation: log_sigma, sigma or log_alpha, got {self.interpolation!r}")
        object.__setattr__(self, "_table", bar)

    @classmethod
    def from_betas(cls, betas: Tensor | list[float], *, zero_terminal_snr: bool = False, **kwargs: str) -> Discrete:
        """From the betas of the forward process; ``zero_terminal_snr`` rescales them (arXiv:2305.08891, Algorithm 1)."""
        bar = torch.cumprod(1 - torch.as_tensor(betas, dtype=torch.float64), 0)
        if zero_terminal_snr:
            root = bar.sqrt()
            first, last = root[0].clone(), root[-1].clone()
            bar = ((root - last) * first / (first - last)) ** 2
        return cls(tuple(bar.tolist()), **kwargs)  # type: ignore[arg-type]

    @classmethod
    def linear(cls, beta_start: float = 1e-4, beta_end: float = 0.02, steps: int = 1000, **kwargs: object) -> Discrete:
        """DDPM's betas: linear from 1e-4 to 0.02."""
        return cls.from_betas(torch.linspace(beta_start, beta_end, steps, dtype=torch.float64), **kwargs)  # type: ignore[arg-type]

    @classmethod
    def scaled_linear(
        cls, beta_start: float = 0.00085, beta_end: float = 0.012, steps: int = 1000, **kwargs: object
    ) -> Discrete:
        """Stable Diffusion's betas: linear in the square root."""
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64) ** 2
        return cls.from_betas(betas, **kwargs)  # type: ignore[arg-type]

    @classmethod
    def squared_cosine(cls, steps: int = 1000, max_beta: float = 0.999, **kwargs: object) -> Discrete:
        """``squaredcos_cap_v2`` of improved DDPM (arXiv:2102.09672)."""
        t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        bar = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        return cls.from_betas((1 - bar[1:] / bar[:-1]).clamp(max=max_beta), **kwargs)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.alphas_bar)

    def label(self, t: Number) -> Tensor:
        t = _tensor(t)
        if not self.rounded:
            return t
        low = t.detach().floor().clamp(0, len(self) - 2)
        nearer = self.rho(low + 1) - self.rho(t) < self.rho(t) - self.rho(low)
        return low + nearer.to(low)

    @property
    def t_start(self) -> float:
        return float(len(self) - 1)

    @property
    def t_end(self) -> float:
        return 0.0

    @cached_property
    def _knots(self) -> Tensor:
        """The interpolated quantity at the labels; increasing. A zero-SNR last entry is held apart (see ``rho``)."""
        rho = torch.sqrt((1 - self._table) / self._table)
        return {"log_sigma": torch.log, "sigma": lambda r: r, "log_alpha": lambda r: torch.log1p(r * r) / 2}[
            self.interpolation
        ](rho)

    def rho(self, t: Number) -> Tensor:
        t = _tensor(t)
        knots, last = self._knots, len(self) - 1
        k = t.detach().floor().clamp(0, last - 1).long()
        w = t - k
        low, high = knots[k], knots[k + 1]
        value = torch.where(w == 0, low, torch.where(w == 1, high, low + w * (high - low)))
        if self.interpolation == "log_sigma":
            return value.exp()
        return value if self.interpolation == "sigma" else torch.sqrt(torch.expm1(2 * value))

    def alpha(self, t: Number) -> Tensor:
        rho = self.rho(t)
        return torch.where(torch.isinf(rho), torch.zeros_like(rho), torch.rsqrt(1 + rho**2))

    def sigma(self, t: Number) -> Tensor:
        rho = self.rho(t)
        return torch.where(torch.isinf(rho), torch.ones_like(rho), rho * torch.rsqrt(1 + rho**2))

    def time(self, rho: Number) -> Tensor:
        rho = _tensor(rho)
        value = {"log_sigma": torch.log, "sigma": lambda r: r, "log_alpha": lambda r: torch.log1p(r * r) / 2}[
            self.interpolation
        ](rho)
        knots, last = self._knots, len(self) - 1
        k = (torch.searchsorted(knots, value.detach().contiguous(), right=True) - 1).clamp(0, last - 1)
        low, high = knots[k], knots[k + 1]
        inside = k + (value - low) / (high - low)
        at_end = torch.where(torch.isinf(value) & (value > 0), torch.full_like(inside, last), k.to(inside))
        return torch.where(torch.isinf(high) | torch.isinf(value), at_end, inside).clamp(0, last)


@dataclass(frozen=True)
class Flow(NoiseSchedule):
    """Rectified flow / flow matching: x_t = (1 - t) x_0 + t n, t from ``t_max`` = 1 (pure noise) to 0.

    ``shift`` moves uniformly spaced times towards the noise, t -> shift t / (1 + (shift - 1) t) (SD3, arXiv:2403.03206);
    grids apply it to their uniform times. The network is told ``label_scale * t`` (1000 t in SD3 and Flux).
    """

    shift: float = 1.0
    t_max: float = 1.0
    t_min: float = 0.0
    label_scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.shift > 0:
            raise ValueError(f"shift: must be positive, got {self.shift}")
        if not 0 <= self.t_min < self.t_max <= 1:
            raise ValueError(f"t_max, t_min: need 0 <= t_min < t_max <= 1, got {self.t_min}, {self.t_max}")

    @property
    def t_start(self) -> float:
        return self.t_max

    @property
    def t_end(self) -> float:
        return self.t_min

    def shifted(self, t: Number) -> Tensor:
        t = _tensor(t)
        return self.shift * t / (1 + (self.shift - 1) * t)

    def alpha(self, t: Number) -> Tensor:
        return 1 - _tensor(t)

    def sigma(self, t: Number) -> Tensor:
        return _tensor(t)

    def time(self, rho: Number) -> Tensor:
        rho = _tensor(rho)
        noise = torch.isinf(rho)
        finite = torch.where(
            noise, torch.zeros_like(rho), rho
        )  # both branches of where have gradients: none may be NaN
        return torch.where(noise, torch.ones_like(rho), finite / (1 + finite))

    def label(self, t: Number) -> Tensor:
        return _tensor(t) * self.label_scale


def _check_range(low_name: str, low: float, high_name: str, high: float) -> None:
    if not (math.isfinite(low) and math.isfinite(high) and 0 < low < high):
        raise ValueError(f"{low_name}, {high_name}: need 0 < {low_name} < {high_name} < inf, got {low} and {high}")


def schedule_to_dict(schedule: NoiseSchedule | None) -> dict[str, Any] | None:
    """A schedule as plain data for JSON; :func:`schedule_from_dict` makes an equal one of it."""
    if schedule is None:
        return None
    return {"kind": type(schedule).__name__, **{f.name: getattr(schedule, f.name) for f in fields(schedule) if f.init}}  # type: ignore[arg-type]


def schedule_from_dict(values: Mapping[str, Any] | None) -> NoiseSchedule | None:
    """Raises ``ValueError`` for a kind of schedule that is not known, or fields that it does not have."""
    if values is None:
        return None
    kinds: dict[str, Any] = {c.__name__: c for c in (EDM, VE, VPLinear, SubVP, Cosine, Discrete, Flow)}
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k != "kind"}
    try:
        schedule: NoiseSchedule = kinds[values["kind"]](**given)
        return schedule
    except (KeyError, TypeError) as error:
        raise ValueError(f"schedule: must be one of {', '.join(kinds)} with its fields, got {values}") from error
