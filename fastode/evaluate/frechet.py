"""The Frechet distance between two sets of features, in float64.

For features with means m1, m2 and covariances S1, S2 (arXiv:1706.08500; of Gaussians it is the squared 2-Wasserstein
distance)::

    d = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)

tr (S1 S2)^(1/2) is the sum of the singular values of A1^T A2 for any factors S = A A^T. So no matrix square root of a
product that is not symmetric is taken, and nothing becomes complex where a covariance is singular.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastode.files import whole


@dataclass(frozen=True, eq=False)
class Statistics:
    """``mean`` [F] and ``covariance`` [F, F] (divided by N - 1) of ``count`` feature vectors, float64.

    ``count`` is None where a file does not tell it.
    """

    mean: Tensor
    covariance: Tensor
    count: int | None = None

    def __post_init__(self) -> None:
        f = self.mean.shape[0] if self.mean.ndim == 1 else 0
        if f < 1 or self.covariance.shape != (f, f):
            raise ValueError(
                f"statistics: need a mean [F] and a covariance [F, F], got {list(self.mean.shape)} and "
                f"{list(self.covariance.shape)}"
            )
        if not bool(torch.isfinite(self.mean).all() and torch.isfinite(self.covariance).all()):
            raise ValueError("statistics: mean or covariance is not finite")

    @property
    def dimension(self) -> int:
        return len(self.mean)

    @classmethod
    def of(cls, features: Tensor) -> Statistics:
        """Of ``features`` [N, F]; N must be at least 2. Sums are made in float64 about the mean, so nothing cancels."""
        if features.ndim != 2 or features.shape[0] < 2:
            raise ValueError(f"features: need [N, F] with N of at least 2, got shape {list(features.shape)}")
        x = features.detach().to("cpu", torch.float64)
        mean = x.mean(0)
        centred = x - mean
        return cls(mean, centred.T @ centred / (len(x) - 1), len(x))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an .npz with ``mu`` and ``sigma``, the file that pytorch-fid and others read, and ``count``."""
        target = Path(path)
        if target.suffix != ".npz":
            raise ValueError(f"statistics: must end in .npz, got {str(path)!r}")
        target.parent.mkdir(parents=True, exist_ok=True)
        arrays = {"mu": self.mean.numpy(), "sigma": self.covariance.numpy()}
        if self.count is not None:
            arrays["count"] = np.asarray(self.count)
        with whole(target) as part, part.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """Read ``mu`` and ``sigma`` from an .npz. Raises ``FileNotFoundError`` or ``ValueError`` naming the path."""
        if not Path(path).exists():
            raise FileNotFoundError(f"reference: {path} does not exist")
        try:
            with np.load(path, allow_pickle=False) as file:
                found = {name: file[name] for name in ("mu", "sigma", "count") if name in file}
            if "mu" not in found or "sigma" not in found:
                raise ValueError("it has no arrays 'mu' and 'sigma'")
            count = int(found["count"]) if "count" in found else None
            return cls(torch.from_numpy(found["mu"]).double(), torch.from_numpy(found["sigma"]).double(), count)
        except (ValueError, OSError, EOFError, TypeError) as error:
            raise ValueError(f"reference: {path} holds no feature statistics ({error})") from error


def frechet_distance(one: Statistics, other: Statistics) -> float:
    """The squared distance d above. Raises ``ValueError`` where the features differ in number."""
    if one.dimension != other.dimension:
        raise ValueError(
            f"statistics: of {one.dimension} and of {other.dimension} features; both sets need the same extractor"
        )
    shift = (one.mean - other.mean).square().sum()
    overlap = torch.linalg.svdvals(_factor(one.covariance).T @ _factor(other.covariance)).sum()
    return float(shift + one.covariance.trace() + other.covariance.trace() - 2 * overlap)


def floor(reference: Statistics, count: int, *, repeats: int = 4, seed: int = 0) -> float:
    """What ``count`` perfect samples would get: the bias of the distance at a finite number.

    The mean over ``repeats`` draws of ``count`` vectors from the Gaussian of ``reference``. The covariance of ``count``
    draws is W / (count - 1) with W a Wishart matrix, which for few samples misses all but ``count - 1`` directions.
    """
    generator = torch.Generator().manual_seed(seed)
    factor = _factor(reference.covariance)
    found = []
    for _ in range(repeats):
        z = torch.randn(count, factor.shape[1], generator=generator, dtype=torch.float64)
        found.append(frechet_distance(Statistics.of(reference.mean + z @ factor.T), reference))
    return sum(found) / repeats


def too_few(count: int, reference: Statistics) -> str | None:
    """A warning that names the bias where ``count`` samples do not determine the covariance; None where they do."""
    if count > reference.dimension:
        return None
    return (
        f"frechet: {count} samples cannot determine a covariance of {reference.dimension} features; the distance is biased "
        f"upward: {count} perfect samples would get {floor(reference, count):.4g} instead of 0. "
        f"Take more than {reference.dimension}, or compare only with figures of the same number"
    )


def _factor(covariance: Tensor) -> Tensor:
    """A with A A^T = covariance; negative eigenvalues are rounding errors of zeros."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    return vectors * values.clamp(min=0).sqrt()


def jackknife(estimates: Any) -> float:
    """Standard error of an estimate from its values with each of B independent blocks left out:
    sqrt((B - 1)/B sum (theta_b - mean)^2). NaN for fewer than two blocks."""
    values = torch.as_tensor(estimates, dtype=torch.float64)
    b = len(values)
    return float(((b - 1) / b * (values - values.mean()).square().sum()).sqrt()) if b > 1 else float("nan")
