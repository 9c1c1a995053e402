"""The examples of CONTRIBUTING.md run and are what they say: a solver of order 2, a backend, a runtime."""

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import fastode
from fastode import Denoiser
from fastode.backends import BACKENDS
from fastode.denoisers import GaussianMixture
from fastode.schedules import EDM, karras
from fastode.solvers.solver import Solver
from tests.conftest import VARIANTS, make_grid, relative, start, variant_id

TEXT = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()
SOLVER, USE, BACKEND, RUNTIME = (block.split("```")[0] for block in TEXT.split("```python\n")[1:])


def scope(code: str, **names: object) -> dict:
    exec(code, names)
    return names


def test_the_solver(gaussian, mixture, capsys):
    ralston = scope(SOLVER)["ralston"]
    solver = Solver("ralston", ralston)
    for kind in ("edm", "zero", "vp", "ddpm", "flow", "flow_full"):
        assert solver(make_grid(kind)).defect() < 1e-11
    errors = []
    x = 80 * torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for steps in (80, 160):
        samples = fastode.sample(gaussian, x, solver=solver, grid=karras(EDM(0.02, 80), steps))
        errors.append(float((samples - gaussian.flow(x, 80, 0.02)).norm()))
    assert abs(math.log2(errors[0] / errors[1]) - 2) < 0.2  # slopes between 80 and 160 steps: see tests/test_order.py

    names = scope(USE, ralston=ralston, denoiser=mixture, x=start(karras(EDM(), 10), (2, 6)))
    assert "ralston: 6 evaluations, 3 steps" in capsys.readouterr().out
    plain = np.asarray(names["x"])
    levels = karras(EDM(), 10).sigmas.tolist()
    for s, t in pairwise(levels):  # the textbook's loop
        u = s + 2 / 3 * (t - s)
        k1 = (plain - mixture(torch.from_numpy(plain), s).numpy()) / s
        y = plain + (u - s) * k1
        k2 = (y - mixture(torch.from_numpy(y), u).numpy()) / u
        plain = plain + (t - s) * (k1 / 4 + 3 / 4 * k2)
    # the textbook's form x + h k cancels 80 against 0.002: 1e-16 * 80 / 0.5, ten steps
    assert relative(names["samples"], torch.from_numpy(plain)) < 1e-12


@pytest.mark.parametrize("case", VARIANTS[::2], ids=variant_id)
def test_the_backend(case, monkeypatch):
    """Equal to the definition for every solver, with guidance per sample, and with draws."""
    monkeypatch.setitem(BACKENDS, "plain", scope(BACKEND)["PlainBackend"]())
    name, options = case
    grid = make_grid("edm")
    x = start(grid, (3, 6))
    denoiser = Denoiser(lambda x, t, class_labels: torch.tanh(x + class_labels[:, None]), num_classes=3, null_label=3)
    runs = [
        fastode.sample(
            denoiser,
            x,
            solver=name,
            grid=grid,
            class_labels=[0, 1, 2],
            guidance_scale=[1.0, 2.0, 0.5],
            seeds=[4, 5, 6],
            backend=backend,
            **options,
        )
        for backend in ("reference", "plain")
    ]
    assert relative(runs[1], runs[0]) < 1e-10  # float64, another grouping; PNDM's warm-up amplifies it (test_program)


def test_the_backend_draws(monkeypatch):
    monkeypatch.setitem(BACKENDS, "plain", scope(BACKEND)["PlainBackend"]())
    data = GaussianMixture(torch.zeros(1, 6), 0.25)
    grid = make_grid("zero")
    runs = [
        fastode.sample(data, start(grid, (3, 6)), solver="ddim", eta=1.0, grid=grid, seeds=range(3), backend=backend)
        for backend in ("reference", "plain")
    ]
    assert relative(runs[1], runs[0]) < 1e-12


def test_the_runtime():
    class Numpy:
        def run(self, names: None, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
            return [np.tanh(feeds["x"] + feeds["c_noise"][:, None] + feeds.get("class_labels", np.zeros(2))[:, None])]

    session = Denoiser(scope(RUNTIME)["Session"](Numpy()), num_classes=3)
    eager = Denoiser(lambda x, c, class_labels: torch.tanh(x + c[:, None] + class_labels[:, None]), num_classes=3)
    grid = make_grid("edm")
    samples = [
        fastode.sample(d, start(grid, (2, 6)), solver="unipc", grid=grid, class_labels=[0, 2]) for d in (session, eager)
    ]
    assert relative(*samples) < 1e-12  # two libraries' tanh in float64
