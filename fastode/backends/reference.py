"""The definition of what a program means, in PyTorch: any dtype, any device, differentiable. Every other backend is tested
against it. It works on the program itself, before any folding, with denoised estimates as the solver wrote them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from fastode.program import Atom, Form, Program, Stage, Table
from fastode.scalar import Late, evaluate


def run(
    program: Program,
    denoise: Callable[[Tensor, Stage, Mapping[Late, Any]], Tensor | tuple[Tensor, Mapping[str, Tensor]]],
    x: Tensor,
    *,
    noise: Callable[[int], Tensor] | None = None,
    known: Mapping[Late, Any] | None = None,
    visit: Callable[[Stage, Tensor, Tensor], bool | None] | None = None,
    keep: bool = False,
) -> tuple[Tensor, dict[int, Tensor]]:
    """Execute ``program`` from ``x`` [B, *sample]; returns the result and the values still held (all, if ``keep``).

    ``denoise(x, stage, known)`` returns the denoised estimate in the dtype of ``x``, or that and the named outputs which the
    stage asks for; ``noise(k)`` is draw k; ``known`` gives the late numbers that come with the call. ``visit(stage, x,
    denoised)`` is called after every evaluation; True ends the run there, and the result is then the state evaluated.
    """
    values: dict[int, Tensor] = {0: x}
    numbers: dict[Late, Any] = dict(known or {})
    memo: dict[int, Any] = {}
    last_use = _last_uses(program)

    def total(form: Form, output: Tensor | None) -> Tensor:
        return weigh(form, values, output, noise=noise, known=numbers, memo=memo)

    def apply(table: Table, output: Tensor | None) -> None:
        values.update({write: total(form, output) for write, form in table.rows()})

    apply(program.init, None)
    for stage in program.stages:
        point = values[stage.net_in]
        made = denoise(point, stage, numbers)
        output, features = made if isinstance(made, tuple) else (made, {})
        for bind in program.binds:
            if bind.stage == stage.index:
                norms = [total(form, output).flatten(1).norm(dim=1) for form in bind.norms]
                numbers |= bind.make([features[name] for name in bind.outputs], norms, x)
        if visit is not None and visit(stage, point, output):
            return point, values
        apply(stage.table, output)
        if not keep:
            for value in [v for v in values if last_use.get(v, -1) <= stage.index and v != program.result]:
                del values[value]
    return values[program.result], values


def weigh(
    form: Form,
    values: Mapping[int, Tensor],
    output: Tensor | None = None,
    *,
    noise: Callable[[int], Tensor] | None = None,
    known: Mapping[Late, Any] | None = None,
    memo: dict[int, Any] | None = None,
) -> Tensor:
    """One row of a table: the weighted sum of stored ``values`` (by id, value 0 the start), of the evaluation's ``output``,
    of draws and of the constant 1. ``memo`` shares late expressions between rows."""
    x = next(iter(values.values()))

    def read(atom: Atom) -> Tensor:
        if atom.kind == "value":
            return values[atom.index]
        if atom.kind == "one":
            return x.new_ones(()).expand_as(x)
        if atom.kind == "noise":
            assert noise is not None
            return noise(atom.index)
        assert output is not None
        return output

    total: Tensor | None = None
    for atom, coefficient in form.terms.items():
        c = evaluate(coefficient, known or {}, memo)
        c = c.to(device=x.device, dtype=x.dtype) if isinstance(c, Tensor) else c
        source = read(atom)
        term = source * c if isinstance(c, Tensor) or c != 1 else source
        total = term if total is None else total + term
    return x.new_zeros(()).expand_as(x) if total is None else total


def _last_uses(program: Program) -> dict[int, int]:
    """The stage after whose update each value is no longer read."""
    last: dict[int, int] = {}
    for stage in program.stages:
        last[stage.net_in] = stage.index
        for atom in stage.table.columns:
            if atom.kind == "value":
                last[atom.index] = stage.index
    for bind in program.binds:
        for atom in (atom for form in bind.norms for atom in form.terms):
            if atom.kind == "value":
                last[atom.index] = max(last.get(atom.index, -1), bind.stage)
    return last
