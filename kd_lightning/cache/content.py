"""Fingerprints of transforms, networks and functions: hashes of their code and all their attributes."""

from __future__ import annotations

import copyreg
import functools
import hashlib
import io
import logging
import os
import random
import re
import sys
import sysconfig
import threading
import types
import warnings
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Set, ValuesView
from enum import Enum
from pathlib import Path, PurePath
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningModule
from PIL import Image
from torch import Tensor, nn

from kd_lightning.cache.tensors import parts_of
from kd_lightning.errors import InputError

Code = bool | Literal["functions"]
_ATOMS = (type(None), bool, int, float, complex, str, bytes)
_PLAIN = (*_ATOMS, type(...), PurePath, torch.dtype, torch.device, torch.Size)
# code that counts by its name only: of these packages, and of the standard library, which lies in these folders
_KNOWN = {"torch", "torchvision", "numpy", "PIL", "pandas"}
_INSTALLED = {"site-packages", "dist-packages"}
_STANDARD = {os.path.realpath(path) for path in (os.path.dirname(os.__file__), sysconfig.get_path("stdlib"))}  # noqa: PTH120
# objects of which only the class counts, since their attributes change at any time
_SERVICES = (logging.Logger, logging.Handler, io.IOBase, threading.Thread)
_GENERATORS = (random.Random, np.random.Generator, np.random.BitGenerator, np.random.RandomState, torch.Generator)
# objects that their text identifies
_TEXTS = (types.WrapperDescriptorType, types.MethodDescriptorType, types.MemberDescriptorType, torch.layout)
_TEXTS += (types.GetSetDescriptorType, types.ClassMethodDescriptorType, torch.memory_format, torch.qscheme)  # type: ignore[assignment]
# attributes of modules that do not count: mode, hooks, trainer, and what torch.compile and Lightning add
_COMPILED = {"_compiled_call_impl", "_is_torch_compile", "_compile_kwargs"}
_CONTENT = {"_parameters", "_buffers", "_modules"}
_BOOKKEEPING = {kind: ({*vars(kind())} | _COMPILED) - _CONTENT for kind in (LightningModule, nn.Module)}
# attributes of classes that do not count
_OF_CLASSES = {"__module__", "__doc__", "__dict__", "__weakref__", "__slots__", "__firstlineno__", "_abc_impl"}
_OF_CLASSES |= {"__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__"}
_OF_CLASSES |= {"__slotnames__", "__static_attributes__", "__conditional_annotations__"}


def fingerprint(thing: Any, without: Iterable[Any] = (), *, code: Code = True) -> str:
    """Compute the SHA-256 of an object's class, its code, and all its attributes. It is the same in every process.

    Functions, lambdas and methods count by their code, defaults and closure, and by the functions, classes and values
    that they use from their own and other modules. For functions in installed packages, the file of their module
    counts instead of what they use. Code of torch, torchvision, numpy, Pillow, pandas and the standard library counts
    by name only. Objects without attributes of their own, such as arrays and random generators of other packages, count
    by what pickle would store of them. Objects that have neither (locks, streams) count by their class.

    Args:
        thing: Any object.
        without: Objects inside it that do not count.
        code: Whether code counts. If not, classes and functions count by name, and devices, types of numbers, absolute
            paths, hooks and random generators do not count: the result is the same on another machine and for another
            version. ``"functions"``: functions and lambdas count by their code as well.

    Raises:
        InputError: If the object is nested too deeply.

    >>> fingerprint([1, 2.0]) == fingerprint([1, 2.0]) != fingerprint([1, 2])
    True
    """
    digest = hashlib.sha256()
    try:
        _feed(thing, digest.update, {id(one): (number, one) for number, one in enumerate(without)}, code)
    except RecursionError as error:
        raise InputError(f"{type(thing).__name__} is nested too deeply for a fingerprint") from error
    return digest.hexdigest()


def _feed(thing: Any, update: Callable[[Any], None], seen: dict[int, tuple[int, Any]], code: Code) -> None:
    if isinstance(thing, nn.Module):
        thing = getattr(thing, "_orig_mod", thing)  # as it is without torch.compile
    if isinstance(thing, _PLAIN) and not isinstance(thing, Enum) and _is_known(type(thing)):
        if code is True or not _is_of_machine(thing):
            update(f"{type(thing).__name__}:{thing!r};".encode())
        return
    if id(thing) in seen:  # also ends cycles
        update(f"seen {seen[id(thing)][0]};".encode())
        return
    seen[id(thing)] = len(seen), thing  # the reference prevents that another object gets this id

    def go(*parts: Any) -> None:
        for part in parts:
            _feed(part, update, seen, code)

    update(f"{type(thing).__module__}.{type(thing).__qualname__}(".encode())
    if isinstance(thing, Enum):
        go(thing.name, thing.value)
    elif isinstance(thing, _ATOMS):  # of a class of somebody's own
        plain = next(kind for kind in _ATOMS if isinstance(thing, kind))
        go(type(thing), plain.__repr__(thing), _state(thing, code))  # type: ignore[call-arg]
    elif isinstance(thing, Tensor):
        go(*parts_of(thing))
    elif isinstance(thing, np.ndarray):
        go(str(thing.dtype), [*thing.shape])
        if thing.dtype.hasobject or thing.dtype.kind == "T":  # texts of any length
            go(thing.tolist())
        else:
            update(np.ascontiguousarray(thing).reshape(-1).view(np.uint8))
        if isinstance(thing, np.ma.MaskedArray):
            go(np.ma.getmaskarray(thing))
    elif isinstance(thing, Image.Image):
        go(thing.mode, thing.size, thing.tobytes())
    elif isinstance(thing, torch.jit.ScriptModule | torch.jit.ScriptFunction):
        go(*_program(thing))
    elif isinstance(thing, Mapping | Set | list | tuple | deque | ValuesView):
        if code is True and isinstance(thing, list) and all(map(_is_row, thing)):
            update(repr([*thing]).encode())  # in one step, since lists of files are long
        else:
            go(*_items(thing, code))
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
            go(_code(thing.__code__) if code else None, thing.__defaults__, thing.__kwdefaults__, cells, vars(thing))
            if code:
                go(_installed(thing.__module__) or _named(thing.__globals__, _names(thing.__code__), ()))
    elif isinstance(thing, staticmethod | classmethod):
        go(thing.__func__)
    elif isinstance(thing, property):
        go(thing.fget)
    elif isinstance(thing, type):
        for kind in thing.__mro__:
            go(f"{kind.__module__}.{kind.__qualname__}")
            if code is True and not _is_known(kind):
                go({name: value for name, value in vars(kind).items() if name not in _OF_CLASSES})
    elif isinstance(thing, types.BuiltinFunctionType | types.ModuleType):
        go(f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', thing.__name__)}")
        owner = getattr(thing, "__self__", None)
        if isinstance(owner, Mapping | Set | list | tuple | str | bytes):
            go(owner)
    elif isinstance(thing, types.GeneratorType):
        frame = thing.gi_frame
        go(
            _code(thing.gi_code) if code is True else thing.__qualname__,
            None if frame is None else [frame.f_lasti, {**frame.f_locals}, thing.gi_yieldfrom],
        )
    elif isinstance(thing, memoryview):
        go(thing.format, thing.shape, thing.tobytes())
    elif isinstance(thing, torch.Generator) and code is True:
        go(thing.get_state())
    elif not isinstance(thing, _SERVICES) and (code is True or not isinstance(thing, _GENERATORS)):
        go(type(thing))
        reduced = _reduced(thing)
        state = {} if reduced is not None and _is_known(type(thing)) else _state(thing, code)
        go(state)
        if isinstance(thing, np.generic) and thing.dtype.kind in "OV":
            go(np.asarray(thing))
        elif reduced is not None:
            go(*reduced)
        elif isinstance(thing, (np.generic, *_TEXTS)) or (not state and hasattr(thing, "__dict__")):
            update(re.sub(r"0x[0-9a-f]+", "", repr(thing)).encode())
    update(b")")


def _is_row(thing: Any) -> bool:
    """Whether ``repr`` identifies it: a number, a string, or a tuple of these."""
    return type(thing) in _ATOMS or (type(thing) is tuple and all(type(part) in _ATOMS for part in thing))


def _is_of_machine(thing: Any) -> bool:
    """Whether it is a device, a type of numbers, or an absolute path."""
    return isinstance(thing, torch.device | torch.dtype) or (
        isinstance(thing, str | PurePath) and Path(thing).is_absolute()
    )


def _items(thing: Any, code: Code) -> Iterable[Any]:
    if isinstance(thing, Mapping):
        return (part for item in thing.items() for part in item)
    return sorted(fingerprint(part, code=code) for part in thing) if isinstance(thing, Set) else thing


def _state(thing: Any, code: Code) -> dict[str, Any]:
    """The attributes of an object, slots included."""
    state = {**getattr(thing, "__dict__", {})}
    for kind in type(thing).__mro__:
        slots = vars(kind).get("__slots__", ())
        for slot in [slots] if isinstance(slots, str) else slots:
            private = slot.startswith("__") and not slot.endswith("__")
            name = f"_{kind.__name__.lstrip('_')}{slot}" if private else slot
            if slot not in ("__dict__", "__weakref__") and hasattr(thing, name):
                state[name] = getattr(thing, name)
    if isinstance(thing, nn.Module):
        hooks = [*getattr(thing, "_forward_pre_hooks", {}).values(), *getattr(thing, "_forward_hooks", {}).values()]
        state = attributes_of(thing, state)
        if hooks and code is True:
            state["hooks"] = hooks  # without their numbers, which count all of the process
    return state


def attributes_of(module: nn.Module, attributes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The attributes of a module, without those that say nothing about what it computes: mode, hooks, trainer.

    Args:
        module: The module.
        attributes: The attributes to choose from. Default: None, which means all.
    """
    apart = next(names for kind, names in _BOOKKEEPING.items() if isinstance(module, kind))
    attributes = vars(module) if attributes is None else attributes
    return {key: value for key, value in attributes.items() if key not in apart}


def _reduced(thing: Any) -> list[Any] | None:
    """What pickle would store of an object whose class has rules of its own for it; None without such rules."""
    kind = type(thing)
    if isinstance(thing, (nn.Module, np.generic, *_TEXTS)):
        return None
    own = [name for name in ("__reduce_ex__", "__reduce__") if getattr(kind, name) is not getattr(object, name)]
    stated = getattr(kind, "__getstate__", None) is not getattr(object, "__getstate__", None) and _is_known(kind)
    if not own and not stated and kind not in copyreg.dispatch_table:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = copyreg.dispatch_table[kind](thing) if kind in copyreg.dispatch_table else thing.__reduce_ex__(4)
    except Exception:  # pickle would fail; errors are of any class
        return None
    if isinstance(found, str):
        return [found]
    function, arguments, *more = found
    state, items, pairs = [*more[:3], None, None, None][:3]
    return [function, arguments, state, [*(items or ())], [*(pairs or ())]]


def _program(script: Any) -> list[Any]:
    """Code, constants and weights of a TorchScript program, without line numbers and the example inputs of a trace."""
    with zipfile.ZipFile(io.BytesIO(script.save_to_buffer())) as archive:
        names = {name.partition("/")[2]: name for name in archive.namelist()}  # without the archive's own name
        kept = (key for key in sorted(names) if not key.startswith((".data/", "traced_inputs")))
        return [(key, archive.read(names[key])) for key in kept if not key.endswith(".debug_pkl")]


def _is_known(thing: Any) -> bool:
    return _is_known_module(str(thing.__module__))


def _is_known_module(name: str) -> bool:
    """Whether the code of a module counts by name only. A user's module may have a name of the standard library."""
    top = name.partition(".")[0]
    if top in _KNOWN:
        return True
    if top not in sys.stdlib_module_names or top not in sys.modules:
        return False
    file = getattr(sys.modules[top], "__file__", None)
    origin = getattr(getattr(sys.modules[top], "__spec__", None), "origin", None)
    return _is_standard(file) if file else origin in ("built-in", "frozen")


@functools.cache
def _is_standard(file: str) -> bool:
    place = os.path.realpath(file)
    inside = any(place.startswith(folder + os.sep) for folder in _STANDARD)
    return inside and _INSTALLED.isdisjoint(PurePath(place).parts)


def _installed(module: str | None) -> str | None:
    """SHA-256 of a module's file, if it belongs to an installed package."""
    file = getattr(sys.modules.get(module or ""), "__file__", None) or ""
    return None if _INSTALLED.isdisjoint(PurePath(file).parts) else _hash_of(file)


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
        own = isinstance(value, types.ModuleType) and not _is_known_module(value.__name__)
        if own and value not in within:
            found[name] = _installed(value.__name__) or _named(vars(value), names, (*within, value))
    return found


def _code(code: types.CodeType) -> list[Any]:
    constants = [_code(c) if isinstance(c, types.CodeType) else c for c in code.co_consts]
    return [code.co_code.hex(), [*code.co_names], [*code.co_varnames], constants]
