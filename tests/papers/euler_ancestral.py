"""Euler ancestral: k-diffusion's `sample_euler_ancestral`, diffusers' EulerAncestralDiscreteScheduler.

In the EDM frame, a = rho_s, b = rho_t: b_up = min(b, eta*b*sqrt(a^2 - b^2)/a), b_down = sqrt(b^2 - b_up^2),

    d = (x - D(x; a))/a,   x' = x + (b_down - a) d + s_noise*b_up*z.

A step from alpha = 0 is the limit a -> inf. One z for every step with b > 0. One evaluation per step.
"""

from collections.abc import Sequence

import numpy as np

from tests.papers.common import Denoise, Levels, ancestral_split, rho


def sample(
    denoise: Denoise,
    x: np.ndarray,
    alphas: Levels,
    sigmas: Levels,
    noise: Sequence[np.ndarray] = (),
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> np.ndarray:
    draws = iter(noise)
    for i in range(len(alphas) - 1):
        a, b = rho(alphas[i], sigmas[i]), rho(alphas[i + 1], sigmas[i + 1])
        x0 = denoise(x, alphas[i], sigmas[i])
        down, up = ancestral_split(a, b, eta)
        if np.isinf(a):
            xhat = x0 + down / sigmas[i] * x
        else:
            # d = (xhat - x0)/a, regrouped so that a large a does not cancel
            xhat = down / a * (x / alphas[i]) + (1 - down / a) * x0
        if b > 0 and eta > 0:
            xhat = xhat + s_noise * up * next(draws)
        x = alphas[i + 1] * xhat
    return x
