"""Lowered updates as single Triton launches: ``kernels/combine.py`` bound to the buffers of one run."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastode.backends.base import Buffers, Draws
from fastode.backends.late import Plan, Plans
from fastode.backends.packing import Packed, Packing, _upload
from fastode.program.lower import Lowered, Source, Target, Update
from fastode.scalar import Late


class TritonExecutor:
    """One launch per update. Weights lie in one device tensor that ``load`` rewrites in place, so that launches
    recorded in a CUDA graph use the new numbers.

    Where ``noise.seeds`` are given, noise is made in the kernel; otherwise draw k is the tensor ``noise(k)``.
    """

    reports_finite = False
    makes_noise = True
    """Given seeds, it makes noise itself, from its own copy of them on the device."""

    def __init__(self, lowered: Lowered, buffers: Buffers, noise: Draws) -> None:
        from fastode.kernels import combine as kernels
        from fastode.kernels.reduce import squares

        self.lowered, self.buffers, self.noise = lowered, buffers, noise
        self._combine, self._place, self._squares = kernels.combine, kernels.place, squares
        net_in, slots = buffers.net_in, buffers.slots
        like = slots[0] if len(slots) else net_in
        self._last = (self._place(like) or (False, 0))[0]  # sweep in the order in which the slots lie in memory
        self.packing = Packing(lowered, tuple(net_in.shape))
        self._state = slots.dtype
        shape = self.packing.fields_shape
        with torch.inference_mode(False):  # this memory serves later calls too, which may be in another mode
            self.table = torch.zeros(self.packing.size, device=slots.device, dtype=slots.dtype)
            self.fields = None if shape is None else self._empty_fields(shape)
            self.seeds = torch.zeros(net_in.shape[0], device=slots.device, dtype=torch.int64)
        self._made_here = False  # whether the draws of this call are made in the kernel
        self._maker: Maker | None = None
        self._known: Mapping[Late, Any] | None = None
        self._slots = [slots[i] for i in range(len(slots))]
        self._tables = [self.table[p.offset : p.end] for p in self.packing.updates]

    def load(self, known: Mapping[Late, Any]) -> None:
        """Rewrite the table if a late number has changed, and take over the seeds of this call."""
        if self._known is None or not _same(self._known, known, self.packing.late):
            self.packing.fill(known, self.table, self.fields)
            self._known = {k: v.clone() if isinstance(v, Tensor) else v for k, v in known.items()}
            if self._maker is not None:
                self._maker.load(known)
        seeds = self.noise.seeds
        self._made_here = seeds is not None
        if seeds is not None and self.lowered.program.draws:
            if seeds.device.type == "cpu":
                _upload(seeds, self.seeds)
            else:
                self.seeds.copy_(seeds)

    def bind(self, index: int, known: Mapping[Late, Any]) -> None:
        self.packing.bind(index, known, self.table, self.fields)

    def prepare(self, levels: Sequence[Tensor | None]) -> bool:
        """Whether kernels will make all numbers of the run (see :mod:`fastode.backends.late`), told to ``levels`` too."""
        plans = Plans.of(self.lowered)
        if plans is not None:
            self._maker = Maker(plans, self.packing, self.table, levels)
            self._known = None  # the numbers that come with the call go to the maker's memory, too
        return plans is not None

    def make(self, index: int, features: Mapping[str, Tensor]) -> None:
        """Make the numbers before update ``index``: in one launch, or in that of the update itself."""
        assert self._maker is not None
        self._maker.look(index, features)
        if self.lowered.due[index] != index:
            self._maker.run()

    def update(self, index: int, start: Tensor, outputs: Sequence[Tensor], result: Tensor) -> bool:
        update, packed = self.lowered.updates[index], self.packing.updates[index]
        sources = self._columns(update, start, outputs)
        targets = [self._target(t, result) for t in update.targets]
        self._make_readable(sources, targets[0])
        arguments = self._arguments(packed, sources)
        if self._maker is None or not self._maker.fold(targets, sources, self._tables[index], arguments):
            self._combine(targets, sources, self._tables[index], **arguments)
        return True

    def _columns(self, update: Update, start: Tensor, outputs: Sequence[Tensor]) -> list[Tensor]:
        """The source tensors; draws are among them unless the kernel makes them."""
        columns = [s for s in update.sources if s.kind != "one" and not (s.kind == "noise" and self._made_here)]
        return [self._source(s, start, outputs) for s in columns]

    def _make_readable(self, sources: list[Tensor], like: Tensor) -> None:
        """Replace sources that the kernel cannot read where they lie by dense copies."""
        n = like[0].numel()
        places = [self._place(t, self._last) for t in sources]
        padded = {p.stride for p in places if p is not None} - {n}
        for i, p in enumerate(places):
            if p is None or (p.stride != n and len(padded) > 1):  # the kernel cannot read it where it lies
                sources[i] = self._dense(sources[i])

    def _arguments(self, packed: Packed, sources: list[Tensor]) -> dict[str, Any]:
        return {
            "pattern": packed.pattern,
            "state": self._state,
            "rows": packed.rows,
            "draws": packed.columns - packed.one - len(sources),
            "one": packed.one,
            "seeds": self.seeds,
            "elements": packed.elements,
            "fields": self.fields if packed.elements else None,
            "last": self._last,
        }

    def norms(self, rows: Update, known: Mapping[Late, Any], start: Tensor, outputs: Sequence[Tensor]) -> list[Tensor]:
        """One launch over the sources, and one over the sums of its blocks."""
        packed = self.packing.measured[self.lowered.measured.index(rows)]
        sources = self._columns(rows, start, outputs)
        self._make_readable(sources, sources[0] if sources else start)
        table = self.table[packed.offset : packed.end]
        squares = self._squares(sources, start, table, len(rows.targets), **self._arguments(packed, sources))
        return list(squares.sum(-1).sqrt().unbind(0))

    def _dense(self, tensor: Tensor) -> Tensor:
        if self._last:
            return tensor.contiguous(memory_format=torch.channels_last if tensor.ndim == 4 else torch.channels_last_3d)
        return tensor.contiguous()

    def _source(self, source: Source, start: Tensor, outputs: Sequence[Tensor]) -> Tensor:
        if source.kind == "slot":
            return self._slots[source.index]
        if source.kind == "output":
            return outputs[source.index]
        if source.kind == "noise":
            return self.noise(source.index)
        return start if source.kind == "start" else self.buffers.net_in

    def _target(self, target: Target, result: Tensor) -> Tensor:
        if target.kind == "slot":
            return self._slots[target.index]
        return self.buffers.net_in if target.kind == "input" else result

    def _empty_fields(self, shape: tuple[int, ...]) -> Tensor:
        """Arrays of weights, in the order of the sweep."""
        slots = self.buffers.slots
        if not self._last:
            return torch.zeros(shape, device=slots.device, dtype=slots.dtype)
        moved = torch.zeros((*shape[:2], *shape[3:], shape[2]), device=slots.device, dtype=slots.dtype)
        return moved.movedim(-1, 2)


class Maker:
    """Makes the late numbers of a run in its kernels: ``look`` takes the feature, then ``fold`` makes them in the launch of
    the update, or ``run`` in one of their own."""

    def __init__(self, plans: Plans, packing: Packing, table: Tensor, levels: Sequence[Tensor | None]) -> None:
        from fastode.kernels import mean_direction as kernels

        self.plans, self.table, self._kernels = plans, table, kernels
        device = table.device
        with torch.inference_mode(False):
            self.leaves = torch.zeros(len(plans.leaves), packing.shape[0], dtype=torch.float64, device=device)
            self._prepared = {i: self._prepare(p, packing, levels, device) for i, p in plans.by_update.items()}
        self._waiting: tuple[_Prepared, tuple[Any, ...], dict[str, int]] | None = None

    def _prepare(
        self, plan: Plan, packing: Packing, levels: Sequence[Tensor | None], device: torch.device
    ) -> _Prepared:
        code, places = plan.code, list[int]()
        for u, r, c in plan.entries:
            packed = packing.updates[u]
            places += [packed.offset + r * packed.columns + c, packed.width]
        structure = self._kernels.Structure(
            plan.made, plan.inputs, len(code.constants), code.instructions, code.outputs, len(plan.entries)
        )
        mlp = plan.mlp
        tensors = [getattr(mlp, name) for name in mlp.__dataclass_fields__]
        hidden, inputs = mlp.w1.shape
        return _Prepared(
            plan.feature,
            self._kernels.build(structure),
            self._kernels.pack(tensors, device),
            torch.tensor(code.constants or (0.0,), dtype=torch.float64, device=device),
            torch.tensor(places or (0, 0), dtype=torch.int64, device=device),
            tuple(level for level in (levels[k] for k in plan.calls) if level is not None),
            (inputs, hidden, len(mlp.b2), len(mlp.offset)),
        )

    def load(self, known: Mapping[Late, Any]) -> None:
        for k, late in enumerate(self.plans.leaves):
            if late in known:
                value = torch.as_tensor(known[late], dtype=torch.float64).flatten()
                if value.device.type == "cpu":
                    _upload(value.expand(self.leaves.shape[1]).contiguous(), self.leaves[k])
                else:
                    self.leaves[k].copy_(value)

    def look(self, index: int, features: Mapping[str, Tensor]) -> None:
        """Take the feature that the numbers before update ``index`` are made from."""
        p = self._prepared[index]
        feature = features[p.feature].flatten(2)  # a view in both memory formats
        if feature.shape[2] != p.sizes[0]:
            self.plans.by_update[index].mlp(features[p.feature])  # says what is wrong
        arguments = self._kernels.arguments(
            feature, p.weights, self.leaves, p.constants, p.places, self.table, p.levels
        )
        self._waiting = p, arguments, self._kernels.sizes_of(feature.shape[1], *p.sizes)

    def run(self) -> None:
        assert self._waiting is not None
        p, arguments, sizes = self._waiting
        self._waiting = None
        with torch.cuda.device_of(self.table):
            p.kernels[0][(self.leaves.shape[1],)](*arguments, **sizes, num_warps=self._kernels.WARPS)

    def fold(self, targets: list[Tensor], sources: list[Tensor], table: Tensor, update: dict[str, Any]) -> bool:
        """Launch the update with what waits folded in. False if nothing waits, or was launched by itself."""
        if self._waiting is None:
            return False
        from fastode.kernels.combine import launch

        with torch.cuda.device_of(self.table):
            # The predictor's matrices need four warps; in one they would spill.
            batch, blocks, own, constants = launch(targets, sources, table, **update, warps=self._kernels.WARPS)
            if blocks > self._kernels.FOLD:
                self.run()
                return False
            p, arguments, sizes = self._waiting
            self._waiting = None
            p.kernels[1][(batch * blocks,)](*arguments, *own, **sizes, **constants)
        return True


@dataclass(frozen=True, eq=False)
class _Prepared:
    feature: str
    kernels: tuple[Any, Any]
    weights: Tensor
    constants: Tensor
    places: Tensor
    levels: tuple[Tensor, ...]
    sizes: tuple[int, int, int, int]


def _same(old: Mapping[Late, Any], new: Mapping[Late, Any], late: frozenset[Late]) -> bool:
    """Whether no late number has changed. One on the device counts as changed: to compare it the host would wait."""
    for key in late:
        a, b = old.get(key), new.get(key)
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            if a.device.type != "cpu" or b.device.type != "cpu" or a.shape != b.shape or not torch.equal(a, b):
                return False
        elif isinstance(a, Tensor) or isinstance(b, Tensor) or a != b:
            return False
    return True


class TritonBackend:
    """CUDA devices; with ``TRITON_INTERPRET=1`` set before triton is imported also the CPU, slowly, for tests."""

    name = "triton"
    device_tables = True
    """Weights are read from device memory, so they may change between replays of a CUDA graph."""

    def missing(self, device: torch.device) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed (pip install 'fastode[triton]')"
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET", "0") != "1":
            return "Triton runs on the CPU only in its interpreter (TRITON_INTERPRET=1)"
        if device.type not in ("cuda", "cpu"):
            return f"Triton does not run on {device.type}"
        if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
            return "it is written for compute capability 8.0 and newer"
        return None

    def normal(
        self, seeds: Tensor, draw: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """``fastode.noise.normal`` on ``device`` in one launch and without a wait, equal to rounding: [B, *shape]."""
        from fastode.kernels.combine import combine

        z = torch.empty((len(seeds), *shape), device=device, dtype=dtype)
        keys = torch.empty(len(seeds), device=device, dtype=torch.int64)
        table = torch.empty(2, device=device, dtype=dtype)
        _upload(seeds, keys)
        _upload(torch.tensor([1, draw], dtype=dtype), table)
        combine([z], [], table, pattern=1, state=dtype, draws=1, seeds=keys)
        return z

    def bind(self, lowered: Lowered, buffers: Buffers, noise: Draws) -> TritonExecutor:
        return TritonExecutor(lowered, buffers, noise)
