"""``fastode describe``: print a solver's program as formulas."""

from __future__ import annotations

import argparse
from typing import Any

from fastode.commands.arguments import compile_program, solver_arguments


def add(commands: Any) -> None:
    p = commands.add_parser("describe", help="print a solver's program as formulas")
    solver_arguments(p)
    p.add_argument("--model", default=None, help="use this model's noise range (default: EDM's 0.002 .. 80)")
    p.add_argument("--save", default=None, help="also write the program to this file")
    p.set_defaults(run=run)


def run(a: argparse.Namespace) -> None:
    from fastode.models import load
    from fastode.schedules import EDM

    schedule = EDM() if a.model is None else load(a.model).schedule
    program = compile_program(a, schedule)
    print(program.describe())
    if a.save is not None:
        program.save(a.save)
        print(f"# wrote {a.save}")
