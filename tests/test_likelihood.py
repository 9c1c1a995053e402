"""Likelihoods against closed forms, latent codes against their inverse."""

import json
import math

import numpy as np
import pytest
import torch

import fastode
from fastode.cli import main
from fastode.denoisers import Gaussian, GaussianMixture
from fastode.drivers import adaptive, decode, dequantise, encode, interpolate, log_likelihood, temper
from fastode.drivers.likelihood import bits_offset
from fastode.schedules import EDM, VE, Cosine, Discrete, Flow, SubVP, VPLinear
from tests import tiny_model
from tests.conftest import relative

SCHEDULES = {
    "edm": (EDM(), 0.002),
    "ve": (VE(), 1e-5),
    "vp": (VPLinear(), 1e-5),
    "subvp": (SubVP(), 1e-5),
    "cosine": (Cosine(), 1e-3),
    "flow": (Flow(t_max=0.99), 1e-3),
    "discrete": (Discrete.linear(), 0.0),
}


@pytest.fixture(params=SCHEDULES)
def case(request):
    return SCHEDULES[request.param]


def correlated():
    g = torch.Generator().manual_seed(3)
    root = torch.randn(4, 4, generator=g, dtype=torch.float64)
    return Gaussian(torch.tensor([0.3, -0.5, 0.0, 1.0]), root @ root.T / 4 + 0.05 * torch.eye(4, dtype=torch.float64))


def density(data, schedule, t):
    """Closed-form log-density of states at time t."""
    alpha, rho = float(schedule.alpha(t)), float(schedule.rho(t))
    return lambda x: data.log_prob(x / alpha, rho) - x[0].numel() * math.log(alpha)


def points(data, batch=3, d=4):
    g = torch.Generator().manual_seed(7)
    return torch.randn(batch, d, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["gaussian", "mixture"])
def test_equals_the_closed_form(case, kind):
    """With the exact trace and the exact density at the noisy end, the likelihood is that of the data at t_min."""
    schedule, t_min = case
    g = torch.Generator().manual_seed(1)
    mixture = GaussianMixture(torch.randn(3, 4, generator=g), torch.tensor([0.1, 0.3, 0.5]))
    data = correlated() if kind == "gaussian" else mixture
    x = points(data)
    prior = density(data, schedule, schedule.t_start)
    made = log_likelihood(data, x, schedule=schedule, trace="exact", prior=prior, rtol=1e-7, atol=1e-7)
    # nats; 20 to 40 steps with 1e-7 each, in 5 numbers that are added
    assert float((made.log_prob - density(data, schedule, t_min)(x)).abs().max()) < 1e-4
    assert made.success


def test_published_priors_leave_their_known_gap():
    """log p = closed form + log prior(z) - log p_1(z): N(0, I) for VP, although a(1) = 0.0066."""
    data, schedule = correlated(), VPLinear()
    x = points(data)
    made = log_likelihood(data, x, schedule=schedule, trace="exact", rtol=1e-7, atol=1e-7)
    normal = -0.5 * made.z.square().sum(1) - 2 * math.log(2 * math.pi)
    gap = normal - density(data, schedule, 1.0)(made.z)
    assert 1e-4 < float(gap.abs().max()) < 0.1
    assert float((made.log_prob - density(data, schedule, 1e-5)(x) - gap).abs().max()) < 1e-4


def test_hutchinson_is_unbiased_and_rademacher_spreads_less():
    """Means over probes within 3 standard errors of the exact trace; the linear part is never probed."""
    data, schedule = correlated(), SubVP()
    x = points(data, 2)
    tolerances = {"rtol": 1e-4, "atol": 1e-4, "norm": "batch"}
    exact = log_likelihood(data, x, schedule=schedule, trace="exact", **tolerances)
    spreads = {}
    for trace in ("rademacher", "gaussian"):
        # 64 probes of one point are a batch of 64 copies of it: the seeds differ
        copies = x[:1].expand(64, -1).contiguous()
        made = log_likelihood(data, copies, schedule=schedule, trace=trace, seeds=range(64), **tolerances)
        error = float(made.log_prob.std() / 8)
        assert abs(float(made.log_prob.mean() - exact.log_prob[0])) < 3 * error
        spreads[trace] = error
    assert 0 < spreads["rademacher"] < 0.8 * spreads["gaussian"]


def test_rademacher_is_exact_for_a_diagonal_jacobian(gaussian):
    x = points(gaussian)
    made = log_likelihood(gaussian, x, rtol=1e-6, atol=1e-6, trace="rademacher")
    exact = log_likelihood(gaussian, x, rtol=1e-6, atol=1e-6, trace="exact")
    assert float((made.log_prob - exact.log_prob).abs().max()) < 1e-9  # the same steps, rounding apart


def test_probes_are_averaged():
    data, x = correlated(), points(None, 2)
    g = torch.Generator().manual_seed(0)
    probes = [torch.randn(x.shape, generator=g, dtype=torch.float64) for _ in range(3)]
    options = {"rtol": 1e-3, "atol": 1e-3}
    each = torch.stack([log_likelihood(data, x, probes=[p], **options).log_prob for p in probes])
    made = log_likelihood(data, x, probes=probes, **options)
    assert torch.allclose(made.log_prob, each.mean(0), rtol=1e-14)
    assert torch.allclose(made.spread, each.std(0) / math.sqrt(3), rtol=1e-12)


def test_a_sample_does_not_depend_on_its_batch():
    data, x = correlated(), points(None, 4)
    together = log_likelihood(data, x, seeds=[5, 6, 7, 8], rtol=1e-3, atol=1e-3)
    alone = log_likelihood(data, x[2:3], seeds=[7], rtol=1e-3, atol=1e-3)
    # the Gaussian's matrix products differ in the last bit with the batch
    assert abs(float(together.log_prob[2] - alone.log_prob[0])) < 1e-9
    assert together.nfe[2] == alone.nfe[0]


@pytest.mark.parametrize("method", ["scipy", "torchdiffeq"])
def test_other_integrators_agree(method):
    pytest.importorskip(method)
    data, x = correlated(), points(None)
    ours = log_likelihood(data, x, schedule=VPLinear(), norm="batch", rtol=1e-7, atol=1e-7)
    theirs = log_likelihood(data, x, schedule=VPLinear(), method=method, rtol=1e-7, atol=1e-7)
    assert float((ours.log_prob - theirs.log_prob).abs().max()) < 1e-4


def test_fixed_steps_converge():
    data, x, schedule = correlated(), points(None), EDM(0.01, 20.0)
    truth = log_likelihood(data, x, schedule=schedule, trace="exact", rtol=1e-9, atol=1e-9).log_prob
    errors = []
    for steps in (12, 24):
        times = fastode.schedules.karras(schedule, steps).t.flip(0)
        made = log_likelihood(data, x, schedule=schedule, trace="exact", times=times, method="rk4")
        errors.append(float((made.log_prob - truth).abs().max()))
    assert errors[1] < errors[0] / 8 < 0.1  # order 4 would be 16; the last steps near the data are not in the limit yet


def test_bits_per_dim_offsets():
    """7 for data in [-1, 1], 8 for [0, 1]; for one density moved from one range to the other nothing changes."""
    assert bits_offset((-1.0, 1.0)) == 7 and bits_offset((0.0, 1.0)) == 8
    small, large = Gaussian(torch.full((4,), 0.5), 0.04), Gaussian(torch.zeros(4), 0.16)
    x = 0.5 + 0.2 * points(None)
    made = []
    for data, y, schedule in ((small, x, VE(0.01, 50.0)), (large, 2 * x - 1, VE(0.02, 100.0))):
        options = {"trace": "exact", "prior": density(data, schedule, 1.0), "rtol": 1e-7, "atol": 1e-7}
        made.append(log_likelihood(data, y, schedule=schedule, t_min=0.0, **options))
    first, second = made
    assert torch.allclose(first.bits_per_dim((0.0, 1.0)), second.bits_per_dim((-1.0, 1.0)), atol=1e-4)
    flat = -first.log_prob / (4 * math.log(2))
    assert torch.allclose(first.bits_per_dim((0.0, 1.0)) - flat, torch.full_like(flat, 8.0), atol=1e-12)


def test_dequantisation_is_uniform_and_keyed_by_seed():
    pixels = torch.randint(0, 256, (6, 1, 16, 16), dtype=torch.uint8)
    x = dequantise(pixels, seeds=range(6), dtype=torch.float64)
    u = (x + 1) / 2 * 256 - pixels
    assert float(u.min()) >= 0 and float(u.max()) < 1
    n = u.numel()
    assert abs(float(u.mean()) - 0.5) < 4 * (1 / 12 / n) ** 0.5
    assert abs(float(u.var()) - 1 / 12) < 4 * (1 / 180 / n) ** 0.5
    assert torch.equal(dequantise(pixels[2:3], seeds=[2], dtype=torch.float64)[0], x[2])
    assert not torch.equal(dequantise(pixels, seeds=range(6), draw=1), x.float())


def test_decode_undoes_encode(case):
    """To the tolerance of the solver, stretched where the flow expands."""
    schedule, _ = case
    data = correlated()
    x = points(data)
    z = encode(data, x, schedule=schedule, rtol=1e-9, atol=1e-9)
    back = decode(data, z.samples, schedule=schedule, rtol=1e-9, atol=1e-9)
    assert relative(back.samples, x) < 1e-6
    assert relative(z.samples, x) > 0.1


def test_codes_are_the_closed_form(case):
    schedule, t_min = case
    data = correlated()
    x = points(data)
    z = encode(data, x, schedule=schedule, rtol=1e-9, atol=1e-9).samples
    first, last = t_min, schedule.t_start
    truth = schedule.alpha(last) * data.flow(
        x / schedule.alpha(first), float(schedule.rho(first)), float(schedule.rho(last))
    )
    # errors near the data grow with the spread, 50 / 1e-2 at most, from 1e-9 each
    assert relative(z, truth) < 1e-4


def test_interpolation_keeps_the_norm_and_its_ends():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, 5, generator=g, dtype=torch.float64) for _ in range(2))
    a, b = (v / v.norm(dim=1, keepdim=True) for v in (a, b))
    assert relative(interpolate(a, b, 0.0), a) < 1e-14 and relative(interpolate(a, b, 1.0), b) < 1e-14
    middle = interpolate(a, b, torch.tensor([0.2, 0.5, 0.7]))
    assert torch.allclose(middle.norm(dim=1), torch.ones(3, dtype=torch.float64), atol=1e-14)
    angle = torch.acos((a * b).sum(1))
    assert torch.allclose(torch.acos((a * middle).sum(1)), torch.tensor([0.2, 0.5, 0.7]) * angle, atol=1e-12)
    assert relative(interpolate(a, a, 0.3), a) < 1e-12


def test_temperature_shrinks_towards_the_mean():
    """On a Gaussian, decode(tau z) has its deviation from the mean times tau, where sigma_max drowns the data."""
    data, schedule = correlated(), VE(0.01, 1000.0)
    x = points(data)
    z = encode(data, x, schedule=schedule, rtol=1e-8, atol=1e-8).samples
    back = decode(data, temper(z, 0.5), schedule=schedule, rtol=1e-8, atol=1e-8).samples
    assert relative(back - data.mean, 0.5 * (x - data.mean)) < 2e-3  # the mean is 1/1000 of the spread of z


def test_conditions_reach_the_likelihood():
    means = torch.tensor([-1.0, 1.0, 0.0])

    def network(x, sigma, class_labels=None):
        mean = means[class_labels].to(x).reshape(-1, 1)
        return mean + 0.2 / (0.2 + torch.as_tensor(sigma, dtype=x.dtype) ** 2) * (x - mean)

    net = fastode.Denoiser(network, "denoised", num_classes=2, null_label=2)
    x = points(None)
    made = log_likelihood(net, x, class_labels=[0, 1, 0], trace="exact", rtol=1e-6, atol=1e-6)
    for i, label in enumerate([0, 1, 0]):
        data = Gaussian(torch.full((4,), float(means[label])), 0.2)
        alone = log_likelihood(data, x[i : i + 1], trace="exact", rtol=1e-6, atol=1e-6)
        assert abs(float(made.log_prob[i] - alone.log_prob[0])) < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trace": "hutchinson"}, "trace: must be one of"),
        ({"probes": 0}, "probes"),
        ({"probes": [torch.ones(3, 5)]}, "probes: must be tensors"),
        ({"method": "dpm_solver_23"}, "method: a likelihood needs"),
        ({"t_min": 80.0, "t_max": 0.002}, "t_min, t_max"),
        ({"t_min": 0.0}, "t_min, t_max"),
        ({"prior": -1.0}, "prior"),
        ({"seeds": [1]}, "seeds"),
        ({"times": [80.0, 0.002]}, "t_min, t_max"),
        ({"times": [0.002, 80.0], "t_min": 0.1}, "times"),
        ({"rtol": -1.0}, "rtol"),
    ],
)
def test_bad_input(gaussian, options, message):
    with pytest.raises(ValueError, match=message):
        log_likelihood(gaussian, points(None), **options)


def test_bad_input_of_the_rest(gaussian):
    with pytest.raises(ValueError, match="'exact' makes 5000"):
        log_likelihood(gaussian, torch.zeros(1, 5000), trace="exact")
    with pytest.raises(TypeError, match="pixels: must be whole"):
        dequantise(torch.zeros(1, 4), seeds=[0])
    with pytest.raises(ValueError, match=r"pixels: must be in 0 \.\. 7"):
        dequantise(torch.full((1, 4), 9), seeds=[0], levels=8)
    with pytest.raises(ValueError, match="data_range"):
        bits_offset((1.0, -1.0))
    with pytest.raises(ValueError, match="weight"):
        interpolate(torch.zeros(2, 3), torch.zeros(2, 3), 1.5)
    with pytest.raises(ValueError, match="other"):
        interpolate(torch.zeros(2, 3), torch.zeros(2, 4), 0.5)
    with pytest.raises(ValueError, match="temperature"):
        temper(torch.zeros(2, 3), 0.0)
    with pytest.raises(ValueError, match="t_min, t_max"):
        encode(gaussian, points(None), t_min=5.0, t_max=1.0)


def test_a_code_of_a_run_that_stopped_is_marked(gaussian):
    with pytest.warns(UserWarning, match="max_nfe"):
        made = log_likelihood(gaussian, points(None), max_nfe=20)
    assert not made.success
    with pytest.warns(UserWarning, match="max_nfe"):
        assert not adaptive(gaussian, points(None), max_nfe=9).success


# -- the command ---------------------------------------------------------------------------------------------------------


def test_the_command_reports_what_the_library_makes(tmp_path, capsys):
    model = tiny_model.write(tmp_path / "model")
    net = fastode.load(model)
    side = net.sample_shape[-1]
    pixels = np.random.default_rng(0).integers(0, 256, (5, side, side, net.sample_shape[0]), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", images=pixels, labels=np.array([0, 1, 0, 1, 0], dtype=np.uint8))
    out = tmp_path / "runs" / "bpd.json"
    arguments = ["--model", model, "--data", tmp_path / "data.npz", "--count", 4, "--batch", 3, "--out", out]
    arguments += ["--method", "rk4", "--steps", 4, "--given-labels"]
    assert main(["likelihood", *map(str, arguments)]) == 0
    report = json.loads(out.read_text())
    x = dequantise(torch.from_numpy(pixels[:4]).permute(0, 3, 1, 2), seeds=range(4))
    times = fastode.schedules.karras(net.schedule, 4).t.flip(0)
    made = log_likelihood(net, x, seeds=range(4), times=times, method="rk4", class_labels=[0, 1, 0, 1])
    # a network of another batch size sums in another order, in float32
    assert np.allclose(report["each"], made.bits_per_dim().numpy(), rtol=1e-4)
    assert report["nfe"] == 16 and report["images"] == 4
    assert "over 4 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "0"], "count: must be at least 1"),
        (["--out", "x.txt"], "out: must end in .json"),
        (["--trace", "none", "--count", "1"], "trace: must be one of"),
        (["--method", "euler", "--count", "1"], "method"),
    ],
)
def test_the_command_refuses(tmp_path, capsys, arguments, message):
    model = tiny_model.write(tmp_path / "model")
    side = fastode.load(model).sample_shape[-1]
    channels = fastode.load(model).sample_shape[0]
    np.savez(tmp_path / "data.npz", images=np.zeros((2, side, side, channels), dtype=np.uint8))
    assert main(["likelihood", "--model", str(model), "--data", str(tmp_path / "data.npz"), *arguments]) == 2
    assert message in capsys.readouterr().err
