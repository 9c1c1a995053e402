"""What the README says is so: the buffers of its table, and its example."""

import re
from pathlib import Path

import pytest
import torch

import fastode
from fastode.schedules import EDM, karras

README = (Path(__file__).parent.parent / "README.md").read_text()
DENOISER = fastode.Denoiser(lambda x, t: x)


def rows():
    for line in README.split("## Solvers")[1].split("## The bundled model")[0].splitlines():
        cells = [c.strip() for c in line.strip("|").split("|")]
        if line.startswith("| `"):
            for name in re.findall(r"`(\w+)`", cells[0]):
                if name in list(fastode.SOLVERS):
                    yield name, cells


def test_every_solver_has_a_row():
    assert [name for name, _ in rows()] == sorted((n for n, _ in rows()), key=[n for n, _ in rows()].index)
    assert {name for name, _ in rows()} == set(fastode.SOLVERS)


@pytest.mark.parametrize(("name", "cells"), list(rows()), ids=[n for n, _ in rows()])
def test_buffers_of_the_table(name, cells):
    grid = karras(EDM(), 9)
    text = cells[4]
    orders = {"dpm_solver_pp": (1, 2, 3), "dpm_solver_pp_s": (2, 3), "unipc": (1, 2, 3), "sde_dpm_solver_pp": (1, 2, 3)}
    options = (
        [{"order": o} for o in orders.get(name, (1, 2, 3, 4))] if "order" in fastode.SOLVERS[name].options else [{}]
    )
    for i, option in enumerate(options):
        slots = fastode.Engine(fastode.SOLVERS[name](grid, **option), DENOISER, (1, 3)).slots
        if "`order`" in text:
            sign, number = text.split()[1:]
            said = option["order"] + int(number) * (1 if sign == "+" else -1)
        else:
            numbers = [int(n) for n in text.split(",")]
            said = numbers[min(i, len(numbers) - 1)]
        assert slots == said, option


def test_the_example_runs():
    code = README.split("```python")[1].split("```")[0]
    scope: dict = {
        "my_network": lambda x, t: torch.zeros_like(x),
        "x": torch.randn(2, 3) * 80,
    }
    exec(code.replace("import fastode\n", "import fastode, fastode.schedules\n"), scope)
    assert scope["images"].shape == (2, 3)
