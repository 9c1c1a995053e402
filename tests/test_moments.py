"""Stochastic solvers on Gaussian data: mean and covariance, exactly, against the closed form of the SDE they solve.

Nothing is sampled: a program on Gaussian data is an affine map, and :func:`fastode.evaluate.moments.push` pushes the law
of the start through it. In the EDM frame, the SDE with ``eta`` times the noise of the reverse diffusion takes a start
N(m, V) at rho_s to

    mean - mu = ((v + rho_t^2)/(v + rho_s^2))^((1 + eta)/2) (m - mu)
    variance  = (v + rho_t^2) + ((v + rho_t^2)/(v + rho_s^2))^(1 + eta) (V - v - rho_s^2)

so that a wrong start is forgotten at a rate that depends on eta: a program that adds the right amount of noise in the wrong
way does not pass. DDIM's and the ancestral samplers' eta is a standard deviation: the rate is its square.
"""

import math

import pytest
import torch

import fastode
from fastode import Denoiser
from fastode.denoisers import Gaussian
from fastode.evaluate.moments import Moments, marginal, push
from fastode.schedules import EDM, karras, log_snr
from tests.conftest import VARIANTS, draws, make_grid, relative, start, variant_id

MEAN, V = torch.tensor([0.3, -0.5, 0.0, 1.0]).double(), torch.tensor([0.25, 0.05, 1.0, 0.6]).double()


@pytest.fixture(scope="module")
def full():
    """Correlated coordinates."""
    basis = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)).Q
    return Gaussian(MEAN, basis @ torch.diag(V) @ basis.T)


@pytest.mark.parametrize("kind", ["edm", "zero", "vp", "flow"])
@pytest.mark.parametrize("case", VARIANTS[::4], ids=variant_id)
def test_push_is_what_the_engine_does(full, case, kind):
    """The affine map read off the engine, column by column: its offset, its start's and every draw's matrix."""
    name, options = case
    grid = make_grid(kind, 4)
    program = fastode.SOLVERS[name](grid, **options)
    columns = 1 + 4 + 4 * program.draws  # nothing, a unit in the start, a unit in a draw
    x = torch.zeros(columns, 4, dtype=torch.float64)
    x[1:5] = torch.eye(4)
    z = torch.zeros(program.draws, columns, 4, dtype=torch.float64)
    for k in range(program.draws):
        z[k, 5 + 4 * k : 9 + 4 * k] = torch.eye(4)
    out = fastode.Engine(program, full, x.shape, "reference", dtype=torch.float64)(x, noise=list(z))
    matrix = (out[1:] - out[0]).T
    law = marginal(full, grid[0])
    spread = matrix[:, :4] @ law.covariance @ matrix[:, :4].T + matrix[:, 4:] @ matrix[:, 4:].T
    found = push(program, full)[-1]
    assert relative(found.mean, out[0] + matrix[:, :4] @ law.mean) < 1e-10  # PNDM's warm-up amplifies roundings
    assert relative(found.covariance, spread) < 1e-10


def closed_form(s: float, t: float, rate: float, m: torch.Tensor, variance: torch.Tensor) -> Moments:
    ratio = (V + t**2) / (V + s**2)
    mean = MEAN + ratio ** ((1 + rate) / 2) * (m - MEAN)
    return Moments(mean, torch.diag(V + t**2 + ratio ** (1 + rate) * (variance - V - s**2)))


F = {"lower_order_final": False}
ORDERS = [  # solver, options, rate of the SDE, weak order on Gaussian data
    ("ddim", {}, 0, 1),
    ("ddim", {"eta": 0.6}, 0.36, 1),
    ("euler_ancestral", {}, 1, 1),
    ("euler_ancestral", {"eta": 0.5}, 0.25, 1),
    ("ddpm", {}, 1, 1),
    ("ddpm", {"variance_type": "fixed_large"}, 1, 1),
    ("dpm_2_ancestral", {}, 1, 1),  # second order only where the law is already right: see below
    ("dpm_2_ancestral", {"eta": 0.5}, 0.25, 1),
    ("dpmpp_2s_ancestral", {}, 1, 1),
    ("dpmpp_2s_ancestral", {"eta": 0.5}, 0.25, 1),
    ("sde_dpm_solver_pp", {"order": 1}, 1, 1),
    ("sde_dpm_solver_pp", {}, 1, 2),
    ("sde_dpm_solver_pp", {"solver_type": "heun", "eta": 0.5, **F}, 0.5, 2),
    ("sde_dpm_solver_pp", {"order": 3, **F}, 1, 2),
    ("sde_dpm_solver_pp", {"order": 3, "exact": True, "eta": 0.7, **F}, 0.7, 2),
    ("dpmpp_3m_sde", {}, 1, 2),
    ("dpmpp_sde", {}, 1, 2),
    ("dpmpp_sde", {"eta": 0.5}, 0.25, 1),
    ("dpmpp_sde", {"brownian": False}, 1, 1),  # the two noises of a step must be those of one path
    ("sa_solver", {"predictor_order": 1, "corrector_order": 0}, 1, 1),
    ("sa_solver", {"corrector_order": 0}, 1, 2),
    ("sa_solver", {}, 1, 2),
    ("sa_solver", {"predictor_order": 3, "corrector_order": 3, "tau": 0.6, **F}, 0.36, 2),
]


@pytest.mark.parametrize(("name", "options", "rate", "order"), ORDERS, ids=[variant_id(c[:2]) for c in ORDERS])
def test_weak_order(name, options, rate, order):
    """From a wrong law at sigma = 2, mean and covariance converge to the SDE's, at the weak order."""
    data = Gaussian(MEAN, V)
    m, variance = MEAN + 1, 0.5 * (V + 4)
    truth = closed_form(2.0, 0.1, rate, m, variance)
    errors = []
    for steps in (64, 128):
        grid = log_snr(EDM(0.1, 2.0), steps)
        got = push(fastode.SOLVERS[name](grid, **options), data, Moments(m, torch.diag(variance)))[-1]
        errors.append([float((got.mean - truth.mean).norm()), float((got.covariance - truth.covariance).norm())])
    # The mean is exact at a rate of 1, where the step of a linear drift is.
    slopes = [math.log2(a / b) for a, b in zip(*errors, strict=True) if a > 1e-12]
    assert abs(min(slopes) - order) < 0.25, (slopes, errors)  # at 128 steps, within 0.1 of the limit
    assert max(errors[1]) < (0.03 if order == 1 else 0.003)


@pytest.mark.parametrize("name", ["dpm_2_ancestral", "dpmpp_2s_ancestral"])
def test_two_stage_ancestral_steps_from_the_right_law(name):
    """There the marginals converge at order 2: what is of order 1 is the speed at which errors are forgotten."""
    data, errors = Gaussian(MEAN, V), []
    for steps in (64, 128):
        grid = log_snr(EDM(0.1, 2.0), steps)
        got = push(fastode.SOLVERS[name](grid), data)[-1].covariance
        errors.append(float((got - marginal(data, grid[-1]).covariance).norm()))
    assert abs(math.log2(errors[0] / errors[1]) - 2) < 0.2


def test_churn_keeps_the_marginals():
    """EDM's stochastic sampler: the law at the end converges to the data's at order 2, with churn as without."""
    data = Gaussian(MEAN, V)
    for options in ({"s_churn": 20.0}, {"s_churn": 40.0, "s_tmin": 0.05, "s_tmax": 50.0}):
        errors = []
        for steps in (128, 256):
            grid = karras(EDM(), steps, final="zero")
            got, want = push(fastode.SOLVERS["edm"](grid, **options), data)[-1], torch.diag(V)
            errors.append(float((got.covariance - want).norm()))
        assert math.log2(errors[0] / errors[1]) > 1.6
        assert errors[1] < 0.02


@pytest.mark.parametrize("kind", ["edm", "zero", "vp"])
def test_no_noise_is_the_deterministic_solver(mixture, kind):
    """eta = 0 (tau = 0, s_churn = 0) is the ODE solver: the same table, number by number, or the same sums regrouped."""
    grid = make_grid(kind)
    x = start(grid, (3, 6))
    bitwise = [
        ("euler_ancestral", {"eta": 0.0}, "ddim", {}),
        ("dpm_2_ancestral", {"eta": 0.0}, "dpm_solver_2", {}),
        ("dpmpp_2s_ancestral", {"eta": 0.0}, "dpm_solver_pp_s", {}),
        *[
            ("sde_dpm_solver_pp", {"eta": 0.0, "order": o, **extra}, "dpm_solver_pp", {"order": o, **extra})
            for o in (1, 2, 3)
            for extra in ({}, {"solver_type": "heun", **F}, {"exact": True})
        ],
        ("edm", {"s_churn": 0.0, "s_noise": 1.1}, "heun", {}),
    ]
    for name, options, other, plain in bitwise:
        program = fastode.SOLVERS[name](grid, **options)
        assert program.draws == 0
        assert program.consistent
        ours = fastode.sample(mixture, x, solver=name, grid=grid, **options)
        assert torch.equal(ours, fastode.sample(mixture, x, solver=other, grid=grid, **plain)), (name, options)
    regrouped = [
        ("dpmpp_sde", {"eta": 0.0, "r": 0.4}, "dpm_solver_pp_s", {"r": 0.4}),
        *[
            ("sa_solver", {"tau": 0.0, "predictor_order": o, **plain}, other, {"order": o, "exact": True, **more})
            for plain in ({"corrector_order": 0, "exact": True},)
            for o, other, more in (
                (2, "dpm_solver_pp", {}),
                (3, "dpm_solver_pp", {}),
                (3, "unipc", {"corrector": False}),
            )
        ],
    ]
    for name, options, other, plain in regrouped:
        ours = fastode.sample(mixture, x, solver=name, grid=grid, **options)
        assert relative(ours, fastode.sample(mixture, x, solver=other, grid=grid, **plain)) < 1e-13


def test_equalities_between_stochastic_solvers(mixture):
    grid = make_grid("zero")
    x = start(grid, (3, 6))

    def run(name, **options):
        return fastode.sample(mixture, x, solver=name, grid=grid, noise=draws(x), **options)

    ddim = run("ddim", eta=1.0)
    for name, options in (
        ("euler_ancestral", {}),
        ("ddpm", {}),
        ("sde_dpm_solver_pp", {"order": 1}),
        ("sa_solver", {"predictor_order": 1, "corrector_order": 0}),
    ):  # the posterior of the forward process is the exact step of the reverse SDE for a constant estimate
        assert relative(run(name, **options), ddim) < 1e-13
    sa = run("sa_solver", predictor_order=2, corrector_order=0, exact=True, tau=math.sqrt(0.3))
    assert relative(sa, run("sde_dpm_solver_pp", eta=0.3, exact=True)) < 1e-13
    assert relative(run("dpmpp_3m_sde"), run("sde_dpm_solver_pp", order=3, solver_type="heun", **F)) == 0


def test_consistency_functions_forget_all_but_the_last_level(gaussian):
    """With the exact consistency function, every state after the first jump has the marginal law, whatever the grid."""
    grid = karras(EDM(), 3, final="zero")
    seen = []

    def consistency(x, sigma):
        seen.append((x.clone(), float(sigma)))
        return gaussian.flow(x, float(sigma), 0.0)

    x = start(grid, (2, 4))
    z = draws(x)
    out = fastode.sample(consistency, x, solver="lcm", grid=grid, noise=z)
    for i, (state, sigma) in enumerate(seen[1:]):
        before, level = seen[i]
        torch.testing.assert_close(state, gaussian.flow(before, level, 0.0) + sigma * z[i], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(out, gaussian.flow(seen[-1][0], seen[-1][1], 0.0))


def test_lcm_boundary_condition():
    """c_skip and c_out of LCM with the label of the level, as the scheduler of diffusers computes them (test_peers)."""
    grid = make_grid("ddpm", 3)
    x = start(grid, (2, 4))
    d = Denoiser(lambda y, t: torch.zeros_like(y), "x0", grid.schedule)
    samples = fastode.sample(
        d, x, solver="lcm", grid=grid, noise=[torch.zeros_like(x)] * 3, sigma_data=0.5, timestep_scaling=1e-3
    )
    first = 0.25 / (0.999**2 + 0.25) * float(grid.alpha[1])
    rest = [0.25 / ((1e-3 * float(t)) ** 2 + 0.25) for t in grid.t[1:3]]
    assert relative(samples, x * first * rest[0] * float(grid.alpha[2]) * rest[1] * float(grid.alpha[3])) < 1e-9


BAD = {
    "eta": [
        ("ddim", -0.1), ("ddim", 1.5), ("ddim", True), ("ddim", "1"), ("euler_ancestral", 2), ("dpm_2_ancestral", -1),
        ("dpmpp_2s_ancestral", 1.01), ("sde_dpm_solver_pp", 3), ("dpmpp_3m_sde", 1.2), ("dpmpp_sde", float("nan")),
    ],
    "s_noise": [("ddim", -1), ("ddpm", float("inf")), ("lcm", "x"), ("edm", -0.5), ("sa_solver", -1), ("heun", None)],
    "tau": [("sa_solver", -0.1), ("sa_solver", float("inf"))],
    "s_churn": [("edm", -1), ("heun", float("nan"))],
    "s_tmin, s_tmax": [("edm", {"s_tmin": 2.0, "s_tmax": 1.0}), ("sa_solver", {"s_tmin": -1.0})],
    "r": [("dpmpp_sde", 0.0)],
    "variance_type": [("ddpm", "learned")],
    "solver_type": [("sde_dpm_solver_pp", "bh2")],
    "order": [("sa_solver", {"predictor_order": 5}), ("sa_solver", {"corrector_order": -1})],
    "sigma_min": [("lcm", -1.0), ("lcm", 0.5)],
    "timestep_scaling": [("lcm", 0.0)],
}  # fmt: skip


@pytest.mark.parametrize("argument", BAD)
def test_bad_options_name_themselves(argument):
    for name, value in BAD[argument]:
        options = value if isinstance(value, dict) else {argument: value}
        with pytest.raises(ValueError, match=rf"^{argument}: ") as caught:
            fastode.SOLVERS[name](make_grid("edm"), **options)
        assert "got" in str(caught.value)


def test_late_programs_have_no_moments(gaussian):
    from fastode.program import Late, Trace

    grid = make_grid("edm", 1)
    p = Trace(grid)
    x = p.start()
    r = Late("r")
    program = p.program(p.land(r * x + (1 - r) * p.denoise(x, grid[0]), grid[1]))
    with pytest.raises(ValueError, match="program: its late numbers"):
        push(program, gaussian)
