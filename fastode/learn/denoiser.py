"""Train an EDM denoiser (Karras et al. 2022, arXiv:2206.00364) on images: ``fastode train denoiser``.

The loss of equation 8 with the paper's settings: for an image y, ln sigma ~ N(P_mean, P_std^2) and n ~ N(0, sigma^2 I),

    L = E[ lambda(sigma) |D(y + n; sigma) - y|^2 ],     lambda = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 .

Weights are averaged with the power function of Karras et al. 2023 (arXiv:2312.02696): after step k the average keeps a
fraction (1 - 1/k)^(gamma + 1) of itself, so its length is a fixed share of the run, and a run may be stopped and
sampled from at any time. The learning rate falls as 1/sqrt(k) after ``lr_reference`` steps for the same reason; the last
``cooldown`` steps of a run of known length also take it linearly to zero.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from fastode.denoisers.precondition import edm_scalings
from fastode.files import whole, write_json, write_tensors
from fastode.learn.data import Images
from fastode.nets.unet import UNet, UNetConfig, build, parameter_count


@dataclass(frozen=True)
class TrainSettings:
    """Hyper-parameters of one run. ``images`` counts training images seen; ``minutes`` also ends the run, if sooner."""

    images: int = 1_000_000
    minutes: float = math.inf
    batch: int = 64
    lr: float = 1e-3
    lr_reference: int = 3000
    warmup: int = 200
    cooldown: int = 0
    label_dropout: float = 0.1
    ema_gamma: float = 6.94
    p_mean: float = -1.2
    p_std: float = 1.2
    sigma_data: float = 0.5
    flip: bool = False
    bf16: bool = True
    clip: float = 1.0
    seed: int = 0
    checkpoint_minutes: float = 2.0

    def __post_init__(self) -> None:
        for name in ("images", "batch", "lr_reference"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.label_dropout < 1:
            raise ValueError(f"label_dropout: must be in [0, 1), got {self.label_dropout}")


def loss(
    network: nn.Module, y: Tensor, labels: Tensor | None, settings: TrainSettings, draws: torch.Generator
) -> Tensor:
    """Mean over the batch and pixels of lambda(sigma) |D - y|^2. ``y``: [B, C, H, W] in [-1, 1]."""
    sigma = (torch.randn(y.shape[0], 1, 1, 1, generator=draws) * settings.p_std + settings.p_mean).exp().to(y)
    noise = torch.randn(y.shape, generator=draws).to(y)
    c_skip, c_out, c_in, c_noise = edm_scalings(sigma, settings.sigma_data)
    x = y + sigma * noise
    # lambda c_out^2 = 1: the weighted error of D is the plain error of F against the target it should give.
    with torch.autocast(y.device.type, dtype=torch.bfloat16, enabled=settings.bf16):
        raw = network(c_in * x, c_noise.flatten(), labels)
    return (raw.to(y) - (y - c_skip * x) / c_out).square().mean()


def drop_labels(labels: Tensor, none: int, share: float, draws: torch.Generator) -> Tensor:
    """Replace a ``share`` of [B] labels by ``none``, the "no class" label that guidance needs."""
    return torch.where(torch.rand(labels.shape, generator=draws).to(labels.device) < share, none, labels)


class Run:
    """One training run: network, average, optimiser, random state; saved and restored as safetensors plus JSON."""

    def __init__(self, config: UNetConfig, settings: TrainSettings, device: torch.device) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.device = settings, device
        self.network: UNet = build(config).to(device)
        self.average: UNet = build(config).to(device).eval()
        self.average.load_state_dict(self.network.state_dict())
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=settings.lr, betas=(0.9, 0.99), eps=1e-8)
        self.draws = torch.Generator().manual_seed(settings.seed)
        self.step = 0
        self.seconds = 0.0
        self.curve: list[tuple[int, float]] = []
        self.window: list[float] = []

    def record(self, value: float | None = None) -> None:
        """Add a loss to the curve, whose points are means of 100 steps; without ``value``, of what there is so far."""
        if value is not None:
            self.window.append(value)
        if len(self.window) == 100 or (value is None and self.window):
            self.curve.append((self.step, sum(self.window) / len(self.window)))
            self.window.clear()

    def train_step(self, y: Tensor, labels: Tensor | None) -> float:
        s = self.settings
        if labels is not None and self.network.config.num_classes:
            labels = drop_labels(labels, self.network.config.num_classes, s.label_dropout, self.draws)
        else:
            labels = None
        if s.flip:
            flips = torch.rand(y.shape[0], 1, 1, 1, generator=self.draws).to(y.device) < 0.5
            y = torch.where(flips, y.flip(3), y)
        self.step += 1
        rate = s.lr * min(self.step / max(s.warmup, 1), 1.0) / math.sqrt(max(self.step / s.lr_reference, 1.0))
        if s.cooldown:
            rate *= min(1.0, max(math.ceil(s.images / s.batch) - self.step + 1, 0) / s.cooldown)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        value = loss(self.network, y, labels, s, self.draws)
        self.optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), s.clip)
        self.optimizer.step()
        self._update_average()
        return float(value.detach())

    @torch.no_grad()
    def _update_average(self) -> None:
        keep = (1 - 1 / self.step) ** (self.settings.ema_gamma + 1)
        average: list[Tensor] = list(self.average.parameters())
        current: list[Tensor] = list(self.network.parameters())
        torch._foreach_lerp_(average, current, 1 - keep)

    def save(self, folder: Path) -> None:
        """Write ``checkpoint.safetensors`` and ``.json``; each appears whole or not at all."""
        self.record()
        tensors = {f"network.{k}": v for k, v in self.network.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{k}": v for k, v in state.items()}
        tensors["draws"] = self.draws.get_state()
        tensors["clock"] = torch.tensor([self.step, self.seconds], dtype=torch.float64)
        if self.curve:
            tensors["curve"] = torch.tensor(self.curve, dtype=torch.float64)
        card = {"config": self.network.config.to_dict(), "settings": asdict(self.settings)}
        write_json(folder / "checkpoint.json", card)
        write_tensors(folder / "checkpoint.safetensors", tensors)

    @classmethod
    def resume(cls, folder: Path, config: UNetConfig, settings: TrainSettings, device: torch.device) -> Run:
        """Continue the run in ``folder``. Its length and cooldown may change; anything else that differs is an error."""
        try:
            card = json.loads((folder / "checkpoint.json").read_text())
            stored, network = TrainSettings(**card["settings"]), UNetConfig(**card["config"])
            tensors = load_file(folder / "checkpoint.safetensors")
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"checkpoint: {folder} cannot be resumed ({error}); start over with resume=False"
            ) from error
        if network != config:
            raise ValueError(f"config: {folder} was started with {network}, got {config}")
        free = {name: getattr(settings, name) for name in ("images", "minutes", "cooldown", "checkpoint_minutes")}
        if replace(stored, **free) != settings:
            raise ValueError(
                f"settings: {folder} was started with {stored}; only {', '.join(free)} may change on resume"
            )
        run = cls(config, settings, device)
        for prefix, module in (("network.", run.network), ("average.", run.average)):
            module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("adam."):
                _, index, name = key.split(".", 2)
                state.setdefault(int(index), {})[name] = value
        if state:
            run.optimizer.load_state_dict({**run.optimizer.state_dict(), "state": state})
        run.draws.set_state(tensors["draws"])
        run.step, run.seconds = int(tensors["clock"][0]), float(tensors["clock"][1])
        run.curve = [(int(k), float(v)) for k, v in tensors["curve"].tolist()] if "curve" in tensors else []
        return run


def train(
    images: Images,
    out: str | Path,
    *,
    config: UNetConfig,
    settings: TrainSettings | None = None,
    device: str | torch.device = "cpu",
    resume: bool = True,
    progress: bool = True,
    card: dict[str, Any] | None = None,
) -> Path:
    """Train and write ``out``/weights.safetensors, its card ``weights.json`` and ``loss.png``; returns the weights' path.

    A run killed at any moment continues from the last checkpoint in ``out`` when called again (``resume=True``) and then
    makes the same draws it would have made. ``resume=False`` starts over and forgets the run that is there.
    """
    settings = settings or TrainSettings()
    folder, target = Path(out), torch.device(device)
    if images.pixels.shape[1:] != (config.in_channels, config.resolution, config.resolution):
        raise ValueError(
            f"config: a network for [{config.in_channels}, {config.resolution}, {config.resolution}] cannot learn images "
            f"of {list(images.pixels.shape[1:])}"
        )
    if config.num_classes and images.num_classes != config.num_classes:
        raise ValueError(
            f"config: num_classes = {config.num_classes}, but the images have {images.num_classes or 'none'}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint.safetensors"
    if not resume:
        checkpoint.unlink(missing_ok=True)
    run = Run.resume(folder, config, settings, target) if checkpoint.exists() else Run(config, settings, target)

    total = math.ceil(settings.images / settings.batch)
    started, saved, shown = time.monotonic(), time.monotonic(), 0.0
    with tqdm(total=total, initial=run.step, unit="step", disable=not progress, desc="train denoiser") as bar:
        while run.step < total and run.seconds < settings.minutes * 60:
            index = torch.randint(len(images), (settings.batch,), generator=run.draws)
            y, labels = images.batch(index)
            value = run.train_step(y.to(target), None if labels is None else labels.to(target))
            if not math.isfinite(value):
                raise FloatingPointError(f"loss: {value} at step {run.step}; the last good state is in {folder}")
            run.record(value)
            bar.update()
            now = time.monotonic()
            run.seconds += now - started
            started = now
            if now - shown > 1:
                shown = now
                bar.set_postfix(loss=f"{run.curve[-1][1] if run.curve else value:.4f}", refresh=False)
            if now - saved > settings.checkpoint_minutes * 60:
                saved = now
                run.save(folder)
                export(run, folder, card)
    run.save(folder)
    return export(run, folder, card)


def export(run: Run, folder: Path, card: dict[str, Any] | None = None) -> Path:
    """Write the averaged weights, their JSON card and the loss curve into ``folder``."""
    weights = folder / "weights.safetensors"
    write_tensors(weights, dict(run.average.state_dict()))
    last = run.curve[-1][1] if run.curve else None
    write_json(
        folder / "weights.json",
        {
            "format": "fastode-denoiser-1",
            "network": "unet",
            "config": run.network.config.to_dict(),
            "prediction": "edm",
            "sigma_data": run.settings.sigma_data,
            "sigma_min": 0.002,
            "sigma_max": 80.0,
            "parameters": parameter_count(run.average),
            "steps": run.step,
            "images_seen": run.step * run.settings.batch,
            "seconds": round(run.seconds, 1),
            "loss": last,
            "settings": asdict(run.settings)
            | {"minutes": None if math.isinf(run.settings.minutes) else run.settings.minutes},
            "torch": torch.__version__,
            **(card or {}),
        },
    )
    plot_curve(run.curve, folder / "loss.png")
    return weights


def plot_curve(curve: list[tuple[int, float]], path: Path) -> None:
    """Loss against step as a PNG; skipped when matplotlib (extra ``[plot]``) is absent or there is nothing to draw."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    if not curve:
        return
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([k for k, _ in curve], [v for _, v in curve], linewidth=1)
    axes.set(xlabel="step", ylabel="EDM loss (mean of 100 steps)", yscale="log")
    axes.grid(alpha=0.3, which="both")
    with whole(path) as part:
        figure.savefig(part, format="png", dpi=120)
