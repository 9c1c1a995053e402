"""SA-Solver. Xue et al., "SA-Solver: Stochastic Adams Solver for Fast Sampling of Diffusion Models", arXiv 2309.05019,
Algorithm 1, data prediction, tau constant on a step (0 outside [s_tmin, s_tmax]).

    x_t = sigma_t/sigma_s e^{-tau^2 h} x_s
          + sum_j d_j sigma_t int_{lam_s}^{lam_t} e^{-tau^2 (lam_t - lam)} (1 + tau^2) e^{lam} l_j(lam) dlam
          + sigma_t sqrt(1 - e^{-2 tau^2 h}) z

over the Lagrange basis l_j on the nodes: lam_s, lam_{s-1}, ... (predictor), with lam_t in front (corrector, same z). The
integrals are done by Gauss-Legendre quadrature. Two nodes, as published: the integral of (lam - lam_s) e^{...} in them is
replaced by h^2/2 at the end's weight; `exact` does not. History: evaluations at predicted points. Step i of n: predictor
order min(p, i + 1), with lower_order_final also <= n - i; corrector order min(q, i + 2), also <= n - i + 1.
A step to sigma = 0 or from alpha = 0 is of order 1 and not corrected.
"""

import math
from collections.abc import Sequence

import numpy as np

from tests.papers.common import Denoise, Levels, lam, rho

X, W = np.polynomial.legendre.leggauss(60)


def weights(nodes: list[float], lam_s: float, lam_t: float, tau: float, exact: bool) -> list[float]:
    """In units of alpha_t."""
    h = lam_t - lam_s
    u = lam_s + h * (X + 1) / 2
    decay = (1 + tau**2) * np.exp(-(1 + tau**2) * (lam_t - u)) * W * h / 2
    if len(nodes) == 2 and not exact:
        total = decay.sum()
        first = (1 + tau**2) * h**2 / 2  # of (lam - lam_s)
        w0 = (first + (lam_s - nodes[1]) * total) / (nodes[0] - nodes[1])
        return [w0, total - w0]
    basis = []
    for j, node in enumerate(nodes):
        value = np.ones_like(u)
        for other in nodes[:j] + nodes[j + 1 :]:
            value = value * (u - other) / (node - other)
        basis.append(value)
    return [float((decay * b).sum()) for b in basis]


def sample(
    denoise: Denoise,
    x: np.ndarray,
    alphas: Levels,
    sigmas: Levels,
    noise: Sequence[np.ndarray] = (),
    predictor_order: int = 2,
    corrector_order: int = 2,
    tau: float = 1.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    lower_order_final: bool = True,
    exact: bool = False,
) -> np.ndarray:
    draws = iter(noise)
    n = len(alphas) - 1
    lams = [lam(a, s) for a, s in zip(alphas, sigmas, strict=True)]
    rhos = [rho(a, s) for a, s in zip(alphas, sigmas, strict=True)]
    first = 1 if math.isinf(rhos[0]) else 0
    m: list[np.ndarray] = []
    base, fresh, last_tau = x, x, 0.0  # of the last step, for its corrector
    for i in range(n):
        m.append(denoise(x, alphas[i], sigmas[i]))
        if i > first and corrector_order:
            q = min(corrector_order, i + 1 - first)  # i - 1 steps were done at the last step
            if lower_order_final:
                q = min(q, n - i + 2)
            nodes = [lams[i - j] for j in range(q)]
            w = weights(nodes, lams[i - 1], lams[i], last_tau, exact)
            x = base + alphas[i] * sum(c * m[i - j] for j, c in enumerate(w)) + fresh
        here = tau if s_tmin <= rhos[i] <= s_tmax else 0.0
        if sigmas[i + 1] == 0:
            x = alphas[i + 1] * m[i]
            continue
        if i < first:
            x = alphas[1] * m[0] + (s_noise * sigmas[1] * next(draws) if here else sigmas[1] / sigmas[0] * x)
            continue
        p = min(predictor_order, i + 1 - first)
        if lower_order_final:
            p = min(p, n - i)
        h = lams[i + 1] - lams[i]
        w = weights([lams[i - j] for j in range(p)], lams[i], lams[i + 1], here, exact)
        base = sigmas[i + 1] / sigmas[i] * math.exp(-(here**2) * h) * x
        fresh = np.zeros_like(x)
        if here:
            fresh = s_noise * sigmas[i + 1] * math.sqrt(-math.expm1(-2 * here**2 * h)) * next(draws)
        x = base + alphas[i + 1] * sum(c * m[i - j] for j, c in enumerate(w)) + fresh
        last_tau = here
    return x
