"""The diffusers scheduler: every solver equals the engine, every class its own method, in real pipelines too."""

from __future__ import annotations

import copy
import inspect
import json
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastode
from fastode import SOLVERS, Denoiser
from fastode.denoisers import GaussianMixture
from fastode.schedules import Discrete, Flow
from tests.conftest import relative

diffusers = pytest.importorskip("diffusers", reason="diffusers is an optional extra: pip install 'fastode[diffusers]'")
diffusers.utils.logging.set_verbosity_error()

from fastode import FastODEScheduler  # noqa: E402 (needs diffusers)
from tests import tiny_pipelines as tiny  # noqa: E402

SHAPE = (3, 2, 2, 2)
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
TOLERANCE = 1e-4  # of two float32 computations in different orders (docs/peers.md); measured: below 2e-6
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def draw(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def network(x: Tensor, t: Any) -> Tensor:
    """Something smooth that depends on the label."""
    w = torch.linspace(-1, 1, x[0].numel(), dtype=x.dtype).reshape(x.shape[1:])
    return torch.tanh(x * w + x.flip(1)) + 0.1 * torch.sin(torch.as_tensor(t).to(x.dtype) / 300)


def loop(s: Any, steps: int | None = 8, net: Callable[[Tensor, Any], Tensor] = network, x: Tensor | None = None,
         **where: Any) -> Tensor:  # fmt: skip
    """What a pipeline does."""
    s.set_timesteps(steps, **where)
    x = (draw() if x is None else x) * getattr(s, "init_noise_sigma", 1.0)
    generator = torch.Generator().manual_seed(1)
    extra = {"generator": generator} if "generator" in inspect.signature(s.step).parameters else {}
    for t in s.timesteps:
        x = s.step(
            net(s.scale_model_input(x, t) if hasattr(s, "scale_model_input") else x, t), t, x, **extra
        ).prev_sample
    return x


# --- the definition: playing a program stage by stage is running it ---


@pytest.mark.parametrize("frame", ["vp", "ve", "flow"])
@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_is_the_engine(name: str, frame: str, mixture: GaussianMixture) -> None:
    levels, fields = {
        "vp": ("DPMSolverMultistepScheduler", {"prediction_type": "sample"}),
        "ve": ("EulerDiscreteScheduler", {"prediction_type": "original_sample"}),
        "flow": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    }[frame]
    s = FastODEScheduler(solver=name, levels=levels, **fields)
    s.set_timesteps(7)
    plan = s._run.plan
    x = draw(dtype=torch.float64).reshape(3, 8)[:, :6] * float(plan.levels.grid.sigma[0])
    want = fastode.sample(_denoiser(frame, mixture), x, solver=name, grid=plan.levels.grid)
    got = x
    assert len(s.timesteps) == plan.program.nfe
    for t, stage in zip(s.timesteps, plan.program.stages, strict=True):
        rho, alpha, sigma = stage.level.rho, stage.level.alpha, stage.level.sigma
        if frame == "flow":
            output = _velocity(got, sigma, mixture)
        else:
            output = mixture(got / alpha, rho)
        got = s.step(output, t, got).prev_sample
    assert got.dtype == torch.float64
    assert relative(got, want) < 1e-10  # the same sums in float64


def _velocity(x: Tensor, t: Any, mixture: GaussianMixture) -> Tensor:
    mean, v = mixture.means[0].to(x), 0.3  # one Gaussian, in the state's own frame: finite at alpha = 0
    return (x - (mean + (1 - t) * v / ((1 - t) ** 2 * v + t**2) * (x - (1 - t) * mean))) / t


def _denoiser(frame: str, mixture: GaussianMixture) -> Any:
    if frame == "flow":
        return Denoiser(lambda x, t: _velocity(x, t[:, None], mixture), prediction="flow", schedule=Flow())
    return mixture


# --- every class, its own method ---


def cases() -> list[Any]:
    found: list[tuple[str, dict[str, Any]]] = []
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    v = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    for order in (1, 2, 3):
        for name in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"):
            found.append((name, {"solver_order": order, **SD}))
        found.append(("EDMDPMSolverMultistepScheduler", {"solver_order": order}))
    bh1 = {"solver_type": "bh1", "final_sigmas_type": "sigma_min"}  # to zero its own bh1 is NaN
    dpm, unipc, euler = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler"
    found += [(dpm, {"use_karras_sigmas": True}), (dpm, {"use_exponential_sigmas": True}), (dpm, v), (dpm, flow)]
    found += [(dpm, {"use_lu_lambdas": True}), (dpm, {"use_beta_sigmas": True}), (dpm, {"timestep_spacing": "leading"})]
    found += [(dpm, {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}), (dpm, {"thresholding": True})]
    found += [(dpm, {"solver_type": "heun", "lower_order_final": False}), (unipc, flow), (unipc, bh1)]
    found += [(unipc, {"use_karras_sigmas": True}), (dpm, {"thresholding": True, "sample_max_value": 1.5})]
    found += [("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, **SD})]
    found += [("DDPMScheduler", {}), ("DDPMScheduler", {"timestep_spacing": "trailing", "clip_sample": False})]
    found += [("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1, **SD})]
    found += [("PNDMScheduler", {"set_alpha_to_one": True}), (euler, SD), (euler, {"use_karras_sigmas": True})]
    found += [(euler, {"prediction_type": "v_prediction", "timestep_spacing": "leading", "steps_offset": 1, **SD})]
    continuous = {"timestep_type": "continuous", "use_karras_sigmas": True, "sigma_min": 0.002, "sigma_max": 700.0}
    found += [(euler, {"prediction_type": "v_prediction", **continuous}), ("EulerAncestralDiscreteScheduler", SD)]
    found += [("HeunDiscreteScheduler", SD), ("HeunDiscreteScheduler", {"use_karras_sigmas": True})]
    found += [("KDPM2DiscreteScheduler", SD), ("LMSDiscreteScheduler", SD), ("EDMEulerScheduler", {})]
    found += [("FlowMatchEulerDiscreteScheduler", {"shift": 3.0})]
    return [pytest.param(n, c, id="-".join([n.removesuffix("Scheduler"), *map(str, c.values())])) for n, c in found]


@pytest.mark.parametrize(("name", "config"), cases())
def test_the_method_of_the_config(name: str, config: dict[str, Any]) -> None:
    theirs = getattr(diffusers, name)(**config)
    ours = FastODEScheduler.from_config(theirs)
    want, got = loop(theirs, 10), loop(ours, 10)
    assert relative(got, want) < TOLERANCE
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=1e-6, atol=0)  # KDPM2's inner labels are float32
    assert ours.order == theirs.order and float(ours.init_noise_sigma) == float(
        getattr(theirs, "init_noise_sigma", 1.0)
    )
    steps = draw(5), draw(6), ours.timesteps[2:3]
    if hasattr(theirs, "add_noise"):
        for s in (theirs, ours):
            s.set_timesteps(10)
        torch.testing.assert_close(ours.add_noise(*steps), theirs.add_noise(*steps), rtol=1e-5, atol=1e-5)
    else:
        torch.testing.assert_close(ours.scale_noise(steps[0], steps[2], steps[1]),
                                   theirs.scale_noise(steps[0], steps[2], steps[1]))  # fmt: skip


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler"])
def test_begin_in_the_middle(name: str) -> None:
    """Image to image: noise at a level, then the rest of ``timesteps``."""
    out = []
    for s in (getattr(diffusers, name)(**SD), FastODEScheduler.from_config(getattr(diffusers, name)(**SD))):
        s.set_timesteps(8)
        begin = 3 * s.order
        s.set_begin_index(begin)
        left = s.timesteps[begin:]
        x = s.add_noise(draw(3), draw(4), left[:1].repeat(3))
        for t in left:
            x = s.step(network(s.scale_model_input(x, t), t), t, x).prev_sample
        out.append(x)
    assert relative(out[1], out[0]) < TOLERANCE


def test_given_levels() -> None:
    flow, euler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), diffusers.EulerDiscreteScheduler(**SD)
    shifted = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    for peer, given in [
        (flow, {"sigmas": [1.0, 0.7, 0.4, 0.1]}),
        (shifted, {"sigmas": [1.0, 0.7, 0.4, 0.1], "mu": 0.8}),
        (euler, {"sigmas": [14.0, 5.0, 1.0, 0.2, 0.0]}),
        (euler, {"timesteps": [999, 700, 300, 20]}),
        (diffusers.DPMSolverMultistepScheduler(**SD), {"timesteps": [999, 700, 300, 20]}),
    ]:
        ours = FastODEScheduler.from_config(peer)
        assert relative(loop(ours, None, **given), loop(peer, None, **given)) < TOLERANCE
    table = Discrete.scaled_linear()  # classes that take none themselves
    ours = FastODEScheduler.from_config(diffusers.DDIMScheduler(clip_sample=False, **SD))
    ours.set_timesteps(timesteps=[900, 500, 100])
    torch.testing.assert_close(ours.sigmas[:3].double(), table.rho(torch.tensor([900, 500, 100])), rtol=1e-5, atol=0)
    assert ours.timesteps.tolist() == [900, 500, 100] and ours.sigmas[-1] == 0


def test_any_solver_on_any_config() -> None:
    """Swapping the solver keeps levels, frame and labels, and converges to the same sample."""
    config = diffusers.EulerDiscreteScheduler(use_karras_sigmas=True, **SD).config
    fine = loop(FastODEScheduler.from_config(config, solver="unipc"), 100)
    few = {}
    for solver, options in [("ddim", {}), ("unipc", {"order": 2}), ("heun", {}), ("dpm_solver_3", {}), ("lms", {})]:
        s = FastODEScheduler.from_config(config, solver=solver, **options)
        few[solver] = relative(loop(s, 25), fine)
        assert len(s.timesteps) == s._run.plan.program.nfe
    assert max(few[s] for s in few if s != "ddim") < few["ddim"] / 3


def test_eta_of_the_pipeline() -> None:
    """Stable Diffusion passes ``eta`` on: 0 leaves the solver alone, more replaces its own."""
    s = FastODEScheduler.from_config(diffusers.DDIMScheduler(clip_sample=False, **SD))
    peer = diffusers.DDIMScheduler(clip_sample=False, **SD)
    for eta in (0.0, 0.7):
        x = y = draw()
        for scheduler in (s, peer):
            scheduler.set_timesteps(5)
        a, b = (torch.Generator().manual_seed(3) for _ in range(2))
        for t in s.timesteps:
            x = s.step(network(x, t), t, x, eta=eta, generator=a).prev_sample
            y = peer.step(network(y, t), t, y, eta=eta, generator=b).prev_sample
        assert relative(x, y) < TOLERANCE


# --- pipelines ---

DPM, FLOW = "DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler"
PIPELINES: list[tuple[str, str, dict[str, Any]]] = [
    ("ddpm", "DDPMScheduler", {}),
    ("ddpm", DPM, {}),
    ("dit", DPM, {}),
    ("dit", "UniPCMultistepScheduler", {}),
    ("sd", "PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": False, **SD}),
    ("sd", "EulerDiscreteScheduler", {"steps_offset": 1, **SD}),
    ("sd", "HeunDiscreteScheduler", {"steps_offset": 1, **SD}),
    ("sd", DPM, {"use_karras_sigmas": True, "steps_offset": 1, **SD}),
    ("sd3", FLOW, {"shift": 3.0}),
    ("flux", FLOW, {"use_dynamic_shifting": True}),
    (
        "flux",
        "UniPCMultistepScheduler",
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
    ),
]


def pipeline(kind: str, scheduler: Any) -> Any:
    if kind not in ("ddpm", "dit"):
        pytest.importorskip("transformers", reason="pipelines with text need transformers")
    made = {"ddpm": tiny.ddpm, "dit": tiny.dit, "sd": tiny.stable_diffusion, "sd3": tiny.sd3, "flux": tiny.flux}
    return made[kind](scheduler)


def generate(kind: str, pipe: Any, steps: int = 6) -> Tensor:
    common: dict[str, Any] = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": steps}
    if kind == "ddpm":
        return torch.from_numpy(pipe(batch_size=2, output_type="np", **common).images)
    if kind == "dit":
        return torch.from_numpy(pipe([1, 2], guidance_scale=2.0, output_type="np", **common).images)
    scale = {"guidance_scale": 1.0} if kind == "flux" else {}
    images: Tensor = pipe(**tiny.embeds(kind), height=8, width=8, output_type="latent", **scale, **common).images
    return images


@pytest.mark.parametrize(("kind", "name", "config"), PIPELINES, ids=[f"{k}-{n}" for k, n, _ in PIPELINES])
def test_pipelines(kind: str, name: str, config: dict[str, Any]) -> None:
    scheduler = getattr(diffusers, name)(**config)
    want = generate(kind, pipeline(kind, scheduler))
    got = generate(kind, pipeline(kind, FastODEScheduler.from_config(scheduler)))
    assert got.shape == want.shape and relative(got, want) < TOLERANCE


def test_every_solver_in_a_pipeline() -> None:
    config = diffusers.DDPMScheduler(clip_sample=False).config
    for name in SOLVERS:
        pipe = pipeline("ddpm", FastODEScheduler.from_config(config, solver=name, levels="DDIMScheduler"))
        assert bool(torch.isfinite(generate("ddpm", pipe, 5)).all())


def test_image_to_image() -> None:
    pytest.importorskip("transformers")
    peer = diffusers.DPMSolverMultistepScheduler(steps_offset=1, **SD)
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    out = []
    for s in (peer, FastODEScheduler.from_config(peer)):
        pipe = tiny.stable_diffusion(s, "StableDiffusionImg2ImgPipeline")
        g = torch.Generator().manual_seed(0)
        out.append(
            pipe(
                **tiny.embeds("sd"),
                image=image,
                strength=0.6,
                generator=g,
                num_inference_steps=10,
                output_type="latent",
            )
        )
    assert relative(out[1].images, out[0].images) < TOLERANCE


# --- configs and files ---


def test_saved_pipelines_load_by_library(tmp_path: Path) -> None:
    pipe = tiny.ddpm(FastODEScheduler.from_config(diffusers.DDPMScheduler(clip_sample=False), solver="unipc", order=2))
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["scheduler"] = ["fastode", "FastODEScheduler"]  # by hand, as in a published repository
    want = generate("ddpm", pipe)
    for written in (False, True):  # what diffusers wrote, and the short form
        if written:
            (tmp_path / "model_index.json").write_text(json.dumps(index))
        loaded = diffusers.DDPMPipeline.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded.scheduler) is FastODEScheduler and loaded.scheduler.config["solver"] == "unipc"
        assert torch.equal(generate("ddpm", loaded), want)
    assert FastODEScheduler.from_pretrained(tmp_path, subfolder="scheduler").config["solver_options"] == {"order": 2}


def test_configs_go_around() -> None:
    """To another class of diffusers and back: nothing is lost."""
    ours = FastODEScheduler.from_config(diffusers.UniPCMultistepScheduler(solver_order=3, **SD))
    other = diffusers.PNDMScheduler.from_config(ours.config)
    assert other.config["beta_schedule"] == "scaled_linear"
    back = FastODEScheduler.from_config(other.config)
    assert back.config["levels"] == "UniPCMultistepScheduler" and back._method(8) == ours._method(8)
    plain = FastODEScheduler.from_config({"_class_name": "DEISMultistepScheduler", "solver_order": 3})
    assert plain._method(20) == ("deis", {"order": 3, "space": "lam", "lower_order_final": False})
    for name in fastode.interop.diffusers_levels.METHODS:  # a config in memory names no class, its fields do
        if name not in ("KDPM2DiscreteScheduler", "LMSDiscreteScheduler"):
            assert FastODEScheduler.from_config(getattr(diffusers, name)().config).config["levels"] == name


def test_unknown_fields_are_kept_with_a_warning() -> None:
    config = {**diffusers.DPMSolverMultistepScheduler().config, "_class_name": DPM, "wobble": 0.5}
    with pytest.warns(UserWarning, match="'wobble'"):
        s = FastODEScheduler.from_config(config)
    assert s.config["wobble"] == 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FastODEScheduler.from_config(diffusers.DPMSolverMultistepScheduler().config)


def test_copies_and_half_precision() -> None:
    s = FastODEScheduler.from_config(diffusers.DPMSolverMultistepScheduler(**SD))
    want = loop(s)
    assert torch.equal(loop(copy.deepcopy(s)), want)
    half = loop(s, x=draw().bfloat16())
    theirs = loop(diffusers.DPMSolverMultistepScheduler(**SD), x=draw().bfloat16())
    assert half.dtype == theirs.dtype == torch.bfloat16
    # the state is remembered unrounded between two steps
    assert relative(half.float(), want) <= relative(theirs.float(), want)


def test_threads_share_a_scheduler() -> None:
    """Two threads with other step counts, switched at every evaluation, against each alone."""
    s = FastODEScheduler.from_config(diffusers.UniPCMultistepScheduler(solver_order=3, **SD))
    want = {n: loop(s, n, x=draw(n)) for n in (5, 8)}
    got: dict[int, Tensor] = {}
    barrier = threading.Barrier(2)

    def work(n: int) -> None:
        def net(x: Tensor, t: Any) -> Tensor:
            if int(s.step_index or 0) < 5:
                barrier.wait(20)
            return network(x, t)

        got[n] = loop(s, n, net, draw(n))

    threads = [threading.Thread(target=work, args=(n,)) for n in (5, 8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.equal(got[n], want[n]) for n in (5, 8))
    done = threading.Thread(target=lambda: got.update({0: s.timesteps}))  # set in one thread, used in another
    s.set_timesteps(4)
    done.start()
    done.join()
    assert torch.equal(got[0], s.timesteps)


@pytest.mark.parametrize("copied", [False, True])
def test_the_state_may_be_changed_between_steps(copied: bool) -> None:
    """In-painting writes into the state, or makes another: what counts is what the pipeline hands in."""
    out = []
    peer = diffusers.DPMSolverMultistepScheduler(**SD)
    for s in (peer, FastODEScheduler.from_config(peer)):
        s.set_timesteps(6)
        x = draw()
        for t in s.timesteps:
            x = s.step(network(x, t), t, x).prev_sample
            x = x.clone() if copied else x
            x[:, 0] = 0.25
        out.append(x)
    assert relative(out[1], out[0]) < TOLERANCE


def test_bad_input() -> None:
    config = diffusers.DPMSolverMultistepScheduler().config
    s = FastODEScheduler.from_config(config)
    with pytest.raises(ValueError, match="set_timesteps"):
        s.step(draw(), 999, draw())
    s.set_timesteps(4)
    with pytest.raises(ValueError, match="timestep: 7 is none of timesteps"):
        s.step(draw(), 7, draw())
    with pytest.raises(ValueError, match="model_output: must have the shape"):
        s.step(draw()[:2], 999, draw())
    for match, call in {
        "unknown solver 'dmp'": lambda: FastODEScheduler.from_config(config, solver="dmp"),
        "unknown option 'ordr'": lambda: FastODEScheduler.from_config(config, solver="unipc", ordr=2),
        "order: unipc has orders": lambda: FastODEScheduler.from_config(config, solver="unipc", order=9).set_timesteps(
            3
        ),
        "levels of LCMScheduler": lambda: FastODEScheduler.from_config({"_class_name": "LCMScheduler"}),
        "levels: must be one of": lambda: FastODEScheduler(levels="LCMScheduler"),
        "KDPM2.* and LMS": lambda: FastODEScheduler.from_config(diffusers.LMSDiscreteScheduler().config),
        "algorithm_type: 'sde": lambda: FastODEScheduler(algorithm_type="sde-dpmsolver++"),
        "afs: the first evaluation": lambda: FastODEScheduler(
            solver="ddim", solver_options={"afs": True}
        ).set_timesteps(3),
        "mu: PNDMScheduler has no": lambda: FastODEScheduler(levels="PNDMScheduler").set_timesteps(5, mu=1.0),
        "num_inference_steps: give": lambda: s.set_timesteps(),
        "num_inference_steps: must": lambda: s.set_timesteps(0),
        "config: must be": lambda: FastODEScheduler.from_config(3),
    }.items():
        with pytest.raises((ValueError, TypeError), match=match):
            call()
    heun = FastODEScheduler.from_config(config, solver="heun")
    heun.set_timesteps(4)
    heun.set_begin_index(1)
    with pytest.raises(ValueError, match="begin_index: 1 is inside a step of heun; begin at a multiple of 2"):
        heun.step(draw(), heun.timesteps[1], draw())
    pndm = FastODEScheduler.from_config(config, solver="pndm")
    pndm.set_timesteps(8)
    pndm.set_begin_index(12)
    with pytest.raises(ValueError, match="warm-up"):
        pndm.step(draw(), pndm.timesteps[12], draw())
