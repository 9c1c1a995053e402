"""DPM-Solver-2. Lu et al., "DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling in Around 10
Steps", arXiv 2206.00927, Algorithm 1 (r = 1/2); general r1 = r in the appendix.

Noise prediction, h = lam_t - lam_s, inner level u at lam_s + r*h:

    x_u = alpha_u/alpha_s * x - sigma_u * (e^{r h} - 1) * eps_s
    x_t = alpha_t/alpha_s * x - sigma_t * (e^h - 1) * eps_s - sigma_t/(2 r) * (e^h - 1) * (eps_u - eps_s)

Order 2, two evaluations per step; r = 1 is Heun in rho. A step to sigma = 0 or from alpha = 0 is DDIM (one evaluation).
In the EDM frame u is sigma_u = sigma_t^r sigma_s^(1-r) (diff-sampler). `between` names the inner level.
"""

import math

import numpy as np

from tests.papers.common import Between, Denoise, Levels, between_lam, ddim_step, eps_from_x0, lam


def sample(
    denoise: Denoise, x: np.ndarray, alphas: Levels, sigmas: Levels, r: float = 0.5, between: Between = between_lam
) -> np.ndarray:
    for i in range(len(alphas) - 1):
        alpha_s, sigma_s = float(alphas[i]), float(sigmas[i])
        alpha_t, sigma_t = float(alphas[i + 1]), float(sigmas[i + 1])
        x0 = denoise(x, alpha_s, sigma_s)
        if sigma_t == 0 or alpha_s == 0:
            x = ddim_step(x, x0, alpha_s, sigma_s, alpha_t, sigma_t)
            continue
        h = lam(alpha_t, sigma_t) - lam(alpha_s, sigma_s)
        eps_s = eps_from_x0(x, x0, alpha_s, sigma_s)
        alpha_u, sigma_u = between(alpha_s, sigma_s, alpha_t, sigma_t, r)
        x_u = alpha_u / alpha_s * x - sigma_u * math.expm1(r * h) * eps_s
        eps_u = eps_from_x0(x_u, denoise(x_u, alpha_u, sigma_u), alpha_u, sigma_u)
        x = (
            alpha_t / alpha_s * x
            - sigma_t * math.expm1(h) * eps_s
            - sigma_t / (2 * r) * math.expm1(h) * (eps_u - eps_s)
        )
    return x
