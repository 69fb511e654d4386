"""Validation samples that select the deployed weights."""

import pytest
import yaml

from kd_lightning.report.selection_check import selection


@pytest.mark.parametrize(("count", "warns"), [(1, True), (99, True), (100, False), (5000, False)])
def test_count(count, warns):
    found = selection(count, "val/accuracy", [])
    assert (found.severity == "warning") is warns and found.reason is None
    assert f"{count} validation samples select the deployed weights by val/accuracy" in found.text
    assert (yaml.safe_load(found.lines or "") == {"checkpoint": {"monitor": None}}) is warns


def test_interval():
    assert "interval 39.8% to 60.2%" in selection(100, "val/accuracy", []).text  # the published exact interval


def test_early_stopping_needs_the_figure():
    found = selection(20, "val/accuracy", [], stops=True)
    assert found.lines is None and "more samples" in found.hint and "last weights" not in found.hint
