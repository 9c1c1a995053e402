"""Denoisers: known distributions, what an output means, guidance, nonlinear wrappers, and what a network may do."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastode
from fastode import Denoiser, Engine, Guidance
from fastode.backends import BACKENDS
from fastode.denoisers import Clip, DynamicThreshold, Empirical, Gaussian, GaussianMixture, clipped, thresholded
from fastode.denoisers.analytic import integrate
from fastode.denoisers.precondition import edm_scalings
from fastode.schedules import EDM, VE, Cosine, Discrete, Flow, Grid, Level, SubVP, VPLinear
from tests import tiny_model
from tests.conftest import make_grid, relative, start

LOWERED = [name for name in ("torch", "native") if BACKENDS[name].missing(torch.device("cpu")) is None]
"""Backends that run lowered programs here, in float64 too."""


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# -- distributions with known flows --------------------------------------------------------------------------


def covariance(d: int) -> torch.Tensor:
    a = randn(d, d, seed=3)
    return a @ a.T / d + 0.05 * torch.eye(d, dtype=torch.float64)


@pytest.mark.parametrize("sigma", [1e-3, 0.3, 5.0, 80.0])
def test_gaussian_is_the_matrix_formula(sigma):
    """D = mean + V (V + sigma^2)^-1 (x - mean), for a full covariance, variances, and one number."""
    mean, v, x = randn(2, 3, seed=1), covariance(6), 2 * randn(5, 2, 3, seed=2)
    variances = v.diag().reshape(2, 3)
    for given_, matrix in ((v, v), (variances, torch.diag(v.diag())), (0.7, 0.7 * torch.eye(6, dtype=torch.float64))):
        shrink = torch.linalg.solve(matrix + sigma**2 * torch.eye(6, dtype=torch.float64), matrix.T).T
        want = mean + ((x - mean).flatten(1) @ shrink.T).reshape(x.shape)
        got = Gaussian(mean, given_)(x, sigma)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)  # eigenvalues or elimination, condition 50


def test_gaussian_with_a_noise_level_per_sample():
    data, x = Gaussian(randn(3), covariance(3)), randn(2, 3)
    together = data(x, torch.tensor([0.5, 2.0]).reshape(2, 1))
    assert torch.equal(together, torch.cat([data(x[:1], 0.5), data(x[1:], 2.0)]))


DISTRIBUTIONS = {
    "gaussian": Gaussian(randn(4, seed=1), covariance(4)),
    "gaussian_diagonal": Gaussian(randn(4, seed=1), torch.tensor([0.0, 0.1, 1.0, 4.0])),
    "mixture_1d": GaussianMixture([[-1.0], [0.5], [2.0]], torch.tensor([0.05, 0.1, 0.3]), [1, 2, 1]),
    "mixture": GaussianMixture(randn(3, 4, seed=2), torch.stack([covariance(4)] * 3) * 0.3, [0.2, 0.5, 0.3]),
    "empirical": Empirical(randn(5, 4, seed=4)),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_denoisers_are_tweedies_formula(name):
    """D = x + sigma^2 grad log p(x; sigma), with the density written out by torch.distributions."""
    data = DISTRIBUTIONS[name]
    if isinstance(data, Gaussian):
        v = torch.diag(data.variances) if data.basis is None else data.basis @ torch.diag(data.variances) @ data.basis.T
        weights, means, covariances = torch.ones(1), data.mean[None], v[None]
    else:
        weights, means = data.log_weights.exp(), data.means
        covariances = torch.diag_embed(data.variances)
        if data.bases is not None:
            covariances = data.bases @ covariances @ data.bases.mT
    d = means[0].numel()
    for sigma in (0.4, 3.0):
        parts = torch.distributions.MultivariateNormal(
            means, covariances + sigma**2 * torch.eye(d, dtype=torch.float64)
        )
        density = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(weights.double()), parts)
        x = (2 * randn(6, d)).requires_grad_()
        (score,) = torch.autograd.grad(density.log_prob(x).sum(), x)
        torch.testing.assert_close(data(x.detach(), sigma), x.detach() + sigma**2 * score, rtol=1e-10, atol=1e-10)


def test_mixture_is_the_posterior_mean_by_quadrature():
    """int x0 p(x0) N(x; x0, sigma^2) dx0 over int p N: the trapezoidal rule on Gaussians is exact to rounding."""
    data = DISTRIBUTIONS["mixture_1d"]
    u = torch.linspace(-6, 8, 4001, dtype=torch.float64)
    sd = data.variances.flatten().sqrt()
    prior = (torch.exp(-0.5 * ((u[:, None] - data.means.flatten()) / sd) ** 2) / sd * data.log_weights.exp()).sum(1)
    x = torch.linspace(-3, 4, 9, dtype=torch.float64)
    for sigma in (0.1, 1.0, 10.0):
        weight = prior * torch.exp(-0.5 * ((x[:, None] - u) / sigma) ** 2)
        want = (weight * u).sum(1) / weight.sum(1)
        torch.testing.assert_close(data(x[:, None], sigma)[:, 0], want, rtol=1e-11, atol=1e-12)


def test_empirical_is_a_softmax_over_the_data():
    data = randn(7, 2, 3, seed=5)
    x, sigma = randn(4, 2, 3), 0.6
    distances = (x[:, None] - data).flatten(2).square().sum(2)
    want = torch.einsum("bk,kij->bij", (-distances / (2 * sigma**2)).softmax(1), data)
    torch.testing.assert_close(Empirical(data)(x, sigma), want, rtol=1e-12, atol=1e-13)
    nearest = data[distances.argmin(1)]
    torch.testing.assert_close(Empirical(data)(x, 1e-3), nearest)  # with little noise: the nearest image


CLOSED = ["gaussian", "gaussian_diagonal", "mixture_1d"]


@pytest.mark.parametrize("name", CLOSED)
def test_flows_compose(name):
    """Going from a to c by way of b is going from a to c; staying is staying; going back returns."""
    data = DISTRIBUTIONS[name]
    x = 3 * randn(5, 1 if name == "mixture_1d" else 4)
    whole = data.flow(x, 5.0, 0.1)
    torch.testing.assert_close(data.flow(data.flow(x, 5.0, 0.9), 0.9, 0.1), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(data.flow(whole, 0.1, 5.0), x, rtol=0, atol=1e-10)  # errors grow like sigma, 50 times
    torch.testing.assert_close(data.flow(x, 5.0, 5.0), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CLOSED)
def test_closed_form_flows_solve_the_ode(name):
    """The quantile and the principal-component formula against classical Runge-Kutta on dx/dsigma = (x - D)/sigma."""
    data = DISTRIBUTIONS[name]
    x = 5 * randn(5, 1 if name == "mixture_1d" else 4)
    # fourth order in h = ln(50)/100 = 0.04; components are 0.2 wide and more, so the trajectory bends within h = 1
    torch.testing.assert_close(data.flow(x, 5.0, 0.1), integrate(data, x, 5.0, 0.1, steps=100), rtol=0, atol=3e-7)
    torch.testing.assert_close(data.flow(x, 5.0, 0.0), integrate(data, x, 5.0, 0.0, steps=300), rtol=0, atol=3e-7)


def test_a_mixture_of_one_component_is_a_gaussian():
    """Also where it has no closed form of its own: its flow is integrated."""
    mean, v, x = randn(4, seed=1), covariance(4), 5 * randn(5, 4)
    one, same = GaussianMixture(mean[None], v[None]), Gaussian(mean, v)
    torch.testing.assert_close(one(x, 0.7), same(x, 0.7), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(integrate(one, x, 5.0, 0.1, steps=100), same.flow(x, 5.0, 0.1), rtol=0, atol=2e-6)


def test_quantiles_are_preserved():
    data = DISTRIBUTIONS["mixture_1d"]
    x = torch.linspace(-8, 8, 11, dtype=torch.float64)[:, None]
    y = data.flow(x, 3.0, 0.05)
    assert bool((y[1:] > y[:-1]).all())
    torch.testing.assert_close(data._cdf(y, 0.05), data._cdf(x, 3.0), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Gaussian(torch.zeros(3), [[1.0, 2.0, 0], [0, 1, 0], [0, 0, 1]]),
            "covariance: a matrix must be symmetric",
        ),
        (lambda: Gaussian(torch.zeros(3), torch.ones(2)), "covariance: must be a number"),
        (lambda: Gaussian(torch.zeros(3), -1.0), "covariance: variances cannot be negative"),
        (lambda: GaussianMixture(torch.zeros(3)), "means: must be"),
        (lambda: GaussianMixture(torch.zeros(3, 2), 1.0, [1.0, 2.0]), "weights: must be 3"),
        (lambda: GaussianMixture(torch.zeros(2, 2), 1.0, [1.0, -2.0]), "weights: must be 2"),
    ],
)
def test_distributions_refuse_nonsense(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


# -- what an output means ------------------------------------------------------------------------------------


@given(sigma=st.floats(1e-3, 1e3), sigma_data=st.floats(0.05, 5))
@settings(max_examples=100, deadline=None)
def test_edm_scalings_are_the_ones_that_were_derived(sigma, sigma_data):
    """Unit variance in (c_in), unit variance asked for (c_out), c_skip the one of least c_out (EDM, appendix B.6)."""
    c_skip, c_out, c_in, c_noise = edm_scalings(sigma, sigma_data)

    def target_variance(skip: float) -> float:  # of x0 - skip (x0 + sigma n)
        return (1 - skip) ** 2 * sigma_data**2 + skip**2 * sigma**2

    close = pytest.approx
    assert c_in**2 * (sigma**2 + sigma_data**2) == close(1, rel=1e-14)
    # (1 - c_skip) cancels where sigma << sigma_data: 1e-16 / 4e-8 at the corner
    assert c_out**2 == close(target_variance(c_skip), rel=1e-7)
    assert target_variance(c_skip) <= min(target_variance(c_skip * 1.01), target_variance(c_skip * 0.99)) * (1 + 1e-12)
    assert c_noise == close(math.log(sigma) / 4, rel=1e-14)


TRAINED_ON = {
    "edm": [EDM()],
    "eps": [VPLinear(), Discrete.scaled_linear(), Cosine(), SubVP(), VE()],
    "x0": [VPLinear(), Discrete.linear()],
    "v": [VPLinear(), Discrete.scaled_linear(), Discrete.scaled_linear(zero_terminal_snr=True), Cosine()],
    "flow": [Flow(), Flow(label_scale=1000.0)],
    "denoised": [EDM()],
}
CASES = [(p, s) for p, schedules in TRAINED_ON.items() for s in schedules]


@pytest.mark.parametrize("prediction, schedule", CASES, ids=[f"{p}-{type(s).__name__}" for p, s in CASES])  # noqa: PT006
@given(log_rho=st.floats(math.log(0.05), math.log(10)), alpha=st.floats(0.01, 3))
@settings(max_examples=25, deadline=None)
def test_any_network_is_right_on_any_grid(prediction, schedule, log_rho, alpha):
    """A network that knows x_0 and n, trained on its own schedule, gives back x_0 on a level of any frame.

    It is shown the state of its own schedule at the same sigma/alpha, and the label of that time.
    """
    rho = math.exp(log_rho)
    x0, n = randn(2, 3, seed=1), randn(2, 3, seed=2)
    if prediction == "edm":
        a, s, label = 1.0, rho, math.log(rho) / 4
        c_skip, c_out, c_in, _ = edm_scalings(rho)
        shown, answer = c_in * (x0 + rho * n), (x0 - c_skip * (x0 + rho * n)) / c_out
    elif prediction == "denoised":
        a, s, label = 1.0, rho, rho
        shown, answer = x0 + rho * n, x0
    else:
        t = schedule.time(rho)
        a, s, label = (float(f(t)) for f in (schedule.alpha, schedule.sigma, schedule.label))
        shown = a * x0 + s * n
        answer = {"eps": n, "x0": x0, "v": a * n - s * x0, "flow": n - x0}[prediction]
    seen = []

    def network(x, c_noise):
        seen.append((x, c_noise))
        return answer

    denoiser = Denoiser(network, prediction, schedule)
    level = Level(alpha, alpha * rho, None)
    got = denoiser.denoise(alpha * x0 + level.sigma * n, level)
    # eps divides the error of a x by alpha, and inverting a table's time is good to 1e-11 (tests of schedules)
    torch.testing.assert_close(got, x0, rtol=0, atol=1e-9)
    (net_in, c_noise), *_ = seen
    torch.testing.assert_close(net_in, shown, rtol=0, atol=1e-9)
    assert c_noise.shape == (() if prediction == "denoised" else (2,))
    assert float(c_noise.flatten()[0]) == pytest.approx(label, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("prediction", ["x0", "v", "flow"])
def test_predictions_that_work_at_pure_noise(prediction):
    x0, n = randn(2, 3, seed=1), randn(2, 3, seed=2)
    schedule = Flow() if prediction == "flow" else Discrete.linear(zero_terminal_snr=True)
    answer = {"x0": x0, "v": -x0, "flow": n - x0}[prediction]
    denoiser = Denoiser(lambda x, t: answer, prediction, schedule)
    torch.testing.assert_close(denoiser.denoise(2 * n, Level(0.0, 2.0, None)), x0)  # any scale of the noise


@pytest.mark.parametrize("prediction", ["eps", "edm", "denoised"])
def test_predictions_that_say_nothing_at_pure_noise(prediction):
    calls = []
    denoiser = Denoiser(lambda x, t: calls.append(1) or x, prediction)
    with pytest.raises(
        ValueError, match=r"^grid: its first level has alpha = 0, where '.*' prediction carries no estimate"
    ):
        fastode.sample(denoiser, randn(2, 3), solver="ddim", grid=make_grid("flow_full", 3))
    assert not calls


def test_denoisers_are_called_in_the_edm_frame():
    """Denoiser(x, sigma) is D(x_0 + sigma n; sigma), whatever the network was trained on."""
    data = Gaussian(torch.zeros(3), torch.tensor([0.1, 0.5, 1.0]))
    schedule = VPLinear()

    def eps(x, label):
        t = label[0] / 999
        a, s = schedule.alpha(t), schedule.sigma(t)
        return (x - a * data(x / a, s / a)) / s

    x = 3 * randn(4, 3)
    torch.testing.assert_close(Denoiser(eps, "eps", schedule)(x, 2.5), data(x, 2.5), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(Denoiser.of(data)(x, torch.tensor(2.5)), data(x, 2.5))
    labelled = Denoiser(lambda x, c, class_labels, shift: x * 0 + class_labels[:, None] + shift, "x0", num_classes=5)
    out = labelled(torch.zeros(2, 3), 1.0, class_labels=torch.tensor([1, 4]), shift=0.5)
    assert out[:, 0].tolist() == [1.5, 4.5]
    d = Denoiser.of(labelled)
    assert d is labelled


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Denoiser(3), TypeError, "network: must be callable, got int"),
        (lambda: Denoiser.of("mnist"), TypeError, "denoiser: must be a Denoiser or a callable"),
        (
            lambda: Denoiser(torch.tanh, "noise"),
            ValueError,
            "prediction: must be one of edm, eps, score, x0, v, flow, denoised",
        ),
        (
            lambda: Denoiser(torch.tanh, "flow", VPLinear()),
            ValueError,
            "schedule: flow prediction needs a Flow schedule",
        ),
        (lambda: Denoiser(torch.tanh, sigma_data=0.0), ValueError, "sigma_data: must be positive"),
        (lambda: Guidance(interval=(2.0, 1.0)), ValueError, "interval: need 0 <= low < high"),
        (lambda: Guidance(interval=(-1.0, 1.0)), ValueError, "interval: need 0 <= low < high"),
        (lambda: Clip(1.0, -1.0), ValueError, "low, high: need low < high"),
        (lambda: DynamicThreshold(0.0), ValueError, "quantile: must be in"),
        (lambda: DynamicThreshold(1.5), ValueError, "quantile: must be in"),
        (lambda: DynamicThreshold(floor=0.0), ValueError, "floor: must be positive"),
    ],
)
def test_denoisers_refuse_nonsense(make, error, message):
    with pytest.raises(error, match=f"^{message}"):
        make()


# -- guidance ------------------------------------------------------------------------------------------------


class Conditional:
    """A network with classes 0 .. 3 and "none" = 4, and one more argument; counts its calls and their batch sizes."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.labels: list[list[int]] = []

    def __call__(self, x, c_noise, class_labels=None, shift=None):
        self.batches.append(len(x))
        self.labels.append([] if class_labels is None else class_labels.tolist())
        h = x + c_noise[:, None]
        if class_labels is not None:
            h = h + torch.tensor([0.5, -1.0, 0.2, 1.5, 0.0], dtype=x.dtype)[class_labels][:, None]
        return torch.tanh(h if shift is None else h + shift)


def conditional(prediction: str = "edm") -> Denoiser:
    return Denoiser(Conditional(), prediction, num_classes=4, null_label=4)


GRID = [20.0, 4.0, 1.0, 0.2, 0.05]
LABELS = [3, 0, 1]


def guided(
    backend: str, w, *, denoiser: Denoiser | None = None, guidance: Guidance | None = None, solver="heun", **kwargs
):
    x = start(Grid(GRID), (3, 5))
    return fastode.sample(
        denoiser or conditional(),
        x,
        solver=solver,
        grid=GRID,
        class_labels=LABELS,
        guidance_scale=w,
        guidance=guidance,
        backend=backend,
        **kwargs,
    )


@pytest.mark.parametrize("backend", ["reference", *LOWERED])
def test_one_batched_call_equals_two(backend):
    one, two = conditional(), conditional()
    a = guided(backend, 2.5, denoiser=one)
    b = guided(backend, 2.5, denoiser=two, guidance=Guidance(batched=False))
    torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
    nfe = len(one.network.batches)
    assert one.network.batches == [6] * nfe  # [uncond; cond]
    assert one.network.labels[0] == [4, 4, 4, *LABELS]
    assert two.network.batches == [3] * 2 * nfe
    assert two.network.labels[:2] == [[4, 4, 4], LABELS]


@pytest.mark.parametrize("backend", ["reference", *LOWERED])
def test_guidance_strengths_that_mean_something(backend):
    """w = 1 is the conditional network alone, w = 0 the unconditional one."""
    x = start(Grid(GRID), (3, 5))
    alone = {}
    for name, labels in (("cond", LABELS), ("none", [4, 4, 4])):
        alone[name] = fastode.sample(conditional(), x, solver="heun", grid=GRID, class_labels=labels, backend=backend)
    # (1 - w) and w fold into the table before they meet the outputs: roundings of float64
    torch.testing.assert_close(guided(backend, 1.0), alone["cond"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(guided(backend, 0.0), alone["none"], rtol=1e-12, atol=1e-12)
    assert relative(alone["cond"], alone["none"]) > 0.1


def test_guidance_is_linear_in_its_strength():
    """D_w = D_0 + w (D_1 - D_0) at one level, in any frame."""
    d, x = conditional("eps"), randn(3, 5)
    condition = d.check_condition(3, fastode.denoisers.Condition(torch.tensor(LABELS)), Guidance())
    level = Level(0.6, 0.8, None)

    def at(w: float) -> torch.Tensor:
        known = {fastode.denoisers.guidance.GUIDANCE_SCALE: w}
        return d.denoise(x, level, condition, guidance=Guidance(), known=known)

    zero, one = at(0.0), at(1.0)
    for w in (-1.0, 0.3, 7.5):
        torch.testing.assert_close(at(w), zero + w * (one - zero), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", *LOWERED])
def test_strength_per_sample_and_per_call(backend):
    """One engine serves any strength: per call, per sample, in any order; nothing is rebuilt."""
    program = fastode.SOLVERS["unipc"](GRID)
    engine = Engine(program, conditional(), (3, 5), backend, dtype=torch.float64, guidance=True)
    x = start(Grid(GRID), (3, 5))
    lowered = dict(engine._lowered)
    single = {w: engine(x, class_labels=LABELS, guidance_scale=w) for w in (0.5, 3.0, 8.0)}
    mixed = engine(x, class_labels=LABELS, guidance_scale=[8.0, 0.5, 3.0])
    for i, w in enumerate((8.0, 0.5, 3.0)):
        torch.testing.assert_close(mixed[i], single[w][i], rtol=1e-12, atol=1e-12)
    again = engine(x, class_labels=LABELS, guidance_scale=torch.tensor(3.0))
    assert torch.equal(again, single[3.0])
    assert engine._lowered == lowered
    fresh = Engine(program, conditional(), (3, 5), backend, dtype=torch.float64, guidance=True)
    assert torch.equal(fresh(x, class_labels=LABELS, guidance_scale=8.0), single[8.0])


@pytest.mark.parametrize("backend", ["reference", *LOWERED])
@pytest.mark.parametrize("batched", [True, False])
def test_guidance_interval(backend, batched):
    """Guided where low < sigma <= high; elsewhere one conditional evaluation is made."""
    d = conditional()
    out = guided(backend, 3.0, denoiser=d, guidance=Guidance(interval=(0.2, 4.0), batched=batched), solver="ddim")
    calls = [[4, 4, 4, *LABELS]] if batched else [[4, 4, 4], LABELS]
    assert d.network.labels == [LABELS, *calls, *calls, LABELS]  # sigma = 20, 4, 1, 0.2
    everywhere = guided(backend, 3.0, guidance=Guidance(batched=batched), solver="ddim")
    assert relative(out, everywhere) > 1e-3
    nowhere = guided(backend, 3.0, guidance=Guidance(interval=(30.0, 40.0), batched=batched), solver="ddim")
    torch.testing.assert_close(nowhere, guided(backend, 1.0, solver="ddim"), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", LOWERED)
@pytest.mark.parametrize("prediction", ["edm", "eps", "v", "x0"])
@pytest.mark.parametrize("solver", ["ddim", "heun", "unipc", "dpm_solver_pp", "ipndm"])
def test_folded_guidance_equals_the_definition(backend, prediction, solver):
    for w in (2.0, [0.0, 1.5, 6.0]):
        guidance = Guidance(interval=(0.1, 5.0))
        runs = [
            guided(b, w, denoiser=conditional(prediction), guidance=guidance, solver=solver)
            for b in ("reference", backend)
        ]
        assert relative(runs[1], runs[0]) < 1e-11  # float64; another grouping of the same sums


def test_nfe_counts_a_guided_evaluation_once():
    d = conditional()
    result = guided("auto", 2.0, denoiser=d, return_trajectory=True)
    assert result.nfe == 8 == len(d.network.batches)


def test_guidance_on_other_conditions():
    """cond and uncond: tensors per sample are batched; what all samples share needs two calls."""
    x, shift = start(Grid(GRID), (3, 5)), randn(3, 1, seed=8)
    run = {"solver": "ddim", "grid": GRID, "guidance_scale": 2.0}
    plain = Denoiser(Conditional(), "edm")
    batched = fastode.sample(plain, x, cond={"shift": shift}, uncond={"shift": 0 * shift}, **run)
    two = fastode.sample(
        plain, x, cond={"shift": shift}, uncond={"shift": 0.0}, guidance=Guidance(batched=False), **run
    )
    torch.testing.assert_close(batched, two, rtol=1e-12, atol=1e-12)
    same = fastode.sample(conditional(), x, class_labels=LABELS, cond={"shift": 0.25}, uncond={"shift": 0.25}, **run)
    assert bool(torch.isfinite(same).all())
    with pytest.raises(ValueError, match=r"^uncond: 'shift' is not per sample .* use Guidance\(batched=False\)"):
        fastode.sample(plain, x, cond={"shift": 0.5}, uncond={"shift": 0.0}, **run)
    with pytest.raises(
        ValueError, match=r"^uncond: 'shift' must be a tensor of shape \[3, 1\] like cond's, got \[1, 1\]"
    ):
        fastode.sample(plain, x, cond={"shift": shift}, uncond={"shift": shift[:1]}, **run)
    with pytest.raises(ValueError, match=r"^uncond: 'shit' replaces nothing; cond has \['shift'\]"):
        fastode.sample(plain, x, cond={"shift": shift}, uncond={"shit": shift}, **run)
    with pytest.raises(ValueError, match=r"^cond: denoiser takes no argument 'text'"):
        fastode.sample(plain, x, solver="ddim", grid=GRID, cond={"text": shift})


@pytest.mark.parametrize(
    ("denoiser", "arguments", "message"),
    [
        (conditional(), {"guidance_scale": 2.0}, "guidance_scale: guidance needs a condition"),
        (
            replace(conditional(), null_label=None),
            {"guidance_scale": 2.0, "class_labels": LABELS},
            "guidance_scale: denoiser",
        ),
        (
            conditional(),
            {"guidance": Guidance(), "class_labels": LABELS},
            "guidance_scale: this engine is guided and needs",
        ),
        (conditional(), {"guidance_scale": [1.0, 2.0], "class_labels": LABELS}, "guidance_scale: must be a number or"),
        (conditional(), {"class_labels": [0, 1, 5]}, "class_labels: must be in 0 .. 4, got 5"),
        (conditional(), {"class_labels": [0, -1, 2]}, "class_labels: must be in 0 .. 4, got -1"),
        (conditional(), {"class_labels": [0, 1]}, r"class_labels: need one label per sample \[3\], got shape \[2\]"),
        (conditional(), {"class_labels": [0.0, 1.0, 2.0]}, "class_labels: must be integers"),
        (conditional(), {"class_labels": [True, False, True]}, "class_labels: must be integers"),
        (
            replace(conditional(), num_classes=0),
            {"class_labels": LABELS},
            "class_labels: denoiser is not class-conditional",
        ),
    ],
)
def test_conditions_are_checked_before_any_call(denoiser, arguments, message):
    before = len(denoiser.network.batches)
    with pytest.raises(ValueError, match=f"^{message}"):
        fastode.sample(denoiser, start(Grid(GRID), (3, 5)), solver="ddim", grid=GRID, **arguments)
    assert len(denoiser.network.batches) == before


def test_one_label_serves_the_whole_batch():
    d = conditional()
    fastode.sample(d, start(Grid(GRID), (3, 5)), solver="ddim", grid=GRID, class_labels=2)
    assert d.network.labels[0] == [2, 2, 2]


# -- clipping and thresholding -------------------------------------------------------------------------------


def test_dynamic_threshold_is_the_quantile_of_each_sample():
    """Imagen, section 2.3: s = max(1, q-quantile of |D|), clip to [-s, s], divide by s."""
    x = 2 * randn(4, 3, 16, 16)
    for q in (0.9, 0.995, 1.0, 0.5):
        s = torch.quantile(x.flatten(1).abs(), q, dim=1).clamp(min=1).reshape(4, 1, 1, 1)
        want = torch.clamp(x, -s, s) / s
        torch.testing.assert_close(DynamicThreshold(q)(x), want, rtol=1e-14, atol=0)


@given(factor=st.floats(1.0, 50.0))
@settings(max_examples=30, deadline=None)
def test_above_the_floor_the_threshold_follows_the_scale(factor):
    """s > 1: multiplying D by a number changes nothing; s < 1: D itself comes back."""
    x = randn(3, 64) * 10
    threshold = DynamicThreshold(0.95)
    torch.testing.assert_close(threshold(x * factor), threshold(x), rtol=1e-13, atol=1e-15)
    assert float(threshold(x).abs().max()) == 1.0
    small = x * 0.001
    assert torch.equal(threshold(small), small)
    torch.testing.assert_close(DynamicThreshold(0.95, floor=2.0)(x), 2 * threshold(x), rtol=1e-14, atol=0)


def test_one_outlier_changes_its_own_sample_only():
    x = randn(3, 50)
    wild = x.clone()
    wild[1, 7] = 1e4
    a, b = DynamicThreshold(1.0)(x), DynamicThreshold(1.0)(wild)
    assert torch.equal(a[[0, 2]], b[[0, 2]])
    assert not torch.equal(a[1], b[1])


def test_samples_of_one_element_are_thresholded():
    x = torch.tensor([[3.0], [-0.5], [-2.0]])
    assert DynamicThreshold()(x).flatten().tolist() == [1.0, -0.5, -1.0]
    samples = fastode.sample(thresholded(lambda x, s: x * 0 + 4.0), x * 80, solver="heun", grid=[80.0, 1.0, 0.0])
    torch.testing.assert_close(samples, torch.ones(3, 1))


def test_clip():
    x = torch.tensor([[-3.0, -0.5, 0.25, 7.0]])
    assert Clip()(x).tolist() == [[-1.0, -0.5, 0.25, 1.0]]
    assert Clip(0.0, 0.5)(x).tolist() == [[0.0, 0.0, 0.25, 0.5]]
    d = thresholded(clipped(torch.tanh, -2, 2), 0.9)
    assert d.transforms == (Clip(-2, 2), DynamicThreshold(0.9))
    assert d.prediction == "denoised"


class Narrow(nn.Module):
    """A bfloat16 network; tanh keeps |F| <= 1."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-2, 2, 6).to(dtype), requires_grad=False)
        self.seen: list[torch.dtype] = []

    def forward(self, x, c_noise):
        self.seen.append(x.dtype)
        return torch.tanh(self.weight * x + c_noise[:, None].to(x.dtype))


@pytest.mark.parametrize("backend", LOWERED)
@pytest.mark.parametrize("wrap", [clipped, thresholded, lambda d: thresholded(clipped(d, -0.7, 0.7), 0.8, 0.3)])
@pytest.mark.parametrize("solver", ["ddim", "heun", "unipc", "dpm_solver_pp", "ipndm", "pndm"])
def test_transforms_are_applied_where_the_definition_applies_them(backend, wrap, solver):
    """Same operations on the same numbers up to regrouping; the wrapper acts in the state's dtype."""
    x = start(Grid(GRID), (3, 6))
    wide = Denoiser(lambda x, t: 2 * torch.tanh(x + t[:, None]), "edm")
    for network in (wide, Denoiser(Narrow(), "edm"), replace(wide, prediction="v", schedule=VPLinear())):
        d = wrap(network)
        a, b = (fastode.sample(d, x, solver=solver, grid=GRID, backend=n) for n in ("reference", backend))
        # In float64 the two network inputs differ by 1e-15, which changes their rounding to bfloat16 once in 1e12.
        assert relative(b, a) < 1e-10
        plain = fastode.sample(network, x, solver=solver, grid=GRID, backend=backend)
        assert relative(plain, a) > 1e-3  # the wrapper does something here


# -- what a network may do -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", *LOWERED])
def test_bfloat16_network_under_a_float32_state(backend):
    """Every estimate errs by at most 2^-9 (see below); five Euler steps add up to five such errors at most.

    F sees x and c_noise rounded to 8 bits and rounds w x + c and tanh again: |dF| < 4 2^-9 with |F'| <= 1 and x, c of
    order 1; c_out <= sigma_data = 0.5 halves it. A state kept in bfloat16 would err by 2^-9 of sigma = 20 instead.
    """
    x = start(Grid([*GRID, 0.02]), (64, 6), dtype=torch.float32)
    narrow = Narrow()
    with_float = Narrow(torch.float64)
    got = fastode.sample(Denoiser(narrow, "edm"), x, solver="ddim", grid=[*GRID, 0.02], backend=backend)
    want = fastode.sample(Denoiser(with_float, "edm"), x.double(), solver="ddim", grid=[*GRID, 0.02])
    assert got.dtype == torch.float32
    assert set(narrow.seen) == {torch.bfloat16}
    assert set(with_float.seen) == {torch.float64}
    error = float((got - want).abs().max())
    assert 1e-5 < error < 5 * 2 * 2**-9


@pytest.mark.parametrize("backend", ["reference", *LOWERED])
@pytest.mark.parametrize(
    ("network", "error", "message"),
    [
        (lambda x, s: x[:, :1], ValueError, r"network: returned shape \[3, 1\] for an input of shape \[3, 5\]"),
        (lambda x, s: x[:1], ValueError, "network: returned shape"),
        (lambda x, s: (x[:1], x), ValueError, "network: returned shape"),
        (lambda x, s: None, TypeError, "network: must return a tensor, got NoneType"),
        (lambda x, s: (), TypeError, "network: must return a tensor, got tuple"),
        (lambda x, s: {"sample": x}, TypeError, "network: must return a tensor, got dict"),
        (lambda x, s: x.numpy(), TypeError, "network: must return a tensor, got ndarray"),
        (lambda x, s: x > 0, TypeError, "network: must return floating point, got torch.bool"),
        (lambda x, s: x * 1j, TypeError, "network: must return floating point, got torch.complex"),
        (lambda x, s: x.to("meta"), ValueError, "network: returned a tensor on meta for an input on cpu"),
    ],
)
def test_what_a_network_may_not_return(backend, network, error, message):
    x = start(Grid(GRID), (3, 5), dtype=torch.float32)
    before = x.clone()
    with pytest.raises(error, match=f"^{message}"):
        fastode.sample(network, x, solver="heun", grid=GRID, backend=backend)
    assert torch.equal(x, before)


@pytest.mark.parametrize("backend", ["reference", *LOWERED])
def test_the_first_of_several_outputs_is_used(backend):
    x = start(Grid(GRID), (3, 5))
    several = fastode.sample(lambda x, s: (torch.tanh(x), "features"), x, solver="heun", grid=GRID, backend=backend)
    assert torch.equal(
        several, fastode.sample(lambda x, s: torch.tanh(x), x, solver="heun", grid=GRID, backend=backend)
    )


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("prediction", ["denoised", "edm"])
def test_a_network_that_writes_to_its_input(prediction, inference):
    """The definition hands out a copy; the others share memory with the network and say so. x is safe."""

    def network(x, c):
        return x.mul_(0.5)

    with torch.inference_mode(inference):
        x = start(Grid(GRID), (3, 5))
        before = x.clone()
        clean = Denoiser(lambda x, c: x * 0.5, prediction)
        want = fastode.sample(clean, x, solver="heun", grid=GRID, backend="reference")
        got = fastode.sample(Denoiser(network, prediction), x, solver="heun", grid=GRID, backend="reference")
        assert torch.equal(got, want)
        for backend in LOWERED:
            engine = Engine(fastode.SOLVERS["heun"](GRID), Denoiser(network, prediction), (3, 5), backend)
            for _ in range(2):  # nothing spoilt is kept for the next call
                with pytest.raises(RuntimeError, match=r"^network: it changed its input in place; wrap it"):
                    engine(x)
        assert torch.equal(x, before)


@pytest.mark.parametrize("backend", ["reference", *LOWERED])
def test_a_network_may_return_its_input(backend):
    x = start(Grid(GRID), (3, 5))
    same = fastode.sample(lambda x, s: x, x, solver="heun", grid=GRID, backend=backend)
    copied = fastode.sample(lambda x, s: x.clone(), x, solver="heun", grid=GRID, backend=backend)
    assert torch.equal(same, copied)


@pytest.mark.parametrize("backend", ["reference", *LOWERED])
def test_a_narrow_network_is_told_the_level_in_full(backend):
    """A label of 999 is no bfloat16 number (992, 996, 1000 are), so labels stay float32 where the images do not."""
    told = []

    class Labelled(Narrow):
        def forward(self, x, c_noise):
            told.append((x.dtype, c_noise.dtype, c_noise.tolist()))
            return super().forward(x, 0 * c_noise.to(x.dtype))

    schedule = Discrete.linear()
    d = Denoiser(Labelled(), "eps", schedule)
    grid = fastode.schedules.linspace(schedule, 3)
    fastode.sample(d, start(grid, (2, 6), dtype=torch.float32), solver="ddim", grid=grid, backend=backend)
    assert [t[:2] for t in told] == [(torch.bfloat16, torch.float32)] * 3
    assert [t[2] for t in told] == [[999.0] * 2, [666.0] * 2, [333.0] * 2]


def test_the_bundled_architecture_in_narrow_types():
    """bfloat16 weights and images, float32 angles of the noise embedding: the raw output errs by a few 2^-9."""
    net, wide = (tiny_model.network() for _ in range(2))
    net = net.to(torch.bfloat16)
    assert torch.equal(net.noise.frequencies, wide.noise.frequencies)
    x, c = torch.randn(4, 1, 8, 8), torch.tensor([1.1, 0.3, -0.5, -1.55])
    with torch.no_grad():
        got, want = net(x.bfloat16(), c), wide(x, c)
    assert got.dtype == torch.bfloat16
    # some twenty layers, each rounding activations of order 1 by 2^-9, in quadrature: 20^0.5 2^-9 = 0.9%, four times that
    assert float((got.float() - want).norm() / want.norm()) < 0.035
