"""Where the noise of one call comes from: seeds, torch generators, or the caller."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastode.noise import normal


class Draws:
    """The draws of the current call. Filled per call, so that an executor bound once can read them."""

    def __init__(self) -> None:
        self.source: Callable[[int], Tensor] | None = None
        self.seeds: Tensor | None = None

    def __call__(self, index: int) -> Tensor:
        assert self.source is not None
        return self.source(index)


@dataclass(frozen=True, eq=False)
class Seeded:
    """Draw k of a program is draw k + 1 of the samples' seeds; draw 0 is the initial state."""

    seeds: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def __call__(self, index: int) -> Tensor:
        return normal(self.seeds, index + 1, self.shape, dtype=self.dtype, device=self.device)


class Generated:
    """Draws from torch generators, in the order and the shapes of diffusers' ``randn_tensor``: draw k is made when it is
    first asked for, after all draws before it, on the device of its generator."""

    def __init__(
        self,
        generators: list[torch.Generator],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._generators, self._shape, self._dtype, self._device = generators, shape, dtype, device
        self._made: dict[int, Tensor] = {}
        self._next = 0

    def next(self) -> Tensor:
        parts = [torch.randn(self._shape, generator=g, dtype=self._dtype, device=g.device) for g in self._generators]
        return torch.cat([part.to(self._device) for part in parts])

    def __call__(self, index: int) -> Tensor:
        while self._next <= index:
            self._made[self._next] = self.next()
            self._made.pop(
                self._next - 2, None
            )  # a program reads a draw in one update, or in two that follow each other
            self._next += 1
        return self._made[index]
