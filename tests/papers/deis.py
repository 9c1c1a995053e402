"""DEIS. Zhang, Chen, "Fast Sampling of Diffusion Models with Exponential Integrator", arXiv 2204.13902: tAB-DEIS
and rhoAB-DEIS, with exact integrals; the polynomial in ln rho is diffusers' DEIS.

    x_t = alpha_t (x_s/alpha_s + sum_j w_j eps_j),   w_j = integral of l_j(u) drho from rho_s to rho_t,

l_j the Lagrange polynomials in u over the newest k = min(order, i+1) nodes, u = t, rho or ln rho. `order` counts the
stored evaluations: the paper's tAB3 is order=4. Here the integral is taken over rho with u = u(rho), by 24-point
Gauss-Legendre on panels [rho, 2 rho]: with u analytic there (singular near rho = 0 at most) the error is rounding.

`t_of_rho` (float to float, may be infinite at 0) gives the time for space="t"; its default is VP time, ln(1 + rho^2) =
beta_d t^2/2 + beta_min t through (t, rho) = (1e-3, 0.002) and (1, 80): diff-sampler's `edm2t`. One evaluation per step.

`lower_order_final` (diffusers): at most as many nodes as steps are left.
Step to sigma = 0: "rho" has nothing special; "t" uses t_of_rho(0) if finite, else first order; "lam" is first order.
Step from alpha = 0: DDIM, and that level is no node later.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np

from tests.papers.common import Denoise, Levels, ddim_step, eps_from_x0, rho

GAUSS_X, GAUSS_W = np.polynomial.legendre.leggauss(24)


def edm_time(r: float) -> float:
    low, high, eps_t = math.log1p(0.002**2), math.log1p(80.0**2), 1e-3
    beta_d = 2 * (low / eps_t - high) / (eps_t - 1)
    beta_min = high - beta_d / 2
    return (math.sqrt(beta_min**2 + 2 * beta_d * math.log1p(r**2)) - beta_min) / beta_d


def panels(rho_s: float, rho_t: float) -> list[tuple[float, float]]:
    """rho_s, rho_s/2, rho_s/4, ... down to rho_t; towards 0 the rest below 2^-60 rho_s is one panel."""
    edges = [rho_s]
    while edges[-1] / 2 > max(rho_t, rho_s * 2.0**-60):
        edges.append(edges[-1] / 2)
    edges.append(rho_t)
    return list(pairwise(edges))


def weights(u: Callable[[float], float], nodes: list[float], rho_s: float, rho_t: float) -> list[float]:
    """integral of l_j(u(rho)) drho over rho_s -> rho_t (negative direction); nodes are values of u."""
    w = [0.0] * len(nodes)
    for a, b in panels(rho_s, rho_t):
        for gauss_x, gauss_w in zip(GAUSS_X, GAUSS_W, strict=True):
            v = u(float((a + b) / 2 + (b - a) / 2 * gauss_x))
            for j in range(len(nodes)):
                ell = 1.0
                for k in range(len(nodes)):
                    if k != j:
                        ell *= (v - nodes[k]) / (nodes[j] - nodes[k])
                w[j] += float((b - a) / 2 * gauss_w) * ell
    return w


def sample(
    denoise: Denoise,
    x: np.ndarray,
    alphas: Levels,
    sigmas: Levels,
    order: int = 4,
    space: str = "t",
    t_of_rho: Callable[[float], float] = edm_time,
    lower_order_final: bool = False,
) -> np.ndarray:
    assert order >= 1 and space in ("t", "rho", "lam")
    u = {"t": t_of_rho, "rho": lambda r: r, "lam": math.log}[space]
    history: list[tuple[float, np.ndarray]] = []  # (u, eps) at the levels with finite rho, oldest first

    for i in range(len(alphas) - 1):
        alpha_s, sigma_s = float(alphas[i]), float(sigmas[i])
        alpha_t, sigma_t = float(alphas[i + 1]), float(sigmas[i + 1])
        x0 = denoise(x, alpha_s, sigma_s)
        if alpha_s == 0:
            x = ddim_step(x, x0, alpha_s, sigma_s, alpha_t, sigma_t)
            continue
        rho_s, rho_t = rho(alpha_s, sigma_s), rho(alpha_t, sigma_t)
        history.append((u(rho_s), eps_from_x0(x, x0, alpha_s, sigma_s)))

        left = len(alphas) - 1 - i
        newest = history[::-1][: min(order, left) if lower_order_final else order]
        if rho_t == 0 and (space == "lam" or not math.isfinite(u(0.0))):
            newest = newest[:1]
        w = weights(u, [node for node, _ in newest], rho_s, rho_t)
        xhat = x / alpha_s
        for w_j, (_, eps_j) in zip(w, newest, strict=True):
            xhat = xhat + w_j * eps_j
        x = alpha_t * xhat
    return x
