"""How a network is executed: one runtime per file, each a callable that takes the place of ``Denoiser.network``.

from fastode import runtimes
fast = runtimes.build(fastode.load("mnist"), "onnx", path="mnist-onnx/", batches=(1, 8))
images = fastode.sample(fast, seeds=range(8), nfe=5, solver="unipc", class_labels=3)
fast = runtimes.load("mnist-onnx/")                       # elsewhere, without the model
fast.network.card.error                                   # how far from eager, by batch size
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fastode.denoisers.base import Denoiser
from fastode.runtimes.base import Card, MissingError, Runtime
from fastode.runtimes.sampler import ExportedSampler, Portable, export_sampler, load_sampler

NAMES = ("eager", "compile", "aoti", "onnx", "tensorrt", "torch_tensorrt")


def _class(name: str) -> Any:
    if name == "eager":
        from fastode.runtimes.eager import Eager as found
    elif name == "compile":
        from fastode.runtimes.compiled import Compiled as found  # type: ignore[assignment]
    elif name == "aoti":
        from fastode.runtimes.aoti import AOTI as found  # type: ignore[assignment]
    elif name == "onnx":
        from fastode.runtimes.onnx import Onnx as found  # type: ignore[assignment]
    elif name == "tensorrt":
        from fastode.runtimes.tensorrt import TensorRT as found  # type: ignore[assignment]
    elif name == "torch_tensorrt":
        from fastode.runtimes.tensorrt import TorchTensorRT as found  # type: ignore[assignment]
    else:
        raise ValueError(f"runtime: must be one of {', '.join(NAMES)}, got {name!r}")
    return found


def build(denoiser: Denoiser, runtime: str, **options: Any) -> Denoiser:
    """``denoiser`` with its network in ``runtime``; the options are those of its ``build`` (``path``, ``batches``, ``dtype``,
    ``mode``, ...). Guidance in one batched call needs buckets of twice the batch."""
    made: Denoiser = _class(runtime).build(denoiser, **options).denoiser(denoiser)
    return made


def load(path: str | os.PathLike[str], **options: Any) -> Denoiser:
    """The denoiser in a folder that "aoti", "onnx" or "tensorrt" wrote; its model is not needed.

    Raises ``FileNotFoundError``, or ``ValueError`` for folders that are damaged or of another version.
    """
    card = Card.read(Path(path) / "card.json")
    made: Denoiser = _class("onnx" if card.runtime == "tensorrt" else card.runtime).load(path, **options).denoiser()
    return made


def onnx_missing() -> str | None:
    """Why ONNX models cannot be made and run here, or None."""
    from fastode.runtimes.onnx import lacking

    return lacking("onnx", "onnxscript", "onnxruntime")


__all__ = [
    "NAMES",
    "Card",
    "ExportedSampler",
    "MissingError",
    "Portable",
    "Runtime",
    "build",
    "export_sampler",
    "load",
    "load_sampler",
    "onnx_missing",
]
