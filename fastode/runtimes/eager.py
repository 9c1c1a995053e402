"""The network as it is, behind the interface of a runtime: what the others are measured against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastode.denoisers.base import Denoiser
from fastode.runtimes.base import Card, Named, Runtime, Source


class Eager(Runtime):
    """Any batch size, in ``dtype``; on a GPU its calls can be recorded in a graph."""

    def __init__(self, card: Card, module: Named) -> None:
        super().__init__(card)
        self.module = module

    @classmethod
    def build(
        cls,
        denoiser: Denoiser,
        *,
        dtype: torch.dtype | None = None,
        cond: Mapping[str, Tensor] | None = None,
        features: bool | None = None,
    ) -> Eager:
        source = Source.of(denoiser, "eager", (1,), dtype=dtype, cond=cond, features=features, capturable=True)
        return cls(replace(source.card, buckets=(), error={"1": 0.0}), source.module)

    def run(self, bucket: int, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        outputs: Any = self.module(*inputs)
        return outputs
