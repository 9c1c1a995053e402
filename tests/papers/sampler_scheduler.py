"""Sampler Scheduler. Cheng, "Sampler Scheduler for Diffusion Models", arXiv 2311.06845: one grid, several samplers in turn.

In the EDM frame, a = rho_s, b = rho_t, d = (x - D(x; a))/a, and D_prev the estimate at the level before (at c):

    euler   x + (b - a) d
    heun    y = x + (b - a) d;  x + (b - a) (d + d_y)/2              Euler to 0
    dpm2    m = sqrt(a b);  u = x + (m - a) d;  x + (b - a) d_u        Euler to 0
    dpm2a   dpm2 to b_down = b^2/a, then + sqrt(b^2 - b_down^2) z
    2m      h = ln(a/b), q = ln(c/a)/h;  (b/a) x + (1 - e^-h)(D + (D - D_prev)/(2 q));  D alone without D_prev, and to 0

D_prev is dropped at a switch (`history="restart"`) or kept, whoever made it ("keep"). Splitting: shares of the steps,
rounded at the boundaries. `lower` off: 2m's last step is 2m unless it ends at 0.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from tests.papers.common import Denoise, Levels, rho

PLANS = {
    "dpm2a-dpm2": [("dpm2a", 2 / 3), ("dpm2", 1 / 3)],
    "heun-dpmpp2m-euler": [("heun", 1 / 3), ("2m", 1 / 3), ("euler", 1 / 3)],
    "euler*1/2 + dpmpp_2m(lower_order_final=false)*1/2": [("euler", 1 / 2), ("2m", 1 / 2)],
}


def sample(
    denoise: Denoise,
    x: np.ndarray,
    alphas: Levels,
    sigmas: Levels,
    noise: Sequence[np.ndarray] = (),
    plan: str | Sequence[tuple[str, int]] = "dpm2a-dpm2",
    history: str = "restart",
    between: Callable[..., tuple[float, float]] | None = None,
) -> np.ndarray:
    draws = iter(noise)
    t = [rho(a, s) for a, s in zip(alphas, sigmas, strict=True)]
    n = len(t) - 1
    segments = PLANS[plan] if isinstance(plan, str) else plan
    names: list[str] = []
    for k, (name, steps) in enumerate(segments):
        end = round(n * sum(share for _, share in segments[: k + 1])) if steps < 1 else len(names) + int(steps)
        names += [name] * (end - len(names))
    d_prev: np.ndarray | None = None

    for i, name in enumerate(names):
        a, b = t[i], t[i + 1]
        x0 = denoise(x, alphas[i], sigmas[i])
        if math.isinf(a):
            last = b * next(draws) if name == "dpm2a" else b / sigmas[i] * x
            x, d_prev = alphas[i + 1] * (x0 + last), None
            continue
        xhat = x / alphas[i]
        d = (xhat - x0) / a
        old = d_prev if history == "keep" or (i > 0 and names[i - 1] == name) else None
        d_prev = x0
        if b == 0:
            xhat = x0
        elif name == "euler":
            xhat = xhat + (b - a) * d
        elif name == "heun":
            y = xhat + (b - a) * d
            xhat = xhat + (b - a) * (d + (y - denoise(alphas[i + 1] * y, alphas[i + 1], sigmas[i + 1])) / b) / 2
        elif name in ("dpm2", "dpm2a"):
            down = b * b / a if name == "dpm2a" else b
            m = math.sqrt(a * down)
            target = alphas[i + 1], alphas[i + 1] * down
            alpha_m, sigma_m = between(alphas[i], sigmas[i], *target, 0.5) if between else (alphas[i], alphas[i] * m)
            u = xhat + (m - a) * d
            xhat = xhat + (down - a) * (u - denoise(alpha_m * u, alpha_m, sigma_m)) / m
            if name == "dpm2a":
                xhat = xhat + math.sqrt(b * b - down * down) * next(draws)
        else:
            h = math.log(a / b)
            mean = x0 if old is None else x0 + (x0 - old) * h / (2 * math.log(t[i - 1] / a))
            xhat = b / a * xhat - math.expm1(-h) * mean
        x = alphas[i + 1] * xhat
    return x
