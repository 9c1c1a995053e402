"""``fastode train``: train a denoiser, or a solver for one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastode.commands import train_solver
from fastode.commands.arguments import device_of, numbers


def add(commands: Any) -> None:
    p = commands.add_parser("train", help="train a model, or calibrate a solver on one")
    kinds = p.add_subparsers(dest="kind", required=True, metavar="what")
    t = kinds.add_parser("denoiser", help="an EDM denoiser on a folder of images or an npz")
    _denoiser_arguments(t)
    train_solver.add(kinds)
    _classifier_arguments(kinds.add_parser("classifier", help="a small classifier that judges samples"))


def _denoiser_arguments(t: argparse.ArgumentParser) -> None:
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
    t.set_defaults(run=_denoiser)


def _denoiser(a: argparse.Namespace) -> None:
    from fastode.learn.data import load_images
    from fastode.learn.denoiser import TrainSettings, train
    from fastode.nets.unet import UNetConfig

    images = load_images(a.data, resolution=a.resolution)
    config = UNetConfig(
        resolution=a.resolution,
        in_channels=images.pixels.shape[1],
        num_classes=images.num_classes,
        channels=tuple(numbers("channels", a.channels)),
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
    weights = train(
        images, out, config=config, settings=settings, device=device_of(a.device), resume=not a.fresh, card=card
    )
    print(f"wrote {weights}")


def _classifier_arguments(t: argparse.ArgumentParser) -> None:
    t.add_argument("--data", required=True, help="an .npz with images and labels, or a folder of class folders")
    t.add_argument("--test", required=True, help="the same, for the accuracy in the card")
    t.add_argument("--out", required=True, help="weights and card are written to OUT.safetensors and OUT.json")
    t.add_argument("--resolution", type=int, default=32)
    t.add_argument("--epochs", type=int, default=4)
    t.add_argument("--flip", action="store_true", help="mirror images at random")
    t.add_argument("--seed", type=int, default=0)
    t.set_defaults(run=_classifier)


def _classifier(a: argparse.Namespace) -> None:
    from fastode.learn.classifier import train
    from fastode.learn.data import load_images

    data, test = (load_images(path, resolution=a.resolution) for path in (a.data, a.test))
    card = {"data": f"{Path(a.data).name}, {len(data)} images at {a.resolution} x {a.resolution}"}
    weights = train(data, test, Path(a.out), epochs=a.epochs, seed=a.seed, flip=a.flip, card=card)
    print(f"wrote {weights}")
