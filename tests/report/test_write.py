"""The page: which parts it has, that what it says is so, and that nothing of the data becomes markup."""

import json
import re
import shlex
from html import unescape
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from kd_lightning.__main__ import main
from kd_lightning.errors import InputError
from kd_lightning.report import figure_parts, write
from kd_lightning.report.cast import make_cast
from kd_lightning.report.verdict import verdict_of
from kd_lightning.report.write import write_report
from kd_lightning.runs.run import Run
from tests.report.conftest import NAMES, NETWORK


class Page(HTMLParser):
    """Collects what the page consists of."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.headings, self.ids, self.links, self.texts = [], [], [], [], []
        self.feed(text)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.links += [attrs["href"]] if tag == "a" else []
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] != "style":
            self.texts.append(data)


def rows(share, seed, count=300):
    return np.random.default_rng(seed).random(count) < share


def taught(folder):
    path = str(folder / "student.safetensors")
    return {"class_path": "kd_lightning.load_weights", "init_args": {"model": NETWORK, "path": path}}


@pytest.fixture
def trio(make, tmp_path):
    """Student alone, distilled student and teacher; without data."""
    teacher = make("teacher", 0, rows(0.95, 99), module="SupervisedModule")
    for seed in range(3):
        make("alone", seed, rows(0.6, seed), module="SupervisedModule")
        make("method", seed, rows(0.9 + 0.01 * seed, 10 + seed), teacher=taught(teacher))
    return [tmp_path / "runs/method", tmp_path / "runs/alone"]


def check_safe(text):
    """Raise if the page runs scripts, loads something, or has markup of the data; return it parsed."""
    page = Page(text)
    allowed = {"html", "head", "meta", "title", "style", "body", "a", "div", "header", "p", "span", "h1", "ul", "li"}
    allowed |= {"strong", "nav", "main", "section", "h2", "h3", "figure", "svg", "g", "path", "defs", "use", "text"}
    allowed |= {"clippath", "rect", "table", "thead", "tbody", "tr", "th", "td", "small", "i", "b", "img", "dl", "dt"}
    allowed |= {"dd", "em", "br", "code", "wbr", "pre", "footer", "circle", "style"}
    assert {tag for tag, _ in page.tags} <= allowed
    for tag, attrs in page.tags:
        assert not [name for name in attrs if name.startswith("on")]
        assert attrs.get("src", "data:image/").startswith("data:image/")
        assert attrs.get("href", "#").startswith("#") and attrs.get("xlink:href", "#").startswith("#")
        assert tag != "svg" or (attrs["role"] == "img" and attrs["aria-label"])
        assert tag != "img" or attrs["alt"]
    assert "url(http" not in text and "@import" not in text
    return page


def test_accessible(experiment):
    """Title, language, headings in order, and links and labels that lead somewhere."""
    page = Page((experiment / "report.html").read_text())
    tags = dict(page.tags)
    assert tags["html"]["lang"] == "en" and "title" in tags
    assert page.headings[0] == 1 and page.headings.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(page.headings, page.headings[1:], strict=False))
    assert len(page.ids) == len({*page.ids})
    for tag, attrs in page.tags:
        if "aria-labelledby" in attrs:
            assert attrs["aria-labelledby"] in page.ids, tag
    assert {link[1:] for link in page.links} <= {*page.ids}


def test_without_data(trio, tmp_path):
    """Figures, verdict, classes and commands come from the runs' folders alone; the rest is named."""
    out = write_report(trio)
    assert out == tmp_path / "runs/report.html"
    page = check_safe(out.read_text())
    assert "The teacher helps: +" in page.text
    assert "Measured on 300 test samples and 3 seeds (0, 1, 2)" in page.text
    for name in ("accuracy", "cost", "classes", "configs", "provenance", "commands", "left-out"):
        assert name in page.ids
    for name in ("mistakes", "calibration", "soft_targets", "doctor", "data", "curves", "pseudo_labels"):
        assert name not in page.ids
    assert "Calibration :" in page.text and "Doctor :" in page.text
    for name in NAMES:
        assert name in page.text


def test_roles(trio, tmp_path):
    cast = make_cast(trio)
    assert [(role.kind, role.label, role.group.name) for role in cast.roles] == [
        ("alone", "student alone", "alone"),
        ("method", "distilled", "method"),
        ("teacher", "teacher", "teacher"),
    ]
    alone = make_cast([tmp_path / "runs/alone/version_0"])
    assert alone.main.group.name == "alone" and alone.find("method") is None
    assert verdict_of(alone).kind == "none"


def test_worse_and_unclear(make, tmp_path):
    for seed in range(3):
        make("alone", seed, rows(0.9, 7 + seed), module="SupervisedModule")
        make("bad", seed, rows(0.6 + 0.02 * seed, seed), teacher={"class_path": "x"})
        make("same", seed, rows(0.9, 20 + seed), teacher={"class_path": "x"})
    runs = tmp_path / "runs"
    bad = verdict_of(make_cast([runs / "alone", runs / "bad"]))
    assert bad.kind == "worse" and bad.headline.startswith("The teacher does harm: \N{MINUS SIGN}")
    assert verdict_of(make_cast([runs / "alone", runs / "same"])).kind == "unclear"
    few = verdict_of(make_cast([runs / "alone/version_0", runs / "bad/version_0"]))
    assert few.kind == "none" and "1 common seed; a verdict needs 3" in few.sentence


def test_classes(trio):
    """Shares, changes and losses of classes, counted here from the predictions."""
    content = figure_parts.classes_part(figure_parts.Facts(make_cast(trio)))
    right = {"alone": [rows(0.6, seed) for seed in range(3)]}
    right |= {"method": [rows(0.9 + 0.01 * seed, 10 + seed) for seed in range(3)], "teacher": [rows(0.95, 99)]}
    for number, name in enumerate(NAMES):
        row = next(row for row in content["rows"] if row.name == name)
        assert row.samples == 100
        for kind, values in right.items():
            assert row.shares[kind] == pytest.approx(np.mean(values, axis=0)[number::3].mean())
        assert row.change == pytest.approx(row.shares["method"] - row.shares["alone"])
        assert row.interval[0] < row.change < row.interval[1]
        assert (row in content["lost"]) == (row.change < 0)


def test_a_class_of_few_samples_has_no_interval(trio, monkeypatch):
    """The bootstrap of a handful of samples is far too narrow."""
    monkeypatch.setattr("kd_lightning.report.classes.LEAST", 101)
    content = figure_parts.classes_part(figure_parts.Facts(make_cast(trio)))
    assert all(row.interval is None and not row.clearly for row in content["rows"])


def test_a_part_that_fails_says_so_in_its_place(trio, monkeypatch):
    def fail(facts):
        raise RuntimeError("no <pen>\nsecond line")

    parts = [(name, title, fail if name == "classes" else make) for name, title, make in write._PARTS]
    monkeypatch.setattr(write, "_PARTS", parts)
    with pytest.warns(UserWarning, match="the part Classes failed: RuntimeError: no <pen>"):
        text = write_report(trio).read_text()
    assert "This part could not be made: RuntimeError: no <pen>" in check_safe(text).text
    assert "second line" not in text


def test_not_tested(make):
    folder = make("only", 0, rows(0.5, 0))
    (folder / "test.json").unlink()
    page = check_safe(write_report([folder]).read_text())
    assert "No test figures yet" in page.text and "accuracy" not in page.ids


def test_without_a_test_part(make):
    """The page does not name a command that must fail."""
    folder = make("only", 0, rows(0.5, 0))
    (folder / "test.json").unlink()
    (folder / "samples.json").write_text(json.dumps({"classes": [], "samples": {"labeled": 9, "test": None}}))
    page = check_safe(write_report([folder]).read_text())
    assert "its data have no test part" in page.text and "not yet tested" not in page.text
    assert "kd-lightning fit --config" in page.text and "kd-lightning test" not in page.text


def test_command(trio, tmp_path, capsys):
    main(["report", *map(str, trio), "--out", str(tmp_path / "deep/page.html")])
    assert f"report: {tmp_path / 'deep/page.html'}" in capsys.readouterr().out
    check_safe((tmp_path / "deep/page.html").read_text())
    for args in (["--out", "page.txt"], []):
        with pytest.raises(SystemExit):
            main(["report", *map(str, trio[: len(args)]), *args])
    assert "--out must end in .html, got page.txt" in capsys.readouterr().err


def test_comparison_of_runs_that_are_gone(tmp_path):
    runs = [{"folder": "runs/x/version_0"}]
    (tmp_path / "comparison.json").write_text(json.dumps({"groups": [{"runs": runs}]}))
    with pytest.raises(InputError, match="names the run runs/x/version_0, which is gone"):
        write_report([tmp_path])
    (tmp_path / "comparison.json").write_text("[]")
    with pytest.raises(InputError, match="comparison.json is damaged"):
        write_report([tmp_path])


def test_of_an_experiment(experiment):
    """All parts, also with the comparison alone; what they show is in the predictions of the test."""
    page = check_safe((experiment / "report.html").read_text())
    for name in ("mistakes", "calibration", "soft_targets", "curves", "data", "doctor", "commands", "classes", "cost"):
        assert name in page.ids
    assert "left-out" not in page.ids and "could not be made" not in page.text
    for name in NAMES:
        assert name in page.text
    assert "Measured on 108 test samples and 2 seeds (0, 1)" in page.text
    content = json.loads((experiment / "comparison.json").read_text())
    runs = {group["name"]: Run(group["runs"][0]["folder"]) for group in content["groups"]}
    student, teacher = (
        {row.index: row for row in runs[name].result().predictions()} for name in ("distil & <i>", "teacher")
    )
    lost = [index for index in student if teacher[index].correct and not student[index].correct]
    both = [index for index in student if teacher[index].correct and student[index].correct]
    assert f"{len(both)} both right {len(lost)} only the teacher right" in page.text
    cards = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(cards) == min(24, len(lost)) + 8
    names = {student[index].path.rpartition("/")[2] for index in lost}
    assert {attrs["alt"] for attrs in cards[:-8]} <= names
    error = runs["distil & <i>"].result().figures["calibration_error"]
    assert f"distilled {100 * error:.2f} %" in page.text
    assert "15 labeled" in page.text and "108 test" in page.text
    assert len((experiment / "report.html").read_bytes()) < 1_000_000


def test_commands_repeat_a_run(experiment):
    """The command of the page trains the same weights again."""
    text = (experiment / "report.html").read_text()
    commands = [unescape(command) for command in re.findall(r"<code>kd-lightning (fit .*?)</code>", text)]
    assert len(commands) == 5 and "/teacher/" in commands[0]
    fit, _, test = commands[-1].partition(" && kd-lightning ")
    before = Run(Path(shlex.split(fit)[-1]).parent)
    assert before.name == "distil & <i>" and shlex.split(test)[:2] == ["test", "--config"]
    main(shlex.split(fit))
    after = before.folder.with_name("version_2")
    weights = load_file(before.weights)
    assert all(weights[name].equal(tensor) for name, tensor in load_file(after / before.weights.name).items())


def test_changed_pictures_are_left_out(experiment, tmp_path):
    """Distributions are those of the tested samples, or none."""
    folder = next(path for path in (experiment.parents[1] / "test").iterdir())
    hidden = folder.rename(tmp_path / "away")
    try:
        page = check_safe(write_report([experiment], tmp_path / "page.html").read_text())
    finally:
        hidden.rename(folder)
    assert "mistakes" not in page.ids and "calibration" not in page.ids and "left-out" in page.ids


def test_templates_are_in_the_package():
    """They are package data, also in a wheel."""
    folder = files("kd_lightning.report") / "templates"
    for name, _, _ in write._PARTS:
        assert (folder / "parts" / f"{name}.html.j2").is_file()
    pattern = "report/templates/**"
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'kd_lightning = ["py.typed", "{pattern}"]' in text


def luminance(color):
    parts = [int(color[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1, 2], ids=["light", "dark", "print"])
def test_contrast(theme):
    """WCAG AA: at least 4.5 to 1 for text in each colour on each background."""
    css = (files("kd_lightning.report") / "templates/report.css").read_text()
    block = re.findall(r":root \{(.*?)\}", css, re.DOTALL)[theme]
    colors = {
        name: value if len(value) == 7 else "#" + "".join(2 * letter for letter in value[1:])
        for name, value in re.findall(r"--(\w+): (#\w+);", block)
    }
    backgrounds = [colors.pop(name) for name in ("page", "card", "soft")]
    del colors["rule"]
    assert len(colors) == 11
    for name, color in colors.items():
        for background in backgrounds:
            light, dark = sorted((luminance(color), luminance(background)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, name
