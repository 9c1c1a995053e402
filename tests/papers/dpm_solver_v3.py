"""DPM-Solver-v3 (arXiv:2310.13268, Algorithms 1 and 2) in plain NumPy, unfolded: cumulative tables, g, derivatives, steps.

``lam``, ``l``, ``s``, ``b``: statistics [N + 1, *sample]; ``at``: indices of the levels among them; trapezoids throughout.
"""

from math import factorial

import numpy as np


def cumulative(y, lam):
    steps = np.diff(lam).reshape(-1, *[1] * (y.ndim - 1))
    return np.concatenate([np.zeros_like(y[:1]), np.cumsum((y[1:] + y[:-1]) / 2 * steps, axis=0)])


def sample(
    denoise, x, alphas, sigmas, at, lam, l, s, b, *, order=3, p_pseudo=False, corrector=True, c_pseudo=False,
    lower_order_final=True,
):  # fmt: skip
    big_l, big_s = cumulative(l, lam), cumulative(s, lam)
    big_i = cumulative(np.exp(big_l + big_s), lam)
    big_b = cumulative(np.exp(-big_s) * b, lam)
    big_c = cumulative(np.exp(big_l + big_s) * big_b, lam)

    def step(x_s, f, i, j, nodes, pseudo):
        s_, t_ = at[i], at[j]
        g = [np.exp(big_s[s_] - big_s[at[k]]) * f[k] - np.exp(big_s[s_]) * (big_b[at[k]] - big_b[s_]) for k in nodes]
        offsets = [lam[at[k]] - lam[s_] for k in nodes]
        n = len(nodes) - 1
        if pseudo:
            table = [list(g)]
            for k in range(1, n + 1):
                old = table[-1]
                table.append([(old[j + 1] - old[j]) / (offsets[j + k] - offsets[j]) for j in range(n + 1 - k)])
            derivatives = [factorial(k) * table[k][0] for k in range(n + 1)]
        else:
            matrix = np.array([[offsets[j] ** k / factorial(k) for k in range(1, n + 1)] for j in range(1, n + 1)])
            rest = np.linalg.solve(matrix, np.stack([v - g[0] for v in g[1:]]).reshape(n, -1)) if n else []
            derivatives = [g[0], *(r.reshape(np.shape(g[0])) for r in rest)]
        part = slice(s_, t_ + 1)
        u = (lam[part] - lam[s_]).reshape(-1, *[1] * (l.ndim - 1))
        weight = np.exp(big_l[part] + big_s[part] - big_l[s_] - big_s[s_])
        total = np.exp(-big_l[s_]) * (big_c[t_] - big_c[s_] - big_b[s_] * (big_i[t_] - big_i[s_]))
        for k, d in enumerate(derivatives):
            total = total + cumulative(weight * u**k / factorial(k), lam[part])[-1] * d
        return alphas[j] * np.exp(big_l[s_] - big_l[t_]) * (x_s / alphas[i] - total)

    steps, f, x_last, last = len(at) - 1, [], None, 0
    for m in range(steps):
        noise = (x - alphas[m] * denoise(x, alphas[m], sigmas[m])) / sigmas[m]
        f.append((sigmas[m] * noise - l[at[m]] * x) / alphas[m])
        q = last + c_pseudo
        if corrector and m and q > 1:
            x = step(x_last, f, m - 1, m, [m - 1, m, *range(m - 2, m - q, -1)], c_pseudo)
        p = min(m + 1, order)
        if lower_order_final:
            p = min(p, steps - m)
        x_last, last = x, p
        x = step(x, f, m, m + 1, list(range(m, m - p, -1)), p_pseudo)
    return x
