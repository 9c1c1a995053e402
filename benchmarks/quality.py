"""How good are the samples of the bundled model, solver by solver?

    python -m benchmarks.quality --nfe 5 --samples 1000

For every solver in ``SOLVERS`` that can make that many evaluations, on each placement of levels worth trying, from the
same seeds: the share of samples in which the independent classifier reads the requested class, and the root mean square
error of the final sample against the converged solution of the same ODE (``edm`` with 64 steps, 127 evaluations). The
18-step ``edm`` sampler is the reference row. Writes ``benchmarks/results/quality.json`` and prints the table of the README.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import classifier
from fastode import SOLVERS, Engine, load
from fastode.api import grid_maker
from fastode.denoisers import Denoiser
from fastode.learn.denoiser import write_json
from fastode.program import Program

RESULTS = Path(__file__).with_name("results") / "quality.json"
GRIDS = ("karras", "log_snr", "time_uniform", "quadratic")


def draw(program: Program, denoiser: Denoiser, count: int, batch: int, bar: tqdm) -> tuple[Tensor, float]:
    """Samples of seeds 0 .. count - 1, classes in turn, and the seconds they took."""
    assert denoiser.sample_shape is not None
    engine = Engine(program, denoiser, (batch, *denoiser.sample_shape))
    parts, started = [], time.perf_counter()
    for first in range(0, count, batch):
        seeds = [min(s, count - 1) for s in range(first, first + batch)]
        parts.append(engine(seeds=seeds, class_labels=[s % 10 for s in seeds]))
        bar.update()
    return torch.cat(parts)[:count], time.perf_counter() - started


def plans(nfe: int, denoiser: Denoiser) -> list[tuple[str, str, Program]]:
    """(solver, grid, program) for everything that can make exactly ``nfe`` evaluations."""
    found = []
    assert denoiser.schedule is not None
    for name, solver in SOLVERS.items():
        for grid in GRIDS:
            try:
                levels, options = solver.plan(nfe, grid_maker(solver, denoiser.schedule, grid))
            except ValueError:
                continue
            found.append((name, grid, solver(levels, **options)))
    return found


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nfe", type=int, default=5)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=125)
    parser.add_argument("--model", default="mnist")
    parser.add_argument("--out", type=Path, default=RESULTS)
    a = parser.parse_args()
    denoiser, judge = load(a.model), classifier.load()
    wanted = torch.arange(a.samples) % 10
    todo = plans(a.nfe, denoiser)
    rows: list[dict[str, Any]] = []
    batches = -(-a.samples // a.batch)
    edm = SOLVERS["edm"]
    with tqdm(total=batches * (len(todo) + 2), unit="batch") as bar:
        make = grid_maker(edm, denoiser.schedule)  # type: ignore[arg-type]
        truth, _ = draw(edm(make(steps=64, final="zero")), denoiser, a.samples, a.batch, bar)
        full = edm(make(steps=18, final="zero"))
        for name, grid, program in [("edm", "karras", full), *todo]:
            samples, seconds = draw(program, denoiser, a.samples, a.batch, bar)
            rows.append(
                {
                    "solver": name,
                    "grid": grid,
                    "options": dict(program.options),
                    "nfe": program.nfe,
                    "class_accuracy": float((classifier.predict(judge, samples) == wanted).double().mean()),
                    "rmse": float((samples - truth).square().mean().sqrt()),
                    "seconds": round(seconds, 2),
                }
            )
    reference = float((classifier.predict(judge, truth) == wanted).double().mean())
    report = {
        "model": dict(denoiser.card) | {"settings": None},
        "samples": a.samples,
        "converged_class_accuracy": reference,
        "classifier": json.loads(classifier.WEIGHTS.with_suffix(".json").read_text()),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "rows": rows,
    }
    write_json(a.out, report)
    print(table(report))


def table(report: dict[str, Any]) -> str:
    """The best grid of every solver by RMSE, as Markdown."""
    lines = ["| solver | grid | NFE | class read | RMSE to the converged sample |", "|---|---|---|---|---|"]
    first, *rest = report["rows"]
    best: dict[str, dict[str, Any]] = {}
    for row in rest:
        if row["solver"] not in best or row["rmse"] < best[row["solver"]]["rmse"]:
            best[row["solver"]] = row
    for row in [first, *sorted(best.values(), key=lambda r: r["rmse"])]:
        options = "".join(f", {k}" if v is True else f", {k}={v}" for k, v in row["options"].items())
        lines.append(
            f"| `{row['solver']}`{options} | {row['grid']} | {row['nfe']} | {row['class_accuracy']:.1%} | {row['rmse']:.4f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
