"""D-ODE solvers: one number per state, its closed-form fit, and targets that lie where the student lands."""

import math

import numpy as np
import pytest
import torch

import fastode
from fastode import SOLVERS, Artifact, Denoiser, Engine
from fastode.backends import reference
from fastode.denoisers import Gaussian, GaussianMixture
from fastode.learn import d_ode as learn
from fastode.learn.teacher import Teacher, training_seeds
from fastode.program.lower import lower
from fastode.schedules import EDM, VPLinear, karras, log_snr, time_uniform
from fastode.solvers.d_ode import corrections, d_ode
from tests.conftest import VARIANTS, make_grid, relative, start, variant_id
from tests.papers import d_ode as paper

TOY = GaussianMixture(*(torch.tensor(v, dtype=torch.float64) for v in ([[-1.0], [0.8]], [0.2**2, 0.35**2], [0.3, 0.7])))
TRAINING = torch.arange(-1.8, 1.9, 0.4, dtype=torch.float64)[:, None]
EDM_GRID = karras(EDM(), 5, final="zero")
AGAIN = ("unipc", "amed", "restart", "sampler_scheduler")
ONCE = [
    (n, o)
    for n, o in VARIANTS
    if (n not in AGAIN or o.get("corrector") is False) and not SOLVERS[n](make_grid("edm", 3), **o).draws
]
"""Every deterministic solver that lands on each level once."""


def model(data):
    return lambda x, level: data(x / level.alpha, level.rho)


def play(program, data, x, backend="reference"):
    return Engine(program, data, x.shape, backend, dtype=torch.float64)(x)


def exact(grid, x, levels, data=TOY):
    """States of the exact flow at ``levels``."""
    first = grid[0]
    return [level.alpha * data.flow(x / first.alpha, first.rho, level.rho) for level in levels]


def fitted(name, grid, x, data=TOY, **how):
    """(lambdas and losses, error of the end points, and of the base solver's, the states corrected)."""
    _, states = corrections(SOLVERS[name], grid, **{k: v for k, v in how.items() if k != "damping"})
    targets = exact(grid, x, [s.level for s in states], data)
    found = learn.distil(SOLVERS[name], grid, model(data), x, targets, **how)
    own = {k: v for k, v in how.items() if k != "damping"}
    base = SOLVERS[name](grid, **{k: v for k, v in own.items() if k not in ("output", "first", "unit")})
    made = play(d_ode(SOLVERS[name], grid, found.lambdas, **own), data, x)
    errors = [float((m - targets[-1]).square().mean().sqrt()) for m in (made, play(base, data, x))]
    return found, errors, states


@pytest.mark.parametrize("kind", ["zero", "flow"])
@pytest.mark.parametrize("case", ONCE, ids=variant_id)
def test_lambdas_of_zero_are_the_base_solver_bit_for_bit(case, kind, mixture):
    name, options = case
    grid = make_grid(kind)
    x = start(grid, (2, 6))
    program, states = corrections(SOLVERS[name], grid, **options)
    plain = SOLVERS[name](grid, **options)
    assert torch.equal(
        play(d_ode(SOLVERS[name], grid, [0.0] * len(states), **options), mixture, x), play(plain, mixture, x)
    )
    assert program.nfe == plain.nfe


@pytest.mark.parametrize("case", ONCE, ids=variant_id)
def test_a_fit_on_the_base_solver_itself_is_zero(case, mixture):
    """Distilled from itself with as many steps: lambda 0 and no residual."""
    name, options = case
    grid = make_grid("vp", 5)
    x = start(grid, (6, 6))
    program, states = corrections(SOLVERS[name], grid, **options)
    known = {late: 0.0 for late in program.late}
    denoise = model(mixture)
    _, values = reference.run(program, lambda y, stage, _: denoise(y, stage.level), x, known=known, keep=True)
    found = learn.distil(SOLVERS[name], grid, denoise, x, [values[s.value] for s in states], **options)
    assert np.abs(found.lambdas).max() < 1e-6  # a rounding of the state over a change of the output at high noise
    assert max(found.losses) < 1e-24


GOLDEN = {
    ("ddim", 5): ([-0.00117627, -6.12130148, -3.80626126, -1.44411541, -0.48429625], 0.155141, 0.306971),
    ("ddim", 10): (
        [-0.00014648, -1.77208740, -1.67945647, -1.10604381, -0.79248024, -0.57593513, -0.42871788, -0.31215342,
         -0.23498180, -0.18964036], 0.063842, 0.179354,
    ),
    ("ipndm", 5): ([-0.00117627, -3.05619485, -1.23442004, -0.10806097, 0.15926350], 0.160697, 0.194960),
    ("ipndm", 10): (
        [-0.00014648, -0.73465419, -0.48202222, -0.06334345, -0.03114630, -0.00560646, 0.00454170, 0.01947686,
         0.02959118, 0.08540477], 0.070981, 0.095812,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "n"), GOLDEN)
def test_golden_noise_prediction(name, n):
    lambdas, error, base = GOLDEN[name, n]
    found, errors, _ = fitted(name, time_uniform(VPLinear(), n), TRAINING)
    assert np.abs(np.subtract(found.lambdas, lambdas)).max() < 6e-9  # as printed
    assert errors == pytest.approx([error, base], abs=2e-6)
    if (name, n) == ("ddim", 5):
        made = play(d_ode(SOLVERS["ddim"], time_uniform(VPLinear(), 5), found.lambdas), TOY, TRAINING).flatten()
        ends = torch.tensor([-1.25832710, -1.25710732, -1.04470915], dtype=torch.float64)
        assert float((made[:3] - ends).abs().max()) < 6e-9


def test_golden_edm():
    x = 80 * TRAINING
    found, errors, _ = fitted("ddim", EDM_GRID, x, output="x0")
    assert np.abs(np.subtract(found.lambdas, [0, 3.24324196, 1.65976652, 0.07340301, -0.04487064])).max() < 6e-9
    assert errors == pytest.approx([0.202372, 0.532330], abs=6e-7)
    golden = [0, -1.39111217, 3229.54694, -1.25014349, 47.3064384, -2.95382015, -0.56004776, 1.18140312, -1.63564665]
    found, errors, states = fitted("edm", EDM_GRID, x)
    assert np.allclose(found.lambdas, golden, rtol=5e-9, atol=6e-9) and len(states) == 9
    assert errors == pytest.approx([0.366534, 1.252868], abs=6e-7)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_equals_the_paper(mixture, backend):
    def denoise(y, alpha, sigma):
        return mixture(torch.from_numpy(y) / alpha, sigma / alpha).numpy()

    rng = np.random.default_rng(0)
    grid = time_uniform(VPLinear(), 6)
    levels = grid.alpha.tolist(), grid.sigma.tolist()
    x = start(grid, (3, 6))
    for name, order in (("ddim", 1), ("ipndm", 1), ("ipndm", 3), ("ipndm", 4)):
        lambdas = rng.normal(size=6) * 0.3
        options = {} if name == "ddim" else {"order": order}
        made = play(d_ode(SOLVERS[name], grid, lambdas.tolist(), **options), mixture, x, backend)
        loop = paper.noise_multistep(denoise, x.numpy(), *levels, lambdas, order)
        assert relative(made, torch.from_numpy(loop)) < 1e-12  # float64 sums of a few terms

    def between(a_s, s_s, a_t, s_t, r):
        level = grid.between(fastode.schedules.Level(a_s, s_s), fastode.schedules.Level(a_t, s_t), r)
        return level.alpha, level.sigma

    for name, order in (("dpm_solver_2", 2), ("dpm_solver_3", 3)):
        lambdas = rng.normal(size=6 * order) * 0.3
        made = play(d_ode(SOLVERS[name], grid, lambdas.tolist(), unit="step"), mixture, x, backend)
        loop = paper.dpm_solver(denoise, x.numpy(), *levels, between, lambdas, order)
        assert relative(made, torch.from_numpy(loop)) < 1e-11  # inner levels are found by inverting the schedule

    x, sigmas = start(EDM_GRID, (3, 6)), EDM_GRID.sigma.tolist()
    lambdas = [0.0, *(rng.normal(size=8) * 0.3)]
    made = play(d_ode(SOLVERS["edm"], EDM_GRID, lambdas), mixture, x, backend)
    assert relative(made, torch.from_numpy(paper.edm_heun(denoise, x.numpy(), sigmas, lambdas))) < 1e-12
    made = play(d_ode(SOLVERS["ddim"], EDM_GRID, lambdas[:5], output="x0"), mixture, x, backend)
    assert relative(made, torch.from_numpy(paper.edm_euler(denoise, x.numpy(), sigmas, lambdas))) < 1e-12


def test_d_ddim_is_a_second_order_method_for_one_choice(mixture):
    """lambda_i = c_i h_i / (2 h_{i-1}), h in lam, is the noise-prediction 2M method in its midpoint form."""
    grid = log_snr(VPLinear(), 7)
    x = start(grid, (3, 6))
    levels = list(grid)
    c = [t.sigma - t.alpha / s.alpha * s.sigma for _, s, t in grid.windows()]
    h = [t.lam - s.lam for _, s, t in grid.windows()]
    lambdas = [0.0] + [c[i] * h[i] / (2 * h[i - 1]) for i in range(1, len(levels) - 1)]
    made = play(d_ode(SOLVERS["ddim"], grid, lambdas), mixture, x)
    plain = play(SOLVERS["dpm_solver_pp"](grid, prediction="eps", lower_order_final=False), mixture, x)
    assert relative(made, plain) < 1e-12


@pytest.mark.parametrize("case", ONCE, ids=variant_id)
def test_every_state_is_fitted_best(case, mixture):
    """Moving one lambda by delta raises the loss of its state by delta^2 <Delta, Delta>: the residual is orthogonal."""
    name, options = case
    grid = make_grid("vp_time", 4)
    x = start(grid, (8, 6))
    program, states = corrections(SOLVERS[name], grid, **options)
    g = torch.Generator().manual_seed(3)
    targets = [torch.randn(x.shape, generator=g, dtype=torch.float64) for _ in states]  # anything will do
    denoise = model(mixture)
    found = learn.distil(SOLVERS[name], grid, denoise, x, targets, **options)
    lates = {late.name: late for late in program.late}
    assert all(b <= a for a, b in zip(found.plain, found.losses, strict=True))
    free = [int(name.removeprefix("lambda")) for name in lates]
    for k in sorted({free[0], free[len(free) // 2], free[-1]}):

        def loss(change, k=k):
            known = {
                late: found.lambdas[int(late.name[6:])] + (change if late is lates[f"lambda{k}"] else 0)
                for late in lates.values()
            }
            _, v = reference.run(program, lambda y, s, _: denoise(y, s.level), x, known=known, keep=True)
            return float((v[states[k].value] - targets[k]).square().mean())

        delta = 0.1 * max(1.0, abs(found.lambdas[k]))
        at, up, down = loss(0.0), loss(delta), loss(-delta)
        assert at == pytest.approx(found.losses[k], rel=1e-7) and at <= min(up, down) + 1e-12
        assert up == pytest.approx(down, rel=1e-6)  # a parabola about the minimum


def test_exact_on_isotropic_gaussians():
    """Errors and directions are parallel to x - alpha mu in every sample, so one number removes the whole error."""
    grid = time_uniform(VPLinear(), 6)
    for mean, golden in (
        (0.0, [9.751, -6.581, -3.156, -1.612, -1.032, -0.810]),
        (0.4, [0, -4.394, -3.337, -1.612, -1.032, -0.810]),
    ):
        data = Gaussian(torch.full((3,), mean), torch.tensor(0.3, dtype=torch.float64))
        x = start(grid, (5, 3))
        found, errors, _ = fitted("ddim", grid, x, data, first="start" if mean == 0 else "none")
        assert np.abs(np.subtract(found.lambdas, golden)).max() < 6e-4  # as printed
        assert errors[0] < 1e-12 < 1e-2 < errors[1]
        other = start(grid, (5, 3), seed=9)  # any other batch too
        made = play(d_ode(SOLVERS["ddim"], grid, found.lambdas, first="start" if mean == 0 else "none"), data, other)
        assert relative(made, exact(grid, other, [grid[6]], data)[0]) < 1e-11
    uneven = Gaussian(torch.zeros(3), torch.tensor([0.1, 0.3, 1.0]))
    assert fitted("ddim", grid, start(grid, (5, 3)), uneven)[1][0] > 1e-3


def test_aligned_targets_lie_where_the_student_lands(mixture):
    """Also inside the steps of single-step solvers; the published ones lie elsewhere on a Karras grid."""
    denoiser = Denoiser(mixture, "denoised", EDM(), sample_shape=(6,))
    teacher, seeds = Teacher(denoiser, tolerance=0.1), training_seeds(3)
    for name, grid in (("dpm_solver_3", karras(EDM(), 3)), ("edm", EDM_GRID), ("pndm", karras(EDM(), 4))):
        _, states = corrections(SOLVERS[name], grid)
        levels = [s.level for s in states]
        made = learn.aligned_targets(teacher, seeds, grid, levels, SOLVERS["ddim"], {}, 1)
        joined = sorted({float(v.rho) for v in [grid[0], *levels]}, reverse=True)
        kept = [r for i, r in enumerate(joined) if not i or r < joined[i - 1] * (1 - 1e-12)]
        engine = Engine(SOLVERS["ddim"](fastode.Grid(kept)), denoiser, (3, 6))
        there = engine(seeds=seeds, return_trajectory=True).states
        for state, level in zip(made, levels, strict=True):
            i = min(range(len(kept)), key=lambda j, r=float(level.rho): abs(kept[j] - r))
            assert kept[i] == pytest.approx(float(level.rho), rel=1e-12) and relative(state, there[i]) < 1e-5
    student = EDM_GRID.sigma.tolist()[1:]
    fine = karras(EDM(), 50, final="zero").sigma[10::10].tolist()
    assert [round(s, 3) for s in student] == [17.528, 2.515, 0.170, 0.002, 0.0]
    assert fine == pytest.approx([23.8, 5.47, 0.85, 0.067, 0.0], rel=0.01)  # where the published targets lie
    published = learn.published_targets(teacher, seeds, EDM_GRID, "karras", SOLVERS["ddim"], {}, 5, 10)
    engine = Engine(SOLVERS["ddim"](karras(EDM(), 50, final="zero")), denoiser, (3, 6))
    states = engine(seeds=seeds, return_trajectory=True).states[10::10]
    assert all(torch.equal(a, b) for a, b in zip(published, states, strict=True))


@pytest.fixture(scope="module")
def tame():
    g = torch.Generator().manual_seed(2)
    data = GaussianMixture(torch.randn(6, 12, generator=g), torch.tensor([0.1, 0.3, 0.2, 0.5, 0.1, 0.2]))
    return Denoiser(data, "denoised", VPLinear(), sample_shape=(12,))


@pytest.mark.parametrize(
    ("solver", "nfe", "most"),
    [("ddim", 5, 0.7), ("ipndm", 5, 0.95), ("dpm_solver_2", 6, 0.6), ("deis", 5, 0.95), ("edm", 5, 0.7)],
)
def test_learned_on_a_few_noises_helps_on_others(tame, tmp_path, solver, nfe, most):
    teacher = Teacher(tame, tolerance=2e-2)
    grid = "time_uniform" if solver != "edm" else None
    made = learn.train(tame, solver=solver, nfe=nfe, samples=64, grid=grid, teacher=teacher, progress=False)
    made.save(tmp_path / "d.safetensors")
    again = Artifact.load(tmp_path / "d.safetensors")
    seeds = range(256)
    base = SOLVERS[solver](made.grid, **{k: v for k, v in made.options.items() if k not in ("output", "first", "unit")})
    after, before = teacher.error(again.program(), seeds), teacher.error(base, seeds)
    assert after.rmse < most * before.rmse and again.nfe == base.nfe == nfe
    assert (
        again.card["rmse_after"] < again.card["rmse_before"] and again.card["evaluations"] == made.card["evaluations"]
    )


def test_published_targets_pull_to_noise(gaussian):
    """On a grid that ends at 0 the published targets are noisier than the student's levels, and cost accuracy."""
    teacher = Teacher(Denoiser(gaussian, "denoised", EDM(), sample_shape=(4,)), tolerance=2e-2)
    seeds = training_seeds(64)
    x = teacher.start(seeds, EDM_GRID).double()
    aligned = exact(EDM_GRID, x, list(EDM_GRID)[1:], gaussian)
    published = learn.published_targets(teacher, seeds, EDM_GRID, "karras", SOLVERS["ddim"], {}, 5, 10)
    other = teacher.start(torch.arange(256), EDM_GRID).double()
    truth, error = gaussian.flow(other, 80.0, 0.0), []
    for targets in (aligned, [y.double() for y in published]):
        found = learn.distil(SOLVERS["ddim"], EDM_GRID, model(gaussian), x, targets, output="x0")
        made = play(d_ode(SOLVERS["ddim"], EDM_GRID, found.lambdas, output="x0"), gaussian, other)
        error.append(float((made - truth).square().mean().sqrt()))
    assert error[1] > 1.5 * error[0]


def test_refining_all_together_never_ends_worse(tame):
    """The end points on the training noises: greedy, then moved together by gradient."""
    teacher = Teacher(tame, tolerance=2e-2)
    cards = [
        learn.train(
            tame, solver="ipndm", nfe=4, samples=32, grid="time_uniform", refine=n, teacher=teacher, progress=False
        ).card
        for n in (0, 8)
    ]
    assert cards[1]["rmse_after"] < 0.98 * cards[0]["rmse_after"]


def test_damping_tames_high_noise(mixture):
    """Without it lambda is 3e3 where outputs do not change; with it the same state is still fitted no worse than plainly."""
    x = 80 * TRAINING
    loose, _, states = fitted("edm", EDM_GRID, x)
    tight, _, _ = fitted("edm", EDM_GRID, x, damping=1e-6)
    assert abs(loose.lambdas[2]) > 3e3 and np.abs(tight.lambdas).max() < 100
    assert all(b <= a for a, b in zip(tight.plain, tight.losses, strict=True)) and len(states) == 9


def test_a_table_like_any_other(mixture):
    """No code runs at sampling time: one more buffer than DDIM, and one launch per evaluation."""
    denoiser = Denoiser.of(mixture)
    grid = time_uniform(VPLinear(), 6)

    def lowered(program):
        return lower(program, denoiser.scaling, lambda level: (1.0,))

    plain, ours = SOLVERS["ddim"](grid), d_ode(SOLVERS["ddim"], grid, [0.1] * 6)
    assert ours.nfe == plain.nfe and len(lowered(ours).updates) == len(lowered(plain).updates)
    assert lowered(ours).slots <= lowered(plain).slots + 1


def test_bad_input(tame, mixture):
    grid, ddim = time_uniform(VPLinear(), 4), SOLVERS["ddim"]
    with pytest.raises(ValueError, match="lambdas: ddim corrects 4 states on this grid, got 3"):
        d_ode(ddim, grid, [0.0] * 3)
    with pytest.raises(ValueError, match="corrector: D-ODE corrects each state once, unipc needs corrector=False"):
        d_ode(SOLVERS["unipc"], grid, [0.0] * 4)
    with pytest.raises(ValueError, match="eta: D-ODE needs a deterministic solver"):
        d_ode(ddim, grid, [0.0] * 4, eta=1.0)
    with pytest.raises(ValueError, match="lambdas: must be finite"):
        d_ode(ddim, grid, [0.0, math.nan, 0.0, 0.0])
    with pytest.raises(ValueError, match=r"state 0 has no change of the output to go along, so it must be 0, got 0\.5"):
        d_ode(ddim, grid, [0.5, 0.0, 0.0, 0.0], output="x0")
    for name, value in (("output", "v"), ("first", "zero"), ("unit", "lam")):
        with pytest.raises(ValueError, match=f"{name}: must be"):
            d_ode(ddim, grid, [0.0] * 4, **{name: value})
    with pytest.raises(ValueError, match="damping: must be at least 0"):
        learn.distil(ddim, grid, model(mixture), start(grid, (2, 6)), [], damping=-1.0)
    with pytest.raises(ValueError, match="targets: need one for each of 4 states, got 0"):
        learn.distil(ddim, grid, model(mixture), start(grid, (2, 6)), [])
    with pytest.raises(ValueError, match="samples: lambdas need at least 2"):
        learn.train(tame, samples=1)
    with pytest.raises(ValueError, match="scale: must be a whole number"):
        learn.train(tame, scale=0)
    with pytest.raises(ValueError, match="refine: must be a whole number"):
        learn.train(tame, nfe=2, samples=10, refine=0.5, progress=False)
    with pytest.raises(ValueError, match="give grid by name"):
        learn.train(tame, nfe=4, grid=grid, targets="published", progress=False)
    with pytest.warns(UserWarning, match="samples: 4 noises are few"):
        learn.train(tame, nfe=2, samples=4, progress=False)
    made = learn.train(tame, nfe=2, samples=10, progress=False)
    with pytest.raises(ValueError, match="learned for sample_shape"):
        fastode.sample(Denoiser(mixture, "denoised", VPLinear(), sample_shape=(6,)), seeds=[0], solver=made)
