"""Arrays of other libraries in and out, without a copy on the same device: NumPy, CuPy, JAX, anything with DLPack."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def to_torch(name: str, value: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """``value`` as a tensor that shares its memory, and the function that turns a tensor into an array of its library.

    Raises ``TypeError`` naming the argument for anything that is neither a tensor nor speaks DLPack.
    """
    if isinstance(value, Tensor):
        return value, _unchanged
    if not hasattr(value, "__dlpack__"):
        raise TypeError(f"{name}: must be a tensor or an array with __dlpack__, got {type(value).__name__}")
    library = type(value).__module__.partition(".")[0]
    if library == "numpy":
        # NumPy refuses to export read-only arrays; nothing here writes to the caller's state, but torch cannot know.
        return torch.from_dlpack(value if value.flags.writeable else value.copy()), lambda t: t.detach().cpu().numpy()
    back = _EXPORTS.get(library)
    return torch.from_dlpack(value), _unchanged if back is None else back


def _unchanged(tensor: Tensor) -> Any:
    return tensor


def _export(module: str) -> Callable[[Tensor], Any]:
    return lambda tensor: importlib.import_module(module).from_dlpack(tensor.detach())


_EXPORTS = {"cupy": _export("cupy"), "jax": _export("jax.dlpack"), "jaxlib": _export("jax.dlpack")}
