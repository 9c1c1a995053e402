"""Parts of one batched call, spread over the processes of a torch.distributed group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Workers:
    """The processes of ``group`` (True: the default group; None: this one alone).

    All processes run the same host loop on the same numbers. ``spread`` divides a call among them and gives everyone the
    whole result; ``agree`` makes a decision's numbers those of the first process, so that no two can part ways.
    """

    def __init__(self, group: Any = None) -> None:
        self.group: Any = None
        self.size, self.rank = 1, 0
        if group is None:
            return
        import torch.distributed as dist

        if not dist.is_available() or not dist.is_initialized():
            raise ValueError("group: torch.distributed is not initialised; call init_process_group first")
        self.group = dist.group.WORLD if group is True else group
        self.size, self.rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        if self.rank < 0:
            raise ValueError("group: this process is not in it")

    def spread(self, part: Callable[[int, int], Tensor], count: int, row: Tensor, failure: type[Exception]) -> Tensor:
        """``part(low, high)`` [(high - low) B, ...] for all of 0 .. count - 1, every process making its share.

        ``row`` [B, ...] tells shape and dtype. If ``failure`` is raised in one process it is raised in all.
        """
        if self.size == 1:
            return part(0, count)
        import torch.distributed as dist

        share = -(-count // self.size)
        low, high = min(self.rank * share, count), min((self.rank + 1) * share, count)
        own = row.new_zeros((share * len(row), *row.shape[1:]))
        failed: Exception | None = None
        if low < high:
            try:
                own[: (high - low) * len(row)] = part(low, high)
            except failure as error:
                failed = error
        flag = torch.tensor([failed is not None], dtype=torch.int32, device=row.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.group)
        if bool(flag):
            raise failed or failure()
        parts = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(parts, own, group=self.group)
        return torch.cat(parts)[: count * len(row)]

    def agree(self, numbers: Tensor) -> Tensor:
        """``numbers`` of the first process."""
        if self.size > 1:
            import torch.distributed as dist

            dist.broadcast(numbers, src=dist.get_global_rank(self.group, 0), group=self.group)
        return numbers
