"""Numbers that a run makes itself: norms, and functions of named outputs, in every backend and in recorded runs."""

from itertools import pairwise

import pytest
import torch

from fastode import Denoiser, Engine
from fastode.backends import BACKENDS
from fastode.program import Bind, Late, PooledMLP, Program, Trace
from fastode.program.lower import lower
from fastode.scalar import exp
from fastode.schedules import VPLinear, log_snr
from fastode.solvers.coefficients import ddim_step, eps_of
from tests.conftest import make_grid, relative, start

AVAILABLE = ["reference", *(n for n in ("torch", "native") if BACKENDS[n].missing(torch.device("cpu")) is None)]


def features_of(x):
    """[B, 3, 2, 2] of anything: what a network might offer."""
    flat = x.flatten(1).double()
    return torch.stack([flat.mean(1), flat.square().mean(1), flat[:, 0]], 1)[:, :, None, None].expand(-1, 3, 2, 2)


def with_features(mixture):
    def network(x, sigma, features=False):
        raw = mixture(x, sigma)
        return (raw, {"bottleneck": features_of(x)}) if features else raw

    return Denoiser(network, "denoised", sample_shape=(6,))


def ratio(feature):
    return (0.2 + 0.6 * torch.sigmoid(feature.mean((1, 2, 3))),)


def looks(p: Trace):
    """Two evaluations a step at an inner level that a function of the features chooses: AMED's structure."""
    x = p.start()
    for _, s, t in p.grid.windows():
        d = p.denoise(x, s)
        (r,) = p.late(("r",), ratio, outputs=("bottleneck",))
        u = p.grid.between(s, t, r)
        y = p.keep(ddim_step(x, d, s, u))
        x = p.land(x / s.alpha * t.alpha + t.alpha * (t.rho - s.rho) * eps_of(y, p.denoise(y, u), u), t)
    return x


def looks_loop(mixture, grid, x):
    """The same, written out in plain tensor arithmetic in the EDM frame."""
    x = x / grid.alpha[0]
    rho = grid.sigmas.tolist()
    for s, t in pairwise(rho):
        d = mixture(x, s)
        r = (0.2 + 0.6 * torch.sigmoid(features_of(x).mean((1, 2, 3))))[:, None]
        u = t**r * s ** (1 - r)
        y = x + (u - s) * (x - d) / s
        x = x + (t - s) * (y - torch.stack([mixture(v[None], float(w))[0] for v, w in zip(y, u, strict=True)])) / u
    return x * grid.alpha[-1]


def measures(p: Trace):
    """A Langevin step after every Euler step: its size comes from two norms per sample."""
    x = p.start()
    for _, s, t in p.grid.windows():
        x = p.land(ddim_step(x, p.denoise(x, s), s, t), t)
        if t.index == len(p.grid) - 1:
            break
        d, z = p.denoise(x, t), p.noise()
        score = -eps_of(x, d, t) / t.sigma
        step = 2 * (0.16 * p.norm(z) / p.norm(score)) ** 2
        x = p.land(x + step * score + (2 * step) ** 0.5 * z, t)
    return x


def measures_loop(mixture, grid, x, draws):
    rho = grid.sigmas.tolist()
    for i, (s, t) in enumerate(pairwise(rho)):
        x = x + (t - s) * (x - mixture(x, s)) / s
        if i + 2 == len(rho):
            return x
        score, z = (mixture(x, t) - x) / t**2, draws[i]
        step = 2 * (0.16 * z.norm(dim=1, keepdim=True) / score.norm(dim=1, keepdim=True)) ** 2
        x = x + step * score + (2 * step).sqrt() * z


def program(formula, grid) -> Program:
    trace = Trace(grid)
    return trace.program(formula(trace), name=formula.__name__)


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_functions_of_features(mixture, backend, dtype):
    grid = make_grid("edm", 5)
    x = start(grid, (4, 6), dtype=dtype)
    engine = Engine(program(looks, grid), with_features(mixture), (4, 6), backend, dtype=dtype)
    truth = looks_loop(mixture, grid, x.double())
    # float32: 5 steps of sums of a few terms; the analytic network itself works in float32
    assert relative(engine(x).double(), truth) < (1e-12 if dtype == torch.float64 else 2e-5)
    assert torch.equal(engine(x), engine(x))


@pytest.mark.parametrize("backend", AVAILABLE)
def test_frames_agree(mixture, backend):
    grid = make_grid("vp", 5)
    x = start(grid, (4, 6))
    vp = Engine(program(looks, grid), with_features(mixture), (4, 6), backend, dtype=torch.float64)(x)
    ve = program(looks, grid.frame(1.0))
    other = Engine(ve, with_features(mixture), (4, 6), backend, dtype=torch.float64)(x / grid.alpha[0])
    assert relative(vp / grid.alpha[-1], other) < 1e-12  # both are float64


@pytest.mark.parametrize("backend", AVAILABLE)
def test_norms(mixture, backend):
    grid = make_grid("edm", 5)
    x = start(grid, (4, 6))
    made = program(measures, grid)
    g = torch.Generator().manual_seed(3)
    draws = [torch.randn(4, 6, generator=g, dtype=torch.float64) for _ in range(made.draws)]
    samples = Engine(made, mixture, (4, 6), backend, dtype=torch.float64)(x, noise=draws)
    assert relative(samples, measures_loop(mixture, grid, x, draws)) < 1e-12


@pytest.mark.parametrize("formula", [looks, measures])
@pytest.mark.parametrize("backend", AVAILABLE)
def test_samples_do_not_depend_on_their_batch(mixture, backend, formula):
    grid = make_grid("edm", 4)
    x = start(grid, (5, 6))

    def run(rows):
        engine = Engine(program(formula, grid), with_features(mixture), (len(rows), 6), backend, dtype=torch.float64)
        return engine(x[rows], seeds=rows)

    whole = run([0, 1, 2, 3, 4])
    for i in range(5):
        # The analytic network multiplies matrices, whose sums depend on the batch in the last bits.
        assert relative(run([i])[0], whole[i]) < 1e-13


@pytest.mark.parametrize("backend", AVAILABLE)
def test_a_number_per_sample_times_one_per_element(mixture, backend):
    """A measured number and a mask in one weight, as when only a part of an image is corrected."""
    mask = torch.tensor([0.0, 1.0, 1.0, 0.0, 0.5, 1.0], dtype=torch.float64)

    def formula(p):
        x = p.start()
        for _, s, t in p.grid.windows():
            d = p.denoise(x, s)
            x = p.land(ddim_step(x, d, s, t) + (mask * (0.01 / p.norm(d))) * d, t)
        return x

    grid = make_grid("edm", 3)
    x, levels = start(grid, (3, 6)), grid.sigmas.tolist()
    trace = Trace(grid)
    trace.consistent = False
    made = trace.program(formula(trace))
    samples = Engine(made, mixture, (3, 6), backend, dtype=torch.float64)(x)
    for s, t in pairwise(levels):
        d = mixture(x, s)
        x = x + (t - s) * (x - d) / s + mask * 0.01 / d.norm(dim=1, keepdim=True) * d
    assert relative(samples, x) < 1e-12


def test_gradients_reach_what_makes_the_numbers(mixture):
    weight = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def formula(p):
        x = p.start()
        for _, s, t in p.grid.windows():
            d = p.denoise(x, s)
            (r,) = p.late(("r",), lambda f: (weight * torch.sigmoid(f.mean((1, 2, 3))),), outputs=("bottleneck",))
            u = p.grid.between(s, t, r)
            y = p.keep(ddim_step(x, d, s, u))
            x = p.land(x + (t.rho - s.rho) * eps_of(y, p.denoise(y, u), u), t)
        return x

    grid = make_grid("edm", 3)
    x = start(grid, (2, 6))

    def loss():
        return Engine(program(formula, grid), with_features(mixture), (2, 6), "reference", dtype=torch.float64)(x).sum()

    loss().backward()
    with torch.no_grad():
        weight += 1e-6
        up = loss()
        weight -= 2e-6
        down = loss()
    assert float(weight.grad) == pytest.approx(float(up - down) / 2e-6, rel=1e-6)  # central difference: error 1e-12/h


def test_guidance_and_binds_together(mixture):
    """Late numbers of the call and of the run meet in one coefficient."""

    def network(x, sigma, class_labels=None, features=False):
        raw = mixture(x, sigma) * (1 + 0.1 * class_labels.to(x)[:, None])
        return (raw, {"bottleneck": features_of(x)}) if features else raw

    denoiser = Denoiser(network, "denoised", sample_shape=(6,), num_classes=3, null_label=3)
    grid = make_grid("edm", 4)
    x = start(grid, (4, 6))
    call = {"class_labels": [0, 1, 2, 0], "guidance_scale": torch.tensor([0.0, 1.0, 1.5, 3.0])}
    run = {
        backend: Engine(program(looks, grid), denoiser, (4, 6), backend, dtype=torch.float64, guidance=True)(x, **call)
        for backend in AVAILABLE
    }
    for backend in AVAILABLE[1:]:
        assert relative(run[backend], run["reference"]) < 1e-12


def test_lowering_knows_when_numbers_arrive(mixture):
    made, denoiser = program(looks, make_grid("edm", 3)), with_features(mixture)
    lowered = lower(made, denoiser.scaling, lambda level: denoiser.columns(level, None))
    assert lowered.due == (0, 1, 1, 3, 3, 5, 5)  # the update after an evaluation that was looked at, and the next
    assert [c.due for c in lowered.calls] == [0, 1, 0, 3, 0, 5]
    assert [c.features for c in lowered.calls] == [("bottleneck",), ()] * 3
    assert not lowered.late and not made.late and len(made.made) == 3
    assert "r0 = ratio(bottleneck0)" in made.describe().replace("function", "ratio")
    with pytest.raises(ValueError, match="no value to save"):
        made.save("never.safetensors")


def test_a_pooled_mlp_is_its_formula():
    g = torch.Generator().manual_seed(0)

    def r(*s):
        return torch.randn(*s, generator=g)

    mlp = PooledMLP(r(7, 12), r(7), r(3, 7), r(3), r(2, 3), r(2), torch.tensor([0.0, 0.99]), torch.tensor([1.0, 1.01]))
    feature = r(5, 6, 3, 4)
    one, two = mlp(feature)
    p = feature.mean(1).reshape(5, 12).double()
    h = p @ mlp.w1.double().T + mlp.b1
    z = (h / (1 + (-h).exp()) @ mlp.w2.double().T + mlp.b2) @ mlp.head.double().T + mlp.offset
    assert relative(one.double(), 1 / (1 + (-z[:, 0]).exp())) < 1e-6  # float32
    assert relative(two.double(), 0.99 + 0.02 / (1 + (-z[:, 1]).exp())) < 1e-6
    with pytest.raises(ValueError, match="trained on 12 pooled numbers"):
        mlp(r(2, 6, 4, 4))


def test_bad_binds(mixture):
    grid = make_grid("edm", 2)
    trace = Trace(grid)
    with pytest.raises(ValueError, match="nothing has been evaluated yet"):
        trace.norm(trace.start())
    with pytest.raises(ValueError, match="offer"):
        Engine(program(looks, grid), Denoiser(mixture, "denoised"), (2, 6))
    with pytest.raises(ValueError, match="need one for each"):
        Bind(0, (Late("a"),), None)

    def wrong(count):
        def formula(p):
            x = p.start()
            for _, s, t in p.grid.windows():
                d = p.denoise(x, s)
                (c,) = p.late(("c",), lambda f: count(f), outputs=("bottleneck",))
                x = p.land(c * ddim_step(x, d, s, t), t)
            return x

        return program(formula, grid)

    for backend in AVAILABLE:
        with pytest.raises(ValueError, match="returned 2 tensors"):
            Engine(wrong(lambda f: (f.sum(), f.sum())), with_features(mixture), (2, 6), backend)(start(grid, (2, 6)))
        with pytest.raises(ValueError, match=r"one number or \[2\] numbers"):
            Engine(wrong(lambda f: (f,)), with_features(mixture), (2, 6), backend)(start(grid, (2, 6)))


def test_exponentials_of_made_numbers(mixture):
    """Every function that solvers apply to numbers works on made ones."""
    r = Late("r")
    from fastode.scalar import evaluate

    assert float(evaluate(exp(-r) * 2, {r: torch.tensor(0.5, dtype=torch.float64)})) == pytest.approx(1.2130613194)


def test_vp_networks_at_made_levels(mixture):
    """The label a network is told at a level made in the run is that of its own schedule."""
    schedule = VPLinear()
    told = []

    def network(x, label, features=False):
        told.append(label.double())
        raw = torch.tanh(x)
        return (raw, {"bottleneck": features_of(x)}) if features else raw

    denoiser = Denoiser(network, "eps", schedule, sample_shape=(6,))
    grid = log_snr(schedule, 3)
    x = start(grid, (2, 6))
    runs = [Engine(program(looks, grid), denoiser, (2, 6), backend, dtype=torch.float64)(x) for backend in AVAILABLE]
    assert all(relative(run, runs[0]) < 1e-12 for run in runs)
    inner = told[1]
    low, high = schedule.label(grid.t[1]), schedule.label(grid.t[0])
    assert inner.shape == (2,) and bool(((inner > low) & (inner < high)).all()) and float(inner[0]) != float(inner[1])
