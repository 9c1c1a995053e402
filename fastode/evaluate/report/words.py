"""What each measure is called, which way is better, and what it means in a sentence or two."""

from __future__ import annotations

from typing import Any

METRICS: dict[str, dict[str, Any]] = {
    "rmse": {
        "name": "RMSE to converged",
        "better": "low",
        "text": "Root mean square difference between a sample and the converged solution of the same ODE from the same noise, "
        "in pixel values from -1 to 1: how well the solver does its own job, whatever the model is worth.",
    },
    "cosine": {
        "name": "cosine to converged",
        "better": "high",
        "text": "Mean cosine between a sample and the converged one from the same noise.",
    },
    "frechet": {
        "name": "Fréchet distance",
        "better": "low",
        "text": "Squared Fréchet distance between the features of samples and of real images (FID where the features are "
        "Inception's). It depends on the number of samples: a finite set of perfect samples does not get 0. It judges model "
        "and solver together, so a coarse solver can score better than the converged solution.",
    },
    "precision": {
        "name": "precision",
        "better": "high",
        "unit": "%",
        "text": "Share of samples within the manifold of real features, k = 3: are they realistic?",
    },
    "recall": {
        "name": "recall",
        "better": "high",
        "unit": "%",
        "text": "Share of real features within the manifold of the samples, k = 3: is everything covered?",
    },
    "density": {
        "name": "density",
        "better": "high",
        "text": "Mean number of real neighbourhoods (k = 5) that hold a sample, over k; above 1 where samples crowd.",
    },
    "coverage": {
        "name": "coverage",
        "better": "high",
        "unit": "%",
        "text": "Share of real neighbourhoods (k = 5) that hold at least one sample.",
    },
    "accuracy": {
        "name": "class read",
        "better": "high",
        "unit": "%",
        "text": "Share of samples in which an independent classifier reads the class that was asked for.",
    },
}


def shown(value: Any, key: str) -> str:
    """A figure for a table."""
    if value is None:
        return "-"
    return f"{100 * value:.1f}%" if METRICS.get(key, {}).get("unit") == "%" else f"{value:.3g}"
