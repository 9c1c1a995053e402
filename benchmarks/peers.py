"""Schedulers of diffusers as the pipelines run them, and the grids on which ours does the same.

diffusers is optional (``pip install 'fastode[diffusers]'``). k-diffusion imports torchvision, which has no build for
every torch, so it is used only where it can be imported.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.registry import Case
from fastode import Grid
from fastode.schedules import Discrete


def module(name: str) -> ModuleType | None:
    """``name`` imported, or None with a message on stderr."""
    try:
        found = importlib.import_module(name)
    except Exception as error:  # a peer may fail to import in its own ways
        print(f"{name} is left out: {type(error).__name__}: {error}", file=sys.stderr)
        return None
    if name == "diffusers":
        found.utils.logging.set_verbosity_error()
    return found


class Scheduler:
    """A scheduler and the loop around it. ``reset`` is for before every run and is not timed."""

    def __init__(self, diffusers: ModuleType, case: Case, evaluations: int, device: torch.device | str = "cpu") -> None:
        assert case.scheduler is not None
        self.evaluations, self.device = evaluations, device
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.scheduler = getattr(diffusers, case.scheduler)(**case.config)
        # Schedulers with two calls per step list 2 n - 1 labels.
        self.steps = (evaluations + 1) // 2 if case.scheduler.startswith(("Heun", "KDPM2")) else evaluations
        self.reset()

    def reset(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.scheduler.set_timesteps(self.steps, device=self.device)

    def run(self, network: Callable[[Tensor, Any], Tensor], x: Tensor) -> Tensor:
        """The loop of the pipelines."""
        s = self.scheduler
        for t in s.timesteps:
            x = s.step(network(s.scale_model_input(x, t), t), t, x, return_dict=False)[0]
        return x

    def grid(self, every: int = 1) -> Grid:
        s, name = self.scheduler, type(self.scheduler).__name__
        if name.startswith(("DDIM", "PNDM")):
            bar = torch.cat([s.alphas_cumprod[s.timesteps.cpu().unique().flip(0)], s.final_alpha_cumprod.reshape(1)])
            bar = torch.unique_consecutive(bar.double())
            return Grid(sigma=(1 - bar).sqrt(), alpha=bar.sqrt(), schedule=Discrete(tuple(s.alphas_cumprod.tolist())))
        sigmas = torch.unique_consecutive(s.sigmas.double().cpu())  # Heun and KDPM2 list a level per call
        if every > 1:
            sigmas = sigmas[sorted({*range(0, len(sigmas) - 1, every), len(sigmas) - 1})]
        exploding = name.startswith(("Euler", "Heun", "KDPM2", "LMS", "EDM"))
        alpha = torch.ones_like(sigmas) if exploding else torch.rsqrt(1 + sigmas**2)
        return Grid(sigma=alpha * sigmas, alpha=alpha)
