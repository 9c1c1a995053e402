"""How far the update is from the memory's limit: ``python -m benchmarks.roofline``.

One step's update in bytes/s (every tensor read and every tensor written counted once) against torch's ``copy_`` with the
same threads, taken in turns so that all see the same load: a copy that moves as many bytes (``ratio_same_bytes``, which
finds as little of them in the cache) and a copy of one tensor of that shape (``ratio_same_shape``). Beside it the same
formula in torch, eager and compiled with its weights as constants (``--compile``; always on a GPU): their times over ours.
All must give the same numbers, or nothing is timed. On a GPU the clock is the device's.

An update that also makes noise (`ddim` with eta 1) is bound by arithmetic on a CPU; beside it stands torch's ``normal_``
alone, and the targets, which are about memory, are not for it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.registry import (
    SMALL,
    UPDATES,
    alternate,
    report,
    significant,
    summary,
    table,
    table_of_targets,
    target,
)
from fastode.api import grid_maker
from fastode.backends import BACKENDS, choose
from fastode.backends.base import Buffers
from fastode.denoisers.base import Denoiser
from fastode.engine import Engine
from fastode.program.lower import Lowered, lower
from fastode.scalar import evaluate
from fastode.schedules import EDM
from fastode.solvers import SOLVERS

SOLVERS_TIMED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("dpm_solver_pp", {}),
    ("unipc", {}),
    ("ddim", {"eta": 1.0}),
)
GPU_SHAPES = ((8, 16, 128, 128), (80, 16, 256, 256))
"""The larger one moves more than 1 GB in every update."""


class Seeds:
    """The draws of a program from fixed seeds."""

    def __init__(self, batch: int) -> None:
        self.seeds = torch.arange(batch)

    def __call__(self, index: int) -> Tensor:
        raise RuntimeError("the backend makes these itself")


@dataclass
class Step:
    """One inner update of a solver on its own buffers."""

    lowered: Lowered
    index: int
    buffers: Buffers
    start: Tensor
    output: Tensor
    result: Tensor
    executor: Any

    @classmethod
    def of(
        cls,
        solver: str,
        shape: tuple[int, ...],
        backend: str,
        device: str = "cpu",
        net_dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> Step:
        denoiser = Denoiser(lambda x, c: x, prediction="edm")
        program = SOLVERS[solver](grid_maker(SOLVERS[solver], EDM())(steps=6, final="sigma_min"), **options)
        exact = net_dtype == torch.float32
        lowered = lower(program, denoiser.scaling, lambda level: denoiser.columns(level, None), exact_input=exact)
        slots = torch.randn(lowered.slots, *shape, device=device)
        buffers = Buffers(slots, torch.randn(shape, device=device).to(net_dtype))
        start, result = torch.randn(shape, device=device), torch.randn(shape, device=device)
        output = torch.randn(shape, device=device).to(net_dtype)
        executor = BACKENDS[backend].bind(lowered, buffers, Seeds(shape[0]))
        executor.load({})
        return cls(lowered, len(lowered.updates) // 2, buffers, start, output, result, executor)

    @property
    def update(self) -> Any:
        return self.lowered.updates[self.index]

    def run(self) -> Any:
        return self.executor.update(self.index, self.start, (self.output,), self.result)

    def _tensor(self, place: Any) -> Tensor:
        if place.kind == "slot":
            return self.buffers.slots[place.index]
        return {"start": self.start, "input": self.buffers.net_in, "output": self.output, "result": self.result}[
            place.kind
        ]

    def tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        """Those read and those written."""
        read = [self._tensor(s) for s in self.update.sources if s.kind not in ("noise", "one")]
        return read, [self._tensor(t) for t in self.update.targets]

    @property
    def moved(self) -> int:
        read, written = self.tensors()
        return sum(t.nbytes for t in (*read, *written))

    def formula(self) -> Callable[[list[Tensor], list[Tensor]], None] | None:
        """The update as one writes it in torch: sums in float32, written in place. None where it has noise."""
        if any(s.kind in ("noise", "one") for s in self.update.sources):
            return None
        weights = [[float(evaluate(c, {})) for c in row] for row in self.update.entries]

        def run(read: list[Tensor], written: list[Tensor]) -> None:
            sums = []
            for row in weights:
                total = None
                for c, x in zip(row, read, strict=True):
                    if c:
                        total = x.float() * c if total is None else torch.add(total, x, alpha=c)
                assert total is not None
                sums.append(total)
            for out, total in zip(written, sums, strict=True):
                out.copy_(total)

        return run


def bandwidth(
    shape: tuple[int, ...],
    solver: str,
    backend: str,
    seconds: float,
    *,
    device: str = "cpu",
    net_dtype: torch.dtype = torch.float32,
    compiled: bool = False,
    **options: Any,
) -> dict[str, Any]:
    step = Step.of(solver, shape, backend, device, net_dtype, **options)
    names, runs = ["update", "copy_bytes", "copy"], [step.run]
    many_a, many_b = torch.randn(step.moved // 8, device=device), torch.empty(step.moved // 8, device=device)
    a, b = torch.randn(shape, device=device), torch.empty(shape, device=device)
    runs += [lambda: many_b.copy_(many_a), lambda: b.copy_(a)]
    bytes_of = [step.moved, many_a.nbytes * 2, 2 * a.nbytes]
    formula = step.formula()
    if formula is not None:
        read, written = step.tensors()
        for name, function in (("eager", formula), ("compile", compile_or_none(formula) if compiled else None)):
            if function is not None and agree(step, function, name):
                names.append(name)
                runs.append(lambda function=function: function(read, written))
                bytes_of.append(step.moved)
    else:  # it makes noise
        names.append("randn")
        runs.append(lambda: b.normal_())
        bytes_of.append(step.moved)
    with torch.no_grad():
        times = (on_device if device == "cuda" else alternate)(runs, seconds)
    rates = {n: [k / t / 1e9 for t in taken] for n, k, taken in zip(names, bytes_of, times, strict=True)}
    row: dict[str, Any] = {
        "id": f"{solver}{''.join(f',{k}={v}' for k, v in options.items())} {list(shape)} {str(net_dtype)[6:]}",
        "solver": solver, "options": options, "shape": list(shape), "network": str(net_dtype)[6:], "backend": backend,
        "bytes": step.moved, "gb_per_s": {n: summary(r) for n, r in rates.items()},
    }  # fmt: skip
    for name in ("copy_bytes", "copy"):
        ratios = [u / c for u, c in zip(rates["update"], rates[name], strict=True)]
        row["ratio_same_bytes" if name == "copy_bytes" else "ratio_same_shape"] = significant(statistics.median(ratios))
        if name == "copy_bytes":
            row["ratio_same_bytes_quartiles"] = [significant(q) for q in statistics.quantiles(ratios, n=4)[::2]]
    for name in names[3:]:
        row[f"{name}_over_update"] = significant(statistics.median(rates["update"]) / statistics.median(rates[name]))
    return row


def compile_or_none(formula: Callable[..., None]) -> Callable[..., None] | None:
    torch._dynamo.reset()
    return torch.compile(formula, fullgraph=True, dynamic=False)


def agree(step: Step, function: Callable[..., None], name: str) -> bool:
    """Whether ``function`` runs here; raises where it and the update give different numbers from the same start."""
    read, written = step.tensors()
    before = [t.clone() for t in written]

    def restore() -> None:
        for t, old in zip(written, before, strict=True):
            t.copy_(old)

    step.run()
    ours = [t.clone() for t in written]
    restore()
    try:
        function(read, written)
    except Exception as error:  # no compiler on this machine
        print(f"{name} is left out: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
        restore()
        return False
    for mine, theirs in zip(ours, written, strict=True):
        tolerance = 1e-5 if mine.dtype == torch.float32 else 2e-2  # one rounding of bfloat16
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance * float(mine.abs().max()))
    restore()
    return True


def on_device(runs: Sequence[Callable[[], Any]], seconds: float, inner: int = 10) -> list[list[float]]:
    """As :func:`alternate`, by the device's clock; each time is the mean of ``inner`` launches in a row, so that the
    device and not the host is waited for."""
    times: list[list[float]] = [[] for _ in runs]

    def timed(run: Callable[[], Any]) -> float:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        run()
        first.record()
        for _ in range(inner):
            run()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3 / inner

    for run in runs:
        timed(run)
    spent = 0.0
    while spent < seconds or len(times[0]) < 5:
        for run, taken in zip(runs, times, strict=True):
            taken.append(timed(run))
            spent += taken[-1] * (inner + 1)
        if len(times[0]) >= 200:
            break
    return times


def host(solver: str, backend: str, evaluations: int = 20, repeats: int = 30) -> dict[str, Any]:
    """Host time of a step at 4 elements, alone on the processor; everything a call does is counted."""
    s = SOLVERS[solver]
    engine = Engine(s(grid_maker(s, EDM())(steps=evaluations, final=s.final)), lambda x, sigma: x, SMALL, backend)
    x = torch.randn(SMALL)
    times = alternate([lambda: engine(x)], 0.0, least=repeats)[0]
    return {
        "id": f"host {solver}",
        "solver": solver,
        "us_per_step": summary(times, 1e6 / evaluations),
        "us_per_evaluation": summary(times, 1e6 / engine.nfe),
    }


def measure(
    seconds: float = 3.0,
    shapes: Sequence[tuple[int, ...]] = UPDATES,
    *,
    backend: str = "auto",
    device: str = "cpu",
    network_types: Sequence[torch.dtype] = (torch.float32,),
    compiled: bool = False,
) -> dict[str, Any]:
    """``seconds`` for every row."""
    chosen = choose(backend, torch.device(device))
    rows = [
        bandwidth(shape, solver, chosen, seconds, device=device, net_dtype=dtype, compiled=compiled, **options)
        for shape in shapes
        for dtype in network_types
        for solver, options in SOLVERS_TIMED
    ]
    result = report("roofline", "ratio_same_bytes", rows, targets(rows, device))
    result["device"] = device
    if device == "cpu" and chosen == "native":
        result["host"] = [host(solver, chosen) for solver in SOLVERS]
    return result


def targets(rows: Sequence[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    found = []
    for row in rows:
        large = row["bytes"] >= 1e9 if device == "cuda" else tuple(row["shape"]) in UPDATES[1:]
        if large and "randn_over_update" not in row:
            limit = 0.92 if device == "cuda" else 0.85
            found.append(target(f"{row['id']}: bytes/s of copy_", row["ratio_same_bytes"], limit, at_most=False))
            if device == "cuda" and "compile_over_update" in row:
                name = f"{row['id']}: time of torch.compile over ours"
                found.append(target(name, row["compile_over_update"], 1.0, at_most=False))
    return found


def show(result: dict[str, Any]) -> str:
    columns = (
        "update", "MB moved", "GB/s", "copy_ GB/s", "of copy_, same bytes", "of copy_, same shape", "eager / ours",
        "compile / ours", "normal_ / ours",
    )  # fmt: skip
    rows = [
        (
            r["id"], significant(r["bytes"] / 1e6, 3), r["gb_per_s"]["update"]["median"],
            r["gb_per_s"]["copy_bytes"]["median"], r["ratio_same_bytes"], r["ratio_same_shape"],
            r.get("eager_over_update"), r.get("compile_over_update"),
            r.get("randn_over_update"),
        )
        for r in result["rows"]
    ]  # fmt: skip
    text = table(columns, rows)
    if result.get("host"):
        own = [
            (h["solver"], h["us_per_step"]["median"], h["us_per_evaluation"]["median"], h["us_per_evaluation"]["best"])
            for h in result["host"]
        ]
        text += "\n\n" + table(("4 elements", "us per step", "us per evaluation", "best"), own)
    return text + ("\n\n" + table_of_targets(result["targets"]) if result["targets"] else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--seconds", type=float, default=3.0, help="per row")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action="store_true", help="also the compiled formula (on a GPU always)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    gpu = args.device == "cuda"
    types = (torch.float32, torch.bfloat16) if gpu else (torch.float32,)
    print(
        show(
            measure(
                args.seconds,
                GPU_SHAPES if gpu else UPDATES,
                backend=args.backend,
                device=args.device,
                network_types=types,
                compiled=gpu or args.compile,
            )
        )
    )


if __name__ == "__main__":
    main()
