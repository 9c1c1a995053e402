"""Linear forms: what ``x``, ``d`` and ``old`` are while a solver is traced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fastode.scalar import Scalar, is_scalar, is_zero


@dataclass(frozen=True)
class Atom:
    """Something a row can read: a stored value, an output of an evaluation, a fresh normal draw, or the constant 1."""

    kind: Literal["value", "output", "noise", "one"]
    index: int = 0
    name: str = ""

    def __str__(self) -> str:
        if self.kind == "output":
            return f"D{self.index}" if self.name == "denoised" else f"{self.name}{self.index}"
        return {"value": f"x{self.index}", "noise": f"z{self.index}", "one": "1"}[self.kind]


ONE = Atom("one")


class Form:
    """A linear form ``sum_a c_a a`` over atoms with scalar coefficients. Immutable.

    The operators are those of a vector space: forms add, and a scalar multiplies. A product of forms is an error, because
    a program is linear in what it stores; nonlinear operations belong to the denoiser.
    """

    __slots__ = ("terms",)
    __array_ufunc__ = None

    def __init__(self, terms: dict[Atom, Scalar]) -> None:
        self.terms = {a: c for a, c in terms.items() if not is_zero(c)}

    def __add__(self, other: Form | float) -> Form:
        if not isinstance(other, Form):
            if is_zero(other):
                return self
            raise TypeError(f"cannot add {other!r} to a linear form; multiply Trace.one() for a constant")
        terms = dict(self.terms)
        for atom, c in other.terms.items():
            terms[atom] = terms[atom] + c if atom in terms else c
        return Form(terms)

    __radd__ = __add__

    def __neg__(self) -> Form:
        return self * -1.0

    def __sub__(self, other: Form) -> Form:
        return self + (-other)

    def __rsub__(self, other: Form | float) -> Form:
        return -self + other

    def __mul__(self, scale: Any) -> Form:
        if not is_scalar(scale):
            raise TypeError(f"a linear form can be multiplied by a number, not by {type(scale).__name__}")
        return Form({a: c * scale for a, c in self.terms.items()})

    __rmul__ = __mul__

    def __truediv__(self, scale: Any) -> Form:
        if not is_scalar(scale):
            raise TypeError(f"a linear form can be divided by a number, not by {type(scale).__name__}")
        return Form({a: c / scale for a, c in self.terms.items()})

    def substitute(self, atom: Atom, form: Form) -> Form:
        """This form with ``form`` in the place of ``atom``."""
        if atom not in self.terms:
            return self
        rest = Form({a: c for a, c in self.terms.items() if a != atom})
        return rest + form * self.terms[atom]

    def single(self) -> Atom | None:
        """The atom, if this form is one atom with coefficient 1."""
        if len(self.terms) == 1:
            ((atom, c),) = self.terms.items()
            if isinstance(c, (int, float)) and c == 1:
                return atom
        return None

    def __repr__(self) -> str:
        from fastode.scalar import show

        return " + ".join(f"{show(c)} {a}" for a, c in self.terms.items()) or "0"
