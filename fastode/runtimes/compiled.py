"""``torch.compile``: one compilation per batch bucket, made at build and not in the first call."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastode.denoisers.base import Denoiser
from fastode.runtimes.base import Card, Runtime, Source, blame

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


class Compiled(Runtime):
    """The network through ``torch.compile(mode=..., dynamic=False)``.

    ``reduce-overhead`` and ``max-autotune`` keep CUDA graphs of their own, so an engine must not record them once more
    (``card.capturable`` is False). Raises ``ValueError`` for unknown modes and networks that the compiler refuses.
    """

    def __init__(self, card: Card, function: Any) -> None:
        super().__init__(card)
        self.function = function

    @classmethod
    def build(
        cls,
        denoiser: Denoiser,
        *,
        batches: Sequence[int] = (1,),
        mode: str = "default",
        backend: str = "inductor",
        dtype: torch.dtype | None = None,
        cond: Mapping[str, Tensor] | None = None,
        features: bool | None = None,
        progress: bool = False,
    ) -> Compiled:
        """Compile for every batch size of ``batches``; ``progress`` shows a bar, since a bucket may take minutes."""
        if mode not in MODES:
            raise ValueError(f"mode: must be one of {', '.join(MODES)}, got {mode!r}")
        capturable = mode in ("default", "max-autotune-no-cudagraphs")
        source = Source.of(
            denoiser, "compile", batches, dtype=dtype, cond=cond, features=features, capturable=capturable
        )
        options: dict[str, Any] = {"backend": backend, "dynamic": False}
        if backend == "inductor":
            options["mode"] = mode
        function = torch.compile(copy.copy(source.module), **options)
        made = cls(source.card, function)
        try:
            for bucket in tqdm(source.card.buckets, desc="compile", unit="bucket", disable=not progress):
                with torch.no_grad():
                    made.run(bucket, source.example(bucket))
        except Exception as error:
            first = str(error).strip().splitlines()
            raise ValueError(
                f"network: cannot be compiled; in {blame(source.module, error)}: {first[0] if first else error!r}"
            ) from error
        made.card = replace(source.card, error=source.measured(made.run))
        return made

    def run(self, bucket: int, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        with torch.no_grad():
            outputs: Any = self.function(*inputs)
        if self.card.capturable:
            return outputs
        return [out.clone() for out in outputs]  # its graph writes into the same memory in the next call
