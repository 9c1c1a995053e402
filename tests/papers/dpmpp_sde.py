"""DPM-Solver++ SDE: k-diffusion's `sample_dpmpp_sde`, diffusers' DPMSolverSDEScheduler (r = 1/2).

In the EDM frame, from a to b, m = a^{1-r} b^r, f = 1/(2r), ancestral splits a -> m and a -> b:

    u  = (m_down/a) x + (1 - m_down/a) D + s_noise*m_up*z_1
    x' = (b_down/a) x + (1 - b_down/a) ((1 - f) D + f D(u; m)) + s_noise*b_up*z_2

`brownian`: z_1, z_2 are unit increments of one Brownian path over [m, a] and [b, a], time rho: z_2 = c z_1 + sqrt(1-c^2) z,
c^2 = (a - m)/(a - b). Two draws per step. A step to 0, or from a = inf, is Euler ancestral. Two evaluations, one there.
"""

import math
from collections.abc import Sequence

import numpy as np

from tests.papers.common import Between, Denoise, Levels, ancestral_split, rho
from tests.papers.dpm_2_ancestral import inner_ve


def sample(
    denoise: Denoise,
    x: np.ndarray,
    alphas: Levels,
    sigmas: Levels,
    noise: Sequence[np.ndarray] = (),
    r: float = 0.5,
    eta: float = 1.0,
    s_noise: float = 1.0,
    brownian: bool = True,
    between: Between = inner_ve,
) -> np.ndarray:
    draws = iter(noise)
    for i in range(len(alphas) - 1):
        a, b = rho(alphas[i], sigmas[i]), rho(alphas[i + 1], sigmas[i + 1])
        x0 = denoise(x, alphas[i], sigmas[i])
        if b == 0:
            x = alphas[i + 1] * x0
            continue
        down, up = ancestral_split(a, b, eta)
        if math.isinf(a):
            xhat = x0 + down / sigmas[i] * x
            x = alphas[i + 1] * (xhat + s_noise * up * next(draws) if eta else xhat)
            continue
        xhat = x / alphas[i]
        alpha_m, sigma_m = between(alphas[i], sigmas[i], alphas[i + 1], sigmas[i + 1], r)
        m = a ** (1 - r) * b**r
        m_down, m_up = ancestral_split(a, m, eta)
        u = m_down / a * xhat + (1 - m_down / a) * x0
        z1 = z2 = np.zeros_like(x)
        if eta:
            z1, z2 = next(draws), next(draws)
            if brownian:
                c = math.sqrt((a - m) / (a - b))
                z2 = c * z1 + math.sqrt(1 - c * c) * z2
        u = u + s_noise * m_up * z1
        mean = (1 - 1 / (2 * r)) * x0 + 1 / (2 * r) * denoise(alpha_m * u, alpha_m, sigma_m)
        x = alphas[i + 1] * (down / a * xhat + (1 - down / a) * mean + s_noise * up * z2)
    return x
