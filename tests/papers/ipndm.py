"""iPNDM. Zhang, Chen, "Fast Sampling of Diffusion Models with Exponential Integrator", arXiv 2204.13902
(improved PNDM), after Liu et al., "Pseudo Numerical Methods for Diffusion Models on Manifolds", arXiv 2202.09778.

Classical Adams-Bashforth weights on eps whatever the spacing, orders 1, 2, 3, 4 as the history grows:

    xhat' = xhat + (rho_t - rho_s) * e,   e = eps_0; (3 eps_0 - eps_1)/2; (23, -16, 5)/12; (55, -59, 37, -9)/24

One evaluation per step, nothing special at sigma = 0. Step from alpha = 0: DDIM; its eps = x/sigma is finite and, the
weights being fixed, stays in the history.
"""

import numpy as np

from tests.papers.common import Denoise, Levels, ddim_step, eps_from_x0, rho


def sample(denoise: Denoise, x: np.ndarray, alphas: Levels, sigmas: Levels, order: int = 4) -> np.ndarray:
    assert order in (1, 2, 3, 4)
    eps: list[np.ndarray] = []
    for i in range(len(alphas) - 1):
        alpha_s, sigma_s = float(alphas[i]), float(sigmas[i])
        alpha_t, sigma_t = float(alphas[i + 1]), float(sigmas[i + 1])
        x0 = denoise(x, alpha_s, sigma_s)
        eps.append(eps_from_x0(x, x0, alpha_s, sigma_s))
        if alpha_s == 0:
            x = ddim_step(x, x0, alpha_s, sigma_s, alpha_t, sigma_t)
            continue
        k = min(order, i + 1)
        if k == 1:
            e = eps[-1]
        elif k == 2:
            e = (3 * eps[-1] - eps[-2]) / 2
        elif k == 3:
            e = (23 * eps[-1] - 16 * eps[-2] + 5 * eps[-3]) / 12
        else:
            e = (55 * eps[-1] - 59 * eps[-2] + 37 * eps[-3] - 9 * eps[-4]) / 24
        x = alpha_t * (x / alpha_s + (rho(alpha_t, sigma_t) - rho(alpha_s, sigma_s)) * e)
    return x
