"""``fastode bench``: the microbenchmarks of a checkout, with a table and a comparison to a stored run."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

SUITES = ("overhead", "roofline", "trajectory", "cold")


def add(commands: Any) -> None:
    p = commands.add_parser("bench", help="the microbenchmarks, compared with a stored run")
    p.add_argument("suites", nargs="*", metavar="SUITE", help=f"some of {', '.join(SUITES)} (default: all)")
    p.add_argument(
        "--compare",
        nargs="+",
        default=None,
        metavar="OLD.json",
        help="stored reports, or a folder of them (default: benchmarks/results of the checkout)",
    )
    p.add_argument("--out", default="out/bench", help="folder for the reports (default %(default)s)")
    p.add_argument("--threads", type=int, default=None, help="of torch (default: its own choice)")
    p.add_argument("--quick", action="store_true", help="a look in about a minute; too short to be quoted")
    p.set_defaults(run=run)


def run(a: argparse.Namespace) -> None:
    import json

    import torch

    unknown = [s for s in a.suites if s not in SUITES]
    if unknown:
        raise ValueError(f"suites: must be among {', '.join(SUITES)}, got {unknown[0]!r}")
    if a.threads is not None and a.threads < 1:
        raise ValueError(f"threads: must be at least 1, got {a.threads}")
    bench = checkout()
    old: dict[str, Any] = {}
    for path in stored(a.compare, bench.RESULTS):
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            if report["benchmark"] in SUITES:
                old.setdefault(report["benchmark"], report)
        except (ValueError, KeyError, TypeError) as error:
            if a.compare is not None and str(path) in a.compare:
                raise ValueError(f"compare: {path} is no stored report ({error})") from error
    if a.threads is not None:
        torch.set_num_threads(a.threads)
    for name in a.suites or SUITES:
        measure, show = bench.BENCHMARKS[name]
        result = measure(a.quick)
        bench.store(result, Path(a.out) / f"{name}.json")
        m = result["machine"]
        print(f"\n## {name}: {m['cpu']}, {m['threads']} threads, torch {m['torch']}, {m['commit']}\n")
        print(show(result), flush=True)
        if name in old:
            print("\n" + bench.compare(old[name], result), flush=True)
    print(f"\nwrote {a.out}")


def checkout() -> Any:
    """``benchmarks.run`` of the checkout that this package is installed from.

    Raises ``ImportError`` where it is installed without one: benchmarks belong to the repository.
    """
    root = Path(__file__).parents[2]
    if not (root / "benchmarks" / "run.py").is_file():
        raise ImportError(
            "bench: the benchmarks are part of the repository, not of the package; run it from a checkout"
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return importlib.import_module("benchmarks.run")


def stored(given: list[str] | None, usual: Path) -> list[Path]:
    """The files of ``--compare``; folders stand for what they hold."""
    paths: list[Path] = []
    for path in [Path(p) for p in given] if given is not None else [usual]:
        if not path.exists():
            raise FileNotFoundError(f"compare: {path} does not exist")
        paths += sorted(path.glob("*.json")) if path.is_dir() else [path]
    return paths
