"""Empirical model statistics of DPM-Solver-v3 (arXiv:2310.13268): l, s, b by Jacobian-vector products of the denoiser."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastode.learn.replay import Evaluate
from fastode.noise import normal
from fastode.schedules.grid import Level
from fastode.solvers.coefficients import check_choice
from fastode.solvers.dpm_solver_v3 import Statistics

DERIVATIVES = ("forward", "double_backward", "finite_difference")
"""Ways to a Jacobian-vector product, in the order in which "auto" tries them."""

NAMES = ("vJv", "D", "y", "D1", "DD", "yy", "Dy", "DD1", "yD1")


@dataclass(frozen=True, eq=False)
class Moments:
    """Element-wise means over samples on each level, in the frame y = x/alpha: ``means`` [N + 1, 9, *sample] float64.

    v * Jv with random signs v (its mean is the diagonal of J = dD/dy), then D, y, D1, D^2, y^2, D y, D D1, y D1, where D1 is
    the derivative of D along the flow with respect to lam. l, s and b are functions of these nine.
    """

    lam: Tensor
    means: Tensor
    samples: int
    derivative: str


def moments(
    evaluate: Callable[[Tensor], Evaluate],
    data: Tensor,
    lam: Tensor,
    seeds: Tensor,
    *,
    derivative: str = "auto",
    batch: int = 64,
    dtype: torch.dtype = torch.float32,
    tick: Callable[[int], bool | None] | None = None,
) -> Moments:
    """Average over K images ``data`` [K, *sample], the same on every level of ``lam``, with fresh noise on each.

    ``evaluate(rows)`` gives D(y, level) for those rows of ``data``. Per level and sample: two Jacobian-vector products, each
    of which evaluates as well. ``derivative``: "forward" (torch.func.jvp), "double_backward", "finite_difference" (central,
    six evaluations in all), or "auto": the first that works, with a warning that names what did not. ``tick(level)`` after
    each.
    Raises ``FloatingPointError`` naming the level where a mean is not finite.
    """
    check_choice("derivative", derivative, ("auto", *DERIVATIVES))
    if len(data) < 2 or len(seeds) != len(data):
        raise ValueError(f"data: need at least 2 images and a seed for each, got {len(data)} and {len(seeds)} seeds")
    if not bool(torch.isfinite(data).all()):
        raise ValueError("data: must be finite")
    product, name = _choose(derivative, evaluate, data, lam, dtype)
    means = torch.zeros(len(lam), len(NAMES), *data.shape[1:], dtype=torch.float64)
    for i, value in enumerate(lam.tolist()):
        total = torch.zeros(means.shape[1:], dtype=torch.float64, device=data.device)
        for rows in torch.arange(len(data)).split(batch):
            x = data[rows].to(dtype)
            y = x + math.exp(-value) * normal(seeds[rows], 2 * i, x.shape[1:], device=data.device).to(dtype)
            v = torch.sign(normal(seeds[rows], 2 * i + 1, x.shape[1:], device=data.device)).to(dtype)
            at = evaluate(rows)
            d, jv = product(at, y, v, value, 0.0)
            _, d1 = product(at, y, d - y, value, 1.0)
            jv, d, y, d1 = (z.double() for z in (jv * v, d, y, d1))
            total += torch.stack([z.sum(0) for z in (jv, d, y, d1, d * d, y * y, d * y, d * d1, y * d1)])
        means[i] = (total / len(data)).cpu()
        if not bool(torch.isfinite(means[i]).all()):
            raise FloatingPointError(f"statistics: not finite at level {i}, sigma {math.exp(-value):.6g}")
        if tick is not None and tick(i):
            raise TimeoutError(f"minutes: the statistics were at level {i + 1} of {len(lam)} when the time was over")
    return Moments(lam, means, len(data), name)


Product = Callable[[Evaluate, Tensor, Tensor, float, float], tuple[Tensor, Tensor]]
"""(D, y, dy, lam, dlam) -> (D(y, lam), its derivative along (dy, dlam)), detached."""


def _forward(at: Evaluate, y: Tensor, dy: Tensor, lam: float, dlam: float) -> tuple[Tensor, Tensor]:
    point = torch.tensor(lam, dtype=torch.float64)

    def d(state: Tensor, value: Tensor) -> Tensor:
        return at(state, Level(1.0, torch.exp(-value)))

    made: Any
    if dlam:
        made = torch.func.jvp(d, (y, point), (dy, torch.full_like(point, dlam)))
    else:
        made = torch.func.jvp(lambda state: at(state, Level(1.0, math.exp(-lam))), (y,), (dy,))
    return made[0].detach(), made[1].detach()


def _double_backward(at: Evaluate, y: Tensor, dy: Tensor, lam: float, dlam: float) -> tuple[Tensor, Tensor]:
    """J u as the derivative in w of <J^T w, u>, which is linear in w."""
    with torch.enable_grad():
        state = y.detach().requires_grad_()
        point = torch.tensor(lam, dtype=torch.float64, requires_grad=bool(dlam))
        d = at(state, Level(1.0, torch.exp(-point)) if dlam else Level(1.0, math.exp(-lam)))
        w = torch.zeros_like(d, requires_grad=True)
        inputs = (state, point) if dlam else (state,)
        back = torch.autograd.grad(d, inputs, w, create_graph=True)
        along = (back[0] * dy).sum() + (back[1] * dlam if dlam else 0.0)
        (jv,) = torch.autograd.grad(along, w)
    return d.detach(), jv.detach()


def _finite_difference(at: Evaluate, y: Tensor, dy: Tensor, lam: float, dlam: float) -> tuple[Tensor, Tensor]:
    """Central, with a step of a thousandth of the noise: in float32 rounding and curvature then cost about 1e-4 each."""
    with torch.no_grad():
        size = float(dy.square().mean().sqrt()) or 1.0
        scale = math.sqrt(math.exp(-2 * lam) + 1)
        h = 1e-3 * scale / max(size, abs(dlam) * scale)
        d = at(y, Level(1.0, math.exp(-lam)))
        up, down = (at(y + c * h * dy, Level(1.0, math.exp(-(lam + c * h * dlam)))) for c in (1, -1))
        return d, (up - down) / (2 * h)


_PRODUCTS: dict[str, Product] = {
    "forward": _forward,
    "double_backward": _double_backward,
    "finite_difference": _finite_difference,
}


def _choose(
    derivative: str, evaluate: Callable[[Tensor], Evaluate], data: Tensor, lam: Tensor, dtype: torch.dtype
) -> tuple[Product, str]:
    if derivative != "auto":
        return _PRODUCTS[derivative], derivative
    rows = torch.arange(1)
    y = data[:1].to(dtype) + 1e-3
    for name in DERIVATIVES[:-1]:
        try:
            d, _ = _PRODUCTS[name](evaluate(rows), y, torch.ones_like(y), float(lam[len(lam) // 2]), 1.0)
            if d.shape == y.shape:
                return _PRODUCTS[name], name
        except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            after = DERIVATIVES[DERIVATIVES.index(name) + 1]
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            warnings.warn(
                f"derivative: this network has no {name!r} ({first[:120]}); using {after!r}",
                RuntimeWarning,
                stacklevel=3,
            )
    return _finite_difference, "finite_difference"


def statistics(
    found: Moments, *, smooth: int | None = None, reduce: str = "element", floor: float = 1e-8
) -> Statistics:
    """l = 1 - E[v Jv]; then s, b by regression of f' on f, with f = (1 - l) y - D and

        f' = -l' y + (1 - l)(D - y) - D1

    l' by central differences, averaged over ``smooth`` levels (fewer at the ends). Published: 11 of 120 or more, the
    default there; below 120 as large a part of the range. ``reduce``: a number per
    "element", per "channel" (the first axis) or one for "all": moments are pooled before anything is divided. ``floor``:
    the smallest variance of f that is divided by.
    """
    check_choice("reduce", reduce, ("element", "channel", "all"))
    n = len(found.lam) - 1
    smooth = min(11, 2 * round(5.5 * n / 120 - 0.5) + 1) if smooth is None else smooth
    if isinstance(smooth, bool) or not isinstance(smooth, int) or smooth < 1 or smooth % 2 == 0:
        raise ValueError(f"smooth: must be an odd whole number, got {smooth!r}")
    means = found.means
    if reduce != "element":
        axes = tuple(range(2 if reduce == "all" else 3, means.ndim))
        means = means.mean(axes, keepdim=True) if axes else means
    jv, d, y, d1, dd, yy, dy, dd1, yd1 = means.unbind(1)
    l = 1 - jv  # noqa: E741
    slope = torch.gradient(l, spacing=float(found.lam[1] - found.lam[0]), dim=0)[0]
    slope = _average(slope, smooth)
    k = 1 - l  # f = k y - D;   f' = (-l' - k) y + k D - D1
    a = -slope - k
    mean_f, mean_f1 = k * y - d, a * y + k * d - d1
    square = k * k * yy - 2 * k * dy + dd - mean_f**2
    cross = k * a * yy + (k * k - a) * dy - k * yd1 - k * dd + dd1 - mean_f * mean_f1
    s = cross / square.clamp(min=floor)
    return Statistics(found.lam, l, s, mean_f1 - s * mean_f)


def _average(values: Tensor, width: int) -> Tensor:
    """Moving average over ``width`` levels; the window shrinks at the ends."""
    reach, n = width // 2, len(values)
    total = torch.cat([torch.zeros_like(values[:1]), values.cumsum(0)])
    low = [max(0, i - reach) for i in range(n)]
    high = [min(n, i + reach + 1) for i in range(n)]
    count = torch.tensor([b - a for a, b in zip(low, high, strict=True)], dtype=values.dtype)
    return (total[high] - total[low]) / count.reshape(-1, *[1] * (values.ndim - 1))


def uniform_levels(sigmas: Sequence[float], count: int) -> Tensor:
    """``count`` + 1 levels uniform in lam between the largest and the smallest of EDM-frame ``sigmas``, float64."""
    low, high = min(sigmas), max(sigmas)
    if isinstance(count, bool) or not isinstance(count, int) or count < 2:
        raise ValueError(f"levels: must be a whole number of at least 2, got {count!r}")
    if not 0 < low < high < math.inf:
        raise ValueError(
            f"grid: statistics need 0 < sigma_min < sigma_max < inf in the EDM frame, got {low:g} and {high:g}"
        )
    return torch.linspace(-math.log(high), -math.log(low), count + 1, dtype=torch.float64)
