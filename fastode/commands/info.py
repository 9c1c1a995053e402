"""``fastode info``: versions, and which backends are present."""

from __future__ import annotations

import argparse
from typing import Any


def add(commands: Any) -> None:
    p = commands.add_parser("info", help="versions, and which backends are present")
    p.set_defaults(run=run)


def run(_: argparse.Namespace) -> None:
    from fastode.info import report

    print(report())
