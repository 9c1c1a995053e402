"""Samples as pictures: labelled grids, preview strips, files. Everything is written to a temporary name, then renamed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

BACKGROUND, INK = 255, 40


def to_uint8(x: Tensor) -> np.ndarray:
    """[B, C, H, W] in [-1, 1] to [B, H, W, C] uint8, C = 1 or 3; values outside are clipped."""
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise ValueError(f"samples: pictures need shape [B, 1 or 3, H, W], got {list(x.shape)}")
    pixels = ((x.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255).byte()
    return pixels.permute(0, 2, 3, 1).numpy()


def picture_grid(
    samples: Tensor,
    *,
    columns: int,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    title: str = "",
    scale: int = 2,
) -> Image.Image:
    """Samples [B, C, H, W] row by row, enlarged ``scale`` times, with labels left of the rows and above the columns."""
    pixels = to_uint8(samples)
    b, h, w, c = pixels.shape
    rows = -(-b // columns)
    gap, font = 4, ImageFont.load_default(size=14)
    left = 8 + (max((int(font.getlength(t)) for t in row_labels), default=0) + 8 if row_labels else 0)
    top = 8 + (24 if title else 0) + (20 if column_labels else 0)
    cell_h, cell_w = h * scale + gap, w * scale + gap
    width = left + columns * cell_w + 4
    if title:
        width = max(width, int(font.getlength(title)) + 16)
    canvas = Image.new("RGB", (width, top + rows * cell_h + 4), (BACKGROUND,) * 3)
    draw = ImageDraw.Draw(canvas)
    if title:
        draw.text((8, 6), title, fill=(INK,) * 3, font=font)
    for j, text in enumerate(column_labels or ()):
        draw.text((left + j * cell_w + (w * scale) / 2, top - 18), text, fill=(INK,) * 3, font=font, anchor="ma")
    for i, text in enumerate(row_labels or ()):
        draw.text((8, top + i * cell_h + h * scale / 2), text, fill=(INK,) * 3, font=font, anchor="lm")
    for k in range(b):
        tile = Image.fromarray(pixels[k].squeeze(-1) if c == 1 else pixels[k]).convert("RGB")
        tile = tile.resize((w * scale, h * scale), Image.Resampling.NEAREST)
        canvas.paste(tile, (left + (k % columns) * cell_w, top + (k // columns) * cell_h))
    return canvas


def save_image(image: Image.Image, path: str | Path) -> Path:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        image.save(part, format="PNG", optimize=True)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return target


def check_target(path: str | Path) -> Path:
    """``path`` if :func:`save_samples` can write there. Raises ``ValueError`` otherwise; to be asked before the work."""
    target = Path(path)
    if target.suffix not in (".png", ".npz", ""):
        raise ValueError(f"out: must end in .png, .npz or be a folder, got {str(path)!r}")
    if target.exists() and target.is_dir() == bool(target.suffix):
        raise ValueError(f"out: {str(path)!r} exists and is {'a folder' if target.suffix else 'a file'}")
    return target


def save_samples(
    samples: Tensor, path: str | Path, *, labels: Sequence[int] | None = None, seeds: Sequence[int]
) -> Path:
    """Write samples as a PNG grid (``.png``), as arrays (``.npz``), or as one PNG each (a folder)."""
    target = check_target(path)
    if target.suffix == ".npz":
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.{os.getpid()}.npz")
        arrays = {"samples": samples.detach().float().cpu().numpy(), "seeds": np.asarray(seeds, dtype=np.int64)}
        if labels is not None:
            arrays["labels"] = np.asarray(labels, dtype=np.int64)
        try:
            np.savez_compressed(part, **arrays)  # type: ignore[arg-type]
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)
        return target
    if target.suffix == ".png":
        columns = max(1, min(10, len(samples)))
        return save_image(picture_grid(samples, columns=columns), target)
    target.mkdir(parents=True, exist_ok=True)
    for k, pixels in enumerate(to_uint8(samples)):
        name = f"{seeds[k]:06d}" + (f"_class{labels[k]}" if labels is not None else "") + ".png"
        save_image(Image.fromarray(pixels.squeeze(-1) if pixels.shape[2] == 1 else pixels), target / name)
    return target
