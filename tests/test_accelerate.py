"""A pipeline's loop replaced by the engine gives the pipeline's own images, or a reason why not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastode
from tests.conftest import relative

diffusers = pytest.importorskip("diffusers", reason="diffusers is an optional extra: pip install 'fastode[diffusers]'")
diffusers.utils.logging.set_verbosity_error()

from tests import tiny_pipelines as tiny  # noqa: E402 (needs diffusers)
from tests.test_diffusers_scheduler import SD, TOLERANCE, generate  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("ddpm", "DDPMScheduler", {}),
    ("ddpm", "DPMSolverMultistepScheduler", {"thresholding": True}),
    ("dit", "DPMSolverMultistepScheduler", {}),
    ("sd", "UniPCMultistepScheduler", {"steps_offset": 1, **SD}),
    ("sd", "EulerDiscreteScheduler", {"steps_offset": 1, **SD}),
]


@pytest.mark.parametrize(("kind", "name", "config"), CASES, ids=[f"{k}-{n}" for k, n, _ in CASES])
def test_the_same_images(kind: str, name: str, config: dict[str, Any]) -> None:
    if kind == "sd":
        pytest.importorskip("transformers", reason="pipelines with text need transformers")
    make = {"ddpm": tiny.ddpm, "dit": tiny.dit, "sd": tiny.stable_diffusion}[kind]
    pipe = make(getattr(diffusers, name)(**config))
    want = generate(kind, pipe)
    fast = fastode.accelerate(pipe, steps=6)
    calls: dict[str, dict[str, Any]] = {
        "ddpm": {"batch_size": 2, "output_type": "np"},
        "dit": {"class_labels": [1, 2], "guidance_scale": 2.0, "output_type": "np"},
        "sd": {**tiny.embeds("sd"), "height": 8, "width": 8, "output_type": "latent"},
    }
    images = fast(generator=generator(), **calls[kind]).images
    assert fast.nfe == 6 and relative(torch.as_tensor(images), want) < TOLERANCE


def test_any_solver_is_the_scheduler() -> None:
    """Single-step ones too: the same as the pipeline's own loop with our scheduler."""
    pipe = tiny.ddpm(diffusers.DPMSolverMultistepScheduler())
    for solver, nfe, options in [
        ("heun", 7, {}),
        ("unipc", 5, {"order": 2}),
        ("dpm_solver_3", 7, {}),
        ("ddim", 4, {"eta": 1.0}),
    ]:
        fast = fastode.accelerate(pipe, solver=solver, nfe=nfe, **options)
        own = tiny.ddpm(fastode.FastODEScheduler.from_config(pipe.scheduler, solver=solver, **options))
        want = own(batch_size=2, generator=generator(), num_inference_steps=fast.steps, output_type="np").images
        got = fast(batch_size=2, generator=generator(), output_type="np").images
        assert fast.nfe == nfe and relative(torch.as_tensor(got), torch.as_tensor(want)) < TOLERANCE
    assert fast(generator=generator()).images[0].size == (8, 8)


def test_why_not() -> None:
    pipe = tiny.ddpm(diffusers.DPMSolverMultistepScheduler())
    for match, call in {
        "the loop of dict is not known": lambda: fastode.accelerate({}, nfe=5),
        "nfe: give": lambda: fastode.accelerate(pipe),
        "nfe: this solver cannot make exactly 4": lambda: fastode.accelerate(pipe, solver="heun", nfe=4),
        "unknown option 'ordr'": lambda: fastode.accelerate(pipe, solver="unipc", nfe=4, ordr=1),
        "output_type": lambda: fastode.accelerate(pipe, nfe=2)(output_type="gif"),
        "class_labels: DDPMPipeline is not": lambda: fastode.accelerate(pipe, nfe=2)(class_labels=[1]),
        "latents: must have shape": lambda: fastode.accelerate(pipe, nfe=2)(latents=torch.zeros(1)),
    }.items():
        with pytest.raises((ValueError, TypeError), match=match):
            call()
    pipe.unet._hf_hook = object()
    with pytest.raises(ValueError, match=r"hooks move its unet.*FastODEScheduler"):
        fastode.accelerate(pipe, nfe=5)
