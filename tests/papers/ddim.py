"""DDIM. Song, Meng, Ermon, "Denoising Diffusion Implicit Models", arXiv 2010.02502, eqs. (12), (13), (16).

One evaluation per step, order 1. eta = 0 is Euler in rho; eta = 1 is ancestral (DDPM) sampling. In rho the paper's
(12), (16) read: rho_up = eta*sqrt(rho_t^2 (rho_s^2 - rho_t^2) / rho_s^2), rho_down^2 = rho_t^2 - rho_up^2, a
deterministic step to rho_down at alpha_t, then alpha_t*rho_up*z. rho_up is clipped at rho_t (k-diffusion).
`noise` holds one z for every step with sigma_t > 0, in order; it is not looked at when eta = 0.
"""

from collections.abc import Sequence

import numpy as np

from tests.papers.common import Denoise, Levels, ancestral_split, ddim_step, rho


def sample(
    denoise: Denoise,
    x: np.ndarray,
    alphas: Levels,
    sigmas: Levels,
    eta: float = 0.0,
    noise: Sequence[np.ndarray] | None = None,
) -> np.ndarray:
    for i in range(len(alphas) - 1):
        alpha_s, sigma_s = float(alphas[i]), float(sigmas[i])
        alpha_t, sigma_t = float(alphas[i + 1]), float(sigmas[i + 1])
        x0 = denoise(x, alpha_s, sigma_s)
        if eta == 0 or sigma_t == 0:
            x = ddim_step(x, x0, alpha_s, sigma_s, alpha_t, sigma_t)
        else:
            assert noise is not None, "eta > 0 needs noise, one array for every step with sigma_t > 0"
            rho_down, rho_up = ancestral_split(rho(alpha_s, sigma_s), rho(alpha_t, sigma_t), eta)
            x = ddim_step(x, x0, alpha_s, sigma_s, alpha_t, alpha_t * rho_down) + alpha_t * rho_up * noise[i]
    return x
