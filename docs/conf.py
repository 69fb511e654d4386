"""How Sphinx builds the site: ``make docs``. Every warning is an error there."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "kd_lightning"
author = "the kd_lightning contributors"
copyright = author

extensions = [
    "myst_parser",  # pages in Markdown
    "sphinx.ext.autodoc",  # the reference comes from docstrings ...
    "sphinx.ext.napoleon",  # ... in Google's style
    "mathml",  # formulas without a script and without a network
    "sphinx_copybutton",
    "arguments",  # settings and commands, from the code
    "extras",  # optional packages, from pyproject.toml
    "flow",  # pictures of methods
    "measured",  # tables of benchmarks/RESULTS.md
    "short_names",  # links to classes by their last name, as docstrings have them
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
myst_links_external_new_tab = False

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # types stand in the settings tables and in the docstrings
autodoc_default_options = {"members": True, "exclude-members": "extra_repr"}
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Shape", "notes_style"), ("Shapes", "notes_style"), ("Source", "notes_style")]
python_maximum_signature_line_length = 80
add_module_names = False

html_theme = "furo"  # as lightly-train has; it reads well on a phone and in the dark, without a network
html_math_renderer = "mathml"
html_title = "kd_lightning"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False
copybutton_exclude = ".linenos, .gp, .go"
smartquotes_action = "qe"  # quotes and ellipses; dashes of options stay as they are


def shown_signature(app: Any, what: str, name: str, obj: Any, options: Any, signature: str, returns: str) -> Any:
    """Return no arguments for a class without a constructor of its own, whose signature is that of ``nn.Module``."""
    return ("()", returns) if what == "class" and signature == "(*args, **kwargs)" else None


def keep_first_line(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Put an empty comment before the text of an attribute: napoleon takes a first line with a colon for a type."""
    if what in ("attribute", "data", "property"):
        lines[:0] = ["..", ""]


def setup(app: Any) -> None:
    """Connect the functions above."""
    app.connect("autodoc-process-signature", shown_signature)
    app.connect("autodoc-process-docstring", keep_first_line, priority=400)  # before napoleon
