"""The site: what its directives make of the code and of the results, and a build without a warning."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest
from sphinx.errors import ExtensionError


@pytest.fixture(scope="module")
def extension(root):
    """Loads an extension of docs/_ext."""

    def load(name):
        spec = importlib.util.spec_from_file_location(name, root / f"docs/_ext/{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def test_sections_of_results(extension):
    text = "# Results\nintro\n## A b (2026-11-29)\none\n```sh\n# no heading\n```\n### C: d\n| x |\n|---|\n\n| y |\n"
    first, second, third = extension("measured").sections(text)
    assert (first.level, first.title, first.lines) == (1, "Results", ["intro"])
    assert (second.title, second.date, second.target) == ("A b", "2026-11-29", "results-a-b")
    assert "# no heading" in second.lines
    assert (third.level, third.date, third.target) == (3, "", "results-a-b-c-d")
    assert extension("measured").tables(third.lines) == [["| x |", "|---|"], ["| y |"]]


def test_titles_of_results_are_targets(extension, root):
    measured = extension("measured")
    targets = [one.target for one in measured.sections((root / "benchmarks/RESULTS.md").read_text())]
    assert len(targets) == len({*targets}) > 20


def test_allowed_values(extension):
    arguments = extension("arguments")
    from kd_lightning import DistillModule, PseudoLabelModule

    found = {
        one.name: arguments.allowed(owner, one)
        for owner in (PseudoLabelModule, DistillModule)
        for one in arguments.describe_arguments(owner)
    }
    assert found["soft_weight"] == "number in [0, 1]"
    assert found["pseudo_labels"] == "`online`, `refreshed`"
    assert found["task"] == "`multiclass`, `multilabel`, `binary`, `regression`"  # an alias
    assert found["class_dim"] == "whole number, null"  # through **kwargs
    assert found["weight_decay_exclude_1d"] == "true, false"


def test_help_of_commands(extension):
    arguments = extension("arguments")
    for name in (*arguments.COMMANDS, *arguments.VERBS):
        assert arguments.command_help(name).startswith("usage: kd-lightning"), name
    assert "--labels-per-class" in arguments.command_help("distill")


def test_flow(extension):
    flow = extension("flow")
    places, arrows = flow.place(["a > b*", ". > c<", "a > c<"])
    assert places == {"a": (0, 0), "b*": (1, 0), "c<": (1, 1)}
    assert arrows == [("a", "b*"), ("a", "c<")]
    drawn = flow.draw(["a > b*", ". > c<", "a > c<"])
    assert drawn.count("<rect") == 3
    assert drawn.count('class="trains"') == 1
    assert "c&lt;" in drawn
    assert "c<<" not in drawn
    with pytest.raises(ExtensionError, match="at most 18 characters, got balanced_unsupervised"):
        flow.draw(["a > balanced_unsupervised"])


def test_formulas(extension):
    mathml = extension("mathml")
    assert mathml.convert("T^2", inline=True).startswith("<math")
    with pytest.raises(mathml.MathError):
        mathml.convert(r"\nosuch{x}", inline=True)


def test_extras(extension):
    lines = ['a = ["x>=1"]  # for x', "b = [", '  "y",  # y', '  "z[q]>=2", # z, too', "]", 'test = ["t"]']
    text = "\n".join(["[project.optional-dependencies]", *lines, ""])
    assert extension("extras").extras(text) == {"a": [("x>=1", "for x")], "b": [("y", "y"), ("z[q]>=2", "z, too")]}


def test_text_of_docstrings(extension):
    arguments = extension("arguments")

    def documented():
        """The :class:`~a.B` of ``x``.

        .. math:: \\frac{1}{2}

        See https://example.org/x, too.

        Args:
            none: Not here.
        """

    assert arguments.described(documented).split("\n\n") == [
        "The `B` of `x`.",
        "$$\n \\frac{1}{2}\n$$",
        "See <https://example.org/x>, too.",
        "",
    ]


def test_links_to_names_that_do_not_exist(extension):
    exists = extension("short_names").exists
    assert exists("kd_lightning.batch.Batch.select")
    assert not exists("kd_lightning.batch.Bach")
    assert not exists("kd_lightning.bach.Batch")


@pytest.mark.slow
def test_builds_without_a_warning(root, tmp_path):
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-q", "-d", tmp_path / "doctrees"]
    done = subprocess.run([*command, root / "docs", tmp_path / "html"], env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = [*(tmp_path / "html").rglob("*.html")]
    assert len(pages) > 20
    assert "DefaultValue" not in (tmp_path / "html/reference/settings.html").read_text()  # of autodoc
    runs = (tmp_path / "html/reference/api/runs.html").read_text()
    assert (
        "The name of the run: runs of one name differ in seed" in runs
    )  # napoleon takes what is before a colon for a type
    assert "experiment --tune: sampler" in (tmp_path / "html/start/install.html").read_text()
    for page in pages:  # links inside, also to files that Sphinx does not check
        for link in re.findall(r'(?:href|src)="([^"#:?]+)[^":]*"', page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
