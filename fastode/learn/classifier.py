"""Training of the small classifier that judges samples. It shares nothing with the denoiser but the data."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from fastode.files import write_json, write_tensors
from fastode.learn.data import Images
from fastode.nets.classifier import Classifier, ClassifierConfig


def train(
    data: Images,
    test: Images,
    out: Path,
    *,
    epochs: int = 4,
    seed: int = 0,
    batch: int = 128,
    flip: bool = False,
    card: dict[str, Any] | None = None,
) -> Path:
    """Train on ``data``, judge on ``test``; writes ``out``.safetensors and its card ``out``.json with the accuracy.

    Raises ``ValueError`` where either set has no labels, or they differ in shape.
    """
    for name, images in (("data", data), ("test", test)):
        if images.labels is None:
            raise ValueError(f"{name}: a classifier needs labels; give an .npz with 'labels' or class folders")
        if images.pixels.shape[1:] != data.pixels.shape[1:]:
            raise ValueError(
                f"{name}: images are {list(images.pixels.shape[1:])}, the training set's {list(data.pixels.shape[1:])}"
            )
    if epochs < 1 or len(data) < batch:
        raise ValueError(f"epochs: need at least 1 epoch of {batch} images, got {epochs} of {len(data)}")
    started = time.monotonic()
    torch.manual_seed(seed)
    config = ClassifierConfig(data.pixels.shape[1], data.pixels.shape[2], data.num_classes)
    model = Classifier(config)
    steps = epochs * (len(data) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    with tqdm(total=steps, desc="train classifier", mininterval=2) as bar:
        for _ in range(epochs):
            order = torch.randperm(len(data))
            for i in range(len(data) // batch):
                x, y = data.batch(order[i * batch : (i + 1) * batch])
                if flip and torch.rand(()) < 0.5:
                    x = x.flip(3)
                loss = functional.cross_entropy(model(shifted(x)), y)  # type: ignore[arg-type]
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    model.eval()
    weights = out.with_suffix(".safetensors")
    weights.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(weights, dict(model.state_dict()))
    made = {
        "config": config.to_dict(),
        "epochs": epochs,
        "seed": seed,
        "test_accuracy": accuracy(model, test),
        "seconds": round(time.monotonic() - started),
        "torch": torch.__version__,
        **(card or {}),
    }
    write_json(weights.with_suffix(".json"), made)
    return weights


def shifted(x: Tensor, reach: int = 2) -> Tensor:
    """A batch moved by up to ``reach`` pixels, the same way for all: cheap augmentation."""
    dy, dx = (int(v) for v in torch.randint(-reach, reach + 1, (2,)))
    return x.roll((dy, dx), dims=(2, 3))


@torch.no_grad()
def accuracy(model: Classifier, data: Images, batch: int = 500) -> float:
    """Share of ``data`` whose label the classifier reads."""
    right = 0
    for rows in torch.arange(len(data)).split(batch):
        x, y = data.batch(rows)
        right += int((model(x).argmax(1) == y).sum())
    return right / len(data)
