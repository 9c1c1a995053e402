"""One update by the compiled CPU backend: sizes, types, orders of memory, aliasing, NaN."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastode
from fastode import SOLVERS, Engine
from fastode.backends import native
from fastode.backends.base import Buffers
from fastode.engine import NonFiniteError
from fastode.program.lower import Source, Target, Update
from tests import native_cases
from tests.conftest import make_grid, start
from tests.native_cases import DOUBLE, SINGLE, Given, assert_same, lowered_of, mixed, module, over_a_run

isa = native_cases.isa

# -- one update ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("elements", [1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 511, 512, 513, 1000, 70001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["single", "double"])
def test_sizes_and_tails(isa: str, elements: int, dtype: torch.dtype) -> None:
    for batch, net in ((1, dtype), (3, dtype), (2, torch.float16)):
        assert_same(mixed(), (batch, elements), dtype=dtype, net=net, tolerance=net_tolerance(net, dtype))


@pytest.mark.parametrize("n_out", [1, 2, 3, 4])
@pytest.mark.parametrize("n_in", [0, 1, 2, 3, 4, 5, 6])
def test_any_number_of_tensors(isa: str, n_in: int, n_out: int) -> None:
    assert_same(mixed(n_in, n_out), (2, 150), dtype=torch.float64)


def net_tolerance(net: torch.dtype, state: torch.dtype) -> dict[str, float]:
    """Sums that differ in their last bit may round to neighbours in a narrow network input."""
    tight = DOUBLE if state == torch.float64 else SINGLE
    eps = torch.finfo(net).eps if net in (torch.float16, torch.bfloat16) else 0.0
    return {"rtol": max(tight["rtol"], eps), "atol": max(tight["atol"], eps)}


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_conversions_are_torchs(isa: str, half: torch.dtype) -> None:
    """Bit for bit: every 16-bit number read; ties, subnormals, overflow, infinity and NaN written."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(half).reshape(1, -1)
    top = every.float().nan_to_num(0, 65504, -65504).double()
    half_step = torch.finfo(half).eps / 2
    neighbours = torch.cat([top, top * (1 + half_step), top * (1 + half_step * 1.0001)], dim=1).float()
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, 65519.0, 65520.0, 3.4e38, 1e-45, 2.0**-25, 2.001**-25, 5.96e-8]
    for values in (every, every[:, :11], torch.cat([neighbours, torch.tensor([special])], 1), torch.tensor([special])):
        shape = tuple(values.shape)
        read = Update((Source("output"),), (Target("result"),), ((1.0,),))
        write = Update((Source("start"),), (Target("input"),), ((1.0,),))
        buffers = Buffers(torch.zeros(1, *shape), torch.zeros(shape, dtype=half))
        executor = native.NativeExecutor(module, lowered_of(read, write), buffers, Given())
        executor.load({})
        result = torch.empty(shape)
        if values.dtype == half:
            executor.update(0, result, (values,), result)
            expected = values.float()
            assert torch.equal(result.isnan(), expected.isnan())
            assert torch.equal(result.nan_to_num(7.0), expected.nan_to_num(7.0))
        else:
            executor.update(1, values, (), result)
            expected = values.to(half)
            assert torch.equal(buffers.net_in.isnan(), expected.isnan())
            assert torch.equal(buffers.net_in.nan_to_num(7.0, 8.0, 9.0), expected.nan_to_num(7.0, 8.0, 9.0))


ORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "rows": lambda x: torch.stack([x, x], 3).flatten(3, 4)[..., ::2],
    "part": lambda x: torch.nn.functional.pad(x, (1, 2, 3, 1))[..., 3:-1, 1:-2],
    "expanded": lambda x: x[:, :1, :, :1].expand(x.shape),
    "one number": lambda x: x.flatten()[0].expand(x.shape),
    "flipped batch": lambda x: x.flip(0).movedim(0, 1).contiguous().movedim(0, 1),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("net", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_in_another_order(order: str, net: torch.dtype) -> None:
    g = torch.Generator().manual_seed(3)
    shape = (3, 5, 7, 30)
    values = [ORDERS[order](torch.randn(shape, generator=g).to(net)) for _ in range(2)]
    assert not values[0].is_contiguous()
    assert_same(
        mixed(),
        shape,
        net=net,
        outputs=lambda _: values,
        begin=ORDERS[order],
        tolerance=net_tolerance(net, torch.float32),
    )


def test_network_input_in_another_order() -> None:
    shape = (2, 3, 8, 9)
    buffers = Buffers(torch.randn(1, *shape), torch.empty(shape, memory_format=torch.channels_last))
    update = Update((Source("start"),), (Target("input"), Target("slot", 0)), ((2.0,), (3.0,)))
    again = Update((Source("input"), Source("slot", 0)), (Target("result"), Target("input")), ((1.0, 1.0), (1.0, 0.0)))
    executor = native.NativeExecutor(module, lowered_of(update, again), buffers, Given())
    executor.load({})
    x, result = torch.randn(shape), torch.empty(shape)
    executor.update(0, x, (), result)
    executor.update(1, x, (), result)
    assert torch.equal(buffers.net_in, 2 * x)
    torch.testing.assert_close(result, 5 * x)


@pytest.mark.parametrize(
    "view",
    [lambda x: x, lambda x: x.transpose(2, 3), lambda x: x.flip(3), lambda x: x[:, :1].expand(x.shape)],
    ids=["itself", "turned", "copy", "part"],
)
def test_a_network_that_returns_its_input(view: Callable[[Tensor], Tensor]) -> None:
    """Also rearranged: the update must not read what it has just overwritten."""
    update = Update((Source("input"), Source("output")), (Target("input"), Target("result")), ((0.5, 2.0), (1.0, -1.0)))
    assert_same(update, (2, 3, 40, 40), outputs=lambda net_in: [view(net_in)])
    engines = [
        Engine(SOLVERS["heun"](make_grid("edm", 4)), lambda x, s: view(x), (2, 3, 8, 8), b) for b in ("torch", "native")
    ]
    x = start(engines[0].program.grid, (2, 3, 8, 8), dtype=torch.float32)
    torch.testing.assert_close(engines[1](x), engines[0](x), **over_a_run(x))


def test_a_start_that_is_the_result() -> None:
    x = torch.randn(2, 301)
    before = x.clone()
    buffers = Buffers(torch.empty(0, 2, 301), torch.empty(2, 301))
    update = Update((Source("start"),), (Target("input"), Target("result")), ((3.0,), (2.0,)))
    executor = native.NativeExecutor(module, lowered_of(update), buffers, Given())
    executor.load({})
    executor.update(0, x, (), x)
    assert torch.equal(x, 2 * before) and torch.equal(buffers.net_in, 3 * before)


@pytest.mark.parametrize("sample", [(3,), (2, 9, 8), (2, 40, 17)])
def test_weights_per_sample_and_per_element(isa: str, sample: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(5)
    shape = (3, *sample)
    per_sample = torch.randn(3, *[1] * len(sample), generator=g, dtype=torch.float64)
    per_element = torch.randn(sample, generator=g, dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        for a, b in ((per_sample, 0.25), (per_element, 0.25), (per_element, per_sample)):
            sources = (Source("slot", 0), Source("output"), Source("one"))
            rows = ((a, 0.5, b), (0.0, b, a))
            assert_same(Update(sources, (Target("slot", 0), Target("input")), rows), shape, dtype=dtype)


def test_beyond_the_limits() -> None:
    """Nine tensors, or five results, are left to torch, with the same answer."""
    nine = tuple(Source("slot", i) for i in range(9))
    row = tuple(0.1 * i - 0.3 for i in range(9))
    assert_same(Update(nine, (Target("slot", 3), Target("input")), (row, row[::-1])), (2, 50))
    five = tuple(Target("slot", i) for i in range(5))
    assert_same(Update(nine[:2], five, tuple((0.5 * i, 1.0) for i in range(5))), (2, 50))


def test_a_column_that_a_row_does_not_read() -> None:
    """Weight 0 means not read: infinity elsewhere must not become NaN here."""
    update = Update(
        (Source("slot", 0), Source("output")), (Target("slot", 0), Target("input")), ((0.0, 1.0), (1.0, 0.0))
    )
    buffers = Buffers(torch.full((1, 1, 100), 2.0), torch.empty(1, 100))
    executor = native.NativeExecutor(module, lowered_of(update, slots=1), buffers, Given())
    executor.load({})
    executor.update(0, buffers.net_in, (torch.full((1, 100), math.inf),), buffers.net_in)
    assert (buffers.net_in == 2).all() and (buffers.slots == math.inf).all()


# -- NaN and infinity ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_non_finite_outputs_are_seen(isa: str, net: torch.dtype) -> None:
    """Wherever they are; and nothing else is taken for one, not even garbage behind the tail."""
    for elements in (1, 5, 16, 64, 100, 513):
        update = Update(
            (Source("slot", 0), Source("output")), (Target("slot", 0), Target("input")), ((1.0, 1e-3), (0.5, 0.0))
        )
        dtype = torch.float64 if net == torch.float64 else torch.float32
        buffers = Buffers(torch.zeros(1, 1, elements, dtype=dtype), torch.empty(1, elements, dtype=net))
        executor = native.NativeExecutor(module, lowered_of(update, slots=1), buffers, Given())
        executor.load({})
        output, result = torch.zeros(1, elements, dtype=net), torch.empty(1, elements, dtype=dtype)
        for extreme in (torch.finfo(net).max, torch.finfo(net).tiny, -torch.finfo(net).max):
            assert executor.update(0, result, (output.fill_(extreme),), result)
        output.zero_()
        for at in {0, elements // 2, elements - 1}:
            for value in (math.nan, math.inf, -math.inf):
                output[0, at] = value
                assert not executor.update(0, result, (output,), result), (elements, at, value)
                buffers.slots.zero_()
            output[0, at] = 0
        assert executor.update(0, result, (output,), result)


def test_the_engine_names_the_stage() -> None:
    for shape in ((1, 3), (2, 3, 200, 200)):
        network = lambda x, s: x / (s > 1).float()  # noqa: E731
        engine = Engine(SOLVERS["ddim"](fastode.Grid([3.0, 2.0, 1.0, 0.5])), network, shape, "native")
        with pytest.raises(NonFiniteError, match=r"stage 2 \(step 2, sigma 1\)"):
            engine(torch.ones(shape))
        quiet = Engine(engine.program, network, shape, "native", check_finite=False)
        assert not quiet(torch.ones(shape)).isfinite().all()


def test_non_finite_in_every_output() -> None:
    """Guidance: both columns are looked at; so is an output that the update does not read."""
    good, bad = torch.zeros(2, 30), torch.full((2, 30), math.nan)
    buffers = Buffers(torch.zeros(1, 2, 30), torch.zeros(2, 30))
    two = Update((Source("output", 0), Source("output", 1)), (Target("result"),), ((1.0, 2.0),))
    one = Update((Source("output", 0),), (Target("result"),), ((1.0,),))
    none = Update((Source("slot", 0),), (Target("result"),), ((1.0,),))
    executor = native.NativeExecutor(module, lowered_of(two, one, none), buffers, Given())
    executor.load({})
    for index in range(3):
        assert executor.update(index, good, (good, good), torch.empty(2, 30))
        assert not executor.update(index, good, (good, bad), torch.empty(2, 30))
        assert not executor.update(index, good, (bad, good), torch.empty(2, 30))
