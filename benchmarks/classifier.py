"""The independent judge: a small convolutional network that reads digits. It shares nothing with the denoiser.

    python -m benchmarks.classifier train --train mnist_train.npz --test mnist_test.npz
    python -m benchmarks.classifier test --test mnist_test.npz

The first command writes ``benchmarks/classifier.safetensors`` and ``classifier.json`` (accuracy, settings). Its last hidden
layer, 128 numbers, is the feature space for Frechet distances between sets of digits.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from fastode.files import write_json, write_tensors
from fastode.learn.data import Images, load_images

WEIGHTS = Path(__file__).with_name("classifier.safetensors")


class Classifier(nn.Module):
    """[B, 1, 32, 32] in [-1, 1] to logits [B, 10]; ``features`` gives the last hidden layer, [B, 128]."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 16, 32, 64)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm2d(c) for c in widths[1:])
        self.hidden = nn.Linear(64 * 4 * 4, 128)
        self.output = nn.Linear(128, 10)

    def features(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = functional.max_pool2d(functional.relu(norm(conv(x))), 2)
        return functional.relu(self.hidden(x.flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.output(functional.dropout(self.features(x), 0.3, self.training))


def shifted(x: Tensor, reach: int = 2) -> Tensor:
    """A batch moved by up to ``reach`` pixels, the same way for all: cheap augmentation."""
    dy, dx = (int(v) for v in torch.randint(-reach, reach + 1, (2,)))
    return x.roll((dy, dx), dims=(2, 3))


def train(data: Images, test: Images, epochs: int, seed: int) -> tuple[Classifier, float]:
    torch.manual_seed(seed)
    model = Classifier()
    batch = 128
    steps = epochs * (len(data) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    with tqdm(total=steps, desc="train classifier", mininterval=2) as bar:
        for _ in range(epochs):
            order = torch.randperm(len(data))
            for i in range(len(data) // batch):
                x, y = data.batch(order[i * batch : (i + 1) * batch])
                loss = functional.cross_entropy(model(shifted(x)), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    return model.eval(), accuracy(model.eval(), test)


@torch.no_grad()
def predict(model: Classifier, x: Tensor, batch: int = 500) -> Tensor:
    return torch.cat([model(part).argmax(1) for part in x.split(batch)])


def accuracy(model: Classifier, data: Images) -> float:
    x, y = data.batch(torch.arange(len(data)))
    return float((predict(model, x) == y).double().mean())


def load() -> Classifier:
    """The trained classifier of this tree, in evaluation mode."""
    model = Classifier()
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["train", "test"])
    parser.add_argument("--train", help="mnist_train.npz")
    parser.add_argument("--test", required=True, help="mnist_test.npz")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    test = load_images(a.test, resolution=32)
    if a.command == "test":
        print(f"test accuracy {accuracy(load(), test):.4f} on {len(test)} digits")
        return
    started = time.monotonic()
    data = load_images(a.train, resolution=32)
    model, score = train(data, test, a.epochs, a.seed)
    write_tensors(WEIGHTS, dict(model.state_dict()))
    card = {
        "data": f"{Path(a.train).name}, {len(data)} digits padded to 32 x 32",
        "epochs": a.epochs,
        "seed": a.seed,
        "test_accuracy": score,
        "seconds": round(time.monotonic() - started),
        "torch": torch.__version__,
    }
    write_json(WEIGHTS.with_suffix(".json"), card)
    print(json.dumps(card, indent=2))


if __name__ == "__main__":
    main()
