"""The adaptive driver: scipy's steps exactly, adaptive DPM-Solver's loop, closed-form flows, independence of samples."""

import math

import pytest
import torch

import fastode
from fastode.denoisers import Gaussian
from fastode.drivers import PI, PID, adaptive
from fastode.drivers.embedded import TABLEAUS, Clock, Tableau
from fastode.schedules import EDM, VE, Cosine, Discrete, Flow, SubVP, VPLinear, karras
from tests.conftest import relative
from tests.papers import dpm_adaptive

SCHEDULES = {
    "edm": EDM(),
    "ve": VE(),
    "vp": VPLinear(),
    "subvp": SubVP(),
    "cosine": Cosine(),
    "flow": Flow(t_max=0.999, t_min=0.001),
    "discrete": Discrete.linear(),
}


@pytest.fixture(params=SCHEDULES)
def schedule(request):
    return SCHEDULES[request.param]


def begin(schedule, batch=3, d=4, dtype=torch.float64):
    g = torch.Generator().manual_seed(5)
    z = torch.randn(batch, d, generator=g, dtype=torch.float64)
    return (float(schedule.sigma(schedule.t_start)) * z + 0.1 * float(schedule.alpha(schedule.t_start))).to(dtype)


def exact(data, schedule, x):
    first, last = schedule.t_start, schedule.t_end
    y = data.flow(x.double() / schedule.alpha(first), float(schedule.rho(first)), float(schedule.rho(last)))
    return schedule.alpha(last) * y


def test_steps_are_those_of_scipy(gaussian, schedule):
    """With scipy's controller (beta = 0) and norm, our driver makes the same decisions from start to end."""
    pytest.importorskip("scipy")
    x = begin(schedule)
    theirs = adaptive(gaussian, x, schedule=schedule, method="scipy")
    ours = adaptive(gaussian, x, schedule=schedule, norm="batch", controller=PI(beta=0))
    assert torch.equal(ours.nfe, theirs.nfe) and torch.equal(ours.accepted, theirs.accepted)
    assert torch.equal(ours.rejected, theirs.rejected) and int(ours.rejected[0] + ours.accepted[0]) == len(ours.trials)
    # the same steps up to the rounding of the step size, to which a solution of tolerance 1e-5 is not sensitive
    assert relative(ours.samples, theirs.samples) < 1e-8


@pytest.mark.parametrize(("order", "h"), [(2, 0.05), (3, 0.05), (3, 30.0)])
def test_dpm_solver_equals_the_paper(mixture, order, h):
    """Same decisions and same states as the plain loop; its norm couples the batch, so norm="batch". A first step of 30 is
    cut at the end and rejected, and what shrinks then is the 30."""
    x = 80 * torch.randn(3, 6, dtype=torch.float64)

    def denoise(y, alpha, sigma):
        return mixture(torch.from_numpy(y) / alpha, sigma / alpha).numpy()

    truth, accepted, rejected = dpm_adaptive.sample(denoise, x.numpy(), 80.0, 0.002, order=order, h_init=h)
    run = adaptive(mixture, x, method=f"dpm_solver_{order - 1}{order}", norm="batch", h_init=h)
    assert (int(run.accepted[0]), int(run.rejected[0])) == (accepted, rejected)
    assert rejected > 0  # else nothing was decided
    # a rejected attempt and the next share their first evaluation: one less than the plain loop each time
    assert int(run.nfe[0]) == order * (accepted + rejected) - rejected
    # 20 steps of float64; each rounding is multiplied by e^h, and step sizes come from errors: 4e-10 seen
    assert relative(run.samples, torch.from_numpy(truth)) < 1e-8


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "heun_euler", "dpm_solver_23", "scipy", "torchdiffeq"])
def test_converges_with_the_tolerance(gaussian, schedule, method):
    """Against the closed form: the error falls with the tolerance, by at least the square root of it."""
    if method in ("scipy", "torchdiffeq"):
        pytest.importorskip(method)
        if isinstance(schedule, (Cosine, VE, EDM)):
            return
    x = begin(schedule)
    truth = exact(gaussian, schedule, x)
    coarse, fine = (1e-2, 1e-4) if method in ("heun_euler", "dpm_solver_23") else (1e-3, 1e-6)
    errors = []
    for tol in (coarse, fine):
        run = adaptive(gaussian, x, schedule=schedule, method=method, rtol=tol, atol=tol)
        assert run.success and bool(((run.t - schedule.t_end).abs() < 1e-9).all())
        errors.append(float((run.samples - truth).abs().max()))
    # An error per step of tol adds up along the way, and grows where the flow expands: within 100 tol was seen at most 30.
    assert errors[1] < 100 * fine
    assert errors[1] < errors[0] * math.sqrt(fine / coarse)


def test_forwards_is_the_inverse(gaussian, schedule):
    x = begin(schedule)
    down = adaptive(gaussian, x, schedule=schedule, rtol=1e-9, atol=1e-9).samples
    up = adaptive(
        gaussian, down, schedule=schedule, t_start=schedule.t_end, t_end=schedule.t_start, rtol=1e-9, atol=1e-9
    )
    # going up the flow stretches errors by the ratio of the spreads at both ends: at most 157 / 0.2 for VP and EDM
    assert relative(up.samples, x) < 1e-5


def test_a_sample_does_not_depend_on_its_batch(gaussian):
    """norm="each": the same steps, the same numbers, alone and beside harder samples; bitwise for elementwise denoisers."""
    x = begin(EDM(), 5, dtype=torch.float32)
    x[3] *= 5  # another difficulty, so that the others would share its steps if they were coupled
    for method in ("dopri5", "dpm_solver_23"):
        together = adaptive(gaussian, x, method=method, rtol=1e-3, atol=1e-3)
        assert len(set(together.accepted.tolist())) > 1 or method == "dopri5"
        for i in (0, 3):
            alone = adaptive(gaussian, x[i : i + 1], method=method, rtol=1e-3, atol=1e-3)
            assert torch.equal(alone.samples[0], together.samples[i])
            assert alone.nfe[0] == together.nfe[i] and alone.rejected[0] == together.rejected[i]
    shared = [adaptive(gaussian, x[: 4 - k], norm="batch", rtol=1e-3, atol=1e-3).samples[0] for k in (0, 3)]
    assert not torch.equal(*shared)  # the published norm does couple


def test_norms_agree_for_one_sample(gaussian):
    x = begin(VPLinear(), 1)
    runs = [adaptive(gaussian, x, schedule=VPLinear(), norm=n) for n in ("each", "sample", "batch")]
    assert all(torch.equal(r.samples, runs[0].samples) for r in runs)


@pytest.mark.parametrize(("name", "order"), [("dopri5", 5), ("bosh3", 3), ("heun_euler", 2), ("rk4", 4)])
def test_order_at_fixed_steps(gaussian, name, order):
    """Fixed steps in VP time between two smooth levels."""
    clock, ends = VPLinear(), (0.6, 0.2)
    x = begin(clock)
    y = gaussian.flow(x / clock.alpha(ends[0]), float(clock.rho(ends[0])), float(clock.rho(ends[1])))
    truth, errors = y * clock.alpha(ends[1]), []
    for steps in (8, 16):
        times = torch.linspace(*ends, steps + 1, dtype=torch.float64)
        run = adaptive(gaussian, x, schedule=clock, times=times, method=name)
        stages = TABLEAUS[name].stages
        assert int(run.nfe[0]) == (1 + (stages - 1) * steps if TABLEAUS[name].fsal else stages * steps)
        errors.append(float((run.samples - truth).abs().max()))
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.4  # slopes of 8 to 16 steps: 0.25 off at most


def test_wrong_tableaus_are_refused():
    with pytest.raises(ValueError, match="sums to"):
        Tableau("x", (0.0, 0.5), ((), (0.4,)), (0.0, 1.0), (-1.0, 1.0), 2, 2, False)
    with pytest.raises(ValueError, match="weights must sum"):
        Tableau("x", (0.0, 0.5), ((), (0.5,)), (0.0, 0.9), (-1.0, 1.0), 2, 2, False)


def test_velocity_equals_score_sde():
    """a x + b D is f x - g^2/2 score with the f and g of the paper (card score_sde, section 1)."""
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    x, d = torch.tensor(0.7, dtype=torch.float64), torch.tensor(-0.4, dtype=torch.float64)
    for schedule in (VPLinear(), SubVP(), VE()):
        alpha, sigma, a, b = Clock(schedule).levels(t)
        score = (alpha * d - x) / sigma**2
        if isinstance(schedule, VE):
            f, g2 = 0.0, sigma**2 * 2 * math.log(50.0 / 0.01)
        else:
            beta = 0.1 + t * 19.9
            ell = -(t**2) * 19.9 / 4 - t * 0.05
            f, g2 = -beta / 2, beta * (-torch.expm1(4 * ell) if isinstance(schedule, SubVP) else 1.0)
        assert torch.allclose(a * x + b * d, f * x - g2 / 2 * score, rtol=1e-12, atol=1e-12)


def test_flow_from_pure_noise_to_data(gaussian):
    """A flow starts at alpha = 0 and ends at sigma = 0: the last step is a denoise from t = 0.001."""

    def velocity(x, t):
        t = t.reshape(-1, 1)
        mean = gaussian.mean.to(x)
        v = gaussian.variances.to(x)
        alpha, var = 1 - t, (1 - t) ** 2 * v + t**2
        d = mean + alpha * v / var * (x - alpha * mean)
        return (x - d) / t

    x = torch.randn(3, 4, dtype=torch.float64)
    net = fastode.Denoiser(velocity, "flow")
    for norm in ("each", "batch"):
        run = adaptive(net, x, rtol=1e-8, atol=1e-8, norm=norm)
        truth = gaussian.mean + gaussian.variances.sqrt() * x
        # Euler's last step of 0.001: its error is t^2 over the spread, 1e-6 / 0.22
        assert float((run.samples - truth).abs().max()) < 2e-5


def test_evaluations_are_counted(gaussian):
    calls = []

    def counted(x, sigma):
        calls.append(len(x))
        return gaussian(x, sigma)

    x = begin(EDM(), 3)
    for method in ("dopri5", "heun_euler", "dpm_solver_12"):
        for norm in ("each", "batch"):
            calls.clear()
            run = adaptive(counted, x, method=method, norm=norm, rtol=1e-2, atol=1e-2, denoise=True)
            assert sum(calls) == int(run.nfe.sum())
    assert "accepted" in run.report() and str(int(run.nfe.max())) in run.report()


def test_conditions_and_guidance_follow_their_samples():
    """Labels and strengths of the samples that still run; the guided D is the sum of both estimates."""
    means = torch.tensor([-1.0, 0.0, 1.0])

    def network(x, sigma, class_labels=None):
        mean = means[class_labels].to(x).reshape(-1, 1)
        v = 0.2
        return mean + v / (v + torch.as_tensor(sigma, dtype=x.dtype) ** 2) * (x - mean)

    net = fastode.Denoiser(network, "denoised", num_classes=2, null_label=2)
    x = begin(EDM(), 3)
    scale = torch.tensor([1.0, 2.0, 3.0])
    labels = [0, 1, 0]
    run = adaptive(net, x, class_labels=labels, guidance_scale=scale, rtol=1e-7, atol=1e-7)
    mean = means[2] + scale.double() * (means[labels].double() - means[2])
    for i in range(3):
        data = Gaussian(torch.full((4,), float(mean[i])), 0.2)  # guidance is linear: another Gaussian
        assert relative(run.samples[i : i + 1], data.flow(x[i : i + 1], 80.0, 0.002)) < 1e-4


def test_bounds_stop_the_run_and_say_so(gaussian):
    x = begin(EDM())
    with pytest.warns(UserWarning, match="within 20 evaluations"):
        run = adaptive(gaussian, x, max_nfe=20)
    assert not run.success and "max_nfe" in run.message and float(run.t.max()) > 0.002 and int(run.nfe.max()) <= 20

    def noisy(y, sigma):  # no step is small enough for an estimate that jumps
        return gaussian(y, sigma) + (torch.sign(torch.sin(1e6 * y)) if float(torch.as_tensor(sigma).max()) < 40 else 0)

    with pytest.warns(UserWarning, match="cannot be met|max_nfe"):
        run = adaptive(noisy, x[:1], rtol=0.0, atol=1e-13, max_nfe=600)
    assert not run.success and 0.002 < float(run.t) < 80


def test_a_network_that_fails_is_named(gaussian):
    def broken(x, sigma):
        return gaussian(x, sigma) * (math.nan if float(torch.as_tensor(sigma).max()) < 10 else 1)

    with pytest.raises(ValueError, match="NaN or Inf at sigma"):
        adaptive(broken, begin(EDM()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rtol": -1.0}, "rtol"),
        ({"rtol": 0.0, "atol": 0.0}, "rtol, atol: one of them"),
        ({"atol": math.inf}, "atol"),
        ({"method": "rk45"}, "method: must be one of"),
        ({"norm": "all"}, "norm"),
        ({"max_nfe": 0}, "max_nfe"),
        ({"h_init": -1.0}, "h_init"),
        ({"t_end": 0.0}, "t_end: the flow needs"),
        ({"t_start": 1.0, "t_end": 1.0}, "must differ"),
        ({"t_start": math.nan}, "t_start"),
        ({"times": [3.0, 1.0, 2.0]}, "times: must increase or decrease"),
        ({"times": [3.0, 1.0], "t_end": 0.5}, "times: brings its own"),
        ({"times": [3.0, 1.0], "method": "scipy"}, "method: fixed steps"),
        ({"class_labels": [0, 1, 2]}, "class_labels"),
        ({"guidance_scale": 2.0}, "guidance_scale"),
    ],
)
def test_bad_input(gaussian, options, message):
    with pytest.raises(ValueError, match=message):
        adaptive(gaussian, begin(EDM()), **options)


def test_bad_types(gaussian):
    with pytest.raises(TypeError, match="controller"):
        adaptive(gaussian, begin(EDM()), controller=3)
    with pytest.raises(TypeError, match="schedule"):
        adaptive(gaussian, begin(EDM()), schedule="vp")
    with pytest.raises(TypeError, match="x: must be floating"):
        adaptive(gaussian, torch.ones(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="x: give the state"):
        adaptive(gaussian)
    with pytest.raises(ValueError, match="safety"):
        PID(safety=0)
    with pytest.raises(ValueError, match="beta"):
        PI(beta=1.0)


def test_fixed_steps_on_a_grid_are_heun(gaussian):
    """The program of Heun's method on the same levels, in the EDM frame."""
    grid = karras(EDM(), 12)
    x = begin(EDM())
    run = adaptive(gaussian, x, times=grid, method="heun_euler")
    assert relative(run.samples, fastode.sample(gaussian, x, solver="heun", grid=grid)) < 1e-12
