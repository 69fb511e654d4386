"""What tells one transform, network or function from another: a hash of its code and of all that it holds."""

from __future__ import annotations

import functools
import hashlib
import inspect
import re
import types
from collections.abc import Mapping, Set
from enum import Enum
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_PLAIN = (type(None), type(...), bool, int, float, complex, str, bytes, PurePath, torch.dtype, torch.device, torch.Size)
# what every nn.Module holds beside its content: its mode, and hooks
_BOOKKEEPING = {*vars(nn.Module()), "_compiled_call_impl"} - {"_parameters", "_buffers", "_modules"}


def fingerprint(thing: Any) -> str:
    """SHA-256 of an object's class, its source, and all attributes, down to numbers; the same in every process.

    Functions and lambdas count by their code, defaults and closure. What a function takes from its module's globals is
    not followed.

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
        update(f"{thing.__module__}.{thing.__qualname__};".encode())
        held = inspect.getclosurevars(thing).nonlocals
        go(_code(thing.__code__), thing.__defaults__, thing.__kwdefaults__, held)
    elif isinstance(thing, type | types.BuiltinFunctionType | types.ModuleType):
        update(f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', thing.__name__)};".encode())
        update(_source(thing) if isinstance(thing, type) else b"")
    else:
        update(_source(type(thing)))
        slots = [n for c in type(thing).__mro__ for n in getattr(c, "__slots__", ()) if hasattr(thing, n)]
        state = getattr(thing, "__dict__", {}) | {name: getattr(thing, name) for name in slots}
        go({key: value for key, value in state.items() if not (isinstance(thing, nn.Module) and key in _BOOKKEEPING)})
        if not state:
            update(re.sub(r"0x[0-9a-f]+", "", repr(thing)).encode())
    update(b")")


def _source(kind: Any) -> bytes:
    """The source of a class and of those that it is built on, torch's aside, whose version says as much."""
    found = b""
    for one in getattr(kind, "__mro__", (kind,)):
        if one.__module__.split(".")[0] in ("builtins", "torch", "abc", "typing"):
            continue
        try:
            found += inspect.getsource(one).encode()
        except (OSError, TypeError):  # made in a prompt, or in C: its methods' code, where there is any
            methods = [m.__code__ for m in vars(one).values() if isinstance(m, types.FunctionType)]
            found += fingerprint([_code(code) for code in methods]).encode()
    return found


def _code(code: types.CodeType) -> list[Any]:
    constants = [_code(c) if isinstance(c, types.CodeType) else c for c in code.co_consts]
    return [code.co_code.hex(), [*code.co_names], [*code.co_varnames], constants]
