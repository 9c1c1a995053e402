"""``fastode train solver``: calibrate a solver on a model."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from fastode.commands.arguments import device_of, numbers, option


def add(kinds: Any) -> None:
    p = kinds.add_parser("solver", help="a solver calibrated on a model: steps, gits, table, best, ...")
    p.add_argument("method", help="how; `list` shows the methods with their settings")
    p.add_argument("--model", default="mnist", help="a bundled model or a weights file (default %(default)s)")
    p.add_argument("--nfe", type=int, default=5, help="evaluations per sample (default %(default)s)")
    p.add_argument("--solver", default=None, help="the solver to start from (default: the method's own choice)")
    p.add_argument(
        "-o", "--option", action="append", default=[], metavar="NAME=VALUE", help="a solver option: order=3, afs=true"
    )
    p.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the method: metric=l2, lr=0.01"
    )
    p.add_argument("--guidance", type=float, default=None, help="classifier-free guidance strength")
    p.add_argument("--labels", default=None, help="classes in turn: 3, 0-9, 1,4,7 (default: all)")
    p.add_argument("--samples", type=int, default=None, help="trajectories to learn from (default: the method's own)")
    p.add_argument("--held-out", type=int, default=64, help="samples to measure on (default %(default)s; 0: do not)")
    p.add_argument("--seed", type=int, default=0, help="another seed, other trajectories (default %(default)s)")
    p.add_argument("--batch", type=int, default=64, help="samples at a time (default %(default)s)")
    p.add_argument("--budget", default=None, help="stop after this long, if sooner: 90s, 10min, 1h")
    p.add_argument("--cache", default=None, help="a folder that keeps the teacher's trajectories")
    p.add_argument("--device", default=None)
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of the network")
    p.add_argument("--out", default=None, help="default out/<model>-<method>-<nfe>.safetensors")
    p.set_defaults(run=run)


def run(a: argparse.Namespace) -> None:
    from fastode.learn.methods import TRAINERS, settings, trainer

    if a.method == "list":
        for name, train in TRAINERS.items():
            print(f"{name}\n    {' '.join((train.__doc__ or '').split())[:200]}")
            print("    settings: " + ", ".join(f"{k}={v}" for k, v in settings(name).items()))
        return
    import torch

    from fastode.learn.calibration import best_uniform
    from fastode.learn.teacher import Teacher, held_out_seeds
    from fastode.models import load

    train = trainer(a.method)
    own = dict(option(text) for text in a.set)
    known = settings(a.method)
    for name in own:
        if name not in known:
            raise ValueError(f"set: {a.method} has no setting {name!r}; it has {', '.join(known) or 'none'}")
    minutes = duration(a.budget)
    if a.held_out < 0:
        raise ValueError(f"held-out: must be at least 0, got {a.held_out}")
    denoiser = load(a.model, device=device_of(a.device)).to(getattr(torch, a.dtype))
    out = Path(a.out or f"out/{denoiser.name}-{a.method}-{a.nfe}.safetensors")
    if out.suffix != ".safetensors":
        raise ValueError(f"out: must end in .safetensors, got {str(out)!r}")
    out.parent.mkdir(parents=True, exist_ok=True)
    labels = None if a.labels is None else numbers("labels", a.labels)
    teacher = Teacher(denoiser, guidance_scale=a.guidance, class_labels=labels, batch=a.batch, cache=a.cache)
    if a.solver is not None:
        own["solver"] = a.solver
    options = dict(option(text) for text in a.option)
    if a.samples is not None:
        own["samples"] = a.samples
    artifact = train(
        denoiser,
        nfe=a.nfe,
        options=options,
        guidance_scale=a.guidance,
        class_labels=labels,
        seed=a.seed,
        teacher=teacher,
        save=lambda found: found.save(out),
        minutes=minutes,
        **own,
    )
    if int(os.environ.get("RANK", "0")):
        return  # under torchrun the first process reports
    card = artifact.card
    print(f"method   {a.method}: {artifact.method} on {artifact.solver}, {artifact.nfe} evaluations")
    if "tried" in card and a.method == "best":
        from fastode.learn.best import table

        print(table(artifact))
    print(f"cost     {card.get('seconds', 0):.1f} s, {card.get('evaluations', 0):,} evaluations, "
          f"peak memory {card.get('peak_memory_bytes', 0) / 2**20:.0f} MiB")  # fmt: skip
    if a.held_out:
        seeds = held_out_seeds(a.held_out)
        grid, chosen, base = best_uniform(teacher, artifact.solver, a.nfe, options, seeds)
        print(f"error    {teacher.error(artifact.program(), seeds)} on {a.held_out} held-out samples")
        extra = "".join(f", {k}={v}" for k, v in chosen.items())
        print(f"before   {base} ({artifact.solver}{extra} on {grid.name}, its best uniform placement)")
    print(f"wrote    {out}")


def duration(text: str | None) -> float:
    """90s, 10min, 1.5h in minutes; infinite without a limit."""
    if text is None:
        return float("inf")
    units = {"s": 1 / 60, "sec": 1 / 60, "min": 1.0, "m": 1.0, "h": 60.0}
    value = text.strip().lower()
    for unit, factor in sorted(units.items(), key=lambda u: -len(u[0])):
        if value.endswith(unit):
            try:
                minutes = float(value[: -len(unit)]) * factor
            except ValueError:
                break
            if minutes > 0:
                return minutes
            break
    raise ValueError(f"budget: must look like 90s, 10min or 1h, got {text!r}")
