"""Forms, traces, programs and their lowering."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastode
from fastode.program import Atom, Form, Late, Program, Stage, Table, Trace
from fastode.program.lower import lower
from fastode.scalar import evaluate, exp, log
from tests.conftest import VARIANTS, draws, make_grid, relative, start, variant_id

numbers = st.floats(-1e3, 1e3, allow_nan=False)
atoms = st.builds(Atom, st.just("value"), st.integers(0, 3))
forms = st.dictionaries(atoms, numbers, max_size=4).map(Form)


def value(form: Form, point: dict[int, float]) -> float:
    return sum(c * point[a.index] for a, c in form.terms.items())


@given(forms, forms, numbers, st.lists(numbers, min_size=4, max_size=4))
@settings(max_examples=200, deadline=None)
def test_forms_are_a_vector_space(a, b, c, point):
    at = dict(enumerate(point))
    # float64 rounding of sums of eight products of numbers up to 1e6
    close = pytest.approx
    assert value(a + b, at) == close(value(a, at) + value(b, at), abs=1e-6)
    assert value(c * a, at) == close(c * value(a, at), abs=1e-5)
    assert value(a - b, at) == close(value(a, at) - value(b, at), abs=1e-6)
    assert value(a - a, at) == 0


def test_products_of_forms_are_errors():
    x = Form({Atom("value", 0): 1.0})
    with pytest.raises(TypeError, match="multiplied by a number"):
        x * x
    with pytest.raises(TypeError, match="divided by a number"):
        x / x
    with pytest.raises(TypeError, match="cannot add"):
        x + 1.0


def test_late_numbers_record_and_play_back():
    r = Late("r")
    expression = 2 * exp(-r) + log(r**2) / (1 - r)
    value = evaluate(expression, {r: torch.tensor([0.3, 0.5], dtype=torch.float64)})
    t = torch.tensor([0.3, 0.5], dtype=torch.float64)
    torch.testing.assert_close(value, 2 * torch.exp(-t) + torch.log(t**2) / (1 - t))
    assert expression.leaves() == {r}
    for question in (bool, float, lambda v: v < 1):
        with pytest.raises(TypeError, match="no value yet"):
            question(r)
    with pytest.raises(ValueError, match="'r'"):
        evaluate(expression, {})


def test_late_levels_give_late_tables():
    """A midpoint ratio known only in the run: DPM-Solver-2 with a late r equals the same solver with the number."""
    from fastode.solvers.dpm_solver import second_order

    grid = make_grid("edm", 3)
    r = Late("r")

    def build(ratio):
        p = Trace(grid)
        x = p.start()
        for _, s, t in grid.windows():
            x = p.land(second_order(p, x, s, t, ratio, data=False), t)
        return p.program(x)

    late, known = build(r), build(0.37)
    assert late.late == {r}
    for stage, other in zip(late.stages, known.stages, strict=True):
        for row, row2 in zip(stage.table.entries, other.table.entries, strict=True):
            for c, c2 in zip(row, row2, strict=True):
                got = evaluate(c, {r: torch.tensor(0.37, dtype=torch.float64)})
                assert float(got) == pytest.approx(float(c2), rel=1e-12, abs=1e-15)


def test_programs_check_themselves():
    grid = make_grid("edm", 1)
    empty = Table((), (), ())
    level = grid[0]
    good = Table((1,), (Atom("value", 0), Atom("output", 0, "denoised")), ((0.5, 0.5),))
    with pytest.raises(ValueError, match="not written yet"):
        Program(grid, empty, (Stage(0, 7, level, 0, good),), 1, (0, 1))
    with pytest.raises(ValueError, match="second time"):
        Program(grid, empty, (Stage(0, 0, level, 0, good), Stage(1, 1, level, 0, good)), 1, (0, 1))
    with pytest.raises(ValueError, match="never written"):
        Program(grid, empty, (Stage(0, 0, level, 0, good),), 9, (0, 1))
    bad = Table((1,), (Atom("output", 5, "denoised"),), ((1.0,),))
    with pytest.raises(ValueError, match="another evaluation"):
        Program(grid, empty, (Stage(0, 0, level, 0, bad),), 1, (0, 1))
    with pytest.raises(ValueError, match="states"):
        Program(grid, empty, (Stage(0, 0, level, 0, good),), 1, (0,))
    with pytest.raises(ValueError, match="not finite"):
        Table((1,), (Atom("value", 0),), ((float("nan"),),))
    with pytest.raises(ValueError, match="rows of"):
        Table((1,), (Atom("value", 0),), ((1.0, 2.0),))


def test_trace_needs_every_level():
    grid = make_grid("edm", 2)
    p = Trace(grid)
    with pytest.raises(ValueError, match="never landed"):
        p.program(p.start())


@pytest.mark.parametrize("case", VARIANTS, ids=variant_id)
def test_unroll_is_the_sample(mixture, case):
    """The final state equals the unrolled weights applied to the recorded evaluations."""
    name, options = case
    grid = make_grid("edm")
    program = fastode.SOLVERS[name](grid, **options)
    x = start(grid, (2, 6))
    seen = []

    def record(y, sigma):
        seen.append(mixture(y, sigma))
        return seen[-1]

    samples = fastode.Engine(program, record, (2, 6), "reference", dtype=torch.float64)(x, noise=draws(x))
    u = program.unroll()
    total = u.start * x + sum(w * d for w, d in zip(u.outputs, seen, strict=True))
    total = total + sum(w * z for w, z in zip(u.noise, draws(x), strict=False))
    # Unrolled weights of PNDM's warm-up cancel: they reach 1e6 where the step-by-step sums do not.
    assert relative(total, samples) < (1e-8 if name == "pndm" else 1e-11)
    assert u.weights().shape == (program.nfe,)
    half = program.unroll(level=3)
    assert any(half.outputs)
    assert half.outputs[-1] == 0


@pytest.mark.parametrize("case", VARIANTS[::3], ids=variant_id)
def test_save_and_load(tmp_path, mixture, case):
    name, options = case
    program = fastode.SOLVERS[name](make_grid("vp"), **options)
    path = tmp_path / "program.safetensors"
    program.save(path)
    again = Program.load(path)
    assert again.describe() == program.describe()
    x = start(program.grid, (2, 6))
    one, two = (
        fastode.Engine(p, mixture, (2, 6), "reference", dtype=torch.float64)(x, noise=draws(x))
        for p in (program, again)
    )
    assert torch.equal(one, two)  # JSON keeps float64 exactly
    assert [p.name for p in tmp_path.iterdir()] == ["program.safetensors"]


def test_damaged_programs_are_refused(tmp_path):
    path = tmp_path / "program.safetensors"
    fastode.SOLVERS["heun"](make_grid("edm")).save(path)
    whole = path.read_bytes()
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "noise").write_bytes(b"not a program at all")
    wrong = whole.replace(b"fastode-program-1", b"fastode-program-9")
    (tmp_path / "wrong").write_bytes(wrong)
    for name in ("cut", "noise", "wrong"):
        with pytest.raises(ValueError, match="not a fastode program"):
            Program.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        Program.load(tmp_path / "absent")
    # A header whose numbers were changed no longer passes the program's own check.
    header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    program = json.loads(header["__metadata__"]["fastode"])
    program["stages"][0]["table"]["entries"][0][0] *= 1.5
    from safetensors.torch import save_file

    save_file({"sigmas": torch.zeros(1)}, tmp_path / "changed", metadata={"fastode": json.dumps(program)})
    with pytest.raises(ValueError, match="single data point"):
        Program.load(tmp_path / "changed")


SLOTS = {  # state-sized buffers besides the network's input and output, for a network with the state's dtype
    "ddim": 0,
    "heun": 1,
    "dpm_solver_2": 1,
    "dpm_solver_3": 2,
    "dpm_solver_pp": 1,
    "dpm_solver_pp_s": 1,
    "deis": 3,
    "ipndm": 3,
    "ipndm_v": 3,
    "lms": 3,
    "edm": 1,
    "unipc": 4,
    "pndm": 5,
    "amed": 1,
    "euler_ancestral": 0,
    "dpm_2_ancestral": 1,
    "dpmpp_2s_ancestral": 1,
    "ddpm": 0,
    "sde_dpm_solver_pp": 1,
    "dpmpp_3m_sde": 2,
    "dpmpp_sde": 1,
    "sa_solver": 2,
    "lcm": 0,
    "restart": 1,
    "sampler_scheduler": 1,
}


@pytest.mark.parametrize("name", list(fastode.SOLVERS))
def test_buffers_are_few(name):
    denoiser = fastode.Denoiser(lambda x, t: x)
    engine = fastode.Engine(fastode.SOLVERS[name](make_grid("edm", 8)), denoiser, (1, 3))
    assert engine.slots <= SLOTS[name]


def test_narrow_networks_keep_the_state_in_full_precision(mixture):
    """With a bfloat16 network the state is never read back from the rounded network input."""
    program = fastode.SOLVERS["ddim"](make_grid("edm"))
    denoiser = fastode.Denoiser(lambda x, t: x)
    wide = lower(program, denoiser.scaling, lambda level: (1.0,), exact_input=True)
    narrow = lower(program, denoiser.scaling, lambda level: (1.0,), exact_input=False)
    assert wide.slots == 0
    assert narrow.slots == 1
    assert all(s.kind != "input" for u in narrow.updates for s in u.sources)


def test_euler_moves_three_states_per_step():
    """Read the network's input and output, write the next input: the least an update can do."""
    program = fastode.SOLVERS["ddim"](make_grid("edm", 5))
    denoiser = fastode.Denoiser(lambda x, t: x)
    lowered = lower(program, denoiser.scaling, lambda level: (1.0,))
    assert [len(u.sources) + len(u.targets) for u in lowered.updates] == [2, 3, 3, 3, 3, 3]


@pytest.mark.parametrize("case", VARIANTS, ids=variant_id)
@pytest.mark.parametrize("prediction", ["edm", "eps", "v"])
def test_folding_changes_nothing(case, prediction):
    """Lowered tables (preconditioning folded, slots reused) equal the definition, to rounding, trajectory included."""
    name, options = case
    grid = make_grid("vp" if prediction != "edm" else "edm")
    weight = torch.linspace(-1, 1, 6, dtype=torch.float64)
    denoiser = fastode.Denoiser(lambda x, t: torch.tanh(x * weight + t[:, None] * 1e-3), prediction)
    x = start(grid, (3, 6))
    program = fastode.SOLVERS[name](grid, **options)
    runs = [
        fastode.Engine(program, denoiser, (3, 6), b, dtype=torch.float64)(x, noise=draws(x), return_trajectory=True)
        for b in ("reference", "torch")
    ]
    # eps networks divide by alpha = 0.0066 at the first level, and the state is read back from the network input; roundings
    # of a float64 are amplified by 1e4 at most.
    assert relative(runs[1].samples, runs[0].samples) < 1e-10
    for a, b in zip(runs[0].states, runs[1].states, strict=True):
        assert relative(b, a) < 1e-10
    assert len(runs[0].states) == len(grid)
    assert torch.equal(runs[0].sigmas, runs[1].sigmas)


def test_learned_tables_have_gradients(mixture):
    """A grid with gradients gives a program with gradients: finite differences agree."""
    sigmas = torch.tensor([80.0, 20.0, 4.0, 0.8, 0.1], dtype=torch.float64, requires_grad=True)
    x = 80 * torch.randn(2, 6, dtype=torch.float64)
    for name in ("ddim", "dpm_solver_pp", "unipc", "ipndm", "deis", "heun", "dpm_solver_2", "lms", "ipndm_v"):

        def loss(s, name=name):
            return fastode.sample(mixture, x, solver=name, grid=fastode.Grid(s)).square().sum()

        (gradient,) = torch.autograd.grad(loss(sigmas), sigmas)
        for i in (1, 3):
            h = 1e-5 * float(sigmas[i].detach())
            step = torch.zeros(5, dtype=torch.float64).index_fill(0, torch.tensor(i), h)
            with torch.no_grad():
                slope = (loss(sigmas + step) - loss(sigmas - step)) / (2 * h)
            assert float(gradient[i]) == pytest.approx(float(slope), rel=1e-5)  # central differences: error h^2


def test_gradient_reaches_start_and_network(mixture):
    x = (80 * torch.randn(2, 6, dtype=torch.float64)).requires_grad_()
    scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    samples = fastode.sample(lambda y, s: scale * mixture(y, s), x, solver="unipc", grid=[80.0, 9.0, 1.0, 0.1])
    samples.sum().backward()
    assert x.grad is not None
    assert scale.grad is not None
    assert float(x.grad.abs().max()) > 0
    assert float(scale.grad.abs()) > 0


def test_per_element_weights():
    """A coefficient of the sample's shape weighs every element by its own number."""
    grid = fastode.Grid([2.0, 1.0])
    gain = torch.tensor([0.5, 0.25, 1.0], dtype=torch.float64)
    p = Trace(grid)
    p.consistent = False
    x = p.start()
    d = p.denoise(x, grid[0])
    program = p.program(p.land(gain * x + (1 - gain) * d, grid[1]))
    x0 = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    for backend in ("reference", "torch"):
        engine = fastode.Engine(program, lambda y, s: torch.zeros_like(y), (1, 3), backend, dtype=torch.float64)
        torch.testing.assert_close(engine(x0), x0 * gain)
    with pytest.raises(ValueError, match="not a single known number"):
        program.stages[0].table.matrix()
