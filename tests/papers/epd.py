"""EPD-Solver and EPD-Plugin. Zhu et al., arXiv 2507.14797. EDM frame: levels t, states x = x0 + t n, D(x, t).

Per step from t to t', h = t' - t: d = (x - D(x, t))/t (first step: x/sqrt(1 + t^2), no evaluation, with AFS); then for each
point k: tau = t'^r t^(1-r), y = x + (tau - t) d, e_k = (y - D(y, a tau))/tau; x' = x + h sum_k w_k c_k e_k.
The plugin replaces d by Adams-Bashforth over the directions d of the steps so far (equal-step weights, at most `order`).
"""

import math

import numpy as np

AB = {1: [1.0], 2: [1.5, -0.5], 3: [23 / 12, -16 / 12, 5 / 12], 4: [55 / 24, -59 / 24, 37 / 24, -9 / 24]}


def sample(denoise, x, levels, r, w, c, a, *, afs=True, order=1):
    past = []
    for i in range(len(levels) - 1):
        t, t_next = levels[i], levels[i + 1]
        d = x / math.sqrt(1 + t * t) if afs and i == 0 else (x - denoise(x, t)) / t
        past.insert(0, d)
        weights = AB[min(order, len(past))]
        slope = sum(weight * old for weight, old in zip(weights, past, strict=False))
        total = np.zeros_like(x)
        for k in range(len(r[i])):
            tau = t_next ** r[i][k] * t ** (1 - r[i][k])
            y = x + (tau - t) * slope
            total = total + w[i][k] * c[i][k] * (y - denoise(y, a[i][k] * tau)) / tau
        x = x + (t_next - t) * total
    return x
