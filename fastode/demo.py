"""``make demo``: 80 digits, 8 of each class, in five network evaluations of the bundled model."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor

from fastode.engine import Engine
from fastode.evaluate.pictures import picture_grid, save_image
from fastode.evaluate.summary import print_run
from fastode.models import load, load_solver

SOLVER, NFE = "amed_unipc", 5


def run(out: Path, device: str) -> None:
    """Sample, show progress, write ``digits.png`` and ``previews.png``, print what was done."""
    denoiser = load("mnist", device=device)
    assert denoiser.sample_shape is not None
    learned = load_solver("mnist", SOLVER, nfe=NFE)
    learned.check(denoiser)
    program = learned.program()
    labels = [c for c in range(10) for _ in range(8)]
    engine = Engine(program, denoiser, (len(labels), *denoiser.sample_shape))
    engine(seeds=range(len(labels)), class_labels=labels)  # warm-up: first-call costs are not the sampler's

    started = time.perf_counter()
    samples = engine(seeds=range(len(labels)), class_labels=labels, progress=True)
    if device != "cpu":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started

    previews: list[tuple[float, Tensor]] = []

    def look(step: int, sigma: float, state: Tensor, denoised: Tensor) -> None:
        previews.append((sigma, denoised[::8].clone()))

    engine(seeds=range(len(labels)), class_labels=labels, callback=look)
    digits = picture_grid(
        samples,
        columns=8,
        row_labels=[str(c) for c in range(10)],
        title=f"{SOLVER}, {program.nfe} evaluations",
    )
    tiles = torch.stack([*(d for _, d in previews), samples[::8]], dim=1).flatten(0, 1)
    strip = picture_grid(
        tiles,
        columns=len(previews) + 1,
        row_labels=[str(c) for c in range(10)],
        column_labels=[*(f"{sigma:.3g}" for sigma, _ in previews), "final"],
        title="denoised estimate at each sigma",
    )
    print_run(program, len(labels), seconds, device, engine.backend)
    print(f"wrote    {save_image(digits, out / 'digits.png')} and {save_image(strip, out / 'previews.png')}")
