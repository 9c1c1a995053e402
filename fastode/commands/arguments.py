"""Arguments that several commands share, and how their text is read."""

from __future__ import annotations

import argparse
import os
from typing import Any


def solver_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--solver",
        default="dpm_solver_pp",
        help="see `fastode solvers`, the file of a learned solver, or a bundled one: mnist/amed-5 (default %(default)s)",
    )
    p.add_argument("--nfe", type=int, default=None, help="exactly this many evaluations (default 5)")
    p.add_argument("--steps", type=int, default=None, help="this many steps, whatever they cost")
    p.add_argument("--grid", default=None, help="placement of the levels (default: the solver's usual one)")
    p.add_argument(
        "-o", "--option", action="append", default=[], metavar="NAME=VALUE", help="a solver option: order=3, afs=true"
    )


def model_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--model",
        default="mnist",
        help="a bundled model, a weights file, or edm:FILE.pkl and its kin (default %(default)s)",
    )
    solver_arguments(p)
    p.add_argument("--device", default=None, help="cpu, cuda, ... (default: cuda where there is one)")
    p.add_argument("--backend", default="auto", help="auto, reference, ... (default %(default)s)")
    p.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="dtype of the network"
    )


def compile_program(a: argparse.Namespace, schedule: Any, denoiser: Any = None) -> Any:
    """The program that ``--solver`` and its companions ask for; a learned solver must fit ``denoiser``."""
    from fastode.api import grid_maker, learned
    from fastode.solvers import SOLVERS

    artifact = learned(a.solver)
    if artifact is not None:
        if a.nfe is not None or a.steps is not None or a.grid is not None or a.option:
            raise ValueError("solver: a learned solver brings its own grid, evaluations and options; leave them out")
        if denoiser is not None:
            artifact.check(denoiser, guidance_scale=getattr(a, "guidance", None))
        return artifact.program()
    solver = SOLVERS[a.solver]
    options = dict(option(text) for text in a.option)
    make = grid_maker(solver, schedule, a.grid)
    if a.steps is not None:
        if a.nfe is not None:
            raise ValueError("nfe: give --nfe or --steps, not both")
        return solver(make(steps=a.steps, final=solver.final), **options)
    grid, options = solver.plan(5 if a.nfe is None else a.nfe, make, **options)
    return solver(grid, **options)


def device_of(name: str | None) -> str:
    import torch

    if name is None:
        rank = os.environ.get("LOCAL_RANK")  # under torchrun each process has a device of its own
        return ("cuda" if rank is None else f"cuda:{rank}") if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device: {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return name


def numbers(name: str, text: str) -> list[int]:
    """0-4 or 1,3,5 or a mixture, as whole numbers."""
    numbers: list[int] = []
    try:
        for part in text.split(","):
            low, dash, high = part.strip().partition("-")
            numbers += range(int(low), int(high) + 1) if dash else [int(low)]
    except ValueError:
        raise ValueError(f"{name}: must look like 0-79 or 1,5,9, got {text!r}") from None
    if not numbers:
        raise ValueError(f"{name}: {text!r} names no number")
    return numbers


def option(text: str) -> tuple[str, Any]:
    from fastode.solvers.spec import value_of

    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"option: must be NAME=VALUE, got {text!r}")
    return name, value_of(value)
