"""Every solver equals its plain float64 loop in ``tests/papers/``, written from the paper, and makes as many calls."""

import importlib
import math

import numpy as np
import pytest
import torch

import fastode
from fastode.schedules.spacing import diffusion_time
from tests.conftest import VARIANTS, draws, make_grid, relative, start, variant_id


def oracle(name, options, grid, mixture, x):
    """The paper's loop on the same levels and with the same draws; returns the final state and the evaluations."""
    calls = []

    def denoise(y, alpha, sigma):
        calls.append(sigma)
        return mixture(torch.from_numpy(np.asarray(y)) / alpha, sigma / alpha).numpy()

    extra = given_draws(name, options, grid, x)
    if name == "deis" and options.get("space", "t") == "t":
        clock = diffusion_time(grid.schedule)
        extra["t_of_rho"] = lambda rho: float(clock.time(rho)) if math.isfinite(rho) else math.nan
    if name == "pndm" and not options.get("skip_prk_steps", False):
        levels = list(grid)

        def between(i):
            level = grid.at_time(levels[i], levels[i + 1], 0.5)
            return level.alpha, level.sigma

        extra["between_t"] = between
    loop = importlib.import_module(f"tests.papers.{name}")
    final = loop.sample(denoise, x.numpy(), grid.alpha.tolist(), grid.sigma.tolist(), **options, **extra)
    return torch.from_numpy(final), len(calls)


def given_draws(name, options, grid, x):
    if not fastode.SOLVERS[name](grid, **options).draws:
        return {}
    return {"noise": [z.numpy() for z in draws(x)]}


@pytest.mark.parametrize("kind", ["edm", "zero", "vp", "vp_time", "ddpm", "flow"])
@pytest.mark.parametrize("case", VARIANTS, ids=variant_id)
def test_equals_the_paper(mixture, case, kind):
    name, options = case
    if kind == "ddpm" and name == "deis" and options["space"] == "t":
        return  # the oracle's quadrature needs a smooth time; test_deis_on_a_table covers this case
    grid = make_grid(kind)
    x = start(grid, (3, 6))
    truth, calls = oracle(name, options, grid, mixture, x)
    program = fastode.SOLVERS[name](grid, **options)
    assert program.nfe == calls
    for backend in ("reference", "torch"):
        samples = fastode.sample(mixture, x, solver=name, grid=grid, noise=draws(x), backend=backend, **options)
        # The issue asks for 1e-12; both sides are float64 sums of at most ten terms per step.
        assert relative(samples, truth) < 1e-12


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("case", VARIANTS, ids=variant_id)
def test_equals_the_paper_at_few_steps(mixture, case, steps):
    """Warm-up and final rules meet when there are fewer steps than the order."""
    name, options = case
    for kind in ("edm", "zero"):
        grid = make_grid(kind, steps)
        x = start(grid, (2, 6))
        truth, calls = oracle(name, options, grid, mixture, x)
        run = fastode.sample(mixture, x, solver=name, grid=grid, noise=draws(x), return_trajectory=True, **options)
        # PNDM's warm-up forms noise predictions at the end of a step: a rounding is divided by 0.002 and multiplied by 80.
        # So do, in one step from 80 to 0.002, the textbook's formulas of two-stage ancestral steps.
        assert relative(run.samples, truth) < (
            1e-12 if name not in ("pndm", "dpm_2_ancestral", "sampler_scheduler") else 1e-10
        )
        assert run.nfe == calls == len(run.sigmas)


@pytest.mark.parametrize("case", VARIANTS, ids=variant_id)
def test_flow_from_pure_noise_equals_the_paper(case):
    """alpha = 0 at the first level: rho and lam are infinite there."""
    name, options = case
    grid = make_grid("flow_full", 6)
    target = torch.tensor([0.5, -1.0], dtype=torch.float64)

    def x0(x, sigma):  # any smooth function of the state and its level will do
        return target + 0.3 * torch.tanh(x) * (1 - sigma)

    def denoise(y, alpha, sigma):
        return x0(torch.from_numpy(np.asarray(y)), sigma).numpy()

    x = start(grid, (3, 2))
    extra = given_draws(name, options, grid, x)
    if name == "deis" and options.get("space") == "t":
        extra["t_of_rho"] = lambda rho: rho / (1 + rho)
    if name == "pndm" and not options.get("skip_prk_steps", False):
        levels = list(grid)
        extra["between_t"] = lambda i: (lambda v: (v.alpha, v.sigma))(grid.at_time(levels[i], levels[i + 1], 0.5))
    loop = importlib.import_module(f"tests.papers.{name}")
    inner = (
        "amed",
        "dpm_solver_2",
        "dpm_solver_3",
        "dpm_solver_pp_s",
        "dpm_2",
        "dpmpp_2s",
        "dpmpp_sde",
        "sampler_scheduler",
    )
    if name.startswith(inner):
        extra["between"] = lambda a_s, s_s, a_t, s_t, r: _flow_between(a_s, s_s, a_t, s_t, r)
    if options.get("s_churn"):
        extra["frame"] = lambda rho: (1 / (1 + rho), rho / (1 + rho))
    truth = loop.sample(denoise, x.numpy(), grid.alpha.tolist(), grid.sigma.tolist(), **options, **extra)
    network = fastode.Denoiser(lambda y, t: x0(y, t.reshape(-1, 1)), "x0", fastode.schedules.Flow())
    samples = fastode.sample(network, x, solver=name, grid=grid, noise=draws(x), **options)
    assert relative(samples, torch.from_numpy(truth)) < 1e-12


def _flow_between(a_s, s_s, a_t, s_t, r):
    rho = (s_t / a_t) ** r * (s_s / a_s) ** (1 - r)
    return 1 / (1 + rho), rho / (1 + rho)


def test_deis_on_a_table(mixture):
    """On a tabulated schedule the time weights integrate the piecewise smooth rho(t) exactly: compare with brute force."""
    schedule = fastode.schedules.Discrete.linear()
    from fastode.solvers.coefficients import time_weights

    nodes = [700.0, 850.0, 999.0]
    s, t = 700.0, 500.0
    weights = time_weights(schedule, nodes, s, t, schedule.rho(s), schedule.rho(t))
    u = torch.linspace(s, t, 2_000_001, dtype=torch.float64)
    rho = schedule.rho(u)
    for j, node in enumerate(nodes):
        basis = torch.ones_like(u)
        for i, other in enumerate(nodes):
            if i != j:
                basis = basis * (u - other) / (node - other)
        brute = (0.5 * (basis[1:] + basis[:-1]) * (rho[1:] - rho[:-1])).sum()
        assert abs(weights[j] - float(brute)) < 1e-9 * abs(float(brute))  # trapezoid error of the brute force


def test_denoise_to_zero_adds_one_evaluation(mixture):
    grid = make_grid("edm")
    x = start(grid, (2, 6))
    for name in fastode.SOLVERS:
        call = {"solver": name, "grid": grid, "noise": draws(x), "return_trajectory": True}
        plain = fastode.sample(mixture, x, **call)
        more = fastode.sample(mixture, x, denoise_to_zero=True, **call)
        assert more.nfe == plain.nfe + 1
        assert relative(more.samples, mixture(plain.samples, 0.002)) < 1e-13


def test_analytical_first_step_saves_one_evaluation(mixture):
    """AFS is the solver with the first evaluation answered by x (1 - sigma / sqrt(1 + sigma^2))."""
    grid = make_grid("edm")
    x = start(grid, (2, 6))
    for name in fastode.SOLVERS:
        calls = []

        def answered(y, sigma, calls=calls):
            calls.append(sigma)
            s = torch.as_tensor(sigma, dtype=torch.float64)
            return y * (1 - s / torch.sqrt(1 + s * s)) if len(calls) == 1 else mixture(y, sigma)

        plain = fastode.sample(answered, x, solver=name, grid=grid, noise=draws(x))
        run = fastode.sample(mixture, x, solver=name, grid=grid, noise=draws(x), afs=True, return_trajectory=True)
        assert run.nfe == len(calls) - 1
        # 1 - sigma/sqrt(1 + sigma^2) loses four digits at sigma = 80 in the comparison's own formula
        assert relative(run.samples, plain) < 1e-10
