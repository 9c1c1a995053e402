"""Sampler Scheduler: different solvers on different steps of one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from typing import Any

from fastode.program import Form, Trace
from fastode.program.leg import walk
from fastode.solvers.coefficients import check_choice
from fastode.solvers.solver import GridError, Solver
from fastode.solvers.spec import Spec, bound

PLANS: dict[str, str] = {
    "dpm2a-dpm2": "dpm_2_ancestral * 2/3 + dpm_solver_2 * 1/3",
    "heun-dpm2": "heun * 2/3 + dpm_solver_2 * 1/3",
    "heun-dpmpp2m-euler": "heun * 1/3 + dpmpp_2m * 1/3 + euler * 1/3",
}
"""The paper's recommended combinations (arXiv:2311.06845 and its author's code), as shares of the steps."""

Segment = tuple[Spec, Any]
"""A solver and its number of steps, or its share of them: an ``int``, or a ``Fraction`` or ``float`` below 1."""


def sampler_scheduler(plan: str | Sequence[Segment], *, history: str = "restart") -> Solver:
    """A solver that changes its method on the way.

        fastode.sample(model, seeds=range(8), solver=sampler_scheduler([("heun", 10), ("dpm_solver_2", 5)]), nfe=29)

    See :func:`segments`, which is ``SOLVERS["sampler_scheduler"]``. Raises what it raises.
    """
    last = bound("plan", _parse(plan)[-1][0])[0]
    kept = plan if isinstance(plan, str) else tuple(plan)
    return Solver("sampler_scheduler", partial(segments, plan=kept, history=history), final="zero", grid=last.grid)


def segments(p: Trace, *, plan: str | Sequence[Segment] = "dpm2a-dpm2", history: str = "restart") -> Form:
    """Sampler Scheduler (arXiv:2311.06845): segments of (solver, steps) on one grid, each going on from the last state.

    The paper's advice is noise early and an ODE late, about two thirds to the first. ``plan``: a list of (solver, steps), or
    text "heun*10 + dpm_solver_2*5", or one of ``PLANS``. Steps are counts that add up to the grid's, or shares that add up
    to 1 ("heun*2/3 + ddim*1/3"). A solver is a name, a name with options "unipc(order=2)", or a :class:`Solver`.

    Every solver ends its steps at the noise level of the grid, in the one frame, so any may follow any; the program's own
    check on a single data point proves it for the chain. A segment sees the grid from its first level to the end of the run:
    rules about last steps (first order to sigma = 0, no noise there, falling orders) are those of the run, never of a
    segment's end. One-step solvers may therefore be split anywhere without changing a number. ``history="restart"``: a
    multistep solver begins its segment at order 1. "keep": it begins with the evaluations made at the grid levels before,
    by whichever solver, as denoised estimates or noise predictions, whichever it interpolates; noise predictions only as far
    back as the last fresh noise, before which they are about other noise.

    Raises ``ValueError`` where the parts do not add up, or a part is no solver.
    """
    check_choice("history", history, ("restart", "keep"))
    parts = _parse(plan)
    formulas: list[Callable[[Trace], Form]] = [bound("plan", spec)[1] for spec, _ in parts]
    levels, x, first = list(p.grid), p.start(), 0
    for formula, steps in zip(formulas, _counts(parts, p.grid.steps), strict=True):
        if steps:
            stop = None if first + steps == p.grid.steps else steps
            x = walk(p, formula, x, levels[first:], stop=stop, hands_over=history == "keep")
            first += steps
    return x


def _counts(parts: Sequence[Segment], steps: int) -> list[int]:
    """Steps of every segment; shares are rounded at the boundaries, so that they add up."""
    shares = [steps_of for _, steps_of in parts if isinstance(steps_of, Fraction)]
    if not shares:
        counts = [int(n) for _, n in parts]
        if sum(counts) != steps:
            raise GridError(f"plan: the segments make {sum(counts)} steps, but the grid has {steps}; they do not meet")
        return counts
    if len(shares) != len(parts) or sum(shares) != 1:
        given = ", ".join(str(n) for _, n in parts)
        raise ValueError(f"plan: shares must add up to 1, and cannot be mixed with numbers of steps, got {given}")
    ends = [round(sum(shares[: k + 1], Fraction(0)) * steps) for k in range(len(shares))]
    return [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _parse(plan: Any) -> list[Segment]:
    if isinstance(plan, str):
        text = PLANS.get(plan, plan)
        rows: list[Any] = [tuple(part.rsplit("*", 1)) for part in _split(text)]
    else:
        rows = list(plan)
    made: list[Segment] = []
    for row in rows:
        if not isinstance(row, tuple) or len(row) != 2:
            raise ValueError(
                f"plan: must be (solver, steps) each, or text like 'heun*10 + ddim*5' or one of {', '.join(PLANS)}, "
                f"got {row if not isinstance(plan, str) else plan!r}"
            )
        made.append((row[0].strip() if isinstance(row[0], str) else row[0], _steps(row[1])))
    if not made:
        raise ValueError("plan: needs at least one segment, got none")
    return made


def _split(text: str) -> list[str]:
    """At plus signs outside parentheses: options may hold numbers like 1e+1."""
    parts, depth = [""], 0
    for letter in text:
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if letter == "+" and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _steps(value: Any) -> int | Fraction:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = Fraction(value.replace(" ", "") if isinstance(value, str) else value).limit_denominator(10**6)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        raise ValueError(f"plan: steps must be a whole number or a share of them, got {value!r}") from None
    whole = number.denominator == 1 and not isinstance(value, Fraction | float)
    if number <= 0 or (not whole and number > 1):
        raise ValueError(f"plan: steps must be a whole number of at least 1 or a share up to 1, got {value!r}")
    return int(number) if whole else number
