"""How far the update is from the memory's limit, and what a step costs the host: ``python -m benchmarks.roofline``.

Prints one JSON object. ``update``: bytes/s of one step's update (every tensor read and every tensor written counted
once) against torch's ``copy_`` with the same threads, measured in turns so that both see the same load: a copy of a
tensor of that shape (``ratio_same_shape``), and one that moves as many bytes (``ratio_same_bytes``), which finds as
little of them in the cache. ``host``: microseconds per step and per evaluation with a denoiser that costs nothing, for
every solver. Medians; ``least`` is the best of all repeats, which other load on the machine disturbs least.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastode.api import grid_maker
from fastode.backends import BACKENDS
from fastode.backends.base import Buffers
from fastode.denoisers.base import Denoiser
from fastode.engine import Engine
from fastode.program.lower import lower
from fastode.schedules import EDM
from fastode.solvers import SOLVERS

SHAPES = ((1, 4, 64, 64), (8, 16, 128, 128), (16, 16, 256, 256))


class Seeds:
    """The draws of a program from fixed seeds."""

    def __init__(self, batch: int) -> None:
        self.seeds = torch.arange(batch)

    def __call__(self, index: int) -> Tensor:
        raise NotImplementedError("the backend makes these itself")


def step(solver: str, shape: tuple[int, ...], backend: str, **options: Any) -> tuple[Callable[[], Any], int]:
    """One inner update of ``solver`` on buffers of ``shape``, and the bytes it moves."""
    denoiser = Denoiser(lambda x, c: x, prediction="edm")
    program = SOLVERS[solver](grid_maker(SOLVERS[solver], EDM())(steps=6, final="sigma_min"), **options)
    lowered = lower(program, denoiser.scaling, lambda level: denoiser.columns(level, None))
    buffers = Buffers(torch.randn(lowered.slots, *shape), torch.randn(shape))
    start, output, result = torch.randn(shape), torch.randn(shape), torch.randn(shape)
    executor = BACKENDS[backend].bind(lowered, buffers, Seeds(shape[0]))
    executor.load({})
    index = len(lowered.updates) // 2
    update = lowered.updates[index]
    tensors = sum(s.kind not in ("noise", "one") for s in update.sources) + len(update.targets)
    return lambda: executor.update(index, start, (output,), result), tensors * output.nbytes


def alternate(runs: list[Callable[[], Any]], seconds: float) -> list[list[float]]:
    """Seconds of each run, taken in turns for about ``seconds`` in all."""
    times: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for run, taken in zip(runs, times, strict=True):
            began = time.perf_counter()
            run()
            taken.append(time.perf_counter() - began)
    return times


def bandwidth(shape: tuple[int, ...], solver: str, backend: str, seconds: float, **options: Any) -> dict[str, Any]:
    update, moved = step(solver, shape, backend, **options)
    a, b = torch.randn(shape), torch.empty(shape)
    many_a, many_b = torch.randn(moved // 8), torch.empty(moved // 8)
    times = alternate([update, lambda: b.copy_(a), lambda: many_b.copy_(many_a)], seconds)
    rates = [[n / t for t in run] for n, run in zip((moved, 2 * a.nbytes, moved), times, strict=True)]
    same_shape, same_bytes = ([u / c for u, c in zip(rates[0], copy, strict=True)] for copy in rates[1:])
    return {
        "solver": solver,
        "shape": list(shape),
        "bytes": moved,
        "repeats": len(times[0]),
        "gb_per_s": {
            k: statistics.median(r) / 1e9 for k, r in zip(("update", "copy", "copy_bytes"), rates, strict=True)
        },
        "gb_per_s_best": {k: max(r) / 1e9 for k, r in zip(("update", "copy", "copy_bytes"), rates, strict=True)},
        "ratio_same_shape": statistics.median(same_shape),
        "ratio_same_bytes": statistics.median(same_bytes),
        "ratio_same_bytes_quartiles": statistics.quantiles(same_bytes, n=4)[::2],
    }


def host(solver: str, backend: str, steps: int = 20, repeats: int = 30) -> dict[str, Any]:
    """Host time of a step at 4 elements; everything a call does is counted, divided by its steps."""
    s = SOLVERS[solver]
    engine = Engine(s(grid_maker(s, EDM())(steps=steps, final=s.final)), lambda x, sigma: x, (1, 4), backend)
    x = torch.randn(1, 4)
    for _ in range(5):
        engine(x)
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        engine(x)
        times.append((time.perf_counter() - began) * 1e6)
    median, least = statistics.median(times), min(times)
    return {
        "solver": solver,
        "us_per_step": median / steps,
        "us_per_evaluation": median / engine.nfe,
        "us_per_step_least": least / steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="native")
    parser.add_argument("--seconds", type=float, default=3.0, help="per comparison with copy_")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", help="write the result here too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = {
        "machine": {
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "platform": f"{platform.system()} {platform.machine()}",
            "threads": torch.get_num_threads(),
            "load": os.getloadavg()[0],
        },
        "torch": torch.__version__,
        "backend": args.backend,
        "update": [
            bandwidth(shape, solver, args.backend, args.seconds, **options)
            for shape in SHAPES
            for solver, options in (("dpm_solver_pp", {}), ("unipc", {}), ("ddim", {"eta": 1.0}))
        ],
        "host": [host(solver, args.backend) for solver in SOLVERS],
    }
    text = json.dumps(result, indent=2)
    print(text)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
