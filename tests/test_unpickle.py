"""Other people's pickles: data comes through whole, code never runs."""

import io
import pickle
import pickletools
import re
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from fastode.interop.pickle_machine import GLOBALS
from fastode.interop.unpickle import Object, UnsafePickle, load_pickle, tensors_of
from tests.pickles import LIVE, Calls, Persistent, as_persistent, attacks, persistence

CONTENTS = {
    "none": None,
    "numbers": [0, -1, 255, 65536, 2**40, -(2**70), 1.5, float("inf"), True, 3 + 4j],
    "text": ["", "ä" * 300, b"", b"\x00\xff" * 200, bytearray(b"ab")],
    "containers": {"a": (1,), (1, 2): [(), (1, 2, 3, 4), [], {}], 3: {1, 2}, "f": frozenset([1])},
    "ordered": OrderedDict([("z", 1), ("a", OrderedDict())]),
    "shape": torch.Size([2, 3]),
}
TENSORS = {
    **{
        str(d): torch.arange(12).reshape(3, 4).to(d)
        for d in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
    },
    "complex": torch.randn(3, dtype=torch.complex64),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
    "transposed": torch.arange(12.0).reshape(3, 4).t(),
    "slice": torch.arange(20.0)[5:15:3],
    "expanded": torch.ones(1, 3).expand(4, 3),
    "parameter": nn.Parameter(torch.randn(2, 2)),
}


def same(a, b):
    if isinstance(b, (torch.Tensor, np.ndarray)):
        return isinstance(b, type(a)) and a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
    if isinstance(b, dict):
        return type(a) is type(b) and list(a) == list(b) and all(same(a[k], b[k]) for k in b)
    if isinstance(b, (list, tuple)) and not isinstance(b, torch.Size):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("protocol", range(6))
def test_plain_data(tmp_path, protocol):
    arrays = [np.arange(6.0).reshape(2, 3), np.array(3, dtype=">i4"), np.asfortranarray(np.eye(3)), np.float32(0.5),
              np.array(["ab", "c"]), np.zeros((0, 2)), np.arange(4, dtype="f2")]  # fmt: skip
    value = {**CONTENTS, "arrays": arrays, "tensors": TENSORS}
    value["again"] = value["containers"]
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(value, protocol))
    read = load_pickle(tmp_path / "a.pkl")
    value = pickle.loads(pickle.dumps(value, protocol))  # Python's own reading: NumPy turns big-endian arrays around
    assert same({**read, "shape": 0}, {**value, "shape": 0}) and tuple(read["shape"]) == (2, 3)
    assert read["again"] is read["containers"]  # what was shared is shared


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files(tmp_path, zipped):
    shared = torch.arange(10.0)
    value = {**CONTENTS, "tensors": TENSORS, "views": [shared, shared[2:5]], "dtype": torch.float16,
             "device": torch.device("cpu")}  # fmt: skip
    value["module"] = nn.Linear(2, 2).state_dict()  # an OrderedDict with an attribute
    torch.save(value, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    read = load_pickle(tmp_path / "a.pt")
    assert same({**read, "shape": 0, "device": 0}, {**value, "shape": 0, "device": 0}) and read["device"] == "cpu"
    assert read["views"][0].untyped_storage().data_ptr() == read["views"][1].untyped_storage().data_ptr()
    assert tensors_of(read["module"]).keys() == {"weight", "bias"}


def test_objects_are_data(tmp_path):
    """A persistent object carries source code that its owner's loader runs. Here it is a name, its arguments, its tensors."""
    network = nn.Sequential(nn.Linear(3, 4), nn.ModuleDict({"a": nn.GroupNorm(2, 4)}), nn.BatchNorm1d(2))
    kwargs = {"hidden_dim": 128, "afs": True, "scale_dir": 0.01}
    with persistence() as make:
        names = {nn.Linear: "Linear", nn.GroupNorm: "GroupNorm", nn.Sequential: "AMED_predictor", nn.BatchNorm1d: "BN"}
        value = as_persistent(network, make, names, _init_args=(), _init_kwargs=kwargs, num_steps=4)
        raw = pickle.dumps({"model": value, "loss_fn": Persistent(make, "AMED_loss", {"num_steps": 4})})
    (tmp_path / "network-snapshot-000010.pkl").write_bytes(raw)
    read = load_pickle(tmp_path / "network-snapshot-000010.pkl")
    model = read["model"]
    assert isinstance(model, Object) and (model.class_name, model.init_kwargs) == ("AMED_predictor", kwargs)
    assert model["num_steps"] == 4 and read["loss_fn"]["num_steps"] == 4 and model.init_args == ()
    expected = network.state_dict()
    assert model.tensors().keys() == expected.keys() and all(same(v, expected[k]) for k, v in model.tensors().items())
    assert isinstance(model["1"], Object) and model["1"].class_name == "torch.nn.modules.container.ModuleDict"
    assert "RuntimeError" not in repr(model.state.keys())
    with pytest.raises(KeyError, match="AMED_predictor has no 'fc_q'"):
        model["fc_q"]


# -- attacks ---------------------------------------------------------------------------------------------------------------


def containers(raw: bytes, path):
    """The attack in every container that is accepted."""
    state = {"_parameters": {}, "_modules": {}, "training": False}
    out = {"plain": raw}
    if raw.endswith(b"."):
        body = raw[2:-1] if raw[:1] == b"\x80" else raw[:-1]
        body = body[9:] if raw[2:3] == b"\x95" else body  # the frame of protocol 4
        with persistence() as make:
            for name, wrapped in {
                "EDM payload": {"ema": Persistent(make, "EDMPrecond", {**state, "evil": "HERE"})},
                "predictor": {"model": Persistent(make, "AMED_predictor", {**state, "evil": "HERE"}), "loss_fn": None},
                "checkpoint": {"model": OrderedDict(), "optimizer": {"state": "HERE"}},
            }.items():
                inside = pickle.dumps(wrapped, 2)
                here = pickle.BINUNICODE + b"\x04\x00\x00\x00HERE"
                at = inside.index(here)
                after = inside[at + len(here) + 2 :]  # without the memo entry of the string
                memo = bytes_without_memo(body)
                out[name] = inside[:at] + memo + after
    files = {}
    for name, data in out.items():
        files[name] = path / f"{name}.pkl"
        files[name].write_bytes(data)
        torch.save({"a": torch.ones(2)}, path / "ok.pt")
        files[f"zip, {name}"] = path / f"{name}.pt"
        with zipfile.ZipFile(path / "ok.pt") as source, zipfile.ZipFile(files[f"zip, {name}"], "w") as target:
            for item in source.namelist():
                target.writestr(item, data if item.endswith("data.pkl") else source.read(item))
        files[f"before 1.6, {name}"] = path / f"{name}.old.pt"
        legacy = io.BytesIO()
        for value in (
            0x1950A86A20F9469CFC6C,
            1001,
            {"protocol_version": 1001, "little_endian": True, "type_sizes": {}},
        ):
            pickle.dump(value, legacy, 2)
        legacy.write(data)
        pickle.dump([], legacy, 2)
        files[f"before 1.6, {name}"].write_bytes(legacy.getvalue())
    return files


def bytes_without_memo(body: bytes) -> bytes:
    """Opcodes without the memo's: the attacks never read it, and their numbers would clash with those around them."""
    data, kept = body + b".", b""
    positions = [(op.name, at) for op, _, at in pickletools.genops(data)]
    for (name, at), (_, end) in zip(positions, [*positions[1:], (None, len(data))], strict=True):
        if name not in ("MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT", "FRAME", "PROTO", "STOP"):
            kept += data[at:end]
    return kept


@pytest.mark.parametrize("name", list(attacks("x")))
def test_refused_everywhere(tmp_path, name):
    marker = tmp_path / "executed"
    raw, named = attacks(str(marker))[name]
    for where, file in containers(raw, tmp_path).items():
        with pytest.raises(ValueError, match="pickle: ") as caught:
            load_pickle(file)
        assert re.search(named, str(caught.value)), (where, caught.value)
        assert not marker.exists(), where


@pytest.mark.parametrize("name", LIVE)
def test_the_attacks_are_real(tmp_path, name):
    """Python's own loader does what they ask: the tests above can fail."""
    raw, _ = attacks(str(tmp_path / "executed"))[name]
    pickle.loads(raw)
    assert (tmp_path / "executed").exists()


def test_source_code_of_a_payload_is_not_run(tmp_path):
    marker = tmp_path / "executed"
    source = f"open({str(marker)!r}, 'w').close()\nclass Net: ...\n"
    with persistence() as make:
        (tmp_path / "a.pkl").write_bytes(pickle.dumps({"ema": Persistent(make, "Net", {"a": 1}, source)}))
    assert load_pickle(tmp_path / "a.pkl")["ema"].state == {"a": 1} and not marker.exists()


def test_poisoned_attributes_stay_data(tmp_path):
    """What would be ``__class__`` or ``__setstate__`` of an object is a key of a dict: nothing looks for it there."""
    state = {"__class__": "x", "__setstate__": "y", "__reduce__": "z", "_modules": {"a": "not a module"}, "_buffers": 3}
    with persistence() as make:
        raw = pickle.dumps(Persistent(make, "Net", state))
    (tmp_path / "a.pkl").write_bytes(raw)
    read = load_pickle(tmp_path / "a.pkl")
    assert type(read) is Object and read.state["__class__"] == "x" and read.tensors() == {}


def test_the_list_holds_no_foreign_function():
    """What a listed name stands for is ours, or a dtype: never what the name means in Python."""
    for name, entry in GLOBALS.items():
        made = getattr(entry, "make", None)
        assert made is None or made.__module__ == "fastode.interop.pickle_machine", name


def test_unknown_names_are_named(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"x": Calls(io.BytesIO)}))
    with pytest.raises(UnsafePickle, match=r"a\.pkl asks for _io\.BytesIO, which is not on the list"):
        load_pickle(tmp_path / "a.pkl")


@pytest.mark.parametrize("kind", ["plain", "zip", "old"])
def test_damage_is_an_error(tmp_path, kind):
    """Bytes changed at random: data or ``ValueError``, never anything else, and no memory beyond the file's size."""
    value = {"a": torch.arange(6.0), "b": OrderedDict(c=[1, (2, "x")]), "d": np.arange(3.0)}
    path = tmp_path / "a.pt"
    if kind == "plain":
        path.write_bytes(pickle.dumps(value))
    else:
        torch.save({k: value[k] for k in "ab"}, path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    rng, read = np.random.default_rng(0), 0
    for trial in range(400):
        bad = bytearray(whole[: rng.integers(1, len(whole))] if trial % 4 == 0 else whole)
        for at in rng.integers(0, len(bad), rng.integers(1, 4)):
            bad[at] = rng.integers(0, 256)
        path.write_bytes(bad)
        try:
            load_pickle(path)
            read += 1
        except ValueError:
            pass
    assert 0 < read < 400


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_pickle(tmp_path / "none.pkl")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("readme", "x")
    with pytest.raises(ValueError, match=r"zip file without one data\.pkl"):
        load_pickle(tmp_path / "a.zip")
    (tmp_path / "deep.pkl").write_bytes(b"\x80\x02}" + b")" + b"\x85" * 100000 + b"K\x01s.")
    with pytest.raises(ValueError, match="malformed key"):  # hashing it would overrun the interpreter's stack
        load_pickle(tmp_path / "deep.pkl")
    storage = (
        b"\x80\x02(" + text_op("storage") + b"ctorch\nFloatStorage\n" + text_op("0") + text_op("cpu") + b"K\x02NtQ"
    )
    torch.save({"a": torch.ones(2)}, tmp_path / "ok.pt")
    for name, size, stride in (("beyond", 3, 1), ("before", 2, -1)):
        numbers = f"(I{size}\nt(I{stride}\ntI00\nNtR.".encode()
        main = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage.replace(b"\x80\x02", b"") + b"K\x00" + numbers
        with zipfile.ZipFile(tmp_path / "ok.pt") as source, zipfile.ZipFile(tmp_path / f"{name}.pt", "w") as target:
            for item in source.namelist():
                target.writestr(item, main if item.endswith("data.pkl") else source.read(item))
        with pytest.raises(ValueError, match="malformed tensor"):
            load_pickle(tmp_path / f"{name}.pt")
    with pytest.raises(ValueError, match="expected a state dict of tensors by name, got a dict with model, ema"):
        tensors_of({"model": 1, "ema": 2})


def text_op(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()
