"""The networks that choose AMED's evaluation points: about 9,000 parameters, or three numbers per step.

A predictor answers two questions about step ``i`` from noise level t to t' (EDM frame): ``look(i, t, t')`` is a function of
the denoiser's bottleneck feature, or None if it needs none, and ``numbers(i, t, t')`` are the numbers without a feature.
``heads`` names what it gives, in order: "r", then "scale_dir" and "scale_time" where they are trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastode.program.bind import PooledMLP


class Heads:
    """Ranges of the numbers: r in (0, 1), scale_dir in 1 -+ ``scale_dir``, scale_time in 1 -+ ``scale_time``; a range of 0
    leaves the head out."""

    def __init__(self, scale_dir: float, scale_time: float) -> None:
        for name, value in (("scale_dir", scale_dir), ("scale_time", scale_time)):
            if not 0 <= value < 1:
                raise ValueError(f"{name}: must be in [0, 1), got {value}")
        ranges = {"scale_dir": scale_dir, "scale_time": scale_time}
        self.names = ("r", *(name for name, value in ranges.items() if value))
        self.low = torch.tensor([0.0, *(1 - value for value in ranges.values() if value)])
        self.high = torch.tensor([1.0, *(1 + value for value in ranges.values() if value)])


class AMEDPredictor(nn.Module):
    """AMED's predictor (arXiv:2312.00094, section 3.3; 8,929 parameters, 21 more per scale head at the defaults).

    The bottleneck feature [B, C, h, w] is averaged over channels and flattened to ``inputs`` = h w numbers, then two linear
    layers with a SiLU between them give 4 numbers; t and t' are embedded by sines and cosines of ``noise_channels`` / 2
    frequencies 10000^(-k/3) and a shared linear layer with SiLU; a linear head and a sigmoid give each number.
    """

    def __init__(
        self,
        inputs: int = 64,
        *,
        hidden: int = 128,
        width: int = 4,
        noise_channels: int = 8,
        scale_dir: float = 0.01,
        scale_time: float = 0.0,
    ) -> None:
        super().__init__()
        if inputs < 1:
            raise ValueError(f"inputs: must be at least 1, got {inputs}")
        self.noise_channels = noise_channels
        self.ranges = Heads(scale_dir, scale_time)
        self.heads = self.ranges.names
        self.register_buffer("scale_dir", torch.tensor(float(scale_dir)))
        self.register_buffer("scale_time", torch.tensor(float(scale_time)))
        self.hidden = nn.Linear(inputs, hidden)
        self.feature = nn.Linear(hidden, width)
        self.noise = nn.Linear(noise_channels, noise_channels)
        self.head = nn.Linear(width + 2 * noise_channels, len(self.heads))
        for layer in (self.hidden, self.feature, self.head):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        nn.init.xavier_uniform_(self.noise.weight)
        for layer in (self.hidden, self.feature, self.noise, self.head):
            nn.init.zeros_(layer.bias)

    def look(self, step: int, t: float, t_next: float) -> PooledMLP:
        """What is left to compute in the run, with both noise levels folded into the offset."""
        levels = torch.cat([self._embed(t), self._embed(t_next)])
        width = self.feature.out_features
        device = self.head.weight.device
        return PooledMLP(
            self.hidden.weight,
            self.hidden.bias,
            self.feature.weight,
            self.feature.bias,
            self.head.weight[:, :width],
            self.head.weight[:, width:] @ levels + self.head.bias,
            self.ranges.low.to(device),
            self.ranges.high.to(device),
        )

    def numbers(self, step: int, t: float, t_next: float) -> tuple[Tensor, ...]:
        """With a zero feature, as on the analytical first step: one float64 number per head."""
        empty = self.hidden.weight.new_zeros(1, 1, self.hidden.in_features, 1)
        return tuple(number.double().reshape(()) for number in self.look(step, t, t_next)(empty))

    def _embed(self, level: float) -> Tensor:
        half = self.noise_channels // 2
        k = torch.arange(half, device=self.noise.weight.device, dtype=torch.float64)
        angle = float(level) * torch.exp(-math.log(10000.0) * k / (half - 1))
        values = torch.cat([angle.sin(), angle.cos()]).to(self.noise.weight.dtype)
        return nn.functional.silu(self.noise(values))


class StepTable(nn.Module):
    """Numbers that depend on the step alone: the predictor for networks without a feature to look at, and the frozen table.

    ``steps`` rows of free numbers z; every number is low + (high - low) / (1 + exp(-z)) in float64.
    """

    def __init__(self, steps: int, *, scale_dir: float = 0.01, scale_time: float = 0.0) -> None:
        super().__init__()
        if steps < 1:
            raise ValueError(f"steps: must be at least 1, got {steps}")
        self.ranges = Heads(scale_dir, scale_time)
        self.heads = self.ranges.names
        self.register_buffer("scale_dir", torch.tensor(float(scale_dir)))
        self.register_buffer("scale_time", torch.tensor(float(scale_time)))
        self.free = nn.Parameter(torch.zeros(steps, len(self.heads), dtype=torch.float64))

    def look(self, step: int, t: float, t_next: float) -> None:
        return None

    def numbers(self, step: int, t: float, t_next: float) -> tuple[Tensor, ...]:
        if not 0 <= step < len(self.free):
            raise ValueError(f"predictor: it was learned for {len(self.free)} steps, this is step {step + 1}")
        low, high = self.ranges.low.double(), self.ranges.high.double()
        return tuple((low + (high - low) * torch.sigmoid(self.free[step].cpu())).unbind(0))


Predictor = AMEDPredictor | StepTable


def to_numbers(predictor: Predictor) -> dict[str, Tensor]:
    """The tensors of an artifact."""
    return {name: value.detach().cpu().clone() for name, value in predictor.state_dict().items()}


def from_numbers(numbers: Mapping[str, Tensor]) -> Predictor:
    """The predictor of an artifact's tensors. Raises ``ValueError`` if they are not those of one."""
    try:
        # float32 stores 0.01 as 0.0099999998: what was trained with is what is stored
        scales: dict[str, Any] = {name: float(numbers[name]) for name in ("scale_dir", "scale_time")}
        made: Predictor
        if "free" in numbers:
            made = StepTable(len(numbers["free"]), **scales)
        else:
            hidden, inputs = numbers["hidden.weight"].shape
            width, channels = numbers["feature.weight"].shape[0], numbers["noise.weight"].shape[0]
            made = AMEDPredictor(inputs, hidden=hidden, width=width, noise_channels=channels, **scales)
        made.load_state_dict(dict(numbers))
    except (KeyError, ValueError, RuntimeError) as error:
        raise ValueError(f"predictor: these are not the numbers of one ({' '.join(str(error).split())})") from error
    return made.eval().requires_grad_(False)
