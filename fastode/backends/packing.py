"""The tables of all updates in one flat vector, as kernels read them, and which numbers of it change between calls.

The weights of one update are a row ``[targets * columns]``, target by target, followed by the numbers of its draws
(draw k of a program is draw k + 1 of a seed). If a weight may differ between samples there is one such row per sample.
Weights per element lie outside, in ``fields``. Columns are the source tensors, then the draws, then the constant 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastode.program.lower import Lowered, Update
from fastode.scalar import Late, evaluate

ALIGN = 4  # numbers; every update starts at a multiple of 16 bytes


@dataclass(frozen=True)
class Packed:
    """One update in the flat vector: ``table[offset : offset + rows * width]`` is [rows, width].

    ``pattern`` has bit r * columns + c where a weight may be non-zero; ``elements[r * columns + c]`` is 1 + the index
    of the entry's array in the fields, or 0.
    """

    offset: int
    rows: int
    width: int
    columns: int
    tensors: int
    draws: int
    one: bool
    pattern: int
    elements: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.offset + self.rows * self.width


@dataclass(frozen=True)
class _Spot:
    """A number that is known only with a call, or made in the run before update ``due``: its update, its entry there, and
    its array if it is one per element."""

    due: int
    packed: Packed
    entry: int
    field: int
    value: Late


class Packing:
    """Where every weight of ``lowered`` goes, for a batch of [B, *sample]."""

    def __init__(self, lowered: Lowered, shape: tuple[int, ...]) -> None:
        """``updates`` and ``measured`` say where the weights of ``lowered.updates`` and ``lowered.measured`` lie."""
        self.shape = shape
        self.late = lowered.late
        self.updates: list[Packed] = []
        self._late: list[_Spot] = []
        self._fixed: list[tuple[int, Tensor]] = []
        self.batched_fields = False
        self._fields = 0
        known: list[tuple[Packed, list[float]]] = []
        offset = 0
        for update, due in zip(lowered.updates, lowered.due, strict=True):
            packed, numbers = self._place(update, offset, due)
            self.updates.append(packed)
            known.append((packed, numbers))
            offset = -(-packed.end // ALIGN) * ALIGN
        self.measured: list[Packed] = []
        for rows in lowered.measured:
            packed, numbers = self._place(rows, offset, lowered.due_of(rows))
            self.measured.append(packed)
            known.append((packed, numbers))
            offset = -(-packed.end // ALIGN) * ALIGN
        self.size = max(offset, ALIGN)
        self._template = torch.zeros(self.size, dtype=torch.float64)
        for packed, numbers in known:
            row = torch.tensor(numbers, dtype=torch.float64)
            self._template[packed.offset : packed.end].view(packed.rows, packed.width).copy_(row)

    def _place(self, update: Update, offset: int, due: int) -> tuple[Packed, list[float]]:
        draws = [s.index for s in update.sources if s.kind == "noise"]
        one = any(s.kind == "one" for s in update.sources)
        columns = len(update.sources)
        entries = [c for row in update.entries for c in row]
        pattern, elements, late, numbers = 0, [0] * len(entries), [], []
        per_sample = False
        for i, c in enumerate(entries):
            number = 0.0
            if isinstance(c, Late):
                if self._per_element(c):
                    self._fields, self.batched_fields = self._fields + 1, True
                    elements[i] = self._fields
                else:
                    per_sample = True
                late.append((i, elements[i], c))
            elif isinstance(c, Tensor) and c.ndim:
                self._fields += 1
                elements[i] = self._fields
                self._fixed.append((elements[i] - 1, c))
            else:
                number = float(c.detach() if isinstance(c, Tensor) else c)
            numbers.append(number)
            pattern |= int(isinstance(c, Late) or elements[i] > 0 or number != 0) << i
        rows = self.shape[0] if per_sample else 1
        packed = Packed(
            offset, rows, len(entries) + len(draws), columns, columns - len(draws) - one, len(draws), one, pattern,
            tuple(elements) if any(elements) else (),
        )  # fmt: skip
        self._late += [_Spot(due, packed, i, field - 1, c) for i, field, c in late]
        return packed, numbers + [float(k + 1) for k in draws]

    def _per_element(self, c: Late) -> bool:
        """Whether a late weight has a value per element, found by evaluating it on ones."""
        one = torch.ones((self.shape[0], *[1] * (len(self.shape) - 1)), dtype=torch.float64)
        try:
            value = evaluate(c, dict.fromkeys(c.leaves(), one))
        except Exception:  # whatever the caller's function raises; the weight is then one per sample, checked in fill()
            return False
        return isinstance(value, Tensor) and value.numel() > self.shape[0]

    @property
    def fields_shape(self) -> tuple[int, ...] | None:
        """[E, 1 or B, *sample], or None where no weight is per element."""
        return (self._fields, self.shape[0] if self.batched_fields else 1, *self.shape[1:]) if self._fields else None

    def fill(self, known: Mapping[Late, Any], table: Tensor, fields: Tensor | None) -> None:
        """Write all weights for ``known`` into ``table`` [size] and ``fields``, without waiting for the device; but for
        those that wait for numbers made in the run, see :meth:`bind`.

        Late numbers that live on the device are written there. Raises ``ValueError`` for a late number without a value.
        """
        memo: dict[int, Any] = {}
        host = self._template.clone() if self._late else self._template
        device: list[tuple[Tensor, Tensor]] = []
        for spot in (spot for spot in self._late if not spot.due):
            value = evaluate(spot.value, known, memo)
            if spot.field >= 0:
                assert fields is not None
                device.append((fields[spot.field], torch.as_tensor(value, dtype=torch.float64)))
                continue
            column = slice(spot.packed.offset + spot.entry, spot.packed.end, spot.packed.width)
            if isinstance(value, Tensor):
                if value.numel() not in (1, spot.packed.rows):
                    shape = list(value.shape)
                    raise ValueError(f"{spot.value!r}: a late coefficient is one number or one per sample, got {shape}")
                value = value.detach().reshape(-1)
                if value.device.type != "cpu":
                    device.append((table[column], value))
                    continue
            host[column] = value
        _upload(host.to(table.dtype), table)
        for index, c in self._fixed:
            assert fields is not None
            fields[index].copy_(c.detach().to(fields.dtype))
        for where, value in device:
            where.copy_(value.detach().to(where.dtype))

    def bind(self, index: int, known: Mapping[Late, Any], table: Tensor, fields: Tensor | None) -> None:
        """Write the weights that waited for numbers made just before update ``index``. Nothing passes through the host, so
        this can be recorded in a graph when ``known`` holds tensors on the device of ``table``."""
        memo: dict[int, Any] = {}
        for spot in (spot for spot in self._late if spot.due == index):
            value = torch.as_tensor(evaluate(spot.value, known, memo))
            if spot.field >= 0:
                assert fields is not None
                fields[spot.field].copy_(value.detach())
            else:
                column = table[spot.packed.offset + spot.entry : spot.packed.end : spot.packed.width]
                column.copy_(value.detach().reshape(-1))


def _upload(host: Tensor, device: Tensor) -> None:
    """Copy without making the host wait: from pinned memory, which its allocator keeps until the copy has been made."""
    if device.device.type == "cuda":
        device.copy_(host.pin_memory(), non_blocking=True)
    else:
        device.copy_(host)
