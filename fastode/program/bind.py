"""Late numbers that a run makes itself: between an evaluation and its update, from what the evaluation gave.

AMED's midpoint ratio comes from a small network that looks at a feature map of the denoiser; the step size of a Langevin
corrector comes from two norms. Both are functions of the evaluation just made, and both are needed in the very update that
follows. A :class:`Bind` records where such numbers come from. They are computed on the device, so nothing waits for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastode.program.form import Form
from fastode.scalar import Late


@dataclass(frozen=True, eq=False)
class Bind:
    """``lates`` become known after evaluation ``stage`` and before its update.

    ``function(*features, *norms)`` returns one tensor for each of ``lates``, [B] or without dimensions. ``features`` are the
    evaluation's named outputs ``outputs``, e.g. [B, C, h, w]; ``norms`` are [B]: the Euclidean norms, over the elements of
    each sample, of the linear forms ``norms``. ``function=None``: the numbers are the norms themselves.
    """

    stage: int
    lates: tuple[Late, ...]
    function: Callable[..., Sequence[Tensor]] | None
    outputs: tuple[str, ...] = ()
    norms: tuple[Form, ...] = ()

    def __post_init__(self) -> None:
        if self.function is None and len(self.norms) != len(self.lates):
            raise ValueError(f"norms: need one for each of {len(self.lates)} late numbers, got {len(self.norms)}")

    def make(self, features: Sequence[Tensor], norms: Sequence[Tensor], like: Tensor) -> dict[Late, Tensor]:
        """The numbers in float64, [B, 1, ...] or without dimensions, for states shaped ``like`` [B, *sample].

        Raises ``ValueError`` if the function returns another number of tensors, or tensors of another shape.
        """
        made: Sequence[Tensor] = norms if self.function is None else self.function(*features, *norms)
        names = ", ".join(late.name for late in self.lates)
        if len(made) != len(self.lates):
            raise ValueError(f"{names}: the function that makes them returned {len(made)} tensors")
        batch = like.shape[0]
        known: dict[Late, Tensor] = {}
        for late, value in zip(self.lates, made, strict=True):
            if value.numel() not in (1, batch):
                raise ValueError(f"{late.name}: must be one number or [{batch}] numbers, got shape {list(value.shape)}")
            one_each = value.ndim > 0 and value.numel() == batch
            known[late] = (
                value.double().reshape(batch, *[1] * (like.ndim - 1)) if one_each else value.double().reshape(())
            )
        return known


@dataclass(frozen=True, eq=False)
class PooledMLP:
    """A function of one feature map that backends may compute in their own kernels instead of calling it.

    p = mean over channels of the feature [B, C, h, w], flattened to [B, n];

        z = head (w2 silu(w1 p + b1) + b2) + offset,      number_k = low_k + (high_k - low_k) / (1 + exp(-z_k))

    Shapes: ``w1`` [m, n], ``b1`` [m], ``w2`` [q, m], ``b2`` [q], ``head`` [K, q], ``offset``, ``low``, ``high`` [K]; float32.
    ``offset`` holds what does not depend on the feature: the two noise levels of AMED's predictor, already embedded.
    """

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    head: Tensor
    offset: Tensor
    low: Tensor
    high: Tensor

    def __call__(self, feature: Tensor) -> tuple[Tensor, ...]:
        """K tensors [B]. Raises ``ValueError`` for a feature of another size than the network was trained for."""
        pooled = feature.to(self.w1.dtype).mean(1).flatten(1)
        if pooled.shape[1] != self.w1.shape[1]:
            raise ValueError(
                f"feature: the predictor was trained on {self.w1.shape[1]} pooled numbers per sample, "
                f"this network offers {pooled.shape[1]} (shape {list(feature.shape)})"
            )
        hidden = torch.nn.functional.silu(pooled @ self.w1.T + self.b1) @ self.w2.T + self.b2
        z = hidden @ self.head.T + self.offset
        return tuple((self.low + (self.high - self.low) * torch.sigmoid(z)).unbind(1))

    def to(self, device: Any) -> PooledMLP:
        return PooledMLP(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))
