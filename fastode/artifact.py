"""Learned solvers on disk: a safetensors file whose header says what it was learned for.

An :class:`Artifact` is everything that a solver calibrated on one model needs to be played again: the base solver and its
options, the grid, the learned numbers, and the model they belong to. ``METHODS`` says how the numbers of each method
become a program. Training is in :mod:`fastode.learn`; nothing here needs it.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastode.denoisers.base import Denoiser
from fastode.files import write_tensors
from fastode.program import Program
from fastode.schedules.grid import Grid
from fastode.schedules.noise import schedule_from_dict, schedule_to_dict
from fastode.solvers import SOLVERS, plugin
from fastode.solvers.d_ode import d_ode
from fastode.solvers.dc import dc
from fastode.solvers.dpm_solver_v3 import Statistics, dpm_solver_v3
from fastode.solvers.table import LearnedTable, retold

FORMAT = "fastode-artifact-1"


@dataclass(frozen=True, eq=False)
class Artifact:
    """A solver learned for one model on one grid. Immutable.

    ``method``: a key of ``METHODS``. ``solver``, ``options``: the base solver, a key of ``SOLVERS``, and its options
    (``afs`` among them). ``grid``: the levels it was learned on. ``numbers``: the learned tensors. ``model``: what it was
    learned for, see :func:`identity`. ``card``: how it was made (teacher, loss, settings, seconds, evaluations), as plain
    data for people; nothing in it changes a sample.

    Raises ``ValueError`` for a method or solver that is not known.
    """

    method: str
    solver: str
    grid: Grid
    numbers: Mapping[str, Tensor] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    card: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method: must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.solver not in SOLVERS:
            raise ValueError(f"solver: must be one of {', '.join(SOLVERS)}, got {self.solver!r}")

    def program(self) -> Program:
        """The learned solver as a program, ready for an :class:`~fastode.engine.Engine`."""
        return METHODS[self.method](self)

    @property
    def nfe(self) -> int:
        """Network evaluations per sample."""
        return self.program().nfe

    def check(self, denoiser: Denoiser, *, guidance_scale: Any = None) -> None:
        """Raise ``ValueError`` unless ``denoiser`` (and the guidance strength) is what this was learned for.

        Compared are those entries of ``model`` that were recorded: shape of a sample, prediction, schedule, weights.
        """
        here = identity(denoiser, guidance_scale=guidance_scale)
        for name, learned in self.model.items():
            if name in ("name",) or learned is None:
                continue
            if name not in here or here[name] != learned:
                raise ValueError(
                    f"solver: this {self.method} artifact was learned for {name} = {_short(learned)} "
                    f"({self.model.get('name', 'a model')}), {denoiser.name} has {_short(here.get(name))}"
                )
        weight = self.card.get("largest_weight")
        if weight is not None and denoiser.dtype is not None and weight * torch.finfo(denoiser.dtype).eps > 0.25:
            warnings.warn(
                f"solver: this {self.method} artifact multiplies network outputs by up to {weight:.3g}, too much for their "
                f"rounding in {denoiser.dtype}; use a wider network dtype, a lower order, or more steps",
                RuntimeWarning,
                stacklevel=2,
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file with the card in its header; it appears whole or not at all."""
        header = {
            "format": FORMAT,
            "method": self.method,
            "solver": self.solver,
            "options": dict(self.options),
            "grid": {**self.grid.to_dict(), "schedule": schedule_to_dict(self.grid.schedule)},
            "model": dict(self.model),
            "card": dict(self.card),
        }
        tensors = dict(self.numbers) or {"none": torch.zeros(0)}
        write_tensors(path, tensors, {"fastode": json.dumps(header, default=_plain)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Artifact:
        """Read what :meth:`save` wrote. Raises ``FileNotFoundError``, or ``ValueError`` for a foreign or damaged file."""
        from safetensors import SafetensorError, safe_open

        if not Path(path).exists():
            raise FileNotFoundError(f"solver: {path} does not exist")
        try:
            with safe_open(str(path), framework="pt") as file:
                header = json.loads((file.metadata() or {})["fastode"])
                if header["format"] != FORMAT:
                    raise ValueError(f"format {header['format']!r} is not {FORMAT!r}")
                numbers = {key: file.get_tensor(key) for key in file.keys() if key != "none"}  # noqa: SIM118
            g = header["grid"]
            grid = Grid(g["sigma"], g["alpha"], g["t"], schedule_from_dict(g["schedule"]), g["name"])
            kept = {name: header[name] for name in ("method", "solver", "options", "model", "card")}
            return cls(grid=grid, numbers=numbers, **kept)
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            raise ValueError(f"solver: {path} is not a fastode artifact or is damaged ({error})") from error


def identity(denoiser: Denoiser, *, guidance_scale: Any = None) -> dict[str, Any]:
    """What tells one model from another: name, shape of a sample, prediction, schedule, guidance strength, and the
    hash of the weights (:func:`weights_hash`)."""
    return {
        "name": denoiser.name,
        "sample_shape": None if denoiser.sample_shape is None else list(denoiser.sample_shape),
        "prediction": denoiser.prediction,
        "schedule": json.loads(json.dumps(schedule_to_dict(denoiser.schedule))),
        "guidance_scale": None if guidance_scale is None else float(torch.as_tensor(guidance_scale).flatten()[0]),
        "weights": weights_hash(denoiser.network),
    }


def weights_hash(network: Any) -> str | None:
    """SHA-256 over names and values of a module's parameters and buffers, each rounded to bfloat16, so that it is the
    same for a network cast to another dtype; None where there are none."""
    if not isinstance(network, nn.Module):
        return None
    digest, found = hashlib.sha256(), False
    for name, value in sorted(network.state_dict().items()):
        found = True
        digest.update(f"{name} {tuple(value.shape)} ".encode())
        number = value.detach().to("cpu")
        number = number.to(torch.bfloat16).view(torch.int16) if number.is_floating_point() else number
        digest.update(number.contiguous().numpy().tobytes())
    return digest.hexdigest() if found else None


def _grid(artifact: Artifact) -> Program:
    """A learned placement of levels: the base solver on it, with levels told to the network where they were learned too."""
    program = SOLVERS[artifact.solver](artifact.grid, **artifact.options)
    return retold(program, artifact.numbers["told"]) if "told" in artifact.numbers else program


def _table(artifact: Artifact) -> Program:
    """A learned table, played as it is; the base solver is where it started."""
    table = LearnedTable.of_tensors(artifact.numbers)
    return table.program(artifact.grid, name=f"{artifact.solver} table", options=artifact.options)


def _amed(artifact: Artifact) -> Program:
    """AMED-Solver, or AMED plugged into the base solver, with the predictor that the numbers are."""
    from fastode.nets.predictor import from_numbers

    base = SOLVERS[artifact.solver]
    solver = base if base.name == "amed" else plugin(base)
    return solver(artifact.grid, predictor=from_numbers(artifact.numbers), **artifact.options)


def _dc(artifact: Artifact) -> Program:
    """Compensation ratios of DC-Solver: one per step, on any solver with a history."""
    return dc(SOLVERS[artifact.solver], artifact.grid, artifact.numbers["ratios"].tolist(), **artifact.options)


def _d_ode(artifact: Artifact) -> Program:
    """Lambdas of a D-ODE solver: one per state, on any solver that lands on each level once."""
    return d_ode(SOLVERS[artifact.solver], artifact.grid, artifact.numbers["lambdas"].tolist(), **artifact.options)


def _v3(artifact: Artifact) -> Program:
    """DPM-Solver-v3 with the statistics that the numbers are."""
    return dpm_solver_v3(artifact.grid, Statistics(**artifact.numbers), **artifact.options)


METHODS: dict[str, Callable[[Artifact], Program]] = {
    "grid": _grid,
    "amed": _amed,
    "dc": _dc,
    "d_ode": _d_ode,
    "dpm_solver_v3": _v3,
    "table": _table,
}
"""How the numbers of each method become a program."""


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else str(value)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
