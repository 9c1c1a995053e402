"""A run as a pure function of tensors, so that torch.compile takes the network and the solver together, once.

    sampler = Sampler(SOLVERS["unipc"](grid), denoiser, shape=(16, 3, 32, 32))
    run = torch.compile(sampler, fullgraph=True)
    images = run(x, sampler.numbers())
    images = run(x, sampler.numbers(SOLVERS["unipc"](another_grid)))           # the same compiled code

Everything that may change between calls is a tensor: weights, noise levels, guidance strength, seeds, labels. What is
fixed is the *structure*: which buffers each update reads and writes, and which weights are zero in every call. The
compiler traces the network once per evaluation, so the time to compile grows with NFE.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastode.backends.late import Plan, Plans
from fastode.backends.packing import Packing
from fastode.denoisers.base import Condition, Denoiser
from fastode.denoisers.guidance import GUIDANCE_SCALE, Guidance
from fastode.program import PooledMLP, Program
from fastode.program.lower import Lowered, Source, Target, lower
from fastode.scalar import Late, evaluate


class Numbers(NamedTuple):
    """All numbers of one call, on the device. ``table``: weights of all updates; ``fields``: weights per element, or
    empty; ``c_noise``: what the network is told, [NFE] or [NFE, B] in the state's dtype."""

    table: Tensor
    fields: Tensor
    c_noise: Tensor


class _Maker:
    """Makes the numbers before one update, in tensor operations that a compiler can trace."""

    def __init__(self, plan: Plan, places: Tensor, mlp: PooledMLP) -> None:
        self.plan, self.places, self.mlp = plan, places, mlp

    def make(
        self, features: Mapping[str, Tensor], numbers: Numbers, leaves: dict[int, Tensor], told: dict[int, Tensor]
    ) -> Numbers:
        """``numbers`` with the new weights; late numbers are added to ``leaves``, levels of later calls to ``told``."""
        plan = self.plan
        made = self.mlp(features[plan.feature])
        leaves.update({leaf: value.double() for leaf, value in zip(plan.made, made, strict=True)})
        values = plan.code.run([leaves[leaf] for leaf in plan.inputs])
        entries = torch.cat(values[: len(plan.entries)]).to(numbers.table.dtype)
        told.update(zip(plan.calls, values[len(plan.entries) :], strict=True))
        return numbers._replace(table=numbers.table.index_copy(0, self.places, entries))


class Sampler(nn.Module):
    """``sampler(x, numbers, seeds, class_labels, **cond)`` gives samples [B, *sample]; compile with ``fullgraph=True``.

    Args:
        program: a compiled solver. ``numbers(other)`` accepts any program of the same structure, e.g. the same solver
            with the same options and number of steps on another grid.
        denoiser: a :class:`Denoiser` or a plain callable, without transforms (those belong into the network here).
        shape: ``(B, *sample)``; device, dtype: of the state.
        guidance: prepares classifier-free guidance; its strength is one of the numbers.

    Nothing is checked inside a call, where a check would be compiled: labels and seeds are int64 [B] on the device, and
    ``x`` is a state at the first level. Gradients do not flow (use ``Engine(backend="reference")``).
    """

    def __init__(
        self,
        program: Program,
        denoiser: Any,
        shape: Sequence[int],
        *,
        guidance: Guidance | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        import fastode.ops  # registers the operator

        super().__init__()
        self._combine = fastode.ops.combine
        self.denoiser, self.guidance = Denoiser.of(denoiser), guidance
        if self.denoiser.transforms:
            raise ValueError("denoiser: transforms are not linear and not part of a table; put them into the network")
        self.network = self.denoiser.network if isinstance(self.denoiser.network, nn.Module) else None
        self.shape, self.dtype = tuple(int(n) for n in shape), dtype
        self.device = torch.device(device) if device is not None else (self.denoiser.device or torch.device("cpu"))
        self.net_dtype = self.denoiser.dtype or dtype
        self.program = program
        self._lowered = self._lower(program)
        self._packing = Packing(self._lowered, self.shape)
        self._updates = tuple(
            (update.sources, update.targets, packed)
            for update, packed in zip(self._lowered.updates, self._packing.updates, strict=True)
        )
        self._guided = tuple(call.outputs > 1 for call in self._lowered.calls)
        self._makers = self._made()

    def numbers(self, program: Program | None = None, *, guidance_scale: Any = None) -> Numbers:
        """The numbers of a call: of ``program`` (of this structure; by default the sampler's own) at
        ``guidance_scale``, one number or [B]. Raises ``ValueError`` naming the first update whose structure differs."""
        lowered, packing = self._lowered, self._packing
        if program is not None and program is not self.program:
            if self._makers or program.binds:
                raise ValueError(
                    "program: one whose run makes numbers itself belongs to its own sampler; build another"
                )
            lowered = self._lower(program)
            packing = Packing(lowered, self.shape)
            self._compare(lowered, packing)
        if (guidance_scale is None) != (self.guidance is None):
            raise ValueError("guidance_scale: give a strength exactly if the sampler was built with guidance")
        known: dict[Late, Any] = {}
        if guidance_scale is not None:
            value = torch.as_tensor(guidance_scale, dtype=torch.float64)
            known[GUIDANCE_SCALE] = value.reshape(-1, *[1] * (len(self.shape) - 1)) if value.ndim else float(value)
        table = torch.empty(packing.size, dtype=self.dtype, device=self.device)
        fields = torch.empty(packing.fields_shape or (0,), dtype=self.dtype, device=self.device)
        packing.fill(known, table, fields)
        return Numbers(table, fields, self._levels(lowered, known))

    def _levels(self, lowered: Lowered, known: Mapping[Late, Any]) -> Tensor:
        memo: dict[int, Any] = {}
        told = [1.0 if call.due else evaluate(call.c_noise, known, memo) for call in lowered.calls]
        values = [torch.as_tensor(value, dtype=torch.float64) for value in told]
        if any(v.numel() > 1 for v in values):
            values = [v.reshape(-1).expand(self.shape[0]) for v in values]
        flat = torch.stack([v.reshape(-1) if v.ndim else v for v in values]) if values else torch.zeros(0)
        return flat.to(device=self.device, dtype=self.dtype)

    def _made(self) -> dict[int, _Maker]:
        """What makes the late numbers of the run, by the update they are made before."""
        if not self.program.binds:
            return {}
        plans = Plans.of(self._lowered)
        if plans is None or self._lowered.late:
            raise ValueError(
                "program: here the numbers that a run makes itself must come from a PooledMLP, enter elementary expressions, "
                "and not meet numbers of the call; use an Engine"
            )
        batch = torch.arange(self.shape[0], device=self.device)
        makers = {}
        for index, plan in plans.by_update.items():
            packed = [(self._packing.updates[u], r, c) for u, r, c in plan.entries]
            places = [p.offset + r * p.columns + c + batch * p.width for p, r, c in packed]
            makers[index] = _Maker(plan, torch.cat(places), plan.mlp.to(self.device))
        return makers

    def _lower(self, program: Program) -> Lowered:
        denoiser = self.denoiser
        exact = self.net_dtype == self.dtype
        return lower(program, denoiser.scaling, lambda level: denoiser.columns(level, self.guidance), exact_input=exact)

    def _compare(self, lowered: Lowered, packing: Packing) -> None:
        if len(packing.updates) != len(self._updates):
            raise ValueError(
                f"program: makes {len(lowered.calls)} network calls, this sampler was built for {len(self._guided)}"
            )
        for i, (update, packed) in enumerate(zip(lowered.updates, packing.updates, strict=True)):
            if (update.sources, update.targets, packed) != self._updates[i]:
                where = f"after network call {i - 1}" if i else "before the first network call"
                raise ValueError(
                    f"program: its update {where} has another structure than the one this sampler was built for"
                )

    @torch.no_grad()
    def forward(
        self,
        x: Tensor,
        numbers: Numbers,
        seeds: Tensor | None = None,
        class_labels: Tensor | None = None,
        **cond: Any,
    ) -> Tensor:
        slots = [torch.empty_like(x) for _ in range(self._lowered.slots)]
        net_in = torch.empty(self.shape, dtype=self.net_dtype, device=x.device)
        result = torch.empty_like(x)
        condition = Condition(class_labels, cond, None)
        outputs: Sequence[Tensor] = ()
        features: Mapping[str, Tensor] = {}
        leaves: dict[int, Tensor] = {}
        told: dict[int, Tensor] = {}
        for i in range(len(self._updates)):
            if i in self._makers:
                numbers = self._makers[i].make(features, numbers, leaves, told)
            self._update(i, numbers, slots, x, net_in, outputs, result, seeds)
            if i < len(self._guided):
                c_noise = self.denoiser.c_noise(told.get(i, numbers.c_noise[i]), net_in)
                on = self.guidance if self._guided[i] else None
                names = self._lowered.calls[i].features
                outputs, features = self.denoiser.raw_and_features(net_in, c_noise, condition, on, names)
        return result

    def _update(
        self,
        index: int,
        numbers: Numbers,
        slots: list[Tensor],
        start: Tensor,
        net_in: Tensor,
        outputs: Sequence[Tensor],
        result: Tensor,
        seeds: Tensor | None,
    ) -> None:
        sources, targets, packed = self._updates[index]

        def tensor(place: Source | Target) -> Tensor:
            if place.kind == "slot":
                return slots[place.index]
            if place.kind == "output":
                return outputs[place.index]
            return {"start": start, "input": net_in, "result": result}[place.kind]

        self._combine(
            [tensor(t) for t in targets],
            [tensor(s) for s in sources if s.kind not in ("noise", "one")],
            numbers.table[packed.offset : packed.end],
            numbers.fields if packed.elements else None,
            seeds if packed.draws else None,
            packed.pattern,
            packed.rows,
            packed.draws,
            packed.one,
            packed.elements,
        )
