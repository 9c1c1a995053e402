"""Noise schedules, grids of levels, and ways to place them."""

from fastode.schedules.grid import Grid, Level
from fastode.schedules.noise import EDM, VE, Cosine, Discrete, Flow, NoiseSchedule, SubVP, VPLinear
from fastode.schedules.spacing import (
    GRIDS,
    ays,
    beta,
    explicit,
    exponential,
    karras,
    leading,
    linspace,
    log_snr,
    polynomial,
    quadratic,
    time_uniform,
    trailing,
)

__all__ = [
    "EDM",
    "GRIDS",
    "VE",
    "Cosine",
    "Discrete",
    "Flow",
    "Grid",
    "Level",
    "NoiseSchedule",
    "SubVP",
    "VPLinear",
    "ays",
    "beta",
    "explicit",
    "exponential",
    "karras",
    "leading",
    "linspace",
    "log_snr",
    "polynomial",
    "quadratic",
    "time_uniform",
    "trailing",
]
