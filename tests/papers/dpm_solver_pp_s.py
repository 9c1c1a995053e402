"""Single-step DPM-Solver++(2S) and (3S). Lu et al., "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion
Probabilistic Models", arXiv 2211.01095, Algorithm 1 (2S, r1 = 1/2) and appendix (3S); the `dpmsolver` type.

h_l = lam_l - lam_s for a level l; inner levels 1 at lam_s + r1*h, 2 at lam_s + r2*h; m = x0 or eps; D1 = m_1 - m_s:

    x0:  base_l = sigma_l/sigma_s x - alpha_l (e^{-h_l} - 1) m_s     c1_l = +alpha_l ((e^{-h_l} - 1)/h_l + 1)
    eps: base_l = alpha_l/alpha_s x - sigma_l (e^{ h_l} - 1) m_s     c1_l = -sigma_l ((e^{ h_l} - 1)/h_l - 1)
    2S:  x_1 = base_1;   x_t = base_t + c0_t/(2 r1) D1,    c0_l m_s being the second term of base_l
    3S:  x_1 = base_1;   x_2 = base_2 + r2/r1 c1_2 D1;     x_t = base_t + c1_t/r2 (m_2 - m_s)

Defaults r1 = 1/2 (order 2), r1 = 1/3, r2 = 2/3 (order 3). `order` evaluations per step; a step to sigma = 0 or from
alpha = 0 is DDIM (one evaluation). prediction="eps" is DPM-Solver-2, -3 (arXiv 2206.00927).
"""

import math

import numpy as np

from tests.papers.common import Between, Denoise, Levels, between_lam, ddim_step, eps_from_x0, lam


def sample(
    denoise: Denoise,
    x: np.ndarray,
    alphas: Levels,
    sigmas: Levels,
    order: int = 2,
    prediction: str = "x0",
    r1: float | None = None,
    r2: float = 2 / 3,
    between: Between = between_lam,
) -> np.ndarray:
    assert order in (2, 3) and prediction in ("x0", "eps")
    if r1 is None:
        r1 = 1 / 2 if order == 2 else 1 / 3

    for i in range(len(alphas) - 1):
        alpha_s, sigma_s = float(alphas[i]), float(sigmas[i])
        alpha_t, sigma_t = float(alphas[i + 1]), float(sigmas[i + 1])
        x0 = denoise(x, alpha_s, sigma_s)
        if sigma_t == 0 or alpha_s == 0:
            x = ddim_step(x, x0, alpha_s, sigma_s, alpha_t, sigma_t)
            continue
        h = lam(alpha_t, sigma_t) - lam(alpha_s, sigma_s)
        alpha_1, sigma_1 = between(alpha_s, sigma_s, alpha_t, sigma_t, r1)
        alpha_2, sigma_2 = between(alpha_s, sigma_s, alpha_t, sigma_t, r2)
        h_1, h_2 = r1 * h, r2 * h

        if prediction == "x0":
            x_1 = sigma_1 / sigma_s * x - alpha_1 * math.expm1(-h_1) * x0
            d1 = denoise(x_1, alpha_1, sigma_1) - x0
            x_t = sigma_t / sigma_s * x - alpha_t * math.expm1(-h) * x0
            if order == 2:
                x = x_t - alpha_t * math.expm1(-h) / (2 * r1) * d1
            else:
                x_2 = sigma_2 / sigma_s * x - alpha_2 * math.expm1(-h_2) * x0
                x_2 = x_2 + r2 / r1 * alpha_2 * (math.expm1(-h_2) / h_2 + 1) * d1
                d2 = denoise(x_2, alpha_2, sigma_2) - x0
                x = x_t + alpha_t * (math.expm1(-h) / h + 1) / r2 * d2
        else:
            eps = eps_from_x0(x, x0, alpha_s, sigma_s)
            x_1 = alpha_1 / alpha_s * x - sigma_1 * math.expm1(h_1) * eps
            d1 = eps_from_x0(x_1, denoise(x_1, alpha_1, sigma_1), alpha_1, sigma_1) - eps
            x_t = alpha_t / alpha_s * x - sigma_t * math.expm1(h) * eps
            if order == 2:
                x = x_t - sigma_t * math.expm1(h) / (2 * r1) * d1
            else:
                x_2 = alpha_2 / alpha_s * x - sigma_2 * math.expm1(h_2) * eps
                x_2 = x_2 - r2 / r1 * sigma_2 * (math.expm1(h_2) / h_2 - 1) * d1
                d2 = eps_from_x0(x_2, denoise(x_2, alpha_2, sigma_2), alpha_2, sigma_2) - eps
                x = x_t - sigma_t * (math.expm1(h) / h - 1) / r2 * d2
    return x
