"""``fastode convert``: other people's checkpoints to safetensors and a card. No code in them is run."""

from __future__ import annotations

import argparse
from typing import Any

from fastode.commands.arguments import option


def add(commands: Any) -> None:
    p = commands.add_parser("convert", help="turn a foreign checkpoint into safetensors and a card")
    p.add_argument("kind", choices=["edm", "adm", "score_sde"], help="what wrote it")
    p.add_argument("source", help="the checkpoint, such as edm-cifar10-32x32-uncond-vp.pkl")
    p.add_argument("out", help="where to write: NAME makes NAME.safetensors and NAME.json")
    p.add_argument(
        "-o",
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="what the file does not say: image_size=64, num_head_channels=64 (adm); config=vp/cifar10_ddpmpp (score_sde)",
    )
    p.set_defaults(run=run)


def run(a: argparse.Namespace) -> None:
    from fastode.models import convert, load

    path = convert(a.kind, a.source, a.out, **dict(option(text) for text in a.option))
    denoiser = load(path)
    print(f"{denoiser.name}: {denoiser.card['network']}, prediction {denoiser.prediction}, {denoiser.schedule!r:.80}")
    print(f"wrote {path} and {path.with_suffix('.json').name}")
