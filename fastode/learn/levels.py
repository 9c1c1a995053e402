"""A grid whose inner levels are learned."""

from __future__ import annotations

import torch
from torch import nn

from fastode.schedules.grid import Grid, replace_grid
from fastode.schedules.spacing import explicit


class Levels(nn.Module):
    """The grid; where it is learned, ln rho of its inner levels by the logarithms of their gaps, so that they stay in order.
    The ends are those of the grid that it begins with."""

    def __init__(self, grid: Grid, *, learned: bool) -> None:
        super().__init__()
        self.first = grid
        rho = grid.sigmas
        possible = grid.steps > 1 and bool(torch.isfinite(rho).all()) and bool((rho > 0).all())
        self.gaps = nn.Parameter((-rho.log().diff()).log()) if learned and possible else None

    def forward(self) -> Grid:
        if self.gaps is None:
            return self.first
        ln = self.first.sigmas.log()
        inner = ln[0] + (ln[-1] - ln[0]) * self.gaps.softmax(0).cumsum(0)[:-1]
        rho = torch.cat([self.first.sigmas[:1], inner.exp(), self.first.sigmas[-1:]])
        if self.first.schedule is not None:
            return replace_grid(explicit(self.first.schedule, rho), name="learned", schedule=self.first.schedule)
        return Grid(rho * self.first.alpha, self.first.alpha, name="learned")
