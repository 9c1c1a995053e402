"""Programs run with gradients: through one step at a time, or through the whole run.

A gradient goes from a state to the numbers of the table and to the levels that the network was told, and from there to
whatever they were computed from. The network's own weights get none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from fastode.backends.reference import weigh
from fastode.denoisers.base import Condition, Denoiser
from fastode.denoisers.guidance import GUIDANCE_SCALE, Guidance
from fastode.program import Program, Stage, Table
from fastode.scalar import Late

Evaluation = tuple[Tensor, dict[str, Tensor]]
Denoise = Callable[[Tensor, Stage, Mapping[Late, Any]], Evaluation]


class Play:
    """A run of ``program`` from ``x`` in progress, one evaluation at a time, by the definition of the reference backend.

    ``values`` and ``numbers`` are what it holds; they may be changed between two evaluations (training cuts gradients
    there, and starts steps from other states). ``denoise``: see :func:`fastode.backends.reference.run`.
    """

    def __init__(self, program: Program, denoise: Denoise, x: Tensor, known: Mapping[Late, Any]) -> None:
        self.program, self.denoise = program, denoise
        self.values: dict[int, Tensor] = {0: x}
        self.numbers: dict[Late, Any] = dict(known)
        self._memo: dict[int, Any] = {}
        self._write(program.init, None)

    def evaluate(self, stage: Stage) -> Tensor:
        """The denoised estimate of ``stage``; what is made from it in the run becomes known."""
        output, features = self.denoise(self.values[stage.net_in], stage, self.numbers)
        for bind in self.program.binds:
            if bind.stage == stage.index:
                rows = (weigh(f, self.values, output, known=self.numbers, memo=self._memo) for f in bind.norms)
                norms = [row.flatten(1).norm(dim=1) for row in rows]
                self.numbers |= bind.make([features[name] for name in bind.outputs], norms, output)
        return output

    def update(self, stage: Stage, output: Tensor) -> None:
        """Write the values that ``stage`` writes."""
        self._write(stage.table, output)

    def _write(self, table: Table, output: Tensor | None) -> None:
        made = {w: weigh(f, self.values, output, known=self.numbers, memo=self._memo) for w, f in table.rows()}
        self.values.update(made)


@contextmanager
def frozen(denoiser: Denoiser) -> Iterator[None]:
    """The network in evaluation mode and without gradients for its weights, as long as this lasts."""
    network = denoiser.network
    if not isinstance(network, nn.Module):
        yield
        return
    training, wanted = network.training, [p for p in network.parameters() if p.requires_grad]
    network.eval().requires_grad_(False)
    try:
        yield
    finally:
        network.train(training)
        for parameter in wanted:
            parameter.requires_grad_(True)


class Evaluator:
    """Evaluations of ``denoiser`` under one condition, as :class:`Play` asks for them.

    ``checkpoint``: recompute what is inside the network on the way back instead of keeping it. ``count``: evaluations made,
    times their samples.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        guidance: Guidance | None = None,
        guidance_scale: float | None = None,
        checkpoint: bool = False,
    ) -> None:
        self.denoiser, self.guidance, self.checkpoint = denoiser, guidance, checkpoint
        self.known: dict[Late, Any] = {} if guidance_scale is None else {GUIDANCE_SCALE: float(guidance_scale)}
        self.count = 0

    def play(
        self, program: Program, x: Tensor, condition: Condition, first: Mapping[int, Evaluation] | None = None
    ) -> Play:
        """``program`` from ``x``. ``first``: evaluations that are known already, by stage."""
        known = dict(first or {})

        def denoise(state: Tensor, stage: Stage, numbers: Mapping[Late, Any]) -> Evaluation:
            if stage.index in known:
                return known[stage.index]
            return self(state, stage, condition, numbers)

        return Play(program, denoise, x, self.known)

    def __call__(self, x: Tensor, stage: Stage, condition: Condition, numbers: Mapping[Late, Any]) -> Evaluation:
        """The estimate, and the named outputs with their channels averaged, [B, 1, ...]: all a predictor looks at."""
        names = [name for name in stage.outputs if name != "denoised"]

        def make(state: Tensor) -> Evaluation:
            denoised, made = self.denoiser.denoise_and_features(
                state, stage.level, condition, guidance=self.guidance, known=numbers, names=names
            )
            return denoised, {name: _wide(feature).mean(1, keepdim=True) for name, feature in made.items()}

        self.count += len(x)
        if self.checkpoint and torch.is_grad_enabled():
            made: Evaluation = recompute(make, x, use_reentrant=False)  # the levels' gradients come through the closure
            return made
        return make(x)


def _wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def steps_of(program: Program) -> list[list[Stage]]:
    """The evaluations of every step of the grid."""
    steps: list[list[Stage]] = [[] for _ in range(program.grid.steps)]
    for stage in program.stages:
        steps[min(stage.step, program.grid.steps - 1)].append(stage)
    return steps


def squared(made: Tensor, truth: Tensor) -> Tensor:
    """Sum of squares over the elements of each sample, [B]."""
    return (made - truth).square().flatten(1).sum(1)


def feature_distance(network: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Squared distance of what ``network`` makes of two images, [B]: a loss in the features of a network of yours.

    It should not be the network whose features judge the result: what is trained on is not evidence.
    """
    if isinstance(network, nn.Module):
        network.eval().requires_grad_(False)

    def distance(made: Tensor, truth: Tensor) -> Tensor:
        with torch.no_grad():
            target = network(truth)
        return squared(network(made), target)

    return distance
