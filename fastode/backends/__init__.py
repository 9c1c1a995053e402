"""Backends by name. ``reference`` defines the meaning of a program; the others execute lowered updates."""

from __future__ import annotations

import difflib

import torch

from fastode.backends.base import Backend
from fastode.backends.native import NativeBackend
from fastode.backends.nvrtc import NvrtcBackend
from fastode.backends.torch import TorchBackend
from fastode.backends.triton import TritonBackend

BACKENDS: dict[str, Backend] = {
    "native": NativeBackend(),
    "torch": TorchBackend(),
    "triton": TritonBackend(),
    "nvrtc": NvrtcBackend(),
}
"""Executors of lowered updates, best last resort first."""

PREFERENCE: dict[str, tuple[str, ...]] = {"cpu": ("native", "torch"), "cuda": ("triton", "native", "nvrtc", "torch")}


def choose(name: str, device: torch.device) -> str:
    """The backend to use: ``name`` itself if it can run on ``device``, the best one present for "auto".

    Raises ``ValueError`` for unknown names and for backends that cannot run here, with the reason.
    """
    if name == "reference":
        return name
    if name == "auto":
        return next(n for n in PREFERENCE.get(device.type, ("torch",)) if BACKENDS[n].missing(device) is None)
    if name not in BACKENDS:
        known = ["auto", "reference", *BACKENDS]
        close = difflib.get_close_matches(str(name), known, n=1)
        raise ValueError(
            f"backend: must be one of {', '.join(known)}, got {name!r}"
            + (f"; did you mean {close[0]!r}?" if close else "")
        )
    reason = BACKENDS[name].missing(device)
    if reason is not None:
        raise ValueError(f"backend: {name!r} cannot run on {device}: {reason}")
    return name


__all__ = ["BACKENDS", "Backend", "choose"]
