"""What is compared: a solver with its options, at one number of evaluations, on one of several placements of levels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastode.api import grid_maker
from fastode.artifact import Artifact
from fastode.denoisers import Denoiser
from fastode.program import Program
from fastode.schedules.spacing import GRIDS
from fastode.solvers import SOLVERS

CANDIDATES = ("karras", "log_snr", "time_uniform", "quadratic")
"""Placements of levels that each solver is tried on, besides its own usual one."""


@dataclass(frozen=True)
class Spec:
    """A solver that is compared: ``text`` names it in tables. ``grid`` fixes the placement of levels; ``artifacts`` are one
    learned solver at several numbers of evaluations, each with its own."""

    text: str
    solver: str
    options: dict[str, Any] = field(default_factory=dict)
    grid: str | None = None
    artifacts: tuple[Artifact, ...] = ()


@dataclass(frozen=True, eq=False)
class Case:
    """``programs``: one for every placement of levels that is tried, the usual one first."""

    name: str
    label: str
    nfe: int
    programs: tuple[Program, ...]


def plan(
    specs: Sequence[Spec],
    nfes: Sequence[int],
    denoiser: Denoiser,
    *,
    grids: Sequence[str] = CANDIDATES,
    guidance_scale: float | None = None,
) -> tuple[list[Case], list[str]]:
    """All cases, the cheapest first, and why some are missing (a solver that cannot make that many evaluations).

    A learned solver has the evaluations it was trained for; one alone appears whatever ``nfes`` are. Raises ``ValueError``
    where two entries have one name, a grid is unknown, or nothing is left to compare.
    """
    texts = [spec.text for spec in specs]
    twice = sorted({t for t in texts if texts.count(t) > 1})
    if twice:
        raise ValueError(f"solvers: {twice[0]!r} is there twice")
    for grid in grids:
        if grid not in GRIDS:
            raise ValueError(f"grids: must be among {', '.join(GRIDS)}, got {grid!r}")
    for nfe in nfes:
        if nfe < 1:
            raise ValueError(f"nfe: must be at least 1, got {nfe}")
    found: list[Case] = []
    missing: list[str] = []
    for spec in specs:
        for artifact in spec.artifacts:
            artifact.check(denoiser, guidance_scale=guidance_scale)
            program = artifact.program()
            if len(spec.artifacts) == 1 or program.nfe in nfes:
                found.append(Case(f"{spec.text}@{program.nfe}", spec.text, program.nfe, (program,)))
        if spec.artifacts:
            continue
        for nfe in dict.fromkeys(nfes):
            try:
                programs = _programs(spec, nfe, denoiser, grids)
            except ValueError as error:
                if not str(error).startswith("nfe: "):
                    raise
                missing.append(str(error).removeprefix("nfe: "))
                continue
            found.append(Case(f"{spec.text}@{nfe}", spec.text, nfe, programs))
    if not found:
        raise ValueError(f"solvers: nothing to compare: {missing[0] if missing else 'no solver was given'}")
    return sorted(found, key=lambda case: case.nfe), missing


def _programs(spec: Spec, nfe: int, denoiser: Denoiser, grids: Sequence[str]) -> tuple[Program, ...]:
    solver = SOLVERS[spec.solver]
    assert denoiser.schedule is not None
    usual, options = solver.plan(nfe, grid_maker(solver, denoiser.schedule, spec.grid), **spec.options)
    programs = {tuple(usual.sigmas.tolist()): solver(usual, **options)}
    for name in grids if spec.grid is None else ():
        try:  # the same number of steps makes as many evaluations on other levels: planned once, compiled once
            grid = grid_maker(solver, denoiser.schedule, name)(steps=usual.steps, final=solver.final)
        except (ValueError, TypeError):
            continue  # a placement that this schedule has not
        key = tuple(grid.sigmas.tolist())
        if key not in programs:
            program = solver(grid, **options)
            if program.nfe == nfe:
                programs[key] = program
    return tuple(programs.values())
