"""Read files of ``torch.save`` without running code, whatever objects they hold."""

from __future__ import annotations

import collections
import io
import pickle
import types
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch


class Stub:
    """Stands for an object of a class that is not read. It accepts what an unpickler does to objects, and ignores it.

    Attributes:
        name: The dotted name of the class or function in the file.
    """

    name = ""
    dump_patches = False  # torch reads it of classes in files of its older format

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Ignore all arguments."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return another stub: the file calls the result of a call."""
        return type(self)()

    def __setstate__(self, state: Any) -> None:
        """Ignore a state."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Ignore an item of a mapping."""

    def append(self, item: Any) -> None:
        """Ignore an item of a list."""

    extend = add = append

    def __repr__(self) -> str:
        return f"<{self.name}, not read>"


class _Allowed(Stub):
    """Stands for a function that may be called. A new one for each file: whatever is set on it changes nothing else."""

    def __init__(self, name: str, function: Any) -> None:
        self.name = name
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function; odd arguments give a stub."""
        try:
            return self.function(*args)
        except Exception:  # the arguments come from the file
            return _stub_class(self.name)()


class _UntypedStorage(Stub):
    """Stands for ``torch.UntypedStorage``, of which torch reads the dtype alone."""

    name = "torch.storage.UntypedStorage"
    dtype = torch.uint8


class Unpickler(pickle.Unpickler):
    """Finds tensors and plain values; anything else becomes a :class:`Stub`."""

    def find_class(self, module: str, name: str, /) -> Any:
        """Return what a name in the file stands for; nothing is imported."""
        module = {"__builtin__": "builtins"}.get(module, module)
        place = f"{module}.{name}"
        if place == _UntypedStorage.name:
            return _UntypedStorage()
        if place in _FUNCTIONS:
            return _Allowed(place, _FUNCTIONS[place])
        if module == "torch" and isinstance(constant := vars(torch).get(name), _CONSTANTS):
            return constant
        return _stub_class(place)


def read_tensors(file: str | Path | IO[bytes], *, mmap: bool = False) -> Any:
    """Read a file that ``torch.save`` has written. Nothing in it is executed.

    Args:
        file: A path, or an open file.
        mmap: Leave the tensors on disk until they are used. It needs a path.

    Returns:
        The content. An object that is neither a tensor nor a plain value is a :class:`Stub`; see :func:`find_stub`.

    Raises:
        pickle.UnpicklingError: If the file is made in another way than ``torch.save`` makes files.
        Exception: Any other, if the file is damaged.
    """
    mmap = mmap and zipfile.is_zipfile(file)  # torch refuses it for the older format
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError:
        is_zip = zipfile.is_zipfile(file)
    if not isinstance(file, str | Path):
        file.seek(0)
    if not is_zip:  # the older format; torch would unpack a file of the oldest, an archive of files
        file = io.BytesIO(Path(file).read_bytes() if isinstance(file, str | Path) else file.read())
    reader = types.SimpleNamespace(__name__=__name__, Unpickler=Unpickler, load=_load)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the source code of classes is not compared
            return torch.load(file, map_location="cpu", weights_only=False, mmap=mmap, pickle_module=reader)
    except Exception as error:  # what an odd file raises can be anything
        raise pickle.UnpicklingError(str(error)) from error


def find_stub(content: Any, place: str = "") -> tuple[str, str] | None:
    """Return the place and the class of the first object in a content that was not read.

    Args:
        content: A content of :func:`read_tensors`.
        place: The place of the content itself.

    Returns:
        The keys that lead to the object, joined by dots, and its class; None if there is no such object.
    """
    todo, seen = [(place, content)], set()
    while todo:
        place, value = todo.pop()
        if isinstance(value, Stub) or (isinstance(value, type) and issubclass(value, Stub)):
            return place, value.name
        if not isinstance(value, _CONTAINERS) or id(value) in seen:
            continue
        seen.add(id(value))  # a list can hold itself
        if isinstance(value, Mapping):
            parts = [(key, part) for key, held in value.items() for part in (held, key)]
            parts += vars(value).items() if hasattr(value, "__dict__") else []  # as of a state dict
        else:
            parts = [*enumerate(value)]
        todo += [(f"{place}.{key}" if place else str(key), p) for key, p in reversed(parts) if isinstance(p, _MAY_HOLD)]
    return None


def _load(file: IO[bytes], **kwargs: Any) -> Any:
    """Read the next of several pickles in a file of the older format."""
    return Unpickler(file, **kwargs).load()


def _stub_class(name: str) -> type[Stub]:
    return type(name.rsplit(".", 1)[-1], (Stub,), {"name": name})


def _encode(text: Any, encoding: Any) -> bytes:
    """Return bytes, which pickle stores as a text in latin-1."""
    if not isinstance(text, str) or encoding != "latin1":
        raise TypeError
    return text.encode("latin1")


def _rebuild_from_type(rebuild: Any, kind: Any, arguments: Any, state: Any) -> torch.Tensor:
    """Return a tensor without its attributes, or one of a class that adds no state, as a plain tensor."""
    is_tensor = getattr(kind, "name", "") in ("torch.Tensor", "torch._tensor.Tensor")
    if not isinstance(rebuild, _Allowed) or (state and not is_tensor):
        raise TypeError
    tensor = rebuild(*arguments)
    if not isinstance(tensor, torch.Tensor):
        raise TypeError
    return tensor


def _bytearray(content: Any = b"") -> bytearray:
    if not isinstance(content, bytes):  # an integer would take that much memory
        raise TypeError
    return bytearray(content)


_CONTAINERS = (Mapping, list, tuple, set, frozenset)
_MAY_HOLD = (*_CONTAINERS, Stub, type)
_CONSTANTS = (torch.dtype, torch.layout, torch.memory_format, torch.qscheme)
_FUNCTIONS = {
    "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
    "torch._utils._rebuild_tensor_v3": torch._utils._rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": torch._utils._rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": torch._utils._rebuild_parameter_with_state,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch.serialization._get_layout": torch.serialization._get_layout,
    "torch.Size": torch.Size,
    "torch.device": torch.device,
    "collections.OrderedDict": collections.OrderedDict,
    "collections.Counter": collections.Counter,
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    "builtins.complex": complex,
    "builtins.bytearray": _bytearray,
    "_codecs.encode": _encode,
}
