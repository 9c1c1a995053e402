"""``fastode compare``: which solver for my model."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from fastode.commands.arguments import device_of, numbers, option


def add(commands: Any) -> None:
    p = commands.add_parser(
        "compare",
        help="which solver for my model: quality, time and evaluations side by side",
        description="Measures solvers on a model at several numbers of evaluations; the results go to a file that a later "
        "run continues, and from it to a page, pictures and a table. Under torchrun, processes share the seeds.",
    )
    p.add_argument("--model", default="mnist", help="a bundled model or a weights file (default %(default)s)")
    p.add_argument(
        "--solvers",
        nargs="+",
        default=["unipc", "dpm_solver_pp", "ipndm_v", "deis", "ddim"],
        metavar="SOLVER",
        help="names, NAME:OPTION=VALUE,..., NAME@GRID, MODEL/NAME or the .safetensors of learned solvers; `all` for all "
        "of `fastode solvers`",
    )
    p.add_argument("--nfe", default="3-10", help="numbers of evaluations: 3-10, or 5,8 (default %(default)s)")
    p.add_argument("--samples", type=int, default=1000, help="per case (default %(default)s)")
    p.add_argument(
        "--blocks", type=int, default=8, help="independent blocks of seeds, for error bars (default %(default)s)"
    )
    p.add_argument("--out", default="out/compare.jsonl", help="the file of results (default %(default)s)")
    p.add_argument(
        "--reference",
        default=None,
        help="real images (an .npz or a folder), their statistics (.npz, .safetensors), `bundled`, or `none` "
        "(default: bundled for a bundled model)",
    )
    p.add_argument("--fit", action="store_true", help="bring reference images to the model's resolution")
    p.add_argument(
        "--features",
        default=None,
        help="mnist, pixels, inception:WEIGHTS, a classifier's .safetensors, or module:function (default: the bundled "
        "classifier of the model)",
    )
    p.add_argument("--metrics", default=None, help="some of them, with commas (default: all that are possible)")
    p.add_argument(
        "--grids", nargs="*", default=None, metavar="GRID", help="placements of levels to try; the best is taken"
    )
    p.add_argument("--screen", type=int, default=48, help="samples that choose the placement (default %(default)s)")
    p.add_argument("--guidance", type=float, default=None, help="classifier-free guidance strength")
    p.add_argument("--batch", type=int, default=125, help="samples at a time (default %(default)s)")
    p.add_argument("--first-seed", type=int, default=0, help="seeds are counted from here (default %(default)s)")
    p.add_argument("--steps", type=int, default=32, help="of the converged solution, at least (default %(default)s)")
    p.add_argument(
        "--bound", type=float, default=0.005, help="halving its step must change it by less (default %(default)s)"
    )
    p.add_argument("--device", default=None, help="cpu, cuda, ... (default: cuda where there is one)")
    p.add_argument("--backend", default="auto", help="auto, reference, ... (default %(default)s)")
    p.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="dtype of the network"
    )
    p.add_argument("--compile", action="store_true", help="torch.compile the network (a minute at the start)")
    p.add_argument("--no-cache", action="store_true", help="keep no converged solutions on disk")
    p.add_argument("--report", action="store_true", help="measure nothing, make the page from the file")
    p.add_argument("--no-report", action="store_true", help="measure only")
    p.set_defaults(run=run)


def run(a: argparse.Namespace) -> None:
    from fastode.evaluate.results import check_path

    out = check_path(a.out)
    if a.report and a.no_report:
        raise ValueError("report: give --report or --no-report, not both")
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if not a.report:
        _measure(a, out, rank, world)
    if not a.no_report and rank == 0:
        from fastode.evaluate.report import write_report

        for path in write_report(out):
            print(f"wrote {path}")


def spec(text: str) -> Any:
    """``unipc``, ``unipc:order=2,variant=bh1``, ``unipc@karras``, the .safetensors of a learned solver, or a bundled one with
    all its numbers of evaluations: ``mnist/amed``.

    Raises ``ValueError`` or ``TypeError`` naming the solver, option or grid that is not known.
    """
    from fastode.artifact import Artifact
    from fastode.evaluate.cases import Spec
    from fastode.models import bundled_solvers, load_solver
    from fastode.schedules.spacing import GRIDS
    from fastode.solvers import SOLVERS

    if text.endswith(".safetensors"):
        artifact = Artifact.load(text)
        return Spec(Path(text).stem, artifact.solver, dict(artifact.options), None, (artifact,))
    model, _, learned = text.partition("/")
    if learned:
        known = [n.rpartition("-")[2] for n in bundled_solvers(model) if n.rpartition("-")[0] == text]
        if not known:
            names = sorted({n.rpartition("-")[0] for n in bundled_solvers()})
            raise ValueError(f"solvers: no bundled solver {text!r}; there is {', '.join(names) or 'none'}")
        family = tuple(load_solver(model, learned, nfe=int(n)) for n in known)
        return Spec(text, family[0].solver, dict(family[0].options), None, family)
    name, _, grid = text.partition("@")
    name, _, rest = name.partition(":")
    solver = SOLVERS[name]
    options = dict(option(part) for part in rest.split(",")) if rest else {}
    solver.check(options)
    if grid and grid not in GRIDS:
        raise ValueError(f"grid: must be one of {', '.join(GRIDS)}, got {grid!r}")
    return Spec(text, solver.name, options, grid or None)


def _measure(a: argparse.Namespace, out: Path, rank: int, world: int) -> None:
    import torch

    from fastode.evaluate.cache import folder
    from fastode.evaluate.cases import CANDIDATES, plan
    from fastode.evaluate.compare import Comparison, Settings
    from fastode.evaluate.data import load_reference
    from fastode.evaluate.features import bundled, extractor
    from fastode.evaluate.pool import check_metrics
    from fastode.info import machine
    from fastode.models import load
    from fastode.solvers import SOLVERS

    def say(text: str) -> None:
        if rank == 0:
            print(text, file=sys.stderr)

    settings = Settings(
        samples=a.samples,
        blocks=a.blocks,
        first_seed=a.first_seed,
        screen=a.screen,
        guidance_scale=a.guidance,
        dtype=a.dtype,
        steps=a.steps,
        bound=a.bound,
    )
    device = device_of(a.device)
    if device == "cuda" and world > 1:
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', rank)) % torch.cuda.device_count()}"
    denoiser = load(a.model, device=device).to(getattr(torch, a.dtype))
    texts = list(SOLVERS) if a.solvers == ["all"] else a.solvers
    grids = CANDIDATES if a.grids is None else a.grids
    todo, missing = plan(
        [spec(text) for text in texts], numbers("nfe", a.nfe), denoiser, grids=grids, guidance_scale=a.guidance
    )
    name = a.features or (denoiser.name if denoiser.name in bundled() else None)
    extract = None if name is None else extractor(name)
    source = a.reference or (
        "bundled" if extract is not None and extract.name in bundled() and a.features is None else "none"
    )
    reference = None
    if source != "none":
        if extract is None:
            raise ValueError("features: a reference needs an extractor (--features)")
        reference = load_reference(source, extract, denoiser.sample_shape, fit=a.fit)
    metrics = check_metrics(
        None if a.metrics is None else a.metrics.split(","),
        reference=reference,
        features=extract is not None and extract.classify is not None,
        labels=bool(denoiser.num_classes),
    )
    comparison = Comparison(
        denoiser,
        todo,
        settings,
        out,
        metrics=metrics,
        extract=extract,
        reference=reference,
        batch=a.batch,
        backend=a.backend,
        rank=rank,
        world=world,
        cache=None if a.no_cache else folder("solutions"),
        machine={**machine(), "compiled": bool(a.compile), "processes": world},
        say=say,
    )
    for text in missing:
        say(f"left out: {text}")
    if a.compile and isinstance(denoiser.network, torch.nn.Module):
        denoiser.network.compile(dynamic=False)
    comparison.run(progress=rank == 0)
