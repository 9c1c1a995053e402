"""The compiled CPU backend against the torch executor and the definition, at the edges where such code goes wrong."""

from __future__ import annotations

import json
import math
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import fastode
from fastode import SOLVERS, Denoiser, Engine
from fastode.backends import native
from fastode.backends.base import Buffers
from fastode.noise import normal, philox
from fastode.program.lower import Source, Target, Update
from tests import native_cases
from tests.conftest import VARIANTS, make_grid, start, variant_id
from tests.native_cases import BACKEND, Given, lowered_of, module, over_a_run

isa = native_cases.isa

# -- whole runs ------------------------------------------------------------------------------------------------------


def denoiser_of(x: Tensor, sigma: Tensor) -> Tensor:
    """Smooth, bounded, different at every sigma."""
    return torch.tanh(x / (1 + sigma)) * 0.7 + 0.1


@pytest.mark.parametrize("case", VARIANTS, ids=variant_id)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["single", "double"])
def test_every_solver(case: tuple[str, dict], dtype: torch.dtype) -> None:
    name, options = case
    grid = make_grid("edm", 7)
    program, shape = SOLVERS[name](grid, **options), (2, 3, 5, 7)
    x = start(grid, shape, dtype=dtype)
    seeds = [7, -3]
    expected = Engine(program, denoiser_of, shape, "reference", dtype=dtype)(x, seeds=seeds)
    torches = Engine(program, denoiser_of, shape, "torch", dtype=dtype)(x, seeds=seeds)
    found = Engine(program, denoiser_of, shape, "native", dtype=dtype)(x, seeds=seeds)
    torch.testing.assert_close(found, torches, **over_a_run(x))
    torch.testing.assert_close(found, expected, **over_a_run(x))


@pytest.mark.parametrize("prediction", ["edm", "eps", "v"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_networks_of_every_dtype(prediction: str, dtype: torch.dtype) -> None:
    """Both hand the network the same rounded numbers up to a rare tie, which then costs one rounding there."""
    network = torch.nn.Conv2d(3, 3, 1).to(dtype)
    network.forward = lambda x, c: torch.tanh(x) * 0.5  # type: ignore[method-assign, assignment]
    engines = [
        Engine(
            SOLVERS["dpm_solver_pp"](make_grid("vp", 5)),
            Denoiser(network, prediction),
            (2, 3, 9, 5),
            b,
            dtype=torch.float32,
        )
        for b in ("torch", "native")
    ]
    x = start(make_grid("vp", 5), (2, 3, 9, 5), dtype=torch.float32)
    torches, found = (e(x) for e in engines)
    torch.testing.assert_close(found, torches, rtol=0, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 3, 33, 31), (5, 4, 64, 64)])
def test_noise_is_made_in_the_kernel(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    program = SOLVERS["ddim"](make_grid("edm", 5), eta=1.0)
    seeds = [2**62 + i * 7 for i in range(shape[0])]
    expected = Engine(program, denoiser_of, shape, "torch")(seeds=seeds)
    engine = Engine(program, denoiser_of, shape, "native")
    monkeypatch.setattr("fastode.engine.normal", None)
    torch.testing.assert_close(engine(seeds=seeds), expected, **over_a_run(torch.tensor([300.0])))
    alone = Engine(program, denoiser_of, (1, *shape[1:]), "native")
    assert torch.equal(alone(seeds=seeds[-1:])[0], engine(seeds=seeds)[-1]), "a sample does not depend on its batch"


def test_noise_given_as_tensors() -> None:
    program = SOLVERS["ddim"](make_grid("edm", 4), eta=0.7)
    shape = (2, 3, 6, 6)
    draws = [torch.randn(shape).transpose(2, 3) for _ in range(program.draws)]
    x = start(program.grid, shape, dtype=torch.float32)
    expected = Engine(program, denoiser_of, shape, "torch")(x, noise=draws)
    torch.testing.assert_close(Engine(program, denoiser_of, shape, "native")(x, noise=draws), expected, **over_a_run(x))


@pytest.mark.parametrize("scale", [3.0, [1.0, 2.5, 0.0]], ids=["shared", "per-sample"])
def test_guidance(scale: Any) -> None:
    def network(x: Tensor, c: Tensor, class_labels: Tensor) -> Tensor:
        return torch.tanh(x) * (class_labels.reshape(-1, 1, 1, 1) + 1) / 4

    d = Denoiser(network, "edm", num_classes=3, null_label=3)
    shape = (3, 2, 5, 5)
    x = start(make_grid("edm", 5), shape, dtype=torch.float32)
    found = {}
    for backend in ("torch", "native"):
        engine = Engine(SOLVERS["unipc"](make_grid("edm", 5)), d, shape, backend, guidance=True)
        engine(x, class_labels=[0, 1, 2], guidance_scale=1.5)  # the numbers of the first call must not stay
        found[backend] = engine(x, class_labels=[0, 1, 2], guidance_scale=scale)
    torch.testing.assert_close(found["native"], found["torch"], **over_a_run(x))


def test_poisoned_buffers() -> None:
    """Nothing is read before it was written: all memory of a run is NaN before it starts."""
    for name, options in VARIANTS:
        engine = Engine(SOLVERS[name](make_grid("edm", 6), **options), denoiser_of, (2, 3, 5), "native")
        x = start(engine.program.grid, (2, 3, 5), dtype=torch.float32)
        clean = engine(x, seeds=[1, 2])
        work = engine._free[False].get_nowait()
        work.buffers.slots.fill_(math.nan)
        work.buffers.net_in.fill_(math.nan)
        engine._free[False].put(work)
        assert torch.equal(engine(x, seeds=[1, 2]), clean), variant_id((name, options))


def test_two_threads_share_an_engine() -> None:
    program = SOLVERS["ddim"](make_grid("edm", 6), eta=1.0)
    shape = (4, 3, 64, 64)  # large enough that the module lets go of the interpreter
    engine = Engine(program, denoiser_of, shape, "native")
    alone = [engine(seeds=range(i, i + 4)) for i in range(4)]
    found: dict[int, list[Tensor]] = {}

    def work(i: int) -> None:
        found[i] = [engine(seeds=range(i, i + 4)) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i, samples in found.items():
        assert len(samples) == 3 and all(torch.equal(s, alone[i]) for s in samples)


def test_only_the_result_is_allocated() -> None:
    static = torch.zeros(2, 3, 8, 8)
    engine = Engine(SOLVERS["unipc"](make_grid("edm", 8)), lambda x, s: static, (2, 3, 8, 8), "native")
    x = start(engine.program.grid, (2, 3, 8, 8), dtype=torch.float32)
    engine(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        engine(x)
    allocated = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]" and e.nbytes() > 0]
    assert [e.nbytes() for e in allocated] == [x.nbytes]


def test_inference_mode() -> None:
    """Memory that was made inside it serves calls outside."""
    engine = Engine(SOLVERS["heun"](make_grid("edm", 3)), denoiser_of, (2, 3), "native")
    x = start(engine.program.grid, (2, 3), dtype=torch.float32)
    with torch.inference_mode():
        inside = engine(x)
    assert torch.equal(inside, engine(x))


def test_a_network_that_changes_its_arguments() -> None:
    for network in (lambda x, s: x.mul_(0.5), lambda x, s: x * s.mul_(0.5)):
        engine = Engine(SOLVERS["ddim"](make_grid("edm", 3)), network, (2, 3), "native")
        for _ in range(2):
            with pytest.raises(RuntimeError, match="changed its input in place"):
                engine(torch.ones(2, 3))


# -- noise -----------------------------------------------------------------------------------------------------------

KNOWN = [  # Random123's kat_vectors for philox4x32-10
    ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, ...], words: str) -> None:
    expected = [int(w, 16) for w in words.split()]
    assert list(module.philox(counter, key)) == expected
    assert [int(w) for w in philox([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])] == expected


@pytest.mark.parametrize("sample", [(1,), (3,), (4,), (5,), (63,), (64,), (65,), (3, 7, 11), (3, 512), (517,)])
def test_noise_equals_the_definition(isa: str, sample: tuple[int, ...]) -> None:
    """In float64 to the rounding of the logarithm and the angle; in float32 the same number, but for rare ties."""
    seeds = torch.tensor([0, 1, -1, 2**62 + 12345, -(2**63)])
    for draw in (0, 1, 77):
        exact = normal(seeds, draw, sample, dtype=torch.float64)
        torch.testing.assert_close(BACKEND.normal(seeds, draw, sample, torch.float64), exact, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(
            BACKEND.normal(seeds, draw, sample, torch.float32), exact.float(), rtol=1.2e-7, atol=0
        )


def test_noise_in_an_update_at_any_offset(isa: str) -> None:
    """Blocks begin inside a sample at places that are no multiple of anything."""
    shape = (3, 1027)
    seeds = torch.tensor([5, 6, 7])
    update = Update(
        (Source("noise", 4), Source("slot", 0)), (Target("slot", 0), Target("result")), ((1.0, 0.0), (2.0, 1.0))
    )
    buffers = Buffers(torch.zeros(1, *shape), torch.empty(shape))
    executor = native.NativeExecutor(module, lowered_of(update, slots=1), buffers, Given(seeds))
    executor.load({})
    result = torch.empty(shape)
    executor.update(0, result, (), result)
    assert torch.equal(buffers.slots[0], BACKEND.normal(seeds, 5, shape[1:], torch.float32)), (
        "draw k is draw k + 1 of a seed"
    )
    assert torch.equal(result, 2 * buffers.slots[0])


def test_noise_of_many_threads() -> None:
    seeds = torch.arange(3)
    big = BACKEND.normal(seeds, 0, (101, 997), torch.float32)
    torch.testing.assert_close(big, normal(seeds, 0, (101, 997)), rtol=1.2e-7, atol=0)


def test_noise_moments() -> None:
    z = BACKEND.normal(torch.arange(16), 0, (65536,), torch.float64).flatten()
    n = len(z)  # four standard errors of each moment
    assert abs(z.mean()) < 4 / math.sqrt(n) and abs(z.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((z**3).mean()) < 4 * math.sqrt(15 / n) and abs((z**4).mean() - 3) < 4 * math.sqrt(96 / n)


# -- what is missing -------------------------------------------------------------------------------------------------


def test_reasons(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    assert BACKEND.missing(torch.device("mps")) == "it does not run on mps"
    expected = "built for the CPU only" if not module.CUDA else "no CUDA device"
    if not (module.CUDA and torch.cuda.is_available()):
        assert expected in str(BACKEND.missing(torch.device("cuda")))
    with pytest.raises(ValueError, match="'native' cannot run on mps"):
        fastode.backends.choose("native", torch.device("mps"))

    def fails(name: str) -> None:
        raise ImportError(f"no {name}")

    monkeypatch.setattr(native.importlib, "import_module", fails)
    monkeypatch.setattr(native, "__file__", str(tmp_path / "backends" / "native.py"))
    assert (
        native.NativeBackend().missing(torch.device("cpu")) == "the native module cannot be loaded: no fastode._native"
    )
    (tmp_path / "_native_build.json").write_text(json.dumps({"reason": "CMake was not found"}))
    assert native.NativeBackend().missing(torch.device("cpu")) == "the native module was not built: CMake was not found"


def test_bad_arguments_of_the_module() -> None:
    with pytest.raises(ValueError, match="dtype"):
        module.Executor([1, 2], 9, 0, (0, 0, []))
    executor = module.Executor([1, 2], 0, 0, (0, 0, []))
    with pytest.raises(ValueError, match="at most 8"):
        executor.add([("slot", i) for i in range(9)], [])
    executor.add([("noise", 0)], [("result", 0)])
    executor.load(0, [1.0], [1], [])
    with pytest.raises(ValueError, match="seeds"):
        executor.update(0, 0, 0, 0, 0)
    with pytest.raises(IndexError):
        executor.update(7, 0, 0, 0, 0)
