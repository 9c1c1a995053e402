"""Learned solvers on disk: what is written is what is read, and it is refused where it does not belong."""

import json

import pytest
import torch
from safetensors.torch import save_file

import fastode
from fastode import Artifact
from fastode.artifact import identity, weights_hash
from fastode.cli import main
from fastode.schedules import EDM, Cosine, Discrete, Flow, VPLinear, karras, log_snr
from fastode.schedules.noise import schedule_from_dict, schedule_to_dict
from tests.tiny_model import write


@pytest.fixture
def artifact():
    model = {"sample_shape": [6], "name": "mixture"}
    return Artifact("grid", "unipc", karras(EDM(), 5), options={"order": 3}, model=model, card={"seconds": 1.5})


def test_round_trip(tmp_path, artifact, mixture):
    artifact.save(tmp_path / "a.safetensors")
    again = Artifact.load(tmp_path / "a.safetensors")
    assert again.grid.sigma.tolist() == artifact.grid.sigma.tolist() and again.grid.schedule == EDM()
    assert (again.method, again.solver, again.options, again.model, again.card) == (
        artifact.method, artifact.solver, artifact.options, artifact.model, artifact.card
    )  # fmt: skip
    x = 80 * torch.randn(3, 6, dtype=torch.float64)
    denoiser = fastode.Denoiser(mixture, "denoised", sample_shape=(6,))
    played = fastode.sample(denoiser, x, solver=tmp_path / "a.safetensors")
    plain = fastode.sample(denoiser, x, solver="unipc", grid=artifact.grid, order=3)
    assert torch.equal(played, plain)  # JSON keeps every bit of a float64
    assert artifact.nfe == 5 and [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("schedule", [EDM(0.01, 50), VPLinear(), Cosine(), Discrete.linear(steps=20), Flow(shift=3.0)])
def test_schedules_as_data(schedule):
    again = schedule_from_dict(json.loads(json.dumps(schedule_to_dict(schedule))))
    t = torch.linspace(schedule.t_end + 0.1, schedule.t_start - 0.1, 5, dtype=torch.float64)
    assert torch.equal(again.rho(t), schedule.rho(t)) and type(again) is type(schedule)


def test_another_model_is_refused(artifact, mixture):
    x = torch.randn(2, 3)
    with pytest.raises(ValueError, match="learned for sample_shape"):
        fastode.sample(fastode.Denoiser(mixture, "denoised", sample_shape=(3,)), x, solver=artifact)
    with pytest.raises(ValueError, match="grid: a learned solver brings its own"):
        fastode.sample(fastode.Denoiser(mixture, "denoised", sample_shape=(6,)), x, solver=artifact, grid=[1.0, 0.5])


def test_the_weights_tell_models_apart():
    one, other = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    assert weights_hash(one) != weights_hash(other)
    before = weights_hash(one)
    assert before == weights_hash(one.to(torch.bfloat16))  # a cast is the same model
    assert weights_hash(lambda x: x) is None
    trained = identity(fastode.Denoiser(one, "x0", VPLinear()))
    learned = Artifact("grid", "ddim", log_snr(VPLinear(), 3), model=trained)
    learned.check(fastode.Denoiser(one, "x0", VPLinear()))
    with pytest.raises(ValueError, match="learned for weights"):
        learned.check(fastode.Denoiser(other, "x0", VPLinear()))
    guided = Artifact("grid", "ddim", log_snr(VPLinear(), 3), model={"guidance_scale": 1.5})
    with pytest.raises(ValueError, match="learned for guidance_scale"):
        guided.check(fastode.Denoiser(one, "x0", VPLinear()), guidance_scale=2.0)


@pytest.mark.parametrize("damage", ["missing", "empty", "foreign", "cut", "method"])
def test_bad_files(tmp_path, artifact, damage):
    path = tmp_path / "a.safetensors"
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "foreign":
        save_file({"x": torch.zeros(1)}, path)
    elif damage == "cut":
        artifact.save(path)
        path.write_bytes(path.read_bytes()[:100])
    elif damage == "method":
        artifact.save(path)
        path.write_bytes(path.read_bytes().replace(b'"method\\": \\"grid', b'"method\\": \\"girl'))
    with pytest.raises(FileNotFoundError if damage == "missing" else ValueError, match=r"solver: .*a\.safetensors"):
        Artifact.load(path)


def test_from_the_command_line(tmp_path, capsys):
    weights = write(tmp_path)
    model = fastode.load(weights)
    path = tmp_path / "learned.safetensors"
    Artifact("grid", "unipc", karras(model.schedule, 3), model=identity(model)).save(path)
    out = tmp_path / "o.npz"
    arguments = ["sample", "--model", str(weights), "--seeds", "0-3", "--out", str(out), "--solver", str(path)]
    assert main(arguments) == 0 and out.exists()
    assert main([*arguments, "--nfe", "5"]) == 2 and "brings its own grid" in capsys.readouterr().err
    assert main(["describe", "--solver", str(path)]) == 0


def test_unknown_method_and_solver():
    grid = karras(EDM(), 3)
    with pytest.raises(ValueError, match="method: must be one of"):
        Artifact("nothing", "ddim", grid)
    with pytest.raises(ValueError, match="solver: must be one of"):
        Artifact("grid", "nothing", grid)
