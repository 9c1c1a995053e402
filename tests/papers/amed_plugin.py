"""AMED as a plug-in (arXiv 2312.00094, section 3.4) on Euler, DPM-Solver-2, iPNDM and DPM-Solver++, in the EDM frame.

Every step from t to t' is cut at tau = t'^r t^(1-r); r, c and a are arrays [n, B], per step and sample. ``d(x, sigma)`` takes
sigma [B, 1]. The evaluation at tau is told a tau, its direction is divided by tau; c multiplies what the second half adds to
the state, in DPM-Solver++ all but the term of x.
"""

import itertools

import numpy as np

AB = {1: (1,), 2: (1.5, -0.5), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}


def inner(t, tn, r):
    return tn**r * t ** (1 - r)


def euler(d, x, rho, r, c, a):
    for i, (t, tn) in enumerate(itertools.pairwise(rho)):
        tau = inner(t, tn, r[i][:, None])
        y = x + (tau - t) * (x - d(x, t)) / t
        x = y + c[i][:, None] * (tn - tau) * (y - d(y, a[i][:, None] * tau)) / tau
    return x


def dpm_solver_2(d, x, rho, r, c, a):
    for i, (t, tn) in enumerate(itertools.pairwise(rho)):
        r_i = r[i][:, None]
        tau = inner(t, tn, r_i)
        e = (x - d(x, t)) / t
        y = x + (tau - t) * e
        e_mid = (y - d(y, a[i][:, None] * tau)) / tau
        x = x + c[i][:, None] * (tn - t) * (e_mid / (2 * r_i) + (1 - 1 / (2 * r_i)) * e)
    return x


def ipndm(d, x, rho, r, c, a, order=4):
    history = []

    def push(e):
        history.insert(0, e)
        del history[order:]
        return sum(w * h for w, h in zip(AB[len(history)], history, strict=True))

    for i, (t, tn) in enumerate(itertools.pairwise(rho)):
        tau = inner(t, tn, r[i][:, None])
        x = x + (tau - t) * push((x - d(x, t)) / t)
        x = x + c[i][:, None] * (tn - tau) * push((x - d(x, a[i][:, None] * tau)) / tau)
    return x


def dpm_solver_pp(d, x, rho, r, c, a, order=2, prediction="x0"):
    """Multistep 2M (midpoint) and first order, lower_order_final, on the refined levels; sigma-frame formulas."""
    stored, levels, total = [], [], 2 * (len(rho) - 1)

    def step(x, m, s, t, c, number):
        stored.insert(0, m)
        levels.insert(0, s)
        k = min(order, len(stored), total - number)
        h = np.log(s / t)
        gain, scale = (t / s, -np.expm1(-h)) if prediction == "x0" else (1.0, -t * np.expm1(h))
        slope = m
        if k == 2:
            slope = m + (m - stored[1]) / (2 * np.log(levels[1] / s) / h)
        return gain * x + c * scale * slope

    for i, (t, tn) in enumerate(itertools.pairwise(rho)):
        tau = inner(t, tn, r[i][:, None])
        m = d(x, t)
        t_col = np.full_like(tau, t)
        x = step(x, m if prediction == "x0" else (x - m) / t, t_col, tau, 1.0, 2 * i)
        m = d(x, a[i][:, None] * tau)
        x = step(x, m if prediction == "x0" else (x - m) / tau, tau, np.full_like(tau, tn), c[i][:, None], 2 * i + 1)
    return x
