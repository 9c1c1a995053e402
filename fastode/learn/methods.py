"""The methods that calibrate a solver on a model. ``TRAINERS`` is the one list that the command line and ``best`` go by.

A trainer is ``train(denoiser, *, solver, nfe, options, guidance_scale, class_labels, samples, seed, teacher, save,
progress, minutes, **own) -> Artifact``:

* ``solver``, ``nfe``, ``options``: the base solver, a key of ``SOLVERS``, with exactly this many evaluations;
* ``guidance_scale``, ``class_labels``: the condition it is calibrated under, see :class:`~fastode.learn.teacher.Teacher`;
* ``samples``: trajectories to learn from, with the seeds ``training_seeds(samples, seed)``;
* ``teacher``: a :class:`Teacher` to share (its trajectories are made once for several calibrations), or None;
* ``save(artifact)`` receives the last good state however the run ends; ``progress`` shows a bar; ``minutes`` bounds the time.

It raises ``ValueError`` for what it cannot do before anything is computed, ``FloatingPointError`` when a number stops being
finite. Whatever else it takes has a default and is named in its docstring.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from fastode.artifact import Artifact
from fastode.learn import amed, best, d_ode, dc, gits, ld3, steps, table, v3

TRAINERS: dict[str, Callable[..., Artifact]] = {
    "steps": steps.train,
    "gits": gits.train,
    "dc": dc.train,
    "d_ode": d_ode.train,
    "amed": amed.train,
    "v3": v3.train,
    "ld3": ld3.train,
    "table": table.train,
    "best": best.train,
}

COMMON = frozenset(
    (
        "solver", "nfe", "options", "guidance_scale", "class_labels", "samples", "seed", "teacher", "save", "progress",
        "minutes",
    )
)  # fmt: skip
"""Keyword arguments that every trainer takes."""


def settings(method: str) -> dict[str, Any]:
    """The method's own keyword arguments with their defaults."""
    parameters = list(inspect.signature(trainer(method)).parameters.values())[1:]
    return {p.name: p.default for p in parameters if p.name not in COMMON}


def trainer(method: str) -> Callable[..., Artifact]:
    if method not in TRAINERS:
        raise ValueError(f"method: must be one of {', '.join(TRAINERS)}, got {method!r}")
    return TRAINERS[method]
