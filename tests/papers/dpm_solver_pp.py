"""Multistep DPM-Solver++(1M, 2M, 3M). Lu et al., "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion
Probabilistic Models", arXiv 2211.01095, Algorithm 2 (2M, midpoint); 3M as in the authors' code.

m_0, m_1, m_2 newest first, h = lam_t - lam_s, r0 = (lam_s - lam_{s-1})/h, r1 = (lam_{s-1} - lam_{s-2})/h:

    D1_0 = (m_0 - m_1)/r0, D1_1 = (m_1 - m_2)/r1, D1 = D1_0 + r0/(r0+r1) (D1_0 - D1_1), D2 = (D1_0 - D1_1)/(r0+r1)
    x0:  sigma_t/sigma_s x + c0 m_0, c0 = -alpha_t (e^{-h} - 1), c1 = +alpha_t ((e^{-h} - 1)/h + 1),
         c2 = -alpha_t ((e^{-h} - 1 + h)/h^2 - 1/2)
    eps: alpha_t/alpha_s x + c0 m_0, c0 = -sigma_t (e^{ h} - 1), c1 = -sigma_t ((e^{ h} - 1)/h - 1),
         c2 = -sigma_t ((e^h - 1 - h)/h^2 - 1/2)
    2M midpoint: + c0/2 D1_0;   2M heun: + c1 D1_0;   3M: + c1 D1 + c2 D2

D2 is half the second derivative (times h^2), so published 3M is of order 2; `exact=True` uses 2*c2, and heun for every
order-2 step: the exponential Adams-Bashforth method of that order.

Order of step i of n: min(order, i+1), with lower_order_final also <= n-i (any n). A step to sigma = 0 or from alpha = 0
is first order, and a level with alpha = 0 is not used as an older node. One evaluation per step.
"""

import math

import numpy as np

from tests.papers.common import Denoise, Levels, ddim_step, eps_from_x0, lam


def sample(
    denoise: Denoise,
    x: np.ndarray,
    alphas: Levels,
    sigmas: Levels,
    order: int = 2,
    prediction: str = "x0",
    lower_order_final: bool = True,
    solver_type: str = "midpoint",
    exact: bool = False,
) -> np.ndarray:
    assert order in (1, 2, 3) and prediction in ("x0", "eps") and solver_type in ("midpoint", "heun")
    n = len(alphas) - 1
    lams = [lam(float(a), float(s)) for a, s in zip(alphas, sigmas, strict=True)]
    outputs: list[np.ndarray] = []  # m at levels 0..i

    for i in range(n):
        alpha_s, sigma_s = float(alphas[i]), float(sigmas[i])
        alpha_t, sigma_t = float(alphas[i + 1]), float(sigmas[i + 1])
        x0 = denoise(x, alpha_s, sigma_s)
        outputs.append(x0 if prediction == "x0" else eps_from_x0(x, x0, alpha_s, sigma_s))

        p = min(order, i + 1)
        if lower_order_final:
            p = min(p, n - i)
        p = min(p, sum(math.isfinite(v) for v in lams[: i + 1]))
        if sigma_t == 0 or alpha_s == 0 or p == 1:
            x = ddim_step(x, x0, alpha_s, sigma_s, alpha_t, sigma_t)
            continue

        h = lams[i + 1] - lams[i]
        if prediction == "x0":
            c0 = -alpha_t * math.expm1(-h)
            c1 = alpha_t * (math.expm1(-h) / h + 1)
            c2 = -alpha_t * ((math.expm1(-h) + h) / h**2 - 0.5)
            x = sigma_t / sigma_s * x + c0 * outputs[i]
        else:
            c0 = -sigma_t * math.expm1(h)
            c1 = -sigma_t * (math.expm1(h) / h - 1)
            c2 = -sigma_t * ((math.expm1(h) - h) / h**2 - 0.5)
            x = alpha_t / alpha_s * x + c0 * outputs[i]
        if exact:
            c2 = 2 * c2

        r0 = (lams[i] - lams[i - 1]) / h
        d1_0 = (outputs[i] - outputs[i - 1]) / r0
        if p == 2:
            x = x + (c1 if exact or solver_type == "heun" else c0 / 2) * d1_0
        else:
            r1 = (lams[i - 1] - lams[i - 2]) / h
            d1_1 = (outputs[i - 1] - outputs[i - 2]) / r1
            d1 = d1_0 + r0 / (r0 + r1) * (d1_0 - d1_1)
            d2 = (d1_0 - d1_1) / (r0 + r1)
            x = x + c1 * d1 + c2 * d2
    return x
