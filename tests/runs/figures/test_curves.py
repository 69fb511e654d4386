"""Curves over training."""

import pytest

from kd_lightning.runs.figures.curves import plot_curves

ALONE = [{1: 60.0, 2: 80.0}, {1: 70.0, 2: 90.0, 3: 95.0}]


@pytest.fixture(scope="module")
def axes():
    return plot_curves({"alone": ALONE, "$distilled": [{1: 90.0, 3: 96.0}]}, "epoch", "accuracy, %").axes[0]


def test_a_thin_line_for_each_seed_and_a_bold_mean(axes):
    lines = [(line.get_linewidth() > 1, [*line.get_xdata()], [*line.get_ydata()]) for line in axes.lines]
    assert lines == [
        (False, [1, 2], [60, 80]),
        (False, [1, 2, 3], [70, 90, 95]),
        (True, [1, 2, 3], [65, 85, 95]),
        (True, [1, 3], [90, 96]),  # one seed is its own mean
    ]
    assert len({line.get_color() for line in axes.lines}) == 2


def test_names(axes):
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["alone", "$distilled"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "accuracy, %")
    assert all(tick == int(tick) for tick in axes.get_xticks())


def test_one_method_has_no_legend():
    assert plot_curves({"alone": ALONE}, "step", "loss").axes[0].get_legend() is None
