"""Ways to place the levels of a grid on a noise schedule. Every function returns a :class:`Grid` in float64.

``steps`` is the number of steps the solver will make, so a grid has ``steps + 1`` levels. With ``final="zero"`` the last
level is sigma = 0 and the ``steps`` levels before it are placed as the named sources place them (k-diffusion, EDM).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy
import torch
from torch import Tensor

from fastode.schedules.grid import Grid
from fastode.schedules.noise import EDM, VE, Discrete, Flow, NoiseSchedule, VPLinear

Final = Literal["sigma_min", "zero"]

AYS_TABLES: dict[str, tuple[float, ...]] = {
    "sd15": (
        *(14.6146412293, 6.4745760956, 3.8636745985, 2.6946151520, 1.8841921177, 1.3943805092),
        *(0.9642583904, 0.6523686016, 0.3977456272, 0.1515232662, 0.0291671582),
    ),
    "sdxl": (
        *(14.6146412293, 6.3184485287, 3.7681790315, 2.1811480769, 1.3405244945, 0.8620721141),
        *(0.5550693289, 0.3798540708, 0.2332364134, 0.1114188177, 0.0291671582),
    ),
    "svd": (700.00, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}


def karras(
    schedule: NoiseSchedule,
    steps: int,
    *,
    rho: float = 7.0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    final: Final = "sigma_min",
) -> Grid:
    """sigma_i = (sigma_max^(1/rho) + a_i (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho (arXiv:2206.00364, equation 5)."""
    if not rho > 0:
        raise ValueError(f"rho: must be positive, got {rho}")
    low, high = _range(schedule, sigma_min, sigma_max)
    a = _unit(steps, final)
    sigmas = (high ** (1 / rho) + a * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return _on_schedule(schedule, _pin(sigmas, high, low), final, f"karras rho={rho:g}")


polynomial = karras


def log_snr(
    schedule: NoiseSchedule,
    steps: int,
    *,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    final: Final = "sigma_min",
) -> Grid:
    """Uniform in lam = ln(alpha/sigma): the grid of DPM-Solver, and k-diffusion's "exponential"."""
    low, high = _range(schedule, sigma_min, sigma_max)
    a = _unit(steps, final)
    sigmas = torch.exp(math.log(high) + a * (math.log(low) - math.log(high)))
    return _on_schedule(schedule, _pin(sigmas, high, low), final, "log_snr")


exponential = log_snr


def time_uniform(schedule: NoiseSchedule, steps: int, *, power: float = 1.0, final: Final = "sigma_min") -> Grid:
    """t_i^(1/power) uniform between the schedule's ends: power 1 is uniform time, 2 the quadratic grid of DEIS.

    On schedules whose time is the noise level itself (EDM, VE) the time is that of the variance preserving process with
    the same range, :meth:`VPLinear.fitted`, as in diff-sampler. A flow's ``shift`` is applied to the uniform times.
    """
    if not power > 0:
        raise ValueError(f"power: must be positive, got {power}")
    final = _end(schedule, final)
    a = _unit(steps, final)
    clock: NoiseSchedule = diffusion_time(schedule)
    first, last = clock.t_start, clock.t_end
    t = (first ** (1 / power) + a * (last ** (1 / power) - first ** (1 / power))) ** power
    if isinstance(schedule, Flow):
        t = schedule.shifted(t)
    t[0] = first if not isinstance(schedule, Flow) else float(schedule.shifted(first))
    name = f"time_uniform power={power:g}"
    if clock is schedule:
        return _from_times(schedule, t, final, name)
    return _on_schedule(schedule, clock.rho(t), final, name)


def quadratic(schedule: NoiseSchedule, steps: int, *, final: Final = "sigma_min") -> Grid:
    """Linear in sqrt(t), the grid of the published DEIS figures (arXiv:2204.13902)."""
    return time_uniform(schedule, steps, power=2.0, final=final)


def linspace(schedule: Discrete, steps: int, *, final: Final = "zero") -> Grid:
    """Labels round(linspace(0, T - 1, steps + 1)) from the top: "linspace" of diffusers' DPM-Solver, UniPC and DEIS.

    ``final="zero"`` ends at sigma = 0 in place of label 0.
    """
    table = _discrete(schedule)
    labels = _rounded(numpy.linspace(0, len(table) - 1, _check_steps(steps) + 1)).flip(0)
    return _from_labels(table, labels[:-1] if final == "zero" else labels, final, "linspace")


def leading(schedule: Discrete, steps: int, *, offset: int = 0, final: Final = "zero") -> Grid:
    """Labels i * (T // steps) + offset, i = steps-1 .. 0: "leading" of diffusers (``steps_offset``) and PNDM's grid.

    ``final="sigma_min"`` ends at label 0. Without an offset the labels are then i * (T // (steps + 1)), i = steps .. 0:
    that is "leading" of diffusers' DPM-Solver, UniPC and DEIS.
    """
    table = _discrete(schedule)
    extra = 1 if final == "sigma_min" and offset == 0 else 0
    stride = len(table) // (_check_steps(steps) + extra)
    labels = torch.arange(steps - 1 + extra, -1, -1, dtype=torch.float64) * stride + offset
    if not 0 <= float(labels[-1]) <= float(labels[0]) < len(table):
        span = f"{int(labels[0])} .. {int(labels[-1])}"
        raise ValueError(f"offset: labels of this table are 0 .. {len(table) - 1}, got {span} with offset {offset}")
    return _from_labels(table, labels if extra else _to_label_0(labels, final), final, "leading")


def trailing(schedule: Discrete, steps: int, *, final: Final = "zero") -> Grid:
    """Labels round(T - i T / steps) - 1, i = 0 .. steps-1, diffusers' "trailing"; then label 0 for ``final="sigma_min"``."""
    table = _discrete(schedule)
    labels = _rounded(numpy.arange(len(table), 0, -len(table) / _check_steps(steps))[:steps]) - 1
    return _from_labels(table, _to_label_0(labels, final), final, "trailing")


def beta(schedule: NoiseSchedule, steps: int, *, a: float = 0.6, b: float = 0.6, final: Final = "zero") -> Grid:
    """Quantiles of a Beta(a, b) distribution as times (arXiv:2407.12173): dense at both ends. Needs scipy."""
    try:
        from scipy.stats import beta as distribution
    except ImportError as error:
        raise ImportError("the beta grid needs scipy: pip install 'fastode[grids]'") from error
    final = _end(schedule, final)
    clock = diffusion_time(schedule)
    quantiles = torch.from_numpy(distribution.ppf(1 - _unit(steps, final).numpy(), a, b))
    t = clock.t_end + quantiles * (clock.t_start - clock.t_end)
    name = f"beta a={a:g} b={b:g}"
    return (
        _from_times(schedule, t, final, name)
        if clock is schedule
        else _on_schedule(schedule, clock.rho(t), final, name)
    )


def ays(schedule: NoiseSchedule, steps: int = 10, *, table: str = "sd15", final: Final = "sigma_min") -> Grid:
    """Align Your Steps (arXiv:2404.14507): the published 10-step table; log-linear interpolation for other step counts."""
    if table not in AYS_TABLES:
        raise ValueError(f"table: published AYS tables are {sorted(AYS_TABLES)}, got {table!r}")
    logs = torch.log(torch.tensor(AYS_TABLES[table], dtype=torch.float64))
    # diffusers and the paper's page replace the last level by 0, so ten steps stay ten steps.
    position = torch.linspace(0, len(logs) - 1, _check_steps(steps) + 1, dtype=torch.float64)
    k = position.floor().clamp(max=len(logs) - 2).long()
    sigmas = torch.exp(logs[k] + (position - k) * (logs[k + 1] - logs[k]))
    if final == "zero":
        sigmas = sigmas[:-1]
    return _on_schedule(schedule, sigmas, final, f"ays {table}")


def explicit(schedule: NoiseSchedule, sigmas: Sequence[float] | Tensor) -> Grid:
    """The given EDM-frame levels, in the schedule's frame."""
    return _on_schedule(schedule, torch.as_tensor(sigmas, dtype=torch.float64), "sigma_min", "explicit")


GRIDS: dict[str, Callable[..., Grid]] = {
    "karras": karras,
    "polynomial": polynomial,
    "log_snr": log_snr,
    "exponential": exponential,
    "time_uniform": time_uniform,
    "quadratic": quadratic,
    "linspace": linspace,
    "leading": leading,
    "trailing": trailing,
    "beta": beta,
    "ays": ays,
}


def diffusion_time(schedule: NoiseSchedule | None) -> NoiseSchedule:
    """The schedule that provides a diffusion time: itself, or the fitted VP process where time is just the noise level."""
    if schedule is None:
        return VPLinear.fitted()
    if isinstance(schedule, (EDM, VE)):
        return VPLinear.fitted(schedule.sigma_min, schedule.sigma_max)
    return schedule


def _check_steps(steps: int) -> int:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps: must be a whole number of at least 1, got {steps!r}")
    return steps


def _unit(steps: int, final: Final) -> Tensor:
    """Positions 0 .. 1 of the levels before a final zero, if any."""
    if final not in ("sigma_min", "zero"):
        raise ValueError(f"final: 'sigma_min' or 'zero', got {final!r}")
    count = _check_steps(steps) + (final == "sigma_min")
    return torch.linspace(0, 1, count, dtype=torch.float64)


def _end(schedule: NoiseSchedule, final: Final) -> Final:
    """A schedule whose own last level is sigma = 0 (a flow) needs no zero appended."""
    return "sigma_min" if final == "zero" and schedule.sigma_min == 0 else final


def _rounded(values: numpy.ndarray) -> Tensor:
    """Labels as numpy places and rounds them: elsewhere the ties fall another way, and the grid misses the published one."""
    return torch.from_numpy(numpy.round(values))


def _to_label_0(labels: Tensor, final: Final) -> Tensor:
    return torch.cat([labels, labels.new_zeros(1)]) if final == "sigma_min" else labels


def _range(schedule: NoiseSchedule, sigma_min: float | None, sigma_max: float | None) -> tuple[float, float]:
    low = schedule.sigma_min if sigma_min is None else sigma_min
    high = schedule.sigma_max if sigma_max is None else sigma_max
    if not (0 < low < high < math.inf):
        raise ValueError(
            f"sigma_min, sigma_max: this grid needs 0 < sigma_min < sigma_max < inf in the EDM frame, got {low:g} and {high:g}"
            + (
                "; for schedules that start at alpha = 0 use time_uniform, or give sigma_max"
                if high == math.inf
                else ""
            )
            + ("; for schedules that end at sigma = 0 give sigma_min" if low == 0 else "")
        )
    return low, high


def _pin(sigmas: Tensor, high: float, low: float) -> Tensor:
    """The ends exactly as asked, free of the rounding of powers."""
    sigmas[0] = high
    if len(sigmas) > 1:
        sigmas[-1] = low
    return sigmas


def _on_schedule(schedule: NoiseSchedule, sigmas: Tensor, final: Final, name: str) -> Grid:
    """EDM-frame levels in the schedule's own frame, with a zero appended where asked."""
    t = schedule.time(sigmas)
    alpha = torch.ones_like(sigmas) if isinstance(schedule, (EDM, VE)) else schedule.alpha(t)
    sigma, alpha, t = _finish(schedule, alpha * sigmas, alpha, t, final)
    return Grid(sigma, alpha, t, schedule, name)


def _from_times(schedule: NoiseSchedule, t: Tensor, final: Final, name: str) -> Grid:
    sigma, alpha, t = _finish(schedule, schedule.sigma(t), schedule.alpha(t), t, final)
    return Grid(sigma, alpha, t, schedule, name)


def _from_labels(table: Discrete, labels: Tensor, final: Final, name: str) -> Grid:
    if bool((labels[1:] >= labels[:-1]).any()):
        raise ValueError(
            f"steps: {len(labels)} distinct labels are needed, too many for a table of {len(table)} labels"
        )
    return _from_times(table, labels, final, name)


def _finish(
    schedule: NoiseSchedule, sigma: Tensor, alpha: Tensor, t: Tensor, final: Final
) -> tuple[Tensor, Tensor, Tensor]:
    if final == "zero":
        zero, one = sigma.new_zeros(1), sigma.new_ones(1)
        end = zero if isinstance(schedule, (EDM, VE, Flow)) else sigma.new_full((1,), min(0.0, schedule.t_end))
        return torch.cat([sigma, zero]), torch.cat([alpha, one]), torch.cat([t, end])
    return sigma, alpha, t


def _discrete(schedule: NoiseSchedule) -> Discrete:
    if not isinstance(schedule, Discrete):
        raise TypeError(f"schedule: this grid picks labels of a Discrete schedule, got {type(schedule).__name__}")
    return schedule
