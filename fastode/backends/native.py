"""Lowered updates by the compiled module ``fastode._native`` (csrc/): one pass over memory for each.

On the CPU an update costs about 1 us and its memory traffic: one call through pybind11, which finds everything that is
known beforehand (addresses of the slots, weights, types) already in place. On CUDA devices, where the module was built
with nvcc, it is one launch.
"""

from __future__ import annotations

import ctypes
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastode.backends.base import Buffers, Draws, Executor
from fastode.backends.cuda import DTYPES, Arguments, CudaExecutor, normal
from fastode.backends.late import Plans
from fastode.backends.torch import TorchExecutor
from fastode.program.code import OPS
from fastode.program.lower import Lowered, Update
from fastode.scalar import Late


class NativeExecutor(TorchExecutor):
    """Hands every update to the compiled module; what is beyond its limits (more than 8 tensors read or 4 written) is
    left to the executor in torch, with the same numbers."""

    reports_finite = True

    def __init__(self, module: ModuleType, lowered: Lowered, buffers: Buffers, noise: Draws) -> None:
        super().__init__(lowered, buffers, noise)
        slots, net_in = buffers.slots, buffers.net_in
        self._native = module.Executor(list(net_in.shape), DTYPES[slots.dtype], slots.data_ptr(), _describe(net_in))
        self._net_dtype = net_in.dtype
        self._memory = net_in.untyped_storage().data_ptr()
        fits = slots.is_contiguous() and net_in.ndim <= module.MAX_DIMS
        self._made: Plans | None = None
        self._both: set[int] = set()  # updates whose weights differ between samples and elements: left to torch
        self._plans = [_plan(u, module) if fits else None for u in lowered.updates]
        for update, plan in zip(lowered.updates, self._plans, strict=True):
            known = () if plan is None else update.sources
            written = () if plan is None else update.targets
            self._native.add([(s.kind, s.index) for s in known], [(t.kind, t.index) for t in written])

    def prepare(self, levels: Sequence[Tensor | None]) -> bool:
        """Whether the module will make all numbers of the run (see :mod:`fastode.backends.late`), told to ``levels`` too."""
        plans = Plans.of(self.lowered)
        waiting = [u for u, due in enumerate(self.lowered.due) if due]
        if plans is None or any(self._plans[u] is None for u in waiting):
            return False
        shape = self.buffers.net_in.shape
        one_each = torch.ones((shape[0], *[1] * (len(shape) - 1)), dtype=torch.float64)
        for u in waiting:  # room for weights per sample; those known already are filled in with them
            entries = self.lowered.updates[u].entries
            rows = [[one_each if isinstance(c, Late) else float(c) for c in row] for row in entries]
            self._native.load(u, *_pack(rows, shape))
        self._native.set_leaves(len(plans.leaves))
        for index, plan in plans.by_update.items():
            mlp, code = plan.mlp, plan.code
            told = [levels[k] for k in plan.calls]
            self._native.numbers(
                index,
                [getattr(mlp, name).detach().float().flatten().tolist() for name in mlp.__dataclass_fields__],
                plan.made,
                plan.inputs,
                code.constants,
                [(OPS.index(op), a, b) for op, a, b in code.instructions],
                code.outputs,
                plan.entries,
                [(level.data_ptr(), DTYPES[level.dtype]) for level in told if level is not None],
            )
        self._made = plans
        return True

    def make(self, index: int, features: Mapping[str, Tensor]) -> None:
        """Make the numbers before update ``index``: one call, which writes the weights of all updates that wait."""
        assert self._made is not None
        plan = self._made.by_update[index]
        feature = features[plan.feature]
        if feature.ndim < 3 or feature.dtype not in DTYPES or not feature.is_cpu:
            raise ValueError(f"{plan.feature}: must be a map [B, C, h, w] on the CPU, got {list(feature.shape)}")
        flat = feature.flatten(2)  # a view where the positions lie evenly, as in both memory formats
        if flat.shape[2] != plan.mlp.w1.shape[1]:
            plan.mlp(feature)  # says what is wrong
        stride = flat.stride()
        self._native.make(index, flat.data_ptr(), DTYPES[flat.dtype], flat.shape[1], flat.shape[2], *stride)

    def load(self, known: Mapping[Late, Any]) -> None:
        before = self._tables
        super().load(known)
        if self._tables is not before:
            self._hand_over(0)
        if self._made is not None:
            for k, late in enumerate(self._made.leaves):
                if late in known:
                    self._native.set_leaf(k, torch.as_tensor(known[late], dtype=torch.float64).flatten().tolist())
        # The tensor of seeds is kept, since the module holds its address until the next call.
        self._seeds = self.noise.seeds
        self._native.begin(0 if self._seeds is None else self._seeds.data_ptr(), torch.get_num_threads())

    def bind(self, index: int, known: Mapping[Late, Any]) -> None:
        super().bind(index, known)
        self._hand_over(index)

    def _hand_over(self, due: int) -> None:
        """Give the module the weights that became known before update ``due``."""
        assert self._tables is not None
        shape = self.buffers.net_in.shape
        for i, rows in enumerate(self._tables):
            if self._plans[i] is not None and self.lowered.due[i] == due:
                self._both.discard(i)
                if any(_per_sample_and_element(c, shape) for row in rows for c in row):
                    self._both.add(i)
                else:
                    self._native.load(i, *_pack(rows, shape))

    def update(self, index: int, start: Tensor, outputs: Sequence[Tensor], result: Tensor) -> bool:
        plan = None if index in self._both else self._plans[index]
        if plan is None:
            super().update(index, start, outputs, result)
            return all(bool(torch.isfinite(raw).all()) for raw in outputs)
        reads, reads_start, draws = plan
        plain = (not reads_start or start.is_contiguous()) and result.is_contiguous() and len(outputs) == reads <= 1
        if plain and (self._seeds is not None or not draws):
            if not reads:
                return self._native.update(index, start.data_ptr(), result.data_ptr(), 0, 0)
            raw = outputs[0]
            if raw.dtype is self._net_dtype and raw.is_cpu and raw.is_contiguous():
                return self._native.update(index, start.data_ptr(), result.data_ptr(), raw.data_ptr(), 0)
        return self._update_any(index, start, outputs, result)

    def _update_any(self, index: int, start: Tensor, outputs: Sequence[Tensor], result: Tensor) -> bool:
        """Tensors of any type and order, several outputs, and draws that come as tensors."""
        plan = self._plans[index]
        assert plan is not None
        reads, _, draws = plan
        used, unused = outputs[:reads], outputs[reads:]
        finite = all(bool(torch.isfinite(raw).all()) for raw in unused)
        if self._made is not None and self.lowered.due[index]:  # its weights are known to the module alone
            used = [torch.empty_like(raw, memory_format=torch.contiguous_format).copy_(raw) for raw in used]
        if any(self._foreign(raw) for raw in (*used, start)):
            super().update(index, start, outputs, result)
            return finite and all(bool(torch.isfinite(raw).all()) for raw in used)
        noise = [] if self._seeds is not None else [self.noise(k) for k in draws]
        given = [_describe(raw) for raw in used]
        done = self._native.update_any(index, _describe(start), _describe(result), given, [_describe(z) for z in noise])
        return finite and done

    def _foreign(self, x: Tensor) -> bool:
        """A tensor that the module cannot read in place: of another device, layout or type, or a rearranged view of the
        network's input, whose elements would be overwritten before they are read."""
        if not x.is_cpu or x.layout is not torch.strided or x.dtype not in DTYPES or x.is_neg():
            return True
        return not x.is_contiguous() and x.untyped_storage().data_ptr() == self._memory


class NativeBackend:
    """The compiled executor, where it was built: on the CPU, and on CUDA devices if it was built with nvcc."""

    name = "native"

    def __init__(self) -> None:
        self._module: ModuleType | None = None

    def missing(self, device: torch.device) -> str | None:
        if device.type not in ("cpu", "cuda"):
            return f"it does not run on {device.type}"
        if self._module is None:
            try:
                self._module = importlib.import_module("fastode._native")
            except ImportError as error:
                return not_built(error)
        if device.type == "cuda" and not self._module.CUDA:
            return "the native module was built for the CPU only; build it with FASTODE_CUDA=1 (needs nvcc)"
        if device.type == "cuda" and (torch.version.cuda is None or not torch.cuda.is_available()):
            return "PyTorch sees no CUDA device"
        return None

    def bind(self, lowered: Lowered, buffers: Buffers, noise: Draws) -> Executor:
        module = self._present(buffers.net_in.device)
        if buffers.net_in.device.type == "cuda":
            return CudaExecutor(self._launch(buffers.net_in.device), lowered, buffers, noise)
        return NativeExecutor(module, lowered, buffers, noise)

    def normal(
        self, seeds: Tensor, draw: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None
    ) -> Tensor:
        """``fastode.noise.normal``, equal to rounding: [B, *shape] on ``device`` for ``seeds`` int64 [B]."""
        where = torch.device("cpu") if device is None else device
        module = self._present(where)
        if where.type == "cuda":
            return normal(self._launch(where), seeds, draw, shape, dtype, where)
        keys = seeds.contiguous()
        z = torch.empty(len(keys), *shape, dtype=dtype)
        module.normal(
            keys.data_ptr(), len(keys), draw, z[0].numel(), DTYPES[dtype], z.data_ptr(), torch.get_num_threads()
        )
        return z

    def _present(self, device: torch.device) -> ModuleType:
        reason = self.missing(device)
        if reason is not None:
            raise ValueError(f"backend: 'native' cannot run on {device}: {reason}")
        assert self._module is not None
        return self._module

    def _launch(self, device: torch.device) -> Callable[[Arguments, int], None]:
        """Launches on torch's current stream of ``device``."""
        launch = self._present(device).launch

        def on_current_stream(arguments: Arguments, vector: int) -> None:
            with torch.cuda.device(device):
                launch(ctypes.addressof(arguments), vector, torch.cuda.current_stream(device).cuda_stream)

        return on_current_stream


def not_built(error: ImportError) -> str:
    """Why there is no compiled module, from the report its build left behind."""
    report = Path(__file__).parents[1] / "_native_build.json"
    try:
        reason = json.loads(report.read_text(encoding="utf-8"))["reason"]
    except (OSError, ValueError, KeyError):
        reason = None
    return f"the native module was not built: {reason}" if reason else f"the native module cannot be loaded: {error}"


def _plan(update: Update, module: ModuleType) -> tuple[int, bool, tuple[int, ...]] | None:
    """(number of network outputs read, whether the start is, draws) of an update within the limits, else None."""
    outputs = [s.index for s in update.sources if s.kind == "output"]
    tensors = [s for s in update.sources if s.kind != "one"]
    if len(tensors) > module.MAX_INPUTS or len(update.targets) > module.MAX_OUTPUTS or outputs not in ([], [0], [0, 1]):
        return None
    draws = tuple(s.index for s in update.sources if s.kind == "noise")
    return len(outputs), any(s.kind == "start" for s in update.sources), draws


def _pack(
    rows: list[list[Any]], shape: Sequence[int]
) -> tuple[list[float], list[int], list[tuple[int, int, list[float]]]]:
    """Weights [B or 1][rows][columns] in one list, per row a bit mask of its columns, and what is per element."""
    batch, elements = shape[0], []
    used = [sum(1 << k for k, c in enumerate(row) if isinstance(c, Tensor) or c != 0) for row in rows]
    numbers: list[list[Any]] = [[0.0 if isinstance(c, Tensor) else c for c in row] for row in rows]
    samples = 1
    for j, row in enumerate(rows):
        for k, c in enumerate(row):
            if not isinstance(c, Tensor):
                continue
            if c.numel() == 1:
                numbers[j][k] = float(c)
            elif c.ndim == len(shape) and c.numel() == c.shape[0] == batch:
                numbers[j][k], samples = c.flatten().tolist(), batch
            else:
                elements.append((j, k, c.detach().expand(shape[1:]).flatten().tolist()))
    flat = [c[b] if isinstance(c, list) else c for b in range(samples) for row in numbers for c in row]
    return flat, used, elements


def _per_sample_and_element(c: Any, shape: Sequence[int]) -> bool:
    return isinstance(c, Tensor) and c.ndim == len(shape) and c.shape[0] == shape[0] > 1 and c.numel() > shape[0]


def _describe(x: Tensor) -> tuple[int, int, list[int]]:
    return x.data_ptr(), DTYPES[x.dtype], [] if x.is_contiguous() else list(x.stride())
