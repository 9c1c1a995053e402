"""Heun's method (trapezoid) in rho = sigma/alpha. Karras et al., "Elucidating the Design Space of Diffusion-Based
Generative Models", arXiv 2206.00364, Algorithm 1 with s(t) = 1, sigma(t) = t, written for any alpha.

    xhat' = xhat + (rho_t - rho_s) * (eps_s + eps_t) / 2,    eps_t at the Euler point.

Order 2, two evaluations per step. A step to sigma = 0 and a step from alpha = 0 are Euler (DDIM): one evaluation.
With churn it is the loop of edm.py.
"""

from typing import Any

import numpy as np

from tests.papers import edm
from tests.papers.common import Denoise, Levels, ddim_step, eps_from_x0, rho


def sample(denoise: Denoise, x: np.ndarray, alphas: Levels, sigmas: Levels, **churn: Any) -> np.ndarray:
    if churn:
        return edm.sample(denoise, x, alphas, sigmas, **churn)
    for i in range(len(alphas) - 1):
        alpha_s, sigma_s = float(alphas[i]), float(sigmas[i])
        alpha_t, sigma_t = float(alphas[i + 1]), float(sigmas[i + 1])
        x0 = denoise(x, alpha_s, sigma_s)
        euler = ddim_step(x, x0, alpha_s, sigma_s, alpha_t, sigma_t)
        if sigma_t == 0 or alpha_s == 0:
            x = euler
            continue
        eps_s = eps_from_x0(x, x0, alpha_s, sigma_s)
        eps_t = eps_from_x0(euler, denoise(euler, alpha_t, sigma_t), alpha_t, sigma_t)
        h = rho(alpha_t, sigma_t) - rho(alpha_s, sigma_s)
        x = alpha_t * (x / alpha_s + h * (eps_s + eps_t) / 2)
    return x
