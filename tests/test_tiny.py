"""The smallest set that shows everything works, in seconds, on any machine."""

import torch

import fastode
from fastode.denoisers import Gaussian
from fastode.schedules import EDM, karras


def test_one_call():
    """Data at one point: five evaluations land on it exactly (to float32)."""
    point = torch.tensor([0.5, -1.0, 2.0])
    samples = fastode.sample(
        lambda x, sigma: point.expand_as(x), torch.randn(4, 3) * 80, solver="ddim", grid=[80, 9, 1, 0.1, 0]
    )
    torch.testing.assert_close(samples, point.expand(4, 3))


def test_engine_is_the_one_call_form():
    data = Gaussian(torch.zeros(3), 0.25)
    grid = karras(EDM(), 6)
    program = fastode.SOLVERS["unipc"](grid, order=3)
    engine = fastode.Engine(program, data, shape=(4, 3))
    x = torch.randn(4, 3) * 80
    assert torch.equal(engine(x), fastode.sample(data, x, solver="unipc", grid=grid, order=3))
    assert engine.nfe == 6
    assert engine(seeds=range(4)).shape == (4, 3)


def test_describe_reads_like_the_formula():
    text = fastode.SOLVERS["ddim"]([10.0, 5.0, 0.0]).describe()
    assert "D0 = denoise(x0, sigma=10)" in text
    assert "x1 = 0.5 x0 + 0.5 D0" in text
