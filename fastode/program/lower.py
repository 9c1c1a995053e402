"""From a program to what a backend executes: one small table between two network calls, over few buffers.

Lowering does four things.

1. *Folding.* c_skip, c_out, c_in and guidance are linear, so a denoised estimate is replaced by the state it was made from
   and the raw network outputs: ``D = c_skip x + c_out sum_g w_g F_g``. The next network input ``c_in x`` becomes a row.
2. *Buffers.* Values that live at the same time get different slots; a slot is reused as soon as its value has been read
   for the last time, also by a value written in the same update, which is safe because an update reads an element in full
   before it writes it. A state that is only needed next to the network call it was made for has no slot at all: it is read
   back from the network input, divided by c_in (unless the network's dtype is narrower than the state's).
3. *Numbers of the run.* Norms that the run measures become rows like any other; which updates wait for which numbers
   is known beforehand.
4. *Packing.* All shared weights go, in float64 until the last moment, into one flat table; per-sample and per-element
   weights lie beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from torch import Tensor

from fastode.program.bind import Bind
from fastode.program.form import Atom, Form
from fastode.program.program import Program, Stage
from fastode.scalar import Late, Scalar
from fastode.schedules.grid import Level

Kind = Literal["shared", "sample", "element"]
Norms = list[list[tuple[Bind, list[Form]]]]
"""For each update, the binds before it and the rows whose norms they need."""


@dataclass(frozen=True)
class Source:
    """A column of an update: a slot, the caller's start, the current network input, a network output, a draw, or 1."""

    kind: Literal["slot", "start", "input", "output", "noise", "one"]
    index: int = 0


@dataclass(frozen=True)
class Target:
    """A row of an update: a slot, the next network input, or the result; of a measurement: a norm per sample."""

    kind: Literal["slot", "input", "result", "norm"]
    index: int = 0


@dataclass(frozen=True, eq=False)
class Update:
    """One launch: every target becomes a weighted sum of the sources. ``entries``: [targets][sources]."""

    sources: tuple[Source, ...]
    targets: tuple[Target, ...]
    entries: tuple[tuple[Scalar, ...], ...]

    @cached_property
    def kind(self) -> Kind:
        """The widest coefficient in the update; late numbers may turn out per sample."""
        kinds = {_kind(c) for row in self.entries for c in row}
        return "element" if "element" in kinds else "sample" if "sample" in kinds else "shared"

    @cached_property
    def late(self) -> frozenset[Late]:
        """The late numbers in the update."""
        return frozenset().union(*(c.leaves() for row in self.entries for c in row if isinstance(c, Late)))


@dataclass(frozen=True, eq=False)
class Call:
    """One network call: what it is told, how many outputs it gives (2 under guidance), and where the state it evaluates can
    be read: in a slot, or in the network input, divided by c_in. ``features``: named outputs it is asked for besides.
    ``due``: the update before which ``c_noise`` becomes known, 0 for the start of the run."""

    c_noise: Scalar
    outputs: int
    stage: Stage
    point: Source
    features: tuple[str, ...] = ()
    due: int = 0


@dataclass(frozen=True, eq=False)
class Measured:
    """A :class:`Bind` lowered: ``norms`` are rows to be measured before update ``stage + 1``, or None if there are none."""

    bind: Bind
    norms: Update | None


@dataclass(frozen=True, eq=False)
class Lowered:
    """``updates[0]`` prepares the first network input; then call i is followed by ``updates[i + 1]``.

    ``slots`` state-sized buffers suffice, besides the network's own input and output. ``states[value]`` tells in which slot
    a watched value ends up. ``binds[u]``: numbers made just before update u. ``due[u]``: the update before which all numbers
    of update u are known; 0: when the call begins.
    """

    program: Program
    updates: tuple[Update, ...]
    calls: tuple[Call, ...]
    slots: int
    states: dict[int, Source]
    binds: tuple[tuple[Measured, ...], ...]
    due: tuple[int, ...]

    @cached_property
    def late(self) -> frozenset[Late]:
        """The late numbers that come with the call."""
        found: set[Late] = set()
        for update in self.updates:
            found |= update.late
        for norms in self.measured:
            found |= norms.late
        for call in self.calls:
            if isinstance(call.c_noise, Late):
                found |= call.c_noise.leaves()
        return frozenset(found - self.program.made.keys())

    @cached_property
    def measured(self) -> tuple[Update, ...]:
        """All rows whose norms the run measures."""
        return tuple(m.norms for group in self.binds for m in group if m.norms is not None)

    def due_of(self, update: Update) -> int:
        """The update before which all numbers of ``update`` (or of measured rows) are known."""
        return _due(self.program, update.late)

    @property
    def traffic(self) -> int:
        """State-sized transfers of all updates together: what a memory-bound update costs."""
        moving = {"slot", "start", "input", "output"}
        return sum(sum(s.kind in moving for s in u.sources) + len(u.targets) for u in self.updates)


def lower(
    program: Program,
    scaling: Callable[[Level], Any],
    columns: Callable[[Level], tuple[Scalar, ...]],
    *,
    folded: bool = True,
    exact_input: bool = True,
    watch: Collection[int] = (),
) -> Lowered:
    """Lower ``program`` for a denoiser.

    ``scaling(level)`` gives c_skip, c_out, c_in, c_noise; ``columns(level)`` the weights of the network outputs.
    ``folded=False``: the backend is handed denoised estimates (nonlinear denoisers), so only c_in is applied.
    ``exact_input``: the network input keeps the state's precision, so that the state can be read back from it.
    ``watch``: values that must survive to the end of the run (states of a trajectory).
    """
    scalings = [scaling(stage.level) for stage in program.stages]
    forms, norms = _fold(program, scalings, columns, folded)
    live = _live(program, forms, norms, watch)
    reads = _reads(program, forms, norms, live, folded)
    in_slot = {
        value
        for value in live
        if value in watch or any(_needs_slot(value, u, program, scalings, exact_input) for u in reads.get(value, ()))
    }
    slot_of: dict[int, int] = {}
    free: list[int] = []
    count = 0
    states: dict[int, Source] = {}
    updates: list[Update] = []
    points: list[Source] = []
    binds: list[tuple[Measured, ...]] = []
    n = len(program.stages)
    for u in range(n + 1):
        rows = {v: f for v, f in forms[u].items() if v in live}
        net_value = program.stages[u - 1].net_in if u else None
        c_in: Any = scalings[u - 1].c_in if u else None
        # What each value is read from during this update.
        source_of: dict[int, tuple[Source, Scalar]] = {v: (Source("slot", s), 1.0) for v, s in slot_of.items()}
        if u == 0:
            source_of[0] = (Source("start"), 1.0)
        elif net_value is not None and net_value not in slot_of:
            source_of[net_value] = (Source("input"), 1.0 if _is_one(c_in) else 1 / c_in)
        binds.append(tuple(_measured(bind, rows_of, source_of) for bind, rows_of in norms[u]))

        targets: list[tuple[Target, Form]] = []
        released = [v for v in slot_of if max(reads.get(v, {-1})) <= u and v not in watch]
        for v in released:
            free.append(slot_of.pop(v))
        if u == 0 and 0 in in_slot:
            rows = {0: Form({Atom("value", 0): 1.0}), **rows}
        for v, form in rows.items():
            if v in in_slot:
                if free:
                    slot = free.pop()
                else:
                    slot, count = count, count + 1
                slot_of[v] = slot
                targets.append((Target("slot", slot), form))
                if v in watch:
                    states[v] = Source("slot", slot)
        if u < n:
            point = program.stages[u].net_in
            form = rows.get(point, Form({Atom("value", point): 1.0}))
            targets.append((Target("input"), form if _is_one(scalings[u].c_in) else form * scalings[u].c_in))
            points.append(Source("slot", slot_of[point]) if point in slot_of else Source("input"))
        if program.result in rows:
            targets.append((Target("result"), rows[program.result]))
        elif u == n and program.result not in {v for f in forms for v in f}:
            targets.append((Target("result"), Form({Atom("value", program.result): 1.0})))
        updates.append(_assemble(targets, source_of))
    calls = tuple(
        Call(
            c_noise=s.c_noise,
            outputs=len(columns(stage.level)),
            stage=stage,
            point=point,
            features=tuple(name for name in stage.outputs if name != "denoised"),
            due=_due(program, s.c_noise.leaves() if isinstance(s.c_noise, Late) else ()),
        )
        for s, stage, point in zip(scalings, program.stages, points, strict=True)
    )
    due = tuple(_due(program, update.late) for update in updates)
    return Lowered(program, tuple(updates), calls, count, states, tuple(binds), due)


def _due(program: Program, lates: Iterable[Late]) -> int:
    """The update before which all of ``lates`` are known."""
    return max((program.made.get(late, -1) + 1 for late in lates), default=0)


def _measured(bind: Bind, rows: list[Form], source_of: dict[int, tuple[Source, Scalar]]) -> Measured:
    targets = [(Target("norm", i), form) for i, form in enumerate(rows)]
    return Measured(bind, _assemble(targets, source_of) if targets else None)


def _fold(
    program: Program, scalings: list[Any], columns: Callable[[Level], tuple[Scalar, ...]], folded: bool
) -> tuple[list[dict[int, Form]], Norms]:
    """Rows of each update over values, raw outputs, draws and 1; and the norms measured before it, likewise."""
    norms: Norms = [[]]
    forms: list[dict[int, Form]] = [dict(program.init.rows())]
    for stage, s in zip(program.stages, scalings, strict=True):
        denoised = Atom("output", stage.index, "denoised")
        raw: dict[Atom, Scalar] = {Atom("output", stage.index, "raw0"): 1.0}
        if folded:
            raw = {Atom("output", stage.index, f"raw{g}"): s.c_out * w for g, w in enumerate(columns(stage.level))}
        estimate = Form(raw) + (Form({Atom("value", stage.net_in): s.c_skip}) if folded else Form({}))
        forms.append({v: form.substitute(denoised, estimate) for v, form in stage.table.rows()})
        here = [bind for bind in program.binds if bind.stage == stage.index]
        norms.append([(bind, [form.substitute(denoised, estimate) for form in bind.norms]) for bind in here])
    return forms, norms


def _live(program: Program, forms: list[dict[int, Form]], norms: Norms, watch: Collection[int]) -> set[int]:
    """Values that something needs: the result, watched states, network inputs, norms, and what those are made of."""
    live = {program.result, *watch, *(s.net_in for s in program.stages)}
    live |= {a.index for group in norms for _, rows in group for f in rows for a in f.terms if a.kind == "value"}
    for rows in reversed(forms):
        for v in [v for v in rows if v in live]:
            live |= {a.index for a in rows[v].terms if a.kind == "value"}
    return live


def _reads(
    program: Program, forms: list[dict[int, Form]], norms: Norms, live: set[int], folded: bool
) -> dict[int, set[int]]:
    """value -> updates that read it (as a column; the network input made from it counts in the update that makes it).

    An unfolded denoised estimate is assembled from the state just before the update, so the state must last until then.
    """
    reads: dict[int, set[int]] = {}
    for u, rows in enumerate(forms):
        for v, form in rows.items():
            if v in live:
                for atom in form.terms:
                    if atom.kind == "value":
                        reads.setdefault(atom.index, set()).add(u)
        for atom in (atom for _, rows_of in norms[u] for form in rows_of for atom in form.terms):
            if atom.kind == "value":
                reads.setdefault(atom.index, set()).add(u)
        if u and not folded:
            reads.setdefault(program.stages[u - 1].net_in, set()).add(u)
        if u < len(program.stages) and program.stages[u].net_in not in rows:
            reads.setdefault(program.stages[u].net_in, set()).add(u)
    written = {v for rows in forms for v in rows}
    if program.result not in written:
        reads.setdefault(program.result, set()).add(len(forms) - 1)
    return reads


def _needs_slot(value: int, update: int, program: Program, scalings: list[Any], exact_input: bool) -> bool:
    """Whether ``update`` must read ``value`` from a slot. The start is at hand in update 0; the state that was just
    evaluated can be read back from the network input, if nothing was rounded."""
    if update == 0:
        return False
    stage, c_in = program.stages[update - 1], scalings[update - 1].c_in
    return stage.net_in != value or not exact_input or (isinstance(c_in, (int, float)) and c_in == 0)


def _assemble(targets: list[tuple[Target, Form]], source_of: dict[int, tuple[Source, Scalar]]) -> Update:
    order = {"slot": 0, "start": 1, "input": 2, "output": 3, "noise": 4, "one": 5}
    rows: list[dict[Source, Scalar]] = []
    for _, form in targets:
        row: dict[Source, Scalar] = {}
        for atom, c in form.terms.items():
            if atom.kind == "value":
                source, factor = source_of[atom.index]
                c = c if _is_one(factor) else c * factor
            elif atom.kind == "output":
                source = Source("output", int(atom.name.removeprefix("raw")))
            else:
                source = Source(atom.kind, atom.index)
            row[source] = row[source] + c if source in row else c
        rows.append(row)
    sources = sorted({s for row in rows for s in row}, key=lambda s: (order[s.kind], s.index))
    entries = tuple(tuple(row.get(s, 0.0) for s in sources) for row in rows)
    return Update(tuple(sources), tuple(t for t, _ in targets), entries)


def _is_one(c: Any) -> bool:
    return isinstance(c, (int, float)) and c == 1


def _kind(c: Scalar) -> Kind:
    if isinstance(c, Late):
        return "sample"
    return "element" if isinstance(c, Tensor) and c.ndim else "shared"
