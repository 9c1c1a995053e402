"""Shared by all tests: seeds, closed-form data, grids in every frame, and the solvers with their options."""

from __future__ import annotations

import pytest
import torch

from fastode import SOLVERS, Grid
from fastode.denoisers import Gaussian, GaussianMixture
from fastode.schedules import EDM, Discrete, Flow, VPLinear, karras, linspace, log_snr, time_uniform

torch.set_num_threads(1)  # tests are many and small: threads that wait for each other made them 20 times slower

VARIANTS: list[tuple[str, dict]] = [
    ("ddim", {}),
    ("heun", {}),
    ("dpm_solver_2", {}),
    ("dpm_solver_2", {"r": 0.3}),
    ("dpm_solver_3", {}),
    ("dpm_solver_3", {"lower_order_final": True}),
    *[("dpm_solver_pp", {"order": o, "prediction": m}) for o in (1, 2, 3) for m in ("x0", "eps")],
    ("dpm_solver_pp", {"order": 3, "solver_type": "heun", "lower_order_final": False}),
    ("dpm_solver_pp", {"order": 3, "exact": True}),
    *[("dpm_solver_pp_s", {"order": o, "prediction": m}) for o in (2, 3) for m in ("x0", "eps")],
    *[("deis", {"order": o, "space": s}) for o in (1, 2, 3, 4) for s in ("t", "rho", "lam")],
    ("deis", {"order": 3, "space": "lam", "lower_order_final": True}),
    *[("ipndm", {"order": o}) for o in (1, 2, 3, 4)],
    *[("ipndm_v", {"order": o, "exact": e}) for o in (1, 2, 3, 4) for e in (False, True)],
    *[
        ("unipc", {"order": o, "variant": v, "prediction": m})
        for o in (1, 2, 3)
        for v in ("bh1", "bh2")
        for m in ("x0", "eps")
    ],
    ("unipc", {"order": 3, "corrector": False}),
    ("unipc", {"order": 2, "exact": True}),
    ("pndm", {}),
    ("pndm", {"skip_prk_steps": True}),
    *[("lms", {"order": o}) for o in (1, 2, 3, 4)],
    ("edm", {}),
    ("amed", {}),
    ("amed", {"r": 0.3}),
    ("ddim", {"eta": 0.6}),
    ("edm", {"s_churn": 4.0, "s_tmin": 0.05, "s_tmax": 50.0}),
    *[("euler_ancestral", {"eta": e}) for e in (1.0, 0.5)],
    *[("dpm_2_ancestral", {"eta": e}) for e in (1.0, 0.5)],
    *[("dpmpp_2s_ancestral", {"eta": e}) for e in (1.0, 0.5)],
    ("ddpm", {}),
    ("ddpm", {"variance_type": "fixed_large", "s_noise": 0.9}),
    *[("sde_dpm_solver_pp", {"order": o}) for o in (1, 2, 3)],
    ("sde_dpm_solver_pp", {"solver_type": "heun", "eta": 0.5, "lower_order_final": False}),
    ("sde_dpm_solver_pp", {"order": 3, "eta": 0.7, "exact": True}),
    ("dpmpp_3m_sde", {}),
    ("dpmpp_sde", {}),
    ("dpmpp_sde", {"r": 0.7, "eta": 0.5, "s_noise": 1.1, "brownian": False}),
    ("sa_solver", {}),
    ("sa_solver", {"predictor_order": 3, "corrector_order": 4, "tau": 0.8}),
    ("sa_solver", {"predictor_order": 2, "corrector_order": 0, "s_tmin": 0.05, "s_tmax": 10.0}),
    ("sa_solver", {"corrector_order": 1, "exact": True, "lower_order_final": False}),
    ("lcm", {}),
    ("lcm", {"sigma_min": 0.001}),
    ("restart", {}),  # with intervals: tests/test_restart.py, since those must fit the grid
    ("restart", {"base": "dpm_solver_2(r=0.4)"}),
    ("sampler_scheduler", {}),
    ("sampler_scheduler", {"plan": "heun-dpmpp2m-euler"}),
    ("sampler_scheduler", {"plan": "euler*1/2 + dpmpp_2m(lower_order_final=false)*1/2", "history": "keep"}),
]
"""Every solver with every option that changes its formula."""

assert {name for name, _ in VARIANTS} == set(SOLVERS), "every solver of SOLVERS is tested"


def variant_id(case: tuple[str, dict]) -> str:
    name, options = case
    return name + "".join(f"-{v}" for v in options.values())


def make_grid(kind: str, steps: int = 7) -> Grid:
    """Grids in every frame; the flow grid stops short of both ends, where the EDM frame is finite."""
    return {
        "edm": lambda: karras(EDM(), steps),
        "zero": lambda: karras(EDM(), steps, final="zero"),
        "vp": lambda: log_snr(VPLinear(), steps),
        "vp_time": lambda: time_uniform(VPLinear(), steps),
        "ddpm": lambda: linspace(Discrete.linear(), steps),
        "flow": lambda: time_uniform(Flow(t_max=0.99, t_min=0.01), steps),
        "flow_full": lambda: time_uniform(Flow(), steps),
    }[kind]()


def start(grid: Grid, shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """A state at the first level: noise at its level, and some signal where the level carries any."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(shape, generator=g, dtype=torch.float64)
    return (float(grid.sigma[0]) * z + float(grid.alpha[0]) * 0.1).to(dtype)


def draws(x: torch.Tensor, count: int = 64) -> list[torch.Tensor]:
    """The draws of a stochastic solver, given: standard normal numbers of the shape of ``x``, in float64."""
    g = torch.Generator().manual_seed(77)
    return [torch.randn(x.shape, generator=g, dtype=torch.float64) for _ in range(count)]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference over largest magnitude of ``b``."""
    return float((a - b).abs().max() / b.abs().max())


@pytest.fixture(scope="session")
def gaussian() -> Gaussian:
    """Four coordinates with different means and variances: not isotropic, so that gains differ between elements."""
    return Gaussian(torch.tensor([0.3, -0.5, 0.0, 1.0]), torch.tensor([0.25, 0.05, 1.0, 0.6]))


@pytest.fixture(scope="session")
def mixture() -> GaussianMixture:
    """Four components in six dimensions: curved trajectories, no closed form a solver could hit by accident."""
    g = torch.Generator().manual_seed(1)
    return GaussianMixture(2 * torch.randn(4, 6, generator=g), torch.tensor([0.1, 0.3, 0.2, 0.5]))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
