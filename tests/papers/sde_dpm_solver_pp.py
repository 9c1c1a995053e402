"""SDE-DPM-Solver++(1, 2M, 3M): Lu et al., arXiv 2211.01095, appendix; with eta as k-diffusion's `dpmpp_2m_sde`, `3m_sde`.

In the EDM frame (x = xhat), h = ln(a/b), e = (1 + eta) h, D1_0, D1, D2 the differences of the 2M and 3M formulas:

    x' = (b/a) e^{-eta h} x + (1 - e^{-e}) m_0 + correction + s_noise*b*sqrt(1 - e^{-2 eta h}) z
    2M midpoint: (1 - e^{-e})/2 D1_0;  heun: p2 D1_0, p2 = 1 - (1 - e^{-e})/e;  3M: p2 D1 - p3 D2, p3 = p2/e - 1/2

`exact`: 3M with 2 p3, 2M with p2. Order of a step as in dpm_solver_pp.py. A step to 0 returns m_0; one from a = inf
keeps nothing of x (eta > 0).
"""

import math
from collections.abc import Sequence

import numpy as np

from tests.papers.common import Denoise, Levels, rho


def sample(
    denoise: Denoise,
    x: np.ndarray,
    alphas: Levels,
    sigmas: Levels,
    noise: Sequence[np.ndarray] = (),
    order: int = 2,
    solver_type: str = "midpoint",
    eta: float = 1.0,
    s_noise: float = 1.0,
    lower_order_final: bool = True,
    exact: bool = False,
) -> np.ndarray:
    draws = iter(noise)
    n = len(alphas) - 1
    rhos = [rho(a, s) for a, s in zip(alphas, sigmas, strict=True)]
    m: list[np.ndarray] = []
    for i in range(n):
        a, b = rhos[i], rhos[i + 1]
        m.append(denoise(x, alphas[i], sigmas[i]))
        p = min(order, sum(math.isfinite(r) for r in rhos[: i + 1]))
        if lower_order_final:
            p = min(p, n - i)
        if b == 0:
            x = alphas[i + 1] * m[i]
            continue
        if math.isinf(a):
            x = alphas[i + 1] * (m[i] + (s_noise * b * next(draws) if eta else b / sigmas[i] * x))
            continue
        h = math.log(a / b)
        e = (1 + eta) * h
        p2 = 1 + math.expm1(-e) / e
        p3 = p2 / e - 0.5
        xhat = b / a * math.exp(-eta * h) * x / alphas[i] - math.expm1(-e) * m[i]
        if p >= 2:
            r0 = math.log(rhos[i - 1] / a) / h
            d1_0 = (m[i] - m[i - 1]) / r0
            if p == 2:
                xhat = xhat + (p2 if exact or solver_type == "heun" else -math.expm1(-e) / 2) * d1_0
            else:
                r1 = math.log(rhos[i - 2] / rhos[i - 1]) / h
                d1_1 = (m[i - 1] - m[i - 2]) / r1
                d1 = d1_0 + r0 / (r0 + r1) * (d1_0 - d1_1)
                d2 = (d1_0 - d1_1) / (r0 + r1)
                xhat = xhat + p2 * d1 - (2 * p3 if exact else p3) * d2
        if eta:
            xhat = xhat + s_noise * b * math.sqrt(-math.expm1(-2 * eta * h)) * next(draws)
        x = alphas[i + 1] * xhat
    return x
