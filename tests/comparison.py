"""A finished file of results without any sampling: made-up figures that behave like real ones, for tests of the report."""

from __future__ import annotations

import base64
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

SOLVERS = {
    "unipc": (0.35, 1.7),
    "dpm_solver_pp": (0.4, 1.6),
    "ipndm_v": (0.33, 1.5),
    "deis": (0.42, 1.5),
    "ddim": (0.5, 1.0),
}
"""Error at 3 evaluations, and how fast it falls."""
NFES = (3, 4, 5, 6)


def picture(seed: int, noise: float) -> str:
    """Ten digits in a row, with noise on them."""
    image = Image.new("L", (320, 32))
    draw = ImageDraw.Draw(image)
    for i in range(10):
        draw.ellipse((32 * i + 9, 6, 32 * i + 22, 26), outline=255, width=3)
        if i % 2:
            draw.line((32 * i + 16, 4, 32 * i + 16, 28), fill=255, width=3)
    pixels = np.asarray(image) + np.random.default_rng(seed).normal(0, 255 * noise, (32, 320))
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def records() -> list[dict[str, Any]]:
    lam = np.linspace(math.log(80), math.log(0.002), 25)
    path = [[float(30 * s), float(4 * s / (1 + s * s))] for s in np.exp(lam)]
    found: list[dict[str, Any]] = [
        {
            "kind": "header",
            "format": "fastode-compare-1",
            "model": {"name": "mnist </script>", "prediction": "edm", "weights": "0123456789abcdef", "guidance_scale": None},
            "settings": {
                "samples": 1000, "blocks": 8, "first_seed": 0, "screen": 48, "dtype": "bfloat16", "guidance_scale": None,
                "features": {"name": "mnist"}, "reference": {"name": "bundled mnist", "count": 60000},
            },
            "machine": {"cpu": "a processor", "threads": 2, "torch": "2.13", "fastode": "0.1"},
        },
        {
            "kind": "solution", "steps": 32, "change": 0.0018, "bound": 0.005, "pictures": 10, "frechet_floor": 1.1,
            "variance": [0.99997, 2.8e-5, 1.1e-6, 1.6e-7], "paths": [path, path[::-1][::-1]], "sigmas": np.exp(lam).tolist(),
        },
        {
            "kind": "case", "case": "converged", "label": "converged", "nfe": 32, "frechet": 4.2, "precision": 0.93,
            "accuracy": 0.941, "picture": picture(0, 0.0),
        },
    ]  # fmt: skip
    for j, (label, (start, order)) in enumerate(SOLVERS.items()):
        for n in NFES:
            error = start * (3 / n) ** order
            sigmas = np.exp(np.linspace(math.log(80), math.log(0.002), n + 1)).tolist()
            found.append(
                {
                    "kind": "case", "case": f"{label}@{n}", "label": label, "solver": label, "nfe": n, "count": 1000,
                    "options": {"afs": True} if label == "deis" and n == 3 else {},
                    "grid": "karras rho=7" if j % 2 else "time_uniform power=1", "sigmas": sigmas, "stochastic": False,
                    "rmse": error, "rmse_se": error * 0.03, "cosine": 1 - error**2, "cosine_se": 0.001,
                    "frechet": 4 + 30 * error, "frechet_se": 0.4, "precision": 0.95 - error / 3, "precision_se": 0.01,
                    "recall": 0.9 - error / 2, "recall_se": 0.01, "density": 1.2 - error, "density_se": 0.02,
                    "coverage": 0.9 - error / 2, "coverage_se": 0.01, "accuracy": 0.96 - error / 4, "accuracy_se": 0.006,
                    "seconds_per_image": 0.0015 * n * (1 + 0.02 * j), "state_bytes": 12288 + 4096 * j, "peak_bytes": 10**8,
                    "truncation": [error * 0.5 * s / (1 + s) for s in sigmas[1:]],
                    "trajectories": [[[30 * s, 4 * s / (1 + s * s) * (1 + error)] for s in sigmas]] * 2,
                    "picture": picture(n, error),
                }
            )  # fmt: skip
    return found


def write(path: Path) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records()))
    return path
