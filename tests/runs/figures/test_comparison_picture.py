"""The picture of a comparison: its message, dots, costs and curves. Groups are made by hand."""

from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from kd_lightning.runs.figures.comparison_picture import describe, draw_comparison
from kd_lightning.runs.figures.run_groups import Group
from kd_lightning.runs.figures.statistics import Difference
from kd_lightning.runs.results import Result

BETTER = Difference(0.06, 3, (0.05, 0.07), (0.04, 0.08))


def group(name, *values, figure="accuracy", costs=None, curve=()):
    runs = {seed: SimpleNamespace(validations=lambda: list(curve), seed=seed) for seed in range(len(values))}
    results = {seed: Result("test", 600, {figure: value}, "", Path()) for seed, value in enumerate(values)}
    return Group(name, runs, results, costs or {})


def test_message_of_an_experiment():
    groups = [group("x_alone", 0.92, 0.93, 0.94), group("x", 0.98, 0.99, 1.0)]
    message, evidence = describe(groups, [None, BETTER], "accuracy", "test")
    assert message == "x gains 6.0 points of accuracy against the same student alone"
    assert evidence == (
        "93.0 % → 99.0 %; +6.0 points (95 % interval over 3 seeds +5.0 … +7.0, over samples +4.0 … +8.0); "
        "n = 600 test samples."
    )


@pytest.mark.parametrize(
    ("found", "figure", "message"),
    [
        (Difference(-0.06, 3, (-0.07, -0.05), (-0.08, -0.04)), "accuracy", "b loses 6.0 points of accuracy against a"),
        (Difference(0.06, 3, (-0.1, 0.2), (0.04, 0.08)), "accuracy", "b and a: no clear difference in accuracy"),
        (Difference(0.06, 1, reasons=["1 seed"]), "accuracy", "b and a: no clear difference in accuracy"),
        (Difference(reasons=["no common seed"]), "accuracy", "Accuracy: a 50.0 %, b 60.0 %"),
        (
            Difference(-0.5, 3, (-1, -0.1), (-1, -0.1), less_is_better=True),
            "mae",
            "b lowers the mean absolute error by 0.5 against a",
        ),
    ],
)
def test_message_follows_the_verdict(found, figure, message):
    """It never claims more than the verdict of the table; missing verdicts have their reasons below."""
    groups = [group("a", 0.5, figure=figure), group("b", 0.6, figure=figure)]
    title, evidence = describe(groups, [None, found], figure, "test")
    assert title == message
    assert all(reason in evidence for reason in found.reasons)


def test_a_group_alone_and_groups_without_figures():
    assert describe([group("a", 0.5)], [None], "accuracy", "val")[0] == "Accuracy: a 50.0 %"
    assert describe([group("a"), group("b")], [None, None], "accuracy", "val")[0] == "Accuracy: not measured"
    draw_comparison([group("a"), group("b")], [None, None], "accuracy", "val")


def test_dots_means_and_curves():
    """A dot for each seed, in percent, also for equal values; curves are means over seeds."""
    curve = [{"step": 5, "val/accuracy": 0.25}, {"step": 9, "val/accuracy": 0.5}]
    a, b = group("a", 0.5, 0.7, 0.7, curve=curve), group("b", 0.9)
    picture = draw_comparison([a, b], [None, Difference()], "accuracy", "test")
    dots, curves = picture.axes
    mean, of_a, of_b = dots.get_lines()
    assert list(mean.get_xdata()) == [pytest.approx(190 / 3)] * 2
    assert list(of_a.get_xdata()) == pytest.approx([50, 70, 70]) and list(of_b.get_xdata()) == [90]
    assert len({*of_a.get_ydata()}) == 3
    bold = max(curves.get_lines(), key=lambda line: line.get_linewidth())
    assert (list(bold.get_xdata()), list(bold.get_ydata())) == ([5, 9], [25, 50])


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_texts_do_not_overlap(count):
    """Neither names, values, ticks nor titles, with names as long as runs have."""
    costs = [{"macs": 10.0 ** (4 + n % 3), "precision": "fp32"} for n in range(count)]
    groups = [
        group(f"distill_{n}_with_a_long_name, lr 0.00{n}", 0.9, 0.91 + n / 900, costs=costs[n]) for n in range(count)
    ]
    picture = draw_comparison(groups, [None, *[BETTER] * (count - 1)], "accuracy", "test")
    canvas = FigureCanvasAgg(picture)
    canvas.draw()
    texts = [*picture.texts]
    for axes in picture.axes:
        texts += [axes._left_title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            texts += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    boxes = [(t.get_text(), t.get_window_extent(canvas.get_renderer())) for t in texts if t.get_text()]
    assert any("MACs" in text and "fewer" in text for text, _ in boxes) == (count > 1)
    for (one, a), (other, b) in combinations(boxes, 2):
        assert not a.overlaps(b), (one, other)
