"""EDM sampler. Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", arXiv 2206.00364,
Algorithm 2 with sigma(t) = t, s(t) = 1; Algorithm 1 at S_churn = 0.

Names of the paper: t_i = rho_i = sigma_i/alpha_i, x = xhat, D(x; t) = denoise(alpha*x, alpha, sigma). The grid is taken
as given: the paper's N levels *and* its final t_N = 0 if that is wanted; gamma = min(S_churn/steps, sqrt(2) - 1). Two
evaluations per step, one in the step to 0 (35 for N = 18). A step from alpha = 0 (t = inf, not in the paper) is the DDIM
step. `frame`: rho -> (alpha, sigma), where D is asked about the raised level (by default in the frame of level i).
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from tests.papers.common import Denoise, Levels, ddim_step, rho


def sample(
    denoise: Denoise,
    x: np.ndarray,
    alphas: Levels,
    sigmas: Levels,
    noise: Sequence[np.ndarray] = (),
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    frame: Callable[[float], tuple[float, float]] | None = None,
) -> np.ndarray:
    draws = iter(noise)
    alpha = [float(a) for a in alphas]
    sigma = [float(s) for s in sigmas]
    t = [rho(a, s) for a, s in zip(alpha, sigma, strict=True)]
    n, first = len(t) - 1, 0
    if alpha[0] == 0:
        x = ddim_step(x, denoise(x, alpha[0], sigma[0]), alpha[0], sigma[0], alpha[1], sigma[1])
        first = 1
    x = x / alpha[first]
    for i in range(first, n):
        t_hat, a_hat, s_hat = t[i], alpha[i], sigma[i]
        if s_churn > 0 and s_tmin <= t[i] <= s_tmax:
            t_hat = t[i] * (1 + min(s_churn / n, math.sqrt(2) - 1))
            x = x + math.sqrt(t_hat**2 - t[i] ** 2) * s_noise * next(draws)
            a_hat, s_hat = frame(t_hat) if frame else (alpha[i], alpha[i] * t_hat)
        d = (x - denoise(a_hat * x, a_hat, s_hat)) / t_hat
        x_next = x + (t[i + 1] - t_hat) * d
        if t[i + 1] != 0:  # the correction, unless sigma goes to zero
            d_next = (x_next - denoise(alpha[i + 1] * x_next, alpha[i + 1], sigma[i + 1])) / t[i + 1]
            x_next = x + (t[i + 1] - t_hat) * (d / 2 + d_next / 2)
        x = x_next
    return alpha[n] * x
