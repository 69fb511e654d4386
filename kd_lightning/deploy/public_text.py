"""Configs and texts as they may leave this machine: without its paths, and without secrets."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

from kd_lightning.errors import InputError

_LEFT_OUT = {"config", "ckpt_path", "fast", "verbose", "weights_only", "return_predictions"}
_OF_MACHINE = {"default_root_dir", "logger", "profiler"}  # of the trainer; a logger may hold accounts and addresses
_SECRET_KEY = re.compile(
    r"(?:^|_)(?:password|passwd|secret|credentials?|(?:api|access|secret)_?key|(?:auth|access|api|hub|hf)_?token)$|^token$",
    re.IGNORECASE,
)
_SECRET_VARIABLE = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|(?:API|ACCESS)_?KEY", re.IGNORECASE)
_ABSOLUTE = re.compile(r"[\\/~]|\.\.?[\\/]|[A-Za-z]:[\\/]|file:", re.IGNORECASE)
_FILE = re.compile(r"[\w .+-]*[\\/].*\.[A-Za-z]\w{0,11}")
_URL = re.compile(r"([A-Za-z][\w+.-]*://)(?:[^/@\s]*@)?")
# in a text: at least two parts, so that neither "and/or" nor "/ 255" is one
_IN_TEXT = re.compile(
    r"(?<![\w.:/\\<~)%-])(?:~|[A-Za-z]:|\\)?[\\/](?:[^\s\\/:*?\"'<>|,;()]+[\\/])+([^\s\\/:*?\"'<>|,;()]*)"
)


def public_config(config: Mapping[str, Any], places: Sequence[Path]) -> dict[str, Any]:
    """Return a run's config without what belongs to this machine.

    Each path is replaced by its last name, as ``<photos>``. Loggers, folders of outputs, and values of keys such as
    ``password`` are left out, and so are the login of an address.

    Args:
        config: The config.
        places: Folders. A relative text such as ``a/b`` is a path if it exists in one of them, or ends as a file does;
            else it is a name of the Hub.
    """

    def visit(node: Any) -> Any:
        if isinstance(node, Mapping):
            return {
                visit(key): None if _SECRET_KEY.search(str(key)) and isinstance(value, str) else visit(value)
                for key, value in node.items()
            }
        if isinstance(node, list | tuple):
            return [visit(value) for value in node]
        if not isinstance(node, str | Path):
            return node
        text = str(node)
        if "\n" in text:
            return without_paths(text)
        return f"<{last_name(text)}>" if _is_path(text, places) else _URL.sub(r"\1", text)

    kept = {key: value for key, value in config.items() if key not in _LEFT_OUT}
    if isinstance(trainer := kept.get("trainer"), Mapping):
        kept["trainer"] = {key: value for key, value in trainer.items() if key not in _OF_MACHINE}
    found: dict[str, Any] = visit(kept)
    return found


def _is_path(text: str, places: Sequence[Path]) -> bool:
    if _ABSOLUTE.match(text):
        return True
    if "://" in text or not re.search(r"[\\/]", text):
        return False
    if _FILE.fullmatch(text):
        return True
    return any(os.path.exists(place / text) for place in places)  # noqa: PTH110  (of any text, also a long one)


def last_name(path: str) -> str:
    r"""Return the last part of a path of any system; that of a home folder is ``home``.

    >>> last_name("/data/photos/"), last_name(r"C:\Users\ada\x.csv"), last_name("/home/ada")
    ('photos', 'x.csv', 'home')
    """
    parts = [part for part in PureWindowsPath(re.sub(r"^file:/*", "/", path)).parts if part.strip("\\/")]
    is_home = len(parts) in (2, 3) and parts[-2].lower() in ("home", "users") and _ABSOLUTE.match(path)
    if not parts or is_home or parts[-1] in ("~", "..") or parts[-1].endswith(":\\"):
        return "home"
    return parts[-1]


def without_paths(text: str) -> str:
    """Return a text with the last name of each absolute path in it.

    >>> without_paths("read /home/ada/photos/a.jpg, 3/4 of it")
    'read a.jpg, 3/4 of it'
    """
    return _IN_TEXT.sub(lambda found: last_name(found[0]), text)


def check_public(text: str, file: str) -> None:
    """Raise InputError if a text of a file holds the home folder, or the value of a secret environment variable."""
    home = str(Path.home())
    if len(home) > 1 and re.search(rf"(?<![\w/]){re.escape(home)}(?!\w)", text):
        raise InputError(f"{file} would publish the path of the home folder")
    for name, value in os.environ.items():
        if _SECRET_VARIABLE.search(name) and len(value) >= 8 and value in text:
            raise InputError(f"{file} would publish the value of the environment variable {name}")
