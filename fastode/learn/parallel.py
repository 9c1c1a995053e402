"""Training on several processes: each takes its share of every batch, and gradients are averaged.

``torchrun --nproc_per_node=4 -m fastode.cli train solver amed ...`` starts them; alone, there is one process and nothing to do.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, distributed


@dataclass(frozen=True)
class Ranks:
    """This process is ``rank`` of ``size``."""

    rank: int = 0
    size: int = 1

    @classmethod
    def here(cls, device: torch.device) -> Ranks:
        """As torchrun says; joins the process group (NCCL on CUDA, gloo elsewhere) if nobody has yet."""
        if not distributed.is_available() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        if not distributed.is_initialized():
            distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(distributed.get_rank(), distributed.get_world_size())

    def share(self, rows: Tensor) -> Tensor:
        """The rows of a batch that are this process's."""
        return rows[self.rank :: self.size]

    def sum(self, values: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over the processes."""
        if self.size > 1:
            for value in values:
                distributed.all_reduce(value)

    def any(self, value: bool) -> bool:
        """Whether ``value`` is true on any of the processes: what they must decide together."""
        if self.size == 1:
            return value
        flag = torch.tensor([float(value)])
        distributed.all_reduce(flag)
        return bool(flag.item())
