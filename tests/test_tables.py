"""Learned tables: published ones as they are, any solver as one, and the methods they generalise."""

import itertools

import numpy as np
import pytest
import torch

import fastode
from fastode import SOLVERS, Artifact, Engine
from fastode.schedules import EDM, VPLinear, karras, time_uniform
from fastode.solvers.table import LearnedTable, dyweight, epd, generalized, retold, tabulate
from tests.conftest import VARIANTS, make_grid, relative, start, variant_id
from tests.papers import dyweight as dyweight_paper
from tests.papers import epd as epd_paper
from tests.papers import gs as gs_paper

UNIFORM_4 = time_uniform(EDM(), 3)
EPD_R = [(0.03333, 0.79558), (0.07587, 0.63244), (0.38699, 0.09434)]
EPD_W = [(0.86941, 0.13059), (0.41741, 0.58259), (0.22410, 0.77590)]
EPD_C = [(0.99735, 0.98616), (0.99400, 1.00711), (1.00299, 0.99999)]
EPD_A = [(0.95415, 0.95376), (1.04503, 1.04331), (0.95588, 1.01795)]
AMED_R, AMED_C, AMED_A = [0.21808, 0.45471, 0.15570], [0.99806, 1.00720, 1.00308], [0.80345, 1.00678, 0.90598]
DYWEIGHT_W = [
    (1.03134,),
    (-0.43971, 1.62405),
    (0.40196, -1.34005, 1.94233),
    (0.35179, -1.41052, 1.78087),
    (0.40214, -1.35886, 1.77035),
    (0.40834, -1.33739, 1.90093),
]
DYWEIGHT_S = [0.79179, 0.97331, 1.00316, 0.98427, 0.94603]

PUBLISHED = {
    "amed-const": (lambda: epd(UNIFORM_4, AMED_R, None, AMED_C, AMED_A), 5, 0.0082929672),
    "epd": (lambda: epd(UNIFORM_4, EPD_R, EPD_W, EPD_C, EPD_A), 8, 0.0072986583),
    "dyweight": (lambda: dyweight(karras(EDM(), 6), DYWEIGHT_W, DYWEIGHT_S), 5, 0.0066797465),
    "amed, r = 1/2": (lambda: epd(UNIFORM_4, [0.5] * 3), 5, 0.0168367354),
    "ipndm": (lambda: SOLVERS["ipndm"](karras(EDM(), 6), order=3, afs=True), 5, 0.0062337572),
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("tabulated", [False, True])
def test_published_tables(name, tabulated):
    """On N(0, 0.25) every method multiplies by one number: those of the official code, to the digits printed."""
    make, nfe, gain = PUBLISHED[name]
    program = make()
    assert program.nfe == nfe
    if tabulated:
        program = LearnedTable.of_tensors(tabulate(program).tensors()).program(program.grid)

    def shrink(x, sigma):
        return 0.25 / (0.25 + sigma**2) * x

    made = Engine(program, shrink, (1, 1), dtype=torch.float64)(torch.ones(1, 1, dtype=torch.float64))
    assert abs(float(made) - gain) < 6e-11  # half of the last digit


def sampled(program, model, x):
    return Engine(program, model, x.shape, dtype=torch.float64)(x)


@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("order", [1, 2, 4])
def test_epd_equals_the_paper(mixture, afs, order):
    grid = karras(EDM(), 4)
    g = torch.Generator().manual_seed(0)
    r, c, a = (torch.rand(4, 2, generator=g, dtype=torch.float64).tolist() for _ in range(3))
    c, a = [[1 + (v - 0.5) / 10 for v in row] for row in c], [[1 + (v - 0.5) / 5 for v in row] for row in a]
    w = torch.softmax(torch.randn(4, 2, generator=g, dtype=torch.float64), 1).tolist()
    x = start(grid, (3, 6))
    truth = epd_paper.sample(_numpy(mixture), x.numpy(), grid.sigmas.tolist(), r, w, c, a, afs=afs, order=order)
    program = epd(grid, r, w, c, a, afs=afs, plugin_order=order)
    assert program.nfe == 4 * 3 - afs
    assert relative(sampled(program, mixture, x), torch.from_numpy(truth)) < 1e-12


@pytest.mark.parametrize("afs", [False, True])
def test_dyweight_equals_the_paper(mixture, afs):
    grid = karras(EDM(), 6)
    x, told = start(grid, (3, 6)), DYWEIGHT_S if afs else [1.1, *DYWEIGHT_S]
    truth = dyweight_paper.sample(_numpy(mixture), x.numpy(), grid.sigmas.tolist(), DYWEIGHT_W, told, afs=afs)
    # the analytical direction of the loop subtracts two numbers of size 80
    assert relative(sampled(dyweight(grid, DYWEIGHT_W, told, afs=afs), mixture, x), torch.from_numpy(truth)) < 1e-10


@pytest.mark.parametrize("kind", ["edm", "vp"])
def test_gs_equals_the_paper(mixture, kind):
    grid = make_grid(kind, 5)
    g = torch.Generator().manual_seed(0)
    places = [(k, j) for k in range(5) for j in range(k + 1)]
    a, c = ({p: float(0.01 * torch.randn((), generator=g)) for p in places} for _ in range(2))
    told = [1.0, 1.1, 0.9, 1.05, 0.97]
    x = start(grid, (3, 6))
    levels = grid.sigmas.tolist()
    truth = gs_paper.sample(_numpy(mixture), (x / grid.alpha[0]).numpy(), levels, told, a, c)
    base = SOLVERS["dpm_solver_pp"](grid, order=3, lower_order_final=False)
    made = sampled(generalized(base, a=a, c=c, told=told).program(grid), mixture, x) / grid.alpha[-1]
    assert relative(made, torch.from_numpy(truth)) < 1e-12


def _numpy(model):
    return lambda x, sigma: model(torch.from_numpy(np.asarray(x)), sigma).numpy()


DETERMINISTIC = [(n, o) for n, o in VARIANTS if not SOLVERS[n](make_grid("edm", 4), **o).draws]


@pytest.mark.parametrize("case", DETERMINISTIC, ids=variant_id)
def test_every_solver_is_a_table(mixture, case):
    """Written out in points and outputs it is the same sum: equal to rounding, also after a trip through an artifact."""
    name, options = case
    for kind in ("edm", "flow"):
        grid = make_grid(kind, 4)
        program = SOLVERS[name](grid, **options)
        table = LearnedTable.of_tensors(tabulate(program).tensors()).program(grid)
        assert table.nfe == program.nfe
        x = start(grid, (2, 6))
        assert relative(sampled(table, mixture, x), sampled(program, mixture, x)) < 1e-11


def test_identities(mixture):
    """What each method is when its extra numbers do nothing."""
    grid, x = karras(EDM(), 5), start(karras(EDM(), 5), (2, 6))
    r = [[0.3], [0.6], [0.5], [0.2], [0.4]]
    one = sampled(epd(grid, r, afs=False), mixture, x)
    same = epd(grid, [row * 3 for row in r], [[0.5, 0.2, 0.3]] * 5, afs=False)
    assert relative(sampled(same, mixture, x), one) < 1e-13
    weights = [(1,), (-0.5, 1.5), *[(5 / 12, -16 / 12, 23 / 12)] * 3]
    ipndm = sampled(SOLVERS["ipndm"](grid, order=3), mixture, x)
    assert relative(sampled(dyweight(grid, weights, afs=False, epsilon=0.0), mixture, x), ipndm) < 1e-12
    base = SOLVERS["dpm_solver_pp"](grid, order=3, lower_order_final=False)
    assert relative(sampled(generalized(base).program(grid), mixture, x), sampled(base, mixture, x)) < 1e-13
    assert relative(sampled(retold(base, [1.0] * 5), mixture, x), sampled(base, mixture, x)) == 0


def test_told_levels_reach_the_network_only(mixture):
    """The step stays on its own level: DDIM by hand with another sigma for the network, whose preconditioning follows it."""
    grid = time_uniform(VPLinear(), 3)
    told, asked = [1.2, 0.9, 1.05], []

    def model(x, sigma):
        asked.append(float(sigma))
        return mixture(x, sigma)

    x = y = start(grid, (2, 6))
    for (_, s, t), f in zip(grid.windows(), told, strict=True):
        d = mixture(y / s.alpha, f * s.rho)
        y = t.sigma / s.sigma * y + (t.alpha - s.alpha * t.sigma / s.sigma) * d
    made = sampled(retold(SOLVERS["ddim"](grid), told), model, x)
    assert relative(made, y) < 1e-13
    assert asked == pytest.approx([f * r for f, r in zip(told, grid.sigmas.tolist(), strict=False)])
    network = fastode.Denoiser(lambda x, c, class_labels=None: torch.tanh(x) * c.reshape(-1, 1).cos(), "edm")
    level = fastode.schedules.Grid([1.3, 0.1])[0]
    plain = network.denoise(x, level)
    program = retold(SOLVERS["ddim"](fastode.Grid([1.0, 1e-9])), [1.3])
    assert relative(sampled(program, network, x), plain) < 1e-7


def test_through_an_artifact(mixture, tmp_path):
    model = fastode.Denoiser(mixture, "denoised", sample_shape=(6,))
    program = epd(UNIFORM_4, EPD_R, EPD_W, EPD_C, EPD_A)
    artifact = Artifact("table", "ddim", UNIFORM_4, tabulate(program).tensors(), {"form": "epd"})
    artifact.save(tmp_path / "epd.safetensors")
    x = start(UNIFORM_4, (4, 6))
    made = fastode.sample(model, x, solver=tmp_path / "epd.safetensors")
    assert relative(made, sampled(program, mixture, x)) < 1e-12
    assert torch.equal(made[1:2], fastode.sample(model, x[1:2], solver=tmp_path / "epd.safetensors"))
    run = fastode.sample(model, x, solver=tmp_path / "epd.safetensors", return_trajectory=True)
    assert len(run.states) == 4 and run.nfe == 8
    grid = Artifact("grid", "ddim", UNIFORM_4, {"told": torch.tensor([1.1, 1.0, 0.9], dtype=torch.float64)})
    assert grid.program().sigmas.tolist() == pytest.approx([88, 6.950235, 1.158002], rel=1e-6)


def test_bad_input():
    grid = karras(EDM(), 3)
    table = tabulate(SOLVERS["ddim"](grid))
    numbers = table.tensors()
    for call, message in (
        (lambda: epd(grid, [0.5] * 2), "r: need one row for each of 3 steps"),
        (lambda: epd(grid, [[0.5, 0.4]] * 3, [[1.0]] * 3), "w: row 0 must have 2"),
        (lambda: epd(grid, [0.5] * 3, plugin_order=5), "plugin_order: must be"),
        (lambda: epd(karras(EDM(), 3, final="zero"), [0.5] * 3), "grid: EPD needs"),
        (lambda: dyweight(grid, DYWEIGHT_W), "weights: need one row"),
        (lambda: dyweight(grid, [(1,), (1, 1), (1, 1, 1, 1)]), "weights: row 2"),
        (lambda: dyweight(grid, [(1,)] * 3, [1.0] * 3), "told: need one factor for each of 2"),
        (lambda: dyweight(time_uniform(VPLinear(), 3), [(1,)] * 3), "grid: DyWeight tables live"),
        (lambda: retold(SOLVERS["ddim"](grid), [1.0]), "told: need one factor for each of 3"),
        (lambda: tabulate(SOLVERS["ddim"](grid, eta=1.0)), "solver: ddim has noise"),
        (lambda: generalized(SOLVERS["ddim"](grid), a={(0, 1): 1.0}), "a: entries are"),
        (lambda: table.program(karras(EDM(), 4)), "rows: name 4 states"),
        (
            lambda: LearnedTable.of_tensors({k: v for k, v in numbers.items() if k != "told"}),
            "told: this table has none",
        ),
        (lambda: LearnedTable.of_tensors(numbers | {"a": numbers["a"] / 0}), "a: must be finite"),
        (lambda: LearnedTable.of_tensors(numbers | {"a": numbers["a"][:2]}), "a, b: must be square"),
        (lambda: LearnedTable.of_tensors(numbers | {"gain": torch.ones(2)}), "gain: must have 3"),
        (lambda: LearnedTable.of_tensors(numbers | {"first": torch.zeros(())}), "first: must not be 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert list(itertools.pairwise(table.rows)) == [(0, 1), (1, 2), (2, 3)]
