"""A page of ``report`` in a notebook, whole or part by part."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from html import escape, unescape
from pathlib import Path

from kd_lightning.errors import InputError

NAME = "report.html"

_HEIGHT = 600  # pixels, where the viewer does not run what measures the frame
_FIT = "this.style.height = this.contentDocument.documentElement.scrollHeight + 'px'"
_SECTION = re.compile(r'<section id="([\w-]+)".*?<h2[^>]*>(.*?)</h2>.*?</section>', re.DOTALL)


@dataclass(frozen=True)
class Frame:
    """A page of HTML that a notebook shows in a frame: neither changes the style of the other, and no script runs.

    Attributes:
        page: The page.
    """

    page: str = field(repr=False)  # notebooks store the repr, too

    def _repr_html_(self) -> str:
        style = f"width: 100%; height: {_HEIGHT}px; border: 0"
        # no script of the page runs; the notebook, which measures it, may read it
        sandbox = 'sandbox="allow-same-origin"'
        return f'<iframe {sandbox} srcdoc="{escape(self.page)}" style="{style}" onload="{_FIT}"></iframe>'


class ReportPage:
    """A page that ``report`` or ``experiment`` has written. As the last line of a cell, a notebook shows all of it.

    Args:
        path: The file, or the folder that holds its ``report.html``, such as that of a run or of a comparison.

    Raises:
        InputError: If there is no such file, or if ``report`` has not written it.

    >>> page = ReportPage("runs/distilled_comparison")  # doctest: +SKIP
    >>> page.titles  # doctest: +SKIP
    {'top': 'The teacher helps: +2.94 points', 'accuracy': 'Accuracy', 'cost': 'Size and speed', ...}
    >>> page.part("accuracy")  # doctest: +SKIP
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path) / NAME if Path(path).is_dir() else Path(path)
        try:
            self._text = self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"path must be a page of `report`, or its folder, got {path}: {error}") from error
        if "<header>" not in self._text or '<main id="parts">' not in self._text:
            raise InputError(f"path must be a page of `report`, or its folder, got {self.path}, which is another page")

    @cached_property
    def titles(self) -> dict[str, str]:
        """The heading of each part, by its name. The first is ``top``, whose heading is the verdict."""
        parts = {name: unescape(title) for name, title in _SECTION.findall(self._text)}
        return {"top": unescape(self._find(r"<h1[^>]*>(.*?)</h1>")), **parts}

    @property
    def evidence(self) -> str:
        """The sentence below the verdict: on what it was measured, and the intervals."""
        return unescape(self._find(r'<p class="lead">(.*?)</p>'))

    def part(self, name: str) -> Frame:
        """Return a part, which a notebook shows.

        Args:
            name: Name of the part; a key of ``titles``.

        Raises:
            InputError: If the page has no such part.
        """
        if name not in self.titles:
            raise InputError(f"name must be a part of {self.path} ({', '.join(self.titles)}), got {name}")
        if name == "top":
            content = self._find("(<header>.*?</header>)")
        else:
            section = f'(<section id="{name}".*?</section>)'
            content = f"<main>{self._find(section)}</main>"
        head = self._find('^(.*?)<a class="skip"')
        return Frame(f'{head}<div class="page">{content}</div></body></html>')

    def _find(self, pattern: str) -> str:
        found = re.search(pattern, self._text, re.DOTALL)
        return found[1] if found else ""

    def _repr_html_(self) -> str:
        return Frame(self._text)._repr_html_()
