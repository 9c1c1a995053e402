"""Training that can be stopped at any moment: the state of a run in a folder, as safetensors and JSON, and its curves."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fastode.files import whole, write_json, write_tensors

ROWS = ("loss", "mean", "spread")


@dataclass
class Curves:
    """One row per batch: the loss of each step, and mean and spread of each of the learned numbers ``names``."""

    names: list[str] = field(default_factory=list)
    loss: list[list[float]] = field(default_factory=list)
    mean: list[list[float]] = field(default_factory=list)
    spread: list[list[float]] = field(default_factory=list)


class Checkpoint:
    """``folder``/checkpoint.safetensors and .json: parameters, optimiser and curves of a run with these ``settings``.

    Raises ``ValueError`` where the folder holds a run with other settings.
    """

    def __init__(self, folder: str | os.PathLike[str], settings: dict[str, Any]) -> None:
        self.folder, self.settings = Path(folder), json.loads(json.dumps(settings, default=str))
        self._saved = time.monotonic()

    def resume(self, module: nn.Module, optimizer: torch.optim.Optimizer, curves: Curves) -> int:
        """Load what is there into the arguments; the batches done, 0 if there is nothing."""
        card, tensors = self.folder / "checkpoint.json", self.folder / "checkpoint.safetensors"
        if not tensors.exists():
            return 0
        try:
            settings, kept = json.loads(card.read_text())["settings"], load_file(tensors)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"folder: {self.folder} cannot be resumed ({error})") from error
        changed = sorted(k for k in {*settings, *self.settings} if settings.get(k) != self.settings.get(k))
        if changed:
            k = changed[0]
            raise ValueError(
                f"folder: {self.folder} holds a run with {k} = {settings.get(k)}, this one has {self.settings.get(k)}; "
                "give another folder"
            )
        module.load_state_dict({k.removeprefix("module."): v for k, v in kept.items() if k.startswith("module.")})
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in kept.items():
            if key.startswith("adam."):
                _, index, name = key.split(".", 2)
                state.setdefault(int(index), {})[name] = value
        if state:
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        for name in ROWS:
            if f"curve.{name}" in kept:
                getattr(curves, name)[:] = kept[f"curve.{name}"].tolist()
        return int(kept["done"])

    def save(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, curves: Curves, done: int, *, every: float = 0.0
    ) -> None:
        """Write the run and ``curves.png``; not if the last time is less than ``every`` seconds ago."""
        if time.monotonic() - self._saved < every:
            return
        self._saved = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"module.{k}": v for k, v in module.state_dict().items()}
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{k}": v for k, v in state.items()}
        tensors |= {
            f"curve.{k}": torch.tensor(getattr(curves, k), dtype=torch.float64) for k in ROWS if getattr(curves, k)
        }
        tensors["done"] = torch.tensor(done)
        write_json(self.folder / "checkpoint.json", {"settings": self.settings})
        write_tensors(self.folder / "checkpoint.safetensors", tensors)
        plot(self.folder / "curves.png", curves)


def plot(path: Path, curves: Curves) -> None:
    """Losses and learned numbers against batches, as a PNG; skipped without matplotlib (extra ``[plot]``)."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    loss = curves.loss
    if not loss:
        return
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(loss, linewidth=1, label=[f"step {i + 1}" for i in range(len(loss[0]))] if len(loss[0]) > 1 else None)
    left.set(xlabel="batch", ylabel="loss", yscale="log")
    if len(loss[0]) > 1:
        left.legend(fontsize="small")
    right.plot(curves.mean, linewidth=1, label=curves.names)
    right.legend(fontsize="x-small", ncols=2)
    right.set(xlabel="batch", ylabel="learned numbers, mean")
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both")
    with whole(path) as part:
        figure.savefig(part, format="png", dpi=120)
