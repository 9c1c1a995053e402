"""DPM-2 ancestral: k-diffusion's `sample_dpm_2_ancestral`, diffusers' KDPM2AncestralDiscreteScheduler.

In the EDM frame, from a to b, ancestral split (b_down, b_up), m = sqrt(a b_down):

    u = x + (m - a) (x - D(x; a))/a,   x' = x + (b_down - a) (u - D(u; m))/m + s_noise*b_up*z,

Euler's step to b_down where b_down = 0 or a is infinite. Two evaluations per step, one in the step to 0.
"""

import math
from collections.abc import Sequence

import numpy as np

from tests.papers.common import Between, Denoise, Levels, ancestral_split, rho


def inner_ve(alpha_s: float, sigma_s: float, alpha_t: float, sigma_t: float, r: float) -> tuple[float, float]:
    """Any frame of the inner level will do."""
    return alpha_s, alpha_s * (sigma_s / alpha_s) ** (1 - r) * (sigma_t / alpha_t) ** r


def sample(
    denoise: Denoise,
    x: np.ndarray,
    alphas: Levels,
    sigmas: Levels,
    noise: Sequence[np.ndarray] = (),
    eta: float = 1.0,
    s_noise: float = 1.0,
    between: Between = inner_ve,
) -> np.ndarray:
    draws = iter(noise)
    for i in range(len(alphas) - 1):
        a, b = rho(alphas[i], sigmas[i]), rho(alphas[i + 1], sigmas[i + 1])
        x0 = denoise(x, alphas[i], sigmas[i])
        down, up = ancestral_split(a, b, eta)
        if math.isinf(a):
            xhat = x0 + down / sigmas[i] * x
        elif down == 0:
            xhat = x0
        else:
            xhat = x / alphas[i]
            d = (xhat - x0) / a
            m = math.sqrt(a * down)
            alpha_m, sigma_m = between(alphas[i], sigmas[i], alphas[i + 1], alphas[i + 1] * down, 0.5)
            u = xhat + (m - a) * d
            d = (u - denoise(alpha_m * u, alpha_m, sigma_m)) / m
            xhat = xhat + (down - a) * d
        if b > 0 and eta > 0:
            xhat = xhat + s_noise * up * next(draws)
        x = alphas[i + 1] * xhat
    return x
