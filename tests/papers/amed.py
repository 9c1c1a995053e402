"""AMED-Solver. Zhou et al., "Fast ODE-based Sampling for Diffusion Models in Around 5 Steps", arXiv 2312.00094, eq. 11.

In the EDM frame (xhat = x/alpha, rho = sigma/alpha), from t to t', with numbers r, c, a of the step:

    e = (xhat - D(xhat, t))/t,  tau = t'^r t^(1-r),  yhat = xhat + (tau - t) e
    xhat' = xhat + c (t' - t) (yhat - D(yhat, a tau))/tau

Two evaluations per step. A step to sigma = 0 or from alpha = 0 is DDIM (one evaluation).
"""

import numpy as np

from tests.papers.common import Between, Denoise, Levels, between_lam, ddim_step


def sample(
    denoise: Denoise,
    x: np.ndarray,
    alphas: Levels,
    sigmas: Levels,
    r=0.5,
    scale_dir=1.0,
    scale_time=1.0,
    between: Between = between_lam,
) -> np.ndarray:
    for i in range(len(alphas) - 1):
        alpha_s, sigma_s = float(alphas[i]), float(sigmas[i])
        alpha_t, sigma_t = float(alphas[i + 1]), float(sigmas[i + 1])
        x0 = denoise(x, alpha_s, sigma_s)
        if sigma_t == 0 or alpha_s == 0:
            x = ddim_step(x, x0, alpha_s, sigma_s, alpha_t, sigma_t)
            continue
        r_i, c, a = (v if np.isscalar(v) else v[i] for v in (r, scale_dir, scale_time))
        t, tn = sigma_s / alpha_s, sigma_t / alpha_t
        alpha_u, sigma_u = between(alpha_s, sigma_s, alpha_t, sigma_t, r_i)
        tau = sigma_u / alpha_u
        y = x / alpha_s + (tau - t) * (x / alpha_s - x0) / t
        x = alpha_t * (x / alpha_s + c * (tn - t) * (y - denoise(alpha_u * y, alpha_u, a * sigma_u)) / tau)
    return x
