"""Calls of any batch size on engines of a few fixed sizes: smaller batches are padded, larger ones split."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastode.engine import Engine

SIZES = (1, 2, 4, 8, 16, 32, 64)


def plan(batch: int, sizes: Sequence[int], oversize: Literal["split", "error"] = "split") -> list[tuple[int, int, int]]:
    """(first sample, samples, bucket) of the calls that a batch needs: as few as possible, each in the smallest bucket.

    Raises ``ValueError`` for an empty batch, or one larger than the largest bucket if ``oversize`` is "error".
    """
    if batch < 1:
        raise ValueError(f"batch: must be at least 1, got {batch}")
    largest = max(sizes)
    if batch > largest and oversize == "error":
        raise ValueError(
            f"batch: {batch} samples do not fit into the largest bucket of {largest}; split it, or add one"
        )
    parts = [(first, min(largest, batch - first)) for first in range(0, batch, largest)]
    return [(first, count, min(s for s in sizes if s >= count)) for first, count in parts]


class Buckets:
    """``buckets(x)`` or ``buckets(seeds=[...])``, like an :class:`Engine`, for any number of samples.

    Args:
        make: ``make(batch)`` builds the engine of one bucket, e.g. with a common ``graph=Graphs(...)``, so that all
            share memory and its budget.
        sizes: batch sizes of the buckets; engines are built when they are first needed, or by :meth:`warmup`.
        oversize: "split" a batch larger than the largest bucket into several calls, or make it an "error".

    A padded sample repeats the last one and is thrown away; samples do not depend on their batch, so the others are as
    in a batch of their own size. Safe to share between threads.
    """

    def __init__(
        self,
        make: Callable[[int], Engine],
        sizes: Sequence[int] = SIZES,
        *,
        oversize: Literal["split", "error"] = "split",
    ) -> None:
        self.sizes = tuple(sorted({int(s) for s in sizes}))
        if not self.sizes or self.sizes[0] < 1:
            raise ValueError(f"sizes: need at least one positive batch size, got {list(sizes)}")
        if oversize not in ("split", "error"):
            raise ValueError(f"oversize: must be 'split' or 'error', got {oversize!r}")
        self.make, self.oversize = make, oversize
        self._engines: dict[int, Engine] = {}
        self._lock = threading.Lock()
        self._samples = dict.fromkeys(self.sizes, 0)
        self._padding = dict.fromkeys(self.sizes, 0)

    def engine(self, size: int) -> Engine:
        with self._lock:
            if size not in self._engines:
                self._engines[size] = self.make(size)
            return self._engines[size]

    def __call__(
        self,
        x: Tensor | None = None,
        *,
        seeds: Sequence[int] | Tensor | None = None,
        class_labels: Tensor | Sequence[int] | int | None = None,
        guidance_scale: float | Sequence[float] | Tensor | None = None,
        cond: Mapping[str, Any] | None = None,
        uncond: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Samples [B, *sample]; the arguments are those of :meth:`Engine.__call__`, with B samples."""
        if x is None and seeds is None:
            raise ValueError("x: give the state at the first level, or seeds")
        batch = len(x) if x is not None else len(seeds)  # type: ignore[arg-type]
        if seeds is not None and len(seeds) != batch:
            raise ValueError(f"seeds: need one per sample ({batch}), got {len(seeds)}")
        per_sample = {"x": x, "seeds": seeds, "class_labels": class_labels, "guidance_scale": guidance_scale}
        parts = []
        for first, count, size in plan(batch, self.sizes, self.oversize):

            def rows(value: Any, first: int = first, count: int = count, size: int = size) -> Any:
                return _rows(value, batch, first, count, size)

            call = {name: rows(value) for name, value in per_sample.items()}
            call |= {
                name: None if values is None else {k: rows(v) for k, v in values.items()}
                for name, values in (("cond", cond), ("uncond", uncond))
            }
            parts.append(self.engine(size)(**call)[:count])
            with self._lock:
                self._samples[size] += count
                self._padding[size] += size - count
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def warmup(self, **call: Any) -> None:
        """Build and warm up the engine of every bucket; see :meth:`Engine.warmup`."""
        for size in self.sizes:
            self.engine(size).warmup(**call)

    def report(self) -> list[dict[str, Any]]:
        """The engines' reports, each row with the ``padding`` of its bucket: the share of samples thrown away."""
        rows = []
        for size, engine in sorted(self._engines.items()):
            done = self._samples[size] + self._padding[size]
            waste = self._padding[size] / done if done else 0.0
            rows += [{**row, "batch": size, "padding": waste} for row in engine.report() or [{}]]
        return rows


def _rows(value: Any, batch: int, first: int, count: int, size: int) -> Any:
    """Rows ``first .. first + count`` of what has one per sample, the last repeated up to ``size``; else ``value``."""
    if isinstance(value, Tensor):
        if value.ndim == 0 or len(value) != batch:
            return value
        part = value[first : first + count]
        return part if size == count else torch.cat([part, part[-1:].expand(size - count, *part.shape[1:])])
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == batch:
        chosen = list(value[first : first + count])
        return chosen + chosen[-1:] * (size - count)
    return value
