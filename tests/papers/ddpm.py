"""DDPM. Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", arXiv 2006.11239, Algorithm 2, eqs. (6), (7).

With ab_s = bar alpha of the level left, ab_t of the level reached (s noisier), alpha = ab_s/ab_t, beta = 1 - alpha:

    mean = sqrt(ab_t) beta/(1 - ab_s) x0 + sqrt(alpha) (1 - ab_t)/(1 - ab_s) x
    variance: (1 - ab_t)/(1 - ab_s) beta  ("fixed_small")   or   beta  ("fixed_large")

bar alpha = 1/(1 + rho^2) whatever the frame of the levels. No noise in the step to rho = 0. One evaluation per step.
"""

import math
from collections.abc import Sequence

import numpy as np

from tests.papers.common import Denoise, Levels, rho


def sample(
    denoise: Denoise,
    x: np.ndarray,
    alphas: Levels,
    sigmas: Levels,
    noise: Sequence[np.ndarray] = (),
    variance_type: str = "fixed_small",
    s_noise: float = 1.0,
) -> np.ndarray:
    draws = iter(noise)
    for i in range(len(alphas) - 1):
        a, b = rho(alphas[i], sigmas[i]), rho(alphas[i + 1], sigmas[i + 1])
        x0 = denoise(x, alphas[i], sigmas[i])
        ab_s, ab_t = 1 / (1 + a**2), 1 / (1 + b**2)
        one_s, one_t = 1.0 if math.isinf(a) else a**2 / (1 + a**2), b**2 / (1 + b**2)  # 1 - ab without cancellation
        beta = 1.0 if math.isinf(a) else (a**2 - b**2) / (1 + a**2)
        x_vp = x / sigmas[i] if math.isinf(a) else math.sqrt(ab_s) * x / alphas[i]
        mean = math.sqrt(ab_t) * beta / one_s * x0 + math.sqrt(ab_s / ab_t) * one_t / one_s * x_vp
        if b > 0:
            variance = one_t / one_s * beta if variance_type == "fixed_small" else beta
            mean = mean + s_noise * math.sqrt(variance) * next(draws)
        x = alphas[i + 1] / math.sqrt(ab_t) * mean
    return x
