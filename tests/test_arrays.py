"""Arrays of other libraries go in and come out; torch generators draw what diffusers draws."""

import numpy as np
import pytest
import torch

import fastode
from fastode.interop.arrays import to_torch
from tests.conftest import make_grid, start


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numpy_in_numpy_out(gaussian, dtype):
    grid = make_grid("edm")
    x = start(grid, (3, 4)).numpy().astype(dtype)
    before = x.copy()
    samples = fastode.sample(gaussian, x, solver="unipc", grid=grid)
    assert isinstance(samples, np.ndarray)
    assert samples.dtype == dtype
    assert np.array_equal(x, before)
    assert np.array_equal(samples, fastode.sample(gaussian, torch.from_numpy(x), solver="unipc", grid=grid).numpy())
    run = fastode.sample(gaussian, x, solver="heun", grid=grid, return_trajectory=True)
    assert all(isinstance(state, np.ndarray) for state in run.states)


def test_no_copy_on_the_same_device():
    x = np.zeros((2, 3), dtype=np.float32)
    tensor, back = to_torch("x", x)
    assert tensor.data_ptr() == x.ctypes.data
    out = torch.ones(2, 3)
    assert back(out).ctypes.data == out.data_ptr()
    x.flags.writeable = False
    assert torch.equal(to_torch("x", x)[0], tensor)  # a read-only array is copied: torch knows no read-only tensors


def test_any_dlpack_array():
    class Foreign:
        def __init__(self, tensor):
            self.tensor = tensor

        def __dlpack__(self, **kwargs):
            return self.tensor.__dlpack__(**kwargs)

        def __dlpack_device__(self):
            return self.tensor.__dlpack_device__()

    x = torch.randn(2, 3)
    tensor, back = to_torch("x", Foreign(x))
    assert tensor.data_ptr() == x.data_ptr()
    assert back(tensor) is tensor
    with pytest.raises(TypeError, match=r"x: must be a tensor or an array with __dlpack__, got list"):
        to_torch("x", [1.0])


def test_generators_draw_in_the_order_of_diffusers(gaussian):
    """randn_tensor: one generator fills the batch, a list fills one sample each; the initial state comes first."""
    grid = make_grid("edm", 4)
    program = fastode.SOLVERS["ddim"](grid, eta=1.0)
    engine = fastode.Engine(program, gaussian, (2, 4))

    def by_hand(draw):
        z = [draw() for _ in range(1 + program.draws)]
        return engine(z[0] * float(grid.sigma[0]), noise=z[1:])

    one = torch.Generator().manual_seed(3)
    assert torch.equal(
        engine(generator=torch.Generator().manual_seed(3)), by_hand(lambda: torch.randn((2, 4), generator=one))
    )
    many = [torch.Generator().manual_seed(s) for s in (5, 6)]
    expected = by_hand(lambda: torch.cat([torch.randn((1, 4), generator=g) for g in many]))
    for backend in ("reference", "torch"):
        again = [torch.Generator().manual_seed(s) for s in (5, 6)]
        samples = fastode.Engine(program, gaussian, (2, 4), backend)(generator=again)
        torch.testing.assert_close(samples, expected, rtol=1e-5, atol=1e-5)  # float32, other order of summation
    with pytest.raises(ValueError, match="generator: need one"):
        engine(generator=many[:1])
    with pytest.raises(ValueError, match="takes the place"):
        engine(generator=one, seeds=[1, 2])
    with pytest.raises(TypeError, match=r"torch\.Generator"):
        engine(generator=[1, 2])


def test_generators_equal_diffusers_randn_tensor():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is an optional extra")
    assert diffusers
    from diffusers.utils.torch_utils import randn_tensor

    engine = fastode.Engine(fastode.SOLVERS["ddim"]([1.0, 0.5]), lambda x, s: torch.zeros_like(x), (2, 4))
    for seeds in (7, [7, 8]):
        make = (
            (lambda s=seeds: torch.Generator().manual_seed(s))
            if isinstance(seeds, int)
            else (lambda s=seeds: [torch.Generator().manual_seed(k) for k in s])
        )
        torch.testing.assert_close(engine(generator=make()), 0.5 * randn_tensor((2, 4), generator=make()))
