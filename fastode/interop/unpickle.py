"""Reading other people's pickles as data: nothing in them is ever imported or run.

:func:`load_pickle` accepts three containers: a plain pickle (EDM, diff-sampler), PyTorch's zip files and PyTorch's files
from before 1.6. What is inside is executed by :mod:`fastode.interop.pickle_machine`, which can only build data.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from fastode.interop.pickle_machine import Object, Storage, StorageType, UnsafePickle, run

__all__ = ["Object", "UnsafePickle", "load_pickle", "tensors_of"]

MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a PyTorch file from before 1.6
_ZIP = b"PK\x03\x04"
_STORAGE_FROM_BYTES = "torch.storage._load_from_bytes"


def load_pickle(path: str | os.PathLike[str]) -> Any:
    """The contents of a pickle or of a PyTorch file as plain data.

    Tensors (on the CPU), NumPy arrays, numbers, strings and containers come as themselves. Objects come as :class:`Object`:
    ``class_name``, ``init_kwargs``, ``state`` and, for modules, ``tensors()``. EDM's pickles carry the source code of their
    classes; it is not looked at.

    Raises ``FileNotFoundError``, :class:`UnsafePickle` naming a global that is not on the list (``GLOBALS``), ``ValueError``
    for a damaged file.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"pickle: {file} does not exist")
    with file.open("rb") as stream:
        if stream.read(4) == _ZIP:
            return _read_zip(file)
    return _read_bytes(file.read_bytes(), file.name, nested=False)


def tensors_of(data: Any, *, what: str = "state dict") -> dict[str, Tensor]:
    """``data`` as named tensors: a state dict, or a module. Raises ``ValueError`` saying what it is instead."""
    if isinstance(data, Object):
        return data.tensors()
    if not isinstance(data, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in data.items()):
        held = f"a dict with {', '.join(map(str, list(data)[:6]))}" if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"weights: expected a {what} of tensors by name, got {held}")
    return dict(data)


def _read_zip(file: Path) -> Any:
    """PyTorch >= 1.6: ``<root>/data.pkl`` names storages ``<root>/data/<key>``."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = set(archive.namelist())
            mains = sorted(n for n in names if n == "data.pkl" or n.endswith("/data.pkl"))
            if len(mains) != 1:
                raise ValueError(f"pickle: {file.name} is a zip file without one data.pkl, so not PyTorch's")
            root = mains[0][: -len("data.pkl")]
            order = _member(archive, f"{root}byteorder") if f"{root}byteorder" in names else b"little"
            if order != b"little":
                raise ValueError(f"pickle: {file.name} was written in {order.decode(errors='replace')}-endian order")
            storages: dict[str, Storage] = {}

            def storage(key: str, dtype: torch.dtype, numel: int) -> Storage:
                if key not in storages:
                    member = f"{root}data/{key}"
                    if member not in names:
                        raise ValueError(f"storage {key!r} is missing")
                    if archive.getinfo(member).file_size < numel * dtype.itemsize:
                        raise ValueError(f"storage {key!r} is cut short")
                    storages[key] = Storage(_bytes_tensor(_member(archive, member)), dtype)
                return storages[key]

            main = io.BytesIO(_member(archive, mains[0]))
            return run(main, name=file.name, persistent=_persistent(storage))
    except (zipfile.BadZipFile, RuntimeError, OSError, EOFError, struct.error) as error:
        raise ValueError(f"pickle: {file.name} is a damaged zip file ({error})") from error


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    """PyTorch stores without compression; a file that unpacks to more than itself is not its own."""
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"pickle: {name} in the zip file is compressed, which PyTorch does not do")
    return archive.read(name)


def _read_bytes(data: bytes, name: str, *, nested: bool) -> Any:
    """A plain pickle, or a PyTorch file from before 1.6. ``nested``: the bytes of one storage inside a pickle."""
    calls = {} if nested else {_STORAGE_FROM_BYTES: lambda raw: _storage_from_bytes(raw, name)}
    stream = io.BytesIO(data)
    first = run(stream, name=name, calls=calls)
    if type(first) is not int or first != MAGIC:
        return first
    protocol, system = run(stream, name=name), run(stream, name=name)
    if protocol != 1001 or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError(f"pickle: {name} is a PyTorch file of an unknown kind (protocol {protocol!r})")
    waiting: dict[str, Storage] = {}

    def storage(key: str, dtype: torch.dtype, numel: int) -> Storage:
        if key not in waiting:
            if numel * dtype.itemsize > len(data):
                raise ValueError(f"storage {key!r} is larger than the file")
            waiting[key] = Storage(torch.empty(numel * dtype.itemsize, dtype=torch.uint8), dtype)
        return waiting[key]

    result = run(stream, name=name, persistent=_persistent(storage), calls=calls)
    keys = run(stream, name=name)
    if not isinstance(keys, list) or set(keys) != set(waiting):
        raise ValueError(f"pickle: {name} is damaged: its storages do not match its tensors")
    for key in keys:
        _fill(waiting[key], stream, name)
    return result


def _fill(storage: Storage, stream: IO[bytes], name: str) -> None:
    numel = int.from_bytes(stream.read(8), "little")
    raw = stream.read(storage.data.numel())
    if numel != len(storage) or len(raw) != storage.data.numel():
        raise ValueError(f"pickle: {name} is damaged: a storage is cut short")
    storage.data.copy_(_bytes_tensor(raw))


def _storage_from_bytes(raw: Any, name: str) -> Storage:
    """How a tensor gets into a plain pickle: its storage is a whole PyTorch file of its own."""
    if type(raw) is not bytes:
        raise ValueError("malformed storage")
    storage = _read_bytes(raw, name, nested=True)
    if not isinstance(storage, Storage):
        raise ValueError("malformed storage")
    return storage


def _persistent(find: Callable[[str, torch.dtype, int], Storage]) -> Callable[[Any], Storage]:
    def resolve(token: Any) -> Storage:
        kind, storage_type, key, _, numel, *view = token
        if kind != "storage" or not isinstance(storage_type, StorageType) or type(key) is not str:
            raise ValueError("malformed storage")
        if type(numel) is not int or numel < 0:
            raise ValueError("malformed storage")
        storage = find(key, storage_type.dtype, numel)
        if view and view[0] is not None:
            _, offset, size = view[0]
            size_of = storage_type.dtype.itemsize
            return Storage(storage.data[offset * size_of : (offset + size) * size_of], storage_type.dtype)
        return storage

    return resolve


def _bytes_tensor(raw: bytes) -> Tensor:
    """[n] uint8, in memory of its own."""
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
