"""The numbers a table is made of, and the few functions solvers apply to them.

A coefficient is one of

* a Python float: shared by the batch and all elements, known now;
* a float64 tensor without dimensions: the same, but differentiable (learned grids and tables);
* a float64 tensor of the sample's shape ``[*sample]``: one number per element (DPM-Solver-v3, masks);
* a :class:`Late` number: not known until the run. It may turn out shared or per sample ``[B, 1, ...]``.

Solvers write ordinary arithmetic and :func:`exp`, :func:`log`, ...; the result has the right kind by itself.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, Union

import torch
from torch import Tensor

Scalar: TypeAlias = Union[float, Tensor, "Late"]


class Late:
    """A number of the run: a guidance strength given with the call, or AMED's midpoint ratio made by a small network.

    Arithmetic on late numbers records an expression. :func:`evaluate` plays it back on tensors: on the host in float64
    for numbers known when a call starts, on the device for numbers that an evaluation produces. A program's structure can
    not depend on a late number, so asking for its value (``bool``, ``float``, ``<``) is an error.
    """

    __slots__ = ("args", "function", "name")
    __array_ufunc__ = None  # numpy scalars defer to our reflected operators

    def __init__(self, name: str, function: Callable[..., Any] | None = None, args: tuple[Any, ...] = ()) -> None:
        self.name, self.function, self.args = name, function, args

    @classmethod
    def apply(cls, name: str, function: Callable[..., Any], *args: Any) -> Late:
        """``function(*args)`` once the late numbers among ``args`` are known; ``function`` must take tensors."""
        return cls(name, function, args)

    def leaves(self) -> set[Late]:
        """The late numbers this one is made of."""
        if self.function is None:
            return {self}
        return set().union(*(a.leaves() for a in self.args if isinstance(a, Late)))

    def __repr__(self) -> str:
        if self.function is None:
            return self.name
        inner = ", ".join(repr(a) if isinstance(a, Late) else _short(a) for a in self.args)
        return f"{self.name}({inner})"

    def _unknown(self, *_: object) -> Any:
        raise TypeError(
            f"the late coefficient {self.name!r} has no value yet: a program's structure cannot depend on a number that is "
            "known only during the run"
        )

    __bool__ = __float__ = __int__ = __lt__ = __le__ = __gt__ = __ge__ = _unknown

    def __add__(self, other: Scalar) -> Late:
        return Late("add", operator.add, (self, other))

    def __radd__(self, other: Scalar) -> Late:
        return Late("add", operator.add, (other, self))

    def __sub__(self, other: Scalar) -> Late:
        return Late("sub", operator.sub, (self, other))

    def __rsub__(self, other: Scalar) -> Late:
        return Late("sub", operator.sub, (other, self))

    def __mul__(self, other: Any) -> Any:
        return Late("mul", operator.mul, (self, other)) if is_scalar(other) else NotImplemented

    def __rmul__(self, other: Any) -> Any:
        return Late("mul", operator.mul, (other, self)) if is_scalar(other) else NotImplemented

    def __truediv__(self, other: Scalar) -> Late:
        return Late("div", operator.truediv, (self, other))

    def __rtruediv__(self, other: Scalar) -> Late:
        return Late("div", operator.truediv, (other, self))

    def __pow__(self, other: Scalar) -> Late:
        return Late("pow", _power, (self, other))

    def __rpow__(self, other: Scalar) -> Late:
        return Late("pow", _power, (other, self))

    def __neg__(self) -> Late:
        return Late("neg", operator.neg, (self,))


def is_scalar(value: object) -> bool:
    return isinstance(value, (int, float, Tensor, Late))


def is_known(value: Scalar) -> bool:
    return not isinstance(value, Late)


def is_zero(value: Scalar) -> bool:
    """True for a plain 0. A tensor or late number is a free coefficient even where it happens to be 0 now."""
    return isinstance(value, (int, float)) and value == 0


def evaluate(value: Scalar, known: Mapping[Late, Any], memo: dict[int, Any] | None = None) -> Any:
    """The number ``value`` stands for, given its leaves. ``memo`` shares common subexpressions between calls."""
    if not isinstance(value, Late):
        return value
    memo = {} if memo is None else memo
    if id(value) not in memo:
        if value.function is None:
            if value not in known:
                raise ValueError(f"{value.name}: this program needs a value for the late coefficient {value.name!r}")
            memo[id(value)] = known[value]
        else:
            memo[id(value)] = value.function(*(evaluate(a, known, memo) for a in value.args))
    return memo[id(value)]


def _power(base: Any, exponent: Any) -> Any:
    if isinstance(base, Tensor) or not isinstance(exponent, Tensor):
        return base**exponent
    return torch.pow(torch.as_tensor(base, dtype=exponent.dtype, device=exponent.device), exponent)


OPERATIONS: dict[Callable[..., Any], str] = {
    operator.add: "add",
    operator.sub: "sub",
    operator.mul: "mul",
    operator.truediv: "div",
    operator.neg: "neg",
    _power: "pow",
}
"""What a late number may be made with and still be compiled (:mod:`fastode.program.code`), besides :class:`Moment`."""


def _function(
    name: str, on_float: Callable[[float], float], on_tensor: Callable[[Tensor], Tensor]
) -> Callable[[Any], Any]:
    def either(x: Any) -> Any:
        return on_tensor(x) if isinstance(x, Tensor) else on_float(x)

    def apply(x: Scalar) -> Any:
        return Late(name, either, (x,)) if isinstance(x, Late) else either(x)

    apply.__name__ = name
    apply.__doc__ = f"{name}(x) of a float, tensor or late number."
    OPERATIONS[either] = name
    return apply


exp = _function("exp", math.exp, torch.exp)
expm1 = _function("expm1", math.expm1, torch.expm1)
sqrt = _function("sqrt", math.sqrt, torch.sqrt)


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf


log = _function("log", _log, torch.log)


@dataclass(frozen=True)
class Moment:
    """M_k(h) = int_0^h e^{sign (h - u)} u^k/k! du: the phi functions of exponential integrators, times h^(k+1).

    Of a float, tensor or late number. For small h the recursion M_k = sign (M_{k-1} - h^k/k!) cancels, so the power series
    is summed instead.
    """

    k: int
    sign: int

    def __call__(self, h: Scalar) -> Any:
        if isinstance(h, Late):
            return Late(f"{'K' if self.sign > 0 else 'J'}{self.k}", self, (h,))
        if isinstance(h, Tensor):
            return self._of_tensor(h)
        k, sign = self.k, self.sign
        if abs(h) < k + 1:
            term = h ** (k + 1) / math.factorial(k + 1)
            total = term
            for j in range(1, 40):
                term *= sign * h / (k + 1 + j)
                total += term
            return total
        value = sign * math.expm1(sign * h)
        for i in range(1, k + 1):
            value = sign * (value - h**i / math.factorial(i))
        return value

    def _of_tensor(self, h: Tensor) -> Tensor:
        k, sign = self.k, self.sign
        small = h.abs() < k + 1
        near = torch.where(small, h, torch.zeros_like(h))  # the branch not taken must not poison gradients
        term = near ** (k + 1) / math.factorial(k + 1)
        series = term
        for j in range(1, 40):
            term = term * sign * near / (k + 1 + j)
            series = series + term
        far = torch.where(small, torch.ones_like(h), h)
        value = sign * torch.expm1(sign * far)
        for i in range(1, k + 1):
            value = sign * (value - far**i / math.factorial(i))
        return torch.where(small, series, value)


def finite(value: Scalar) -> bool:
    """False only for a number known to be infinite or NaN."""
    if isinstance(value, Late):
        return True
    return bool(torch.isfinite(value).all()) if isinstance(value, Tensor) else math.isfinite(value)


def _short(value: object) -> str:
    if isinstance(value, Tensor):
        return f"tensor{list(value.shape)}" if value.ndim else f"{value.item():.6g}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def show(value: Scalar) -> str:
    """A coefficient as ``describe`` prints it."""
    return repr(value) if isinstance(value, Late) else _short(value)
