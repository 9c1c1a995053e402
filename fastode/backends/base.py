"""What a backend is: it executes updates. It knows tables and buffers, no solver and no network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fastode.program.lower import Lowered
from fastode.scalar import Late


@dataclass(frozen=True)
class Buffers:
    """The memory of one run in flight. ``slots``: [S, B, *sample] in the state's dtype; ``net_in``: [B, *sample] in the
    network's dtype. The engine owns it; an executor is bound to it."""

    slots: Tensor
    net_in: Tensor


class Executor(Protocol):
    """Updates bound to one set of buffers. Not shared between threads."""

    def load(self, known: Mapping[Late, Any]) -> None:
        """Evaluate the tables for the late numbers of this call; a no-op when they have not changed."""

    def update(self, index: int, start: Tensor, outputs: Sequence[Tensor], result: Tensor) -> None:
        """Run ``lowered.updates[index]`` in place. ``start`` is the caller's state, ``result`` receives the sample."""


class Backend(Protocol):
    """One way to execute updates."""

    name: str

    def missing(self, device: torch.device) -> str | None:
        """Why this backend cannot run on ``device`` here, or None if it can."""

    def bind(self, lowered: Lowered, buffers: Buffers, noise: Callable[[int], Tensor]) -> Executor:
        """An executor over ``buffers``; ``noise(k)`` is draw k of the current call, for backends that do not make it."""
