"""The Triton kernel compiled for sm_80 and sm_90, which needs no GPU: 128-bit accesses, no spills, no shared memory.

``python -m tests.test_triton_compile`` records what ptxas says of each kernel: benchmarks/results/triton_compile.json.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

import fastode.kernels.combine as kernels  # noqa: E402
import fastode.kernels.mean_direction as mean_direction  # noqa: E402
from fastode import SOLVERS, Denoiser, Guidance  # noqa: E402
from fastode.backends.base import Buffers  # noqa: E402
from fastode.backends.triton import TritonExecutor  # noqa: E402
from fastode.denoisers.guidance import GUIDANCE_SCALE  # noqa: E402
from fastode.kernels.combine import LANES, combine_kernel  # noqa: E402
from fastode.nets.predictor import AMEDPredictor  # noqa: E402
from fastode.program.lower import lower  # noqa: E402
from tests.conftest import make_grid  # noqa: E402

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "triton_compile.json"


class Case(NamedTuple):
    """One specialisation: dtypes of the tensors read and written, and the options of the kernel."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    options: dict[str, Any] = {}  # noqa: RUF012  (never written to)
    state: str = "fp32"
    warps: int = 4
    aligned: bool = True


F, H, B = "fp32", "fp16", "bf16"
ONES = ("blocks", "minor", "stride", "n", "major", "field_size")
CASES: dict[str, Case] = {
    "start from seeds": Case((), (F,), {"NOISE": 1}),
    "first input": Case((F,), (F,)),
    "ddim": Case((F, F), (F,)),
    "ddim bf16": Case((F, B), (F, B)),
    "ddim fp16 guided": Case((F, H, H), (F, H)),
    "dpm_solver_pp": Case((F, F, F), (F, F)),
    "dpm_solver_pp bf16": Case((F, F, B), (F, F, B)),
    "unipc": Case((F, F, F, F, F, F), (F, F, F)),
    "unipc bf16": Case((F, F, F, F, F, B), (F, F, F, B)),
    "largest": Case((F,) * 8, (F,) * 4),
    "largest bf16": Case((F, F, F, F, F, B, B, B), (F, F, F, B)),
    "largest, one warp": Case((F,) * 8, (F,) * 4, warps=1),
    "per element": Case((F, F), (F,), {"ELEMENTS": (0, 1)}),
    "noise": Case((F, F), (F,), {"NOISE": 1}),
    "noise bf16": Case((F, B), (F, B), {"NOISE": 1}),
    "two draws and a constant": Case((F, F), (F, F), {"NOISE": 2, "ONE": 1}),
    "largest with noise": Case((F,) * 8, (F,) * 4, {"NOISE": 1}),
    "64-bit offsets": Case((F, F, B), (F, B), {"WIDE": True}),
    "64-bit offsets with noise": Case((F, F, B), (F, B), {"WIDE": True, "NOISE": 1}),
    "padded outputs": Case((F, F, B), (F, B), {"STRIDED": 4}),
    "noise, channels last": Case((F, F), (F,), {"NOISE": 1, "GATHER": True}),
    "float64": Case(("fp64", "fp64"), ("fp64",), state="fp64"),
}
OTHERS: dict[str, Case] = {
    "mixed formats": Case((F, B), (F, B), {"SWAPPED": 10, "BARRIER": True}),
    "odd size": Case((F, F, B), (F, B), {"BARRIER": True}, aligned=False),
    # Triton compiles integers that are 1 as constants.
    "one element": Case((F, B), (F, B), {"NOISE": 1, "BARRIER": True} | dict.fromkeys(ONES, 1), aligned=False),
    "one pixel": Case((F, B), (F, B), {"SWAPPED": 2, "GATHER": True, "NOISE": 1} | dict.fromkeys(ONES[:3], 1)),
}
"""Correct, but not in 128-bit accesses."""


@cache
def facts(name: str, arch: int) -> dict[str, Any]:
    """Registers, spilled bytes, stack and shared memory, and the global accesses in the PTX."""
    case = {**CASES, **OTHERS}[name]
    compiled = triton.compile(_source(case), target=GPUTarget("cuda", arch, 32), options={"num_warps": case.warps})
    ptx = compiled.asm["ptx"]
    said = _ptxas(ptx, re.search(r"\.target (\w+)", ptx)[1])
    return {
        "registers": int(re.search(r"Used (\d+) registers", said)[1]),
        "spill_stores": int(re.search(r"(\d+) bytes spill stores", said)[1]),
        "spill_loads": int(re.search(r"(\d+) bytes spill loads", said)[1]),
        "stack": int(re.search(r"(\d+) bytes stack frame", said)[1]),
        "shared": compiled.metadata.shared,
        "accesses": dict(sorted(Counter(re.findall(r"(?:ld|st)\.global\S*", ptx)).items())),
    }


def _source(case: Case) -> ASTSource:
    columns = len(case.sources) + case.options.get("NOISE", 0) + case.options.get("ONE", 0)
    entries = len(case.targets) * columns
    constants = {
        "STATE": {"fp32": tl.float32, "fp64": tl.float64}[case.state],
        "PATTERN": 2**entries - 1,
        "ELEMENTS": (0,) * entries,
        **dict.fromkeys(("NOISE", "ONE", "STRIDED", "SWAPPED"), 0),
        **dict.fromkeys(("GATHER", "WIDE", "BARRIER"), False),
        "BLOCK": case.warps * 32 * LANES,
        **case.options,
    }
    pointers = {"table": "*" + case.state, "fields": "*" + case.state, "seeds": "*i64"}
    signature: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    divisible = [["tt.divisibility", 16]]
    for i, name in enumerate(combine_kernel.arg_names):
        if name in ("sources", "targets"):
            dtypes = case.sources if name == "sources" else case.targets
            signature[name] = tuple("*" + d for d in dtypes)
            attributes |= {(i, k): divisible for k in range(len(dtypes)) if case.aligned}
        elif name in constants:
            signature[name] = "constexpr"
        else:
            signature[name] = pointers.get(name, "i64" if constants["WIDE"] and name in ("n", "stride") else "i32")
            if name in pointers or (case.aligned and name in ("n", "stride", "field_stride", "field_size")):
                attributes[(i,)] = divisible
    return ASTSource(combine_kernel, signature, constexprs=constants, attrs=attributes)


def _ptxas(ptx: str, target: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [triton.knobs.nvidia.ptxas.path, "-v", f"-arch={target}", path, "-o", Path(folder) / "kernel.cubin"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stderr + done.stdout


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", CASES)
def test_128_bit_accesses_and_no_spills(name: str, arch: int) -> None:
    case, found = CASES[name], facts(name, arch)
    accesses = Counter(found["accesses"])
    wide = 4 * (case.state == "fp32") or 2
    fields = sum(bool(e) for e in case.options.get("ELEMENTS", ()))
    state_reads = fields + sum(s == case.state for s in case.sources)
    state_writes = sum(t == case.state for t in case.targets)
    narrow_reads, narrow_writes = (sum(s in (B, H) for s in side) for side in (case.sources, case.targets))
    per_tensor = 4 // wide  # float64: two accesses of 128 bits for four elements
    bits = {"fp32": "b32", "fp64": "b64"}[case.state]
    assert accesses[f"ld.global.v{wide}.{bits}"] == state_reads * per_tensor
    assert accesses[f"st.global.v{wide}.{bits}"] == state_writes * per_tensor
    # Four elements of a 16-bit tensor are 64 bits per thread, 256 bytes per warp: whole sectors as well.
    assert (accesses["ld.global.v2.b32"], accesses["st.global.v2.b32"]) == (narrow_reads, narrow_writes)
    assert found["spill_stores"] == found["spill_loads"] == found["stack"] == 0
    assert case.state == "fp64" or found["shared"] == 0
    assert found["registers"] <= 64  # 1024 threads fit on a multiprocessor


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", OTHERS)
def test_the_other_layouts_do_not_spill(name: str, arch: int) -> None:
    found = facts(name, arch)
    assert found["spill_stores"] == found["spill_loads"] == found["stack"] == 0


def test_the_weights_are_loaded_before_anything_is_stored() -> None:
    ptx = triton.compile(_source(CASES["largest"]), target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    assert ptx.rindex("ld.global") < ptx.index("st.global")


def test_recorded() -> None:
    """The record names every kernel; other versions of Triton and ptxas may allocate other numbers of registers."""
    kernels = json.loads(RESULTS.read_text())["kernels"]
    assert set(kernels) == {f"{name} sm_{arch}" for name in {**CASES, **OTHERS} for arch in (80, 90)}
    assert all(k["spill_stores"] == 0 for k in kernels.values())


class NoDevice:
    """A driver that is enough to compile what a launch would run on an sm_90 device, with tensors on the CPU."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Any]]:
    """(programs, compiled kernel) of every launch; all is as on a device but for the launch itself."""
    made: list[tuple[int, Any]] = []

    class Compiling:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def compile_only(*args: Any, **kwargs: Any) -> None:
                made.append((grid[0], self.kernel.warmup(*args, grid=grid, **kwargs)))

            return compile_only

    build = mean_direction.build
    monkeypatch.setattr(triton.runtime.driver, "_active", NoDevice())
    monkeypatch.setattr(kernels, "combine_kernel", Compiling(combine_kernel))
    monkeypatch.setattr(mean_direction, "build", lambda structure: tuple(Compiling(k) for k in build(structure)))
    return made


@pytest.mark.parametrize("name", ["ddim", "dpm_solver_pp", "unipc"])
def test_one_launch_per_update_and_all_are_wide(name: str, launches: list[tuple[int, Any]]) -> None:
    """The executor of a guided bfloat16 network: halves of one output as two columns, a strength per sample."""
    denoiser = Denoiser(lambda x, c: x, num_classes=2, null_label=1)
    lowered = lower(
        SOLVERS[name](make_grid("edm", 3)),
        denoiser.scaling,
        lambda at: denoiser.columns(at, Guidance()),
        exact_input=False,
    )
    shape = (2, 4, 16, 16)
    slots, net_in = torch.zeros((lowered.slots, *shape)), torch.zeros(shape, dtype=torch.bfloat16)
    executor = TritonExecutor(lowered, Buffers(slots, net_in), SimpleNamespace(seeds=None))
    executor.load({GUIDANCE_SCALE: 2.0})
    halves = torch.zeros((4, *shape[1:]), dtype=torch.bfloat16).chunk(2)
    for i in range(len(lowered.updates)):
        executor.update(i, torch.zeros(shape), halves, torch.zeros(shape))
    assert len(launches) == len(lowered.updates) == 4
    for update, (_, kernel) in zip(lowered.updates, launches, strict=True):
        accesses = Counter(re.findall(r"(?:ld|st)\.global\S*", kernel.asm["ptx"]))
        assert accesses["ld.global.v4.b32"] == sum(s.kind in ("slot", "start") for s in update.sources)
        assert accesses["ld.global.v2.b32"] == sum(s.kind in ("input", "output") for s in update.sources)
        assert accesses["st.global.v4.b32"] == sum(t.kind != "input" for t in update.targets)
        assert accesses["st.global.v2.b32"] == sum(t.kind == "input" for t in update.targets)


@pytest.mark.parametrize(("fold", "count"), [(8, 6), (0, 8)])
def test_amed_takes_six_launches(fold: int, count: int, launches: list[tuple[int, Any]], monkeypatch: Any) -> None:
    """5 evaluations with the predictor folded into the updates; 8 launches where a sample is too large for that."""
    monkeypatch.setattr(mean_direction, "FOLD", fold)
    denoiser = Denoiser(lambda x, c, features=False: x)
    program = SOLVERS["amed"](make_grid("edm", 3), afs=True, predictor=AMEDPredictor(scale_time=0.2))
    lowered = lower(program, denoiser.scaling, lambda at: (1.0,), exact_input=False)
    shape = (4, 3, 32, 32)
    slots, net_in = torch.zeros((lowered.slots, *shape)), torch.zeros(shape, dtype=torch.bfloat16)
    executor = TritonExecutor(lowered, Buffers(slots, net_in), SimpleNamespace(seeds=None))
    assert executor.prepare([torch.zeros(4) for _ in lowered.calls])
    executor.load({})
    for i in range(len(lowered.updates)):
        if lowered.binds[i]:
            executor.make(i, {"bottleneck": torch.zeros((4, 256, 8, 8), dtype=torch.bfloat16)})
        executor.update(i, torch.zeros(shape), (torch.zeros_like(net_in),), torch.zeros(shape))
    assert program.nfe == 5 and len(launches) == count
    for _, kernel in launches:
        said = _ptxas(kernel.asm["ptx"], "sm_90a")
        assert "0 bytes spill stores, 0 bytes spill loads" in said
        assert int(re.search(r"Used (\d+) registers", said)[1]) <= 255


def test_beyond_two_to_the_31(launches: list[tuple[int, Any]]) -> None:
    """Offsets are 64-bit from 2^31 elements on, and accesses stay wide."""
    small, large = torch.empty((2, 2**20), device="meta"), torch.empty((3, 2**30), device="meta")
    for x in (small, large):
        kernels.combine([x], [x], torch.ones(1), pattern=1)
    (_, narrow), (programs, wide) = launches
    assert programs == 3 * 2**30 // (4 * 32 * LANES)
    assert "xi64>" in wide.asm["ttir"] and "xi64>" not in narrow.asm["ttir"]  # tensors of offsets
    assert "ld.global.v4.b32" in wide.asm["ptx"] and "st.global.v4.b32" in wide.asm["ptx"]


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (2, 3, 5), (2, 1, 8, 8), (2, 4, 1, 1)])
def test_sizes_that_are_constants_compile(shape: tuple[int, ...], launches: list[tuple[int, Any]]) -> None:
    x, seeds = torch.zeros(shape), torch.zeros(shape[0], dtype=torch.int64)
    kernels.combine([x], [x], torch.ones(1), pattern=1)
    kernels.combine([x], [x], torch.ones(3), pattern=3, draws=1, seeds=seeds)
    kernels.combine([x], [], torch.ones(2), pattern=1, draws=1, seeds=seeds)
    assert len(launches) == 3


if __name__ == "__main__":
    version = re.search(
        r"release (\S+),", subprocess.check_output([triton.knobs.nvidia.ptxas.path, "--version"], text=True)
    )
    record = {
        "what": "facts of compilation, found without a GPU; one thread handles 4 elements of every tensor",
        "triton": triton.__version__,
        "ptxas": version[1] if version else "unknown",
        "kernels": {f"{name} sm_{arch}": facts(name, arch) for name in {**CASES, **OTHERS} for arch in (80, 90)},
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    for kernel, found in record["kernels"].items():
        sys.stdout.write(f"{kernel:32} {found['registers']:3} registers, {found['stack']} stack, {found['accesses']}\n")
