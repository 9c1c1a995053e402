"""``torch.ops.fastode.combine``: the fused update as an operator that torch.compile and torch.export see as one node.

    combine(targets, sources, table, fields, seeds, pattern, rows, draws, one, elements)

Every target becomes a weighted sum of the sources, of ``draws`` draws of noise made from ``seeds``, and of the constant
1 if ``one``. ``targets`` are written in place, after all that is read; a tensor may be both. ``table`` is one update of
what :mod:`fastode.backends.packing` describes, in the dtype of the state; sums are made in that dtype.

It is for code that is compiled. Executors launch their kernels directly, without the 6 to 10 us of the dispatcher.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastode.noise import normal

_SCHEMA = (
    "combine(Tensor(a!)[] targets, Tensor[] sources, Tensor table, Tensor? fields, Tensor? seeds, "
    "int pattern, int rows, int draws, bool one, int[] elements) -> ()"
)
_LIBRARY = torch.library.Library("fastode", "DEF")  # the registration lives as long as this object
_LIBRARY.define(_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))


def _check(
    targets: Sequence[Tensor], sources: Sequence[Tensor], table: Tensor, rows: int, draws: int, one: bool
) -> None:
    if not targets:
        raise ValueError("targets: need at least one")
    if table.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"table: must be float32 or float64, got {table.dtype}")
    shape = targets[0].shape
    for t in (*targets, *sources):
        if t.shape != shape:
            raise ValueError(f"combine: all tensors must have one shape, got {list(shape)} and {list(t.shape)}")
    need = rows * (len(targets) * (len(sources) + draws + one) + draws)
    if table.numel() != need:
        raise ValueError(f"table: must hold {need} numbers, got {table.numel()}")


def _fake(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    table: Tensor,
    fields: Tensor | None,
    seeds: Tensor | None,
    pattern: int,
    rows: int,
    draws: int,
    one: bool,
    elements: Sequence[int],
) -> None:
    _check(targets, sources, table, rows, draws, one)


def _plain(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    table: Tensor,
    fields: Tensor | None,
    seeds: Tensor | None,
    pattern: int,
    rows: int,
    draws: int,
    one: bool,
    elements: Sequence[int],
) -> None:
    """In tensor operations: what runs where no kernel does."""
    _check(targets, sources, table, rows, draws, one)
    shape, dtype = targets[0].shape, table.dtype
    width = table.numel() // rows
    weights = table.view(rows, width).T.reshape(width, rows, *[1] * (len(shape) - 1))  # [width, B or 1, 1, ...]
    columns = [s.to(dtype) for s in sources]
    for k in range(draws):
        assert seeds is not None
        draw = int(table[width - draws + k])
        columns.append(normal(seeds, draw, shape[1:], dtype=dtype, device=table.device))
    if one:
        columns.append(torch.ones((), dtype=dtype, device=table.device))
    totals = []
    for r in range(len(targets)):
        total = torch.zeros(shape, dtype=dtype, device=table.device)
        for c, column in enumerate(columns):
            entry = r * len(columns) + c
            if pattern >> entry & 1:
                weight = weights[entry]
                if elements and elements[entry]:
                    assert fields is not None
                    weight = fields[elements[entry] - 1]
                total = torch.addcmul(total, weight, column)
        totals.append(total)
    for target, total in zip(targets, totals, strict=True):
        target.copy_(total)


def _triton(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    table: Tensor,
    fields: Tensor | None,
    seeds: Tensor | None,
    pattern: int,
    rows: int,
    draws: int,
    one: bool,
    elements: Sequence[int],
) -> None:
    from fastode.backends import BACKENDS

    if BACKENDS["triton"].missing(table.device) is not None:
        return _plain(targets, sources, table, fields, seeds, pattern, rows, draws, one, elements)
    from fastode.kernels.combine import combine, place

    _check(targets, sources, table, rows, draws, one)
    n = targets[0][0].numel()
    places = [place(s) for s in sources]
    padded = {p.stride for p in places if p is not None} - {n}
    readable = [
        s.contiguous() if p is None or (p.stride != n and len(padded) > 1) else s
        for s, p in zip(sources, places, strict=True)
    ]
    combine(
        targets,
        readable,
        table,
        pattern=pattern,
        state=table.dtype,
        rows=rows,
        draws=draws,
        one=one,
        seeds=seeds,
        elements=tuple(elements),
        fields=fields if elements else None,
    )


_LIBRARY.impl("combine", _plain, "CPU")
_LIBRARY.impl("combine", _triton, "CUDA")
torch.library.register_fake("fastode::combine", _fake, lib=_LIBRARY)

combine = torch.ops.fastode.combine
