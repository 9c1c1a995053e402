"""DPM-Solver-v3: its integrals, steps and degenerate cases; per-element tables in every backend; statistics of a model."""

import math

import numpy as np
import pytest
import torch

import fastode
from fastode import SOLVERS, Artifact, Denoiser, Engine
from fastode.backends import BACKENDS
from fastode.denoisers import Gaussian, GaussianMixture
from fastode.learn import ems, v3
from fastode.learn.teacher import Teacher, training_seeds
from fastode.schedules import EDM, Flow, VPLinear, karras, log_snr, time_uniform
from fastode.solvers.dpm_solver_v3 import Statistics, dpm_solver_v3, integrate, snap
from tests.conftest import relative, start
from tests.papers import dpm_solver_v3 as paper

TOY = GaussianMixture(*(torch.tensor(v, dtype=torch.float64) for v in ([[-1.0], [0.8]], [0.2**2, 0.35**2], [0.3, 0.7])))
STARTS = torch.tensor([[-1.0], [0.1], [1.5]], dtype=torch.float64)
VP = VPLinear()


def levels(n, schedule=VP):
    return ems.uniform_levels([schedule.sigma_min, schedule.sigma_max], n)


def surrogate(n, mean=0.26, v=0.77815):
    """The statistics of the golden values: l of a Gaussian, s as if data and noise prediction took turns."""
    lam = levels(n)
    l = 1 / (1 + v * torch.exp(2 * lam))  # noqa: E741
    s = -2 * torch.tanh(lam - 0.7)
    return Statistics(lam, l[:, None], s[:, None], (2 * mean * l * (1 - l) + s * mean * l)[:, None])


def uneven(n, shape, schedule=VP):
    """Smooth statistics that differ between elements."""
    lam = levels(n, schedule).reshape(-1, *[1] * len(shape))
    g = torch.Generator().manual_seed(4)
    v = 0.2 + torch.rand(shape, generator=g, dtype=torch.float64)
    l = 1 / (1 + v * torch.exp(2 * lam))  # noqa: E741
    return Statistics(levels(n, schedule), l, -v * torch.tanh(lam - 0.7), 0.3 * l * (1 - l) * v)


def play(program, data, x, backend="reference", dtype=torch.float64):
    return Engine(program, data, x.shape, backend, dtype=dtype)(x.to(dtype))


GOLDEN = [
    ({"order": 1, "corrector": False}, 8, (-0.9838634282, 0.6839979380, 1.2286021306)),
    ({"order": 2, "corrector": False, "lower_order_final": False}, 8, (-1.0183325010, 0.6768192359, 1.2406330713)),
    ({"corrector": False, "lower_order_final": False}, 8, (-1.0039589041, 0.6620415647, 1.2513562770)),
    ({"corrector": False}, 8, (-1.0046601441, 0.6611088484, 1.2533347414)),
    (
        {"corrector": False, "p_pseudo": True, "lower_order_final": False},
        8,
        (-1.0149642617, 0.6719452420, 1.2438969208),
    ),
    ({}, 8, (-0.9535764237, 0.6374181058, 1.2712707976)),
    ({"c_pseudo": True}, 8, (-0.9396132692, 0.6174272683, 1.2842041545)),
    ({"p_pseudo": True, "lower_order_final": False}, 5, (-0.9832960005, 0.6803514392, 1.2657532676)),
    ({"order": 2, "c_pseudo": True}, 6, (-0.8526952657, 0.5752527697, 1.3072311568)),
]


@pytest.mark.parametrize(("options", "steps", "golden"), GOLDEN, ids=str)
def test_golden_samples(options, steps, golden):
    table = surrogate(1200)
    program = dpm_solver_v3(snap(log_snr(VP, steps), table), table, refine=1, **options)
    made = play(program, TOY, STARTS).flatten()
    assert float((made - torch.tensor(golden, dtype=torch.float64)).abs().max()) < 2e-10  # as printed
    assert program.nfe == steps


def test_golden_integrals():
    table = surrogate(1200)
    whole = integrate(table, torch.arange(0, 601, dtype=torch.float64), 600 * table.step)
    found = [whole.L, whole.S, whole.B]
    assert found == pytest.approx([4.59275279, 9.29529532, 0.25998074], abs=6e-9)
    assert [whole.E[0], whole.J] == pytest.approx([434384.55641, 112913.17061544], rel=1e-11)
    part = integrate(table, torch.arange(450, 601, dtype=torch.float64), 150 * table.step)
    assert part.E[:3] == pytest.approx((9.15550204, 7.93955386, 3.79074039), abs=6e-9)


def test_constant_statistics_have_a_closed_form():
    """l = .6, s = -.3, b = .2 over h = .8; trapezoids of 4000 levels are good to 1e-7."""
    n = 4000
    lam = torch.linspace(0, 0.8, n + 1, dtype=torch.float64)
    table = Statistics(lam, *(torch.full((n + 1, 1), c, dtype=torch.float64) for c in (0.6, -0.3, 0.2)))
    made = integrate(table, torch.arange(n + 1, dtype=torch.float64), 0.8)
    assert math.exp(-made.L) == pytest.approx(0.618783391806, abs=1e-12)
    assert (*made.E[:3], made.J) == pytest.approx(
        (0.904163834405, 0.376118286175, 0.102271473093, 0.081751223945), abs=1e-8
    )


@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
def test_interpolation_reproduces_polynomials(interpolation):
    lam = torch.linspace(-1, 2, 13, dtype=torch.float64)
    cube = (lam**3 if interpolation == "cubic" else lam)[:, None]
    table = Statistics(lam, cube, cube, cube)
    where = torch.linspace(1, 11, 57, dtype=torch.float64)
    at = -1 + 0.25 * where
    made = table.at(where, "l", cubic=interpolation == "cubic").flatten()
    assert torch.allclose(made, at**3 if interpolation == "cubic" else at, atol=1e-12, rtol=0)
    ends = torch.tensor([0.0, 12.0], dtype=torch.float64)
    assert torch.equal(table.at(ends, "l", cubic=interpolation == "cubic"), cube[[0, -1]])


@pytest.mark.parametrize("steps", [1, 2, 3, 6])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("p_pseudo", [False, True])
@pytest.mark.parametrize("corrector", [None, False, True])  # off, true order, pseudo
def test_equals_the_paper(steps, order, p_pseudo, corrector):
    """Per-element tables, on VP and EDM grids, against cumulative tables and unfolded steps."""
    for schedule, make in ((VP, time_uniform), (EDM(), karras)):
        data = Gaussian(torch.tensor([0.3, -0.5, 0.0]), torch.tensor([0.25, 0.05, 1.0]))
        table = uneven(240, (3,), schedule)
        grid = snap(make(schedule, steps), table)
        x = start(grid, (2, 3))
        options = {
            "order": order, "p_pseudo": p_pseudo, "corrector": corrector is not None, "c_pseudo": bool(corrector),
            "lower_order_final": order != 2,
        }  # fmt: skip

        def denoise(y, alpha, sigma, data=data):
            return data(torch.from_numpy(y) / alpha, sigma / alpha).numpy()

        at = [round(table.position(float(v.lam))) for v in grid]
        loop = paper.sample(
            denoise, x.numpy(), grid.alpha.tolist(), grid.sigma.tolist(), at,
            *(t.numpy() for t in (table.lam, table.l, table.s, table.b)), **options,
        )  # fmt: skip
        made = play(dpm_solver_v3(grid, table, refine=1, **options), data, x)
        # the loop's tables span e^(L+S), ten decades, and are subtracted; ours start at every level
        assert relative(made, torch.from_numpy(loop)) < 1e-7


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(
    "grid", [log_snr(VP, 6), karras(EDM(), 6), time_uniform(Flow(t_max=0.99, t_min=0.01), 6)], ids=str
)
def test_degenerate_is_exponential_adams_bashforth(order, grid, mixture):
    """l = 1, s = b = 0: the integrals are the phi functions, and nothing depends on the statistics."""
    table = uneven(240, (6,), EDM(1e-3, 200.0))
    program = dpm_solver_v3(grid, table, order=order, corrector=False, degenerate=True)
    plain = SOLVERS["dpm_solver_pp"](grid, order=order, exact=True)
    x = start(grid, (2, 6))
    assert relative(play(program, mixture, x), play(plain, mixture, x)) < 1e-11
    with_corrector = dpm_solver_v3(grid, table, order=order, degenerate=True)
    assert order == 1 or relative(play(with_corrector, mixture, x), play(plain, mixture, x)) > 1e-4


def test_noise_prediction_is_a_special_case(mixture):
    """(l, s, b) = (0, -1, 0): DEIS in ln rho. Constant tables, so that only the trapezoid is left: 1/N^2."""
    grid, error = log_snr(VP, 6), []
    x = start(grid, (2, 6))
    for n in (300, 600):
        zero = torch.zeros(n + 1, 1)
        table = Statistics(levels(n), zero, zero - 1, zero)
        made = play(dpm_solver_v3(grid, table, corrector=False, lower_order_final=False, refine=1), mixture, x)
        error.append(relative(made, play(SOLVERS["deis"](grid, order=3, space="lam"), mixture, x)))
    assert error[0] < 2e-3 and 3.8 < error[0] / error[1] < 4.2


def test_one_step_is_exact_on_gaussian_data():
    """l = 1/(1 + v e^(2 lam)) makes f the same for all x and b = f' - s f makes g constant: every order, one step."""
    mean, v = torch.tensor([0.3, -0.5, 1.0]), torch.tensor([0.25, 0.05, 0.6])
    data = Gaussian(mean, v)
    error = {}
    for n in (240, 480):
        lam = levels(n)[:, None]
        l = 1 / (1 + v * torch.exp(2 * lam))  # noqa: E741
        for s in (0.0, 0.7):
            table = Statistics(levels(n), l, torch.full_like(l, s), 2 * mean * l * (1 - l) + s * mean * l)
            grid = log_snr(VP, 1)
            x = start(grid, (4, 3))
            exact = grid.alpha[1] * data.flow(x / grid.alpha[0], float(grid[0].rho), float(grid[1].rho))
            made = play(dpm_solver_v3(grid, table, refine=1), data, x)
            error[n, s] = relative(made, exact)
    assert error[240, 0.0] < 1e-3 and 3.7 < error[240, 0.0] / error[480, 0.0] < 4.3  # up to quadrature: 1/N^2
    assert 3.5 < error[240, 0.7] / error[480, 0.7] < 4.5
    refined = play(dpm_solver_v3(grid, table, refine=10, interpolation="cubic"), data, x)
    assert relative(refined, exact) < 0.05 * error[480, 0.7]  # interpolate, then integrate: free at sampling time


def test_refining_the_statistics_removes_the_quadrature_error():
    """The card's toy at 5 steps: 120 levels with plain trapezoids against the same 120 levels refined tenfold."""
    fine = surrogate(12000)
    coarse = Statistics(fine.lam[::100], fine.l[::100], fine.s[::100], fine.b[::100])
    options = {"p_pseudo": True, "lower_order_final": False}
    grid = snap(log_snr(VP, 5), coarse)
    truth = play(dpm_solver_v3(grid, fine, refine=1, **options), TOY, STARTS)
    plain = play(dpm_solver_v3(grid, coarse, refine=1, **options), TOY, STARTS)
    refined = play(dpm_solver_v3(grid, coarse, refine=10, **options), TOY, STARTS)
    cubic = play(dpm_solver_v3(grid, coarse, refine=20, interpolation="cubic", **options), TOY, STARTS)
    assert relative(cubic, truth) < 0.1 * relative(plain, truth)
    assert relative(refined, truth) < 0.75 * relative(plain, truth)


def test_convergence_order():
    """Slope of the error in the number of steps, orders 1 to 3 with corrector off; statistics are smooth and fixed."""
    table = uneven(500, (2,))
    data = Gaussian(torch.tensor([0.3, -0.5]), torch.tensor([0.25, 0.6]))
    for order, low in (
        (1, 0.9),
        (2, 1.8),
        (3, 1.9),
    ):  # the first steps of a history are of first order, which limits order 3
        errors = []
        for n in (20, 40):
            grid = log_snr(VP, n)
            x = start(grid, (2, 2))
            exact = grid.alpha[-1] * data.flow(x / grid.alpha[0], float(grid[0].rho), float(grid[n].rho))
            made = play(dpm_solver_v3(grid, table, order=order, corrector=False, lower_order_final=False), data, x)
            errors.append(float((made - exact).abs().max()))
        assert math.log2(errors[0] / errors[1]) > low


def test_half_corrector():
    """ "late" corrects at small times, "early" at large ones: in steps and in what is changed."""
    table, grid = surrogate(1200), time_uniform(VP, 8)
    runs = {
        half: Engine(dpm_solver_v3(grid, table, half=half), TOY, (3, 1), "reference", dtype=torch.float64)(
            STARTS, return_trajectory=True
        ).states
        for half in (None, "late", "early")
    }
    off = Engine(dpm_solver_v3(grid, table, corrector=False), TOY, (3, 1), "reference", dtype=torch.float64)
    plain = off(STARTS, return_trajectory=True).states
    assert all(torch.equal(a, b) for a, b in zip(runs["late"][:4], plain[:4], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(runs["early"][:4], runs[None][:4], strict=True))
    assert not torch.equal(runs["early"][-1], runs["late"][-1])


@pytest.mark.parametrize("backend", sorted(set(BACKENDS) - {"cuda", "nvrtc"}))
@pytest.mark.parametrize("shape", [(3, 2, 4, 6), (5, 7)])
def test_tables_per_element_in_every_backend(backend, shape, monkeypatch):
    """Weights, factors and constants of shape [*sample] against the reference, float32; also shared per channel."""
    if BACKENDS[backend].missing(torch.device("cpu")) is not None:
        pytest.skip(BACKENDS[backend].missing(torch.device("cpu")))
    data = Gaussian(torch.full(shape[1:], 0.3), 0.4)
    grid = log_snr(VP, 8)
    x = start(grid, shape)
    for table in (uneven(240, shape[1:]), uneven(240, (shape[1], *[1] * (len(shape) - 2)))):
        program = dpm_solver_v3(grid, table, order=2)
        truth = play(program, data, x)
        made = play(program, data, x, backend, torch.float32)
        weight = program.options["largest_weight"]
        assert relative(made.double(), truth) < 1e-6 * max(
            1.0, weight
        )  # roundings of the network, grown by the weights
        one = play(program, data, x[1:2], backend, torch.float32)
        assert torch.equal(made[1:2], one)  # a sample is the same alone


def test_weights_per_element_survive_saving(tmp_path):
    table, grid = uneven(240, (3,)), log_snr(VP, 5)
    program = dpm_solver_v3(grid, table, order=2)
    program.save(tmp_path / "p.safetensors")
    again = fastode.program.Program.load(tmp_path / "p.safetensors")
    data, x = Gaussian(torch.zeros(3), 0.4), start(grid, (2, 3))
    assert torch.equal(play(again, data, x), play(program, data, x))


# -- statistics of a model -------------------------------------------------------------------------------------------------


class Curved(torch.nn.Module):
    """A small smooth network D(y, sigma) whose Jacobian is not diagonal."""

    def __init__(self, d):
        super().__init__()
        g = torch.Generator().manual_seed(7)
        self.mix = torch.nn.Parameter(torch.randn(d, d, generator=g, dtype=torch.float64) / d**0.5)

    def forward(self, y, sigma):
        s = torch.as_tensor(sigma, dtype=y.dtype)
        return torch.tanh(y @ self.mix / (1 + s)) + 0.3 * y / (1 + s * s)


def on(data):
    """moments(evaluate=...) for plain D(y, sigma)."""
    return lambda rows: lambda y, level: data(y, level.rho)


@pytest.mark.parametrize("derivative", ems.DERIVATIVES)
def test_products_with_the_jacobian(derivative):
    """J v, and the derivative along the flow, against central differences along a finely solved trajectory."""
    net, lam = Curved(5).requires_grad_(False), 0.3
    y = torch.randn(4, 5, dtype=torch.float64)
    v = torch.randn(4, 5, dtype=torch.float64)
    product = ems._PRODUCTS[derivative]
    at = on(net)(None)
    jacobian = torch.stack([torch.autograd.functional.jacobian(lambda z: net(z, math.exp(-lam)), row) for row in y])
    tolerance = 1e-5 if derivative == "finite_difference" else 1e-12  # steps of 1e-3 of the noise, squared
    d, jv = product(at, y, v, lam, 0.0)
    assert relative(d, net(y, math.exp(-lam))) < 1e-12
    assert relative(jv, torch.einsum("bij,bj->bi", jacobian, v)) < tolerance

    def along(h):
        z, n = y, 50
        for i in range(n):  # midpoint rule for dy/dlam = D - y
            u = lam + h * i / n
            z_half = z + h / (2 * n) * (net(z, math.exp(-u)) - z)
            z = z + h / n * (net(z_half, math.exp(-u - h / (2 * n))) - z_half)
        return net(z, math.exp(-lam - h))

    _, d1 = product(at, y, d - y, lam, 1.0)
    assert relative(d1, (along(1e-3) - along(-1e-3)) / 2e-3) < max(1e-6, tolerance)


def test_statistics_are_what_they_are_defined_to_be():
    """Against direct formulas on the same samples: l, f, f' formed one by one, then the regression, which leaves a residual
    of mean 0 that is uncorrelated with f."""
    net, k = Curved(3).requires_grad_(False), 40
    data = torch.randn(k, 3, dtype=torch.float64)
    lam, seeds = torch.linspace(-2, 2, 21, dtype=torch.float64), torch.arange(k)
    found = ems.moments(on(net), data, lam, seeds, dtype=torch.float64)
    made = ems.statistics(found, smooth=5)
    l = 1 - found.means[:, 0]  # noqa: E741
    slope = torch.gradient(l, spacing=0.2, dim=0)[0]
    for i in (0, 1, 10, 19, 20):
        window = slope[max(0, i - 2) : i + 3].mean(0)
        value = float(lam[i])
        z = fastode.noise.normal(seeds, 2 * i, (3,)).double()
        y = data + math.exp(-value) * z
        d, d1 = ems._forward(on(net)(None), y, net(y, math.exp(-value)) - y, value, 1.0)
        f, f1 = (1 - l[i]) * y - d, -window * y + (1 - l[i]) * (d - y) - d1
        s = ((f * f1).mean(0) - f.mean(0) * f1.mean(0)) / f.var(0, unbiased=False)
        assert torch.allclose(made.s[i], s, rtol=1e-9) and torch.allclose(
            made.b[i], f1.mean(0) - s * f.mean(0), rtol=1e-9
        )
        residual = f1 - made.s[i] * f - made.b[i]
        assert float(residual.mean(0).abs().max()) < 1e-10 and float((residual * f).mean(0).abs().max()) < 1e-10


def test_gaussian_data_has_known_statistics():
    """l = 1/(1 + v e^(2 lam)) to rounding, and f' = s f + b holds exactly, so statistics from few images sample exactly."""
    mean, v = torch.tensor([0.3, -0.5, 1.0]), torch.tensor([0.25, 0.05, 0.6])
    data = Gaussian(mean, v)
    lam, k = levels(60), 8
    images = mean + v.sqrt() * torch.randn(k, 3, dtype=torch.float64)
    found = ems.moments(on(data), images, lam, torch.arange(k), dtype=torch.float64)
    table = ems.statistics(found, smooth=1, floor=1e-30)
    assert torch.allclose(table.l, 1 / (1 + v * torch.exp(2 * lam[:, None])), atol=1e-12)
    grid = log_snr(VP, 2)
    x = start(grid, (4, 3))
    exact = grid.alpha[-1] * data.flow(x / grid.alpha[0], float(grid[0].rho), float(grid[2].rho))
    ddim = play(SOLVERS["ddim"](grid), data, x)
    flat = Statistics(lam, table.l, torch.zeros_like(table.s), 2 * mean * table.l * (1 - table.l))
    assert (
        relative(play(dpm_solver_v3(grid, flat, refine=20, interpolation="cubic"), data, x), exact)
        < 1e-3
        < 0.1
        < relative(ddim, exact)
    )


def test_reduced_statistics():
    """Pooled moments: one number per channel, or for all, from the same samples; shared weights are plain numbers."""
    data = GaussianMixture(torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(0)), 0.2)
    lam, images = levels(30), torch.randn(8, 2, 3, 3, dtype=torch.float64)
    found = ems.moments(on(data), images, lam, torch.arange(8), dtype=torch.float64)
    shapes = {kind: list(ems.statistics(found, reduce=kind).l.shape) for kind in ("element", "channel", "all")}
    assert shapes == {"element": [31, 2, 3, 3], "channel": [31, 2, 1, 1], "all": [31, 1, 1, 1]}
    whole = ems.statistics(found, reduce="all")
    assert torch.allclose(whole.l.flatten(), 1 - found.means[:, 0].mean((1, 2, 3)))
    program = dpm_solver_v3(log_snr(VP, 4), whole)
    assert all(isinstance(c, float) for s in program.stages for row in s.table.entries for c in row)


class NoForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        raise NotImplementedError("no backward here")


@pytest.mark.parametrize(
    ("function", "used", "warnings"), [(NoForward, "double_backward", 1), (NoGradient, "finite_difference", 2)]
)
def test_falls_back_by_name(function, used, warnings):
    images = torch.randn(4, 3, dtype=torch.float64)
    lam = levels(4)
    with pytest.warns(RuntimeWarning, match="derivative: this network has no 'forward'") as said:
        found = ems.moments(
            on(lambda y, s: function.apply(y) / (1 + s)), images, lam, torch.arange(4), dtype=torch.float64
        )
    assert found.derivative == used and len([w for w in said if "derivative" in str(w.message)]) == warnings
    plain = ems.moments(on(lambda y, s: y.sin() / (1 + s)), images, lam, torch.arange(4), dtype=torch.float64)
    scale = plain.means.abs().amax((0, 2))[:, None]
    assert float(((found.means - plain.means) / scale).abs().max()) < 1e-2  # D1 by differences at sigma = 150


@pytest.fixture(scope="module")
def tame():
    g = torch.Generator().manual_seed(2)
    data = GaussianMixture(torch.randn(6, 12, generator=g), torch.tensor([0.1, 0.3, 0.2, 0.5, 0.1, 0.2]))
    return Denoiser(data, "denoised", VP, sample_shape=(12,))


@pytest.fixture(scope="module")
def calibrated(tame):
    teacher = Teacher(tame, tolerance=2e-2, batch=1024)
    return teacher, v3.train(tame, nfe=5, samples=256, levels=40, teacher=teacher, progress=False)


def test_calibrated_on_a_mixture(tame, calibrated, tmp_path):
    """Better than its degenerate form and than UniPC and DPM-Solver++ on the same grid, on noises it never saw."""
    teacher, made = calibrated
    made.save(tmp_path / "v3.safetensors")
    again = Artifact.load(tmp_path / "v3.safetensors")
    seeds = range(512)
    ours = teacher.error(again.program(), seeds).rmse
    plain = {name: teacher.error(SOLVERS[name](made.grid), seeds).rmse for name in ("unipc", "dpm_solver_pp", "ddim")}
    degenerate = dpm_solver_v3(made.grid, Statistics(**made.numbers), degenerate=True, **made.options)
    assert again.nfe == 5 and again.card["derivative"] == "forward" and again.card["evaluations"] > 41 * 256 * 3
    assert ours < 0.85 * min(plain.values()) and ours < 0.8 * teacher.error(degenerate, seeds).rmse
    best = v3.train(
        tame, nfe=5, samples=256, levels=40, statistics=str(tmp_path / "v3.safetensors"), choose="measured",
        teacher=teacher, progress=False,
    )  # fmt: skip
    assert (
        teacher.error(best.program(), seeds).rmse < 0.8 * ours and len(best.card["tried"]) == 10
    )  # .084, .132, UniPC .176


def test_statistics_serve_another_nfe(tame, calibrated, tmp_path):
    teacher, made = calibrated
    made.save(tmp_path / "v3.safetensors")
    before = teacher.evaluations
    other = v3.train(tame, nfe=8, statistics=str(tmp_path / "v3.safetensors"), teacher=teacher, progress=False)
    assert other.nfe == 8 and teacher.evaluations == before and torch.equal(other.numbers["l"], made.numbers["l"])
    with pytest.raises(ValueError, match="statistics: must be a dpm_solver_v3 artifact"):
        v3.train(tame, nfe=8, statistics=Artifact("grid", "ddim", log_snr(VP, 3)), teacher=teacher, progress=False)


def test_weights_too_large_for_the_network(calibrated):
    """Third order in five steps multiplies outputs by hundreds: said where the network is narrow."""
    _, made = calibrated
    assert (
        made.card["largest_weight"]
        == dpm_solver_v3(made.grid, Statistics(**made.numbers), **made.options).options["largest_weight"]
    )
    narrow = torch.nn.Linear(12, 12).to(torch.bfloat16)
    large = Artifact("dpm_solver_v3", "unipc", made.grid, made.numbers, made.options, {}, {"largest_weight": 400.0})
    with pytest.warns(RuntimeWarning, match=r"multiplies network outputs by up to 400, .* torch\.bfloat16"):
        large.check(Denoiser(narrow, "x0", VP))


def test_bad_input(tame):
    table, grid = surrogate(60), log_snr(VP, 5)
    lam = table.lam
    bad = table.l.clone()
    bad[3] = math.nan
    with pytest.raises(ValueError, match="l: the statistics are not finite at level 3 of 60"):
        Statistics(lam, bad, table.s, table.b)
    with pytest.raises(ValueError, match="lam: must increase by the same step"):
        Statistics(lam**3, table.l, table.s, table.b)
    with pytest.raises(ValueError, match=r"s: must be \[61, \*sample\] like l"):
        Statistics(lam, table.l, table.s[:, :0], table.b)
    with pytest.raises(ValueError, match="statistics cover sigma/alpha from 152"):
        dpm_solver_v3(karras(EDM(0.01, 200), 5), table)
    with pytest.raises(ValueError, match="grid: lam must be finite at every level"):
        dpm_solver_v3(karras(EDM(0.02, 80), 5, final="zero"), table)
    with pytest.raises(ValueError, match="refine=1"):
        dpm_solver_v3(time_uniform(VP, 5), table, refine=1)
    with pytest.raises(ValueError, match="fall on the same level"):
        snap(time_uniform(VP, 50), table)
    with pytest.raises(ValueError, match="half: must be None, 'late' or 'early'"):
        dpm_solver_v3(grid, table, half="both")
    for name, value in (("order", 5), ("refine", 0), ("interpolation", "spline")):
        with pytest.raises(ValueError, match=f"{name}: "):
            dpm_solver_v3(grid, table, **{name: value})
    with pytest.raises(ValueError, match="not finite"):
        dpm_solver_v3(grid, Statistics(lam, table.l + 500, table.s, table.b))
    with pytest.raises(ValueError, match="derivative: must be"):
        ems.moments(on(TOY), torch.zeros(2, 1), lam, torch.arange(2), derivative="magic")
    with pytest.raises(ValueError, match="data: need at least 2 images"):
        ems.moments(on(TOY), torch.zeros(1, 1), lam, torch.arange(1))
    with pytest.raises(ValueError, match="data: must be finite"):
        ems.moments(on(TOY), torch.full((2, 1), math.inf), lam, torch.arange(2))
    with pytest.raises(FloatingPointError, match="statistics: not finite at level 0"):
        ems.moments(on(lambda y, s: y * math.nan), torch.zeros(2, 1), lam, torch.arange(2), derivative="forward")
    with pytest.raises(ValueError, match="samples: statistics need at least 2"):
        v3.train(tame, samples=1)
    with pytest.raises(ValueError, match="levels: must be a whole number of at least 2"):
        v3.train(tame, levels=1)
    with pytest.raises(ValueError, match="smooth: must be an odd"):
        ems.statistics(ems.Moments(lam, torch.zeros(61, 9, 1), 2, "forward"), smooth=4)
    with pytest.raises(ValueError, match="v3 makes one evaluation per step"):
        v3.train(tame, solver="heun", nfe=4)
    teacher = Teacher(tame, tolerance=2e-2)
    with pytest.raises(ValueError, match=r"data: must be \[K, 12\]"):
        v3.train(tame, samples=40, levels=4, data=torch.zeros(40, 3), teacher=teacher, progress=False)
    with pytest.raises(TimeoutError, match="minutes: the statistics were at level 1 of 5"):
        v3.train(tame, samples=40, levels=4, minutes=1e-9, data=torch.zeros(40, 12), teacher=teacher, progress=False)
    with pytest.warns(UserWarning, match="samples: 8 images are few"):
        v3.train(tame, samples=8, levels=30, data=torch.randn(8, 12), teacher=teacher, progress=False)
    assert v3.recommended(5, EDM()) == {"p_pseudo": True, "lower_order_final": False}
    assert v3.recommended(9, VP) == {"corrector": False} and v3.recommended(8, VP) == {"corrector": True}
    assert training_seeds(2).tolist() != [0, 1] and np.isfinite(float(lam[0]))
