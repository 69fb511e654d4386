"""Class paths in configs, and the arguments of the classes and functions that they name."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
from argparse import SUPPRESS
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from jsonargparse import ArgumentParser, Namespace

from kd_lightning.runs.argument_types import ArgumentTypes, takes_lists

SPEC_KEYS = ("class_path", "init_args", "dict_kwargs")
"""The keys of a mapping that describes an object."""
_MODULES_OF_SHORT_NAMES = (
    "kd_lightning",
    "kd_lightning.models",
    "kd_lightning.losses",
    "torch.optim",
    "torch.optim.lr_scheduler",
    "torch.nn",
    "lightning.pytorch.callbacks",
    "torchvision.models",
    "torchvision.transforms.v2",
)

_EXTRAS = {
    "timm": "timm",
    "brevitas": "quant",
    "onnx": "export",
    "onnxruntime": "export",
    "cleanlab": "weak",
    "skactiveml": "weak",
    "pyarrow": "weak",
    "imagehash": "weak",
    "datasets": "hf",
    "litdata": "litdata",
}
"""Optional packages, and the extra of this package that installs each."""
_EXPORTED = (".pt2",)
_WEIGHTS = (".bin", ".ckpt", ".pt", ".pth", ".safetensors")


def walk_config(node: Any, path: str = "", owner: Any = None) -> Iterator[tuple[str, Any, Any, Any]]:
    """Yield (path, key, value, owner) of every key; the owner is the class path whose argument the key is."""
    if isinstance(node, list):
        for number, child in enumerate(node):
            yield from walk_config(child, f"{path}[{number}]", owner)
    if isinstance(node, dict):
        for key, child in node.items():
            key_path = f"{path}.{key}" if path else str(key)
            yield key_path, key, child, owner
            yield from walk_config(child, key_path, node.get("class_path") if key in SPEC_KEYS[1:] else None)


def class_names() -> list[str]:
    """The short names that a class path may be compared with."""
    modules = [importlib.import_module(name) for name in _MODULES_OF_SHORT_NAMES]
    named = [(module, name) for module in modules for name in getattr(module, "__all__", vars(module))]
    return [name for module, name in named if name[0] != "_" and callable(getattr(module, name, None))]


def missing_package(path: str) -> str:
    """Return how to install the optional package of an import path, empty if it is installed or not optional."""
    package = path.partition(".")[0]
    if package in _EXTRAS:
        try:
            importlib.import_module(package)
        except ImportError:
            return f"{package} is not installed: pip install 'kd-lightning[{_EXTRAS[package]}]'"
    return ""


def network_reader(file: str) -> str:
    """Return what makes a network of a file, as the end of a message; empty for a file of another kind.

    >>> network_reader("net.pt2")
    '; kd_lightning.teachers.ExportedNetwork (argument program: net.pt2) makes a network of an exported program'
    """
    if file.endswith(_EXPORTED):
        text = (
            f"kd_lightning.teachers.ExportedNetwork (argument program: {file}) makes a network of an exported program"
        )
        return f"; {text}"
    if file.endswith(_WEIGHTS):
        return f"; kd_lightning.load_weights (arguments model, and path: {file}) loads weights into a network"
    return ""


def find_class(class_path: Any) -> Any:
    """Return the class or function of a path or of a short name, None if there is none."""
    if not isinstance(class_path, str):
        return None
    module_name, _, name = class_path.rpartition(".")
    for module in [module_name] if module_name else _MODULES_OF_SHORT_NAMES:
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError, TypeError):
            continue
    return None


def arguments_of(owner: Any) -> list[str]:
    """Return the arguments of a class or function that the parser accepts, through ``**kwargs``, too.

    Args:
        owner: A class, a function, or anything else that a class path may lead to.

    Returns:
        Their names, in the order of the signature; empty if they are not known.
    """
    parser = _parser_of(owner)
    return [] if parser is None else [*parser.arguments]


class Argument(NamedTuple):
    """An argument of a class or function, as the parser has it.

    Attributes:
        name: Its name.
        text: What its docstring says.
        default: Its default; of an object the mapping that describes it, or the object if a config cannot hold it.
        needed: Whether it has none.
    """

    name: str
    text: str
    default: Any
    needed: bool


def describe_arguments(owner: Any) -> list[Argument]:
    """Return the arguments of a class or function that the parser accepts; see :func:`arguments_of`."""
    parser = _parser_of(owner)
    actions = {} if parser is None else {action.dest: action for action in parser._actions}
    found = [(name, actions[f"{_PREFIX}.{name}"]) for name in arguments_of(owner) if f"{_PREFIX}.{name}" in actions]
    own = inspect.signature(owner).parameters if found else {}
    needed = {name for name, parameter in own.items() if parameter.default is parameter.empty}
    described = []
    for name, action in found:
        left_out = action.default == SUPPRESS and name in own  # a config cannot hold it
        default = own[name].default if left_out else action.default
        described.append(Argument(name, str(action.help or ""), default, name in needed))
    return described


def takes_any_argument(owner: Any) -> bool:
    """Return whether arguments that the parser does not know may be valid, or whether none are known."""
    names = arguments_of(owner)
    try:
        parameters = inspect.signature(owner).parameters
    except (TypeError, ValueError):
        return not names
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return not names or (open_ended and parameters.keys() >= set(names))  # the parser found nothing behind **kwargs


def takes_none(owner: Any, name: str) -> bool:
    """Return whether an argument accepts None; parsing does not check this: it ignores each null."""
    parser = _parser_of(owner)
    if parser is None or name not in parser.arguments:
        return True
    try:
        parser.validate(Namespace({f"{_PREFIX}.{name}": None}), skip_unset=False, skip_required=True)  # type: ignore[no-untyped-call]
    except TypeError:
        return False
    return True


def with_tensors(node: Any, owner: Any = None, name: str = "") -> Any:
    """Return a part of a config with tensors in place of the numbers and lists that stand for them.

    Args:
        node: The part.
        owner: The class or function whose argument it is. Default: None, which means that of no object.
        name: The argument's name.
    """
    if isinstance(node, dict) and "class_path" in node:
        found = find_class(node["class_path"])
        return {
            key: {inner: with_tensors(value, found, inner) for inner, value in part.items()}
            if key in SPEC_KEYS[1:] and isinstance(part, dict)
            else part
            for key, part in node.items()
        }
    parser, path = _parser_of(owner), f"{_PREFIX}.{name}"
    actions: list[Any] = parser._actions if parser is not None else []
    hint = next((action._typehint for action in actions if action.dest == path), None)
    if node is not None and takes_lists(hint) and all(key != "class_path" for _, key, _, _ in walk_config(node)):
        return parser.instantiate(Namespace({path: node}))[path]  # type: ignore[no-untyped-call, union-attr]
    if isinstance(node, dict):
        return {key: with_tensors(part) for key, part in node.items()}
    return [*map(with_tensors, node)] if isinstance(node, list) else node


_PREFIX = "arguments"


class _SignatureParser(ArgumentTypes, ArgumentParser):
    """A parser of one class's or function's arguments."""

    arguments: tuple[str, ...] = ()


def _parser_of(owner: Any) -> _SignatureParser | None:
    try:
        return _make_parser(owner) if callable(owner) else None
    except Exception:  # the resolver reads other people's code and annotations, and can fail in any way
        return None


@functools.cache
def _make_parser(owner: Any) -> _SignatureParser:
    parser = _SignatureParser(exit_on_error=False)
    add = parser.add_class_arguments if inspect.isclass(owner) else parser.add_function_arguments
    added = add(owner, _PREFIX, as_group=False, fail_untyped=False)
    parser.arguments = tuple(name.removeprefix(f"{_PREFIX}.") for name in added)
    return parser


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """Return ``; did you mean ...?`` with the allowed name that is most similar, or an empty text."""
    similar = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f"; did you mean {similar[0]}?" if similar else ""


def name_of(owner: Any) -> str:
    """Return the name of a class or function, or of the class of another callable."""
    return str(getattr(owner, "__name__", type(owner).__name__))
