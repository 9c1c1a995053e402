"""``fastode inpaint``: complete images of which a part is given."""

from __future__ import annotations

import argparse
from typing import Any

PARTS = ("left", "right", "top", "bottom", "frame")


def add(commands: Any) -> None:
    p = commands.add_parser("inpaint", help="complete images of which a part is given")
    p.add_argument("--model", default="mnist", help="a bundled model or a weights file (default %(default)s)")
    p.add_argument("--data", required=True, help="an .npz with 'images' (and 'labels'), or a folder of pictures")
    p.add_argument("--count", type=int, default=8, help="the first so many images (default %(default)s)")
    p.add_argument("--known", default="left", help=f"the half that is given: {', '.join(PARTS)} (default %(default)s)")
    p.add_argument("--draws", type=int, default=3, help="completions of every image (default %(default)s)")
    p.add_argument("--levels", type=int, default=100, help="noise levels; two evaluations each (default %(default)s)")
    p.add_argument("--snr", type=float, default=0.16, help="of the Langevin corrector (default %(default)s)")
    p.add_argument("--given-labels", action="store_true", help="tell the model the class of every image")
    p.add_argument("--device", default=None, help="cpu, cuda, ... (default: cuda where there is one)")
    p.add_argument(
        "--out", default="out/inpaint.png", help="a .png: data, given part, completions (default %(default)s)"
    )
    p.set_defaults(run=run)


def run(a: argparse.Namespace) -> None:
    import torch

    from fastode.commands.arguments import device_of
    from fastode.controllable import inpaint
    from fastode.evaluate.pictures import picture_grid, save_image
    from fastode.learn.data import load_images
    from fastode.models import load
    from fastode.schedules import VE
    from fastode.solvers.score_sde import score_sde_grid

    if a.known not in PARTS:
        raise ValueError(f"known: must be one of {', '.join(PARTS)}, got {a.known!r}")
    if not a.out.endswith(".png"):
        raise ValueError(f"out: must end in .png, got {a.out!r}")
    for name in ("count", "draws"):
        if getattr(a, name) < 1:
            raise ValueError(f"{name}: must be at least 1, got {getattr(a, name)}")
    device = device_of(a.device)
    net = load(a.model, device=device)
    shape, schedule = net.sample_shape, net.schedule
    assert shape is not None and schedule is not None
    grid = score_sde_grid(VE(0.01, min(schedule.sigma_max, 50.0)), a.levels)
    images = load_images(a.data, resolution=shape[-1])
    if tuple(images.pixels.shape[1:]) != shape:
        raise ValueError(f"data: {net.name} knows images {list(shape)}, got {list(images.pixels.shape[1:])}")
    if a.given_labels and images.labels is None:
        raise ValueError("given-labels: the data has no labels")
    rows = torch.arange(min(a.count, len(images)))
    y, labels = images.batch(rows)
    mask = known_part(a.known, shape)
    every = y.to(device).repeat(a.draws, 1, 1, 1)
    told = None
    if a.given_labels and labels is not None:
        told = labels.repeat(a.draws)
    elif net.null_label is not None:
        told = torch.full((len(every),), net.null_label)
    made = inpaint(net, every, mask, grid=grid, seeds=range(len(every)), class_labels=told, snr=a.snr).cpu()
    shown = torch.cat([y, torch.where(mask == 1, y, torch.zeros_like(y)), made])
    names = ["data", "given", *(f"draw {i + 1}" for i in range(a.draws))]
    save_image(picture_grid(shown, columns=len(rows), row_labels=names), a.out)
    print(f"wrote    {a.out}")


def known_part(name: str, shape: tuple[int, ...]) -> Any:
    """A mask [*sample], 1 on the given half (for "frame": all but the middle quarter)."""
    import torch

    mask = torch.zeros(shape)
    h, w = shape[-2:]
    if name == "frame":
        mask[...] = 1
        mask[..., h // 4 : h - h // 4, w // 4 : w - w // 4] = 0
        return mask
    part = {"left": (..., slice(None), slice(0, w // 2)), "right": (..., slice(None), slice(w // 2, None))}
    part |= {"top": (..., slice(0, h // 2), slice(None)), "bottom": (..., slice(h // 2, None), slice(None))}
    mask[part[name]] = 1
    return mask
