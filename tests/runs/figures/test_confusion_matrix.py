"""The picture of a confusion matrix."""

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from kd_lightning.runs.figures.confusion_matrix import draw_confusion_matrix, row_percent, worst_confusions


def texts(axes):
    return {(round(t.get_position()[1]), round(t.get_position()[0])): t.get_text() for t in axes.texts}


def test_cells_are_row_percent_and_rows_have_their_number():
    counts = np.array([[30, 10, 0], [1, 999, 0], [0, 0, 0]])
    (axes,) = draw_confusion_matrix(counts, ["ant", "$bee$", "a bee"]).axes
    assert texts(axes) == {(0, 0): "75", (0, 1): "25", (1, 0): "0.1", (1, 1): ">99"}
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "ant  (n = 40)",
        "$bee$  (n = 1,000)",
        "a bee  (n = 0)",
    ]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["ant", "$bee$", "a bee"]
    assert axes.figure.get_suptitle() == "1,040 samples: 98.9 % right; cells: % of the true class"


def test_numbers_where_names_do_not_fit():
    (axes,) = draw_confusion_matrix(np.eye(2), ["ant"]).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1"]


def test_many_classes_show_the_worst_confusions():
    counts = 50 * np.eye(300, dtype=int)
    counts[7, 9], counts[250, 3] = 40, 60
    image, bars, *_ = draw_confusion_matrix(counts, [f"class {n}" for n in range(300)]).axes
    names = [label.get_text() for label in bars.get_yticklabels()]
    assert names == ["class 250 → class 3", "class 7 → class 9"]
    assert [t.get_text().strip() for t in bars.texts] == ["55 % (60 of 110)", "44 % (40 of 90)"]
    shown = image.get_images()[0].get_array()
    assert shown.shape == (300, 300) and shown[7, 9] == pytest.approx(400 / 9)
    assert len(image.get_xticks()) < 20  # a tick or a text for each class takes minutes


def test_worst_confusions_against_a_sort():
    counts = np.random.default_rng(0).integers(0, 5, (30, 30))
    share = row_percent(counts)
    pairs = [(a, b) for a in range(30) for b in range(30) if a != b and counts[a, b]]
    expected = sorted(pairs, key=lambda p: (-counts[p], -share[p], *p))[:20]
    assert worst_confusions(counts, 20) == expected


@pytest.mark.parametrize("size", [2, 300])
def test_without_errors_or_samples(size):
    for counts in (np.eye(size), np.zeros((size, size))):
        FigureCanvasAgg(draw_confusion_matrix(counts)).draw()


def test_labels_of_the_multilabel_task():
    counts = np.array([[[6, 2], [1, 3]], [[8, 0], [0, 0]]])
    (axes,) = draw_confusion_matrix(counts, ["ant", "bee"]).axes
    assert texts(axes) == {(0, 0): "75", (0, 1): "25", (0, 2): "25", (0, 3): "75", (1, 0): "100"}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["ant  (n = 4)", "bee  (n = 0)"]


def test_many_labels_show_those_with_the_lowest_recall():
    counts = np.tile([[5, 5], [0, 10]], (120, 1, 1))
    counts[77] = [[5, 5], [9, 1]]
    (axes,) = draw_confusion_matrix(counts).axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names[0] == "77  (n = 10)" and len(names) == 20


def test_long_names_are_cut_in_the_middle():
    (axes,) = draw_confusion_matrix(np.eye(2), ["n01440764_tench_of_the_old_lake", "b"]).axes
    assert axes.get_xticklabels()[0].get_text() == "n01440764_…e_old_lake"
