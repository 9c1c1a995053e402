"""csrc/combine.cuh without a GPU: its code run on the host, thread by thread, and what nvcc makes of it."""

from __future__ import annotations

import ctypes
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastode import SOLVERS, Denoiser, Engine
from fastode.backends import BACKENDS, cuda, native, nvrtc
from fastode.backends.base import Buffers
from fastode.noise import normal
from fastode.program.lower import Source, Target, Update
from fastode.scalar import Late
from tests.conftest import VARIANTS, make_grid, start, variant_id
from tests.native_cases import DOUBLE, SINGLE, Given, assert_same, lowered_of, mixed, module, over_a_run

CSRC = Path(__file__).parents[1] / "csrc"
WIDTHS: set[int] = set()  # elements per thread in the launches so far


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The kernel's code as a host function: a few threads, so that each makes several rounds, and two rows of them."""
    library = tmp_path_factory.mktemp("kernel") / "host_kernel.so"
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    source = Path(__file__).with_name("host_kernel.cpp")
    command = [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", f"-I{CSRC}", str(source), "-o", str(library)]
    subprocess.run(command, check=True, capture_output=True)
    host = ctypes.CDLL(str(library))
    sizes = (ctypes.c_int64 * 2)()
    host.sizes(sizes)
    assert tuple(sizes) == module.SIZES == (ctypes.sizeof(cuda.Operand), ctypes.sizeof(cuda.Arguments))

    def run(arguments: cuda.Arguments, vector: int) -> None:
        WIDTHS.add(vector)
        assert host.run(ctypes.byref(arguments), vector, ctypes.c_int64(7), ctypes.c_int64(2)) == 0

    return run


@pytest.fixture
def host(launch: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend that runs it."""

    class Host:
        name = "host"

        def missing(self, device: torch.device) -> None:
            return None

        def bind(self, *args: Any) -> cuda.CudaExecutor:
            return cuda.CudaExecutor(launch, *args)

    monkeypatch.setitem(BACKENDS, "host", Host())
    return "host"


def network(x: Tensor, sigma: Tensor) -> Tensor:
    return torch.tanh(x / (1 + sigma)) * 0.7 + 0.1


@pytest.mark.parametrize("case", VARIANTS, ids=variant_id)
def test_every_solver(host: str, case: tuple[str, dict]) -> None:
    program, shape = SOLVERS[case[0]](make_grid("edm", 6), **case[1]), (2, 3, 3, 5)
    for dtype in (torch.float32, torch.float64):
        x = start(program.grid, shape, dtype=dtype)
        expected = Engine(program, network, shape, "torch", dtype=dtype)(x, seeds=[7, -3])
        found = Engine(program, network, shape, host, dtype=dtype)(x, seeds=[7, -3])
        torch.testing.assert_close(found, expected, **over_a_run(x))


@pytest.mark.parametrize("elements", [1, 2, 3, 4, 7, 8, 16, 31, 33, 100, 257])
@pytest.mark.parametrize("net", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_sizes_and_types(launch: Any, elements: int, net: torch.dtype) -> None:
    eps = torch.finfo(net).eps if net in (torch.bfloat16, torch.float16) else 0.0  # sums may round to neighbours
    for state in (torch.float32, torch.float64):
        tight = SINGLE if torch.float32 in (state, net) else DOUBLE
        tolerance = {"rtol": max(tight["rtol"], eps), "atol": max(tight["atol"], eps)}
        for n_in, n_out in ((6, 4), (3, 2), (1, 1)):
            make = lambda *a: cuda.CudaExecutor(launch, *a)  # noqa: E731
            assert_same(mixed(n_in, n_out), (3, elements), dtype=state, net=net, make=make, tolerance=tolerance)


def test_vectors_were_used() -> None:
    assert {1, 2, 4, 8} == WIDTHS, "the tests above reach every kernel"


@pytest.mark.parametrize("net", [torch.bfloat16, torch.float16])
def test_conversions_are_torchs(launch: Any, net: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(net).reshape(1, -1)
    between = torch.linspace(-3, 3, 65536).exp().reshape(1, -1) * torch.tensor([[1.0, -1.0]]).repeat(1, 32768)
    for values, source, target in ((every, "output", "result"), (between, "start", "input")):
        update = Update((Source(source),), (Target(target),), ((1.0,),))
        buffers = Buffers(torch.zeros(1, 1, 65536), torch.zeros(1, 65536, dtype=net))
        executor = cuda.CudaExecutor(launch, lowered_of(update), buffers, Given())
        executor.load({})
        result = torch.empty(1, 65536)
        executor.update(0, values if source == "start" else result, (values,), result)
        found, expected = (result, values.float()) if target == "result" else (buffers.net_in, values.to(net))
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num(7.0, 8.0, 9.0), expected.nan_to_num(7.0, 8.0, 9.0))


def test_other_orders_and_aliases(launch: Any) -> None:
    make = lambda *a: cuda.CudaExecutor(launch, *a)  # noqa: E731
    shape = (3, 4, 6, 8)
    for outputs in (
        lambda x: (
            [torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(memory_format=torch.channels_last)] * 2
        ),
        lambda x: [x, x[:, :1].expand(shape)],
        lambda x: [x.flip(1), torch.ones(()).expand(shape)],
    ):
        turned = lambda x: x.transpose(1, 3).contiguous().transpose(1, 3)  # noqa: E731
        assert_same(mixed(), shape, outputs=outputs, begin=turned, make=make)


@pytest.mark.parametrize("sample", [(5,), (16,), (2, 3, 8)])
def test_weights_per_sample_and_per_element(launch: Any, sample: tuple[int, ...]) -> None:
    w, shape = Late("w"), (3, *sample)
    per_element = torch.randn(sample, dtype=torch.float64)
    update = Update(
        (Source("slot", 0), Source("output"), Source("one")),
        (Target("slot", 0), Target("input")),
        ((w, 0.5, per_element), (0.0, per_element, 1 - w)),
    )
    for value in (0.75, torch.randn(3, *[1] * len(sample), dtype=torch.float64)):
        found = []
        for make in (lambda *a: native.NativeExecutor(module, *a), lambda *a: cuda.CudaExecutor(launch, *a)):
            buffers = Buffers(torch.ones(1, *shape), torch.zeros(shape))
            executor = make(lowered_of(update, slots=1), buffers, Given())
            executor.load({w: 0.1})
            executor.load({w: value})
            executor.update(0, buffers.net_in, (torch.full(shape, 2.0),), torch.empty(shape))
            found.append((buffers.slots, buffers.net_in))
        torch.testing.assert_close(found[1], found[0], **SINGLE)


def test_guidance_and_noise(host: str) -> None:
    def labelled(x: Tensor, c: Tensor, class_labels: Tensor) -> Tensor:
        return torch.tanh(x) * (class_labels.reshape(-1, 1, 1, 1) + 1) / 4

    d, shape = Denoiser(labelled, "edm", num_classes=3, null_label=3), (3, 2, 5, 5)
    program = SOLVERS["ddim"](make_grid("edm", 5), eta=1.0)
    for scale in (3.0, [1.0, 2.5, 0.0]):
        kwargs: dict[str, Any] = {"class_labels": [0, 1, 2], "guidance_scale": scale, "seeds": [7, 8, 2**40]}
        found = [Engine(program, d, shape, b, guidance=True)(**kwargs) for b in ("torch", host)]
        torch.testing.assert_close(found[1], found[0], **over_a_run(torch.tensor([300.0])))


@pytest.mark.parametrize("sample", [(1,), (3,), (4,), (8,), (5, 5), (64,), (131,)])
def test_noise_equals_the_definition(launch: Any, sample: tuple[int, ...]) -> None:
    """In float32 the logarithm and the angle are float32 too: 3 ulp of a number below 7, and of 2 pi."""
    seeds = torch.tensor([0, -1, 2**62 + 5])
    for dtype, atol in ((torch.float32, 3e-6), (torch.float64, 1e-14)):
        found = cuda.normal(launch, seeds, 3, sample, dtype, torch.device("cpu"))
        torch.testing.assert_close(found, normal(seeds, 3, sample, dtype=dtype), rtol=0, atol=atol)


def test_beyond_the_limits(launch: Any) -> None:
    nine = tuple(Source("slot", i) for i in range(9))
    row = tuple(0.1 * i - 0.3 for i in range(9))
    make = lambda *a: cuda.CudaExecutor(launch, *a)  # noqa: E731
    assert_same(Update(nine, (Target("slot", 3),), (row,)), (2, 50), make=make)


def test_a_column_that_a_row_does_not_read(launch: Any) -> None:
    update = Update(
        (Source("slot", 0), Source("output")), (Target("slot", 0), Target("input")), ((0.0, 1.0), (1.0, 0.0))
    )
    buffers = Buffers(torch.full((1, 1, 100), 2.0), torch.empty(1, 100))
    executor = cuda.CudaExecutor(launch, lowered_of(update, slots=1), buffers, Given())
    executor.load({})
    executor.update(0, buffers.net_in, (torch.full((1, 100), math.inf),), buffers.net_in)
    assert (buffers.net_in == 2).all() and (buffers.slots == math.inf).all()


def test_grid_and_names() -> None:
    a = cuda.Arguments(batch=70000, sample=1000, state=0, n_in=5)
    assert cuda.grid(a, 4, 132) == (8 * 132, 1) and cuda.kernel_name(a, 4) == "fastode_f32_4_8"
    a.noise = 1
    assert cuda.grid(a, 1, 132) == (1, 65535) and cuda.kernel_name(a, 1) == "fastode_f32_1_8"
    assert "FASTODE_KERNEL(fastode_f64_2_4, double, 2, 4)" in nvrtc.source("fastode_f64_2_4")
    assert nvrtc.by_value(a).shape == (1,) and nvrtc.by_value(a).nbytes == ctypes.sizeof(a)
    assert nvrtc.NvrtcBackend().missing(torch.device("cpu")) == "it runs on CUDA devices"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_compiled_by_nvcc(tmp_path: Path) -> None:
    """For sm_80 and sm_90: nothing spilled, at most 128 registers (two blocks of 256 threads per processor), 128-bit
    accesses in every kernel that takes vectors."""
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in (80, 90)]
    flags = ["nvcc", "-std=c++17", "-O3", "-Xptxas", "-v", "--threads", "2", "--keep", "--keep-dir", str(tmp_path)]
    command = [*flags, *targets, "-c", str(CSRC / "combine_cuda.cu"), "-o", str(tmp_path / "combine.o")]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    log = done.stdout + done.stderr
    names = re.findall(r"Compiling entry function '(\w+)' for '(sm_\d+)'", log)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    assert len(names) == len(registers) == 16
    assert max(registers) <= 128, dict(zip(names, registers, strict=True))
    assert set(re.findall(r"(\d+) bytes spill", log)) == {"0"} and set(re.findall(r"(\d+) bytes stack", log)) == {"0"}
    ptx = next(tmp_path.glob("combine_cuda*compute_90*.ptx")).read_text()
    for body in re.split(r"\.visible \.entry ", ptx)[1:]:
        width = int(re.match(r"fastode_f\d+_(\d)", body)[1])  # type: ignore[index]
        assert (width > 1) == ("ld.global.v4" in body) == ("st.global.v4" in body)
