"""Parts of a written page, as a notebook shows them."""

import re
from html import unescape

import numpy as np
import pytest

from kd_lightning.errors import InputError
from kd_lightning.report.page import ReportPage
from kd_lightning.report.write import write_report


@pytest.fixture
def path(make):
    random = np.random.default_rng(0)
    runs = [make(name, seed, random.random(300) < 0.8) for name in ("alone", "a & <b>") for seed in range(3)]
    return write_report(runs)


def framed(shown):
    """The page in the frame."""
    start, attributes = '<iframe sandbox="allow-same-origin" srcdoc="', 'style="[^"]*" onload="[^"]*"'
    return unescape(re.fullmatch(f'{start}([^"]*)" {attributes}></iframe>', shown._repr_html_())[1])


def test_titles_are_the_headings_of_the_page(path):
    text = path.read_text()
    page = ReportPage(path)
    assert [*page.titles] == ["top", *re.findall(r'<section id="([\w-]+)"', text)]
    assert page.titles["cost"] == "Size and speed"
    assert page.titles["top"] and page.titles["top"] in unescape(text)
    assert "measured on 300 test samples" in page.evidence


def test_a_part_is_cut_out_whole(path):
    text = path.read_text()
    page = ReportPage(path.parent)  # its folder
    parts = {name: framed(page.part(name)) for name in page.titles}
    style = re.search("<style>.*?</style>", text, re.DOTALL)[0]
    for name, part in parts.items():
        assert part.startswith("<!DOCTYPE html>") and style in part, name
        assert part.count("<section") == (name != "top")
        assert part.count("<h1") == (name == "top")
    body = "".join(
        re.search(r'<div class="page">(?:<main>)?(.*?)(?:</main>)?</div></body>', one, re.DOTALL)[1]
        for one in parts.values()
    )
    content = re.sub(r"<nav.*?</nav>|<footer.*?</footer>|<main.*?>|</main>", "", text, flags=re.DOTALL)
    content = re.search(r'<div class="page">(.*)</div>', content, re.DOTALL)[1]
    assert "".join(body.split()) == "".join(content.split())  # all parts are the page


def test_the_whole_page(path):
    assert framed(ReportPage(path)) == path.read_text()


def test_text_of_a_part_is_short(path):
    """A notebook stores it beside the HTML."""
    assert repr(ReportPage(path).part("top")) == "Frame()"


def test_refuses(path, tmp_path):
    with pytest.raises(InputError, match=r"name must be a part of .*report.html \(top, accuracy, .*\), got speed"):
        ReportPage(path).part("speed")
    with pytest.raises(InputError, match="path must be a page of `report`, or its folder, got .*missing"):
        ReportPage(tmp_path / "missing")
    (tmp_path / "other.html").write_text("<html></html>")
    with pytest.raises(InputError, match="other.html, which is another page"):
        ReportPage(tmp_path / "other.html")
