"""Denoisers from disk: weights as safetensors beside a JSON card. The bundled ones are loaded by name."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from fastode.denoisers.base import Denoiser
from fastode.schedules.noise import EDM

WEIGHTS = Path(__file__).parent / "weights"
FORMAT = "fastode-denoiser-1"


def bundled() -> list[str]:
    """Names that :func:`load` knows without a path."""
    return sorted(p.stem for p in WEIGHTS.glob("*.safetensors"))


def load(name: str | Path, *, device: str = "cpu") -> Denoiser:
    """A denoiser by bundled name ("mnist"), or from ``<path>.safetensors`` with its card ``<path>.json`` beside it.

    Nothing is unpickled. Raises ``FileNotFoundError`` for unknown names, ``ValueError`` for damaged or foreign files.
    """
    path = _find(name)
    card = _read_card(path.with_suffix(".json"))
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from fastode.nets.unet import build

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"weights: {path} is damaged or not safetensors ({error})") from error
    try:
        network = build(card["config"])
        network.load_state_dict({k: v.to(network.state_dict()[k].dtype) for k, v in tensors.items()})
        config = network.config
        denoiser = Denoiser(
            network.eval().requires_grad_(False).to(device),
            prediction=card["prediction"],
            schedule=EDM(card["sigma_min"], card["sigma_max"]),
            sigma_data=card["sigma_data"],
            num_classes=config.num_classes,
            null_label=config.num_classes or None,
            sample_shape=(config.in_channels, config.resolution, config.resolution),
            name=str(card.get("name", path.stem)),
            card=card,
        )
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"weights: {path} does not fit its card ({error})") from error
    return denoiser


def _find(name: str | Path) -> Path:
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
