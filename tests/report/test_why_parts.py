"""The report's parts about why a teacher does not help, and about gradients."""

import pytest

from kd_lightning.report.cast import make_cast
from kd_lightning.report.facts import Facts, same_split
from kd_lightning.report.outputs import Unavailable
from kd_lightning.report.why_parts import balance_part, why_part
from kd_lightning.report.write import write_report
from kd_lightning.runs.run import Run
from kd_lightning.teachers.findings import Finding
from tests.report.test_write import check_safe, rows

LINES = "model:\n  init_args: {soft_weight: 0.5}\n"
FOUND = [
    Finding("labels", "100 labeled"),
    Finding("following", "<b>52 %</b> alike", "train longer", reason="gap"),
    Finding("wrong decisions", "a fifth wrong", "let labels overrule it", reason="wrong", lines=LINES),
    Finding("verdict", "the most probable reason: it errs", severity="warning", reason="wrong"),
]


@pytest.fixture
def planted(monkeypatch):
    """Lets doctor find what is planted."""
    monkeypatch.setattr(Facts, "findings", FOUND)


@pytest.fixture
def runs(make, tmp_path):
    """Runs of a teacher that harms, of one that helps, and of one without effect."""
    for seed in range(3):
        make("alone", seed, rows(0.8, 7 + seed), module="SupervisedModule")
        make("bad", seed, rows(0.5 + 0.02 * seed, seed), teacher={"class_path": "x"})
        make("good", seed, rows(0.97, 40 + seed), teacher={"class_path": "x"})
        make("same", seed, rows(0.8, 20 + seed), teacher={"class_path": "x"})
    return tmp_path / "runs"


@pytest.mark.parametrize(
    ("name", "title"), [("bad", "Why the teacher harms"), ("same", "Why the teacher does not help"), ("good", None)]
)
def test_where_the_teacher_does_not_help(planted, runs, name, title):
    """The most probable reason stands first, with its cure; findings that are fine stand in the doctor's part alone."""
    content = why_part(Facts(make_cast([runs / "alone", runs / name])))
    if title is None:
        assert content is None
        return
    assert content["heading"] == title and content["verdict"] == "The most probable reason: it errs"
    assert [one[1] for one in content["findings"]] == ["wrong decisions", "following"]
    page = check_safe(write_report([runs / "alone", runs / name]).read_text())
    assert "why" in page.ids and title in page.text and "let labels overrule it" in page.text
    assert "init_args: {soft_weight: 0.5}" in page.text and "<b>52 %</b> alike" in page.text  # escaped: a text


@pytest.mark.parametrize(("share", "title"), [(0.5, "Why the teacher may not help"), (0.95, None)])
def test_too_few_samples_for_a_verdict(planted, make, tmp_path, share, title):
    """A mean that is not better is enough."""
    for seed in range(3):
        make("alone", seed, rows(0.75, 7 + seed, 90), module="SupervisedModule")
        make("few", seed, rows(share, seed, 90), teacher={"class_path": "x"})
    facts = Facts(make_cast([tmp_path / "runs/alone", tmp_path / "runs/few"]))
    content = why_part(facts)
    assert facts.verdict.kind == "none" and (content and content["heading"]) == title


def test_without_soft_targets(monkeypatch, runs):
    monkeypatch.setattr(Facts, "findings", FOUND[:1])
    assert why_part(Facts(make_cast([runs / "alone", runs / "bad"]))) is None


def test_without_data(runs):
    """The part is named among those that are left out."""
    facts = Facts(make_cast([runs / "alone", runs / "bad"]))
    with pytest.raises(Unavailable):
        why_part(facts)
    page = check_safe(write_report([runs / "alone", runs / "bad"]).read_text())
    assert "why" not in page.ids and "left-out" in page.ids and "could not be made" not in page.text


def test_gradients(runs):
    """A line for each term, also without the data."""
    for seed in range(3):
        text = "step,gradient/hard,gradient/soft\n" + "".join(f"{k},{1 + seed},{10 - k}\n" for k in range(4))
        (runs / f"bad/version_{seed}/metrics.csv").write_text(text)
    content = balance_part(Facts(make_cast([runs / "alone", runs / "bad"])))
    assert content["finding"] == "" and content["seeds"] == "3 seeds"
    assert "hard 2 at first, 2 at the end; soft 10 at first, 7 at the end" in content["svg"]
    page = check_safe(write_report([runs / "alone", runs / "bad"]).read_text())
    assert "balance" in page.ids and "Gradients of the terms" in page.text


def test_without_gradients(planted, runs):
    assert balance_part(Facts(make_cast([runs / "alone", runs / "bad"]))) is None


def test_runs_of_one_split(runs):
    """A student that has seen the validation samples is not compared on them."""
    cast = make_cast([runs / "alone", runs / "bad"])
    run = Run(runs / "bad/version_1")
    assert same_split(None, run) is None
    assert same_split(cast.find("alone"), run).folder == runs / "alone/version_0"  # none has a seed of the data
    config = (
        (runs / "bad/version_1/config.yaml")
        .read_text()
        .replace("init_args:\n    source", "init_args:\n    seed: 4\n    source")
    )
    (runs / "bad/version_1/config.yaml").write_text(config)
    assert Run(runs / "bad/version_1").seeds[1] == 4
    assert same_split(cast.find("alone"), Run(runs / "bad/version_1")) is None
