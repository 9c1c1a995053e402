"""The local truncation error of a program, step by step, against a converged trajectory.

The program runs, but every time it lands on a level its state is replaced by the exact one. What it misses there is the
error that this step alone has made: its history is exact wherever it was made from states.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastode.evaluate.reference import Trajectory
from fastode.program import Atom, Program, Stage, Table


def local_errors(
    program: Program, denoise: Callable[[Tensor, Stage], Tensor], trajectory: Trajectory
) -> list[float] | None:
    """Root mean square of (landing - exact)/alpha at each level but the first, [steps]; in the units of the samples.

    ``denoise(x, stage)`` gives D in the dtype of ``x``. None for programs that draw noise, which solve no ODE, and for
    those with numbers that are only known in a run.
    """
    if program.draws or program.late:
        return None
    start = trajectory.at(program.grid[0]).to(torch.float32)
    level_of = {value: i for i, value in enumerate(program.states)}
    values: dict[int, Tensor] = {0: start}
    errors: dict[int, float] = {}

    def apply(table: Table, output: Tensor | None) -> None:
        new: dict[int, Tensor] = {}
        for write, form in table.rows():
            total = torch.zeros_like(start)
            for atom, c in form.terms.items():
                weight = c.to(total) if isinstance(c, Tensor) else float(c)
                total = total + weight * _read(atom, values, output, start)
            i = level_of.get(write)
            if i:
                level = program.grid[i]
                exact = trajectory.at(level)
                scale = float(level.alpha) or 1.0
                errors[i] = float((total.double() - exact).square().mean().sqrt() / scale)
                total = exact.to(torch.float32)
            new[write] = total
        values.update(new)

    apply(program.init, None)
    for stage in program.stages:
        apply(stage.table, denoise(values[stage.net_in], stage))
    return [errors[i] for i in range(1, len(program.grid)) if i in errors]


def _read(atom: Atom, values: dict[int, Tensor], output: Tensor | None, start: Tensor) -> Tensor:
    if atom.kind == "value":
        return values[atom.index]
    if atom.kind == "one":
        return torch.ones_like(start)
    assert output is not None
    return output


def plane(states: Tensor) -> tuple[Tensor, Tensor]:
    """The principal plane of a trajectory ``states`` [L, d] that ends at its last state (arXiv:2312.00094, section 3).

    Returns the two directions [2, d] about the end, and the fraction of variance of each principal component, [min(L, d)].
    """
    x = states.double()
    centred = x - x.mean(0)
    _, s, v = torch.linalg.svd(centred, full_matrices=False)
    variance = s.square()
    directions = v[:2]
    if len(directions) < 2:
        directions = torch.cat([directions, torch.zeros(2 - len(directions), x.shape[1], dtype=x.dtype)])
    # Signs are free; the start lies to the right, and the bend points up.
    first = (x[0] - x[-1]) @ directions.T
    bend = ((x - x[-1]) @ directions.T)[:, 1]
    sign = torch.tensor([1.0 if first[0] >= 0 else -1.0, 1.0 if bend.sum() >= 0 else -1.0], dtype=x.dtype)
    return directions * sign[:, None], variance / variance.sum().clamp(min=1e-300)
