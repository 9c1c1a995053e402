"""`fastode train classifier`: it learns, its files load as an extractor, and it reads classes in a comparison."""

import json
import re

import numpy as np
import pytest
import torch

from fastode.cli import main
from fastode.evaluate.features import extractor
from fastode.evaluate.results import cases, read
from fastode.learn.data import load_images
from tests import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes that a bright row tells apart."""
    path = tmp_path_factory.mktemp("classifier")
    random = np.random.default_rng(0)
    for name, count in (("train", 1536), ("test", 90)):
        labels = np.arange(count) % 3
        images = random.integers(0, 90, (count, 8, 8), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[:, 3 * label : 3 * label + 2] = (
                240  # shifts of the augmentation go up and down, and two pixels sideways
            )
            image[: 1 + label] = 120
        np.savez(path / f"{name}.npz", images=images, labels=labels)
    argv = ["train", "classifier", "--data", path / "train.npz", "--test", path / "test.npz", "--out", path / "judge"]
    assert main([str(a) for a in [*argv, "--resolution", 8, "--epochs", 6]]) == 0
    return path


def test_it_learns_and_loads(folder):
    card = json.loads((folder / "judge.json").read_text())
    assert card["test_accuracy"] > 0.8  # a third by guessing
    assert card["config"] == {"channels": 1, "resolution": 8, "classes": 3, "widths": [16, 32, 64], "hidden": 128}
    judge = extractor(str(folder / "judge.safetensors"))
    test = load_images(folder / "test.npz")
    x, y = test.batch(torch.arange(len(test)))
    features = judge(x)
    assert features.shape == (90, 128)
    assert float((judge.read(features) == y).double().mean()) == pytest.approx(card["test_accuracy"])


def test_it_judges_samples(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTODE_CACHE", str(tmp_path / "cache"))
    tiny_model.write(tmp_path)
    argv = [
        "compare",
        "--model",
        tmp_path / "tiny.safetensors",
        "--solvers",
        "ddim",
        "--nfe",
        2,
        "--samples",
        9,
        "--blocks",
        3,
    ]
    argv += ["--features", folder / "judge.safetensors", "--steps", 8, "--bound", 0.5, "--screen", 3, "--device", "cpu"]
    assert main([str(a) for a in [*argv, "--out", tmp_path / "a.jsonl", "--no-report"]]) == 0
    converged, case = cases(read(tmp_path / "a.jsonl")[1])
    for found in (converged, case):
        assert 0 <= found["accuracy"] <= 1 and 9 * found["accuracy"] == pytest.approx(round(9 * found["accuracy"]))


def test_bad_input(folder, tmp_path, capsys):
    np.savez(tmp_path / "plain.npz", images=np.zeros((200, 8, 8), dtype=np.uint8))
    np.savez(tmp_path / "few.npz", images=np.zeros((20, 8, 8), dtype=np.uint8), labels=np.arange(20) % 2)
    for data, test, message in (
        ("plain.npz", folder / "test.npz", "data: a classifier needs labels"),
        (folder / "train.npz", "plain.npz", "test: a classifier needs labels"),
        ("few.npz", folder / "test.npz", "epochs: need at least 1 epoch of 128 images"),
        ("none.npz", folder / "test.npz", "data: .*none.npz does not exist"),
    ):
        argv = ["train", "classifier", "--data", tmp_path / data, "--test", tmp_path / test, "--out", tmp_path / "o"]
        assert main([str(a) for a in [*argv, "--resolution", 8]]) == 2
        assert re.match(f"fastode train: {message}", capsys.readouterr().err)
    (folder / "broken.safetensors").write_bytes(b"x")
    (folder / "broken.json").write_text("{}")
    with pytest.raises(ValueError, match=r"features: .*broken.safetensors is no classifier"):
        extractor(str(folder / "broken.safetensors"))
