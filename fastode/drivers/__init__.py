"""Drivers: host loops that look at the numbers they compute, built from programs.

``adaptive``: the probability flow with step-size control. ``likelihood``: exact log-likelihood, latent codes.
``parallel``: all steps of a program at once, by Picard sweeps (ParaDiGMS).
"""

from fastode.drivers.adaptive import AdaptiveResult, adaptive
from fastode.drivers.control import PI, PID
from fastode.drivers.likelihood import Likelihood, decode, dequantise, encode, interpolate, log_likelihood, temper
from fastode.drivers.parallel import Cost, Parallel, ParallelResult

__all__ = [
    "PI",
    "PID",
    "AdaptiveResult",
    "Cost",
    "Likelihood",
    "Parallel",
    "ParallelResult",
    "adaptive",
    "decode",
    "dequantise",
    "encode",
    "interpolate",
    "log_likelihood",
    "temper",
]
