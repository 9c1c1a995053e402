"""What a report draws of a case: samples as pictures, and trajectories in their principal planes."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastode.evaluate.pictures import to_uint8
from fastode.evaluate.reference import Trajectory
from fastode.evaluate.truncation import plane
from fastode.program import Program

PICTURES, DRAWN, TILE = 10, 3, 96
"""Samples shown per case, trajectories drawn per case, and the largest side of a picture."""


def picture(samples: Tensor) -> str | None:
    """Samples side by side as one PNG in base64; None for what is no picture."""
    if samples.ndim != 4 or samples.shape[1] not in (1, 3):
        return None
    pixels = to_uint8(samples)
    strip = np.concatenate(list(pixels), axis=1)
    image = Image.fromarray(strip.squeeze(-1) if strip.shape[2] == 1 else strip)
    if pixels.shape[1] > TILE:
        image = image.resize((TILE * len(pixels), TILE), Image.Resampling.BOX)
    file = io.BytesIO()
    image.save(file, format="PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def _flat(state: Tensor, alpha: float) -> Tensor:
    return state.double().flatten(1) / alpha


def planes(way: Trajectory) -> dict[str, Any]:
    """Converged trajectories of the first seeds in their principal planes, and how much variance these hold on average
    over the probe."""
    rows = [i for i, level in enumerate(way.grid) if not level.is_noise]
    states = torch.stack([_flat(way.states[i], float(way.grid.alpha[i])) for i in rows])  # [L, B, d]
    shares, paths = [], []
    for b in range(states.shape[1]):
        directions, variance = plane(states[:, b])
        shares.append(variance[:4])
        if b < DRAWN:
            paths.append(_rounded((states[:, b] - states[-1, b]) @ directions.T))
    return {
        "variance": torch.stack(shares).mean(0).tolist(),
        "paths": paths,
        "sigmas": [float(f"{way.grid.sigmas[i]:.6g}") for i in rows],
    }


def projected(way: Trajectory, program: Program, states: Sequence[Tensor]) -> list[list[list[float]]]:
    rows = [i for i, level in enumerate(way.grid) if not level.is_noise]
    exact = torch.stack([_flat(way.states[i], float(way.grid.alpha[i])) for i in rows])
    levels = [i for i, level in enumerate(program.grid) if not level.is_noise and i < len(states)]
    made = torch.stack([_flat(states[i], float(program.grid.alpha[i])) for i in levels])
    paths = []
    for b in range(min(DRAWN, exact.shape[1])):
        directions, _ = plane(exact[:, b])
        paths.append(_rounded((made[:, b] - exact[-1, b]) @ directions.T))
    return paths


def _rounded(x: Tensor) -> list[list[float]]:
    return [[float(f"{v:.5g}") for v in row] for row in x.tolist()]
