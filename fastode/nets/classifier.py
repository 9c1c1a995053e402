"""A small convolutional classifier: the independent judge of samples, and a feature space for Frechet distances."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class ClassifierConfig:
    """``widths``: channels after each convolution; every one halves the picture. ``hidden``: length of the features."""

    channels: int = 1
    resolution: int = 32
    classes: int = 10
    widths: tuple[int, ...] = (16, 32, 64)
    hidden: int = 128

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))
        if self.resolution % 2 ** len(self.widths):
            raise ValueError(
                f"resolution: must be a multiple of {2 ** len(self.widths)} for widths {list(self.widths)}, "
                f"got {self.resolution}"
            )

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "widths": list(self.widths)}

    @classmethod
    def of(cls, card: Mapping[str, Any]) -> ClassifierConfig:
        return cls(**card)


class Classifier(nn.Module):
    """[B, C, H, W] in [-1, 1] to logits [B, classes]; ``features`` gives the last hidden layer, [B, hidden]."""

    def __init__(self, config: ClassifierConfig = ClassifierConfig()) -> None:
        super().__init__()
        self.config = config
        widths = (config.channels, *config.widths)
        side = config.resolution // 2 ** len(config.widths)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm2d(c) for c in widths[1:])
        self.hidden = nn.Linear(widths[-1] * side * side, config.hidden)
        self.output = nn.Linear(config.hidden, config.classes)

    def features(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = functional.max_pool2d(functional.relu(norm(conv(x))), 2)
        return functional.relu(self.hidden(x.flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.output(functional.dropout(self.features(x), 0.3, self.training))
