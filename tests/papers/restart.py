"""Restart. Xu et al., "Restart Sampling for Improving Generative Processes", arXiv 2306.14878, Algorithm 2.

In the EDM frame. Main grid as given; an interval (N_R, K, t_min, t_max) fires at the positive main level nearest to t_min:
K times, x <- x + s_noise sqrt(t_max^2 - t_min^2) z, then Heun over N_R levels of the rho = 7 grid from t_max to that level
(N_R - 1 steps). With gamma > 0 a step of a round that starts at t in [s_tmin, s_tmax] first goes up to t (1 + gamma), by
s_noise times the noise that takes. Heun: Euler in a step to 0. NFE (2 N - 1) + sum K 2 (N_R - 1).

`base`: "edm", or "dpm_solver_2(r=...)" for steps of that method.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from tests.papers.common import Denoise, Levels, ddim_step, rho


def sample(
    denoise: Denoise,
    x: np.ndarray,
    alphas: Levels,
    sigmas: Levels,
    noise: Sequence[np.ndarray] = (),
    base: str = "edm",
    intervals: Sequence[tuple[int, int, float, float]] = (),
    s_noise: float = 1.0,
    gamma: float = 0.0,
    s_tmin: float = 0.01,
    s_tmax: float = 1.0,
) -> np.ndarray:
    draws = iter(noise)
    t = [rho(a, s) for a, s in zip(alphas, sigmas, strict=True)]
    alpha = dict(
        zip(t, (float(a) for a in alphas), strict=True)
    )  # where a main level is evaluated; else any frame will do
    r = float(base[len("dpm_solver_2(r=") : -1]) if base != "edm" else None

    def network(xhat: np.ndarray, s: float) -> np.ndarray:
        a = alpha.get(s, 1 / (1 + s))
        return denoise(a * xhat, a, a * s)

    def step(x: np.ndarray, s: float, u: float) -> np.ndarray:
        d = (x - network(x, s)) / s
        euler = x + (u - s) * d
        if u == 0:
            return euler
        if r is None:
            return x + (u - s) * (d + (euler - network(euler, u)) / u) / 2
        m = u**r * s ** (1 - r)
        y = x + (m - s) * d
        return x + (u - s) * (d + ((y - network(y, m)) / m - d) / (2 * r))

    first = 0
    if alphas[0] == 0:
        x = ddim_step(x, denoise(x, alphas[0], sigmas[0]), alphas[0], sigmas[0], alphas[1], sigmas[1])
        first = 1
    x = x / alphas[first]
    fire = {}
    for interval in intervals:
        positive = [i for i in range(1, len(t)) if t[i] > 0]
        fire[min(positive, key=lambda i: abs(t[i] - interval[2]))] = interval
    for i in range(first, len(t) - 1):
        x = step(x, t[i], t[i + 1])
        if i + 1 in fire:
            n, rounds, _, top = fire[i + 1]
            low = t[i + 1]
            levels = [(top ** (1 / 7) + j / (n - 1) * (low ** (1 / 7) - top ** (1 / 7))) ** 7 for j in range(n - 1)] + [
                low
            ]
            for _ in range(rounds):
                x = x + s_noise * math.sqrt(top**2 - low**2) * next(draws)
                for s, u in pairwise(levels):
                    start = s
                    if gamma > 0 and s_tmin <= s <= s_tmax:
                        start = s * (1 + gamma)
                        x = x + s_noise * math.sqrt(start**2 - s**2) * next(draws)
                    x = step(x, start, u)
    return alphas[-1] * x
