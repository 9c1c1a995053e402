"""AMED's numbers in Triton: the predictor, all late weights and the noise levels that the network will be told, in one launch,
or folded into the launch of the update that needs them first.

Between the evaluation at t and the update that follows, AMED (arXiv:2312.00094) needs r, c and a of every sample; from them
follow the weights of that update and of the next, and the level of the next network call. :func:`pooled_mlp` is the
predictor. The weights are straight-line code (``fastode/program/code.py``), which :func:`build` turns into Triton source:
its structure is compiled, its constants are read from device memory, so another grid needs no other kernel.

In the folded kernel every program makes the numbers of its sample for itself and all write the same values, so none waits
for another; a barrier lies between these writes and the reads of the update. It saves a launch where a sample has few
programs, and would repeat the predictor too often where it has many.
"""

# Triton unrolls loops over tuples that grow by `t = t + (x,)`, and compiles no other form.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"
from __future__ import annotations

import linecache
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastode.kernels.combine import combine_kernel

WARPS = 4
FOLD = 8
"""Fold into the update where a sample has at most this many programs."""


@triton.jit
def pooled_mlp(
    feature,
    stride_b,
    stride_c,
    stride_p,
    weights,
    b,
    CHANNELS: tl.constexpr,
    INPUTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    P: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """HEADS numbers of sample ``b``, float64: see ``fastode.program.bind.PooledMLP``.

    ``feature``: [B, CHANNELS, INPUTS] at the given strides, any float type. ``weights``: w1, b1, w2, b2, head, offset, low,
    high in a row, float32. P, H, W: INPUTS, HIDDEN, WIDTH rounded up to powers of two.
    """
    p = tl.arange(0, P)
    h = tl.arange(0, H)
    w = tl.arange(0, W)
    c = tl.arange(0, CHUNK)
    total = tl.zeros([P], tl.float32)
    start = feature + b.to(tl.int64) * stride_b
    for first in range(0, CHANNELS, CHUNK):
        at = (first + c)[:, None] * stride_c + p[None, :] * stride_p
        inside = ((first + c) < CHANNELS)[:, None] & (p < INPUTS)[None, :]
        total += tl.sum(tl.load(start + at, mask=inside, other=0.0).to(tl.float32), axis=0)
    mean = total / CHANNELS

    b1 = weights + HIDDEN * INPUTS
    w2 = b1 + HIDDEN
    b2 = w2 + WIDTH * HIDDEN
    head = b2 + WIDTH
    offset = head + HEADS * WIDTH
    low = offset + HEADS
    high = low + HEADS
    inside = (h < HIDDEN)[:, None] & (p < INPUTS)[None, :]
    first_layer = tl.load(weights + h[:, None] * INPUTS + p[None, :], mask=inside, other=0.0)
    z = tl.sum(first_layer * mean[None, :], axis=1) + tl.load(b1 + h, mask=h < HIDDEN, other=0.0)
    hidden = z / (1.0 + tl.exp(-z))
    inside = (w < WIDTH)[:, None] & (h < HIDDEN)[None, :]
    second_layer = tl.load(w2 + w[:, None] * HIDDEN + h[None, :], mask=inside, other=0.0)
    width = tl.sum(second_layer * hidden[None, :], axis=1) + tl.load(b2 + w, mask=w < WIDTH, other=0.0)
    numbers = ()
    for k in tl.static_range(HEADS):
        row = tl.load(head + k * WIDTH + w, mask=w < WIDTH, other=0.0)
        y = tl.sum(row * width) + tl.load(offset + k)
        bottom = tl.load(low + k)
        value = bottom + (tl.load(high + k) - bottom) * (1.0 / (1.0 + tl.exp(-y)))
        numbers = numbers + (value.to(tl.float64),)
    return numbers


@triton.jit
def power(a, b):
    """a^b for a >= 0 in float64; whole exponents have become products before."""
    return tl.exp(b * tl.log(a))


@triton.jit
def expm1(x):
    """e^x - 1 in float64 without cancellation: (u - 1) x / ln u with u = e^x (Kahan)."""
    u = tl.exp(x)
    near = (u - 1.0) * x / tl.log(tl.where(u == 1.0, 2.0, u))
    return tl.where(u == 1.0, x, tl.where(tl.abs(x) > 1.0, u - 1.0, near))


@triton.jit
def moment(x, K: tl.constexpr, SIGN: tl.constexpr):
    """``fastode.scalar.Moment`` in float64: the power series for small x, the recursion beyond."""
    near = tl.where(tl.abs(x) < K + 1, x, 0.0)
    term = near
    for i in tl.static_range(K):
        term = term * near / (i + 2)
    series = term
    for j in range(1, 40):
        term = term * (SIGN * near) / (K + 1 + j)
        series += term
    far = SIGN * expm1(SIGN * x)
    power_of_x = x * 0.0 + 1.0
    for i in tl.static_range(K):
        power_of_x = power_of_x * x / (i + 1)
        far = SIGN * (far - power_of_x)
    return tl.where(tl.abs(x) < K + 1, series, far)


@dataclass(frozen=True)
class Structure:
    """What the generated source depends on: not the numbers, not the grid, not the batch.

    ``made``: leaves that the predictor fills. Registers are ``inputs`` (leaves), ``constants`` numbers, then one per
    instruction (op, a, b), as in ``fastode.program.code.Code``. Of ``outputs`` (registers) the first ``entries`` are
    weights, the others noise levels.
    """

    made: tuple[int, ...]
    inputs: tuple[int, ...]
    constants: int
    instructions: tuple[tuple[str, int, int], ...]
    outputs: tuple[int, ...]
    entries: int


PARAMETERS = "feature, stride_b, stride_c, stride_p, weights, leaves, constants, places, table, levels, batch"
SIZES = "CHANNELS, INPUTS, HIDDEN, WIDTH, HEADS, P, H, W, CHUNK"


@cache
def build(structure: Structure) -> tuple[Any, Any]:
    """(a kernel with one program per sample that makes the numbers, the same folded into ``combine_kernel``)."""
    text = source(structure)
    name = f"<fastode numbers {abs(hash(structure)):x}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)  # where triton looks the source up
    scope: dict[str, Any] = {
        "triton": triton, "tl": tl, "pooled_mlp": pooled_mlp, "power": power, "expm1": expm1, "moment": moment,
        "combine_kernel": combine_kernel, "__name__": __name__,
    }  # fmt: skip
    exec(compile(text, name, "exec"), scope)
    return scope["numbers_kernel"], scope["folded_kernel"]


def source(s: Structure) -> str:
    """Triton source of both kernels."""
    lines = [f"n = pooled_mlp(feature, stride_b, stride_c, stride_p, weights, b, {SIZES})"]
    lines += [f"tl.store(leaves + {leaf} * batch + b, n[{k}])" for k, leaf in enumerate(s.made)]
    names: list[str] = []
    for k, leaf in enumerate(s.inputs):
        fresh = f"n[{s.made.index(leaf)}]" if leaf in s.made else f"tl.load(leaves + {leaf} * batch + b)"
        lines.append(f"x{k} = {fresh}")
        names.append(f"x{k}")
    for k in range(s.constants):
        lines.append(f"c{k} = tl.load(constants + {k})")
        names.append(f"c{k}")
    binary = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
    for k, (op, i, j) in enumerate(s.instructions):
        a, b = names[i], names[j]
        if op in binary:
            value = f"{a} {binary[op]} {b}"
        elif op == "neg":
            value = f"-{a}"
        elif op == "pow":
            value = f"power({a}, {b})"
        elif op == "expm1":
            value = f"expm1({a})"
        elif op in ("exp", "sqrt", "log"):
            value = f"tl.{op}({a})"
        else:
            value = f"moment({a}, {op[1]}, {'1.0' if op[0] == 'K' else '-1.0'})"
        lines.append(f"v{k} = {value}")
        names.append(f"v{k}")
    for k, register in enumerate(s.outputs[: s.entries]):
        at = f"tl.load(places + {2 * k}) + b * tl.load(places + {2 * k + 1})"
        lines.append(f"tl.store(table + {at}, {names[register]}.to(table.dtype.element_ty))")
    for k, register in enumerate(s.outputs[s.entries :]):
        lines.append(f"tl.store(levels[{k}] + b, {names[register]}.to(levels[{k}].dtype.element_ty))")
    body = "\n    ".join(lines)
    sizes = ", ".join(f"{name.strip()}: tl.constexpr" for name in SIZES.split(","))
    constants = "STATE, PATTERN, ELEMENTS, NOISE, ONE, STRIDED, SWAPPED, GATHER, WIDE, BARRIER, BLOCK"
    typed = ", ".join(f"{name.strip()}: tl.constexpr" for name in constants.split(","))
    update = (
        "sources, targets, own, own_stride, fields, field_stride, field_size, seeds, n, blocks, stride, minor, major"
    )
    return f"""
@triton.jit
def numbers(b, {PARAMETERS}, {sizes}):
    {body}


@triton.jit
def numbers_kernel({PARAMETERS}, {sizes}):
    numbers(tl.program_id(0), {PARAMETERS}, {SIZES})


@triton.jit
def folded_kernel({PARAMETERS}, {update}, {sizes}, {typed}):
    numbers(tl.program_id(0) // blocks, {PARAMETERS}, {SIZES})
    tl.debug_barrier()
    combine_kernel({update}, {constants})
"""


def pack(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """w1, b1, w2, b2, head, offset, low, high in a row, float32."""
    return torch.cat([t.detach().float().flatten() for t in tensors]).to(device)


def sizes_of(channels: int, inputs: int, hidden: int, width: int, heads: int) -> dict[str, int]:
    """The constants of :func:`pooled_mlp`."""
    up = triton.next_power_of_2
    return {
        "CHANNELS": channels, "INPUTS": inputs, "HIDDEN": hidden, "WIDTH": width, "HEADS": heads,
        "P": up(inputs), "H": up(hidden), "W": up(width), "CHUNK": max(1, 2048 // up(inputs)),
    }  # fmt: skip


def arguments(
    feature: Tensor,
    weights: Tensor,
    leaves: Tensor,
    constants: Tensor,
    places: Tensor,
    table: Tensor,
    levels: Sequence[Tensor],
) -> tuple[Any, ...]:
    """Arguments of both kernels, in the order of ``PARAMETERS``. ``feature``: [B, C, positions]; ``leaves``: [L, B] float64;
    ``constants``: float64; ``places``: (offset in ``table``, numbers from one sample to the next) of every weight, int64."""
    return (
        feature, *feature.stride(), weights, leaves, constants, places, table, tuple(levels),
        leaves.shape[1],
    )  # fmt: skip
