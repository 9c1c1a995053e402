"""All numbers of a calibrated solver moved together, towards smaller error of the end points."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from fastode.backends import reference
from fastode.learn.replay import Evaluate
from fastode.program import Program
from fastode.scalar import Late


def polish(
    program: Program,
    evaluate: Evaluate,
    x: Tensor,
    target: Tensor,
    begin: Mapping[Late, float],
    *,
    scales: Sequence[float] | None = None,
    iterations: int = 20,
    late: Callable[[], bool] = lambda: False,
) -> dict[Late, float]:
    """Minimise the mean square error of the end points of ``program`` from ``x`` against ``target`` [B, *sample].

    Greedy calibration makes every state as good as it can be by itself; the end is what counts. L-BFGS from ``begin``, the
    gradient through all evaluations by reverse mode; ``scales``: how far each number moves when it moves by one unit.
    Never ends worse than it began, nor on a number that is not finite. ``late()`` ends it early.
    """
    try:
        from scipy.optimize import minimize
    except ImportError as error:
        raise ImportError("refining needs scipy: pip install 'fastode[learn]'") from error
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"refine: must be a whole number of at least 1, got {iterations!r}")
    names, start = list(begin), numpy.array(list(begin.values()))
    size = numpy.ones(len(names)) if scales is None else numpy.asarray(scales, dtype=float)
    best: tuple[float, numpy.ndarray] = (math.inf, start)
    first: list[float] = []  # the loss at the start: the optimiser sees losses in its units

    def loss(theta: numpy.ndarray) -> tuple[float, numpy.ndarray]:
        nonlocal best
        values = torch.from_numpy(start + size * theta).requires_grad_()
        known: dict[Late, Any] = dict(zip(names, values.unbind(), strict=True))
        try:
            made, _ = reference.run(program, lambda y, stage, _: evaluate(y, stage.level), x, known=known)
        except FloatingPointError:
            return 1e300, numpy.zeros(len(names))
        value = (made - target).square().mean()
        (slope,) = torch.autograd.grad(value, values)
        number, gradient = float(value.detach()), slope.numpy() * size
        if not (math.isfinite(number) and numpy.isfinite(gradient).all()):
            return 1e300, numpy.zeros(len(names))
        if number < best[0]:
            best = number, start + size * theta
        first.append(number)
        if late():
            raise StopIteration
        return number / first[0], gradient / first[0]

    with contextlib.suppress(StopIteration):
        minimize(loss, numpy.zeros(len(names)), jac=True, method="L-BFGS-B", options={"maxiter": iterations})
    return dict(zip(names, best[1].tolist(), strict=True))
