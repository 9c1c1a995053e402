"""A pickle is a program for a stack machine. This is a machine that can only build data.

``pickletools`` of the standard library splits a pickle into opcodes; :func:`run` executes them. The opcodes that make
numbers, strings and containers do what they say. Those that name a class or a function (GLOBAL, STACK_GLOBAL, INST) may
name what ``GLOBALS`` lists and nothing else, and what they get is not the thing itself but our own function that makes
plain data of its arguments: no module is imported, no attribute is looked up, no foreign code is called. An object of a
class (a module of a network, say) becomes an :class:`Object`, a name with a dict.
"""

from __future__ import annotations

import math
import pickletools
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor


class UnsafePickle(ValueError):
    """A pickle asks for something that is not data."""


@dataclass(eq=False)
class Object:
    """A pickled object as data: its class is a name, its attributes are a dict. Nothing of the class was executed.

    ``class_name``: "SongUNet", or "torch.nn.modules.container.ModuleDict" for classes of PyTorch. ``state``: what would have
    been the object's ``__dict__``.
    """

    class_name: str
    state: dict[str, Any] = field(default_factory=dict)

    @property
    def init_args(self) -> tuple[Any, ...]:
        """Positional arguments that the object was made with, where it recorded them (EDM's persistent classes do)."""
        return tuple(self.state.get("_init_args") or ())

    @property
    def init_kwargs(self) -> dict[str, Any]:
        """Keyword arguments that the object was made with, where it recorded them."""
        return dict(self.state.get("_init_kwargs") or {})

    def __getitem__(self, name: str) -> Any:
        """An attribute; for a module also its parameters, buffers and submodules. Raises ``KeyError``."""
        for place in (self.state, *(self.state.get(k) for k in ("_parameters", "_buffers", "_modules"))):
            if isinstance(place, dict) and name in place:
                return place[name]
        raise KeyError(f"{self.class_name} has no {name!r}")

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers of a module by their dotted names, as in its ``state_dict``."""
        found: dict[str, Tensor] = {}
        todo: list[tuple[str, Object]] = [("", self)]
        seen: set[int] = set()
        while todo:
            prefix, module = todo.pop()
            if id(module) in seen:
                raise ValueError(f"pickle: module {prefix or self.class_name!r} occurs twice")
            seen.add(id(module))
            skipped = module.state.get("_non_persistent_buffers_set") or ()
            for kind in ("_parameters", "_buffers"):
                for name, value in _items(module.state.get(kind)):
                    if isinstance(value, Tensor) and not (kind == "_buffers" and name in skipped):
                        found[prefix + name] = value
            for name, value in reversed(_items(module.state.get("_modules"))):
                if isinstance(value, Object):
                    todo.append((f"{prefix}{name}.", value))
        return found


def _items(value: Any) -> list[tuple[str, Any]]:
    return [(str(k), v) for k, v in value.items()] if isinstance(value, dict) else []


@dataclass(frozen=True, eq=False)
class Global:
    """What a listed global stands for: ``make(*args)`` builds the data that a call of it would have built."""

    name: str
    make: Callable[..., Any]


@dataclass(frozen=True, eq=False)
class Storage:
    """Bytes of tensors, [n] uint8, and the dtype they are read in."""

    data: Tensor
    dtype: torch.dtype

    def __len__(self) -> int:
        return self.data.numel() // self.dtype.itemsize


# -- what the listed globals make ----------------------------------------------------------------------------------------


def _check(fine: Any, what: str) -> None:
    if not fine:
        raise ValueError(f"malformed {what}")


def _check_keys(values: Any) -> None:
    """Keys are plain: hashing a tuple nested a million times over would overrun the stack of the interpreter."""
    flat = [v for value in values for v in (value if type(value) is tuple else (value,))]
    kinds = (str, bytes, int, float, bool, complex, type(None), torch.dtype)
    _check(all(isinstance(v, kinds) for v in flat), "key")


def _whole(values: Any) -> bool:
    return isinstance(values, tuple) and all(type(v) is int and v >= 0 for v in values)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any, dtype: torch.dtype | None = None) -> Tensor:
    _check(isinstance(storage, Storage) and _whole((offset,)) and _whole(size) and _whole(stride), "tensor")
    _check(len(size) == len(stride), "tensor")
    flat = storage.data.view(dtype or storage.dtype)
    if 0 in size:
        return torch.empty(size, dtype=flat.dtype)
    _check(offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) < flat.numel(), "tensor: out of bounds")
    return torch.as_strided(flat, size, stride, offset)


def _tensor_v3(storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *_: Any) -> Tensor:
    _check(isinstance(dtype, torch.dtype), "tensor")
    return _tensor(storage, offset, size, stride, dtype=dtype)


def _first_tensor(value: Any, *_: Any) -> Tensor:
    _check(isinstance(value, Tensor), "parameter")
    return value


def _from_type(make: Any, kind: Any, args: Any, state: Any) -> Any:
    """A tensor with Python attributes; they are left out."""
    _check(isinstance(make, Global) and make.name in _TENSOR_MAKERS and isinstance(args, tuple), "tensor")
    return make.make(*args)


def _ordered(pairs: Any = ()) -> OrderedDict[Any, Any]:
    _check(type(pairs) in (list, tuple) and all(type(p) in (list, tuple) and len(p) == 2 for p in pairs), "OrderedDict")
    _check_keys([key for key, _ in pairs])
    return OrderedDict([(k, v) for k, v in pairs])


def _easy_dict(*args: Any) -> dict[Any, Any]:
    _check(not args or (len(args) == 1 and isinstance(args[0], dict)), "EasyDict")
    return dict(*args)


def _collection(kind: type) -> Callable[..., Any]:
    def make(values: Any = ()) -> Any:
        _check(type(values) in (list, tuple, bytes, set, frozenset), kind.__name__)
        _check_keys(values)
        return kind(values)

    return make


def _bytes(text: Any, encoding: Any = "latin1") -> bytes:
    """How protocol 2 writes bytes."""
    _check(type(text) is str and encoding in ("latin1", "latin-1"), "bytes")
    return text.encode("latin1")


def _bytearray(data: Any = b"", encoding: Any = None) -> bytearray:
    return bytearray(data if type(data) in (bytes, bytearray) else _bytes(data, encoding))


def _empty_bytes() -> bytes:
    """How protocol 2 writes ``b""``."""
    return b""


def _complex(real: Any, imag: Any) -> complex:
    _check(type(real) is float and type(imag) is float, "complex")
    return complex(real, imag)


def _text(*args: Any) -> str:
    """A device or a layout, as its name."""
    _check(args and all(type(a) in (str, int) for a in args), "device")
    return ":".join(str(a) for a in args)


def _size(values: Any = ()) -> tuple[int, ...]:
    _check(_whole(tuple(values) if type(values) in (list, tuple) else None), "torch.Size")
    return tuple(values)


def _persistent(meta: Any) -> Object:
    """EDM's ``torch_utils.persistence``: the class name and the state are kept, the source code is left unread."""
    _check(isinstance(meta, dict) and meta.get("type") == "class", "persistent object")
    name, state = meta.get("class_name"), meta.get("state")
    _check(type(name) is str and isinstance(state, dict), "persistent object")
    return Object(name, dict(state))


def _reconstructor(kind: Any, base: Any, state: Any) -> Any:
    """How protocols 0 and 1 write an object of a plain class."""
    _check(isinstance(kind, Global) and kind.name in _CLASSES and state is None, "object")
    return kind.make()


@dataclass(eq=False)
class Dtype:
    """A NumPy dtype in the making. NumPy's own ``__setstate__`` is not called: it believes every flag it is given."""

    value: np.dtype[Any]

    def build(self, state: Any) -> None:
        _check(type(state) is tuple and len(state) >= 5 and state[2:5] == (None, None, None), "numpy.dtype")
        _check(type(state[1]) is str and state[1] in ("<", ">", "|", "="), "numpy.dtype")
        self.value = self.value.newbyteorder(state[1])


def _dtype(kind: Any, *_: Any) -> Dtype:
    _check(type(kind) is str and re.fullmatch(r"[<>|=]?[biufcSU?][0-9]{0,6}", kind), "numpy.dtype")
    return Dtype(np.dtype(kind))


def _empty_array(kind: Any, shape: Any, code: Any) -> np.ndarray[Any, Any]:
    return np.empty(0, dtype=np.uint8)  # BUILD brings what belongs in it


def _buffer_array(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray[Any, Any]:
    _check(type(data) in (bytes, bytearray) and isinstance(dtype, Dtype) and _whole(shape), "numpy array")
    _check(type(order) is str and order in ("C", "F"), "numpy array")
    return np.frombuffer(bytearray(data), dtype=dtype.value).reshape(shape, order=order)


def _numpy_scalar(dtype: Any, data: Any = None) -> Any:
    raw = data.encode("latin1") if type(data) is str else data
    _check(isinstance(dtype, Dtype) and type(raw) is bytes and len(raw) == dtype.value.itemsize > 0, "numpy scalar")
    return np.frombuffer(raw, dtype=dtype.value)[0]


_CLASSES: tuple[str, ...] = (
    *(f"torch.nn.modules.container.{n}" for n in ("ModuleDict", "ModuleList", "Sequential", "ParameterList")),
    *(f"torch.nn.modules.activation.{n}" for n in ("SiLU", "ReLU", "Sigmoid", "Tanh", "GELU", "Softmax", "LeakyReLU")),
    *(f"torch.nn.modules.linear.{n}" for n in ("Linear", "Identity")),
    *(f"torch.nn.modules.conv.{n}" for n in ("Conv1d", "Conv2d", "ConvTranspose2d")),
    *(f"torch.nn.modules.normalization.{n}" for n in ("GroupNorm", "LayerNorm")),
    *(f"torch.nn.modules.dropout.{n}" for n in ("Dropout", "Dropout2d")),
    *(f"torch.nn.modules.pooling.{n}" for n in ("AvgPool2d", "AdaptiveAvgPool2d")),
    "torch.nn.modules.flatten.Flatten",
    "torch.nn.modules.sparse.Embedding",
    "torch.nn.modules.upsampling.Upsample",
)
"""Classes whose objects become :class:`Object`."""

_TENSOR_MAKERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _first_tensor,
    "torch._utils._rebuild_parameter_with_state": _first_tensor,
}

_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in (
        *("float16", "float32", "float64", "bfloat16", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2"),
        *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
    )
}

_STORAGES: dict[str, torch.dtype] = {
    "HalfStorage": torch.float16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "BFloat16Storage": torch.bfloat16,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}


@dataclass(frozen=True, eq=False)
class StorageType:
    """The class of a storage, as the dtype of what is in it."""

    dtype: torch.dtype


def _python(module: str, name: str) -> list[str]:
    """The name of a builtin in Python 3 and in Python 2."""
    return [f"{module}.{name}", f"__builtin__.{name}"]


_CALLS: dict[str, Callable[..., Any]] = {
    **_TENSOR_MAKERS,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch._utils._rebuild_from_type_v2": _from_type,
    "torch.Size": _size,
    "torch.device": _text,
    "torch.serialization._get_layout": _text,
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
    "collections.OrderedDict": _ordered,
    "dnnlib.util.EasyDict": _easy_dict,
    "_codecs.encode": _bytes,
    "copyreg._reconstructor": _reconstructor,
    "copy_reg._reconstructor": _reconstructor,
    "numpy.dtype": _dtype,
    **{f"numpy.{core}.multiarray._reconstruct": _empty_array for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _numpy_scalar for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _buffer_array for core in ("core", "_core")},
    **{n: _collection(kind) for kind in (set, frozenset) for n in _python("builtins", kind.__name__)},
    **dict.fromkeys(_python("builtins", "complex"), _complex),
    **dict.fromkeys(_python("builtins", "bytearray"), _bytearray),
    **dict.fromkeys(_python("builtins", "bytes"), _empty_bytes),
    **{name: lambda name=name: Object(name) for name in _CLASSES},
}


def _nothing(*_: Any) -> Any:
    raise ValueError("a class was called that is only ever named")


GLOBALS: Mapping[str, Any] = {
    **{name: Global(name, make) for name, make in _CALLS.items()},
    # named as arguments of the above, never called:
    **{name: Global(name, _nothing) for name in (*_python("builtins", "object"), "numpy.ndarray", "torch.Tensor")},
    "torch.nn.parameter.Parameter": Global("torch.nn.parameter.Parameter", _nothing),
    **{f"torch.{name}": dtype for name, dtype in _DTYPES.items()},
    **{f"torch.{where}{name}": StorageType(dtype) for name, dtype in _STORAGES.items() for where in ("", "cuda.")},
    "torch.storage.UntypedStorage": StorageType(torch.uint8),
}
"""Every global that a pickle may name, and what it stands for here."""


# -- the machine -----------------------------------------------------------------------------------------------------------

_MARK = object()
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = frozenset(
    (
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    )
)
_EMPTY: dict[str, type] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}


def run(
    source: IO[bytes],
    *,
    name: str = "pickle",
    persistent: Callable[[Any], Any] | None = None,
    calls: Mapping[str, Callable[..., Any]] | None = None,
) -> Any:
    """The data of one pickle, read from ``source`` up to its STOP.

    ``persistent``: what a persistent id stands for; without it a pickle may have none. ``calls``: further globals.
    Raises :class:`UnsafePickle` naming the global that is asked for, ``ValueError`` for a damaged pickle.
    """
    extra = {n: Global(n, make) for n, make in (calls or {}).items()}
    machine = _Machine(name, persistent, extra)
    try:
        return machine.execute(pickletools.genops(source))
    except UnsafePickle:
        raise
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, MemoryError, RuntimeError, EOFError) as error:
        raise ValueError(f"pickle: {name} is damaged or no pickle ({type(error).__name__}: {error})") from error


class _Machine:
    def __init__(self, name: str, persistent: Callable[[Any], Any] | None, extra: Mapping[str, Global]) -> None:
        self.name, self.persistent, self.extra = name, persistent, extra
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def execute(self, opcodes: Iterator[tuple[Any, Any, Any]]) -> Any:
        stack = self.stack
        for opcode, value, _ in opcodes:
            op = opcode.name
            if op in _LITERALS:
                stack.append(value)
            elif op in _CONSTANTS:
                stack.append(_CONSTANTS[op])
            elif op in _EMPTY:
                stack.append(_EMPTY[op]())
            elif op == "STOP":
                result = self.pop()
                _check(not stack, "end: the stack is not empty")
                return result
            else:
                step = getattr(self, f"op_{op.lower()}", None)
                if step is None:
                    raise UnsafePickle(f"pickle: {self.name} uses {op}, which builds no data of its own; it is refused")
                step(value)
        raise ValueError("no STOP")

    def pop(self) -> Any:
        value = self.stack.pop()
        _check(value is not _MARK, "stack")
        return value

    def top(self) -> Any:
        _check(self.stack and self.stack[-1] is not _MARK, "stack")
        return self.stack[-1]

    def since_mark(self) -> list[Any]:
        for i in range(len(self.stack) - 1, -1, -1):
            if self.stack[i] is _MARK:
                values = self.stack[i + 1 :]
                del self.stack[i:]
                return values
        raise ValueError("no mark on the stack")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    # Markers of the format, and the stack itself.
    def op_proto(self, value: Any) -> None: ...
    def op_frame(self, value: Any) -> None: ...

    def op_mark(self, _: Any) -> None:
        self.push(_MARK)

    def op_pop(self, _: Any) -> None:
        self.stack.pop()

    def op_pop_mark(self, _: Any) -> None:
        self.since_mark()

    def op_dup(self, _: Any) -> None:
        self.push(self.top())

    # The memo.
    def op_put(self, key: int) -> None:
        self.memo[key] = self.top()

    op_binput = op_long_binput = op_put

    def op_memoize(self, _: Any) -> None:
        self.op_put(len(self.memo))

    def op_get(self, key: int) -> None:
        self.push(self.memo[key])

    op_binget = op_long_binget = op_get

    # Containers.
    def op_tuple(self, _: Any) -> None:
        self.push(tuple(self.since_mark()))

    def op_tuple1(self, _: Any) -> None:
        self.push((self.pop(),))

    def op_tuple2(self, _: Any) -> None:
        b, a = self.pop(), self.pop()
        self.push((a, b))

    def op_tuple3(self, _: Any) -> None:
        c, b, a = self.pop(), self.pop(), self.pop()
        self.push((a, b, c))

    def op_list(self, _: Any) -> None:
        self.push(self.since_mark())

    def op_append(self, _: Any) -> None:
        value = self.pop()
        self._extend([value])

    def op_appends(self, _: Any) -> None:
        self._extend(self.since_mark())

    def _extend(self, values: list[Any]) -> None:
        target = self.top()
        _check(type(target) is list, "list")
        target.extend(values)

    def op_dict(self, _: Any) -> None:
        values = self.since_mark()
        self.push({})
        self._update(values)

    def op_setitem(self, _: Any) -> None:
        value, key = self.pop(), self.pop()
        self._update([key, value])

    def op_setitems(self, _: Any) -> None:
        self._update(self.since_mark())

    def _update(self, values: list[Any]) -> None:
        target = self.top()
        _check(type(target) in (dict, OrderedDict) and len(values) % 2 == 0, "dict")
        _check_keys(values[::2])
        target.update(zip(values[::2], values[1::2], strict=True))

    def op_additems(self, _: Any) -> None:
        values, target = self.since_mark(), self.top()
        _check(type(target) is set, "set")
        _check_keys(values)
        target.update(values)

    def op_frozenset(self, _: Any) -> None:
        values = self.since_mark()
        _check_keys(values)
        self.push(frozenset(values))

    # Names, and what is made of them.
    def _named(self, module: Any, name: Any) -> Any:
        _check(type(module) is str and type(name) is str, "global")
        full = f"{module}.{name}"
        if full in self.extra:
            return self.extra[full]
        if full not in GLOBALS:
            raise UnsafePickle(
                f"pickle: {self.name} asks for {full}, which is not on the list of harmless globals; "
                "it was not imported and nothing was run"
            )
        return GLOBALS[full]

    def _make(self, kind: Any, args: Any) -> None:
        if not isinstance(kind, Global):
            raise UnsafePickle(f"pickle: {self.name} calls a {type(kind).__name__}; only listed globals make data")
        _check(type(args) is tuple, "arguments")
        try:
            self.push(kind.make(*args))
        except (ValueError, TypeError, RuntimeError) as error:
            raise error if isinstance(error, UnsafePickle) else ValueError(f"{kind.name}: {error}") from error

    def op_global(self, value: str) -> None:
        module, _, name = value.partition(" ")
        self.push(self._named(module, name))

    def op_stack_global(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        self.push(self._named(module, name))

    def op_inst(self, value: str) -> None:
        module, _, name = value.partition(" ")
        self._make(self._named(module, name), tuple(self.since_mark()))

    def op_obj(self, _: Any) -> None:
        kind, *args = self.since_mark()
        self._make(kind, tuple(args))

    def op_reduce(self, _: Any) -> None:
        args, kind = self.pop(), self.pop()
        self._make(kind, args)

    op_newobj = op_reduce

    def op_build(self, _: Any) -> None:
        state, target = self.pop(), self.top()
        if isinstance(target, Object):
            _check(isinstance(state, dict) and all(type(k) is str for k in state), "state")
            target.state.update(state)  # a dict of ours: "__class__" is a key like any other
        elif type(target) is OrderedDict:  # a state_dict carries its version numbers as an attribute
            _check(isinstance(state, dict) and set(state) <= {"_metadata"}, "state of an OrderedDict")
        elif type(target) is np.ndarray:
            self._fill_array(target, state)
        elif isinstance(target, Dtype):
            target.build(state)
        else:
            raise UnsafePickle(f"pickle: {self.name} sets the state of a {type(target).__name__}; it is refused")

    @staticmethod
    def _fill_array(target: np.ndarray[Any, Any], state: Any) -> None:
        _check(type(state) is tuple and len(state) == 5, "numpy array")
        _, shape, dtype, fortran, raw = state
        raw = raw.encode("latin1") if type(raw) is str else raw
        _check(_whole(shape) and isinstance(dtype, Dtype) and type(raw) is bytes, "numpy array")
        _check(len(raw) == dtype.value.itemsize * math.prod(shape), "numpy array")
        restore: Any = target.__setstate__
        restore((1, shape, dtype.value, bool(fortran), raw))

    def op_binpersid(self, _: Any) -> None:
        _check(self.persistent is not None, "persistent id: this container has none")
        assert self.persistent is not None
        self.push(self.persistent(self.pop()))
