"""``fastode solvers``: list the solvers and their options."""

from __future__ import annotations

import argparse
from typing import Any


def add(commands: Any) -> None:
    p = commands.add_parser("solvers", help="list the solvers and their options")
    p.add_argument("--nfe", type=int, default=None, help="say for each how it makes this many evaluations")
    p.set_defaults(run=run)


def run(a: argparse.Namespace) -> None:
    from fastode.api import grid_maker
    from fastode.models import bundled_solvers
    from fastode.schedules import EDM
    from fastode.solvers import SOLVERS

    for name, solver in SOLVERS.items():
        aliases = [alias for alias, target in SOLVERS.aliases.items() if target == name]
        print(f"{name}{'  (also ' + ', '.join(aliases) + ')' if aliases else ''}")
        print(f"    {solver.summary}")
        print("    options: " + ", ".join(f"{k}={v}" for k, v in solver.options.items()))
        if a.nfe is not None:
            try:
                grid, options = solver.plan(a.nfe, grid_maker(solver, EDM()))
                extra = f" with {', '.join(f'{k}={v}' for k, v in options.items())}" if options else ""
                print(f"    {a.nfe} evaluations: {grid.steps} steps{extra} on {grid.name}")
            except ValueError as error:
                print(f"    {error}")
    print("learned, for the bundled models: " + (", ".join(bundled_solvers()) or "none"))
