"""Cascade polynomial regression of DC-Solver (arXiv:2409.03755): ratios for an NFE and guidance strength never searched."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

CLAMP = (0.3, 2.0)


@dataclass(frozen=True, eq=False)
class Cascade:
    """Ratios as polynomials of polynomials. With u = i/NFE of step i = 1 .. NFE, z = guidance/12 and q = NFE/50,

        ratio_i = sum_k P_k u^k,   P_k = sum_j a_kj z^(2-j),   a_kj = sum_m c_kjm q^(2-m),   k <= 3, j, m <= 2

    and 1 for i < 3. ``coefficients``: float64 [4, 3, 3], c_kjm. ``nfe``, ``guidance``: the ranges they were fitted on.
    The sums cancel (coefficients of 1e4, ratios of 1), so nothing outside those ranges means anything.
    """

    coefficients: Tensor
    nfe: tuple[float, float]
    guidance: tuple[float, float]

    def __post_init__(self) -> None:
        if self.coefficients.shape != (4, 3, 3) or not bool(torch.isfinite(self.coefficients).all()):
            raise ValueError(f"coefficients: must be finite and [4, 3, 3], got {list(self.coefficients.shape)}")

    def ratios(self, nfe: int, guidance_scale: float, *, clamp: tuple[float, float] | None = CLAMP) -> list[float]:
        """One ratio per step, within ``clamp`` (None: as the polynomials say). Warns outside the fitted ranges."""
        if isinstance(nfe, bool) or not isinstance(nfe, int) or nfe < 1:
            raise ValueError(f"nfe: must be a whole number of at least 1, got {nfe!r}")
        for name, value, (low, high) in (("nfe", nfe, self.nfe), ("guidance_scale", guidance_scale, self.guidance)):
            if not low <= value <= high:
                warnings.warn(f"{name}: ratios were fitted for {low:g} .. {high:g}, {value:g} is outside", stacklevel=2)
        terms = numpy.einsum("nkjm,kjm->n", _terms(nfe, guidance_scale), self.coefficients.numpy())
        low, high = clamp or (-numpy.inf, numpy.inf)
        return [1.0 if i < 2 else float(min(max(r, low), high)) for i, r in enumerate(terms)]


def fit(found: Sequence[tuple[int, float, Sequence[float]]]) -> Cascade:
    """The cascade through searched ratios: entries (NFE, guidance strength, ratios), at least three of each.

    The published fit is a non-linear solver on the nested form; multiplied out, the ratios are linear in its 36 numbers, so
    this is plain least squares. Raises ``ValueError`` where the entries do not determine the coefficients.
    """
    rows, right = [], []
    for nfe, guidance, ratios in found:
        if len(ratios) != nfe:
            raise ValueError(f"found: need one ratio per step, got {len(ratios)} for {nfe} steps")
        rows.append(_terms(nfe, guidance)[2:].reshape(nfe - 2, 36))
        right.append(numpy.asarray(ratios, dtype=float)[2:])
    design = numpy.concatenate(rows) if rows else numpy.zeros((0, 36))
    if not design.shape[0] or not numpy.isfinite(numpy.concatenate(right)).all():
        raise ValueError("found: no ratios, or some that are not finite")
    size = numpy.linalg.norm(design, axis=0)
    solution, _, rank, _ = numpy.linalg.lstsq(design / size, numpy.concatenate(right), rcond=1e-12)
    if rank < 36:
        counts = len({n for n, _, _ in found}), len({g for _, g, _ in found})
        raise ValueError(
            f"found: the 36 coefficients need at least 3 NFEs, each with at least 3 guidance strengths and enough steps; "
            f"got {counts[0]} and {counts[1]}, which determine {rank}"
        )
    span = [(min(v), max(v)) for v in ([n for n, _, _ in found], [g for _, g, _ in found])]
    return Cascade(torch.from_numpy((solution / size).reshape(4, 3, 3)), *span)


def _terms(nfe: int, guidance: float) -> numpy.ndarray:
    """u^k z^(2-j) q^(2-m) of every step: [NFE, 4, 3, 3]."""
    u = numpy.arange(1, nfe + 1) / nfe
    powers = u[:, None] ** numpy.arange(4)
    z, q = ((value / top) ** numpy.array([2, 1, 0]) for value, top in ((guidance, 12), (nfe, 50)))
    return numpy.einsum("nk,j,m->nkjm", powers, z, q)


STABLE_DIFFUSION_2_1 = Cascade(
    torch.tensor(
        [
            [
                [1523.67661966, -1111.47464508, 198.38349618],
                [-1346.08900228, 1007.19494126, -186.25475774],
                [168.39730243, -128.03894894, 24.88478975],
            ],
            [
                [-8140.64401858, 5906.74827912, -1035.99411231],
                [6941.4138994, -5193.98065982, 950.3205653],
                [-848.21046751, 650.69033333, -121.28674277],
            ],
            [
                [13309.27038462, -9616.67032053, 1668.76859621],
                [-11037.10779439, 8256.66668566, -1503.79920359],
                [1293.97404351, -999.56293282, 188.22170414],
            ],
            [
                [-6747.42182161, 4853.15305335, -835.51167928],
                [5489.11518378, -4096.89721821, 743.09534131],
                [-619.56127633, 480.14971466, -90.89633129],
            ],
        ],
        dtype=torch.float64,
    ),
    nfe=(5, 10),
    guidance=(1, 12),
)
"""The published coefficients, for one configuration only: Stable Diffusion 2.1 (v-prediction, 768), UniPC of order 2 with
bh2 and ``disable_corrector=[0]``, ``dc_order=2`` in time, ``linspace`` levels of 1000 labels."""
