"""What the Triton backend must satisfy wherever it runs: in the interpreter on the CPU (``TRITON_INTERPRET=1``) or on a
CUDA device. ``test_triton.py`` runs this file both ways, each in a process of its own, since Triton reads the variable
when it is imported."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from torch import nn

from fastode import Denoiser, Engine
from fastode.backends import BACKENDS
from fastode.denoisers.guidance import GUIDANCE_SCALE
from fastode.noise import normal
from fastode.program import Program
from fastode.program.trace import Trace
from fastode.scalar import exp
from fastode.schedules import EDM, karras
from fastode.solvers import SOLVERS
from fastode.solvers.dpm_solver_v3 import Statistics, dpm_solver_v3
from tests.conftest import VARIANTS, make_grid, relative, start, variant_id

if os.environ.get("TRITON_INTERPRET") == "1":
    DEVICE = torch.device("cpu")
elif torch.cuda.is_available():
    DEVICE = torch.device("cuda")
else:
    pytest.skip("needs TRITON_INTERPRET=1 or a CUDA device", allow_module_level=True)

import fastode.kernels.combine as kernels
from fastode.backends.triton import Maker as TritonMaker

SHAPE = (3, 2, 5, 4)
# Backends round every product and sum in another grouping. The state shrinks from 80 to about 3, and errors made at the
# start stay: 80 * 6e-8 / 3, times the few operations of a step. The same in float64, where the reference is compared.
SAME32 = 2e-5
SAME64 = 1e-12


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer starts as NaN, so whatever is read before it is written shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.dtype.is_floating_point else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


def network(x: torch.Tensor, c_noise: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
    """A curved function of its input, the level and the class."""
    column = [-1] + [1] * (x.ndim - 1)
    y = 0.7 * torch.tanh(x) + 0.1 * c_noise.reshape(column).to(x.dtype)
    return y if class_labels is None else y * (1 + 0.1 * class_labels.reshape(column).to(x.dtype))


class Net(nn.Module):
    """``network`` with a dtype and a memory format of its own."""

    def __init__(self, dtype: torch.dtype = torch.float32, memory_format: torch.memory_format | None = None) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=dtype, device=DEVICE))
        self.memory_format = memory_format

    def forward(self, x, c_noise, class_labels=None):
        y = network(x, c_noise, class_labels) * self.scale
        return y if self.memory_format is None else y.contiguous(memory_format=self.memory_format)


def noisy(p: Trace) -> object:
    """Ancestral Euler with two draws in one update, a constant, and a history: everything an update can have."""
    x, old = p.start(), None
    for s, t in itertools.pairwise(p.grid):
        d = p.keep(p.denoise(x, s))
        mean = d if old is None else 1.5 * d - 0.5 * old
        ratio = t.sigma / s.sigma
        x = p.land(ratio * x + (1 - ratio) * mean + 0.3 * t.sigma * p.noise() + 0.2 * p.noise() + 0.01 * p.one(), t)
        old = d
    return x


def noisy_program(steps: int = 4) -> Program:
    trace = Trace(karras(EDM(), steps))
    x = noisy(trace)
    trace.consistent = False
    return trace.program(x)


def per_element_program(*, late: bool) -> Program:
    """Euler with a mask per element, as in DPM-Solver-v3 or inpainting; ``late``: times a number of the call."""
    grid = karras(EDM(), 4)
    trace = Trace(grid)
    trace.consistent = False
    mask = torch.linspace(0.5, 1.5, SHAPE[1] * SHAPE[2] * SHAPE[3], dtype=torch.float64).reshape(SHAPE[1:])
    x = trace.start()
    for s, t in itertools.pairwise(grid):
        ratio = t.sigma / s.sigma
        weight = (1 - ratio) * mask * exp(0.1 * GUIDANCE_SCALE) if late else (1 - ratio) * mask
        x = trace.land(ratio * x + trace.denoise(x, s) * weight, t)
    return trace.program(x)


def both(
    program: Program, denoiser: Denoiser, shape=SHAPE, *, dtype=torch.float32, guidance=None, other="torch", **call
):
    """The samples of the Triton backend and of ``other``."""
    x = call.pop("x", None)
    x = start(program.grid, shape, dtype=dtype).to(DEVICE) if x is None else x
    if "noise" not in call:
        call.setdefault("seeds", range(shape[0]))  # what a stochastic solver draws is the same on both
    return [
        Engine(program, denoiser, shape, backend, device=DEVICE, dtype=dtype, guidance=guidance)(x, **call)
        for backend in ("triton", other)
    ]


@pytest.mark.parametrize("case", VARIANTS, ids=variant_id)
def test_every_solver_is_the_torch_backend_and_the_reference(case):
    name, options = case
    program = SOLVERS[name](make_grid("edm", 5), **options)
    triton, torch_ = both(program, Denoiser(network))
    assert relative(triton, torch_) < SAME32
    triton, definition = both(program, Denoiser(network), other="reference", dtype=torch.float64)
    assert relative(triton, definition) < SAME64


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("scale", [2.5, torch.tensor([0.0, 1.0, 3.0])], ids=["shared", "per_sample"])
def test_guidance_halves_are_two_columns(name, scale):
    denoiser = Denoiser(network, num_classes=4, null_label=3)
    program = SOLVERS[name](make_grid("zero", 4))
    a, b = both(program, denoiser, guidance=True, guidance_scale=scale, class_labels=[0, 1, 2])
    assert relative(a, b) < SAME32


@pytest.mark.parametrize("name", ["ddim", "dpm_solver_pp", "unipc", "pndm"])
def test_float64_state(name):
    a, b = both(SOLVERS[name](make_grid("vp", 4)), Denoiser(network, prediction="v"), dtype=torch.float64)
    assert relative(a, b) < SAME64
    a, b = both(noisy_program(), Denoiser(network), dtype=torch.float64, seeds=[1, 2, 3])
    assert relative(a, b) < SAME64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SOLVERS)
def test_narrow_networks(name, dtype):
    """The network's input is rounded once, as torch rounds; a state that differs in its last bit may be rounded the
    other way, so a few elements differ by a rounding of the network's dtype."""
    a, b = both(SOLVERS[name](make_grid("edm", 4)), Denoiser(Net(dtype)))
    assert relative(a, b) < 4 * torch.finfo(dtype).eps
    assert ((a - b).abs() <= SAME32 * b.abs().max()).float().mean() > 0.8


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (3, 5, 7), (2, 4, 8, 8), (1, 3, 5, 5), (2, 1030), (5, 1, 3, 3, 3)])
def test_sizes(shape):
    for program in (SOLVERS["unipc"](make_grid("edm", 4)), noisy_program()):
        a, b = both(program, Denoiser(network), shape, seeds=range(shape[0]))
        assert relative(a, b) < SAME32


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 7, 7), (1, 4099), (2, 4, 8, 8)])
def test_noise_is_that_of_the_definition(shape):
    """Uniforms are equal; ln, sin and cos are good to 1e-7 and the radius is at most 6.7."""
    for seeds in ([0, 2**63 - 1, -1, 12345, 2**32][: shape[0]], [7] * shape[0]):
        z = torch.zeros(shape, device=DEVICE)
        table = torch.tensor([1.0, 9.0], device=DEVICE)
        seed = torch.tensor(seeds, device=DEVICE)
        kernels.combine([z], [], table, pattern=1, draws=1, seeds=seed)
        assert (z - normal(seeds, 9, shape[1:], device=DEVICE)).abs().max() < 2e-6


def test_the_start_is_that_of_the_definition():
    seeds = torch.tensor([5, 6, 7])
    z = BACKENDS["triton"].normal(seeds, 0, SHAPE[1:], torch.float32, DEVICE)
    assert (z - normal(seeds, 0, SHAPE[1:], device=DEVICE)).abs().max() < 2e-6


def test_noise_far_into_a_sample():
    """Many blocks: the counter is that of the element, not of the program."""
    z = torch.zeros((2, 70000), device=DEVICE)
    kernels.combine(
        [z], [], torch.tensor([1.0, 3.0], device=DEVICE), pattern=1, draws=1, seeds=torch.tensor([4, 5], device=DEVICE)
    )
    assert (z - normal([4, 5], 3, (70000,), device=DEVICE)).abs().max() < 2e-6


def test_stochastic_programs():
    program, denoiser = noisy_program(), Denoiser(network)
    a, b = both(program, denoiser, seeds=[5, 6, 7])
    assert relative(a, b) < SAME32
    given = [torch.randn(SHAPE, device=DEVICE) for _ in range(program.draws)]
    a, b = both(program, denoiser, noise=given)
    assert relative(a, b) < SAME32


def test_a_sample_does_not_depend_on_its_batch():
    program, denoiser = noisy_program(), Denoiser(network)
    batch = Engine(program, denoiser, SHAPE, "triton", device=DEVICE)(seeds=[5, 6, 7])
    alone = Engine(program, denoiser, (1, *SHAPE[1:]), "triton", device=DEVICE)(seeds=[6])
    assert torch.equal(batch[1:2], alone)


@pytest.mark.parametrize("late", [False, True])
def test_per_element_weights(late):
    program, denoiser = per_element_program(late=late), Denoiser(network, num_classes=4, null_label=3)
    scales = [1.0, torch.tensor([0.0, 1.0, 3.0])] if late else [None]
    for scale in scales:
        call = {"guidance": True, "guidance_scale": scale, "class_labels": [0, 1, 2]} if late else {}
        a, b = both(program, denoiser, **call)
        assert relative(a, b) < SAME32


def test_tables_per_element_of_dpm_solver_v3():
    """Weights, factors and constants [*sample], per element and per channel."""
    grid = karras(EDM(), 5)
    lam = torch.linspace(-grid.sigmas[0].log(), -grid.sigmas[-1].log(), 61, dtype=torch.float64).reshape(-1, 1, 1, 1)
    for shape in (SHAPE[1:], (SHAPE[1], 1, 1)):
        v = 0.3 + torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        l = 1 / (1 + v * torch.exp(2 * lam))  # noqa: E741
        table = Statistics(lam.flatten(), l, -0.3 * v * torch.tanh(lam), 0.1 * l * (1 - l))
        program = dpm_solver_v3(grid, table, order=2)
        denoiser = Denoiser(network, "edm")
        x = start(grid, SHAPE).to(DEVICE, torch.float32)
        made = Engine(program, denoiser, SHAPE, "triton", device=DEVICE)(x)
        truth = Engine(program, denoiser, SHAPE, "reference", device=DEVICE, dtype=torch.float64)(x.double())
        assert relative(made.double(), truth) < SAME32 * max(1.0, program.options["largest_weight"])


def test_new_numbers_are_written_into_the_same_table():
    denoiser = Denoiser(network, num_classes=4, null_label=3)
    engine = Engine(
        SOLVERS["dpm_solver_pp"](make_grid("edm", 4)), denoiser, SHAPE, "triton", device=DEVICE, guidance=True
    )
    plain = Engine(engine.program, denoiser, SHAPE, "torch", device=DEVICE, guidance=True)
    x = start(engine.program.grid, SHAPE, dtype=torch.float32).to(DEVICE)
    tables = []
    for scale in (1.0, 4.0, torch.tensor([1.0, 2.0, 3.0]), 1.0):
        call = {"class_labels": [0, 1, 2], "guidance_scale": scale}
        assert relative(engine(x, **call), plain(x, **call)) < SAME32
        work = engine._free[False].get_nowait()
        tables.append((work.executor.table.data_ptr(), work.executor.table.clone()))
        engine._free[False].put(work)
    assert len({pointer for pointer, _ in tables}) == 1
    assert not torch.equal(tables[0][1], tables[1][1]) and torch.equal(tables[0][1], tables[3][1])


@pytest.mark.parametrize("name", ["ddim", "dpm_solver_pp", "unipc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_last_networks(name, dtype):
    denoiser = Denoiser(Net(dtype, torch.channels_last))
    a, b = both(SOLVERS[name](make_grid("edm", 4)), denoiser)
    assert relative(a, b) < (SAME32 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps)


def test_channels_last_start():
    program = SOLVERS["unipc"](make_grid("edm", 4))
    x = start(program.grid, SHAPE, dtype=torch.float32).to(DEVICE).contiguous(memory_format=torch.channels_last)
    a, b = both(program, Denoiser(network), x=x)
    assert relative(a, b) < SAME32


class Wide(nn.Module):
    """Returns the first half of the channels of a wider output (a learned variance is thrown away): a padded view."""

    def forward(self, x, c_noise):
        y = network(x, c_noise)
        return torch.cat([y, torch.full_like(y, float("nan"))], dim=1)[:, : x.shape[1]]


class Odd(nn.Module):
    """A view that is dense in no memory format."""

    def forward(self, x, c_noise):
        return torch.stack([network(x, c_noise), torch.full_like(x, float("nan"))], dim=-1)[..., 0]


@pytest.mark.parametrize("net", [Wide, Odd])
def test_views_of_outputs(net):
    a, b = both(SOLVERS["unipc"](make_grid("edm", 4)), Denoiser(net()))
    assert relative(a, b) < SAME32


# -- the kernel by itself -------------------------------------------------------------------------------------------


def formula(targets, sources, weights, dtype=torch.float64):
    """What combine computes: [R, C] weights; columns beyond the sources are the constant 1."""
    columns = [s.to(dtype) for s in sources]
    columns += [torch.ones_like(columns[0])] * (weights.shape[1] - len(columns))
    return [sum(w * c for w, c in zip(row.to(dtype), columns, strict=True)) for row in weights[: len(targets)]]


@pytest.mark.parametrize("inputs", [1, 2, 5, 8])
@pytest.mark.parametrize("outputs", [1, 4])
def test_in_place(inputs, outputs):
    """All targets are sources, in another order: every element is read in full before it is written."""
    slab = torch.randn((8, 3, 50), device=DEVICE)
    sources, targets = [slab[i] for i in range(inputs)], [slab[(i + 1) % 8] for i in range(outputs)]
    weights = torch.randn(outputs, inputs + 1, device=DEVICE)
    expected = formula(targets, sources, weights)
    kernels.combine(targets, sources, weights.flatten(), pattern=2 ** weights.numel() - 1, one=True)
    for got, want in zip(targets, expected, strict=True):
        assert relative(got.double(), want) < 1e-6


def test_a_zero_weight_is_not_read():
    """As in the torch backend: what a row does not use cannot spoil it."""
    x, broken = torch.ones((2, 9), device=DEVICE), torch.full((2, 9), float("nan"), device=DEVICE)
    target = torch.zeros((2, 9), device=DEVICE)
    kernels.combine([target], [x, broken], torch.tensor([2.0, 0.0], device=DEVICE), pattern=1)
    assert torch.equal(target, torch.full_like(target, 2.0))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_formats(last, mixed, dtype):
    """The sweep in either order, the network's tensors in the same or the other one; noise follows the element."""
    memory = {False: torch.contiguous_format, True: torch.channels_last}
    shape, seeds = (3, 4, 5, 2), torch.tensor([1, 2, 3], device=DEVICE)
    state = torch.randn(shape, device=DEVICE).contiguous(memory_format=memory[last])
    net = torch.randn(shape, device=DEVICE).to(dtype).contiguous(memory_format=memory[last != mixed])
    z = normal(seeds, 6, shape[1:], device=DEVICE)
    weights = torch.tensor([[0.5, 2.0, 1.0], [1.0, 0.25, -1.0]], device=DEVICE)
    expected = formula([state, net], [state, net, z], weights)
    numbers = torch.cat([weights.flatten(), torch.tensor([6.0], device=DEVICE)])
    kernels.combine([state, net], [state, net], numbers, pattern=63, draws=1, seeds=seeds, last=last)
    assert relative(state.double(), expected[0]) < 1e-6
    assert relative(net.double(), expected[1]) < (1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps)


def test_64_bit_offsets(monkeypatch):
    monkeypatch.setattr(kernels, "LIMIT", 0)
    x, y = torch.randn((2, 3, 77), device=DEVICE)
    expected = formula([x], [x, y], torch.tensor([[3.0, -1.0]], device=DEVICE))
    kernels.combine([x], [x, y], torch.tensor([3.0, -1.0], device=DEVICE), pattern=3)
    assert relative(x.double(), expected[0]) < 1e-6


def test_places():
    x = torch.empty(3, 4, 5, 2)
    assert kernels.place(x) == (False, 40)
    assert kernels.place(x.contiguous(memory_format=torch.channels_last)) == (True, 40)
    assert kernels.place(x[:, :2]) == (False, 40)
    assert kernels.place(x[..., :1]) is None
    assert kernels.place(x[:1].expand(3, 4, 5, 2)) is None
    assert kernels.place(torch.empty(3, 1, 5, 2), True) == (True, 10)  # dense in both formats: as asked
    assert kernels.place(torch.empty(3, 7), True) == (True, 7)
    with pytest.raises(ValueError, match="dense"):
        kernels.combine([x], [x[..., :1].expand_as(x)], torch.ones(1), pattern=1)


# -- numbers made in the run -----------------------------------------------------------------------------------------


def looking(net=network):
    """``net`` with a feature map to look at, [B, 3, 2, 2]."""

    def offers(x, c_noise, class_labels=None, features=False):
        raw = net(x, c_noise, class_labels)
        flat = x.flatten(1).float()
        seen = torch.stack([flat.mean(1), flat.square().mean(1), flat[:, 0]], 1)[:, :, None, None].expand(-1, 3, 2, 2)
        return (raw, {"bottleneck": seen}) if features else raw

    return Denoiser(offers, num_classes=4, null_label=3)


def traced(formula, steps: int = 3) -> Program:
    trace = Trace(karras(EDM(), steps))
    trace.consistent = False
    return trace.program(formula(trace))


def looks(p: Trace):
    x = p.start()
    for s, t in itertools.pairwise(p.grid):
        d = p.denoise(x, s)
        (r,) = p.late(("r",), lambda f: (0.2 + 0.6 * torch.sigmoid(f.mean((1, 2, 3))),), outputs=("bottleneck",))
        u = p.grid.between(s, t, r)
        y = p.keep(u.sigma / s.sigma * x + (1 - u.sigma / s.sigma) * d)
        x = p.land(x + (t.sigma - s.sigma) / u.sigma * (y - p.denoise(y, u)), t)
    return x


def measures(p: Trace):
    x = p.start()
    for s, t in itertools.pairwise(p.grid):
        d, z = p.denoise(x, s), p.noise()
        step = p.norm(z) / p.norm((x - d) / s.sigma)
        x = p.land(t.sigma / s.sigma * x + (1 - t.sigma / s.sigma) * d + 0.1 * step * t.sigma * z + 0.01 * p.one(), t)
    return x


@pytest.mark.parametrize("formula", [looks, measures])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, SAME32), (torch.float64, SAME64)])
def test_numbers_made_in_the_run(formula, dtype, tolerance):
    program, denoiser = traced(formula), looking()
    x = start(program.grid, SHAPE, dtype=dtype).to(DEVICE)
    call = {"seeds": [3, 1, 4], "class_labels": [0, 1, 2], "guidance_scale": torch.tensor([0.0, 1.0, 2.5])}
    # float64: the networks' features are made in float32 on both sides, from states that agree to 1e-13
    runs = [Engine(program, denoiser, SHAPE, b, dtype=dtype, guidance=True)(x, **call) for b in ("reference", "triton")]
    assert relative(runs[1], runs[0]) < (tolerance if dtype == torch.float32 else 1e-6)


@pytest.mark.parametrize("last", [False, True])
def test_norms_do_not_depend_on_the_batch(last):
    """To the last bit: the blocks that are summed are cut by the size of a sample alone."""
    memory = torch.channels_last if last else torch.contiguous_format
    program, denoiser = traced(measures), Denoiser(Net(memory_format=memory))
    x = start(program.grid, SHAPE, dtype=torch.float32).to(DEVICE)
    whole = Engine(program, denoiser, SHAPE, "triton")(x, seeds=[7, 8, 9])
    for i in range(3):
        alone = Engine(program, denoiser, (1, *SHAPE[1:]), "triton")(x[i : i + 1], seeds=[7 + i])
        assert torch.equal(alone[0], whole[i])


class Bottleneck(nn.Module):
    """A network with a feature map of 8 x 8, in the dtype and memory format of its own."""

    def __init__(self, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7, dtype=dtype, device=DEVICE))
        self.memory_format = memory_format

    def forward(self, x, c_noise, class_labels=None, features=False):
        raw = network(x, c_noise, class_labels) * self.weight
        seen = torch.cat([x * k for k in (1, 0.5, 0.2)], 1).to(memory_format=self.memory_format)
        return (raw, {"bottleneck": seen}) if features else raw


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize(
    ("name", "dtype", "memory_format"),
    [
        ("amed", torch.float32, torch.contiguous_format),
        ("amed", torch.bfloat16, torch.channels_last),
        ("ipndm", torch.float32, torch.channels_last),
        ("dpm_solver_pp", torch.float32, torch.contiguous_format),
        ("unipc", torch.float32, torch.contiguous_format),
    ],
)
def test_amed_in_kernels(monkeypatch, name, dtype, memory_format, fold):
    """The predictor, the weights and the levels made by kernels, folded into the update or not, equal the definition; the
    launches are counted: one per update, and one more per predictor where it is not folded."""
    import fastode.kernels.mean_direction as mean_direction
    from fastode.nets.predictor import AMEDPredictor
    from fastode.solvers import plugin

    monkeypatch.setattr(mean_direction, "FOLD", 10**9 if fold else 0)
    torch.manual_seed(0)
    predictor = AMEDPredictor(scale_time=0.2).requires_grad_(False).to(DEVICE)
    solver = SOLVERS["amed"] if name == "amed" else plugin(SOLVERS[name])
    program = solver(karras(EDM(), 3), predictor=predictor, afs=True)
    shape = (3, 2, 8, 8)
    x = start(program.grid, shape, dtype=torch.float32).to(DEVICE)
    denoiser = Denoiser(Bottleneck(dtype, memory_format), num_classes=4, null_label=3)
    call = {"class_labels": [0, 1, 2], "guidance_scale": torch.tensor([0.0, 1.0, 2.5])}
    engines = [Engine(program, denoiser, shape, b, guidance=True) for b in ("reference", "triton")]
    launches: list[str] = []
    for kernel in ("run", "fold"):
        monkeypatch.setattr(TritonMaker, kernel, counted(getattr(TritonMaker, kernel), kernel, launches))
    expected, found = (engine(x, **call) for engine in engines)
    assert relative(found, expected) < (5e-5 if dtype == torch.float32 else 2e-2)  # a bfloat16 network rounds to 1/256
    assert launches.count("fold True") == (2 if fold else 0) and launches.count("run None") == (0 if fold else 2)
    assert torch.equal(engines[1](x, **call), found)


def counted(method, name, into):
    def call(self, *args):
        result = method(self, *args)
        into.append(f"{name} {result}")
        return result

    return call


def test_generated_code_is_the_expression():
    """Every operation that straight-line code has, in float64."""
    import fastode.kernels.mean_direction as mean_direction
    from fastode.program.code import OPS

    g = torch.Generator().manual_seed(0)
    batch = 5
    one, two = (0.1 + 3 * torch.rand(batch, generator=g, dtype=torch.float64) for _ in range(2))
    instructions = tuple((op, 0, 1) for op in OPS)
    s = mean_direction.Structure((2,), (0, 1), 0, instructions, tuple(range(2, 2 + len(OPS))), 0)
    numbers, _ = mean_direction.build(s)
    leaves = torch.stack([one, two, torch.zeros_like(one)]).to(DEVICE)
    levels = [torch.zeros(batch, dtype=torch.float64, device=DEVICE) for _ in OPS]
    mlp = [torch.randn(n, generator=g) for n in ((4, 3), (4,), (2, 4), (2,), (1, 2), (1,), (1,), (1,))]
    feature = torch.randn(batch, 7, 3, generator=g).to(DEVICE)
    places = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    packed = mean_direction.pack(mlp, DEVICE)
    arguments = mean_direction.arguments(feature, packed, leaves, leaves[2], places, leaves[2].float(), levels)
    numbers[(batch,)](*arguments, **mean_direction.sizes_of(7, 3, 4, 2, 1))
    from fastode.program import Late
    from fastode.program.code import Code

    truth = Code((Late("a"), Late("b")), (), instructions, s.outputs).run([one, two])
    for op, level, value in zip(OPS, levels, truth, strict=True):
        assert relative(level.cpu(), value) < 1e-13, op
    from fastode.program import PooledMLP

    assert relative(leaves[2].cpu(), PooledMLP(*mlp)(feature.cpu()[..., None])[0].double()) < 1e-6  # float32
