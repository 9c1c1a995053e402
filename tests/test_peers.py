"""Every solver against the diffusers scheduler that implements it: same grid, same start, closed-form denoiser.

The float64 runs read ``float32`` as ``float64`` inside the scheduler's module, because most schedulers keep their tables
(and some their state) in float32; nothing else of them changes. ``pytest tests/test_peers.py -s`` prints each difference;
docs/peers.md keeps them, with those against peers that cannot be installed.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

import fastode
from fastode import Denoiser, Grid
from fastode.denoisers import GaussianMixture
from fastode.schedules import Discrete, Flow

diffusers = pytest.importorskip("diffusers", reason="diffusers is an optional extra: pip install 'fastode[diffusers]'")

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
SHAPE = (4, 3, 2, 2)


def mixture() -> GaussianMixture:
    g = torch.Generator().manual_seed(0)
    means = torch.randn(5, *SHAPE[1:], generator=g, dtype=torch.float64)
    return GaussianMixture(means, covariances=[0.1, 0.2, 0.3, 0.4, 0.5], weights=[1, 2, 3, 2, 1])


def draw(seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --- the peer -----------------------------------------------------------------------------------------------------------


class Double:
    """A module whose ``float32`` is ``float64``."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, "float64" if name == "float32" else name)


@contextmanager
def precision(module: ModuleType, dtype: torch.dtype) -> Iterator[None]:
    if dtype == torch.float32:
        yield
        return
    names = {name: Double(value) for name, value in (("torch", torch), ("np", np)) if hasattr(module, name)}
    try:
        torch.set_default_dtype(torch.float64)
        with mock.patch.multiple(module, **names):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def scheduler(name: str, dtype: torch.dtype, steps: int, config: dict[str, Any]) -> Iterator[Any]:
    cls = getattr(diffusers, name)
    with precision(sys.modules[cls.__module__], dtype), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated algorithm types; scale_model_input not called
        made = cls(**config)
        made.set_timesteps(steps)
        yield made


def levels_of_calls(s: Any) -> list[float]:
    """sigma/alpha of every network call."""
    if isinstance(s, (diffusers.DDIMScheduler, diffusers.PNDMScheduler)):
        bar = s.alphas_cumprod.double()[s.timesteps]
        return ((1 - bar) / bar).sqrt().tolist()
    sigmas = s.sigmas.double().tolist()
    if isinstance(s, diffusers.KDPM2DiscreteScheduler):
        between = s.sigmas_interpol.double().tolist()
        return [between[i] if i % 2 else sigmas[i] for i in range(len(s.timesteps))]
    if isinstance(s, diffusers.FlowMatchEulerDiscreteScheduler):
        return [v / (1 - v) if v < 1 else float("inf") for v in sigmas[:-1]]
    return sigmas[: len(s.timesteps)]


def alpha_of(s: Any, rho: float) -> float:
    variance_exploding = ("Euler", "Heun", "KDPM2", "LMS", "EDM")
    return 1.0 if type(s).__name__.startswith(variance_exploding) else (1 + rho**2) ** -0.5


def run_peer(s: Any, x: Tensor, noise: list[Tensor] | None = None, **step: Any) -> Tensor:
    """The pipeline's loop, with the network in closed form."""
    data = mixture()
    for i, (t, rho) in enumerate(zip(s.timesteps, levels_of_calls(s), strict=True)):
        if isinstance(s, diffusers.FlowMatchEulerDiscreteScheduler):
            output = flow_network(x, torch.as_tensor(rho / (1 + rho) if rho < float("inf") else 1.0, dtype=x.dtype))
        else:
            alpha = alpha_of(s, rho)
            d = data(x / alpha, rho)
            if s.config.get("prediction_type") == "sample":
                output = d
            elif type(s).__name__.startswith("EDM"):
                c = s.config.sigma_data
                output = (d - c**2 / (rho**2 + c**2) * x) * (rho**2 + c**2) ** 0.5 / (rho * c)
            else:
                output = (x - alpha * d) / (alpha * rho)
        if noise is not None:
            step["variance_noise"] = noise[i] if i < len(noise) else torch.zeros_like(x)
        x = s.step(output, t, x, **step).prev_sample
    return x


def flow_network(x: Tensor, t: Tensor, **_: Any) -> Tensor:
    """E[n - x_0 | x] for x = (1 - t) x_0 + t n and one Gaussian N(m, v): finite at t = 1."""
    t = t.reshape(-1, *[1] * (x.ndim - 1)) if t.ndim else t
    mean = mixture().means[0].to(x)
    gain = ((1 - t) * 0.3 - t) / ((1 - t) ** 2 * 0.3 + t**2)
    return -mean - gain * (x - (1 - t) * mean)


# --- ours, on the peer's own levels ---------------------------------------------------------------------------------------


def grid_of(s: Any) -> Grid:
    if isinstance(s, (diffusers.DDIMScheduler, diffusers.PNDMScheduler)):
        stride = len(s.alphas_cumprod) // s.num_inference_steps
        labels = np.unique(s.timesteps.numpy())[::-1]
        if isinstance(s, diffusers.PNDMScheduler) and not s.config.skip_prk_steps:
            labels = np.flip(np.arange(s.num_inference_steps)) * stride + s.config.steps_offset
        bar = [*s.alphas_cumprod[labels.copy()].tolist(), float(s.final_alpha_cumprod)]
        table = Discrete(tuple(s.alphas_cumprod.tolist()))
        bar_t = torch.unique_consecutive(torch.tensor(bar, dtype=torch.float64))
        return Grid(sigma=(1 - bar_t).sqrt(), alpha=bar_t.sqrt(), schedule=table)
    rho = s.sigmas.double()
    rho = torch.unique_consecutive(rho)  # Heun and KDPM2 list a level per call; some end with an empty step
    if isinstance(s, diffusers.FlowMatchEulerDiscreteScheduler):
        return Grid(sigma=rho, alpha=1 - rho, schedule=Flow())
    alpha = torch.tensor([alpha_of(s, float(r)) for r in rho])
    return Grid(sigma=rho * alpha, alpha=alpha)


def compare(name: str, dtype: torch.dtype, solver: str, options: dict[str, Any], steps: int, **config: Any) -> float:
    config = dict(config)
    every = config.pop("every", 1)  # a block of the peer's levels is one step of ours
    step = config.pop("step", {})
    with scheduler(name, dtype, steps, config) as s:
        grid = grid_of(s)
        x = draw(1, dtype) * float(grid.sigma[0])
        noise = [draw(10 + i, dtype) for i in range(steps)] if step.get("eta") else None
        theirs = run_peer(s, x, noise, **step)
    if every > 1:
        last = grid.steps
        keep = sorted({*range(0, last, every), last})
        grid = Grid(sigma=grid.sigma[keep], alpha=grid.alpha[keep])
    flow = isinstance(s, diffusers.FlowMatchEulerDiscreteScheduler)
    denoiser = Denoiser(flow_network, prediction="flow") if flow else mixture()
    ours = fastode.sample(denoiser, x, solver=solver, grid=grid, noise=noise, **options)
    assert ours.dtype == theirs.dtype == dtype
    return float((ours - theirs).abs().max() / theirs.abs().max())


DPM, UNIPC, DEIS = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"
SINGLE, PNDM, EDM_DPM = "DPMSolverSinglestepScheduler", "PNDMScheduler", "EDMDPMSolverMultistepScheduler"


def cases() -> Iterator[Any]:
    def case(label: str, *values: Any, **config: Any) -> Any:
        return pytest.param(*values, config, id=label)

    for spacing_ in ("leading", "trailing"):
        for eta in (0.0, 1.0):
            own: dict[str, Any] = {"clip_sample": False, "timestep_spacing": spacing_, "step": {"eta": eta}}
            yield case(f"ddim-{spacing_}-eta{eta:g}", "DDIMScheduler", "ddim", {"eta": eta}, 10, **own)
    sd = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    own = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, **sd}
    yield case("ddim-stable-diffusion", "DDIMScheduler", "ddim", {}, 10, **own)

    for order in (1, 2, 3):
        for kind in ("midpoint", "heun"):
            if order == 2 or kind == "midpoint":
                o = {"order": order, "solver_type": kind}
                c = {"solver_order": order, "solver_type": kind}
                yield case(f"dpm++{order}{kind}", DPM, "dpm_solver_pp", o, 8, **c)
                noise_mode = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
                yield case(f"dpm{order}{kind}", DPM, "dpm_solver_pp", {**o, "prediction": "eps"}, 8, **c, **noise_mode)
    long = {"order": 3, "lower_order_final": False}  # the peer lowers the order at the end below 15 steps only
    yield case("dpm++3-20-steps", DPM, "dpm_solver_pp", long, 20, solver_order=3)
    yield case("dpm++3-not-lowered", DPM, "dpm_solver_pp", long, 8, solver_order=3, lower_order_final=False)
    placements: dict[str, dict[str, Any]] = {
        "leading": {"timestep_spacing": "leading", "steps_offset": 1},
        "trailing": {"timestep_spacing": "trailing"},
        "sigma_min": {"final_sigmas_type": "sigma_min"},
        "karras": {"use_karras_sigmas": True},
        "exponential": {"use_exponential_sigmas": True},
        "lu": {"use_lu_lambdas": True},
        "x0": {"prediction_type": "sample"},
    }
    for label, c in placements.items():
        yield case(f"dpm++3-{label}", DPM, "dpm_solver_pp", {"order": 3}, 8, solver_order=3, **c)

    block = {"solver_order": 2, "use_exponential_sigmas": True, "every": 2}  # r = 1/2 on a log-SNR grid
    yield case("dpm++2s", SINGLE, "dpm_solver_pp_s", {}, 9, **block)
    noise_mode = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
    yield case("dpm2s", SINGLE, "dpm_solver_2", {}, 9, **block, **noise_mode)

    for order in (1, 2, 3):
        for variant in ("bh1", "bh2"):
            for x0 in (True, False):
                o = {"order": order, "variant": variant, "prediction": "x0" if x0 else "eps"}
                c = {"solver_order": order, "solver_type": variant, "predict_x0": x0, "final_sigmas_type": "sigma_min"}
                yield case(f"unipc{order}-{variant}-{o['prediction']}", UNIPC, "unipc", o, 8, **c)
    off = {"disable_corrector": list(range(8))}
    yield case("unip3", UNIPC, "unipc", {"order": 3, "corrector": False}, 8, solver_order=3, **off)
    for label in ("leading", "trailing", "karras", "exponential", "x0"):
        yield case(f"unipc3-{label}", UNIPC, "unipc", {"order": 3}, 8, solver_order=3, **placements[label])

    for order in (1, 2, 3):
        c = {"solver_order": order, "lower_order_final": False}
        yield case(f"deis{order}", DEIS, "deis", {"order": order, "space": "lam"}, 8, **c)

    for skip in (False, True):
        for one in (False, True):
            c = {"skip_prk_steps": skip, "set_alpha_to_one": one}
            label = f"{'plms' if skip else 'pndm'}-to-{'zero' if one else 'label-0'}"
            yield case(label, PNDM, "pndm", {"skip_prk_steps": skip}, 10, **c)
    yield case("plms-stable-diffusion", PNDM, "pndm", {"skip_prk_steps": True}, 10, skip_prk_steps=True, steps_offset=1, **sd)

    for name, solver in (("Euler", "ddim"), ("Heun", "heun"), ("KDPM2", "dpm_solver_2"), ("LMS", "lms")):
        for karras in (False, True):
            label = f"{name}-{'karras' if karras else 'linspace'}"
            yield case(label.lower(), f"{name}DiscreteScheduler", solver, {}, 8, use_karras_sigmas=karras)
    yield case("edm-euler", "EDMEulerScheduler", "ddim", {}, 8)
    for order in (1, 2, 3):
        yield case(f"edm-dpm++{order}", EDM_DPM, "dpm_solver_pp", {"order": order}, 8, solver_order=order)
    for shift in (1.0, 3.0):
        yield case(f"flow-euler-shift{shift:g}", "FlowMatchEulerDiscreteScheduler", "ddim", {}, 8, shift=shift)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize(("name", "solver", "options", "steps", "config"), cases())
def test_scheduler(
    name: str, solver: str, options: dict[str, Any], steps: int, config: dict[str, Any], dtype: torch.dtype
) -> None:
    difference = compare(name, dtype, solver, options, steps, **config)
    print(f"\n{name:32} {difference:.1e}  ", end="")
    assert difference <= TOLERANCE[dtype]
