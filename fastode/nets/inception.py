"""The Inception-v3 of the published FID (arXiv:1512.00567, arXiv:1706.08500), for a weights file of yours.

The file is the conversion of TensorFlow's 2015 graph that pytorch-fid ("pt_inception-2015-12-05") and torch-fidelity
("weights-inception-2015-12-05") load, or the same tensors as .safetensors. That graph differs from other Inception-v3 nets:
averages do not count the padding, the last block pools by maximum, and there are 1008 classes. A file of another net with the
same names gives numbers that are no FID.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

SIDE = 299


class Conv(nn.Module):
    """Convolution without bias, batch normalisation in evaluation mode (eps 0.001), ReLU."""

    def __init__(
        self, channels: int, width: int, kernel: int | tuple[int, int] = 1, stride: int = 1, *, same: bool = True
    ) -> None:
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (sides[0] // 2, sides[1] // 2) if same else (0, 0)
        self.conv = nn.Conv2d(channels, width, sides, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(x)))


def _average(x: Tensor) -> Tensor:
    return functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class Grid35(nn.Module):
    """Blocks at 35 x 35: 1x1, 5x5, two 3x3, pooling."""

    def __init__(self, channels: int, pool: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(channels, 64)
        self.branch5x5_1, self.branch5x5_2 = Conv(channels, 48), Conv(48, 64, 5)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(channels, 64), Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3)
        self.branch_pool = Conv(channels, pool)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), wide, double, self.branch_pool(_average(x))], 1)


class Reduce35(nn.Module):
    """35 x 35 to 17 x 17."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3 = Conv(channels, 384, 3, 2, same=False)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(channels, 64), Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3, 2, same=False)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, functional.max_pool2d(x, 3, 2)], 1)


class Grid17(nn.Module):
    """Blocks at 17 x 17: 7x7 factored into 1x7 and 7x1, once and twice."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        row, column = (1, 7), (7, 1)
        self.branch1x1 = Conv(768, 192)
        self.branch7x7_1, self.branch7x7_2 = Conv(768, inner), Conv(inner, inner, row)
        self.branch7x7_3 = Conv(inner, 192, column)
        self.branch7x7dbl_1, self.branch7x7dbl_2 = Conv(768, inner), Conv(inner, inner, column)
        self.branch7x7dbl_3, self.branch7x7dbl_4 = Conv(inner, inner, row), Conv(inner, inner, column)
        self.branch7x7dbl_5 = Conv(inner, 192, row)
        self.branch_pool = Conv(768, 192)

    def forward(self, x: Tensor) -> Tensor:
        once = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return torch.cat([self.branch1x1(x), once, twice, self.branch_pool(_average(x))], 1)


class Reduce17(nn.Module):
    """17 x 17 to 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Conv(768, 192), Conv(192, 320, 3, 2, same=False)
        self.branch7x7x3_1, self.branch7x7x3_2 = Conv(768, 192), Conv(192, 192, (1, 7))
        self.branch7x7x3_3, self.branch7x7x3_4 = Conv(192, 192, (7, 1)), Conv(192, 192, 3, 2, same=False)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), wide, functional.max_pool2d(x, 3, 2)], 1)


class Grid8(nn.Module):
    """Blocks at 8 x 8: 3x3 split into 1x3 beside 3x1. ``maximum``: the last one pools by maximum."""

    def __init__(self, channels: int, *, maximum: bool) -> None:
        super().__init__()
        row, column = (1, 3), (3, 1)
        self.maximum = maximum
        self.branch1x1 = Conv(channels, 320)
        self.branch3x3_1 = Conv(channels, 384)
        self.branch3x3_2a, self.branch3x3_2b = Conv(384, 384, row), Conv(384, 384, column)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(channels, 448), Conv(448, 384, 3)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = Conv(384, 384, row), Conv(384, 384, column)
        self.branch_pool = Conv(channels, 192)

    def forward(self, x: Tensor) -> Tensor:
        one = self.branch3x3_1(x)
        two = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = functional.max_pool2d(x, 3, stride=1, padding=1) if self.maximum else _average(x)
        parts = [self.branch1x1(x), self.branch3x3_2a(one), self.branch3x3_2b(one)]
        return torch.cat([*parts, self.branch3x3dbl_3a(two), self.branch3x3dbl_3b(two), self.branch_pool(pooled)], 1)


class Inception(nn.Module):
    """[B, 3, 299, 299] in [-1, 1] to pooled features [B, 2048]; names of modules are those of the weights file."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, 2, same=False)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, same=False)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, same=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = Grid35(192, 32), Grid35(256, 64), Grid35(288, 64)
        self.Mixed_6a = Reduce35(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (Grid17(c) for c in (128, 160, 160, 192))
        self.Mixed_7a = Reduce17()
        self.Mixed_7b, self.Mixed_7c = Grid8(1280, maximum=False), Grid8(2048, maximum=True)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x: Tensor) -> Tensor:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(functional.max_pool2d(x, 3, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(functional.max_pool2d(x, 3, 2))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean((2, 3))

    @torch.no_grad()
    def features(self, samples: Tensor) -> Tensor:
        """Features [B, 2048] of samples [B, 1 or 3, H, W] in [-1, 1], by the published FID's path: rounded to 8 bits,
        resized as TensorFlow 1 did, scaled to (p - 128)/128."""
        if samples.ndim != 4 or samples.shape[1] not in (1, 3):
            raise ValueError(f"features: inception takes pictures [B, 1 or 3, H, W], got {list(samples.shape)}")
        pixels = ((samples.float() + 1) * 127.5).round().clamp(0, 255)
        resized = resize_tf1(pixels.expand(-1, 3, -1, -1), SIDE)
        weight = self.fc.weight
        return self(
            (resized - 128) / 128 if weight.dtype == resized.dtype else ((resized - 128) / 128).to(weight.dtype)
        )


def resize_tf1(x: Tensor, side: int) -> Tensor:
    """Bilinear as in TensorFlow 1: output pixel i reads the input at i n / side, corners not aligned, no half pixel.

    Published FID statistics were made so; torch's own ``interpolate`` shifts by half a pixel and changes FID.
    """
    for dim in (2, 3):
        n = x.shape[dim]
        where = torch.arange(side, device=x.device, dtype=torch.float32) * (n / side)
        low = where.floor().long().clamp(max=n - 1)
        high = (low + 1).clamp(max=n - 1)
        weight = (where - low).to(x.dtype)
        weight = weight[:, None] if dim == 2 else weight
        a, b = x.index_select(dim, low), x.index_select(dim, high)
        x = a + (b - a) * weight
    return x


def load_inception(path: str | Path) -> Inception:
    """The net with the weights of ``path``: .safetensors, or .pth read as plain tensors, which runs no code of the file.

    Raises ``FileNotFoundError``, or ``ValueError`` where the tensors are not those of this net.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"features: the Inception weights {str(path)!r} do not exist")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    with torch.device("meta"):
        network = Inception()
    try:
        tensors = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
        known = network.state_dict()
        lacking = sorted(k for k in known if k not in tensors and not k.endswith("num_batches_tracked"))
        if lacking:
            raise ValueError(f"it lacks {lacking[0]} and {len(lacking) - 1} other tensors")
        wrong = [k for k, v in known.items() if k in tensors and tensors[k].shape != v.shape]
        if wrong:
            got, want = list(tensors[wrong[0]].shape), list(known[wrong[0]].shape)
            raise ValueError(f"{wrong[0]} has shape {got} instead of {want}; FID's net has 1008 classes")
        kept = {k: tensors[k] if k in tensors else torch.zeros((), dtype=torch.int64) for k in known}
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"features: {path} holds no Inception weights ({str(error).splitlines()[0]})") from error
    except Exception as error:  # torch.load raises pickle's own errors for foreign files
        raise ValueError(f"features: {path} cannot be read as plain tensors ({type(error).__name__})") from error
    network.load_state_dict(kept, assign=True)
    return network.eval().requires_grad_(False)
