"""GITS: the search against exhaustive enumeration, the costs against their geometry."""

import itertools

import pytest
import torch

import fastode
from fastode.denoisers import Gaussian, GaussianMixture
from fastode.learn import gits
from fastode.learn.gits import cost_matrix, search
from fastode.learn.teacher import Teacher, held_out_seeds
from fastode.schedules import EDM, Flow, VPLinear, karras

BENT = GaussianMixture(torch.tensor([[0.6, 0.6, 0.0], [-0.6, 0.2, 0.4]]), 0.01)
"""Two components: trajectories with one bend."""


def enumerated(cost, jumps, gamma):
    n = len(cost)
    paths = [[0, *inner, n - 1] for inner in itertools.combinations(range(1, n - 1), jumps - 1)]
    return min(paths, key=lambda p: sum(gamma**k * float(cost[a, b]) for k, (a, b) in enumerate(itertools.pairwise(p))))


@pytest.mark.parametrize("gamma", [0.9, 1.0, 1.15])
def test_search_is_exhaustive(gamma):
    """Random costs, negative ones among them."""
    g = torch.Generator().manual_seed(0)
    for n, jumps in ((4, 1), (4, 3), (6, 2), (8, 3), (10, 4)):
        for _ in range(5):
            cost = torch.randn(n, n, generator=g, dtype=torch.float64)
            assert search(cost, jumps, gamma) == enumerated(cost, jumps, gamma)


def test_ties_take_the_smallest_index():
    assert search(torch.zeros(9, 9), 4) == [0, 1, 2, 3, 8]


def test_more_weight_on_late_jumps_moves_levels_down(mixture):
    states, slopes, sigmas = follow(mixture)
    cost = cost_matrix(states, slopes, sigmas)
    means = [sum(search(cost, 5, g)) for g in (0.8, 1.0, 1.2, 1.5)]
    assert means == sorted(means) and means[0] < means[-1]


def follow(data, n=21, count=16, dim=6):
    grid = karras(EDM(), n - 1)
    teacher = Teacher(fastode.Denoiser(data, "denoised", sample_shape=(dim,)), batch=count)
    states, seen = teacher.follow(fastode.SOLVERS["ipndm"](grid), held_out_seeds(count))
    slopes = [(x - d) / s for (x, d), s in zip(seen, grid.sigmas.tolist()[:-1], strict=True)]
    return states, slopes, grid.sigmas


def test_one_data_point_costs_nothing():
    """Straight lines: every jump is exact. 1e-5 is float32 at a state of size 80."""
    states, slopes, sigmas = follow(Gaussian(torch.ones(6), 0.0))
    for metric in ("dev", "l1", "l2"):
        assert cost_matrix(states, slopes, sigmas, metric).abs().max() < 6e-4
    assert cost_matrix(states, slopes, sigmas, "l2").abs().max() > 0


def test_deviation_sees_shape_only():
    """An isotropic Gaussian: trajectories are straight through the mean, but not run at constant speed."""
    states, slopes, sigmas = follow(Gaussian(torch.zeros(6), 0.25))
    assert cost_matrix(states, slopes, sigmas, "dev").abs().max() < 1e-4 < 1e-1
    assert cost_matrix(states, slopes, sigmas, "l2").max() > 0.1


def test_deviation_is_a_length(mixture):
    """Invariant under shifts and rotations of the data, and of degree 1 when data and sigma are scaled together."""
    states, slopes, sigmas = follow(mixture)
    states, slopes = [x.double() for x in states], [d.double() for d in slopes]
    cost = cost_matrix(states, slopes, sigmas)
    q = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    moved = cost_matrix([(x + 3) @ q for x in states], [d @ q for d in slopes], sigmas)
    scaled = cost_matrix([2 * x for x in states], slopes, 2 * sigmas)
    assert (moved - cost).abs().max() < 1e-10 * cost.abs().max()
    assert (scaled - 2 * cost).abs().max() < 1e-12 * cost.abs().max()


def test_cost_by_hand():
    """Three levels in two dimensions: jump (0, 2) from (4, 0) along (1, 0.5) over -2 lands on (2, -1)."""
    sigmas = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    states = [torch.tensor([[4.0, 0.0]]), torch.tensor([[2.0, 1.0]]), torch.tensor([[0.0, 0.0]])]
    slopes = [torch.tensor([[1.0, 0.5]]), torch.tensor([[2.0, 0.0]])]
    assert cost_matrix(states, slopes, sigmas, "l1")[0, 2] == 3
    assert cost_matrix(states, slopes, sigmas, "l2")[0, 2] == pytest.approx(5**0.5)
    # the line is the first axis: (2, -1) is 1 off it and the last state 0; (3, -0.5) is 0.5 off where the state is 1
    dev = cost_matrix(states, slopes, sigmas, "dev")
    assert dev[0, 2] == pytest.approx(1) and dev[0, 1] == pytest.approx(-0.5) and dev[1, 2] == pytest.approx(1)


@pytest.mark.parametrize("schedule", [EDM(), VPLinear()], ids=["edm", "vp"])
def test_the_grid_beats_karras(schedule):
    """Two components, the same solver and evaluations: closer to the converged solution on samples it has not seen."""
    model = fastode.Denoiser(BENT, "denoised", schedule, sample_shape=(3,))
    teacher = Teacher(model, batch=128)
    artifact = gits.train(model, nfe=5, samples=128, teacher=teacher, progress=False)
    assert artifact.nfe == 5 and artifact.grid.name == "gits dev gamma=1.15"
    seeds = held_out_seeds(128)
    plain = fastode.SOLVERS["ipndm"](karras(schedule, 5))
    assert teacher.error(artifact.program(), seeds).rmse < teacher.error(plain, seeds).rmse
    assert len(artifact.card["tried"]) == 1 and artifact.card["evaluations"] >= 128 * 60


def test_analytical_first_step():
    """One more level, put between the first two; as many evaluations. The published teacher hugs the first level."""
    model = fastode.Denoiser(BENT, "denoised", sample_shape=(3,))
    ours = gits.train(model, nfe=4, samples=16, levels=21, options={"afs": True}, progress=False)
    published = gits.train(model, nfe=4, samples=16, levels=21, options={"afs": True}, teacher_afs=True, progress=False)
    dense = karras(EDM(), 20).sigmas
    for found in (ours, published):
        assert found.nfe == 4 and found.grid.steps == 5
        inserted = float(found.grid.sigmas[1])
        assert float(found.grid.sigmas[2]) < inserted < 80 and bool((dense == inserted).any())
    assert published.grid.sigmas[1] == dense[1]


def test_bad_input(mixture):
    model = fastode.Denoiser(mixture, "denoised", sample_shape=(6,))
    flow = fastode.Denoiser(mixture, "denoised", Flow(), sample_shape=(6,))
    zeros = torch.zeros(4, 4)
    for call, message in (
        (lambda: search(zeros, 4), "jumps: between 1 and 3"),
        (lambda: search(zeros[:3], 2), "cost: must be square"),
        (lambda: search(zeros, 2, 0.0), "gamma: must be positive"),
        (lambda: search(zeros / 0, 2), "cost: must be numbers"),
        (lambda: search(1 / zeros, 2), "cost: allows no path"),
        (lambda: gits.train(model, metric="l3"), "metric: must be one of"),
        (lambda: gits.train(model, levels=5), "levels: must be more than"),
        (lambda: gits.train(model, gamma=[]), "gamma: must be positive"),
        (lambda: gits.train(model, nfe=0), "nfe: must be"),
        (lambda: gits.train(flow, dense="time_uniform"), "dense: GITS jumps in sigma/alpha"),
        (lambda: cost_matrix([torch.zeros(1, 2)] * 3, [torch.zeros(1, 2)], torch.ones(3)), "states, directions"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
