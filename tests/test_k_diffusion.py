"""k-diffusion's functions on our solvers: its formulas in float64, its callback, its noise, its models, and its users' habits.

``pytest tests/test_k_diffusion.py`` also runs beside k-diffusion itself where that is installed.
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastode
from fastode import SOLVERS, Denoiser, k_diffusion
from fastode.denoisers import GaussianMixture
from fastode.schedules import EDM, Discrete, karras, time_uniform
from tests.conftest import relative

SHAPE = (3, 6)


def sigmas(steps: int = 6, final: str = "zero") -> Tensor:
    return karras(EDM(0.03, 15.0), steps, final=final).sigmas


def x0(seed: int = 0, scale: float = 15.0) -> Tensor:
    return scale * torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class KModel:
    """A k-diffusion model: sigma comes as [B]; records what it was called with."""

    def __init__(self, data: GaussianMixture) -> None:
        self.data, self.seen = data, []

    def __call__(self, x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
        assert sigma.shape == (x.shape[0],) and sigma.dtype == x.dtype
        self.seen.append((float(sigma[0]), extra))
        return self.data(x, sigma[0]) * extra.get("scale", 1.0)


# The formulas, in plain float64 loops (arXiv:2206.00364, Algorithm 2 without churn; arXiv:2211.01095, Algorithm 2).


def euler(model: Any, x: Tensor, s: Tensor, noise: list[Tensor] | None = None) -> Tensor:
    for i in range(len(s) - 1):
        slope = (x - model(x, s[i].expand(len(x)))) / s[i]
        up = 0.0 if noise is None else min(s[i + 1], (s[i + 1] ** 2 * (1 - s[i + 1] ** 2 / s[i] ** 2)) ** 0.5)
        x = x + slope * ((s[i + 1] ** 2 - up**2) ** 0.5 - s[i])
        if noise is not None and s[i + 1] > 0:
            x = x + up * noise[i]
    return x


def heun(model: Any, x: Tensor, s: Tensor) -> Tensor:
    for i in range(len(s) - 1):
        slope, h = (x - model(x, s[i].expand(len(x)))) / s[i], s[i + 1] - s[i]
        if s[i + 1] > 0:
            y = x + h * slope
            slope = (slope + (y - model(y, s[i + 1].expand(len(x)))) / s[i + 1]) / 2
        x = x + h * slope
    return x


def dpmpp_2m(model: Any, x: Tensor, s: Tensor) -> Tensor:
    old = None
    for i in range(len(s) - 1):
        d = model(x, s[i].expand(len(x)))
        if s[i + 1] == 0:
            return d
        h = (s[i] / s[i + 1]).log()
        m = d if old is None else d + (d - old) * h / (2 * (s[i - 1] / s[i]).log())
        x, old = s[i + 1] / s[i] * x - torch.expm1(-h) * m, d
    return x


LOOPS = {"euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m}


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("name", LOOPS)
def test_is_the_formula(name: str, final: str, mixture: GaussianMixture) -> None:
    s, x = sigmas(final=final), x0()
    got = getattr(k_diffusion, f"sample_{name}")(KModel(mixture), x, s, disable=True)
    assert relative(got, LOOPS[name](KModel(mixture), x, s)) < 1e-12  # the same sums in float64, grouped differently


def test_ancestral_noise_in_order(mixture: GaussianMixture) -> None:
    s, x = sigmas(), x0()
    noise = [x0(seed=10 + i, scale=1.0) for i in range(6)]
    asked: list[tuple[float, float]] = []

    def sampler(sigma: Tensor, sigma_next: Tensor) -> Tensor:
        asked.append((float(sigma), float(sigma_next)))
        return noise[len(asked) - 1]

    got = k_diffusion.sample_euler_ancestral(KModel(mixture), x, s, disable=True, noise_sampler=sampler)
    assert relative(got, euler(KModel(mixture), x, s, noise)) < 1e-12
    assert asked == list(zip(s[:-2].tolist(), s[1:-1].tolist(), strict=True))
    still = k_diffusion.sample_euler_ancestral(KModel(mixture), x, s, disable=True, s_noise=0.0)
    assert relative(still, euler(KModel(mixture), x, s, [0 * n for n in noise])) < 1e-12
    torch.manual_seed(3)
    drawn = [torch.randn_like(x) for _ in range(5)]
    torch.manual_seed(3)  # without a sampler: torch's generator, one draw a step
    got = k_diffusion.sample_euler_ancestral(KModel(mixture), x, s, disable=True)
    assert relative(got, euler(KModel(mixture), x, s, drawn)) < 1e-12


@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "amed"])  # needs a predictor
def test_every_solver_is_there(name: str, mixture: GaussianMixture) -> None:
    s, x = sigmas(5), x0()
    torch.manual_seed(5)
    got = getattr(k_diffusion, f"sample_{name}")(KModel(mixture), x, s, disable=True)
    torch.manual_seed(5)
    noise = [torch.randn_like(x) for _ in range(SOLVERS[name](s).draws)]
    assert torch.equal(got, fastode.sample(mixture, x, solver=name, grid=s, noise=noise))


def test_callback(mixture: GaussianMixture) -> None:
    s, x, seen = sigmas(), x0(), []
    model = KModel(mixture)
    k_diffusion.sample_heun(model, x, s, {"scale": 1.0}, seen.append, True)
    assert [c["i"] for c in seen] == list(range(6)) and all(
        set(c) == {"x", "i", "sigma", "sigma_hat", "denoised"} for c in seen
    )
    assert torch.equal(torch.stack([c["sigma"] for c in seen]), s[:-1])
    torch.testing.assert_close(torch.stack([c["sigma_hat"] for c in seen]), s[:-1], rtol=1e-14, atol=0)
    assert torch.equal(seen[0]["x"], x)
    for c in seen:
        assert relative(c["denoised"], mixture(c["x"], c["sigma"])) < 1e-12
    assert all(extra == {"scale": 1.0} for _, extra in model.seen)

    def stop(_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # how webui interrupts
        k_diffusion.sample_euler(model, x, s, callback=stop, disable=True)


def test_habits(mixture: GaussianMixture) -> None:
    """Signatures are inspected, dtypes are kept, a list without a step is none."""
    names = list(inspect.signature(k_diffusion.sample_dpmpp_2m).parameters)
    assert names[:6] == ["model", "x", "sigmas", "extra_args", "callback", "disable"] and "order" in names
    assert inspect.signature(k_diffusion.sample_euler_ancestral).parameters["eta"].default == 1.0
    assert k_diffusion.sample_unipc.__name__ == "sample_unipc"
    x, half = x0(), x0().half()
    assert k_diffusion.sample_euler(KModel(mixture), x, sigmas()[:1]) is x
    assert k_diffusion.sample_euler(KModel(mixture), half, sigmas(), disable=True).dtype == torch.half
    assert not hasattr(k_diffusion, "sample_nothing")
    with pytest.raises(AttributeError, match="did you mean sample_dpmpp_2m"):
        _ = k_diffusion.sample_dpmpp_2mm


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "unipc", "heun"])
def test_flow_models_of_comfyui(name: str, mixture: GaussianMixture) -> None:
    """Its samplers are handed states (1 - t) x_0 + t n of flow models, and times as sigmas, from pure noise on."""

    class CONST: ...

    class Inner:
        model_sampling = CONST()

    class Model:
        inner_model = Inner()

        def __call__(self, x: Tensor, t: Tensor) -> Tensor:
            t = t[:, None]
            return x - t * velocity(x, t)

    def velocity(x: Tensor, t: Tensor) -> Tensor:  # of one Gaussian, in the state's own frame: finite at alpha = 0
        mean, v = mixture.means[0].to(x), 0.3
        return (x - (mean + (1 - t) * v / ((1 - t) ** 2 * v + t**2) * (x - (1 - t) * mean))) / t

    levels, x = time_uniform(fastode.schedules.Flow(3.0), 6), x0(scale=1.0)
    seen: list[dict[str, Any]] = []
    got = getattr(k_diffusion, f"sample_{name}")(Model(), x, levels.sigma, callback=seen.append, disable=True)
    network = Denoiser(lambda y, t: velocity(y, t[:, None]), prediction="flow")
    assert relative(got, fastode.sample(network, x, solver=k_diffusion._FUNCTIONS[f"sample_{name}"].solver, grid=levels,
                                        **k_diffusion._FUNCTIONS[f"sample_{name}"].defaults)) < 1e-12  # fmt: skip
    assert [float(c["sigma_hat"]) for c in seen] == pytest.approx(levels.sigma[:-1].tolist(), rel=1e-12)


def test_our_denoisers() -> None:
    model, s = fastode.load("mnist"), sigmas(3)
    x = 15.0 * torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    extra = {"class_labels": torch.tensor([1, 2]), "guidance_scale": 1.5}
    got = k_diffusion.sample_dpmpp_2m(model, x, s, extra, disable=True)
    options = {"solver": "dpm_solver_pp", "lower_order_final": False, "grid": s}
    assert torch.equal(got, fastode.sample(model, x, **options, **extra))


# --- networks as they come ---


class DiscreteEps(nn.Module):
    """What k-diffusion makes of an eps network over a DDPM table: c_in, the nearest label, x - sigma eps."""

    def __init__(self, table: Discrete, network: nn.Module) -> None:
        super().__init__()
        self.inner_model, self.log_sigmas = network, table.rho(torch.arange(len(table))).log()

    def forward(self, x: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        label = (sigma.log()[:, None] - self.log_sigmas.to(sigma)).abs().argmin(1)
        c = sigma[:, None]
        return x - c * self.inner_model(x / (c**2 + 1) ** 0.5, label, **kwargs)


class Eps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6, dtype=torch.float64)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return torch.tanh(self.linear(x)) + label[:, None].double() / 1000


def test_external_model() -> None:
    """On the levels of its own table it is our eps denoiser."""
    table = Discrete.scaled_linear()
    network = Eps()
    labels = torch.tensor([999.0, 700, 400, 100, 10])
    s = torch.cat([table.rho(labels), torch.zeros(1)])
    got = k_diffusion.sample_unipc(DiscreteEps(table, network), x0(), s, disable=True)
    want = fastode.sample(Denoiser(network, "eps", table), x0(), solver="unipc", grid=s)
    assert relative(got, want) < 1e-9  # labels of ours come from an inversion of the table


class EDMPrecond(nn.Module):
    """The interface of NVlabs/edm: ``net(x, sigma, class_labels)``, one-hot labels, its noise range, ``round_sigma``."""

    def __init__(self, label_dim: int = 3) -> None:
        super().__init__()
        self.img_resolution, self.img_channels, self.label_dim = 4, 2, label_dim
        self.model = SimpleNamespace(label_dropout=0.1)  # trained without labels too, so guidance has a meaning
        self.sigma_min, self.sigma_max = 0.0, float("inf")
        self.weight = nn.Parameter(torch.tensor([0.1, -0.2, 0.4]))

    def forward(self, x: Tensor, sigma: Any, class_labels: Tensor | None = None, force_fp32: bool = False) -> Tensor:
        sigma = torch.as_tensor(sigma).to(torch.float32).reshape(-1, 1, 1, 1)
        labels = (
            torch.zeros([1, self.label_dim])
            if class_labels is None
            else class_labels.to(torch.float32).reshape(-1, self.label_dim)
        )
        shift = (labels @ self.weight[: self.label_dim]).reshape(-1, 1, 1, 1) if self.label_dim else 0.0
        return x.float() / (1 + sigma**2) + shift

    def round_sigma(self, sigma: Any) -> Any:
        return torch.as_tensor(sigma)


def test_edm_network_unwrapped() -> None:
    net, x = EDMPrecond(), 80 * torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    s = karras(EDM(), 5, final="zero").sigmas
    labels = torch.tensor([2, 0])
    got = fastode.sample(net, x, solver="edm", grid=s, class_labels=labels)
    rows = nn.functional.one_hot(labels, 3).float()
    want = heun(lambda y, sigma: net(y, sigma, rows), x.double(), s)
    assert relative(got.double(), want) < 1e-5  # the network computes in float32
    same = k_diffusion.sample_heun(net, x, s, extra_args={"class_labels": rows}, disable=True)
    assert relative(same, got) < 1e-6
    # seeds, the range of the grid and guidance against "no class" (rows of zeros) come from the network
    made = fastode.sample(net, seeds=[1, 2], nfe=5, solver="unipc", class_labels=labels, guidance_scale=2.0)
    assert made.shape == (2, 2, 4, 4)
    free = fastode.sample(net, x, solver="edm", grid=s)
    zero = fastode.sample(net, x, solver="edm", grid=s, class_labels=labels, guidance_scale=0.0)
    assert relative(zero, free) < 1e-6
    net.model.label_dropout = 0
    with pytest.raises(ValueError, match="has no unconditional input"):
        fastode.sample(net, x, solver="edm", grid=s, class_labels=labels, guidance_scale=2.0)
    with pytest.raises(ValueError, match="class_labels"):
        fastode.sample(EDMPrecond(0), x, solver="edm", grid=s, class_labels=labels)


def test_bad_input(mixture: GaussianMixture) -> None:
    model = KModel(mixture)
    for match, call in {
        "sigma": lambda: k_diffusion.sample_euler(model, x0(), sigmas().flip(0)),
        "sigmas": lambda: k_diffusion.sample_euler(model, x0(), sigmas()[None]),
        "x:": lambda: k_diffusion.sample_euler(model, torch.zeros(2, 3, dtype=torch.long), sigmas()),
        "model": lambda: k_diffusion.sample_euler(3, x0(), sigmas()),
        "unknown option 'churn'": lambda: k_diffusion.sample_euler(model, x0(), sigmas(), churn=1.0),
    }.items():
        with pytest.raises((ValueError, TypeError), match=match):
            call()
    assert not model.seen


# --- beside k-diffusion ---

PEERS = {
    "euler": {},
    "euler_ancestral": {"eta": 0.7},
    "heun": {},
    "dpm_2": {},
    "lms": {},
    "dpmpp_2m": {},
    "dpmpp_2m_sde": {"eta": 0.6},
    "dpmpp_3m_sde": {"eta": 0.6},
    "dpm_2_ancestral": {"eta": 0.7},
    "dpmpp_2s_ancestral": {"eta": 0.7},
}


@pytest.mark.parametrize("name", PEERS)
def test_beside_k_diffusion(name: str, mixture: GaussianMixture) -> None:
    peer = pytest.importorskip("k_diffusion.sampling", exc_type=ImportError)
    s, x = sigmas(8), x0()
    options = dict(PEERS[name])
    if "eta" in options:
        options["noise_sampler"] = lambda a, b: x0(seed=int(1e3 * float(a)), scale=1.0)
    theirs = getattr(peer, f"sample_{name}")(KModel(mixture), x, s, disable=True, **options)
    ours = getattr(k_diffusion, f"sample_{name}")(KModel(mixture), x, s, disable=True, **options)
    assert relative(ours, theirs) < 1e-9  # its LMS integrates by quadrature to 1e-4 of a weight's last digits
