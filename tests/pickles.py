"""Pickles as EDM and diff-sampler write them, and pickles that attack whoever loads them."""

from __future__ import annotations

import io
import pickle
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastode.nets.dhariwal import DhariwalUNet
from fastode.nets.edm_blocks import Block, Conv, RandomFourier, Sinusoids
from fastode.nets.song import SongUNet

SOURCE = "raise RuntimeError('the source code in the pickle was executed')\n"


@contextmanager
def persistence() -> Iterator[Callable[[Any], Any]]:
    """EDM's ``torch_utils.persistence._reconstruct_persistent_obj``, present while a pickle that names it is written."""

    def _reconstruct_persistent_obj(meta: Any) -> Any:
        raise AssertionError("called")

    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    _reconstruct_persistent_obj.__qualname__ = _reconstruct_persistent_obj.__name__
    module = types.ModuleType("torch_utils.persistence")
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj  # type: ignore[attr-defined]
    sys.modules["torch_utils"], sys.modules["torch_utils.persistence"] = types.ModuleType("torch_utils"), module
    try:
        yield _reconstruct_persistent_obj
    finally:
        del sys.modules["torch_utils"], sys.modules["torch_utils.persistence"]


class Persistent:
    """Pickles as an object of a persistent class of EDM."""

    def __init__(self, make: Any, class_name: str, state: dict[str, Any], source: str = SOURCE) -> None:
        self.reduced = (make, (dict(type="class", version=6, module_src=source, class_name=class_name, state=state),))

    def __reduce__(self) -> Any:
        return self.reduced


def as_persistent(module: nn.Module, make: Any, names: dict[type, str], **attributes: Any) -> Any:
    """A module of ours as EDM would pickle its own: classes in ``names`` are persistent, the rest PyTorch's."""
    if type(module) not in names:
        assert type(module).__module__.startswith("torch.nn"), type(module)
    state = dict(module.__dict__)
    state["_modules"] = {k: None if m is None else as_persistent(m, make, names) for k, m in module._modules.items()}
    if type(module) in names:
        state.pop("config", None)
        return Persistent(make, names[type(module)], {**state, **attributes})
    twin = nn.ModuleDict() if isinstance(module, nn.ModuleDict) else nn.Module.__new__(type(module))
    twin.__dict__.update(state)
    return twin


def edm_pickle(path: Path, network: nn.Module, kind: str = "EDMPrecond", **kwargs: Any) -> Path:
    """A network of ours as the pickle that EDM's training would have written; ``kind``: the preconditioning class."""
    names: dict[type, str] = {
        SongUNet: "SongUNet", DhariwalUNet: "DhariwalUNet", Block: "UNetBlock", Conv: "Conv2d", nn.Linear: "Linear",
        nn.GroupNorm: "GroupNorm", Sinusoids: "PositionalEmbedding", RandomFourier: "FourierEmbedding",
    }  # fmt: skip
    config = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(network.config).items()}  # type: ignore[arg-type]
    arguments = {
        "img_resolution": config.pop("img_resolution"), "img_channels": config.pop("in_channels"),
        "label_dim": config.pop("label_dim"), "model_type": names[type(network)], **config, **kwargs,
    }  # fmt: skip
    del arguments["out_channels"]
    with persistence() as make:
        state: dict[str, Any] = {"training": False, "_parameters": OrderedDict(), "_buffers": OrderedDict()}
        state["_modules"] = OrderedDict(model=as_persistent(network, make, names))
        if kind == "iDDPMPrecond":
            state["_buffers"]["u"] = torch.zeros(1001)
        whole = Persistent(make, kind, {**state, "_init_args": (), "_init_kwargs": arguments})
        data = {"ema": whole, "loss_fn": Persistent(make, "EDMLoss", {"P_mean": -1.2}), "dataset_kwargs": {"path": "x"}}
        path.write_bytes(pickle.dumps(data))
    return path


class Calls:
    """Pickles as a call of ``function(*args)``."""

    def __init__(self, function: Any, *args: Any, state: Any = None) -> None:
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> Any:
        return self.reduced


def text(value: str) -> bytes:
    """SHORT_BINUNICODE."""
    raw = value.encode()
    return b"\x8c" + bytes([len(raw)]) + raw


def attacks(marker: str) -> dict[str, tuple[bytes, str]]:
    """Pickles that would write the file ``marker``, or try to get hold of what could: (bytes, what the refusal says)."""
    import builtins
    import functools
    import os

    code = f"open({marker!r}, 'w').close()"
    system = f"touch {marker}"
    evil = Calls(builtins.exec, code)

    class Slots:
        def __reduce__(self) -> Any:
            return (torch._utils._rebuild_parameter, (evil, True, None))

    def dumped(value: Any, protocol: int = 4) -> bytes:
        return pickle.dumps(value, protocol)

    array = pickle.dumps(__import__("numpy").array([evil], dtype=object), 2)
    in_storage = io.BytesIO(pickle.dumps(evil, 2))
    stack = b"\x80\x04" + text("os") + text("system") + b"\x93" + text(system) + b"\x85R."
    dotted = b"\x80\x04" + text("torch") + text("serialization.os.system") + b"\x93" + text(system) + b"\x85R."
    builtin = b"\x80\x04" + text("builtins") + text("getattr") + b"\x93"  # getattr(__import__("os"), "system")(...)
    imported = text("builtins") + text("__import__") + b"\x93" + text("os") + b"\x85R"
    by_getattr = builtin + imported + text("system") + b"\x86R" + text(system) + b"\x85R."
    return {
        **{f"system, protocol {p}": (dumped(Calls(os.system, system), p), "posix.system") for p in range(6)},
        "exec": (dumped(evil), "builtins.exec"),
        "eval": (dumped(Calls(builtins.eval, code)), "builtins.eval"),
        "exec, Python 2's name": (dumped(evil, 2), "__builtin__.exec"),
        "getattr": (by_getattr, "builtins.getattr"),
        "import": (dumped(Calls(builtins.__import__, "os")), "builtins.__import__"),
        "partial": (dumped(Calls(functools.partial, builtins.exec, code)), "functools.partial"),
        "STACK_GLOBAL": (stack, "os.system"),
        "a dotted name in a listed module": (dotted, "torch.serialization.os.system"),
        "INST": (f"(S{system!r}\nios\nsystem\n.".encode(), "os.system"),
        "OBJ": (b"(cos\nsystem\n" + text(system) + b"o.", "os.system"),
        "NEWOBJ": (b"\x80\x02csubprocess\nPopen\n" + text(system) + b"\x85\x81.", "subprocess.Popen"),
        "EXT1": (b"\x80\x02\x82\x01)R.", "EXT1"),
        "a call of a string": (b"\x80\x04" + text("os.system") + text(system) + b"\x85R.", "calls a str"),
        "a call of a call's result": (b"\x80\x02ccollections\nOrderedDict\n)R" + text(system) + b"\x85R.", "calls a"),
        "an argument": (dumped(Calls(__import__("collections").OrderedDict, [("a", evil)])), "builtins.exec"),
        "a parameter": (dumped(Slots()), "builtins.exec"),
        "array of objects": (array, "numpy.dtype"),
        "class of an old-style object": (
            b"ccopy_reg\n_reconstructor\n(cos\nsystem\nc__builtin__\nobject\nNtR.", "os.system"),
        "__setstate__ of a dict": (
            b"\x80\x02ccollections\nOrderedDict\n)R}" + text("__setstate__") + b"cos\nsystem\nsb.", "os.system"),
        "__setstate__ that is a string": (
            b"\x80\x02ccollections\nOrderedDict\n)R}" + text("__setstate__") + text("x") + b"sb.", "state of an Ordered"),
        "__class__ in slots": (
            b"\x80\x02ccollections\nOrderedDict\n)RN}" + text("__class__") + b"ctorch\nSize\ns\x86b.", "state of an Ordered"),
        "state of a function": (b"\x80\x02ctorch\nSize\n}" + text("make") + text("x") + b"sb.", "sets the state"),
        "state of a dict": (b"\x80\x02}}" + text("__class__") + text("x") + b"sb.", "sets the state"),
        "state of a dtype": (
            b"\x80\x02cnumpy\ndtype\n" + text("f4") + b"\x85R(K\x03" + text("<") + b"cos\nsystem\nNNK\x00K\x00tb.",
            "os.system"),
        "dtype of objects": (b"\x80\x02cnumpy\ndtype\n" + text("O") + b"\x85R.", "numpy.dtype"),
        "a storage": (
            b"\x80\x02ctorch.storage\n_load_from_bytes\nB"
            + len(in_storage.getvalue()).to_bytes(4, "little") + in_storage.getvalue() + b"\x85R.",
            "__builtin__.exec|_load_from_bytes"),
        "persistent id": (b"\x80\x02" + text("x") + b"Q.", "persistent id|values to unpack"),
        "out-of-band buffer": (b"\x80\x05\x97.", "NEXT_BUFFER"),
    }  # fmt: skip


LIVE = ("system, protocol 0", "exec", "getattr", "STACK_GLOBAL", "INST", "an argument", "array of objects")
"""Attacks that do write the file when they are loaded by Python itself; the others end in an error there."""
