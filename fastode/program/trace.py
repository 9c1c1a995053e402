"""What a solver writes to: it performs the solver's arithmetic on linear forms and records the tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from fastode.program.bind import Bind
from fastode.program.form import ONE, Atom, Form
from fastode.program.program import Program, Stage, Table
from fastode.scalar import Late
from fastode.schedules.grid import Grid, Level


class Past(NamedTuple):
    """An evaluation at a grid level: the level, the state there, its denoised estimate, and how many draws came before."""

    level: Level
    state: Form
    denoised: Form
    draws: int


class Trace:
    """One recording of a solver on ``grid``.

    ``start`` gives the state at the first level, ``denoise`` the denoised estimate at a point, ``land`` declares the state
    at a grid level, ``keep`` stores a form that later steps need (a noise prediction in a multistep history, say), ``noise``
    is a fresh standard normal draw. Outputs may be used in later steps as they are; they are stored if they are.
    ``late`` and ``norm`` give numbers that the run makes from the evaluation just requested.

    ``afs=True`` answers the first request for a denoised estimate with the analytical first step instead of the network:
    far from the data the network would return ``x`` shrunk to unit variance, i.e. noise ``x / sqrt(1 + sigma^2)`` in the
    EDM frame (GENIE, arXiv:2210.05475; AMED, arXiv:2312.00094).
    """

    def __init__(self, grid: Grid, *, afs: bool = False) -> None:
        self.grid = self.whole = grid
        self.afs = afs
        self.consistent = not afs
        self._afs = afs
        self._forms: dict[int, Form] = {}  # value -> its definition
        self._made: dict[int, int] = {0: -2}  # value -> stage that writes it; the start precedes init (-1)
        self._points: list[tuple[int, Level, int, tuple[str, ...]]] = []
        self._states: dict[int, int] = {0: 0}
        self._evaluated: list[Past] = []
        self._draws = 0
        self._step = 0
        self._binds: list[Bind] = []

    def start(self) -> Form:
        """The state at the first level."""
        return Form({Atom("value", 0): 1.0})

    def one(self) -> Form:
        """The constant 1, for affine steps."""
        return Form({ONE: 1.0})

    def noise(self) -> Form:
        """A fresh standard normal draw of the sample's shape."""
        self._draws += 1
        return Form({Atom("noise", self._draws - 1): 1.0})

    def past(self, count: int, *, quiet: bool = False) -> list[Past]:
        """Up to ``count`` evaluations at earlier grid levels, newest first, that a multistep formula may start with.

        None at the start of a run. A formula that continues another one's run finds the other's (Sampler Scheduler).
        ``quiet``: only those since the last draw, after which earlier noise predictions are about noise that is gone.
        """
        return []

    def denoise(self, x: Form, level: Level) -> Form:
        """E[x_0 | x] at ``level``: one evaluation. ``x`` must be a state of that level's frame, alpha x_0 + sigma n.

        A learned table may tell the network another level than the state's own (AMED's and EPD's time factors): that level
        is given here, sets c_skip .. c_noise, and the program is declared ``consistent = False``.
        """
        if self._afs and not self._points:
            self._afs = False
            size = (level.alpha**2 + level.sigma**2) ** 0.5
            # x/alpha - (sigma/alpha) x/size = x alpha / (size (size + sigma)): the difference without cancellation.
            return x * (level.alpha / (size * (size + level.sigma)))
        index, value = len(self._points), self._value(x)
        self._points.append((value, level, self._step, ("denoised",)))
        denoised = Form({Atom("output", index, "denoised"): 1.0})
        if level.index is not None and self._states.get(level.index) == value:
            self._evaluated.append(Past(level, x, denoised, self._draws))
        return denoised

    def bind(
        self,
        lates: Sequence[Late],
        function: Callable[..., Any] | None,
        *,
        outputs: Sequence[str] = (),
        norms: Sequence[Form] = (),
    ) -> None:
        """``lates`` are made after the evaluation requested last, as ``function(*features, *norms)``; see :class:`Bind`.

        They may be used in every coefficient from that evaluation on, and for the levels of later ones. ``outputs`` names
        what the network must offer besides its output ("bottleneck"). Raises ``ValueError`` before the first evaluation.
        """
        if not self._points:
            names = ", ".join(late.name for late in lates)
            raise ValueError(f"{names}: nothing has been evaluated yet that they could be made from")
        stage = len(self._points) - 1
        x, level, step, offered = self._points[-1]
        self._points[-1] = (x, level, step, (*offered, *(name for name in outputs if name not in offered)))
        self._binds.append(Bind(stage, tuple(lates), function, tuple(outputs), tuple(norms)))

    def late(
        self,
        names: Sequence[str],
        function: Callable[..., Any] | None,
        *,
        outputs: Sequence[str] = (),
        norms: Sequence[Form] = (),
    ) -> tuple[Late, ...]:
        """New late numbers, named after the evaluation they are made after; see :meth:`bind`."""
        lates = tuple(Late(f"{name}{len(self._points) - 1}") for name in names)
        self.bind(lates, function, outputs=outputs, norms=norms)
        return lates

    def norm(self, form: Form) -> Late:
        """The Euclidean norm of ``form`` over the elements of each sample, a number per sample; see :meth:`late`."""
        return self.late(("norm",), None, norms=(form,))[0]

    def keep(self, form: Form) -> Form:
        """Store ``form`` as one value; later uses read the value instead of what it was made of."""
        atom = form.single()
        if atom is not None and atom.kind == "value":
            return form
        value = len(self._made)
        self._made[value] = len(self._points) - 1
        self._forms[value] = form
        return Form({Atom("value", value): 1.0})

    def land(self, form: Form, level: Level) -> Form:
        """``keep`` the state at a grid level. Landing again on a level replaces its state (a corrector does that)."""
        kept = self.keep(form)
        if level.index is not None:
            (atom,) = kept.terms
            self._states[level.index] = atom.index
            self._step = level.index
        return kept

    def inner(self, form: Form, level: Level) -> Form:
        """``keep`` a state that is evaluated on the way to the next grid level: a Runge-Kutta node, a predicted point."""
        return self.keep(form)

    def compensated(self, form: Form, level: Level) -> Form:
        """The output of the evaluation on ``level`` as a multistep solver steps with it and remembers it: ``form`` itself
        here, something else where a calibrated method corrects the history (DC-Solver)."""
        return form

    def program(self, x: Form, *, name: str = "program", options: Mapping[str, Any] | None = None) -> Program:
        """The finished program, returning ``x``."""
        result = self._value(x)
        missing = [i for i in range(len(self.grid)) if i not in self._states]
        if missing:
            raise ValueError(
                f"{name}: the solver never landed on grid level {missing[0]} (sigma {self.grid[missing[0]].rho})"
            )
        rows: dict[int, dict[int, Form]] = {stage: {} for stage in range(-1, len(self._points))}
        stored: dict[tuple[int, str], int] = {}
        for value, form in list(self._forms.items()):
            stage = self._made[value]
            rows[stage][value] = self._expand(form, stage, stored)
        binds = tuple(
            replace(bind, norms=tuple(self._expand(form, bind.stage, stored) for form in bind.norms))
            for bind in self._binds
        )
        for (stage, output), value in stored.items():
            rows[stage][value] = Form({Atom("output", stage, output): 1.0})
        stages = tuple(
            Stage(i, point, level, step, Table.of(rows[i]), outputs)
            for i, (point, level, step, outputs) in enumerate(self._points)
        )
        return Program(
            grid=self.grid,
            init=Table.of(rows[-1]),
            stages=stages,
            result=result,
            states=tuple(self._states[i] for i in range(len(self.grid))),
            draws=self._draws,
            name=name,
            consistent=self.consistent,
            options=dict(options or {}),
            binds=binds,
        )

    def _value(self, form: Form) -> int:
        (atom,) = self.keep(form).terms
        return atom.index

    def _expand(self, form: Form, stage: int, stored: dict[tuple[int, str], int]) -> Form:
        """Rewrite ``form`` so that it reads only what exists before ``stage`` writes, and outputs of ``stage`` itself."""
        while True:
            inline = next((a for a in form.terms if a.kind == "value" and self._made[a.index] == stage), None)
            if inline is None:
                break
            form = form.substitute(inline, self._forms[inline.index])
        for atom in [a for a in form.terms if a.kind == "output" and a.index != stage]:
            key = (atom.index, atom.name)
            if key not in stored:
                stored[key] = len(self._made)
                self._made[stored[key]] = atom.index
            form = form.substitute(atom, Form({Atom("value", stored[key]): 1.0}))
        return form
