"""What all benchmarks share: the inputs, each declared once; how times are taken; what a stored report looks like."""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RESULTS = Path(__file__).with_name("results")

SMALL, MIDDLE, LARGE = (1, 4), (1, 4, 64, 64), (8, 16, 128, 128)
STATES: tuple[tuple[int, ...], ...] = (SMALL, MIDDLE, LARGE)
"""Of `overhead`: nothing but host time, a latent of Stable Diffusion, and a state that does not fit into a cache."""

UPDATES: tuple[tuple[int, ...], ...] = (MIDDLE, LARGE, (16, 16, 256, 256))
"""Of `roofline` on the CPU."""

BATCHES = (1, 8, 64)
EVALUATIONS = 20
"""Of a run in `overhead`."""


@dataclass(frozen=True)
class Case:
    """A solver, and the diffusers scheduler that is the same method (docs/peers.md): ``every`` of the scheduler's levels
    are one step of the solver."""

    solver: str
    options: Mapping[str, Any] = field(default_factory=dict)
    scheduler: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    every: int = 1

    @property
    def name(self) -> str:
        return self.solver + "".join(f",{k}={v}" for k, v in self.options.items())


def _cases() -> tuple[Case, ...]:
    dpm, unipc, single = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DPMSolverSinglestepScheduler"
    exponential = {"solver_order": 2, "use_exponential_sigmas": True}
    to_sigma_min = {"final_sigmas_type": "sigma_min"}
    return (
        Case("dpm_solver_pp", {"order": 2}, dpm, {"solver_order": 2}),
        Case("dpm_solver_pp", {"order": 3, "lower_order_final": False}, dpm, {"solver_order": 3}),
        Case("unipc", {"order": 2}, unipc, {"solver_order": 2, **to_sigma_min}),
        Case("unipc", {"order": 3}, unipc, {"solver_order": 3, **to_sigma_min}),
        Case("ddim", {}, "DDIMScheduler", {"clip_sample": False}),
        Case("ddim", {}, "EulerDiscreteScheduler"),
        Case(
            "deis",
            {"order": 3, "space": "lam"},
            "DEISMultistepScheduler",
            {"solver_order": 3, "lower_order_final": False},
        ),
        Case("heun", {}, "HeunDiscreteScheduler"),
        Case("dpm_solver_2", {}, "KDPM2DiscreteScheduler"),
        Case("dpm_solver_pp_s", {}, single, exponential, every=2),
        Case("pndm", {"skip_prk_steps": True}, "PNDMScheduler", {"skip_prk_steps": True}),
        Case("lms", {}, "LMSDiscreteScheduler"),
        Case("dpm_solver_3"),
        Case("ipndm"),
        Case("ipndm_v"),
        Case("edm"),
        Case("amed"),
        Case("euler_ancestral"),
        Case("dpm_2_ancestral"),
        Case("dpmpp_2s_ancestral"),
        Case("ddpm"),
        Case("sde_dpm_solver_pp"),
        Case("dpmpp_3m_sde"),
        Case("dpmpp_sde"),
        Case("sa_solver"),
        Case("lcm"),
        Case("restart"),
        Case("sampler_scheduler"),
    )


CASES = _cases()
"""Of `overhead`: every solver of ``SOLVERS``."""


class Fixed:
    """The network that costs nothing: it always returns the same tensor."""

    def __init__(self, shape: Sequence[int], device: torch.device | str = "cpu") -> None:
        generator = torch.Generator().manual_seed(1)  # not the start's numbers, whoever seeded torch with 0
        self.output = torch.randn(tuple(shape), generator=generator).to(device)

    def __call__(self, x: Tensor, c_noise: Any) -> Tensor:
        return self.output


# --- times ---


def alternate(
    runs: Sequence[Callable[[], Any]],
    seconds: float,
    *,
    least: int = 5,
    before: Sequence[Callable[[], Any] | None] = (),
    wait: Callable[[], None] | None = None,
) -> list[list[float]]:
    """Seconds of each run, taken in turns for about ``seconds`` in all, so that all see the same load.

    ``before[i]`` is called ahead of run i, off the clock. ``wait`` (for the device) is on it.
    """
    prepare = list(before) or [None] * len(runs)
    times: list[list[float]] = [[] for _ in runs]
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for measured in (False, True):
            end = time.perf_counter() + seconds
            while True:
                for run, first, taken in zip(runs, prepare, times, strict=True):
                    if first is not None:
                        first()
                    if wait is not None:
                        wait()
                    began = time.perf_counter()
                    run()
                    if wait is not None:
                        wait()
                    if measured:
                        taken.append(time.perf_counter() - began)
                if not measured or (time.perf_counter() >= end and len(times[0]) >= least):
                    break
    finally:
        if collecting:
            gc.enable()
    return times


def summary(times: Sequence[float], scale: float = 1.0) -> dict[str, float]:
    """Median, quartiles and best of ``times``, multiplied by ``scale``. Other load disturbs the best one least."""
    low, middle, high = statistics.quantiles(times, n=4) if len(times) > 1 else [times[0]] * 3
    rounded = {"median": middle, "quartile_1": low, "quartile_3": high, "best": min(times)}
    return {k: significant(v * scale) for k, v in rounded.items()} | {"repeats": len(times)}


def significant(x: float, digits: int = 4) -> float:
    return float(f"{x:.{digits}g}")


# --- reports ---


def report(benchmark: str, figure: str, rows: list[dict[str, Any]], targets: list[dict[str, Any]]) -> dict[str, Any]:
    """What is stored. Every row has an ``id`` and, under the name ``figure``, the number by which commits are compared."""
    return {"benchmark": benchmark, "figure": figure, "machine": machine(), "targets": targets, "rows": rows}


def target(name: str, measured: float, limit: float, *, at_most: bool) -> dict[str, Any]:
    reached = measured <= limit if at_most else measured >= limit
    sign = "<=" if at_most else ">="
    return {"name": name, "measured": significant(measured), "wanted": f"{sign} {limit:.4g}", "reached": reached}


def machine() -> dict[str, Any]:
    """Processor, devices, versions, commit and date; nothing that names the machine itself."""
    record: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }
    for name in ("diffusers", "triton"):
        record[name] = version(name)
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        record["gpu"] = properties.name
        record["gpu_bytes"] = properties.total_memory
        record["gpu_capability"] = f"{properties.major}.{properties.minor}"
        record["cuda"] = torch.version.cuda
        record["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
    return record


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """Of this repository; marked where the engine's own files differ from it."""
    root = str(Path(__file__).parents[1])
    name = _output("git", "-C", root, "rev-parse", "--short", "HEAD")
    changed = _output("git", "-C", root, "status", "--porcelain", "--untracked-files=no", "fastode", "kernels", "csrc")
    return (name or "unknown") + (" with changes" if name and changed else "")


def store(result: Mapping[str, Any], path: Path) -> None:
    """Write ``path`` whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(result, indent=1) + "\n")
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Markdown; the first column to the left, numbers to the right."""
    text = [[_cell(c) for c in row] for row in rows]
    lines = ["| " + " | ".join(columns) + " |", "| --- |" + " ---: |" * (len(columns) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in text])


def table_of_targets(targets: Sequence[Mapping[str, Any]]) -> str:
    rows = [(t["name"], t["measured"], t["wanted"], "yes" if t["reached"] else "NO") for t in targets]
    return table(("target", "measured", "wanted", "reached"), rows)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 1000 else str(value)


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
