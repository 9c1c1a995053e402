"""The examples run as they are, and say the truth about themselves."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import threading
import urllib.error
import urllib.request
from pathlib import Path
from types import ModuleType

import numpy
import pytest
import torch
from PIL import Image

import fastode
from tests import tiny_model

ROOT = Path(__file__).parents[1]


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_swap_scheduler(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    difference = example("swap_scheduler").main(["--steps", "4", "--out", str(tmp_path)])
    assert difference < 1e-4 and Image.open(tmp_path / "1.png").size == (8, 8)


@pytest.mark.parametrize("features", [False, True])
def test_train_amed(tmp_path: Path, features: bool) -> None:
    pytest.importorskip("diffusers")
    file = tmp_path / "amed.safetensors"
    arguments = ["--nfe", "4", "--samples", "8", "--images", "32", "--out", str(file), *["--features"] * features]
    learned, _ = example("train_amed").main(arguments)  # a random network is no denoiser: its error means nothing
    made = fastode.Artifact.load(file)
    assert made.nfe == 4 and file.stat().st_size < 100_000 and math.isfinite(learned)
    with pytest.raises(ValueError, match="this amed artifact was learned for"):
        made.check(fastode.load("mnist"))


def test_export_and_serve(tmp_path: Path) -> None:
    """A picture from the server is the engine's sample of that seed and label."""
    weights, file = tiny_model.write(tmp_path), tmp_path / "three.pt2"
    arguments = ["--out", str(file), "--model", str(weights), "--nfe", "2", "--batch", "1", "--solver", "ddim"]
    assert example("export_sampler").main(arguments) < 2e-5
    serve = example("serve")
    running = serve.server(serve.load_sampler(file), 0)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    root = f"http://127.0.0.1:{running.server_address[1]}"
    try:
        assert json.loads(urllib.request.urlopen(root, timeout=30).read())["nfe"] == 2
        picture = Image.open(io.BytesIO(urllib.request.urlopen(f"{root}/sample?seed=7&label=2", timeout=30).read()))
        want = fastode.sample(fastode.load(weights), seeds=[7], class_labels=[2], solver="ddim", nfe=2)[0, 0]
        want = ((want.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
        assert numpy.abs(numpy.asarray(picture).astype(int) - want).max() <= 1  # a rounding tie may fall either way
        for query, message in [("seed=7&label=9", "label: must be in 0 .. 2"), ("sed=1", "sed: the parameters")]:
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(f"{root}/sample?{query}", timeout=30)
            assert refused.value.code == 400 and message in refused.value.read().decode()
    finally:
        running.shutdown()
        running.server_close()
        thread.join()
