"""Numbers made in the run, for backends that make them in their own kernels.

A backend that can do so offers ``prepare(levels) -> bool`` and ``make(index, features)`` besides what an executor must
have. ``prepare`` is given one tensor for each network call, what the network is told in it, and says whether the executor
will make *all* numbers of the run: those of the tables and those told to the network. ``make(index, features)`` then takes
the place of everything that happens between an evaluation and update ``index``: no late number passes through Python.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastode.program.bind import PooledMLP
from fastode.program.code import Code, compile_code
from fastode.program.lower import Lowered
from fastode.scalar import Late, Scalar


@dataclass(frozen=True, eq=False)
class Plan:
    """What is made before one update. Late numbers are numbered by ``leaves`` of :class:`Plans`.

    ``made``: the numbers that ``mlp`` gives, looking at the named output ``feature``. ``inputs``: the late numbers that
    ``code`` reads. Its first outputs are the weights ``entries`` (update, row, column), the others what calls ``calls`` are
    told.
    """

    feature: str
    mlp: PooledMLP
    made: tuple[int, ...]
    code: Code
    inputs: tuple[int, ...]
    entries: tuple[tuple[int, int, int], ...]
    calls: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Plans:
    """``by_update[index]`` for every update that numbers are made before; ``leaves``: all late numbers of the run."""

    leaves: tuple[Late, ...]
    by_update: dict[int, Plan]

    @classmethod
    def of(cls, lowered: Lowered) -> Plans | None:
        """None where a kernel cannot make all numbers: a function that is no :class:`PooledMLP`, or norms, or weights per
        element, or weights that are not elementary expressions."""
        leaves = (*sorted(lowered.late, key=lambda late: late.name), *lowered.program.made)
        number = {late: k for k, late in enumerate(leaves)}
        plans: dict[int, Plan] = {}
        for index, group in enumerate(lowered.binds):
            if not group:
                continue
            bind = group[0].bind
            if len(group) > 1 or bind.norms or not isinstance(bind.function, PooledMLP) or len(bind.outputs) != 1:
                return None
            entries: list[tuple[int, int, int]] = []
            expressions: list[Scalar] = []
            for u, update in enumerate(lowered.updates):
                if lowered.due[u] == index:
                    for r, row in enumerate(update.entries):
                        for c, weight in enumerate(row):
                            if isinstance(weight, Late):
                                entries.append((u, r, c))
                                expressions.append(weight)
            calls = [k for k, call in enumerate(lowered.calls) if call.due == index]
            code = compile_code([*expressions, *(lowered.calls[k].c_noise for k in calls)])
            if code is None:
                return None
            made, inputs = (tuple(number[late] for late in lates) for lates in (bind.lates, code.inputs))
            plans[index] = Plan(bind.outputs[0], bind.function, made, code, inputs, tuple(entries), tuple(calls))
        return cls(leaves, plans) if plans else None
