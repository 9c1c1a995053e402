"""AMED-Solver and AMED-Plugin: equal to plain loops with numbers per sample, and to their base where AMED is neutral."""

import math

import numpy as np
import pytest
import torch

import fastode
from fastode import SOLVERS, Denoiser, Engine
from fastode.backends import BACKENDS
from fastode.nets.predictor import AMEDPredictor, StepTable, from_numbers, to_numbers
from fastode.schedules import EDM, VPLinear, karras, log_snr, time_uniform
from fastode.solvers import plugin
from fastode.solvers.amed import MULTISTEP
from tests.conftest import make_grid, relative, start
from tests.papers import amed_plugin as loops

AVAILABLE = ["reference", *(n for n in ("torch", "native") if BACKENDS[n].missing(torch.device("cpu")) is None)]
B = 4


class Given:
    """A predictor whose numbers per step and sample are given; it ignores the feature."""

    def __init__(self, heads, values):
        self.heads, self.values = heads, torch.as_tensor(values)  # [steps, heads, B]

    def look(self, step, t, t_next):
        return lambda feature: tuple(self.values[step])

    def numbers(self, step, t, t_next):  # the analytical first step: one for all
        return tuple(self.values[step, :, 0])


def given(steps, heads=("r", "scale_dir", "scale_time"), seed=0):
    g = torch.Generator().manual_seed(seed)
    ranges = {"r": (0.2, 0.8), "scale_dir": (0.95, 1.05), "scale_time": (0.8, 1.2)}
    rows = [ranges[h][0] + (ranges[h][1] - ranges[h][0]) * torch.rand(steps, B, generator=g).double() for h in heads]
    return Given(heads, torch.stack(rows, 1))


def looked_at(mixture):
    def network(x, sigma, features=False):
        raw = mixture(x, sigma)
        return (raw, {"bottleneck": x.reshape(len(x), 3, 2, 1)}) if features else raw

    return Denoiser(network, "denoised", sample_shape=(6,))


def play(mixture, program, x, backend="reference", **options):
    return Engine(program, looked_at(mixture), x.shape, backend, dtype=torch.float64, **options)(x)


def of(mixture):
    """The mixture's denoiser for NumPy arrays and levels per sample."""

    def d(x, sigma):
        levels = np.broadcast_to(np.asarray(sigma, dtype=np.float64).reshape(-1), (len(x),))
        rows = [mixture(torch.from_numpy(row)[None], float(s))[0] for row, s in zip(x, levels, strict=True)]
        return torch.stack(rows).numpy()

    return d


PLUGINS = [
    ("ddim", {}, loops.euler),
    ("dpm_solver_2", {}, loops.dpm_solver_2),
    *[("ipndm", {"order": o}, loops.ipndm) for o in (1, 2, 3, 4)],
    *[("dpm_solver_pp", {"order": o, "prediction": m}, loops.dpm_solver_pp) for o in (1, 2) for m in ("x0", "eps")],
]


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize(("name", "options", "loop"), PLUGINS)
def test_plugin_equals_the_paper(mixture, name, options, loop, backend):
    grid = make_grid("edm", 4)
    x, predictor = start(grid, (B, 6)), given(4)
    program = plugin(SOLVERS[name])(grid, predictor=predictor, **options)
    r, c, a = predictor.values.numpy().transpose(1, 0, 2)
    truth = loop(of(mixture), x.numpy(), grid.sigmas.tolist(), r, c, a, **options)
    assert program.nfe == 8
    # float64; a multistep history divides differences by short steps: a dozen roundings more than without
    assert relative(play(mixture, program, x, backend), torch.from_numpy(truth)) < 5e-12


@pytest.mark.parametrize("backend", AVAILABLE)
def test_amed_with_numbers_per_sample_equals_itself_per_sample(mixture, backend):
    """A batch with numbers per sample equals each sample alone with its own plain numbers, which the paper's loop covers."""
    grid = make_grid("edm", 4)
    x, predictor = start(grid, (B, 6)), given(4)
    whole = play(mixture, SOLVERS["amed"](grid, predictor=predictor), x, backend)
    for b in range(B):
        r, c, a = predictor.values[:, :, b].T.tolist()
        alone = SOLVERS["amed"](grid, r=r, scale_dir=c, scale_time=a)
        assert relative(whole[b], play(mixture, alone, x[b : b + 1], backend)[0]) < 1e-12


@pytest.mark.parametrize("name", [*MULTISTEP, "dpm_solver_2"])
def test_neutral_plugins_are_their_base_on_the_refined_grid(mixture, name):
    """c = a = 1: the base solver on t_0, tau_0, t_1, ...; with DPM-Solver-2, that solver with inner level r."""
    grid, r = make_grid("edm", 4), [0.3, 0.5, 0.6, 0.4]
    x, options = start(grid, (3, 6)), {"space": "rho"} if name == "deis" else {}
    made = play(mixture, plugin(SOLVERS[name])(grid, r=r, **options), x)
    if name == "dpm_solver_2":
        single = plugin(SOLVERS[name])(grid, r=0.3)
        assert relative(play(mixture, single, x), play(mixture, SOLVERS[name](grid, r=0.3), x)) < 1e-13
        return
    rho = grid.sigmas.tolist()
    refined = [rho[0]]
    for i in range(4):
        refined += [rho[i + 1] ** r[i] * rho[i] ** (1 - r[i]), rho[i + 1]]
    assert relative(made, play(mixture, SOLVERS[name](refined, **options), x)) < 1e-12


def test_half_is_dpm_solver_2(mixture):
    for kind in ("edm", "vp", "flow"):
        for afs in (False, True):
            grid = make_grid(kind)
            x = start(grid, (3, 6))
            one, two = (play(mixture, SOLVERS[n](grid, afs=afs), x) for n in ("amed", "dpm_solver_2"))
            assert relative(one, two) < 1e-13
    third, other = (play(mixture, SOLVERS[n](make_grid("edm"), r=0.3), x) for n in ("amed", "dpm_solver_2"))
    assert relative(third, other) > 1e-3  # r enters in another way


@pytest.mark.parametrize("name", [*MULTISTEP, "dpm_solver_2", "amed"])
@pytest.mark.parametrize("afs", [False, True])
def test_backends_and_frames_agree(mixture, name, afs):
    options = {"space": "lam"} if name == "deis" else {}
    solver = SOLVERS["amed"] if name == "amed" else plugin(SOLVERS[name])
    edm = make_grid("edm", 3)
    x, predictor = start(edm, (B, 6)), given(3, seed=2)
    truth = play(mixture, solver(edm, predictor=predictor, afs=afs, **options), x)
    for backend in AVAILABLE[1:]:
        same = play(mixture, solver(edm, predictor=predictor, afs=afs, **options), x, backend)
        assert relative(same, truth) < 1e-11  # float64, other groupings
    if not afs:  # the analytical first step speaks of unit variance, whatever the frame
        vp = edm.frame(1 / (1 + edm.sigmas**2).sqrt())
        other = play(mixture, solver(vp, predictor=predictor, **options), x * float(vp.alpha[0]))
        assert relative(other / float(vp.alpha[-1]), truth) < 1e-11


def test_evaluations():
    """2 (N - 1), one less with the analytical first step; a grid that ends at 0 saves one more."""
    for steps in (1, 2, 3, 5):
        for solver in (SOLVERS["amed"], plugin(SOLVERS["ipndm"]), plugin(SOLVERS["dpm_solver_2"])):
            assert solver(make_grid("edm", steps)).nfe == 2 * steps
            assert solver(make_grid("edm", steps), afs=True).nfe == 2 * steps - 1
            assert solver(make_grid("zero", steps)).nfe == 2 * steps - 1


# -- closed forms ------------------------------------------------------------------------------------------------------

BEST = {  # r that makes each AMED step exact on N(0, 1/4), sigma 80 .. 0.002, 4 levels: roots of one equation each
    "karras": (0.428108, 0.402256, 0.130099),
    "time_uniform": (0.427934, 0.424208, 0.133266),
    "log_snr": (0.430961, 0.274868, 0.188082),
}


@pytest.mark.parametrize("name", list(BEST))
def test_the_best_points_of_a_gaussian(name):
    """Solved here to full precision, the steps land on the exact flow; the card's rounded values are those roots."""
    grid = {"karras": karras, "time_uniform": time_uniform, "log_snr": log_snr}[name](EDM(), 3)
    rho = grid.sigmas.tolist()

    def miss(r, t, tn):
        tau, g = tn**r * t ** (1 - r), lambda u: u / (0.25 + u * u)
        return 1 + (tn - t) * g(tau) * (1 + (tau - t) * g(t)) - math.sqrt((0.25 + tn**2) / (0.25 + t**2))

    found = []
    for i in range(3):
        low, high = 1e-3, 0.9
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (
                (middle, high)
                if miss(low, rho[i], rho[i + 1]) * miss(middle, rho[i], rho[i + 1]) > 0
                else (low, middle)
            )
        found.append(low)
    assert found == pytest.approx(BEST[name], abs=6e-7)  # printed to six digits
    gaussian = fastode.denoisers.Gaussian(torch.zeros(4), torch.full((4,), 0.25))
    x = 80 * torch.randn(5, 4, dtype=torch.float64)
    samples = fastode.sample(gaussian, x, solver="amed", grid=grid, r=found)
    assert relative(samples, gaussian.flow(x, 80, rho[-1])) < 1e-10  # roots to 1e-15, amplified by 80 / 0.5


def test_published_tables_on_a_gaussian():
    """AMED-form tables of the literature on N(0, 1/4): every method is multiplication by one number there."""
    gaussian = fastode.denoisers.Gaussian(torch.zeros(1), torch.full((1,), 0.25))
    grid, x = time_uniform(EDM(), 3), torch.ones(1, 1, dtype=torch.float64)
    table = {
        "r": [0.21808, 0.45471, 0.15570],
        "scale_dir": [0.99806, 1.00720, 1.00308],
        "scale_time": [0.80345, 1.00678, 0.90598],
    }
    learned = fastode.sample(gaussian, x, solver="amed", grid=grid, afs=True, **table)
    plain = fastode.sample(gaussian, x, solver="amed", grid=grid, afs=True)
    assert float(learned) == pytest.approx(0.0082929672, abs=1e-10)
    assert float(plain) == pytest.approx(0.0168367354, abs=1e-10)


def test_a_point_scaled_directions():
    """All data at one point: any r lands exactly; c misses by (c - 1) h (x - mu)/t, no more."""
    mu = torch.tensor([0.3, -0.2], dtype=torch.float64)
    grid, x = karras(EDM(), 1), 80 * torch.randn(3, 2, dtype=torch.float64)
    rho = grid.sigmas.tolist()
    for c in (1.0, 1.01):
        made = fastode.sample(lambda y, s: mu.expand_as(y), x, solver="amed", grid=grid, r=0.37, scale_dir=c)
        exact = mu + (x - mu) * rho[1] / rho[0] + (c - 1) * (rho[1] - rho[0]) * (x - mu) / rho[0]
        assert relative(made, exact) < 1e-12


# -- predictors --------------------------------------------------------------------------------------------------------


def test_the_predictor_has_about_9k_parameters():
    counts = [
        sum(p.numel() for p in AMEDPredictor(scale_dir=c, scale_time=a).parameters())
        for c, a in ((0.0, 0.0), (0.01, 0.0), (0.01, 0.2))
    ]
    assert counts == [8929, 8950, 8971]  # as in the paper's code


def test_the_predictor_is_its_formula():
    torch.manual_seed(0)
    predictor = AMEDPredictor(scale_dir=0.01, scale_time=0.2)
    feature = torch.randn(3, 5, 8, 8)
    t, tn = 6.95, 1.2867
    w = {k: v.double().numpy() for k, v in predictor.state_dict().items()}

    def silu(z):
        return z / (1 + np.exp(-z))

    def embed(level):
        f = level * 10000.0 ** (-np.arange(4) / 3)
        return silu(w["noise.weight"] @ np.concatenate([np.sin(f), np.cos(f)]) + w["noise.bias"])

    p = feature.double().numpy().mean(1).reshape(3, 64)
    h = silu(p @ w["hidden.weight"].T + w["hidden.bias"]) @ w["feature.weight"].T + w["feature.bias"]
    z = np.concatenate([h, np.tile(embed(t), (3, 1)), np.tile(embed(tn), (3, 1))], 1) @ w["head.weight"].T
    s = 1 / (1 + np.exp(-(z + w["head.bias"])))
    made = [v.detach().double().numpy() for v in predictor.look(0, t, tn)(feature)]
    for got, want in zip(made, (s[:, 0], 0.99 + 0.02 * s[:, 1], 0.8 + 0.4 * s[:, 2]), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)  # float32
    zero = [float(v.detach()) for v in predictor.numbers(0, t, tn)]
    again = predictor.look(0, t, tn)(torch.zeros(1, 1, 8, 8))
    assert zero == pytest.approx([float(v.detach()) for v in again], abs=1e-7)


@pytest.mark.parametrize("make", [lambda: AMEDPredictor(2, scale_time=0.2), lambda: StepTable(3, scale_time=0.2)])
def test_predictors_survive_storage(mixture, make):
    torch.manual_seed(1)
    predictor = make()
    again = from_numbers(to_numbers(predictor))
    assert again.heads == predictor.heads == ("r", "scale_dir", "scale_time")
    grid = make_grid("edm", 3)
    x = start(grid, (B, 6))
    one, two = (play(mixture, SOLVERS["amed"](grid, predictor=p), x).detach() for p in (predictor, again))
    assert torch.equal(one, two)
    numbers = to_numbers(predictor)
    numbers.pop("scale_dir")
    with pytest.raises(ValueError, match="predictor: these are not the numbers"):
        from_numbers(numbers)


@pytest.mark.parametrize("solver", ["amed", "ipndm"])
def test_artifacts(mixture, tmp_path, solver):
    torch.manual_seed(4)
    grid, predictor = time_uniform(EDM(), 3), AMEDPredictor(2, scale_time=0.2)
    artifact = fastode.Artifact("amed", solver, grid, to_numbers(predictor), {"afs": True}, {"sample_shape": [6]})
    artifact.save(tmp_path / "learned.safetensors")
    x = start(grid, (B, 6))
    played = fastode.sample(looked_at(mixture), x, solver=tmp_path / "learned.safetensors")
    base = SOLVERS["amed"] if solver == "amed" else plugin(SOLVERS[solver])
    direct = fastode.sample(looked_at(mixture), x, solver=base, grid=grid, afs=True, predictor=predictor)
    assert torch.equal(played, direct.detach()) and artifact.nfe == 5
    with pytest.raises(ValueError, match="predictor: these are not the numbers"):
        fastode.Artifact("amed", solver, grid, {"r": torch.zeros(3)}).program()


def test_each_sample_keeps_its_own_numbers(mixture):
    torch.manual_seed(2)
    predictor = AMEDPredictor(2, scale_time=0.2)
    grid = time_uniform(EDM(), 3)
    x = start(grid, (B, 6))
    order = [2, 0, 3, 1]

    def network(y, sigma, features=False):
        raw = mixture(y, sigma)
        return (raw, {"bottleneck": torch.tanh(y).reshape(len(y), 3, 2, 1)}) if features else raw

    denoiser = Denoiser(network, "denoised", sample_shape=(6,))
    for name in ("amed", "ipndm", "dpm_solver_pp", "unipc"):
        solver = SOLVERS["amed"] if name == "amed" else plugin(SOLVERS[name])
        engine = Engine(solver(grid, predictor=predictor), denoiser, (B, 6), dtype=torch.float64)
        assert relative(engine(x[order]), engine(x)[order]) < 1e-13
        changed = x.clone()
        changed[0] += 1
        assert relative(engine(changed)[1:], engine(x)[1:]) < 1e-13  # the mixture's matrix products mix roundings


class Bottleneck(torch.nn.Module):
    """Any network with a feature map of 8 x 8, in the dtype and memory format of its own."""

    def __init__(self, dtype=torch.float32, memory_format=torch.contiguous_format):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.7, dtype=dtype))
        self.memory_format = memory_format

    def forward(self, x, c_noise, class_labels=None, features=False):
        raw = self.weight * torch.tanh(x) + 0.1 * c_noise.reshape(-1, 1, 1, 1).to(x)
        if class_labels is not None:
            raw = raw * (1 + 0.1 * class_labels.reshape(-1, 1, 1, 1).to(x))
        seen = torch.cat([x * k for k in (1, 0.5, 0.2)], 1).to(memory_format=self.memory_format)
        return (raw, {"bottleneck": seen}) if features else raw


@pytest.mark.parametrize("name", ["amed", "ipndm", "dpm_solver_pp", "unipc"])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(
    ("dtype", "memory_format"),
    [
        (torch.float32, torch.contiguous_format),
        (torch.float32, torch.channels_last),
        (torch.bfloat16, torch.channels_last),
    ],
)
def test_numbers_made_by_the_backend(name, guided, dtype, memory_format):
    """The compiled module makes all late numbers itself; the definition makes them by calling the predictor."""
    torch.manual_seed(5)
    solver = SOLVERS["amed"] if name == "amed" else plugin(SOLVERS[name])
    program = solver(time_uniform(EDM(), 3), predictor=AMEDPredictor(scale_time=0.2), afs=True)
    denoiser = Denoiser(Bottleneck(dtype, memory_format), num_classes=3, null_label=3)
    x = start(program.grid, (B, 2, 8, 8), dtype=torch.float32)
    call = {"class_labels": [0, 1, 2, 0], "guidance_scale": torch.tensor([0.0, 1.0, 1.5, 2.0])} if guided else {}
    engines = {b: Engine(program, denoiser, x.shape, b, guidance=guided) for b in AVAILABLE}
    with torch.no_grad():
        runs = {b: engine(x, **call) for b, engine in engines.items()}
        again = {b: engine(x, **call) for b, engine in engines.items()}
    for backend in AVAILABLE[1:]:
        # float32 sums grouped otherwise; a bfloat16 network turns the last bit of its input into 1 of 256
        assert relative(runs[backend], runs["reference"]) < (5e-5 if dtype == torch.float32 else 2e-2)
        assert torch.equal(runs[backend], again[backend])
    if "native" in engines:
        work = engines["native"]._borrow(False)
        assert work.makes  # that is, this did compare what it says


def test_networks_of_other_schedules(mixture):
    """An eps network on its VP grid: the told level is a times as noisy on the network's own schedule."""
    schedule = VPLinear()

    def network(x, label, features=False):
        raw = torch.tanh(x)
        return (raw, {"bottleneck": x.reshape(len(x), 3, 2, 1)}) if features else raw

    denoiser = Denoiser(network, "eps", schedule, sample_shape=(6,))
    grid = log_snr(schedule, 3)
    x, predictor = start(grid, (B, 6)), given(3)
    for solver in (SOLVERS["amed"], plugin(SOLVERS["dpm_solver_pp"])):
        program = solver(grid, predictor=predictor)
        runs = [Engine(program, denoiser, (B, 6), b, dtype=torch.float64)(x) for b in AVAILABLE]
        assert all(relative(run, runs[0]) < 1e-11 for run in runs)


def test_bad_input(mixture):
    grid = make_grid("edm", 3)
    with pytest.raises(ValueError, match="r: need one number, or one for each of 3 steps, got 2"):
        SOLVERS["amed"](grid, r=[0.5, 0.5])
    with pytest.raises(ValueError, match=r"r: must be in \(0, 1\]"):
        SOLVERS["amed"](grid, r=0.0)
    with pytest.raises(ValueError, match="AMED plugs into ddim"):
        plugin(SOLVERS["heun"])
    with pytest.raises(ValueError, match="space: with AMED, deis works in"):
        plugin(SOLVERS["deis"])(grid)
    with pytest.raises(TypeError, match="unknown option 'ordre'"):
        plugin(SOLVERS["ipndm"])(grid, ordre=2)
    with pytest.raises(ValueError, match="offer"):
        Engine(SOLVERS["amed"](grid, predictor=AMEDPredictor(6)), Denoiser(mixture, "denoised"), (2, 6))
    with pytest.raises(ValueError, match="trained on 64 pooled numbers"):
        play(mixture, SOLVERS["amed"](grid, predictor=AMEDPredictor()), start(grid, (B, 6)))
    with pytest.raises(ValueError, match="it was learned for 2 steps, this is step 3"):
        SOLVERS["amed"](grid, predictor=StepTable(2))
    with pytest.raises(ValueError, match=r"scale_dir: must be in \[0, 1\)"):
        StepTable(2, scale_dir=1.0)
    with pytest.raises(ValueError, match="it can make 2, 4, 6"):
        SOLVERS["amed"].plan(5, lambda *, steps, final: karras(EDM(), steps), afs=False)


def test_gradients_reach_the_predictor(mixture):
    """Finite differences of a loss at the end of the run; with a time head this checks the derivative in sigma too."""
    torch.manual_seed(3)
    grid = time_uniform(EDM(), 2)
    x = start(grid, (2, 6))
    table = StepTable(2, scale_time=0.2)

    def loss():
        return play(mixture, SOLVERS["amed"](grid, predictor=table), x).square().sum()

    loss().backward()
    for i in range(2):
        for k in range(3):
            with torch.no_grad():
                table.free[i, k] += 1e-5
                up = loss()
                table.free[i, k] -= 2e-5
                down = loss()
                table.free[i, k] += 1e-5
            # central difference: rounding 1e-16/1e-5 of the loss, truncation 1e-10
            assert float(table.free.grad[i, k]) == pytest.approx(float(up - down) / 2e-5, rel=1e-5, abs=1e-7)
