"""Restart: the paper's loop, its tables of settings, its contraction, and that it is one program whatever the base."""

import pytest
import torch

import fastode
from fastode import Engine, Grid
from fastode.denoisers import Gaussian
from fastode.evaluate.moments import Moments, marginal, push
from fastode.graph import Graphs
from fastode.program import Program
from fastode.schedules import EDM, Discrete, VPLinear, karras, leading, log_snr
from fastode.solvers.restart import PRESETS, restart
from tests.conftest import draws, make_grid, relative, start
from tests.papers import restart as paper
from tests.test_graph import Replayer

TWO = [(4, 2, 0.06, 0.5), (3, 1, 1.0, 9.0)]
SINGLE_STEP = ["ddim", "heun", "edm", "dpm_solver_2", "dpm_solver_3", "dpm_solver_pp_s"]
MULTISTEP = ["dpm_solver_pp", "unipc", "deis", "ipndm", "lms", "pndm", "sa_solver(tau=0)"]


def grids(kind, steps=12):
    return {
        "edm": lambda: karras(EDM(), steps),
        "zero": lambda: karras(EDM(), steps, final="zero"),
        "vp": lambda: log_snr(VPLinear(), steps),
        "ve view": lambda: Grid(karras(EDM(), steps, final="zero").sigmas, torch.linspace(1.0, 0.2, steps + 1)),
    }[kind]()


@pytest.mark.parametrize("kind", ["edm", "zero", "vp", "ve view"])
@pytest.mark.parametrize("base", ["edm", "dpm_solver_2(r=0.4)"])
@pytest.mark.parametrize("options", [{}, {"gamma": 0.05, "s_noise": 1.003}], ids=["plain", "churn"])
def test_equals_the_paper(mixture, kind, base, options):
    grid = grids(kind)
    x = start(grid, (3, 6))
    calls = []

    def denoise(y, alpha, sigma):
        calls.append(sigma)
        return mixture(torch.from_numpy(y) / alpha, sigma / alpha).numpy()

    noise = [z.numpy() for z in draws(x)]
    levels = grid.alpha.tolist(), grid.sigma.tolist()
    truth = torch.from_numpy(paper.sample(denoise, x.numpy(), *levels, noise, base=base, intervals=TWO, **options))
    for backend in ("reference", "torch"):
        run = fastode.sample(
            mixture,
            x,
            solver="restart",
            base=base,
            intervals=TWO,
            grid=grid,
            noise=draws(x),
            backend=backend,
            return_trajectory=True,
            **options,
        )
        assert relative(run.samples, truth) < 1e-12  # float64 sums of a few terms per step
        assert run.nfe == len(calls)
    text = "4,2,0.06,0.5; 3, 1, 1.0, 9.0"
    again = fastode.sample(mixture, x, solver=restart(base, intervals=text, **options), grid=grid, noise=draws(x))
    assert relative(again, truth) < 1e-12


LEVELS = {18: (19.353, 1.088, 0.585, 0.296, 0.0599), 14: (19.946, 0.823, 0.0421), 20: (0.0449,)}
LEVELS[36] = (20.239, 0.965, 0.523, 0.268, 0.0555)


@pytest.mark.parametrize("name", [n for n in PRESETS if not n.startswith("sd")])
def test_published_settings_make_their_nfe(name):
    """Every row of the paper's tables, on the grid of its network; restarts fire at the levels that the card lists."""
    preset = PRESETS[name]
    grid = preset.grid(EDM())
    program = restart(preset=name)(grid)
    assert program.nfe == int(name.split("-")[-1])
    assert len(grid) == preset.steps + 1
    sigmas = [round(s, 3) for s in program.sigmas.tolist()]
    for _, rounds, _, top in preset.intervals:  # raised by churn at or below sigma = 1
        assert sigmas.count(round(top * (1 + preset.gamma) if top <= 1 else top, 3)) >= rounds
    if "vp" not in name and "edm" not in name:
        fired = [
            r for r in LEVELS[preset.steps] if abs(min(program.sigmas.tolist(), key=lambda s: abs(s - r)) - r) < 6e-4
        ]
        assert len(fired) == len(LEVELS[preset.steps])
    assert len(preset.intervals) <= program.draws
    assert program.consistent == (preset.s_noise == 1)


def test_dpm_solver_3_restarts_right_before_the_last_step():
    """Nominal t_min = 0.06 falls on the last positive level there; rounds are DPM-Solver-3, the last step Euler."""
    program = restart(preset="cifar10-vp-18")(PRESETS["cifar10-vp-18"].grid(EDM()))
    last = program.sigmas.tolist()[-7:]
    assert last[0] == 1.0
    assert last[-1] == pytest.approx(0.010486, rel=1e-12)
    assert program.stages[-2].step == program.stages[-7].step == program.grid.steps - 2


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("sd15-w2", [[914, 776, 639, 502, 364], [934, 899, 864, 828, 793]]),
        ("sd15-w3", [[673, 598, 524, 449, 374, 300, 225, 150, 76, 1]]),
        ("sd15-w5", [[562, 500, 437, 375, 313, 250, 188, 126, 63, 1]]),
    ],
)
def test_stable_diffusion_labels(name, labels):
    """DDIM of 30 steps; rounds by Heun on whole labels, between those that the card lists; steps of the paper's formula."""
    schedule = Discrete.scaled_linear()
    program = restart(preset=name)(PRESETS[name].grid(schedule))
    assert program.nfe == 30 + sum(2 * 2 * (n - 1) for n, *_ in PRESETS[name].intervals)
    seen = [round(float(schedule.time(s))) for s in program.sigmas.tolist()]
    for path in labels:
        heun = [path[0], *(label for label in path[1:-1] for _ in range(2)), path[-1]]
        found = [i for i in range(len(seen)) if seen[i : i + len(heun)] == heun]
        assert len(found) == 2, path  # K = 2
    assert program.states[30] >= 0
    assert float(program.grid.t[-1]) == 0


@pytest.mark.parametrize("base", [*SINGLE_STEP, *MULTISTEP])
def test_no_round_is_the_base_itself(base):
    grid = grids("zero")
    plain = restart(base)(grid)
    for intervals in ([], [(3, 0, 0.06, 0.3)], [(3, 4, float(grid.sigmas[8]), float(grid.sigmas[8]))]):
        assert restart(base, intervals=intervals)(grid).describe() == plain.describe()
    name = base.split("(")[0]
    options = {"tau": 0.0} if "tau" in base else {}
    own = fastode.SOLVERS[name](grid, **options).describe()
    assert plain.describe().splitlines()[1:] == own.splitlines()[1:]  # after the name


def test_no_noise_in_the_rounds_and_none_to_make_up_for_it(mixture):
    """s_noise = 0 is a solve from t_max of a state that has only the noise of t_min, as forgetting the option was."""
    grid = grids("zero")
    program = restart("heun", intervals=[(3, 1, 0.06, 0.5)], s_noise=0.0)(grid)
    assert not program.consistent
    assert program.unroll().noise == (0.0,) * program.draws


@pytest.mark.parametrize("base", [*SINGLE_STEP, *MULTISTEP, "unipc(order=2, variant=bh1)", "dpm_solver_pp(order=3)"])
@pytest.mark.parametrize("kind", ["edm", "zero", "vp", "ve view"])
def test_any_solver_walks_back_up(mixture, base, kind):
    """One program, exact on a single data point, equal in all frames and on all backends, with samples of their seeds."""
    grid = grids(kind)
    solver = restart(base, intervals=TWO)
    program = solver(grid)
    assert program.draws == 3
    assert program.defect() < 1e-11
    x = start(grid, (3, 6))
    call = {"solver": solver, "noise": draws(x)}
    own = fastode.sample(mixture, x, grid=grid, **call)
    view = Grid(grid.sigmas, 1.0, grid.t, schedule=grid.schedule)
    other = fastode.sample(mixture, x / grid.alpha[0], grid=view, **call)
    # PNDM's warm-up divides a rounding by a small sigma and multiplies it by a large one, in every round anew
    assert relative(own / grid.alpha[-1], other) < (1e-9 if base == "pndm" else 1e-11)
    if kind == "edm":
        reference = fastode.sample(mixture, x, grid=grid, backend="reference", **call)
        assert relative(own, reference) < (1e-9 if base == "pndm" else 1e-11)
        data = Gaussian(torch.zeros(6), 0.5)
        big = Engine(program, data, (64, 6))(seeds=range(64))
        assert torch.equal(Engine(program, data, (1, 6))(seeds=[37])[0], big[37])


def test_one_round_contracts_by_the_factor_of_the_theory():
    """Data N(0, 1/4), [0.06, 0.30]: the error of the variance shrinks by (c^2 + t_min^2)/(c^2 + t_max^2) = 0.745882 per
    round, towards c^2 + t_min^2, and the mean by its root; Heun with N_R = 3 has 0.867041 for that root (method card)."""
    data, low, high = Gaussian(torch.zeros(1), 0.25), 0.06, 0.30
    grid = Grid([80.0, low])

    def left(points, rounds):
        program = restart("heun", intervals=[(points, rounds, low, high)])(grid)
        plain = fastode.SOLVERS["heun"](grid)
        wrong = Moments(torch.ones(1, dtype=torch.float64), 2 * marginal(data, grid[0]).covariance)
        before, after = (push(p, data, wrong)[-1] for p in (plain, program))
        fixed = 0.25 + low**2
        return float(after.mean / before.mean), float((after.covariance - fixed) / (before.covariance - fixed))

    assert left(3, 1)[0] == pytest.approx(0.867041, abs=5e-7)
    for rounds in (1, 3):  # of 100 steps of Heun's method: error 3e-3/100^2 each
        mean, variance = left(101, rounds)
        assert mean == pytest.approx(0.863645**rounds, abs=rounds * 2e-6)
        assert variance == pytest.approx(0.745882**rounds, abs=rounds * 4e-6)


def test_exact_samples_stay_exact():
    """Twenty rounds from the right law, with a fine way back, leave it alone."""
    data = Gaussian(torch.tensor([0.5, -1.0]), torch.tensor([0.3, 0.02]))
    grid = Grid([0.3, 0.06, 0.0599])
    program = restart("heun", intervals=[(30, 20, 0.06, 0.3)])(grid)
    found = push(program, data)[1]
    wanted = marginal(data, grid[1])
    assert relative(found.mean, wanted.mean) < 1e-12
    assert relative(found.covariance, wanted.covariance) < 2e-3  # Heun's error of one way back, over 1 - 0.75


def test_states_and_steps_are_those_of_the_main_grid(mixture):
    """Rounds belong to the step that ends where they are made: its state is the one after the last round."""
    grid = karras(EDM(), 18, final="zero")
    program = restart(preset="cifar10-vp-43")(grid)
    steps = [s.step for s in program.stages]
    assert steps == sorted(steps)
    assert steps.count(13) == 2 + 2 * 4
    x = start(grid, (2, 6))
    seen = []
    run = fastode.sample(
        mixture,
        x,
        solver=restart(preset="cifar10-vp-43"),
        grid=grid,
        noise=draws(x),
        callback=lambda *call: seen.append(call),
        return_trajectory=True,
    )
    assert [(step, sigma) for step, sigma, _, _ in seen] == [
        (i, pytest.approx(float(grid.sigmas[i]))) for i in range(18)
    ]
    for (step, _, state, _), kept in zip(seen, run.states, strict=False):
        torch.testing.assert_close(state, kept, rtol=1e-12, atol=1e-12), step
    plain = fastode.sample(mixture, x, solver="edm", grid=grid, return_trajectory=True)
    for i in range(19):
        same = relative(run.states[i], plain.states[i]) < 1e-12
        assert same == (i < 14)


def test_a_multistep_base_starts_anew_at_the_top_of_every_round_only(mixture):
    """The last round and the rest of the run are one descent: the same as solving it as a run of its own."""
    grid = karras(EDM(), 10)
    x = start(grid, (2, 6))
    solver = restart("dpm_solver_pp", order=3, intervals=[(4, 1, 0.5, 5.0)])
    program = solver(grid)
    z = draws(x)
    run = fastode.sample(mixture, x, solver=solver, grid=grid, noise=z, return_trajectory=True)
    i = min(range(1, 11), key=lambda k: abs(float(grid.sigmas[k]) - 0.5))
    low = float(grid.sigmas[i])
    down = [(5 ** (1 / 7) + j / 3 * (low ** (1 / 7) - 5 ** (1 / 7))) ** 7 for j in range(3)]
    path = Grid([*down, *grid.sigmas[i:].tolist()])
    # order 3 cannot be lowered at the end of a part: the way down to level i is that of the whole run
    first = fastode.sample(mixture, x, solver="dpm_solver_pp", order=3, grid=grid, return_trajectory=True).states[i]
    up = first + (25 - low**2) ** 0.5 * z[0]
    assert relative(run.samples, fastode.sample(mixture, up, solver="dpm_solver_pp", order=3, grid=path)) < 1e-12
    assert program.nfe == 10 + 3


def test_one_recording_and_one_file(tmp_path, gaussian):
    grid = grids("zero")
    program = restart("heun", intervals=TWO)(grid)
    recorder = Replayer()
    recorded = Engine(program, gaussian, (3, 4), "torch", check_finite=False, graph=Graphs(True, recorder=recorder))
    plain = Engine(program, gaussian, (3, 4), "torch", graph=False)
    for seeds in ([1, 2, 3], [7, 8, 9]):
        assert torch.equal(recorded(seeds=seeds), plain(seeds=seeds))
    assert recorder.recorded == 1
    program.save(tmp_path / "p.safetensors")
    again = Engine(Program.load(tmp_path / "p.safetensors"), gaussian, (3, 4), "torch")
    assert torch.equal(again(seeds=[1, 2, 3]), plain(seeds=[1, 2, 3]))


def test_learned_grids_keep_their_gradient(mixture):
    sigmas = torch.tensor([80.0, 20.0, 4.0, 0.8, 0.1], dtype=torch.float64, requires_grad=True)
    x = 80 * torch.randn(2, 6, dtype=torch.float64)

    def loss(s):
        solver = restart("heun", intervals=[(3, 1, 0.8, 5.0)])
        return fastode.sample(mixture, x, solver=solver, grid=Grid(s), noise=draws(x)).square().sum()

    (gradient,) = torch.autograd.grad(loss(sigmas), sigmas)
    for i in (1, 4):
        h = 1e-5 * float(sigmas[i].detach())
        step = torch.zeros(5, dtype=torch.float64).index_fill(0, torch.tensor(i), h)
        with torch.no_grad():
            slope = (loss(sigmas + step) - loss(sigmas - step)) / (2 * h)
        assert float(gradient[i]) == pytest.approx(float(slope), rel=1e-5)  # central differences: error h^2


def test_nfe_finds_the_published_grid():
    from fastode.api import grid_maker

    solver = restart(preset="imagenet64-39")
    grid, _ = solver.plan(39, grid_maker(solver, EDM()))
    assert grid.steps == 14
    assert torch.equal(grid.sigma, PRESETS["imagenet64-39"].grid(EDM()).sigma)
    with pytest.raises(ValueError, match=r"^nfe: restart cannot make exactly 3 evaluations; it can make 18, 19"):
        solver.plan(3, grid_maker(solver, EDM()))
    outside = restart(intervals=[(3, 1, 100.0, 200.0)])
    with pytest.raises(ValueError, match=r"^nfe: restart cannot make exactly 9 evaluations: intervals: .* in the grid"):
        outside.plan(9, grid_maker(outside, EDM()))


def test_from_the_command_line(capsys):
    from fastode.cli import main

    for options, nfe in (
        (["--nfe", "43", "-o", "preset=cifar10-vp-43"], 43),
        (["--steps", "18", "-o", "intervals=3,2,0.06,0.3; 3,1,1,2"], 47),
        (["--steps", "6", "-o", "base=unipc(order=2)", "-o", "intervals=3,1,0.06,0.3"], 8),
    ):
        assert main(["describe", "--solver", "restart", *options]) == 0
        assert f"# restart: {nfe} evaluations" in capsys.readouterr().out
    assert (
        main(["describe", "--solver", "sampler_scheduler", "--steps", "15", "-o", "plan=heun*10+ddim(eta=0.5)*5"]) == 0
    )
    assert "# sampler_scheduler: 25 evaluations" in capsys.readouterr().out
    assert main(["describe", "--solver", "restart", "--steps", "18", "-o", "intervals=3,1,0.06"]) != 0
    assert "intervals: must be (N_R, K, t_min, t_max) each" in capsys.readouterr().err


def test_bad_intervals():
    grid = karras(EDM(), 18, final="zero")
    for intervals, message in [
        ([(3, 1, 0.06)], r"must be \(N_R, K, t_min, t_max\) each"),
        ("3,1,low,1", r"must be \(N_R, K, t_min, t_max\) each"),
        ([(1, 1, 0.06, 0.3)], "N_R must be a whole number of at least 2"),
        ([(3.5, 1, 0.06, 0.3)], "N_R must be a whole number of at least 2"),
        ([(3, -1, 0.06, 0.3)], "K of at least 0"),
        ([(3, 1, 0.3, 0.06)], "need 0 < t_min <= t_max"),
        ([(3, 1, 0.0, 0.06)], "need 0 < t_min <= t_max"),
        ([(3, 1, 0.001, 0.06)], r"must lie in the grid, between 0.002 and 80, got \[0.001, 0.06\]"),
        ([(3, 1, 1.0, 100.0)], r"must lie in the grid, between 0.002 and 80, got \[1, 100\]"),
        ([(3, 1, 0.5, 0.55)], "falls on the level 0.585"),
        ([(3, 1, 0.06, 0.3), (3, 1, 0.061, 1.0)], "two of them fall on the same level"),
    ]:
        with pytest.raises(ValueError, match=rf"^intervals: .*{message}"):
            restart(intervals=intervals)(grid)
    with pytest.raises(ValueError, match=r"^preset: must be one of cifar10-vp-43.*got 'cifar'"):
        restart(preset="cifar")
    with pytest.raises(ValueError, match=r"^gamma: must be in \[0, 1\), got 1"):
        restart(gamma=1)(grid)
    with pytest.raises(ValueError, match=r"^s_noise: "):
        restart(s_noise=-1, intervals=[(3, 1, 0.06, 0.3)])(grid)
    with pytest.raises(ValueError, match=r"^spacing: must be 'karras' or 'time'"):
        restart(spacing="linear")(grid)
    with pytest.raises(ValueError, match=r"^spacing: 'time' needs a grid with a schedule"):
        restart(spacing="time", intervals=[(3, 1, 0.8, 5.0)])(Grid([80.0, 0.8, 0.1]))
    with pytest.raises(ValueError, match=r"solver: unknown solver 'huen'; did you mean 'heun'"):
        restart("huen")
    with pytest.raises(TypeError, match=r"heun: unknown option 'order'"):
        restart("heun", order=2)
    with pytest.raises(ValueError, match=r"^base: 'afs' is an option of the whole run"):
        restart("heun(afs=true)")
    with pytest.raises(ValueError, match=r"^base: options must be NAME=VALUE"):
        restart("unipc(3)")
    with pytest.raises(TypeError, match=r"^inner: must be a solver or the name of one, got int"):
        restart("heun", inner=3)(grid)
    with pytest.raises(ValueError, match="schedule: this setting needs a table"):
        PRESETS["sd15-w2"].grid(EDM())
    assert leading(Discrete.scaled_linear(), 30, offset=1, final="sigma_min").steps == 30
    assert make_grid("edm").steps == 7
