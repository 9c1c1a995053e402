"""From the figures of independent blocks of seeds to one figure with its standard error."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastode.evaluate.data import Reference
from fastode.evaluate.frechet import Statistics, frechet_distance, jackknife
from fastode.evaluate.manifold import MEASURES, Manifold

TRAJECTORY = ("rmse", "cosine", "truncation")
SETS = ("frechet", *MEASURES)
METRICS = (*TRAJECTORY, *SETS, "accuracy")
"""Everything that is measured; README and the report explain each."""


def check_metrics(
    names: Sequence[str] | None, *, reference: Reference | None, features: bool, labels: bool
) -> tuple[str, ...]:
    """The metrics to measure: all that are possible, or those asked for.

    Raises ``ValueError`` for an unknown one, or one that lacks what it needs.
    """
    manifolds = reference is not None and reference.features is not None
    lacking = {
        "frechet": None if reference is not None else "a reference (--reference)",
        **{m: None if manifolds else "real features: a reference of images, not of statistics" for m in MEASURES},
        "accuracy": None if features and labels else "labels, and an extractor that reads classes",
    }
    if names is None:
        return tuple(m for m in METRICS if lacking.get(m) is None)
    for name in names:
        if name not in METRICS:
            raise ValueError(f"metrics: must be among {', '.join(METRICS)}, got {name!r}")
        if lacking.get(name) is not None:
            raise ValueError(f"metrics: {name} needs {lacking[name]}")
    return tuple(m for m in METRICS if m in names)


def pooled(
    blocks: Sequence[Mapping[str, Any]],
    features: Sequence[Tensor],
    metrics: Sequence[str],
    reference: Reference | None,
    manifold: Manifold | None,
) -> dict[str, Any]:
    """Figures over all blocks by name, each with ``<name>_se``: the jackknife over blocks, which are independent because
    their seeds are. Trajectory figures come from the blocks' records, set figures from their features."""
    sizes = [int(b["count"]) for b in blocks]
    out: dict[str, Any] = {"count": sum(sizes)}
    for name, source, finish in (
        ("rmse", "mse", lambda v: v**0.5),
        ("cosine", "cosine", lambda v: v),
        ("accuracy", "accuracy", lambda v: v),
    ):
        values = [float(b[source]) for b in blocks if b.get(source) is not None]
        if name not in metrics or len(values) < len(blocks):
            continue
        out[name], out[f"{name}_se"] = _mean(values, sizes, finish)
    if reference is not None and "frechet" in metrics and features:
        everything = list(features)
        out["frechet"] = frechet_distance(Statistics.of(torch.cat(everything)), reference.statistics)
        if len(everything) > 1:
            without = [torch.cat(everything[:i] + everything[i + 1 :]) for i in range(len(everything))]
            out["frechet_se"] = jackknife([frechet_distance(Statistics.of(w), reference.statistics) for w in without])
    if manifold is not None and features and any(m in metrics for m in MEASURES):
        measured = manifold.measure(torch.cat(list(features)), [len(f) for f in features])
        out |= {k: v for k, v in measured.items() if k.removesuffix("_se") in metrics}
    return out


def _mean(values: Sequence[float], sizes: Sequence[int], finish: Callable[[Any], Any]) -> tuple[float, float]:
    v, n = torch.tensor(values, dtype=torch.float64), torch.tensor(sizes, dtype=torch.float64)
    total = (v * n).sum()
    mean = finish(total / n.sum())
    if len(v) < 2:
        return float(mean), float("nan")
    return float(mean), jackknife([float(finish((total - a * b) / (n.sum() - b))) for a, b in zip(v, n, strict=True)])
