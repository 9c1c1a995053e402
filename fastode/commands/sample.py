"""``fastode sample``: draw samples from a model."""

from __future__ import annotations

import argparse
import time
from typing import Any

from fastode.commands.arguments import compile_program, device_of, model_arguments, numbers


def add(commands: Any) -> None:
    p = commands.add_parser("sample", help="draw samples from a model")
    model_arguments(p)
    p.add_argument("--seeds", default="0-79", help="seeds, one per sample: 0-79, or 1,5,9 (default %(default)s)")
    p.add_argument(
        "--labels", default=None, help="class per sample, repeated in turn: 3, 0-9, 1,4,7 (default: all in turn)"
    )
    p.add_argument("--guidance", type=float, default=None, help="classifier-free guidance strength")
    p.add_argument("--batch", type=int, default=256, help="samples at a time (default %(default)s)")
    p.add_argument("--out", default="out/samples.png", help="a .png grid, an .npz, or a folder (default %(default)s)")
    p.set_defaults(run=run)


def run(a: argparse.Namespace) -> None:
    import torch

    from fastode.denoisers import Condition, Guidance
    from fastode.engine import Engine
    from fastode.evaluate.pictures import check_target, save_samples
    from fastode.evaluate.summary import print_run
    from fastode.models import load
    from fastode.noise import check_seeds

    check_target(a.out)
    if a.batch < 1:
        raise ValueError(f"batch: must be at least 1, got {a.batch}")
    device = device_of(a.device)
    seeds = check_seeds(numbers("seeds", a.seeds)).tolist()
    denoiser = load(a.model, device=device).to(getattr(torch, a.dtype))
    labels = None
    if denoiser.num_classes:
        cycle = numbers("labels", a.labels) if a.labels is not None else list(range(denoiser.num_classes))
        labels = [cycle[i % len(cycle)] for i in range(len(seeds))]
    elif a.labels is not None:
        raise ValueError(f"labels: {denoiser.name} is not class-conditional")
    guidance = Guidance() if a.guidance is not None else None
    everyone = Condition(None if labels is None else torch.tensor(labels))
    denoiser.check_condition(len(seeds), everyone, guidance)  # a wrong label in the last batch is an error now
    program = compile_program(a, denoiser.schedule, denoiser)
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
