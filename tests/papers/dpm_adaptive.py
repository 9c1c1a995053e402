"""Adaptive DPM-Solver. Lu et al., arXiv 2206.00927, Appendix C, with the conventions of k-diffusion's sample_dpm_adaptive.

alpha = 1, lam = -ln sigma. A step of order 2 (3) and the step of order 1 (2) inside it give the error; the tolerance is
max(atol, rtol max(|low|, |low of the last accepted step|)); the norm is the root mean square over everything; the step is
multiplied by 1 + arctan(f - 1), f = (error + 1e-8)^(-1/order), and accepted if that is at least 0.81.
"""

import math

import numpy as np


def sample(denoise, x, sigma_max, sigma_min, order=3, rtol=0.05, atol=0.0078, h_init=0.05):
    """Returns (final state, accepted, rejected)."""

    def eps(y, lam):
        sigma = math.exp(-lam)
        return (y - denoise(y, 1.0, sigma)) / sigma

    def first(y, e, lam, lam_new):
        return y - math.exp(-lam_new) * math.expm1(lam_new - lam) * e

    s, end, h = -math.log(sigma_max), -math.log(sigma_min), h_init
    before, accepted, rejected = x, 0, 0
    while s < end - 1e-9:
        t = min(end, s + h)
        step = t - s
        e = eps(x, s)
        r1 = 1 / 2 if order == 2 else 1 / 3
        u = s + r1 * step
        e_u = eps(first(x, e, s, u), u)
        sigma_t = math.exp(-t)
        second = first(x, e, s, t) - sigma_t * math.expm1(step) / (2 * r1) * (e_u - e)
        if order == 2:
            low, high = first(x, e, s, t), second
        else:
            r2 = 2 / 3
            v = s + r2 * step
            c = math.exp(-v) * r2 / r1 * (math.expm1(r2 * step) / (r2 * step) - 1)
            e_v = eps(first(x, e, s, v) - c * (e_u - e), v)
            low, high = second, first(x, e, s, t) - sigma_t / r2 * (math.expm1(step) / step - 1) * (e_v - e)
        delta = np.maximum(atol, rtol * np.maximum(np.abs(low), np.abs(before)))
        error = math.sqrt(np.mean(((low - high) / delta) ** 2))
        factor = 1 + math.atan((error + 1e-8) ** (-1 / order) - 1)
        if factor >= 0.81:
            before, x, s, accepted = low, high, t, accepted + 1
        else:
            rejected += 1
        h *= factor
    return x, accepted, rejected
