"""``fastode demo``: 80 digits in five evaluations."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastode.commands.arguments import device_of


def add(commands: Any) -> None:
    p = commands.add_parser("demo", help="80 digits in five evaluations")
    p.add_argument("--out", default="out", help="folder for the pictures (default %(default)s)")
    p.add_argument("--device", default=None)
    p.set_defaults(run=run)


def run(a: argparse.Namespace) -> None:
    from fastode.demo import run

    run(Path(a.out), device_of(a.device))
