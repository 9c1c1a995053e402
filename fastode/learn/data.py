"""Images for training: an ``.npz`` file, a folder of pictures, or a folder of class folders. Held in memory as uint8."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image
from torch import Tensor

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


@dataclass(frozen=True)
class Images:
    """``pixels``: [N, C, H, W] uint8; ``labels``: [N] int64 or None; ``classes``: names in label order."""

    pixels: Tensor
    labels: Tensor | None
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def num_classes(self) -> int:
        return 0 if self.labels is None else max(len(self.classes), int(self.labels.max()) + 1)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """Pixels in [-1, 1], float32 [B, C, H, W], and labels [B] for rows ``index``."""
        x = self.pixels[index].to(torch.float32).div_(127.5).sub_(1.0)
        return x, None if self.labels is None else self.labels[index]


def load_images(path: str | Path, *, resolution: int | None = None) -> Images:
    """Read ``path`` and bring every image to ``resolution`` x ``resolution``.

    A smaller image is padded with zeros on all sides (28 x 28 digits become 32 x 32 without blurring); a larger one is
    centre-cropped to a square and resized with an area filter.

    Raises ``FileNotFoundError`` or ``ValueError`` naming the path and what would be accepted.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"data: {path} does not exist; give an .npz with 'images' or a folder of pictures")
    arrays, labels, classes = _read_npz(path) if path.suffix == ".npz" else _read_folder(path, resolution)
    if resolution is not None:
        arrays = _fit(arrays, resolution)
    if arrays.shape[2] != arrays.shape[3]:
        raise ValueError(f"data: images of {path} are {arrays.shape[2]} x {arrays.shape[3]}; give resolution=...")
    return Images(
        pixels=torch.from_numpy(arrays),
        labels=None if labels is None else torch.from_numpy(labels.astype(np.int64)),
        classes=classes,
    )


def _read_npz(path: Path) -> tuple[np.ndarray, np.ndarray | None, tuple[str, ...]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            found = sorted(file)
            images, labels = (file[name] if name in found else None for name in ("images", "labels"))
    except (ValueError, TypeError, OSError, EOFError, BadZipFile) as error:
        raise ValueError(f"data: {path} is damaged or not an .npz ({error})") from error
    if images is None:
        raise ValueError(f"data: {path} has no array 'images' (found {found})")
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise ValueError(
            f"data: 'images' of {path} must be uint8 [N, H, W] or [N, H, W, C], got {images.dtype} {images.shape}"
        )
    if not images.size:
        raise ValueError(f"data: 'images' of {path} is empty")
    if labels is not None and (labels.shape != images.shape[:1] or labels.dtype.kind not in "ui"):
        raise ValueError(f"data: 'labels' of {path} must be {images.shape[:1]} integers, got {labels.shape}")
    if labels is not None and labels.min() < 0:
        raise ValueError(f"data: 'labels' of {path} must be 0 or more, got {labels.min()}")
    pixels = images[:, None] if images.ndim == 3 else np.moveaxis(images, 3, 1)
    names = () if labels is None else tuple(str(i) for i in range(int(labels.max()) + 1))
    return np.ascontiguousarray(pixels), labels, names


def _read_folder(path: Path, resolution: int | None) -> tuple[np.ndarray, np.ndarray | None, tuple[str, ...]]:
    names = tuple(sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")))
    found = [(file, i) for i, name in enumerate(names) for file in _pictures(path / name)]
    labelled = bool(found)
    if not labelled:
        found = [(file, 0) for file in _pictures(path)]
    if not found:
        raise ValueError(f"data: no pictures ({', '.join(sorted(PICTURES))}) in {path} or in its class folders")
    rows = []
    for file, _ in found:
        try:
            with Image.open(file) as image:
                rows.append(_square(image, resolution))
        except OSError as error:
            raise ValueError(f"data: {file} cannot be read ({error})") from error
    if len({row.shape[0] for row in rows}) > 1:  # grey among coloured ones
        rows = [row if len(row) == 3 else np.repeat(row, 3, axis=0) for row in rows]
    if len({row.shape for row in rows}) > 1:
        raise ValueError(f"data: pictures of {path} differ in size; give resolution=...")
    labels = np.array([i for _, i in found]) if labelled else None
    return np.stack(rows), labels, names if labelled else ()


def _pictures(folder: Path) -> Iterator[Path]:
    return (p for p in sorted(folder.iterdir()) if p.suffix.lower() in PICTURES)


def _square(image: Image.Image, resolution: int | None) -> np.ndarray:
    picture = image if image.mode in ("L", "RGB") else image.convert("RGB")
    if resolution is not None and max(picture.size) > resolution:
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        box = (left, top, left + side, top + side)
        size = min(side, resolution)  # a long narrow picture is cropped, not enlarged
        picture = picture.resize((size, size), Image.Resampling.BOX, box=box)
    array = np.asarray(picture, dtype=np.uint8)
    array = array[None] if array.ndim == 2 else np.moveaxis(array, 2, 0)
    return _fit(array[None], resolution)[0] if resolution is not None else array


def _fit(pixels: np.ndarray, resolution: int) -> np.ndarray:
    """Pad [N, C, H, W] to ``resolution``, or shrink larger images one by one."""
    height, width = pixels.shape[2:]
    if height > resolution or width > resolution:
        shrunk = [_square(Image.fromarray(np.moveaxis(p, 0, 2).squeeze()), resolution) for p in pixels]
        return np.stack(shrunk)
    top, left = (resolution - height) // 2, (resolution - width) // 2
    margin = ((0, 0), (0, 0), (top, resolution - height - top), (left, resolution - width - left))
    return np.pad(pixels, margin)
