"""Late numbers as straight-line code equal the expressions they were compiled from."""

import pytest
import torch

from fastode import SOLVERS, Denoiser
from fastode.program import Late
from fastode.program.code import compile_code
from fastode.program.lower import lower
from fastode.scalar import Moment, evaluate, exp, expm1, log, sqrt
from fastode.schedules import VPLinear, log_snr
from fastode.solvers import plugin
from fastode.solvers.amed import MULTISTEP
from tests.conftest import make_grid, relative


class Look:
    """A predictor that asks for three numbers in every step."""

    heads = ("r", "scale_dir", "scale_time")

    def look(self, step, t, t_next):
        return lambda feature: (feature,) * 3


def test_every_operation():
    r, c = Late("r"), Late("c")
    expressions = [
        2 * r + c / 3 - 1, -(r**2.5), 2.0**r, exp(-r), expm1(r), sqrt(c), log(c) * r,
        *(Moment(k, s)(r * h) for k in range(4) for s in (-1, 1) for h in (0.1, 7.0)), r, 4.0,
    ]  # fmt: skip
    code = compile_code(expressions)
    known = {r: torch.tensor([0.1, 0.5, 0.9]).double(), c: torch.tensor([1.0, 2.0, 0.5]).double()}
    for got, want in zip(code.run([known[i] for i in code.inputs]), expressions, strict=True):
        value = torch.as_tensor(evaluate(want, known), dtype=torch.float64)
        assert relative(got, value.expand(3)) < 1e-15  # the same operations in the same order


def test_common_parts_are_made_once():
    r = Late("r")
    code = compile_code([exp(r) + 1, exp(r) * 2, 1 + exp(r)])
    assert [op for op, _, _ in code.instructions].count("exp") == 1


def test_what_is_not_elementary_is_left_alone():
    r = Late("r")
    assert compile_code([Late.apply("table", lambda v: v, r)]) is None
    assert compile_code([r * torch.ones(3)]) is None


@pytest.mark.parametrize("name", ["amed", "dpm_solver_2", *MULTISTEP])
@pytest.mark.parametrize("prediction", ["edm", "eps", "v"])
def test_all_weights_of_amed_are_elementary(name, prediction):
    """Kernels can make them: for every plug-in, on EDM's networks and on those of VP schedules."""
    solver = SOLVERS["amed"] if name == "amed" else plugin(SOLVERS[name])
    options = {"space": "lam"} if name == "deis" else {}
    schedule = None if prediction == "edm" else VPLinear()
    grid = make_grid("edm", 3) if prediction == "edm" else log_snr(schedule, 3)
    denoiser = Denoiser(lambda x, t, features=False: x, prediction, schedule)
    program = solver(grid, predictor=Look(), **options)
    lowered = lower(program, denoiser.scaling, lambda level: denoiser.columns(level, None))
    g = torch.Generator().manual_seed(0)
    known = {late: 0.3 + 0.6 * torch.rand(4, generator=g, dtype=torch.float64) for late in program.made}
    for update, due in zip(lowered.updates, lowered.due, strict=True):
        entries = [c for row in update.entries for c in row if isinstance(c, Late)]
        assert bool(entries) == bool(due)
        code = compile_code(entries)
        if entries:
            for got, want in zip(code.run([known[i] for i in code.inputs]), entries, strict=True):
                assert relative(got, evaluate(want, known)) < 1e-12
