"""Exact log-likelihood of the probability flow, in nats and bits per dimension; latent codes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastode.denoisers.base import Denoiser
from fastode.denoisers.guidance import Guidance
from fastode.drivers.adaptive import FIXED, METHODS, AdaptiveResult, adaptive, fixed_times, tolerances
from fastode.drivers.control import PI, PID
from fastode.drivers.embedded import Clock
from fastode.drivers.evaluation import Evaluation, start_state
from fastode.drivers.stepping import Field, Norm, Run, solve
from fastode.noise import check_seeds, normal
from fastode.schedules.grid import Grid, Level
from fastode.schedules.noise import EDM, VE, Flow, NoiseSchedule, VPLinear

Prior = Callable[[Tensor], Tensor]
TRACES = ("rademacher", "gaussian", "exact")
EXACT_LIMIT = 4096
_PROBE, _DEQUANTISE = 1 << 20, 1 << 21
"""Draws of a seed that no program reaches: probes of the trace, and dequantisation."""


@dataclass(frozen=True, eq=False)
class Likelihood:
    """``log_prob``: nats [B] float64, the density of ``x`` at the first time; ``z``: the latent code [B, *sample];
    ``spread``: standard error of ``log_prob`` over the probes [B] (NaN for one probe); ``nfe``: evaluations of each
    sample, int64 [B], a vector-Jacobian product with each (and per probe)."""

    log_prob: Tensor
    z: Tensor
    spread: Tensor
    nfe: Tensor
    success: bool

    def bits_per_dim(self, data_range: tuple[float, float] = (-1.0, 1.0), levels: int = 256) -> Tensor:
        """-log_prob / (d ln 2) + log2(levels / (high - low)), [B]: bits per dimension of data dequantised from ``levels``
        integers and scaled to ``data_range``. The offset is 7 for data in [-1, 1] and 8 for [0, 1]."""
        return -self.log_prob / (self.z[0].numel() * math.log(2)) + bits_offset(data_range, levels)


def bits_offset(data_range: tuple[float, float] = (-1.0, 1.0), levels: int = 256) -> float:
    """What the change of variables from integers to ``data_range`` adds, in bits per dimension."""
    low, high = data_range
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"data_range: need low < high, got {data_range}")
    if isinstance(levels, bool) or not isinstance(levels, int) or levels < 2:
        raise ValueError(f"levels: must be a whole number of at least 2, got {levels!r}")
    return math.log2(levels / (high - low))


def dequantise(
    pixels: Tensor,
    *,
    seeds: Sequence[int] | Tensor,
    data_range: tuple[float, float] = (-1.0, 1.0),
    levels: int = 256,
    draw: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """low + (high - low) (pixels + u) / levels with u uniform in [0, 1): pixels as a density can see them, [B, *sample].

    ``pixels``: whole numbers 0 .. levels - 1. u depends on the sample's seed and ``draw`` alone.
    """
    bits_offset(data_range, levels)
    if not isinstance(pixels, Tensor) or pixels.ndim < 2:
        raise ValueError("pixels: must be a tensor [B, *sample]")
    if pixels.dtype.is_floating_point or pixels.dtype == torch.bool:
        raise TypeError(f"pixels: must be whole numbers 0 .. {levels - 1}, got {pixels.dtype}")
    if int(pixels.min()) < 0 or int(pixels.max()) >= levels:
        raise ValueError(f"pixels: must be in 0 .. {levels - 1}, got {int(pixels.min())} .. {int(pixels.max())}")
    z = normal(
        check_seeds(seeds, len(pixels)), _DEQUANTISE + draw, pixels.shape[1:], dtype=torch.float64, device=pixels.device
    )
    u = torch.special.ndtr(z).clamp(max=1 - 2**-53)
    low, high = data_range
    return (low + (high - low) * (pixels + u) / levels).to(dtype)


def log_likelihood(
    denoiser: Denoiser | Callable[..., Any],
    x: Tensor,
    *,
    schedule: NoiseSchedule | None = None,
    t_min: float | None = None,
    t_max: float | None = None,
    trace: str = "rademacher",
    probes: int | Sequence[Tensor] = 1,
    seeds: Sequence[int] | Tensor | None = None,
    prior: Prior | float | None = None,
    times: Grid | Sequence[float] | Tensor | None = None,
    method: str = "dopri5",
    rtol: float | None = None,
    atol: float | None = None,
    norm: Norm = "each",
    controller: PI | PID | None = None,
    max_nfe: int = 2000,
    class_labels: Tensor | Sequence[int] | int | None = None,
    guidance_scale: float | Sequence[float] | Tensor | None = None,
    guidance: Guidance | None = None,
    cond: Mapping[str, Any] | None = None,
    uncond: Mapping[str, Any] | None = None,
) -> Likelihood:
    """log p(x) = log prior(z) + int div v dt along dx/dt = v = a x + b D from ``t_min`` to ``t_max`` (arXiv:2011.13456, D.2).

    div v = a d + b div D. The first part is integrated in closed form, d ln(sigma_max/sigma_min), so that probes only see D
    (the published estimator probes all of v; in VP its variance is larger). div D is e^T (dD/dx) e, one vector-Jacobian
    product, with probes e that stay the same along the way.

    Args:
        x: data [B, *sample], float32 or float64 (float64 states are recommended where the network is). It is read as a
            state at ``t_min``, by default 1e-5 on VP, sub-VP and VE as published, and the schedule's own end elsewhere.
        trace: probes "rademacher" (+-1, published) or "gaussian"; "exact": d products, for up to 4,096 dimensions.
        probes: how many (the mean is returned, and its standard error), or the probes themselves, each [B, *sample].
        seeds: of the probes, one per sample; by default 0, 1, 2, ...
        prior: log-density of z [B, *sample] -> [B], or the standard deviation of a centred normal. By default N(0, 1) on
            variance-preserving schedules and N(0, sigma_max^2) on others, as published: the density at ``t_max`` differs
            from it by what the data adds there.
        times: fixed steps at these times, increasing, instead of error control; method "rk4" as well.
        method, rtol, atol, norm, controller, max_nfe: see :func:`adaptive`; the integral is part of the error.

    Raises ``ValueError`` or ``TypeError`` naming the argument before anything is computed.
    """
    d = Denoiser.of(denoiser)
    chosen = schedule or d.schedule
    assert chosen is not None
    fixed = None if times is None else fixed_times(times, method)
    if method.startswith("dpm") or method not in (*METHODS, *FIXED):
        raise ValueError(f"method: a likelihood needs a Runge-Kutta pair, scipy or torchdiffeq, got {method!r}")
    first, last = _ends(chosen, t_min, t_max, fixed)
    rtol, atol = tolerances(method, rtol, atol)
    if trace not in TRACES:
        raise ValueError(f"trace: must be one of {', '.join(TRACES)}, got {trace!r}")
    x = start_state(d, x, None, 1.0)
    size = x[0].numel()
    if trace == "exact" and size > EXACT_LIMIT:
        raise ValueError(f"trace: 'exact' makes {size} products per evaluation; probes are meant beyond {EXACT_LIMIT}")
    vectors = _probes(x, trace, probes, seeds)
    log_prior = _prior(prior, chosen, last)
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
    clock = Clock.of(chosen)
    alphas = (1.0, 1.0)
    spread_first, spread_last = (float(chosen.sigma(t)) for t in (first, last))
    if clock.schedule is not chosen:  # the clock has alpha = 1 and its time is sigma/alpha
        alphas = float(chosen.alpha(first)), float(chosen.alpha(last))
        first, last = (float(chosen.rho(t)) for t in (first, last))
        fixed = None if fixed is None else [float(chosen.rho(t)) for t in fixed]
    runs: list[Run] = []
    with torch.no_grad():
        for vector in vectors:
            runs.append(
                solve(
                    clock,
                    divergence_field(evaluation, vector),
                    x / alphas[0] if alphas[0] != 1 else x,
                    first,
                    last,
                    method=method,
                    rtol=rtol,
                    atol=atol,
                    norm=norm,
                    controller=controller,
                    max_nfe=max_nfe,
                    times=fixed,
                    integral=True,
                )
            )
        # In the frame alpha x_0 + sigma n the linear part grows by sigma_last / sigma_first, in any frame.
        linear = size * math.log(spread_last / spread_first)
        made = []
        for run in runs:
            assert run.quantity is not None
            made.append(log_prior(run.samples * alphas[1]).double() + linear + run.quantity)
        values = torch.stack(made)
    spread = values.std(0) / math.sqrt(len(values)) if len(values) > 1 else torch.full_like(values[0], math.nan)
    nfe = torch.stack([run.nfe for run in runs]).sum(0)
    return Likelihood(values.mean(0), runs[0].samples * alphas[1], spread, nfe, all(run.success for run in runs))


def divergence_field(evaluation: Evaluation, probe: Tensor | None) -> Field:
    """D and div D; ``probe`` [B, *sample], or None for the exact trace."""

    def field(x: Tensor, levels: list[Level], rows: Tensor | None) -> tuple[Tensor, Tensor | None]:
        some = evaluation if rows is None else evaluation.take(rows)
        with torch.enable_grad():
            y = x.detach().requires_grad_()
            d = some.at(y, levels[0]) if len(levels) == 1 else some.rows(y, levels)
            if probe is None:
                return d.detach(), _exact_divergence(d, y)
            e = (probe if rows is None else probe[rows.to(probe.device)]).to(d.dtype)
            (product,) = torch.autograd.grad(d, y, e)
        return d.detach(), (product * e).double().flatten(1).sum(1)

    return field


def _exact_divergence(d: Tensor, y: Tensor) -> Tensor:
    total = torch.zeros(len(y), dtype=torch.float64, device=y.device)
    flat = d.flatten(1)
    for i in range(flat.shape[1]):
        (row,) = torch.autograd.grad(flat[:, i].sum(), y, retain_graph=i + 1 < flat.shape[1])
        total += row.flatten(1)[:, i].double()
    return total


# -- latent codes --------------------------------------------------------------------------------------------------------


def encode(denoiser: Denoiser | Callable[..., Any], x: Tensor, **options: Any) -> AdaptiveResult:
    """The latent code of ``x``: the probability flow forwards, ``samples`` [B, *sample] at the schedule's noisy end.

    ``x`` is read as a state at the end of the schedule that is data (1e-5 on VP, sub-VP and VE). ``t_min``, ``t_max`` and
    the options of :func:`adaptive`. The map is one-to-one, and unique for a given score.
    """
    chosen, low, high = _ends_of(denoiser, options)
    return adaptive(denoiser, x, schedule=chosen, t_start=low, t_end=high, **options)


def decode(denoiser: Denoiser | Callable[..., Any], z: Tensor, **options: Any) -> AdaptiveResult:
    """The inverse of :func:`encode`: from a latent code to data, on the same times."""
    chosen, low, high = _ends_of(denoiser, options)
    return adaptive(denoiser, z, schedule=chosen, t_start=high, t_end=low, **options)


def interpolate(z: Tensor, other: Tensor, weight: float | Sequence[float] | Tensor) -> Tensor:
    """Spherical interpolation [sin((1 - u) W) z + sin(u W) z'] / sin W of codes [B, *sample], W their angle, per sample.

    ``weight``: u in [0, 1], one or one per sample. Codes that are parallel are interpolated linearly.
    """
    if z.shape != other.shape or z.ndim < 2:
        raise ValueError(f"other: must have the shape of z {list(z.shape)}, got {list(other.shape)}")
    u = torch.as_tensor(weight, dtype=torch.float64)
    if u.ndim > 1 or (u.ndim == 1 and len(u) != len(z)) or bool(((u < 0) | (u > 1)).any()):
        raise ValueError(f"weight: must be in [0, 1], one or one per sample ({len(z)}), got {weight!r}")
    a, b = z.double().flatten(1), other.double().flatten(1)
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-300)
    angle = torch.acos(cosine.clamp(-1, 1))
    u = u.to(z.device).expand(len(z))
    sine = torch.sin(angle)
    near = sine < 1e-6
    safe = torch.where(near, torch.ones_like(sine), sine)
    first = torch.where(near, 1 - u, torch.sin((1 - u) * angle) / safe)
    second = torch.where(near, u, torch.sin(u * angle) / safe)
    return (first[:, None] * a + second[:, None] * b).reshape(z.shape).to(z.dtype)


def temper(z: Tensor, temperature: float) -> Tensor:
    """``temperature`` times the code: below 1 decodes to smoother, more typical data (arXiv:2011.13456, D.4)."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature: must be positive, got {temperature}")
    return z * temperature


# -- arguments -----------------------------------------------------------------------------------------------------------


def _ends_of(denoiser: Any, options: dict[str, Any]) -> tuple[NoiseSchedule, float, float]:
    chosen = options.pop("schedule", None) or Denoiser.of(denoiser).schedule
    assert chosen is not None
    low, high = _ends(chosen, options.pop("t_min", None), options.pop("t_max", None), None)
    return chosen, low, high


def _ends(
    schedule: NoiseSchedule, t_min: float | None, t_max: float | None, times: list[float] | None
) -> tuple[float, float]:
    """Times of the data and of the prior."""
    if times is not None:
        if t_min is not None or t_max is not None:
            raise ValueError("times: brings its own ends; leave t_min and t_max out")
        first, last = times[0], times[-1]
    else:
        published = isinstance(schedule, VE) or (isinstance(schedule, VPLinear) and schedule.beta_min > 0)
        default = 1e-5 if published else schedule.t_end
        if float(schedule.sigma(default)) == 0:
            default = 1e-3
        first = default if t_min is None else float(t_min)
        last = schedule.t_start if t_max is None else float(t_max)
    if not (math.isfinite(first) and math.isfinite(last)):
        raise ValueError(f"t_min, t_max: must be finite, got {first} and {last}")
    low, high = (float(schedule.rho(t)) for t in (first, last))
    if not 0 < low < high:
        raise ValueError(
            f"t_min, t_max: a likelihood goes from data to noise, 0 < sigma; got noise levels {low:g} and {high:g}"
        )
    return first, last


def _probes(x: Tensor, trace: str, probes: int | Sequence[Tensor], seeds: Any) -> list[Tensor | None]:
    if trace == "exact":
        return [None]
    if not isinstance(probes, int):
        given = list(probes)
        if not given or any(not isinstance(p, Tensor) or p.shape != x.shape for p in given):
            raise ValueError(f"probes: must be tensors of shape {list(x.shape)}")
        return [p.to(x) for p in given]
    if isinstance(probes, bool) or probes < 1:
        raise ValueError(f"probes: must be at least 1, got {probes!r}")
    keys = check_seeds(range(len(x)) if seeds is None else seeds, len(x))

    def draw(k: int) -> Tensor:
        z = normal(keys, _PROBE + k, x.shape[1:], dtype=x.dtype, device=x.device)
        return z if trace == "gaussian" else torch.where(z < 0, -1.0, 1.0).to(x.dtype)

    return [draw(k) for k in range(probes)]


def _prior(prior: Prior | float | None, schedule: NoiseSchedule, last: float) -> Prior:
    if callable(prior):
        return prior
    if prior is None:
        grows = isinstance(schedule, (EDM, VE, Flow))
        std = float(schedule.sigma(last)) if grows else 1.0
    else:
        std = float(prior)
        if not (math.isfinite(std) and std > 0):
            raise ValueError(f"prior: must be a log-density or a positive standard deviation, got {prior}")

    def log_normal(z: Tensor) -> Tensor:
        flat = z.double().flatten(1) / std
        return -0.5 * flat.square().sum(1) - flat.shape[1] * (0.5 * math.log(2 * math.pi) + math.log(std))

    return log_normal
