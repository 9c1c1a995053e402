"""DC-Solver: compensation as a modifier of solvers, the search for its ratios, and the regression that predicts them."""

import numpy as np
import pytest
import torch

import fastode
from fastode import SOLVERS, Artifact, Denoiser, Engine
from fastode.denoisers import GaussianMixture
from fastode.learn import dc as learn
from fastode.learn.cascade import STABLE_DIFFUSION_2_1, Cascade, fit
from fastode.learn.replay import published_states
from fastode.learn.teacher import Teacher, refine
from fastode.schedules import EDM, Discrete, VPLinear, karras, linspace, time_uniform
from fastode.solvers.dc import Compensating, dc
from tests.conftest import make_grid, relative, start
from tests.papers import dc as paper

TOY = GaussianMixture(*(torch.tensor(v, dtype=torch.float64) for v in ([[-1.0], [0.8]], [0.2**2, 0.35**2], [0.3, 0.7])))
"""The one-dimensional toy of the golden values."""
RATIOS = [1.0, 1.0, 1.1, 0.9, 1.2, 0.8]
MULTISTEP = [
    ("unipc", {}), ("unipc", {"prediction": "eps"}), ("unipc", {"order": 2, "disable_corrector": [0]}),
    ("dpm_solver_pp", {"order": 3}), ("dpm_solver_pp", {"order": 2, "prediction": "eps"}), ("ddim", {}),
    ("deis", {}), ("ipndm", {}), ("lms", {}), ("pndm", {"skip_prk_steps": True}),
]  # fmt: skip


def play(program, denoiser, x, backend="reference"):
    return Engine(program, denoiser, x.shape, backend, dtype=torch.float64)(x)


def truth(grid, x, data=TOY):
    """States of the exact flow at levels 1 .. n."""
    first = grid[0]
    return [level.alpha * data.flow(x / first.alpha, first.rho, level.rho) for level in list(grid)[1:]]


@pytest.fixture(scope="module")
def tame():
    """Six overlapping components in twelve dimensions: no sample is torn between two of them, as few are in images."""
    g = torch.Generator().manual_seed(2)
    return GaussianMixture(torch.randn(6, 12, generator=g), torch.tensor([0.1, 0.3, 0.2, 0.5, 0.1, 0.2]))


class Model:
    """D(x, level) of closed-form data, counting its calls."""

    def __init__(self, data):
        self.data, self.calls = data, 0

    def __call__(self, x, level):
        self.calls += 1
        return self.data(x / level.alpha, level.rho)


def near(grid, x, data, steps=20):
    """States of the flow by many small steps."""
    fine = refine(grid, steps - 1)
    engine = Engine(SOLVERS["unipc"](fine), data, x.shape, "torch", dtype=torch.float64)
    return engine(x, return_trajectory=True).states[steps::steps]


@pytest.mark.parametrize("kind", ["vp", "ddpm", "zero"])
@pytest.mark.parametrize("case", MULTISTEP, ids=str)
def test_ratios_of_one_are_the_base_solver_bit_for_bit(case, kind, mixture):
    name, options = case
    grid = make_grid(kind)
    x = start(grid, (2, 6))
    program = dc(SOLVERS[name], grid, [1.0] * grid.steps, **options)
    plain = SOLVERS[name](grid, **options)
    assert torch.equal(play(program, mixture, x), play(plain, mixture, x)) and program.nfe == plain.nfe


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("dc_order", [1, 2, 3])
def test_equals_the_paper(mixture, variant, order, dc_order):
    for schedule, steps in ((VPLinear(), 8), (Discrete.linear(), 6)):
        grid = time_uniform(schedule, steps)
        x = start(grid, (3, 6))
        ratios = [1.0 if i < dc_order else 1 + 0.3 * np.cos(2.0 * i) for i in range(steps)]

        def denoise(y, alpha, sigma):
            return mixture(torch.from_numpy(y) / alpha, sigma / alpha).numpy()

        loop = paper.sample(
            denoise, x.numpy(), grid.alpha.tolist(), grid.sigma.tolist(), grid.t.tolist(), ratios,
            order=order, variant=variant, dc_order=dc_order,
        )  # fmt: skip
        for backend in ("reference", "torch"):
            program = dc(SOLVERS["unipc"], grid, ratios, order=order, variant=variant, dc_order=dc_order)
            # float64 sums of a few terms; times of the discrete schedule are found by inversion, good to 1e-13
            assert relative(play(program, mixture, x, backend), torch.from_numpy(loop)) < 1e-11


@pytest.mark.parametrize(
    ("variant", "golden"),
    [("bh1", (-0.7865217157, 0.6195000388, 1.0653454986)), ("bh2", (-0.7642497553, 0.6123156905, 1.0539743327))],
)
def test_golden_samples(variant, golden):
    x = torch.tensor([[-1.0], [0.1], [1.5]], dtype=torch.float64)
    program = dc(SOLVERS["unipc"], time_uniform(VPLinear(), 6), RATIOS, variant=variant)
    assert (play(program, TOY, x).flatten() - torch.tensor(golden, dtype=torch.float64)).abs().max() < 1e-10


@pytest.mark.parametrize(
    ("variant", "ratios", "losses", "error"),
    [
        (
            "bh1",
            (0.93074206, 1.02628468, 1.10282387, 1.29619527),
            (3.0150e-8, 5.6878e-7, 7.8533e-5, 1.7187e-2),
            0.131099,
        ),
        ("bh2", (0.95378788, 1.02867551, 1.13430043, 1.33936825), None, 0.145666),
    ],
)
def test_golden_search(variant, ratios, losses, error):
    grid = time_uniform(VPLinear(), 6)
    x = torch.arange(-1.8, 1.9, 0.4, dtype=torch.float64)[:, None]
    evaluate = Model(TOY)
    found = learn.search(SOLVERS["unipc"], grid, evaluate, x, truth(grid, x), variant=variant, tolerance=1e-9)
    # Brent's method finds a minimum to the root of the rounding of the loss
    assert found.ratios[:2] == [1.0, 1.0] and np.allclose(found.ratios[2:], ratios, atol=1e-7, rtol=0)
    if losses:
        assert np.allclose(found.losses[2:], losses, rtol=2e-5)
    samples = play(dc(SOLVERS["unipc"], grid, found.ratios, variant=variant), TOY, x)
    assert float((samples - truth(grid, x)[-1]).square().mean().sqrt()) == pytest.approx(error, abs=1e-6)
    assert all(b <= a for a, b in zip(found.plain[2:], found.losses[2:], strict=True))


@pytest.mark.parametrize("case", MULTISTEP, ids=str)
def test_search_is_stationary_on_any_multistep_solver(case, mixture):
    """The loss of each step does not fall on either side of the ratio found, with the earlier ratios as found."""
    name, options = case
    grid = time_uniform(VPLinear(), 6)
    x = start(grid, (10, 6))
    targets = near(grid, x, mixture)
    found = learn.search(SOLVERS[name], grid, Model(mixture), x, targets, tolerance=1e-7, **options)
    searched = [i for i, loss in enumerate(found.losses) if loss == loss]
    assert searched == ([3, 4, 5] if name == "pndm" else [2, 3, 4, 5])  # PLMS starts with a step outside the history

    def loss(i, change):
        ratios = [r if j < i else r + change if j == i else 1.0 for j, r in enumerate(found.ratios)]
        engine = Engine(dc(SOLVERS[name], grid, ratios, **options), mixture, x.shape, "reference", dtype=torch.float64)
        return float((engine(x, return_trajectory=True).states[i + 1] - targets[i]).square().mean())

    for i in searched:
        assert loss(i, 0.0) == pytest.approx(found.losses[i], rel=1e-9)
        assert loss(i, 0.0) <= min(loss(i, 1e-3), loss(i, -1e-3)) and found.losses[i] <= found.plain[i]


def test_adamw_stops_near_the_minimum():
    """The published search ends within 0.1 of the greedy minimum on the toy; its bounded form stays within 1/2 of 1."""
    grid = time_uniform(VPLinear(), 6)
    x = torch.arange(-1.8, 1.9, 0.4, dtype=torch.float64)[:, None]
    evaluate = Model(TOY)
    exact = learn.search(SOLVERS["unipc"], grid, evaluate, x, truth(grid, x))
    before = evaluate.calls
    targets = truth(grid, x)
    adamw = learn.search(SOLVERS["unipc"], grid, evaluate, x, targets, method="adamw", iterations=25)
    assert evaluate.calls - before > 3 * 25
    assert 1e-4 < np.abs(np.subtract(adamw.ratios, exact.ratios)).max() < 0.1
    bounded = learn.search(SOLVERS["unipc"], grid, evaluate, x, targets, method="adamw", bounded=True, iterations=3)
    assert all(0.5 <= r <= 1.5 for r in bounded.ratios)


def test_interpolation():
    """Weights sum to 1; ratio 0 copies the entry before; at order 1, ratio 2 is 2 m_i - m_{i-1}; a polynomial is reproduced."""
    grid = time_uniform(VPLinear(), 3)

    def weights(ratio, dc_order):
        trace = Compensating(grid, [1.0] * dc_order + [ratio] * (3 - dc_order), dc_order=dc_order)
        x = trace.start()
        outputs = [trace.denoise(x, grid[i]) for i in range(dc_order + 1)]
        for i, out in enumerate(outputs[:-1]):
            trace.compensated(out, grid[i])
        used = trace.compensated(outputs[-1], grid[dc_order])
        (atom,) = used.terms
        form = trace._forms[atom.index]
        return [float(form.terms.get(next(iter(out.terms)), 0.0)) for out in outputs]

    assert weights(2.0, 1) == [-1.0, 2.0] and weights(0.0, 2) == pytest.approx([0.0, 1.0, 0.0], abs=1e-15)
    w, t = weights(1.3, 2), [float(grid.t[i]) for i in range(3)]
    target = 1.3 * t[2] - 0.3 * t[1]
    assert sum(w) == pytest.approx(1, abs=1e-14)
    assert sum(c * (2 - 3 * u + 5 * u * u) for c, u in zip(w, t, strict=True)) == pytest.approx(
        2 - 3 * target + 5 * target**2
    )


def test_compensation_persists(mixture):
    """A history that forgets the compensation differs from the second compensated step on."""
    grid = time_uniform(VPLinear(), 5)
    x = start(grid, (2, 6))

    class Forgetful(Compensating):
        def compensated(self, form, level):
            used = super().compensated(form, level)
            self._entries[0] = (level, form)
            return used

    kept = dc(SOLVERS["unipc"], grid, [1, 1, 1.2, 1.2, 1])
    forgot = SOLVERS["unipc"].record(Forgetful(grid, [1, 1, 1.2, 1.2, 1]))
    a, b = (
        Engine(p, mixture, x.shape, "reference", dtype=torch.float64)(x, return_trajectory=True).states
        for p in (kept, forgot)
    )
    assert torch.equal(a[3], b[3]) and not torch.allclose(a[4], b[4])


def test_lam_space_and_the_time_of_edm_grids(mixture):
    """On an EDM grid "t" is the time of the fitted VP process, as for DEIS: the same ratios give another sample in lam."""
    grid = karras(EDM(), 6)
    x = start(grid, (2, 6))
    in_t, in_lam = (dc(SOLVERS["unipc"], grid, RATIOS, dc_space=s) for s in ("t", "lam"))
    vp = VPLinear.fitted()
    view = fastode.Grid(grid.sigmas * vp.alpha(vp.time(grid.sigmas)), vp.alpha(vp.time(grid.sigmas)), schedule=vp)
    first = float(view.alpha[0])
    same = play(dc(SOLVERS["unipc"], view, RATIOS), mixture, x * first) / float(view.alpha[-1])
    assert relative(same, play(in_t, mixture, x)) < 1e-10  # 1e4 roundings: alpha at sigma = 80 is 0.0125
    assert relative(play(in_lam, mixture, x), play(in_t, mixture, x)) > 1e-3


def test_learned_on_a_few_noises_helps_on_others(tame, tmp_path):
    """Held-out error at 8 steps falls clearly; the artifact plays what was learned, and knows its model."""
    denoiser = Denoiser(tame, "denoised", VPLinear(), sample_shape=(12,))
    grid = time_uniform(VPLinear(), 8)
    teacher = Teacher(denoiser, tolerance=2e-3)
    artifact = learn.train(denoiser, nfe=8, grid=grid, options={"order": 3}, teacher=teacher, progress=False)
    artifact.save(tmp_path / "dc.safetensors")
    x = start(grid, (256, 12), seed=5)
    exact = near(grid, x, tame, steps=60)[-1]

    def error(**how):
        return float((fastode.sample(denoiser, x, **how) - exact).square().mean().sqrt())

    learned, plain = error(solver=tmp_path / "dc.safetensors"), error(solver="unipc", grid=grid, order=3)
    assert learned < 0.8 * plain  # 0.093 against 0.131
    card = Artifact.load(tmp_path / "dc.safetensors").card
    assert card["rmse_after"] < card["rmse_before"] and card["evaluations"] == teacher.evaluations and artifact.nfe == 8
    assert all(b <= a for a, b in zip(card["losses_at_ratio_1"], card["losses"], strict=True))
    assert artifact.numbers["ratios"].tolist()[:2] == [1.0, 1.0]
    with pytest.raises(ValueError, match="learned for schedule"):
        fastode.sample(Denoiser(tame, "denoised", EDM(), sample_shape=(12,)), x, solver=artifact)


def test_published_targets(gaussian):
    """DDIM in uniform time, and for each level the state one reference step too early."""
    grid = time_uniform(VPLinear(), 4)
    x = start(grid, (3, 4))
    published = published_states(Model(gaussian), grid, list(grid)[1:], x, steps=40)
    engine = Engine(SOLVERS["ddim"](time_uniform(VPLinear(), 40)), gaussian, x.shape, "reference", dtype=torch.float64)
    states = engine(x, return_trajectory=True).states
    assert all(relative(p, states[k]) < 1e-12 for p, k in zip(published, (9, 19, 29, 39), strict=True))


def test_regression_golden_values():
    golden = {
        (5, 7.5): [1, 1, 1.0271, 0.7392, 1.2263],
        (6, 6.0): [1, 1, 1.1056, 0.9250, 0.6616, 1.3009],
        (10, 7.5): [1, 1, 0.4446, 0.8980, 1.0628, 1.0426, 0.9408, 0.8610, 0.9068, 1.1816],
        (8, 3.0): [1, 1, 0.8662, 1.0721, 1.0729, 1.0165, 1.0507, 1.3233],
    }
    for (nfe, guidance), ratios in golden.items():
        assert np.allclose(STABLE_DIFFUSION_2_1.ratios(nfe, guidance), ratios, atol=5e-5)


def test_regression_finds_what_it_was_made_from():
    found = [
        (n, g, STABLE_DIFFUSION_2_1.ratios(n, g, clamp=None)) for n in (5, 6, 8, 10) for g in (1.5, 4.5, 7.5, 12.0)
    ]
    again = fit(found)
    for n, g in ((7, 6.0), (9, 3.0)):
        ours, theirs = (c.ratios(n, g, clamp=None) for c in (again, STABLE_DIFFUSION_2_1))
        assert np.allclose(ours, theirs, rtol=1e-6, atol=1e-6)  # the design has condition 1e8
    assert again.nfe == (5, 10) and again.guidance == (1.5, 12.0)


def test_regression_bad_input():
    with pytest.warns(UserWarning, match="nfe: ratios were fitted for 5 .. 10, 20 is outside"):
        clamped = STABLE_DIFFUSION_2_1.ratios(20, 7.5)
    assert all(0.3 <= r <= 2 for r in clamped)
    with pytest.warns(UserWarning, match="guidance_scale: ratios were fitted"):
        STABLE_DIFFUSION_2_1.ratios(5, 20.0)
    with pytest.raises(ValueError, match="nfe: must be a whole number"):
        STABLE_DIFFUSION_2_1.ratios(0, 7.5)
    with pytest.raises(ValueError, match="at least 3 NFEs"):
        fit([(5, g, [1.0] * 5) for g in (1.0, 2.0, 3.0)])
    with pytest.raises(ValueError, match="one ratio per step"):
        fit([(5, 1.0, [1.0] * 4)])
    with pytest.raises(ValueError, match=r"\[4, 3, 3\]"):
        Cascade(torch.zeros(3, 3, 3), (1, 2), (1, 2))


def test_bad_input(mixture):
    grid, unipc = time_uniform(VPLinear(), 4), SOLVERS["unipc"]
    with pytest.raises(ValueError, match="ratios: need one per step, 4 for this grid, got 3"):
        dc(unipc, grid, [1.0] * 3)
    with pytest.raises(ValueError, match=r"must be 1 at the first 2 steps, got 1\.1 at step 1"):
        dc(unipc, grid, [1.0, 1.1, 1.0, 1.0])
    with pytest.raises(ValueError, match="ratios: must be finite"):
        dc(unipc, grid, [1.0, 1.0, float("nan"), 1.0])
    with pytest.raises(ValueError, match="heun steps from no history"):
        dc(SOLVERS["heun"], grid, [1.0] * 4)
    with pytest.raises(ValueError, match="dc_space: must be 't' or 'lam'"):
        dc(unipc, grid, [1.0] * 4, dc_space="rho")
    with pytest.raises(ValueError, match="dc_order: must be 1, 2 or 3"):
        dc(unipc, grid, [1.0] * 4, dc_order=0)
    with pytest.raises(ValueError, match="disable_corrector: must be whole numbers"):
        unipc(grid, disable_corrector=[0.5])
    denoiser = Denoiser(mixture, "denoised", VPLinear(), sample_shape=(6,))
    with pytest.raises(ValueError, match="samples: ratios need at least 2 noises"):
        learn.train(denoiser, samples=1)
    with pytest.raises(ValueError, match="2 steps leave nothing to learn"):
        learn.train(denoiser, nfe=2)
    with pytest.raises(ValueError, match="targets: must be"):
        learn.train(denoiser, targets="near")
    with pytest.raises(ValueError, match="nfe: unipc makes 4 evaluations on this grid, got 5"):
        learn.train(denoiser, grid=grid)
    with pytest.raises(ValueError, match="heun steps from no history"):
        learn.train(denoiser, solver="heun", nfe=6)
    broken = Denoiser(lambda x, s: x * float("nan"), "denoised", VPLinear(), sample_shape=(6,))
    with pytest.raises((ValueError, FloatingPointError), match="network: returned NaN"):
        learn.train(broken, nfe=4, progress=False)


def test_few_noises_and_greed_are_warned_about(mixture):
    """Samples torn between modes: every step gets better and the end gets worse, which is said. So are few noises."""
    denoiser = Denoiser(mixture, "denoised", VPLinear(), sample_shape=(6,))
    with pytest.warns(RuntimeWarning, match="every step by itself is better, the whole is not"):
        made = learn.train(denoiser, grid="time_uniform", samples=64, progress=False)
    assert made.card["rmse_after"] > made.card["rmse_before"]
    with pytest.warns(UserWarning, match="samples: 4 noises are few"):
        learn.train(denoiser, nfe=4, samples=4, progress=False)


def test_stops_in_time_and_saves_what_it_has(tame):
    kept = []
    denoiser = Denoiser(tame, "denoised", VPLinear(), sample_shape=(12,))
    made = learn.train(denoiser, nfe=8, minutes=1e-9, save=kept.append, progress=False)
    ratios = made.numbers["ratios"].tolist()
    assert ratios[2] != 1.0 and ratios[3:] == [1.0] * 5 and kept[-1] is made


def test_a_search_that_diverges_keeps_the_last_good_ratio(mixture):
    """Where the gradient through the network is NaN the ratio stays 1; the last step needs none and is still found."""
    grid = linspace(Discrete.linear(), 5, final="sigma_min")
    x = start(grid, (10, 6))
    targets = near(grid, x, mixture)

    def steep(y, level):
        return mixture(y / level.alpha, level.rho) + 0 * torch.sqrt(0 * y)  # a gradient of 0 * inf

    found = learn.search(SOLVERS["unipc"], grid, steep, x, targets, method="adamw", iterations=3)
    assert found.ratios[:4] == [1.0] * 4 and found.ratios[4] != 1.0
