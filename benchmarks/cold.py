"""From nothing to the first sample: ``python -m benchmarks.cold``.

Every time is that of a fresh Python process (files already read once, so in the system's cache), by its own clock; the
kinds are taken in turns. ``import fastode`` contains ``import torch``; the ratio says how much it adds. A first sample is
import, loading the bundled model, building the engine and five evaluations at batch 1.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.registry import report, significant, summary, table

ROOT = Path(__file__).parents[1]
SAMPLE = """
import fastode
clock("import")
denoiser = fastode.load("mnist", device={device!r})
clock("load")
x = fastode.sample(denoiser, seeds=[0], class_labels=[3], solver="dpm_solver_pp", nfe=5)
float(x.sum())
clock("first sample")
x = fastode.sample(denoiser, seeds=[1], class_labels=[4], solver="dpm_solver_pp", nfe=5)
float(x.sum())
clock("second sample")
"""
PROGRAMS: Mapping[str, str] = {
    "import torch": "import torch",
    "import fastode": "import fastode",
    "first sample": SAMPLE,
    "import diffusers scheduler": "from diffusers import DPMSolverMultistepScheduler",
}
CLOCK = """
import time
_began = _last = time.perf_counter()
def clock(name):
    global _last
    now = time.perf_counter()
    print("clock", name, now - _last, now - _began, sep="|")
    _last = now
"""


def once(program: str, device: str = "cpu") -> dict[str, float]:
    """Seconds of every part, and in all ("end")."""
    source = CLOCK + program.replace("{device!r}", repr(device)) + '\nclock("end")\n'
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", source],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": path},
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no message")
    marks = [line.split("|") for line in done.stdout.splitlines() if line.startswith("clock|")]
    return {name: float(total if name == "end" else part) for _, name, part, total in marks}


def measure(repeats: int = 5, *, device: str = "cpu") -> dict[str, Any]:
    programs, times = dict(PROGRAMS), {}
    for name in list(programs):
        try:
            once(programs[name], device)  # brings the files into the cache
            times[name] = []
        except RuntimeError as error:
            if "fastode" in programs[name]:
                raise
            print(f"{name} is left out: {error}", file=sys.stderr)
            del programs[name]
    for _ in range(repeats):
        for name, program in programs.items():
            times[name].append(once(program, device))
    rows = [
        {
            "id": name,
            "seconds": summary([t["end"] for t in taken]),
            "seconds_median": summary([t["end"] for t in taken])["median"],
            "parts": {part: summary([t[part] for t in taken]) for part in taken[0] if part != "end"},
        }
        for name, taken in times.items()
    ]
    result = report("cold", "seconds_median", rows, [])
    medians = {r["id"]: r["seconds_median"] for r in rows}
    result["ratios"] = {
        "import fastode / import torch": significant(medians["import fastode"] / medians["import torch"]),
        "first sample / import torch": significant(medians["first sample"] / medians["import torch"]),
    }
    return result


def show(result: dict[str, Any]) -> str:
    rows: list[tuple[Any, ...]] = []
    for r in result["rows"]:
        rows.append((r["id"], r["seconds"]["median"], r["seconds"]["quartile_1"], r["seconds"]["quartile_3"]))
        rows += [(f"- of which {p}", t["median"], t["quartile_1"], t["quartile_3"]) for p, t in r["parts"].items()]
    text = table(("fresh process", "seconds, median", "quartile 1", "quartile 3"), rows)
    return text + "\n\n" + table(("ratio", "of medians"), list(result["ratios"].items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args()
    print(show(measure(args.repeats, device=args.device)))


if __name__ == "__main__":
    main()
