"""Multistep sampling of consistency models: jump to the data, add the next level's noise."""

from __future__ import annotations

import math
from typing import Any

from fastode.program import Form, Trace
from fastode.scalar import sqrt
from fastode.schedules.grid import Level
from fastode.solvers.stochastic import check_s_noise, renoised


def lcm(
    p: Trace,
    *,
    sigma_min: float = 0.0,
    sigma_data: float = 0.0,
    timestep_scaling: float = 10.0,
    s_noise: float = 1.0,
) -> Form:
    """Multistep consistency sampling (arXiv:2303.01469, Algorithm 1; LCM, arXiv:2310.04378): NFE 1 per step.

    x_t = alpha_t f(x) + sigma_t z with f the denoised estimate: of a consistency model, the end of the trajectory. All noise
    is fresh, so only the last evaluation counts for a model that is exact. ``sigma_min``: the EDM-frame noise that is left in
    f, taken off the fresh noise: sqrt(rho_t^2 - sigma_min^2) z. ``sigma_data`` (0.5 in LCM; 0: the network is a consistency
    function as it is) applies LCM's boundary condition f = c_skip x + c_out d with c_skip = sigma_data^2/(T^2 +
    sigma_data^2), c_out = T/sqrt(T^2 + sigma_data^2) at T = ``timestep_scaling`` times the label of the level.
    """
    for name, value in (("sigma_min", sigma_min), ("sigma_data", sigma_data)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}: must be a number of at least 0, got {value}")
    if not 0 < timestep_scaling < math.inf:
        raise ValueError(f"timestep_scaling: must be a positive number, got {timestep_scaling}")
    check_s_noise(p, s_noise)
    if sigma_min or sigma_data:
        p.consistent = False
    x = p.start()
    for _, s, t in p.grid.windows():
        d = p.denoise(x, s)
        if sigma_data:
            c_skip, c_out = _boundary(s, sigma_data, timestep_scaling)
            d = c_skip * x + c_out * d
        fresh = t.sigma
        if sigma_min and not t.is_data:
            if t.rho < sigma_min:
                raise ValueError(f"sigma_min: the grid goes below it, to {float(t.rho):.6g}, got {sigma_min}")
            fresh = sqrt(t.sigma**2 - (t.alpha * sigma_min) ** 2)
        x = p.land(renoised(p, t.alpha * d, fresh, s_noise), t)
    return x


def _boundary(s: Level, sigma_data: float, scaling: float) -> tuple[Any, Any]:
    size = (scaling * s.t) ** 2 + sigma_data**2
    return sigma_data**2 / size, scaling * s.t / sqrt(size)
