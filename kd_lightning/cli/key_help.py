"""``--model.help DistillModule``: the keys of a class, one line each; ``--model.help``: the classes."""

from __future__ import annotations

import inspect
import re
import shutil
import textwrap
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn, optim

import kd_lightning.data
import kd_lightning.models
import kd_lightning.modules
from kd_lightning.errors import InputError
from kd_lightning.runs.class_paths import (
    class_names,
    describe_arguments,
    did_you_mean,
    find_class,
    missing_package,
    name_of,
)

_PLAIN = {"trainer": Trainer, "checkpoint": ModelCheckpoint}
_END = ".help"
_SCREEN = 24  # lines


def wanted_help(args: Sequence[str]) -> tuple[str, str] | None:
    """Return the key and the class of the last ``--KEY.help CLASS`` on a command line, None if there is none.

    >>> wanted_help(["--model.help", "DistillModule"]), wanted_help(["--data.help"]), wanted_help(["--name", "x"])
    (('model', 'DistillModule'), ('data', ''), None)
    """
    found = None
    for argument, following in zip(args, [*args[1:], "-"], strict=True):
        name, equals, value = argument.partition("=")
        if name.startswith("--") and name.endswith(_END):
            found = name[2 : -len(_END)], value if equals else "" if following.startswith("-") else following
    return found


def key_help(key: str, name: str) -> str:
    """Return the help of a key.

    Args:
        key: Such as ``"model"``.
        name: Path or short name of a class or function whose arguments are listed; empty for the classes of the key.

    Raises:
        InputError: If there is no such class, or the key needs one.
    """
    if key in _PLAIN:
        return _arguments(_PLAIN[key], f"--{key}.KEY VALUE, or in YAML {key}: {{KEY: VALUE}}")
    if name:
        owner = find_class(name)
        if owner is None:
            reason = missing_package(name) or f"no class {name!r}{did_you_mean(name, class_names())}"
            raise InputError(f"--{key}{_END}: {reason}")
        return _arguments(owner, f"--{_place(key, owner)}.init_args.KEY VALUE")
    last = key.rpartition(".")[2]
    if key == "model":
        found = _public(kd_lightning.modules, LightningModule)
    elif key == "data":
        found = [*_public(kd_lightning.data, LightningDataModule), *_sources()]
    elif last == "optimizer":
        found = _public(optim, optim.Optimizer)
    elif last in ("student", "network", "model"):
        found = _public(kd_lightning.models, nn.Module)
    else:
        raise InputError(f"--{key}{_END} needs a class, such as: --{key}{_END} {last.title().replace('_', '')}")
    lines = [f"{name_of(one):<26}{_summary(one)}" for one in found]
    more = "Any class of yours or of a library fits, too, by its import path."
    return "\n".join([*map(_cut, lines), "", more, f"--{key}{_END} CLASS lists the keys of a class."])


def _public(module: Any, kind: type) -> list[Any]:
    found = [getattr(module, name) for name in getattr(module, "__all__", None) or vars(module)]
    kinds = [one for one in found if inspect.isclass(one) and issubclass(one, kind) and not inspect.isabstract(one)]
    return [one for one in dict.fromkeys(kinds) if one is not kind]


def _sources() -> list[Any]:
    names = [name for name in kd_lightning.data.__all__ if "source" not in name.lower() or name[0].isupper()]
    found = [getattr(kd_lightning.data, name) for name in names]
    return [one for one in found if inspect.isclass(one) and hasattr(one, "load")]


def _place(key: str, owner: Any) -> str:
    """Return the place at which an object of a class usually stands."""
    kind = owner if inspect.isclass(owner) else object
    if key == "data" and not issubclass(kind, LightningDataModule):
        return "data.init_args.source"
    if key == "model" and issubclass(kind, nn.Module) and not issubclass(kind, LightningModule):
        return "model.init_args.student"
    return key


def _arguments(owner: Any, how: str) -> str:
    """Return a line for each argument: its name, its default, and the first sentence about it."""
    arguments = describe_arguments(owner)
    width = max((len(one.name) for one in arguments), default=0)
    defaults = ["needed" if one.needed else _default(one.default) for one in arguments]
    column = min(12, max(map(len, defaults), default=0))
    lines = []
    for one, default in zip(arguments, defaults, strict=True):
        start = f"  {one.name:<{width}}  {default:<{column}}  "
        indent: Any = {"initial_indent": start, "subsequent_indent": " " * len(start)}
        lines.append(textwrap.wrap(_sentence(one.text), _width(), **indent) or [start.rstrip()])
    if sum(map(len, lines)) > _SCREEN:
        lines = [[line[0] if len(line) == 1 else f"{line[0][: _width() - 3].rstrip()}..."] for line in lines]
    head = textwrap.fill(": ".join(filter(None, (name_of(owner), _summary(owner)))), _width())
    shown = [text for line in lines for text in line]
    return "\n".join(
        [head, "keys: " + how, "", *shown, "", "--verbose adds types, all of each text, and nested classes."]
    )


def _default(value: Any) -> str:
    if isinstance(value, dict) and "class_path" in value:
        value = value["class_path"]
    if value is not None and type(value) not in (bool, int, float, str, list, tuple, dict):
        return name_of(value)
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text.rpartition(".")[2] if all(map(str.isidentifier, text.split("."))) else text


def _summary(owner: Any) -> str:
    return _sentence(inspect.getdoc(owner) or "")


def _sentence(text: str) -> str:
    """Return the first sentence of a docstring, without its marks."""
    paragraph = " ".join(text.strip().partition("\n\n")[0].split()).replace("``", "")
    paragraph = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"\1", paragraph)
    return re.split(r"(?<!\bal)\. ", paragraph)[0].removesuffix(".")


def _cut(text: str) -> str:
    """Cut a line at the end of the terminal's."""
    width = _width()
    return text if len(text) <= width else f"{text[: width - 3].rstrip()}..."


def _width() -> int:
    return max(80, shutil.get_terminal_size().columns)
