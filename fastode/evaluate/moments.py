"""What a program makes of Gaussian data, exactly: mean and covariance at every level, without a single sample.

On Gaussian data the denoised estimate is affine in the state, so a program is an affine map of its start and its draws, all
of which are normal. Pushing the map through the table gives the law of its output; nothing is estimated.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastode.denoisers.analytic import Gaussian
from fastode.program import Form, Program
from fastode.schedules.grid import Level


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean [d] and covariance [d, d] in float64 of a normal law, in the frame of its level."""

    mean: Tensor
    covariance: Tensor


@dataclass(frozen=True, eq=False)
class _Affine:
    """``gain * start + sum_k noise[k] draw_k + offset``, one number per principal component of the data."""

    gain: Tensor
    noise: Tensor  # [draws, d]
    offset: Tensor


def marginal(data: Gaussian, level: Level) -> Moments:
    """The law of alpha x_0 + sigma n: what every sampler should have at ``level``."""
    alpha, sigma = float(level.alpha), float(level.sigma)
    return Moments(alpha * data.mean.reshape(-1), _matrix(data, alpha**2 * data.variances + sigma**2))


def push(program: Program, data: Gaussian, start: Moments | None = None) -> list[Moments]:
    """Moments of the program's state at every grid level, then of its result; from the marginal at the first level.

    ``start``: another law at the first level, whose covariance is diagonal in the data's principal axes. Raises
    ``ValueError`` for programs with late or per-element numbers.
    """
    if program.late:
        raise ValueError("program: its late numbers are not known, so it is no fixed map")
    first = start or marginal(data, program.grid[0])
    d, basis = data.variances.numel(), data.basis
    zero, mean = torch.zeros(d, dtype=torch.float64), _rotate(data.mean.reshape(-1), basis)
    one = _rotate(torch.ones(d, dtype=torch.float64), basis)
    nothing = torch.zeros(program.draws, d, dtype=torch.float64)
    values = {0: _Affine(torch.ones(d, dtype=torch.float64), nothing, zero)}

    def read(form: Form, denoised: _Affine | None) -> _Affine:
        gain, noise, offset = zero.clone(), nothing.clone(), zero.clone()
        for atom, weight in form.terms.items():
            w = float(weight)
            if atom.kind == "noise":
                noise[atom.index] += w
            elif atom.kind == "one":
                offset += w * one
            else:
                term = values[atom.index] if atom.kind == "value" else denoised
                assert term is not None
                gain, noise, offset = gain + w * term.gain, noise + w * term.noise, offset + w * term.offset
        return _Affine(gain, noise, offset)

    values |= {write: read(form, None) for write, form in program.init.rows()}
    for stage in program.stages:
        x, alpha, sigma = values[stage.net_in], float(stage.level.alpha), float(stage.level.sigma)
        # E[x_0 | x] = mean + alpha v/(alpha^2 v + sigma^2) (x - alpha mean), also at alpha = 0
        shrink = alpha * data.variances / (alpha**2 * data.variances + sigma**2)
        estimate = _Affine(shrink * x.gain, shrink * x.noise, mean + shrink * (x.offset - alpha * mean))
        values |= {write: read(form, estimate) for write, form in stage.table.rows()}

    variance = torch.diagonal(first.covariance if basis is None else basis.T @ first.covariance @ basis)
    begin = _rotate(first.mean, basis)

    def law(value: int) -> Moments:
        a = values[value]
        made = a.gain * begin + a.offset
        return Moments(
            made if basis is None else basis @ made, _matrix(data, a.gain**2 * variance + (a.noise**2).sum(0))
        )

    return [law(value) for value in (*program.states, program.result)]


def _rotate(x: Tensor, basis: Tensor | None) -> Tensor:
    return x if basis is None else basis.T @ x


def _matrix(data: Gaussian, variances: Tensor) -> Tensor:
    if data.basis is None:
        return torch.diag(variances)
    return data.basis @ torch.diag(variances) @ data.basis.T
