"""read_tensors: reads tensors and plain values whatever else a file holds, and runs nothing."""

import functools
import os
import pickle
import posix
import tarfile
import tempfile
import zipfile
from collections import Counter, OrderedDict, defaultdict
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch

from kd_lightning.runs.unpickling import Stub, find_stub, read_tensors


class Color(Enum):
    RED = 1


class Names(list):
    """A list of a class of its own, with a state."""


class Slots:
    __slots__ = ("a", "b")

    def __init__(self):
        self.a, self.b = 1, [2]


class Calls:
    """Pickles to a call, or to a chain of calls."""

    def __init__(self, function, *args, state=None):
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.reduced

    def __call__(self):
        """Pickle requires that what is called can be called."""


ODD = {
    "path": Path("a/b"),
    "enum": Color.RED,
    "class": torch.optim.Adam,
    "function": os.path.join,
    "partial": functools.partial(torch.optim.SGD, lr=0.1),
    "list": Names([1, Path("a")]),
    "mapping": defaultdict(list, {"a": [1]}),
    "slots": Slots(),
    "numpy": np.float64(1.5),
    "array": np.arange(3),
    "module": torch.nn.Linear(2, 2),
    "keys": {Path("a"): 1},
    "set": {Path("a")},
}
PLAIN = {
    "tensor": torch.arange(6.0).view(2, 3).t(),
    "parameter": torch.nn.Parameter(torch.ones(2)),
    "half": torch.ones(2, dtype=torch.bfloat16),
    "float8": torch.ones(4).to(torch.float8_e4m3fn),
    "counter": Counter({3: 2}),
    "ordered": OrderedDict(a=1),
    "size": torch.Size([1, 2]),
    "dtype": torch.float16,
    "device": torch.device("cpu"),
    "bytes": b"\x00\xff",
    "bytearray": bytearray(b"ab"),
    "set": {1, 2},
    "frozenset": frozenset({1}),
    "complex": 1j,
    "nested": [(1, 2.5), {"a": None, 2: True}],
    "huge": 10**40,
}


def write_pickle(content: bytes, path: Path) -> None:
    """Put a pickle into a file as of torch.save."""
    torch.save({"a": torch.ones(3)}, path.with_suffix(".whole"))
    with zipfile.ZipFile(path.with_suffix(".whole")) as whole, zipfile.ZipFile(path, "w") as archive:
        for name in whole.namelist():
            archive.writestr(name, content if name.endswith("data.pkl") else whole.read(name))


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("odd", ODD)
def test_tensors_and_plain_values_beside_odd_objects(tmp_path, odd, mmap):
    torch.save(PLAIN | {"odd": {"inner": [ODD[odd]]}}, tmp_path / "a.pt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "a.pt", weights_only=True)
    found = read_tensors(tmp_path / "a.pt", mmap=mmap)
    place, name = find_stub(found)
    assert place.startswith("odd.inner.0")
    assert "." in name
    del found["odd"]
    assert find_stub(found) is None
    assert found.keys() == PLAIN.keys()
    for key, value in PLAIN.items():
        assert type(found[key]) is type(value)
        if isinstance(value, torch.Tensor):
            assert found[key].dtype == value.dtype
            assert torch.equal(found[key].float(), value.float())
        else:
            assert found[key] == value


def test_tensors_that_share_memory_still_do(tmp_path):
    whole = torch.arange(4.0)
    torch.save({"whole": whole, "part": whole[1:], "odd": Path("a")}, tmp_path / "a.pt")
    found = read_tensors(tmp_path / "a.pt")
    found["whole"].zero_()
    assert not found["part"].any()


def test_the_attributes_of_a_state_dict_stay(tmp_path):
    state = torch.nn.BatchNorm1d(2).state_dict()
    torch.save({"state_dict": state, "odd": Path("a")}, tmp_path / "a.pt")
    assert read_tensors(tmp_path / "a.pt")["state_dict"]._metadata == state._metadata


@pytest.mark.parametrize("name", ["path", "enum", "class", "keys", "set"])
def test_the_place_of_the_first_object(name):
    assert find_stub({"a": 1, "b": [torch.ones(1)]}) is None
    thing = type("Path", (Stub,), {"name": "pathlib.Path"})
    content = {"path": thing(), "enum": [thing()], "class": thing, "keys": {thing(): 1}, "set": {thing()}}[name]
    place, found = find_stub({"ok": [1], "a": {"b": content}}, "top")
    assert place.startswith("top.a.b")
    assert found == "pathlib.Path"


def test_a_content_that_holds_itself():
    content = [1]
    content.append(content)
    assert find_stub(content) is None


EVIL = {
    "system": lambda file: Calls(os.system, f"touch {file}"),
    "eval": lambda file: Calls(eval, f"open({str(file)!r}, 'w')"),
    "exec": lambda file: Calls(exec, f"open({str(file)!r}, 'w')"),
    "hub": lambda file: Calls(torch.hub.load, str(file), "net"),
    "open": lambda file: Calls(open, str(file), "w"),
    "getattr": lambda file: Calls(Calls(getattr, Calls(__import__, "os"), "system"), f"touch {file}"),
    "torch.load": lambda file: Calls(torch.load, str(file)),
    "state": lambda file: Calls(functools.partial, print, state=(os.system, (f"touch {file}",), {}, None)),
    "set of calls": lambda file: Calls(set, Calls(map, os.system, [f"touch {file}"])),
    "hooks": lambda file: Calls(torch._utils._rebuild_parameter, torch.ones(1), True, {0: os.system}),
    "attributes": lambda file: Calls(
        torch._utils._rebuild_parameter_with_state, torch.ones(1), True, OrderedDict(), {"__class__": Color}
    ),
}


@pytest.mark.parametrize("evil", EVIL)
@pytest.mark.parametrize("protocol", [2, 4])
def test_nothing_runs(tmp_path, evil, protocol):
    file = tmp_path / "evil"
    content = {"weight": torch.ones(2), "evil": EVIL[evil](file), "after": 3}
    torch.save(content, tmp_path / "a.pt", pickle_protocol=protocol)
    found = read_tensors(tmp_path / "a.pt")
    assert not file.exists()
    assert torch.equal(found["weight"], torch.ones(2))
    assert found["after"] == 3


@pytest.mark.parametrize(
    "arguments", [(), (1,), ("a", 0, (1,), (1,), False, {}), (Path("a"), 0, (10**9,), (1,), False, OrderedDict())]
)
def test_a_tensor_that_cannot_be_built(tmp_path, arguments):
    torch.save([Path("a"), {"odd": Calls(torch._utils._rebuild_tensor_v2, *arguments)}], tmp_path / "a.pt")
    assert find_stub(read_tensors(tmp_path / "a.pt")[1]) == ("odd", "torch._utils._rebuild_tensor_v2")


def test_a_size_beyond_the_file(tmp_path):
    def grow(tensor):
        reduced = tensor.__reduce_ex__(2)
        return Calls(reduced[0], reduced[1][0], 0, (10**6,), (1,), False, OrderedDict())

    torch.save([Path("a"), {"odd": grow(torch.ones(2))}], tmp_path / "a.pt")
    assert find_stub(read_tensors(tmp_path / "a.pt", mmap=True)[1]) == ("odd", "torch._utils._rebuild_tensor_v2")


# raw pickles, one for each way to build an object
G = b"cposix\nsystem\n"
ARG = b"(X\x04\x00\x00\x00true"
RAW = {
    "REDUCE": G + ARG + b"tR.",
    "OBJ": b"(" + G + ARG[1:] + b"o.",
    "INST": ARG + b"iposix\nsystem\n.",
    "NEWOBJ": G + ARG + b"t\x81.",
    "NEWOBJ_EX": G + ARG + b"t}\x92.",
    "BUILD": G + ARG + b"tR}X\x01\x00\x00\x00aK\x01sb.",
    "STACK_GLOBAL": b"\x8c\x05posix\x8c\x06system\x93" + ARG + b"tR.",
    "dotted name": b"\x80\x04\x8c\x02os\x8c\x0epath.os.system\x93" + ARG + b"tR.",
    "call of a call": G + ARG + b"tR" + ARG + b"tR.",
}
# raw pickles that would change an object of this process; nothing allows it
ATTACKS = {
    "attribute of a function": b"ctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\x00\x00\x00__defaults__K\x01s\x86b.",
    "attribute of a class": b"ctorch.storage\nUntypedStorage\nN}X\x04\x00\x00\x00evilK\x01s\x86b.",
}
BROKEN = {
    "attribute of a module": b"ctorch\nhub\n}X\x04\x00\x00\x00evilK\x01sb.",
    "EXT": b"\x82\x01.",
    "persistent id": b"X\x01\x00\x00\x00aQ.",
    "nested persistent id": b"(X\x07\x00\x00\x00storage(X\x07\x00\x00\x00storageK\x01tQK\x01K\x01K\x01tQ.",
    "call of a number": b"K\x01)R.",
    "empty stack": b"R.",
    "no end": b"K\x01",
}


@pytest.mark.parametrize("name", [*RAW, *ATTACKS])
def test_every_way_to_build_an_object(tmp_path, monkeypatch, name):
    called = []
    for module in (os, posix):
        monkeypatch.setattr(module, "system", called.append)
    defaults = torch._utils._rebuild_tensor_v2.__defaults__
    write_pickle((RAW | ATTACKS)[name], tmp_path / "a.pt")
    assert find_stub([read_tensors(tmp_path / "a.pt")]) is not None
    assert not called
    assert torch._utils._rebuild_tensor_v2.__defaults__ == defaults
    assert not hasattr(torch.UntypedStorage, "evil")


@pytest.mark.parametrize("name", BROKEN)
def test_broken_pickles(tmp_path, name):
    write_pickle(BROKEN[name], tmp_path / "a.pt")
    with pytest.raises((pickle.UnpicklingError, AssertionError, EOFError, IndexError, ValueError)):
        read_tensors(tmp_path / "a.pt")
    assert not hasattr(torch.hub, "evil")


def test_an_open_file(tmp_path):
    for content in ({"a": torch.ones(1)}, {"a": torch.ones(1), "odd": Path("a")}):
        torch.save(content, tmp_path / "a.pt")
        with (tmp_path / "a.pt").open("rb") as file:
            assert torch.equal(read_tensors(file)["a"], torch.ones(1))


def test_older_format(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(read_tensors(tmp_path / "a.pt", mmap=True)["a"], torch.ones(1))
    content = {"a": torch.arange(3), "odd": Path("a"), "b": torch.ones(2, 2)[0]}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    with (tmp_path / "a.pt").open("rb") as file:
        for found in (read_tensors(tmp_path / "a.pt", mmap=True), read_tensors(file)):
            assert torch.equal(found["a"], torch.arange(3))
            assert torch.equal(found["b"], torch.ones(2))
            assert find_stub(found) == ("odd", "pathlib.PosixPath")


@pytest.mark.parametrize("content", [b"", b"text", pickle.dumps({"a": torch.ones(1)}), pickle.dumps(Path("a"))])
def test_files_of_another_kind(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises((pickle.UnpicklingError, EOFError, RuntimeError, IndexError)):
        read_tensors(tmp_path / "a.pt")


def test_an_archive_of_the_oldest_format_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temp"))
    (tmp_path / "temp").mkdir()
    (tmp_path / "storages").write_bytes(pickle.dumps(Path("a")))
    with tarfile.open(tmp_path / "a.pt", "w") as archive:
        archive.add(tmp_path / "storages", "storages")
    with pytest.raises((pickle.UnpicklingError, RuntimeError)):
        read_tensors(tmp_path / "a.pt")
    assert not list((tmp_path / "temp").iterdir())
