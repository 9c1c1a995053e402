"""What a run did, in a few lines."""

from __future__ import annotations

from fastode.program import Program


def print_run(program: Program, count: int, seconds: float, device: str, backend: str) -> None:
    """Solver, NFE, wall time, images per second and device of a run, one line each."""
    options = ", ".join(f"{k}={v}" for k, v in program.options.items() if isinstance(v, (str, float, int)))
    print(f"solver   {program.name}{f' ({options})' if options else ''} on {program.grid.name}")
    print(f"NFE      {program.nfe}")
    print(f"time     {seconds:.2f} s for {count} images, {count / seconds:.1f} images/s")
    print(f"device   {device}, backend {backend}")
