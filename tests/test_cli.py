"""The command line: what it writes is what the library makes, errors are one line, and importing costs little."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import fastode
from fastode import SOLVERS, Artifact, models
from fastode.api import grid_maker
from fastode.cli import main
from fastode.evaluate.pictures import picture_grid, to_uint8
from fastode.nets.predictor import StepTable, to_numbers
from fastode.program import Program
from fastode.schedules import EDM, karras
from tests import tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(tiny_model.write(tmp_path_factory.mktemp("model")))


def run(*argv: object) -> None:
    assert main([str(a) for a in argv]) == 0


def arrays(path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file}


# -- sample --------------------------------------------------------------------------------------------------------


def test_samples_are_those_of_the_library(tiny, tmp_path, capsys):
    """Seeds, labels in turn, guidance, solver, options and grid mean what they mean in ``fastode.sample``."""
    out = tmp_path / "deep" / "s.npz"
    run(
        *("sample", "--model", tiny, "--solver", "unipc", "--nfe", 4, "--grid", "karras", "-o", "order=2"),
        *("-o", "variant=bh1", "--seeds", "3,7,100-102", "--labels", "2,0", "--guidance", 1.5, "--out", out),
    )
    made = arrays(out)
    assert made["seeds"].tolist() == [3, 7, 100, 101, 102]
    assert made["labels"].tolist() == [2, 0, 2, 0, 2]
    d = fastode.load(tiny)
    grid = fastode.GRIDS["karras"](d.schedule, 4)
    want = fastode.sample(
        d,
        seeds=[3, 7, 100, 101, 102],
        class_labels=[2, 0, 2, 0, 2],
        guidance_scale=1.5,
        solver="unipc",
        grid=grid,
        order=2,
        variant="bh1",
    )
    assert np.array_equal(made["samples"], want.numpy())
    shown = capsys.readouterr()
    assert re.search(r"solver   unipc \(order=2, variant=bh1\) on karras", shown.out)
    assert re.search(r"NFE      4\b", shown.out)
    assert re.search(r"time     [\d.]+ s for 5 images, [\d.]+ images/s", shown.out)
    assert re.search(r"device   cpu, backend \w+", shown.out)
    assert f"wrote    {out}" in shown.out
    assert "4/4" in shown.err  # the progress bar


def test_batches_do_not_change_samples(tiny, tmp_path):
    """Nor does the backend, to rounding."""
    common = ["sample", "--model", tiny, "--seeds", "0-6"]
    run(*common, "--out", tmp_path / "a.npz")
    run(*common, "--batch", 3, "--out", tmp_path / "b.npz")
    run(*common, "--backend", "reference", "--out", tmp_path / "c.npz")
    a, b, c = (arrays(tmp_path / f"{n}.npz") for n in "abc")
    # matrix products choose their order of summation by batch size; five evaluations in float32
    np.testing.assert_allclose(b["samples"], a["samples"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(c["samples"], a["samples"], rtol=0, atol=1e-4)
    assert a["labels"].tolist() == [0, 1, 2, 0, 1, 2, 0]  # all classes in turn
    assert float(np.abs(a["samples"]).max()) > 0.1


def test_a_grid_picture(tiny, tmp_path):
    run("sample", "--model", tiny, "--seeds", "0-11", "--out", tmp_path / "s.png")
    run("sample", "--model", tiny, "--seeds", "0-11", "--out", tmp_path / "s.npz")
    want = picture_grid(torch.from_numpy(arrays(tmp_path / "s.npz")["samples"]), columns=10)
    with Image.open(tmp_path / "s.png") as picture:
        assert picture.format == "PNG"
        assert np.array_equal(np.asarray(picture), np.asarray(want))


def test_a_folder_of_pictures(tiny, tmp_path):
    for name in ("f", "f"):  # a second run replaces the pictures
        run("sample", "--model", tiny, "--seeds", "5,12", "--labels", "1", "--out", tmp_path / name)
    run("sample", "--model", tiny, "--seeds", "5,12", "--labels", "1", "--out", tmp_path / "s.npz")
    pixels = to_uint8(torch.from_numpy(arrays(tmp_path / "s.npz")["samples"]))
    assert sorted(p.name for p in (tmp_path / "f").iterdir()) == ["000005_class1.png", "000012_class1.png"]
    for k, seed in enumerate((5, 12)):
        with Image.open(tmp_path / "f" / f"{seed:06d}_class1.png") as picture:
            assert np.array_equal(np.asarray(picture), pixels[k].squeeze(-1))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_networks_on_the_cpu(tiny, tmp_path, dtype):
    common = ["sample", "--model", tiny, "--seeds", "0-5", "--nfe", 4, "--guidance", 1.2]
    run(*common, "--out", tmp_path / "wide.npz")
    run(*common, "--dtype", dtype, "--out", tmp_path / "narrow.npz")
    wide, narrow = (arrays(tmp_path / f"{n}.npz")["samples"] for n in ("wide", "narrow"))
    assert narrow.dtype == np.float32
    # 8 or 11 bits in a network of some twenty layers and four evaluations: 2^-9 or 2^-12, times twenty
    bound = 20 * (2**-9 if dtype == "bfloat16" else 2**-12)
    error = np.sqrt(((wide - narrow) ** 2).mean() / (wide**2).mean())
    assert 1e-5 < error < bound


def test_models_without_classes(tmp_path):
    config = tiny_model.UNetConfig(**{**tiny_model.CONFIG.to_dict(), "num_classes": 0, "in_channels": 3})
    path = tiny_model.write(tmp_path, config=config)
    run("sample", "--model", path, "--seeds", "0-1", "--out", tmp_path / "s.npz")
    assert set(arrays(tmp_path / "s.npz")) == {"samples", "seeds"}
    run("sample", "--model", path, "--seeds", "0-1", "--out", tmp_path / "f")
    assert sorted(p.name for p in (tmp_path / "f").iterdir()) == ["000000.png", "000001.png"]
    assert (
        main(["sample", "--model", str(path), "--seeds", "0-1", "--labels", "1", "--out", str(tmp_path / "s.png")]) == 2
    )


ERRORS = {
    "model": (["--model", "nowhere"], "model: no bundled model or weights file 'nowhere'"),
    "solver": (["--solver", "unipcc"], "solver: unknown solver 'unipcc'; did you mean 'unipc'"),
    "option": (["-o", "ordre=2"], "dpm_solver_pp: unknown option 'ordre'; did you mean 'order'?"),
    "option without value": (["-o", "order"], "option: must be NAME=VALUE, got 'order'"),
    "order": (["-o", "order=7"], "order: dpm_solver_pp has orders 1, 2, 3, got 7"),
    "grid": (["--grid", "uniform"], "grid: must be one of karras, .*, got 'uniform'"),
    "grid of labels": (["--grid", "trailing"], "schedule: this grid picks labels of a Discrete schedule"),
    "nfe": (
        ["--solver", "dpm_solver_3", "--nfe", "4"],
        "nfe: dpm_solver_3 cannot make exactly 4 evaluations; it can make",
    ),
    "nfe 0": (["--nfe", "0"], "nfe: must be a whole number of at least 1, got 0"),
    "nfe and steps": (["--nfe", "5", "--steps", "5"], "nfe: give --nfe or --steps, not both"),
    "steps": (["--steps", "0"], "steps: must be a whole number of at least 1, got 0"),
    "labels": (["--labels", "4"], "class_labels: must be in 0 .. 3, got 4"),
    "a late label": (["--labels", "0,0,0,0,9", "--batch", "2"], "class_labels: must be in 0 .. 3, got 9"),
    "labels in words": (["--labels", "three"], "labels: must look like 0-79 or 1,5,9, got 'three'"),
    "seeds": (["--seeds", "1,x"], "seeds: must look like 0-79 or 1,5,9, got '1,x'"),
    "no seeds": (["--seeds", "5-2"], "seeds: '5-2' names no number"),
    "large seed": (["--seeds", str(2**63)], "seeds: must fit in 64 signed bits"),
    "batch": (["--batch", "0"], "batch: must be at least 1, got 0"),
    "backend": (["--backend", "tritn"], "backend: must be one of auto, .*did you mean 'triton'"),
    "device": (["--device", "abacus"], "device: 'abacus' cannot be used here"),
    "guidance": (["--guidance", "nan"], "guidance_scale: must be finite, got nan"),
    "out": (["--out", "s.jpg"], "out: must end in .png, .npz or be a folder, got 's.jpg'"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_one_line(tiny, tmp_path, capsys, monkeypatch, name):
    """Exit status 2, nothing on stdout, no progress bar, no file: nothing was computed."""
    arguments, message = ERRORS[name]
    monkeypatch.chdir(tmp_path)
    argv = ["sample", "--model", tiny, "--seeds", "0-5", "--out", "s.png", *arguments]
    assert main(argv) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.fullmatch(f"fastode sample: {message}.*\n", shown.err)
    assert not list(tmp_path.iterdir())


def test_damaged_weights_are_one_line(tmp_path, capsys):
    for spoil in (lambda p: p.write_bytes(p.read_bytes()[:500]), lambda p: p.with_suffix(".json").write_text("{")):
        path = tiny_model.write(tmp_path)
        spoil(path)
        assert main(["sample", "--model", str(path), "--out", str(tmp_path / "s.png")]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    other = tiny_model.UNetConfig(**{**tiny_model.CONFIG.to_dict(), "channels": (16, 16)})
    path = tiny_model.write(tmp_path, {"config": other.to_dict()})
    assert main(["sample", "--model", str(path), "--out", str(tmp_path / "s.png")]) == 2
    assert capsys.readouterr().err.count("\n") == 1  # torch's own message has many lines


def test_targets_that_exist_as_something_else(tiny, tmp_path, capsys):
    (tmp_path / "a.png").mkdir()
    (tmp_path / "b").write_text("")
    for name in ("a.png", "b"):
        assert main(["sample", "--model", tiny, "--seeds", "0", "--out", str(tmp_path / name)]) == 2
        assert re.fullmatch("fastode sample: out: .* exists and is a (file|folder)\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    "argv", [[], ["smaple"], ["sample", "--nfe", "five"], ["sample", "--dtype", "int8"], ["train"]]
)
def test_misspelt_commands(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "usage: fastode" in capsys.readouterr().err


def test_interrupting_is_no_crash(tiny, tmp_path, capsys, monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fastode.Engine, "__call__", interrupted)
    assert main(["sample", "--model", tiny, "--seeds", "0", "--out", str(tmp_path / "s.png")]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert not list(tmp_path.iterdir())


# -- the other commands --------------------------------------------------------------------------------------------


def test_solvers_lists_all_and_how_they_make_an_nfe(capsys):
    """Every line "5 evaluations: ..." is true: the steps and options it names make a program of that many."""
    run("solvers", "--nfe", 5)
    text = capsys.readouterr().out
    *blocks, learned = re.split(r"\n(?=\S)", text.strip())
    assert learned == "learned, for the bundled models: " + ", ".join(models.bundled_solvers())
    assert [re.split(r"\s", b)[0] for b in blocks] == list(SOLVERS)
    made = 0
    for block, (name, solver) in zip(blocks, SOLVERS.items(), strict=True):
        assert solver.summary in block
        for option in solver.options:
            assert f"{option}=" in block
        also = re.search(r"\(also (.*)\)", block.splitlines()[0])
        assert set(also[1].split(", ") if also else []) == {
            a for a, target in SOLVERS.aliases.items() if target == name
        }
        found = re.search(r"5 evaluations: (\d+) steps(?: with (.*?))? on", block)
        if found is None:
            assert "cannot make exactly 5 evaluations; it can make" in block
            continue
        options = {k: v == "True" for k, v in (o.split("=") for o in (found[2] or "").split(", ") if o)}
        grid = grid_maker(solver, fastode.schedules.EDM())(steps=int(found[1]), final=solver.final)
        assert solver(grid, **options).nfe == 5
        made += 1
    assert made >= len(SOLVERS) - 1  # PNDM's warm-up steps cost four
    run("solvers")
    assert "evaluations:" not in capsys.readouterr().out


def test_describe_prints_and_saves_a_program(tiny, tmp_path, capsys):
    run("describe", "--solver", "heun", "--steps", 2, "--save", tmp_path / "p.safetensors")
    shown = capsys.readouterr().out
    program = Program.load(tmp_path / "p.safetensors")
    assert shown == program.describe() + f"\n# wrote {tmp_path / 'p.safetensors'}\n"
    assert program.nfe == 4
    run("describe", "--solver", "ddim", "--nfe", 3, "--model", tiny, "-o", "afs=true")
    assert "# ddim: 3 evaluations, 4 steps" in capsys.readouterr().out
    assert main(["describe", "--solver", "nothing"]) == 2


def test_info_names_versions_and_backends(capsys):
    run("info")
    text = capsys.readouterr().out
    assert torch.__version__ in text
    assert "cpu: ready" in text
    for name in ("reference", *fastode.backends.BACKENDS):
        assert f"  {name}" in text


def test_train_and_sample_what_was_trained(tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 255, (20, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "d.npz", images=images, labels=np.arange(20) % 2)
    argv = ["train", "denoiser", "--data", tmp_path / "d.npz", "--out", tmp_path / "net", "--resolution", 8]
    argv += ["--channels", "8,16", "--images", 12, "--batch", 4, "--patch", 1, "--no-bf16"]
    run(*argv)
    assert "20 images [1, 8, 8], 2 classes" in capsys.readouterr().out
    card = json.loads((tmp_path / "net" / "weights.json").read_text())
    assert (card["name"], card["steps"], card["classes"]) == ("net", 3, ["0", "1"])
    assert card["data"] == "d.npz, 20 images"
    run("sample", "--model", tmp_path / "net" / "weights", "--seeds", "0-2", "--out", tmp_path / "s.npz")
    assert arrays(tmp_path / "s.npz")["samples"].shape == (3, 1, 8, 8)
    capsys.readouterr()
    for extra, message in (
        (["--lr", "0.5"], "settings: .* was started with"),
        (["--channels", "16,16"], "config: .* was started with"),
        (["--channels", "8,12", "--fresh"], "channels: every width must be a multiple of 8"),
        (["--batch", "0"], "batch: must be at least 1"),
        (["--data", str(tmp_path / "no.npz")], "data: .*no.npz does not exist"),
        (["--out", str(tmp_path / "d.npz"), "--fresh"], ".*d.npz"),
    ):
        assert main([str(a) for a in (*argv, *extra)]) == 2
        assert re.search(f"^fastode train: {message}", capsys.readouterr().err, re.MULTILINE)


def test_demo(tmp_path, capsys, monkeypatch):
    """The whole command on a small stand-in for the bundled model: ten classes, so eighty tiny digits."""
    config = tiny_model.UNetConfig(**{**tiny_model.CONFIG.to_dict(), "num_classes": 10})
    tiny_model.write(tmp_path / "weights", name="mnist", config=config)
    monkeypatch.setattr(models, "WEIGHTS", tmp_path / "weights")
    (tmp_path / "weights" / "solvers" / "mnist").mkdir(parents=True)
    learned = Artifact("amed", "unipc", karras(EDM(), 3), to_numbers(StepTable(3)), {"afs": True})
    learned.save(tmp_path / "weights" / "solvers" / "mnist" / "amed_unipc-5.safetensors")
    run("demo", "--out", tmp_path / "out", "--device", "cpu")
    shown = capsys.readouterr()
    assert re.search(r"NFE      5\n", shown.out)
    assert "for 80 images" in shown.out
    assert "5/5" in shown.err
    for name, tiles in (("digits.png", (8, 10)), ("previews.png", (4, 10))):
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.width >= tiles[0] * 2 * 8
            assert picture.height >= tiles[1] * 2 * 8


# -- importing -----------------------------------------------------------------------------------------------------


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_fastode_costs_little():
    """At most 15% over torch, as the time the process itself spends, the least of three: other load does not count."""
    code = """
import time
a = time.process_time()
import torch
b = time.process_time()
import fastode
print(b - a, time.process_time() - b)
"""
    runs = [[float(v) for v in python(code).split()] for _ in range(3)]
    assert min(r[1] for r in runs) < 0.15 * min(r[0] for r in runs)


def test_importing_fastode_imports_nothing_heavy():
    """Optional packages, and what only one command needs, wait until they are asked for; the command line too."""
    heavy = (
        "scipy",
        "matplotlib",
        "PIL",
        "triton",
        "diffusers",
        "safetensors",
        "cupy",
        "torch._dynamo",
        "torch._inductor",
    )
    code = "import sys\nimport torch\nbefore = set(sys.modules)\n{}\nprint(*sorted(set(sys.modules) - before))"
    loaded = python(code.format("import fastode")).split()
    assert "fastode.engine" in loaded
    for name in heavy:
        assert not [m for m in loaded if m == name or m.startswith(name + ".")], name
    assert not [
        m for m in loaded if m.startswith(("fastode.learn.", "fastode.nets.", "fastode.evaluate.", "fastode.cli"))
    ]


def test_the_installed_command():
    """``python -m fastode.cli`` and its help, in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "fastode.cli", "--help"], capture_output=True, text=True, check=True)
    for command in ("sample", "solvers", "describe", "train", "demo", "info"):
        assert command in done.stdout
