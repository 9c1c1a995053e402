"""Linear multistep (variable-step Adams-Bashforth) in rho = sigma/alpha: the sampler `lms` of k-diffusion, equal to
rhoAB-DEIS of Zhang, Chen, arXiv 2204.13902 (appendix). Any numerical-analysis text: Hairer, Norsett, Wanner, III.5.

    xhat' = xhat + sum_j w_j eps_j,   w_j = integral over [rho_s, rho_t] of the Lagrange polynomial l_j(rho) drho,

by the antiderivative of the polynomial, in z = (rho - rho_s)/(rho_t - rho_s). k = min(order, i+1) newest nodes. One
evaluation per step, also to sigma = 0 (no special case). Step from alpha = 0: DDIM, and that level is no node later.
"""

import numpy as np
from numpy.polynomial import Polynomial

from tests.papers.common import Denoise, Levels, ddim_step, eps_from_x0, rho


def sample(denoise: Denoise, x: np.ndarray, alphas: Levels, sigmas: Levels, order: int = 4) -> np.ndarray:
    rhos: list[float] = []
    eps: list[np.ndarray] = []
    for i in range(len(alphas) - 1):
        alpha_s, sigma_s = float(alphas[i]), float(sigmas[i])
        alpha_t, sigma_t = float(alphas[i + 1]), float(sigmas[i + 1])
        x0 = denoise(x, alpha_s, sigma_s)
        if alpha_s == 0:
            x = ddim_step(x, x0, alpha_s, sigma_s, alpha_t, sigma_t)
            continue
        rhos.append(rho(alpha_s, sigma_s))
        eps.append(eps_from_x0(x, x0, alpha_s, sigma_s))

        h = rho(alpha_t, sigma_t) - rhos[-1]
        k = min(order, len(rhos))
        z = [(rhos[-1 - j] - rhos[-1]) / h for j in range(k)]
        xhat = x / alpha_s
        for j in range(k):
            ell = Polynomial([1.0])
            for other in range(k):
                if other != j:
                    ell = ell * Polynomial([-z[other], 1.0]) / (z[j] - z[other])
            xhat = xhat + h * ell.integ()(1.0) * eps[-1 - j]
        x = alpha_t * xhat
    return x
