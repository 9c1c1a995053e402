"""Denoisers from disk: weights as safetensors beside a JSON card. The bundled ones are loaded by name.

The card is everything but the weights: which network and its config, what its output means, on which schedule. Other
people's checkpoints are converted to it once (:func:`convert`), or read each time (``load("edm:network.pkl")``).
"""

from __future__ import annotations

import difflib
import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastode.denoisers.base import Denoiser
from fastode.files import write_json, write_tensors
from fastode.schedules.noise import EDM, schedule_from_dict, schedule_to_dict

WEIGHTS = Path(__file__).parent / "weights"
FORMAT = "fastode-denoiser-1"

KINDS: dict[str, str] = {
    "edm": "a network pickle of EDM",
    "adm": "a checkpoint of guided diffusion, or an EDM network of Consistency Models",
    "score_sde": "a checkpoint of score-SDE",
    "diffusers": "a pipeline or a model of diffusers",
}
"""Foreign formats: ``fastode.interop.<kind>`` has a ``load(path, **options)`` for each."""


def bundled() -> list[str]:
    """Names that :func:`load` knows without a path."""
    return sorted(p.stem for p in WEIGHTS.glob("*.safetensors"))


def load(name: str | os.PathLike[str], *, device: str = "cpu") -> Denoiser:
    """A denoiser by bundled name ("mnist"), or from ``<path>.safetensors`` with its card ``<path>.json`` beside it.

    "edm:<path>", "adm:<path>" and "diffusers:<path>" name a foreign format, see ``KINDS``; what needs options is converted
    first. Nothing is unpickled: pickles are read as data. Raises ``FileNotFoundError`` for unknown names, ``ValueError`` for
    damaged or foreign files.
    """
    kind, colon, rest = str(name).partition(":")
    if colon and kind in KINDS:
        return load_foreign(kind, rest).to(device)
    path = _find(name)
    card = _read_card(path.with_suffix(".json"))
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from fastode.nets.families import build_network

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"weights: {path} is damaged or not safetensors ({error})") from error
    try:
        network = build_network(card.get("network", "unet"), card["config"])
        network.load_state_dict({k: v.to(network.state_dict()[k].dtype) for k, v in tensors.items()})
        denoiser = Denoiser(
            network.eval().requires_grad_(False).to(device),
            prediction=card["prediction"],
            sigma_data=card["sigma_data"],
            name=str(card.get("name", path.stem)),
            card=card,
            **_meaning(card, network),
        )
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"weights: {path} does not fit its card ({error})") from error
    return denoiser


def load_foreign(kind: str, path: str | os.PathLike[str], **options: Any) -> Denoiser:
    """A denoiser from a foreign format, a key of ``KINDS``. Raises ``ValueError`` naming an option that it does not have."""
    if kind not in KINDS:
        raise ValueError(f"kind: must be one of {', '.join(KINDS)}, got {kind!r}")
    module: Any = importlib.import_module(f"fastode.interop.{kind}")
    try:
        denoiser: Denoiser = module.load(path, **options)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise ValueError(f"option: {kind} has none of that name ({error})") from error
    return denoiser


def save(denoiser: Denoiser, path: str | os.PathLike[str], **notes: Any) -> Path:
    """Write ``<path>.safetensors`` and its card, which :func:`load` makes the same denoiser of. ``notes`` go into the card.

    Raises ``ValueError`` for a network that a card cannot name, and for transforms, which belong to the code that uses it.
    """
    from fastode.nets.families import describe_network

    family, config = describe_network(denoiser.network)
    if denoiser.transforms:
        raise ValueError("denoiser: its transforms cannot be written to a card; save it without")
    weights = Path(path).with_suffix(".safetensors")
    card = {
        "format": FORMAT,
        "name": denoiser.name,
        "network": family,
        "config": config,
        "prediction": denoiser.prediction,
        "sigma_data": denoiser.sigma_data,
        "schedule": schedule_to_dict(denoiser.schedule),
        "num_classes": denoiser.num_classes,
        "null_label": denoiser.null_label,
        "sample_shape": denoiser.sample_shape,
        **notes,
    }
    weights.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(weights, denoiser.network.state_dict())  # type: ignore[attr-defined]
    write_json(weights.with_suffix(".json"), card)
    return weights


def convert(kind: str, source: str | os.PathLike[str], path: str | os.PathLike[str], **options: Any) -> Path:
    """Read a foreign format, a key of ``KINDS``, and :func:`save` it."""
    denoiser = load_foreign(kind, source, **options)
    return save(denoiser, path, source={"kind": kind, "file": Path(source).name, **options})


def _meaning(card: Mapping[str, Any], network: Any) -> dict[str, Any]:
    """Schedule, classes and shape: as the card says, or, in cards that name no schedule, as they were trained here."""
    if "schedule" in card:
        return {
            "schedule": schedule_from_dict(card["schedule"]),
            "num_classes": card["num_classes"],
            "null_label": card["null_label"],
            "sample_shape": None if card["sample_shape"] is None else tuple(card["sample_shape"]),
        }
    config = network.config
    return {
        "schedule": EDM(card["sigma_min"], card["sigma_max"]),
        "num_classes": config.num_classes,
        "null_label": config.num_classes or None,
        "sample_shape": (config.in_channels, config.resolution, config.resolution),
    }


def _find(name: str | os.PathLike[str]) -> Path:
    given = Path(name)
    for path in (given, given.with_suffix(".safetensors"), WEIGHTS / f"{name}.safetensors"):
        if path.suffix == ".safetensors" and path.is_file():
            return path
    close = difflib.get_close_matches(str(name), bundled(), n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise FileNotFoundError(
        f"model: no bundled model or weights file {str(name)!r}{hint} (bundled: {', '.join(bundled()) or 'none'})"
    )


def _read_card(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"model: the card {path} is missing beside the weights")
    try:
        card = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"model: the card {path} is not valid JSON ({error})") from error
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise ValueError(f"model: {path} is not a card of format {FORMAT!r}")
    return card
