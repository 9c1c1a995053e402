"""Late numbers as straight-line code: what a kernel executes instead of an expression in Python.

The weights of an update that waits for numbers of the run are expressions of them. :func:`compile_code` turns any number of
such expressions into one list of instructions over float64 registers, with common parts made once. The instructions
depend on the structure alone; all plain numbers lie in ``constants``, so another grid is other data for the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastode.scalar import OPERATIONS, Late, Moment, Scalar

UNARY = ("neg", "exp", "expm1", "sqrt", "log")
BINARY = ("add", "sub", "mul", "div", "pow")
MOMENTS = tuple(f"{kind}{k}" for kind in "JK" for k in range(4))
"""J_k and K_k, k < 4: :class:`~fastode.scalar.Moment` with sign -1 and +1."""
OPS = (*UNARY, *BINARY, *MOMENTS)


@dataclass(frozen=True)
class Code:
    """Registers are numbered: ``inputs``, then ``constants``, then one per instruction (op, a, b), which reads earlier ones
    (unary operations have b = a). ``outputs[k]`` is the register of expression k."""

    inputs: tuple[Late, ...]
    constants: tuple[float, ...]
    instructions: tuple[tuple[str, int, int], ...]
    outputs: tuple[int, ...]

    @cached_property
    def registers(self) -> int:
        return len(self.inputs) + len(self.constants) + len(self.instructions)

    def run(self, values: Sequence[Tensor]) -> list[Tensor]:
        """The definition: expressions from the float64 values of ``inputs``."""
        like = values[0]
        registers: list[Tensor] = [*values, *(torch.full_like(like, c) for c in self.constants)]
        for op, a, b in self.instructions:
            registers.append(_play(op, registers[a], registers[b]))
        return [registers[k] for k in self.outputs]


def compile_code(expressions: Sequence[Scalar]) -> Code | None:
    """Code for ``expressions``, or None if one has a part that is not elementary (a schedule's table, say) or not one
    number per sample."""
    compiler = _Compiler()
    try:
        places = [compiler.place(e) for e in expressions]
    except _NotElementary:
        return None
    start = {"input": 0, "constant": len(compiler.inputs)}
    start["instruction"] = start["constant"] + len(compiler.constants)

    def register(place: tuple[str, int]) -> int:
        return start[place[0]] + place[1]

    instructions = tuple((op, register(a), register(b)) for op, a, b in compiler.instructions)
    constants = tuple(compiler.constants)
    return Code(tuple(compiler.inputs), constants, instructions, tuple(register(p) for p in places))


class _NotElementary(Exception):
    pass


Place = tuple[str, int]


class _Compiler:
    def __init__(self) -> None:
        self.inputs: list[Late] = []
        self.constants: list[float] = []
        self.instructions: list[tuple[str, Place, Place]] = []
        self._constant: dict[float, Place] = {}
        self._done: dict[int, Place] = {}  # by identity of the expression
        self._same: dict[tuple[str, Place, Place], Place] = {}

    def place(self, value: Any) -> Place:
        if not isinstance(value, Late):
            if isinstance(value, Tensor):
                if value.numel() > 1:
                    raise _NotElementary
                value = value.detach()
            number = float(value)
            if number not in self._constant:
                self._constant[number] = ("constant", len(self.constants))
                self.constants.append(number)
            return self._constant[number]
        if id(value) not in self._done:
            self._done[id(value)] = self._of(value)
        return self._done[id(value)]

    def _of(self, value: Late) -> Place:
        if value.function is None:
            self.inputs.append(value)
            return "input", len(self.inputs) - 1
        if isinstance(value.function, Moment):
            op = f"{'K' if value.function.sign > 0 else 'J'}{value.function.k}"
        else:
            op = OPERATIONS.get(value.function, "")
        if op not in OPS:
            raise _NotElementary
        places = [self.place(a) for a in value.args]
        exponent = value.args[1] if op == "pow" else None
        if isinstance(exponent, (int, float)) and exponent == int(exponent) and 1 <= exponent <= 8:
            made = places[0]
            for _ in range(int(exponent) - 1):  # exact for negative bases too, where exp(b log a) is not
                made = self._emit("mul", made, places[0])
            return made
        return self._emit(op, places[0], places[-1])

    def _emit(self, op: str, a: Place, b: Place) -> Place:
        instruction = (op, a, b)
        if instruction not in self._same:
            self._same[instruction] = ("instruction", len(self.instructions))
            self.instructions.append(instruction)
        return self._same[instruction]


def _play(op: str, a: Tensor, b: Tensor) -> Tensor:
    if op in MOMENTS:
        return Moment(int(op[1]), 1 if op[0] == "K" else -1)(a)
    plain: dict[str, Callable[..., Tensor]] = {
        "neg": torch.neg, "exp": torch.exp, "expm1": torch.expm1, "sqrt": torch.sqrt, "log": torch.log,
        "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "pow": torch.pow,
    }  # fmt: skip
    return plain[op](a) if op in UNARY else plain[op](a, b)
