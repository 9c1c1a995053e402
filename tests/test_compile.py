"""torch.compile takes a whole sampler in one graph, once; the operator keeps its contract (opcheck)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastode.ops
from fastode import Denoiser, Engine, Guidance
from fastode.denoisers import clipped
from fastode.functional import Sampler
from fastode.nets.predictor import AMEDPredictor
from fastode.nets.unet import build
from fastode.program.trace import Trace
from fastode.schedules import EDM, karras
from fastode.solvers import SOLVERS, plugin
from tests.conftest import make_grid, relative, start

SHAPE = (2, 1, 16, 16)
SAME = 2e-5  # as in triton_cases.py: another grouping of the same sums in float32


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


class Counting:
    """An eager backend of torch.compile that counts the graphs it is given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        self.graphs += 1
        self.calls = sum("combine" in str(node.target) for node in graph.graph.nodes)
        return graph.forward


class TinyUNet(nn.Module):
    """Down, up and a skip, told the level and the class: what a U-Net does, in few operations: tracing is slow."""

    def __init__(self) -> None:
        super().__init__()
        self.label = nn.Embedding(5, 4)
        self.input, self.down = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.output = nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x: torch.Tensor, c_noise: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        h = self.input(x) + c_noise[:, None, None, None]
        if class_labels is not None:
            h = h + self.label(class_labels)[:, :, None, None]
        deep = nn.functional.interpolate(nn.functional.silu(self.down(h)), scale_factor=2.0)
        return self.output(torch.cat([h, deep], dim=1))


class Looking(TinyUNet):
    """Offers its coarse feature map, 8 x 8."""

    def forward(self, x, c_noise, class_labels=None, features: bool = False):
        raw = super().forward(x, c_noise, class_labels)
        return (raw, {"bottleneck": self.down(self.input(x))}) if features else raw


@pytest.mark.parametrize("name", ["amed", "ipndm", "dpm_solver_pp"])
def test_numbers_made_in_the_run_compile(name):
    """AMED's predictor, late weights and levels inside one compiled graph."""
    torch.manual_seed(0)
    solver = SOLVERS["amed"] if name == "amed" else plugin(SOLVERS[name])
    grid = make_grid("edm", 3)
    program = solver(grid, afs=True, predictor=AMEDPredictor(scale_time=0.2).requires_grad_(False))
    denoiser = Denoiser(Looking().requires_grad_(False), num_classes=4, null_label=4)
    x, labels = start(grid, SHAPE, dtype=torch.float32), torch.tensor([1, 3])
    sampler, counting = Sampler(program, denoiser, SHAPE), Counting()
    run = torch.compile(sampler, fullgraph=True, backend=counting)
    samples = run(x, sampler.numbers(), class_labels=labels)
    assert counting.graphs == 1 and counting.calls == 6  # one update per evaluation, and the first
    truth = Engine(program, denoiser, SHAPE, "reference")(x, class_labels=labels)
    assert relative(samples, truth) < SAME
    other = solver(grid, afs=True, predictor=AMEDPredictor())
    with pytest.raises(ValueError, match="belongs to its own sampler"):
        sampler.numbers(other)


def noisy(grid) -> object:
    """Euler with a draw of noise in every step."""
    p = Trace(grid)
    p.consistent = False
    x = p.start()
    for i in range(len(grid) - 1):
        s, t = grid[i], grid[i + 1]
        ratio = t.sigma / s.sigma
        x = p.land(ratio * x + (1 - ratio) * p.denoise(x, s) + 0.1 * t.sigma * p.noise(), t)
    return p.program(x)


@pytest.mark.parametrize("name", ["ddim", "heun", "dpm_solver_pp", "unipc"])
def test_one_graph_for_all_numbers(name):
    denoiser = Denoiser(TinyUNet(), num_classes=4, null_label=4)
    solver, grids = SOLVERS[name], [karras(EDM(), 4), karras(EDM(), 4, rho=3.0), karras(EDM(sigma_max=20), 4)]
    sampler = Sampler(solver(grids[0]), denoiser, SHAPE, guidance=Guidance())
    counting = Counting()
    run = torch.compile(sampler, backend=counting, fullgraph=True)
    for k, grid in enumerate(grids):
        program = solver(grid)
        labels = torch.tensor([k, 1])
        x = start(grid, SHAPE, seed=k, dtype=torch.float32)
        got = run(x, sampler.numbers(program, guidance_scale=1.0 + k), class_labels=labels)
        engine = Engine(program, denoiser, SHAPE, "torch", guidance=True)
        assert relative(got, engine(x, class_labels=labels, guidance_scale=1.0 + k)) < SAME
    assert counting.graphs == 1
    assert counting.calls == sampler.program.nfe + 1  # one node per update and nothing else between two network calls


def test_seeds_do_not_recompile():
    program = noisy(karras(EDM(), 3))
    sampler = Sampler(program, Denoiser(TinyUNet()), SHAPE)
    counting = Counting()
    run = torch.compile(sampler, backend=counting, fullgraph=True)
    engine = Engine(program, sampler.denoiser, SHAPE, "torch")
    x = start(program.grid, SHAPE, dtype=torch.float32)
    for seeds in ([1, 2], [3, -4], [2**62, 0]):
        assert relative(run(x, sampler.numbers(), torch.tensor(seeds)), engine(x, seeds=seeds)) < SAME
    assert counting.graphs == 1


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_functionalized_and_generated_code(backend):
    """The buffers are written in place through the operator, in the order of the program, whatever is compiled."""
    denoiser = Denoiser(TinyUNet())
    program = SOLVERS["unipc"](karras(EDM(), 4))
    sampler = Sampler(program, denoiser, SHAPE)
    x = start(program.grid, SHAPE, dtype=torch.float32)
    got = torch.compile(sampler, backend=backend, fullgraph=True)(x, sampler.numbers())
    assert relative(got, Engine(program, denoiser, SHAPE, "torch")(x)) < SAME


@pytest.mark.slow
def test_the_bundled_network():
    net = build(resolution=16, channels=(8, 16), blocks=1, attention=(8,), embedding=16, num_classes=4).eval()
    for parameter in net.parameters():  # its last layers start at zero
        nn.init.normal_(parameter, std=0.1)
    denoiser, program = Denoiser(net, num_classes=4, null_label=4), SOLVERS["dpm_solver_pp"](karras(EDM(), 2))
    sampler = Sampler(program, denoiser, SHAPE)
    x, labels = start(program.grid, SHAPE, dtype=torch.float32), torch.tensor([0, 3])
    got = torch.compile(sampler, backend="eager", fullgraph=True)(x, sampler.numbers(), class_labels=labels)
    assert relative(got, Engine(program, denoiser, SHAPE, "torch")(x, class_labels=labels)) < SAME


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_as_a_function(name):
    program = SOLVERS[name](make_grid("edm", 4))
    denoiser = Denoiser(lambda x, c: 0.7 * torch.tanh(x))
    x = start(program.grid, (2, 5), dtype=torch.float32)
    sampler, seeds = Sampler(program, denoiser, (2, 5)), torch.tensor([3, 4])
    assert (
        relative(sampler(x, sampler.numbers(), seeds), Engine(program, denoiser, (2, 5), "torch")(x, seeds=seeds))
        < SAME
    )


def test_another_structure_is_refused():
    sampler = Sampler(SOLVERS["ddim"](make_grid("edm", 4)), Denoiser(lambda x, c: x), (2, 5))
    with pytest.raises(ValueError, match="network calls"):
        sampler.numbers(SOLVERS["ddim"](make_grid("edm", 5)))
    with pytest.raises(ValueError, match="structure"):
        sampler.numbers(SOLVERS["dpm_solver_pp"](make_grid("edm", 4)))
    with pytest.raises(ValueError, match="guidance_scale"):
        sampler.numbers(guidance_scale=2.0)
    with pytest.raises(ValueError, match="transforms"):
        Sampler(SOLVERS["ddim"](make_grid("edm", 4)), clipped(lambda x, sigma: x), (2, 5))


@pytest.mark.parametrize("case", ["shared", "per sample", "noise", "per element"])
def test_opcheck(case):
    x, y, out = torch.randn(2, 3, 5), torch.randn(2, 3, 5).bfloat16(), torch.empty(2, 3, 5, dtype=torch.bfloat16)
    rows, draws = (2 if case == "per sample" else 1), int(case == "noise")
    width = 2 * (2 + draws + 1) + draws
    table = torch.randn(rows * width)
    if draws:
        table[-1] = 3.0
    elements = [1, 0, 0, 0, 2, 0] if case == "per element" else []
    fields = torch.randn(2, 1, 3, 5) if elements else None
    seeds = torch.tensor([1, 2]) if draws else None
    arguments = ([x.clone(), out], [x, y], table, fields, seeds, 2 ** (width - draws) - 1, rows, draws, True, elements)
    torch.library.opcheck(fastode.ops.combine.default, arguments)


def test_the_operator_says_what_is_wrong():
    x = torch.randn(2, 3)
    with pytest.raises(ValueError, match="hold 2 numbers"):
        fastode.ops.combine([x], [x, x], torch.zeros(3), None, None, 3, 1, 0, False, [])
    with pytest.raises(ValueError, match="one shape"):
        fastode.ops.combine([x], [x[:1]], torch.zeros(1), None, None, 1, 1, 0, False, [])
    with pytest.raises(ValueError, match="float32"):
        fastode.ops.combine([x], [x], torch.zeros(1).half(), None, None, 1, 1, 0, False, [])
