"""One training step of AMED-Solver and of its iPNDM plug-in as plain float64 NumPy (arXiv:2312.00094, Algorithm 1 and card),
with numbers per step instead of a network; gradients by central differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

ADAMS = {1: [1.0], 2: [3 / 2, -1 / 2], 3: [23 / 12, -16 / 12, 5 / 12], 4: [55 / 24, -59 / 24, 37 / 24, -9 / 24]}


def numbers(z: Any, scale_dir: float, scale_time: float) -> tuple[float, float, float]:
    """(r, c, a) of one step's free numbers."""
    s = 1 / (1 + np.exp(-np.asarray(z)))
    return s[0], 1 - scale_dir + 2 * scale_dir * s[1], 1 - scale_time + 2 * scale_time * s[2]


def heun(d: Any, x: Any, levels: Sequence[float]) -> list[Any]:
    """The teacher's states."""
    states = [x]
    for t, tn in pairwise(levels):
        slope = (x - d(x, t)) / t
        y = x + (tn - t) * slope
        x = x + (tn - t) * (slope + (y - d(y, tn)) / tn) / 2
        states.append(x)
    return states


def amed(d: Any, x: Any, t: float, tn: float, rca: Any, history: list[Any], afs: bool, order: int) -> Any:
    r, c, a = rca
    slope = x / np.sqrt(1 + t * t) if afs else (x - d(x, t)) / t
    tau = tn**r * t ** (1 - r)
    y = x + (tau - t) * slope
    return x + c * (tn - t) * (y - d(y, a * tau)) / tau


def ipndm(d: Any, x: Any, t: float, tn: float, rca: Any, history: list[Any], afs: bool, order: int) -> Any:
    r, c, a = rca

    def combined() -> Any:
        k = min(order, len(history))
        return sum(w * history[-1 - j] for j, w in enumerate(ADAMS[k]))

    history.append(x / np.sqrt(1 + t * t) if afs else (x - d(x, t)) / t)
    tau = tn**r * t ** (1 - r)
    y = x + (tau - t) * combined()
    history.append((y - d(y, a * tau)) / tau)
    return y + c * (tn - tau) * combined()


def step_losses(
    step: Callable[..., Any],
    d: Any,
    x: Any,
    levels: Sequence[float],
    targets: Sequence[Any],
    z: Any,
    *,
    scale_dir: float,
    scale_time: float,
    afs: bool,
    order: int = 4,
    from_teacher: bool,
    difference: float = 1e-6,
) -> tuple[list[float], Any]:
    """Loss of every step (mean over the batch of the sum of squares) and its gradient for that step's own free numbers."""
    history: list[Any] = []
    losses, gradient = [], np.zeros_like(z)
    for i in range(len(levels) - 1):

        def attempt(free: Any, i: int = i, x: Any = x, history: list[Any] = history) -> tuple[Any, list[Any]]:
            kept = list(history)
            rca = numbers(free, scale_dir, scale_time)
            return step(d, x, levels[i], levels[i + 1], rca, kept, afs and i == 0, order), kept

        def loss(free: Any, i: int = i, attempt: Any = attempt) -> float:
            made = attempt(free)[0]
            return float(((made - targets[i + 1]) ** 2).reshape(len(made), -1).sum(1).mean())

        losses.append(loss(z[i]))
        for j in range(3):
            e = difference * np.eye(3)[j]
            gradient[i, j] = (loss(z[i] + e) - loss(z[i] - e)) / (2 * difference)
        x, history = attempt(z[i])
        x = targets[i + 1] if from_teacher else x
    return losses, gradient
