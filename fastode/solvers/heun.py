"""Heun's method in the EDM frame: the sampler of Karras et al."""

from __future__ import annotations

from fastode.program import Form, Trace
from fastode.solvers.coefficients import ddim_step, eps_of, is_first_order


def heun(p: Trace) -> Form:
    """Heun's trapezoidal rule for dx/drho = eps (arXiv:2206.00364, Algorithm 1 without churn): order 2, NFE 2 per step.

    With e = (x - alpha_s d)/sigma_s and e' the same at the Euler point on level t,

        x_t/alpha_t = x/alpha_s + (rho_t - rho_s)(e + e')/2 .

    A step to sigma = 0 (or from alpha = 0) is the first-order step, one evaluation. On a grid that ends at 0 this is EDM's
    sampler with 2n - 1 evaluations; on a grid that ends at sigma_min every step is corrected.
    """
    x = p.start()
    for _, s, t in p.grid.windows():
        d = p.denoise(x, s)
        if is_first_order(s, t):
            x = p.land(ddim_step(x, d, s, t), t)
            continue
        euler = p.inner(ddim_step(x, d, s, t), t)
        half = (t.rho - s.rho) / 2
        first = p.keep(x / s.alpha + half * eps_of(x, d, s))  # one buffer instead of x and d
        x = p.land(t.alpha * (first + half * eps_of(euler, p.denoise(euler, t), t)), t)
    return x


def edm(p: Trace) -> Form:
    """EDM's deterministic sampler: Heun with the last step to sigma = 0 (arXiv:2206.00364, Algorithm 1).

    The same rule as :func:`heun`; its usual grid is ``karras(schedule, steps, final="zero")``, NFE 2 steps - 1.
    """
    return heun(p)
