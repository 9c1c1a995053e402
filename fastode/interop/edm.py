"""Network pickles of EDM (github.com/NVlabs/edm, arXiv:2206.00364) as denoisers. The code in them is never run.

A pickle holds ``ema``: a preconditioning class around a network class, with the arguments both were made with. The network
is rebuilt from those arguments with our own modules; the preconditioning becomes the denoiser's prediction and schedule.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastode.denoisers.base import Denoiser
from fastode.interop.unpickle import Object, load_pickle
from fastode.interop.weights import fit
from fastode.nets.families import FAMILIES, build_network
from fastode.schedules.noise import EDM, VE, Discrete, NoiseSchedule, VPLinear

NETWORKS = {"SongUNet": "song", "DhariwalUNet": "dhariwal"}
"""EDM's network classes and the families that they are here."""


@dataclass(frozen=True)
class Precond:
    """A preconditioning class of EDM: its own arguments with their defaults, and the network it takes by default."""

    model_type: str
    defaults: dict[str, Any]


_COMMON = {"img_resolution": None, "img_channels": None, "label_dim": 0, "use_fp16": False}
PRECONDS = {
    "EDMPrecond": Precond("DhariwalUNet", {**_COMMON, "sigma_min": 0.0, "sigma_max": math.inf, "sigma_data": 0.5}),
    "VPPrecond": Precond("SongUNet", {**_COMMON, "beta_d": 19.9, "beta_min": 0.1, "M": 1000, "epsilon_t": 1e-5}),
    "VEPrecond": Precond("SongUNet", {**_COMMON, "sigma_min": 0.02, "sigma_max": 100.0}),
    "iDDPMPrecond": Precond("DhariwalUNet", {**_COMMON, "C_1": 0.001, "C_2": 0.008, "M": 1000}),
}


def load(path: str | os.PathLike[str], *, key: str = "ema") -> Denoiser:
    """The network of an EDM pickle, such as ``edm-cifar10-32x32-uncond-vp.pkl``, as a :class:`Denoiser`.

    ``key``: which network of the pickle. D(x; sigma) is that of EDM's own class with the same weights: EDM preconditioning
    is prediction "edm"; VP and iDDPM are "eps" on their schedules, VE is "score". Class labels are whole numbers. The
    denoiser can be guided where the network was trained with label dropout; its null label is ``label_dim``.

    Sampling ranges are EDM's where the network leaves them open, 0.002 .. 80; VP ends at t = 0.001.

    Raises ``FileNotFoundError``; ``UnsafePickle`` for a pickle that asks for anything but data; ``ValueError`` for classes
    and arguments that are not EDM's, and for missing, extra or misshapen weights.
    """
    return of(load_pickle(path), name=Path(path).stem, key=key)


def of(data: Any, *, name: str = "edm", key: str = "ema") -> Denoiser:
    """As :func:`load`, from the data of the pickle."""
    if isinstance(data, dict):
        if key not in data:
            raise ValueError(f"pickle: {name} has no {key!r}, it has {', '.join(map(str, data)) or 'nothing'}")
        data = data[key]
    if not isinstance(data, Object) or data.class_name not in PRECONDS:
        found = data.class_name if isinstance(data, Object) else type(data).__name__
        raise ValueError(f"pickle: {name} holds a {found}; known are {', '.join(PRECONDS)}")
    try:
        return _denoiser(data, name)
    except (TypeError, AttributeError, OverflowError, ArithmeticError) as error:
        raise ValueError(f"pickle: {name} was made with arguments that are not EDM's ({error})") from error


def _denoiser(data: Object, name: str) -> Denoiser:
    own, rest = _arguments(data)
    model_type = rest.pop("model_type", PRECONDS[data.class_name].model_type)
    if model_type not in NETWORKS:
        raise ValueError(f"pickle: {name} has a network of class {model_type!r}; known are {', '.join(NETWORKS)}")
    resolution, channels, classes = own["img_resolution"], own["img_channels"], int(own["label_dim"])
    config = {
        "img_resolution": resolution,
        "in_channels": channels,
        "out_channels": 2 * channels if data.class_name == "iDDPMPrecond" else channels,
        "label_dim": classes,
        **rest,
    }
    family = NETWORKS[model_type]
    network = build_network(family, config)
    weights = data.tensors()
    if data.class_name == "iDDPMPrecond":
        weights.pop("u", None)  # the table of noise levels, which follows from the arguments
    tensors = {k.removeprefix("model."): v for k, v in weights.items()}
    fit(network, tensors, where=name)
    prediction, schedule = _meaning(data.class_name, own)
    return Denoiser(
        network,
        prediction=prediction,
        schedule=schedule,
        sigma_data=float(own.get("sigma_data", 0.5)),
        num_classes=classes,
        null_label=classes if classes and config.get("label_dropout") else None,
        sample_shape=(channels, resolution, resolution),
        name=name,
    )


def _arguments(data: Object) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of the preconditioning class, defaults filled in, and those it passes on to its network."""
    defaults = PRECONDS[data.class_name].defaults
    given = {**dict(zip(defaults, data.init_args, strict=False)), **data.init_kwargs}
    missing = [n for n in ("img_resolution", "img_channels") if given.get(n) is None]
    if missing or len(data.init_args) > len(defaults):
        raise ValueError(
            f"pickle: the arguments of {data.class_name} were not recorded ({', '.join(missing) or 'extra'})"
        )
    own = {n: given.get(n, default) for n, default in defaults.items()}
    rest = {n: v for n, v in given.items() if n not in defaults}
    model_type = rest.get("model_type", PRECONDS[data.class_name].model_type)
    known = set(FAMILIES[NETWORKS[model_type]][0].__dataclass_fields__) if model_type in NETWORKS else set(rest)
    unknown = sorted(set(rest) - known - {"model_type"})
    if unknown:
        raise ValueError(
            f"pickle: {data.class_name} was made with {unknown[0]!r}, an argument that {model_type} has not"
        )
    return own, rest


def _meaning(kind: str, own: dict[str, Any]) -> tuple[str, NoiseSchedule]:
    """Prediction and schedule of a preconditioning class (arXiv:2206.00364, Table 1)."""
    if kind == "EDMPrecond":
        return "edm", EDM(max(float(own["sigma_min"]), 0.002), min(float(own["sigma_max"]), 80.0))
    if kind == "VEPrecond":
        return "score", VE(float(own["sigma_min"]), float(own["sigma_max"]), told="log_half_sigma")
    if kind == "VPPrecond":
        low, slope = float(own["beta_min"]), float(own["beta_d"])
        return "eps", VPLinear(low, low + slope, t_min=max(float(own["epsilon_t"]), 1e-3), label_scale=own["M"] - 1)
    return "eps", improved_ddpm(int(own["M"]), float(own["C_1"]), float(own["C_2"]))


def improved_ddpm(steps: int = 1000, c_1: float = 0.001, c_2: float = 0.008) -> Discrete:
    """Improved DDPM's levels as EDM numbers them: u_M = 0, u_{j-1}^2 = (u_j^2 + 1) / max(abar_{j-1} / abar_j, C_1) - 1 with
    abar_j = sin^2(pi/2 j / (M (1 + C_2))). Level u_j has label M - 1 - j; noise levels are rounded to the nearest u."""
    j = torch.arange(steps + 1, dtype=torch.float64)
    bar = torch.sin(0.5 * math.pi * j / (steps * (1 + c_2))) ** 2
    ratio = (bar[:-1] / bar[1:]).clamp(min=c_1)  # of j - 1 to j
    alphas_bar, signal = [], 1.0
    for k in range(steps - 1, -1, -1):  # 1 / (u^2 + 1) is a running product
        signal *= float(ratio[k])
        alphas_bar.append(signal)
    return Discrete(tuple(alphas_bar), rounded=True)
