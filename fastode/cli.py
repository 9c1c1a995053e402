"""The command line: ``fastode sample | compare | solvers | train | convert | ...``. Each command is a file in commands/."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


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
    from fastode.commands import COMMANDS

    parser = argparse.ArgumentParser(prog="fastode", description="Sample diffusion models in about five evaluations.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for command in COMMANDS:
        command.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
