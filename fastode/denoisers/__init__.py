"""Denoisers: what a network's output means, guidance, nonlinear wrappers, and distributions with known flows."""

from fastode.denoisers.analytic import Empirical, Gaussian, GaussianMixture
from fastode.denoisers.base import Condition, Denoiser
from fastode.denoisers.controlled import classifier_guided, mixed
from fastode.denoisers.guidance import Guidance
from fastode.denoisers.nonlinear import Clip, DynamicThreshold, clipped, thresholded

__all__ = [
    "Clip",
    "Condition",
    "Denoiser",
    "DynamicThreshold",
    "Empirical",
    "Gaussian",
    "GaussianMixture",
    "Guidance",
    "classifier_guided",
    "clipped",
    "mixed",
    "thresholded",
]
