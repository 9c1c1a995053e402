"""A program played one evaluation at a time, for callers that keep the loop and the network to themselves."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fastode.program import Program, Table
from fastode.program.form import Atom
from fastode.scalar import Late


class Stages:
    """The values of one run of ``program``; ``advance(i, x, denoised, noise)`` makes the update that follows evaluation i.

    The caller hands in the state that was evaluated, so it may have changed it in between (a masked image, say). Values are
    forgotten after their last use. Raises ``ValueError`` for programs that cannot be played so: those that begin with an
    update (``afs``), and those with late coefficients.
    """

    def __init__(self, program: Program) -> None:
        if program.late:
            names = ", ".join(sorted(late.name for late in program.late))
            raise ValueError(f"solver: {program.name} needs {names} from the run; use fastode.Engine")
        if program.init.writes or program.stages[0].net_in != 0:
            raise ValueError(f"afs: the first evaluation of {program.name} is not at the start; leave it out here")
        self.program = program
        self.values: dict[int, Tensor] = {}
        self._draws: dict[int, Tensor] = {}
        self._last = _last_uses(program)

    def advance(self, index: int, x: Tensor, denoised: Tensor, noise: Callable[[], Tensor]) -> Tensor:
        """The state at which evaluation ``index + 1`` is due, or the result. ``noise()`` makes one draw like ``x``; draws are
        asked for in order."""
        program = self.program
        stage = program.stages[index]
        self.values[stage.net_in] = x
        self._apply(stage.table, x, denoised, noise)
        last = index + 1 == len(program.stages)
        wanted = program.result if last else program.stages[index + 1].net_in
        made = self.values[wanted]
        self.values = {v: value for v, value in self.values.items() if self._last.get(v, -1) > index}
        return made

    def _apply(self, table: Table, x: Tensor, denoised: Tensor, noise: Callable[[], Tensor]) -> None:
        def read(atom: Atom) -> Tensor:
            if atom.kind == "value":
                return self.values[atom.index]
            if atom.kind == "output":
                return denoised
            if atom.kind == "one":
                return x.new_ones(()).expand_as(x)
            while len(self._draws) <= atom.index:
                self._draws[len(self._draws)] = noise()
            return self._draws[atom.index]

        new: dict[int, Tensor] = {}
        for write, form in table.rows():
            total: Tensor | None = None
            for atom, c in form.terms.items():
                assert not isinstance(c, Late)
                weight = c.to(x) if isinstance(c, Tensor) else c
                if total is None:
                    total = read(atom) * weight
                elif isinstance(weight, Tensor):
                    total.add_(read(atom) * weight)
                else:
                    total.add_(read(atom), alpha=weight)
            new[write] = x.new_zeros(x.shape) if total is None else total
        self.values.update(new)


def _last_uses(program: Program) -> dict[int, int]:
    """The evaluation after whose update each value is no longer read; the result is read at the end."""
    last: dict[int, int] = {program.result: len(program.stages)}
    for stage in program.stages:
        last[stage.net_in] = max(stage.index, last.get(stage.net_in, -1))
        for atom in stage.table.columns:
            if atom.kind == "value":
                last[atom.index] = max(stage.index, last.get(atom.index, -1))
    return last
