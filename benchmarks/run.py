"""All benchmarks of this machine's processor: ``python -m benchmarks.run``; on a GPU ``python -m benchmarks.gpu``.

Runs the smallest tests first, since a fast wrong answer is no result. Writes one JSON file per benchmark into
``benchmarks/results`` and prints its table. ``--compare old.json`` shows what has changed against a stored report.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import cold, overhead, roofline, trajectory
from benchmarks.registry import RESULTS, store, table

BENCHMARKS: Mapping[str, tuple[Callable[[bool], dict[str, Any]], Callable[[dict[str, Any]], str]]] = {
    "overhead": (lambda quick: overhead.measure(0.1 if quick else 0.5), overhead.show),
    "roofline": (lambda quick: roofline.measure(0.2 if quick else 1.5, compiled=not quick), roofline.show),
    "trajectory": (
        lambda quick: trajectory.measure(0.5 if quick else 4.0, batches=(1, 8) if quick else (1, 8, 64)),
        trajectory.show,
    ),
    "cold": (lambda quick: cold.measure(2 if quick else 5), cold.show),
}


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The figure by which commits are compared, for all rows that both reports have."""
    if old["benchmark"] != new["benchmark"]:
        raise ValueError(f"compare: the old report is of {old['benchmark']!r}, the new one of {new['benchmark']!r}")
    figure = new["figure"]
    before = {r["id"]: r[figure] for r in old["rows"]}
    rows = [
        (r["id"], before[r["id"]], r[figure], r[figure] / before[r["id"]]) for r in new["rows"] if r["id"] in before
    ]
    commits = (old["machine"]["commit"], new["machine"]["commit"])
    text = table((f"{new['benchmark']}: {figure}", *commits, "new / old"), rows)
    same = {k for k in ("cpu", "cpus", "threads", "gpu", "torch") if old["machine"].get(k) != new["machine"].get(k)}
    return text + (f"\n\nNot the same conditions: {', '.join(sorted(same))} differ." if same else "")


def tests_pass() -> bool:
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_tiny.py"]
    return subprocess.run(command, cwd=root, check=False).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(BENCHMARKS), default=list(BENCHMARKS))
    parser.add_argument("--compare", type=Path, nargs="+", default=[], metavar="OLD.json", help="stored reports")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    parser.add_argument("--quick", action="store_true", help="a look in about a minute; too short to be quoted")
    args = parser.parse_args()
    old = {r["benchmark"]: r for r in (json.loads(p.read_text(encoding="utf-8")) for p in args.compare)}
    if args.threads:
        torch.set_num_threads(args.threads)
    if not tests_pass():
        print("the tests fail: nothing is measured", file=sys.stderr)
        return 1
    for name in args.only:
        run, show = BENCHMARKS[name]
        result = run(args.quick)
        store(result, args.out / f"{name}.json")
        machine = result["machine"]
        print(
            f"\n## {name}: {machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, {machine['commit']}\n"
        )
        print(show(result), flush=True)
        if name in old:
            print("\n" + compare(old[name], result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
