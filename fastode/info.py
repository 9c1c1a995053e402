"""What is installed, and which backends can run and why others can not."""

from __future__ import annotations

import importlib.metadata
import platform

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


def report() -> str:
    lines = [
        f"fastode {importlib.metadata.version('fastode')}, Python {platform.python_version()}, {platform.machine()}"
    ]
    for name in PACKAGES:
        try:
            lines.append(f"  {name:<14}{importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"  {name:<14}not installed")
    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    lines.append(f"devices: cpu ({torch.get_num_threads()} threads)" + "".join(f", {name}" for name in cuda))
    lines.append("backends:")
    lines.append("  reference     everywhere; differentiable")
    for name, backend in BACKENDS.items():
        for device in ("cpu", "cuda"):
            if device == "cuda" and not cuda:
                continue
            reason = backend.missing(torch.device(device))
            lines.append(f"  {name:<14}{device}: {'ready' if reason is None else reason}")
    lines.append(f"models: {', '.join(bundled()) or 'none bundled'}")
    return "\n".join(lines)
