"""`fastode compare`: figures are what they are called, files resume to the same results, wrong input is one line."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import fastode
from fastode.cli import main
from fastode.commands.compare import spec
from fastode.evaluate import compare as module
from fastode.evaluate.cases import plan
from fastode.evaluate.compare import MEASURED
from fastode.evaluate.frechet import Statistics, frechet_distance
from fastode.evaluate.reference import Converged
from fastode.evaluate.results import Results, cases, parts, read
from fastode.schedules import EDM, karras
from tests import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model and real pictures for it."""
    path = tmp_path_factory.mktemp("compare")
    tiny_model.write(path)
    images = np.random.default_rng(0).integers(0, 255, (60, 8, 8), dtype=np.uint8)
    np.savez(path / "real.npz", images=images, labels=np.arange(60) % 3)
    return path


@pytest.fixture(autouse=True)
def _own_cache(folder, monkeypatch):
    monkeypatch.setenv("FASTODE_CACHE", str(folder / "cache"))


def arguments(folder: Path, out: Path, *more: object) -> list[str]:
    fixed = {
        "--model": folder / "tiny.safetensors",
        "--solvers": "unipc",
        "--nfe": "2,3",
        "--samples": 24,
        "--blocks": 3,
    }
    fixed |= {"--screen": 6, "--batch": 8, "--steps": 8, "--bound": 0.5, "--reference": folder / "real.npz"}
    fixed |= {"--features": "pixels", "--device": "cpu", "--out": out}
    argv = [str(v) for pair in fixed.items() for v in pair]
    i = argv.index("--solvers") + 2
    return ["compare", *argv[:i], "ddim", "heun", *argv[i:], "--no-report", *map(str, more)]


@pytest.fixture(scope="module")
def finished(folder):
    os.environ["FASTODE_CACHE"] = str(folder / "cache")
    out = folder / "finished.jsonl"
    assert main(arguments(folder, out)) == 0
    return out


def timeless(path: Path) -> list[dict]:
    """Header and records of the main file, less what a clock has measured."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in (*MEASURED, "machine")} for r in found]


# -- what is measured ------------------------------------------------------------------------------------------------


def test_figures_are_what_they_are_called(folder, finished):
    """One case computed by hand: root mean square error, cosine, distance of features, evaluations, levels."""
    header, records = read(finished)
    case = next(c for c in cases(records) if c["case"] == "ddim@3")
    d = fastode.load(folder / "tiny.safetensors")
    labels = [s % 3 for s in range(24)]
    samples = fastode.sample(d, seeds=range(24), class_labels=labels, solver="ddim", grid=case["sigmas"])
    true = Converged(d).solve(range(24), labels, steps=8)
    assert case["rmse"] == pytest.approx(float((samples - true).square().mean().sqrt()), rel=1e-4)
    cosine = torch.nn.functional.cosine_similarity(samples.flatten(1), true.flatten(1)).mean()
    assert case["cosine"] == pytest.approx(float(cosine), abs=1e-5)
    real = np.load(folder / "real.npz")["images"].reshape(60, 64) / 127.5 - 1
    distance = frechet_distance(Statistics.of(samples.flatten(1)), Statistics.of(torch.from_numpy(real)))
    assert case["frechet"] == pytest.approx(distance, rel=1e-4)
    assert (case["nfe"], case["count"], len(case["sigmas"]), len(case["truncation"])) == (3, 24, 4, 3)
    for name in ("rmse", "cosine", "frechet", "precision", "recall", "density", "coverage"):
        assert case[f"{name}_se"] >= 0
    assert header["model"]["weights"] == fastode.artifact.weights_hash(d.network)
    assert not list(finished.parent.glob("finished.features/*"))  # features go when the case is complete


def test_the_best_placement_is_taken(finished):
    _, records = read(finished)
    screens = [r for r in records if r["kind"] == "screen"]
    assert {r["case"] for r in screens} == {"unipc@2", "unipc@3", "ddim@2", "ddim@3", "heun@2", "heun@3"} - {
        c["case"] for c in cases(records) if "tried" not in c
    }
    for r in screens:
        assert r["rmse"][r["chosen"]] == min(r["rmse"].values()) and len(r["rmse"]) > 1


def test_every_case_is_there_and_the_converged_one(finished):
    _, records = read(finished)
    found = cases(records)
    assert found[0]["case"] == "converged" and "rmse" not in found[0]
    assert {c["case"] for c in found[1:]} == {f"{s}@{n}" for s in ("unipc", "ddim", "heun") for n in (2, 3)}
    assert all(c["seconds_per_image"] > 0 and c["state_bytes"] > 0 and c["picture"] for c in found[1:])
    solution = next(r for r in records if r["kind"] == "solution")
    assert solution["change"] < solution["bound"] and sum(solution["variance"]) <= 1 + 1e-9


def test_no_reference_and_metrics_of_choice(folder, tmp_path):
    argv = arguments(folder, tmp_path / "a.jsonl", "--reference", "none", "--metrics", "rmse,truncation", "--nfe", 2)
    assert main(argv) == 0
    case = cases(read(tmp_path / "a.jsonl")[1])[1]
    assert "rmse" in case and "truncation" in case and "frechet" not in case and "cosine" not in case


def test_a_learned_solver_and_fixed_levels(folder, tmp_path):
    d = fastode.load(folder / "tiny.safetensors")
    model = fastode.artifact.identity(d)
    fastode.Artifact("grid", "unipc", karras(EDM(), 4), options={"order": 2}, model=model).save(
        tmp_path / "own.safetensors"
    )
    argv = arguments(
        folder, tmp_path / "a.jsonl", "--nfe", 2, "--solvers", tmp_path / "own.safetensors", "unipc:order=2@karras"
    )
    assert main(argv) == 0
    found = cases(read(tmp_path / "a.jsonl")[1])
    assert [c["case"] for c in found] == ["converged", "unipc:order=2@karras@2", "own@4"]
    assert not [r for r in read(tmp_path / "a.jsonl")[1] if r["kind"] == "screen"]
    assert found[1]["options"] == {"order": 2} and found[1]["grid"].startswith("karras")


def test_solvers_that_draw_noise_have_no_error_to_the_ode(folder, tmp_path):
    assert main(arguments(folder, tmp_path / "a.jsonl", "--nfe", 2, "--solvers", "ddim:eta=1.0")) == 0
    case = cases(read(tmp_path / "a.jsonl")[1])[1]
    assert case["stochastic"] and "rmse" not in case and "truncation" not in case and case["frechet"] > 0


# -- resuming --------------------------------------------------------------------------------------------------------


def test_killed_at_any_line_and_resumed_it_is_the_same_file(folder, finished, tmp_path, monkeypatch):
    """Stopped after every few records, also in the middle of a line, then run on: the same records in the same order."""
    out = tmp_path / "a.jsonl"
    append, stop = Results.append, 0

    def limited(self, record):
        if len(self.records) >= stop:
            os.write(self._file, b'{"kind":"block","case":"uni')  # the line that the kill cut off
            raise KeyboardInterrupt
        return append(self, record)

    monkeypatch.setattr(Results, "append", limited)
    for stop in (0, 1, 4, 5, 9, 17):  # noqa: B007 (read by limited)
        assert main(arguments(folder, out)) == 130
    monkeypatch.undo()
    monkeypatch.setenv("FASTODE_CACHE", str(folder / "cache"))
    assert main(arguments(folder, out)) == 0
    assert timeless(out) == timeless(finished)
    before = out.read_bytes()
    monkeypatch.setattr(module.Engine, "__call__", lambda *_, **__: pytest.fail("nothing is left to do"))
    assert main(arguments(folder, out)) == 0
    assert out.read_bytes() == before


@pytest.mark.slow
def test_a_process_that_is_killed(folder, finished, tmp_path):
    """SIGKILL in the middle; then the same command again."""
    out = tmp_path / "a.jsonl"
    command = [sys.executable, "-m", "fastode.cli", *arguments(folder, out)]
    root = str(Path(__file__).parents[1])
    process = subprocess.Popen(command, cwd=root, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while process.poll() is None and (not out.exists() or out.read_bytes().count(b"\n") < 8):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert out.read_bytes().count(b"\n") >= 8
    assert main(arguments(folder, out)) == 0
    assert timeless(out) == timeless(finished)


def test_more_solvers_join_the_same_file(folder, tmp_path):
    out = tmp_path / "a.jsonl"
    assert main(arguments(folder, out, "--nfe", 2, "--solvers", "ddim")) == 0
    assert main(arguments(folder, out, "--nfe", 2, "--solvers", "ddim", "deis")) == 0
    assert [c["case"] for c in cases(read(out)[1])] == ["converged", "ddim@2", "deis@2"]


def test_processes_share_blocks_and_give_the_same_figures(folder, finished, tmp_path, monkeypatch):
    """Two ranks, one after the other, as torchrun would start them at once: nobody waits, the last one finishes the cases."""
    out = tmp_path / "a.jsonl"
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert main(arguments(folder, out)) == 0
        assert not (rank == 1 and cases(read(out)[1]))
    assert [p.name for p in parts(out)] == ["a.jsonl", "a.part1.jsonl"]
    found, want = ({c["case"]: c for c in cases(read(p)[1])} for p in (out, finished))
    assert set(found) == set(want)
    for name, case in want.items():
        same = {k: v for k, v in case.items() if k not in MEASURED}
        assert {k: v for k, v in found[name].items() if k not in MEASURED} == same
    counts = [sum(r["kind"] == "block" for r in map(json.loads, p.read_text().splitlines())) for p in parts(out)]
    assert counts == [14, 7]  # 7 cases; blocks 0 and 2 against block 1


def test_appending_is_whole_lines(tmp_path):
    results = Results(tmp_path / "a.jsonl", {"model": {}, "settings": {}})
    results.append({"kind": "block", "case": "a", "x": float("nan")})
    results.close()
    with (tmp_path / "a.jsonl").open("ab") as file:
        file.write(b'{"kind":"blo')
    assert [r["x"] for r in read(tmp_path / "a.jsonl")[1]] == [None]
    again = Results(tmp_path / "a.jsonl", {"model": {}, "settings": {}})
    again.append({"kind": "block", "case": "b"})
    assert [r["case"] for r in read(tmp_path / "a.jsonl")[1]] == ["a", "b"]


# -- bad input -------------------------------------------------------------------------------------------------------


def test_a_file_of_another_model_or_of_other_settings(folder, finished, tmp_path, capsys):
    other = tiny_model.write(tmp_path, name="other", config=tiny_model.UNetConfig(**{
        **tiny_model.CONFIG.to_dict(), "channels": (8, 8)
    }))  # fmt: skip
    for change, message in (
        (["--model", other], "out: .* holds results of another model: name is tiny there and other here"),
        (["--samples", 12], "out: .* of other settings: samples is 24 there and 12 here; give another file"),
        (["--guidance", 2], "out: .* of another model: guidance_scale is None there and 2.0 here"),
    ):
        before = finished.read_bytes()
        assert main(arguments(folder, finished, *change)) == 2
        assert re.fullmatch(f"fastode compare: {message}.*\n", capsys.readouterr().err)
        assert finished.read_bytes() == before


def test_a_file_that_is_something_else(folder, tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    for content in ("no json\n", '{"a": 1}\n', '{"kind": "block", "case": "x"}\n'):
        path.write_text(content)
        assert main(arguments(folder, path)) == 2
        assert re.search("(damaged at line 1|has no header)", capsys.readouterr().err)
        assert path.read_text() == content


ERRORS = {
    "metric": (["--metrics", "rmse,fid"], "metrics: must be among rmse, .*, got 'fid'"),
    "metric without reference": (["--reference", "none", "--metrics", "frechet"], "metrics: frechet needs a reference"),
    "accuracy": (["--metrics", "accuracy"], "metrics: accuracy needs labels, and an extractor that reads classes"),
    "solver": (["--solvers", "unipcc"], "solver: unknown solver 'unipcc'; did you mean 'unipc'"),
    "option": (["--solvers", "unipc:orderr=2"], "unipc: unknown option 'orderr'"),
    "value": (["--solvers", "unipc:order=9"], "order: unipc has orders 1, 2, 3, got 9"),
    "grid": (["--solvers", "unipc@karas"], "grid: must be one of karras, .*, got 'karas'"),
    "grids": (["--grids", "karas"], "grids: must be among karras, .*, got 'karas'"),
    "twice": (["--solvers", "ddim", "ddim"], "solvers: 'ddim' is there twice"),
    "nfe": (["--nfe", "0"], "nfe: must be at least 1, got 0"),
    "nothing": (
        ["--solvers", "heun:afs=false", "--nfe", "3"],
        "solvers: nothing to compare: heun cannot make exactly 3",
    ),
    "blocks": (["--samples", "25"], r"samples: must be a multiple of blocks \(3\), got 25"),
    "batch": (["--batch", "0"], "batch: must be at least 1, got 0"),
    "bound": (["--bound", "0"], "bound: must be positive, got 0.0"),
    "not converged": (
        ["--bound", "1e-9", "--no-cache", "--steps", "200", "--samples", "3", "--reference", "none"],
        "bound: 200 steps and 400 differ by .*, not less than 1e-09",
    ),
    "out": (["--out", "a.json"], "out: must end in .jsonl, got 'a.json'"),
    "features": (["--features", "mnist"], r"reference: .*|features: mnist takes pictures of shape \[1, 32, 32\]"),
    "no features": (["--features", "imagenet"], "features: must be one of mnist, pixels"),
    "reference": (["--reference", "nowhere"], "reference: nowhere does not exist"),
    "report twice": (["--report"], "report: give --report or --no-report, not both"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_one_line(folder, tmp_path, capsys, monkeypatch, name):
    more, message = ERRORS[name]
    monkeypatch.chdir(tmp_path)
    assert main(arguments(folder, Path("a.jsonl"), *more)) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(f"fastode compare: ({message})", last), last


def test_a_reference_of_another_size(folder, tmp_path, capsys):
    for shape, message in (
        ((60, 6, 6), r"reference: images of .* have shape \[1, 6, 6\], the model makes \[1, 8, 8\]; --fit"),
        ((60, 8, 8, 3), r"reference: images of .* have shape \[3, 8, 8\], the model makes \[1, 8, 8\]\n"),
    ):
        np.savez(tmp_path / "r.npz", images=np.zeros(shape, dtype=np.uint8))
        assert main(arguments(folder, tmp_path / "a.jsonl", "--reference", tmp_path / "r.npz")) == 2
        assert re.search(message, capsys.readouterr().err)
        assert not (tmp_path / "a.jsonl").exists()


def test_too_few_samples_are_said_with_the_bias(folder, tmp_path, capsys):
    assert main(arguments(folder, tmp_path / "a.jsonl", "--nfe", 2, "--solvers", "ddim")) == 0
    shown = capsys.readouterr().err
    said = re.search(r"warning: frechet: 24 samples cannot determine a covariance of 64 features; .* biased upward: 24 "
                     r"perfect samples would get ([\d.]+) instead of 0", shown)  # fmt: skip
    solution = next(r for r in read(tmp_path / "a.jsonl")[1] if r["kind"] == "solution")
    assert said is not None and float(said[1]) == pytest.approx(solution["frechet_floor"], rel=1e-3)


def test_what_cannot_be_made_is_left_out_and_said(folder):
    d = fastode.load(folder / "tiny.safetensors")
    todo, missing = plan([spec("unipc"), spec("dpm_solver_3")], [4], d)
    assert [c.name for c in todo] == ["unipc@4"] and missing[0].startswith("dpm_solver_3 cannot make exactly 4")


def test_levels_that_are_not_tried_any_more(folder, tmp_path, capsys):
    """Blocks of one case on different levels would be no sample of anything."""
    out = tmp_path / "a.jsonl"
    assert main(arguments(folder, out, "--nfe", 2, "--solvers", "unipc")) == 0
    lines = [line for line in out.read_text().splitlines() if '"case":"unipc@2"' not in line or '"screen"' in line]
    out.write_text("\n".join(lines).replace('"chosen":"', '"chosen":"old ') + "\n")
    assert main(arguments(folder, out, "--nfe", 2, "--solvers", "unipc")) == 2
    assert "chose levels 'old " in capsys.readouterr().err
