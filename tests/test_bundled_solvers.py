"""Learned solvers in the box: they belong to the bundled model, do what their names say, and beat what they grew from."""

import pytest
import torch

import fastode
from fastode import Artifact
from fastode.models import WEIGHTS, bundled_solvers, load_solver
from fastode.schedules import karras, time_uniform


@pytest.fixture(scope="module")
def model():
    return fastode.load("mnist")


def test_what_there_is():
    assert bundled_solvers("mnist") == [f"mnist/{s}-{n}" for s in ("amed", "amed_unipc") for n in range(3, 11)]
    assert all(p.stat().st_size < 10_000 for p in (WEIGHTS / "solvers").glob("*/*.safetensors"))  # a few numbers each


@pytest.mark.parametrize("name", bundled_solvers())
def test_they_are_what_their_names_say(model, name):
    artifact = fastode.api.learned(name)
    assert isinstance(artifact, Artifact) and artifact.nfe == int(name.rpartition("-")[2])
    assert name.partition("/")[2].rpartition("-")[0] == artifact.program().name
    artifact.check(model)
    with pytest.raises(ValueError, match="learned for"):
        artifact.check(fastode.Denoiser(lambda x, sigma: x, "denoised", sample_shape=(3, 8, 8)))
    assert artifact.card["data"].startswith("none") and artifact.card["error"]["rmse"] < artifact.card["before"]["rmse"]
    assert artifact.card["settings"]["loss"] == "rollout"


def test_they_play_by_name(model):
    one = fastode.sample(model, seeds=[1, 2], solver="mnist/amed_unipc-5", class_labels=[3, 4])
    two = fastode.sample(model, seeds=[1, 2], solver=load_solver("mnist", "amed_unipc", nfe=5), class_labels=[3, 4])
    assert torch.equal(one, two)
    with pytest.raises(FileNotFoundError, match="no bundled solver mnist/amed-2"):
        fastode.sample(model, seeds=[1], solver="mnist/amed-2", class_labels=[3])
    with pytest.raises(FileNotFoundError, match="no bundled solver"):
        load_solver("mnist", "amed", nfe=99)


def test_the_plugin_beats_its_base(model):
    """On seeds that nothing was learned from, at equal evaluations, on both of the base's grids. The README has the table on
    many more seeds, where the learned error is a bit more than half."""

    def draw(solver, **own):
        return fastode.sample(model, seeds=range(8), class_labels=range(8), solver=solver, **own)

    truth = draw("unipc", grid=karras(model.schedule, 32))

    def error(samples):
        return float((samples - truth).square().mean().sqrt())

    learned = error(draw("mnist/amed_unipc-5"))
    assert learned < 0.9 * error(draw("unipc", grid=time_uniform(model.schedule, 5)))
    assert learned < 0.9 * error(draw("unipc", grid=time_uniform(model.schedule, 6), afs=True))
