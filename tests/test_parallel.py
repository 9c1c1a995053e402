"""ParaDiGMS: the published loop pass by pass, the sequential sampler at tolerance 0, and honest accounts."""

import math
import os
import warnings

import pytest
import torch

import fastode
from fastode.drivers.parallel import Cost, Parallel
from fastode.schedules import EDM, Discrete, VPLinear, karras, linspace, time_uniform
from tests.conftest import VARIANTS, make_grid, relative, start, variant_id
from tests.papers import paradigms

DOUBLE = torch.float64


def loop(denoiser, grid, x, **options):
    def denoise(y, alpha, sigma):
        return denoiser(torch.from_numpy(y) / alpha, sigma / alpha).numpy()

    return paradigms.sample(denoise, x.numpy(), grid.alpha.tolist(), grid.sigma.tolist(), **options)


@pytest.mark.parametrize("tau", [0.5, 0.1, 1e-3])
@pytest.mark.parametrize("window", [1, 5, 30])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_equals_the_published_loop(mixture, tau, window, eta):
    """Same passes, same evaluations, same samples, for DDIM and for DDPM with given noise."""
    grid = make_grid("vp", 30)
    x = start(grid, (3, 6))
    noise = [torch.randn(3, 6, dtype=DOUBLE) for _ in range(30)] if eta else None
    arrays = [z.numpy() for z in noise] if noise else None
    truth, passes, evaluations = loop(mixture, grid, x, window=window, tau=tau, noise=arrays)
    program = fastode.SOLVERS["ddim"](grid, eta=eta)
    options = {"window": window, "tolerance": tau, "response": "increments", "fill": "copy", "dtype": DOUBLE}
    run = Parallel(program, mixture, (3, 6), **options)(x, noise=noise)
    assert (run.sweeps, run.evaluations) == (passes, evaluations)
    assert relative(run.samples, torch.from_numpy(truth)) < 1e-12  # sums of 30 increments of float64


@pytest.mark.parametrize("case", VARIANTS, ids=variant_id)
def test_tolerance_zero_is_the_sequential_sampler(gaussian, case):
    """Bit for bit, multistep history included: a settled point is the very number that was evaluated."""
    name, options = case
    grid = make_grid("edm", 5)
    program = fastode.SOLVERS[name](grid, **options)
    x = start(grid, (2, 4), dtype=torch.float32)
    noise = [torch.randn(2, 4) for _ in range(program.draws)]
    truth = fastode.Engine(program, gaussian, (2, 4), "reference")(x, noise=noise)
    for window in (3, program.nfe):
        run = Parallel(program, gaussian, (2, 4), window=window, tolerance=0.0)(x, noise=noise)
        assert torch.equal(run.samples, truth)
        assert run.sweeps <= program.nfe and run.converged


@pytest.mark.parametrize("response", ["gaussian", "data", "noise", "increments", 0.7])
@pytest.mark.parametrize("kind", ["vp", "flow", "zero", "flow_full"])
def test_the_fixed_point_does_not_depend_on_the_response(gaussian, response, kind):
    grid = make_grid(kind, 6)
    x = start(grid, (2, 4), dtype=torch.float32)
    denoiser = gaussian
    if kind == "flow_full":  # alpha = 0 first: x0 prediction works there, and any smooth function will do
        denoiser = fastode.Denoiser(
            lambda y, t: 0.3 * torch.tanh(y) * (1 - t.reshape(-1, 1)), "x0", fastode.schedules.Flow()
        )
    for fill in ("predict", "copy"):
        for name in ("ddim", "dpm_solver_pp", "heun"):
            program = fastode.SOLVERS[name](grid)
            truth = fastode.Engine(program, denoiser, (2, 4), "reference")(x)
            run = Parallel(program, denoiser, (2, 4), window=4, tolerance=0.0, response=response, fill=fill)(x)
            assert torch.equal(run.samples, truth)


def test_a_window_of_one_is_sequential_at_any_tolerance(gaussian):
    grid = make_grid("edm", 8)
    x = start(grid, (2, 4), dtype=torch.float32)
    program = fastode.SOLVERS["dpm_solver_pp"](grid)
    for tau in (0.0, 10.0):
        run = Parallel(program, gaussian, (2, 4), window=1, tolerance=tau)(x)
        assert run.sweeps == run.evaluations == 8 and run.strides == (1,) * 8
        assert torch.equal(run.samples, fastode.Engine(program, gaussian, (2, 4), "reference")(x))


@pytest.mark.parametrize("name", ["ddim", "dpm_solver_pp", "unipc"])
def test_error_falls_with_the_tolerance(mixture, name):
    """Also for multistep solvers, where the published code drops to first order and the error grows."""
    grid = make_grid("vp", 40)
    x = start(grid, (2, 6))
    program = fastode.SOLVERS[name](grid)
    truth = fastode.sample(mixture, x, solver=name, grid=grid)
    runs = [Parallel(program, mixture, (2, 6), tolerance=tau, dtype=DOUBLE)(x) for tau in (0.3, 1e-2, 1e-4, 1e-9)]
    errors = [relative(run.samples, truth) for run in runs]
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] < 1e-8
    assert runs[0].sweeps < runs[2].sweeps < 40  # it does take fewer sweeps than steps


def test_order_survives(gaussian):
    """Steps T and 2T at tolerance 1e-9: the error falls by 2 for DDIM and by 4 for 2M; the published 2M shows 2."""
    schedule = VPLinear()
    ratios = {}
    for name in ("ddim", "dpm_solver_pp"):
        errors = []
        for steps in (20, 40):
            grid = time_uniform(schedule, steps)
            x = start(grid, (2, 4))
            flow = gaussian.flow(x / grid.alpha[0], float(grid.sigmas[0]), float(grid.sigmas[-1])) * grid.alpha[-1]
            program = fastode.SOLVERS[name](grid)
            made = Parallel(program, gaussian, (2, 4), window=10, tolerance=1e-9, dtype=DOUBLE)(x).samples
            errors.append(float((made - flow).abs().max()))
        ratios[name] = errors[0] / errors[1]
    assert 1.6 < ratios["ddim"] < 2.5 and 3.0 < ratios["dpm_solver_pp"] < 6.0


def test_after_k_sweeps_k_points_are_exact(mixture):
    """The prefix property: without sliding by tolerance the front is exact, what lies behind it is not."""
    grid = make_grid("edm", 8)
    x = start(grid, (2, 6))
    seen = []

    def watched(y, sigma):
        seen.append((y.clone(), torch.as_tensor(sigma).reshape(-1)))
        return mixture(y, sigma)

    program = fastode.SOLVERS["dpm_solver_pp"](grid)
    states = fastode.Engine(program, mixture, (2, 6), "reference", dtype=DOUBLE)(x, return_trajectory=True).states
    Parallel(program, watched, (2, 6), tolerance=0.0, dtype=DOUBLE)(x)
    for k in range(1, 4):  # sweep k starts at point k, whose first k predecessors are settled
        y, _ = seen[k]
        assert relative(y[:2], states[k]) < 1e-13  # the front of the window
        assert relative(y[2:4], states[k + 1]) > 1e-9  # the point behind it


def test_the_accounts_are_the_calls(gaussian):
    rows = []

    def counted(y, sigma):
        rows.append(len(y))
        return gaussian(y, sigma)

    program = fastode.SOLVERS["ddim"](make_grid("edm", 20))
    run = Parallel(program, counted, (3, 4), window=6, tolerance=0.1)(seeds=None, x=start(program.grid, (3, 4)).float())
    assert len(rows) == run.sweeps == len(run.strides) and sum(rows) == 3 * run.evaluations
    assert sum(run.strides) == run.sequential == 20 and run.depth == 20 / run.sweeps


def test_noise_is_drawn_once_and_belongs_to_the_seeds(gaussian):
    """DDPM: every sweep sees the same noise, that of the sequential run; fresh noise would be another sample."""
    net = fastode.Denoiser(gaussian, "denoised", sample_shape=(4,))
    program = fastode.SOLVERS["ddim"](make_grid("edm", 12), eta=1.0)
    truth = fastode.Engine(program, net, (2, 4), "reference")(seeds=[5, 9])
    made = Parallel(program, net, (2, 4), window=5, tolerance=0.0)
    assert torch.equal(made(seeds=[5, 9]).samples, truth)
    assert not torch.equal(made(seeds=[5, 10]).samples[1], truth[1])
    assert torch.equal(made(seeds=[5, 10]).samples[0], truth[0])


def test_the_last_step_is_the_programs_own(mixture):
    """A table that ends at label 0 and not at alpha = 1: the published code ends elsewhere than its sequential sampler."""
    grid = linspace(Discrete.linear(), 10, final="sigma_min")
    x = start(grid, (2, 6))
    assert float(grid.alpha[-1]) < 1
    program = fastode.SOLVERS["ddim"](grid)
    made = Parallel(program, mixture, (2, 6), tolerance=1e-9, dtype=DOUBLE)(x).samples
    assert relative(made, fastode.sample(mixture, x, solver="ddim", grid=grid)) < 1e-7


def test_labels_and_guidance():
    means = torch.tensor([-1.0, 1.0, 0.0])

    def network(x, sigma, class_labels=None):
        mean = means[class_labels].to(x).reshape(-1, 1)
        return mean + 0.2 / (0.2 + torch.as_tensor(sigma, dtype=x.dtype) ** 2) * torch.tanh(x - mean)

    net = fastode.Denoiser(network, "denoised", num_classes=2, null_label=2)
    guidance = fastode.Guidance(interval=(0.1, 10.0))
    program = fastode.SOLVERS["dpm_solver_pp"](make_grid("edm", 8))
    x = start(program.grid, (3, 4), dtype=torch.float32)
    call = {"class_labels": [0, 1, 0], "guidance_scale": [1.0, 2.0, 3.0]}
    truth = fastode.Engine(program, net, (3, 4), "reference", guidance=guidance)(x, **call)
    made = Parallel(program, net, (3, 4), tolerance=0.0, guidance=guidance)(x, **call)
    assert relative(made.samples, truth) < 1e-6  # float32 sums of the guided pair in another order


def test_a_window_that_does_not_fit_shrinks_with_a_warning(gaussian):
    def small(y, sigma):
        if len(y) > 8:
            raise torch.OutOfMemoryError("out of memory")
        return gaussian(y, sigma)

    program = fastode.SOLVERS["ddim"](make_grid("edm", 10))
    x = start(program.grid, (2, 4), dtype=torch.float32)
    with pytest.warns(UserWarning, match="do not fit into memory") as said:
        run = Parallel(program, small, (2, 4), tolerance=0.0)(x)
    assert [str(w.message)[-1] for w in said] == ["5", "2"]
    assert run.window == 2
    assert torch.equal(run.samples, fastode.Engine(program, gaussian, (2, 4), "reference")(x))

    def never(y, sigma):
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        Parallel(program, never, (2, 4), window=1)(x)


def test_a_bound_on_sweeps_stops_and_says_so(mixture):
    program = fastode.SOLVERS["ddim"](make_grid("edm", 30))
    x = start(program.grid, (2, 6))
    sampler = Parallel(program, mixture, (2, 6), tolerance=1e-12, max_sweeps=3, dtype=DOUBLE)
    with pytest.warns(UserWarning, match="was not met within max_sweeps = 3"):
        run = sampler(x)
    assert not run.converged and run.sweeps == 3
    truth = fastode.sample(mixture, x, solver="ddim", grid=program.grid)
    assert relative(run.samples, truth) < 2  # a guess, but of the right size


def test_the_cost_model():
    """Predictions are arithmetic on what was measured."""
    free = Cost(call=1.0, window_call=1.0, overhead=0.0, window=100, sweeps=10, evaluations=400, steps=100)
    assert free.speedup == pytest.approx(10) and free.pays  # batching is free: the depth
    linear = Cost(call=1.0, window_call=100.0, overhead=0.0, window=100, sweeps=10, evaluations=400, steps=100)
    assert linear.speedup == pytest.approx(100 / 400) and not linear.pays  # time per row: the work
    alone = Cost(call=1.0, window_call=1.0, overhead=0.5, window=1, sweeps=100, evaluations=100, steps=100)
    assert alone.speedup == pytest.approx(1 / 1.5)
    assert "does not pay" in str(linear) and "10.00x" in str(free)


@pytest.mark.parametrize(("per_call", "per_row"), [(1.0, 0.0), (0.0, 1.0)])
def test_auto_obeys_the_cost_model(monkeypatch, per_call, per_row):
    """On a clock that only network calls move: free batching pays as much as it saves depth, time per row does not pay."""
    now = [0.0]
    monkeypatch.setattr("fastode.drivers.parallel.time.perf_counter", lambda: now[0])

    def network(y, sigma):
        now[0] += per_call + per_row * len(y)
        return y / (1 + torch.as_tensor(sigma) ** 2) + 0.1 * torch.sin(y)

    program = fastode.SOLVERS["ddim"](make_grid("edm", 24))
    x = start(program.grid, (1, 4), dtype=torch.float32)
    sampler = Parallel(program, network, (1, 4), mode="auto")
    cost = sampler.warmup(x)
    pays = per_row == 0
    assert cost.pays == pays
    assert cost.speedup == pytest.approx(24 / (cost.sweeps if pays else cost.evaluations))
    run = sampler(x)
    assert run.parallel == pays and run.sweeps == (cost.sweeps if pays else 24)
    assert run.seconds == pytest.approx(cost.parallel if pays else cost.sequential)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window"),
        ({"window": 2.5}, "window"),
        ({"tolerance": -0.1}, "tolerance"),
        ({"tolerance": math.nan}, "tolerance"),
        ({"max_sweeps": 0}, "max_sweeps"),
        ({"mode": "fast"}, "mode"),
        ({"fill": "zero"}, "fill"),
        ({"response": "model"}, "response: must be one of"),
        ({"response": 0.0}, "response: the data's variance"),
        ({"group": True}, "group: torch.distributed"),
    ],
)
def test_bad_input(gaussian, options, message):
    with pytest.raises(ValueError, match=message):
        Parallel(fastode.SOLVERS["ddim"](make_grid("edm")), gaussian, (2, 4), **options)


def test_bad_calls(gaussian):
    program = fastode.SOLVERS["ddim"](make_grid("edm"), eta=1.0)
    sampler = Parallel(program, gaussian, (2, 4))
    with pytest.raises(ValueError, match="built for shape"):
        sampler(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="noise: this program makes"):
        sampler(torch.zeros(2, 4), noise=[torch.zeros(2, 4)])
    with pytest.raises(ValueError, match="noise: draw 0 must have shape"):
        sampler(torch.zeros(2, 4), noise=lambda k: torch.zeros(2, 5))
    with pytest.raises(TypeError, match="program"):
        Parallel("ddim", gaussian, (2, 4))
    with pytest.raises(ValueError, match="shape"):
        Parallel(program, gaussian, (2,))


def test_programs_that_look_at_their_numbers_are_refused(gaussian):
    from fastode.program import Trace

    grid = karras(EDM(), 3)
    p = Trace(grid)
    x = p.start()
    for _, s, t in grid.windows():
        d = p.denoise(x, s)
        x = p.land(t.sigma / s.sigma * x + (1 - t.sigma / s.sigma) * d / (1 + 0 * p.norm(d)), t)
    with pytest.raises(ValueError, match="makes numbers in the run"):
        Parallel(p.program(x), gaussian, (2, 4))


# -- two processes -------------------------------------------------------------------------------------------------------


def worker(rank, path, folder):
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    from fastode.denoisers import Gaussian

    rows = []

    def counted(y, sigma):
        rows.append(len(y))
        if rank == 1 and len(y) > 6:  # only one of the two runs out of memory
            raise torch.OutOfMemoryError("out of memory")
        return Gaussian(torch.tensor([0.3, -0.5, 0.0, 1.0]), torch.tensor([0.25, 0.05, 1.0, 0.6]))(y, sigma)

    program = fastode.SOLVERS["dpm_solver_pp"](karras(EDM(), 9), order=3)
    x = start(program.grid, (2, 4), dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = Parallel(program, counted, (2, 4), tolerance=0.0, group=True)(x)
    torch.save(
        {"samples": run.samples, "rows": rows, "evaluations": run.evaluations}, os.path.join(folder, f"{rank}.pt")
    )
    dist.destroy_process_group()


def test_two_processes_make_one_sample(gaussian, tmp_path):
    """gloo: each evaluates its half of every window, both hold the sequential sampler's result, bit for bit."""
    context = torch.multiprocessing.get_context("spawn")
    jobs = [context.Process(target=worker, args=(r, str(tmp_path / "store"), str(tmp_path))) for r in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(120)
        assert job.exitcode == 0
    program = fastode.SOLVERS["dpm_solver_pp"](karras(EDM(), 9), order=3)
    truth = fastode.Engine(program, gaussian, (2, 4), "reference")(start(program.grid, (2, 4), dtype=torch.float32))
    made = [torch.load(tmp_path / f"{r}.pt") for r in range(2)]
    for one in made:
        assert torch.equal(one["samples"], truth)
        assert max(one["rows"]) < 2 * 9  # nobody evaluated a whole window
    # the first calls, of 5 and 4 points, were made twice: one process had no room for its share
    assert sum(made[0]["rows"]) + sum(made[1]["rows"]) >= 2 * made[0]["evaluations"]
