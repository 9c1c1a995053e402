"""The one-call form: ``fastode.sample(denoiser, x, solver=..., grid=...)``."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastode.artifact import Artifact
from fastode.denoisers.base import Denoiser
from fastode.denoisers.guidance import Guidance
from fastode.engine import Engine, NoiseSource
from fastode.interop.arrays import to_torch
from fastode.models import load_solver
from fastode.noise import check_seeds
from fastode.schedules.grid import Grid
from fastode.schedules.noise import NoiseSchedule
from fastode.schedules.spacing import GRIDS
from fastode.solvers import SOLVERS, Solver
from fastode.watch import Callback

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


def sample(
    denoiser: Denoiser | Callable[..., Any],
    x: Any = None,
    *,
    solver: str | Solver | Artifact = "dpm_solver_pp",
    grid: Grid | ArrayLike | Sequence[float] | None = None,
    nfe: int | None = None,
    class_labels: Tensor | Sequence[int] | int | None = None,
    guidance_scale: float | Sequence[float] | Tensor | None = None,
    guidance: Guidance | None = None,
    cond: Mapping[str, Any] | None = None,
    uncond: Mapping[str, Any] | None = None,
    seeds: Sequence[int] | Tensor | None = None,
    noise: NoiseSource | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    backend: str = "auto",
    callback: Callback | None = None,
    progress: bool = False,
    return_trajectory: bool = False,
    check_finite: bool | None = None,
    **options: Any,
) -> Any:
    """Sample a diffusion model.

    Args:
        denoiser: a :class:`Denoiser`, or a plain callable ``D(x, sigma)`` in the EDM frame.
        x: the state at the first level, [B, *sample] (``sigma_0`` times unit noise, for grids that start at noise): a
            tensor, or an array of NumPy, CuPy, JAX or anything with DLPack, which is then also what is returned, without
            copies on the same device. May be left out when ``seeds`` (or one generator per sample) are given and the
            denoiser knows its sample shape.
        solver: a name in ``SOLVERS``, a :class:`Solver`, or a learned solver: an :class:`Artifact`, the path of its file
            or the name of a bundled one, "mnist/amed-5" (which bring their own grid and options).
        grid: a :class:`Grid`, or EDM-frame sigmas taken as given, nothing appended. Or leave it out and give ``nfe``: then
            the solver's usual grid is made with exactly that many evaluations.
        class_labels, cond: conditions; ``guidance_scale`` (a number or one per sample) turns on classifier-free guidance,
            against ``uncond`` or the network's "no class" label. ``guidance`` sets its interval and batching.
        seeds: one whole number per sample: the initial state if ``x`` is left out, and the noise of stochastic solvers.
        noise, generator, callback, progress, return_trajectory: see :meth:`Engine.__call__`.
        options: the solver's own, and ``afs``, ``denoise_to_zero``.

    Returns [B, *sample] in float64 if ``x`` is float64, float32 otherwise; a :class:`Result` with ``return_trajectory``.
    Raises ``ValueError`` or ``TypeError`` naming the argument before anything is computed.
    """
    d = Denoiser.of(denoiser)
    given, back = x, None
    artifact = learned(solver)
    if artifact is not None:
        if grid is not None or nfe is not None or options:
            extra = "grid" if grid is not None else "nfe" if nfe is not None else next(iter(options))
            raise ValueError(f"{extra}: a learned solver brings its own grid and options; leave it out")
        artifact.check(d, guidance_scale=guidance_scale)
    else:
        assert not isinstance(solver, Artifact)
        chosen = solver if isinstance(solver, Solver) else SOLVERS[solver]
        chosen.check(options)
    if x is not None:
        x, back = to_torch("x", x)
    if x is not None and not x.dtype.is_floating_point:
        raise TypeError(f"x: must be floating point, got {x.dtype}")
    if artifact is not None:
        program = artifact.program()
    elif (grid is None) == (nfe is None):
        raise ValueError("grid: give a grid, or nfe to have one made" + (", not both" if grid is not None else ""))
    elif nfe is not None:
        assert d.schedule is not None
        levels, options = chosen.plan(nfe, grid_maker(chosen, d.schedule), **options)
        program = chosen(levels, **options)
    else:
        program = chosen(Grid.of(grid), **options)  # type: ignore[arg-type]
    if x is not None:
        shape: tuple[int, ...] = tuple(x.shape)
    elif seeds is not None and d.sample_shape is not None:
        shape = (len(check_seeds(seeds)), *d.sample_shape)
    elif isinstance(generator, Sequence) and d.sample_shape is not None:
        shape = (len(generator), *d.sample_shape)
    else:
        raise ValueError("x: give the state at the first level, or seeds with a denoiser that knows its sample shape")
    guided = guidance or (Guidance() if guidance_scale is not None else None)
    engine = Engine(
        program,
        d,
        shape,
        _differentiable(backend, x, program.grid, guidance_scale),
        device=None if x is None else x.device,
        dtype=torch.float64 if x is not None and x.dtype == torch.float64 else torch.float32,
        guidance=guided,
        check_finite=check_finite,
    )
    made = engine(
        x,
        seeds=seeds,
        class_labels=class_labels,
        guidance_scale=guidance_scale,
        cond=cond,
        uncond=uncond,
        noise=noise,
        generator=generator,
        callback=callback,
        progress=progress,
        return_trajectory=return_trajectory,
    )
    if back is None or isinstance(given, Tensor):
        return made
    if return_trajectory:
        return replace(made, samples=back(made.samples), states=[back(state) for state in made.states])
    return back(made)


def learned(solver: Any) -> Artifact | None:
    """The artifact that ``solver`` is or names, if it is no solver."""
    if isinstance(solver, Artifact):
        return solver
    if isinstance(solver, os.PathLike) or (isinstance(solver, str) and solver.endswith(".safetensors")):
        return Artifact.load(solver)
    if isinstance(solver, str) and "/" in solver:
        model, _, rest = solver.rpartition("/")
        name, _, nfe = rest.rpartition("-")
        return load_solver(model, name, nfe=int(nfe) if nfe.isdecimal() else 0)
    return None


def grid_maker(solver: Solver, schedule: NoiseSchedule, name: str | None = None, **kwargs: Any) -> Callable[..., Grid]:
    """``make(steps=..., final=...)`` for the named placement of levels, by default the solver's usual one.

    A schedule without a finite range in the EDM frame (a flow) gets uniform times instead of a Karras or log-SNR grid.
    """
    if name is not None and name not in GRIDS:
        raise ValueError(f"grid: must be one of {', '.join(GRIDS)}, got {name!r}")
    chosen = name or solver.grid
    finite = schedule.sigma_max < math.inf and schedule.sigma_min > 0
    if name is None and not finite:
        chosen = "time_uniform"

    def make(*, steps: int, final: str) -> Grid:
        end = final if finite or schedule.sigma_min > 0 else "sigma_min"
        return GRIDS[chosen](schedule, steps, **{"final": end, **kwargs})

    return make


def _differentiable(backend: str, x: Tensor | None, grid: Grid, scale: Any) -> str:
    """ "auto" means the reference backend where a gradient is asked for: it is the differentiable one."""
    wanted = (x is not None and x.requires_grad) or grid.sigma.requires_grad or grid.alpha.requires_grad
    wanted = wanted or (isinstance(scale, Tensor) and scale.requires_grad)
    return "reference" if backend == "auto" and wanted and torch.is_grad_enabled() else backend
