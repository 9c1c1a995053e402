"""Inpainting, colorization and classifier guidance against closed-form Gaussians, and the published loop draw by draw."""

import math

import numpy as np
import pytest
import torch

import fastode
from fastode.controllable import colorize, inpaint
from fastode.denoisers import Gaussian, GaussianMixture, classifier_guided, mixed
from fastode.denoisers.controlled import grey_matrix, mix
from fastode.drivers import adaptive
from fastode.schedules import EDM, VE, VPLinear, karras
from fastode.solvers.langevin import pc
from fastode.solvers.score_sde import score_sde_grid
from tests.conftest import make_grid, relative, start

DOUBLE = torch.float64


def draws_of(grid, mask, shape, **options):
    g = torch.Generator().manual_seed(4)
    count = pc(grid, mask=mask, **options).draws
    return [torch.randn(shape, generator=g, dtype=DOUBLE) for _ in range(count)]


def loop(denoise, y, mask, prior, grid, noise, snr=0.16):
    """Appendix I.2 with Langevin and reverse diffusion on VE, as published code orders it; returns the mean."""
    noise = iter(noise)
    n = len(grid)
    x = mask * y + (1 - mask) * prior
    sigmas = np.exp(np.linspace(math.log(0.01), math.log(50.0), n))
    size = lambda v: np.sqrt((v**2).sum(1, keepdims=True))  # noqa: E731
    for k, s in enumerate(grid):
        score, z = (denoise(x, s.sigma) - x) / s.sigma**2, next(noise)
        h = 2 * (snr * size(z) / size(score)) ** 2
        x = x + h * score + np.sqrt(2 * h) * z
        x = (1 - mask) * x + mask * (y + s.sigma * next(noise))
        score = (denoise(x, s.sigma) - x) / s.sigma**2
        i = n - 1 - k
        gap = sigmas[i] ** 2 - (sigmas[i - 1] ** 2 if i else 0.0)
        mean = x + gap * score
        if k == n - 1:
            return (1 - mask) * mean + mask * y
        x = mean + math.sqrt(gap) * next(noise)
        x = (1 - mask) * x + mask * (y + s.sigma * next(noise))


def test_equals_the_loop_draw_by_draw(mixture):
    grid = score_sde_grid(VE(), 15)
    mask = torch.tensor([1.0, 0, 0, 1, 0, 0])
    g = torch.Generator().manual_seed(1)
    y, prior = torch.randn(3, 6, generator=g, dtype=DOUBLE), 50 * torch.randn(3, 6, generator=g, dtype=DOUBLE)
    noise = draws_of(grid, mask, (3, 6), corrector="langevin")

    def denoise(x, sigma):
        return mixture(torch.from_numpy(x), sigma).numpy()

    truth = loop(denoise, y.numpy(), mask.double().numpy(), prior.numpy(), grid, [z.numpy() for z in noise])
    for backend in ("reference", "torch"):
        made = inpaint(mixture, y, mask, grid=grid, noise=noise, prior=prior, backend=backend)
        assert relative(made, torch.from_numpy(truth)) < 1e-10
        assert torch.equal(made[:, mask == 1], y[:, mask == 1])  # bit for bit


def test_everything_given_and_nothing_given(mixture):
    grid = score_sde_grid(VE(), 10)
    y = torch.randn(2, 6, dtype=DOUBLE)
    assert torch.equal(inpaint(mixture, y, torch.ones(6), grid=grid), y)
    # mask = 0 is the unconditional sampler: its draws are every second one, the others overwrite nothing
    none = torch.zeros(6)
    noise = draws_of(grid, none, (2, 6), corrector="langevin")
    prior = 50 * torch.randn(2, 6, dtype=DOUBLE)
    made = inpaint(mixture, y, none, grid=grid, noise=noise, prior=prior)
    plain = fastode.Engine(pc(grid, corrector="langevin"), mixture, (2, 6), "reference", dtype=DOUBLE)
    assert relative(made, plain(prior, noise=noise[::2])) < 1e-12


def test_a_gaussian_is_completed_as_its_conditional_says():
    """Mean and variance of the free element, read off the affine program; corrections bring them to the closed form."""
    rho, y = 0.9, 0.8
    data = Gaussian(torch.zeros(2), torch.tensor([[1.0, rho], [rho, 1.0]]))
    mean, variance = rho * y, 1 - rho**2
    errors = []
    for repeats in (1, 12):
        options = {"corrector": "annealed", "snr": 0.35, "corrector_steps": repeats}
        grid = score_sde_grid(VE(0.01, 5.0), 40)
        mask = torch.tensor([1.0, 0.0])
        program = pc(grid, mask=mask, **options)
        # sample 0: nothing but y; then every element of every draw alone, and the start of the free element
        n = 2 * program.draws + 2
        x = torch.zeros(n, 2, dtype=DOUBLE)
        x[0, 0] = y
        x[-1, 1] = 5.0

        def noise(k, n=n):
            z = torch.zeros(n, 2, dtype=DOUBLE)
            z[1 + 2 * k, 0] = z[2 + 2 * k, 1] = 1
            return z

        made = fastode.Engine(program, data, (n, 2), "reference", dtype=DOUBLE)(x, noise=noise)[:, 1]
        errors.append((abs(float(made[0]) - mean), abs(float(made[1:].square().sum()) - variance)))
    # Overwriting alone forgets how the free part answers to the given one; what is left at 12 corrections is what levels of
    # small sigma no longer mix: 0.72 -> 0.68, and 0.19 -> 0.21.
    assert errors[1][0] < 0.05 and errors[1][1] < 0.03
    assert errors[0][0] > 2 * errors[1][0] and errors[0][1] > 2 * errors[1][1]


def test_colorization_keeps_the_grey_image():
    """The mean over the colours is the input; the matrix is orthogonal, its first column the grey direction."""
    m = grey_matrix()
    assert torch.allclose(m @ m.T, torch.eye(3, dtype=DOUBLE), atol=1e-15)
    g = torch.Generator().manual_seed(0)
    centre = torch.rand(3, 2, 2, generator=g)
    data = Gaussian(centre, 0.05)
    grey = torch.rand(2, 1, 2, 2, generator=g, dtype=DOUBLE)
    made = colorize(data, grey, grid=score_sde_grid(VE(0.01, 10.0), 40))
    assert made.shape == (2, 3, 2, 2)
    assert float((made.mean(1, keepdim=True) - grey).abs().max()) < 1e-14
    # independent colours: the free directions keep the data's own means, 0.22 standard deviations apart
    free = mix(made, m)[:, 1:] - mix(centre[None].double(), m)[:, 1:]
    assert 0.01 < float(free.abs().mean()) < 0.6


def test_mixed_channels_are_another_view_of_one_denoiser():
    g = torch.Generator().manual_seed(0)
    centre = torch.randn(3, 2, 2, generator=g)
    data = Gaussian(centre, torch.rand(3, 2, 2, generator=g) + 0.1)
    m = grey_matrix()
    grid = make_grid("edm", 6)
    x = start(grid, (2, 3, 2, 2))
    turned = fastode.sample(mixed(data, m), mix(x, m), solver="dpm_solver_pp", grid=grid)
    assert relative(mix(turned, m.T), fastode.sample(data, x, solver="dpm_solver_pp", grid=grid)) < 1e-12


def classifier_of(mixture):
    """Exact p(component | x, sigma) of an isotropic mixture, as logits."""

    def classify(x, sigma):
        means, v = mixture.means.flatten(1).to(x), mixture.variances.to(x)
        total = v + torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1, 1) ** 2
        square = ((x.flatten(1)[:, None] - means) ** 2 / total + total.log()).sum(-1)
        return mixture.log_weights.to(x) - square / 2

    return classify


@pytest.mark.parametrize("kind", ["edm", "vp"])
def test_guided_mixture_is_its_component(mixture, kind):
    """S + grad log p(k|x) is the score of component k: guided D is that component's, in any frame."""
    net = classifier_guided(mixture, classifier_of(mixture), num_classes=4)
    grid = make_grid(kind, 8)
    x = start(grid, (4, 6))
    made = fastode.sample(net, x, solver="dpm_solver_pp", grid=grid, class_labels=[0, 1, 2, 3])
    for k in range(4):
        component = Gaussian(mixture.means[k], float(mixture.variances[k, 0]))
        alone = fastode.sample(component, x[k : k + 1], solver="dpm_solver_pp", grid=grid)
        assert relative(made[k : k + 1], alone) < 1e-9
    # without labels it is the mixture
    assert (
        relative(fastode.sample(net, x, solver="ddim", grid=grid), fastode.sample(mixture, x, solver="ddim", grid=grid))
        < 1e-12
    )


def test_guidance_reaches_predictors_correctors_and_drivers(mixture):
    net = classifier_guided(mixture, classifier_of(mixture), num_classes=4)
    component = Gaussian(mixture.means[2], float(mixture.variances[2, 0]))
    program = pc(score_sde_grid(VE(), 10), corrector="langevin")
    g = torch.Generator().manual_seed(0)
    x = 50 * torch.randn(2, 6, generator=g, dtype=DOUBLE)
    noise = [torch.randn(2, 6, generator=g, dtype=DOUBLE) for _ in range(program.draws)]
    guided = fastode.Engine(program, net, (2, 6), dtype=DOUBLE)(x, noise=noise, class_labels=2)
    assert relative(guided, fastode.Engine(program, component, (2, 6), dtype=DOUBLE)(x, noise=noise)) < 1e-8
    run = adaptive(net, x, schedule=EDM(0.01, 50.0), class_labels=[2, 2], rtol=1e-6, atol=1e-6)  # levels per row
    assert relative(run.samples, component.flow(x, 50.0, 0.01)) < 1e-4


def test_bad_input(mixture):
    grid = score_sde_grid(VE(), 5)
    y = torch.zeros(2, 6)
    for mask, message in (
        (torch.ones(5), "mask: must have the shape"),
        (torch.full((6,), 2.0), r"mask: must be in \[0, 1\]"),
        (1.0, "mask: must be a tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            inpaint(mixture, y, mask, grid=grid)
    with pytest.raises(ValueError, match="y: must be"):
        inpaint(mixture, torch.zeros(2, 6, dtype=torch.int64), torch.ones(6), grid=grid)
    with pytest.raises(ValueError, match="prior"):
        inpaint(mixture, y, torch.ones(6), grid=grid, prior=torch.zeros(1, 6))
    with pytest.raises(ValueError, match="VPLinear, SubVP and VE"):
        inpaint(mixture, y, torch.ones(6), grid=karras(EDM(), 4))
    with pytest.raises(ValueError, match="grey"):
        colorize(mixture, torch.zeros(2, 3, 4, 4), grid=grid)
    with pytest.raises(ValueError, match="matrix: must be orthogonal"):
        mixed(mixture, torch.ones(2, 2))
    with pytest.raises(TypeError, match="classifier"):
        classifier_guided(mixture, 3)
    with pytest.raises(ValueError, match="scale"):
        classifier_guided(mixture, classifier_of(mixture), scale=math.nan)
    net = classifier_guided(mixture, lambda x, s: x.sum(), num_classes=2)
    with pytest.raises(ValueError, match="logits"):
        fastode.sample(net, torch.zeros(2, 6), grid=[2.0, 1.0], class_labels=[0, 1])


def test_vp_returns_the_scaled_data():
    """On VP the result is a state at eps: alpha y, alpha = 0.99995, on given elements."""
    grid = score_sde_grid(VPLinear(), 25)
    y = torch.randn(2, 4, dtype=DOUBLE)
    data = GaussianMixture(torch.randn(2, 4), 0.2)
    made = inpaint(data, y, torch.ones(4), grid=grid)
    assert relative(made, float(grid.alpha[-1]) * y) < 1e-15
