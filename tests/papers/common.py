"""What the paper loops share: the field's names for a level, and one DDIM step.

A level is (alpha, sigma), a state there is x = alpha*x0 + sigma*n, and
lam = ln(alpha/sigma), rho = sigma/alpha, eps = (x - alpha*x0)/sigma, dxhat/drho = eps with xhat = x/alpha.
alpha = 0 (pure noise: rho = inf, lam = -inf) and sigma = 0 (clean data: rho = 0, lam = inf) are both allowed.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

Denoise = Callable[[np.ndarray, float, float], np.ndarray]  # (x, alpha, sigma) -> estimate of x0
Levels = Sequence[float] | np.ndarray
Between = Callable[[float, float, float, float, float], tuple[float, float]]  # (alpha_s, sigma_s, alpha_t, sigma_t, r)


def lam(alpha: float, sigma: float) -> float:
    if alpha == 0:
        return -math.inf
    if sigma == 0:
        return math.inf
    return math.log(alpha / sigma)


def rho(alpha: float, sigma: float) -> float:
    return math.inf if alpha == 0 else sigma / alpha


def eps_from_x0(x: np.ndarray, x0: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
    return (x - alpha * x0) / sigma


def ddim_step(
    x: np.ndarray, x0: np.ndarray, alpha_s: float, sigma_s: float, alpha_t: float, sigma_t: float
) -> np.ndarray:
    """x_t = alpha_t*x0 + sigma_t*eps without the division by alpha_s: good at alpha_s = 0 and at sigma_t = 0."""
    return sigma_t / sigma_s * x + (alpha_t - alpha_s * sigma_t / sigma_s) * x0


def between_lam(alpha_s: float, sigma_s: float, alpha_t: float, sigma_t: float, r: float) -> tuple[float, float]:
    """The level at lam_s + r*h, its alpha by the same geometric mean."""
    lam_s, lam_t = lam(alpha_s, sigma_s), lam(alpha_t, sigma_t)
    alpha = alpha_s ** (1 - r) * alpha_t**r
    return alpha, alpha * math.exp(-(lam_s + r * (lam_t - lam_s)))


def ancestral_split(rho_s: float, rho_t: float, eta: float) -> tuple[float, float]:
    """(rho_down, rho_up), rho_down^2 + rho_up^2 = rho_t^2: step to rho_down, then add fresh noise rho_up*z."""
    if math.isinf(rho_s):
        rho_up = min(rho_t, eta * rho_t)  # the limit of the line below
    else:
        rho_up = min(rho_t, eta * math.sqrt(rho_t**2 * (rho_s**2 - rho_t**2) / rho_s**2))
    # rho_t^2 - rho_up^2 without the cancellation of a long step; 0 where eta > 1 was clipped
    share = (1 - eta) * (1 + eta) + (0.0 if math.isinf(rho_s) else (eta * rho_t / rho_s) ** 2)
    return rho_t * math.sqrt(max(share, 0.0)), rho_up
