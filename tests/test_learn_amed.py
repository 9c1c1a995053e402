"""Training AMED: one step equals the paper's loop, training finds the known optimum, and runs that fail leave what was good."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fastode
from fastode import SOLVERS, Artifact, Denoiser, Engine
from fastode.denoisers import Gaussian
from fastode.learn import amed, amed_plan
from fastode.learn.amed import train
from fastode.learn.teacher import Teacher, Trajectories, training_seeds
from fastode.learn.unroll import feature_distance, squared
from fastode.nets.predictor import AMEDPredictor, StepTable
from fastode.schedules import EDM
from tests.conftest import relative
from tests.papers import amed_training as loops
from tests.test_amed import BEST, of
from tests.tiny_model import write

QUICK = {"progress": False, "samples": 16, "batch": 8, "images": 16}


def denoiser_of(mixture, shape=(6,)):
    return Denoiser(mixture, "denoised", EDM(), sample_shape=shape, name="mixture")


def with_feature(mixture):
    def network(x, sigma, features=False):
        raw = mixture(x, sigma)
        return (
            (raw, {"bottleneck": torch.tanh(x / (1 + sigma**2) ** 0.5).reshape(len(x), 3, 2, 1)}) if features else raw
        )

    return Denoiser(network, "denoised", EDM(), sample_shape=(6,), name="mixture")


def trainer(denoiser, solver, nfe, make=None, truth=None, afs=None, **own):
    """A trainer in float64 on the batch of ``training_seeds(4)``, which learns from the states ``truth``."""
    settings = dict.fromkeys(
        (
            "images",
            "lr",
            "cosine",
            "scale_dir",
            "scale_time",
            "levels",
            "place",
            "start",
            "teacher_solver",
            "intermediate",
        )
    )
    settings |= {"predictor": "table", "loss": "steps", "batch": 4, "micro": 4, "checkpoint": False, **own}
    plan = amed_plan.plan_of(**settings, solver=solver, nfe=nfe)
    teacher, seeds = Teacher(denoiser), training_seeds(4)
    chosen = amed_plan.student(solver)
    options = {} if afs is None else {"afs": afs}
    grid, fixed = amed_plan.placed(chosen, solver, nfe, options, "karras", teacher, seeds)
    made = make(grid) if make else plan.make_predictor(teacher, grid)
    draws = torch.Generator().manual_seed(0)
    t = amed._Trainer(plan, teacher, chosen, solver, grid, fixed, made, squared, seeds, draws)
    x = 80 * torch.randn(4, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    states = torch.stack([x, *([truth] * grid.steps if truth is not None else [x * 0] * grid.steps)])

    def trajectories(rows):
        index = [t.batches[0].tolist().index(int(s)) for s in rows]
        return Trajectories(rows, None, grid, states[:, index], None, 0, 0.0)

    t.trajectories = trajectories
    return t, x, states


def spy(t):
    """The gradients at every step of the optimiser."""
    seen, step = [], t.optimizer.step

    def recorded():
        seen.append([None if p.grad is None else p.grad.clone() for p in t.parameters])
        step()

    t.optimizer.step = recorded
    return seen


@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize(("solver", "step"), [("amed", loops.amed), ("ipndm", loops.ipndm)])
def test_one_training_step_equals_the_paper(mixture, solver, step, afs):
    z = torch.randn(3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def table(grid):
        made = StepTable(3, scale_dir=1 / 64, scale_time=0.25)
        made.free.data.copy_(z)
        return made

    t, x, states = trainer(denoiser_of(mixture), solver, 6 - afs, table, afs=afs, scale_dir=1 / 64, scale_time=0.25)
    levels = t.grid.sigmas.tolist()
    targets = loops.heun(of(mixture), x.numpy(), levels)
    states[1:] = torch.from_numpy(np.stack(targets[1:]))
    gradients = spy(t)
    losses = t.update()
    expected, gradient = loops.step_losses(
        step, of(mixture), x.numpy(), levels, targets, z.numpy(), scale_dir=1 / 64, scale_time=0.25, afs=afs,
        from_teacher=solver == "amed",
    )  # fmt: skip
    np.testing.assert_allclose(losses, expected, rtol=1e-11)
    for i in range(3):
        own = gradients[i][0]
        # central differences of width 1e-6 of a loss of about 100: 1e-16 * 1e2 / 1e-6 from rounding
        np.testing.assert_allclose(own[i].numpy(), gradient[i], rtol=1e-5, atol=1e-6 * np.abs(gradient[i]).max())
        assert torch.equal(own[torch.arange(3) != i], torch.zeros(2, 3, dtype=torch.float64))  # one step at a time


@pytest.mark.parametrize(
    ("solver", "own"),
    [("amed", {}), ("amed", {"predictor": "features"}), ("unipc", {}), ("dpm_solver_pp", {"predictor": "features"})],
)
def test_the_roll_outs_gradient_is_that_of_the_whole_run(mixture, solver, own):
    """Against central differences of the sample's error in every learned number, levels included; and the same number by
    parts, with recomputation, or both."""

    def made(grid):
        torch.manual_seed(0)
        if "predictor" in own:
            return AMEDPredictor(2, hidden=3, scale_dir=0.05, scale_time=0.2).double()
        table = StepTable(3, scale_dir=0.05, scale_time=0.2)
        torch.nn.init.normal_(table.free, std=0.3)
        return table

    levels = "fixed" if "predictor" in own else "learned"
    truth = torch.randn(4, 6, dtype=torch.float64)
    gradients = []
    for extra in ({}, {"micro": 3}, {"checkpoint": True}, {"micro": 2, "checkpoint": True}):
        t, x, _ = trainer(with_feature(mixture), solver, 6, made, truth, loss="rollout", levels=levels, **own, **extra)
        seen = spy(t)
        before = [p.detach().clone() for p in t.parameters]
        (loss,) = t.update()
        gradients.append(seen[0])
        for p, value in zip(t.parameters, before, strict=True):
            p.data.copy_(value)

    def error():
        with torch.no_grad():
            samples = Engine(t.program(t.predictor), with_feature(mixture), x.shape, "reference", dtype=x.dtype)(x)
        return float((samples - truth).square().sum(1).mean())

    assert loss == pytest.approx(error(), rel=1e-12)
    for k, p in enumerate(t.parameters):
        for other in gradients[1:]:
            assert relative(other[k], gradients[0][k]) < 1e-11  # sums in another order
        flat, g = p.data.view(-1), gradients[0][k].view(-1)
        for i in range(0, len(flat), max(1, len(flat) // 5)):
            keep, h = float(flat[i]), 1e-6
            flat[i] = keep + h
            up = error()
            flat[i] = keep - h
            down = error()
            flat[i] = keep
            # differences: rounding of a loss of about 10 over 2e-6
            assert float(g[i]) == pytest.approx((up - down) / (2 * h), rel=1e-5, abs=1e-7 * abs(loss) / h * 1e-3)


@pytest.mark.parametrize("name", ["karras", "time_uniform"])
def test_training_finds_the_best_points(name):
    """On N(0, 1/4) one r makes each step exact; the reference itself ends within 3e-4 of it."""
    gaussian = Denoiser(Gaussian(torch.zeros(4), torch.full((4,), 0.25)), "denoised", EDM(), sample_shape=(4,))
    artifact = train(
        gaussian, solver="amed", nfe=6, grid=name, loss="steps", scale_dir=0, scale_time=0, intermediate=63,
        teacher_solver="heun", samples=16, batch=16, images=16 * 100, lr=0.1, cosine=True, progress=False,
    )  # fmt: skip
    assert artifact.card["learned"]["r"] == pytest.approx(BEST[name], abs=3e-4)


@pytest.mark.parametrize("solver", ["amed", "ddim", "ipndm", "dpm_solver_pp", "unipc", "dpm_solver_2"])
@pytest.mark.parametrize("loss", ["steps", "rollout"])
def test_learning_helps(mixture, solver, loss):
    """Every student. As a whole: the samples come nearer to the flow. Per step, a step may lose what the steps before it
    gain where it cannot follow; the first has none before it."""
    model = denoiser_of(mixture)
    teacher = Teacher(model)
    artifact = train(model, solver=solver, nfe=5, loss=loss, teacher=teacher, samples=32, batch=16, images=480, lr=0.03,
                     progress=False)  # fmt: skip
    assert artifact.options["afs"] and artifact.nfe == 5
    first, last = artifact.card["loss"]["first"], artifact.card["loss"]["last"]
    assert last[0] < 0.97 * first[0] and len(last) == (3 if loss == "steps" else 1)
    if loss == "rollout":
        assert artifact.card["error"]["rmse"] < 0.95 * artifact.card["before"]["rmse"]


def test_a_plugin_begins_as_its_base(mixture):
    """place="base": the inner levels are those of the base's own finer grid, so nothing is lost before the first step."""
    model, teacher = denoiser_of(mixture), Teacher(denoiser_of(mixture))
    seeds = training_seeds(8)
    for base in ("unipc", "ipndm", "ddim", "dpm_solver_pp"):
        for nfe in (5, 6):
            artifact = train(model, solver=base, nfe=nfe, grid="time_uniform", minutes=1e-9, **QUICK)
            steps = 3
            fine = fastode.schedules.time_uniform(EDM(), 2 * steps)
            plain = SOLVERS[base](fine, afs=nfe % 2 == 1)
            assert relative(teacher.sample(artifact.program(), seeds), teacher.sample(plain, seeds)) < 1e-5  # float32


def test_nothing_is_evaluated_twice(mixture):
    """Steps that begin at the teacher's states evaluate them once; from then on a batch costs one evaluation per step."""
    counts = []
    for epochs in (1, 2, 3):
        model = denoiser_of(mixture)
        artifact = train(model, solver="amed", nfe=6, loss="steps", **{**QUICK, "images": 16 * epochs})
        counts.append(artifact.card["evaluations"])
    assert counts[2] - counts[1] == counts[1] - counts[0] == 16 * 3
    counts = []
    for epochs in (1, 2):
        artifact = train(denoiser_of(mixture), solver="amed", nfe=6, **{**QUICK, "images": 16 * epochs})
        counts.append(artifact.card["evaluations"])
    assert counts[1] - counts[0] == 16 * 5  # a roll-out: all but the first, which is always the same


def test_stopped_runs_continue(mixture, tmp_path):
    """The same numbers, to the bit, as a run that nobody stopped."""
    calls = 0

    def fragile(x, sigma):
        nonlocal calls
        calls += 1
        if calls == 140:
            raise KeyboardInterrupt
        return mixture(x, sigma)

    settings = {"nfe": 5, "samples": 16, "batch": 8, "images": 80, "progress": False}
    teacher = Teacher(denoiser_of(mixture), tolerance=0.1)
    whole = train(teacher.denoiser, teacher=teacher, **settings)
    broken = Denoiser(fragile, "denoised", EDM(), sample_shape=(6,))
    saved = []
    with pytest.raises(KeyboardInterrupt):
        train(broken, teacher=Teacher(broken, tolerance=0.1), folder=tmp_path, save=saved.append, **settings)
    assert (tmp_path / "checkpoint.safetensors").exists() and (tmp_path / "curves.png").exists() and saved
    assert 0 < int(load_file(tmp_path / "checkpoint.safetensors")["done"]) < 10
    again = train(teacher.denoiser, teacher=Teacher(teacher.denoiser, tolerance=0.1), folder=tmp_path, **settings)
    for name, value in whole.numbers.items():
        assert torch.equal(value, again.numbers[name])
    assert again.grid.sigma.tolist() == whole.grid.sigma.tolist()
    with pytest.raises(ValueError, match=r"folder: .* holds a run with batch = 8, this one has 16"):
        train(teacher.denoiser, folder=tmp_path, **{**settings, "batch": 16})
    (tmp_path / "checkpoint.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be resumed"):
        train(teacher.denoiser, folder=tmp_path, **settings)


def test_a_loss_that_is_not_finite_stops(mixture, tmp_path):
    """... with the last good numbers written, and the gradients that are not are taken for nothing."""
    calls = 0

    def network(x, sigma):
        nonlocal calls
        calls += x.requires_grad  # in training, not in the teacher
        return mixture(x, sigma) * (math.nan if calls > 150 else 1.0)

    model = Denoiser(network, "denoised", EDM(), sample_shape=(6,))
    path = tmp_path / "a.safetensors"
    with pytest.raises(FloatingPointError, match=r"loss: nan at step .* of amed; the last good state was kept"):
        train(model, nfe=5, save=lambda a: a.save(path), **{**QUICK, "images": 800})
    kept = Artifact.load(path)
    assert all(bool(torch.isfinite(v).all()) for v in kept.numbers.values()) and kept.card["images"] > 0
    t, _, _ = trainer(denoiser_of(mixture), "amed", 6)
    t.parameters[0].register_hook(lambda g: torch.full_like(g, math.inf))
    gradients = spy(t)
    t.update()
    assert all(bool((g[0] == 1e5).all()) for g in gradients)


def test_two_processes_are_one(mixture, tmp_path):
    """torchrun on the CPU: each takes half of every batch, and the result is that of one process up to sums' order."""
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, torch\n"
        "torch.set_num_threads(1)\n"
        "from fastode.denoisers import Denoiser, GaussianMixture\n"
        "from fastode.learn.amed import train\n"
        "g = torch.Generator().manual_seed(1)\n"
        "mixture = GaussianMixture(2 * torch.randn(4, 6, generator=g), torch.tensor([0.1, 0.3, 0.2, 0.5]))\n"
        "model = Denoiser(mixture, 'denoised', sample_shape=(6,))\n"
        "train(model, nfe=5, samples=16, batch=8, images=40, progress=False, save=lambda a: a.save(sys.argv[1]))\n"
    )
    base = {**os.environ, "PYTHONPATH": str(Path(fastode.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000), "WORLD_SIZE": "2"}
    jobs = [
        subprocess.Popen([sys.executable, script, tmp_path / name], env={**base, **env})
        for name, env in (("two.safetensors", {**shared, "RANK": "0"}), ("no.safetensors", {**shared, "RANK": "1"}))
    ]
    one = train(denoiser_of(mixture), nfe=5, samples=16, batch=8, images=40, progress=False)
    assert [job.wait(timeout=300) for job in jobs] == [0, 0]
    two = Artifact.load(tmp_path / "two.safetensors")
    assert not (tmp_path / "no.safetensors").exists() and two.card["settings"]["processes"] == 2
    assert (
        one.numbers["free"] - two.numbers["free"]
    ).abs().max() < 1e-4  # float32 states, Adam divides small gradients


@pytest.mark.parametrize("loss", ["steps", "rollout"])
@pytest.mark.parametrize("predictor", ["table", "features"])
def test_networks_with_classes_and_guidance(tmp_path, loss, predictor):
    model = fastode.load(write(tmp_path))
    for p in model.network.parameters():
        p.requires_grad_(True)  # a user's network: what trains is the predictor alone
    artifact = train(model, nfe=4, guidance_scale=2.0, class_labels=[0, 2], predictor=predictor, loss=loss, scale_time=0.1,
                     **{**QUICK, "samples": 8, "images": 8, "batch": 4, "micro": 3})  # fmt: skip
    assert all(p.requires_grad and p.grad is None for p in model.network.parameters())
    assert set(artifact.card["learned"]) == {"r", "scale_dir", "scale_time"}
    images = fastode.sample(model, seeds=range(3), solver=artifact, class_labels=[0, 1, 2], guidance_scale=2.0)
    assert images.shape == (3, 1, 8, 8)
    with pytest.raises(ValueError, match="learned for guidance_scale"):
        fastode.sample(model, seeds=range(3), solver=artifact, class_labels=[0, 1, 2])
    other = fastode.load(write(tmp_path / "other"))
    with torch.no_grad():
        next(iter(other.network.parameters())).add_(1)
    with pytest.raises(ValueError, match="learned for weights"):
        fastode.sample(other, seeds=range(3), solver=artifact, class_labels=[0, 1, 2], guidance_scale=2.0)


def test_feature_loss(mixture):
    """In the features of the identity it is the squared error; a network of one's own gets no gradient."""
    own = torch.nn.Linear(6, 3)
    a, b = torch.randn(4, 6), torch.randn(4, 6)
    assert torch.equal(feature_distance(lambda x: x)(a, b), squared(a, b))
    model = denoiser_of(mixture)
    one = train(model, nfe=5, module=lambda x: x, **QUICK)
    two = train(model, nfe=5, **QUICK)
    assert torch.equal(one.numbers["free"], two.numbers["free"])
    train(model, nfe=5, module=own, **QUICK)
    assert own.weight.grad is None
    train(model, nfe=5, module="torch.nn:Identity", **QUICK)


def test_levels_are_learned_between_their_ends(mixture):
    artifact = train(denoiser_of(mixture), nfe=5, samples=16, batch=16, images=160, lr=0.2, progress=False)
    begun = fastode.schedules.time_uniform(EDM(), 3).sigmas
    sigmas = artifact.grid.sigmas
    assert sigmas[[0, -1]].tolist() == begun[[0, -1]].tolist() and bool((sigmas.diff() < 0).all())
    assert artifact.grid.name == "learned" and not torch.allclose(sigmas, begun, rtol=0.05)
    fixed = train(denoiser_of(mixture), nfe=5, levels="fixed", **QUICK)
    assert fixed.grid.sigmas.tolist() == begun.tolist()


def test_bad_input(mixture):
    model = denoiser_of(mixture)
    for settings, message in (
        (
            {"predictor": "features"},
            "predictor: mixture offers no 'bottleneck' to look at; train with predictor='table'",
        ),
        ({"predictor": "both"}, "predictor: must be 'table' or 'features', got 'both'"),
        ({"loss": "end"}, "loss: must be 'rollout' or 'steps'"),
        ({"nfe": 5, "options": {"afs": False}}, "two evaluations per step.* odd ones afs=True"),
        ({"nfe": 6, "options": {"afs": True}}, "even numbers need afs=False"),
        ({"solver": "heun"}, "solver: AMED plugs into"),
        ({"solver": "ipndm", "loss": "steps", "start": "teacher"}, "start: ipndm has a history"),
        ({"loss": "steps", "levels": "learned"}, "levels: a step is compared"),
        ({"loss": "steps", "module": torch.nn.Identity()}, "module: a loss in features"),
        ({"module": "nothing"}, "module: must look like package.module:function"),
        ({"lr": -1.0}, "lr: must be positive"),
        ({"batch": 0}, "batch: must be a whole number of at least 1"),
        ({"scale_time": 1.5}, r"scale_time: must be in \[0, 1\)"),
        ({"options": {"r": 0.5}}, "options: r is what is learned"),
        ({"grid": "best"}, "grid: must be one of"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            train(model, **{**QUICK, **settings})
