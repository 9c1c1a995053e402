"""What samples are compared with: features and statistics of real images, from images, from a file, or from the box."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from fastode.evaluate.cache import folder
from fastode.evaluate.features import WEIGHTS, Extractor, batches
from fastode.evaluate.frechet import Statistics
from fastode.files import write_tensors
from fastode.learn.data import Images, load_images

KEPT = 10_000
"""Features that are kept for precision and recall; statistics are of all images."""


@dataclass(frozen=True, eq=False)
class Reference:
    """``statistics`` of all real images; ``features`` [M, F] of some of them, for manifolds, where they are known."""

    name: str
    statistics: Statistics
    features: Tensor | None
    digest: str

    def save(
        self, path: str | os.PathLike[str], *, count: int | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        """One safetensors file of statistics and (the first ``count``) features, for :func:`load_reference`."""
        s = self.statistics
        tensors = {"mean": s.mean, "covariance": s.covariance}
        if self.features is not None:
            tensors["features"] = self.features[:count].to(dtype)
        write_tensors(path, tensors, {"fastode": json.dumps({"format": "fastode-reference-1", "count": s.count})})


def load_reference(
    name: str, extract: Extractor, sample_shape: tuple[int, ...] | None = None, *, fit: bool = False
) -> Reference:
    """The reference by name.

    ``name``: "bundled" (the statistics that come with a bundled extractor), a .safetensors or .npz with statistics (``mu``
    and ``sigma``, as other FID tools write them), or images: an .npz with ``images`` or a folder of pictures.
    ``sample_shape``: the model's. Images of another size are an error, unless ``fit``: then smaller ones are padded and
    larger ones cropped to a square and shrunk, as for training. Features of images are kept in the cache.

    Raises ``FileNotFoundError`` or ``ValueError`` naming what is wrong.
    """
    if name == "bundled":
        path = WEIGHTS / "reference" / f"{extract.name}.safetensors"
        if not path.exists():
            raise ValueError(
                f"reference: none is bundled for features {extract.name!r}; give images, statistics or none"
            )
        return _read(path, f"bundled {extract.name}")
    path = Path(name)
    if not path.exists():
        raise FileNotFoundError(f"reference: {name} does not exist; give images, statistics, bundled or none")
    if path.suffix == ".safetensors":
        return _read(path, path.name)
    if path.suffix == ".npz" and _is_statistics(path):
        statistics = Statistics.load(path)
        return Reference(path.name, statistics, None, _digest(statistics.mean, statistics.covariance))
    resolution = sample_shape[-1] if fit and sample_shape is not None else None
    images = load_images(path, resolution=resolution)
    got = tuple(images.pixels.shape[1:])
    if sample_shape is not None and got != tuple(sample_shape):
        hint = "" if got[0] != sample_shape[0] else "; --fit pads or shrinks them to the model's resolution"
        raise ValueError(
            f"reference: images of {name} have shape {list(got)}, the model makes {list(sample_shape)}{hint}"
        )
    return of_images(images, extract, path.name)


def of_images(images: Images, extract: Extractor, name: str, *, cached: bool = True) -> Reference:
    """Features of ``images``, all of them for the statistics and the first of them kept; from the cache where they are
    known already."""
    digest = _digest(images.pixels) + extract.digest[:16]
    path = folder("features") / f"{digest[:40]}.safetensors"
    if cached and path.exists():
        return _read(path, name)
    parts = []
    for rows in tqdm(list(batches(len(images), 500)), desc=f"features of {name}", unit="batch", disable=None):
        parts.append(extract(images.batch(torch.arange(rows.start, rows.stop))[0]))
    features = torch.cat(parts)
    made = Reference(name, Statistics.of(features), features[:KEPT], "")
    path.parent.mkdir(parents=True, exist_ok=True)
    made.save(path)
    return _read(path, name)


def _read(path: Path, name: str) -> Reference:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {})["fastode"])
            keys = set(file.keys())
            mean, covariance = file.get_tensor("mean"), file.get_tensor("covariance")
            features = file.get_tensor("features").float() if "features" in keys else None
        statistics = Statistics(mean.double(), covariance.double(), header["count"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ValueError(f"reference: {path} holds no feature statistics ({error})") from error
    return Reference(name, statistics, features, _digest(mean, covariance))


def _is_statistics(path: Path) -> bool:
    import zipfile

    try:
        with zipfile.ZipFile(path) as file:
            return "mu.npy" in file.namelist()
    except (zipfile.BadZipFile, OSError):
        return False


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for t in tensors:
        digest.update(str(tuple(t.shape)).encode())
        digest.update(t.contiguous().numpy().tobytes())
    return digest.hexdigest()
