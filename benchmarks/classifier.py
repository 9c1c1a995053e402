"""How the bundled classifier was made: the independent judge of digits. It shares nothing with the denoiser.

    fastode train classifier --data mnist_train.npz --test mnist_test.npz --resolution 32 --out mnist

writes ``mnist.safetensors`` and its card; with the files in ``fastode/evaluate/weights/`` they are what ``extractor("mnist")``
loads. Its last hidden layer, 128 numbers, is the feature space for Frechet distances between sets of digits.

    python -m benchmarks.classifier reference --train mnist_train.npz    statistics and some features of the real digits
    python -m benchmarks.classifier test --test mnist_test.npz           accuracy
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from fastode.evaluate.data import of_images
from fastode.evaluate.features import WEIGHTS, classifier, extractor
from fastode.learn.classifier import accuracy
from fastode.learn.data import load_images
from fastode.nets.classifier import Classifier

REFERENCE = WEIGHTS / "reference" / "mnist.safetensors"


def load() -> Classifier:
    """The trained classifier of this tree, in evaluation mode."""
    return classifier(WEIGHTS / "mnist.safetensors")[0]


@torch.no_grad()
def predict(model: Classifier, x: Tensor, batch: int = 500) -> Tensor:
    return torch.cat([model(part).argmax(1) for part in x.split(batch)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["reference", "test"])
    parser.add_argument("--train", help="mnist_train.npz")
    parser.add_argument("--test", help="mnist_test.npz")
    parser.add_argument("--count", type=int, default=2000, help="features to keep (default %(default)s)")
    a = parser.parse_args()
    if a.command == "test":
        test = load_images(a.test, resolution=32)
        print(f"test accuracy {accuracy(load(), test):.4f} on {len(test)} digits")
        return
    made = of_images(load_images(a.train, resolution=32), extractor("mnist"), "mnist", cached=False)
    REFERENCE.parent.mkdir(parents=True, exist_ok=True)
    made.save(REFERENCE, count=a.count, dtype=torch.float16)
    print(f"{REFERENCE}: statistics of {made.statistics.count} digits, {a.count} features")


if __name__ == "__main__":
    main()
