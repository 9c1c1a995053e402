"""DPM-Solver++(2S) ancestral: k-diffusion's `sample_dpmpp_2s_ancestral`.

In the EDM frame, from a to b, ancestral split (b_down, b_up), h = ln(a/b_down):

    u = e^{-h/2} x + (1 - e^{-h/2}) D(x; a),   x' = e^{-h} x + (1 - e^{-h}) D(u; a e^{-h/2}) + s_noise*b_up*z,

the denoised estimate where b_down = 0 (Euler's step to it). Two evaluations per step, one in the step to 0.
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
    eta: float = 1.0,
    s_noise: float = 1.0,
    between: Between = inner_ve,
) -> np.ndarray:
    draws = iter(noise)
    for i in range(len(alphas) - 1):
        a, b = rho(alphas[i], sigmas[i]), rho(alphas[i + 1], sigmas[i + 1])
        x0 = denoise(x, alphas[i], sigmas[i])
        down, up = ancestral_split(a, b, eta)
        if math.isinf(a):
            xhat = x0 + down / sigmas[i] * x
        elif down == 0:
            xhat = x0
        else:
            xhat, h = x / alphas[i], math.log(a / down)
            alpha_m, sigma_m = between(alphas[i], sigmas[i], alphas[i + 1], alphas[i + 1] * down, 0.5)
            u = math.exp(-h / 2) * xhat - math.expm1(-h / 2) * x0
            xhat = math.exp(-h) * xhat - math.expm1(-h) * denoise(alpha_m * u, alpha_m, sigma_m)
        if b > 0 and eta > 0:
            xhat = xhat + s_noise * up * next(draws)
        x = alphas[i + 1] * xhat
    return x
