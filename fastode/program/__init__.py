"""Programs: linear forms, the tracer that records them, and the frozen tables that backends execute."""

from fastode.program.bind import Bind, PooledMLP
from fastode.program.form import Atom, Form
from fastode.program.program import Program, Stage, Table, Unrolled
from fastode.program.trace import Trace
from fastode.scalar import Late, Scalar

__all__ = ["Atom", "Bind", "Form", "Late", "PooledMLP", "Program", "Scalar", "Stage", "Table", "Trace", "Unrolled"]
