"""Every solver against the diffusers scheduler that implements it: same levels, same start, closed-form denoiser.

The float64 runs read ``float32`` as ``float64`` inside the scheduler's module, because most schedulers keep their
tables (and some their state) in float32; nothing else of them changes. ``pytest tests/test_peers.py -s -q`` prints
every difference. docs/peers.md keeps them, together with those against peers that cannot be installed.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

import fastode
from fastode import Denoiser, Grid
from fastode.denoisers import GaussianMixture
from fastode.schedules import EDM, Discrete, Flow, exponential, karras, leading, linspace, time_uniform, trailing

diffusers = pytest.importorskip("diffusers", reason="diffusers is an optional extra: pip install 'fastode[diffusers]'")
diffusers.utils.logging.set_verbosity_error()  # for instance that scale_model_input was not called

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
DRAW_BY_DRAW = {torch.float64: 1e-10, torch.float32: 1e-5}  # of stochastic ones, whose fresh noise forgets roundings
SHAPE = (4, 3, 2, 2)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors of 48 numbers: waiting for other threads would be most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def mixture() -> GaussianMixture:
    g = torch.Generator().manual_seed(0)
    means = torch.randn(5, *SHAPE[1:], generator=g, dtype=torch.float64)
    return GaussianMixture(means, covariances=[0.1, 0.2, 0.3, 0.4, 0.5], weights=[1, 2, 3, 2, 1])


def draw(seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --- the peer ---


class Double:
    """A module whose ``float32`` is ``float64``."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, "float64" if name == "float32" else name)


@contextmanager
def precision(module: ModuleType, dtype: torch.dtype) -> Iterator[None]:
    if dtype == torch.float32:
        yield
        return
    names = {name: Double(value) for name, value in (("torch", torch), ("np", np)) if hasattr(module, name)}
    try:
        torch.set_default_dtype(torch.float64)
        with mock.patch.multiple(module, **names):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def scheduler(name: str, dtype: torch.dtype, steps: int, config: dict[str, Any]) -> Iterator[Any]:
    cls = getattr(diffusers, name)
    with precision(sys.modules[cls.__module__], dtype), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated algorithm types
        made = cls(**config)
        made.set_timesteps(steps)
        yield made


def kind(s: Any) -> str:
    """The frame of the peer's state: "vp" (alpha^2 + sigma^2 = 1), "ve" (alpha = 1), or "flow" (alpha + sigma = 1)."""
    name = type(s).__name__
    if name.startswith("FlowMatch") or s.config.get("use_flow_sigmas"):
        return "flow"
    return "ve" if name.startswith(("Euler", "Heun", "KDPM2", "LMS", "EDM")) else "vp"


def discrete(s: Any) -> bool:
    """DDIM, DDPM, LCM and PNDM step between entries of the table; the others between sigmas."""
    return type(s).__name__.startswith(("DDIM", "DDPM", "LCM", "PNDM"))


def levels(s: Any) -> tuple[Tensor, Tensor]:
    """alpha and sigma of every network call."""
    if discrete(s):
        bar = s.alphas_cumprod[s.timesteps].double()
        return bar.sqrt(), (1 - bar).sqrt()
    sigmas = s.sigmas[: len(s.timesteps)].double().clone()
    if type(s).__name__.startswith("KDPM2"):  # the ancestral one files its inner levels one place earlier
        shift = 0 if "Ancestral" in type(s).__name__ else 1
        sigmas[1::2] = s.sigmas_interpol[: len(s.timesteps)].double()[shift::2][: len(sigmas) // 2]
    return frame(s, sigmas)


def frame(s: Any, sigmas: Tensor) -> tuple[Tensor, Tensor]:
    if kind(s) == "flow":
        return 1 - sigmas, sigmas
    alpha = torch.ones_like(sigmas) if kind(s) == "ve" else torch.rsqrt(1 + sigmas**2)
    return alpha, alpha * sigmas


def posterior(x: Tensor, alpha: Any, sigma: Any) -> Tensor:
    """E[x_0 | x] of one Gaussian, in the state's own frame, so that alpha = 0 is no special case."""
    mean, v = mixture().means[0].to(x), 0.3
    return mean + alpha * v / (alpha**2 * v + sigma**2) * (x - alpha * mean)


def run_peer(s: Any, x: Tensor, noise: list[Tensor], **step: Any) -> Tensor:
    """The pipeline's loop, with the network in closed form."""
    data, prediction = mixture(), s.config.get("prediction_type")
    for i, (t, alpha, sigma) in enumerate(zip(s.timesteps, *(v.tolist() for v in levels(s)), strict=True)):
        if type(s).__name__.startswith("FlowMatch"):
            output = (x - posterior(x, alpha, sigma)) / sigma
        elif prediction == "v_prediction":
            d = posterior(x, alpha, sigma)
            output = alpha * (x - alpha * d) / sigma - sigma * d
        else:
            d = data(x / alpha, sigma / alpha)
            if prediction == "sample":
                output = d
            elif prediction == "flow_prediction":
                output = (x - d) / sigma
            elif type(s).__name__.startswith("EDM"):
                c = s.config.sigma_data
                output = (d - c**2 / (sigma**2 + c**2) * x) * (sigma**2 + c**2) ** 0.5 / (sigma * c)
            else:
                output = (x - alpha * d) / sigma
        if step.get("eta"):
            step["variance_noise"] = noise[i]
        with given_noise(s, noise[i]):
            x = s.step(output, t, x, **step).prev_sample
    return x


@contextmanager
def given_noise(s: Any, z: Tensor) -> Iterator[None]:
    """What the scheduler draws in this step is ``z``."""
    module = sys.modules[type(s).__module__]
    if hasattr(module, "randn_tensor"):
        with mock.patch.object(module, "randn_tensor", return_value=z):
            yield
    else:
        yield


# --- ours, on the peer's own levels ---


def grid_of(s: Any) -> Grid:
    if discrete(s):
        labels = s.timesteps.unique().flip(0)
        if isinstance(s, diffusers.PNDMScheduler) and not s.config.skip_prk_steps:  # calls at half steps in between
            labels = torch.arange(s.num_inference_steps).flip(0) * (1000 // s.num_inference_steps)
        one = torch.as_tensor(s.final_alpha_cumprod if isinstance(s, (diffusers.DDIMScheduler, PNDM_TYPE)) else 1.0)
        bar = torch.cat([s.alphas_cumprod[labels], one.reshape(1).to(s.alphas_cumprod)]).double()
        bar = torch.unique_consecutive(bar)  # an empty last step where label 0 is also the end
        return Grid(sigma=(1 - bar).sqrt(), alpha=bar.sqrt(), schedule=Discrete(tuple(s.alphas_cumprod.tolist())))
    # Heun and KDPM2 list a level per call, and some lists end with an empty step.
    alpha, sigma = frame(s, torch.unique_consecutive(s.sigmas.double()))
    return Grid(sigma=sigma, alpha=alpha)


def denoiser_of(s: Any) -> Any:
    if type(s).__name__.startswith("FlowMatch"):
        return Denoiser(lambda x, t: (x - posterior(x, 1 - col(t), col(t))) / col(t), prediction="flow")
    if s.config.get("prediction_type") != "v_prediction":
        return mixture()
    bar = s.alphas_cumprod.double()

    def network(x: Tensor, label: Tensor) -> Tensor:
        a = bar[label.round().long()].to(x.dtype)
        alpha, sigma = col(a.sqrt()), col((1 - a).sqrt())
        d = posterior(x, alpha, sigma)
        return alpha * (x - alpha * d) / sigma - sigma * d

    return Denoiser(network, prediction="v", schedule=Discrete(tuple(bar.tolist())))


def col(t: Tensor) -> Tensor:
    return t.reshape(-1, 1, 1, 1)


def compare(name: str, dtype: torch.dtype, solver: str, options: dict[str, Any], steps: int, **config: Any) -> float:
    """Largest difference of the final states, relative to the largest value."""
    config = dict(config)
    every = config.pop("every", 1)  # so many levels of the peer are one step of ours
    step = config.pop("step", {})
    drawn = config.pop("drawn", lambda i: i)  # which of the peer's draws is draw i of ours
    noise = [draw(10 + i, dtype) for i in range(2 * steps)]
    with scheduler(name, dtype, steps, config) as s:
        grid, denoiser = grid_of(s), denoiser_of(s)
        x = draw(1, dtype) * float(grid.sigma[0])
        theirs = run_peer(s, x, noise, **step)
    if every > 1:
        keep = sorted({*range(0, grid.steps, every), grid.steps})
        grid = Grid(sigma=grid.sigma[keep], alpha=grid.alpha[keep])
    given = [noise[k] for k in map(drawn, range(steps)) if k < len(noise)]
    ours = fastode.sample(denoiser, x, solver=solver, grid=grid, noise=lambda i: given[i], **options)
    assert ours.dtype == theirs.dtype == dtype
    return float((ours - theirs).abs().max() / theirs.abs().max())


TABLE = Discrete.linear(interpolation="sigma")
DPM, UNIPC, DEIS = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"
FLOW = "FlowMatchEulerDiscreteScheduler"
PNDM_TYPE, SA = diffusers.PNDMScheduler, "SASolverScheduler"
SINGLE, PNDM, EDM_DPM = "DPMSolverSinglestepScheduler", "PNDMScheduler", "EDMDPMSolverMultistepScheduler"


def cases() -> Iterator[Any]:
    def case(label: str, *values: Any, **config: Any) -> Any:
        return pytest.param(*values, config, id=label)

    for spacing_ in ("leading", "trailing"):
        for eta in (0.0, 1.0):
            own: dict[str, Any] = {"clip_sample": False, "timestep_spacing": spacing_, "step": {"eta": eta}}
            yield case(f"ddim-{spacing_}-eta{eta:g}", "DDIMScheduler", "ddim", {"eta": eta}, 10, **own)
    sd = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    own = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, **sd}
    yield case("ddim-stable-diffusion", "DDIMScheduler", "ddim", {}, 10, **own)

    zero_snr = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "clip_sample": False}
    yield case("ddim-zero-snr-v", "DDIMScheduler", "ddim", {}, 10, timestep_spacing="trailing", **zero_snr)

    noise_mode = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
    for order in (1, 2, 3):
        for rule in ("midpoint", "heun")[: 1 if order == 1 else 2]:
            o = {"order": order, "solver_type": rule}
            c = {"solver_order": order, "solver_type": rule}
            yield case(f"dpm++{order}-{rule}", DPM, "dpm_solver_pp", o, 8, **c)
            yield case(f"dpm{order}-{rule}", DPM, "dpm_solver_pp", {**o, "prediction": "eps"}, 8, **c, **noise_mode)
    long = {"order": 3, "lower_order_final": False}  # the peer lowers the order at the end below 15 steps only
    yield case("dpm++3-20-steps", DPM, "dpm_solver_pp", long, 20, solver_order=3)
    yield case("dpm++3-not-lowered", DPM, "dpm_solver_pp", long, 8, solver_order=3, lower_order_final=False)
    placements: dict[str, dict[str, Any]] = {
        "leading": {"timestep_spacing": "leading", "steps_offset": 1},
        "trailing": {"timestep_spacing": "trailing"},
        "sigma_min": {"final_sigmas_type": "sigma_min"},
        "karras": {"use_karras_sigmas": True},
        "exponential": {"use_exponential_sigmas": True},
        "lu": {"use_lu_lambdas": True},
        "beta": {"use_beta_sigmas": True},
        "flow": {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
        "x0": {"prediction_type": "sample"},
    }
    for label, c in placements.items():
        yield case(f"dpm++3-{label}", DPM, "dpm_solver_pp", {"order": 3}, 8, solver_order=3, **c)

    block = {"solver_order": 2, "use_exponential_sigmas": True, "every": 2}  # r = 1/2 on a log-SNR grid
    yield case("dpm++2s", SINGLE, "dpm_solver_pp_s", {}, 9, **block)
    yield case("dpm2s", SINGLE, "dpm_solver_2", {}, 9, **block, **noise_mode)

    for order in (1, 2, 3):
        for variant in ("bh1", "bh2"):
            for x0 in (True, False):
                o = {"order": order, "variant": variant, "prediction": "x0" if x0 else "eps"}
                c = {"solver_order": order, "solver_type": variant, "predict_x0": x0, "final_sigmas_type": "sigma_min"}
                yield case(f"unipc{order}-{variant}-{o['prediction']}", UNIPC, "unipc", o, 8, **c)
    off = {"disable_corrector": list(range(8))}
    yield case("unip3", UNIPC, "unipc", {"order": 3, "corrector": False}, 8, solver_order=3, **off)
    for label in ("leading", "trailing", "karras", "exponential", "beta", "flow", "x0"):
        yield case(f"unipc3-{label}", UNIPC, "unipc", {"order": 3}, 8, solver_order=3, **placements[label])

    for order in (1, 2, 3):
        c = {"solver_order": order, "lower_order_final": False}
        yield case(f"deis{order}", DEIS, "deis", {"order": order, "space": "lam"}, 8, **c)
        o = {"order": order, "space": "lam", "lower_order_final": True}
        yield case(f"deis{order}-lowered", DEIS, "deis", o, 8, solver_order=order)

    for skip in (False, True):
        for one in (False, True):
            c = {"skip_prk_steps": skip, "set_alpha_to_one": one}
            label = f"{'plms' if skip else 'pndm'}-to-{'zero' if one else 'label-0'}"
            yield case(label, PNDM, "pndm", {"skip_prk_steps": skip}, 10, **c)
    plms = {"skip_prk_steps": True}
    yield case("plms-stable-diffusion", PNDM, "pndm", plms, 10, steps_offset=1, **plms, **sd)

    for name, solver in (("Euler", "ddim"), ("Heun", "heun"), ("KDPM2", "dpm_solver_2"), ("LMS", "lms")):
        for label, c in (("linspace", {}), ("karras", placements["karras"])):
            yield case(f"{name.lower()}-{label}", f"{name}DiscreteScheduler", solver, {}, 8, **c)
    yield case("edm-euler", "EDMEulerScheduler", "ddim", {}, 8)
    for order in (1, 2, 3):
        yield case(f"edm-dpm++{order}", EDM_DPM, "dpm_solver_pp", {"order": order}, 8, solver_order=order)
    # Stochastic ones, draw by draw. Schedulers that are called twice per step draw both times; some use only the second.
    second: dict[str, Any] = {"drawn": lambda i: 2 * i + 1}
    for label in ("leading", "trailing"):
        c = placements[label]
        yield case(f"euler-a-{label}", "EulerAncestralDiscreteScheduler", "euler_ancestral", {}, 8, **c)
    for label, c in (("linspace", {}), ("karras", placements["karras"])):
        yield case(f"kdpm2-a-{label}", "KDPM2AncestralDiscreteScheduler", "dpm_2_ancestral", {}, 8, **c, **second)
    for variance in ("fixed_small", "fixed_large"):
        c = {"variance_type": variance, "clip_sample": False}
        yield case(f"ddpm-{variance}", "DDPMScheduler", "ddpm", {"variance_type": variance}, 10, **c)
    sde: dict[str, Any] = {"algorithm_type": "sde-dpmsolver++"}
    for order, rule in ((1, "midpoint"), (2, "midpoint"), (2, "heun")):
        o, c = {"order": order, "solver_type": rule}, {"solver_order": order, "solver_type": rule, **sde}
        yield case(f"sde-dpm++{order}-{rule}", DPM, "sde_dpm_solver_pp", o, 8, **c)
        yield case(f"edm-sde-dpm++{order}-{rule}", EDM_DPM, "sde_dpm_solver_pp", o, 8, **c)
    yield case("sde-dpm++2-karras", DPM, "sde_dpm_solver_pp", {}, 8, solver_order=2, **sde, **placements["karras"])
    yield case("lcm", "LCMScheduler", "lcm", {"sigma_data": 0.5}, 4, clip_sample=False)
    for predictor, corrector in ((1, 1), (2, 2), (3, 1), (1, 3), (3, 4)):
        o = c = {"predictor_order": predictor, "corrector_order": corrector}
        yield case(f"sa-{predictor}-{corrector}", SA, "sa_solver", o, 8, tau_func=lambda t: 1.0, **c)
    c = {"predictor_order": 2, "corrector_order": 2}
    some = {"s_tmin": float(TABLE.rho(200)), "s_tmax": float(TABLE.rho(800)), "tau": 1.2}
    on = {"tau_func": lambda t: 1.2 if 200 <= t <= 800 else 0.0}
    yield case("sa-2-2-interval", SA, "sa_solver", some, 12, **c, **on, drawn=lambda i: i + 3)
    all_way = {"lower_order_final": False}
    yield case("sa-3-4-not-lowered", SA, "sa_solver", {**o, **all_way}, 8, **o, **all_way, tau_func=lambda t: 1.0)

    for shift in (1.0, 3.0):
        yield case(f"flow-euler-shift{shift:g}", FLOW, "ddim", {}, 8, shift=shift)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize(("name", "solver", "options", "steps", "config"), list(cases()))
def test_scheduler(
    name: str,
    solver: str,
    options: dict[str, Any],
    steps: int,
    config: dict[str, Any],
    dtype: torch.dtype,
    request: pytest.FixtureRequest,
) -> None:
    difference = compare(name, dtype, solver, options, steps, **config)
    print(f"\n{name:32} {request.node.callspec.id:28} {difference:.1e}  ", end="")
    drawn = solver in ("ddpm", "lcm", "sa_solver", "sde_dpm_solver_pp") or "ancestral" in solver
    assert difference <= (DRAW_BY_DRAW if drawn else TOLERANCE)[dtype]


# --- grids ---

LABELS = [  # ours; schedulers that place their labels so; their options
    (linspace, (DPM, UNIPC, DEIS), {}),
    (lambda t, n: leading(t, n, offset=1), ("DDIMScheduler", PNDM, "EulerDiscreteScheduler"), {"steps_offset": 1}),
    (trailing, ("DDIMScheduler", PNDM, "EulerDiscreteScheduler", DPM, UNIPC, DEIS), {}),
]


@pytest.mark.parametrize(("ours", "names", "options"), LABELS, ids=["linspace", "leading", "trailing"])
def test_labels(ours: Any, names: tuple[str, ...], options: dict[str, Any], request: pytest.FixtureRequest) -> None:
    """Also where a label falls on a tie (26, 30, 48): rounded the other way, the grid is another one."""
    for name in names:
        for steps in (1, 2, 5, 6, 7, 10, 26, 30, 48, 50, 96, 100):
            if name == PNDM and steps < 2:
                continue
            config = {"timestep_spacing": request.node.callspec.id, **options}
            if name == PNDM:
                config["skip_prk_steps"] = True
            with scheduler(name, torch.float64, steps, config) as s:
                assert ours(TABLE, steps).t[:-1].tolist() == s.timesteps.unique().flip(0).tolist(), (name, steps)


SIGMAS = [
    (lambda n: linspace(TABLE, n), DPM, {}),
    (lambda n: linspace(TABLE, n, final="sigma_min"), DPM, {"final_sigmas_type": "sigma_min"}),
    (lambda n: leading(TABLE, n, final="sigma_min"), DEIS, {"timestep_spacing": "leading"}),
    (lambda n: trailing(TABLE, n, final="sigma_min"), DEIS, {"timestep_spacing": "trailing"}),
    (lambda n: karras(TABLE, n, final="zero"), UNIPC, {"use_karras_sigmas": True}),
    (lambda n: exponential(TABLE, n, final="zero"), DPM, {"use_exponential_sigmas": True}),
    (lambda n: exponential(TABLE, n, final="zero"), DPM, {"use_lu_lambdas": True}),
    (lambda n: karras(EDM(), n, final="zero"), "EDMEulerScheduler", {}),
    (lambda n: exponential(EDM(), n, final="zero"), EDM_DPM, {"sigma_schedule": "exponential"}),
    (
        lambda n: time_uniform(Flow(3.0, t_min=3 / 1002), n, final="zero"),
        FLOW,
        {"shift": 3.0},
    ),  # it shifts 1/1000 twice
]


@pytest.mark.parametrize(("ours", "name", "config"), SIGMAS)
def test_sigmas(ours: Any, name: str, config: dict[str, Any]) -> None:
    for steps in (2, 5, 8, 20):
        with scheduler(name, torch.float64, steps, config) as s:
            sigmas = ours(steps).sigma if kind(s) == "flow" else ours(steps).sigmas
            torch.testing.assert_close(sigmas, s.sigmas.double(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_pipeline_sigmas(shift: float) -> None:
    """The pipelines of flow models pass linspace(1, 1/n, n), which the scheduler shifts and ends with 0."""
    for steps in (1, 4, 28):
        s = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        s.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
        torch.testing.assert_close(time_uniform(Flow(shift), steps).sigma, s.sigmas.double(), rtol=2e-7, atol=0)
