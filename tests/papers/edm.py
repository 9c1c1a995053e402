"""EDM sampler. Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", arXiv 2206.00364,
Algorithm 1 with sigma(t) = t, s(t) = 1 (Algorithm 2 with S_churn = 0).

Names of the paper: t_i = rho_i = sigma_i/alpha_i, x = xhat, D(x; t) = denoise(alpha*x, alpha, sigma). The grid is taken
as given: the paper's N levels *and* its final t_N = 0 if that is wanted. Two evaluations per step, one in the step to 0
(35 for N = 18). A step from alpha = 0 (t = inf, not in the paper) is the DDIM step.
"""

import numpy as np

from tests.papers.common import Denoise, Levels, ddim_step, rho


def sample(denoise: Denoise, x: np.ndarray, alphas: Levels, sigmas: Levels) -> np.ndarray:
    alpha = [float(a) for a in alphas]
    sigma = [float(s) for s in sigmas]
    t = [rho(a, s) for a, s in zip(alpha, sigma, strict=True)]
    n, first = len(t) - 1, 0
    if alpha[0] == 0:
        x = ddim_step(x, denoise(x, alpha[0], sigma[0]), alpha[0], sigma[0], alpha[1], sigma[1])
        first = 1
    x = x / alpha[first]
    for i in range(first, n):
        d = (x - denoise(alpha[i] * x, alpha[i], sigma[i])) / t[i]
        x_next = x + (t[i + 1] - t[i]) * d
        if t[i + 1] != 0:  # the correction, unless sigma goes to zero
            d_next = (x_next - denoise(alpha[i + 1] * x_next, alpha[i + 1], sigma[i + 1])) / t[i + 1]
            x_next = x + (t[i + 1] - t[i]) * (d / 2 + d_next / 2)
        x = x_next
    return alpha[n] * x
