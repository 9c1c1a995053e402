"""Norms of weighted sums in Triton: the rows of an update squared and summed over each sample, without being stored.

    squares[r, b, i] = sum over the elements j of block i of ( sum_c table[b, r, c] columns[c][b, j] )^2

What a Langevin corrector needs to know before it steps (arXiv:2011.13456, Algorithm 4): the norms of the score and of its
noise. The blocks are cut by the size of a sample alone, so that a norm does not depend on the batch, to the last bit.
"""

# mypy: disable-error-code="assignment"
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastode.kernels.combine import LIMIT, layout, read, weigh

WARPS = 4
BLOCK = WARPS * 32 * 4


@triton.jit
def squares_kernel(
    sources,
    squares,
    row_stride,
    table,
    table_stride,
    fields,
    field_stride,
    field_size,
    seeds,
    n,
    blocks,
    stride,
    minor,
    major,
    STATE: tl.constexpr,
    PATTERN: tl.constexpr,
    ELEMENTS: tl.constexpr,
    ROWS: tl.constexpr,
    NOISE: tl.constexpr,
    ONE: tl.constexpr,
    STRIDED: tl.constexpr,
    SWAPPED: tl.constexpr,
    GATHER: tl.constexpr,
    WIDE: tl.constexpr,
    BARRIER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: one block of one sample. The arguments are those of :func:`fastode.kernels.combine.combine_kernel`."""
    T: tl.constexpr = len(sources)
    program = tl.program_id(0)
    b = program // blocks
    block = program % blocks
    if WIDE:
        b = b.to(tl.int64)
        block = block.to(tl.int64)
    j = block * BLOCK + tl.arange(0, BLOCK)
    inside = j < n
    other = j
    if SWAPPED or GATHER:
        other = (j % minor) * major + j // minor
    weights = table + b * table_stride
    columns = read(
        sources, weights + ROWS * (T + NOISE + ONE), seeds, n, stride, b, block, j, other, inside,
        STATE, NOISE, STRIDED, SWAPPED, GATHER, BARRIER, BLOCK,
    )  # fmt: skip
    totals = weigh(
        columns, weights, fields + b * field_stride + j, field_size, inside, STATE, PATTERN, ELEMENTS, ROWS, ONE, BLOCK
    )
    for r in tl.static_range(ROWS):
        inner = tl.where(inside, totals[r], 0.0)
        tl.store(squares + r * row_stride + program, tl.sum(inner * inner))


def squares(
    sources: Sequence[Tensor],
    like: Tensor,
    table: Tensor,
    rows_out: int,
    *,
    pattern: int,
    state: torch.dtype = torch.float32,
    rows: int = 1,
    draws: int = 0,
    one: bool = False,
    seeds: Tensor | None = None,
    elements: tuple[int, ...] = (),
    fields: Tensor | None = None,
    last: bool = False,
) -> Tensor:
    """[rows_out, B, blocks] in ``state``: sums of squares of each block of elements; their sum over blocks is |row|^2.

    ``like``: any tensor of the shape [B, *sample]. The other arguments are those of :func:`fastode.kernels.combine.combine`.
    """
    batch, n = like.shape[0], like[0].numel()
    where = layout(sources, like, draws=draws, fields=fields, last=last)
    blocks = -(-n // BLOCK)
    out = torch.empty((rows_out, batch, blocks), device=like.device, dtype=state)
    with torch.cuda.device_of(like):
        squares_kernel[(batch * blocks,)](
            tuple(sources),
            out,
            batch * blocks,
            table,
            table.numel() // rows if rows > 1 else 0,
            table if fields is None else fields,
            where.field_stride,
            where.field_size,
            table if seeds is None else seeds,
            n,
            blocks,
            where.stride,
            where.minor,
            where.major,
            STATE=tl.float32 if state == torch.float32 else tl.float64,
            PATTERN=pattern,
            ELEMENTS=elements or (0,) * (rows_out * (len(sources) + draws + one)),
            ROWS=rows_out,
            NOISE=draws,
            ONE=int(one),
            STRIDED=where.strided,
            SWAPPED=where.swapped,
            GATHER=where.gather,
            WIDE=where.reach > LIMIT,
            BARRIER=bool(where.swapped) or state != torch.float32 or n % 4 != 0 or where.stride % 4 != 0,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return out
