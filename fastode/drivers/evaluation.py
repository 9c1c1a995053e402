"""What the drivers evaluate: a denoiser with the conditions of one call, at one level or at one level per row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastode.denoisers.base import Condition, Denoiser
from fastode.denoisers.guidance import GUIDANCE_SCALE, Guidance
from fastode.engine import NonFiniteError
from fastode.noise import check_seeds, normal
from fastode.scalar import evaluate
from fastode.schedules.grid import Level


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A denoiser bound to its conditions for ``batch`` samples.

    ``at(x, level)`` is D for a shared level, ``rows(x, levels)`` for one level per row. Both are :meth:`Denoiser.denoise`
    in other clothes: the four numbers of a level are made in float64 on the host, so that the corner cases (alpha = 0) are
    those of the engine.
    """

    denoiser: Denoiser
    batch: int
    condition: Condition
    guidance: Guidance | None = None
    known: Mapping[Any, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        denoiser: Denoiser | Callable[..., Any],
        batch: int,
        *,
        class_labels: Any = None,
        guidance_scale: Any = None,
        guidance: Guidance | None = None,
        cond: Mapping[str, Any] | None = None,
        uncond: Mapping[str, Any] | None = None,
        ndim: int = 4,
    ) -> Evaluation:
        """Check the conditions of a call. Raises ``ValueError`` naming the argument."""
        d = Denoiser.of(denoiser)
        on = guidance or (Guidance() if guidance_scale is not None else None)
        if on is not None and guidance_scale is None:
            raise ValueError("guidance_scale: guidance needs a strength (a number, or one per sample)")
        labels = None if class_labels is None else torch.as_tensor(class_labels)
        condition = d.check_condition(batch, Condition(labels, dict(cond or {}), uncond), on)
        known: dict[Any, Any] = {}
        if guidance_scale is not None:
            value = torch.as_tensor(guidance_scale, dtype=torch.float64)
            if value.ndim and value.shape != (batch,):
                raise ValueError(
                    f"guidance_scale: must be a number or [{batch}] numbers, got shape {list(value.shape)}"
                )
            if not bool(torch.isfinite(value).all()):
                raise ValueError("guidance_scale: must be finite")
            known[GUIDANCE_SCALE] = value.reshape(-1, *[1] * (ndim - 1)) if value.ndim else float(value)
        return cls(d, batch, condition, on, known)

    def _map(self, batch: int, move: Callable[[Tensor], Tensor]) -> Evaluation:
        def moved(value: Any) -> Any:
            return move(value) if isinstance(value, Tensor) and value.ndim and len(value) == self.batch else value

        c = self.condition
        uncond = None if c.uncond is None else {k: moved(v) for k, v in c.uncond.items()}
        condition = Condition(moved(c.class_labels), {k: moved(v) for k, v in c.cond.items()}, uncond)
        return replace(self, batch=batch, condition=condition, known={k: moved(v) for k, v in self.known.items()})

    def take(self, rows: Tensor) -> Evaluation:
        """The same for some of the samples: ``rows`` int64."""
        if len(rows) == self.batch:
            return self
        return self._map(len(rows), lambda v: v[rows.to(v.device)])

    def tiled(self, count: int) -> Evaluation:
        """The same for ``count`` copies of the batch, one after the other."""
        return self if count == 1 else self._map(count * self.batch, lambda v: torch.cat([v] * count))

    def at(self, x: Tensor, level: Level) -> Tensor:
        """D at states ``x`` [B, *sample] of one level of floats."""

        def check(raw: Tensor) -> None:
            self._check(raw, level)

        return self.denoiser.denoise(x, level, self.condition, guidance=self.guidance, known=self.known, check=check)

    def rows(self, x: Tensor, levels: Sequence[Level]) -> Tensor:
        """D at states ``x`` [R, *sample], row i on ``levels[i]``."""
        denoiser, shape = self.denoiser, (-1, *[1] * (x.ndim - 1))
        unique: dict[tuple[float, float], Any] = {}
        for level in levels:
            unique.setdefault((level.alpha, level.sigma), denoiser.scaling(level))
        scalings = [unique[level.alpha, level.sigma] for level in levels]

        def column(name: str) -> Tensor:
            values = torch.tensor([float(getattr(s, name)) for s in scalings], dtype=torch.float64)
            return values.reshape(shape).to(x.device)

        c_skip, c_out, c_in = (column(name) for name in ("c_skip", "c_out", "c_in"))
        net_in = (c_in.to(x.dtype) * x).to(denoiser.dtype or x.dtype)
        c_noise = denoiser.c_noise(column("c_noise"), net_in)
        outputs = denoiser.raw(net_in, c_noise, self.condition, self.guidance)
        for raw in outputs:
            self._check(raw, levels[0])
        denoised = c_skip.to(x.dtype) * x
        for w, raw in zip(self._weights(levels, shape, x), outputs, strict=True):
            denoised = denoised + (w * c_out).to(x.dtype) * raw.to(x.dtype)
        for transform in denoiser.transforms:
            denoised = transform(denoised)
        return denoised

    def _weights(self, levels: Sequence[Level], shape: tuple[int, ...], x: Tensor) -> list[Any]:
        if self.guidance is None:
            return [1.0]
        scale = torch.as_tensor(evaluate(GUIDANCE_SCALE, self.known), dtype=torch.float64)
        active = torch.tensor([self.guidance.active(level) for level in levels]).reshape(shape)
        w = torch.where(active, scale.cpu(), 1.0).to(x.device)  # elsewhere the conditional estimate alone
        return [1 - w, w]

    def _check(self, raw: Tensor, level: Level) -> None:
        if raw.device.type == "cpu" and not bool(torch.isfinite(raw).all()):
            raise NonFiniteError(f"network: returned NaN or Inf at sigma {float(level.rho):.6g}")


def start_state(
    denoiser: Denoiser, x: Tensor | None, seeds: Any, sigma: float, *, dtype: torch.dtype | None = None
) -> Tensor:
    """The state at the first level: ``x`` as it is, or ``sigma`` times the unit noise of ``seeds``."""
    if x is not None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x: must be a tensor, got {type(x).__name__}")
        if not x.dtype.is_floating_point:
            raise TypeError(f"x: must be floating point, got {x.dtype}")
        if x.ndim < 2 or x.numel() == 0:
            raise ValueError(f"x: must be [B, *sample] and not empty, got shape {list(x.shape)}")
        if denoiser.sample_shape is not None and tuple(x.shape[1:]) != tuple(denoiser.sample_shape):
            raise ValueError(
                f"x: {denoiser.name} has samples of shape {list(denoiser.sample_shape)}, got {list(x.shape[1:])}"
            )
        if not bool(torch.isfinite(x).all()):
            raise ValueError("x: must be finite")
        return x.detach().to(dtype or (torch.float64 if x.dtype == torch.float64 else torch.float32))
    if seeds is None or denoiser.sample_shape is None:
        raise ValueError("x: give the state at the first level, or seeds with a denoiser that knows its sample shape")
    device = denoiser.device or torch.device("cpu")
    return normal(check_seeds(seeds), 0, denoiser.sample_shape, dtype=dtype or torch.float32, device=device) * sigma
