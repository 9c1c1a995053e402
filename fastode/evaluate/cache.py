"""Where things are kept that are dear to compute and can always be computed again."""

from __future__ import annotations

import os
from pathlib import Path


def root() -> Path:
    """``$FASTODE_CACHE``, else ``$XDG_CACHE_HOME/fastode``, else ``~/.cache/fastode``."""
    own = os.environ.get("FASTODE_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastode"


def folder(kind: str) -> Path:
    """The folder of one kind of thing; it need not exist."""
    return root() / kind


def sizes() -> dict[str, tuple[int, int]]:
    """Files and bytes of every kind."""
    found: dict[str, tuple[int, int]] = {}
    base = root()
    if base.is_dir():
        for kind in sorted(p for p in base.iterdir() if p.is_dir()):
            files = [p for p in kind.rglob("*") if p.is_file()]
            found[kind.name] = len(files), sum(p.stat().st_size for p in files)
    return found
