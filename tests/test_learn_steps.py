"""Optimised time steps: the bound, its optimum against golden values, and what must be rejected."""

import math

import numpy as np
import pytest
import torch

import fastode
from fastode import SOLVERS, Artifact
from fastode.denoisers import GaussianMixture
from fastode.learn import steps
from fastode.learn.steps import objective, optimise, plausible, step_weights
from fastode.learn.teacher import Teacher, held_out_seeds
from fastode.schedules import EDM, Flow, VPLinear, karras, log_snr, quadratic, time_uniform
from fastode.schedules.spacing import explicit

PAPER = {"order": 3, "exact": True}

VP_OPTIMA = {
    (4, 2): (60.837689, [-1.9912, -0.7910, 0.8899], [0.62910, 0.41665, 0.12023]),
    (4, 1): (83.836206, [-1.8885, -0.6589, 1.1019], [0.61296, 0.39034, 0.09768]),
    (5, 2): (49.904819, [-2.1818, -1.2158, -0.2578, 1.0646], [0.65819, 0.49784, 0.30946, 0.10136]),
    (5, 1): (71.375704, [-2.0651, -1.0895, -0.0810, 1.3248], [0.64052, 0.47434, 0.27455, 0.07797]),
    (6, 2): (38.347715, [-2.5450, -1.4233, -0.8111, 0.0997, 1.2571], [0.71065, 0.53516, 0.42062, 0.24027, 0.08355]),
    (6, 1): (56.822435, [-2.4039, -1.2337, -0.5980, 0.3928, 1.6171], [0.69071, 0.50112, 0.37809, 0.18933, 0.05749]),
    (7, 2): (25.798066, [-2.9239, -1.9130, -1.3385, -0.3949, 0.4886, 1.5187], None),
}

EDM_OPTIMA = {
    (4, 1): (122.702836, [2.46054, 0.68026, 0.09166]),
    (5, 1): (102.226262, [3.06275, 1.11352, 0.37370, 0.07227]),
    (6, 1): (79.418201, [4.45582, 1.30253, 0.64615, 0.21760, 0.05202]),
    (7, 1): (55.493302, [6.13646, 2.03491, 0.98961, 0.31643, 0.11267, 0.03469]),
    (5, 2): (52.120639, [4.25813, 1.58829, 0.61073, 0.14297]),
    (6, 2): (39.577252, [6.20227, 2.03809, 1.05837, 0.43748, 0.11738]),
}


@pytest.mark.parametrize("name", ["dpm_solver_pp", "unipc", "ipndm", "heun", "dpm_solver_3", "pndm"])
@pytest.mark.parametrize("grid", [karras(EDM(), 6), time_uniform(VPLinear(), 6)], ids=["edm", "vp"])
def test_step_weights_add_up_to_the_unrolled_program(name, grid):
    """Also with correctors and inner points; and a constant estimate moves x/sigma as DDIM does in every step."""
    program = SOLVERS[name](grid)
    w = step_weights(program)
    total = program.unroll().weights().numpy() / float(grid.sigma[-1])
    assert np.abs(w.sum(0) - total).max() < 1e-12 * np.abs(w).max()
    exact = np.diff(np.exp(-grid.sigmas.log().numpy()))  # e^lam at both ends
    assert np.abs(w.sum(1) - exact).max() < 1e-12 * exact.max()


def test_paper_weights_integrate_polynomials():
    """Order 3 weights integrate 1, lam, lam^2 against e^lam exactly: quadrature to 1e-14, sums of five terms."""
    grid = log_snr(VPLinear(), 6)
    w, lam = step_weights(SOLVERS["dpm_solver_pp"](grid, **PAPER)), -grid.sigmas.log().numpy()
    x, weight = np.polynomial.legendre.leggauss(40)
    for s, degree in ((2, 2), (3, 2), (1, 1), (4, 1), (0, 0)):
        half = (lam[s + 1] - lam[s]) / 2
        u = lam[s] + half * (1 + x)
        for k in range(degree + 1):
            exact = (half * weight * np.exp(u) * u**k).sum()
            assert abs((w[s] * lam[:-1] ** k).sum() - exact) < 1e-12 * max(abs(exact), 1)


@pytest.mark.parametrize(
    ("make", "n", "value"),
    [
        (time_uniform, 5, 75.9653), (time_uniform, 6, 58.7883), (log_snr, 5, 231.4785), (log_snr, 6, 171.0305),
        (karras, 5, 135.5416), (karras, 6, 124.3659), (quadratic, 5, 68.7144), (quadratic, 6, 51.9262),
    ],
)  # fmt: skip
def test_golden_objective(make, n, value):
    assert abs(objective(SOLVERS["dpm_solver_pp"](make(VPLinear(), n), **PAPER), power=2) - value) < 1e-4


@pytest.mark.parametrize(("case", "golden"), VP_OPTIMA.items(), ids=str)
def test_golden_optimum(case, golden):
    """The optimum is unique up to seven steps: every start reaches it (all are tried at five)."""
    (n, power), (value, lam, times) = case, golden
    starts = ("karras", "log_snr", "time_uniform", "quadratic") if n == 5 else ("time_uniform",)
    for place in optimise(VPLinear(), n, power=power, starts=starts):
        assert abs(place.value - value) < 2e-5 and place.plausible
        # printed to four decimals; at n = 7 the minimum is flat: J differs by 1e-5 where lam differs by 1e-3
        found = -place.grid.sigmas.log()[1:-1]
        assert (found - torch.tensor(lam)).abs().max() < (2e-4 if n < 7 else 2e-3)
        if times is not None:
            assert (place.grid.t[1:-1] - torch.tensor(times)).abs().max() < 2e-5
        assert (float(place.grid.sigmas[0]), float(place.grid.sigmas[-1])) == pytest.approx(
            (VPLinear().sigma_max, VPLinear().sigma_min), rel=1e-12
        )


@pytest.mark.parametrize(("case", "golden"), EDM_OPTIMA.items(), ids=str)
def test_golden_optimum_edm(case, golden):
    (n, power), (value, sigmas) = case, golden
    (place,) = optimise(EDM(), n, power=power, starts=("karras",))
    assert abs(place.value - value) < 2e-5
    assert (place.grid.sigmas[1:-1] / torch.tensor(sigmas) - 1).abs().max() < (3e-4 if n < 7 else 2e-3)


def test_trust_region_finds_the_same_optimum():
    """The paper's optimiser reaches it at five steps; at eight it stalls above what smoothing finds."""
    (place,) = optimise(VPLinear(), 5, power=2, minimizer="trust-constr", starts=("time_uniform",))
    assert abs(place.value - 49.904819) < 1e-4


@pytest.mark.slow
def test_cancelling_grids_are_rejected():
    """With c = 0 nothing stops errors from cancelling: a good minimiser finds a useless grid, and the gap rule sees it."""
    found = optimise(VPLinear(), 6, power=2, truncate=0, starts=("karras",))
    assert found[0].value < 5 and not found[0].plausible


def test_gap_rule():
    """The eight-step grid that c = 0 ends in is refused, the golden ones pass."""
    published = [1, 0.969, 0.235, 0.056, 0.015, 0.007, 0.0045, 0.0027, 0.001]
    assert not plausible(VPLinear().lam(torch.tensor(published, dtype=torch.float64)).numpy())
    for _, lam, _ in VP_OPTIMA.values():
        assert plausible([-5.0249784, *lam, 4.5577149])
    assert not plausible([0, 1, 1 + 5e-4, 2]) and not plausible([0, 1, 7, 8])


def test_any_solver_has_an_optimum():
    """The solver's own weights: the result is at least as good, for that solver, as the paper's grid."""
    schedule = EDM()
    for name, options in (("unipc", {}), ("ipndm", {"order": 2}), ("ddim", {})):
        (own,) = optimise(schedule, 5, solver=name, options=options, starts=("time_uniform",))
        (paper,) = optimise(schedule, 5, starts=("time_uniform",))
        assert own.value <= objective(SOLVERS[name](paper.grid, **options)) + 1e-6


def test_beats_uniform_grids_on_a_mixture():
    """At six steps the optimum beats uniform t and uniform lam for both powers, on data of about unit size."""
    g = torch.Generator().manual_seed(0)
    data = GaussianMixture(torch.randn(3, 16, generator=g), 0.05)
    schedule = VPLinear()
    model = fastode.Denoiser(data, "denoised", schedule, sample_shape=(16,))
    teacher, seeds = Teacher(model, batch=256), held_out_seeds(256)

    def error(grid):
        return teacher.error(SOLVERS["dpm_solver_pp"](grid, **PAPER), seeds).rmse

    uniform = min(error(time_uniform(schedule, 6)), error(log_snr(schedule, 6)))
    for power in (1, 2):
        assert error(optimise(schedule, 6, power=power, starts=("karras",))[0].grid) < uniform


def test_train_writes_a_playable_artifact(mixture, tmp_path):
    model = fastode.Denoiser(mixture, "denoised", sample_shape=(6,))
    saved = []
    artifact = steps.train(
        model, nfe=5, samples=32, powers=1, weights="paper", save=saved.append, progress=False, minutes=5
    )
    assert (artifact.method, artifact.solver, artifact.nfe) == ("grid", "unipc", 5)
    assert saved[-1] is artifact
    card = artifact.card
    assert card["seconds"] > 0 and card["evaluations"] > 32 * 5 and card["peak_memory_bytes"] > 0
    assert card["tried"][0]["rmse"] == card["error"]["rmse"] and card["uniform"]["rmse"] > 0
    artifact.save(tmp_path / "a.safetensors")
    x = 80 * torch.randn(3, 6, dtype=torch.float64)
    played = fastode.sample(model, x, solver=tmp_path / "a.safetensors")
    assert torch.equal(played, fastode.sample(model, x, solver="unipc", grid=artifact.grid))
    assert Artifact.load(tmp_path / "a.safetensors").card["settings"]["truncate"] == 3


def test_bad_input(mixture):
    model = fastode.Denoiser(mixture, "denoised", sample_shape=(6,))
    for call, message in (
        (lambda: optimise(EDM(), 1), "steps: at least 2"),
        (lambda: optimise(Flow(), 5), "schedule: the bound needs"),
        (lambda: optimise(EDM(), 5, power=0), "power: must be positive"),
        (lambda: optimise(EDM(), 5, truncate=-1), "truncate: must be"),
        (lambda: optimise(EDM(), 5, minimizer="newton"), "minimizer: must be"),
        (lambda: objective(SOLVERS["edm"](karras(EDM(), 3, final="zero"))), "grid: the bound is on x/sigma"),
        (lambda: step_weights(SOLVERS["ddim"](karras(EDM(), 3), eta=1.0)), "solver: ddim injects noise"),
        (lambda: steps.train(model, weights="none"), "weights: must be"),
        (lambda: steps.train(model, minutes=0), "minutes: must be positive"),
        (lambda: steps.train(model, samples=0), "samples: must be"),
        (lambda: steps.train(mixture), "sample_shape: .* does not know"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_levels_depend_on_lam_only():
    """Shifting the schedule's clock changes nothing: same range in the EDM frame, same levels."""
    (one,) = optimise(EDM(0.01, 50), 5, starts=("log_snr",))
    (other,) = optimise(VPLinear.fitted(0.01, 50), 5, starts=("log_snr",))
    assert (one.grid.sigmas / other.grid.sigmas - 1).abs().max() < 1e-4
    assert math.isclose(one.value, other.value, rel_tol=1e-6)
    assert torch.equal(explicit(EDM(0.01, 50), one.grid.sigmas).sigmas, one.grid.sigmas)
