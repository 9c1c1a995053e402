"""The fused update in Triton: every target becomes a weighted sum of the sources, in one launch and in place.

    targets[r][b, j] = sum_c table[b, r, c] columns[c][b, j],       b: sample, j: element of a sample

The columns are, in this order, the source tensors, the draws of noise, and the constant 1. A thread reads its four
elements of every source before it writes any target, and no other thread touches these elements; so a tensor may be a
source and a target at once. The weights are read from device memory, so that a captured graph keeps serving when they
change. Sums are made in the dtype of the state (float32 or float64); other tensors are cast on the way in and out.

Noise is that of ``fastode.noise``: one Philox block of four words gives the elements 4q .. 4q + 3 of a sample.
"""

# Triton unrolls loops over tuples that grow by `t = t + (x,)`, and compiles no other form.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"
from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements per thread: one 128-bit access in float32, and exactly one Philox block. With 8, 16-bit tensors would be read and
# written in 128 bits too instead of 64 (whole sectors either way), but Triton 3.6 and 3.7 then pass every float32 store
# through shared memory: 4 KB and more registers a thread (UniPC: 96 and 62 instead of 38), seen in the code for sm_90.
LANES = 4
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
LIMIT = 2**31 - 2**16  # offsets up to here fit in 32 bits, whatever a partly masked block adds


@triton.jit
def _log(u):
    """ln u for float32 u in [2^-32, 1] to an ulp, next to 1 too, where lg2.approx has no right digit (Cephes logf)."""
    bits = u.to(tl.int32, bitcast=True)
    e = (bits - 0x3F3504F3) >> 23  # u = 2^e m with m in [sqrt(1/2), sqrt(2))
    f = (bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0
    z = f * f
    p = 7.0376836292e-2 * f - 1.1514610310e-1
    p = p * f + 1.1676998740e-1
    p = p * f - 1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f - 1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f - 2.4999993993e-1
    p = p * f + 3.3333331174e-1
    k = e.to(tl.float32)
    low = p * f * z + k * -2.12194440e-4 - 0.5 * z
    return f + low + k * 0.693359375


@triton.jit
def _turn(u):
    """(cos, sin)(2 pi u) for float32 u in [0, 1] to 1e-7: quarter turns are taken off exactly, then a polynomial.

    tl.cos would bring along the reduction of huge arguments, which works in local memory.
    """
    t = 4.0 * u
    q = (t + 0.5).to(tl.int32)
    x = (t - q.to(tl.float32)) * 1.5707963267948966
    z = x * x
    sine = x + x * z * ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1)
    cosine = 1.0 - 0.5 * z + z * z * ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2)
    odd = (q & 1) == 1
    c = tl.where(odd, sine, cosine)
    s = tl.where(odd, cosine, sine)
    return tl.where(((q + 1) & 2) == 2, -c, c), tl.where((q & 2) == 2, -s, s)


@triton.jit
def _pair(a, b, STATE: tl.constexpr):
    """Box-Muller on two Philox words; uniforms are rounded to float32 first, as the definition says."""
    u1 = (a.to(tl.float32) + 1.0) * 2.3283064365386963e-10
    u2 = b.to(tl.float32) * 2.3283064365386963e-10
    if STATE == tl.float64:
        radius = tl.sqrt(-2.0 * tl.log(u1.to(tl.float64)))
        angle = u2.to(tl.float64) * 6.283185307179586
        return radius * tl.cos(angle), radius * tl.sin(angle)
    else:
        radius = tl.sqrt(-2.0 * _log(u1))
        c, s = _turn(u2)
        return radius * c, radius * s


@triton.jit
def _normal4(seed, quad, draw, STATE: tl.constexpr):
    """Elements 4 quad .. 4 quad + 3 of one draw."""
    low = quad.to(tl.uint32)
    high = (quad.to(tl.int64) >> 32).to(tl.uint32)
    r0, r1, r2, r3 = tl.philox(seed, low, high, draw.to(tl.uint32) + low * 0, low * 0)
    z0, z1 = _pair(r0, r1, STATE)
    z2, z3 = _pair(r2, r3, STATE)
    return z0, z1, z2, z3


@triton.jit
def _cast(x, dtype: tl.constexpr):
    """``x`` as ``dtype``, rounded to nearest even. Hardware does that; the interpreter would truncate to bfloat16."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def read(
    sources,
    draws,
    seeds,
    n,
    stride,
    b,
    block,
    j,
    other,
    inside,
    STATE: tl.constexpr,
    NOISE: tl.constexpr,
    STRIDED: tl.constexpr,
    SWAPPED: tl.constexpr,
    GATHER: tl.constexpr,
    BARRIER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """This program's elements of all sources, then of NOISE draws whose numbers lie at ``draws``: a tuple in STATE.

    The other arguments are those of :func:`combine_kernel`; ``j`` and ``other`` number the elements of sample ``b``.
    """
    columns = ()
    for i in tl.static_range(len(sources)):
        at = other if (SWAPPED >> i) & 1 else j
        base = b * stride if (STRIDED >> i) & 1 else b * n
        columns = columns + (tl.load(sources[i] + base + at, mask=inside).to(STATE),)
    if BARRIER:
        tl.debug_barrier()
    if NOISE:
        seed = tl.load(seeds + b)
        for k in tl.static_range(NOISE):
            draw = tl.load(draws + k).to(tl.int32)
            if GATHER:
                z0, z1, z2, z3 = _normal4(seed, other // 4, draw, STATE)
                lane = other % 4
                z = tl.where(lane < 2, tl.where(lane == 0, z0, z1), tl.where(lane == 2, z2, z3))
            else:
                quad = block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
                z0, z1, z2, z3 = _normal4(seed, quad, draw, STATE)
                z = tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), [BLOCK])
            columns = columns + (z,)
    return columns


@triton.jit
def weigh(
    columns,
    weights,
    fields,
    field_size,
    inside,
    STATE: tl.constexpr,
    PATTERN: tl.constexpr,
    ELEMENTS: tl.constexpr,
    R: tl.constexpr,
    ONE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """R weighted sums of the columns (and of 1, if ONE): a tuple in STATE. ``fields``: at this program's elements."""
    N: tl.constexpr = len(columns)
    C: tl.constexpr = N + ONE
    totals = ()
    for r in tl.static_range(R):
        total = tl.zeros([BLOCK], STATE)
        for c in tl.static_range(C):
            if (PATTERN >> (r * C + c)) & 1:
                if ELEMENTS[r * C + c]:
                    w = tl.load(fields + (ELEMENTS[r * C + c] - 1) * field_size, mask=inside)
                else:
                    w = tl.load(weights + (r * C + c))
                if c < N:
                    total += w * columns[c]
                else:
                    total += w
        totals = totals + (total,)
    return totals


@triton.jit
def combine_kernel(
    sources,
    targets,
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
    NOISE: tl.constexpr,
    ONE: tl.constexpr,
    STRIDED: tl.constexpr,
    SWAPPED: tl.constexpr,
    GATHER: tl.constexpr,
    WIDE: tl.constexpr,
    BARRIER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK elements of one sample (or of the whole batch as one long sample, when nothing depends on b).

    Args:
        sources, targets: tuples of pointers; bit i of the masks below means source i, bit len(sources) + i target i.
        table: [B or 1, R * C + NOISE] weights, row by row, then the numbers of the draws (whole, so exact in float32);
            ``table_stride`` is 0 when all samples share them.
        fields: [E, B or 1, n] per-element weights, ``field_size`` numbers per array, ``field_stride`` between samples
            (0: shared); ELEMENTS maps the entry r * C + c to its array plus 1, 0 for none.
        seeds: [B] int64.
        n, blocks: elements, and programs, per sample.
        stride: elements between samples of the tensors in STRIDED (views into wider network outputs).
        minor, major: the tensors in SWAPPED lie in the other memory format (channels last where the sweep is
            contiguous, or the reverse): element j of the sweep is their element (j % minor) * major + j // minor.
        PATTERN: bit r * C + c: the weight may be non-zero. Others are not read, so 0 times NaN stays out.
        GATHER: the sweep is channels last, so the element number that noise is keyed by is the swapped one.
        WIDE: 64-bit offsets. BARRIER: layouts may differ between loads and stores; make all loads come first.
    """
    T: tl.constexpr = len(sources)
    R: tl.constexpr = len(targets)
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
        sources, weights + R * (T + NOISE + ONE), seeds, n, stride, b, block, j, other, inside,
        STATE, NOISE, STRIDED, SWAPPED, GATHER, BARRIER, BLOCK,
    )  # fmt: skip
    totals = weigh(
        columns, weights, fields + b * field_stride + j, field_size, inside, STATE, PATTERN, ELEMENTS, R, ONE, BLOCK
    )
    # Only now, so that no load of a weight waits behind a store.
    for r in tl.static_range(R):
        at = other if (SWAPPED >> (T + r)) & 1 else j
        base = b * stride if (STRIDED >> (T + r)) & 1 else b * n
        tl.store(targets[r] + base + at, _cast(totals[r], targets[r].dtype.element_ty), mask=inside)


class Place(NamedTuple):
    """Where the elements of a tensor [B, *sample] lie: ``last``: channels last; ``stride`` between samples."""

    last: bool
    stride: int


def place(tensor: Tensor, last: bool = False) -> Place | None:
    """How ``tensor`` [B, *sample] lies in memory, or None if a sample is not dense in one of the two formats.

    A sample that is dense in both (one channel, or one pixel) is reported in the format asked for by ``last``.
    """
    batch, n = tensor.shape[0], tensor[0].numel()
    if not last and tensor.is_contiguous():
        return Place(False, n)
    stride = tensor.stride(0) if batch > 1 else n
    dims = list(range(1, tensor.ndim))
    for format_last in (last, not last):
        order = [*dims[1:], dims[0]] if format_last else dims
        expected, dense = 1, True
        for d in reversed(order):
            if tensor.shape[d] != 1:
                dense &= tensor.stride(d) == expected
                expected *= tensor.shape[d]
        if dense and stride >= n:
            return Place(format_last, stride)
    return None


class Layout(NamedTuple):
    """Where the elements of several tensors [B, *sample] lie, as :func:`combine_kernel` takes it."""

    stride: int
    strided: int
    swapped: int
    reach: int
    minor: int
    major: int
    gather: bool
    field_size: int
    field_stride: int


def layout(
    tensors: Sequence[Tensor],
    like: Tensor,
    *,
    draws: int = 0,
    fields: Tensor | None = None,
    last: bool = False,
    places: Sequence[Place] | None = None,
) -> Layout:
    """The layout of ``tensors``, all shaped like ``like``. Raises ``ValueError`` if a sample is not dense in memory."""
    batch, n = like.shape[0], like[0].numel()
    found = [place(t, last) for t in tensors] if places is None else places
    stride, strided, swapped, reach = n, 0, 0, batch * n
    for i, p in enumerate(found):
        if p is None:
            raise ValueError(f"combine: a sample must be dense in memory, got strides {tensors[i].stride()}")
        if p.last != last:
            swapped |= 1 << i
        if p.stride != n:
            if strided and p.stride != stride:
                raise ValueError("combine: tensors with padding between samples must have the same padding")
            strided, stride, reach = strided | 1 << i, p.stride, max(reach, batch * p.stride)
    minor, major = 1, 1
    gather = last and draws > 0
    if swapped or gather:
        channels = like.shape[1]
        minor, major = (channels, n // channels) if last else (n // channels, channels)
    field_size, field_stride = 1, 0
    if fields is not None:
        field_size, field_stride = fields[0].numel(), n if fields.shape[1] > 1 else 0
        reach = max(reach, fields.numel())
    return Layout(stride, strided, swapped, reach, minor, major, gather, field_size, field_stride)


def combine(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    table: Tensor,
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
    places: Sequence[Place] | None = None,
    warps: int | None = None,
) -> None:
    """Launch the update on the current stream; nothing is checked that the caller can know beforehand.

    Args:
        targets, sources: [B, *sample] each; at least one of either.
        table: in dtype ``state``; ``rows`` is 1 for shared weights, B for one row per sample. A row is
            [len(targets) * columns] weights and then ``draws`` numbers of draws.
        pattern: bit r * columns + c is set where the weight may be non-zero.
        draws, seeds: columns of noise made here, keyed by ``seeds`` int64 [B].
        one: whether the last column is the constant 1.
        elements, fields: entry -> 1 + index of its array in ``fields`` [E, 1 or B, *sample], 0 for a table's number.
        last: sweep in channels-last order (that of the slots); ``fields`` then lie in that order, too.
        places: of targets and sources in one list, sources first, if the caller knows them.

    Raises ``ValueError`` for tensors whose samples are not dense in memory.
    """
    with torch.cuda.device_of(targets[0]):
        batch, blocks, arguments, constants = launch(
            targets, sources, table, pattern=pattern, state=state, rows=rows, draws=draws, one=one, seeds=seeds,
            elements=elements, fields=fields, last=last, places=places, warps=warps,
        )  # fmt: skip
        combine_kernel[(batch * blocks,)](*arguments, **constants)


def launch(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    table: Tensor,
    *,
    pattern: int,
    state: torch.dtype,
    rows: int,
    draws: int,
    one: bool,
    seeds: Tensor | None,
    elements: tuple[int, ...],
    fields: Tensor | None,
    last: bool,
    places: Sequence[Place] | None = None,
    warps: int | None = None,
) -> tuple[int, int, tuple[Any, ...], dict[str, Any]]:
    """How :func:`combine` launches its kernel: samples, programs per sample, arguments and constants of the kernel."""
    first = targets[0]
    batch, n = first.shape[0], first[0].numel()
    where = layout((*sources, *targets), first, draws=draws, fields=fields, last=last, places=places)
    stride, strided, swapped, reach = where.stride, where.strided, where.swapped, where.reach
    minor, major, field_size, field_stride = where.minor, where.major, where.field_size, where.field_stride
    wide = reach > LIMIT
    # The barrier is needed only where Triton may choose different layouts for a load and a store of the same tensor.
    barrier = bool(swapped) or state != torch.float32 or n % LANES != 0 or stride % LANES != 0
    if rows == 1 and not draws and not strided and not swapped and (fields is None or field_stride == n):
        batch, n = 1, batch * n
    if warps is None:
        warps = pick_warps(batch, n)
    block = warps * 32 * LANES if not INTERPRETED.value else 1 << min(max(n - 1, 3).bit_length(), 16)
    blocks = -(-n // block)
    arguments = (
        tuple(sources),
        tuple(targets),
        table,
        table.numel() // rows if rows > 1 else 0,
        table if fields is None else fields,
        field_stride,
        field_size,
        table if seeds is None else seeds,
        n,
        blocks,
        stride,
        minor,
        major,
    )
    constants = dict(
        STATE=tl.float32 if state == torch.float32 else tl.float64,
        PATTERN=pattern,
        ELEMENTS=elements or (0,) * (len(targets) * (len(sources) + draws + one)),
        NOISE=draws,
        ONE=int(one),
        STRIDED=strided,
        SWAPPED=swapped,
        GATHER=where.gather,
        WIDE=wide,
        BARRIER=barrier,
        BLOCK=block,
        num_warps=warps,
    )
    return batch, blocks, arguments, constants


def pick_warps(batch: int, n: int) -> int:
    """Warps per program: few for small states, so that they spread over the multiprocessors, or what
    ``python -m fastode.kernels.tune`` found; and no idle warps in short samples."""
    wanted = _tuned().get((batch * n).bit_length(), 1 if batch * n <= 2**16 else 4)
    useful = max(1, -(-n // (32 * LANES)))
    return min(wanted, 1 << (useful - 1).bit_length())


@cache
def _tuned() -> dict[int, int]:
    """bit length of the number of elements -> warps, for this kind of device."""
    path = Path(__file__).with_name("tuned.json")
    if INTERPRETED.value or not path.exists() or not torch.cuda.is_available():
        return {}
    return {int(k): int(v) for k, v in json.loads(path.read_text()).get(torch.cuda.get_device_name(), {}).items()}
