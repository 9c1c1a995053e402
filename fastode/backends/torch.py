"""Lowered updates in plain tensor operations: runs wherever PyTorch runs, and is what everything else falls back to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastode.backends.base import Buffers, Draws
from fastode.program.lower import Lowered, Source, Update
from fastode.scalar import Late, evaluate


class TorchExecutor:
    """Evaluates every row of an update before it writes any, since a slot may be both read and written."""

    reports_finite = False

    def __init__(self, lowered: Lowered, buffers: Buffers, noise: Draws) -> None:
        self.lowered, self.buffers, self.noise = lowered, buffers, noise
        self._tables: list[list[list[Any]]] | None = None
        self._late = bool(lowered.late)
        self._known: dict[Late, Any] = {}

    def load(self, known: Mapping[Late, Any]) -> None:
        if self._tables is not None and (not self._late or _same(known, self._known)):
            return
        memo: dict[int, Any] = {}
        due = self.lowered.due
        self._tables = [self._table(u, known, memo) if not due[i] else [] for i, u in enumerate(self.lowered.updates)]
        self._known = dict(known)

    def bind(self, index: int, known: Mapping[Late, Any]) -> None:
        assert self._tables is not None
        memo: dict[int, Any] = {}
        for i, due in enumerate(self.lowered.due):
            if due == index:
                self._tables[i] = self._table(self.lowered.updates[i], known, memo)

    def norms(self, rows: Update, known: Mapping[Late, Any], start: Tensor, outputs: Sequence[Tensor]) -> list[Tensor]:
        table = self._table(rows, known, {})
        return [row.flatten(1).norm(dim=1) for row in self._rows(rows, table, start, outputs)]

    def _table(self, update: Update, known: Mapping[Late, Any], memo: dict[int, Any]) -> list[list[Any]]:
        slots = self.buffers.slots

        def number(c: Any) -> Any:
            value = evaluate(c, known, memo)
            if not isinstance(value, Tensor):
                return float(value)
            if value.ndim == 0 and not value.requires_grad and value.device.type == "cpu":
                return float(value)
            return value.to(device=slots.device, dtype=slots.dtype)

        return [[number(c) for c in row] for row in update.entries]

    def _rows(self, update: Update, table: list[list[Any]], start: Tensor, outputs: Sequence[Tensor]) -> list[Tensor]:
        columns = [self._source(s, start, outputs, self.buffers.slots.dtype) for s in update.sources]
        return [_weighted_sum(columns, row, start) for row in table]

    def update(self, index: int, start: Tensor, outputs: Sequence[Tensor], result: Tensor) -> bool:
        update = self.lowered.updates[index]
        assert self._tables is not None
        rows = self._rows(update, self._tables[index], start, outputs)
        for target, row in zip(update.targets, rows, strict=True):
            if target.kind == "slot":
                self.buffers.slots[target.index].copy_(row)
            else:
                (self.buffers.net_in if target.kind == "input" else result).copy_(row)
        return True

    def _source(self, source: Source, start: Tensor, outputs: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        if source.kind == "slot":
            return self.buffers.slots[source.index]
        if source.kind == "start":
            return start
        if source.kind == "input":
            return self.buffers.net_in.to(dtype)
        if source.kind == "output":
            return outputs[source.index].to(dtype)
        if source.kind == "noise":
            return self.noise(source.index)
        return torch.ones((), device=start.device, dtype=dtype)


def _same(known: Mapping[Late, Any], before: Mapping[Late, Any]) -> bool:
    """Whether both give the same plain numbers; tensors may have been written to since, so they count as new."""
    plain = all(isinstance(v, float) for v in (*known.values(), *before.values()))
    return plain and known == before


def _weighted_sum(columns: list[Tensor], row: list[Any], like: Tensor) -> Tensor:
    total: Tensor | None = None
    for column, c in zip(columns, row, strict=True):
        if isinstance(c, Tensor):
            term = column * c
            total = term if total is None else total + term
        elif c == 0:
            continue
        elif total is None:
            total = column * c
        else:
            total = torch.add(total, column, alpha=c)
    return torch.zeros_like(like) if total is None else total


class TorchBackend:
    name = "torch"

    def missing(self, device: torch.device) -> str | None:
        return None

    def bind(self, lowered: Lowered, buffers: Buffers, noise: Draws) -> TorchExecutor:
        return TorchExecutor(lowered, buffers, noise)
