"""fastode: a sampling engine for diffusion models. Images in about five network evaluations."""

from fastode.api import sample
from fastode.artifact import Artifact
from fastode.buckets import Buckets
from fastode.denoisers import Denoiser, Guidance
from fastode.engine import Engine, NonFiniteError, Result
from fastode.functional import Sampler
from fastode.graph import Graphs
from fastode.models import load
from fastode.program import Program
from fastode.schedules import GRIDS, Grid
from fastode.solvers import SOLVERS

__version__ = "0.1.0"

__all__ = [
    "GRIDS",
    "SOLVERS",
    "Artifact",
    "Buckets",
    "Denoiser",
    "Engine",
    "Graphs",
    "Grid",
    "Guidance",
    "NonFiniteError",
    "Program",
    "Result",
    "Sampler",
    "__version__",
    "load",
    "sample",
]
