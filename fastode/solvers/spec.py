"""A solver together with its options, as composite solvers take it: by name, as text, or as an object."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

from fastode.program import Form, Trace
from fastode.solvers.solver import MODIFIERS, Solver

Spec: TypeAlias = "str | Solver | tuple[str | Solver, Mapping[str, Any]]"
"""``"heun"``, ``"unipc(order=2, variant=bh1)"``, a :class:`Solver`, or one of these with a mapping of options."""

_TEXT = re.compile(r"\s*([^()\s]+)\s*(?:\((.*)\))?\s*")


def bound(argument: str, spec: Any) -> tuple[Solver, Callable[[Trace], Form]]:
    """The solver that ``spec`` names, and its formula with the options filled in.

    Raises ``ValueError`` or ``TypeError`` naming ``argument``, or the option.
    """
    from fastode.solvers import SOLVERS

    options: dict[str, Any] = {}
    if isinstance(spec, tuple) and len(spec) == 2 and isinstance(spec[1], Mapping):
        spec, given = spec
        options |= given
    if isinstance(spec, str):
        match = _TEXT.fullmatch(spec)
        if match is None:
            raise ValueError(f"{argument}: must look like 'heun' or 'unipc(order=2)', got {spec!r}")
        solver = SOLVERS[match[1]]
        options = dict(_option(argument, part) for part in (match[2] or "").split(",") if part.strip()) | options
    elif isinstance(spec, Solver):
        solver = spec
    else:
        raise TypeError(f"{argument}: must be a solver or the name of one, got {type(spec).__name__}")
    solver.check(options)
    whole = [name for name in options if name in MODIFIERS]
    if whole:
        raise ValueError(f"{argument}: {whole[0]!r} is an option of the whole run, not of {solver.name} in it")
    return solver, partial(solver.formula, **options)


def value_of(text: str) -> Any:
    """``text`` as the boolean or number it looks like, or as it is."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _option(argument: str, text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{argument}: options must be NAME=VALUE, got {text!r}")
    return name.strip(), value_of(value.strip())
