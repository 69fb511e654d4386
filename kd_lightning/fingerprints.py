"""What tells one transform, network or function from another: a hash of its code and of all that it holds."""

from __future__ import annotations

import functools
import hashlib
import re
import sys
import types
from collections.abc import Mapping, Set
from enum import Enum
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from PIL import Image
from torch import Tensor, nn

_PLAIN = (type(None), type(...), bool, int, float, complex, str, bytes, PurePath, torch.dtype, torch.device, torch.Size)
# whose code is known by their version
_KNOWN = (
    "builtins",
    "torch",
    "torchvision",
    "numpy",
    "PIL",
    "abc",
    "typing",
    "enum",
    "functools",
    "collections",
    "math",
)
# what every module holds beside its content: its mode, hooks, and the trainer that it was under
_CONTENT = {"_parameters", "_buffers", "_modules"}
_BOOKKEEPING = {kind: {*vars(kind()), "_compiled_call_impl"} - _CONTENT for kind in (LightningModule, nn.Module)}
_GLOBALS = (*_PLAIN, Enum, Tensor, np.ndarray, list, tuple, Mapping, Set, types.FunctionType, type)


def fingerprint(thing: Any) -> str:
    """SHA-256 of an object's class, its code, and all attributes, down to numbers; the same in every process.

    Functions, lambdas and methods count by their code, defaults and closure; in modules that are not installed as
    packages also by what they name: other functions, classes, and plain values. Code of torch, torchvision and numpy
    counts by name alone.

    >>> fingerprint([1, 2.0]) == fingerprint([1, 2.0]) != fingerprint([1, 2])
    True
    """
    digest = hashlib.sha256()
    _feed(thing, digest.update, {})
    return digest.hexdigest()


def _feed(thing: Any, update: Any, seen: dict[int, tuple[int, Any]]) -> None:
    if isinstance(thing, Enum):
        update(f"{type(thing).__qualname__}.{thing.name};".encode())
        return
    if isinstance(thing, _PLAIN):
        update(f"{type(thing).__name__}:{thing!r};".encode())
        return
    if id(thing) in seen:  # also ends circles
        update(f"seen {seen[id(thing)][0]};".encode())
        return
    seen[id(thing)] = len(seen), thing  # kept alive, so that no other object gets this id

    def go(*parts: Any) -> None:
        for part in parts:
            _feed(part, update, seen)

    update(f"{type(thing).__module__}.{type(thing).__qualname__}(".encode())
    if isinstance(thing, Tensor):
        go(str(thing.dtype), [*thing.shape], thing.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    elif isinstance(thing, np.ndarray) and thing.dtype != object:
        go(str(thing.dtype), [*thing.shape])
        update(np.ascontiguousarray(thing).tobytes())
    elif isinstance(thing, Image.Image):
        go(thing.mode, thing.size, thing.tobytes())
    elif isinstance(thing, Mapping):
        go(*(part for item in thing.items() for part in item))
    elif isinstance(thing, Set):
        go(*sorted(map(fingerprint, thing)))
    elif isinstance(thing, list | tuple):
        go(*thing)
    elif isinstance(thing, functools.partial):
        go(thing.func, thing.args, thing.keywords)
    elif isinstance(thing, types.MethodType):
        go(thing.__func__, thing.__self__)
    elif isinstance(thing, types.FunctionType):
        go(f"{thing.__module__}.{thing.__qualname__}")
        if not _is_known(thing):
            cells = [cell.cell_contents for cell in thing.__closure__ or () if cell != types.CellType()]
            named = {name: thing.__globals__.get(name) for name in _names(thing.__code__) if not _is_installed(thing)}
            named = {name: value for name, value in named.items() if isinstance(value, _GLOBALS)}
            go(_code(thing.__code__), thing.__defaults__, thing.__kwdefaults__, cells, named)
    elif isinstance(thing, staticmethod | classmethod):
        go(thing.__func__)
    elif isinstance(thing, property):
        go(thing.fget)
    elif isinstance(thing, type):
        for kind in thing.__mro__:
            go(f"{kind.__module__}.{kind.__qualname__}")
            if not _is_known(kind):
                held = vars(kind).items()
                go({name: value for name, value in held if isinstance(value, _MEMBERS) and name not in _OF_CLASSES})
    elif isinstance(thing, types.BuiltinFunctionType | types.ModuleType):
        go(f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', thing.__name__)}")
    else:
        go(type(thing))
        slots = [n for c in type(thing).__mro__ for n in getattr(c, "__slots__", ()) if hasattr(thing, n)]
        state = getattr(thing, "__dict__", {}) | {name: getattr(thing, name) for name in slots}
        apart = next((names for kind, names in _BOOKKEEPING.items() if isinstance(thing, kind)), set())
        go({key: value for key, value in state.items() if key not in apart})
        if not state:
            update(re.sub(r"0x[0-9a-f]+", "", repr(thing)).encode())
    update(b")")


_MEMBERS = (*_GLOBALS, staticmethod, classmethod, property, functools.partial)
_OF_CLASSES = {"__module__", "__doc__", "__annotations__", "__dict__", "__weakref__", "__firstlineno__", "__slots__"}


def _is_known(thing: Any) -> bool:
    return str(thing.__module__).split(".")[0] in _KNOWN


def _is_installed(thing: Any) -> bool:
    file = getattr(sys.modules.get(thing.__module__), "__file__", None) or ""
    return not {"site-packages", "dist-packages"}.isdisjoint(PurePath(file).parts)


def _names(code: types.CodeType) -> list[str]:
    """All names that a function and those within it may look up in their module."""
    inner = [name for constant in code.co_consts if isinstance(constant, types.CodeType) for name in _names(constant)]
    return [*dict.fromkeys([*code.co_names, *inner])]


def _code(code: types.CodeType) -> list[Any]:
    constants = [_code(c) if isinstance(c, types.CodeType) else c for c in code.co_consts]
    return [code.co_code.hex(), [*code.co_names], [*code.co_varnames], constants]
