"""Everything for a CUDA machine in one command, under 8 minutes: ``python -m benchmarks.gpu``.

Writes ``benchmarks/results/gpu.json`` (after every part, so that a part that fails costs only itself) and prints all tables.
Asserted: one launch per evaluation outside the network, counted by the profiler, and no host wait and no allocation in a
sample after warm-up. The exit status is 1 where a part failed or a target was missed. ``--smoke`` runs what does not need
a GPU on the processor, in seconds; its figures mean nothing and are not stored unless ``--out`` is given.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import cold, overhead, peers, roofline, trajectory
from benchmarks.networks import make
from benchmarks.registry import (
    CASES,
    LARGE,
    RESULTS,
    SMALL,
    STATES,
    Case,
    Fixed,
    machine,
    store,
    table,
    table_of_targets,
    target,
)
from fastode import SOLVERS, Denoiser, Engine
from fastode.nets.predictor import AMEDPredictor
from fastode.schedules import EDM, time_uniform

LIMIT = 480.0  # seconds
WAITS = (
    "cudaDeviceSynchronize",
    "cudaStreamSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpy",
    "cudaMalloc",
    "cudaFree",
)


def launches(call: Callable[[], Any]) -> tuple[int, list[str]]:
    """Kernels that ``call`` runs on the device (a replayed graph's too), and the waits and allocations of the host."""
    from torch.profiler import ProfilerActivity, profile, record_function

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
        with record_function("the call"):
            call()
        torch.cuda.synchronize()  # ours: outside the range that is looked at
    events = list(prof.events())
    host = [e for e in events if e.device_type == torch.autograd.DeviceType.CPU]
    whole = next(e.time_range for e in host if e.name == "the call")
    waits = [e.name for e in host if e.name in WAITS and whole.start <= e.time_range.start <= whole.end]
    kernels = 0
    for event in events:  # the range itself is mirrored on the device
        if event.device_type == torch.autograd.DeviceType.CUDA and event.name != "the call":
            kernels += not event.name.startswith(("Memcpy", "Memset"))
    return kernels, waits


def launch_rows() -> list[dict[str, Any]]:
    """Kernels of a run with a network that launches nothing, at two numbers of evaluations: the difference is what an
    evaluation costs, the rest what a call costs."""
    rows = []
    for case in {c.name: c for c in CASES}.values():
        counts: dict[int, int] = {}
        for wanted in (8, 16):
            program = SOLVERS[case.solver](overhead.usual_grid(case, wanted), **case.options)
            engine = Engine(program, Denoiser(Fixed(LARGE, "cuda")), LARGE, device="cuda", graph=False)
            x = torch.randn(LARGE, device="cuda")
            engine(x)
            counts[engine.nfe] = launches(lambda engine=engine, x=x: engine(x))[0]
            engine.close()
        (few, a), (many, b) = sorted(counts.items())
        per_evaluation = (b - a) / (many - few)
        rows.append(
            {
                "id": case.name,
                "per_evaluation": per_evaluation,
                "per_call": a - few * per_evaluation,
                "evaluations": [few, many],
                "kernels": [a, b],
            }
        )
    return rows


class Looking(Fixed):
    """A network that launches nothing and offers a feature map."""

    def __init__(self, shape: tuple[int, ...], device: str) -> None:
        super().__init__(shape, device)
        self.seen = torch.randn(shape[0], 96, 8, 8, device=device)

    def __call__(self, x: Tensor, c_noise: Tensor, features: bool = False, **_: Any) -> Any:
        raw = super().__call__(x, c_noise)
        return (raw, {"bottleneck": self.seen}) if features else raw


def amed_row() -> dict[str, Any]:
    """Kernels of AMED-Solver outside the network, predictor included, in five evaluations of a small image."""
    shape = (8, 3, 32, 32)
    predictor = AMEDPredictor(scale_time=0.1).requires_grad_(False).to("cuda")
    program = SOLVERS["amed"](time_uniform(EDM(), 3), afs=True, predictor=predictor)
    engine = Engine(program, Denoiser(Looking(shape, "cuda")), shape, device="cuda", graph=False)
    x = torch.randn(shape, device="cuda")
    engine(x)
    kernels = launches(lambda: engine(x))[0]
    engine.close()
    return {
        "id": "amed, 5 evaluations",
        "per_evaluation": kernels / 6,
        "per_call": 0,
        "evaluations": [5],
        "kernels": [kernels],
    }


def quiet_sample(batch: int, dtype: torch.dtype, conditional: bool) -> dict[str, Any]:
    """One replayed sample of the bundled model after warm-up, with the start and the output given: how often the host
    waits, and how much memory is taken from the allocator and from the device."""
    denoiser = make("mnist", "cuda").to(dtype)
    assert denoiser.sample_shape is not None
    shape = (batch, *denoiser.sample_shape)
    engine = Engine(trajectory.program_of(), denoiser, shape, graph=True)
    x, out = torch.randn(shape, device="cuda") * 80, torch.empty(shape, device="cuda")
    given: dict[str, Any] = {"x": x, "out": out}
    if conditional:
        given["class_labels"] = torch.arange(batch, device="cuda") % 10
    engine.warmup(**given)
    engine(**given)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()
    refused = None
    torch.cuda.set_sync_debug_mode("error")  # torch's own operations that make the host wait raise
    try:
        engine(**given)
    except RuntimeError as error:
        refused = str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    after = torch.cuda.memory_stats()
    torch.cuda.synchronize()
    kernels, waits = launches(lambda: engine(**given))
    engine.close()
    return {
        "id": f"batch {batch}" + (" with class labels" if conditional else ""),
        "torch_wait": refused,
        "runtime_waits": len(waits),
        "allocations": after["allocation.all.allocated"] - before["allocation.all.allocated"],
        "device_allocations": after["segment.all.allocated"] - before["segment.all.allocated"],
        "kernels": kernels,
    }


# --- the parts: name, what it returns, what it prints ---


def host_time(seconds: float, shapes: Any, cases: Any, device: str) -> dict[str, Any]:
    """As `overhead`, until the device is done."""
    diffusers = peers.module("diffusers")
    wait = torch.cuda.synchronize if device == "cuda" else None
    rows = [
        overhead.measure_one(diffusers, case, shape, seconds, device=device, wait=wait, least=3)
        for shape in shapes
        for case in cases
    ]
    return {"rows": rows, "targets": []}


def count(_: float) -> dict[str, Any]:
    rows = launch_rows()
    targets = []
    for row in rows:
        name = f"{row['id']}: launches per evaluation outside the network, less 1"
        targets.append(target(name, abs(row["per_evaluation"] - 1), 0, at_most=True))
    rows.append(amed_row())
    targets.append(target("AMED, 5 evaluations: launches outside the network", rows[-1]["kernels"][0], 6, at_most=True))
    return {"rows": rows, "targets": targets}


def quiet(_: float) -> dict[str, Any]:
    rows = [quiet_sample(b, torch.bfloat16, labels) for b in (1, 64) for labels in (False, True)]
    targets = []
    for row in rows:
        waits = row["runtime_waits"] + (row["torch_wait"] is not None)
        targets.append(target(f"{row['id']}: host waits in a sample", waits, 0, at_most=True))
        targets.append(target(f"{row['id']}: allocations in a sample", row["allocations"], 0, at_most=True))
    return {"rows": rows, "targets": targets}


def show_rows(part: dict[str, Any]) -> str:
    columns = list(part["rows"][0])
    return table(columns, [[r[c] for c in columns] for r in part["rows"]]) + "\n\n" + table_of_targets(part["targets"])


def show_host(part: dict[str, Any]) -> str:
    return overhead.show(part)


Part = tuple[str, Callable[[float], dict[str, Any]], Callable[[dict[str, Any]], str]]


def parts(device: str, smoke: bool) -> list[Part]:
    if smoke:
        few: tuple[Case, ...] = CASES[:3]
        return [
            ("overhead", lambda s: host_time(s, (SMALL,), few, "cpu"), show_host),
            ("roofline", lambda s: roofline.measure(s, ((1, 4, 16, 16),)), roofline.show),
            ("trajectory", lambda s: trajectory.measure(s, networks=["mnist"], batches=(1,), least=2), trajectory.show),
        ]
    both = (torch.float32, torch.bfloat16)
    return [
        ("launches", count, show_rows),
        ("quiet", quiet, show_rows),
        (
            "roofline",
            lambda s: roofline.measure(s, roofline.GPU_SHAPES, device=device, network_types=both, compiled=True),
            roofline.show,
        ),
        ("trajectory", lambda s: trajectory.measure(2 * s, device=device), trajectory.show),
        ("overhead", lambda s: host_time(0.5 * s, STATES, CASES, device), show_host),
        ("cold", lambda _: cold.measure(3, device=device), cold.show),
    ]


def run(device: str, smoke: bool, seconds: float, out: Path | None) -> int:
    began, failed = time.perf_counter(), []
    result: dict[str, Any] = {"benchmark": "gpu", "smoke": smoke, "machine": machine(), "parts": {}, "failed": {}}
    for name, measure, show in parts(device, smoke):
        spent = time.perf_counter() - began
        if spent > 0.85 * LIMIT:
            failed.append(name)
            result["failed"][name] = f"left out: {spent:.0f} s of {LIMIT:.0f} s were spent"
            continue
        try:
            part = measure(seconds)
        except Exception as error:
            traceback.print_exc()
            failed.append(name)
            result["failed"][name] = f"{type(error).__name__}: {error}"
        else:
            result["parts"][name] = part
            print(f"\n## {name}\n\n{show(part)}", flush=True)
        result["seconds"] = round(time.perf_counter() - began, 1)
        if out is not None:
            store(result, out)
    missed = [t["name"] for p in result["parts"].values() for t in p["targets"] if not t["reached"]]
    print(f"\n{result['seconds']} s. Failed parts: {', '.join(failed) or 'none'}. Missed targets: {len(missed)}")
    for name in missed:
        print(f"  {name}")
    return int(bool(failed or (missed and not smoke)))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="what does not need a GPU, on the processor")
    parser.add_argument("--seconds", type=float, help="per row (default 1; with --smoke 0.01)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    if args.smoke:
        return run("cpu", True, args.seconds or 0.01, args.out)
    if not torch.cuda.is_available():
        print(
            "benchmarks.gpu: this torch sees no CUDA device; nothing was measured (--smoke runs without)",
            file=sys.stderr,
        )
        return 2
    return run("cuda", False, args.seconds or 1.0, args.out or RESULTS / "gpu.json")


if __name__ == "__main__":
    sys.exit(main())
