"""Denoisers of known data distributions. Their probability flows are known too, which makes them ground truth for solvers.

Each is a callable ``D(x, sigma)`` in the EDM frame on [B, *sample], in the dtype and on the device of ``x``, and has
``flow(x, sigma_from, sigma_to)``: the exact solution of the probability-flow ODE dx/dsigma = (x - D)/sigma.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class Gaussian:
    """Data N(mean, covariance): D = mean + V (V + sigma^2)^-1 (x - mean).

    ``mean``: [*sample]; ``covariance``: a number (times identity), [*sample] variances, or a full [d, d] matrix.
    The flow scales each principal component by sqrt((v + sigma_to^2)/(v + sigma_from^2)).
    """

    def __init__(self, mean: Any, covariance: Any = 1.0) -> None:
        self.mean = torch.as_tensor(mean, dtype=torch.float64)
        d = self.mean.numel()
        value = torch.as_tensor(covariance, dtype=torch.float64)
        self.basis: Tensor | None = None
        if value.ndim == 2 and value.shape == (d, d) and (self.mean.shape != value.shape):
            if not torch.allclose(value, value.T):
                raise ValueError("covariance: a matrix must be symmetric")
            self.variances, self.basis = torch.linalg.eigh(value)
        else:
            try:
                self.variances = value.expand(self.mean.shape).reshape(-1)
            except RuntimeError as error:
                raise ValueError(
                    f"covariance: must be a number, {list(self.mean.shape)} variances or a [{d}, {d}] matrix, "
                    f"got shape {list(value.shape)}"
                ) from error
        if bool((self.variances < -1e-12).any()):
            raise ValueError("covariance: variances cannot be negative")
        self.variances = self.variances.clamp(min=0)

    def _scale(self, x: Tensor, gains: Tensor) -> Tensor:
        """mean + (x - mean) with every principal component multiplied by its gain."""
        mean = self.mean.to(x).reshape(-1)
        y = x.flatten(1) - mean
        if self.basis is None:
            y = y * gains.to(x)
        else:
            basis = self.basis.to(x)
            y = ((y @ basis) * gains.to(x)) @ basis.T
        return (mean + y).reshape(x.shape)

    def __call__(self, x: Tensor, sigma: Any) -> Tensor:
        s = torch.as_tensor(sigma, device=x.device, dtype=torch.float64)
        if s.numel() > 1:
            return torch.cat([self(x[i : i + 1], s.flatten()[i]) for i in range(len(x))])
        s = s.reshape(())
        return self._scale(x, self.variances.to(x.device) / (self.variances.to(x.device) + s**2))

    def flow(self, x: Tensor, sigma_from: float, sigma_to: float) -> Tensor:
        gains = torch.sqrt((self.variances + sigma_to**2) / (self.variances + sigma_from**2))
        return self._scale(x, gains.to(x.device))

    def log_prob(self, x: Tensor, sigma: float = 0.0) -> Tensor:
        """Log-density of x_0 + sigma n at ``x``: float64 [B]."""
        y = x.double().flatten(1) - self.mean.to(x.device).reshape(-1)
        y = y if self.basis is None else y @ self.basis.to(x.device)
        total = self.variances.to(x.device) + sigma**2
        return -0.5 * (y**2 / total + torch.log(2 * math.pi * total)).sum(1)


class GaussianMixture:
    """Data sum_k w_k N(mean_k, covariance_k): D is the posterior mean, a softmax-weighted mean of the components'.

    ``means``: [K, *sample]; ``weights``: [K]; ``covariances``: a number, [K] numbers (times identity) or [K, d, d].
    One-dimensional flows preserve quantiles and are solved for exactly; otherwise the flow is integrated to rounding error.
    """

    def __init__(self, means: Any, covariances: Any = 1.0, weights: Any = None) -> None:
        self.means = torch.as_tensor(means, dtype=torch.float64)
        if self.means.ndim < 2:
            raise ValueError(f"means: must be [K, *sample], got shape {list(self.means.shape)}")
        k, d = self.means.shape[0], self.means[0].numel()
        w = torch.ones(k) if weights is None else torch.as_tensor(weights)
        if w.shape != (k,) or bool((w < 0).any()) or not float(w.sum()) > 0:
            raise ValueError(f"weights: must be {k} non-negative numbers, got {w.tolist()}")
        self.log_weights = (w.double() / w.double().sum()).log()
        value = torch.as_tensor(covariances, dtype=torch.float64)
        self.variances: Tensor  # [K, d]
        self.bases: Tensor | None = None  # [K, d, d]
        if value.ndim == 3:
            self.variances, self.bases = torch.linalg.eigh(value)
        else:
            self.variances = value.reshape(-1, 1).expand(k, d)

    def __call__(self, x: Tensor, sigma: Any) -> Tensor:
        s = torch.as_tensor(sigma, device=x.device, dtype=x.dtype)
        s2 = (s.reshape(-1, 1, 1) if s.ndim else s) ** 2
        means, v = self.means.flatten(1).to(x), self.variances.to(x)
        y = x.flatten(1)[:, None] - means  # [B, K, d]
        if self.bases is not None:
            y = torch.einsum("bkd,kde->bke", y, self.bases.to(x))
        total = v + s2
        logits = self.log_weights.to(x) - 0.5 * (y**2 / total + total.log()).sum(-1)
        shrunk = y * (v / total)
        if self.bases is not None:
            shrunk = torch.einsum("bke,kde->bkd", shrunk, self.bases.to(x))
        return torch.einsum("bk,bkd->bd", logits.softmax(1), means + shrunk).reshape(x.shape)

    def flow(self, x: Tensor, sigma_from: float, sigma_to: float) -> Tensor:
        if self.means[0].numel() == 1:
            return self._quantile_flow(x, sigma_from, sigma_to)
        return integrate(self, x, sigma_from, sigma_to)

    def log_prob(self, x: Tensor, sigma: float = 0.0) -> Tensor:
        """Log-density of x_0 + sigma n at ``x``: float64 [B]."""
        y = x.double().flatten(1)[:, None] - self.means.flatten(1).to(x.device)
        if self.bases is not None:
            y = torch.einsum("bkd,kde->bke", y, self.bases.to(x.device))
        total = self.variances.to(x.device) + sigma**2
        each = -0.5 * (y**2 / total + torch.log(2 * math.pi * total)).sum(-1)
        return torch.logsumexp(self.log_weights.to(x.device) + each, 1)

    def _cdf(self, x: Tensor, sigma: float) -> Tensor:
        z = (x.reshape(-1, 1) - self.means.flatten()) / torch.sqrt(self.variances.flatten() + sigma**2)
        return (torch.special.ndtr(z) * self.log_weights.exp()).sum(1)

    def _quantile_flow(self, x: Tensor, sigma_from: float, sigma_to: float) -> Tensor:
        flat = x.reshape(-1).double()
        target = self._cdf(flat, sigma_from)
        spread = 40 * (sigma_to + float(self.variances.max()) ** 0.5) + float(self.means.abs().max())
        low, high = torch.full_like(flat, -spread), torch.full_like(flat, spread)
        for _ in range(100):
            middle = (low + high) / 2
            below = self._cdf(middle, sigma_to) < target
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return ((low + high) / 2).reshape(x.shape).to(x)


class Empirical(GaussianMixture):
    """Data uniform on the rows of ``data`` [K, *sample]: the optimal denoiser of a training set."""

    def __init__(self, data: Any) -> None:
        super().__init__(data, 0.0)


def integrate(denoiser: Any, x: Tensor, sigma_from: float, sigma_to: float, *, steps: int = 4000) -> Tensor:
    """The probability flow by classical Runge-Kutta in lam = -ln sigma, float64: error about 1e-12 at the default steps."""
    if sigma_to == 0:
        x = integrate(denoiser, x, sigma_from, 1e-6, steps=steps)
        return denoiser(x, 1e-6).to(x)
    y = x.double()
    h = (math.log(sigma_to) - math.log(sigma_from)) / steps

    def slope(state: Tensor, u: float) -> Tensor:
        return state - denoiser(state, math.exp(u))

    for i in range(steps):
        u = math.log(sigma_from) + i * h
        k1 = slope(y, u)
        k2 = slope(y + h / 2 * k1, u + h / 2)
        k3 = slope(y + h / 2 * k2, u + h / 2)
        k4 = slope(y + h * k3, u + h)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return y.to(x)
