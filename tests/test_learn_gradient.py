"""Grids, told levels and tables learned on trajectories: gradients, regression, what is kept, and the best of all."""

import json

import pytest
import torch

import fastode
from fastode import SOLVERS, Artifact
from fastode.artifact import identity
from fastode.cli import main
from fastode.denoisers import Gaussian, GaussianMixture
from fastode.learn import best, ld3, methods, table
from fastode.learn.calibration import Calibration, best_uniform
from fastode.learn.descent import descend, distance, rollout
from fastode.learn.ld3 import Gaps
from fastode.learn.table import FORMS, FreeTable, fit
from fastode.learn.teacher import Error, Teacher, held_out_seeds, refine, training_seeds
from fastode.schedules import EDM, Flow, VPLinear, karras, log_snr, quadratic, time_uniform
from fastode.solvers.table import retold
from tests.tiny_model import write

DATA = GaussianMixture(torch.tensor([[0.6, 0.6, 0.0, 0.2], [-0.6, 0.2, 0.4, 0.0], [0.1, -0.7, 0.3, 0.4]]), 0.05)
MODEL = fastode.Denoiser(DATA, "denoised", sample_shape=(4,))


@pytest.fixture(scope="module")
def teacher():
    return Teacher(MODEL, batch=64)


# -- the teacher -----------------------------------------------------------------------------------------------------------


def test_the_teacher_is_the_flow():
    """States at every level are those of the exact flow, to the teacher's own tolerance."""
    data = Gaussian(torch.tensor([0.3, -0.2]), torch.tensor([0.25, 0.05]))
    teacher = Teacher(fastode.Denoiser(data, "denoised", sample_shape=(2,)))
    grid, seeds = karras(EDM(), 4), training_seeds(16)
    found = teacher.trajectories(seeds, grid, denoised=True)
    assert found.states.shape == (5, 16, 2) and found.denoised.shape == (4, 16, 2)
    for i, sigma in enumerate(grid.sigmas.tolist()):
        exact = data.flow(found.start.double(), 80.0, sigma)
        assert (found.states[i] - exact).square().mean().sqrt() < 3e-3 * exact.square().mean().sqrt()
        if i < 4:
            assert (found.denoised[i] - data(exact, sigma)).abs().max() < 1e-2
    assert found.change < teacher.tolerance
    assert torch.allclose(found.start, fastode.noise.normal(seeds, 0, (2,)) * 80)


def test_one_end_point_for_all_placements(teacher):
    seeds, before = training_seeds(8), teacher.evaluations
    one = teacher.ends(seeds, time_uniform(EDM(), 3))
    spent = teacher.evaluations - before
    assert teacher.ends(seeds, log_snr(EDM(), 7)) is one and teacher.evaluations - before == spent


def test_prescribed_teachers(teacher):
    """M levels inside every interval, by any solver; or a dense grid that has the levels among its own."""
    grid, seeds = karras(EDM(), 3), training_seeds(4)
    found = teacher.trajectories(seeds, grid, intermediate=1, solver="heun")
    assert found.evaluations == 12
    assert torch.equal(found.end, teacher.sample(SOLVERS["heun"](refine(grid, 1)), seeds))
    dense = karras(EDM(), 6)
    inside = teacher.trajectories(seeds, grid, dense=dense, solver="heun")
    assert torch.allclose(inside.states, found.states, rtol=1e-6)  # karras in karras, up to rounding of powers
    with pytest.raises(ValueError, match="dense: must contain every level"):
        teacher.trajectories(seeds, grid, dense=karras(EDM(), 5))


@pytest.mark.parametrize("grid", [karras(EDM(), 2), log_snr(VPLinear(), 2), time_uniform(Flow(), 2)])
def test_refined_grids_keep_their_levels(grid):
    fine = refine(grid, 3)
    assert len(fine) == 9 and torch.equal(fine.sigma[::4], grid.sigma) and torch.equal(fine.t[::4], grid.t)
    if grid.schedule != Flow():
        assert torch.allclose(fine.alpha, grid.schedule.alpha(fine.t), rtol=1e-12) or bool((fine.alpha == 1).all())


def test_trajectories_on_disk(tmp_path):
    """Kept by model, seeds and grid: another run reads them without a call; another model does not."""
    model = fastode.load(write(tmp_path / "one"))
    seeds = training_seeds(3)
    first = Teacher(model, cache=tmp_path / "cache", most=32, tolerance=1.0)
    made = first.ends(seeds, karras(model.schedule, 2))
    again = Teacher(model, cache=tmp_path / "cache", most=32, tolerance=1.0)
    read = again.ends(seeds, karras(model.schedule, 5))
    assert torch.equal(read.states, made.states) and again.evaluations == 0 and read.change == made.change
    with torch.no_grad():
        next(model.network.parameters()).add_(0.1)
    other = Teacher(model, cache=tmp_path / "cache", most=32, tolerance=1.0)
    other.ends(seeds, karras(model.schedule, 2))
    assert other.evaluations > 0


def test_labels_and_guidance(tmp_path):
    model = fastode.load(write(tmp_path))
    seeds = held_out_seeds(4)
    plain = Teacher(model, most=32, tolerance=1.0)
    assert plain.labels(seeds).tolist() == [int(s) % 3 for s in seeds]
    guided = Teacher(model, guidance_scale=2.0, class_labels=[1], most=32, tolerance=1.0)
    grid = karras(model.schedule, 2)
    program = SOLVERS["ddim"](grid)
    expected = fastode.sample(model, seeds=seeds, solver="ddim", grid=grid, class_labels=1, guidance_scale=2.0)
    assert torch.allclose(guided.sample(program, seeds), expected, atol=1e-5)
    x = guided.start(seeds, grid)
    assert torch.allclose(rollout(program, guided, x, seeds), expected, atol=1e-5)
    assert (plain.sample(program, seeds) - expected).abs().max() > 1e-4


def test_an_unconverged_teacher_says_so():
    with pytest.warns(RuntimeWarning, match="teacher: not converged after"):
        Teacher(MODEL, most=16, tolerance=1e-6).ends(training_seeds(2), karras(EDM(), 2))


def test_error_and_its_error():
    made = torch.tensor([[1.0, 1.0], [3.0, 3.0]])
    error = Error.between(made, torch.zeros(2, 2))
    # squares 1 and 9: mean 5, standard error of the mean 4, through the root 4/(2 sqrt 5)
    assert error.rmse == pytest.approx(5**0.5) and error.deviation == pytest.approx(2 / 5**0.5)


# -- gradients ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [EDM(), VPLinear(), Flow()], ids=["edm", "vp", "flow"])
def test_gradients_through_a_grid(kind):
    """d loss / d logits and d told against central differences (1e-4 of the float64 loss), checkpointed or not."""
    model = fastode.Denoiser(DATA, "denoised", kind, sample_shape=(4,))
    if kind == Flow():
        kind = Flow(t_max=0.99, t_min=0.01)
    teacher, grid = Teacher(model), time_uniform(kind, 3)
    gaps, delta = Gaps(grid), torch.full((2,), 0.3, dtype=torch.float64, requires_grad=True)
    assert torch.allclose(gaps.grid().sigmas, grid.sigmas, rtol=1e-12)
    seeds = training_seeds(4)
    x, goal = teacher.start(seeds, grid).double(), torch.zeros(4, 4, dtype=torch.float64)

    def value(checkpoint=True):
        program = retold(SOLVERS["dpm_solver_pp"](gaps.grid(), order=3), gaps.told(delta))
        return distance(rollout(program, teacher, x, seeds, checkpoint=checkpoint), goal, "l2")

    leaves = [gaps.theta, delta]
    found = torch.autograd.grad(value(), leaves)
    plain = torch.autograd.grad(value(checkpoint=False), leaves)
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(found, plain, strict=True))
    step = 1e-5
    with torch.no_grad():
        leaf = gaps.theta
        for i in range(2):
            leaf[i] += step
            up = float(value())
            leaf[i] -= 2 * step
            down = float(value())
            leaf[i] += step
            assert (up - down) / (2 * step) == pytest.approx(float(found[0][i]), rel=1e-4, abs=1e-8)
        for i in range(2):
            delta[i] += step
            up = float(value())
            delta[i] -= 2 * step
            down = float(value())
            delta[i] += step
            assert (up - down) / (2 * step) == pytest.approx(float(found[1][i]), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("form", ["full", "gs", "s4s"])
def test_gradients_through_a_table(form):
    grid = karras(EDM(), 3)
    free = FreeTable("dpm_solver_pp", grid, {}, FORMS[form])
    teacher, seeds = Teacher(MODEL), training_seeds(4)
    x, goal = teacher.start(seeds, grid).double(), torch.zeros(4, 4, dtype=torch.float64)

    def value():
        return distance(rollout(free.program(), teacher, x, seeds), goal, "l2")

    leaves, rates = free.parameters(1.0)
    assert len(leaves) == len(rates) == {"full": 4, "gs": 4, "s4s": 2}[form]
    found, step = torch.autograd.grad(value(), leaves), 1e-5
    with torch.no_grad():
        for leaf, gradient in zip(leaves, found, strict=True):
            place = (1, 0) if leaf.ndim == 2 else (1,)
            leaf[place] += step
            up = float(value())
            leaf[place] -= 2 * step
            down = float(value())
            leaf[place] += step
            assert (up - down) / (2 * step) == pytest.approx(float(gradient[place]), rel=1e-4, abs=1e-8)


def test_a_free_table_starts_as_its_solver(teacher):
    """All numbers 0: the same samples, bit for bit where nothing is added at all, for every form."""
    grid, seeds = karras(EDM(), 4), training_seeds(4)
    plain = teacher.sample(SOLVERS["ipndm"](grid), seeds)
    for free in FORMS.values():
        made = teacher.sample(FreeTable("ipndm", grid, {}, free).program(), seeds)
        assert (made - plain).abs().max() < 2e-4  # eps history written out: float32 at a state of size 80


def test_descent_keeps_the_best_and_stops_on_nan(teacher):
    """An absurd rate only makes things worse: the start is what is kept. NaN raises, and the kept state is saved."""
    grid, seeds, saved = karras(EDM(), 3), training_seeds(16), []
    truth = teacher.ends(seeds, grid)
    gaps = Gaps(grid)
    first = gaps.theta.detach().clone()
    with Calibration("ld3", teacher, save=saved.append, progress=False) as run:

        def artifact(error):
            return run.artifact("ddim", gaps.grid(), error=error)

        def program():
            return SOLVERS["ddim"](gaps.grid())

        descend(run, [gaps.theta], program, truth, truth, artifact, steps=3, batch=8, lr=5.0, look=1)
        kept = run.best
    assert torch.equal(gaps.theta.detach(), first) and torch.allclose(kept.grid.sigmas, grid.sigmas)
    assert len(saved) == 1
    saved.clear()
    poison = {"factor": 1.0}

    def spoiling(error):
        poison["factor"] = float("nan")
        return Artifact("grid", "ddim", grid)

    def spoilt():
        return retold(SOLVERS["ddim"](gaps.grid()), [1.0, 1.0, torch.exp(gaps.theta.sum() * 0) * poison["factor"]])

    with Calibration("ld3", teacher, save=saved.append, progress=False) as run, pytest.raises(FloatingPointError):
        descend(run, [gaps.theta], spoilt, truth, truth, spoiling, steps=3, batch=8, lr=0.1)
    assert len(saved) == 1 and saved[0].grid is grid


def test_interrupting_keeps_the_last_good_state(teacher):
    saved = []
    kept = Artifact("grid", "ddim", karras(EDM(), 3))

    def interrupted():
        with Calibration("x", teacher, save=saved.append, progress=False) as run:
            run.keep(kept)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert saved == [kept]


# -- methods -----------------------------------------------------------------------------------------------------------------


def test_regression_is_exact_where_the_flow_is_linear():
    """Isotropic Gaussian data: every state is a multiple of the start, so two outputs determine the next state."""
    model = fastode.Denoiser(Gaussian(torch.zeros(3), 0.25), "denoised", sample_shape=(3,))
    teacher, seeds, grid = Teacher(model, tolerance=1e-3), training_seeds(16), quadratic(EDM(), 3)
    free = FreeTable("ddim", grid, {}, FORMS["weights"])
    before = teacher.error(free.program(), seeds).rmse
    fit(free, teacher, seeds, ridge=1e-12)
    assert teacher.error(free.program(), seeds).rmse < 1e-2 * before  # float32 at a state of size 80


def test_the_last_row_is_optimal(teacher):
    """Regression of the end point is the least squares optimum: any change of its weights is worse."""
    grid, seeds = quadratic(EDM(), 4), training_seeds(64)
    free = FreeTable("dpm_solver_pp", grid, {}, FORMS["weights"])
    fit(free, teacher, seeds, ridge=1e-12, rows=1)
    least = teacher.error(free.program(), seeds).rmse
    assert not free.b[:3].any()
    with torch.no_grad():
        for j in range(4):
            for change in (-0.01, 0.01):
                free.b[3, j] += change
                assert teacher.error(free.program(), seeds).rmse > least
                free.b[3, j] -= change


@pytest.mark.parametrize("solver", ["dpm_solver_pp", "unipc", "heun"])
def test_tables_beat_their_solver(teacher, solver):
    """Without a gradient already: at most half the error of the best uniform placement, on samples it has not seen."""
    nfe = 5 if solver != "heun" else 6
    artifact = table.train(MODEL, solver=solver, nfe=nfe, samples=64, teacher=teacher, steps=0, progress=False)
    assert artifact.method == "table" and artifact.nfe == nfe
    seeds = held_out_seeds(64)
    _, _, uniform = best_uniform(teacher, solver, nfe, None, seeds)
    assert teacher.error(artifact.program(), seeds).rmse < 0.5 * uniform.rmse
    assert artifact.card["error"]["rmse"] <= artifact.card["uniform"]["rmse"]


def test_where_learning_starts(teacher, tmp_path):
    """A grid by name, as levels, or another artifact's: calibrations compose."""
    grid, path = karras(EDM(), 3), str(tmp_path / "grid.safetensors")
    Artifact("grid", "ddim", grid).save(path)
    for given in ("karras", grid, path):
        made, options, error = ld3.started(teacher, "ddim", 3, {}, given, training_seeds(2))
        assert torch.equal(made.sigmas, grid.sigmas) and options == {} and error is None
    with pytest.raises(ValueError, match="grid: must be one of"):
        ld3.started(teacher, "ddim", 3, {}, "none", training_seeds(2))


def test_learned_grids_beat_uniform_ones(teacher, tmp_path):
    artifact = ld3.train(
        MODEL, solver="dpm_solver_pp", nfe=5, samples=64, teacher=teacher, steps=30, batch=64, progress=False
    )
    seeds = held_out_seeds(64)
    _, _, uniform = best_uniform(teacher, "dpm_solver_pp", 5, None, seeds)
    assert teacher.error(artifact.program(), seeds).rmse < 0.7 * uniform.rmse
    artifact.save(tmp_path / "a.safetensors")
    again = Artifact.load(tmp_path / "a.safetensors")
    assert torch.equal(teacher.sample(again.program(), seeds[:4]), teacher.sample(artifact.program(), seeds[:4]))
    assert float(again.program().sigmas[0]) == pytest.approx(80)  # the first evaluation is told its own level


def test_descent_improves_a_table(teacher):
    """From the uncalibrated solver, without regression; soft teacher forcing runs and keeps inside its ball."""
    options = {"solver": "dpm_solver_pp", "nfe": 4, "samples": 32, "teacher": teacher, "progress": False}
    plain = table.train(MODEL, form="told", steps=20, batch=32, lr=3e-3, **options)
    assert plain.card["error"]["rmse"] < 0.9 * plain.card["uniform"]["rmse"]
    soft = table.train(MODEL, form="told", steps=5, batch=32, radius=0.1, loss="huber", **options)
    assert soft.card["settings"]["radius"] == 0.1
    assert soft.card["error"]["rmse"] <= soft.card["uniform"]["rmse"]


def test_best_takes_the_smallest_error(teacher):
    saved = []
    found = best.train(
        MODEL, nfe=4, samples=32, teacher=teacher, held_out=32, methods=("gits", "table"), bases=("unipc", "ipndm"),
        save=saved.append, progress=False, minutes=0.5,
    )  # fmt: skip
    tried = found.card["tried"]
    assert [t["method"] for t in tried[:8]] == ["uncalibrated"] * 8
    assert {"gits", "table"} <= {t["method"] for t in tried}
    measured = [t["rmse"] for t in tried if "rmse" in t]
    assert found.card["error"]["rmse"] == min(measured) < 0.5 * min(t["rmse"] for t in tried[:8])
    assert saved[-1].method == found.method and "seconds" in best.table(found)
    assert all({"seconds", "evaluations", "peak_memory_bytes"} <= set(t) for t in tried if "rmse" in t)
    json.dumps(found.card)


def test_best_lists_what_cannot_be_done(teacher):
    flow = fastode.Denoiser(DATA, "denoised", Flow(t_max=0.99, t_min=0.0), sample_shape=(4,))
    found = best.train(
        flow, nfe=3, samples=8, held_out=8, methods=("steps",), bases="ddim", progress=False
    )  # fmt: skip
    (failure,) = [t for t in found.card["tried"] if "failed" in t]
    assert "sigma_min" in failure["failed"] and found.solver == "ddim"
    assert "failed" in best.table(found)


def test_every_trainer_takes_the_common_arguments():
    for name in methods.TRAINERS:
        defaults = methods.settings(name)
        assert not set(defaults) & methods.COMMON
        import inspect

        assert set(inspect.signature(methods.trainer(name)).parameters) >= methods.COMMON, name


# -- the command -------------------------------------------------------------------------------------------------------------


def test_train_and_sample_from_the_command_line(tmp_path, capsys):
    weights = str(write(tmp_path))
    out = tmp_path / "solver.safetensors"
    argv = ["train", "solver", "table", "--model", weights, "--nfe", "3", "--samples", "3", "--held-out", "3"]
    argv += ["--solver", "ddim", "--labels", "0,2", "--guidance", "1.5", "--out", str(out), "--set", "steps=0"]
    assert main(argv) == 0
    shown = capsys.readouterr().out
    assert "table: table on ddim, 3 evaluations" in shown and "held-out" in shown and "peak memory" in shown
    artifact = Artifact.load(out)
    assert artifact.model == identity(fastode.load(weights), guidance_scale=1.5)
    samples = ["sample", "--model", weights, "--solver", str(out), "--seeds", "0-2", "--out", str(tmp_path / "s.npz")]
    assert main([*samples, "--guidance", "1.5"]) == 0
    assert main([*samples, "--guidance", "3"]) == 2 and "learned for guidance_scale" in capsys.readouterr().err
    assert main(["train", "solver", "list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in methods.TRAINERS)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["nothing"], "method: must be one of"),
        (["gits", "--set", "colour=red"], "set: gits has no setting 'colour'"),
        (["gits", "--set", "metric"], "option: must be NAME=VALUE"),
        (["gits", "--budget", "soon"], "budget: must look like"),
        (["gits", "--budget=-3min"], "budget: must look like"),
        (["gits", "--out", "solver.pt"], "out: must end in .safetensors"),
        (["gits", "--nfe", "0"], "nfe: must be a whole number"),
        (["gits", "--samples", "0"], "samples: must be"),
        (["gits", "--solver", "nothing"], "solver: unknown solver"),
        (["gits", "--labels", "7"], "class_labels: must be in 0 .. 3"),
        (["gits", "--held-out", "-1"], "held-out: must be at least 0"),
        (["gits", "-o", "order=9"], "order: "),
    ],
)
def test_bad_commands(tmp_path, capsys, extra, message):
    weights = str(write(tmp_path))
    method, *rest = extra
    assert main(["train", "solver", method, "--model", weights, "--out", str(tmp_path / "o.safetensors"), *rest]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastode train: ") or "fastode train: " in error
    assert message in error and error.strip().splitlines()[-1].startswith("fastode train")
    assert not (tmp_path / "o.safetensors").exists()


def test_bad_settings(teacher):
    free = FreeTable("ddim", karras(EDM(), 3), {}, FORMS["weights"])
    for call, message in (
        (lambda: table.train(MODEL, form="none", teacher=teacher), "form: must be one of"),
        (lambda: table.train(MODEL, memory=0, samples=2, nfe=2, teacher=teacher, progress=False), "memory: at least 1"),
        (lambda: table.train(MODEL, grid=karras(EDM(), 3), nfe=4, teacher=teacher, progress=False), "grid: .* 3 evalu"),
        (lambda: ld3.train(MODEL, nfe=2, samples=2, loss="l3", teacher=teacher, progress=False), "loss: must be"),
        (lambda: ld3.train(MODEL, nfe=2, samples=2, radius=-1, teacher=teacher, progress=False), "radius: must be"),
        (lambda: ld3.train(MODEL, nfe=2, samples=2, batch=0, teacher=teacher, progress=False), "steps, batch: must be"),
        (
            lambda: ld3.train(DATA, teacher=teacher, guidance_scale=2.0),
            "guidance_scale: the teacher was made with None",
        ),
        (lambda: fit(free, teacher, training_seeds(2), ridge=0.0), "ridge: must be positive"),
        (
            lambda: fit(FreeTable("heun", karras(EDM(), 2), {}, FORMS["weights"]), teacher, training_seeds(2)),
            "fit: the",
        ),
        (lambda: best.train(MODEL, methods=(), teacher=teacher), "methods: nothing to try"),
        (lambda: best.train(MODEL, methods=("nothing",), teacher=teacher), "method: must be one of"),
        (lambda: Gaps(fastode.Grid([1.0, 0.5, 0.0])), "grid: levels at sigma = 0"),
        (lambda: refine(karras(EDM(), 2), -1), "intermediate: must be at least 0"),
        (lambda: Teacher(MODEL, tolerance=0), "tolerance: must be positive"),
        (lambda: Teacher(MODEL, class_labels=[1]), "class_labels"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
