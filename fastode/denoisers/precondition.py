"""What a network's raw output means: ``D = c_skip x + c_out F(c_in x; c_noise)``, for every kind of prediction.

``x`` is the sampler's state, ``alpha x_0 + sigma n`` on its own level; the network was trained on states of *its* schedule.
The two are the same up to a factor, which is part of ``c_in`` and ``c_skip`` here, so any network can be sampled on any grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from fastode.scalar import Late, Scalar, log, sqrt
from fastode.schedules.grid import Level
from fastode.schedules.noise import Cosine, Discrete, NoiseSchedule, VPLinear

Prediction = Literal["edm", "eps", "score", "x0", "v", "flow", "denoised"]
PREDICTIONS: tuple[str, ...] = ("edm", "eps", "score", "x0", "v", "flow", "denoised")


@dataclass(frozen=True)
class Scaling:
    """The four numbers of one level. A ``c_noise`` for plain denoisers is the EDM-frame sigma itself."""

    c_skip: Scalar
    c_out: Scalar
    c_in: Scalar
    c_noise: Scalar


def scaling(prediction: str, level: Level, *, schedule: NoiseSchedule | None, sigma_data: float) -> Scaling:
    """Preconditioning of ``prediction`` on ``level``.

    ``edm``: Karras et al. 2022 (arXiv:2206.00364, Table 1) with ``sigma_data``; ``eps``, ``score`` (F = sigma times the
    score = -eps, as variance exploding networks are trained, arXiv:2011.13456), ``x0``, ``v`` (arXiv:2202.00512) and
    ``flow`` (F = n - x_0, states (1 - t) x_0 + t n) for networks trained on ``schedule``; ``denoised``: the network is
    D(x, sigma) itself, in the EDM frame. Raises ``ValueError`` where the prediction says nothing about x_0.
    """
    if prediction == "edm":
        _needs_signal(prediction, level)
        return Scaling(*_edm_in_frame(level.alpha, level.sigma, sigma_data), log(level.rho) / 4)
    if prediction == "denoised":
        _needs_signal(prediction, level)
        return Scaling(0.0, 1.0, 1.0 if _is_one(level.alpha) else 1 / level.alpha, level.rho)
    assert schedule is not None
    alpha, sigma, label = _trained_level(schedule, level)
    factor: Scalar = (
        sigma / level.sigma
        if level.is_noise or (level.is_data is False and _larger(sigma, alpha))
        else alpha / level.alpha
    )
    if not isinstance(factor, (Tensor, Late)) and abs(factor - 1) < 1e-12:
        factor = 1.0
    if prediction in ("eps", "score"):
        _needs_signal(prediction, level)
        toward = -sigma / alpha if prediction == "eps" else sigma / alpha
        return Scaling(1 / level.alpha, toward, factor, label)
    if prediction == "x0":
        return Scaling(0.0, 1.0, factor, label)
    if prediction == "v":
        return Scaling(alpha * factor, -sigma, factor, label)
    return Scaling(factor, -sigma, factor, label)


def edm_scalings(sigma: Any, sigma_data: float = 0.5) -> tuple[Any, Any, Any, Any]:
    """(c_skip, c_out, c_in, c_noise) of EDM at EDM-frame noise ``sigma``; floats or tensors."""
    return (*_edm_in_frame(1.0, sigma, sigma_data), log(sigma) / 4)


def _edm_in_frame(alpha: Scalar, sigma: Scalar, sigma_data: float) -> tuple[Scalar, Scalar, Scalar]:
    square = sigma**2 + alpha**2 * sigma_data**2
    size = sqrt(square)
    return alpha * sigma_data**2 / square, sigma * sigma_data / size, 1 / size


def _trained_level(schedule: NoiseSchedule, level: Level) -> tuple[Any, Any, Any]:
    """(alpha, sigma, label) of the network's own schedule at the noise level of ``level``."""
    rho = level.rho
    if isinstance(rho, Late):
        if type(schedule) in (
            VPLinear,
            Cosine,
            Discrete,
        ):  # alpha^2 + sigma^2 = 1: elementary, so kernels can compute it
            alpha_vp: Any = 1 / sqrt(1 + rho * rho)
            return alpha_vp, rho * alpha_vp, Late.apply("label", lambda r: schedule.label(schedule.time(r)).to(r), rho)
        return (
            Late.apply("alpha", lambda r: schedule.alpha(schedule.time(r)).to(r), rho),
            Late.apply("sigma", lambda r: schedule.sigma(schedule.time(r)).to(r), rho),
            Late.apply("label", lambda r: schedule.label(schedule.time(r)).to(r), rho),
        )
    time = schedule.time(rho)
    values = schedule.alpha(time), schedule.sigma(time), schedule.label(time)
    if isinstance(rho, Tensor):
        return values
    alpha, sigma, label = (float(v) for v in values)
    return alpha, sigma, label


def _needs_signal(prediction: str, level: Level) -> None:
    if level.is_noise:
        raise ValueError(
            f"grid: its first level has alpha = 0, where {prediction!r} prediction carries no estimate of x_0; "
            "use a network with v, flow or x0 prediction, or start at alpha > 0"
        )


def _is_one(value: Any) -> bool:
    return isinstance(value, float) and value == 1.0


def _larger(a: Any, b: Any) -> bool:
    return isinstance(a, float) and isinstance(b, float) and a > b
