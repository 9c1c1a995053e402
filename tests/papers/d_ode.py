"""D-ODE solvers (arXiv:2309.16421) in plain NumPy, with their lambdas given. ``x`` starts at the first level."""

from itertools import pairwise

import numpy as np

ADAMS_BASHFORTH = {1: [1], 2: [3 / 2, -1 / 2], 3: [23 / 12, -16 / 12, 5 / 12], 4: [55 / 24, -59 / 24, 37 / 24, -9 / 24]}


def noise_multistep(denoise, x, alphas, sigmas, lambdas, order):
    """D-DDIM (order 1) and D-iPNDM: the DDIM step with the combined noise O, and lambda (O - O_last)."""
    noises, last = [], x / np.hypot(alphas[0], sigmas[0])
    for i in range(len(alphas) - 1):
        noises.insert(0, (x - alphas[i] * denoise(x, alphas[i], sigmas[i])) / sigmas[i])
        weights = ADAMS_BASHFORTH[min(order, len(noises))]
        o = sum(w * e for w, e in zip(weights, noises, strict=False))
        gain = alphas[i + 1] / alphas[i]
        x = gain * x + (sigmas[i + 1] - gain * sigmas[i]) * o + lambdas[i] * (o - last)
        last = o
    return x


def edm_euler(denoise, x, sigmas, lambdas):
    """D-DDIM in the EDM frame."""
    last = None
    for i, (s, t) in enumerate(pairwise(sigmas)):
        d = denoise(x, 1.0, s)
        x = x + (t - s) * (x - d) / s + (0 if last is None else lambdas[i] * (d - last))
        last = d
    return x


def edm_heun(denoise, x, sigmas, lambdas):
    """D-EDM: lambdas of the Euler and the Heun stage in turn."""
    last, k = None, 0
    for s, t in pairwise(sigmas):
        d = denoise(x, 1.0, s)
        slope = (x - d) / s
        y = x + (t - s) * slope + (0 if last is None else lambdas[k] * (d - last))
        last, k = d, k + 1
        if t == 0:
            return y
        d = denoise(y, 1.0, t)
        x = x + (t - s) * (slope + (y - d) / t) / 2 + lambdas[k] * (d - last)
        last, k = d, k + 1
    return x


def dpm_solver(denoise, x, alphas, sigmas, between, lambdas, order):
    """D-DPM-Solver-2 and -3 (noise prediction, single step): lambdas are gains of the terms of the step."""
    last, k = x / np.hypot(alphas[0], sigmas[0]), 0

    def noise(y, a, s):
        return (y - a * denoise(y, a, s)) / s

    for i in range(len(alphas) - 1):
        a_s, s_s, a_t, s_t = alphas[i], sigmas[i], alphas[i + 1], sigmas[i + 1]
        h = np.log(a_t / s_t) - np.log(a_s / s_s)
        m = noise(x, a_s, s_s)
        r1, r2 = (0.5, None) if order == 2 else (1 / 3, 2 / 3)
        a_1, s_1 = between(a_s, s_s, a_t, s_t, r1)
        x1 = a_1 / a_s * x - s_1 * np.expm1(r1 * h) * (m + lambdas[k] * (m - last))
        m1 = noise(x1, a_1, s_1)
        if order == 2:
            x = a_t / a_s * x - s_t * np.expm1(h) * m - s_t * np.expm1(h) / (2 * r1) * (1 + lambdas[k + 1]) * (m1 - m)
            last, k = m1, k + 2
            continue
        a_2, s_2 = between(a_s, s_s, a_t, s_t, r2)
        phi = [np.expm1(z) / z - 1 for z in (r2 * h, h)]
        x2 = a_2 / a_s * x - s_2 * np.expm1(r2 * h) * m - r2 / r1 * s_2 * phi[0] * (1 + lambdas[k + 1]) * (m1 - m)
        m2 = noise(x2, a_2, s_2)
        x = a_t / a_s * x - s_t * np.expm1(h) * m - s_t * phi[1] / r2 * ((m2 - m) + lambdas[k + 2] * (m2 - m1))
        last, k = m2, k + 3
    return x
