"""fastode: a sampling engine for diffusion models. Images in about five network evaluations."""

from fastode.api import sample
from fastode.artifact import Artifact
from fastode.buckets import Buckets
from fastode.denoisers import Denoiser, Guidance
from fastode.engine import Engine, NonFiniteError, Result
from fastode.functional import Sampler
from fastode.graph import Graphs
from fastode.models import load, load_solver
from fastode.program import Program
from fastode.schedules import GRIDS, Grid
from fastode.solvers import SOLVERS

__version__ = "0.1.0"

_LAZY = {  # other people's interfaces: imported when asked for, since their packages may be absent and are slow to import
    "k_diffusion": ("fastode.k_diffusion", None),
    "FastODEScheduler": ("fastode.interop.diffusers_scheduler", "FastODEScheduler"),
    "SchedulerMixin": ("fastode.interop.diffusers_scheduler", "SchedulerMixin"),
    "accelerate": ("fastode.interop.accelerate", "accelerate"),
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'fastode' has no attribute {name!r}")
    import importlib

    module, attribute = _LAZY[name]
    found = importlib.import_module(module)
    return found if attribute is None else getattr(found, attribute)


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
    "load_solver",
    "sample",
]
