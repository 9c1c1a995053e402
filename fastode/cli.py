"""The command line: ``fastode sample | solvers | describe | train | demo | info``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CLASSES_PER_ROW = 10


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; errors of the caller's making are printed as one line, exit status 2."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError, KeyError, FloatingPointError) as error:
        print(f"fastode {arguments.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastode", description="Sample diffusion models in about five evaluations.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    p = commands.add_parser("sample", help="draw samples from a model")
    _model_arguments(p)
    p.add_argument("--seeds", default="0-79", help="seeds, one per sample: 0-79, or 1,5,9 (default %(default)s)")
    p.add_argument(
        "--labels", default=None, help="class per sample, repeated in turn: 3, 0-9, 1,4,7 (default: all in turn)"
    )
    p.add_argument("--guidance", type=float, default=None, help="classifier-free guidance strength")
    p.add_argument("--batch", type=int, default=256, help="samples at a time (default %(default)s)")
    p.add_argument("--out", default="out/samples.png", help="a .png grid, an .npz, or a folder (default %(default)s)")
    p.set_defaults(run=_sample)

    p = commands.add_parser("solvers", help="list the solvers and their options")
    p.add_argument("--nfe", type=int, default=None, help="say for each how it makes this many evaluations")
    p.set_defaults(run=_solvers)

    p = commands.add_parser("describe", help="print a solver's program as formulas")
    _solver_arguments(p)
    p.add_argument("--model", default=None, help="use this model's noise range (default: EDM's 0.002 .. 80)")
    p.add_argument("--save", default=None, help="also write the program to this file")
    p.set_defaults(run=_describe)

    p = commands.add_parser("train", help="train a model")
    kinds = p.add_subparsers(dest="kind", required=True, metavar="what")
    t = kinds.add_parser("denoiser", help="an EDM denoiser on a folder of images or an npz")
    _train_arguments(t)

    p = commands.add_parser("demo", help="80 digits in five evaluations")
    p.add_argument("--out", default="out", help="folder for the pictures (default %(default)s)")
    p.add_argument("--device", default=None)
    p.set_defaults(run=_demo)

    p = commands.add_parser("info", help="versions, and which backends are present")
    p.set_defaults(run=_info)
    return parser


def _solver_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--solver", default="dpm_solver_pp", help="see `fastode solvers` (default %(default)s)")
    p.add_argument("--nfe", type=int, default=None, help="exactly this many evaluations (default 5)")
    p.add_argument("--steps", type=int, default=None, help="this many steps, whatever they cost")
    p.add_argument("--grid", default=None, help="placement of the levels (default: the solver's usual one)")
    p.add_argument(
        "-o", "--option", action="append", default=[], metavar="NAME=VALUE", help="a solver option: order=3, afs=true"
    )


def _model_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--model", default="mnist", help="a bundled model or a weights file (default %(default)s)")
    _solver_arguments(p)
    p.add_argument("--device", default=None, help="cpu, cuda, ... (default: cuda where there is one)")
    p.add_argument("--backend", default="auto", help="auto, reference, ... (default %(default)s)")
    p.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="dtype of the network"
    )


def _train_arguments(t: argparse.ArgumentParser) -> None:
    t.add_argument("--data", required=True, help="an .npz with images (and labels), or a folder (of class folders)")
    t.add_argument("--out", required=True, help="folder for weights, card, loss curve and checkpoints")
    t.add_argument("--resolution", type=int, default=32)
    t.add_argument("--channels", default="64,96", help="widths of the levels (default %(default)s)")
    t.add_argument("--blocks", type=int, default=1, help="blocks per level (default %(default)s)")
    t.add_argument("--patch", type=int, default=2, help="fold patches of pixels into channels (default %(default)s)")
    t.add_argument("--images", type=int, default=1_000_000, help="training images to see (default %(default)s)")
    t.add_argument("--minutes", type=float, default=float("inf"), help="stop after this long, if sooner")
    t.add_argument("--batch", type=int, default=64)
    t.add_argument("--lr", type=float, default=1e-3)
    t.add_argument("--cooldown", type=int, default=0, help="steps at the end over which the rate falls to zero")
    t.add_argument("--flip", action="store_true", help="mirror images at random")
    t.add_argument("--no-bf16", action="store_true")
    t.add_argument("--seed", type=int, default=0)
    t.add_argument("--name", default=None, help="name in the card (default: the folder's)")
    t.add_argument("--device", default=None)
    t.add_argument("--fresh", action="store_true", help="start over instead of resuming")
    t.set_defaults(run=_train)


def _sample(a: argparse.Namespace) -> None:
    import torch

    from fastode.denoisers import Condition, Guidance
    from fastode.engine import Engine
    from fastode.evaluate.pictures import check_target, save_samples
    from fastode.evaluate.summary import print_run
    from fastode.models import load
    from fastode.noise import check_seeds
    from fastode.solvers import SOLVERS

    check_target(a.out)
    if a.batch < 1:
        raise ValueError(f"batch: must be at least 1, got {a.batch}")
    device = _device(a.device)
    seeds = check_seeds(_numbers("seeds", a.seeds)).tolist()
    denoiser = load(a.model, device=device).to(getattr(torch, a.dtype))
    labels = None
    if denoiser.num_classes:
        cycle = _numbers("labels", a.labels) if a.labels is not None else list(range(denoiser.num_classes))
        labels = [cycle[i % len(cycle)] for i in range(len(seeds))]
    elif a.labels is not None:
        raise ValueError(f"labels: {denoiser.name} is not class-conditional")
    guidance = Guidance() if a.guidance is not None else None
    everyone = Condition(None if labels is None else torch.tensor(labels))
    denoiser.check_condition(len(seeds), everyone, guidance)  # a wrong label in the last batch is an error now
    program = _program(a, SOLVERS[a.solver], denoiser.schedule)
    assert denoiser.sample_shape is not None
    engines: dict[int, Engine] = {}
    parts, started = [], time.perf_counter()
    for i in range(0, len(seeds), a.batch):
        rows = seeds[i : i + a.batch]
        shape = (len(rows), *denoiser.sample_shape)
        if len(rows) not in engines:
            engines[len(rows)] = Engine(program, denoiser, shape, a.backend, guidance=guidance)
        chosen = None if labels is None else labels[i : i + a.batch]
        engine = engines[len(rows)]
        parts.append(engine(seeds=rows, class_labels=chosen, guidance_scale=a.guidance, progress=True).cpu())
    seconds = time.perf_counter() - started
    path = save_samples(torch.cat(parts), a.out, labels=labels, seeds=seeds)
    print_run(program, len(seeds), seconds, str(device), next(iter(engines.values())).backend)
    print(f"wrote    {path}")


def _program(a: argparse.Namespace, solver: Any, schedule: Any) -> Any:
    from fastode.api import grid_maker

    options = dict(_option(text) for text in a.option)
    make = grid_maker(solver, schedule, a.grid)
    if a.steps is not None:
        if a.nfe is not None:
            raise ValueError("nfe: give --nfe or --steps, not both")
        return solver(make(steps=a.steps, final=solver.final), **options)
    grid, options = solver.plan(5 if a.nfe is None else a.nfe, make, **options)
    return solver(grid, **options)


def _solvers(a: argparse.Namespace) -> None:
    from fastode.api import grid_maker
    from fastode.schedules import EDM
    from fastode.solvers import SOLVERS

    for name, solver in SOLVERS.items():
        aliases = [alias for alias, target in SOLVERS.aliases.items() if target == name]
        print(f"{name}{'  (also ' + ', '.join(aliases) + ')' if aliases else ''}")
        print(f"    {solver.summary}")
        print("    options: " + ", ".join(f"{k}={v}" for k, v in solver.options.items()))
        if a.nfe is not None:
            try:
                grid, options = solver.plan(a.nfe, grid_maker(solver, EDM()))
                extra = f" with {', '.join(f'{k}={v}' for k, v in options.items())}" if options else ""
                print(f"    {a.nfe} evaluations: {grid.steps} steps{extra} on {grid.name}")
            except ValueError as error:
                print(f"    {error}")


def _describe(a: argparse.Namespace) -> None:
    from fastode.models import load
    from fastode.schedules import EDM
    from fastode.solvers import SOLVERS

    schedule = EDM() if a.model is None else load(a.model).schedule
    program = _program(a, SOLVERS[a.solver], schedule)
    print(program.describe())
    if a.save is not None:
        program.save(a.save)
        print(f"# wrote {a.save}")


def _train(a: argparse.Namespace) -> None:
    from fastode.learn.data import load_images
    from fastode.learn.denoiser import TrainSettings, train
    from fastode.nets.unet import UNetConfig

    images = load_images(a.data, resolution=a.resolution)
    config = UNetConfig(
        resolution=a.resolution,
        in_channels=images.pixels.shape[1],
        num_classes=images.num_classes,
        channels=tuple(_numbers("channels", a.channels)),
        blocks=a.blocks,
        patch=a.patch,
    )
    settings = TrainSettings(
        images=a.images,
        minutes=a.minutes,
        batch=a.batch,
        lr=a.lr,
        cooldown=a.cooldown,
        flip=a.flip,
        bf16=not a.no_bf16,
        seed=a.seed,
    )
    out = Path(a.out)
    card = {"name": a.name or out.name, "data": f"{Path(a.data).name}, {len(images)} images", "classes": images.classes}
    print(f"{len(images)} images {list(images.pixels.shape[1:])}, {images.num_classes or 'no'} classes -> {out}")
    print(
        f"wrote {train(images, out, config=config, settings=settings, device=_device(a.device), resume=not a.fresh, card=card)}"
    )


def _demo(a: argparse.Namespace) -> None:
    from fastode.demo import run

    run(Path(a.out), _device(a.device))


def _info(_: argparse.Namespace) -> None:
    from fastode.info import report

    print(report())


def _device(name: str | None) -> str:
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device: {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return name


def _numbers(name: str, text: str) -> list[int]:
    """0-4 or 1,3,5 or a mixture, as whole numbers."""
    numbers: list[int] = []
    try:
        for part in text.split(","):
            low, dash, high = part.strip().partition("-")
            numbers += range(int(low), int(high) + 1) if dash else [int(low)]
    except ValueError:
        raise ValueError(f"{name}: must look like 0-79 or 1,5,9, got {text!r}") from None
    if not numbers:
        raise ValueError(f"{name}: {text!r} names no number")
    return numbers


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"option: must be NAME=VALUE, got {text!r}")
    if value.lower() in ("true", "false"):
        return name, value.lower() == "true"
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            continue
    return name, value


if __name__ == "__main__":
    sys.exit(main())
