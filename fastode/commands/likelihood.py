"""``fastode likelihood``: bits per dimension of a data set under a model."""

from __future__ import annotations

import argparse
from typing import Any


def add(commands: Any) -> None:
    p = commands.add_parser("likelihood", help="bits per dimension of a data set under a model")
    p.add_argument("--model", default="mnist", help="a bundled model or a weights file (default %(default)s)")
    p.add_argument("--data", required=True, help="an .npz with 'images' (and 'labels'), or a folder of pictures")
    p.add_argument("--count", type=int, default=100, help="the first so many images (default %(default)s)")
    p.add_argument("--given-labels", action="store_true", help="p(image | its label) instead of p(image)")
    p.add_argument("--trace", default="rademacher", help="rademacher, gaussian or exact (default %(default)s)")
    p.add_argument("--probes", type=int, default=1, help="probes per image (default %(default)s)")
    p.add_argument("--method", default="dopri5", help="dopri5, bosh3, scipy, torchdiffeq (default %(default)s)")
    p.add_argument("--tolerance", type=float, default=1e-5, help="rtol and atol (default %(default)s)")
    p.add_argument(
        "--steps", type=int, default=None, help="fixed steps on a Karras grid instead, with --method rk4 say"
    )
    p.add_argument("--sigma-min", type=float, default=None, help="noise level of the data (default: the model's own)")
    p.add_argument("--batch", type=int, default=32, help="images at a time (default %(default)s)")
    p.add_argument("--device", default=None, help="cpu, cuda, ... (default: cuda where there is one)")
    p.add_argument("--out", default=None, help="a .json for the figures of every image")
    p.set_defaults(run=run)


def run(a: argparse.Namespace) -> None:
    import math
    import time
    from pathlib import Path

    import torch
    from tqdm import tqdm

    from fastode.commands.arguments import device_of
    from fastode.drivers import dequantise, log_likelihood
    from fastode.files import write_json
    from fastode.learn.data import load_images
    from fastode.models import load
    from fastode.schedules import karras

    for name in ("count", "batch", "probes"):
        if getattr(a, name) < 1:
            raise ValueError(f"{name}: must be at least 1, got {getattr(a, name)}")
    if a.out is not None and not a.out.endswith(".json"):
        raise ValueError(f"out: must end in .json, got {a.out!r}")
    device = device_of(a.device)
    denoiser = load(a.model, device=device)
    schedule, shape = denoiser.schedule, denoiser.sample_shape
    assert schedule is not None and shape is not None
    images = load_images(a.data, resolution=shape[-1])
    if tuple(images.pixels.shape[1:]) != shape:
        raise ValueError(f"data: {denoiser.name} knows images {list(shape)}, got {list(images.pixels.shape[1:])}")
    if a.given_labels and images.labels is None:
        raise ValueError("given-labels: the data has no labels")
    t_min = None if a.sigma_min is None else float(schedule.time(a.sigma_min))
    ends: dict[str, Any] = {"t_min": t_min}
    if a.steps is not None:
        ends = {"times": karras(schedule, a.steps, sigma_min=a.sigma_min).t.flip(0)}
    count = min(a.count, len(images))
    bits: list[float] = []
    evaluations: list[int] = []
    started = time.perf_counter()
    for start in tqdm(range(0, count, a.batch), unit="batch", desc="likelihood"):
        rows = range(start, min(start + a.batch, count))
        pixels = images.pixels[rows.start : rows.stop]
        x = dequantise(pixels, seeds=list(rows)).to(device)
        labels = None
        if a.given_labels and images.labels is not None:
            labels = images.labels[rows.start : rows.stop]
        elif denoiser.null_label is not None:
            labels = torch.full((len(x),), denoiser.null_label)
        made = log_likelihood(
            denoiser,
            x,
            trace=a.trace,
            probes=a.probes,
            seeds=list(rows),
            method=a.method,
            rtol=a.tolerance,
            atol=a.tolerance,
            class_labels=labels,
            **ends,
        )
        bits += made.bits_per_dim().tolist()
        evaluations += made.nfe.tolist()
    seconds = time.perf_counter() - started
    values = torch.tensor(bits, dtype=torch.float64)
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    print(f"bits/dim {float(values.mean()):.4f} +- {error:.4f} (standard error over {len(values)} images)")
    print(f"NFE      {sum(evaluations) / len(evaluations):.1f} on average, a product with the Jacobian each")
    print(f"time     {seconds:.1f} s on {device}")
    if a.out is not None:
        report = {
            "model": denoiser.name,
            "images": len(bits),
            "bits_per_dim": float(values.mean()),
            "standard_error": error,
            "nfe": sum(evaluations) / len(evaluations),
            "seconds": seconds,
            "method": a.method,
            "tolerance": a.tolerance if a.steps is None else None,
            "steps": a.steps,
            "sigma_min": a.sigma_min,
            "trace": a.trace,
            "probes": a.probes,
            "given_labels": a.given_labels,
            "each": bits,
        }
        Path(a.out).parent.mkdir(parents=True, exist_ok=True)
        write_json(a.out, report)
        print(f"wrote    {a.out}")
