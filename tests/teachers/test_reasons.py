"""The verdict: the first reason in the documented order, or none."""

import itertools

import pytest

from kd_lightning.teachers.findings import Finding
from kd_lightning.teachers.reasons import REASONS, verdict


def finding(reason, name="check"):
    return Finding(name, "text", None if reason is None else "hint", reason=reason)


@pytest.mark.parametrize(("first", "second"), [*itertools.pairwise(REASONS)])
def test_the_first_reason_counts(first, second):
    for order in ([finding(second, "b"), finding(first, "a")], [finding(first, "a"), finding(second, "b")]):
        found = verdict([finding(None), *order])
        assert found.reason == first and REASONS[first] in found.text and "(see a)" in found.text
        assert found.severity == "warning" and found.hint is None


def test_no_reason():
    found = verdict([finding(None), Finding("labels", "text", "hint")])  # a warning about something else
    assert found.severity == "info" and found.reason is None and "--tune 20" in found.text
    assert found.text.startswith("no reason found why the teacher should not help")
    assert "why the teacher does not help" in verdict([], helps=False).text


def test_what_runs_show():
    reasons = [finding("wrong")]
    assert verdict(reasons).text.startswith("if the teacher does not help, the most probable reason: ")
    assert verdict(reasons, helps=False).text.startswith("the most probable reason: ")
    found = verdict(reasons, helps=True)
    assert found.severity == "info" and found.reason is None and "the teacher helps" in found.text


def test_how_to_measure():
    """Without finished runs the text says how to make them; not where their outcome is known."""
    command = "kd-lightning experiment CONFIG` trains"
    assert command in verdict([finding("wrong")], measured=False).text
    assert command not in verdict([finding("wrong")]).text + verdict([], measured=False).text
    assert command not in verdict([finding("wrong")], measured=False, helps=False).text


def test_where_experiment_does_not_run():
    found = [verdict(given, measured=None).text for given in ([], [finding("wrong")])]
    assert not any("experiment" in text for text in found) and found[0].endswith("why the teacher should not help")


def test_a_teacher_that_is_no_better_has_no_other_reason():
    order = [*REASONS]
    assert order.index("no better") < min(map(order.index, ("memory", "poor", "views", "wrong", "one-hot", "gap")))
    assert order[-2:] == ["level", "few"]  # they do no harm
