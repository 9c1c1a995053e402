"""Feature extractors: what turns pictures into the vectors that Frechet distances and manifolds are measured on.

mnist                  the bundled classifier of digits: its last hidden layer, 128 numbers; it also reads the class
<path>.safetensors     a classifier of `fastode train classifier`, with its card beside it
inception:<weights>    the Inception-v3 of the published FID, 2048 numbers, from a weights file of yours
pixels                 the picture itself, flattened
module:function        yours: called with pictures [B, C, H, W] in [-1, 1], it returns [B, F]
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastode.nets.classifier import Classifier, ClassifierConfig

WEIGHTS = Path(__file__).parent / "weights"


@dataclass(frozen=True, eq=False)
class Extractor:
    """``features(x)``: [B, C, H, W] in [-1, 1] to [B, F] float32. ``classify(features)``: their logits, where it has any.

    ``sample_shape``: the pictures it takes, None for any. ``digest`` tells one extractor from another in result files.
    """

    name: str
    features: Callable[[Tensor], Tensor]
    digest: str
    classify: Callable[[Tensor], Tensor] | None = None
    sample_shape: tuple[int, ...] | None = None
    card: dict[str, Any] = field(default_factory=dict)

    @torch.no_grad()
    def __call__(self, x: Tensor, batch: int = 250) -> Tensor:
        """Features [N, F] of pictures [N, C, H, W], ``batch`` at a time. Raises ``ValueError`` for what it cannot take."""
        if self.sample_shape is not None and tuple(x.shape[1:]) != self.sample_shape:
            raise ValueError(
                f"features: {self.name} takes pictures of shape {list(self.sample_shape)}, got {list(x.shape[1:])}"
            )
        parts = []
        for part in x.to(torch.float32).split(batch):
            made = self.features(part)
            if not isinstance(made, Tensor) or made.ndim != 2 or len(made) != len(part):
                got = list(made.shape) if isinstance(made, Tensor) else type(made).__name__
                raise ValueError(f"features: {self.name} must return [{len(part)}, F], got {got}")
            parts.append(made.to("cpu", torch.float32))
        features = torch.cat(parts)
        if not bool(torch.isfinite(features).all()):
            raise ValueError(f"features: {self.name} returned NaN or Inf")
        return features

    def read(self, features: Tensor) -> Tensor:
        """The class that it reads in each row, int64 [N]."""
        assert self.classify is not None
        with torch.no_grad():
            return self.classify(features).argmax(1)


def bundled() -> list[str]:
    """Names of the classifiers in the box."""
    return sorted(p.stem for p in WEIGHTS.glob("*.safetensors"))


def extractor(name: str) -> Extractor:
    """An extractor by name; see the top of this file. Raises ``ValueError`` naming what would be accepted."""
    if name == "pixels":
        return Extractor("pixels", lambda x: x.flatten(1), "pixels")
    if name in bundled() or (name.endswith(".safetensors") and not name.startswith("inception:")):
        return _classifier(WEIGHTS / f"{name}.safetensors" if name in bundled() else Path(name))
    kind, colon, rest = name.partition(":")
    if colon and kind == "inception":
        from fastode.nets.inception import load_inception

        network = load_inception(rest)
        return Extractor("inception", network.features, _digest(network))
    if colon and rest:
        return _own(kind, rest)
    raise ValueError(
        f"features: must be one of {', '.join(bundled())}, pixels, inception:WEIGHTS, a classifier's .safetensors or "
        f"module:function, got {name!r}"
    )


def classifier(path: Path) -> tuple[Classifier, dict[str, Any]]:
    """A classifier and its card from ``path``. Raises ``FileNotFoundError`` or ``ValueError`` naming the path."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    card_path = path.with_suffix(".json")
    for needed in (path, card_path):
        if not needed.exists():
            raise FileNotFoundError(f"features: {needed} does not exist")
    try:
        card = json.loads(card_path.read_text())
        network = Classifier(ClassifierConfig.of(card["config"]))
        network.load_state_dict(load_file(path))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"features: {path} is no classifier of `fastode train classifier` ({error})") from error
    return network.eval().requires_grad_(False), card


def _classifier(path: Path) -> Extractor:
    network, card = classifier(path)
    c = network.config
    shape = (c.channels, c.resolution, c.resolution)
    name = path.stem if path.parent == WEIGHTS else str(path)
    return Extractor(name, network.features, _digest(network), network.output, shape, card)


def _own(module: str, name: str) -> Extractor:
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"features: {module}:{name} cannot be imported ({error})") from error
    if not callable(function):
        raise ValueError(f"features: {module}:{name} must be callable with [B, C, H, W], got {type(function).__name__}")
    digest = _digest(function) if isinstance(function, torch.nn.Module) else f"{module}:{name}"
    return Extractor(f"{module}:{name}", function, digest)


def _digest(network: torch.nn.Module) -> str:
    from fastode.artifact import weights_hash

    return weights_hash(network) or hashlib.sha256(repr(network).encode()).hexdigest()


def batches(count: int, batch: int) -> Iterator[slice]:
    for start in range(0, count, batch):
        yield slice(start, min(start + batch, count))
