"""Converged solutions: equal to closed-form flows, kept on disk under the right name; and the error of every single step."""

import math

import pytest
import torch
from torch import Tensor, nn

import fastode
from fastode.denoisers import Denoiser, Gaussian
from fastode.evaluate.reference import Converged, NotConvergedError
from fastode.evaluate.truncation import local_errors, plane
from fastode.program import Program
from fastode.schedules import EDM, Flow, VPLinear, karras, log_snr, time_uniform
from fastode.schedules.grid import Level
from fastode.solvers import SOLVERS


class Module(nn.Module):
    """A Gaussian whose mean is a buffer, so that it has weights to tell it by."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.3, -0.5, 0.0, 1.0]).double() + shift)
        self.calls = 0

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.calls += len(x)
        return Gaussian(self.mean, torch.tensor([0.25, 0.05, 1.0, 0.6]))(x, sigma)


class FlowModule(Module):
    """The same as an x0 network in the frame of a flow, also at pure noise, where it knows nothing but the mean."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = t.reshape(-1, 1).double().clamp(max=1 - 1e-12)
        v = torch.tensor([0.25, 0.05, 1.0, 0.6]).double()
        gain = v * (1 - t) / (v * (1 - t) ** 2 + t**2)
        return (self.mean + gain * (x - (1 - t) * self.mean)).to(x)


def model(schedule=None, **kw) -> Denoiser:
    if isinstance(schedule, Flow):
        return Denoiser(FlowModule(**kw), "x0", schedule, sample_shape=(4,), name="gaussian")
    return Denoiser(Module(**kw), "denoised", schedule or EDM(), sample_shape=(4,), name="gaussian")


def exact(d: Denoiser, seeds, high: float, low: float) -> Tensor:
    x = fastode.noise.normal(torch.tensor(list(seeds)), 0, (4,), dtype=torch.float64) * high
    return Gaussian(d.network.mean, torch.tensor([0.25, 0.05, 1.0, 0.6])).flow(x, high, low)


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def test_solution_is_the_flow_within_the_bound():
    d = model()
    one = Converged(d)
    check = one.check(range(6), bound=0.002)
    error = rms(one.solve(range(6), steps=check.steps) - exact(d, range(6), 80, 0.002))
    assert check.change < 0.002 and error < 0.002
    assert check.steps == 32 or one.check(range(6), bound=0.002, steps=check.steps // 2).steps == check.steps
    tight = one.check(range(6), bound=2e-5)
    assert tight.steps > check.steps  # halving until it is converged
    assert rms(one.solve(range(6), steps=tight.steps) - exact(d, range(6), 80, 0.002)) < 2e-5
    with pytest.raises(NotConvergedError, match=r"bound: 64 steps and 128 differ by .*not less than 1e-09"):
        one.check(range(2), bound=1e-9, limit=64)


def test_kept_on_disk_by_weights_seeds_and_steps(tmp_path):
    d = model()
    one = Converged(d, cache=tmp_path)
    first = one.solve([3, 1], steps=8)
    assert one.evaluations == 16 and d.network.calls == 16
    again = Converged(d, cache=tmp_path)
    assert torch.equal(again.solve([3, 1], steps=8), first) and again.evaluations == 0 and d.network.calls == 16
    for other in (lambda: again.solve([1, 3], steps=8), lambda: again.solve([3, 1], steps=9)):
        before = again.evaluations
        other()
        assert again.evaluations > before
    changed = Converged(model(shift=0.5), cache=tmp_path)
    assert rms(changed.solve([3, 1], steps=8) - first) > 0.1
    assert not [p for p in tmp_path.iterdir() if p.suffix != ".safetensors"]
    for path in tmp_path.iterdir():  # a damaged file is made again
        path.write_bytes(path.read_bytes()[:40])
    assert torch.equal(Converged(d, cache=tmp_path).solve([3, 1], steps=8), first)


def test_functions_without_weights_are_not_kept(tmp_path):
    d = Denoiser(Gaussian(torch.zeros(4)), "denoised", sample_shape=(4,))
    Converged(d, cache=tmp_path).solve([0], steps=4)
    assert not list(tmp_path.iterdir())


def test_batches_do_not_matter():
    d = model()
    whole = Converged(d).solve(range(7), steps=8)
    assert torch.equal(Converged(d, batch=3).solve(range(7), steps=8), whole)


@pytest.mark.parametrize("schedule", [EDM(), VPLinear(), Flow()], ids=["edm", "vp", "flow"])
def test_trajectory_at_any_level(schedule):
    """Between the nodes as good as at them: the flow in closed form, read in the frame of the level."""
    d = model(schedule)
    way = Converged(d).trajectory(range(5), steps=96)
    high, low = float(way.grid.sigmas[0]), float(way.grid.sigmas[-1])
    if math.isinf(high):  # from pure noise there is no finite start: compare from the first node on
        high = float(way.grid.sigmas[1])
        start = way.states[1] / float(way.grid.alpha[1])
        assert torch.equal(way.at(way.grid[0]), way.states[0])
    else:
        start = way.states[0] / float(way.grid.alpha[0])
    gaussian = Gaussian(d.network.mean, torch.tensor([0.25, 0.05, 1.0, 0.6]))
    low = max(low, 1e-3)
    for share in (0.0, 0.013, 0.31, 0.5, 0.77, 0.997, 1.0):
        sigma = math.exp(math.log(high) * (1 - share) + math.log(low) * share)
        want = gaussian.flow(start, high, sigma)
        made = way.at(Level(0.5, 0.5 * sigma, None)) / 0.5
        # UniPC's own error at 96 steps, and float32 states: 1e-3 relative to the size of the state
        assert rms(made - want) < 1e-3 * rms(want), sigma


@pytest.mark.parametrize(("name", "options", "order"), [
    ("ddim", {}, 1), ("heun", {}, 2), ("dpm_solver_2", {}, 2), ("dpm_solver_pp", {"order": 2, "exact": True}, 2),
])  # fmt: skip
def test_local_errors_are_one_order_higher(name, options, order):
    """A method of order p misses by O(h^(p + 1)) in one step from exact values."""
    d = model(EDM(0.1, 10))
    way = Converged(d).trajectory(range(4), steps=256)

    def middle(steps: int) -> float:
        program = SOLVERS[name](log_snr(EDM(0.1, 10), steps), **options)
        errors = local_errors(program, lambda x, s: d.denoise(x, s.level), way)
        assert errors is not None and len(errors) == steps
        return errors[steps // 2 - 1]  # the step that ends at the same level for all

    slopes = [math.log2(middle(n) / middle(2 * n)) for n in (8, 16)]
    assert slopes[-1] == pytest.approx(order + 1, abs=0.3)


def test_local_errors_of_exact_and_of_random_programs():
    """A single-step method's first error is its global one; programs that draw noise have none."""
    d = model()
    way = Converged(d).trajectory(range(3), steps=128)
    grid = karras(EDM(), 5)
    errors = local_errors(SOLVERS["ddim"](grid), lambda x, s: d.denoise(x, s.level), way)
    result = fastode.sample(d, seeds=range(3), solver="ddim", grid=grid, return_trajectory=True)
    assert errors[0] == pytest.approx(rms(result.states[1] - way.at(grid[1])), rel=1e-3)
    assert errors[-1] != pytest.approx(rms(result.states[-1] - way.at(grid[-1])), rel=1e-2)
    noisy = SOLVERS["ddim"](grid, eta=1.0)
    assert local_errors(noisy, lambda x, s: x, way) is None
    zero = SOLVERS["edm"](karras(EDM(), 4, final="zero"))
    assert len(local_errors(zero, lambda x, s: d.denoise(x, s.level), way)) == 4
    assert isinstance(zero, Program)


def test_principal_plane():
    t = torch.linspace(1, 0, 20).double()
    flat = torch.stack([t, 0.1 * t * (1 - t), 0 * t, 0 * t], 1) @ torch.linalg.qr(torch.randn(4, 4).double())[0]
    directions, variance = plane(flat)
    assert float(variance[:2].sum()) == pytest.approx(1, abs=1e-12)
    assert torch.allclose(directions @ directions.T, torch.eye(2).double(), atol=1e-12)
    along = (flat - flat[-1]) @ directions.T
    assert along[0, 0] > 0 and along[:, 1].sum() >= 0
    d = model(time_uniform(VPLinear(), 2).schedule)
    assert d.schedule == VPLinear()
