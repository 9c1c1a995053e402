"""Precision and recall (arXiv:1904.06991), density and coverage (arXiv:2002.09797), from distances between features.

The manifold of a set is the union of balls about its points, each as large as the distance to its k-th nearest neighbour
in the set (itself not counted).

    precision  share of samples inside the manifold of the reference          (k = 3)
    recall     share of reference points inside the manifold of the samples   (k = 3)
    density    number of reference balls that hold a sample, mean, over k     (k = 5)
    coverage   share of reference balls that hold a sample                    (k = 5)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MEASURES = ("precision", "recall", "density", "coverage")


@dataclass(frozen=True, eq=False)
class Manifold:
    """``features`` [M, F] of the reference, with the radii of its balls at both k, [M]."""

    features: Tensor
    radius: Tensor
    wide_radius: Tensor
    k: int
    wide_k: int

    @classmethod
    def of(cls, features: Tensor, *, k: int = 3, wide_k: int = 5) -> Manifold:
        """Raises ``ValueError`` for fewer than ``wide_k + 1`` points."""
        x = _check(features, max(k, wide_k))
        between = torch.cdist(x, x).fill_diagonal_(float("inf"))
        near = between.topk(max(k, wide_k), largest=False).values
        return cls(x, near[:, k - 1], near[:, wide_k - 1], k, wide_k)

    def measure(self, samples: Tensor, blocks: Sequence[int] | None = None) -> dict[str, Any]:
        """Measures of ``samples`` [N, F] by name; with ``blocks`` (their sizes, which add up to N) also ``<name>_se``, the
        standard error by leaving out one block at a time."""
        from fastode.evaluate.frechet import jackknife

        x = _check(samples, self.k)
        if x.shape[1] != self.features.shape[1]:
            raise ValueError(f"samples: {x.shape[1]} features, the reference has {self.features.shape[1]}")
        across = torch.cdist(x, self.features)  # [N, M]
        within = torch.cdist(x, x).fill_diagonal_(float("inf"))
        inside = (across <= self.radius).any(1).double()  # of a sample alone, whatever the others are
        held = across <= self.wide_radius
        count = held.sum(1).double() / self.wide_k

        def measures(kept: Tensor | slice) -> tuple[float, float, float, float]:
            radius = within[kept][:, kept].kthvalue(self.k, dim=1).values
            recall = (across[kept] <= radius[:, None]).any(0).double().mean()
            coverage = held[kept].any(0).double().mean()
            return float(inside[kept].mean()), float(recall), float(count[kept].mean()), float(coverage)

        found: dict[str, Any] = dict(zip(MEASURES, measures(slice(None)), strict=True))
        if blocks is not None and len(blocks) > 1:
            left_out = []
            for start, size in zip(torch.tensor([0, *blocks]).cumsum(0), blocks, strict=False):
                every = torch.ones(len(x), dtype=torch.bool)
                every[start : start + size] = False
                left_out.append(measures(every))
            for name, values in zip(MEASURES, zip(*left_out, strict=True), strict=True):
                found[f"{name}_se"] = jackknife(values)
        return found


def _check(features: Tensor, k: int) -> Tensor:
    if features.ndim != 2 or len(features) <= k:
        raise ValueError(
            f"features: precision, recall, density and coverage need [N, F] with more than {k} points, "
            f"got shape {list(features.shape)}"
        )
    return features.detach().to("cpu", torch.float32)
