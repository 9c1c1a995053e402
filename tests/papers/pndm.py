"""PNDM. Liu, Ren, Lin, Zhao, "Pseudo Numerical Methods for Diffusion Models on Manifolds", arXiv 2202.09778,
S-PNDM and F-PNDM; `skip_prk_steps` as in diffusers (Stable Diffusion's PLMS).

    phi(x, e; t -> s) = alpha_s/alpha_t x + (sigma_s - alpha_s sigma_t/alpha_t) e          (one DDIM step)

    PRK (4 evaluations): (e1 + 2 e2 + 2 e3 + e4)/6, e1 = eps(x, t), e2 = eps(phi(x, e1; t -> m), m),
        e3 = eps(phi(x, e2; t -> m), m), e4 = eps(phi(x, e3; t -> t'), t')
    improved Euler (2 evaluations): (e1 + e2)/2, e2 = eps(phi(x, e1; t -> t'), t')
    PLMS-2, 3, 4 (1 evaluation): (3, -1)/2; (23, -16, 5)/12; (55, -59, 37, -9)/24 over the stored e1, newest first

skip_prk_steps=False is F-PNDM: the first three steps PRK (all of them if there are fewer), then PLMS-4; n + 9
evaluations. True: first step improved Euler, then PLMS-2, 3, 4, 4, ...; n + 1 evaluations. order=2 with it is S-PNDM.
Only the first-stage e1 enter the history. `between_t(i)` is the half level of step i; the default is the middle in rho
and in alpha. A warm-up step to sigma = 0 or from alpha = 0 is DDIM with e1 (which stays in the history) and still
counts as one of the warm-up steps; a PLMS step to sigma = 0 is like any other.
"""

from collections.abc import Callable

import numpy as np

from tests.papers.common import Denoise, Levels, ddim_step, eps_from_x0, rho


def sample(
    denoise: Denoise,
    x: np.ndarray,
    alphas: Levels,
    sigmas: Levels,
    skip_prk_steps: bool = False,
    between_t: Callable[[int], tuple[float, float]] | None = None,
    order: int = 4,
) -> np.ndarray:
    assert order in (1, 2, 3, 4)

    def middle(i: int) -> tuple[float, float]:
        alpha = (float(alphas[i]) + float(alphas[i + 1])) / 2
        rho_m = (rho(float(alphas[i]), float(sigmas[i])) + rho(float(alphas[i + 1]), float(sigmas[i + 1]))) / 2
        return alpha, alpha * rho_m

    def eps_at(x: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
        return eps_from_x0(x, denoise(x, alpha, sigma), alpha, sigma)

    def phi(x: np.ndarray, e: np.ndarray, alpha_t: float, sigma_t: float, alpha_s: float, sigma_s: float) -> np.ndarray:
        return alpha_s / alpha_t * x + (sigma_s - alpha_s * sigma_t / alpha_t) * e

    ets: list[np.ndarray] = []
    for i in range(len(alphas) - 1):
        alpha_s, sigma_s = float(alphas[i]), float(sigmas[i])
        alpha_t, sigma_t = float(alphas[i + 1]), float(sigmas[i + 1])
        x0 = denoise(x, alpha_s, sigma_s)
        e1 = eps_from_x0(x, x0, alpha_s, sigma_s)
        ets.append(e1)
        warm_up = i < (1 if skip_prk_steps else 3)
        if alpha_s == 0 or (warm_up and sigma_t == 0):
            x = ddim_step(x, x0, alpha_s, sigma_s, alpha_t, sigma_t)
            continue
        if warm_up and skip_prk_steps:
            e2 = eps_at(phi(x, e1, alpha_s, sigma_s, alpha_t, sigma_t), alpha_t, sigma_t)
            e = (e1 + e2) / 2
        elif warm_up:
            alpha_m, sigma_m = (between_t or middle)(i)
            e2 = eps_at(phi(x, e1, alpha_s, sigma_s, alpha_m, sigma_m), alpha_m, sigma_m)
            e3 = eps_at(phi(x, e2, alpha_s, sigma_s, alpha_m, sigma_m), alpha_m, sigma_m)
            e4 = eps_at(phi(x, e3, alpha_s, sigma_s, alpha_t, sigma_t), alpha_t, sigma_t)
            e = (e1 + 2 * e2 + 2 * e3 + e4) / 6
        else:
            k = min(order, len(ets))
            if k == 1:
                e = ets[-1]
            elif k == 2:
                e = (3 * ets[-1] - ets[-2]) / 2
            elif k == 3:
                e = (23 * ets[-1] - 16 * ets[-2] + 5 * ets[-3]) / 12
            else:
                e = (55 * ets[-1] - 59 * ets[-2] + 37 * ets[-3] - 9 * ets[-4]) / 24
        x = phi(x, e, alpha_s, sigma_s, alpha_t, sigma_t)
    return x
