"""Fingerprints of transforms, networks and functions: hashes of their code and all their attributes."""

from __future__ import annotations

import functools
import hashlib
import io
import logging
import re
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Set
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from PIL import Image
from torch import Tensor, nn

from kd_lightning.errors import InputError

_ATOMS = (type(None), bool, int, float, complex, str, bytes)
_PLAIN = (*_ATOMS, type(...), PurePath, torch.dtype, torch.device, torch.Size)
# packages whose code counts by name only
_KNOWN = {"torch", "torchvision", "numpy", "PIL", *sys.stdlib_module_names}
# objects of which only the class counts, since their attributes change at any time
_SERVICES = (logging.Logger, logging.Handler, io.IOBase, threading.Thread)
# attributes of modules that do not count: mode, hooks, trainer, and what torch.compile and Lightning add
_COMPILED = {"_compiled_call_impl", "_is_torch_compile", "_compile_kwargs"}
_CONTENT = {"_parameters", "_buffers", "_modules"}
_BOOKKEEPING = {kind: ({*vars(kind())} | _COMPILED) - _CONTENT for kind in (LightningModule, nn.Module)}
# attributes of classes that do not count
_OF_CLASSES = {"__module__", "__doc__", "__dict__", "__weakref__", "__slots__", "__firstlineno__", "_abc_impl"}
_OF_CLASSES |= {"__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__"}
_OF_CLASSES |= {"__static_attributes__", "__conditional_annotations__"}


def fingerprint(thing: Any, without: Iterable[Any] = ()) -> str:
    """Compute the SHA-256 of an object's class, its code, and all its attributes. It is the same in every process.

    Functions, lambdas and methods count by their code, defaults and closure, and by the functions, classes and values
    that they use from their own and other modules. For functions in installed packages, the file of their module
    counts instead of what they use. Code of torch, torchvision, numpy, Pillow and the standard library counts by name
    only.

    Args:
        thing: Any object.
        without: Objects inside it that do not count.

    Raises:
        InputError: If the object is nested too deeply.

    >>> fingerprint([1, 2.0]) == fingerprint([1, 2.0]) != fingerprint([1, 2])
    True
    """
    digest = hashlib.sha256()
    try:
        _feed(thing, digest.update, {id(one): (number, one) for number, one in enumerate(without)})
    except RecursionError as error:
        raise InputError(f"{type(thing).__name__} is nested too deeply for a fingerprint") from error
    return digest.hexdigest()


def _feed(thing: Any, update: Callable[[Any], None], seen: dict[int, tuple[int, Any]]) -> None:
    if isinstance(thing, nn.Module):
        thing = getattr(thing, "_orig_mod", thing)  # as it is without torch.compile
    if isinstance(thing, _PLAIN) and not isinstance(thing, Enum):
        update(f"{type(thing).__name__}:{thing!r};".encode())
        return
    if id(thing) in seen:  # also ends cycles
        update(f"seen {seen[id(thing)][0]};".encode())
        return
    seen[id(thing)] = len(seen), thing  # the reference prevents that another object gets this id

    def go(*parts: Any) -> None:
        for part in parts:
            _feed(part, update, seen)

    update(f"{type(thing).__module__}.{type(thing).__qualname__}(".encode())
    if isinstance(thing, Enum):
        go(thing.name, thing.value)
    elif isinstance(thing, Tensor):
        go(str(thing.dtype), [*thing.shape], thing.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    elif isinstance(thing, np.ndarray):
        go(str(thing.dtype), [*thing.shape])
        if thing.dtype == object:
            go(thing.tolist())
        else:
            update(np.ascontiguousarray(thing).reshape(-1).view(np.uint8))
    elif isinstance(thing, Image.Image):
        go(thing.mode, thing.size, thing.tobytes())
    elif isinstance(thing, torch.jit.ScriptModule):
        update(thing.save_to_buffer())
    elif isinstance(thing, Mapping | Set | list | tuple | deque):
        if isinstance(thing, list) and all(map(_is_row, thing)):
            update(repr([*thing]).encode())  # in one step, since lists of files are long
        else:
            go(*_items(thing))
        if not _is_known(type(thing)):
            go(type(thing), getattr(thing, "__dict__", None))
    elif isinstance(thing, functools.partial):
        go(thing.func, thing.args, thing.keywords)
    elif isinstance(thing, types.MethodType):
        go(thing.__func__, thing.__self__)
    elif isinstance(thing, types.FunctionType):
        go(f"{thing.__module__}.{thing.__qualname__}")
        if not _is_known(thing):
            cells = [cell.cell_contents for cell in thing.__closure__ or () if cell != types.CellType()]
            go(_code(thing.__code__), thing.__defaults__, thing.__kwdefaults__, cells, vars(thing))
            go(_installed(thing.__module__) or _named(thing.__globals__, _names(thing.__code__), ()))
    elif isinstance(thing, staticmethod | classmethod):
        go(thing.__func__)
    elif isinstance(thing, property):
        go(thing.fget)
    elif isinstance(thing, type):
        for kind in thing.__mro__:
            go(f"{kind.__module__}.{kind.__qualname__}")
            if not _is_known(kind):
                go({name: value for name, value in vars(kind).items() if name not in _OF_CLASSES})
    elif isinstance(thing, types.BuiltinFunctionType | types.ModuleType):
        go(f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', thing.__name__)}")
    elif not isinstance(thing, _SERVICES):
        go(type(thing))
        state = _state(thing)
        go(state)
        if not state:
            update(re.sub(r"0x[0-9a-f]+", "", repr(thing)).encode())
    update(b")")


def _is_row(thing: Any) -> bool:
    """Whether ``repr`` identifies it: a number, a string, or a tuple of these."""
    return type(thing) in _ATOMS or (type(thing) is tuple and all(type(part) in _ATOMS for part in thing))


def _items(thing: Any) -> Iterable[Any]:
    if isinstance(thing, Mapping):
        return (part for item in thing.items() for part in item)
    return sorted(map(fingerprint, thing)) if isinstance(thing, Set) else thing


def _state(thing: Any) -> dict[str, Any]:
    """The attributes of an object, slots included."""
    state = {**getattr(thing, "__dict__", {})}
    for kind in type(thing).__mro__:
        slots = vars(kind).get("__slots__", ())
        for slot in [slots] if isinstance(slots, str) else slots:
            private = slot.startswith("__") and not slot.endswith("__")
            name = f"_{kind.__name__.lstrip('_')}{slot}" if private else slot
            if hasattr(thing, name):
                state[name] = getattr(thing, name)
    if isinstance(thing, nn.Module):
        hooks = [*getattr(thing, "_forward_pre_hooks", {}).values(), *getattr(thing, "_forward_hooks", {}).values()]
        apart = next(names for kind, names in _BOOKKEEPING.items() if isinstance(thing, kind))
        state = {key: value for key, value in state.items() if key not in apart}
        state |= {"hooks": hooks} if hooks else {}  # without their numbers, which count all hooks of the process
    return state


def _is_known(thing: Any) -> bool:
    return str(thing.__module__).split(".")[0] in _KNOWN


def _installed(module: str | None) -> str | None:
    """SHA-256 of a module's file, if it belongs to an installed package."""
    file = getattr(sys.modules.get(module or ""), "__file__", None) or ""
    return None if {"site-packages", "dist-packages"}.isdisjoint(PurePath(file).parts) else _hash_of(file)


@functools.cache
def _hash_of(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def _names(code: types.CodeType) -> list[str]:
    """All names that a function and its inner functions may look up in modules."""
    inner = [name for constant in code.co_consts if isinstance(constant, types.CodeType) for name in _names(constant)]
    return [*dict.fromkeys([*code.co_names, *inner])]


def _named(space: Mapping[str, Any], names: list[str], within: tuple[types.ModuleType, ...]) -> dict[str, Any]:
    """The values of these names in a module, and in the modules that it uses."""
    found = {name: space[name] for name in names if name in space}
    for name, value in found.items():
        own = isinstance(value, types.ModuleType) and value.__name__.split(".")[0] not in _KNOWN
        if own and value not in within:
            found[name] = _installed(value.__name__) or _named(vars(value), names, (*within, value))
    return found


def _code(code: types.CodeType) -> list[Any]:
    constants = [_code(c) if isinstance(c, types.CodeType) else c for c in code.co_consts]
    return [code.co_code.hex(), [*code.co_names], [*code.co_varnames], constants]
