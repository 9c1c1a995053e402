"""What a solver compiles to: a frozen table of numbers that any backend can execute.

A :class:`Program` is a list of stages. Each stage evaluates the denoiser once, at a stored value, and then writes a few
new values, every one a weighted sum of stored values, of the outputs of that evaluation, of fresh normal draws and of the
constant 1::

    for stage in program.stages:
        outputs = denoiser(values[stage.net_in], stage.level)
        numbers made in the run (``binds``) become known
        values[stage.table.writes] = stage.table @ [*values, *outputs, *noise, one]

Values are written once (value 0 is the state at the first level). Which buffers they live in is decided in
:mod:`fastode.program.lower`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastode.files import write_tensors
from fastode.program.bind import Bind
from fastode.program.form import Atom, Form
from fastode.scalar import Late, Scalar, finite, show
from fastode.schedules.grid import Grid, Level

FORMAT = "fastode-program-1"


@dataclass(frozen=True, eq=False)
class Table:
    """Rows of weights: value ``writes[i]`` becomes ``sum_j entries[i][j] * columns[j]``.

    Raises ``ValueError`` if the entries do not match, or a known entry is not finite.
    """

    writes: tuple[int, ...]
    columns: tuple[Atom, ...]
    entries: tuple[tuple[Scalar, ...], ...]

    def __post_init__(self) -> None:
        if len(set(self.writes)) != len(self.writes):
            raise ValueError(f"writes: value ids must be distinct, got {self.writes}")
        if len(set(self.columns)) != len(self.columns):
            raise ValueError("columns: a table reads each column once")
        if len(self.entries) != len(self.writes) or any(len(row) != len(self.columns) for row in self.entries):
            raise ValueError(
                f"entries: need {len(self.writes)} rows of {len(self.columns)} numbers, got rows of "
                f"{[len(row) for row in self.entries]}"
            )
        for write, row in zip(self.writes, self.entries, strict=True):
            for column, c in zip(self.columns, row, strict=True):
                if not finite(c):
                    raise ValueError(f"entries: the weight of {column} in x{write} is not finite ({show(c)})")

    @classmethod
    def of(cls, rows: Mapping[int, Form]) -> Table:
        """The table of some rows; columns in the order values, outputs, noise, one."""
        order = {"value": 0, "output": 1, "noise": 2, "one": 3}
        atoms = {atom for form in rows.values() for atom in form.terms}
        columns = tuple(sorted(atoms, key=lambda a: (order[a.kind], a.index, a.name)))
        entries = tuple(tuple(form.terms.get(a, 0.0) for a in columns) for form in rows.values())
        return cls(tuple(rows), columns, entries)

    def rows(self) -> Iterator[tuple[int, Form]]:
        for write, row in zip(self.writes, self.entries, strict=True):
            yield write, Form(dict(zip(self.columns, row, strict=True)))

    @cached_property
    def shape(self) -> tuple[int, int]:
        return len(self.writes), len(self.columns)

    def matrix(self) -> Tensor:
        """Entries as a float64 matrix [rows, columns]; only for tables of shared, known numbers."""
        for row in self.entries:
            for c in row:
                if isinstance(c, Late) or (isinstance(c, Tensor) and c.ndim):
                    raise ValueError(f"entries: {show(c)} is not a single known number, so this table is no matrix")
        rows = [torch.stack([torch.as_tensor(c, dtype=torch.float64) for c in row]) for row in self.entries if row]
        return torch.stack(rows) if rows else torch.zeros(self.shape, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Stage:
    """One evaluation of the denoiser at value ``net_in`` on ``level``, and the update that follows it.

    ``step`` is the index of the grid level the solver had reached when it asked for this evaluation.
    """

    index: int
    net_in: int
    level: Level
    step: int
    table: Table
    outputs: tuple[str, ...] = ("denoised",)


@dataclass(frozen=True, eq=False)
class Unrolled:
    """One value as a sum over what enters a run: the start, every evaluation, every draw, and a constant."""

    start: Scalar
    outputs: tuple[Scalar, ...]
    noise: tuple[Scalar, ...]
    constant: Scalar

    def weights(self) -> Tensor:
        """Weights of the evaluations, float64 [NFE] (or [NFE, *sample] where coefficients are per element)."""
        return torch.stack([torch.as_tensor(w, dtype=torch.float64) for w in self.outputs])


@dataclass(frozen=True, eq=False)
class Program:
    """A compiled solver. Immutable; safe to share between threads.

    ``init`` writes values before the first evaluation (often none); ``result`` is the value returned; ``states[i]`` is the
    value that holds the state at grid level i. ``draws`` counts the standard normal draws. ``binds`` say where the late
    numbers come from that the run makes itself.

    Construction checks that nothing is read before it is written, that each stage reads only its own outputs, and, unless
    ``consistent`` is False, that the table is exact when the data set is a single point: states at level t are then
    ``alpha_t mu + sigma_t n`` (in law, where noise is injected).
    """

    grid: Grid
    init: Table
    stages: tuple[Stage, ...]
    result: int
    states: tuple[int, ...]
    draws: int = 0
    name: str = "program"
    consistent: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)
    binds: tuple[Bind, ...] = ()

    def __post_init__(self) -> None:
        self._check_binds()
        written = {0, *self.init.writes}
        self._check_columns(self.init, {0}, None)
        for stage in self.stages:
            if stage.net_in not in written:
                raise ValueError(f"stage {stage.index}: evaluates x{stage.net_in}, which is not written yet")
            again = written & set(stage.table.writes)
            if again:
                raise ValueError(f"stage {stage.index}: writes x{min(again)} a second time")
            self._check_columns(stage.table, written, stage)
            written |= set(stage.table.writes)
        for name, values in (("result", (self.result,)), ("states", self.states)):
            missing = set(values) - written
            if missing:
                raise ValueError(f"{name}: x{min(missing)} is never written")
        if len(self.states) != len(self.grid):
            raise ValueError(f"states: need one value for each of {len(self.grid)} levels, got {len(self.states)}")
        if self.consistent:
            defect = self.defect()
            if defect > 1e-8:
                raise ValueError(
                    f"{self.name}: this table is not exact on a single data point (relative defect {defect:.2e}); a weight "
                    "is wrong, or the program should be declared consistent=False"
                )

    def _check_binds(self) -> None:
        made = self.made
        for where, stage, numbers in self._numbers():
            for late in set().union(*(c.leaves() for c in numbers if isinstance(c, Late))):
                if made.get(late, -1) > stage:
                    raise ValueError(f"{where}: uses {late.name!r}, which is made only after evaluation {made[late]}")
        for bind in self.binds:
            names = ", ".join(late.name for late in bind.lates)
            if not 0 <= bind.stage < len(self.stages):
                raise ValueError(f"{names}: made after evaluation {bind.stage} of {len(self.stages)}")
            missing = sorted(set(bind.outputs) - set(self.stages[bind.stage].outputs))
            if missing:
                raise ValueError(f"{names}: evaluation {bind.stage} does not ask for the output {missing[0]!r}")

    def _numbers(self) -> Iterator[tuple[str, int, list[Scalar]]]:
        """(where, the evaluation after which they are used, numbers) of all tables, norms and levels."""
        yield "init", -1, [c for row in self.init.entries for c in row]
        for stage in self.stages:
            yield f"stage {stage.index}", stage.index - 1, [stage.level.alpha, stage.level.sigma]
            yield f"stage {stage.index}", stage.index, [c for row in stage.table.entries for c in row]
        for bind in self.binds:
            yield bind.lates[0].name, bind.stage - 1, [c for form in bind.norms for c in form.terms.values()]

    def _check_columns(self, table: Table, written: set[int], stage: Stage | None) -> None:
        where = "init" if stage is None else f"stage {stage.index}"
        for atom in table.columns:
            if atom.kind == "value" and atom.index not in written:
                raise ValueError(f"{where}: reads x{atom.index}, which is not written yet")
            if atom.kind == "output" and (stage is None or atom.index != stage.index or atom.name not in stage.outputs):
                raise ValueError(f"{where}: reads {atom}, an output of another evaluation")
            if atom.kind == "noise" and not 0 <= atom.index < self.draws:
                raise ValueError(f"{where}: reads draw {atom.index} of {self.draws}")

    @property
    def nfe(self) -> int:
        """Network evaluations per sample, counted the field's way (guidance by a second call is not counted twice)."""
        return len(self.stages)

    @cached_property
    def sigmas(self) -> Tensor:
        """EDM-frame noise level of every network call in order, float64 [NFE]; NaN where it is known only in the run."""
        rho = [s.level.rho for s in self.stages]
        return torch.tensor([math.nan if isinstance(r, Late) else _number_of(r) for r in rho], dtype=torch.float64)

    @cached_property
    def made(self) -> Mapping[Late, int]:
        """The late numbers that the run makes itself, with the evaluation that each is made after."""
        return {late: bind.stage for bind in self.binds for late in bind.lates}

    @cached_property
    def late(self) -> frozenset[Late]:
        """The late numbers this program needs from the caller."""
        found: set[Late] = set()
        for _, _, numbers in self._numbers():
            found.update(*(c.leaves() for c in numbers if isinstance(c, Late)))
        return frozenset(found - self.made.keys())

    def unroll(self, level: int | None = None) -> Unrolled:
        """The final sample (or the state at grid ``level``) as a weighted sum of everything that entered the run.

        This is what a solver *is* once its evaluations are given; step optimisation minimises norms of these weights.
        """
        target = self.result if level is None else self.states[level]
        forms: dict[int, Form] = {0: Form({Atom("value", 0): 1.0})}
        for table in (self.init, *(s.table for s in self.stages)):
            new = {}
            for write, form in table.rows():
                for atom in [a for a in form.terms if a.kind == "value"]:
                    if atom.index:
                        form = form.substitute(atom, forms[atom.index])
                new[write] = form
            forms |= new
            if target in forms:
                break
        terms = forms[target].terms

        def weight(kind: str, index: int) -> Scalar:
            found = [c for a, c in terms.items() if a.kind == kind and a.index == index]
            return found[0] if found else 0.0

        return Unrolled(
            start=weight("value", 0),
            outputs=tuple(weight("output", s.index) for s in self.stages),
            noise=tuple(weight("noise", k) for k in range(self.draws)),
            constant=weight("one", 0),
        )

    def defect(self) -> float:
        """Largest relative error over all states and evaluated points when the data set is one point, beyond rounding.

        0 for programs with late or per-element numbers, which cannot be judged beforehand.
        """
        if (
            self.late
            or self.binds
            or any(isinstance(c, Tensor) and c.ndim for s in self.stages for r in s.table.entries for c in r)
        ):
            return 0.0
        number = _number_of
        start = self.grid[0]
        signal, noise = {0: number(start.alpha)}, {0: number(start.sigma)}
        fresh: dict[int, dict[int, float]] = {0: {}}
        slack = {0: 0.0}  # running bound of rounding errors: a table that cancels 80 against 0.002 is not thereby wrong
        for table in (self.init, *(s.table for s in self.stages)):
            for write, form in table.rows():
                signal[write] = noise[write] = slack[write] = 0.0
                fresh[write] = {}
                for atom, c in form.terms.items():
                    w = number(c)
                    if atom.kind == "value":
                        signal[write] += w * signal[atom.index]
                        noise[write] += w * noise[atom.index]
                        size = abs(signal[atom.index]) + abs(noise[atom.index])
                        slack[write] += abs(w) * (slack[atom.index] + 1e-14 * size)
                        for k, v in fresh[atom.index].items():
                            fresh[write][k] = fresh[write].get(k, 0.0) + w * v
                    elif atom.kind == "output":
                        signal[write] += w
                        slack[write] += 1e-14 * abs(w)
                    elif atom.kind == "noise":
                        fresh[write][atom.index] = fresh[write].get(atom.index, 0.0) + w
        worst = 0.0
        evaluated = [(stage.level, stage.net_in) for stage in self.stages]
        for level, value in [*zip(self.grid, self.states, strict=True), *evaluated]:
            spread = math.hypot(noise[value], *fresh[value].values())
            alpha, sigma = number(level.alpha), number(level.sigma)
            size = math.hypot(alpha, sigma)
            error = max(abs(signal[value] - alpha), abs(spread - sigma))
            worst = max(worst, (error - slack[value]) / size)
        return worst

    def describe(self) -> str:
        """The program as straight-line formulas, one line per value."""
        lines = [f"# {self.name}: {self.nfe} evaluations, {self.grid.steps} steps"]
        marks = {
            value: f"sigma/alpha {_number(level.rho)}" for level, value in zip(self.grid, self.states, strict=True)
        }
        if 0 in marks:
            lines.append(f"x0 = start{'':<24}# {marks[0]}")
        lines += self._rows(self.init, marks)
        for stage in self.stages:
            names = ", ".join(str(Atom("output", stage.index, n)) for n in stage.outputs)
            lines.append(f"{names} = denoise(x{stage.net_in}, sigma={_number(stage.level.rho)})")
            for bind in (b for b in self.binds if b.stage == stage.index):
                inputs = [
                    *(str(Atom("output", stage.index, n)) for n in bind.outputs),
                    *(f"|{f!r}|" for f in bind.norms),
                ]
                name = "" if bind.function is None else getattr(bind.function, "name", type(bind.function).__name__)
                made = ", ".join(late.name for late in bind.lates)
                lines.append(f"{made} = {name}({', '.join(inputs)})" if name else f"{made} = {', '.join(inputs)}")
            lines += self._rows(stage.table, marks)
        lines.append(f"return x{self.result}")
        return "\n".join(lines)

    @staticmethod
    def _rows(table: Table, marks: Mapping[int, str]) -> list[str]:
        rows = [(write, f"x{write} = {form!r}") for write, form in table.rows()]
        return [f"{text:<60}# {marks[write]}" if write in marks else text for write, text in rows]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file: the structure as JSON in its header, per-element weights as tensors.

        Raises ``ValueError`` for programs with late numbers, which are saved as artifacts of their method instead.
        """
        if self.late or self.binds:
            names = sorted(late.name for late in {*self.late, *self.made})
            raise ValueError(f"program: late coefficients {names} have no value to save")
        tensors: dict[str, Tensor] = {"sigmas": self.grid.sigmas.detach().contiguous()}

        def number(c: Scalar) -> Any:
            if isinstance(c, Tensor) and c.ndim:
                key = f"entry{len(tensors)}"
                tensors[key] = c.detach().contiguous()
                return key
            return _number_of(c)

        def table(t: Table) -> dict[str, Any]:
            columns = [[a.kind, a.index, a.name] for a in t.columns]
            return {"writes": t.writes, "columns": columns, "entries": [[number(c) for c in r] for r in t.entries]}

        header = {
            "format": FORMAT,
            "name": self.name,
            "grid": self.grid.to_dict(),
            "init": table(self.init),
            "stages": [
                {
                    "net_in": s.net_in,
                    "level": [float(s.level.alpha), float(s.level.sigma), _maybe(s.level.t), s.level.index],
                    "step": s.step,
                    "outputs": s.outputs,
                    "table": table(s.table),
                }
                for s in self.stages
            ],
            "result": self.result,
            "states": self.states,
            "draws": self.draws,
            "consistent": self.consistent,
            "options": {k: v for k, v in self.options.items() if isinstance(v, (str, int, float, bool, type(None)))},
        }
        write_tensors(path, tensors, {"fastode": json.dumps(header)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Program:
        """Read what :meth:`save` wrote; checks it as construction does.

        Raises ``FileNotFoundError``, or ``ValueError`` when the file is not a program or is damaged.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).exists():
            raise FileNotFoundError(f"program: {path} does not exist")
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            header = json.loads(metadata["fastode"])
            if header["format"] != FORMAT:
                raise ValueError(f"format {header['format']!r} is not {FORMAT!r}")
            return cls._from_header(header, tensors)
        except (SafetensorError, KeyError, TypeError, IndexError, ValueError, OSError) as error:
            raise ValueError(f"program: {path} is not a fastode program or is damaged ({error})") from error

    @classmethod
    def _from_header(cls, header: dict[str, Any], tensors: Mapping[str, Tensor]) -> Program:
        def table(t: dict[str, Any]) -> Table:
            columns = tuple(Atom(kind, index, name) for kind, index, name in t["columns"])
            entries = tuple(tuple(tensors[c] if isinstance(c, str) else float(c) for c in row) for row in t["entries"])
            return Table(tuple(t["writes"]), columns, entries)

        g = header["grid"]
        return cls(
            grid=Grid(g["sigma"], g["alpha"], g["t"], name=g["name"]),
            init=table(header["init"]),
            stages=tuple(
                Stage(i, s["net_in"], Level(*s["level"]), s["step"], table(s["table"]), tuple(s["outputs"]))
                for i, s in enumerate(header["stages"])
            ),
            result=header["result"],
            states=tuple(header["states"]),
            draws=header["draws"],
            name=header["name"],
            consistent=header["consistent"],
            options=header["options"],
        )


def _number_of(value: Any) -> float:
    """A known shared number as a float, whether or not it carries a gradient."""
    return float(value.detach()) if isinstance(value, Tensor) else float(value)


def _number(value: Any) -> str:
    return show(value) if isinstance(value, Late) else f"{_number_of(value):.6g}"


def _maybe(value: Any) -> float | None:
    return None if value is None or isinstance(value, Late) else float(value)
