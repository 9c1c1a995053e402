"""What is installed, which backends can run and why others can not, and what is kept on disk."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from fastode.backends import BACKENDS
from fastode.models import bundled

PACKAGES = (
    "torch",
    "numpy",
    "safetensors",
    "triton",
    "cupy-cuda13x",
    "diffusers",
    "onnxruntime",
    "scipy",
    "matplotlib",
)


def machine() -> dict[str, Any]:
    """Processor, devices and versions; nothing that names the machine itself."""
    record: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastode": version("fastode"),
    }
    if torch.cuda.is_available():
        record["gpu"] = torch.cuda.get_device_properties(torch.cuda.current_device()).name
        record["cuda"] = torch.version.cuda
    return record


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def report() -> str:
    lines = [f"fastode {version('fastode')}, Python {platform.python_version()}, {platform.machine()}"]
    for name in PACKAGES:
        lines.append(f"  {name:<14}{version(name) or 'not installed'}")
    lines.append(
        f"processor: {_cpu_name()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} threads"
    )
    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if not cuda:
        built = torch.version.cuda
        why = (
            "this torch is built without CUDA" if built is None else f"torch is built for CUDA {built}, no device found"
        )
        lines.append(f"GPU: none ({why})")
    for i, name in enumerate(cuda):
        properties = torch.cuda.get_device_properties(i)
        lines.append(
            f"GPU: cuda:{i} {name}, {properties.total_memory / 2**30:.0f} GiB, compute capability "
            f"{properties.major}.{properties.minor}, CUDA {torch.version.cuda}"
        )
    lines.append("backends:")
    lines.append("  reference     everywhere; differentiable")
    for name, backend in BACKENDS.items():
        for device in ("cpu", "cuda"):
            if device == "cuda" and not cuda:
                continue
            reason = backend.missing(torch.device(device))
            lines.append(f"  {name:<14}{device}: {'ready' if reason is None else reason}")
    lines.append(f"models: {', '.join(bundled()) or 'none bundled'}")
    lines += _caches()
    return "\n".join(lines)


def _caches() -> list[str]:
    from fastode.evaluate.cache import root, sizes

    found = sizes()
    kept = {**{f"fastode {kind}": size for kind, size in found.items()}}
    triton = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    if triton.is_dir():
        files = [p for p in triton.rglob("*") if p.is_file()]
        kept["triton kernels"] = len(files), sum(p.stat().st_size for p in files)
    lines = [f"caches: {root()}"]
    for kind, (count, size) in kept.items():
        lines.append(f"  {kind:<24}{count} files, {size / 2**20:.1f} MiB")
    return lines if kept else [lines[0] + " (empty)"]


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
