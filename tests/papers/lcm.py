"""Multistep consistency sampling. Song et al., "Consistency Models", arXiv 2303.01469, Algorithm 1; Luo et al., "Latent
Consistency Models", arXiv 2310.04378.

    x <- f(x; rho_s) + sqrt(rho_t^2 - sigma_min^2) z   in the EDM frame, f alone at the last level if that is 0.

`sigma_data` > 0: f = c_skip x + c_out D with LCM's boundary scalings of T = timestep_scaling * label (`times`).
"""

import math
from collections.abc import Sequence

import numpy as np

from tests.papers.common import Denoise, Levels


def sample(
    denoise: Denoise,
    x: np.ndarray,
    alphas: Levels,
    sigmas: Levels,
    noise: Sequence[np.ndarray] = (),
    sigma_min: float = 0.0,
    sigma_data: float = 0.0,
    timestep_scaling: float = 10.0,
    s_noise: float = 1.0,
    times: Levels = (),
) -> np.ndarray:
    draws = iter(noise)
    for i in range(len(alphas) - 1):
        f = denoise(x, alphas[i], sigmas[i])
        if sigma_data:
            t = timestep_scaling * times[i]
            f = sigma_data**2 / (t**2 + sigma_data**2) * x + t / math.sqrt(t**2 + sigma_data**2) * f
        x = alphas[i + 1] * f
        if sigmas[i + 1] > 0:
            r = sigmas[i + 1] / alphas[i + 1]
            x = x + alphas[i + 1] * math.sqrt(r**2 - sigma_min**2) * s_noise * next(draws)
    return x
