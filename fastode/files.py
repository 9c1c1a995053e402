"""Files appear whole or not at all: they are written under a temporary name beside their own, then renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor


@contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name beside ``path`` to write to; it takes the place of ``path`` when all is well, else it is removed."""
    target = Path(path)
    part = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        yield part
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """A safetensors file."""
    from safetensors.torch import save_file

    with whole(path) as part:
        save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, part, metadata=metadata)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    with whole(path) as part:
        part.write_text(json.dumps(value, indent=2, default=str) + "\n")
