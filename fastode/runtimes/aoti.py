"""AOTInductor: the network compiled ahead of time into ``.pt2`` packages that need no Python model to run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastode.denoisers.base import Denoiser
from fastode.files import whole
from fastode.runtimes.base import Card, Runtime, Source, export


class AOTI(Runtime):
    """A folder: ``card.json`` and one ``b<batch>.pt2`` per bucket. :meth:`load` needs neither the model nor its code."""

    def __init__(self, card: Card, packages: Mapping[int, Any]) -> None:
        super().__init__(card)
        self.packages = packages

    @classmethod
    def build(
        cls,
        denoiser: Denoiser,
        path: str | os.PathLike[str],
        *,
        batches: Sequence[int] = (1,),
        dtype: torch.dtype | None = None,
        cond: Mapping[str, Tensor] | None = None,
        features: bool | None = None,
        progress: bool = False,
    ) -> AOTI:
        """Export and compile every bucket into the folder ``path``; the card is written last."""
        source = Source.of(denoiser, "aoti", batches, dtype=dtype, cond=cond, features=features, capturable=True)
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        for bucket in tqdm(source.card.buckets, desc="aoti", unit="bucket", disable=not progress):
            program = export(source.module, source.example(bucket))
            with whole(folder / f"b{bucket}.pt2") as part:
                package = part.with_name(part.name + ".pt2")  # the packager insists on the suffix
                try:
                    torch._inductor.aoti_compile_and_package(program, package_path=str(package))
                    os.replace(package, part)
                finally:
                    package.unlink(missing_ok=True)
        made = cls(source.card, _packages(folder, source.card))
        made.card = replace(source.card, error=source.measured(made.run))
        made.card.write(folder / "card.json")
        return made

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AOTI:
        """Raises ``FileNotFoundError``, or ``ValueError`` for packages of another torch version or a damaged folder."""
        card = Card.read(Path(path) / "card.json")
        if card.versions.get("torch") != torch.__version__:
            raise ValueError(
                f"path: {path} was compiled by torch {card.versions.get('torch')}, this is {torch.__version__}; build it again"
            )
        return cls(card, _packages(Path(path), card))

    def run(self, bucket: int, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        outputs: Any = self.packages[bucket](*inputs)
        return outputs if isinstance(outputs, (tuple, list)) else (outputs,)


def _packages(folder: Path, card: Card) -> dict[int, Any]:
    found = {}
    for bucket in card.buckets:
        file = folder / f"b{bucket}.pt2"
        if not file.exists():
            raise FileNotFoundError(f"path: {file} is missing beside its card")
        try:
            found[bucket] = torch._inductor.aoti_load_package(str(file))
        except RuntimeError as error:
            raise ValueError(f"path: {file} is damaged ({error})") from error
    return found
