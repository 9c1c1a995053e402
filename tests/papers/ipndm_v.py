"""iPNDM_v: variable-step Adams-Bashforth in rho as diff-sampler (zju-pi) evaluates it. No paper of its own; published
with Zhou et al., "Fast ODE-based Sampling for Diffusion Models in Around 5 Steps", arXiv 2312.00094.

h, h1, h2, h3 the signed steps in rho, newest (to be taken) first; w = h/h1, q1 = h1/h2, q2 = h2/h3,
p = h1 (h1+h2)/(h2 (h2+h3)); xhat' = xhat + h * sum_j a_j eps_j:

    order 2: a = [1 + w/2, -w/2];  order 3 adds T1 [1, -(1+q1), q1];  order 4 adds T2 [1, -(1+q1+p), q1+p(1+q2), -p Q]

`exact=True` has the T1, T2, Q of true variable-step Adams-Bashforth; the default those of the published results: a
parenthesis in T1, a sign in T2, q1 for q2 in Q. One evaluation per step, nothing special at sigma = 0. Step from
alpha = 0: DDIM, and that level is no node later (its step is infinite).
"""

import numpy as np

from tests.papers.common import Denoise, Levels, ddim_step, eps_from_x0, rho


def sample(
    denoise: Denoise, x: np.ndarray, alphas: Levels, sigmas: Levels, order: int = 4, exact: bool = False
) -> np.ndarray:
    assert order in (1, 2, 3, 4)
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

        k = min(order, len(rhos))
        h = rho(alpha_t, sigma_t) - rhos[-1]
        a = [1.0, 0.0, 0.0, 0.0]
        if k >= 2:
            h1 = rhos[-1] - rhos[-2]
            w = h / h1
            a[0] += w / 2
            a[1] -= w / 2
        if k >= 3:
            h2 = rhos[-2] - rhos[-3]
            q1 = h1 / h2
            if exact:
                t1 = (1 - h / (3 * (h + h1))) / 2 * h * (h + h1) / (h1 * (h1 + h2))
            else:
                t1 = 1 / 2 - h**2 / (6 * h1 * (h1 + h2))
            a[0] += t1
            a[1] -= t1 * (1 + q1)
            a[2] += t1 * q1
        if k == 4:
            h3 = rhos[-3] - rhos[-4]
            q2 = h2 / h3
            p = h1 * (h1 + h2) / (h2 * (h2 + h3))
            sign = -1 if exact else 1
            t2 = (1 - h / (3 * (h + h1))) / 2 + sign * (1 - h / (2 * (h + h1))) * h / (6 * (h + h1 + h2))
            t2 *= h * (h + h1) * (h + h1 + h2) / (h1 * (h1 + h2) * (h1 + h2 + h3))
            a[0] += t2
            a[1] -= t2 * (1 + q1 + p)
            a[2] += t2 * (q1 + p * (1 + q2))
            a[3] -= t2 * p * (q2 if exact else q1)
        xhat = x / alpha_s
        for j in range(k):
            xhat = xhat + h * a[j] * eps[-1 - j]
        x = alpha_t * xhat
    return x
