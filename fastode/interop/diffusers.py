"""Models and pipelines of diffusers as denoisers: the network as it is, the scheduler's config for what its output means.

Needs the package (``pip install 'fastode[diffusers]'``). Weights are read from safetensors only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastode.denoisers.base import Denoiser
from fastode.interop.diffusers_networks import WRAPPERS, DiT, Flux
from fastode.interop.scheduler_config import meaning
from fastode.schedules.noise import Discrete

NETWORKS = ("unet", "transformer")
"""Components of a pipeline that can be the network, and those that can be its autoencoder."""
AUTOENCODERS = ("vae", "vqvae")


@dataclass(frozen=True, eq=False)
class DiffusersDenoiser(Denoiser):
    """A :class:`Denoiser` of a diffusers model; ``vae``: the autoencoder of a latent model.

    States and samples are latents, scaled as the network was trained on them; :meth:`decode` makes images of samples.
    """

    vae: Any = None

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> latents [B, C, h, w]: the mean of the encoder's distribution, scaled."""
        vae = self._autoencoder()
        weight = next(vae.parameters())
        out = vae.encode(images.to(weight))
        z = out.latent_dist.mode() if hasattr(out, "latent_dist") else getattr(out, "latents", None)
        if z is None:
            z = out.latent
        mean, std, scale = self._scaling(z)
        scaled: Tensor = ((z - mean) / std * scale).to(images.dtype)
        return scaled

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] -> images [B, 3, H, W], about [-1, 1]; in the latents' dtype."""
        vae = self._autoencoder()
        z = latents.to(next(vae.parameters()))
        mean, std, scale = self._scaling(z)
        images: Tensor = vae.decode(z / scale * std + mean, return_dict=False)[0]
        return images.to(latents.dtype)

    def _autoencoder(self) -> Any:
        if self.vae is None:
            raise ValueError(
                f"vae: {self.name} has no autoencoder, its samples are images (or give vae=... when loading)"
            )
        return self.vae

    def _scaling(self, z: Tensor) -> tuple[Any, Any, float]:
        """(mean, std, scaling factor) of the latents, as the autoencoder's config has them."""
        config = self.vae.config
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is not None and std is not None:
            mean, std = (z.new_tensor(v).reshape(1, -1, 1, 1) for v in (mean, std))
        else:
            mean, std = getattr(config, "shift_factor", None) or 0.0, 1.0
        return mean, std, float(getattr(config, "scaling_factor", None) or 1.0)

    def to(self, *args: Any, **kwargs: Any) -> DiffusersDenoiser:
        """Move or cast network and autoencoder in place; returns self."""
        super().to(*args, **kwargs)
        if isinstance(self.vae, nn.Module):
            self.vae.to(*args, **kwargs)
        return self


def load(
    source: Any,
    *,
    scheduler: Any = None,
    prediction: str | None = None,
    vae: Any = None,
    sample_shape: tuple[int, ...] | None = None,
    null_label: int | None = None,
    dtype: torch.dtype | None = None,
    name: str | None = None,
) -> DiffusersDenoiser:
    """A diffusers pipeline or model as a :class:`DiffusersDenoiser`.

    Args:
        source: a pipeline, a model, or the folder or hub name of either. Of a pipeline only the network, the scheduler's
            config and the autoencoder are read; text encoders are not: prompts are passed as embeddings, ``cond={
            "encoder_hidden_states": ..., ...}`` under the model's own argument names.
        scheduler: a scheduler or a config that takes the place of the pipeline's; needed for a bare model.
        prediction: what the network predicts, where it is to be checked against the config.
        vae: an autoencoder that takes the place of the pipeline's.
        sample_shape: shape of a state, where it is not the model's own; Flux's flow shift depends on it.
        null_label: the label that stands for "no class", for class-conditional U-Nets that have one.
        dtype: of the weights, when they are loaded here.

    The schedule, prediction type, flow shift and zero-SNR are the scheduler's. Clipping (``clip_sample``) is not: see
    :func:`fastode.denoisers.clipped`. Raises ``ImportError`` saying what to install; ``ValueError`` for a prediction that
    contradicts the config, and for models that are not known; ``OSError`` for what cannot be found.
    """
    try:
        import diffusers
    except ImportError as error:
        raise ImportError("diffusers: not installed; pip install 'fastode[diffusers]'") from error
    parts = _parts(diffusers, source, dtype)
    model = parts["network"]
    kind = type(model).__name__
    if kind not in WRAPPERS:
        raise ValueError(f"network: {kind} is not known; known models are {', '.join(WRAPPERS)}")
    config = _config(scheduler if scheduler is not None else parts.get("scheduler"))
    if config is None:
        raise ValueError(
            f"scheduler: a bare {kind} does not say what it predicts; give scheduler=... (a config will do)"
        )
    shape = tuple(sample_shape) if sample_shape is not None else _sample_shape(model)
    _check_channels(model, kind)
    tokens = None if shape is None else (shape[-2] // 2) * (shape[-1] // 2)
    found, schedule, sigma_data = meaning(config, prediction=prediction, tokens=tokens)
    network = WRAPPERS[kind](model).eval().requires_grad_(False)
    if isinstance(network, Flux):
        network.label_scale = float(config.get("num_train_timesteps", 1000))
    if getattr(model.config, "time_embedding_type", None) == "learned" and isinstance(schedule, Discrete):
        schedule = replace(schedule, rounded=True)
    classes: int | None = getattr(model.config, "num_class_embeds", None) or 0
    if isinstance(network, DiT):
        classes = network.null_label
        null_label = classes if null_label is None else null_label
    if getattr(model.config, "class_embed_type", None) is not None:
        classes = None  # labels are numbers or embeddings there
    encoder = vae if vae is not None else parts.get("vae")
    if isinstance(encoder, nn.Module):
        encoder.eval().requires_grad_(False)
    return DiffusersDenoiser(
        network,
        prediction=found,
        schedule=schedule,
        sigma_data=sigma_data,
        num_classes=classes,
        null_label=null_label,
        sample_shape=shape,
        name=name or parts.get("name", kind),
        vae=encoder,
    )


def _parts(library: Any, source: Any, dtype: torch.dtype | None) -> dict[str, Any]:
    """Network, scheduler, autoencoder and name, from whatever was given."""
    if isinstance(source, nn.Module):
        return {"network": source}
    components = getattr(source, "components", None)
    if isinstance(components, Mapping):
        network = next((components[n] for n in NETWORKS if components.get(n) is not None), None)
        if network is None:
            raise ValueError(f"network: {type(source).__name__} has none of {', '.join(NETWORKS)}")
        vae = next((components[n] for n in AUTOENCODERS if components.get(n) is not None), None)
        return {"network": network, "scheduler": components.get("scheduler"), "vae": vae, "name": type(source).__name__}
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"source: must be a pipeline, a model or a path, got {type(source).__name__}")
    return _from_disk(library, str(source), dtype)


def _from_disk(library: Any, source: str, dtype: torch.dtype | None) -> dict[str, Any]:
    """The parts of a saved pipeline, or a saved model, each by its own ``from_pretrained``."""
    folder = Path(source)
    looks_local = folder.exists() or folder.is_absolute() or source.startswith(".")
    if looks_local and not folder.is_dir():
        raise FileNotFoundError(f"source: {source} is not a folder of diffusers")
    options = {"torch_dtype": dtype, "use_safetensors": True, "local_files_only": looks_local}
    if looks_local and not (folder / "model_index.json").is_file():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"source: {source} has neither model_index.json nor config.json")
        class_name = json.loads((folder / "config.json").read_text()).get("_class_name")
        return {"network": _class(library, class_name).from_pretrained(source, **options), "name": folder.name}
    index = library.DiffusionPipeline.load_config(source, local_files_only=looks_local)
    present = {n: v for n, v in index.items() if isinstance(v, (list, tuple)) and len(v) == 2 and v[1] is not None}
    network = next((n for n in NETWORKS if n in present), None)
    if network is None:
        raise ValueError(
            f"network: {source} has none of {', '.join(NETWORKS)}, it has {', '.join(present) or 'nothing'}"
        )
    found: dict[str, Any] = {"name": folder.name}
    for role, component in (("network", network), ("vae", next((n for n in AUTOENCODERS if n in present), None))):
        if component is not None:
            origin, class_name = present[component]
            if origin != "diffusers":
                raise ValueError(
                    f"{component}: {source} brings its own code for it ({origin}.{class_name}), it is not run"
                )
            found[role] = _class(library, class_name).from_pretrained(source, subfolder=component, **options)
    if "scheduler" in present:
        scheduler = _class(library, present["scheduler"][1])
        found["scheduler"] = scheduler.load_config(source, subfolder="scheduler", local_files_only=looks_local)
        found["scheduler"] = {"_class_name": present["scheduler"][1], **found["scheduler"]}
    return found


def _class(library: Any, name: Any) -> Any:
    found = getattr(library, name, None) if isinstance(name, str) else None
    if found is None:
        raise ValueError(f"source: diffusers {library.__version__} has no class {name!r}")
    return found


def _config(scheduler: Any) -> Mapping[str, Any] | None:
    """A scheduler's config with the name of its class: of a scheduler, a config, or a folder with scheduler_config.json."""
    if scheduler is None:
        return None
    if isinstance(scheduler, (str, os.PathLike)):
        path = Path(scheduler)
        path = path / "scheduler_config.json" if path.is_dir() else path
        loaded: dict[str, Any] = json.loads(path.read_text())
        return loaded
    if isinstance(scheduler, Mapping):
        return scheduler
    config = getattr(scheduler, "config", None)
    if not isinstance(config, Mapping):
        raise TypeError(f"scheduler: must be a scheduler or its config, got {type(scheduler).__name__}")
    return {**config, "_class_name": type(scheduler).__name__}


def _sample_shape(model: Any) -> tuple[int, ...] | None:
    if type(model).__name__ == "FluxTransformer2DModel":  # on patches of 2 x 2; its pipeline's default is 1024 pixels
        return (model.config.in_channels // 4, 128, 128)
    size = getattr(model.config, "sample_size", None)
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    return (int(model.config.in_channels), int(height), int(width))


def _check_channels(model: Any, kind: str) -> None:
    """The output estimates the input, or is twice that with a variance; what is concatenated to a state is no state."""
    if kind == "FluxTransformer2DModel":
        return
    c_in, c_out = model.config.in_channels, getattr(model.config, "out_channels", None) or model.config.in_channels
    if c_out not in (c_in, 2 * c_in):
        raise ValueError(
            f"network: {kind} takes {c_in} channels and returns {c_out}; inputs beside the state (inpainting, "
            "upscaling) are not supported"
        )
