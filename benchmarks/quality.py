"""How good are the samples of the bundled model, solver by solver?

    python -m benchmarks.quality --nfe 5 --samples 1000 --readme README.md

For every solver in ``SOLVERS`` that can make that many evaluations, from the same seeds: the share of samples in which
the independent classifier reads the requested class, and the root mean square error of the final sample against the
converged solution of the same ODE (``unipc`` of order 3 with 32 evaluations). Of the placements of levels, each solver gets
the one with the smallest error on the first ``--screen`` samples. The 18-step ``edm`` sampler is the reference row. Writes
``benchmarks/results/quality.json``, and with ``--readme`` the table between the quality marks of that file.
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
from fastode.files import write_json
from fastode.program import Program

RESULTS = Path(__file__).with_name("results") / "quality.json"
GRIDS = ("karras", "log_snr", "time_uniform", "quadratic")


def draw(
    program: Program, denoiser: Denoiser, count: int, batch: int, bar: tqdm, scale: float | None = None
) -> tuple[Tensor, float]:
    """Samples of seeds 0 .. count - 1, classes in turn, and the seconds they took; ``scale``: guidance strength."""
    assert denoiser.sample_shape is not None
    engine = Engine(program, denoiser, (batch, *denoiser.sample_shape), guidance=scale is not None)
    parts, started = [], time.perf_counter()
    for first in range(0, count, batch):
        seeds = [min(s, count - 1) for s in range(first, first + batch)]
        parts.append(engine(seeds=seeds, class_labels=[s % 10 for s in seeds], guidance_scale=scale))
        bar.update()
    return torch.cat(parts)[:count], time.perf_counter() - started


def plans(nfe: int, denoiser: Denoiser) -> dict[str, list[Program]]:
    """Programs of everything that can make exactly ``nfe`` evaluations, by solver; one for each placement of levels."""
    found: dict[str, list[Program]] = {}
    assert denoiser.schedule is not None
    for name, solver in SOLVERS.items():
        for grid in GRIDS:
            try:
                levels, options = solver.plan(nfe, grid_maker(solver, denoiser.schedule, grid))
            except ValueError:
                continue
            found.setdefault(name, []).append(solver(levels, **options))
    return found


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nfe", type=int, default=5)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--screen", type=int, default=125, help="samples that choose the placement of levels")
    parser.add_argument("--batch", type=int, default=125)
    parser.add_argument("--model", default="mnist")
    parser.add_argument("--dtype", default="float32", help="of the network; bfloat16 is twice as fast on recent CPUs")
    parser.add_argument("--guidance", type=float, default=1.5, help="strength for the second reference figure")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--readme", type=Path, default=None)
    a = parser.parse_args()
    denoiser, judge = load(a.model).to(getattr(torch, a.dtype)), classifier.load()
    assert denoiser.schedule is not None
    wanted = torch.arange(a.samples) % 10
    todo = plans(a.nfe, denoiser)
    batches, screens = -(-a.samples // a.batch), -(-a.screen // min(a.screen, a.batch))
    rows: list[dict[str, Any]] = []
    edm, unipc = SOLVERS["edm"], SOLVERS["unipc"]
    full = edm(grid_maker(edm, denoiser.schedule)(steps=18, final="zero"))
    converged = unipc(grid_maker(unipc, denoiser.schedule)(steps=32, final="sigma_min"))
    tries = sum(len(programs) for programs in todo.values())
    with tqdm(total=batches * (len(todo) + 3) + screens * tries, unit="batch", mininterval=5) as bar:
        truth, _ = draw(converged, denoiser, a.samples, a.batch, bar)
        best = [full]
        for programs in todo.values():
            errors = [
                rmse(draw(p, denoiser, a.screen, min(a.screen, a.batch), bar)[0], truth[: a.screen]) for p in programs
            ]
            best.append(programs[errors.index(min(errors))])
        guided, _ = draw(full, denoiser, a.samples, a.batch, bar, a.guidance)
        for program in best:
            samples, seconds = draw(program, denoiser, a.samples, a.batch, bar)
            rows.append(
                {
                    "solver": program.name,
                    "grid": program.grid.name,
                    "options": dict(program.options),
                    "nfe": program.nfe,
                    "class_accuracy": float((classifier.predict(judge, samples) == wanted).double().mean()),
                    "rmse": rmse(samples, truth),
                    "seconds": round(seconds, 2),
                }
            )
    report = {
        "command": f"python -m benchmarks.quality --nfe {a.nfe} --samples {a.samples} --screen {a.screen} --dtype {a.dtype}",
        "model": {k: denoiser.card.get(k) for k in ("name", "data", "parameters", "steps", "images_seen", "loss")},
        "samples": a.samples,
        "dtype": a.dtype,
        "guidance": a.guidance,
        "guided_class_accuracy": float((classifier.predict(judge, guided) == wanted).double().mean()),
        "converged_class_accuracy": float((classifier.predict(judge, truth) == wanted).double().mean()),
        "classifier": json.loads((classifier.WEIGHTS / "mnist.json").read_text()),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "rows": rows,
    }
    write_json(a.out, report)
    text = section(report)
    print(text)
    if a.readme is not None:
        head, rest = a.readme.read_text().split("<!-- quality:begin -->")
        tail = rest.split("<!-- quality:end -->")[1]
        a.readme.write_text(f"{head}<!-- quality:begin -->\n{text}\n<!-- quality:end -->{tail}")


def rmse(samples: Tensor, truth: Tensor) -> float:
    return float((samples - truth).square().mean().sqrt())


def section(report: dict[str, Any]) -> str:
    """The README's words and table."""
    model, judge = report["model"], report["classifier"]
    full, *rest = report["rows"]
    lines = [
        f"`fastode.load('{model['name']}')`: an EDM-preconditioned, class-conditional U-Net of "
        f"{model['parameters'] / 1e6:.1f}M parameters, trained on two CPU cores on the 60,000 MNIST digits, padded to 32 x 32 "
        f"({model['images_seen']:,} images seen). An independent classifier ({judge['test_accuracy']:.2%} on the MNIST test "
        f"set) reads the requested class in {full['class_accuracy']:.1%} of {report['samples']:,} samples of the 18-step `edm` "
        f"sampler ({full['nfe']} evaluations), in {report['guided_class_accuracy']:.1%} with guidance of strength "
        f"{report['guidance']:g}, and in {report['converged_class_accuracy']:.1%} of converged samples without. At "
        f"{rest[0]['nfe']} evaluations without guidance, from the same seeds, with the network in {report['dtype']}:",
        "",
        "| solver | levels | NFE | class read | error to the converged sample (RMSE) |",
        "|---|---|---|---|---|",
    ]
    for row in sorted(rest, key=lambda r: r["rmse"]):
        options = "".join(f", {k}" if v is True else f", {k}={v}" for k, v in row["options"].items())
        cells = (
            f"`{row['solver']}`{options}",
            row["grid"],
            row["nfe"],
            f"{row['class_accuracy']:.1%}",
            f"{row['rmse']:.3f}",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += [
        "",
        f"`{report['command']} --readme README.md` makes this table; each solver on its best placement of levels.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
