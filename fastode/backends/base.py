"""What a backend is: it executes updates. It knows tables and buffers, no solver and no network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fastode.program.lower import Lowered, Update
from fastode.scalar import Late, evaluate


@dataclass(frozen=True)
class Buffers:
    """The memory of one run in flight. ``slots``: [S, B, *sample] in the state's dtype; ``net_in``: [B, *sample] in the
    network's dtype. The engine owns it; an executor is bound to it."""

    slots: Tensor
    net_in: Tensor


class Draws(Protocol):
    """The noise of the current call. ``draws(k)`` is draw k as a tensor in the state's dtype.

    ``seeds``: int64 [B] on the CPU if the noise comes from seeds; a backend may then make draw k itself, as
    ``fastode.noise.normal(seeds, k + 1, ...)``.
    """

    seeds: Tensor | None

    def __call__(self, index: int) -> Tensor: ...


class Executor(Protocol):
    """Updates bound to one set of buffers. Not shared between threads."""

    reports_finite: bool
    """Whether ``update`` looks at the network outputs while it reads them; if not, its answer means nothing."""

    def load(self, known: Mapping[Late, Any]) -> None:
        """Begin a call: evaluate the tables for its late numbers, unless they have not changed; not those that wait for
        numbers made in the run (``lowered.due``)."""

    def norms(self, rows: Update, known: Mapping[Late, Any], start: Tensor, outputs: Sequence[Tensor]) -> list[Tensor]:
        """The Euclidean norm over each sample of every row, [B]; measured just before the update with these sources."""

    def bind(self, index: int, known: Mapping[Late, Any]) -> None:
        """Late numbers were made just before update ``index``: evaluate the tables that waited for them. Without a wait
        for the device, and fit to be recorded in a graph, where the numbers are tensors on the device."""

    def update(self, index: int, start: Tensor, outputs: Sequence[Tensor], result: Tensor) -> bool:
        """Run ``lowered.updates[index]`` in place. ``start`` is the caller's state, ``result`` receives the sample.

        Where ``reports_finite``: returns False if ``outputs`` hold NaN or infinity.
        """


class Backend(Protocol):
    """One way to execute updates."""

    name: str

    def missing(self, device: torch.device) -> str | None:
        """Why this backend cannot run on ``device`` here, or None if it can."""

    def bind(self, lowered: Lowered, buffers: Buffers, noise: Draws) -> Executor:
        """An executor over ``buffers``; ``noise`` gives the draws of the current call."""


def make_numbers(
    lowered: Lowered,
    executor: Executor,
    index: int,
    numbers: dict[Late, Any],
    start: Tensor,
    outputs: Sequence[Tensor],
    features: Mapping[str, Tensor],
    tell: Callable[[int, Any], None],
) -> None:
    """Make the late numbers that update ``index`` and later ones wait for, and hand them to the executor.

    ``tell(call, value)`` receives what later network calls are told.
    """
    group = lowered.binds[index]
    for measured in group:
        norms = [] if measured.norms is None else executor.norms(measured.norms, numbers, start, outputs)
        numbers |= measured.bind.make([features[name] for name in measured.bind.outputs], norms, start)
    if group:
        executor.bind(index, numbers)
        memo: dict[int, Any] = {}
        for k, call in enumerate(lowered.calls):
            if call.due == index:
                tell(k, evaluate(call.c_noise, numbers, memo))
