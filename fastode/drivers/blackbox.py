"""Other people's integrators for the probability flow: scipy.integrate.solve_ivp and torchdiffeq."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor

from fastode.drivers.embedded import Clock
from fastode.schedules.grid import Level

if TYPE_CHECKING:
    from fastode.drivers.stepping import Field, Run


def solve(
    clock: Clock,
    field: Field,
    x: Tensor,
    t_start: float,
    t_end: float,
    *,
    method: str,
    rtol: float,
    atol: float,
    integral: bool,
) -> Run:
    """RK45 on one flat vector: the states of the whole batch, then (``integral``) one accumulator per sample.

    "scipy" keeps the vector in float64 on the host, as score-SDE does; "torchdiffeq" in the state's dtype on its device. The
    error norm is the root mean square over the vector, so samples share their steps.
    """
    from fastode.drivers.stepping import Run

    shape, batch, calls = x.shape, len(x), 0

    def velocity(t: Any, flat: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        alpha, sigma, a, b = (float(v) for v in clock.levels(torch.as_tensor(t, dtype=torch.float64).cpu()))
        state = flat[: x.numel()].reshape(shape).to(device=x.device, dtype=x.dtype)
        d, q = field(state, [Level(alpha, sigma)], None)
        slope = (a * flat[: x.numel()].reshape(shape) + b * d.to(flat)).reshape(-1)
        return slope if q is None else torch.cat([slope, (b * q).to(flat)])

    start = x.reshape(-1) if not integral else torch.cat([x.reshape(-1), x.new_zeros(batch)])
    success, message = True, "reached the end"
    t = torch.full((batch,), t_end, dtype=torch.float64)
    if method == "scipy":
        try:
            from scipy.integrate import solve_ivp
        except ImportError as error:
            raise ImportError("method='scipy' needs scipy: pip install 'fastode[ode]'") from error

        def numpy_velocity(t: float, y: numpy.ndarray) -> numpy.ndarray:
            return velocity(t, torch.from_numpy(y)).cpu().numpy()

        y0 = start.double().cpu().numpy()
        made = solve_ivp(numpy_velocity, (t_start, t_end), y0, method="RK45", rtol=rtol, atol=atol)
        end = torch.from_numpy(numpy.ascontiguousarray(made.y[:, -1]))
        accepted = len(made.t) - 1
        rejected = max(0, (made.nfev - 2) // 6 - accepted)
        if not made.success:
            success, message = False, str(made.message)
            t = torch.full((batch,), float(made.t[-1]), dtype=torch.float64)
            warnings.warn(f"adaptive: {message} Stopped at {float(made.t[-1]):.6g}", stacklevel=5)
    else:
        try:
            from torchdiffeq import odeint
        except ImportError as error:
            raise ImportError("method='torchdiffeq' needs torchdiffeq: pip install 'fastode[ode]'") from error
        points = torch.tensor([t_start, t_end], dtype=torch.float64, device=x.device)
        # By default its last step goes past the end and is interpolated back; past the end a schedule may have no level.
        options = {"step_t": points[1:]}
        end = odeint(velocity, start, points, rtol=rtol, atol=atol, method="dopri5", options=options)[-1]
        accepted = rejected = 0
    count = torch.full((batch,), calls, dtype=torch.int64)
    samples = end[: x.numel()].reshape(shape).to(device=x.device, dtype=x.dtype)
    quantity = end[x.numel() :].double().to(x.device) if integral else None
    return Run(
        samples,
        quantity,
        t,
        count,
        torch.full_like(count, accepted),
        torch.full_like(count, rejected),
        [],
        success,
        message,
    )
