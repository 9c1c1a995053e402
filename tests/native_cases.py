"""What the tests of the compiled CPU backend share; importing it skips them where there is no compiler."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastode.backends import BACKENDS, native
from fastode.backends.base import Buffers
from fastode.backends.torch import TorchExecutor
from fastode.program.lower import Lowered, Source, Target, Update

BACKEND = BACKENDS["native"]
_WHY = BACKEND.missing(torch.device("cpu"))
_TOOLS = any(map(shutil.which, ("c++", "g++", "clang++"))) and not any(t in (_WHY or "") for t in ("not found", "=0"))
if _WHY is not None and not _TOOLS:
    pytest.skip(f"no compiler: {_WHY}", allow_module_level=True)
assert _WHY is None, f"there is a compiler, but {_WHY}"

from fastode import _native as module  # noqa: E402

# One update: both add the same products, in another order and with or without fused multiply-add. Up to 7 terms of size
# 10, so some 7 roundings of 10 * 6e-8 (1e-16 in float64).
SINGLE = {"rtol": 5e-6, "atol": 5e-6}
DOUBLE = {"rtol": 1e-14, "atol": 1e-14}


def over_a_run(x: Tensor) -> dict[str, float]:
    """Tolerance of a run from ``x``: eight roundings of its largest number, since later states are smaller, networks
    here contract, and a solver's weights of opposite sign add up to a few times the state."""
    return {"rtol": 0.0, "atol": 8 * torch.finfo(x.dtype).eps * float(x.abs().max())}


class Given:
    """Draws as a backend gets them: from seeds, or as tensors."""

    def __init__(self, seeds: Tensor | None = None, tensors: Sequence[Tensor] = ()) -> None:
        self.seeds, self.tensors = seeds, tensors

    def __call__(self, index: int) -> Tensor:
        return self.tensors[index]


@pytest.fixture(params=["avx512", "avx2", "baseline"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this CPU has; a CPU without one cannot run its code at all."""
    before = module.cpu_isa()
    if not module.set_cpu_isa(request.param):
        pytest.skip(f"this CPU has no {request.param}")
    yield request.param
    module.set_cpu_isa(before)


def lowered_of(*updates: Update, slots: int = 0) -> Lowered:
    n = len(updates)
    return Lowered(SimpleNamespace(made={}), updates, (), slots, {}, ((),) * n, (0,) * n)  # type: ignore[arg-type]


def run_both(
    update: Update,
    shape: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    net: torch.dtype | None = None,
    outputs: Callable[[Tensor], Sequence[Tensor]] | None = None,
    begin: Callable[[Tensor], Tensor] = lambda x: x,
    draws: Given | None = None,
    make: Callable[..., Any] = lambda *a: native.NativeExecutor(module, *a),
) -> list[list[Tensor]]:
    """Buffers, result and verdict after one update by torch and by the executor of ``make``, from equal memory."""
    out = []
    slots = 1 + max((s.index for s in (*update.sources, *update.targets) if s.kind == "slot"), default=0)
    for executor_of in (TorchExecutor, make):
        g = torch.Generator().manual_seed(1)
        buffers = Buffers(
            torch.randn((slots, *shape), generator=g, dtype=torch.float64).to(dtype),
            torch.randn(shape, generator=g, dtype=torch.float64).to(net or dtype),
        )
        x = begin(torch.randn(shape, generator=g, dtype=torch.float64).to(dtype))
        raw = [torch.randn(shape, generator=g, dtype=torch.float64).to(net or dtype) for _ in range(2)]
        read = 1 + max((s.index for s in update.sources if s.kind == "output"), default=-1)
        raw = list(outputs(buffers.net_in)) if outputs else raw[:read]
        result = torch.full(shape, math.nan, dtype=dtype)
        executor = executor_of(lowered_of(update, slots=slots), buffers, draws or Given())
        executor.load({})
        finite = executor.update(0, x, raw, result)
        out.append([buffers.slots, buffers.net_in, result, torch.tensor(bool(finite))])
    return out


def assert_same(update: Update, shape: tuple[int, ...], **kwargs: Any) -> None:
    tolerance = kwargs.pop("tolerance", DOUBLE if kwargs.get("dtype") == torch.float64 else SINGLE)
    for expected, found in zip(*run_both(update, shape, **kwargs), strict=True):
        torch.testing.assert_close(found, expected, equal_nan=True, **tolerance)


KINDS = [("slot", 0), ("slot", 1), ("start",), ("input",), ("output", 0), ("output", 1), ("one",)]
ALL = tuple(Source(*kind) for kind in KINDS)


def mixed(n_in: int = 6, n_out: int = 3) -> Update:
    """Rows over every kind of column, written over some of them."""
    targets = (Target("slot", 0), Target("input"), Target("result"), Target("slot", 2))[:n_out]
    sources = ALL[-1 - n_in :]
    rows = [tuple(0.0 if (j + k) % 4 == 3 else math.cos(3 * j + k) for k in range(len(sources))) for j in range(n_out)]
    return Update(sources, targets, tuple(rows))
