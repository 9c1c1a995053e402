"""The network families that a card can name: each is a config, which is plain data, and a module made from it."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from torch import nn

from fastode.nets.adm import ADMConfig, ADMUNet
from fastode.nets.dhariwal import DhariwalConfig, DhariwalUNet
from fastode.nets.ncsnpp import NCSNpp, NCSNppConfig
from fastode.nets.song import SongConfig, SongUNet
from fastode.nets.unet import UNet, UNetConfig

FAMILIES: dict[str, tuple[Any, Any]] = {
    "unet": (UNetConfig, UNet),
    "song": (SongConfig, SongUNet),
    "dhariwal": (DhariwalConfig, DhariwalUNet),
    "adm": (ADMConfig, ADMUNet),
    "ncsnpp": (NCSNppConfig, NCSNpp),
}
"""Name in a card -> (config class, module class)."""


def build_network(family: str, config: dict[str, Any]) -> nn.Module:
    """The module of ``family`` with these fields of its config. Raises ``ValueError`` for what is not known."""
    if family not in FAMILIES:
        raise ValueError(f"network: must be one of {', '.join(FAMILIES)}, got {family!r}")
    make_config, make = FAMILIES[family]
    known = {f.name for f in fields(make_config)}
    unknown = sorted(set(config) - known)
    if unknown:
        raise ValueError(f"config: {family} has no field {unknown[0]!r}; its fields are {', '.join(sorted(known))}")
    module: nn.Module = make(make_config(**config))
    return module


def describe_network(network: Any) -> tuple[str, dict[str, Any]]:
    """(family, config) of a module that :func:`build_network` can make. Raises ``ValueError`` for other networks."""
    for family, (_, module_class) in FAMILIES.items():
        if type(network) is module_class:
            return family, asdict(network.config)
    raise ValueError(
        f"network: {type(network).__name__} is none of the families that a card can name ({', '.join(FAMILIES)})"
    )
