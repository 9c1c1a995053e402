"""From a formula to an entry of ``SOLVERS``: options checked, modifiers applied, NFE planned."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from fastode.program import Form, Program, Trace
from fastode.schedules.grid import Grid

MODIFIERS: dict[str, Any] = {"afs": False, "denoise_to_zero": False}
"""Options that every solver takes besides its own."""


@dataclass(frozen=True)
class Solver:
    """A named formula ``formula(trace, **options) -> Form`` that compiles to a :class:`Program`.

    ``grid`` names the placement of levels that its published figures use (a key of ``GRIDS``), ``final`` how that grid
    ends: at "sigma_min", or with an added level "zero". ``extra``: options that the formula takes as ``**options``, with their
    defaults (a solver made from another one).
    """

    name: str
    formula: Callable[..., Form]
    final: Literal["sigma_min", "zero"] = "sigma_min"
    grid: str = "karras"
    extra: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def options(self) -> dict[str, Any]:
        """Every option with its default: the formula's own, then the modifiers."""
        parameters = list(inspect.signature(self.formula).parameters.values())[1:]
        own = {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD}
        return {**self.extra, **own, **MODIFIERS}

    @property
    def summary(self) -> str:
        """First paragraph of the formula's docstring, on one line."""
        return " ".join((inspect.getdoc(self.formula) or "").split("\n\n")[0].split())

    def __call__(self, grid: Any, **options: Any) -> Program:
        """Compile for ``grid`` (a :class:`Grid` or EDM-frame sigmas, taken as given).

        ``afs=True`` replaces the first evaluation by the analytical first step; ``denoise_to_zero=True`` adds an evaluation
        at the last level and returns its denoised estimate (nothing is added on a grid that already ends at 0).
        Other options are the formula's own. Raises ``ValueError`` or ``TypeError`` naming the argument.
        """
        self.check(options)
        return self.record(Trace(Grid.of(grid), afs=bool(options.get("afs", False))), **options)

    def record(self, trace: Trace, **options: Any) -> Program:
        """Compile onto ``trace``, which holds the grid and may alter what the formula writes (calibrated methods do)."""
        self.check(options)
        own = {k: v for k, v in options.items() if k not in MODIFIERS}
        x = self.formula(trace, **own)
        last = trace.grid[-1]
        if options.get("denoise_to_zero", False) and not last.is_data:
            x = trace.denoise(x, last)
        return trace.program(x, name=self.name, options=options)

    def check(self, options: Iterable[str]) -> None:
        for name in options:
            if name not in self.options:
                raise TypeError(f"{self.name}: unknown option {name!r}{_nearest(name, self.options)}")

    def plan(self, nfe: int, make_grid: Callable[..., Grid], **options: Any) -> tuple[Grid, dict[str, Any]]:
        """A grid and options with which this solver makes exactly ``nfe`` evaluations.

        ``make_grid(steps=..., final=...)`` builds the grid. Tries the solver as it is, then with the analytical first step
        (unless ``afs`` is given). Raises ``ValueError`` with the nearest numbers of evaluations that it can make.
        """
        self.check(options)
        if isinstance(nfe, bool) or not isinstance(nfe, int) or nfe < 1:
            raise ValueError(f"nfe: must be a whole number of at least 1, got {nfe!r}")
        possible: set[int] = set()
        misfit: GridError | None = None
        tries: list[dict[str, Any]] = [{}] if "afs" in options else [{}, {"afs": True}]
        for extra in tries:
            for steps in range(1, nfe + 2):
                grid = make_grid(steps=steps, final=self.final)
                try:
                    made = self(grid, **options, **extra).nfe
                except GridError as error:
                    misfit = error
                    continue
                if made == nfe:
                    return grid, {**options, **extra}
                possible.add(made)
                if made > nfe:
                    break
        if not possible and misfit is not None:
            raise ValueError(f"nfe: {self.name} cannot make exactly {nfe} evaluations: {misfit}")
        near = sorted(possible - {0}, key=lambda n: (abs(n - nfe), n))[:3]
        raise ValueError(
            f"nfe: {self.name} cannot make exactly {nfe} evaluations{' with ' + str(options) if options else ''}; "
            f"it can make {', '.join(map(str, sorted(near)))}"
        )


class GridError(ValueError):
    """This solver cannot run on this grid, though it may on another: an interval outside of it, parts that do not meet."""


class SolverTable(Mapping[str, Solver]):
    """The solvers by name; also found by alias, and with a hint when there is none."""

    def __init__(self, solvers: Mapping[str, Solver], aliases: Mapping[str, str]) -> None:
        self._solvers, self.aliases = dict(solvers), dict(aliases)

    def __getitem__(self, name: str) -> Solver:
        found = self._solvers.get(self.aliases.get(name, name)) if isinstance(name, str) else None
        if found is None:
            raise UnknownSolverError(
                f"solver: unknown solver {name!r}{_nearest(str(name), [*self._solvers, *self.aliases])}"
            )
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._solvers or name in self.aliases

    def __iter__(self) -> Iterator[str]:
        return iter(self._solvers)

    def __len__(self) -> int:
        return len(self._solvers)


class UnknownSolverError(KeyError, ValueError):
    """No solver of that name; the message suggests the nearest names."""

    def __str__(self) -> str:
        return str(self.args[0])


def _nearest(name: str, known: Iterable[str]) -> str:
    names = list(known)
    close = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.4)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else f"; known are {', '.join(sorted(names))}"
