"""One process seen in different frames (VP, VE, flow) gives one sample; samples do not depend on their batch."""

import pytest
import torch

import fastode
from fastode.backends import BACKENDS as ALL
from tests.conftest import VARIANTS, draws, make_grid, relative, start, variant_id

BACKENDS = ["reference", *(n for n in ("torch", "native") if ALL[n].missing(torch.device("cpu")) is None)]


@pytest.mark.parametrize("kind", ["vp", "vp_time", "ddpm", "flow"])
@pytest.mark.parametrize("case", VARIANTS, ids=variant_id)
def test_frames_agree(mixture, case, kind):
    name, options = case
    grid = make_grid(kind)
    # The same levels with alpha = 1, the time kept: steps and half steps then mean the same thing in both frames.
    ve = fastode.Grid(grid.sigmas, 1.0, grid.t, schedule=grid.schedule, name="ve view")
    x = start(grid, (3, 6))
    own = fastode.sample(mixture, x, solver=name, grid=grid, noise=draws(x), **options) / float(grid.alpha[-1])
    other = fastode.sample(mixture, x / grid.alpha[0], solver=name, grid=ve, noise=draws(x), **options)
    # Both are float64 with sigma up to 157; a table differs by roundings of its coefficients only. Rounding is amplified
    # by the noise-prediction methods' differences over the small last levels: 2e-12 seen.
    assert relative(own, other) < 1e-11


@pytest.mark.parametrize("prediction", ["edm", "eps", "v", "x0"])
def test_predictions_agree(mixture, prediction):
    """One denoiser dressed up as each kind of network gives the same samples on the same grid."""
    schedule = fastode.schedules.VPLinear()
    grid = make_grid("vp")
    x = start(grid, (3, 6))

    def network(net_in, c_noise):
        shape = (-1, 1)
        if prediction == "edm":
            sigma = torch.exp(4 * c_noise).reshape(shape)
            size = torch.sqrt(sigma**2 + 0.25)
            y = net_in * size
            return (mixture(y, sigma) - 0.25 / size**2 * y) * size / (0.5 * sigma)
        t = c_noise[0] / 999
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        d = mixture(net_in / alpha, sigma / alpha)
        eps = (net_in - alpha * d) / sigma
        return {"eps": eps, "x0": d, "v": alpha * eps - sigma * d}[prediction]

    dressed = fastode.Denoiser(network, prediction, fastode.schedules.EDM() if prediction == "edm" else schedule)
    for name in ("ddim", "heun", "dpm_solver_pp", "unipc", "ipndm"):
        plain = fastode.sample(mixture, x, solver=name, grid=grid)
        assert relative(fastode.sample(dressed, x, solver=name, grid=grid), plain) < 1e-10


def test_flow_network_from_pure_noise(mixture):
    """Flow grids start at alpha = 0: the velocity there is n - E[x_0]."""
    grid = make_grid("flow_full", 40)
    mean = (mixture.log_weights.exp()[:, None] * mixture.means).sum(0)

    def velocity(x, t):
        t = t.reshape(-1, 1)
        d = mean.expand_as(x) if float(t[0]) == 1 else mixture(x / (1 - t), t / (1 - t))
        return (x - d) / t

    x = torch.randn(4, 6, dtype=torch.float64)
    flow = fastode.Denoiser(velocity, "flow")
    truth = mixture.flow(x * 999, 999.0, 1e-6)  # x / alpha just below t = 1
    for name, solver in fastode.SOLVERS.items():
        if solver(grid).draws:
            continue  # their samples are others of the same law
        samples = fastode.sample(flow, x, solver=name, grid=grid)
        assert relative(samples, truth) < 0.3, name
        assert bool(torch.isfinite(samples).all())


@pytest.mark.parametrize("case", VARIANTS, ids=variant_id)
def test_batch_independence(mixture, case):
    """Sample i alone is bitwise sample i of the batch: nothing couples them."""
    name, options = case
    grid = make_grid("edm")
    x = start(grid, (5, 6), dtype=torch.float32)
    for backend in ("reference", "torch"):
        together = fastode.sample(mixture, x, solver=name, grid=grid, seeds=range(5), backend=backend, **options)
        for i in (0, 3):
            alone = fastode.sample(mixture, x[i : i + 1], solver=name, grid=grid, seeds=[i], backend=backend, **options)
            # bitwise, up to the mixture's own matrix products, which choose their order of summation by batch size
            torch.testing.assert_close(alone[0], together[i], rtol=2e-6, atol=2e-6)


def test_batch_independence_is_bitwise_for_elementwise_denoisers(gaussian):
    """Alone and in a batch of 64, with the noise of stochastic solvers from the samples' seeds."""
    grid = make_grid("edm")
    x = start(grid, (64, 4), dtype=torch.float32)
    for name, options in VARIANTS:
        for backend in BACKENDS:
            call = {"solver": name, "grid": grid, "backend": backend, **options}
            together = fastode.sample(gaussian, x, seeds=range(64), **call)
            alone = fastode.sample(gaussian, x[37:38], seeds=[37], **call)
            assert torch.equal(alone[0], together[37]), (name, options, backend)


def test_seeds_make_samples_that_do_not_depend_on_their_batch(gaussian):
    """Also for stochastic solvers: sample i of any batch is the sample of its seed."""
    grid = make_grid("edm")
    for name, options in VARIANTS:
        program = fastode.SOLVERS[name](grid, **options)
        if program.draws:
            big = fastode.Engine(program, gaussian, shape=(6, 4))(seeds=[5, 1, 2, 9, 4, 7])
            small = fastode.Engine(program, gaussian, shape=(2, 4))(seeds=[9, 5])
            assert torch.equal(small, big[[3, 0]]), (name, options)
