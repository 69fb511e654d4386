"""Links to classes and functions by their last name, as docstrings have them: ``:class:`Teacher```.

A name of this package that does not exist is a warning. Names that no page documents, and those of torch, stay text.
"""

from __future__ import annotations

import importlib
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx.util.nodes import make_refnode

_LOGGER = logging.getLogger(__name__)
_PACKAGE = "kd_lightning"


def resolve(app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.Element) -> nodes.Element | None:
    """Return a link to the only object that has the last part of the name; called where Sphinx finds none."""
    if node.get("refdomain") != "py":
        return None
    target = str(node["reftarget"]).lstrip(".~")
    name = target.rpartition(".")[2]
    objects = env.domains["py"].objects  # type: ignore[attr-defined]
    found = {full: entry for full, entry in objects.items() if full.rpartition(".")[2] == name and not entry.aliased}
    pages = {entry.docname: (full, entry) for full, entry in found.items()}
    if len(pages) == 1 and len(found) >= 1:
        docname, (full, entry) = next(iter(pages.items()))
        return make_refnode(app.builder, node["refdoc"], docname, entry.node_id, content, full)
    if target.startswith(f"{_PACKAGE}.") and not exists(target):
        _LOGGER.warning("there is no %s", target, location=node)
    return None


def exists(path: str) -> bool:
    """Return whether a dotted path leads to a module, or to an object in one.

    >>> exists("kd_lightning.batch.Batch.select"), exists("kd_lightning.batch.Bach")
    (True, False)
    """
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for name in parts[end:]:
            if not hasattr(found, name):
                return False
            found = getattr(found, name)
        return True
    return False


def setup(app: Sphinx) -> dict[str, Any]:
    """Add the search for links that Sphinx cannot resolve."""
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
