"""The README and the pages of the site: their code runs as it stands there.

Python blocks of a page run one after another, in one namespace, in a folder with ``photos``. Lines of shell blocks run
as commands of this package, with few epochs. YAML blocks are checked key by key; one that begins with ``# NAME.yaml``
is written to that file first. A block that cannot run here has the line ``<!-- not run: WHY -->`` above it.
"""

import contextlib
import io
import re
import shlex
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from torchvision.models import resnet18

from kd_lightning.__main__ import main
from kd_lightning.cli.arguments import COMMANDS, VERBS, parse, verb_help
from kd_lightning.runs.class_paths import arguments_of, find_class, takes_any_argument, walk_config

ROOT = Path(__file__).parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if "_build" not in path.parts
}
LANGUAGES = ("python", "yaml", "sh", "text", "bibtex")  # text: what a command prints
EPOCHS = {"docs/guides/few_labels.md": 12}  # pseudo-labels are refreshed after a warm-up; other pages have one epoch
OF_FIT = ("fit", "test", "validate", "doctor", "layers", "cache", "experiment", "clean", "crossfit", "duplicates")


class Block(NamedTuple):
    """A code block; ``skipped`` is the reason why it is not run."""

    language: str
    text: str
    skipped: str


def blocks(text):
    """Return the code blocks of a page, without directives and what lies in them."""
    found, fence, lines, before = [], "", [], ""
    for line in text.splitlines():
        opened = re.match(r"(`{3,})(.*)$", line)
        if not fence and opened:
            fence, lines = opened[1], []
            reason = re.fullmatch(r"<!-- not run: (.+) -->", before)
            found.append(Block(opened[2].strip(), "", reason[1] if reason else ""))
        elif fence and line.strip() == fence:
            found[-1] = found[-1]._replace(text="".join(f"{one}\n" for one in lines))
            fence = ""
        elif fence:
            lines.append(line)
        before = line or before
    assert not fence, "a block is not closed"
    return [one for one in found if not one.language.startswith("{")]


def commands(text):
    """Return the lines of a shell block, each split into words; a backslash joins lines."""
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line.rpartition(" | ")[2], comments=True) for line in lines if line.strip()]


def with_language(*languages):
    texts = {name: blocks(path.read_text()) for name, path in PAGES.items()}
    return {name: found for name, found in texts.items() if any(one.language in languages for one in found)}


def test_a_block_of_the_parser():
    text = "a\n<!-- not run: no network -->\n```sh\nx \\\n  y\n```\n````{note}\n```python\n1\n```\n````\n"
    (only,) = blocks(text)
    assert (only.language, only.skipped) == ("sh", "no network")
    assert commands(only.text) == [["x", "y"]]


def test_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert (ROOT / link).exists(), link


def test_readme_has_the_figures_of_the_results():
    """Each figure of a row stands in one row of RESULTS.md, or in its text."""
    glance = (ROOT / "README.md").read_text().partition("## Results at a glance")[2].partition("\n\nMean")[0]
    results = (ROOT / "benchmarks/RESULTS.md").read_text()
    rows = [line for line in glance.splitlines() if line.startswith("|")][2:]
    assert len(rows) > 5
    for row in rows:
        for figure in (cell.strip() for cell in row.split("|")[3:-1]):
            assert figure in results, f"{figure} of {row}"


@pytest.mark.parametrize("page", PAGES)
def test_languages(page):
    for block in blocks(PAGES[page].read_text()):
        assert block.language in LANGUAGES or page == "docs/losses.md", f"{block.language!r}: {block.text}"


@pytest.mark.parametrize("page", with_language("yaml"))
def test_yaml(page):
    for block in blocks(PAGES[page].read_text()):
        if block.language != "yaml":
            continue
        for path, key, value, owner in walk_config(yaml.safe_load(block.text)):
            if key == "class_path":
                assert find_class(value) is not None, f"{path}: {value}"
            if owner is not None and find_class(owner) is not None and not takes_any_argument(find_class(owner)):
                assert key in arguments_of(find_class(owner)), f"{path}: {owner} has no {key}"


@pytest.mark.parametrize("page", with_language("sh"))
def test_commands_exist(page):
    """Also those that are not run: commands, their options, extras, and targets of make."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.M)
    for block in blocks(PAGES[page].read_text()):
        for words in commands(block.text) if block.language == "sh" else []:
            if words[0] == "kd-lightning" and not words[1].startswith("-"):
                assert words[1] in {*COMMANDS, *VERBS}, words
                text = io.StringIO()
                if words[1] in COMMANDS:
                    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
                        parse(words[1], ["--help"])
                known = text.getvalue() + verb_help("fit")
                for option in (word.partition("=")[0] for word in words if word.startswith("--")):
                    assert "." in option or option in known or option == "--config", (words, option)
            for names in re.findall(r"\[([\w,]+)\]", " ".join(words)) if words[0] == "pip" else []:
                assert {*names.split(",")} <= {*extras}, words
            if words[0] == "make":
                assert words[1] in targets, words


@pytest.mark.slow
@pytest.mark.parametrize("page", with_language("python"))
def test_python(page, photos):
    names = {"__name__": "page"}
    for block in blocks(PAGES[page].read_text()):
        if block.language == "python" and not block.skipped:
            exec(compile(block.text, page, "exec"), names)


@pytest.mark.slow
@pytest.mark.parametrize("page", with_language("sh"))
def test_shell(page, photos):
    Path("configs").symlink_to(ROOT / "configs")
    teacher = {f"net.{key}": tensor for key, tensor in resnet18(num_classes=3).state_dict().items()}
    torch.save({"state_dict": teacher}, "teacher.ckpt")
    for block in blocks(PAGES[page].read_text()):
        if block.language == "yaml" and (name := re.match(r"# (\w+\.yaml)\n", block.text)):
            Path(name[1]).write_text(block.text)
        for words in commands(block.text) if block.language == "sh" and not block.skipped else []:
            if words[0] == "kd-lightning":
                run(EPOCHS.get(page, 1), *words[1:])


def run(epochs, name, *args):
    """Run a command, with few epochs and one seed."""
    args = ["1" if before == "--seeds" else one for before, one in zip(["", *args], args, strict=False)]
    of_config = name in OF_FIT or (name == "predict" and args[0].endswith(".yaml"))
    if of_config and not any(one.endswith(".help") for one in args):
        args += ["--trainer.max_epochs", str(epochs), "--trainer.accelerator", "cpu"]
    if name == "distill" and "--dry-run" not in args:
        args += ["--epochs", "1", "--yes"]
    codes = {0, 1} if name == "doctor" else {0}  # 1: after one epoch the teacher is as bad as it says
    assert exit_status(name, *args) in codes, (name, args)


def exit_status(*args):
    try:
        main([*args])
    except SystemExit as error:
        return error.code or 0
    return 0
