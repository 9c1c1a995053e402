"""The same inputs under pytest-benchmark: ``pytest benchmarks/test_speed.py``, with its own options to save and compare."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.overhead import usual_grid
from benchmarks.registry import CASES, MIDDLE, SMALL, UPDATES, Case, Fixed
from benchmarks.roofline import SOLVERS_TIMED, Step
from benchmarks.trajectory import program_of
from fastode import SOLVERS, Denoiser, Engine, load
from fastode.backends import choose

BACKEND = choose("auto", torch.device("cpu"))


@pytest.mark.parametrize("shape", [SMALL, MIDDLE], ids=str)
@pytest.mark.parametrize("case", {c.name: c for c in CASES}.values(), ids=lambda c: c.name)
def test_overhead(benchmark: Any, case: Case, shape: tuple[int, ...]) -> None:
    """20 evaluations of a network that costs nothing."""
    program = SOLVERS[case.solver](usual_grid(case, 20), **case.options)
    engine = Engine(program, Denoiser(Fixed(shape)), shape)
    x = torch.randn(shape)
    benchmark(engine, x)
    benchmark.extra_info["evaluations"] = engine.nfe


@pytest.mark.parametrize("shape", UPDATES[:2], ids=str)
@pytest.mark.parametrize(("solver", "options"), SOLVERS_TIMED, ids=[name for name, _ in SOLVERS_TIMED])
def test_update(benchmark: Any, solver: str, options: dict[str, Any], shape: tuple[int, ...]) -> None:
    step = Step.of(solver, shape, BACKEND, **options)
    benchmark(step.run)
    benchmark.extra_info["bytes"] = step.moved


@pytest.mark.parametrize("batch", [1, 8])
def test_sample(benchmark: Any, batch: int) -> None:
    """Five evaluations of the bundled model."""
    engine = Engine(program_of(), load("mnist"), (batch, 1, 32, 32))
    benchmark(engine, torch.randn(batch, 1, 32, 32) * 80, class_labels=3)
