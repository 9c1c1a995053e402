"""Lowered updates by csrc/combine.cuh, compiled at run time through CuPy: for GPUs where no compiler is installed."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastode.backends.base import Buffers, Draws
from fastode.backends.cuda import THREADS, Arguments, CudaExecutor, Launch, grid, kernel_name, normal
from fastode.program.lower import Lowered


def source(name: str) -> str:
    """A translation unit with the one kernel of that name."""
    _, state, vector, inputs = name.split("_")
    number = {"f32": "float", "f64": "double"}[state]
    return f'#include "combine.cuh"\nFASTODE_KERNEL({name}, {number}, {vector}, {inputs})\n'


def options() -> tuple[str, ...]:
    """What the run-time compiler is told: C++17, and where the headers are, in a checkout or installed."""
    package = Path(__file__).parents[1]
    folder = next((f for f in (package / "csrc", package.parent / "csrc") if (f / "combine.cuh").exists()), None)
    if folder is None:
        raise FileNotFoundError(f"csrc/combine.cuh: not found beside {package}")
    return ("-std=c++17", f"-I{folder}")


class NvrtcBackend:
    """CUDA devices, through CuPy. A kernel is compiled when it is first needed, which takes one or two seconds; CuPy keeps
    what it compiled on disk."""

    name = "nvrtc"

    def __init__(self) -> None:
        self._kernels: dict[tuple[str, int | None], Any] = {}

    def missing(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return "it runs on CUDA devices"
        if importlib.util.find_spec("cupy") is None:
            return "CuPy is not installed (pip install 'fastode[cupy]')"
        if torch.version.cuda is None or not torch.cuda.is_available():
            return "PyTorch sees no CUDA device"
        if torch.cuda.get_device_capability(device) < (7, 0):
            return "it is written for compute capability 7.0 and newer"
        return None

    def _kernel(self, name: str, device: torch.device) -> Any:
        at = (name, device.index)
        if at not in self._kernels:
            cupy = importlib.import_module("cupy")
            with cupy.cuda.Device(device.index or 0):
                self._kernels[at] = cupy.RawKernel(source(name), name, options=options(), backend="nvrtc")
        return self._kernels[at]

    def _launch(self, device: torch.device) -> Launch:
        """Launches on torch's current stream of ``device``."""
        cupy = importlib.import_module("cupy")
        processors = torch.cuda.get_device_properties(device).multi_processor_count

        def on_current_stream(arguments: Arguments, vector: int) -> None:
            kernel = self._kernel(kernel_name(arguments, vector), device)
            stream = cupy.cuda.ExternalStream(torch.cuda.current_stream(device).cuda_stream)
            with cupy.cuda.Device(device.index or 0), stream:
                kernel(grid(arguments, vector, processors), (THREADS,), (by_value(arguments),))

        return on_current_stream

    def bind(self, lowered: Lowered, buffers: Buffers, noise: Draws) -> CudaExecutor:
        return CudaExecutor(self._launch(buffers.net_in.device), lowered, buffers, noise)

    def normal(
        self, seeds: Tensor, draw: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """``fastode.noise.normal``, equal to rounding."""
        return normal(self._launch(device), seeds, draw, shape, dtype, device)


def by_value(arguments: Arguments) -> np.ndarray:
    """The structure as CuPy takes one by value: an array of one record, over the same memory."""
    return np.frombuffer(memoryview(arguments), dtype=[("bytes", np.uint8, (ctypes.sizeof(arguments),))])
