"""Predictors and correctors of score-SDE: draw by draw against plain loops, moments against their closed recursion."""

import math

import pytest
import torch

import fastode
from fastode.denoisers import Gaussian
from fastode.schedules import EDM, VE, Flow, SubVP, VPLinear, karras, time_uniform
from fastode.solvers.langevin import PUBLISHED, pc, published
from fastode.solvers.score_sde import beta_of, drift, index_of, score_sde_grid
from tests.conftest import relative
from tests.papers import score_sde

SDES = {"vp": VPLinear(), "subvp": SubVP(), "ve": VE()}
BACKENDS = ["reference", "torch"]

CASES = [
    {"predictor": "euler_maruyama"},
    {"predictor": "reverse_diffusion"},
    {"predictor": "ancestral"},
    {"predictor": "euler_maruyama", "probability_flow": True},
    {"predictor": "reverse_diffusion", "probability_flow": True},
    {"predictor": "reverse_diffusion", "corrector": "langevin"},
    {"predictor": "reverse_diffusion", "corrector": "langevin", "norm": "batch", "corrector_steps": 2},
    {"predictor": "euler_maruyama", "corrector": "annealed", "snr": 0.05},
    {"predictor": "none", "corrector": "langevin", "corrector_steps": 3},
]


def case_id(case):
    return "-".join(str(v) for v in case.values())


@pytest.mark.parametrize("case", CASES, ids=case_id)
@pytest.mark.parametrize("kind", SDES)
def test_equals_the_loop_draw_by_draw(mixture, kind, case):
    """Every draw is given to both. 30 levels, float64: sums of a few terms each, and norms."""
    if case["predictor"] == "ancestral" and kind == "subvp":
        return
    grid = score_sde_grid(SDES[kind], 30)
    program = pc(grid, **case)
    g = torch.Generator().manual_seed(2)
    noise = [torch.randn(4, 6, generator=g, dtype=torch.float64) for _ in range(program.draws)]
    x = float(grid.sigma[0]) * torch.randn(4, 6, generator=g, dtype=torch.float64)
    calls = []

    def denoise(y, alpha, sigma):
        calls.append(sigma)
        return mixture(torch.from_numpy(y) / alpha, sigma / alpha).numpy()

    options = {("flow" if k == "probability_flow" else k): v for k, v in case.items() if k != "norm"}
    draws = iter([z.numpy() for z in noise])
    truth = score_sde.sample(denoise, x.numpy(), kind, 30, draws, per_sample=case.get("norm") != "batch", **options)
    assert next(draws, None) is None and program.nfe == len(calls)
    for backend in BACKENDS:
        made = fastode.Engine(program, mixture, (4, 6), backend, dtype=torch.float64)(x, noise=noise)
        # sub-VP ends at sigma = 1.2e-4: a score divides a difference of nearly equal numbers by sigma^2, 1e8 roundings
        assert relative(made, torch.from_numpy(truth)) < (1e-8 if kind == "subvp" else 1e-11)


@pytest.mark.parametrize(
    ("options", "mean", "variance"),
    [
        ({"predictor": "euler_maruyama"}, 1.30077, 0.250353),
        ({"predictor": "reverse_diffusion"}, 1.29915, 0.251991),
        ({"predictor": "ancestral"}, 1.29984, 0.251360),
        ({"predictor": "reverse_diffusion", "probability_flow": True}, 1.29459, 0.260691),
    ],
)
def test_moments_of_a_gaussian(options, mean, variance):
    """N = 1000 on data N(1.3, 0.25): every step is affine, so the moments obey a recursion of two numbers (method card).

    They are read off the program itself: sample j of the batch gets draw j and nothing else, sample 0 gets nothing, the
    last one gets the start. The discretisation bias shows: the target is (1.3, 0.25).
    """
    program = pc(score_sde_grid(VPLinear(), 1000), final="noisy", **options)  # the card's figures include the last draw
    data = Gaussian(torch.tensor([1.3]), 0.25)
    n = program.draws + 2
    x = torch.zeros(n, 1, dtype=torch.float64)
    x[-1] = 1

    def noise(k):
        z = torch.zeros(n, 1, dtype=torch.float64)
        z[k + 1] = 1
        return z

    made = fastode.Engine(program, data, (n, 1), "reference", dtype=torch.float64)(x, noise=noise).flatten()
    assert abs(float(made[0]) - mean) < 6e-6  # the card's figures have six digits
    assert abs(float((made[1:] - made[0]).square().sum()) - variance) < 6e-7


@pytest.mark.parametrize("kind", SDES)
@pytest.mark.parametrize("predictor", ["euler_maruyama", "reverse_diffusion"])
def test_weak_order_one(kind, predictor):
    """Mean and variance of Gaussian data: twice the steps, half the bias, beside what start and end contribute."""
    moments = []
    for n in (100, 200, 400):
        program = pc(score_sde_grid(SDES[kind], n, eps=1e-3), predictor=predictor, final="none")
        data = Gaussian(torch.tensor([0.7]), 0.09)
        size = program.draws + 2
        x = torch.zeros(size, 1, dtype=torch.float64)
        x[-1] = float(program.grid.sigma[0])

        def noise(k, size=size):
            z = torch.zeros(size, 1, dtype=torch.float64)
            z[k + 1] = 1
            return z

        made = fastode.Engine(program, data, (size, 1), "reference", dtype=torch.float64)(x, noise=noise).flatten()
        moments.append((float(made[0]), float((made[1:] - made[0]).square().sum())))
    for which in (0, 1):
        coarse, fine = moments[0][which] - moments[1][which], moments[1][which] - moments[2][which]
        # 2 in the limit; at 100 steps Euler-Maruyama of VP, whose beta reaches 20, still has 20% of the next order
        assert 1.5 < coarse / fine < 2.6


def test_langevin_leaves_the_marginal_in_place():
    """Annealed Langevin at small snr keeps N(a mu, v): the bias of its variance is of the order of the step."""
    schedule = VE(0.01, 1.0)
    data = Gaussian(torch.tensor([0.3]), 0.04)
    excess = []
    for snr in (0.1, 0.05):
        grid = score_sde_grid(schedule, 2, eps=0.999)  # two levels, nearly the same
        program = pc(grid, predictor="none", corrector="annealed", snr=snr, corrector_steps=400)
        h, v = 2 * snr**2, 0.04 + 1.0
        # x <- x - h (x - mu)/v + sqrt(2h) z has the stationary variance 2h / (1 - (1 - h/v)^2) = v / (1 - h/(2v))
        expected = v / (1 - h / (2 * v))
        size = program.draws + 1
        x = torch.full((size, 1), 0.3, dtype=torch.float64)

        def noise(k, size=size):
            z = torch.zeros(size, 1, dtype=torch.float64)
            z[k + 1 if k + 1 < size else 0] = 1
            return z

        made = fastode.Engine(program, data, (size, 1), "reference", dtype=torch.float64)(x, noise=noise).flatten()
        variance = float((made - 0.3).square().sum())
        assert abs(variance - expected) < 2e-2 * expected
        excess.append(expected - v)
    assert excess[1] < excess[0] / 3


def test_per_sample_norms_do_not_couple_and_the_published_ones_do(gaussian):
    grid = score_sde_grid(VE(), 10)
    g = torch.Generator().manual_seed(0)
    x = 50 * torch.randn(5, 4, generator=g)
    noise = torch.randn(64, 5, 4, generator=g)
    for norm, coupled in (("sample", False), ("batch", True)):
        program = pc(grid, corrector="langevin", norm=norm)
        for backend in BACKENDS:
            whole = fastode.Engine(program, gaussian, (5, 4), backend)(x, noise=noise)
            part = fastode.Engine(program, gaussian, (2, 4), backend)(x[:2], noise=noise[:, :2])
            assert torch.equal(whole[:2], part) != coupled


def test_seeds_make_samples_that_do_not_depend_on_their_batch(gaussian):
    net = fastode.Denoiser(gaussian, "denoised", sample_shape=(4,))
    program = pc(score_sde_grid(VE(), 12), corrector="langevin")
    together = fastode.Engine(program, net, (64, 4))(seeds=range(64))
    alone = fastode.Engine(program, net, (1, 4))(seeds=[37])
    assert torch.equal(together[37], alone[0])


def test_options(gaussian):
    grid = score_sde_grid(VPLinear(), 20)
    x = torch.randn(2, 4, dtype=torch.float64)

    def run(grid=grid, **options):
        program = pc(grid, probability_flow=True, **options)
        return fastode.Engine(program, gaussian, (2, 4), "reference", dtype=torch.float64)(x), program.nfe

    mean, nfe = run(predictor="euler_maruyama")
    stopped, fewer = run(predictor="euler_maruyama", final="none")
    assert nfe == fewer + 1 == 20
    # the last mean is one more step of 1/N at eps
    f, g2 = drift(VPLinear(), 1e-3)
    s = grid[-1]
    score = (s.alpha * gaussian(stopped / s.alpha, s.rho) - stopped) / s.sigma**2
    assert relative(mean, stopped - (f * stopped - 0.5 * g2 * score) / 20) < 1e-13
    # steps of the grid's spacing end nearer to the flow than 20 steps of 1/20 over 0.999
    spaced, _ = run(predictor="euler_maruyama", step="spacing", final="none")
    assert relative(spaced, stopped) > 1e-3
    truth = gaussian.flow(x / grid.alpha[0], float(grid.sigmas[0]), float(grid.sigmas[-1])) * grid.alpha[-1]
    fine, _ = run(score_sde_grid(VPLinear(), 400), predictor="euler_maruyama", step="spacing", final="none")
    assert relative(fine, truth) < relative(spaced, truth) / 10  # 20 in the limit
    # noise in the last step
    grid = score_sde_grid(VPLinear(), 40)
    program = pc(grid, predictor="ancestral", final="noisy")
    assert program.draws == 40 and pc(grid, predictor="ancestral").draws == 39
    # levels of another discretisation: beta_i of N = 1000 at the same times
    other = pc(grid, predictor="ancestral", levels=1000)
    beta = beta_of(VPLinear(), index_of(1.0, 1000), 1000)
    assert math.isclose(other.unroll(1).noise[0], math.sqrt(beta), rel_tol=1e-12)
    # the paper's order of the two halves: the first level is not corrected, the last is
    listing = pc(grid, corrector="langevin", first="predictor")
    assert listing.nfe == 2 * 40 - 1


def test_indices_repeat_where_the_card_says_so():
    t = torch.linspace(1, 1e-3, 2000, dtype=torch.float64).tolist()
    wrong = [k for k in range(2000) if index_of(t[k], 2000) != 1999 - k]
    assert wrong in (list(range(1000, 2000)), list(range(1001, 2000)))  # k = 1000 is a tie, decided by rounding
    t = torch.linspace(1, 1e-5, 2000, dtype=torch.float64).tolist()
    assert all(index_of(t[k], 2000) == 1999 - k for k in range(2000))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings_compile(name):
    grid, options = published(name)
    if len(grid) > 300:  # the long ones differ in numbers alone
        grid = score_sde_grid(grid.schedule, 30)
    program = pc(grid, **options)
    repeats = options.get("corrector_steps", 1) if options.get("corrector", "none") != "none" else 0
    assert program.nfe == len(grid) * (repeats + (options["predictor"] != "none"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"predictor": "heun"}, "predictor"),
        ({"corrector": "mala"}, "corrector"),
        ({"snr": 0.0}, "snr"),
        ({"corrector_steps": 0}, "corrector_steps"),
        ({"final": "last"}, "final"),
        ({"step": "dt"}, "step"),
        ({"norm": "global"}, "norm"),
        ({"first": "both"}, "first"),
        ({"levels": 1}, "levels"),
        ({"predictor": "ancestral", "probability_flow": True}, "predictor: the probability flow"),
        ({"predictor": "none"}, "predictor, corrector"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        pc(score_sde_grid(VPLinear(), 5), **options)


def test_grids_without_these_sdes_are_refused():
    for grid in (karras(EDM(), 4), time_uniform(Flow(t_max=0.9, t_min=0.1), 4), fastode.Grid([3.0, 1.0])):
        with pytest.raises(ValueError, match="VPLinear, SubVP and VE"):
            pc(grid, corrector="langevin")
    with pytest.raises(ValueError, match="sub-VP has no ancestral"):
        pc(score_sde_grid(SubVP(), 4), predictor="ancestral")
    for options in ({"predictor": "ancestral"}, {"predictor": "none", "corrector": "annealed"}):
        with pytest.raises(ValueError, match="beta_i reaches"):
            pc(score_sde_grid(VPLinear(), 20), **options)
    with pytest.raises(ValueError, match="levels"):
        score_sde_grid(VE(), 1)
    with pytest.raises(ValueError, match="eps"):
        score_sde_grid(VE(), 5, eps=1.0)
    with pytest.raises(ValueError, match="published settings are"):
        published("imagenet")
