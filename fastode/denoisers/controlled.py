"""Denoisers under control: a classifier's gradient, an orthogonal mix of channels (arXiv:2011.13456, section 5)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastode.denoisers.base import Condition, Denoiser
from fastode.schedules.grid import Level

Classifier = Callable[[Tensor, Tensor], Tensor]


def classifier_guided(
    denoiser: Denoiser | Callable[..., Any],
    classifier: Classifier,
    *,
    scale: float = 1.0,
    num_classes: int | None = None,
) -> Denoiser:
    """An unconditional denoiser made conditional by a noise-conditional classifier: D + scale sigma^2 grad log p(y|x, sigma).

    ``classifier(x, sigma)`` gives logits [B, K] for states x = x_0 + sigma n, [B, *sample]; ``sigma`` has no dimension, or
    is [B, 1, ...]. The result takes ``class_labels``; each evaluation adds a pass through the classifier and its gradient.
    The score then is S + scale grad log p(y|x), in predictors and correctors alike; ``scale`` is 1 in score-SDE.
    """
    base = Denoiser.of(denoiser)
    if not callable(classifier):
        raise TypeError(f"classifier: must be callable, got {type(classifier).__name__}")
    if not math.isfinite(scale):
        raise ValueError(f"scale: must be finite, got {scale}")

    def network(x: Tensor, sigma: Any, class_labels: Tensor | None = None, **cond: Any) -> Tensor:
        noise = torch.as_tensor(sigma, device=x.device)
        d = base.denoise(x, Level(1.0, noise), Condition(None, cond))
        if class_labels is None:
            return d
        with torch.enable_grad():
            y = x.detach().requires_grad_()
            logits = classifier(y, noise)
            if logits.ndim != 2 or len(logits) != len(x):
                raise ValueError(f"classifier: must return logits [{len(x)}, K], got shape {list(logits.shape)}")
            chosen = logits.log_softmax(1).gather(1, class_labels.to(logits.device)[:, None]).sum()
            (gradient,) = torch.autograd.grad(chosen, y)
        return d + scale * noise.to(x.dtype) ** 2 * gradient

    return Denoiser(
        network,
        prediction="denoised",
        schedule=base.schedule,
        sigma_data=base.sigma_data,
        num_classes=num_classes,
        sample_shape=base.sample_shape,
        name=f"{base.name}, classifier-guided",
    )


def mixed(denoiser: Denoiser | Callable[..., Any], matrix: Tensor) -> Denoiser:
    """``denoiser`` in coordinates whose channels are mixed: u_j = sum_i x_i M_ij over dimension 1 of [B, C, ...].

    ``matrix``: orthogonal [C, C], so that noise stays white and D_u(u) = D(u M^T) M with the same preconditioning.
    """
    base = Denoiser.of(denoiser)
    m = torch.as_tensor(matrix, dtype=torch.float64)
    if m.ndim != 2 or m.shape[0] != m.shape[1] or not torch.allclose(m @ m.T, torch.eye(len(m)).double(), atol=1e-6):
        raise ValueError("matrix: must be orthogonal, [C, C]")
    if base.transforms:
        raise ValueError("denoiser: its transforms work on unmixed channels; put them into the network")

    def network(x: Tensor, c_noise: Tensor, **kwargs: Any) -> Tensor:
        raw = base.network(mix(x, m.T), c_noise, **kwargs)
        return mix(raw[0] if isinstance(raw, (tuple, list)) else raw, m)

    if base.dtype is not None:  # the wrapper has no parameters to read the network's dtype from

        def cast(x: Tensor, c_noise: Tensor, **kwargs: Any) -> Tensor:
            return network(x.to(base.dtype), c_noise, **kwargs)

        return replace(base, network=cast, name=f"{base.name}, mixed channels")
    return replace(base, network=network, name=f"{base.name}, mixed channels")


def mix(x: Tensor, matrix: Tensor) -> Tensor:
    """u_j = sum_i x_i M_ij over dimension 1."""
    return torch.einsum("bc...,cd->bd...", x, matrix.to(x))


def grey_matrix() -> Tensor:
    """Rows R, G, B; the first new channel is sqrt(3) times the mean of the colours, the other two are free. Float64 [3, 3]."""
    a, b, c = 1 / math.sqrt(3), 1 / math.sqrt(6), 1 / math.sqrt(2)
    return torch.tensor([[a, -2 * b, 0.0], [a, b, c], [a, b, -c]], dtype=torch.float64)
