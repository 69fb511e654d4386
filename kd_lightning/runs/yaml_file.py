"""YAML texts, read within bounds."""

from __future__ import annotations

import re
from typing import Any

import yaml

_MOST_REPEATED = 100_000
"""The most values that aliases may add to those that a text spells out."""

_LIBYAML: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Dumper(yaml.SafeDumper):
    """Quotes a text such as ``1e3``, too, which is a number for jsonargparse and YAML 1.2."""


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"), list("-+0123456789")
)


class UnboundedYAMLError(yaml.YAMLError):
    """Raised for a text that nests too deeply, that holds itself, or whose aliases repeat too much."""


def load_yaml(text: str) -> Any:
    """Return the content of a YAML text.

    Raises:
        yaml.YAMLError: For what :func:`compose_yaml` refuses, and for values that do not exist, such as a 13th month.
    """
    root = compose_yaml(text)
    try:
        return None if root is None else unshared(yaml.SafeLoader("").construct_document(root))
    except (ValueError, OverflowError) as error:
        raise yaml.YAMLError(str(error)) from error


def load_dumped(text: str) -> Any:
    """Return the content of a text that :func:`dump_yaml` wrote: by libyaml where that is installed, which is faster.

    A text of a user is read by :func:`load_yaml`: libyaml does not bound how deeply it nests.
    """
    return unshared(yaml.load(text, Loader=_LIBYAML))


def dump_yaml(value: Any, **options: Any) -> str:
    """Return a value as YAML, which each reader of this package reads as the same value.

    Args:
        value: Mappings, lists, numbers, texts and None.
        **options: Those of ``yaml.dump``.
    """
    options = {"sort_keys": False, "allow_unicode": True, **options}
    return str(yaml.dump(value, Dumper=_Dumper, **options))


def unshared(value: Any) -> Any:
    """Return a copy of a config in which no mapping or list stands at two places, as those of aliases (*name) do.

    Jsonargparse takes ``dict_kwargs`` out of a mapping that it has read, so that a second place would lose them.
    """
    if type(value) is dict:
        return {key: unshared(part) for key, part in value.items()}
    return [*map(unshared, value)] if type(value) is list else value


def compose_yaml(text: str) -> yaml.Node | None:
    """Return the tree of a YAML text, with its line numbers.

    Raises:
        yaml.YAMLError: If the text is no YAML.
        UnboundedYAMLError: If it nests too deeply, holds itself, or has aliases that repeat too much.
    """
    sizes: dict[int, int] = {}
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        expanded = _size(root, sizes)
    except RecursionError as error:
        raise UnboundedYAMLError("it nests too deeply") from error
    if expanded - len(sizes) > _MOST_REPEATED:
        raise UnboundedYAMLError(f"its aliases (*name) repeat more than {_MOST_REPEATED:,} values")
    return root


def _size(node: yaml.Node | None, sizes: dict[int, int]) -> int:
    """Return the number of values at a node and below, with each alias in full; ``sizes`` holds those counted."""
    if node is None:
        return 0
    if id(node) not in sizes:
        sizes[id(node)] = -1  # its own values are being counted
        children = node.value if isinstance(node, yaml.CollectionNode) else ()
        pairs = children if isinstance(node, yaml.MappingNode) else ((child,) for child in children)
        sizes[id(node)] = 1 + sum(_size(child, sizes) for pair in pairs for child in pair)
    if sizes[id(node)] < 0:
        raise UnboundedYAMLError(f"line {node.start_mark.line + 1}: a value holds itself, by an alias (*name)")
    return sizes[id(node)]
