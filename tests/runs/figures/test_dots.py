"""A dot for each seed."""

import pytest

from kd_lightning.runs.figures.dots import plot_seeds

VALUES = {"alone": [84.0, 86.0, 86.0], "distilled, from several teachers": [95.0], "none": []}


@pytest.fixture(scope="module")
def axes():
    return plot_seeds(VALUES, "test accuracy, %").axes[0]


def test_a_dot_for_each_seed(axes):
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    assert [line.get_xdata().tolist() for line in dots] == [[84.0, 86.0, 86.0], [95.0]]
    first = dots[0].get_ydata()
    assert len({*first.tolist()}) == 3  # equal figures lie beside one another
    assert first.mean() == pytest.approx(0) and dots[1].get_ydata().tolist() == [1]


def test_a_line_at_the_mean(axes):
    (line,) = (line for line in axes.lines if line.get_marker() != "o")  # none for a single seed
    assert [*line.get_xdata()] == pytest.approx([256 / 3] * 2)
    assert [text.get_text() for text in axes.texts] == ["85.3", "95.0", "not measured"]


def test_names(axes):
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["alone", "distilled, from several\nteachers", "none"]
    assert axes.get_xlabel() == "test accuracy, % (line: mean)"


def test_form_of_the_means():
    texts = plot_seeds({"a": [0.12345]}, "MAE", text="{:.3g}").axes[0].texts
    assert texts[0].get_text() == "0.123"
