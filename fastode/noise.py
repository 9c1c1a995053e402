"""Standard normal numbers keyed by (sample seed, draw, element): Philox4x32-10 and Box-Muller.

A number depends on nothing else: not on the batch, the position in it, the device, or what was drawn before. So a sample is
the same alone, in any batch, and in any shard of a job, and every backend can make the numbers where it needs them.

Element 4j .. 4j+3 of draw k for seed s come from one Philox block (Salmon et al. 2011, "Parallel random numbers: as easy
as 1, 2, 3"): counter (j mod 2^32, j div 2^32, k, 0), key (s mod 2^32, s div 2^32). The four words r0 .. r3 give

    u1 = (float(r0) + 1) 2^-32,  u2 = float(r1) 2^-32,   z0 = sqrt(-2 ln u1) cos(2 pi u2),  z1 = sqrt(-2 ln u1) sin(2 pi u2)

and the same for (r2, r3). ``float`` rounds to float32, so that u1 and u2 are the same numbers on every backend; the
logarithm and the sines may differ in the last bits.

Draw 0 is the initial state; draw k + 1 is the k-th draw of a program.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four counter words and two key words (int64 tensors holding uint32) to four random words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The product of two 32-bit words wraps in int64, but its 64 bits are right: mask after shifting.
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def check_seeds(seeds: Sequence[int] | Tensor, batch: int | None = None) -> Tensor:
    """``seeds`` as int64 [B]. Raises ``ValueError`` naming what is wrong."""
    if isinstance(seeds, Tensor):
        values = seeds.detach().cpu()
    else:
        rows = list(seeds)
        if any(isinstance(s, bool) or not hasattr(s, "__index__") for s in rows):
            raise ValueError(f"seeds: must be whole numbers, got {rows[:4]}")
        if any(not -(2**63) <= int(s) < 2**63 for s in rows):
            raise ValueError("seeds: must fit in 64 signed bits")
        values = torch.tensor([int(s) for s in rows], dtype=torch.int64)
    if values.ndim != 1 or values.dtype.is_floating_point or values.dtype == torch.bool:
        raise ValueError(
            f"seeds: must be a sequence of whole numbers, got {values.dtype} of shape {list(values.shape)}"
        )
    if batch is not None and len(values) != batch:
        raise ValueError(f"seeds: need one per sample ({batch}), got {len(values)}")
    if len(values) == 0:
        raise ValueError("seeds: need at least one")
    return values.to(torch.int64)


def normal(
    seeds: Sequence[int] | Tensor,
    draw: int,
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal [B, *shape] for ``seeds`` [B] and one ``draw``; evaluated in float64, returned in ``dtype``."""
    keys = check_seeds(seeds).to(device)
    count = math.prod(shape)
    blocks = torch.arange((count + 3) // 4, device=device, dtype=torch.int64)
    rows = keys[:, None]
    zero = torch.zeros_like(blocks)[None]
    words = philox(
        (blocks[None] & _MASK, (blocks[None] >> 32) & _MASK, zero + draw, zero), (rows & _MASK, (rows >> 32) & _MASK)
    )
    r0, r1, r2, r3 = (w.to(torch.float32) for w in words)
    pairs = []
    for a, b in ((r0, r1), (r2, r3)):
        u1 = ((a + 1) * 2.0**-32).double()
        angle = (b * 2.0**-32).double() * (2 * math.pi)
        radius = torch.sqrt(-2 * torch.log(u1))
        pairs += [radius * torch.cos(angle), radius * torch.sin(angle)]
    z = torch.stack(pairs, dim=2).reshape(len(keys), -1)[:, :count]
    return z.reshape(len(keys), *shape).to(dtype)
