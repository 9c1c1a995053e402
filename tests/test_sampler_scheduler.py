"""Sampler Scheduler: splitting changes nothing, a switch keeps the noise level, and history goes where it is told."""

import math
from fractions import Fraction

import pytest
import torch

import fastode
from fastode import SOLVERS, Engine
from fastode.denoisers import Gaussian
from fastode.evaluate.moments import marginal, push
from fastode.schedules import EDM, karras, log_snr
from fastode.solvers.sampler_scheduler import PLANS, sampler_scheduler
from tests.conftest import draws, make_grid, relative, start
from tests.papers import sampler_scheduler as paper

# Solvers that remember nothing from one step to the next: a split cannot be seen.
ONE_STEP = [
    ("ddim", {}),
    ("ddim", {"eta": 0.5}),
    ("edm", {}),
    ("edm", {"s_churn": 3.0, "s_tmin": 0.1}),
    ("dpm_solver_2", {}),
    ("dpm_solver_3", {"lower_order_final": True}),
    ("dpm_solver_pp_s", {"order": 3}),
    ("euler_ancestral", {}),
    ("dpm_2_ancestral", {}),
    ("dpmpp_2s_ancestral", {"eta": 0.7}),
    ("ddpm", {}),
    ("dpmpp_sde", {}),
    ("lcm", {}),
]
MULTISTEP = [
    ("dpm_solver_pp", {"order": 3}),
    ("dpm_solver_pp", {"order": 2, "prediction": "eps"}),
    ("sde_dpm_solver_pp", {"order": 3, "eta": 0.5}),
    ("dpmpp_3m_sde", {}),
    ("sa_solver", {"predictor_order": 3, "corrector_order": 0}),
    ("unipc", {"corrector": False}),
    ("unipc", {"corrector": False, "prediction": "eps"}),
    ("lms", {}),
    ("ipndm", {}),
    ("ipndm_v", {"order": 3}),
    ("deis", {"order": 3}),
]


@pytest.mark.parametrize("kind", ["zero", "vp"])
def test_split_invariance(mixture, kind):
    grid = make_grid(kind)
    x = start(grid, (3, 6))
    for name, options in ONE_STEP:
        plain = fastode.sample(mixture, x, solver=name, grid=grid, noise=draws(x), **options)
        spec = (name, options)
        for plan in ([(spec, 7)], [(spec, 4), (spec, 3)], [(spec, 1), (spec, 5), (spec, 1)]):
            split = fastode.sample(mixture, x, solver=sampler_scheduler(plan), grid=grid, noise=draws(x))
            assert torch.equal(split, plain), (name, plan)


@pytest.mark.parametrize("kind", ["zero", "vp"])
def test_history_is_kept_or_dropped(mixture, kind):
    """Kept, a split multistep solver is the unsplit one; dropped, it starts again at order 1 (0.13 apart in the card)."""
    grid = make_grid(kind)
    x = start(grid, (3, 6))
    for name, options in MULTISTEP:
        plain = fastode.sample(mixture, x, solver=name, grid=grid, noise=draws(x), **options)
        plan = [((name, options), 4), ((name, options), 3)]
        keep, drop = (
            fastode.sample(mixture, x, solver=sampler_scheduler(plan, history=h), grid=grid, noise=draws(x))
            for h in ("keep", "restart")
        )
        assert relative(keep, plain) < 1e-13, name  # eps is made of the same state and estimate, at another place
        assert relative(drop, plain) > 1e-4, name


def test_history_of_another_solver(mixture):
    """Heun's evaluations at grid levels are 2M's history: the same as 2M with the previous estimate given."""
    grid = karras(EDM(), 8)
    x = start(grid, (3, 6))
    plan = [("heun", 4), ("dpmpp_2m(lower_order_final=false)", 4)]

    def denoise(y, alpha, sigma):
        return mixture(torch.from_numpy(y) / alpha, sigma / alpha).numpy()

    for history in ("keep", "restart"):
        truth = paper.sample(
            denoise, x.numpy(), grid.alpha.tolist(), grid.sigma.tolist(), plan=[("heun", 4), ("2m", 4)], history=history
        )
        ours = fastode.sample(mixture, x, solver=sampler_scheduler(plan, history=history), grid=grid)
        assert relative(ours, torch.from_numpy(truth)) < 1e-12


SWITCHES = [
    ["euler_ancestral", "heun"],
    ["heun", "euler_ancestral"],
    ["dpm_2_ancestral", "dpm_solver_2"],
    ["dpmpp_2m_sde", "dpmpp_2m"],  # the author's extension returns the denoised image at the switch here
    ["dpmpp_3m_sde", "unipc", "euler"],
    ["dpmpp_sde", "edm(s_churn=4)"],
    ["lcm", "ddpm"],
    ["sa_solver", "lms", "dpmpp_2s_ancestral"],
    ["ddim(eta=0.6)", "ipndm"],
    ["restart", "heun"],
]


@pytest.mark.parametrize("names", SWITCHES, ids=" ".join)
@pytest.mark.parametrize("history", ["restart", "keep"])
def test_the_noise_level_is_right_at_every_switch(names, history):
    """Any solver may follow any: each ends at the level of the grid, and the program proves it on a single data point.

    On Gaussian data the state at the switch has the marginal's variance, to the error of the solvers at 60 steps.
    """
    grid = karras(EDM(), 60, final="zero")
    share = Fraction(1, len(names))
    specs = [("restart", {"intervals": [(3, 1, 5.0, 9.0)]}) if name == "restart" else name for name in names]
    program = sampler_scheduler([(spec, share) for spec in specs], history=history)(grid)
    assert program.consistent
    assert program.defect() < 1e-11
    data = Gaussian(torch.zeros(1), 0.35**2)
    moments = push(program, data)
    for k in range(1, len(names) + 1):
        i = round(share * k * 60)
        want = float(marginal(data, grid[i]).covariance) ** 0.5
        # LCM is for consistency functions: with a denoiser its spread stays behind at the data's, however many steps
        if names[0] != "lcm":
            assert float(moments[i].covariance) ** 0.5 == pytest.approx(want, rel=0.12)


def test_the_law_converges_with_the_plan():
    """Refined, the final spread tends to the data's 0.35; the card's 160 and 80 steps: 0.338, 0.335, 0.352."""
    data = Gaussian(torch.zeros(1), 0.35**2)

    def spread(plan, steps):
        return float(push(sampler_scheduler(plan)(karras(EDM(), steps)), data)[-1].covariance - 0.002**2) ** 0.5

    for plan in PLANS:
        errors = [abs(spread(plan, steps) - 0.35) for steps in (40, 80, 160)]
        assert errors[0] > errors[1] > errors[2]
        assert errors[2] < 0.01
    assert spread([("dpm_2_ancestral", 60), ("dpm_solver_2", 20)], 80) == pytest.approx(0.352, abs=1e-3)


@pytest.mark.parametrize(
    ("plan", "order"),
    [("heun*1/2 + dpm_solver_2*1/2", 2), ("heun*1/2 + euler*1/2", 1), ("dpm_solver_3*1/2 + dpmpp_2m*1/2", 2)],
)
def test_order_is_that_of_the_lowest_segment(gaussian, plan, order):
    x = 80 * torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    errors = []
    for steps in (80, 160):
        samples = fastode.sample(gaussian, x, solver=sampler_scheduler(plan), grid=karras(EDM(0.02, 80), steps))
        errors.append(float((samples - gaussian.flow(x, 80, 0.02)).norm()))
    assert (
        abs(math.log2(errors[0] / errors[1]) - order) < 0.3
    )  # slopes between 80 and 160 steps: see tests/test_order.py


@pytest.mark.parametrize(
    ("plan", "steps", "nfe"),
    [
        ([("heun", 10), ("dpm_solver_2", 5)], 15, 29),
        ([("dpm_2_ancestral", 10), ("dpm_solver_2", 5)], 15, 29),
        ([("dpm_solver_2", 16)], 16, 31),
        ([("euler", 30)], 30, 30),
        ("dpm2a-dpm2", 15, 29),
        ("heun-dpm2", 15, 29),
        ("heun-dpmpp2m-euler", 30, 40),
    ],
)
def test_evaluations(plan, steps, nfe):
    grid = karras(EDM(), steps, final="zero")
    assert sampler_scheduler(plan)(grid).nfe == nfe
    if not isinstance(plan, str):
        text = " + ".join(f"{name} * {count}" for name, count in plan)
        assert SOLVERS["sampler_scheduler"](grid, plan=text).describe() == sampler_scheduler(plan)(grid).describe()


def test_rules_about_last_steps_are_the_runs(mixture):
    """In the middle of a run 2M does not fall to first order, nor does Heun to Euler."""
    grid = karras(EDM(), 8, final="zero")
    program = sampler_scheduler([("heun", 4), ("dpmpp_2m", 4)])(grid)
    assert [s.step for s in program.stages] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7]
    x = start(grid, (2, 6))
    run = fastode.sample(
        mixture, x, solver=sampler_scheduler("dpmpp_2m*4 + euler*4"), grid=grid, return_trajectory=True
    )
    whole = fastode.sample(mixture, x, solver="dpmpp_2m", grid=grid, return_trajectory=True)
    for i in range(5):
        assert torch.equal(run.states[i], whole.states[i])


def test_one_program_with_samples_of_their_seeds(gaussian):
    program = SOLVERS["sampler_scheduler"](karras(EDM(), 6, final="zero"))
    assert program.draws == 4
    for backend in ("reference", "torch"):
        big = Engine(program, gaussian, (64, 4), backend)(seeds=range(64))
        assert torch.equal(Engine(program, gaussian, (1, 4), backend)(seeds=[37])[0], big[37])


def test_bad_plans():
    grid = log_snr(EDM(), 15)
    for plan, message in [
        ([("heun", 10), ("ddim", 4)], "the segments make 14 steps, but the grid has 15; they do not meet"),
        ([("heun", 10), ("ddim", 6)], "the segments make 16 steps, but the grid has 15; they do not meet"),
        ("heun*2/3 + ddim*1/2", "shares must add up to 1.* got 2/3, 1/2"),
        ([("heun", 10), ("ddim", 0.5)], "shares must add up to 1, and cannot be mixed"),
        ([], "needs at least one segment"),
        ([("heun", 0), ("ddim", 15)], "steps must be a whole number of at least 1 or a share up to 1, got 0"),
        ([("heun", -1)], "steps must be a whole number"),
        ([("heun", 1.5)], "steps must be a whole number"),
        ([("heun", True)], "steps must be a whole number"),
        ("heun*many", "steps must be a whole number or a share of them, got 'many'"),
        ("heun", r"must be \(solver, steps\) each, or text .* or one of dpm2a-dpm2, .* got 'heun'"),
        ([("heun", 10, 5)], r"must be \(solver, steps\) each"),
        ("ddim(afs=true)*15", "'afs' is an option of the whole run"),
        ("ddim(eta)*15", "options must be NAME=VALUE, got 'eta'"),
    ]:
        with pytest.raises(ValueError, match=rf"^plan: .*{message}"):
            SOLVERS["sampler_scheduler"](grid, plan=plan)
    with pytest.raises(ValueError, match="unknown solver 'huen'"):
        sampler_scheduler("ddim*10 + huen*5")(grid)
    with pytest.raises(TypeError, match="heun: unknown option 'order'"):
        sampler_scheduler([(("heun", {"order": 2}), 15)])(grid)
    with pytest.raises(TypeError, match=r"^plan: must be a solver or the name of one, got int"):
        sampler_scheduler([(3, 15)])(grid)
    with pytest.raises(ValueError, match=r"^history: must be 'restart' or 'keep', got 'drop'"):
        sampler_scheduler("ddim*15", history="drop")(grid)
    with pytest.raises(ValueError, match=r"^eta: must be in \[0, 1\], got 2"):
        sampler_scheduler("ddim(eta=2)*15")(grid)
