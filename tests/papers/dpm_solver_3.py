"""DPM-Solver-3. Lu et al., "DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling in Around 10
Steps", arXiv 2206.00927, Algorithm 2 (r1 = 1/3, r2 = 2/3); general r1, r2 in the appendix.

Noise prediction, h = lam_t - lam_s, inner levels 1 at lam_s + r1*h and 2 at lam_s + r2*h:

    x_1 = alpha_1/alpha_s x - sigma_1 (e^{r1 h} - 1) eps_s                                           D1 = eps_1 - eps_s
    x_2 = alpha_2/alpha_s x - sigma_2 (e^{r2 h} - 1) eps_s - sigma_2 r2/r1 ((e^{r2 h} - 1)/(r2 h) - 1) D1
    x_t = alpha_t/alpha_s x - sigma_t (e^h - 1) eps_s - sigma_t/r2 ((e^h - 1)/h - 1) D2,             D2 = eps_2 - eps_s

Order 3, three evaluations per step. A step to sigma = 0 or from alpha = 0 is DDIM (one evaluation).
"""

import math

import numpy as np

from tests.papers.common import Between, Denoise, Levels, between_lam, ddim_step, eps_from_x0, lam


def sample(
    denoise: Denoise,
    x: np.ndarray,
    alphas: Levels,
    sigmas: Levels,
    r1: float = 1 / 3,
    r2: float = 2 / 3,
    lower_order_final: bool = False,
    between: Between = between_lam,
) -> np.ndarray:
    for i in range(len(alphas) - 1):
        alpha_s, sigma_s = float(alphas[i]), float(sigmas[i])
        alpha_t, sigma_t = float(alphas[i + 1]), float(sigmas[i + 1])
        x0 = denoise(x, alpha_s, sigma_s)
        if sigma_t == 0 or alpha_s == 0:
            x = ddim_step(x, x0, alpha_s, sigma_s, alpha_t, sigma_t)
            continue
        h = lam(alpha_t, sigma_t) - lam(alpha_s, sigma_s)
        left = len(alphas) - 1 - i
        if lower_order_final and left <= 2:  # DPM-Solver-2 with r = 1/2, then DDIM
            x_t = ddim_step(x, x0, alpha_s, sigma_s, alpha_t, sigma_t)
            if left == 2:
                alpha_1, sigma_1 = between(alpha_s, sigma_s, alpha_t, sigma_t, 0.5)
                x_1 = ddim_step(x, x0, alpha_s, sigma_s, alpha_1, sigma_1)
                eps_1 = eps_from_x0(x_1, denoise(x_1, alpha_1, sigma_1), alpha_1, sigma_1)
                x_t = alpha_t / alpha_s * x - sigma_t * math.expm1(h) * eps_1
            x = x_t
            continue
        eps_s = eps_from_x0(x, x0, alpha_s, sigma_s)

        alpha_1, sigma_1 = between(alpha_s, sigma_s, alpha_t, sigma_t, r1)
        x_1 = alpha_1 / alpha_s * x - sigma_1 * math.expm1(r1 * h) * eps_s
        d1 = eps_from_x0(x_1, denoise(x_1, alpha_1, sigma_1), alpha_1, sigma_1) - eps_s

        alpha_2, sigma_2 = between(alpha_s, sigma_s, alpha_t, sigma_t, r2)
        x_2 = alpha_2 / alpha_s * x - sigma_2 * math.expm1(r2 * h) * eps_s
        x_2 = x_2 - sigma_2 * r2 / r1 * (math.expm1(r2 * h) / (r2 * h) - 1) * d1
        d2 = eps_from_x0(x_2, denoise(x_2, alpha_2, sigma_2), alpha_2, sigma_2) - eps_s

        x = alpha_t / alpha_s * x - sigma_t * math.expm1(h) * eps_s - sigma_t / r2 * (math.expm1(h) / h - 1) * d2
    return x
