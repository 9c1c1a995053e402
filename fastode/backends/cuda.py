"""Lowered updates by the kernel of csrc/combine.cuh, whoever compiled it: the structures it takes, filled in from tensors.

What launches it is a function ``launch(args, vector)``: the compiled module's (:mod:`fastode.backends.native`), CuPy's
(:mod:`fastode.backends.nvrtc`), or the tests', which run the kernel's code on the host.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastode.backends.base import Buffers, Draws
from fastode.backends.packing import Packed, Packing, _upload
from fastode.backends.torch import TorchExecutor
from fastode.program.lower import Lowered, Update
from fastode.scalar import Late

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
"""Element types and their numbers in csrc/combine.h."""

MAX_INPUTS, MAX_OUTPUTS, MAX_DIMS = 8, 4, 6
THREADS = 256


class Operand(ctypes.Structure):
    """``fastode::Operand``."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("dense", ctypes.c_int32),
        ("dims", ctypes.c_int64),
        ("sizes", ctypes.c_int64 * MAX_DIMS),
        ("strides", ctypes.c_int64 * MAX_DIMS),
    )


class Arguments(ctypes.Structure):
    """``fastode::Update``."""

    _fields_ = (
        ("batch", ctypes.c_int64),
        ("sample", ctypes.c_int64),
        ("state", ctypes.c_int32),
        ("n_in", ctypes.c_int32),
        ("n_out", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("weights", ctypes.c_void_p),
        ("weights_stride", ctypes.c_int64),
        ("seeds", ctypes.c_void_p),
        ("used", ctypes.c_uint32 * MAX_OUTPUTS),
        ("draw", ctypes.c_uint32 * MAX_INPUTS),
        ("noise", ctypes.c_uint32),
        ("watch", ctypes.c_uint32),
        ("per_element", ctypes.c_int64),
        ("element_stride", ctypes.c_int64),
        ("element", ctypes.c_void_p * (MAX_INPUTS + 1) * MAX_OUTPUTS),
        ("inputs", Operand * MAX_INPUTS),
        ("outputs", Operand * MAX_OUTPUTS),
    )


Launch = Callable[[Arguments, int], None]


class CudaExecutor(TorchExecutor):
    """One launch per update, with the weights in one device tensor that ``load`` rewrites in place, so that launches
    recorded in a graph use the new numbers. What is beyond the kernel's limits is left to the executor in torch."""

    reports_finite = False
    makes_noise = True

    def __init__(self, launch: Launch, lowered: Lowered, buffers: Buffers, noise: Draws) -> None:
        super().__init__(lowered, buffers, noise)
        slots, net_in = buffers.slots, buffers.net_in
        self._launch = launch
        self._packing = Packing(lowered, tuple(net_in.shape))
        fields = self._packing.fields_shape
        with torch.inference_mode(False):  # this memory serves later calls too, which may be in another mode
            self.table = torch.zeros(self._packing.size, device=slots.device, dtype=slots.dtype)
            self.fields = None if fields is None else torch.zeros(fields, device=slots.device, dtype=slots.dtype)
            self.seeds = torch.zeros(net_in.shape[0], device=slots.device, dtype=torch.int64)
        self._numbers: Mapping[Late, Any] | None = None
        self._made_here = False
        self._draws = any(s.kind == "noise" for u in (*lowered.updates, *lowered.measured) for s in u.sources)
        fits = slots.is_contiguous() and net_in.ndim <= MAX_DIMS
        packed = zip(lowered.updates, self._packing.updates, strict=True)
        self._arguments = [self._prepare(u, p) if fits and _fits(u) else None for u, p in packed]
        rows = zip(lowered.measured, self._packing.measured, strict=True)
        self._measured = {u: self._prepare(u, p) if fits and _fits(u) else None for u, p in rows}

    def _prepare(self, update: Update, packed: Packed) -> Arguments:
        a, columns = Arguments(), packed.columns
        slots, net_in = self.buffers.slots, self.buffers.net_in
        a.batch, a.sample = net_in.shape[0], net_in[0].numel()
        a.state, a.columns = DTYPES[slots.dtype], columns
        a.n_in, a.n_out = columns - packed.one, len(update.targets)
        a.weights = self.table[packed.offset :].data_ptr()
        a.weights_stride = packed.width if packed.rows > 1 else 0
        a.seeds = self.seeds.data_ptr()
        for row in range(a.n_out):
            a.used[row] = packed.pattern >> row * columns & (1 << columns) - 1
        if packed.elements:
            assert self.fields is not None
            a.per_element, a.element_stride = 1, a.sample if self._packing.batched_fields else 0
            for i, field in enumerate(packed.elements):
                if field:
                    a.element[i // columns][i % columns] = self.fields[field - 1].data_ptr()
        for k, source in enumerate(update.sources):
            if source.kind == "noise":
                a.draw[k] = source.index + 1
            elif source.kind != "one":
                fixed = slots[source.index] if source.kind == "slot" else net_in
                describe(fixed, a.inputs[k])  # for others a place holder: they come with the call
        for r, target in enumerate(update.targets):
            describe(slots[target.index] if target.kind == "slot" else net_in, a.outputs[r])
        return a

    def load(self, known: Mapping[Late, Any]) -> None:
        """Rewrite the table if a late number has changed, and take over the seeds of this call."""
        if self._numbers is None or (self._packing.late and not _unchanged(self._numbers, known)):
            self._packing.fill(known, self.table, self.fields)
            self._numbers = dict(known)
            self._tables = None  # the tables in torch are made when they are first needed
        seeds = self.noise.seeds
        self._made_here = seeds is not None
        if seeds is not None and self._draws:
            if seeds.device.type == "cpu":
                _upload(seeds, self.seeds)
            else:
                self.seeds.copy_(seeds)

    def bind(self, index: int, known: Mapping[Late, Any]) -> None:
        self._packing.bind(index, known, self.table, self.fields)

    def update(self, index: int, start: Tensor, outputs: Sequence[Tensor], result: Tensor) -> bool:
        a, update = self._arguments[index], self.lowered.updates[index]
        if a is None or any(self._foreign(raw) for raw in outputs):
            if self._tables is None:
                super().load(self._numbers or {})
            return super().update(index, start, outputs, result)
        kept = self._connect(a, update, start, outputs)
        for r, target in enumerate(update.targets):
            if target.kind == "result":
                describe(result, a.outputs[r])
        self._launch(a, vector(a))
        del kept  # draws must live until the launch is enqueued
        return True

    def norms(self, rows: Update, known: Mapping[Late, Any], start: Tensor, outputs: Sequence[Tensor]) -> list[Tensor]:
        """One launch writes the rows, another takes their norms."""
        a = self._measured[rows]
        if a is None or any(self._foreign(raw) for raw in outputs):
            return super().norms(rows, known, start, outputs)
        written = [torch.empty(start.shape, device=self.table.device, dtype=self.table.dtype) for _ in rows.targets]
        kept = self._connect(a, rows, start, outputs)
        for r, tensor in enumerate(written):
            describe(tensor, a.outputs[r])
        self._launch(a, vector(a))
        del kept
        return [tensor.flatten(1).norm(dim=1) for tensor in written]

    def _connect(self, a: Arguments, update: Update, start: Tensor, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Fill in the tensors of this call; returns those that nobody else keeps."""
        a.noise = 0
        kept: list[Tensor] = []
        for k, source in enumerate(update.sources):
            if source.kind == "output":
                describe(outputs[source.index], a.inputs[k])
            elif source.kind == "start":
                describe(start, a.inputs[k])
            elif source.kind == "noise" and self._made_here:
                a.noise |= 1 << k
            elif source.kind == "noise":
                kept.append(self.noise(source.index))
                describe(kept[-1], a.inputs[k])
        return kept

    def _foreign(self, x: Tensor) -> bool:
        """A tensor that the kernel cannot read in place; see the native backend's."""
        if x.device != self.table.device or x.layout is not torch.strided or x.dtype not in DTYPES or x.is_neg():
            return True
        memory = self.buffers.net_in.untyped_storage()
        return not x.is_contiguous() and x.untyped_storage().data_ptr() == memory.data_ptr()


def describe(x: Tensor, to: Operand) -> None:
    """Fill ``to`` in: address, type, and, for a tensor in another order, its sizes and strides with runs merged."""
    to.data, to.dtype = x.data_ptr(), DTYPES[x.dtype]
    to.dense = x.is_contiguous()
    if to.dense:
        return
    merged: list[list[int]] = []
    for size, stride in zip(x.shape, x.stride(), strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = [merged[-1][0] * size, stride]
        else:
            merged.append([size, stride])
    to.dims = len(merged)
    for d, (size, stride) in enumerate(merged):
        to.sizes[d], to.strides[d] = size, stride


def vector(a: Arguments) -> int:
    """Neighbouring elements per thread: 16 bytes of the narrowest tensor, or 1 where something forbids vectors."""
    tensors = [a.inputs[k] for k in range(a.n_in) if not a.noise >> k & 1]
    tensors += [a.outputs[r] for r in range(a.n_out)]
    types = {x.dtype for x in tensors}
    half = bool(types & {DTYPES[torch.bfloat16], DTYPES[torch.float16]})
    if a.state == DTYPES[torch.float64]:
        width = 1 if half else 2
    else:
        width = 1 if DTYPES[torch.float64] in types else 8 if half else 4
    by_sample = a.noise or a.per_element or a.weights_stride
    aligned = all(x.dense and x.data % 16 == 0 for x in tensors) and not (by_sample and a.sample % width)
    return width if aligned else 1


def kernel_name(a: Arguments, width: int) -> str:
    """The kernel of combine.cuh for ``width`` elements per thread."""
    state = "f64" if a.state == DTYPES[torch.float64] else "f32"
    return f"fastode_{state}_{width}_{4 if a.n_in <= 4 and width > 1 else 8}"


def grid(a: Arguments, width: int, processors: int) -> tuple[int, int]:
    """Blocks of ``THREADS``: eight for each processor fill it, and a thread of a larger tensor makes several rounds."""
    by_sample = a.noise or a.per_element or a.weights_stride
    samples, length = (a.batch, a.sample) if by_sample else (1, a.batch * a.sample)
    rows = min(samples, 65535)
    return min(-(-length // (width * THREADS)), max(1, 8 * processors // rows)), rows


def normal(
    launch: Launch, seeds: Tensor, draw: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """``fastode.noise.normal`` by the kernel: [B, *shape] on ``device`` for ``seeds`` int64 [B]."""
    keys, one = seeds.to(device).contiguous(), torch.ones(1, device=device, dtype=dtype)
    z = torch.empty(len(keys), *shape, device=device, dtype=dtype)
    a = Arguments(batch=len(keys), sample=z[0].numel(), state=DTYPES[dtype], n_in=1, n_out=1, columns=1, noise=1)
    a.weights, a.seeds, a.draw[0], a.used[0] = one.data_ptr(), keys.data_ptr(), draw, 1
    describe(z, a.outputs[0])
    launch(a, vector(a))
    return z


def _fits(update: Update) -> bool:
    tensors = sum(s.kind != "one" for s in update.sources)
    return tensors <= MAX_INPUTS and len(update.targets) <= MAX_OUTPUTS


def _unchanged(old: Mapping[Late, Any], new: Mapping[Late, Any]) -> bool:
    return old.keys() == new.keys() and all(isinstance(v, float) and v == old[k] for k, v in new.items())
