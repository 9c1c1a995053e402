"""Inpainting and colorization by predictor-corrector sampling (arXiv:2011.13456, section 5 and appendix I)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastode.denoisers.base import Denoiser
from fastode.denoisers.controlled import grey_matrix, mix, mixed
from fastode.engine import Engine, NoiseSource
from fastode.noise import check_seeds, normal
from fastode.schedules.grid import Grid
from fastode.solvers.langevin import check_mask, pc


def inpaint(
    denoiser: Denoiser | Callable[..., Any],
    y: Tensor,
    mask: Tensor,
    *,
    grid: Grid,
    seeds: Sequence[int] | Tensor | None = None,
    class_labels: Tensor | Sequence[int] | int | None = None,
    noise: NoiseSource | None = None,
    prior: Tensor | None = None,
    backend: str = "auto",
    **options: Any,
) -> Tensor:
    """Samples [B, *sample] that agree with ``y`` where ``mask`` [*sample] is 1.

    ``grid``: levels of VP, sub-VP or VE (:func:`score_sde_grid`); ``options``: those of the predictor-corrector sampler, by
    default reverse diffusion with Langevin corrections. ``seeds`` give the free elements' start and all noise, unless
    ``prior`` (the state at the first level) and ``noise`` are given. Raises ``ValueError`` naming the argument.
    """
    base = Denoiser.of(denoiser)
    given = check_mask(mask)
    if not isinstance(y, Tensor) or not y.dtype.is_floating_point or y.ndim < 2:
        raise ValueError("y: must be a floating point tensor [B, *sample]")
    if tuple(given.shape) != tuple(y.shape[1:]):
        raise ValueError(f"mask: must have the shape of a sample {list(y.shape[1:])}, got {list(given.shape)}")
    settings = {"corrector": "langevin", **options}
    program = pc(grid, mask=given, **settings)
    dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
    engine = Engine(program, base, tuple(y.shape), backend, dtype=dtype)
    keys = check_seeds(range(len(y)) if seeds is None else seeds, len(y))
    if prior is None:
        z = normal(keys, 0, y.shape[1:], dtype=dtype, device=engine.device)
        prior = z * float(grid.sigma[0])
    elif prior.shape != y.shape:
        raise ValueError(f"prior: must have the shape of y {list(y.shape)}, got {list(prior.shape)}")
    known = given.to(device=engine.device, dtype=dtype)
    # No arithmetic on given elements: they must come out as they went in.
    start = torch.where(known == 1, y.to(prior), known * y.to(prior) + (1 - known) * prior)
    labels = None if class_labels is None else torch.as_tensor(class_labels)
    made: Tensor = engine(start, seeds=keys if noise is None else None, noise=noise, class_labels=labels)
    return made


def colorize(denoiser: Denoiser | Callable[..., Any], grey: Tensor, *, grid: Grid, **options: Any) -> Tensor:
    """Colour images [B, 3, H, W] whose mean over the colours is ``grey`` [B, 1, H, W] (in the data's range).

    Colours are rotated by an orthogonal matrix whose first new channel is sqrt(3) times the grey value; that channel is
    inpainted, and the result rotated back. ``options`` as for :func:`inpaint`.
    """
    if not isinstance(grey, Tensor) or grey.ndim != 4 or grey.shape[1] != 1:
        got = list(grey.shape) if isinstance(grey, Tensor) else type(grey).__name__
        raise ValueError(f"grey: must be [B, 1, H, W], got {got}")
    matrix = grey_matrix()
    free = torch.zeros_like(grey).expand(-1, 2, -1, -1)
    y = torch.cat([grey * 3**0.5, free], 1)
    mask = torch.zeros(y.shape[1:])
    mask[0] = 1
    return mix(inpaint(mixed(denoiser, matrix), y, mask, grid=grid, **options), matrix.T)
