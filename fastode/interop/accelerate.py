"""``fastode.accelerate(pipe, solver=..., nfe=...)``: a loaded diffusers pipeline with our engine in the place of its loop.

    fast = fastode.accelerate(pipe, solver="unipc", nfe=8)
    images = fast(class_labels=[207, 360], generator=torch.Generator().manual_seed(0)).images

The levels, labels and the start are those of ``pipe.scheduler``'s config, so the images are those of the pipeline itself with
``FastODEScheduler``; what is saved is the host's work between two network calls (on a GPU whole runs are recorded as graphs).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastode.denoisers.base import Denoiser
from fastode.denoisers.guidance import Guidance
from fastode.denoisers.precondition import Scaling
from fastode.engine import Engine
from fastode.interop.diffusers_scheduler import FastODEScheduler
from fastode.schedules.grid import Level


class _Network(nn.Module):
    """The pipeline's network as ``F(x, label, class_labels, **cond)``, without the channels of a learned variance."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, label: Tensor, class_labels: Tensor | None = None, **cond: Any) -> Tensor:
        given = cond if class_labels is None else {"class_labels": class_labels, **cond}
        output: Tensor = self.network(x, timestep=label, **given).sample
        return output[:, : x.shape[1]]


@dataclass(frozen=True, eq=False)
class _PipelineDenoiser(Denoiser):
    """What the scheduler says about a level: its scalings and its label, in the frame of its state."""

    scheduler: Any = None
    plan: Any = field(default=None)

    def scaling(self, level: Level) -> Scaling:
        c_skip, c_out = self.scheduler._scaling(level)
        return Scaling(c_skip, c_out, self.scheduler._input_scale(level), self.plan.levels.label(level))


@dataclass(frozen=True)
class _Kind:
    """How a pipeline class is driven: its network, its shape, and what it does with the samples."""

    network: str
    classes: int | None = None
    text: bool = False
    latent: bool = False


KINDS: Mapping[str, _Kind] = {
    "DDPMPipeline": _Kind("unet"),
    "DDIMPipeline": _Kind("unet"),
    "DiTPipeline": _Kind("transformer", classes=1000, latent=True),
    "StableDiffusionPipeline": _Kind("unet", text=True, latent=True),
}


class Accelerated:
    """``fast(...)`` like the pipeline, for the arguments that the engine has: what it returns has ``images``.

    Args of a call: ``batch_size`` (unconditional), ``class_labels`` (DiT), or ``prompt_embeds``, ``negative_prompt_embeds``
    and ``num_images_per_prompt`` (Stable Diffusion, also ``prompt``, if the pipeline has its text encoder); ``guidance_scale``;
    ``generator``; ``latents``; ``output_type`` "pil", "np", "pt", or "latent". Engines are built for a batch size when it first
    comes. Safe to share between threads.
    """

    def __init__(self, pipe: Any, kind: _Kind, scheduler: FastODEScheduler, steps: int, engine: dict[str, Any]) -> None:
        self.pipe, self.kind, self.scheduler, self.steps = pipe, kind, scheduler, steps
        self._plan = scheduler._make_plan(steps, None, None, None, None)
        self._options, self._engines, self._lock = engine, dict[Any, Engine](), threading.Lock()
        self._network = _Network(getattr(pipe, kind.network))

    @property
    def nfe(self) -> int:
        return int(self._plan.program.nfe)

    def __call__(
        self,
        prompt: Any = None,
        *,
        batch_size: int = 1,
        class_labels: Any = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt: Any = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: Any = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
    ) -> Any:
        pipe, kind = self.pipe, self.kind
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type: must be pil, np, pt or latent, got {output_type!r}")
        call: dict[str, Any] = {}
        scale = guidance_scale if guidance_scale is not None else (7.5 if kind.text else 4.0 if kind.classes else None)
        guided = bool(scale is not None and scale > 1 and (kind.text or kind.classes))
        if kind.classes:
            if class_labels is None:
                raise ValueError("class_labels: this pipeline needs one label per image")
            call["class_labels"] = torch.as_tensor(class_labels).reshape(-1)
            batch_size = len(call["class_labels"])
        elif class_labels is not None:
            raise ValueError(f"class_labels: {type(pipe).__name__} is not class-conditional")
        if kind.text:
            if prompt is None and prompt_embeds is None:
                raise ValueError("prompt_embeds: give the prompt's embeddings, or a prompt")
            if prompt is not None and pipe.text_encoder is None:
                raise ValueError("prompt: this pipeline has no text encoder; give prompt_embeds")
            embeds, negative = pipe.encode_prompt(
                prompt, pipe._execution_device, num_images_per_prompt, guided, negative_prompt,
                prompt_embeds=prompt_embeds, negative_prompt_embeds=negative_prompt_embeds,
            )  # fmt: skip
            batch_size = embeds.shape[0]
            call["cond"] = {"encoder_hidden_states": embeds}
            if guided:
                call["uncond"] = {"encoder_hidden_states": negative}
        shape = (batch_size, *self._sample_shape(height, width))
        x = self._start(shape, generator, latents)
        if guided:
            call["guidance_scale"] = float(scale)  # type: ignore[arg-type]
        if self._plan.program.draws:
            call["noise"] = self._draws(shape, generator)
        with torch.no_grad():
            samples = self._engine(shape, guided)(x, **call)
            return self._output(samples, output_type)

    def _sample_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        size = self._network.network.config
        sides = size.sample_size if isinstance(size.sample_size, (tuple, list)) else (size.sample_size,) * 2
        factor = getattr(self.pipe, "vae_scale_factor", 1)
        asked = [s if given is None else given // factor for s, given in zip(sides, (height, width), strict=True)]
        return int(size.in_channels), int(asked[0]), int(asked[1])

    def _start(self, shape: tuple[int, ...], generator: Any, latents: Tensor | None) -> Tensor:
        from diffusers.utils.torch_utils import randn_tensor

        device, dtype = self._network.network.device, self._network.network.dtype
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents: must have shape {list(shape)}, got {list(latents.shape)}")
        scale = self._plan.levels.init_noise_sigma if self.kind.text else 1.0  # the other loops start from unit noise
        return (latents.to(device=device) * scale).float()

    def _draws(self, shape: tuple[int, ...], generator: Any) -> Callable[[int], Tensor]:
        from diffusers.utils.torch_utils import randn_tensor

        network, made = self._network.network, dict[int, Tensor]()

        def noise(index: int) -> Tensor:
            while len(made) <= index:
                z = randn_tensor(shape, generator=generator, device=network.device, dtype=network.dtype)
                made[len(made)] = z.float()
            return made[index]

        return noise

    def _engine(self, shape: tuple[int, ...], guided: bool) -> Engine:
        key = (shape, guided)
        with self._lock:
            if key not in self._engines:
                kind, plan = self.kind, self._plan
                denoiser = _PipelineDenoiser(
                    self._network, prediction="x0", schedule=None, num_classes=kind.classes, null_label=kind.classes,
                    transforms=self.scheduler._transforms(), name=type(self.pipe).__name__, scheduler=self.scheduler,
                    plan=plan,
                )  # fmt: skip
                guidance = Guidance() if guided else None
                self._engines[key] = Engine(plan.program, denoiser, shape, guidance=guidance, **self._options)
            return self._engines[key]

    def _output(self, samples: Tensor, output_type: str) -> Any:
        from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

        pipe = self.pipe
        if output_type == "latent":
            return ImagePipelineOutput(images=samples)
        if self.kind.latent:
            vae = pipe.vae
            samples = vae.decode(samples.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
        images = (samples.float() / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return ImagePipelineOutput(images=images)
        array = images.cpu().permute(0, 2, 3, 1).numpy()
        return ImagePipelineOutput(images=array if output_type == "np" else pipe.numpy_to_pil(array))


def accelerate(
    pipe: Any, *, solver: str | None = None, nfe: int | None = None, steps: int | None = None, **options: Any
) -> Accelerated:
    """``pipe`` with its denoising loop replaced by an :class:`Engine`; the pipeline itself is left as it is.

    Args:
        solver: a name in ``SOLVERS``; by default the method of the pipeline's scheduler. Its options come with it.
        nfe, steps: network evaluations per image, or steps of the solver; give one.
        options: the solver's own, config fields to replace, and ``backend``, ``graph``, ``check_finite`` of the engine.

    Raises ``ValueError`` saying why, where the pipeline does not allow it: its loop is not one of those known here
    (DDPM/DDIM unconditional, DiT, Stable Diffusion text-to-image), its modules are moved by hooks, or adapters join in. Then
    ``pipe.scheduler = FastODEScheduler.from_config(pipe.scheduler, solver=...)`` still gives the same samples.
    """
    name = type(pipe).__name__
    other = "; pipe.scheduler = FastODEScheduler.from_config(pipe.scheduler, ...) works in its own loop"
    if name not in KINDS:
        raise ValueError(f"pipe: the loop of {name} is not known here, only those of {', '.join(KINDS)}{other}")
    kind = KINDS[name]
    network = getattr(pipe, kind.network)
    if getattr(network, "_hf_hook", None) is not None:
        raise ValueError(
            f"pipe: hooks move its {kind.network} between devices, which a recorded run cannot follow{other}"
        )
    if getattr(pipe, "image_encoder", None) is not None:
        raise ValueError(f"pipe: it has an image encoder, whose embeddings the engine would not get{other}")
    if getattr(network.config, "time_cond_proj_dim", None):
        raise ValueError(f"pipe: its {kind.network} is told the guidance scale as an embedding{other}")
    if (nfe is None) == (steps is None):
        raise ValueError("nfe: give nfe or steps" + (", not both" if nfe is not None else ""))
    engine = {k: options.pop(k) for k in ("backend", "graph", "check_finite") if k in options}
    scheduler = FastODEScheduler.from_config(pipe.scheduler, solver=solver, **options)
    if nfe is not None:
        steps = _steps(scheduler, nfe)
    assert steps is not None
    return Accelerated(pipe, kind, scheduler, steps, engine)


def _steps(scheduler: FastODEScheduler, nfe: int) -> int:
    """The number of steps that makes ``nfe`` evaluations."""
    if isinstance(nfe, bool) or not isinstance(nfe, int) or nfe < 1:
        raise ValueError(f"nfe: must be a whole number of at least 1, got {nfe!r}")
    made: dict[int, int] = {}
    for steps in range(1, nfe + 2):
        try:
            made[steps] = scheduler._make_plan(steps, None, None, None, None).program.nfe
        except (ValueError, IndexError):  # too few steps for the class that places the levels
            continue
        if made[steps] == nfe:
            return steps
        if made[steps] > nfe:
            break
    near = sorted(set(made.values()), key=lambda n: (abs(n - nfe), n))[:3]
    raise ValueError(
        f"nfe: this solver cannot make exactly {nfe} evaluations; it can make {', '.join(map(str, sorted(near)))}"
    )
