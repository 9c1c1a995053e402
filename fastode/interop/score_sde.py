"""Checkpoints of score-SDE (github.com/yang-song/score_sde_pytorch, arXiv:2011.13456) as denoisers.

A checkpoint does not say what it was trained as; the name of its config does (``CONFIGS``).

Variance exploding networks there work on images in [0, 1] and return the score. In [-1, 1], where everything else here
lives, images and noise are twice as large: sigma is twice the paper's, the network is told ln(sigma/2), which is the ln
sigma of the paper, and its bare output is sigma times the score. That is EDM's reading of them, too (arXiv:2206.00364).
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from fastode.denoisers.base import Denoiser
from fastode.interop.unpickle import load_pickle, tensors_of
from fastode.interop.weights import fit
from fastode.nets.ncsnpp import NCSNpp, NCSNppConfig
from fastode.schedules.noise import VE, Discrete, NoiseSchedule, SubVP, VPLinear


@dataclass(frozen=True)
class Training:
    """A network of score-SDE and the process it was trained on.

    ``sde``: "vp", "subvp" or "ve". ``continuous``: on all times, or on a table of ``num_scales`` levels. ``sigma_min``,
    ``sigma_max``: of VE, for images in [0, 1].
    """

    model: NCSNppConfig
    sde: Literal["vp", "subvp", "ve"]
    continuous: bool = True
    num_scales: int = 1000
    sigma_min: float = 0.01
    sigma_max: float = 50.0
    beta_min: float = 0.1
    beta_max: float = 20.0

    def schedule(self) -> NoiseSchedule:
        if self.sde == "ve":
            told: Any = "log_half_sigma" if self.continuous else "index"
            return VE(2 * self.sigma_min, 2 * self.sigma_max, told, self.num_scales)
        if self.sde == "subvp":
            return SubVP(self.beta_min, self.beta_max)
        if self.continuous:
            return VPLinear(self.beta_min, self.beta_max)
        n = self.num_scales
        return Discrete.linear(self.beta_min / n, self.beta_max / n, n)


_ddpmpp = NCSNppConfig
_NCSNPP: dict[str, Any] = {"fir": True, "progressive_input": "residual", "embedding_type": "fourier"}
_HIGH: dict[str, Any] = {"progressive": "output_skip", "progressive_input": "input_skip"}


def _ncsnpp(**changes: Any) -> NCSNppConfig:
    return NCSNppConfig(**{**_NCSNPP, **changes})


def _high(sigma_max: float) -> Training:
    """NCSN++ at 256 x 256."""
    model = _ncsnpp(image_size=256, ch_mult=(1, 1, 2, 2, 2, 2, 2), num_res_blocks=2, **_HIGH)
    return Training(model, "ve", sigma_max=sigma_max)


CONFIGS: dict[str, Training] = {
    "vp/cifar10_ddpmpp_continuous": Training(_ddpmpp(), "vp"),
    "vp/cifar10_ddpmpp_deep_continuous": Training(_ddpmpp(num_res_blocks=8), "vp"),
    "vp/cifar10_ddpmpp": Training(_ddpmpp(), "vp", continuous=False),
    "vp/cifar10_ncsnpp_continuous": Training(_ncsnpp(embedding_type="positional"), "vp"),
    "vp/cifar10_ncsnpp_deep_continuous": Training(_ncsnpp(embedding_type="positional", num_res_blocks=8), "vp"),
    "vp/cifar10_ncsnpp": Training(_ncsnpp(embedding_type="positional"), "vp", continuous=False),
    "subvp/cifar10_ddpmpp_continuous": Training(_ddpmpp(), "subvp"),
    "subvp/cifar10_ddpmpp_deep_continuous": Training(_ddpmpp(num_res_blocks=8), "subvp"),
    "subvp/cifar10_ncsnpp_continuous": Training(_ncsnpp(embedding_type="positional"), "subvp"),
    "subvp/cifar10_ncsnpp_deep_continuous": Training(_ncsnpp(embedding_type="positional", num_res_blocks=8), "subvp"),
    "ve/cifar10_ncsnpp_continuous": Training(_ncsnpp(), "ve"),
    "ve/cifar10_ncsnpp_deep_continuous": Training(_ncsnpp(num_res_blocks=8), "ve"),
    "ve/cifar10_ncsnpp": Training(_ncsnpp(embedding_type="positional"), "ve", continuous=False),
    "ve/bedroom_ncsnpp_continuous": _high(378.0),
    "ve/church_ncsnpp_continuous": _high(380.0),
    "ve/celebahq_256_ncsnpp_continuous": _high(348.0),
    "ve/ffhq_256_ncsnpp_continuous": _high(348.0),
    "ve/ffhq_ncsnpp_continuous": Training(
        _ncsnpp(image_size=1024, nf=16, ch_mult=(1, 2, 4, 8, 16, 32, 32, 32), num_res_blocks=1, **_HIGH),
        "ve",
        sigma_max=1348.0,
    ),
}
"""Configs of score-SDE by the names of their files."""


def load(path: str | os.PathLike[str], *, config: str | Training | None = None, ema: bool = True) -> Denoiser:
    """A checkpoint such as ``checkpoint_24.pth`` as a :class:`Denoiser` of images in [-1, 1].

    ``config``: the name of the config it was trained with, a key of ``CONFIGS``, or a :class:`Training` for one of your own.
    ``ema``: the averaged weights, which published samples are made with, or the last ones. VP and sub-VP networks are
    prediction "eps", VE "score" with sigma from 0.02 to 100: twice the paper's, see the module.

    Raises ``FileNotFoundError``; ``UnsafePickle``; ``ValueError`` for an unknown config, and for missing, extra or misshapen
    weights.
    """
    if isinstance(config, str) and config not in CONFIGS:
        close = difflib.get_close_matches(config, CONFIGS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"config: must be one of {', '.join(CONFIGS)}, got {config!r}{hint}")
    if config is None:
        raise ValueError(f"config: {Path(path).name} does not say; give one of {', '.join(CONFIGS)}")
    return of(load_pickle(path), CONFIGS[config] if isinstance(config, str) else config, name=Path(path).stem, ema=ema)


def of(data: Any, training: Training, *, name: str = "score_sde", ema: bool = True) -> Denoiser:
    """As :func:`load`, from the data of the checkpoint."""
    if not isinstance(data, dict) or "model" not in data or (ema and "ema" not in data):
        raise ValueError(f"weights: {name} is not a checkpoint of score-SDE, a dict with model and ema")
    tensors = {k.removeprefix("module."): v for k, v in tensors_of(data["model"]).items()}
    tensors.pop("sigmas", None)  # the table of noise levels, which follows from the config
    if ema:
        tensors = averaged(tensors, data["ema"], name)
    config = training.model
    network = fit(NCSNpp(config), tensors, where=name)
    return Denoiser(
        network,
        prediction="score" if training.sde == "ve" else "eps",
        schedule=training.schedule(),
        num_classes=0,
        sample_shape=(config.num_channels, config.image_size, config.image_size),
        name=name,
    )


def averaged(tensors: Mapping[str, Tensor], ema: Any, name: str) -> dict[str, Tensor]:
    """``tensors`` with the averages in place of what was trained; those are a list in the order of the parameters."""
    shadows = ema.get("shadow_params") if isinstance(ema, dict) else None
    fixed = [k for k in tensors if k == "all_modules.0.W" and tensors[k].ndim == 1]  # Fourier frequencies
    trained = [k for k in tensors if k not in fixed]
    if not isinstance(shadows, list) or len(shadows) != len(trained):
        count = len(shadows) if isinstance(shadows, list) else "no"
        raise ValueError(f"weights: {name} has {count} averages for {len(trained)} trained tensors")
    for key, value in zip(trained, shadows, strict=True):
        if not isinstance(value, Tensor) or value.shape != tensors[key].shape:
            raise ValueError(f"weights: the averages of {name} are not in the order of its parameters, see {key}")
    return {**tensors, **dict(zip(trained, shadows, strict=True))}
